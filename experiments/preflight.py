"""What a preset needs on a TPU slice, and how long it takes at best, without having the slice.

    python experiments/preflight.py --preset instructgpt-6b --topology v5e:8x8 \
--mesh fsdp=16,tensor=4
    python experiments/preflight.py --preset instructgpt-1.3b --topology v5e --search
    python experiments/preflight.py --preset instructgpt-6b --model DIR --topology v5p:4x4x4 \
--mesh fsdp=16,tensor=4 --remat full

Compiles the SFT step of run_sft.py for the slice, with libtpu and no TPU: memory and collectives
are the compiler's own, times an estimate. Nothing is run, no weights are read.

Hardware: any Linux machine on x86-64 with `pip install instructjax[preflight]`.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import run_sft
import tyro
from jax.sharding import Mesh
from rich.console import Console

from instructjax import models, preflight, sft, sharding, state, train
from instructjax.hf import configs
from instructjax.models import PRESETS, ModelConfig
from instructjax.run import main

# What a preset of the paper trains; others need --model.
MODELS = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6b", "175b": "gpt3-175b"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile, and for what."""

    topology: str
    """A slice, as v5e:16x16 or v5p:4x4x4; with --search a type of chip, as v5e."""
    search: bool = False
    """Try the slices of this type, smallest first, until one fits."""
    preset: str = "instructgpt-6b"
    """Of run_sft.py."""
    model: str | None = None
    """A preset of models, or a directory with a Hugging Face config.json; default: the preset's."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1`; by default all are `fsdp`."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes; default: the preset's."""
    batch_size: int | None = None
    """Rows of a step; default: the preset's."""
    microbatches: int | None = None
    """Shares of a batch whose gradients are accumulated; default: the preset's."""
    out: Path | None = None
    """Write all figures to this file, as JSON."""


class Compilable(NamedTuple):
    """A jitted function with what it is called with."""

    jitted: Any
    args: tuple[Any, ...]  # trees of ShapeDtypeStructs with shardings


def run_preflight(config: Config) -> None:
    script, model = flags(config), describe(config)
    if config.search:
        found = search(config, script, model)
    else:
        topology = preflight.parse_topology(config.topology)
        found = analyse(topology, config.mesh, script, model)
    if config.out is not None:
        config.out.write_text(json.dumps([each.json() for each in found], indent=2) + "\n")


def search(config: Config, script: run_sft.Config, model: ModelConfig) -> list[preflight.Program]:
    """The programs on the smallest slice that they fit."""
    for topology in preflight.slices(config.topology):
        try:
            found = analyse(topology, config.mesh, script, model)
        except ValueError as error:  # the mesh, or the batch, does not divide
            print(f"{topology.name}: {error}")
            continue
        if all(program.fits for program in found):
            return found
    raise ValueError(f"--search: it fits no slice of {config.topology} with these flags")


def analyse(
    topology: preflight.Topology, mesh: str, script: run_sft.Config, model: ModelConfig
) -> list[preflight.Program]:
    """Compiles the preset's programs for a slice, and prints what came of it."""
    try:
        devices = preflight.make_mesh(topology, mesh)
    except ModuleNotFoundError as error:  # libtpu
        raise OSError(str(error)) from error
    found = [
        preflight.analyse(name, each.jitted, each.args, topology)
        for name, each in programs(script, model, devices)
    ]
    console = Console()
    console.print(*preflight.tables(found))
    console.print(preflight.ASSUMPTIONS, soft_wrap=True)
    for program in found:
        console.print(preflight.verdict(program), soft_wrap=True)
    return found


# ------------------------------------------------------------------------------------ programs


def programs(
    script: run_sft.Config, model: ModelConfig, mesh: Mesh
) -> Iterator[tuple[str, Compilable]]:
    """The jitted functions of the scripts that the preset is of, by name."""
    yield "SFT step", sft_step(script, model, mesh)


def sft_step(script: run_sft.Config, model: ModelConfig, mesh: Mesh) -> Compilable:
    """As run_sft.py makes it.

    Raises:
      ValueError: the batch does not divide.
    """
    check_rows(script.batch_size, script.microbatches, mesh)
    computed = {"dtype": script.model_dtype, "remat": script.remat, "unroll": script.unroll}
    model = dataclasses.replace(model, **computed)
    params = abstract_params(model, mesh)
    tx = train.adam(optax.cosine_decay_schedule(script.learning_rate, 1000, alpha=0.1))
    layout = state.shardings(params, tx)
    dropped = dataclasses.replace(model, dropout=script.dropout)
    loss_fn = functools.partial(sft.loss_fn, config=dropped, shard=sharding.constrainer(mesh))
    step = train.make_train_step(loss_fn, tx, script.microbatches, layout)
    start = jax.eval_shape(
        lambda params: state.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)), params
    )
    dtypes = {"tokens_BT": "int32", "segments_BT": "int32", "positions_BT": "int32"}
    dtypes |= {"mask_BT": "bool"}
    shape, where = (script.batch_size, script.length), sharding.batched(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, dtype in dtypes.items()
    }
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))
    return Compilable(step, (jax.tree.map(placed, start, layout), batch, key))


# ------------------------------------------------------------------------------------- helpers


def check_rows(rows: int, microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError, with a mesh that would do, unless a batch divides over this one."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * microbatches):
        said = f"--batch_size {rows}: does not divide over {shards} shards of the batch, in"
        said += f" {microbatches} microbatches"
        divide = [n for n in range(1, mesh.size) if mesh.size % n + rows % (n * microbatches) == 0]
        if divide:
            said += (
                f"; more tensor in --mesh, as fsdp={divide[-1]},tensor={mesh.size // divide[-1]}"
            )
        raise ValueError(said)


def flags(config: Config) -> run_sft.Config:
    """The preset, with the flags that were given.

    Raises:
      ValueError: there is no such preset.
    """
    if config.preset not in run_sft.PRESETS:
        raise ValueError(f"--preset {config.preset}: not one of {', '.join(run_sft.PRESETS)}")
    changes = {name: getattr(config, name) for name in ("remat", "batch_size", "microbatches")}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(run_sft.PRESETS[config.preset], **given)


def describe(config: Config) -> ModelConfig:
    """The model's sizes; no weights.

    Raises:
      ValueError: there is no such model.
    """
    size = config.preset.removeprefix("instructgpt-").split("-")[0]
    model = config.model or MODELS.get(size)
    if model is None:
        raise ValueError(f"--preset {config.preset} names no model of its own: --model NAME|DIR")
    if model in PRESETS:
        return PRESETS[model]
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"--model {model}: not one of {', '.join(PRESETS)}, and no config.json")
    return configs.from_hf(configs.transformers().AutoConfig.from_pretrained(model), model)


def abstract_params(model: ModelConfig, mesh: Mesh) -> models.Params:
    """Parameters as ShapeDtypeStructs, laid out for training."""
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    layout = sharding.shardings(models.logical_axes(model), shapes, mesh)
    return jax.tree.map(placed, shapes, layout)


def placed(shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def cli(argv: Sequence[str] | None = None) -> None:
    run_preflight(tyro.cli(Config, args=argv, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    main(cli)
