"""Chains of responses and revisions of critique_revise.py, from a model or made by rule."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from constitution import Constitution
from jax.sharding import Mesh
from line_files import read_log, write_lines

from instructjax import rollout
from instructjax.data import Record, prompt_ids, template
from instructjax.miniature import critics
from instructjax.models import ModelConfig, Params


@dataclass
class Chain:
    """A response with its revisions.

    Attributes:
      prompt: as the model reads it.
      texts: the response, then each revision; none if the response did not end.
      principles: for each revision the principle's name.
      critiques: for each revision the critique.
      ended: why there are no more revisions; "" if there may be.
    """

    prompt: str
    texts: list[str]
    principles: list[str] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    ended: str = ""

    def add(self, principle: str, critique: str, revised: str) -> None:
        """One more revision."""
        self.principles.append(principle)
        self.critiques.append(critique)
        self.texts.append(revised)


@dataclass(frozen=True)
class Speaker:
    """A model that continues prompts and conversations.

    Attributes:
      form: renders conversations.
      size: texts that are sampled at the same time.
    """

    model: ModelConfig
    params: Params
    tokenizer: Any
    form: template.Template
    mesh: Mesh
    size: int
    max_new_tokens: int
    temperature: float

    def respond(self, prompts: Sequence[Sequence[int]], key: jax.Array) -> list[str | None]:
        """The text that follows the token ids of each prompt; None if it has no end or no words."""
        return [text if end and text.strip() else None for text, end in self._sample(prompts, key)]

    def say(
        self, conversations: Sequence[Any], key: jax.Array, lines: bool = False
    ) -> list[str | None]:
        """What follows each conversation; None if it has no room, no end or no words.

        Args:
          conversations: messages, or texts.
          lines: whether what is said ends where its line ends.
        """
        prompts = [prompt_ids(said, self.tokenizer, self.form) for said in conversations]
        room = self.model.max_length - self.max_new_tokens
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        said: list[str | None] = [None] * len(prompts)
        sampled = self._sample([prompts[i] for i in fits], key, fits) if fits else []
        for i, (text, end) in zip(fits, sampled, strict=True):
            line, line_break, _ = text.lstrip().partition("\n")
            text, end = (line, end or bool(line_break)) if lines else (text, end)
            said[i] = text.strip() if end and text.strip() else None
        return said

    def _sample(
        self, prompts: Sequence[Sequence[int]], key: jax.Array, numbers: Any = None
    ) -> list[tuple[str, bool]]:
        """Each text, and whether it ended."""
        sampled, _ = rollout.sample(
            self.params,
            self.model,
            prompts,
            key,
            size=self.size,
            indices=numbers,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            mesh=self.mesh,
        )
        ids = rollout.token_ids(sampled)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [*zip(texts, rollout.ended(sampled, self.model.eos_ids).tolist(), strict=True)]


def revise(
    chains: Sequence[Chain],
    records: Sequence[Record],
    principles: Constitution,
    critic: Speaker,
    key: jax.Array,
    number: int,
    seed: int,
) -> None:
    """Adds a critique and a revision to each chain that has not ended.

    Args:
      key: key of the critiques and of the revisions.
      number: of the revision; with `seed` it decides which principles are drawn.
    """
    of_critiques, of_revisions = jax.random.split(key)
    drawn = {
        i: principles.draw(seed, number, i) for i, chain in enumerate(chains) if not chain.ended
    }
    said = {i: [chains[i].texts[-1], principle.critique] for i, principle in drawn.items()}

    def ask(of: Sequence[int], key: jax.Array, what: str) -> list[tuple[int, str]]:
        """The answers of these chains. A chain without one ends."""
        dialogues = [principles.dialogue(records[i], said[i]) for i in of]
        answers = critic.say(dialogues, key, principles.in_miniature) if of else []
        for i, answer in zip(of, answers, strict=True):
            if answer is None:
                chains[i].ended = f"{what} had no end, no words or no room"
        return [(i, text) for i, text in zip(of, answers, strict=True) if text is not None]

    critiques = dict(ask([*drawn], of_critiques, "a critique"))
    for i, critique in critiques.items():
        said[i] += [critique, drawn[i].revision]
    for i, revised in ask([*critiques], of_revisions, "a revision"):
        chains[i].add(drawn[i].name, critiques[i], revised)


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
        if chain.ended:
            continue
        principle = by_name[principles.draw(seed, number, i).name]
        row = dict(records[i].row)
        chain.add(principle.name, *critic.revise(row, chain.texts[-1], principle, number))


def write(chains: Sequence[Chain], file: Path) -> None:
    write_lines(file, [dataclasses.asdict(chain) for chain in chains])


def read(file: Path, records: Sequence[Record]) -> list[Chain]:
    """The chains of an earlier start; none if it has written none.

    Raises:
      ValueError: they are of other prompts.
    """
    chains = [Chain(**row) for row in read_log(file)]
    if chains and [chain.prompt for chain in chains] != [record.prompt for record in records]:
        raise ValueError(f"--resume: {file} is of other prompts; give another --out")
    return chains
