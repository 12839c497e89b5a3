"""Shared code of the grids of policies: their flags; reward models on a judge's pairs, for
overoptimise.py and ensembles.py; and the runs that maximise a reward."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from line_files import read_lines, write_lines

from instructjax import data, models, scoring, sharding
from instructjax.data import DataConfig
from instructjax.evaluation import paper
from instructjax.evaluation.grid import Grid, GridConfig, Job, flags_of, parse_flags
from instructjax.ranges import Count
from instructjax.run import checks, pretrained
from instructjax.scoring import RewardConfig

HELD_OUT = 500  # pairs that no reward model learns from
HELD_OUT_FILE = "pairs-held-out.jsonl"
BEST_FILE = "best-held-out.jsonl"  # the better responses of these, whose mean score becomes 0
BETA = 1e-6  # of the KL penalty: none, but the KL is measured
NS = (1, 2, 4, 8, 16, 32, 64)  # of best-of-n
START = "start"  # of `policies_of`: --model. The name of a run ends in its seed


# What no --..._flags may set, as every grid sets it: what a run is of, and what it is compared by.
COMMON = (
    *("model", "models", "seed", "data", "gold", "max_new_tokens", "out", "resume"),
    *("reward", "reward.weights", "reward.combine", "reward.spread"),
)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(GridConfig):
    """The policy at the start, its prompts, their judge, and more flags of the scripts."""

    # What else --..._flags may not set, by their names, as this grid sets it; and what of COMMON
    # they may, as it does not.
    OWN: ClassVar[Mapping[str, Sequence[str]]] = MappingProxyType({})
    FREE: ClassVar[Mapping[str, Sequence[str]]] = MappingProxyType({})

    model: str = "runs/sft"
    """Policy at the start: a run directory, a Hugging Face directory or a hub name."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    gold: tuple[str, ...] = ()
    """Judge: reward models and functions, as for --reward of run_ppo.py. By default the miniature
    has its own judge."""
    max_new_tokens: Count = 32
    """Longest response in tokens, EOS included, in training and in evaluation."""
    ppo_flags: str = ""
    """Further flags of each run_ppo.py, quoted as one argument: --ppo_flags='--steps 40'. Flags
    that the grid sets itself, such as --model and --seed, are refused, also in the flags below."""
    evaluate_flags: str = ""
    """Further flags of each evaluate.py, quoted as one argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(self):
            if each.name.endswith("_flags"):
                try:
                    flags = parse_flags(getattr(self, each.name))
                except ValueError as error:
                    raise ValueError(f"--{each.name}: {error}") from error
                own = {*COMMON} - {*self.FREE.get(each.name, ())} | {*self.OWN.get(each.name, ())}
                for flag in sorted(own & {*flags}):
                    raise ValueError(f"--{each.name}: --{flag} is set by this script's own flags")
        if not self.gold and not self.in_miniature:
            raise ValueError("--gold: these data have no judge of their own; name one")
        beta = " ".join(parse_flags(self.ppo_flags).get("ppo.beta", ["1"]))
        try:
            no_penalty = float(beta) == 0
        except ValueError as error:
            raise ValueError(f"--ppo_flags: --ppo.beta {beta}: expected a number") from error
        if no_penalty:
            raise ValueError(f"--ppo_flags: --ppo.beta 0 measures no KL; give {BETA}")

    @property
    def in_miniature(self) -> bool:
        return self.data.spec == "miniature"

    @property
    def prompt_flags(self) -> dict[str, Any]:
        """The flags of the prompts, their judge and the length of responses."""
        gold = {"gold": self.gold} if self.gold else {}
        return flags_of(self.data, "data") | gold | {"max_new_tokens": self.max_new_tokens}

    @property
    def comparison_flags(self) -> dict[str, Any]:
        """The flags of run_rm.py, on comparisons of responses to these prompts."""
        template = self.data.template
        flags = {"preset": "miniature"} if self.in_miniature else {}
        return flags | ({} if template == "auto" else {"data.template": template})

    def check(
        self, runs: Grid, reward: RewardConfig | None = None, flag: str = "--reward"
    ) -> Mesh | None:
        """Raises ValueError or OSError for flags that cannot work, before anything runs.

        Args:
          runs: the grid of these flags.
          reward: what else scores, which `flag` names.

        Returns:
          a mesh for more checks; None if nothing is to run.
        """
        runs.check(self.runs)
        checks.check_directory("--out", self.directory)
        checks.check_directory("--results", self.results_directory)
        if self.dry_run or not runs.needed(runs.chosen(self.runs)):
            return None
        jax.config.update("jax_platforms", "cpu")  # of this process: the runs need the accelerators
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        pretrained.check(self.model, mesh, scalar_head=False)
        if self.gold:
            scoring.check(RewardConfig(self.gold), mesh, "--gold")
        if reward is not None:
            scoring.check(reward, mesh, flag)
        data.check(self.data, "prompts")
        return mesh


@dataclass(frozen=True, kw_only=True)
class ProxyConfig(PolicyConfig):
    """Also the pairs that reward models learn from."""

    prompts: Count = 16_000
    """Number of prompts that the policy answers twice, for the pairs. Prompts whose two responses
    have the same gold score give no pair."""
    rm_flags: str = ""
    """Further flags of each run_rm.py, quoted as one argument."""

    def check_all(self, runs: Grid, flag: str, rm_models: tuple[str, ...]) -> None:
        """As `check`, with the models that reward models start from, which `flag` names."""
        if (mesh := self.check(runs)) is None:
            return
        for model in rm_models:
            if model not in models.PRESETS:
                pretrained.check(model, mesh, flag=flag)
            elif self.data.spec != "miniature":
                raise ValueError(f"{flag} {model}: presets have the miniature's vocabulary")


# ------------------------------------------------------------------------------------- the runs


class Base(NamedTuple):
    """What a reward model starts from."""

    model: Any  # --model of run_rm.py
    needs: tuple[str, ...] = ()  # the runs that make it


def pairs_job(c: PolicyConfig, prompts: int, labelers: tuple[str, ...] = ()) -> Job:
    """Two responses of the policy to each of the first prompts, ranked by the judge or by others.

    Args:
      labelers: functions and reward models, whose sum ranks in place of the judge.
    """
    flags = {"models": c.model, "batch_size": 512, **c.prompt_flags}
    own = {"split": "train", "prompts": prompts, "samples": 2, "comparisons": []}
    own |= {"gold": labelers} if labelers else {}
    return Job("evaluate.py", flags | parse_flags(c.evaluate_flags) | own, resumes=False)


def add_base(c: ProxyConfig, jobs: dict[str, Job], model: str) -> Base:
    """A model that a reward model starts from. A preset gets a run that pretrains it."""
    if model not in models.PRESETS:
        return Base(model)
    name = f"pretrain-{model}"
    rate = 2e-3 if model == "miniature-large" else 4e-3  # as in reproduce.py
    jobs[name] = Job("run_pretrain.py", {"model": model, "learning_rate": rate})
    return Base(c.directory / name, (name,))


def rm_job(
    c: ProxyConfig,
    base: Base,
    count: int,
    seed: int,
    flipped: float = 0,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Job:
    """A reward model on `count` pairs.

    Args:
      flipped: share of pairs whose order is reversed.
      more: more flags.
    """
    end = f"-flipped-{flipped:g}" if flipped else ""
    file = c.directory / f"pairs-{count}-{seed}{end}.jsonl"
    flags = {
        **{"model": base.model, "seed": seed, **c.comparison_flags},
        **{"data": f"jsonl:{file}", "data.validation": f"jsonl:{c.directory / HELD_OUT_FILE}"},
        # Scores of several reward models are comparable: those of these responses have mean 0.
        **{"demonstrations": f"jsonl:{c.directory / BEST_FILE}", "demonstrations.validation": 0.9},
    }
    if "data.template" in flags:
        flags["demonstrations.template"] = flags["data.template"]
    return Job(
        "run_rm.py",
        flags | parse_flags(c.rm_flags) | {**more},
        needs=("pairs", *base.needs),
        prepare=functools.partial(write_pairs, c, file, count, seed, flipped),
    )


def best_of_n_job(c: PolicyConfig, needs: tuple[str, ...], seed: int, **reward: Any) -> Job:
    """The best of n responses of the policy.

    Args:
      needs: the runs that make the reward.
      reward: flags of the reward.
    """
    flags = {
        **{"models": c.model, "prompts": 128, "batch_size": 512, "seed": seed},
        **{**c.prompt_flags, **parse_flags(c.evaluate_flags)},
        **{"samples": NS[-1], "best_of": NS},
    }
    return Job("evaluate.py", flags | reward, needs=needs, resumes=False)


def ppo_job(c: PolicyConfig, needs: tuple[str, ...], seed: int, **reward: Any) -> Job:
    """PPO without a KL penalty. Arguments: as of `best_of_n_job`."""
    flags = {
        **{"model": c.model, "ppo.beta": BETA, "ptx.coef": 0, "ppo.missing_eos": "none"},
        **{"eval_every": 6, "eval_prompts": 256, "final_prompts": 256, "seed": seed},
        **{**c.prompt_flags, **parse_flags(c.ppo_flags)},
    }
    return Job("run_ppo.py", flags | reward, needs=tuple(dict.fromkeys(needs)))


def evaluation_job(c: PolicyConfig, policies: tuple[str, ...], seed: int) -> Job:
    """Some runs' policies and the start, by the judge, with the KL from the start."""
    flags = {
        **{"models": [c.model, *(c.directory / name for name in policies)], "prompts": 512},
        **{"reference": c.model, "seed": seed, **c.prompt_flags},
    }
    flags |= parse_flags(c.evaluate_flags)
    return Job("evaluate.py", flags, needs=policies, resumes=False)


