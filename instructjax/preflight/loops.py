"""How often a while loop runs, and what stays the same in it.

XLA on CPU notes the trips of a `lax.scan`; on TPU they have to be read off the loop itself: its
index begins at a constant, grows by one, and is compared with another.
"""

import re

from instructjax.preflight.hlo import Computation, Module, Op

# Integers known beforehand among the elements of a computation's tuple parameter.
Known = dict[int, int]
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def invariants(module: Module, where: Computation, loop: Op, known: Known) -> Known:
    """Integers that the loop carries and never changes, by their place in its tuple.

    Args:
      where: the computation that the loop is in.
      known: of the parameter of `where`.
    """
    start, body = where.ops[loop.operands[0]], module.called(loop, "body")
    if start.opcode != "tuple" or body.root.opcode != "tuple":
        return {}
    found = {}
    for i, (before, after) in enumerate(zip(start.operands, body.root.operands, strict=True)):
        value = _value(where, before, known)
        if value is not None and _element(body, after) == i:
            found[i] = value
    return found


def trips(module: Module, where: Computation, loop: Op, known: Known) -> int | None:
    """The number of times that the body runs; None if it depends on data.

    Args: as `invariants`.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted.group(1))
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    start, test = where.ops[loop.operands[0]], condition.root
    same = invariants(module, where, loop, known)
    if test.opcode != "compare" or start.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    left, right = test.operands
    direction = test.attribute("direction")
    index, bound = _element(condition, left), _value(condition, right, same)
    if bound is None:  # the other way round, or no bound that is known
        index, bound = _element(condition, right), _value(condition, left, same)
        direction = _FLIPPED.get(str(direction))
    if index is None or bound is None:
        return None
    first = _value(where, start.operands[index], known)
    step = _step(body, body.root.operands[index], index, same)
    if first is None or not step:
        return None
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    towards = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0, "NE": True}
    return max(0, -(-(bound - first) // step)) if towards.get(str(direction)) else None


def _source(where: Computation, name: str) -> Op:
    """The op, or what it is a copy of."""
    op = where.ops[name]
    while op.opcode in ("copy", "bitcast"):
        op = where.ops[op.operands[0]]
    return op


def _element(where: Computation, name: str) -> int | None:
    """Which element of the parameter the op is; None if it is none."""
    op = _source(where, name)
    if op.opcode != "get-tuple-element" or where.ops[op.operands[0]].opcode != "parameter":
        return None
    return int(str(op.attribute("index")))


def _value(where: Computation, name: str, known: Known) -> int | None:
    """The integer that the op is, if that can be known."""
    op = _source(where, name)
    if op.opcode == "constant":
        return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
    element = _element(where, name)
    return None if element is None else known.get(element)


def _step(body: Computation, name: str, index: int, known: Known) -> int | None:
    """What a turn adds to element `index`."""
    op = _source(body, name)
    if op.opcode != "add":
        return None
    left, right = op.operands
    if _element(body, left) != index:
        left, right = right, left
    return _value(body, right, known) if _element(body, left) == index else None
