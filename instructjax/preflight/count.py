"""What one run of a compiled program does on each device: FLOPs, bytes, collectives.

Counted from the optimised HLO, a loop's body as often as it runs: `compiled.cost_analysis()`
counts it once. FLOPs are those of matmuls, which is what a peak rate is of.
"""

import collections
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instructjax.preflight import loops
from instructjax.preflight.flops import flops
from instructjax.preflight.hlo import HBM, HOST, Computation, Module, Op
from instructjax.preflight.traffic import (
    COLLECTIVES,
    Bytes,
    is_free,
    operands,
    traffic,
)


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind and group size that come from one place."""

    kind: str  # all-gather, all-reduce, ...
    group: int  # devices that take part in each
    where: str  # jit(step)/while/body/dot_general
    count: float  # times that one runs
    bytes: float  # sent by each device, in all


@dataclass(frozen=True)
class Array:
    """An array that some op makes."""

    shape: str  # bf16[8,128]
    bytes: float
    where: str  # jit(step)/while/body/dot_general


@dataclass(frozen=True)
class Counts:
    """Per device and run of the program."""

    flops: float
    hbm_bytes: float  # read and written
    host_bytes: float  # moved to and from host memory
    collectives: tuple[Collective, ...]  # what sends most first
    aliased_bytes: float  # of arguments whose memory results take over
    largest: tuple[Array, ...]
    assumed: tuple[str, ...]  # the loops whose trips the caller gave
    uncounted: tuple[str, ...]  # kernels whose FLOPs nobody states: not in `flops`


def count(module: Module, trips: Sequence[float] = (), largest: int = 20) -> Counts:
    """Counts one run of a program.

    Of a conditional, the branch with the most FLOPs counts.

    Args:
      module: of `hlo.parse(compiled.as_text())`.
      trips: of the loops that run for as long as their data say, in the order of the program, a
        loop before those within it.
      largest: how many of the largest arrays to name.

    Raises:
      ValueError: there are more or fewer such loops than `trips`; names them.
    """
    walk = _Walk(module, trips)
    total = walk.run(module.entry, {})
    if len(walk.assumed) != len(trips):
        raise ValueError(
            f"{len(walk.assumed)} loops run for as long as their data say"
            f" ({', '.join(walk.assumed) or 'none'}); trips are given for {len(trips)}"
        )
    return Counts(
        flops=total.flops,
        hbm_bytes=total.moved[HBM],
        host_bytes=total.moved[HOST],
        collectives=tuple(
            Collective(*key, total.count[key], sent)
            for key, sent in sorted(total.sent.items(), key=lambda item: -item[1])
        ),
        aliased_bytes=sum(
            leaf.bytes for i in module.aliased for leaf in module.entry.parameters[i].result
        ),
        largest=tuple(sorted(walk.arrays, key=lambda x: -x.bytes)[:largest]),
        assumed=tuple(walk.assumed),
        uncounted=tuple(sorted(walk.uncounted)),
    )


def sent_bytes(kind: str, group: int, put_in: float) -> float:
    """Bytes that each device of a group sends for a collective, around a ring.

    Args:
      kind: of `traffic.COLLECTIVES`.
      group: devices.
      put_in: bytes that each of them puts in.
    """
    if kind == "all-gather":  # what it puts in goes to all others
        return put_in * (group - 1)
    if kind == "all-reduce":  # a reduce-scatter, then an all-gather of the shares
        return 2 * put_in * (group - 1) / group
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return put_in * (group - 1) / group
    return put_in


_zeros = functools.partial(collections.defaultdict, float)


@dataclass
class _Sum:
    flops: float = 0
    moved: Bytes = field(default_factory=_zeros)
    sent: dict[tuple[str, int, str], float] = field(default_factory=_zeros)  # kind, group, where
    count: dict[tuple[str, int, str], float] = field(default_factory=_zeros)

    def add(self, other: "_Sum", times: float = 1) -> None:
        self.flops += times * other.flops
        _add(self.moved, other.moved, times)
        _add(self.sent, other.sent, times)
        _add(self.count, other.count, times)


def _add(mine: dict[Any, float], more: Mapping[Any, float], times: float = 1) -> None:
    for key, value in more.items():
        mine[key] += times * value


class _Walk:
    """Through all that runs, from the entry."""

    def __init__(self, module: Module, trips: Sequence[float]):
        self.module, self.trips = module, trips
        self.assumed: list[str] = []
        self.uncounted: set[str] = set()
        self.arrays: set[Array] = set()

    def run(self, where: Computation, known: loops.Known) -> _Sum:
        """One run of a computation.

        Args:
          known: integers among the elements of its parameter.
        """
        total, chains = _Sum(), set()
        for op in where.ops.values():
            if op.opcode == "while":
                self._loop(total, where, op, known)
            elif op.opcode == "conditional":
                branches = [self.run(branch, {}) for branch in self._branches(op)]
                total.add(max(branches, key=lambda branch: (branch.flops, branch.moved[HBM])))
            elif op.opcode in ("call", "call-start", "async-start"):
                key = "calls" if op.opcode == "async-start" else "to_apply"
                total.add(self.run(self.module.called(op, key), {}))
            else:
                self._inside(total, where, op, chains)
                _add(total.moved, traffic(self.module, where, op))
                if not is_free(op):
                    self.arrays |= {Array(str(x), x.bytes, op.where) for x in op.result}
        return total

    def _loop(self, total: _Sum, where: Computation, op: Op, known: loops.Known) -> None:
        n: float | None = loops.trips(self.module, where, op, known)
        if n is None:
            i = len(self.assumed)
            self.assumed.append(op.where)
            n = self.trips[i] if i < len(self.trips) else math.nan  # `count` raises
        same = loops.invariants(self.module, where, op, known)
        total.add(self.run(self.module.called(op, "body"), same), n)
        total.add(self.run(self.module.called(op, "condition"), same), n + 1)

    def _branches(self, op: Op) -> list[Computation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
        if listed is None:
            return [self.module.called(op, f"{x}_computation") for x in ("true", "false")]
        return [self.module.computations[x] for x in re.findall(r"[\w.-]+", listed.group(1))]

    def _inside(
        self, total: _Sum, where: Computation, op: Op, chains: set[str], fused: bool = False
    ) -> None:
        """Matmuls and collectives of an op, and of all that is fused into it.

        Args:
          chains: of the asynchronous collectives that were counted.
        """
        if op.opcode == "fusion":
            inside = self.module.called(op, "calls")
            for inner in inside.ops.values():
                self._inside(total, inside, inner, chains, fused=True)
        elif op.opcode.removesuffix("-start") in COLLECTIVES:
            # An asynchronous collective is fused into all that runs beside it: one op in several
            # places, with one number.
            chain = re.search(r'chain_id="(\d+)"', op.attributes)
            if chain and chain.group(1) in chains:
                return
            chains.update(chain.groups() if chain else ())
            self._collective(total, where, op)
            if fused:  # see traffic
                for leaf in operands(where, op):
                    total.moved[leaf.space] += leaf.bytes
        else:
            made = flops(where, op)
            if made is None:
                self.uncounted.add(op.where)
            total.flops += made or 0

    def _collective(self, total: _Sum, where: Computation, op: Op) -> None:
        kind = op.opcode.removesuffix("-start")
        # A TPU's reduce-scatter is written as an all-reduce of which a share is kept.
        if where.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        group = group_size(op, self.module.partitions)
        if group > 1:
            put_in = sum(leaf.bytes for leaf in operands(where, op))
            total.sent[kind, group, op.where] += sent_bytes(kind, group, put_in)
            total.count[kind, group, op.where] += 1


def group_size(op: Op, devices: int) -> int:
    """How many devices take part in a collective: the size of the first of its groups.

    Args:
      op: with `replica_groups` in one of HLO's three notations, or pairs of source and target,
        whose group is the longest chain of devices.
      devices: of the module, who all take part where no groups are listed.
    """
    text = op.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):  # {{0,1},{2,3}}
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):  # [2,4]<=[4,2]T(1,0)
        return int(found.group(1))
    # mesh['a'=4,'b'=2], device_ids=(..) {'a'}; {'a':(2)2} is 2 of the 4, within every 2
    found = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        over = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in over)
    if found := re.search(r"source_target_pairs=\{(.*?\})\}", text):  # {{0,1},{1,0}}
        pairs = re.findall(r"\{(\d+),(\d+)\}", found.group(1))
        return max(_chain(dict(pairs), start) for start, _ in pairs)
    return devices


def _chain(to: dict[str, str], at: str) -> int:
    """How many devices one gets to from one of them."""
    passed = set()
    while at not in passed:
        passed.add(at)
        at = to.get(at, at)
    return len(passed)
