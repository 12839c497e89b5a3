"""Talk to a model: one prompt, or a conversation. Tokens are printed as they come.

    python experiments/sample.py --model runs/sft                       # until Ctrl-D
    python experiments/sample.py --model runs/sft --prompt "list two animals that are white."
    python experiments/sample.py --model HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.7

Hardware: any that holds the model. The first answer waits for the compiler. Later runs find the
compiled program on disk.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import tyro

from instructjax import sampler, sharding
from instructjax.data import prompt_ids, template
from instructjax.data.dialogue import Messages
from instructjax.run import main, pretrained
from instructjax.run.process import cache_compilations


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model to talk to, and how it answers."""

    model: str = "runs/sft"
    """The model: a preset, a run directory, a Hugging Face directory or a hub name."""
    tokenizer: str | None = None
    """The tokenizer: a Hugging Face directory or a hub name. By default the model's own."""
    prompt: str | None = None
    """Answer this prompt and end. By default the conversation goes on until Ctrl-D."""
    dialogue: bool | None = None
    """Remember earlier turns, in the tokenizer's chat template or as `Human:` and `Assistant:`.
    Otherwise each line is a prompt of its own, exactly as typed.
    By default turns are remembered if the tokenizer has a chat template."""
    temperature: float = 1.0
    """Number that logits are divided by. Lower values give likelier and less varied answers."""
    top_k: int = 0
    """Draw each token from this many likeliest ones. 0 is all of them."""
    top_p: float = 1.0
    """Draw each token from the likeliest ones of this total probability. 1 is all of them."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    seed: int = 0
    """Seed of sampling. The same seed gives the same answers."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("--temperature must be positive, --top_p in (0, 1], --top_k >= 0")
        if self.max_new_tokens < 1:
            raise ValueError("--max_new_tokens must be at least 1")
        if self.prompt == "":
            raise ValueError("--prompt is empty")


def sample(config: Config) -> None:
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    model, params, tokenizer = pretrained.load(
        config.model, mesh, tokenizer=config.tokenizer, seed=config.seed
    )
    if model.scalar_head:
        raise ValueError(f"--model {config.model}: a reward or value model, not a language model")
    form = template.of(tokenizer)
    remembers = form.form == "chat"
    if config.dialogue is not None:
        remembers = config.dialogue
    longest_prompt = model.max_length - config.max_new_tokens

    def ids_of(messages: Messages) -> list[int]:
        return prompt_ids(messages if remembers else messages[-1:], tokenizer, form)

    def answer(messages: Messages, turn: int) -> str:
        """Prints an answer to the last message, token by token, and returns it."""
        while len(ids := ids_of(messages)) > longest_prompt and len(messages) > 1:
            del messages[:2]
            print(
                "(the first turn no longer fits the model's context, and is forgotten)",
                file=sys.stderr,
            )
        tokens, shown = [], ""
        drawn = sampler.stream(
            params,
            model,
            ids,
            jax.random.fold_in(jax.random.key(config.seed), turn),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            mesh=mesh,
        )
        try:
            for token in drawn:
                tokens.append(token)
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # a character whose last bytes are missing yet
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        except KeyboardInterrupt:
            print(" ...", end="")
        print(flush=True)
        return shown

    if config.prompt is not None:
        answer([{"role": "user", "content": config.prompt}], turn=0)
        return
    print(
        f"{config.model}: {'a conversation' if remembers else 'each line is a prompt of its own'};"
        " Ctrl-C stops an answer, Ctrl-D ends"
    )
    messages: Messages = []
    for turn in range(sys.maxsize):
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer(messages, turn)})


def cli(argv: Sequence[str] | None = None) -> None:
    sample(tyro.cli(Config, args=argv, description=__doc__, use_underscores=True))


if __name__ == "__main__":
    main(cli)
