"""DataError, which locates a bad row, and Report, which counts the rows that were left out."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal


class DataError(ValueError):
    """A row that cannot be used: its place (file:line), the field, and the problem."""

    def __init__(self, where: str, field: str | None, problem: str):
        self.where = printable(where)
        problem = problem.encode(errors="backslashreplace").decode()
        self.reason = f"field '{printable(field)}': {problem}" if field is not None else problem
        super().__init__(f"{self.where}: {self.reason}")


class Report:
    """Counts the rows read, and the records left out with the reasons; `print` logs them."""

    def __init__(self, name: str, on_error: Literal["raise", "skip"], log: Callable[[str], None]):
        self.name, self.on_error, self.log = printable(name), on_error, log
        self.rows = 0
        self.counts: Counter[tuple[str, str]] = Counter()  # (verb, reason) -> records
        self.first: dict[tuple[str, str], str] = {}  # (verb, reason) -> its first place
        self.unread: dict[str, None] = {}  # columns that nothing reads, in the order of the data

    def bad(self, error: DataError) -> None:
        """Raises the error, or counts it under `--data.on_error skip`."""
        if self.on_error == "raise":
            raise error
        self.count("skipped", error.reason, error.where)

    def count(self, verb: str, reason: str, where: str = "", times: int = 1) -> None:
        """Counts `times` records or responses that were skipped, dropped, cut or tied: the verb."""
        if times:
            self.counts[verb, reason] += times
            self.first.setdefault((verb, reason), printable(where))

    def note_unread(self, names: Iterable[str]) -> None:
        """Notes columns that have content and that nothing reads; `print` names them once."""
        self.unread |= dict.fromkeys(names)

    def lines(self, shown: int = 5) -> list[str]:
        """Lines for the `shown` most frequent reasons, for all others, and for unread columns."""
        lines = []
        for (verb, reason), times in self.counts.most_common(shown):
            where = self.first[verb, reason]
            lines.append(f"  {times:,} {verb}: {reason}" + (f" (first: {where})" if where else ""))
        others = self.counts.most_common()[shown:]
        if others:
            lines.append(f"  {sum(n for _, n in others):,} more, for {len(others)} other reasons")
        if self.unread:
            names = ", ".join(map(printable, self.unread))
            lines.append(f"  columns that nothing reads: {names}")
        return lines

    def print(self, kept: int, kind: str) -> None:
        """Logs the number of rows read, of records left out, and of the `kept` records.

        Raises:
          DataError: no record was kept.
        """
        lines = "\n".join([f"{self.name}: {self.rows:,} rows read", *self.lines()])
        if not kept:
            raise DataError(self.name, None, f"no {kind} are left\n{lines}")
        self.log(f"{lines}\n  {kept:,} {kind}")


def type_name(value: Any) -> str:
    """JSON's name for the type of a value, for messages; of other types, Python's."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return name
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    return "null" if value is None else f"a value of type {type(value).__name__}"


def check_unicode(flag: str, value: str) -> None:
    """Raises ValueError, which names the flag, if its value holds half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:  # such as a byte of the command line that is not UTF-8
        raise ValueError(f"{flag} {printable(value)}: is not valid Unicode") from error


def printable(text: str) -> str:
    """The text on one line, without half surrogate pairs, which no terminal can print."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def check_text(value: Any, where: str, field: str) -> str:
    """Returns `value` if it is a non-blank string of valid Unicode; raises DataError if not."""
    if not isinstance(value, str):
        raise DataError(where, field, f"expected a string, got {type_name(value)}")
    if not value.strip():
        raise DataError(where, field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, UTF-8 and tokenizers cannot
        raise DataError(where, field, "holds half of a surrogate pair") from error
    return value
