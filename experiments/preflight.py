"""The memory and best-case time of a preset on a TPU slice, estimated without the slice.

    python experiments/preflight.py --topology v5e:16x16 --mesh fsdp=32,tensor=8   # instructgpt-6b
    python experiments/preflight.py --preset instructgpt-1.3b --topology v5e --search
    python experiments/preflight.py --stages sft --model DIR --topology v5p:4x4x4 --remat full

Compiles for the slice the programs that run_sft.py, run_rm.py and run_ppo.py jit. libtpu compiles
them without a TPU. Memory and collectives are the compiler's, times are an estimate. Nothing runs,
and no weights are read.

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
from jax.sharding import AbstractMesh, Mesh
from preflight_programs import check_rows, ppo_programs, rm_step, sft_step
from rich.console import Console

from instructjax import preflight, ranges, sharding, usage
from instructjax.models import ModelConfig
from instructjax.ranges import Count
from instructjax.run import RunConfig, main, pretrained
from instructjax.run.flags import refuse_bucket

# The models that the paper's presets train; other presets need --model.
MODELS = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6b", "175b": "gpt3-175b"}

Stage = Literal["sft", "rm", "ppo"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The programs to compile, and the slice to compile them for."""

    topology: str
    """A slice, such as v5e:16x16 or v5p:4x4x4; with --search a type of chip, such as v5e."""
    num_slices: Count = 1
    """Number of such slices, joined by the data-centre network, whose time is not estimated."""
    search: bool = False
    """Try the slices of this type, smallest first, with each mesh in turn, until one fits."""
    stages: tuple[Stage, ...] = ("sft", "rm", "ppo")
    """Stages whose programs are compiled."""
    preset: str = "instructgpt-6b"
    """Preset of run_sft.py and run_ppo.py. The reward model's is always instructgpt-6b."""
    model: str | None = None
    """Policy: a preset of models, a run directory, a Hugging Face directory or a hub name.
    [The size of --preset]"""
    reward_model: str | None = None
    """Reward model and value net: as --model. [--model if given, else gpt3-6b, as in the paper]"""
    mesh: str = ""
    """Number of devices along each axis, such as `data=2,fsdp=-1`; by default all are `fsdp`."""
    remat: Literal["none", "dots", "full"] | None = None
    """Activations that the backward pass recomputes. [The preset's value]"""
    batch_size: Count | None = None
    """Rows of a step of SFT and RM, episodes of an iteration of PPO. [The preset's value]"""
    microbatches: Count | None = None
    """Number of parts of a batch (in PPO: of a minibatch and of its ptx text) whose gradients are
    accumulated. [The preset's value]"""
    sample_batch: Count | None = None
    """Number of prompts that run_ppo.py samples at a time. [All prompts of an iteration]"""
    shard_sequence: bool = False
    """Split activations between sublayers over the `tensor` axis too, as the scripts' flag does."""
    offload: bool = False
    """Move models to host memory while they are not in use, as run_ppo.py's flag does."""
    out: Path | None = None
    """File that all figures are written to, as JSON."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.out is not None:
            refuse_bucket("--out", self.out, "a file on a disk")
        sharding.parse_mesh(self.mesh)
        if not self.stages:
            raise ValueError("--stages: give at least one of sft, rm, ppo")


def run_preflight(config: Config) -> None:
    if config.search:
        programs = search(config)
    else:
        topology = preflight.parse_topology(config.topology, config.num_slices)
        programs = analyse(config, topology, config.mesh)
    if config.out is not None:
        config.out.write_text(json.dumps([each.json() for each in programs], indent=2) + "\n")


def search(config: Config) -> list[preflight.Program]:
    """The programs on the smallest slice that fits them, with the first mesh and parts that fit.

    The first mesh is all `fsdp`. Each next one doubles `tensor`, which needs more collectives. If a
    step or gradient does not fit, the number of microbatches grows; if the rollout does not fit,
    fewer prompts are sampled at a time. Both stop when the batch no longer divides, and neither
    changes a flag that was given.
    """
    for single in preflight.slices(config.topology):
        topology = dataclasses.replace(single, num_slices=config.num_slices)
        meshes = [config.mesh] if config.mesh else meshes_of(topology.devices)
        for mesh in meshes:
            tried = config
            while tried is not None:
                try:
                    programs = analyse(tried, topology, mesh, until=lambda each: not each.fits)
                except ValueError as error:  # the mesh, or the batch, does not divide
                    print(f"{topology.name} {mesh}: {error}")
                    break
                if all(program.fits for program in programs):
                    print(f"everything fits with {flags(tried, topology, mesh)}")
                    return programs
                shards = topology.devices // sharding.parse_mesh(mesh).get("tensor", 1)
                tried = in_smaller_parts(config, tried, programs[-1], shards)
                if tried is not None:
                    print(f"trying {flags(tried, topology, mesh)}")
    raise ValueError(f"--search: no slice of {config.topology} is large enough with these flags")


def in_smaller_parts(
    given: Config, tried: Config, failed: preflight.Program, shards: int
) -> Config | None:
    """More microbatches or fewer prompts for a program that did not fit; None if neither helps.

    Args:
      given: the user's flags, which are not changed.
      tried: the flags with which the program did not fit.
      shards: number of shards of a batch; at least so many prompts are sampled at a time.
    """
    room = failed.usable - (failed.memory.peak - failed.memory.temporaries)
    if room <= 0:
        return None
    # Half the rows take at least half the memory.
    parts = 2 ** max(1, math.ceil(math.log2(failed.memory.temporaries / room)))
    if failed.name in ("prefill", "rollout") and given.sample_batch is None:
        episodes = preset(given, ppo_config.PRESETS).batch_size
        smaller = (tried.sample_batch or episodes) // parts
        return dataclasses.replace(tried, sample_batch=smaller) if smaller >= shards else None
    splits = failed.name.endswith("gradient") or failed.name in ("SFT step", "RM step")
    if splits and given.microbatches is None:
        return dataclasses.replace(tried, microbatches=parts * (tried.microbatches or 1))
    return None


def flags(config: Config, topology: preflight.Topology, mesh: str) -> str:
    """The command-line flags of a trial."""
    text = f"--topology {topology.slice} --mesh {mesh}"
    if topology.num_slices > 1:
        text += f" --num_slices {topology.num_slices}"
    for name in ("microbatches", "sample_batch"):
        if getattr(config, name) is not None:
            text += f" --{name} {getattr(config, name)}"
    return text


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is compiled."""
    if config.out is not None and not config.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {config.out}: no directory {config.out.parent}")
    if config.out is not None and config.out.is_dir():
        raise IsADirectoryError(f"--out {config.out}: is a directory; give a file in it")
    scripts = [script_config(stage, config) for stage in config.stages]
    describe(config)
    describe_reward_model(config)
    if config.search:
        next(preflight.slices(config.topology))
        return
    topology = preflight.parse_topology(config.topology, config.num_slices)
    sizes = sharding.axis_sizes(topology.devices, **sharding.parse_mesh(config.mesh))
    for script in scripts:
        check_rows(script, AbstractMesh(sizes, sharding.AXES))


