"""What is said of data that cannot be used, and the tally of it where the user asks to go on."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal


class DataError(ValueError):
    """What is wrong with a row: where it stands (file:line), in which field, and how."""

    def __init__(self, where: str, field: str | None, problem: str):
        self.where = where
        self.reason = f"field '{field}': {problem}" if field else problem
        super().__init__(f"{where}: {self.reason}")


class Report:
    """Counts what is read and what is left out, and why; `print` says it all."""

    def __init__(self, name: str, on_error: Literal["raise", "skip"], log: Callable[[str], None]):
        self.name, self.on_error, self.log = name, on_error, log
        self.rows = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (verb, reason) -> records
        self.first: dict[tuple[str, str], str] = {}  # (verb, reason) -> where it was met first

    def bad(self, error: DataError) -> None:
        """Raises the error, or counts it under `--data.on_error skip`."""
        if self.on_error == "raise":
            raise error
        self.count("skipped", error.reason, error.where)

    def count(self, verb: str, reason: str, where: str = "", times: int = 1) -> None:
        """Notes that `times` records were skipped, dropped or cut for a reason."""
        if times:
            self.counts[verb, reason] += times
            self.first.setdefault((verb, reason), where)

    def lines(self, shown: int = 5) -> list[str]:
        """One line for each of the most frequent reasons, and one for the rest."""
        lines = []
        for (verb, reason), times in self.counts.most_common(shown):
            where = self.first[verb, reason]
            lines.append(f"  {times:,} {verb}: {reason}" + (f" (first: {where})" if where else ""))
        rest = self.counts.most_common()[shown:]
        if rest:
            lines.append(f"  {sum(n for _, n in rest):,} more, for {len(rest)} other reasons")
        return lines

    def print(self, kept: int, kind: str) -> None:
        """Says what was read, what was left out, and what remains.

        Raises:
          DataError: nothing remains.
        """
        lines = "\n".join([f"{self.name}: {self.rows:,} rows read", *self.lines()])
        if not kept:
            raise DataError(self.name, None, f"no {kind} are left\n{lines}")
        self.log(f"{lines}\n  {kept:,} {kind}")


def type_name(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), f"the number {value!r:.40}")


def check_text(value: Any, where: str, field: str) -> str:
    """Returns `value` if it is a string that says something; raises DataError if not."""
    if not isinstance(value, str):
        raise DataError(where, field, f"expected a string, got {type_name(value)}")
    if not value.strip():
        raise DataError(where, field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, UTF-8 and tokenizers cannot
        raise DataError(where, field, "holds half of a surrogate pair") from error
    return value
