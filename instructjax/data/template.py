r"""Messages -> text, and the tokens that end a response. All scripts use this module.

chat    the tokenizer's own chat template renders every prompt; a plain prompt is one user message
plain   strings stay as they are; messages take Anthropic's form (Bai et al. 2022):
        `[system]\n\nHuman: ...\n\nAssistant: ...`
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from instructjax.data.dialogue import ASSISTANT, HUMAN, SAID, Messages
from instructjax.data.errors import DataError

Form = Literal["chat", "plain"]
RECORDED = "instructjax_template"  # key of tokenizer_config.json: the form that a model learned


@dataclass(frozen=True)
class Template:
    """Renders conversations; see `of`."""

    form: Form = "plain"
    tokenizer: Any = None
    ends: tuple[str, ...] = ()  # the tokens that end a response, as text

    def prompt(self, messages: Messages, where: str, field: str, tools: Any = None) -> str:
        """The text up to where the assistant's reply begins.

        Raises:
          DataError: the template cannot render the messages, or would ignore a part of them.
        """
        return self._render(messages, True, where, field, tools)

    def reply(
        self, prompt: str, messages: Messages, where: str, field: str, tools: Any = None
    ) -> str:
        """The text after `prompt` of a conversation that ends in the assistant's reply.

        Raises:
          DataError: as `prompt`; or the template renders the prompt differently before a reply.
        """
        whole = self._render(messages, False, where, field, tools)
        if not whole.startswith(prompt):
            problem = "the chat template renders the prompt differently when the reply follows"
            raise DataError(where, field, problem)
        return whole[len(prompt) :]

    def _render(
        self, messages: Messages, open_turn: bool, where: str, field: str, tools: Any
    ) -> str:
        for name in SAID:
            if any(name in message for message in messages):
                self._check_read(name, where, field)
        if tools is not None:
            self._check_read("tools", where, field)
        if self.form == "plain":
            return _plain(messages, open_turn, where, field)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # templates are programs and may raise anything
            raise DataError(where, field, f"chat template: {error}") from error
        for message in messages:  # a template may leave out what the assistant thought
            if message["role"] in ("system", "user") and message["content"].strip() not in text:
                problem = f"the chat template leaves out a message of role {message['role']!r}"
                raise DataError(where, field, problem)
        return text

    def _check_read(self, name: str, where: str, field: str) -> None:
        """Whether the template mentions a key; a template that does not would drop its content."""
        if self.form == "plain":
            raise DataError(where, field, f"{name!r} needs a chat template, and there is none")
        if name not in str(self.tokenizer.chat_template):
            raise DataError(where, field, f"the chat template ignores {name!r}: drop that key")


def of(
    tokenizer: Any,
    choice: Literal["auto", "chat", "plain"] = "auto",
    eos_ids: Sequence[int] = (),
) -> Template:
    """The template that a tokenizer's conversations are rendered with.

    Args:
      tokenizer: of `transformers`, or None.
      choice: `auto` is the form that the model was trained with, if it is recorded beside its
        tokenizer; else `chat` if the tokenizer has a chat template; else `plain`.
      eos_ids: the model's ids that end a response; see `end_ids`.

    Raises:
      ValueError: `chat` is chosen, and the tokenizer has no chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if choice == "chat" and not has_template:
        raise ValueError("--data.template chat: the tokenizer has no chat template")
    form = recorded(tokenizer) or ("chat" if has_template else "plain")
    if choice != "auto":
        form = choice
    if tokenizer is None:
        return Template(form)
    ends = tuple(tokenizer.convert_ids_to_tokens(list(end_ids(tokenizer, eos_ids))))
    return Template(form, tokenizer, ends)


def recorded(tokenizer: Any) -> Form | None:
    """The form that the tokenizer's model was trained with, if it is known."""
    return getattr(tokenizer, "init_kwargs", {}).get(RECORDED)


def record(tokenizer: Any, form: Form) -> None:
    """Writes the form into the tokenizer, which saves it with its other settings."""
    tokenizer.init_kwargs[RECORDED] = form


def end_ids(tokenizer: Any, model_ids: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that end a response: the model's, the tokenizer's EOS, the template's end of turn.

    Args:
      model_ids: `ModelConfig.eos_ids`, from config.json and generation_config.json.
    """
    ids = list(model_ids)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if getattr(tokenizer, "chat_template", None):
        ids += end_of_turn(tokenizer)
    return tuple(dict.fromkeys(map(int, ids)))


def end_of_turn(tokenizer: Any) -> list[int]:
    """The id of the first added token after a reply, if the template writes one."""
    reply = "A short reply"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that wants other messages; data will tell
        return []
    ids = tokenizer(text[text.rfind(reply) + len(reply) :], add_special_tokens=False)["input_ids"]
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return [i for i in ids if i in added and tokenizer.decode([i]).strip()][:1]


def _plain(messages: Messages, open_turn: bool, where: str, field: str) -> str:
    prefixes = {"system": "", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    unknown = sorted({message["role"] for message in messages} - set(prefixes))
    if unknown:
        problem = f"roles {unknown} need a chat template; without one there are {list(prefixes)}"
        raise DataError(where, field, problem)
    text = "".join(prefixes[message["role"]] + message["content"] for message in messages)
    return text + ASSISTANT if open_turn else text
