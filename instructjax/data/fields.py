"""The fields of a row: the columns that they are read from, under conventional names or others."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from instructjax.data.columns import Column
from instructjax.data.errors import DataError, check_text, type_name

Kind = Literal["demonstrations", "comparisons", "prompts", "text"]

CONTEXT = ("system", "history", "tools")
NAMES: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion", "messages", *CONTEXT),
    "comparisons": (
        *("prompt", "messages", "responses", "ranks", "scores", "chosen", "rejected"),
        *("labeler", "margin", *CONTEXT),
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
_KNOWN = {*INPUT, *(name for names in (*NAMES.values(), *ALIASES.values()) for name in names)}


@dataclass(frozen=True)
class Fields:
    """A row whose fields are read one by one. Every error names file, line and field."""

    row: Mapping[str, Any]
    where: str
    kind: Kind
    columns: Mapping[str, Column]  # from `columns.parse_columns`; they go before ALIASES
    used: set[str] = field(default_factory=set)  # columns that --data.columns has read

    def has(self, name: str) -> bool:
        """Whether the row has a value for a field. A null is none, and so is an empty context.

        A column that --data.columns has read for a field is not read for another.
        """
        if name in self.columns:
            return True
        replaced = any(name in INSTEAD_OF.get(other, ()) for other in self.columns)
        if replaced or name not in NAMES[self.kind]:
            return False
        aliases = [alias for alias in ALIASES.get(name, (name,)) if alias not in self.used]
        values = [self.row.get(alias) for alias in aliases]
        if name in CONTEXT:
            return not all(map(is_blank, values))
        return any(value is not None and (name, value) != ("labeler", "") for value in values)

    def get(self, name: str) -> Any:
        """The value of a field; raises DataError if the row has none."""
        if name in self.columns:
            try:
                return self.columns[name](_Noted(self.row, self.used))
            except KeyError as error:
                raise self.error(name, f"no column {error} among {list(self.row)}") from error
            except TypeError as error:
                raise self.error(name, str(error)) from error
        for alias in ALIASES.get(name, (name,)):
            if self.row.get(alias) is not None:
                return self.row[alias]
        raise self.error(name, f"is missing; the row has {list(self.row)}")

    def string(self, name: str) -> str:
        return check_text(self.get(name), self.where, name)

    def array(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.error(name, f"expected a list, got {type_name(value)}")
        return value

    def number(self, value: Any, name: str) -> float:
        try:  # accepts numerals too: every value of a CSV file is a string
            number = float(value) if isinstance(value, str | int | float) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(name, f"expected a number, got {value!r:.40}")
        return number

    def error(self, name: str, problem: str) -> DataError:
        return DataError(self.where, name, problem)

    def unread(self) -> Iterator[str]:
        """Columns with content that belong to no field, and that --data.columns has not read."""
        for name, value in self.row.items():
            if name not in _KNOWN and name not in self.used and not is_blank(value):
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
    """Whether a value is null, empty, or a string of spaces."""
    return value in (None, [], {}) or (isinstance(value, str) and value.strip() in ("", "[]"))
