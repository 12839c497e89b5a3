"""Dialogues -> prompt and reply. Reads lists of messages, Anthropic's form and trees of replies."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from instructjax.data.errors import DataError, Report, check_text, type_name

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]
Render = Callable[[Messages, bool], str]  # (messages, whether to open a reply) -> text

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant"}  # ShareGPT's and OASST's names
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def plain_template(messages: Messages, open_turn: bool) -> str:
    """The chat template for tokenizers that have none: Anthropic's form (Bai et al. 2022).

    `[system]\\n\\nHuman: ...\\n\\nAssistant: ...`; an open turn ends in `\\n\\nAssistant:`.
    """
    prefixes = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    unknown = {message["role"] for message in messages} - set(prefixes)
    if unknown:
        raise ValueError(f"roles {sorted(unknown)} are not among {list(prefixes)}")
    text = "".join(prefixes[message["role"]] + message["content"] for message in messages)
    return text + ASSISTANT if open_turn else text


def chat_template(tokenizer: Any) -> Render:
    """The tokenizer's own template if it has one, else `plain_template`."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return plain_template
    return lambda messages, open_turn: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_turn
    )


def check_messages(value: Any, where: str, field: str, role: str = "user") -> Messages:
    """Returns messages with the roles user, assistant and system; a string is one of `role`.

    Raises:
      DataError: the value is no list of messages, or a message lacks its role or content.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(where, field, f"expected a list of messages, got {type_name(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            problem = f"expected an object with role and content, got {type_name(message)}"
            raise DataError(where, f"{field}.{i}", problem)
        speaker = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if speaker == "system" and content == "":
            continue
        speaker = check_text(speaker, where, f"{field}.{i}.role")
        content = check_text(content, where, f"{field}.{i}.content")
        messages.append({"role": ROLES.get(speaker, speaker), "content": content})
    return messages


def render_prompt(messages: Messages, render: Render, where: str, field: str) -> str:
    """Renders the prompt of the assistant's next turn; a reply at the end is left off.

    Raises:
      DataError: no message is left to reply to.
    """
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(where, field, "no message to reply to")
    return _render(messages, True, render, where, field)


def split_reply(messages: Messages, render: Render, where: str, field: str) -> tuple[str, str]:
    """Renders a dialogue as (prompt, the assistant's last turn).

    Raises:
      DataError: the dialogue ends in another turn, or the template renders the prompt differently
        once the reply follows.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(where, field, "a dialogue must end in an assistant's reply")
    prompt = _render(messages[:-1], True, render, where, field)
    whole = _render(messages, False, render, where, field)
    if not whole.startswith(prompt):
        problem = "the chat template renders the prompt differently when the reply follows"
        raise DataError(where, field, problem)
    return prompt, whole[len(prompt) :]


def split_pair(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """Splits two dialogues in Anthropic's form into (prompt, chosen, rejected).

    The prompt ends at the last `\\n\\nAssistant:` that both share. The response is all text after
    it: in a few of the published pairs it holds further turns.

    Raises:
      DataError: the dialogues share no `\\n\\nAssistant:`.
    """
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - of characters
    end = shared.rfind(ASSISTANT)
    if end <= 0:
        problem = f"is missing, and 'chosen' and 'rejected' share no dialogue up to {ASSISTANT!r}"
        raise DataError(where, "prompt", problem)
    end += len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def is_tree(row: Any) -> bool:
    """Whether a row is a conversation tree of OpenAssistant's export."""
    return (
        isinstance(row, dict) and isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]
    )


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
        if node.get("role") != "prompter":
            continue
        ranked = [r for r in replies if isinstance(r.get("rank"), int)]
        if kind == "prompts":
            yield {"prompt": path}
        elif kind == "demonstrations":
            best = [r for r in ranked if r["rank"] == 0]
            report.count(
                "left out", "replies that are not ranked first", where, len(replies) - len(best)
            )
            for reply in best:
                yield {"prompt": path, "completion": reply.get("text")}
        elif kind == "comparisons":
            used = ranked if len(ranked) > 1 else []
            report.count("left out", "replies with no rank, or none to rank against", where,
                         len(replies) - len(used))  # fmt: skip
            if used:
                texts, ranks = [r.get("text") for r in used], [-r["rank"] for r in used]
                yield {"prompt": path, "responses": texts, "scores": ranks}


def _render(messages: Messages, open_turn: bool, render: Render, where: str, field: str) -> str:
    try:
        return render(messages, open_turn)
    except Exception as error:  # templates are programs and may raise anything
        raise DataError(where, field, f"chat template: {error}") from error
