"""Parses the text of an optimised HLO module: its computations, and their ops.

A TPU's text states the memory space of each array: `bf16[64,512]{1,0:T(8,128)(2,1)S(1)}` is in
space 1, the chip's vector memory; an array without an S is in HBM.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

HBM, HOST = 0, 5  # memory spaces; 1 is vector memory, the others hold scalars and semaphores


@dataclass(frozen=True)
class Buffer:
    """One array of an op's result."""

    dtype: str  # HLO's name: f32, bf16, pred
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Size in bytes, without the padding of TPU tiles."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits.group()) if bits else 0  # tokens: 0
        return math.prod(self.dims) * width / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Op:
    """One instruction."""

    name: str
    opcode: str
    result: tuple[Buffer, ...]  # the leaves of a tuple in order
    operands: tuple[str, ...]  # names of ops of the same computation
    literal: str  # the text between the parentheses of a constant or a parameter
    attributes: str

    def attribute(self, key: str) -> str | None:
        """Value of an attribute without braces, such as a computation's name; None if absent."""
        match = re.search(rf"\b{key}=[%\"]?([\w.-]+)", self.attributes)
        return match and match.group(1)

    @property
    def where(self) -> str:
        """Path of the Python code that the op comes from: jit(step)/while/body/dot_general."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else self.name


@dataclass(frozen=True)
class Computation:
    """A sequence of ops, in the order in which they run."""

    name: str
    ops: dict[str, Op]
    root: Op

    @functools.cached_property
    def parameters(self) -> list[Op]:
        """The parameters, sorted by number."""
        parameters = [op for op in self.ops.values() if op.opcode == "parameter"]
        return sorted(parameters, key=lambda op: int(op.literal))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Op, int]]]:
        """For each op by name, a list of (op that reads it, index of that op's operand)."""
        users: dict[str, list[tuple[Op, int]]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for i, operand in enumerate(op.operands):
                users[operand].append((op, i))
        return users


@dataclass(frozen=True)
class Module:
    """An HLO module."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int  # number of devices
    aliased: tuple[int, ...]  # numbers of the parameters whose memory a result reuses

    def called(self, op: Op, key: str) -> Computation:
        """The computation that the op's attribute `key` names: calls, body, ..."""
        return self.computations[str(op.attribute(key))]


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
      ValueError: a line is not an instruction, or there is no entry computation.
    """
    computations, entry = {}, None
    header, *_ = text.split("\n", 1)
    for is_entry, name, lines in _computations(text):
        ops = [_op(line) for line in lines]
        root = next(i for i, line in enumerate(lines) if line.startswith("ROOT "))
        computations[name] = Computation(name, {op.name: op for op in ops}, ops[root])
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    partitions = re.search(r"num_partitions=(\d+)", header)
    aliased = re.findall(r": \((\d+), \{[^}]*\}, (?:may|must)-alias\)", header)
    return Module(
        computations,
        entry,
        partitions=int(partitions.group(1)) if partitions else 1,
        aliased=tuple(sorted(map(int, aliased))),
    )


def _computations(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """(whether it is the entry, name, instructions without indentation) of each computation."""
    header = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
    name, is_entry, lines = None, False, []
    for line in text.split("\n"):
        if name is None:
            if match := header.match(line):
                is_entry, name, lines = bool(match.group(1)), match.group(2), []
        elif line == "}" or line.startswith("}, execution_thread="):
            yield is_entry, name, lines
            name = None
        elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
            lines.append(line.strip())
        else:  # the metadata of a Pallas kernel has line breaks
            lines[-1] += line


def _op(line: str) -> Op:
    name, _, text = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    begin = text.find("(")
    if begin < 0:
        raise ValueError(f"not an HLO instruction: {line[:200]}")
    end = _closing(text)
    arguments, opcode = text[begin + 1 : end], text[:begin]
    has_operands = opcode not in ("constant", "parameter")
    operands = re.findall(r"%([\w.-]+)", arguments) if has_operands else []
    literal = "" if has_operands else arguments
    return Op(
        name.removeprefix("%"), opcode, _buffers(shape), tuple(operands), literal, text[end + 1 :]
    )


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the first one of the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _buffers(shape: str) -> tuple[Buffer, ...]:
    def buffer(dtype: str, dims: str, layout: str) -> Buffer:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        return Buffer(dtype, sizes, int(space.group(1)) if space else HBM)

    leaves = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape)
    return tuple(buffer(*leaf) for leaf in leaves)