def meshes_of(devices: int) -> list[str]:
    """Meshes of `fsdp` and `tensor` with that many devices in all; `tensor` is at most 32."""
    sizes = [1, 2, 4, 8, 16, 32]
    return [f"fsdp={devices // t},tensor={t}" for t in sizes if devices % t == 0]


def analyse(
    config: Config,
    topology: preflight.Topology,
    mesh: str,
    until: Any = lambda program: False,
) -> list[preflight.Program]:
    """Compiles the stages' programs for a slice, and prints tables and verdicts.

    Args:
      until: function of a Program; if true, no further program is compiled.
    """
    try:
        devices = preflight.make_mesh(topology, mesh)
    except ModuleNotFoundError as error:  # libtpu is missing
        raise OSError(str(error)) from error
    console = Console()
    if not console.is_terminal:  # output to a file has no terminal's width
        console = Console(width=120)
    all_stages = []
    for stage in config.stages:
        analysed: list[preflight.Program] = []
        # `list` makes every program before any is compiled, so sizes that do not divide fail early.
        programs = list(programs_of(stage, config, devices))
        # A program whose arguments alone do not fit may settle the answer without compiling.
        bounds = [preflight.lower_bound(each, topology) for each in programs]
        too_large = [bound.memory.peak > bound.usable and until(bound) for bound in bounds]
        if any(too_large):
            programs = [programs[too_large.index(True)]]
        elif config.search:
            # The largest programs come first, because the search stops at one that does not fit.
            # The steps compile in seconds, in parallel with the rollout.
            first = "rollout", "policy step", "value step"
            programs.sort(
                key=lambda each: (each.name not in first, not each.name.endswith("gradient"))
            )
        where, began = f"{topology.name}, {stage}", time.perf_counter()
        compiled = preflight.analyse(programs, topology, until)
        with contextlib.closing(compiled), console.status(f"{where}: compiling") as status:
            for number, (each, parts) in enumerate(zip(programs, compiled, strict=False), start=1):
                analysed += parts
                seconds = time.perf_counter() - began
                status.update(f"{where}: {number} of {len(programs)} compiled, {seconds:.0f} s")
                if not console.is_terminal and not any(too_large):
                    print(f"{where}: {each.name} compiled, {seconds:.0f} s", flush=True)
        console.print(*preflight.tables(analysed))
        for program in analysed:
            console.print(preflight.verdict(program), soft_wrap=True)
        all_stages += analysed
        if until(analysed[-1]):
            break
    console.print(preflight.ASSUMPTIONS, soft_wrap=True)
    return all_stages


