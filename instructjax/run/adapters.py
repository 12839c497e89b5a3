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

    name: str  # their directory, or `hf:` and their name on the hub
    config: ModelConfig
    params: Params  # in the compute dtype, without an adapter

    def adapted(self, adapter: str, mesh: Mesh) -> tuple[ModelConfig, Params]:
        """The model of an adapter on these weights, whose arrays it shares.

        Whether it was trained on them is for the caller to know; see `hf.check_base`. Errors: as
        for `hf.load_adapter`.
        """
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


def base_of(adapter: str) -> str:
    """`hf.adapter_base` of an adapter that is going to be put on it.

    Raises:
      FileNotFoundError: it is a directory that is not there.
    """
    base = hf.adapter_base(adapter)
    if os.path.isabs(base) and not os.path.isdir(base):
        raise FileNotFoundError(
            f"{adapter}/adapter_config.json: base_model_name_or_path {base}: no such directory; if"
            " it was moved, write there where it is"
        )
    return base


def load_weights(
    where: str, mesh: Mesh, merged: bool, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """`hf.load` of a model, or of an adapter with its base.

    Args:
      merged: whether an adapter is merged into its base, or stays among the parameters.
      dtype: see `hf.load`. A sum of base and adapter is rounded once.

    Raises:
      ValueError: the base's weights are others than those that the adapter was trained on.
    """
    if not hf.is_adapter(where):
        return hf.load(where, mesh, dtype)
    name = base_of(where)
    hf.check_base(where, name)
    config, base = hf.load(name, mesh, "float32" if merged else dtype)
    config, trained = hf.load_adapter(where, config, mesh)
    params = _under(base, trained)
    del base
    if not merged:
        return config, params
    adapter = {"adapter": params.pop("adapter")}
    layout = jax.tree.map(lambda leaf: leaf.sharding, params)

    @functools.partial(jax.jit, out_shardings=layout, donate_argnums=0)  # not two bases at once
    def merge(base: Params, adapter: Params) -> Params:
        return models.cast(models.merge({**base, **adapter}, config), dtype)

    return dataclasses.replace(config, adapter_scale=1.0), merge(params, adapter)


def load_config(where: str) -> ModelConfig:
    """`hf.load_config` of a model, or of an adapter with its base."""
    if not hf.is_adapter(where):
        return hf.load_config(where)
    described = hf.describe_adapter(where, hf.load_config(base_of(where)))
    return dataclasses.replace(described.config, adapter_scale=1.0)


def full_name(weights: str) -> str:
    """A name that means the same in every folder: an absolute path, or `hf:` and a hub's name."""
    hub = hf.hub_name(weights)
    return f"hf:{hub}" if hub is not None else os.path.abspath(os.path.expanduser(weights))


def same(base: str, other: str) -> bool:
    """Whether two names are of the same directory, or the same on the hub."""
    return os.path.realpath(full_name(base)) == os.path.realpath(full_name(other))
