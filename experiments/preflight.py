r"""The memory and best-case time of a preset on a TPU slice, estimated without the slice.

    python experiments/preflight.py --topology v5e:16x16 --mesh fsdp=32,tensor=8   # instructgpt-6b
    python experiments/preflight.py --preset instructgpt-1.3b --topology v5e --search
    python experiments/preflight.py --stages sft --model DIR --topology v5p:4x4x4 --remat full
    python experiments/preflight.py --topology v5e:1x1 --preset small --lora.rank 16 --stages ppo \
        --fit qwen3-0.6b llama-3.2-1b qwen3-1.7b      # the largest of these that fits one chip

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
from operator import attrgetter
from typing import Any

import ppo_config
import run_rm
import run_sft
from jax.sharding import AbstractMesh, Mesh
from preflight_config import (
    Config,
    Stage,
    describe,
    describe_model,
    describe_reward_model,
    parameters,
    script_config,
)
from preflight_programs import (
    check_rows,
    lengths,
    ppo_programs,
    rm_step,
    row_of_comparisons,
    row_of_text,
    sft_step,
)
from rich.console import Console

from instructjax import preflight, sharding, usage
from instructjax.models import ModelConfig
from instructjax.preflight.chips import GiB
from instructjax.run import RunConfig, checks, main


@dataclass(frozen=True)
class Fit:
    """The largest model of --fit that fits a slice, and its program with the highest peak.

    All but `stage` is None if not even the smallest fits.
    """

    stage: Stage
    model: str | None = None
    flags: str | None = None  # that it fits with, besides those that were given
    program: str | None = None
    peak: float | None = None  # bytes on a device
    usable: float | None = None

    def __str__(self) -> str:
        if self.model is None or self.peak is None or self.usable is None:
            return f"{self.stage}: none fits"
        sizes = f"{self.peak / GiB:.2f} of {self.usable / GiB:.2f} GiB"
        besides = f" with {self.flags}" if self.flags else ""
        return f"{self.stage}: {self.model} fits{besides}; at most {sizes} ({self.program})"

    def json(self) -> dict[str, Any]:
        return dict(vars(self))


def run_preflight(config: Config) -> None:
    results: Sequence[Fit | preflight.Program]
    if config.search:
        results = search(config)
    else:
        topology = preflight.parse_topology(config.topology, config.num_slices)
        if config.fit:
            results = [largest(config, stage, topology) for stage in config.stages]
            print("\n".join(map(str, results)))
        else:
            results = analyse(config, topology, config.mesh)
    if config.out is not None:
        config.out.write_text(json.dumps([each.json() for each in results], indent=2) + "\n")


def search(config: Config) -> list[preflight.Program]:
    """The programs on the smallest slice that fits them; see `first_that_fits`."""
    for single in preflight.slices(config.topology):
        topology = dataclasses.replace(single, num_slices=config.num_slices)
        if found := first_that_fits(config, topology):
            words, programs = found
            slices = f" --num_slices {topology.num_slices}" if topology.num_slices > 1 else ""
            print(f"everything fits with --topology {topology.slice}{slices} {words}".rstrip())
            return programs
    raise ValueError(f"--search: no slice of {config.topology} is large enough with these flags")


def largest(config: Config, stage: Stage, topology: preflight.Topology) -> Fit:
    """The largest model of --fit whose programs of a stage fit the slice. Smaller ones are not
    compiled.
    """
    sizes = {model: parameters(describe_model(model, "--fit")) for model in config.fit}
    for model in sorted(sizes, key=lambda model: -sizes[model]):
        trial = dataclasses.replace(config, model=model, stages=(stage,), fit=())
        if found := first_that_fits(trial, topology):
            words, programs = found
            # "prefill" is a part of the rollout, whose memory it has.
            whole = [program for program in programs if program.runs]
            worst = max(whole, key=lambda program: program.memory.peak)
            return Fit(stage, model, words, worst.name, worst.memory.peak, worst.usable)
        print(f"{topology.name}, {stage}: {model} does not fit")
    return Fit(stage)


def first_that_fits(
    config: Config, topology: preflight.Topology
) -> tuple[str, list[preflight.Program]] | None:
    """(flags, programs) of the first mesh and parts of a batch that fit a slice; None: none do.

    The first mesh is all `fsdp`. Each next one doubles `tensor`, which needs more collectives. If a
    step or gradient does not fit, the number of microbatches grows; if the rollout does not fit,
    fewer prompts are sampled at a time. Both stop when the batch no longer divides, and neither
    changes a flag that was given.
    """
    for mesh in [config.mesh] if config.mesh else meshes_of(topology.devices):
        tried: Config | None = config
        while tried is not None:
            try:
                programs = analyse(tried, topology, mesh, all_must_fit=True)
            except ValueError as error:  # the mesh, or the batch, does not divide
                print(f"{topology.name} {mesh}: {error}")
                break
            if all(program.fits for program in programs):
                return added(config, tried, mesh), programs
            tried = in_smaller_parts(config, tried, programs[-1], topology, mesh)
            if tried is not None:
                print(f"trying {topology.name} {added(config, tried, mesh)}")
    return None


def in_smaller_parts(
    given: Config,
    tried: Config,
    failed: preflight.Program,
    topology: preflight.Topology,
    mesh: str,
) -> Config | None:
    """More microbatches or fewer prompts for a program that did not fit; None if neither helps.

    Args:
      given: the user's flags, which are not changed.
      tried: the flags with which the program did not fit.
    """
    room = failed.usable - (failed.memory.peak - failed.memory.temporaries)
    if room <= 0:
        return None
    # Half the rows take at least half the memory.
    parts = 2 ** max(1, math.ceil(math.log2(failed.memory.temporaries / room)))
    stages: dict[str, Stage] = {"SFT step": "sft", "RM step": "rm"}
    stage = stages.get(failed.name, "ppo")
    script: Any = fitted(stage, tried, topology, mesh)
    smaller = tried
    if failed.name in ("prefill", "rollout") and given.sample_batch is None:
        prompts = (script.sample_batch or script.batch_size) // parts
        data, fsdp, _ = sharding.axis_sizes(topology.devices, **sharding.parse_mesh(mesh))
        if prompts >= data * fsdp:
            smaller = dataclasses.replace(tried, sample_batch=prompts)
    elif failed.name in stages and given.microbatches is None:
        smaller = dataclasses.replace(tried, microbatches=parts * script.microbatches)
    elif failed.name.endswith("gradient") and given.microbatches is None:
        name = "ptx" if failed.name.startswith("ptx") else "ppo"
        if getattr(given, name).microbatches is None:
            more = parts * getattr(script, name).microbatches
            part = dataclasses.replace(getattr(tried, name), microbatches=more)
            smaller = dataclasses.replace(tried, **{name: part})
    try:
        # A device has at least one row of a microbatch, so that the script may not change.
        return smaller if fitted(stage, smaller, topology, mesh) != script else None
    except ValueError:  # the batch does not divide into so many parts
        return None


def fitted(stage: Stage, config: Config, topology: preflight.Topology, mesh: str) -> RunConfig:
    """The config of a stage's script on a mesh of the slice."""
    sizes = sharding.axis_sizes(topology.devices, **sharding.parse_mesh(mesh))
    return on_mesh(script_config(stage, config), AbstractMesh(sizes, sharding.AXES))


