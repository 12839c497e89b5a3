"""Bytes that one op moves, by memory space.

A fusion reads its operands and writes its results; arrays between its ops are free. A slice reads
only the slice and an in-place update writes only the update, inside a fusion too.
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
# Ops that only name an existing array, or move next to no bytes.
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
# Index of the new array among the leaves of an asynchronous op's result.
_NEW_LEAF = {"copy-start": 0, "slice-start": -2, "dynamic-slice-start": -2}
_NEW_LEAF |= {"all-gather-start": 1, "collective-permute-start": 1}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # index of the operand that is the update


def is_free(op: Op) -> bool:
    """Whether the op creates no array: it is a name, a call or the end of an asynchronous op."""
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
    """The arrays that are the operands of an op of that computation."""
    return [leaf for name in op.operands for leaf in where.ops[name].result]


def _read(module: Module, where: Computation, op: Op, i: int) -> float:
    """Bytes that the op reads of its operand i; infinity if it reads the whole operand."""
    if op.opcode == "fusion":
        fused = module.called(op, "calls")
        return _read_inside(module, fused, fused.parameters[i])
    if op.opcode in _SLICES and i == 0:
        return op.result[_NEW_LEAF.get(op.opcode, 0)].bytes
    if op.opcode in _UPDATES and i == 0:
        return 0
    return math.inf


def _read_inside(module: Module, fused: Computation, op: Op) -> float:
    """Bytes that the ops of a fusion read of the result of one of them."""
    read = 0.0
    for user, i in fused.users[op.name]:
        if user.opcode == "bitcast":
            read += _read_inside(module, fused, user)
        # Copies of one asynchronous collective are in several fusions; count.py counts them once.
        elif not is_free(user) and user.opcode not in COLLECTIVES:
            read += _read(module, fused, user, i)
    return read


def _written(module: Module, where: Computation, op: Op) -> list[float]:
    """Bytes that the op writes to each leaf of its result."""
    sizes = [leaf.bytes for leaf in op.result]
    if op.opcode in _UPDATES:
        return [where.ops[op.operands[_UPDATES[op.opcode]]].result[0].bytes]
    if op.opcode in _NEW_LEAF:
        new = _NEW_LEAF[op.opcode] % len(sizes)
        return [size if i == new else 0 for i, size in enumerate(sizes)]
    if op.opcode != "fusion":
        return sizes
    fused = module.called(op, "calls")
    roots = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    if len(roots) == len(sizes):
        for i, root in enumerate(roots):
            source = fused.ops[root]
            while source.opcode == "bitcast":
                source = fused.ops[source.operands[0]]
            if source.opcode == "parameter":
                sizes[i] = 0
            elif source.opcode in _UPDATES:
                [sizes[i]] = _written(module, fused, source)
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.attributes)
    for leaf in re.findall(r"\{(\d*)\}: \(", aliases.group(1)) if aliases else ():
        sizes[int(leaf or 0)] = 0
    return sizes
