"""Rows of data -> screens: a prompt with responses to rank, two to compare, or none (to write one).

A row may be a comparison (`prompt`, `responses`; `models` where they are known), or one response
(`prompt`, `response` and `model`, as evaluate.py writes them). The single responses to one prompt
make one screen.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from instructjax.data import conversation, dialogue, records, sources
from instructjax.data.conversation import Conversation
from instructjax.data.dialogue import Message, Messages
from instructjax.data.errors import DataError, Report, type_name
from instructjax.data.fields import ALIASES, Fields
from instructjax.label.answers import FLAGS, are_flags

Kind = Literal["rank", "pairs", "write"]
Reply = str | Messages  # a text, or one message where it holds more than a text

MOST = 9  # responses of a screen, as of a comparison


@dataclass(frozen=True)
class Screen:
    """What a labeler sees at a time. Lists are in the order of the data, not in the labeler's."""

    kind: Kind
    prompt: str | Messages  # as a row of data has it
    tools: Any = None
    responses: Sequence[Reply] = ()  # different ones, but for pairs; none to write
    models: Sequence[Sequence[str]] = ()  # who wrote each response; empty if that is not told
    known_ranks: Sequence[int] = ()  # of a screening set: 1 is best
    known_flags: Sequence[Sequence[str]] = ()  # of a screening set, where it tells them

    @property
    def id(self) -> str:
        """A name that depends on what the screen holds alone."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:20]

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each message of the prompt, as a labeler reads it."""
        messages: Messages = [{"role": "user", "content": str(self.prompt)}]
        if not isinstance(self.prompt, str):
            messages = list(self.prompt)
        elif parsed := dialogue.parse_anthropic(self.prompt):
            messages = parsed
        if self.tools is not None:
            tools = json.dumps(self.tools, ensure_ascii=False, indent=1)
            messages = [{"role": "tools", "content": tools}, *messages]
        return [(message["role"], _said(message)) for message in messages]

    @property
    def texts(self) -> list[str]:
        """Each response, as a labeler reads it."""
        return [x if isinstance(x, str) else _said(x[0]) for x in self.responses]


def _said(message: Message) -> str:
    """The text of a message, and what else it holds, such as calls of tools, as JSON."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    parts = [message["content"], json.dumps(more, ensure_ascii=False, indent=1) if more else ""]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class _Written:
    """A prompt, and responses to it with their models; a row's, or those of all rows with it."""

    where: str
    prompt: str | Messages
    tools: Any
    responses: list[tuple[Reply, str | None]]


def read(
    spec: str,
    kind: Kind = "rank",
    *,
    most: int | None = None,
    log: Callable[[str], None] = print,
) -> list[Screen]:
    """The screens of a data set, in the order of the data.

    Args:
      spec: a SPEC, as of --data.
      kind: `rank` shows all responses to a prompt, at most nine at a time; `pairs` shows one
        response of each of two models; `write` shows the prompt alone.
      most: the number of screens to make; by default all.
      log: receives the report on rows read and left out.

    Raises:
      DataError: a row cannot be shown, or no screen is left; the message names its place.
    """
    report = Report(spec, "raise", log)
    make = {"rank": _rankings, "pairs": _pairs, "write": _writings}[kind]
    screens: dict[str, Screen] = {}
    made = itertools.chain.from_iterable(
        make(written, report) for written in _gathered(_rows(spec, kind, report))
    )
    for where, screen in made:
        if screen.id in screens:
            report.count("left out", "screens that repeat an earlier one", where)
        screens.setdefault(screen.id, screen)
        if len(screens) == most:
            break
    report.print(len(screens), "screens")
    return list(screens.values())


def read_known(spec: str, log: Callable[[str], None] = print) -> list[Screen]:
    """The screens of a screening set: rows with `responses`, their `ranks` and perhaps `flags`.

    `flags` has the names of the flags of each response, as an export has them.

    Raises:
      DataError: a row is no comparison, or `flags` has another form.
    """
    report = Report(spec, "raise", log)
    screens = []
    for where, row in sources.rows(spec, "comparisons"):
        report.rows += 1
        if isinstance(row, DataError):
            raise row
        ranks = records.parse(row, where, "comparisons", {}, None).ranks
        written = _row(row, where, "rank")
        flags = _known_flags(row.get("flags"), where, len(ranks))
        # Of equal texts, whose ranks are equal too, the first is shown.
        texts = [_key(reply) for reply, _ in written.responses]
        kept = [i for i, text in enumerate(texts) if text not in texts[:i]]
        screens.append(
            Screen(
                "rank",
                written.prompt,
                written.tools,
                [written.responses[i][0] for i in kept],
                known_ranks=records.rank([-ranks[i] for i in kept]),
                known_flags=[flags[i] for i in kept] if flags else (),
            )
        )
    report.print(len(screens), "screens with known answers")
    return list({screen.id: screen for screen in screens}.values())


def _known_flags(value: Any, where: str, count: int) -> list[list[str]]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) != count:
        raise DataError(where, "flags", "expected a list of flags for each response")
    for i, names in enumerate(value):
        if not are_flags(names):
            raise DataError(where, f"flags.{i}", f"expected a list of {', '.join(FLAGS)}")
    return value


# ------------------------------------------------------------------------------------------ rows


