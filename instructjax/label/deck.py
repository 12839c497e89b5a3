"""Which screens a labeler sees, and in which order: draws from a seed and the labeler's name."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from instructjax.label.screens import Screen

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Deck:
    """The screens that are given out.

    Attributes:
      screens: by id, each for one labeler, or for `raters` of them.
      screening: by id, the screens with known answers, which each labeler sees first.
      raters: labelers of a shared screen.
      shared: ids of the screens that several labelers get.
    """

    screens: Mapping[str, Screen]
    screening: Mapping[str, Screen]
    raters: int
    shared: frozenset[str]
    seed: int

    def wanted(self, screen: str) -> int:
        """How many labelers a screen is for."""
        return self.raters if screen in self.shared else 1

    def order(self, labeler: str) -> list[str]:
        """All screens, in an order drawn for the labeler."""
        return _drawn([*self.screens], f"{self.seed} screens {labeler}")

    def screening_order(self, labeler: str) -> list[str]:
        return _drawn([*self.screening], f"{self.seed} screening {labeler}")

    def responses(self, labeler: str, screen: str, count: int) -> list[int]:
        """For each place on the labeler's screen, the number of its response in the data."""
        return _drawn(range(count), f"{self.seed} responses {labeler} {screen}")


def deal(
    screens: Sequence[Screen],
    screening: Sequence[Screen] = (),
    *,
    raters: int = 1,
    share: float = 1.0,
    seed: int = 0,
) -> Deck:
    """A deck in which a drawn share of the screens, rounded up, goes to several labelers."""
    ids = {screen.id: screen for screen in screens}
    shared = _drawn([*ids], f"{seed} shared")[: math.ceil(share * len(ids))]
    known = {screen.id: screen for screen in screening}
    return Deck(ids, known, raters, frozenset(shared), seed)


def _drawn(values: Sequence[ValueT], seed: str) -> list[ValueT]:
    drawn = [*values]
    random.Random(seed).shuffle(drawn)
    return drawn
