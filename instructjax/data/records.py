"""Rows -> records of four kinds, checked and rendered.

One class serves all kinds, as later code sees each record as a prompt and K responses.

    demonstrations   a prompt, one response
    comparisons      a prompt, 2 to 9 responses and a rank for each
    prompts          a prompt, no response
    text             no prompt, one response: the document
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from instructjax.data import conversation
from instructjax.data.columns import Column
from instructjax.data.conversation import Conversation
from instructjax.data.dialogue import Message
from instructjax.data.errors import DataError, Report, check_text, type_name
from instructjax.data.fields import NAMES, Fields, Kind
from instructjax.data.json_text import TWICE, loads
from instructjax.data.template import Template

LARGEST_MARGIN = 3e38  # of float32, which batches have


@dataclass(frozen=True, slots=True)
class Record:
    """One validated row of any kind."""

    where: str  # "file:line", for messages
    row: Mapping[str, Any]  # the row as read, with all its columns
    prompt: str = ""  # as the model reads it; "" only in text
    responses: tuple[str, ...] = ()  # demonstrations and text: 1; comparisons: K; prompts: none
    ranks: tuple[int, ...] = ()  # comparisons only: 1 is best, equal ranks are ties
    labeler: str | None = None  # comparisons only
    margin: float = 0.0  # comparisons only: by how much the best is better; 0 if not given
    confidence: float = 1.0  # comparisons only: probability that the better ones are better
    messages: Sequence[Message] = ()  # what `prompt` renders; a plain prompt is a user's message
    turns: tuple[Message, ...] = ()  # the replies that `responses` render
    tools: Any = None  # descriptions of tools that the chat template has in the prompt
    verbatim: bool = False  # whether prompt and responses are the row's own texts

    @property
    def replies(self) -> tuple[str, ...]:
        """The text of each reply, without the template's tokens."""
        return tuple(turn["content"] for turn in self.turns)

    @property
    def said(self) -> str:
        """What the row itself has in the prompt, whatever the template adds."""
        contents = [m["content"].strip() for m in self.messages if m["role"] != "system"]
        return "\n\n".join(contents) or self.prompt or self.responses[0]


def parse(
    row: Any,
    where: str,
    kind: Kind,
    columns: Mapping[str, Column],
    template: Template | None,
    report: Report | None = None,
    ranked: bool = True,
) -> Record:
    """Makes a record of a row.

    Args:
      row: the row as JSON decodes it; a bare string is a prompt or a text.
      where: its file and line.
      kind: the kind of record to make.
      columns: from `columns.parse_columns`; they take precedence over `fields.ALIASES`.
      template: renders the conversation; None leaves the row's texts as they are.
      report: counts replies that are cut, and notes columns that nothing reads.
      ranked: whether a comparison needs ranks that differ; without ranks all are 1.

    Raises:
      DataError: the row makes no such record; the message names file, line and field.
    """
    if isinstance(row, str) and kind in ("prompts", "text"):
        row = {NAMES[kind][0]: row}
    if not isinstance(row, dict):
        raise DataError(where, None, f"expected an object, got {type_name(row)}")
    fields = Fields(row, where, kind, columns)
    if kind == "text":
        record = Record(where, row, "", (fields.string("text"),))
    else:
        dialogue = conversation.read(fields, report)
        names = [name for name, _ in dialogue.replies]
        more: dict[str, Any] = {}
        if kind == "comparisons":
            more = {"ranks": _ranks(fields, names, ranked)} | _remarks(fields)
        record = _rendered(fields, dialogue, template, report, more)
        if kind == "comparisons":
            _check_repeats(fields, record, names, report)
    if report is not None:
        report.note_unread(fields.unread())
    return record


def rank(scores: Sequence[float]) -> tuple[int, ...]:
    """Ranks with 1 for the highest score; equal scores share a rank: (70, 90, 70) -> (2, 1, 2)."""
    return tuple(1 + sum(other > score for other in scores) for score in scores)


def _ranks(fields: Fields, names: list[str], needed: bool) -> tuple[int, ...]:
    """The ranks of the responses with these names: 1 for the best, and for all that have none."""
    count, pair = len(names), names == ["chosen", "rejected"]
    orders: dict[str, tuple[int, ...]] = {}
    for name in ("ranks", "scores"):
        # Beside a pair, other libraries' data have these columns about other texts.
        if fields.has(name) and (not pair or name in fields.columns):
            orders[name] = _order(fields, name, count)
    if pair:
        orders = {"chosen": (1, 2), **orders}
    if not orders and not needed:
        return (1,) * count
    if not orders:
        fields.get("ranks")  # raises
    first, *others = orders
    for name in others:
        check = zip(orders[first], orders[name], names, strict=True)
        for (rank_a, other_a, _), (rank_b, other_b, response) in combinations(check, 2):
            if (rank_a - rank_b) * (other_a - other_b) < 0:
                raise fields.error(name, f"contradicts '{first}' about '{response}'")
    if len(set(orders[first])) == 1 and needed:
        raise fields.error(first, "all responses are tied")
    return orders[first]