def write_pairs(c: ProxyConfig, file: Path, count: int, seed: int, flipped: float) -> None:
    """Writes the pairs that a reward model learns from, and those that none learns from.

    Fewer pairs of a seed are among more pairs of it, and are flipped where those are.

    Raises:
      ValueError: there are too few.
    """
    rows = read_lines(c.directory / "pairs" / "comparisons.jsonl")
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    if len(rows) < count:
        raise ValueError(
            f"{c.directory / 'pairs'} has {len(rows):,} pairs besides {HELD_OUT} for validation,"
            f" and {count:,} are asked for; give more --prompts, and another --out"
        )
    rng = np.random.default_rng(seed)
    order, turned = rng.permutation(len(rows)), rng.random(len(rows)) < flipped
    pairs = [
        rows[i] | ({"scores": rows[i]["scores"][::-1]} if turned[i] else {}) for i in order[:count]
    ]
    best = []
    for row in held_out:
        prompt = {name: value for name, value in row.items() if name in ("prompt", "tools")}
        _, better = max(zip(row["scores"], row["responses"], strict=True))
        best.append({**prompt, "completion": better})
    write_lines(file, pairs)
    write_lines(c.directory / HELD_OUT_FILE, held_out)
    write_lines(c.directory / BEST_FILE, best)


def policies_of(results: Path, evaluation: str) -> dict[str, dict[str, Any]]:
    """What each model of an evaluation got; empty before it has finished.

    Returns:
      START for the first of --models, which is the policy at the start, and the names of runs for
      the others -> means `utility` and, where it was measured, `kl`; `measures`, the means of
      --measure; and `wins`, the win rate against each other.
    """
    found = paper.results_of(results, evaluation)
    if found is None:
        return {}
    # By the place in --models: --model may be a run of another grid, with a name of this one's.
    start, *others = found["models"]
    names = {start: START, **{path: paper.run_name(path) for path in others}}
    figures: dict[str, dict[str, Any]] = {}
    for path, row in found["models"].items():
        means = {name: row[name][0] for name in ("utility", "kl") if name in row}
        measures = {name: estimate[0] for name, estimate in row.get("measures", {}).items()}
        figures[names[path]] = {**means, "measures": measures, "wins": {}}
    for pair in found["pairs"]:
        wins = figures[names[pair["model"]]]["wins"]
        wins[names[pair["against"]]] = pair["win_rate"][0]
    return figures