def on_mesh(script: RunConfig, mesh: Mesh | AbstractMesh) -> RunConfig:
    """A script's config as the script changes it: SFT and RM have fewer microbatches if need be."""
    if isinstance(script, run_sft.Config | run_rm.Config):
        return dataclasses.replace(script, microbatches=checks.fitting_microbatches(script, mesh))
    return script


def added(given: Config, tried: Config, mesh: str) -> str:
    """The flags of a trial that were not given. All fsdp is a script's default, and not named."""
    flags = [] if given.mesh or mesh.endswith("tensor=1") else [f"--mesh {mesh}"]
    for name in ("microbatches", "ppo.microbatches", "ptx.microbatches", "sample_batch"):
        before, now = attrgetter(name)(given), attrgetter(name)(tried)
        if before != now:
            flags.append(f"--{name} {now}")
    return " ".join(flags)


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is compiled."""
    if config.out is not None and not config.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {config.out}: no directory {config.out.parent}")
    if config.out is not None and config.out.is_dir():
        raise IsADirectoryError(f"--out {config.out}: is a directory; give a file in it")
    scripts = [script_config(stage, config) for stage in config.stages]
    for model in config.fit:
        describe_model(model, "--fit")
    for model in config.fit or (config.model,):
        trial = dataclasses.replace(config, model=model, fit=())
        policy, reward_model = describe(trial), describe_reward_model(trial)
        for each in (policy, reward_model) if config.lora.rank else ():
            config.lora.paths(each)
        for script in scripts:
            check_lengths(script, reward_model if isinstance(script, run_rm.Config) else policy)
    if config.search:
        next(preflight.slices(config.topology))
        return
    topology = preflight.parse_topology(config.topology, config.num_slices)
    if config.fit and not config.mesh:
        return
    sizes = sharding.axis_sizes(topology.devices, **sharding.parse_mesh(config.mesh))
    for script in scripts:
        check_rows(script, AbstractMesh(sizes, sharding.AXES))


def check_lengths(script: Any, model: ModelConfig) -> None:
    """Raises ValueError if a flag asks for more tokens than the model's context holds."""
    response, counts = 1, []
    if isinstance(script, run_sft.Config):
        counts.append(("--length", script.length, 0))
    elif isinstance(script, ppo_config.Config):
        response = script.max_new_tokens
        counts.append(("--max_new_tokens", response, 1))
        if script.ptx.coef:
            counts.append(("--ptx.length", script.ptx.length, 0))
    checks.check_tokens(model, [*counts, *checks.data_tokens("--data", script.data, response)])


