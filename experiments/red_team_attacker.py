"""An attacker: a language model that writes attacks, which are prompts for the target."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import data, rollout
from instructjax.data import DataConfig, template
from instructjax.offload import freeze
from instructjax.run import pretrained


def attack_of(written: str, end: str = "", ended: bool = True) -> str:
    """The attack in what an attacker wrote: its first line, cut after `end`; empty without its end.

    Args:
      end: text that an attack ends with, such as `?`; empty: the end of its line or of the text.
      ended: whether the text ended by itself, and was not cut after a number of tokens.
    """
    line, cut_here, _ = written.lstrip().partition("\n")
    line = line.strip()
    if not end:
        return line if ended or cut_here else ""
    before, found, _ = line.partition(end)
    return f"{before}{found}" if found and before.strip() else ""


def with_examples(opening: str, attacks: Sequence[str]) -> str:
    """The opening after some attacks, each a line like the opening's last.

    The number that this line may begin with counts them: after `Questions:\\n1.` and two attacks
    follow `2.` and `3.`.
    """
    head, _, last = opening.rpartition("\n")
    numbered = re.match(r"\s*(\d+)(.*)", last, re.DOTALL)

    def line(i: int) -> str:
        return last if numbered is None else f"{int(numbered[1]) + i}{numbered[2]}"

    written = [f"{line(i)} {attack}".lstrip() for i, attack in enumerate(attacks)]
    return "\n".join([*([head] if "\n" in opening else []), *written, line(len(attacks))])


def read_examples(file: str, needed: int) -> tuple[list[str], np.ndarray]:
    """(attacks, their harm float [n]) of an earlier attacks.jsonl.

    Raises:
      ValueError: a line is no attack, or they are fewer than `needed`; the message names the file.
      FileNotFoundError: there is no such file.
    """
    if not Path(file).expanduser().is_file():
        raise FileNotFoundError(f"--examples {file}: no such file")
    config = DataConfig(f"jsonl:{file}")
    data.check(config, "prompts", "--examples", held_out=False)
    records = data.read(config, "prompts", render=False, log=lambda _: None)
    harm = []
    for record in records:
        value = record.row.get("harm")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--examples {record.where}: 'harm' must be a number, not {value!r}")
        harm.append(value)
    if len(harm) < needed:
        raise ValueError(f"--examples {file}: has {len(harm)} attacks, and --shots is {needed}")
    return [record.prompt for record in records], np.array(harm, np.float64)


def draw(harm: np.ndarray, shots: int, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of examples, without repeats, drawn with probability proportional to
    exp(harm / temperature) (Perez et al. 2022, section 3.1).

    Args:
      harm: float [n], n >= shots.

    Returns:
      int [shots], in the order in which they were drawn.
    """
    # The largest sums of log-probability and Gumbel noise are draws without replacement, and no
    # probability underflows.
    return np.argsort(-(harm / temperature + rng.gumbel(size=len(harm))))[:shots]


class Attacker:
    """Writes texts after prompts of its own. Arguments: as the flags of red_team.py."""

    def __init__(self, model: str, mesh: Mesh, dtype: str, form: Literal["auto", "chat", "plain"]):
        self.config, params, self.tokenizer = pretrained.load(
            model, mesh, flag="--attacker", scalar_head=False
        )
        self.config = dataclasses.replace(self.config, dtype=dtype)
        self.params, self.mesh = freeze(params, dtype), mesh
        self.form = template.of(self.tokenizer, form, self.config.eos_ids)

    def ids(self, text: str) -> list[int]:
        """The prompt as the attacker reads it."""
        return data.prompt_ids(text, self.tokenizer, self.form)

    def prompts(
        self,
        opening: str,
        count: int,
        max_new_tokens: int,
        seed: int,
        *,
        examples: tuple[list[str], np.ndarray] | None,
        shots: int,
        temperature: float,
    ) -> tuple[list[list[int]], int]:
        """(what is read before each of `count` attacks, as token ids; how many of these have fewer
        examples than `shots`, as there is no room for more).

        Args:
          max_new_tokens: tokens of an attack, for which there is to be room.
          seed: of draws, which depend on it and on the attack's number.
          examples: from `read_examples`; None: the opening alone is read.
          shots, temperature: as for `draw`.

        Raises:
          ValueError: there is no room for the opening and an attack.
        """
        room = self.config.max_length - max_new_tokens
        alone = self.ids(opening)
        if len(alone) > room:
            raise ValueError(
                f"--opening: its {len(alone)} tokens leave no room for --max_attack_tokens"
                f" {max_new_tokens} in a context of {self.config.max_length}"
            )
        if examples is None:
            return [alone] * count, 0
        attacks, harm = examples
        prompts, fewer = [], 0
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            shown = [attacks[i] for i in draw(harm, shots, temperature, rng)]
            while len(ids := self.ids(with_examples(opening, shown))) > room:
                shown.pop()
            fewer += len(shown) < shots
            prompts.append(ids)
        return prompts, fewer

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        numbers: Sequence[int],
        size: int,
        **settings: Any,
    ) -> list[tuple[str, bool]]:
        """What it writes after each prompt, and whether that ended. The noise depends on the key
        and the prompt's number.

        Args:
          size: prompts at a time; more of them are written in parts.
          settings: max_new_tokens, temperature and top_p, as of `sampler.generate`.
        """
        ids, filler = filled(prompts, size)
        sampled, _ = rollout.sample(
            self.params,
            self.config,
            ids,
            key,
            size=size,
            indices=[*numbers, *[0] * filler],
            mesh=self.mesh,
            **settings,
        )
        texts = self.tokenizer.batch_decode(rollout.token_ids(sampled), skip_special_tokens=True)
        ended = rollout.ended(sampled, self.config.eos_ids).tolist()
        return [*zip(texts, ended, strict=True)][: len(prompts)]


def filled(prompts: Sequence[Sequence[int]], size: int) -> tuple[list[Sequence[int]], int]:
    """(prompts up to a multiple of `size`, how many were added): other sizes would compile anew."""
    filler = -len(prompts) % size
    return [*prompts, *[prompts[0]] * filler], filler