def programs_of(stage: Stage, config: Config, mesh: Mesh) -> Iterator[preflight.Compilable]:
    """Yields the jitted functions of a stage's script, with the preset's sizes.

    Raises:
      ValueError: there is no such preset or model, or a batch does not divide over the mesh.
    """
    script: Any = script_config(stage, config)
    check_rows(script, mesh)
    if stage == "sft":
        yield sft_step(script, describe(config), mesh)
    elif stage == "rm":
        yield rm_step(script, describe_reward_model(config), mesh)
    else:
        yield from ppo_programs(script, describe(config), describe_reward_model(config), mesh)


# ------------------------------------------------------------------------------------- helpers


def script_config(stage: Stage, config: Config) -> RunConfig:
    """The config of a stage's script: its preset, changed by the flags that were given."""
    if stage == "rm":
        return preset(dataclasses.replace(config, preset="instructgpt-6b"), run_rm.PRESETS)
    return preset(config, run_sft.PRESETS if stage == "sft" else ppo_config.PRESETS)


def preset(config: Config, presets: dict[str, Any]) -> Any:
    """A script's config: the preset, changed by the flags that were given."""
    if config.preset not in presets:
        raise ValueError(f"--preset {config.preset}: not one of {', '.join(presets)}")
    script = presets[config.preset]
    names = {"remat", "batch_size", "shard_sequence"}
    if isinstance(script, ppo_config.Config):
        extra = {"offload": config.offload, "sample_batch": config.sample_batch}
        script = dataclasses.replace(script, **extra)
        if config.microbatches:
            shares = {"microbatches": config.microbatches}
            ppo = dataclasses.replace(script.ppo, **shares)
            # A microbatch then has as many rows of text as episodes.
            shares["microbatches"] *= script.ptx.ratio
            ptx = dataclasses.replace(script.ptx, **shares)
            script = dataclasses.replace(script, ppo=ppo, ptx=ptx)
    else:
        names.add("microbatches")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(script, **given)


def describe_reward_model(config: Config) -> ModelConfig:
    """Sizes of the reward model: --reward_model, --model, or 6B as in the paper (section 3.5)."""
    if config.reward_model is not None:
        return pretrained.describe(config.reward_model, "--reward_model")
    return describe(dataclasses.replace(config, model=config.model or "gpt3-6b"))


def describe(config: Config) -> ModelConfig:
    """The policy's sizes; reads no weights.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: neither --model nor --preset names one.
    """
    size = config.preset.removeprefix("instructgpt-").split("-")[0]
    model = config.model or MODELS.get(size)
    if model is None:
        raise ValueError(f"--preset {config.preset} implies no model: give --model NAME|DIR")
    return dataclasses.replace(pretrained.describe(model), scalar_head=False)


def cli(argv: Sequence[str] | None = None) -> None:
    run_preflight(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