def _order(fields: Fields, name: str, count: int) -> tuple[int, ...]:
    """The ranks that the `ranks` or `scores` of `count` responses say."""
    values = fields.array(name)
    if len(values) != count:
        raise fields.error(name, f"{len(values)} {name} for {count} responses")
    if name == "scores" and name in fields.columns and all(isinstance(v, bool) for v in values):
        values = [int(value) for value in values]  # a column such as `is_correct`, chosen by name
    numbers = [fields.number(value, f"{name}.{i}") for i, value in enumerate(values)]
    if name == "scores":
        return rank(numbers)
    for i, number in enumerate(numbers):
        if number != int(number) or not 1 <= number <= count:
            problem = f"ranks run from 1 (best) to at most {count}, not {values!r:.60}"
            raise fields.error(f"{name}.{i}", problem)
    if min(numbers) != 1:
        raise fields.error(name, f"no response has rank 1, the best: {values!r:.60}")
    return tuple(int(number) for number in numbers)


def _check_repeats(fields: Fields, record: Record, names: list[str], report: Report | None) -> None:
    """Refuses responses of one text with several ranks; a tie of equal texts counts nowhere."""
    texts, ranks = record.responses, record.ranks
    if len(set(texts)) == 1:
        raise fields.error(names[-1], f"equals '{names[0]}'")
    if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
        raise fields.error("responses", "has one text twice, with different ranks")
    if report is not None:
        reason = "responses that repeat another of their comparison"
        report.count("tied", reason, fields.where, len(texts) - len(set(texts)))


def _remarks(fields: Fields) -> dict[str, Any]:
    """Who ranked the responses, by how much the best is better, and how surely, where the row says
    so."""
    labeler = fields.get("labeler") if fields.has("labeler") else None
    if isinstance(labeler, float) and labeler.is_integer():  # of a column that has nulls
        labeler = int(labeler)
    if isinstance(labeler, bool) or not isinstance(labeler, str | int | None):
        raise fields.error("labeler", f"expected a name, got {type_name(labeler)}")
    if isinstance(labeler, str):
        labeler = check_text(labeler, fields.where, "labeler")
    margin = fields.number(fields.get("margin"), "margin") if fields.has("margin") else 0.0
    if not 0 <= margin <= LARGEST_MARGIN:
        problem = f"by how much the best is better: from 0 to {LARGEST_MARGIN:.2g}, not {margin}"
        raise fields.error("margin", problem)
    confidence = 1.0
    if fields.has("confidence"):
        confidence = float(fields.number(fields.get("confidence"), "confidence"))
    if not 0.5 <= confidence <= 1:
        problem = f"probability that the better response is better: 0.5 to 1, not {confidence}"
        raise fields.error("confidence", problem)
    return {
        "labeler": None if labeler is None else str(labeler),
        "margin": float(margin),
        "confidence": confidence,
    }


def _rendered(
    fields: Fields,
    dialogue: Conversation,
    template: Template | None,
    report: Report | None,
    more: Mapping[str, Any],
) -> Record:
    tools, messages = _tools(fields), list(dialogue.messages)
    replies = [] if fields.kind == "prompts" else dialogue.replies
    plain = template is None or template.form == "plain"
    verbatim = plain and dialogue.texts is not None and tools is None
    if verbatim:
        assert dialogue.texts is not None
        prompt, responses = dialogue.texts[0], dialogue.texts[1][: len(replies)]
        verbatim = template is not None or messages[0]["role"] != "system"
    elif template is None:
        prompt = "\n\n".join(message["content"] for message in messages)
        responses = [json.dumps(turn) for _, turn in replies]
    else:
        prompt = template.prompt(messages, fields.where, "prompt", tools)
        responses = [
            template.reply(prompt, [*messages, turn], fields.where, name, tools)
            for name, turn in replies
        ]
        if report is not None and replies:
            reason = "replies lose the turns after the first: a response is one turn"
            report.count("cut", reason, fields.where, dialogue.cut)
    if template is not None:
        for (name, turn), response in zip(replies, responses, strict=True):
            _check_end(fields, name, turn, response, template)
    names = ["prompt", *(name for name, _ in replies)]
    for name, text in zip(names, [prompt, *responses], strict=True):
        check_text(text, fields.where, name)  # tools may hold half of a surrogate pair
    turns = tuple(turn for _, turn in replies)
    if report is not None:
        shown = "".join([prompt, *responses])
        report.note_unread(
            f"messages.*.{key}"
            for message in (*messages, *turns)
            for key in ("name", "tool_call_id")
            if key in message and str(message[key]) not in shown
        )
    rendered = {"messages": messages, "turns": turns, "tools": tools, "verbatim": verbatim}
    return Record(fields.where, fields.row, prompt, tuple(responses), **more, **rendered)


def _check_end(fields: Fields, name: str, turn: Message, response: str, template: Template) -> None:
    """Refuses a token that ends a response before the reply's end, where a rollout would stop.

    What a chat template writes after the end of turn may hold further ones.
    """
    text = response if template.form == "plain" else turn["content"]
    text = text.rstrip()
    text = next((text[: -len(end)] for end in template.ends if text.endswith(end)), text)
    extras = {key: value for key, value in turn.items() if key not in ("role", "content")}
    text += json.dumps(extras, ensure_ascii=False)
    for end in template.ends:
        if end in text:
            raise fields.error(name, f"{end!r} ends a response, and stands before the reply's end")


def _tools(fields: Fields) -> Any:
    if not fields.has("tools"):
        return None
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools, repeated = loads(tools)
        except (RecursionError, ValueError) as error:
            raise fields.error("tools", f"not JSON: {error}") from error
        if repeated is not None:
            raise fields.error(f"tools.{repeated}", TWICE)
    if not isinstance(tools, list):
        raise fields.error("tools", f"expected a list, got {type_name(tools)}")
    return tools
