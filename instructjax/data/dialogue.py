r"""Conversations: lists of messages, Anthropic's form, JSON text and trees of replies -> messages.

A message is `{"role", "content"}` with, where a row has them, the keys of `EXTRAS`. `template.py`
renders messages as text.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from instructjax.data.errors import DataError, Report, check_text, type_name
from instructjax.data.json_text import TWICE, loads

Message = dict[str, Any]
Messages = list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
# The names of ShareGPT, OpenAssistant and the sets made from them.
ROLE_NAMES = {"human": "user", "prompter": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"
)
# Besides role and content, chat templates read these. A template that ignores one of the first
# three would leave out a part of what the assistant said.
SAID = ("tool_calls", "reasoning_content", "thinking")
EXTRAS = (*SAID, "tool_call_id", "name")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_messages(
    value: Any, where: str, field: str, role: str = "user", report: Report | None = None
) -> Messages:
    """Returns checked messages.

    Args:
      value: a list of messages, also as JSON text, a message, or the text of a message of `role`.
      report: notes the keys of messages that nothing reads.

    Raises:
      DataError: the value is none of these, or a message lacks its role or content.
    """
    if isinstance(value, str):
        parsed = parse_json(value, where, field)
        value = {"role": role, "content": value} if parsed is None else parsed
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(where, field, f"expected a list of messages, got {type_name(value)}")
    messages = [_message(item, where, f"{field}.{i}", report) for i, item in enumerate(value)]
    return [m for m in messages if (m["role"], m["content"]) != ("system", "")]


def _message(value: Any, where: str, field: str, report: Report | None) -> Message:
    if not isinstance(value, dict):
        problem = f"expected an object with role and content, got {type_name(value)}"
        raise DataError(where, field, problem)
    role = check_text(_either(value, "role", "from", where, field), where, f"{field}.role")
    role = ROLE_NAMES.get(role, role)
    if role not in ROLES:
        raise DataError(where, f"{field}.role", f"{role!r} is none of {', '.join(ROLES)}")
    extras = {key: value[key] for key in EXTRAS if value.get(key) not in (None, "", [])}
    content = _either(value, "content", "value", where, field)
    content = _content(content, where, f"{field}.content")
    if "tool_calls" in extras and content in (None, ""):
        content = ""
    elif not (role == "system" and content == ""):
        check_text(content, where, f"{field}.content")
    if "tool_calls" in extras:
        extras["tool_calls"] = _tool_calls(extras["tool_calls"], where, f"{field}.tool_calls")
    if report is not None:
        read = {"role", "from", "content", "value", *EXTRAS}
        report.note_unread(
            f"{re.sub(r'[.][0-9]+', '.*', field)}.{key}"
            for key, item in value.items()
            if key not in read and item not in (None, "", [], {})
        )
    return {"role": role, "content": content, **extras}


def _either(value: dict, key: str, other: str, where: str, field: str) -> Any:
    """The value of either of two keys, of which one name is OpenAI's and one ShareGPT's.

    Raises:
      DataError: both have a value, and the two differ.
    """
    first, second = value.get(key), value.get(other)
    if first in (None, "") and second is not None:
        return second
    roles = [ROLE_NAMES.get(name, name) for name in (first, second) if isinstance(name, str)]
    same = first == second or (key == "role" and len(roles) == 2 and roles[0] == roles[1])
    if second not in (None, "") and not same:
        raise DataError(where, f"{field}.{other}", f"differs from '{key}' of the same message")
    return first


def _content(value: Any, where: str, field: str) -> Any:
    """The text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(value, list):
        return value
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type_name(part)
            raise DataError(where, f"{field}.{i}", f"expected a part of type text, got {kind}")
        check_text(part.get("text"), where, f"{field}.{i}.text")
    return "".join(part["text"] for part in value)


def _tool_calls(calls: Any, where: str, field: str) -> Any:
    """Tool calls whose arguments are JSON text get them as objects, which templates expect."""
    try:
        calls = json.loads(json.dumps(calls))  # a copy
    except (RecursionError, TypeError, ValueError) as error:
        raise DataError(where, field, f"not usable as JSON: {error}") from error
    for i, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"], repeated = loads(function["arguments"])
            except (RecursionError, ValueError):
                continue
            if repeated is not None:
                raise DataError(where, f"{field}.{i}.arguments.{repeated}", TWICE)
    return calls


def parse_json(text: str, where: str, field: str) -> Messages | None:
    """The list of messages that a text holds as JSON; None if it holds none.

    A single object is no conversation: replies that are JSON themselves often look like one.

    Raises:
      DataError: a key stands twice in a message.
    """
    if text.lstrip()[:1] != "[":
        return None
    try:
        value, repeated = loads(text)
    except (ValueError, RecursionError):
        return None
    if not are_messages(value):
        return None
    if repeated is not None:
        raise DataError(where, f"{field}.{repeated}", TWICE)
    return value


