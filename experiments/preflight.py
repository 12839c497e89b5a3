"""What a preset needs on a TPU slice, and how long it takes at best, without having the slice.

    python experiments/preflight.py --topology v5e:16x16 --mesh fsdp=32,tensor=8   # instructgpt-6b
    python experiments/preflight.py --preset instructgpt-1.3b --topology v5e --search
    python experiments/preflight.py --stages sft --model DIR --topology v5p:4x4x4 --remat full

Compiles the programs that run_sft.py, run_rm.py and run_ppo.py jit, for the slice, with libtpu and
no TPU: memory and collectives are the compiler's own, times an estimate. Nothing is run, no weights
are read.

Hardware: any Linux machine on x86-64 with `pip install instructjax[preflight]`.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ppo_config
import run_rm
import run_sft
import tyro
from jax.sharding import Mesh
from preflight_programs import ppo_programs, rm_step, sft_step
from rich.console import Console

from instructjax import preflight, sharding
from instructjax.hf import configs
from instructjax.models import PRESETS, ModelConfig
from instructjax.run import main

# What a preset of the paper trains; others need --model.
MODELS = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6b", "175b": "gpt3-175b"}

Stage = Literal["sft", "rm", "ppo"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compile, and for what."""

    topology: str
    """A slice, as v5e:16x16 or v5p:4x4x4; with --search a type of chip, as v5e."""
    num_slices: int = 1
    """How many such slices, joined by the data-centre network, whose time is not estimated."""
    search: bool = False
    """Try the slices of this type, smallest first, and on each all meshes, until one fits."""
    stages: tuple[Stage, ...] = ("sft", "rm", "ppo")
    """Whose programs to compile."""
    preset: str = "instructgpt-6b"
    """Of run_sft.py and run_ppo.py. The reward model is trained with the paper's one preset."""
    model: str | None = None
    """A preset of models, or a directory with a Hugging Face config.json; default: the preset's."""
    reward_model: str | None = None
    """Likewise, of the reward model and the value net; default: gpt3-6b, the paper's, where the
    preset names the model, or else --model."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1`; by default all are `fsdp`."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass recomputes; default: the preset's."""
    batch_size: int | None = None
    """Rows of a step of SFT and RM, episodes of an iteration of PPO; default: the preset's."""
    microbatches: int | None = None
    """Shares of a batch, or of a minibatch and of its text, whose gradients are accumulated;
    default: the preset's."""
    sample_batch: int | None = None
    """As in run_ppo.py: prompts that are sampled at a time; default: all of an iteration's."""
    shard_sequence: bool = False
    """As in the scripts: activations between sublayers are split over `tensor` too."""
    offload: bool = False
    """As in run_ppo.py."""
    out: Path | None = None
    """Write all figures to this file, as JSON."""


def run_preflight(config: Config) -> None:
    if config.search:
        found = search(config)
    else:
        topology = preflight.parse_topology(config.topology, config.num_slices)
        found = analyse(config, topology, config.mesh)
    if config.out is not None:
        config.out.write_text(json.dumps([each.json() for each in found], indent=2) + "\n")


def search(config: Config) -> list[preflight.Program]:
    """The programs on the smallest slice, and its first mesh and microbatches, that they fit.

    Meshes are tried from all `fsdp` on, with `tensor` twice as large each time: what it splits
    has more collectives. Unless the flags are given, microbatches are doubled while what does not
    fit is the work on a batch, and prompts are sampled half as many at a time while it is the
    rollout, as long as the batch divides.
    """
    check(config)
    for one in preflight.slices(config.topology):
        topology = dataclasses.replace(one, num_slices=config.num_slices)
        meshes = [config.mesh] if config.mesh else meshes_of(topology.devices)
        for mesh in meshes:
            tried = config
            while tried is not None:
                try:
                    found = analyse(tried, topology, mesh, until=lambda program: not program.fits)
                except ValueError as error:  # the mesh, or the batch, does not divide
                    print(f"{topology.name} {mesh}: {error}")
                    break
                if all(program.fits for program in found):
                    print(f"all of it fits with {flags(tried, topology, mesh)}")
                    return found
                shards = topology.devices // sharding.parse_mesh(mesh).get("tensor", 1)
                tried = in_smaller_parts(config, tried, found[-1], shards)
                if tried is not None:
                    print(f"again with {flags(tried, topology, mesh)}")
    raise ValueError(f"--search: it fits no slice of {config.topology} with these flags")


def in_smaller_parts(
    given: Config, tried: Config, failed: preflight.Program, shards: int
) -> Config | None:
    """The flags with which a program that did not fit takes less; None where no flag helps.

    Args:
      given: the flags as they came: what was given stays.
      tried: those that it did not fit with.
      shards: of a batch; fewer prompts than that are not sampled at a time.
    """
    room = failed.usable - (failed.memory.peak - failed.memory.temporaries)
    if room <= 0:
        return None
    # Half the rows take half the memory at the least.
    parts = 2 ** max(1, math.ceil(math.log2(failed.memory.temporaries / room)))
    if failed.name in ("prefill", "rollout") and given.sample_batch is None:
        episodes = preset(given, ppo_config.PRESETS).batch_size
        smaller = (tried.sample_batch or episodes) // parts
        return dataclasses.replace(tried, sample_batch=smaller) if smaller >= shards else None
    shared = failed.name.endswith("gradient") or failed.name in ("SFT step", "RM step")
    if shared and given.microbatches is None:
        return dataclasses.replace(tried, microbatches=parts * (tried.microbatches or 1))
    return None


