"""Arrays that rest in host memory between the phases that need them."""

from dataclasses import dataclass
from typing import Any

import jax

from instructjax import models
from instructjax.models import Params


def freeze(params: Params, dtype: str) -> Params:
    """A copy in the compute dtype; see `models.cast`."""
    return jax.jit(models.cast, static_argnums=1)(params, dtype)


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