def are_messages(value: Any) -> bool:
    """Whether a value has the form of a message or of a list of messages."""
    items = value if isinstance(value, list) else [value]
    keys = [item.keys() if isinstance(item, dict) else set() for item in items]
    forms = {"role", "content"}, {"role", "tool_calls"}, {"from", "value"}
    return bool(items) and all(any(form <= k for form in forms) for k in keys)


# --- Anthropic's form ---


def parse_anthropic(text: str) -> Messages | None:
    r"""The messages of `[system]\n\nHuman: ...\n\nAssistant: ...`; None for any other text.

    Neighbours of one role become one message, and an open turn at the end is left off.
    """
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if len(parts) < 3 or parts[1] != "Human" or (parts[0].strip() and len(parts) < 5):
        return None
    messages = [{"role": "system", "content": parts[0].strip()}] if parts[0].strip() else []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            joined = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
            messages[-1] = {"role": role, "content": joined}
        else:
            messages.append({"role": role, "content": content.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def split_anthropic(dialogues: Sequence[str], where: str) -> tuple[str, list[str]]:
    r"""Splits dialogues in Anthropic's form into the prompt that they share, and the replies.

    The prompt ends at the last `\n\nAssistant:` that all share. A reply is all text after it: in a
    few of the published pairs it holds further turns.

    Raises:
      DataError: the dialogues share no `\n\nAssistant:`.
    """
    end = os.path.commonprefix(list(dialogues)).rfind(ASSISTANT)  # noqa: RUF071 - of characters
    if end <= 0:
        problem = f"is missing, and the responses share no dialogue up to {ASSISTANT!r}"
        raise DataError(where, "prompt", problem)
    end += len(ASSISTANT)
    return dialogues[0][:end], [dialogue[end:] for dialogue in dialogues]


# --- trees of replies ---


def is_tree(row: Any) -> bool:
    """Whether a row is a conversation tree of OpenAssistant's export."""
    return (
        isinstance(row, dict) and isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]
    )


def _check_ranked(reply: dict, where: str) -> None:
    """Checks that a ranked reply to a prompter has a whole number as its rank, and is a reply."""
    rank = reply["rank"]  # a float where a column of whole numbers has nulls
    whole = rank.is_integer() if isinstance(rank, float) else isinstance(rank, int)
    if not whole or isinstance(rank, bool):
        raise DataError(where, "rank", f"expected a whole number, got {type_name(rank)}")
    role = str(reply.get("role"))
    if ROLE_NAMES.get(role, role) != "assistant":
        raise DataError(where, "role", f"a ranked reply must be an assistant's, not of {role!r}")


def expand_tree(row: dict, kind: str, where: str, report: Report) -> Iterator[dict]:
    """Yields rows of one kind from a tree {"prompt": {"text", "role", "replies": [...]}}.

    The tree is read depth first. Each message of a prompter gives
      prompts: one row;
      demonstrations: a row for each reply of rank 0;
      comparisons: one row of all ranked replies, if there are two or more.
    `report` counts the replies left out.
    """
    stack: list[tuple[Any, list[dict]]] = [(row["prompt"], [])]
    while stack:
        node, before = stack.pop()
        replies = node.get("replies", []) if isinstance(node, dict) else None
        if not isinstance(replies, list) or not all(isinstance(r, dict) for r in replies):
            raise DataError(
                where, "prompt.replies", "expected messages with text, role and replies"
            )
        path = [*before, {"role": node.get("role"), "content": node.get("text")}]
        stack.extend((reply, path) for reply in reversed(replies))
        role = ROLE_NAMES.get(str(node.get("role")), str(node.get("role")))
        if not before and role != "user":
            raise DataError(where, "prompt.role", f"expected prompter or user, got {role!r:.40}")
        if role != "user":
            continue
        ranked = [r for r in replies if r.get("rank") is not None]
        for reply in ranked:
            _check_ranked(reply, where)
        if kind == "prompts":
            yield {**row, "prompt": path}
        elif kind == "demonstrations":
            best = [r for r in ranked if r["rank"] == 0]
            report.count(
                "left out", "replies that are not ranked first", where, len(replies) - len(best)
            )
            for reply in best:
                yield {**row, "prompt": path, "completion": reply.get("text")}
        elif kind == "comparisons":
            used = ranked if len(ranked) > 1 else []
            report.count("left out", "replies with no rank, or none to rank against", where,
                         len(replies) - len(used))  # fmt: skip
            if used:
                texts, ranks = [r.get("text") for r in used], [-r["rank"] for r in used]
                yield {**row, "prompt": path, "responses": texts, "scores": ranks}
