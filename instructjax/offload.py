"""Frozen models, and arrays that wait in host memory for the phase that uses them."""

from dataclasses import dataclass
from typing import Any

import jax

from instructjax import models
from instructjax.models import Params


def freeze(params: Params, dtype: str) -> Params:
    """A copy in the compute dtype; see `models.cast`."""
    return jax.jit(models.cast, static_argnums=1)(params, dtype)


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
