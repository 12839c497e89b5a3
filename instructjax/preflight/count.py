"""FLOPs, bytes and collectives of one run of a compiled program, on each device.

They are counted from the optimised HLO. A loop's body counts as often as it runs;
`compiled.cost_analysis()` counts it once. FLOPs are those of matmuls, as in a chip's peak rate.
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
    """All collectives of the same kind, group size and place in the program."""

    kind: str  # all-gather, all-reduce, ...
    group: int  # number of devices that take part in each
    where: str  # jit(step)/while/body/dot_general
    count: float  # how many run
    bytes: float  # that each device sends, in total


@dataclass(frozen=True)
class Array:
    """An array that an op creates."""

    shape: str  # bf16[8,128]
    bytes: float
    where: str  # jit(step)/while/body/dot_general


@dataclass(frozen=True)
class Counts:
    """What one run of the program does on one device."""

    flops: float
    hbm_bytes: float  # read and written
    host_bytes: float  # moved to and from host memory
    collectives: tuple[Collective, ...]  # in descending order of bytes
    aliased_bytes: float  # of arguments whose memory a result reuses
    largest: tuple[Array, ...]
    assumed: tuple[str, ...]  # loops whose trip counts the caller gave
    uncounted: tuple[str, ...]  # kernels that state no FLOPs; not in `flops`


def count(module: Module, trips: Sequence[float] = (), largest: int = 20) -> Counts:
    """Counts one run of a program. In a conditional, the branch with the most FLOPs counts.

    Args:
      module: of `hlo.parse(compiled.as_text())`.
      trips: trip counts of the loops whose number of turns depends on data, in program order; a
        loop comes before the loops inside it.
      largest: number of largest arrays to list.

    Raises:
      ValueError: the number of such loops is not the number of `trips`; the message lists the
        loops.
    """
    walk = _Walk(module, trips)
    total = walk.run(module.entry, {})
    if len(walk.assumed) != len(trips):
        raise ValueError(
            f"{len(walk.assumed)} loops have trip counts that depend on data"
            f" ({', '.join(walk.assumed) or 'none'}), but trips are given for {len(trips)}"
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


def sent_bytes(kind: str, group: int, operand_bytes: float) -> float:
    """Bytes that each device of a group sends for a collective, around a ring.

    Args:
      kind: of `traffic.COLLECTIVES`.
      group: number of devices.
      operand_bytes: bytes of the collective's operands on each device.
    """
    if kind == "all-gather":  # each device's operand goes to all others
        return operand_bytes * (group - 1)
    if kind == "all-reduce":  # a reduce-scatter, then an all-gather of the shares
        return 2 * operand_bytes * (group - 1) / group
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return operand_bytes * (group - 1) / group
    return operand_bytes


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


def _add(total: dict[Any, float], more: Mapping[Any, float], times: float = 1) -> None:
    for key, value in more.items():
        total[key] += times * value


class _Walk:
    """Walks through every computation that runs, from the entry on."""

    def __init__(self, module: Module, trips: Sequence[float]):
        self.module, self.trips = module, trips
        self.assumed: list[str] = []
        self.uncounted: set[str] = set()
        self.arrays: set[Array] = set()

    def run(self, where: Computation, known: loops.Known) -> _Sum:
        """Counts one run of a computation.

        Args:
          known: the integers that are known among the elements of its parameter.
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
        constants = loops.invariants(self.module, where, op, known)
        total.add(self.run(self.module.called(op, "body"), constants), n)
        total.add(self.run(self.module.called(op, "condition"), constants), n + 1)

    def _branches(self, op: Op) -> list[Computation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
        if listed is None:
            return [self.module.called(op, f"{x}_computation") for x in ("true", "false")]
        return [self.module.computations[x] for x in re.findall(r"[\w.-]+", listed.group(1))]

    def _inside(
        self, total: _Sum, where: Computation, op: Op, chains: set[str], fused: bool = False
    ) -> None:
        """Adds the matmuls and collectives of an op and of the ops fused into it.

        Args:
          chains: chain ids of the asynchronous collectives already counted.
        """
        if op.opcode == "fusion":
            inside = self.module.called(op, "calls")
            for inner in inside.ops.values():
                self._inside(total, inside, inner, chains, fused=True)
        elif op.opcode.removesuffix("-start") in COLLECTIVES:
            # An asynchronous collective is fused into every op that overlaps with it: the copies
            # share a chain id.
            chain = re.search(r'chain_id="(\d+)"', op.attributes)
            if chain and chain.group(1) in chains:
                return
            chains.update(chain.groups() if chain else ())
            self._collective(total, where, op)
            if fused:  # traffic.py leaves these reads out
                for leaf in operands(where, op):
                    total.moved[leaf.space] += leaf.bytes
        else:
            op_flops = flops(where, op)
            if op_flops is None:
                self.uncounted.add(op.where)
            total.flops += op_flops or 0

    def _collective(self, total: _Sum, where: Computation, op: Op) -> None:
        kind = op.opcode.removesuffix("-start")
        # A TPU's reduce-scatter is written as an all-reduce, each device keeping a share.
        if where.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        group = group_size(op, self.module.partitions)
        if group > 1:
            operand_bytes = sum(leaf.bytes for leaf in operands(where, op))
            total.sent[kind, group, op.where] += sent_bytes(kind, group, operand_bytes)
            total.count[kind, group, op.where] += 1


def group_size(op: Op, devices: int) -> int:
    """Number of devices that take part in a collective: the size of its first group.

    Args:
      op: its attributes hold `replica_groups` in one of HLO's three notations, or pairs of source
        and target, whose group is the longest chain of devices.
      devices: number of devices of the module, all of which take part if no groups are listed.
    """
    text = op.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):  # {{0,1},{2,3}}
        return match.group(1).count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):  # [2,4]<=[4,2]T(1,0)
        return int(match.group(1))
    # mesh['a'=4,'b'=2], device_ids=(..) {'a'}; {'a':(2)2} is a part of 2 of the axis of 4
    match = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if match:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := re.search(r"source_target_pairs=\{(.*?\})\}", text):  # {{0,1},{1,0}}
        pairs = re.findall(r"\{(\d+),(\d+)\}", match.group(1))
        return max(_chain(dict(pairs), start) for start, _ in pairs)
    return devices


def _chain(target_of: dict[str, str], device: str) -> int:
    """Number of devices on the chain of targets that begins at a device."""
    visited = set()
    while device not in visited:
        visited.add(device)
        device = target_of.get(device, device)
    return len(visited)
