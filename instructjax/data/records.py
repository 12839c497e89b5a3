"""Rows -> records of four kinds: the conventional names of their columns, and the checks.

One class serves all kinds, as later code sees each record as a prompt and K responses.

    demonstrations   a prompt, one response
    comparisons      a prompt, 2 to 9 responses and a rank for each
    prompts          a prompt, no response
    text             no prompt, one response: the document
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from instructjax.data.columns import Column
from instructjax.data.dialogue import (
    Messages,
    Render,
    check_messages,
    render_prompt,
    split_pair,
    split_reply,
)
from instructjax.data.errors import DataError, check_text, type_name

Kind = Literal["demonstrations", "comparisons", "prompts", "text"]

FIELDS: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "completion", "messages"),
    "comparisons": (
        "prompt",
        "responses",
        "ranks",
        "scores",
        "chosen",
        "rejected",
        "labeler",
        "margin",
    ),
    "prompts": ("prompt", "messages", "chosen", "rejected"),
    "text": ("text",),
}
# The names of a field in other libraries' data; the first that a row has is read.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversations"),
    "responses": ("responses", "completions", "answers"),
    "ranks": ("ranks", "ranking"),
    "scores": ("scores", "ratings"),
    "labeler": ("labeler", "annotator", "worker"),
    "text": ("text", "content", "document"),
}


@dataclass(frozen=True, slots=True)
class Record:
    """One validated row of any kind."""

    where: str  # "file:line", for messages
    row: Mapping[str, Any]  # the row as read, with all its columns
    prompt: str = ""  # "" only in text
    responses: tuple[str, ...] = ()  # demonstrations and text: 1; comparisons: K; prompts: none
    ranks: tuple[int, ...] = ()  # comparisons only: 1 is best, equal ranks are ties
    labeler: str | None = None  # comparisons only
    margin: float = 0.0  # comparisons only: by how much the best is better; 0 if not given


def parse(
    row: Any, where: str, kind: Kind, columns: Mapping[str, Column], render: Render
) -> Record:
    """Makes a record of a row.

    Args:
      row: the row as JSON decodes it; a bare string is a prompt or a text.
      where: its file and line.
      kind: the kind of record to make.
      columns: from `columns.parse_columns`; they take precedence over `ALIASES`.
      render: the chat template; `render(messages, False)` must begin with
        `render(messages[:-1], True)`.
    Raises:
      DataError: the row makes no such record; the message names file, line and field.
    """
    if isinstance(row, str) and kind in ("prompts", "text"):
        row = {FIELDS[kind][0]: row}
    if not isinstance(row, dict):
        raise DataError(where, None, f"expected an object, got {type_name(row)}")
    return getattr(_Row(row, where, kind, columns, render), kind)()


def rank(scores: Sequence[float]) -> tuple[int, ...]:
    """Ranks with 1 for the highest score; equal scores share a rank: (70, 90, 70) -> (2, 1, 2)."""
    return tuple(1 + sum(other > score for other in scores) for score in scores)


@dataclass(frozen=True)
class _Row:
    """A row being read. The method named after a kind makes a record of that kind."""

    row: dict[str, Any]
    where: str
    kind: str
    columns: Mapping[str, Column]
    render: Render

    def text(self) -> Record:
        return self.record("", self.string("text"))

    def prompts(self) -> Record:
        if self.has("messages") and not self.has("prompt"):
            messages = self.messages("messages")
            return self.record(render_prompt(messages, self.render, self.where, "messages"))
        if self.has("chosen") and not self.has("prompt"):
            if isinstance(self.get("chosen"), list):
                messages = self.messages("chosen")
                return self.record(render_prompt(messages, self.render, self.where, "chosen"))
            chosen, rejected = self.string("chosen"), self.string("rejected")
            return self.record(split_pair(chosen, rejected, self.where)[0])
        return self.record(self.prompt())

    def demonstrations(self) -> Record:
        if self.has("messages") and not self.has("completion"):
            return self.record(*self.split(self.messages("messages"), "messages"))
        if isinstance(self.get("prompt"), list) or isinstance(self.get("completion"), list):
            reply = self.messages("completion", role="assistant")
            return self.record(*self.split([*self.messages("prompt"), *reply], "completion"))
        return self.record(self.prompt(), self.string("completion"))

    def comparisons(self) -> Record:
        if self.has("responses"):
            responses = self.array("responses")
            if not 2 <= len(responses) <= 9:
                raise self.error("responses", f"expected 2 to 9 responses, got {len(responses)}")
            for i, response in enumerate(responses):
                check_text(response, self.where, f"responses.{i}")
            prompt, ranks = self.prompt(), self.ranks(len(responses))
            if isinstance(self.get("prompt"), list):
                turns = [{"role": "assistant", "content": response} for response in responses]
                start = self.messages("prompt")
                responses = [self.split([*start, turn], "responses")[1] for turn in turns]
        else:
            if not self.has("chosen"):
                raise self.error("responses", f"is missing; the row has {list(self.row)}")
            prompt, *responses = self.pair()
            ranks = (1, 2)
        labeler = self.get("labeler") if self.has("labeler") else None
        if isinstance(labeler, bool) or not isinstance(labeler, str | int | None):
            raise self.error("labeler", f"expected a name, got {type_name(labeler)}")
        margin = self.get("margin") if self.has("margin") else None
        return self.record(
            prompt,
            *responses,
            ranks=ranks,
            labeler=None if labeler in (None, "") else str(labeler),
            margin=0.0 if margin is None else self.number(margin, "margin"),
        )

    def ranks(self, count: int) -> tuple[int, ...]:
        name = "scores" if self.has("scores") and not self.has("ranks") else "ranks"
        values = self.array(name)
        if len(values) != count:
            raise self.error(name, f"{len(values)} {name} for {count} responses")
        numbers = [self.number(value, f"{name}.{i}") for i, value in enumerate(values)]
        if len(set(numbers)) == 1:
            raise self.error(name, "all responses are tied")
        if name == "scores":
            return rank(numbers)
        if any(n != int(n) for n in numbers) or min(numbers) != 1 or max(numbers) > count:
            raise self.error(name, f"ranks run from 1 (best) to at most {count}, not {values}")
        return tuple(int(n) for n in numbers)

    def pair(self) -> tuple[str, str, str]:
        """(prompt, chosen, rejected); a row gives replies, or dialogues that hold the prompt."""
        values = {name: self.get(name) for name in ("chosen", "rejected")}
        if any(isinstance(value, list) for value in values.values()):
            turns = {name: self.messages(name, role="assistant") for name in values}
            if self.has("prompt") and all(len(messages) == 1 for messages in turns.values()):
                start = self.messages("prompt")
                turns = {name: [*start, *messages] for name, messages in turns.items()}
            if turns["chosen"][:-1] != turns["rejected"][:-1]:
                raise self.error("rejected", "does not reply to the same messages as 'chosen'")
            prompt, chosen = self.split(turns["chosen"], "chosen")
            _, rejected = self.split(turns["rejected"], "rejected")
        else:
            chosen, rejected = self.string("chosen"), self.string("rejected")
            if self.has("prompt"):
                prompt = self.prompt()
            else:
                prompt, chosen, rejected = split_pair(chosen, rejected, self.where)
                check_text(chosen, self.where, "chosen")
                check_text(rejected, self.where, "rejected")
        if chosen == rejected:
            raise self.error("rejected", "equals 'chosen'")
        return prompt, chosen, rejected

    def prompt(self) -> str:
        if isinstance(self.get("prompt"), list):
            return render_prompt(self.messages("prompt"), self.render, self.where, "prompt")
        prompt = self.string("prompt")
        if "prompt" not in self.columns and "prompt" not in self.row and "instruction" in self.row:
            for name in ("input", "context"):  # the second part of Alpaca's and Dolly's prompts
                if self.row.get(name) not in (None, ""):
                    prompt = f"{prompt}\n\n{check_text(self.row[name], self.where, name)}"
        return prompt

    # --- one field of the row ---

    def has(self, name: str) -> bool:
        if name not in FIELDS[self.kind]:
            return False
        return name in self.columns or any(
            alias in self.row for alias in ALIASES.get(name, (name,))
        )

    def get(self, name: str) -> Any:
        if name in self.columns:
            try:
                return self.columns[name](self.row)
            except KeyError as error:
                raise self.error(name, f"no column {error} among {list(self.row)}") from error
            except TypeError as error:
                raise self.error(name, str(error)) from error
        for alias in ALIASES.get(name, (name,)):
            if alias in self.row:
                return self.row[alias]
        raise self.error(name, f"is missing; the row has {list(self.row)}")

    def string(self, name: str) -> str:
        return check_text(self.get(name), self.where, name)

    def array(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.error(name, f"expected a list, got {type_name(value)}")
        return value

    def messages(self, name: str, role: str = "user") -> Messages:
        return check_messages(self.get(name), self.where, name, role)

    def split(self, messages: Messages, name: str) -> tuple[str, str]:
        return split_reply(messages, self.render, self.where, name)

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

    def record(self, prompt: str, *responses: str, **fields: Any) -> Record:
        return Record(self.where, self.row, prompt, responses, **fields)
