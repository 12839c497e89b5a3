"""A row -> the conversation before the replies, and the replies: the same for every kind of record.

So a row has one prompt in SFT, in the reward model and in PPO, whatever its layout:

    prompt, completion                          texts, or lists of messages
    prompt, responses                           K texts, messages or dialogues
    prompt?, chosen, rejected                   replies, or dialogues that hold the prompt
    messages                                    a dialogue, which may end in the reply
    + system, history, input                    parts of the prompt in columns of their own
"""

import re
from dataclasses import dataclass, replace

from instructjax.data.dialogue import (
    ASSISTANT,
    Message,
    Messages,
    are_messages,
    parse_anthropic,
    parse_json,
    read_messages,
    split_anthropic,
)
from instructjax.data.errors import Report, check_text, type_name
from instructjax.data.fields import INPUT, Fields

Side = str | Messages  # as a row gives a prompt or a reply


@dataclass(frozen=True)
class Conversation:
    """What stands before the replies, and the replies, each with its field's name."""

    messages: Messages
    replies: list[tuple[str, Message]]
    texts: tuple[str, list[str]] | None = None  # (prompt, replies) of a row that has texts alone
    cut: int = 0  # replies that lose further turns, which `texts` has


def read(fields: Fields, report: Report | None = None) -> Conversation:
    """Reads a row in any of the layouts above.

    Raises:
      DataError: the row has another layout, or its columns contradict each other.
    """
    sides = _sides(fields, report)
    prompt = None
    if fields.has("prompt"):
        prompt = _side(fields, "prompt", fields.get("prompt"), "user", report)
    if fields.has("messages"):
        prompt, sides = _dialogue(fields, prompt, sides, report)
    if prompt is None and not sides:
        fields.get("prompt")  # raises
    if isinstance(prompt, list) or any(isinstance(side, list) for _, side in sides):
        conversation = _of_messages(fields, prompt, sides)
    else:
        conversation = _of_texts(fields, prompt, sides)
    if not conversation.messages or conversation.messages[-1]["role"] in ("assistant", "system"):
        name = "prompt" if fields.has("prompt") or not sides else sides[0][0]
        name = "messages" if fields.has("messages") else name
        raise fields.error(name, "holds no message that a reply could follow")
    return _with_context(fields, conversation)


def _sides(fields: Fields, report: Report | None) -> list[tuple[str, Side]]:
    """The columns with replies, or with dialogues that end in them."""
    if fields.has("responses"):
        values = fields.get("responses")
        if not isinstance(values, list):
            if fields.kind == "prompts":
                return []
            raise fields.error("responses", f"expected a list, got {type_name(values)}")
        if fields.kind == "comparisons" and not 2 <= len(values) <= 9:
            raise fields.error("responses", f"expected 2 to 9 responses, got {len(values)}")
        named = [(f"responses.{i}", value) for i, value in enumerate(values)]
    elif fields.has("chosen"):
        named = [("chosen", fields.get("chosen"))]
        if fields.kind == "comparisons" or fields.has("rejected"):
            named.append(("rejected", fields.get("rejected")))
    elif fields.has("completion"):
        named = [("completion", fields.get("completion"))]
    elif fields.kind == "comparisons":
        raise fields.error("responses", f"is missing; the row has {list(fields.row)}")
    elif fields.kind == "demonstrations" and not fields.has("messages"):
        raise fields.error("completion", f"is missing; the row has {list(fields.row)}")
    else:
        return []
    if fields.kind == "prompts" and fields.has("prompt"):
        # A prompt needs its replies only if they hold a part of the conversation.
        named = [(name, value) for name, value in named if _holds_messages(fields, name, value)]
    return [(name, _side(fields, name, value, "assistant", report)) for name, value in named]


def _side(fields: Fields, name: str, value: object, role: str, report: Report | None) -> Side:
    """A text as it is; a message, messages, or messages as JSON text as a list of messages."""
    if isinstance(value, str) and parse_json(value, fields.where, name) is None:
        text = check_text(value, fields.where, name)
        return _with_input(fields, text) if name == "prompt" else text
    if not isinstance(value, str | list | dict):
        raise fields.error(name, f"expected a string, got {type_name(value)}")
    return read_messages(value, fields.where, name, role, report)


def _with_input(fields: Fields, prompt: str) -> str:
    """The prompt with Alpaca's or Dolly's second part."""
    if fields.row.get("prompt") is not None:
        return prompt
    for name in INPUT:
        value = fields.row.get(name)
        if name not in fields.used and value not in (None, ""):
            fields.used.add(name)
            prompt = f"{prompt}\n\n{check_text(value, fields.where, name)}"
    return prompt


def _dialogue(
    fields: Fields, prompt: Side | None, sides: list[tuple[str, Side]], report: Report | None
) -> tuple[Side | None, list[tuple[str, Side]]]:
    """(prompt, sides) of a row with a column of messages."""
    value = fields.get("messages")
    if isinstance(value, str):
        value = parse_json(value, fields.where, "messages") or parse_anthropic(value)
        if value is None:
            raise fields.error("messages", "a string that holds no messages, as JSON text does")
    messages = read_messages(value, fields.where, "messages", "user", report)
    contents = {message["content"].strip() for message in messages}
    if any(m["content"].strip() not in contents for m in _as_messages(prompt)):
        problem = "does not hold the row's 'prompt': name the column to read with --data.columns"
        raise fields.error("messages", f"{problem}, such as messages=messages or prompt=prompt")
    ends_in_reply = messages[-1:] and messages[-1]["role"] == "assistant"
    if fields.kind == "comparisons":  # its replies are the sides
        return (messages[:-1] if ends_in_reply else messages), sides
    if ends_in_reply:
        replies = [_as_messages(side, "assistant")[-1] for _, side in sides]
        if fields.kind == "demonstrations" and replies not in ([], messages[-1:]):
            raise fields.error(sides[0][0], "is not the reply at the end of 'messages'")
        return None, [("messages", messages)]
    if fields.kind == "demonstrations":
        raise fields.error("messages", "a dialogue must end in an assistant's reply")
    return messages, sides


