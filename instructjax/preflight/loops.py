"""Trip counts of while loops, and the values that a loop does not change.

On CPU, XLA notes the trip count of a `lax.scan`. On TPU it is derived from the loop itself: from
the index's start, its step, and the bound that it is compared with.
"""

import re

from instructjax.preflight.hlo import Computation, Module, Op

# The elements of a computation's tuple parameter that are known integers: index -> value.
Known = dict[int, int]
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def invariants(module: Module, where: Computation, loop: Op, known: Known) -> Known:
    """The known integers that the loop carries and never changes, by their index in its tuple.

    Args:
      where: the computation that contains the loop.
      known: known elements of the parameter of `where`.
    """
    start, body = where.ops[loop.operands[0]], module.called(loop, "body")
    if start.opcode != "tuple" or body.root.opcode != "tuple":
        return {}
    constants = {}
    for i, (before, after) in enumerate(zip(start.operands, body.root.operands, strict=True)):
        value = _value(where, before, known)
        if value is not None and _element(body, after) == i:
            constants[i] = value
    return constants


def trips(module: Module, where: Computation, loop: Op, known: Known) -> int | None:
    """Number of times that the body runs; None if it depends on data.

    Args: see `invariants`.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted.group(1))
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    start, test = where.ops[loop.operands[0]], condition.root
    constants = invariants(module, where, loop, known)
    if test.opcode != "compare" or start.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    left, right = test.operands
    direction = test.attribute("direction")
    index, bound = _element(condition, left), _value(condition, right, constants)
    if bound is None:  # the bound may be on the left
        index, bound = _element(condition, right), _value(condition, left, constants)
        direction = _FLIPPED.get(str(direction))
    if index is None or bound is None:
        return None
    first = _value(where, start.operands[index], known)
    step = _step(body, body.root.operands[index], index, constants)
    if first is None or not step:
        return None
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    towards = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0, "NE": True}
    return max(0, -(-(bound - first) // step)) if towards.get(str(direction)) else None


def _source(where: Computation, name: str) -> Op:
    """The op itself or, if it is a copy, the op that it copies."""
    op = where.ops[name]
    while op.opcode in ("copy", "bitcast"):
        op = where.ops[op.operands[0]]
    return op


def _element(where: Computation, name: str) -> int | None:
    """Index of the parameter's element that the op is; None if it is not one."""
    op = _source(where, name)
    if op.opcode != "get-tuple-element" or where.ops[op.operands[0]].opcode != "parameter":
        return None
    return int(str(op.attribute("index")))


def _value(where: Computation, name: str, known: Known) -> int | None:
    """The op's value if it is a known integer, else None."""
    op = _source(where, name)
    if op.opcode == "constant":
        return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
    element = _element(where, name)
    return None if element is None else known.get(element)


def _step(body: Computation, name: str, index: int, known: Known) -> int | None:
    """The integer that one turn of the loop adds to element `index`; None if it is not known."""
    op = _source(body, name)
    if op.opcode != "add":
        return None
    left, right = op.operands
    if _element(body, left) != index:
        left, right = right, left
    return _value(body, right, known) if _element(body, left) == index else None
