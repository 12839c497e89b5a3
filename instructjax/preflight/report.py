"""Tables of programs, and a verdict on each program."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from instructjax.preflight.chips import GiB
from instructjax.preflight.count import Collective, Counts
from instructjax.preflight.program import Program

ASSUMPTIONS = (
    "Compiled, not run. FLOPs are those of matmuls; a loop's body counts as often as it runs. Times"
    " are at published peaks, and nothing waits for the host. If collectives overlap with all else,"
    " a run takes the longest of FLOPs / peak, bytes / HBM bandwidth and bytes sent / interconnect;"
    " if they overlap with nothing, it takes the longer of the first two, plus the third. A ? is"
    " time on the network between slices, which is not estimated."
)


def tables(programs: Sequence[Program]) -> list[Table]:
    """A table of memory and, if any program was compiled, tables of work and of collectives.

    Args:
      programs: at least one, all for the same slice.
    """
    compiled = [program for program in programs if program.counts]
    return [_memory(programs), *([_work(compiled), _collectives(compiled)] if compiled else [])]


def _memory(programs: Sequence[Program]) -> Table:
    first = programs[0]
    where = f"{first.topology.name} ({first.topology.cloud}), {first.topology.devices} devices"
    table = _table(
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
        sizes = (
            m.parameters,
            m.optimizer,
            m.gradients,
            m.cache,
            m.temporaries,
            m.other + m.outputs + m.code,
            m.resident,
        )
        table.add_row(each.name, *map(_gib, (*sizes, m.peak, m.host)))
    return table


def _work(programs: Sequence[Program]) -> Table:
    table = _table(
        "Work of a device in one run, with the time of each part at the chip's peak",
        *("", "TFLOP", "ms", "HBM GB", "ms", "sent GB", "ms", "longest"),
        *("ms, overlapped", "ms, not", "runs"),
    )
    for each in programs:
        assert each.counts is not None
        sent = sum(x.bytes for x in each.counts.collectives)
        parts = (
            *(each.counts.flops / 1e12, 1e3 * each.compute_seconds),
            *(each.counts.hbm_bytes / 1e9, 1e3 * each.memory_seconds),
            *(sent / 1e9, 1e3 * each.network_seconds),
        )
        band = 1e3 * each.overlapped_seconds, 1e3 * each.seconds
        table.add_row(each.name, *map(_short, parts), each.bound, *map(_short, (*band, each.runs)))
    if len(programs) > 1:
        table.add_section()
        least = sum(each.runs * each.overlapped_seconds for each in programs)
        most = sum(each.runs * each.seconds for each in programs)
        table.add_row("all runs", *[""] * 7, _short(1e3 * least), _short(1e3 * most), "")
    return table


def _collectives(programs: Sequence[Program]) -> Table:
    table = _table(None, "", "collective", "devices", "times", "sent MB", "ms")
    for program in programs:
        kinds: dict[tuple[str, int], list[Collective]] = {}
        for each in program.counts.collectives if program.counts else ():
            kinds.setdefault((each.kind, each.group), []).append(each)
        for (kind, group), collectives in kinds.items():
            sent, times = sum(x.bytes for x in collectives), sum(x.count for x in collectives)
            seconds = sent / program.topology.ring_bandwidth(group)
            figures = (group, times, sent / 1e6, 1e3 * seconds)
            table.add_row(program.name, kind, *map(_short, figures))
    return table


def _table(title: str | None, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="left" if heading == "collective" else "right")
    return table


def verdict(program: Program) -> str:
    """Says whether a program fits, what helps if it does not, and notes on its counts."""
    peak, usable = program.memory.peak, program.usable
    if program.fits:
        share = 100 * peak / usable
        lines = [f"{program.name}: fits, {_gib(peak)} of {_gib(usable)} GiB ({share:.0f} %)"]
    else:
        excess = f"{_gib(peak - usable)} GiB over {_gib(usable)}"
        lines = [f"{program.name}: does not fit, {excess}", *advice(program)]
    if program.counts:
        lines += _notes(program.counts)
    return "\n  ".join(lines)


def _notes(counts: Counts) -> list[str]:
    total = sum(each.bytes for each in counts.collectives)
    notes = [
        f"{100 * each.bytes / total:.0f} % of bytes sent: {each.kind}, {each.count:g} times, at"
        f" {each.where}"
        for each in counts.collectives[:3]
        if each.bytes > 0.1 * total
    ]
    if counts.uncounted:
        notes.append(f"kernels of unknown FLOPs, not counted: {', '.join(counts.uncounted)}")
    if counts.assumed:
        notes.append(f"loops with assumed trip counts: {', '.join(counts.assumed)}")
    return notes


def advice(program: Program) -> list[str]:
    """Each part that takes over a tenth of the memory, largest first, with the flags that help."""
    m = program.memory
    states = m.parameters + m.optimizer
    trained = f"{_gib(states)} GiB of parameters and optimizer: more fsdp in --mesh, which splits"
    frozen = f"{_gib(m.parameters)} GiB of parameters: more tensor or fsdp in --mesh; for a frozen"
    smaller = "--remat full, more microbatches (fewer rows at a time), --shard_sequence"
    if program.name in ("prefill", "rollout"):
        smaller = "--sample_batch (fewer prompts at a time), more tensor in --mesh"
    parts = [
        (states, f"{trained} them, or a larger slice")
        if m.optimizer
        else (states, f"{frozen} model, --offload (kept on the host between uses)"),
        (
            m.temporaries,
            f"{_gib(m.temporaries)} GiB of activations and other temporaries: {smaller}, a larger"
            " slice",
        ),
        (m.cache, f"{_gib(m.cache)} GiB of cache: more tensor in --mesh, fewer rows at a time"),
        (
            m.resident,
            f"{_gib(m.resident)} GiB of the other models: --offload, which moves frozen models and,"
            " in a rollout, all models to the host; more fsdp in --mesh for trained models",
        ),
    ]
    return [text for size, text in sorted(parts, reverse=True) if size > 0.1 * m.peak]


def _gib(size: float) -> str:
    return f"{size / GiB:.2f}"


def _short(figure: float) -> str:
    if math.isnan(figure):
        return "?"
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