def _of_texts(fields: Fields, prompt: Side | None, sides: list[tuple[str, Side]]) -> Conversation:
    names, texts = [name for name, _ in sides], [str(text) for _, text in sides]
    if prompt is None:
        if fields.kind == "demonstrations" and ASSISTANT not in texts[0]:
            fields.get("prompt")  # raises
        prompt, texts = split_anthropic(texts, fields.where)
        for name, text in zip(names, texts, strict=True):
            if fields.kind != "prompts":
                check_text(text, fields.where, name)
    messages, replies = _as_messages(prompt), texts
    if parse_anthropic(str(prompt)) is not None:
        # The replies may be whole dialogues, or begin with their marker.
        replies = [text.removeprefix(str(prompt)).removeprefix(ASSISTANT) for text in texts]
        if replies != texts and not str(prompt).endswith(ASSISTANT):
            prompt = f"{prompt}{ASSISTANT}"
        texts = replies
        replies = [re.split(r"\n\n(?:Human|Assistant):", text)[0].strip() for text in texts]
        if fields.kind != "prompts":
            for name, reply in zip(names, replies, strict=True):
                check_text(reply, fields.where, name)
    turns = [_said("assistant", reply) for reply in replies]
    cut = sum(len(a) < len(b.strip()) for a, b in zip(replies, texts, strict=True))
    named = list(zip(names, turns, strict=True))
    return Conversation(messages, named, (str(prompt), texts), cut)


def _of_messages(
    fields: Fields, prompt: Side | None, sides: list[tuple[str, Side]]
) -> Conversation:
    names = [name for name, _ in sides]
    dialogues = [[_said("assistant", x)] if isinstance(x, str) else x for _, x in sides]
    shared = dialogues[0][:-1] if dialogues else []
    for name, dialogue in zip(names, dialogues, strict=True):
        if dialogue[:-1] != shared:
            raise fields.error(name, f"does not reply to the same messages as '{names[0]}'")
        if not dialogue or dialogue[-1]["role"] != "assistant":
            raise fields.error(name, "a dialogue must end in an assistant's reply")
    before, both = _as_messages(prompt), shared
    if before and shared:
        spoken, spoken_shared = _spoken(before), _spoken(shared)
        if _contents(spoken_shared[: len(spoken)]) == _contents(spoken):
            systems = [m for m in shared if m["role"] == "system"]
            before_systems = [m for m in before if m["role"] == "system"]
            if systems and before_systems and _contents(systems) != _contents(before_systems):
                raise fields.error(names[0], "has another system message than 'prompt'")
            both = shared if systems else [*before_systems, *shared]
        elif spoken and spoken[-1]["role"] != spoken_shared[0]["role"]:
            both = [*before, *shared]
        else:
            problem = "does not begin with the messages of 'prompt', nor go on from them"
            raise fields.error(names[0], problem)
    replies = [(name, dialogue[-1]) for name, dialogue in zip(names, dialogues, strict=True)]
    return Conversation(both or before, replies)


def _with_context(fields: Fields, conversation: Conversation) -> Conversation:
    """Adds the row's columns for its system message and for earlier turns."""
    messages, texts = conversation.messages, conversation.texts
    if fields.has("history"):
        turns = [_said(role, text) for pair in _pairs(fields) for role, text in pair]
        first = len(messages) - len(_spoken(messages))
        messages, texts = [*messages[:first], *turns, *messages[first:]], None
    if fields.has("system"):
        system = fields.string("system")
        if any(m["role"] == "system" and m["content"] != system for m in messages):
            raise fields.error("system", "differs from the system message of the dialogue")
        messages = [_said("system", system), *_spoken(messages)]
        if texts is not None:
            gap = "" if texts[0].startswith("\n\n") else "\n\n"
            texts = system + gap + texts[0], texts[1]
    return replace(conversation, messages=messages, texts=texts)


def _pairs(fields: Fields) -> list[list[tuple[str, str]]]:
    pairs = []
    for i, pair in enumerate(fields.array("history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.error(f"history.{i}", "expected [what the user said, the reply]")
        texts = [check_text(text, fields.where, f"history.{i}") for text in pair]
        pairs.append(list(zip(("user", "assistant"), texts, strict=True)))
    return pairs


def _holds_messages(fields: Fields, name: str, value: object) -> bool:
    if isinstance(value, str):
        return parse_json(value, fields.where, name) is not None
    return are_messages(value)


def _as_messages(side: Side | None, role: str = "user") -> Messages:
    if side is None:
        return []
    if isinstance(side, str):
        return (parse_anthropic(side) if role == "user" else None) or [_said(role, side)]
    return side


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _spoken(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] != "system"]


def _contents(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]
