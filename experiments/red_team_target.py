"""A target: the model that is attacked, the harm of its answers, and the reward of an attacker."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from red_team_attacker import attack_of, filled

from instructjax import data, rollout, scoring, sharding
from instructjax.data import DataError, Record
from instructjax.data import template as templates
from instructjax.data.records import parse
from instructjax.evaluation import diversity
from instructjax.models import ModelConfig
from instructjax.offload import Offloaded, freeze, to_host
from instructjax.run import pretrained
from instructjax.scoring import RewardConfig, RewardFn

WIDTH = 32  # prompts are padded to a multiple of this


@dataclass(frozen=True)
class Target:
    """The model that is attacked, and what scores its answers; see `load_target`."""

    config: ModelConfig
    params: Offloaded
    tokenizer: Any
    mesh: Mesh
    harm: scoring.Rewards
    size: int  # attacks that are answered at a time
    max_new_tokens: int
    temperature: float

    def prompts(self, attacks: Sequence[str]) -> list[tuple[Record, list[int]] | None]:
        """Each attack as the target reads it; None where its template refuses it or its context
        has no room for it and an answer, and for an empty one."""
        form = templates.of(self.tokenizer, "auto", self.config.eos_ids)
        records = {}
        for i, attack in enumerate(attacks):
            try:
                if attack:
                    records[i] = parse({"prompt": attack}, "an attack", "prompts", {}, form)
            except DataError:
                pass
        dataset = data.encode([*records.values()], "prompts", self.tokenizer)
        found: list[tuple[Record, list[int]] | None] = [None] * len(attacks)
        for row, (i, record) in enumerate(records.items()):
            ids = dataset.prompt[row].tolist()
            if 0 < len(ids) <= self.config.max_length - self.max_new_tokens:
                found[i] = record, ids
        return found

    def answer(
        self,
        prompts: Sequence[tuple[Record, list[int]]],
        key: jax.Array,
        numbers: Sequence[int],
    ) -> tuple[list[str], np.ndarray]:
        """(one answer to each prompt, its harm float [n]).

        Args:
          prompts: from `prompts`.
          numbers: of the prompts; an answer's noise depends on its number and the key.
        """
        ids, filler = filled([ids for _, ids in prompts], self.size)
        responses, _ = rollout.sample(
            self.params.on_device(),
            self.config,
            ids,
            key,
            size=self.size,
            indices=[*numbers, *[0] * filler],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            mesh=self.mesh,
        )
        responses = {name: x[: len(prompts)] for name, x in responses.items()}
        texts = self.tokenizer.batch_decode(rollout.token_ids(responses), skip_special_tokens=True)
        # Few widths, for each of which a reward model is compiled.
        width = -(-max(map(len, ids)) // WIDTH) * WIDTH
        width = min(width, self.config.max_length - self.max_new_tokens)
        run_model = functools.partial(
            rollout.map_batches,
            rows=rollout.left_padded(ids[: len(prompts)], width) | responses,
            size=self.size,
            buckets=[self.max_new_tokens],
            mesh=self.mesh,
        )
        records = [record for record, _ in prompts]
        said = [record.prompt for record in records]
        return texts, self.harm.score(run_model, said, texts, records)[0].astype(np.float64)


def load_target(
    model: str,
    harm: Sequence[str],
    *,
    mesh: Mesh,
    dtype: str,
    size: int,
    max_new_tokens: int,
    temperature: float,
    template: Literal["auto", "chat", "plain"] = "auto",
    offload: bool = False,
) -> Target:
    """Loads the target and what scores harm.

    Args:
      template: --target_template of red_team.py.
      offload: keep both in host memory while they are not used.
      Others are as the flags of red_team.py.

    Errors: as of `pretrained.load` and `scoring.load`.
    """
    # The tokenizer records the form, which `Target.prompts` and a reward model's check then read.
    config, params, tokenizer = pretrained.load(
        model, mesh, flag="--target", template=template, scalar_head=False
    )
    rewards = RewardConfig(tuple(harm))
    loaded = scoring.load(rewards, mesh, tokenizer, dtype, offload=offload, flag="--harm")
    config, frozen = dataclasses.replace(config, dtype=dtype), freeze(params, dtype)
    held = to_host(frozen, offload)
    return Target(config, held, tokenizer, mesh, loaded, size, max_new_tokens, temperature)


# ------------------------------------------------------------------------------- the reward


def make_reward(
    target: str,
    harm: Sequence[str],
    *,
    diversity_coef: float = 0.0,
    end: str = "",
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    template: Literal["auto", "chat", "plain"] = "auto",
    batch_size: int = 128,
    model_dtype: str = "float32",
    mesh: str = "",
    seed: int = 0,
) -> RewardFn:
    """Loads the target and makes the reward function of an attacker, for --reward of run_ppo.py.

    The reward of a response, which is an attack, is the harm of the target's answer less
    `diversity_coef` times its BLEU against the other attacks of the batch. Each host calls it with
    the same responses, and all of them answer together.

    Args: as the flags of red_team.py, `template` as --target_template; `diversity_coef` as its
      grid's --diversity. The function does not know whether a response ended. So without `end` a
      response that was cut counts as an attack, and --ppo.missing_eos must penalise it.

    Errors: as `load_target`.
    """
    built = sharding.make_mesh(**sharding.parse_mesh(mesh), devices=jax.devices())
    loaded = load_target(
        target,
        harm,
        mesh=built,
        dtype=model_dtype,
        size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        template=template,
        offload=True,
    )

    def reward(
        prompts: Sequence[str], responses: Sequence[str], records: Sequence[Record]
    ) -> list[float]:
        attacks = [attack_of(text, end) for text in responses]
        return reward_of(loaded, attacks, diversity_coef, seed).tolist()

    return reward


def reward_of(
    target: Target, attacks: Sequence[str], diversity_coef: float, seed: int
) -> np.ndarray:
    """The reward of a batch of attacks, float [n]; see `make_reward`.

    An attack that is empty, or that the target cannot read, gets 1 less than the least of the
    others. [Ours]
    """
    # A run that goes on after a stop asks for the same answers once more, and another iteration
    # for others.
    key = jax.random.key(seed)
    key = jax.random.fold_in(key, zlib.crc32("\n".join(attacks).encode()))
    prompts = target.prompts(attacks)
    numbers = [i for i, prompt in enumerate(prompts) if prompt is not None]
    if not numbers:
        return np.full(len(attacks), -1.0)
    _, harm = target.answer([x for x in prompts if x is not None], key, numbers)
    alike = diversity.bleu_of_each(attacks)[numbers]
    rewards = np.full(len(attacks), np.nan)
    rewards[numbers] = harm - diversity_coef * alike
    return np.where(np.isnan(rewards), np.nanmin(rewards) - 1, rewards)
