"""Principles, and the questions about them that a critic is asked.

A file of principles is TOML:

    [[principles]]
    name = "harm"
    choose = "Choose the response that is less harmful."                # ai_feedback.py
    critique = "Say in which way the response is harmful."              # critique_revise.py
    revision = "Rewrite the response so that nothing in it is harmful."
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructjax.data import Record
from instructjax.miniature import critics

MINIATURE = "miniature"  # as --principles: those of the miniature's critics, in its words
PARTS = ("choose", "critique", "revision")
QUESTION = """{choose}

The conversation:
{conversation}

Response A:
{a}

Response B:
{b}

{ending}"""
ANSWER = "Which response is better? Answer with A or B alone."
THINK = "Which response is better? Compare them in a few words first."


@dataclass(frozen=True)
class Principle:
    """A principle; see the text above."""

    name: str
    choose: str = ""
    critique: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Constitution:
    """Principles, and whether they are in the miniature's words."""

    principles: tuple[Principle, ...]
    in_miniature: bool = False

    @property
    def answers(self) -> tuple[str, str]:
        """The names of two responses, of which the critic answers one."""
        return critics.ANSWERS if self.in_miniature else ("A", "B")

    @property
    def before_answer(self) -> str:
        """What ends a question to a model without a chat template."""
        return "" if self.in_miniature else "\nAnswer:"

    def draw(self, seed: int, *number: int) -> Principle:
        """The principle of an item."""
        random = np.random.default_rng([seed, *number])
        return self.principles[int(random.integers(len(self.principles)))]

    def question(
        self, record: Record, a: str, b: str, principle: Principle, *, think: bool = False
    ) -> str:
        """What a critic reads who is to choose one of two responses.

        Args:
          a, b: the responses.
          think: whether it may write something before it answers.
        """
        if self.in_miniature:
            return critics.question(record.prompt, a, b, principle.choose)
        turns = (f"{turn['role']}: {turn['content'].strip()}" for turn in _messages(record))
        return QUESTION.format(
            choose=principle.choose,
            conversation="\n".join(turns),
            a=a,
            b=b,
            ending=THINK if think else ANSWER,
        )

    def dialogue(self, record: Record, said: Sequence[str]) -> list[dict[str, Any]] | str:
        """The prompt for what a critic says next.

        Args:
          said: the response, a request, and perhaps the critique and another request.

        Returns:
          messages, or in the miniature a text: there a request and its answer are one line.
        """
        if self.in_miniature:
            response, *turns = said
            asked = (" ".join(turns[i : i + 2]) for i in range(0, len(turns), 2))
            return "\n".join([record.prompt, response, *asked])
        roles = ("assistant", "user")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        return [*_messages(record), *turns]


def _messages(record: Record) -> list[dict[str, Any]]:
    return [*record.messages] or [{"role": "user", "content": record.prompt}]


def read(source: str, needed: Sequence[str], names: Sequence[str] = ()) -> Constitution:
    """The principles of --principles and --only_principles.

    Args:
      source: a TOML file, or MINIATURE.
      needed: the parts that a principle must have to be read, of PARTS.
      names: the names of those to read; empty: all that have these parts.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no such principles; the message names file and principle.
    """
    flag = f"--principles {source}"
    if source == MINIATURE:
        rows = [principle._asdict() for principle in critics.PRINCIPLES]
        rows = [{name: row[name] for name in ("name", *PARTS)} for row in rows]
    else:
        rows = _read_rows(source, flag)
    principles = tuple(Principle(**row) for row in rows)
    unknown = sorted({*names} - {principle.name for principle in principles})
    if unknown:
        known = ", ".join(principle.name for principle in principles)
        raise ValueError(f"--only_principles {unknown[0]}: there are {known}")
    principles = tuple(p for p in principles if not names or p.name in names)
    able = tuple(p for p in principles if all(getattr(p, part) for part in needed))
    if not able or (names and len(able) < len(principles)):
        raise ValueError(f"{flag}: expected principles with {' and '.join(needed)}")
    return Constitution(able, source == MINIATURE)


def _read_rows(source: str, flag: str) -> list[dict[str, str]]:
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: no such file")
    try:
        rows = tomllib.loads(file.read_text("utf-8")).get("principles")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{flag}: expected tables [[principles]]")
    for i, row in enumerate(rows, 1):
        wrong = [key for key in row if key not in ("name", *PARTS) or not isinstance(row[key], str)]
        if wrong:
            keys = ", ".join(("name", *PARTS))
            raise ValueError(f"{flag}: principle {i}: {wrong[0]!r}: expected texts named {keys}")
        if not row.get("name"):
            raise ValueError(f"{flag}: principle {i} has no name")
    names = [row["name"] for row in rows]
    if len({*names}) < len(names):
        raise ValueError(f"{flag}: two principles have one name")
    return rows
