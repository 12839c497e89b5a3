"""Frozen models, and arrays that wait in host memory for the phase that uses them."""

import functools
from dataclasses import dataclass
from typing import Any

import jax

from instructjax.models import Params


def freeze(params: Params, dtype: str) -> Params:
    """A copy in the compute dtype, but for what computes in float32 in a trained model too.

    Norms rounded to bfloat16 would be another model than the policy, and KL not 0 at the start.
    """

    def cast(path, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return x if "norm" in name or "score" in name else x.astype(dtype)

    return jax.jit(functools.partial(jax.tree_util.tree_map_with_path, cast))(params)


@dataclass(frozen=True)
class Offloaded:
    """A tree of arrays in host memory; see `to_host`."""

    tree: Any
    layout: Any  # shardings on the devices; None: the arrays never left them

    def on_device(self) -> Any:
        """The arrays on their devices. A copy made for it is freed with the result."""
        return self.tree if self.layout is None else jax.device_put(self.tree, self.layout)


def to_host(tree: Any, enabled: bool) -> Offloaded:
    """Copies arrays to pinned host memory, each device's shards to its own host.

    The buffers on the devices are freed with the last reference to `tree`.

    Args:
      enabled: whether `--offload` was given; if not, the arrays stay where they are.
    """
    if not enabled:
        return Offloaded(tree, None)
    layout = jax.tree.map(lambda x: x.sharding, tree)
    host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), layout)
    return Offloaded(jax.device_put(tree, host), layout)
