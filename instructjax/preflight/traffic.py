"""Bytes that one op moves, by memory space.

A fusion reads its operands and writes its results; what is between is free. A slice reads what it
slices, an update in place writes what it updates, inside a fusion too.
"""

import collections
import math
import re

from instructjax.preflight.hlo import Buffer, Computation, Module, Op

Bytes = dict[int, float]  # by memory space
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Names for what is there already, or no bytes to speak of.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id"),
    *("replica-id", "after-all", "add-dependency", "opt-barrier", "while", "conditional"),
    *("call", "call-start", "async-start"),
)
_FREE_CALLS = (
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"),
    *("AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
)
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start")
# Where the array that an asynchronous op makes is, among the leaves of its result.
_MADE = {"copy-start": 0, "slice-start": -2, "dynamic-slice-start": -2}
_MADE |= {"all-gather-start": 1, "collective-permute-start": 1}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # which operand is the update


def is_free(op: Op) -> bool:
    """Whether the op makes no array of its own: names, calls, the ends of asynchronous ops."""
    called = op.opcode == "custom-call" and op.attribute("custom_call_target") in _FREE_CALLS
    return called or op.opcode in _FREE or op.opcode.endswith("-done")


def traffic(module: Module, where: Computation, op: Op) -> Bytes:
    """Bytes that an op of that computation reads and writes."""
    moved: Bytes = collections.defaultdict(float)
    if is_free(op):
        return moved
    for i, name in enumerate(op.operands):
        for leaf in where.ops[name].result:
            moved[leaf.space] += min(_read(module, where, op, i), leaf.bytes)
    for leaf, written in zip(op.result, _written(module, where, op), strict=True):
        moved[leaf.space] += written
    return moved


def operands(where: Computation, op: Op) -> list[Buffer]:
    """The arrays that an op of that computation is given."""
    return [leaf for name in op.operands for leaf in where.ops[name].result]


def _read(module: Module, where: Computation, op: Op, i: int) -> float:
    """Bytes that the op reads of its operand i; infinity: all of them."""
    if op.opcode == "fusion":
        fused = module.called(op, "calls")
        return _read_inside(module, fused, fused.parameters[i])
    if op.opcode in _SLICES and i == 0:
        return op.result[_MADE.get(op.opcode, 0)].bytes
    if op.opcode in _UPDATES and i == 0:
        return 0
    return math.inf


def _read_inside(module: Module, fused: Computation, op: Op) -> float:
    """Bytes that the ops of a fusion read of one of its values."""
    read = 0.0
    for user, i in fused.users[op.name]:
        if user.opcode == "bitcast":
            read += _read_inside(module, fused, user)
        # One asynchronous collective is in several fusions; `count` counts what it reads, once.
        elif not is_free(user) and user.opcode not in COLLECTIVES:
            read += _read(module, fused, user, i)
    return read


def _written(module: Module, where: Computation, op: Op) -> list[float]:
    """Bytes that the op writes of each leaf of its result."""
    sizes = [leaf.bytes for leaf in op.result]
    if op.opcode in _UPDATES:
        return [where.ops[op.operands[_UPDATES[op.opcode]]].result[0].bytes]
    if op.opcode in _MADE:
        made = _MADE[op.opcode] % len(sizes)
        return [size if i == made else 0 for i, size in enumerate(sizes)]
    if op.opcode != "fusion":
        return sizes
    fused = module.called(op, "calls")
    roots = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    if len(roots) == len(sizes):
        for i, root in enumerate(roots):
            made = fused.ops[root]
            while made.opcode == "bitcast":
                made = fused.ops[made.operands[0]]
            if made.opcode == "parameter":
                sizes[i] = 0
            elif made.opcode in _UPDATES:
                [sizes[i]] = _written(module, fused, made)
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.attributes)
    for leaf in re.findall(r"\{(\d*)\}: \(", aliases.group(1)) if aliases else ():
        sizes[int(leaf or 0)] = 0
    return sizes
