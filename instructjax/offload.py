"""Arrays that rest in host memory between the phases that need them."""

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
class Resting:
    """A tree of arrays, and where they are to be used; see `rest`."""

    tree: Any
    layout: Any  # shardings to bring them to; None where they stay

    def awake(self) -> Any:
        """The arrays on their devices; drop the result, and a copy made for it is freed."""
        return self.tree if self.layout is None else jax.device_put(self.tree, self.layout)


def rest(tree: Any, offload: bool) -> Resting:
    """Copies arrays to pinned host memory, each device's shards to its own host.

    The buffers on the devices are freed with the last reference to `tree`.
    """
    if not offload:
        return Resting(tree, None)
    layout = jax.tree.map(lambda x: x.sharding, tree)
    host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), layout)
    return Resting(jax.device_put(tree, host), layout)
