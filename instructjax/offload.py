"""Frozen parameters that rest in host memory between the phases that need them."""

import functools
from dataclasses import dataclass

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
    """Parameters, and where they are to be used; see `rest`."""

    params: Params
    layout: Params | None  # shardings to bring them to; None where they stay

    def awake(self) -> Params:
        """The parameters on their devices; drop the result, and a copy made for it is freed."""
        return self.params if self.layout is None else jax.device_put(self.params, self.layout)


def rest(params: Params, offload: bool) -> Resting:
    """Moves parameters to pinned host memory, each device's shards to its own host."""
    if not offload:
        return Resting(params, None)
    layout = jax.tree.map(lambda x: x.sharding, params)
    host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), layout)
    return Resting(jax.device_put(params, host), layout)
