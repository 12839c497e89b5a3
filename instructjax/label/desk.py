"""Serves the page's requests. Each call is one transaction of the database."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from instructjax.label import agreement, answers
from instructjax.label.deck import Deck
from instructjax.label.screens import Screen
from instructjax.label.store import Store

LEASE = 1800.0  # seconds for which a screen that a labeler was shown is kept from others
REFUSED = "refused"  # instead of a screen, for those whom the screening set did not admit


@dataclass(frozen=True)
class Desk:
    """Gives screens out and takes labels.

    Attributes:
      admit: agreement with the screening set's ranks, and with its flags, that a labeler needs.
      now: the time in seconds.
    """

    store: Store
    deck: Deck
    admit: float = 0.6
    now: Callable[[], float] = time.time

    def open(self) -> None:
        """Adds the screens of the deck to the database."""
        self.store.add([*self.deck.screening.values(), *self.deck.screens.values()])

    def next(self, labeler: str) -> dict[str, Any]:
        """The labeler's next screen, as the page has it; `{"state": ...}` where there is none.

        It is one that the labeler was shown and has not labeled, or else the first in the
        labeler's order that too few others have.
        """
        with self.store.transaction():
            now, known = self.now(), self.store.labelers()[labeler]
            done = dict.fromkeys(self.store.done(labeler))
            if known.admitted is False:
                return {"state": REFUSED, "done": len(done), "left": 0, "previous": None}
            todo = self._screening_left(labeler, done)
            if not todo:
                taken = self.store.taken(labeler, now - LEASE)
                left = dict.fromkeys([*self.store.opened(labeler), *self.deck.order(labeler)])
                todo = [
                    screen
                    for screen in left
                    if screen in self.deck.screens
                    and screen not in done
                    and taken.get(screen, 0) < self.deck.wanted(screen)
                ]
            if not todo:
                previous = self._previous(labeler, None)
                return {"state": "done", "done": len(done), "left": 0, "previous": previous}
            first = self.deck.screening.get(todo[0]) or self.deck.screens[todo[0]]
            places = self.deck.responses(labeler, first.id, len(first.responses))
            self.store.show(labeler, first.id, places, now)
            return self._page(labeler, first.id) | {"left": len(todo)}

    def earlier(self, labeler: str, screen: str) -> dict[str, Any]:
        """A screen that the labeler has labeled, with what the labeler said, to correct it.

        Raises:
          KeyError: the labeler has not labeled it.
        """
        with self.store.transaction():
            if self.store.answer(labeler, screen) is None:
                raise KeyError(screen)
            return self._page(labeler, screen)

    def submit(self, labeler: str, given: Mapping[str, Any]) -> bool:
        """Keeps a label: `id` (drawn by the page), `screen`, `seconds` and the answer.

        Returns:
          whether it is new.

        Raises:
          ValueError: a value is missing or out of its range.
          KeyError: the labeler was not shown the screen.
        """
        id, screen = given.get("id"), given.get("screen")
        if not isinstance(id, str) or not 16 <= len(id) <= 64 or not isinstance(screen, str):
            raise ValueError("expected a label with an id and a screen")
        seconds = answers.seconds(given.get("seconds"))
        with self.store.transaction():
            seen = self.store.seen(labeler, screen)
            if seen is None:
                raise KeyError(screen)
            answer = answers.parse(seen[0].kind, seen[1], given)
            new = self.store.submit(id, screen, labeler, answer, seconds, self.now())
            self._decide(labeler)
        return new

    def _page(self, labeler: str, screen: str) -> dict[str, Any]:
        """A screen as the page has it: without models, and in the labeler's order."""
        seen = self.store.seen(labeler, screen)
        assert seen is not None
        shown, places = seen
        answer = self.store.answer(labeler, screen)
        return {
            "state": "screen",
            "screen": screen,
            "kind": shown.kind,
            "screening": _is_known(shown),
            "turns": shown.turns,
            "responses": [shown.texts[place] for place in places],
            "answer": None if answer is None else answers.shown(answer, places),
            "done": len(self.store.done(labeler)),
            "previous": self._previous(labeler, screen),
        }

    def _previous(self, labeler: str, screen: str | None) -> str | None:
        """The screen that the labeler labeled before this one, if it may be corrected.

        An answer to the screening set may be until all of them are given.
        """
        decided = self.store.labelers()[labeler].admitted is not None
        done = [x for x in self.store.done(labeler) if not decided or x not in self.deck.screening]
        place = done.index(screen) if screen in done else len(done)
        return done[place - 1] if place else None

    def _screening_left(self, labeler: str, done: Collection[str]) -> list[str]:
        if self.store.labelers()[labeler].admitted is not None:
            return []
        return [x for x in self.deck.screening_order(labeler) if x not in done]

    def _decide(self, labeler: str) -> None:
        """Admits or refuses a labeler who has answered the whole screening set, once."""
        if not self.deck.screening or self.store.labelers()[labeler].admitted is not None:
            return
        if self._screening_left(labeler, self.store.done(labeler)):
            return
        given = [self.store.answer(labeler, screen) or {} for screen in self.deck.screening]
        ranks, flags = agreement.with_known([*self.deck.screening.values()], given)
        admitted = ranks >= self.admit and (flags is None or flags >= self.admit)
        self.store.admit(labeler, admitted, ranks, flags)


def _is_known(screen: Screen) -> bool:
    return bool(screen.known_ranks)
