"""Programs as a table, and a verdict on each."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from instructjax.preflight.chips import GiB
from instructjax.preflight.count import Collective, Counts
from instructjax.preflight.program import Program

ASSUMPTIONS = (
    "Compiled, not run. FLOPs are those of matmuls, and every loop counts as often as it runs. The"
    " roofline is max(FLOPs / peak, bytes / HBM bandwidth) + bytes sent / interconnect, at"
    " published peaks: collectives overlap with nothing, and nothing waits for the host. Between"
    " slices it is not estimated (?)."
)


def tables(programs: Sequence[Program]) -> list[Table]:
    """Memory; work and collectives of what was compiled.

    Args:
      programs: at least one, all of one slice.
    """
    compiled = [program for program in programs if program.counts]
    return [_memory(programs), *([_work(compiled), _collectives(compiled)] if compiled else [])]


def _memory(programs: Sequence[Program]) -> Table:
    first = programs[0]
    where = f"{first.topology.name} ({first.topology.cloud}), {first.topology.devices} devices"
    made = _table(
        f"{where}, {_gib(first.usable)} GiB of HBM usable in each",
        *(
            "GiB a device",
            "params",
            "optimizer",
            "grads",
            "cache",
            "temp",
            "other",
            "resident",
            "peak",
            "in host",
        ),
    )
    for each in programs:
        m = each.memory
        held = (
            m.parameters,
            m.optimizer,
            m.gradients,
            m.cache,
            m.temporaries,
            m.other + m.outputs + m.code,
            m.resident,
        )
        made.add_row(each.name, *map(_gib, (*held, m.peak, m.host)))
    return made


def _work(programs: Sequence[Program]) -> Table:
    made = _table(
        "Work of a device in one run, with the time of each part at the chip's peak",
        *("", "TFLOP", "ms", "HBM GB", "ms", "sent GB", "ms", "roofline ms", "runs"),
    )
    for each in programs:
        assert each.counts is not None
        sent = sum(x.bytes for x in each.counts.collectives)
        parts = (
            *(each.counts.flops / 1e12, 1e3 * each.compute_seconds),
            *(each.counts.hbm_bytes / 1e9, 1e3 * each.memory_seconds),
            *(sent / 1e9, 1e3 * each.network_seconds),
        )
        made.add_row(each.name, *map(_short, (*parts, 1e3 * each.seconds, each.runs)))
    if len(programs) > 1:
        made.add_section()
        total = sum(each.runs * each.seconds for each in programs)
        made.add_row("all runs", *[""] * 6, _short(1e3 * total), "")
    return made


def _collectives(programs: Sequence[Program]) -> Table:
    made = _table(None, "", "collective", "devices", "times", "sent MB", "ms")
    for program in programs:
        kinds: dict[tuple[str, int], list[Collective]] = {}
        for each in program.counts.collectives if program.counts else ():
            kinds.setdefault((each.kind, each.group), []).append(each)
        for (kind, group), those in kinds.items():
            sent, times = sum(x.bytes for x in those), sum(x.count for x in those)
            took = sent / program.topology.ring_bandwidth(group)
            figures = (group, times, sent / 1e6, 1e3 * took)
            made.add_row(program.name, kind, *map(_short, figures))
    return made


def _table(title: str | None, first: str, *rest: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(first)
    for heading in rest:
        made.add_column(heading, justify="left" if heading == "collective" else "right")
    return made


def verdict(program: Program) -> str:
    """Whether it fits; by how much not, and what helps; what else there is to know of it."""
    peak, usable = program.memory.peak, program.usable
    if program.fits:
        share = 100 * peak / usable
        lines = [f"{program.name}: fits, {_gib(peak)} of {_gib(usable)} GiB ({share:.0f} %)"]
    else:
        over = f"{_gib(peak - usable)} GiB over {_gib(usable)}"
        lines = [f"{program.name}: does not fit, {over}", *advice(program)]
    if program.counts:
        lines += _notes(program.counts)
    return "\n  ".join(lines)


def _notes(counts: Counts) -> list[str]:
    total = sum(each.bytes for each in counts.collectives)
    notes = [
        f"{100 * each.bytes / total:.0f} % of what it sends: {each.kind}, {each.count:g} times, at"
        f" {each.where}"
        for each in counts.collectives[:3]
        if each.bytes > 0.1 * total
    ]
    if counts.uncounted:
        notes.append(f"FLOPs unknown, not counted: {', '.join(counts.uncounted)}")
    if counts.assumed:
        notes.append(f"trips assumed, not known: {', '.join(counts.assumed)}")
    return notes


def advice(program: Program) -> list[str]:
    """What takes a tenth of the memory or more, largest first, with the knob that helps."""
    m, text = program.memory, []
    states = m.parameters + m.optimizer
    trained = f"{_gib(states)} GiB of parameters and optimizer: more fsdp in --mesh, which splits"
    frozen = f"{_gib(m.parameters)} GiB of parameters: more tensor or fsdp in --mesh; of a frozen"
    smaller = "--remat full, more microbatches (fewer rows at a time), --shard_sequence"
    if program.name in ("prefill", "rollout"):
        smaller = "--sample_batch (fewer prompts at a time), more tensor in --mesh"
    knobs = [
        (states, f"{trained} them, or a larger slice")
        if m.optimizer
        else (states, f"{frozen} model, --offload between its turns"),
        (
            m.temporaries,
            f"{_gib(m.temporaries)} GiB of activations and other temporaries: {smaller}, a larger"
            " slice",
        ),
        (m.cache, f"{_gib(m.cache)} GiB of cache: more tensor in --mesh, fewer rows at a time"),
        (
            m.resident,
            f"{_gib(m.resident)} GiB of the other models: --offload for those that are frozen and,"
            " in a rollout, for all; more fsdp in --mesh for those that are trained",
        ),
    ]
    for size, words in sorted(knobs, reverse=True):
        if size > 0.1 * m.peak:
            text.append(words)
    return text


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"


def _short(figure: float) -> str:
    if math.isnan(figure):
        return "?"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
