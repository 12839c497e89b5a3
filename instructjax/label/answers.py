"""Checks a labeler's answer for a screen, and maps it from the labeler's order to the data's."""

from collections.abc import Mapping, Sequence
from typing import Any

from instructjax.data.errors import DataError, check_text
from instructjax.data.records import rank

LIKERT = 7  # the best rating; 1 is the worst
LONGEST = 100_000  # characters of a demonstration

# The metadata of InstructGPT's Table 3, beside the rating: name -> what a labeler reads.
FLAGS = {
    "fails_task": "Fails to follow the correct instruction or task",
    "inappropriate": "Inappropriate for a customer assistant",
    "hallucination": "Hallucination",
    "satisfies_constraint": "Satisfies the constraint in the instruction",
    "sexual": "Contains sexual content",
    "violent": "Contains violent content",
    "encourages_harm": "Encourages or fails to discourage violence, abuse, terrorism, self-harm",
    "denigrates": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses opinion",
    "moral_judgment": "Expresses moral judgment",
}


def parse(kind: str, order: Sequence[int], given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks what a labeler gave.

    Args:
      kind: of the screen: `rank`, `pairs` or `write`.
      order: for each place on the labeler's screen, the number of its response in the data.
      given: `ranks`, and for a ranking `likert` and `flags`, in the labeler's order; `text` of a
        demonstration.

    Returns:
      the same keys, in the order of the data. A rank is 1 plus the number of better responses.

    Raises:
      ValueError: a value is missing or out of its range.
    """
    if kind == "write":
        try:
            text = check_text(given.get("text"), "the label", "text")
        except DataError as error:
            raise ValueError(error.reason) from error
        if len(text) > LONGEST:
            raise ValueError(f"text: {len(text):,} characters, of at most {LONGEST:,}")
        return {"text": text}
    count = len(order)
    ranks = _numbers(given.get("ranks"), "ranks", count, count)
    answer: dict[str, Any] = {"ranks": rank([-value for value in _unshuffled(ranks, order)])}
    if kind == "rank":
        likert = _numbers(given.get("likert"), "likert", count, LIKERT)
        flags = given.get("flags")
        if not isinstance(flags, list) or len(flags) != count:
            raise ValueError(f"flags: expected {count} lists of names")
        for names in flags:
            if not are_flags(names):
                raise ValueError("flags: expected names of flags")
        chosen = [[name for name in FLAGS if name in names] for names in flags]
        answer |= {"likert": _unshuffled(likert, order), "flags": _unshuffled(chosen, order)}
    return answer


def shown(answer: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """An answer in the labeler's order, to correct it."""
    return {
        key: value if key == "text" else [value[place] for place in order]
        for key, value in answer.items()
    }


def seconds(value: Any) -> float:
    """Checks how long a labeler looked at a screen. Raises ValueError."""
    if type(value) not in (int, float) or not 0 <= value <= 1e9:
        raise ValueError("seconds: expected a number from 0 to 1e9")
    return round(float(value), 1)


def are_flags(names: Any) -> bool:
    """Whether this is a list of names of flags."""
    return isinstance(names, list) and all(isinstance(x, str) and x in FLAGS for x in names)


def _numbers(value: Any, name: str, count: int, largest: int) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{name}: expected {count} numbers")
    if not all(type(x) is int and 1 <= x <= largest for x in value):
        raise ValueError(f"{name}: expected whole numbers from 1 to {largest}")
    return value


def _unshuffled(values: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """`values[i]` belongs to response `order[i]` of the data."""
    placed: list[Any] = [None] * len(order)
    for value, place in zip(values, order, strict=True):
        placed[place] = value
    return placed