def flags(config: Config, topology: preflight.Topology, mesh: str) -> str:
    """What to give preflight.py, and the mesh and parts also the scripts."""
    said = f"--topology {topology.slice} --mesh {mesh}"
    if topology.num_slices > 1:
        said += f" --num_slices {topology.num_slices}"
    for name in ("microbatches", "sample_batch"):
        if getattr(config, name) is not None:
            said += f" --{name} {getattr(config, name)}"
    return said


def check(config: Config) -> None:
    """Raises ValueError for what is wrong on every slice."""
    for stage, presets in (("sft", run_sft.PRESETS), ("ppo", ppo_config.PRESETS)):
        if stage in config.stages:
            preset(config, presets)
    describe(config)
    describe_reward_model(config)


def meshes_of(devices: int) -> list[str]:
    """`fsdp` and `tensor` of up to 32 that make so many devices."""
    sizes = [1, 2, 4, 8, 16, 32]
    return [f"fsdp={devices // t},tensor={t}" for t in sizes if devices % t == 0]


def analyse(
    config: Config,
    topology: preflight.Topology,
    mesh: str,
    until: Any = lambda program: False,
) -> list[preflight.Program]:
    """Compiles the stages' programs for a slice, and prints what came of it.

    Args:
      until: of a Program: whether to compile no more.
    """
    try:
        devices = preflight.make_mesh(topology, mesh)
    except ModuleNotFoundError as error:  # libtpu
        raise OSError(str(error)) from error
    console = Console()
    if not console.is_terminal:  # in a file the tables need not fit a terminal
        console = Console(width=120)
    every = []
    for stage in config.stages:
        found: list[preflight.Program] = []
        # All of a stage first: what does not divide is known before anything is compiled.
        programs = list(programs_of(stage, config, devices))
        # Nor is the rest, if one is enough and it has no room for its arguments alone.
        held = [preflight.held(each, topology) for each in programs]
        too_large = [known.memory.peak > known.usable and until(known) for known in held]
        if any(too_large):
            programs = [programs[too_large.index(True)]]
        elif config.search:
            # Where what holds most does not fit, the rest is not compiled. The steps compile in a
            # few seconds, beside the rollout.
            first = "rollout", "policy step", "value step"
            programs.sort(
                key=lambda each: (each.name not in first, not each.name.endswith("gradient"))
            )
        where, began = f"{topology.name}, {stage}", time.perf_counter()
        compiled = preflight.analyse(programs, topology, until)
        with contextlib.closing(compiled), console.status(f"{where}: compiling") as status:
            for number, (each, those) in enumerate(zip(programs, compiled, strict=False), start=1):
                found += those
                seconds = time.perf_counter() - began
                status.update(f"{where}: {number} of {len(programs)} compiled, {seconds:.0f} s")
                if not console.is_terminal and not any(too_large):
                    print(f"{where}: {each.name} compiled, {seconds:.0f} s", flush=True)
        console.print(*preflight.tables(found))
        for program in found:
            console.print(preflight.verdict(program), soft_wrap=True)
        every += found
        if until(found[-1]):
            break
    console.print(preflight.ASSUMPTIONS, soft_wrap=True)
    return every


def programs_of(stage: Stage, config: Config, mesh: Mesh) -> Iterator[preflight.Compilable]:
    """The jitted functions of a script, as the preset has them.

    Raises:
      ValueError: no such preset or model, or a batch does not divide over the mesh.
    """
    if stage == "sft":
        yield sft_step(preset(config, run_sft.PRESETS), describe(config), mesh)
    elif stage == "rm":
        flags = dataclasses.replace(config, preset="instructgpt-6b")
        yield rm_step(preset(flags, run_rm.PRESETS), describe_reward_model(config), mesh)
    else:
        script = preset(config, ppo_config.PRESETS)
        yield from ppo_programs(script, describe(config), describe_reward_model(config), mesh)


# ------------------------------------------------------------------------------------- helpers


def preset(config: Config, presets: dict[str, Any]) -> Any:
    """A script's preset, with the flags that were given."""
    if config.preset not in presets:
        raise ValueError(f"--preset {config.preset}: not one of {', '.join(presets)}")
    found = presets[config.preset]
    names = {"remat", "batch_size", "shard_sequence"}
    if isinstance(found, ppo_config.Config):
        extra = {"offload": config.offload, "sample_batch": config.sample_batch}
        found = dataclasses.replace(found, **extra)
        if config.microbatches:
            shares = {"microbatches": config.microbatches}
            ppo = dataclasses.replace(found.ppo, **shares)
            # As many rows of text at a time as episodes.
            shares["microbatches"] *= found.ptx.ratio
            ptx = dataclasses.replace(found.ptx, **shares)
            found = dataclasses.replace(found, ppo=ppo, ptx=ptx)
    else:
        names.add("microbatches")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(found, **given)


def describe_reward_model(config: Config) -> ModelConfig:
    """The paper's, for models of all sizes (section 3.5), or one like the model."""
    default = config.model or "gpt3-6b"
    return describe(dataclasses.replace(config, model=config.reward_model or default))


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


def cli(argv: Sequence[str] | None = None) -> None:
    run_preflight(tyro.cli(Config, args=argv, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    main(cli)