def _rows(spec: str, kind: Kind, report: Report) -> Iterator[_Written]:
    record = "prompts" if kind == "write" else "comparisons"
    for where, row in sources.rows(spec, record):
        report.rows += 1
        if isinstance(row, DataError):
            raise row
        if kind == "rank" and isinstance(row, dict) and row.get("ended") is False:
            # Training would read it as a whole one.
            report.count("left out", "responses that did not end", where)
            continue
        tree = dialogue.is_tree(row)
        for part in dialogue.expand_tree(row, record, where, report) if tree else [row]:
            yield _row(part, where, kind)


def _row(row: Any, where: str, kind: Kind) -> _Written:
    """What a row holds for screens of a kind."""
    if isinstance(row, str) and kind == "write":
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise DataError(where, None, f"expected an object, got {type_name(row)}")
    tools = row.get("tools") or None
    fields = Fields(row, where, "comparisons", {})
    if kind == "write":
        said = conversation.read(Fields(row, where, "prompts", {}))
        return _Written(where, _prompt(said), tools, [])
    if fields.has("responses") or fields.has("chosen"):
        said = conversation.read(fields)
        models = _models(row.get("models"), where, len(said.replies))
        replies = list(zip(_replies(said), models, strict=True))
        return _Written(where, _prompt(said), tools, replies)
    model = row.get("model")
    if not isinstance(model, str | None):
        raise DataError(where, "model", f"expected a name, got {type_name(model)}")
    fields = Fields(row, where, "demonstrations", {})
    if not fields.has("completion") and not fields.has("messages"):
        raise DataError(where, "responses", f"is missing; the row has {list(row)}")
    if any(isinstance(row.get(x), str) and not row[x].strip() for x in ALIASES["completion"]):
        # A model may end its response at once: data for training leave that out, labelers judge it.
        said = conversation.read(Fields(row, where, "prompts", {}))
        return _Written(where, _prompt(said), tools, [("", model)])
    said = conversation.read(fields)
    return _Written(where, _prompt(said), tools, [(_replies(said)[0], model)])


def _prompt(said: Conversation) -> str | Messages:
    return said.messages if said.texts is None else said.texts[0]


def _replies(said: Conversation) -> list[Reply]:
    if said.texts is not None:
        return [*said.texts[1]]
    plain = {"role", "content"}
    return [turn["content"] if turn.keys() == plain else [turn] for _, turn in said.replies]


def _key(reply: Reply) -> str:
    """Equal for replies that one template may render alike: some leave out the outer spaces."""
    return json.dumps(reply.strip() if isinstance(reply, str) else reply)


def _models(value: Any, where: str, count: int) -> Sequence[str | None]:
    if value is None:
        return [None] * count
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(where, "models", "expected a list of names, one for each response")
    if len(value) != count:
        raise DataError(where, "models", f"{len(value)} for {count} responses")
    return value


def _gathered(rows: Iterable[_Written]) -> Iterator[_Written]:
    """Rows of several responses as they are; then rows of one response, joined by their prompt."""
    alone: dict[str, _Written] = {}
    for row in rows:
        if len(row.responses) != 1:
            yield row
            continue
        key = json.dumps([row.prompt, row.tools], sort_keys=True)
        alone.setdefault(key, _Written(row.where, row.prompt, row.tools, []))
        alone[key].responses.extend(row.responses)
    yield from alone.values()


# --------------------------------------------------------------------------------------- screens


def _rankings(written: _Written, report: Report) -> Iterator[tuple[str, Screen]]:
    """Screens of 2 to 9 different responses. A text that several models wrote is shown once."""
    by_text: dict[str, tuple[Reply, list[str]]] = {}
    for reply, model in written.responses:
        _, models = by_text.setdefault(_key(reply), (reply, []))
        models.extend([] if model is None else [model])
    if len(by_text) < 2:
        reason = "prompts without two different responses to rank"
        report.count("left out", reason, written.where)
        return
    replies = list(by_text.values())
    parts = -(-len(replies) // MOST)
    for part in range(parts):  # each has responses of all models, whose rows follow one another
        shown = replies[part::parts]
        told = all(models for _, models in shown)
        yield (
            written.where,
            Screen(
                "rank",
                written.prompt,
                written.tools,
                [reply for reply, _ in shown],
                [models for _, models in shown] if told else (),
            ),
        )


def _pairs(written: _Written, report: Report) -> Iterator[tuple[str, Screen]]:
    """Screens of two responses, for each pair of models, sample by sample. Equal texts are shown:
    to leave such ties out would move win rates."""
    samples: dict[str, list[Reply]] = {}
    for reply, model in written.responses:
        if model is None:
            raise DataError(written.where, "model", "is missing, and --pairs compares models")
        samples.setdefault(model, []).append(reply)
    if len(samples) < 2:
        report.count("left out", "prompts with responses of one model alone", written.where)
    for a, b in itertools.combinations(samples, 2):
        for pair in zip(samples[a], samples[b], strict=False):
            models = [[a], [b]]
            yield written.where, Screen("pairs", written.prompt, written.tools, [*pair], models)


def _writings(written: _Written, report: Report) -> Iterator[tuple[str, Screen]]:
    yield written.where, Screen("write", written.prompt, written.tools)


def from_json(text: str) -> Screen:
    """A screen that `to_json` has written."""
    values: Mapping[str, Any] = json.loads(text)
    return Screen(**values)


def to_json(screen: Screen) -> str:
    return json.dumps(asdict(screen), ensure_ascii=False)
