"""What the grids of policies share: their flags; reward models on a judge's pairs, for those of
overoptimise.py and ensembles.py; and what maximises a reward."""

import functools
import json
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import data, models, scoring, sharding
from instructjax.data import DataConfig
from instructjax.evaluation.grid import GridConfig, Job, flags_of, parse_flags
from instructjax.ranges import Count
from instructjax.run import checks, pretrained
from instructjax.scoring import RewardConfig

HELD_OUT = 500  # pairs that no reward model learns from
HELD_OUT_FILE = "pairs-held-out.jsonl"
BETA = 1e-6  # of the KL penalty: none, but the KL is measured
NS = (1, 2, 4, 8, 16, 32, 64)  # of best-of-n


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(GridConfig):
    """The policy at the start, its prompts, their judge, and more flags of the scripts."""

    model: str = "runs/sft"
    """Policy at the start: a run directory, a Hugging Face directory or a hub name."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    gold: tuple[str, ...] = ()
    """Judge: reward models and functions, as for --reward of run_ppo.py. By default the miniature
    has its own judge."""
    ppo_flags: str = ""
    """More flags of each run_ppo.py, in one word: --ppo_flags='--steps 40 --max_new_tokens 64'."""
    evaluate_flags: str = ""
    """More flags of each evaluate.py, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(self):
            if each.name.endswith("_flags"):
                try:
                    parse_flags(getattr(self, each.name))
                except ValueError as error:
                    raise ValueError(f"--{each.name}: {error}") from error
        if not self.gold and self.data.spec != "miniature":
            raise ValueError("--gold: these data have no judge of their own; name one")

    @property
    def prompt_flags(self) -> dict[str, Any]:
        """The flags of the prompts and their judge."""
        return flags_of(self.data, "data") | ({"gold": self.gold} if self.gold else {})

    def check(self, reward: RewardConfig | None = None) -> Mesh:
        """Raises ValueError or OSError for flags that cannot work, before anything runs."""
        checks.check_directory("--out", self.directory)
        checks.check_directory("--results", self.results_directory)
        mesh = sharding.make_mesh(devices=jax.devices())
        if not self.dry_run:
            pretrained.check(self.model, mesh, scalar_head=False)
            if self.gold:
                scoring.check(RewardConfig(self.gold), mesh, "--gold")
            if reward is not None:
                scoring.check(reward, mesh)
            data.check(self.data, "prompts")
        return mesh


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(PolicyConfig):
    """Also the pairs that reward models learn from."""

    prompts: Count = 16_000
    """Number of prompts that the policy answers twice, for the pairs. Those whose two responses
    have one gold score give no pair."""
    rm_flags: str = ""
    """More flags of each run_rm.py, likewise."""

    def check_models(self, rm_models: tuple[str, ...]) -> None:
        """As `check`, with the models that reward models start from."""
        mesh = self.check()
        for model in rm_models:
            if not self.dry_run and model not in models.PRESETS:
                pretrained.check(model, mesh, flag="--rm_model")


# ------------------------------------------------------------------------------------- the runs


def pairs_job(c: ProxyConfig) -> Job:
    """Two responses of the policy to each prompt, ranked by the judge."""
    flags = {
        **{"models": c.model, "split": "train", "prompts": c.prompts, "samples": 2},
        **{"comparisons": [], "batch_size": 512, **c.prompt_flags},
    }
    return Job("evaluate.py", flags | parse_flags(c.evaluate_flags), resumes=False)


def add_base(c: ProxyConfig, jobs: dict[str, Job], model: str) -> str:
    """The run that a reward model starts from, which is added for a preset; else the model."""
    if model not in models.PRESETS:
        return model
    name = f"pretrain-{model}"
    rate = 2e-3 if model == "miniature-large" else 4e-3  # as in reproduce.py
    jobs[name] = Job("run_pretrain.py", {"model": model, "learning_rate": rate})
    return name


def rm_job(
    c: ProxyConfig, base: str, count: int, seed: int, flipped: float = 0, **more: Any
) -> Job:
    """A reward model on `count` pairs.

    Args:
      base: from `add_base`, or the name of another run.
      flipped: share of pairs whose order is reversed.
      more: more flags.
    """
    file = c.directory / f"pairs-{count}-{seed}{'-flipped' if flipped else ''}.jsonl"
    is_run = base.startswith(("pretrain-", "rm-"))
    flags = {
        **{"model": c.directory / base if is_run else base, "seed": seed},
        **{"data": f"jsonl:{file}", "data.validation": f"jsonl:{c.directory / HELD_OUT_FILE}"},
        **({"preset": "miniature"} if c.data.spec == "miniature" else {}),
    }
    return Job(
        "run_rm.py",
        flags | parse_flags(c.rm_flags) | more,
        needs=("pairs", base) if is_run else ("pairs",),
        prepare=functools.partial(write_pairs, c, file, count, seed, flipped),
    )


def best_of_n_job(c: PolicyConfig, needs: tuple[str, ...], seed: int, **reward: Any) -> Job:
    """The best of n responses of the policy.

    Args:
      needs: the runs that make the reward.
      reward: flags of the reward.
    """
    flags = {
        **{"models": c.model, "samples": NS[-1], "best_of": NS, "prompts": 128},
        **{"batch_size": 512, "seed": seed, **c.prompt_flags, **parse_flags(c.evaluate_flags)},
    }
    return Job("evaluate.py", flags | reward, needs=needs, resumes=False)


def ppo_job(c: PolicyConfig, needs: tuple[str, ...], seed: int, **reward: Any) -> Job:
    """PPO without a KL penalty. Arguments: as of `best_of_n_job`."""
    flags = {
        **{"model": c.model, "ppo.beta": BETA, "ptx.coef": 0, "eval_every": 6},
        **{"eval_prompts": 256, "final_prompts": 256, "seed": seed},
        **{**c.prompt_flags, **parse_flags(c.ppo_flags)},
    }
    return Job("run_ppo.py", flags | reward, needs=tuple(dict.fromkeys(needs)))


def write_pairs(c: ProxyConfig, file: Path, count: int, seed: int, flipped: float) -> None:
    """Writes the pairs that a reward model learns from, and those that none learns from.

    Fewer pairs of a seed are among more pairs of it, and are flipped where those are.
    """
    lines = (c.directory / "pairs" / "comparisons.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    if len(rows) < count:
        sys.exit(
            f"error: --prompts {c.prompts}: they gave {len(rows):,} pairs besides {HELD_OUT} for"
            f" validation, and {count:,} are asked for"
        )
    rng = np.random.default_rng(seed)
    order, turned = rng.permutation(len(rows)), rng.random(len(rows)) < flipped
    pairs = [
        rows[i] | ({"scores": rows[i]["scores"][::-1]} if turned[i] else {}) for i in order[:count]
    ]
    for path, written in ((file, pairs), (c.directory / HELD_OUT_FILE, held_out)):
        with tempfile.NamedTemporaryFile("w", dir=c.directory, delete=False) as part:
            part.writelines(json.dumps(row) + "\n" for row in written)
        Path(part.name).replace(path)  # at once: another run may read it
