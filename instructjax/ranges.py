"""Numbers with a range, as types of a config's fields: `batch_size: Count = 8`.

`check` reads the types of flags. The reader of config.json reads those of `ModelConfig`.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True, repr=False)
class Range:
    """What a number must fulfil. No range holds NaN."""

    holds: Callable[[float], bool]
    says: str  # the end of an error

    def __repr__(self) -> str:  # tyro's errors show it
        return self.says


Count = Annotated[int, Range(lambda x: 1 <= x < 2**31, "must be at least 1, and below 2^31")]
CountFrom2 = Annotated[int, Range(lambda x: 2 <= x < 2**31, "must be at least 2, and below 2^31")]
CountOrZero = Annotated[int, Range(lambda x: x >= 0, "must not be negative")]
Seed = Annotated[int, Range(lambda x: 0 <= x < 2**32, "must be from 0 to 2^32 - 1")]
Finite = Annotated[float, Range(math.isfinite, "must be finite")]
NotNegative = Annotated[float, Range(lambda x: 0 <= x < math.inf, "must not be negative or inf")]
Positive = Annotated[float, Range(lambda x: 0 < x < math.inf, "must be positive, not inf")]
PositiveOrInf = Annotated[float, Range(lambda x: x > 0, "must be positive")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "must be from 0 to 1")]
ShareBelow1 = Annotated[float, Range(lambda x: 0 <= x < 1, "must be at least 0 and below 1")]
ShareAbove0 = Annotated[float, Range(lambda x: 0 < x <= 1, "must be above 0 and at most 1")]

_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
}


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
        for item in value if isinstance(value, tuple) else (value,):
            if says := refusal(hints[field.name], item):
                raise ValueError(f"--{flag} {item}: {says}")


def refusal(hint: Any, value: Any) -> str | None:
    """What a field of this type must be, if the value is not; None if the value will do.

    Args:
      hint: `Count | None`, or `tuple[Positive, ...]` for an item of the tuple. Only the numbers and
        booleans in it are checked: any other type holds every value that is neither.
      value: of a flag or of JSON.
    """
    says = None
    for kind, wanted in _parts(hint):
        if kind in _KINDS:
            instances, name = _KINDS[kind]
            if not isinstance(value, instances) or (isinstance(value, bool) and kind is not bool):
                says = says or f"must be {name}"
            elif wanted is None or wanted.holds(value):
                return None
            else:
                says = wanted.says
        elif not isinstance(value, int | float) and (kind is not type(None) or value is None):
            return None
    return says


def _parts(hint: Any) -> Iterator[tuple[Any, Range | None]]:
    """The types that make up a type, each with its range if it has one."""
    found = [x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Range)]
    parts = [] if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)
    if found:
        yield hint.__origin__, found[0]
    elif hasattr(hint, "__metadata__"):
        yield from _parts(hint.__origin__)
    elif parts:
        for part in parts:
            if part is not ...:
                yield from _parts(part)
    else:
        yield hint, None
