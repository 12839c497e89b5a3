"""The fields of a row: the columns that they are read from, under conventional names or others."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from instructjax.data.columns import Column
from instructjax.data.errors import DataError, check_text, type_name

Kind = Literal["demonstrations", "comparisons", "prompts", "text"]

CONTEXT = ("system", "history", "tools")
OPTIONAL = (*CONTEXT, "labeler", "margin", "confidence")  # blank is absent
NAMES: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion", "messages", *CONTEXT),
    "comparisons": (
        *("prompt", "messages", "responses", "ranks", "scores", "chosen", "rejected"),
        *("labeler", "margin", "confidence", *CONTEXT),
    ),
    "prompts": ("prompt", "messages", "completion", "responses", "chosen", "rejected", *CONTEXT),
    "text": ("text",),
}
# The names of a field in other libraries' data; the first that a row has is read.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "responses": ("responses", "completions", "answers"),
    "ranks": ("ranks", "ranking"),
    "scores": ("scores", "ratings"),
    "labeler": ("labeler", "annotator", "worker"),
    "text": ("text", "content", "document"),
    "system": ("system", "system_prompt"),
}
# Numerals as JSON and CSV have them. Python also reads `1_000`, `inf` and the digits of any script.
WHOLE = re.compile(r"\s*[+-]?[0-9]{1,400}\s*")
NUMERAL = re.compile(r"\s*[+-]?([0-9]{1,400}\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
LARGEST = sys.float_info.max
INPUT = ("input", "context")  # the second part of Alpaca's and Dolly's prompts
# A field that --data.columns names keeps these from being read under their conventional names.
INSTEAD_OF = {
    "prompt": ("messages",),
    "completion": ("messages",),
    "messages": ("prompt", "completion"),
    "responses": ("chosen", "rejected"),
    "chosen": ("responses",),
    "ranks": ("scores",),
    "scores": ("ranks",),
}
# What a kind leaves out on purpose.
LEFT_OUT = {
    "prompts": {"completion", "responses", "ranks", "scores", "chosen", "rejected", "labeler"},
    "text": {*NAMES["demonstrations"], *NAMES["comparisons"]},
}


@dataclass(frozen=True)
class Fields:
    """A row whose fields are read one by one. Every error names file, line and field."""

    row: Mapping[str, Any]
    where: str
    kind: Kind
    columns: Mapping[str, Column]  # from `columns.parse_columns`; they go before ALIASES
    used: set[str] = field(default_factory=set)  # columns that were read

    def has(self, name: str) -> bool:
        """Whether the row has a value for a field. A null is none, and so is a blank context.

        A context column that --data.columns has read for another field does not count.
        """
        if name in self.columns:
            return name not in OPTIONAL or not is_blank(self.get(name))
        replaced = any(name in INSTEAD_OF.get(other, ()) for other in self.columns)
        if replaced or name not in NAMES[self.kind]:
            return False
        return self._alias(name) is not None

    def _alias(self, name: str) -> str | None:
        """The conventional column that a field is read from."""
        for alias in ALIASES.get(name, (name,)):
            value = self.row.get(alias)
            absent = value is None or (name in OPTIONAL and is_blank(value))
            if not absent and (name not in OPTIONAL or alias not in self.used):
                return alias
        return None

    def get(self, name: str) -> Any:
        """The value of a field; raises DataError if the row has none."""
        if name in self.columns:
            try:
                return self.columns[name](_Noted(self.row, self.used))
            except KeyError as error:
                raise self.error(name, f"no column {error} among {list(self.row)}") from error
            except TypeError as error:
                raise self.error(name, str(error)) from error
        alias = self._alias(name)
        if alias is None:
            raise self.error(name, f"is missing; the row has {list(self.row)}")
        self.used.add(alias)
        return self.row[alias]

    def string(self, name: str) -> str:
        return check_text(self.get(name), self.where, name)

    def array(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.error(name, f"expected a list, got {type_name(value)}")
        return value

    def number(self, value: Any, name: str) -> int | float:
        """The finite number that a value or a numeral is; every value of a CSV file is a string.

        Whole numbers stay whole, as floats would make large neighbours equal.
        """
        number: Any = value
        if isinstance(value, str) and NUMERAL.fullmatch(value):
            number = int(value) if WHOLE.fullmatch(value) else float(value)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) <= LARGEST:
            got = repr(value) if isinstance(value, str) else type_name(value)
            raise self.error(name, f"expected a number, got {got:.40}")
        return number

    def error(self, name: str, problem: str) -> DataError:
        return DataError(self.where, name, problem)

    def unread(self) -> Iterator[str]:
        """Columns with content that nothing has read, but for what the kind leaves out."""
        left_out = LEFT_OUT.get(self.kind, set())
        left_out = {alias for name in left_out for alias in ALIASES.get(name, (name,))}
        for name, value in self.row.items():
            if name not in self.used and name not in left_out and not is_blank(value):
                yield name


class _Noted(dict):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Mapping[str, Any], names: set[str]):
        super().__init__(row)
        self._names = names

    def __getitem__(self, name: str) -> Any:
        self._names.add(name)
        return super().__getitem__(name)


def is_blank(value: Any) -> bool:
    """Whether a value is null, empty, or a string of spaces or of an empty list."""
    if isinstance(value, str):
        return value.strip() in ("", "[]")
    return value is None or value == [] or value == {}
