"""Chains of responses and revisions: what critique_revise.py samples, by a model or by rule."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from constitution import Constitution
from jax.sharding import Mesh

from instructjax import rollout
from instructjax.data import Record, prompt_ids, template
from instructjax.miniature import critics
from instructjax.models import ModelConfig, Params

# (conversations, key) -> for each the text that follows; None if it has no room, no end or no words
Say = Callable[[Sequence[Any], jax.Array], list[str | None]]


@dataclass
class Chain:
    """A response with its revisions.

    Attributes:
      texts: the response, then each revision.
      principles: for each revision the principle's name.
      critiques: for each revision the critique.
      ended: whether there are no more revisions, because one had no room, no end or no words.
    """

    texts: list[str]
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    ended: bool = False

    def add(self, principle: str, critique: str, revised: str) -> None:
        """One more revision."""
        self.principles.append(principle)
        self.critiques.append(critique)
        self.texts.append(revised)


def speaker(
    model: ModelConfig,
    params: Params,
    tokenizer: Any,
    mesh: Mesh,
    *,
    lines: bool,
    size: int,
    max_new_tokens: int,
    temperature: float,
) -> Say:
    """A model as a function that goes on with conversations.

    Args:
      lines: whether what it says ends where its line ends.
      size: texts that are sampled at the same time.
    """
    form = template.of(tokenizer, "auto", model.eos_ids)

    def say(conversations: Sequence[Any], key: jax.Array) -> list[str | None]:
        prompts = [prompt_ids(said, tokenizer, form) for said in conversations]
        room = model.max_length - max_new_tokens
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        said: list[str | None] = [None] * len(prompts)
        if not fits:
            return said
        sampled, _ = rollout.sample(
            params,
            model,
            [prompts[i] for i in fits],
            key,
            size=size,
            indices=fits,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            mesh=mesh,
        )
        texts = tokenizer.batch_decode(rollout.token_ids(sampled), skip_special_tokens=True)
        ended = rollout.ended(sampled, model.eos_ids)
        for i, text, end in zip(fits, texts, ended, strict=True):
            line, line_break, _ = text.lstrip().partition("\n")
            text, end = (line, end or bool(line_break)) if lines else (text, end)
            said[i] = text.strip() if end and text.strip() else None
        return said

    return say


def revise(
    chains: Sequence[Chain],
    records: Sequence[Record],
    principles: Constitution,
    say: Say,
    key: jax.Array,
    number: int,
    seed: int,
) -> None:
    """Adds a critique and a revision to each chain that has not ended.

    Args:
      say: the critic.
      key: key of the critiques and of the revisions.
      number: of the revision; with `seed` it decides which principles are drawn.
    """
    going = [i for i, chain in enumerate(chains) if not chain.ended]
    drawn = [principles.draw(seed, number, i) for i in going]
    of_critiques, of_revisions = jax.random.split(key)
    said = [[chains[i].texts[-1], p.critique] for i, p in zip(going, drawn, strict=True)]

    def dialogues() -> list[Any]:
        pairs = zip(going, said, strict=True)
        return [principles.dialogue(records[i], turns) for i, turns in pairs]

    critiques = say(dialogues(), of_critiques)
    for turns, critique, principle in zip(said, critiques, drawn, strict=True):
        turns += [critique or "", principle.revision]
    revisions = say(dialogues(), of_revisions)
    for i, principle, critique, revised in zip(going, drawn, critiques, revisions, strict=True):
        if critique is None or revised is None:
            chains[i].ended = True
        else:
            chains[i].add(principle.name, critique, revised)


def revise_by_rule(
    chains: Sequence[Chain],
    records: Sequence[Record],
    principles: Constitution,
    critic: critics.RuleCritic,
    number: int,
    seed: int,
) -> None:
    """As `revise`, by the miniature's rule-based critic. Records need a "request"."""
    by_name = {principle.name: principle for principle in critics.PRINCIPLES}
    for i, chain in enumerate(chains):
        principle = by_name[principles.draw(seed, number, i).name]
        row = dict(records[i].row)
        chain.add(principle.name, *critic.revise(row, chain.texts[-1], principle, number))


def write(chains: Sequence[Chain], file: Path) -> None:
    """Writes chains, a line each. A kill leaves the file as it was, or whole."""
    part = file.with_name(f"{file.name}.part")
    lines = (json.dumps(dataclasses.asdict(chain), ensure_ascii=False) for chain in chains)
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    part.replace(file)


def read(file: Path) -> list[Chain]:
    """What `write` wrote; no chains if there is no file."""
    if not file.exists():
        return []
    lines = file.read_text("utf-8").split("\n")
    return [Chain(**json.loads(line)) for line in lines if line]