def meshes_of(devices: int) -> list[str]:
    """Meshes of `fsdp` and `tensor` with that many devices in all; `tensor` is at most 32."""
    sizes = [1, 2, 4, 8, 16, 32]
    return [f"fsdp={devices // t},tensor={t}" for t in sizes if devices % t == 0]


def analyse(
    config: Config,
    topology: preflight.Topology,
    mesh: str,
    all_must_fit: bool = False,
) -> list[preflight.Program]:
    """Compiles the stages' programs for a slice, and prints tables and verdicts.

    Args:
      all_must_fit: whether to stop at the first program that does not fit. The largest come first.
    """
    until = (lambda program: not program.fits) if all_must_fit else (lambda program: False)
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
        print(f"{topology.name}, {stage}: {sizes_of(stage, config)}")
        # A program whose arguments alone do not fit may settle the answer without compiling.
        bounds = [preflight.lower_bound(each, topology) for each in programs]
        too_large = [bound.memory.peak > bound.usable and until(bound) for bound in bounds]
        names = [each.name for each in programs]
        if any(too_large):
            programs = [programs[too_large.index(True)]]
        elif all_must_fit:
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
        if left := [name for name in names if name not in {each.name for each in analysed}]:
            console.print(f"not compiled: {', '.join(left)}", soft_wrap=True)
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
    script: Any = on_mesh(script_config(stage, config), mesh)
    check_rows(script, mesh)
    if stage == "sft":
        yield sft_step(script, describe(config), mesh)
    elif stage == "rm":
        yield rm_step(script, describe_reward_model(config), mesh)
    else:
        policy, reward_model = describe(config), describe_reward_model(config)
        shared = bool(config.lora.rank) and config.reward_model is None and policy == reward_model
        yield from ppo_programs(script, policy, reward_model, mesh, shared)


def sizes_of(stage: Stage, config: Config) -> str:
    """What a stage was compiled for, in words."""
    script: Any = script_config(stage, config)
    if stage == "sft":
        return f"{script.batch_size:,} rows of {row_of_text(script, describe(config)):,} tokens"
    if stage == "rm":
        tokens = row_of_comparisons(script, describe_reward_model(config))
        return f"{script.batch_size:,} rows of {tokens:,} tokens"
    P, R = lengths(script.data.max_prompt, script.max_new_tokens, describe(config))
    text = f", {script.ptx.ratio} x {script.ptx.length:,} tokens of text each"
    return (
        f"{script.batch_size:,} episodes of {P:,} + {R:,} tokens{text if script.ptx.coef else ''}"
    )


def cli(argv: Sequence[str] | None = None) -> None:
    run_preflight(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
