"""Ranges of numbers, as types of a config's fields: `batch_size: Count = 8`. `check` reads them."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number must fulfil. No range holds NaN."""

    holds: Callable[[float], bool]
    says: str  # the end of an error


_WHOLE = Range(lambda x: x >= 1, "must be at least 1")
_NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "must not be negative, and finite")

Count = Annotated[int, _WHOLE]
CountFrom2 = Annotated[int, Range(lambda x: x >= 2, "must be at least 2")]
CountOrZero = Annotated[int, Range(lambda x: x >= 0, "must not be negative")]
Seed = Annotated[int, Range(lambda x: 0 <= x < 2**32, "must be from 0 to 2^32 - 1")]
Finite = Annotated[float, Range(math.isfinite, "must be a finite number")]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Positive = Annotated[float, Range(lambda x: 0 < x < math.inf, "must be positive, and finite")]
PositiveOrInf = Annotated[float, Range(lambda x: x > 0, "must be positive")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "must be from 0 to 1")]
ShareBelow1 = Annotated[float, Range(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
ShareAbove0 = Annotated[float, Range(lambda x: 0 < x <= 1, "must be above 0 and at most 1")]


def check(config: Any, prefix: str = "") -> None:
    """Checks all numbers of a config and of the configs in it.

    Args:
      config: a dataclass.
      prefix: its name and a dot, if it is a field of another config.

    Raises:
      ValueError: a number is out of the range of its field; the message begins with its flag.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{flag}.")
        values = value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, int | float) and not isinstance(number, bool):
                for wanted in _ranges(hints[field.name]):
                    if not wanted.holds(number):
                        raise ValueError(f"--{flag} {number}: {wanted.says}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges in a type, also in those of its parts: `Count | None`, `tuple[Finite, ...]`."""
    found = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range)]
    return found + [x for part in typing.get_args(hint) for x in _ranges(part)]
