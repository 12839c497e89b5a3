r"""Talk to a model: one prompt, or a conversation. Tokens are printed as they come.

    python experiments/sample.py --model runs/sft                       # until Ctrl-D
    python experiments/sample.py --model runs/sft --prompt "list two animals that are white."
    python experiments/sample.py --model HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.7 \
        --system "You answer in one sentence."

Hardware: any that holds the model. The first answer waits for the compiler. Later runs find the
compiled programs on disk.
"""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from instructjax import ranges, sampler, sharding, usage
from instructjax.data import prompt_ids, template
from instructjax.data.dialogue import Messages
from instructjax.ranges import Count, CountOrZero, NotNegative, Seed, ShareAbove0
from instructjax.run import checks, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model to talk to, and how it answers."""

    model: str = "runs/sft"
    """The model: a preset, a run directory, a Hugging Face directory or a hub name."""
    tokenizer: str | None = None
    """The tokenizer: a Hugging Face directory or a hub name. By default the model's own."""
    prompt: str | None = None
    """Answer this prompt and end. By default there is a conversation until Ctrl-D."""
    dialogue: bool | None = None
    """Remember earlier turns, in the tokenizer's chat template or as `Human:` and `Assistant:`.
    Otherwise each line is a prompt of its own, exactly as typed.
    By default turns are remembered if the tokenizer has a chat template."""
    system: str = ""
    """System message at the start of the conversation. It stays when turns are dropped."""
    temperature: NotNegative = 1.0
    """Number that logits are divided by. Lower values give likelier and less varied answers.
    0 always takes the likeliest token."""
    top_k: CountOrZero = 0
    """Draw each token from this many likeliest ones. 0 is all of them."""
    top_p: ShareAbove0 = 1.0
    """Draw each token from the likeliest ones of this total probability. 1 is all of them."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    context: Count = 2048
    """Longest conversation with its next answer, in tokens, at most the model's own context.
    Beyond it, the first turns are dropped. A longer one takes more memory, and time per token."""
    seed: Seed = 0
    """Seed of sampling. The same seed gives the same answers."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.max_new_tokens >= self.context:
            raise ValueError(
                f"--max_new_tokens {self.max_new_tokens}: must be less than --context"
                f" {self.context}"
            )
        if self.prompt == "":
            raise ValueError("--prompt is empty")
        if self.system and self.dialogue is False:
            raise ValueError("--system: each line is a prompt of its own; give --dialogue True")
        sharding.parse_mesh(self.mesh)


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before the model is loaded."""
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    model = pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
    checks.check_tokens(model, [("--max_new_tokens", config.max_new_tokens, 1)])


def sample(config: Config) -> None:
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    with phase(Console(stderr=True), "loading the model"):
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed, scalar_head=False
        )
        session = sampler.Session(params, model, context=config.context, mesh=mesh)
        del params
    renderer = template.of(tokenizer)
    remembers = renderer.form == "chat"
    if config.dialogue is not None:
        remembers = config.dialogue
    if config.system and not remembers:
        raise ValueError("--system: each line is a prompt of its own; give --dialogue True as well")
    chat = Chat(config, session, tokenizer, renderer if remembers else None)

    if config.prompt is not None:
        chat.say(config.prompt)
        return
    print(
        f"{config.model}: {'a conversation' if remembers else 'each line is a prompt of its own'};"
        " Ctrl-C stops an answer, Ctrl-D ends"
    )
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
            if said:
                chat.say(said)
        except ValueError as error:
            note(f"({error})\n")
        except KeyboardInterrupt:
            note("\n(Ctrl-D ends)\n")
        except EOFError:
            print()
            return


class Chat:
    """A conversation, printed as it goes on."""

    def __init__(
        self,
        config: Config,
        session: sampler.Session,
        tokenizer: Any,
        renderer: template.Template | None,  # None: nothing is remembered
    ):
        self.config, self.session, self.tokenizer = config, session, tokenizer
        self.renderer, self.turn = renderer, 0
        self.system: Messages = []
        if config.system:
            self.system = [{"role": "system", "content": config.system}]
        self.messages: Messages = []

    def ids_of(self, messages: Messages) -> list[int]:
        """The prompt for the reply to the last message."""
        if self.renderer is None:
            return prompt_ids(messages[-1]["content"], self.tokenizer, template.Template())
        return prompt_ids(messages, self.tokenizer, self.renderer)

    def say(self, text: str) -> None:
        """Prints the answer to a message. A conversation remembers both unless it is empty.

        Raises:
          ValueError: the message alone is too long, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        longest = self.session.context - self.config.max_new_tokens
        while len(ids := self.ids_of([*self.system, *messages])) > longest:
            if len(messages) == 1:
                raise ValueError(
                    f"a message of {len(ids)} tokens, with its template, leaves no room for"
                    f" --max_new_tokens {self.config.max_new_tokens} in a --context of"
                    f" {self.session.context}"
                )
            del messages[:2]
            note("(the first turn no longer fits --context, and is forgotten)\n")
        if (answer := self.answer(ids)) and self.renderer is not None:
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def answer(self, ids: list[int]) -> str:
        """Prints an answer to a prompt, token by token, until its end or Ctrl-C."""
        config, tokens, shown, ended = self.config, [], "", False
        drawn = self.session.stream(
            ids,
            jax.random.fold_in(jax.random.key(config.seed), self.turn),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        self.turn += 1
        with interrupts() as interrupted:
            with phase(Console(stderr=True), "compiling, and reading the prompt"):
                first = list(itertools.islice(drawn, 2))  # so that both programs are compiled
            for token in itertools.chain(first, drawn):
                if interrupted or (ended := token in self.session.config.eos_ids):
                    break
                tokens.append(token)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # a character whose last bytes are missing yet
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        if interrupted:
            note(" ... (stopped)")
        elif not ended:
            note(f" ... (cut at --max_new_tokens {config.max_new_tokens})")
        elif not shown.strip():
            note("(an empty answer)")
        print(flush=True)
        return shown


def note(text: str) -> None:
    """Prints what is no part of an answer."""
    sys.stdout.flush()
    print(text, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to. The second one raises KeyboardInterrupt, as usual."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, old)


def cli(argv: Sequence[str] | None = None) -> None:
    sample(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
