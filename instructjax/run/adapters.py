"""Where the adapter of a model is, and the model with its adapter.

runs/sft          a run with --lora.rank has adapter/, and export/ with the merged weights
some/directory    what peft wrote: adapter_config.json, which names the base, and no config.json
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from instructjax import hf, models
from instructjax.models import ModelConfig, Params


class Base(NamedTuple):
    """Frozen weights that several models share."""

    name: str  # their directory or name on the hub
    config: ModelConfig
    params: Params  # in the compute dtype, without an adapter

    def adapted(self, adapter: str, mesh: Mesh) -> tuple[ModelConfig, Params]:
        """The model of an adapter on these weights, whose arrays it shares."""
        config, trained = hf.load_adapter(adapter, self.config, mesh)
        return config, _under(self.params, trained)


def _under(base: Params, trained: Params) -> Params:
    """The base with an adapter. A scalar head takes the unembedding's place."""
    dropped = ("unembed", "score") if "score" in trained else ()
    return {name: tree for name, tree in base.items() if name not in dropped} | trained


def adapter_of(model: str) -> str | None:
    """The directory or hub name of a model's adapter; None if it has none."""
    inner = Path(os.path.expanduser(model)) / "adapter"
    if hf.hub_name(model) is None and (inner / "adapter_config.json").is_file():
        return str(inner)
    return model if hf.is_adapter(model) else None


def load_weights(where: str, mesh: Mesh, merged: bool) -> tuple[ModelConfig, Params]:
    """`hf.load` of a model, or of an adapter with its base.

    Args:
      merged: whether an adapter is merged into its base, or stays among the parameters.
    """
    if not hf.is_adapter(where):
        return hf.load(where, mesh)
    config, base = hf.load(base_of(where), mesh)
    config, adapter = hf.load_adapter(where, config, mesh)
    params = _under(base, adapter)
    if not merged:
        return config, params
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    layout.pop("adapter")
    merge = jax.jit(functools.partial(models.merge, config=config), out_shardings=layout)
    return dataclasses.replace(config, adapter_scale=1.0), merge(params)


def load_config(where: str) -> ModelConfig:
    """`hf.load_config` of a model, or of an adapter with its base."""
    if not hf.is_adapter(where):
        return hf.load_config(where)
    config, _ = hf.describe_adapter(where, hf.load_config(base_of(where)))
    return dataclasses.replace(config, adapter_scale=1.0)


def base_of(adapter: str) -> str:
    """The directory or hub name of the weights that an adapter changes."""
    base = hf.adapter_base(adapter)
    export = Path(os.path.expanduser(base)) / "export"
    return str(export) if (export / "config.json").is_file() else base


def same(base: str, other: str) -> bool:
    """Whether two names are of the same weights."""
    names = [hf.hub_name(x) or os.path.realpath(os.path.expanduser(x)) for x in (base, other)]
    return names[0] == names[1]
