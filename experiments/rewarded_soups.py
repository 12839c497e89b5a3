r"""Several objectives: averages of policies that each learned one of them, against a sweep.

    python experiments/rewarded_soups.py                                     # the miniature
    python experiments/rewarded_soups.py --model MODEL --data jsonl:prompts.jsonl \
        --reward runs/rm my_file.py:short --gold runs/gold-rm --ppo_flags='--max_new_tokens 128'
    python experiments/rewarded_soups.py --dry_run                           # prints the commands

Rewarded soups (Rame et al. 2023, arXiv 2306.04488) take one run of PPO for each reward, and trade
the rewards by averaging the weights of these policies. The sweep takes one run of PPO for each
trade, on the weighted sum of the rewards. The page has what each policy gets of each reward, and
the hypervolume of both sets: all that some policy exceeds in every reward, from the least values on
the page. The sets have the same weights, besides those of one reward, which they share.

    ppo-WEIGHTS-SEED         PPO on a weighted sum, such as 1-0-0 and 0.5-0.5-0
    soup-WEIGHTS-SEED        the weighted mean of the policies with one reward
    evaluation-SEED          all of them, on held-out prompts

The miniature's rewards are parts of its judge's utility: facts (what was asked for, nothing false
or invented), courtesy (a courteous sentence, none that is rude) and form (no padding, nothing
garbled). Courtesy and form disagree: a courteous sentence that was not asked for is padding.

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results. A run that has finished is not made again, and
one that was stopped goes on with the same command.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import policy_grids as grids
import tyro

from instructjax import miniature, scoring, usage
from instructjax.data import Record
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
from instructjax.miniature import language
from instructjax.miniature.judging import GOLD
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
Weights = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The rewards."""

    out: Path | None = Path("runs/soups")
    reward: tuple[str, ...] = ()
    """Rewards, two or more: functions, and at most one reward model, which goes first. By default
    the miniature's facts, courtesy and form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward and self.data.spec != "miniature":
            raise ValueError("--reward: only the miniature has rewards of its own; name some")
        if len(self.rewards) < 2 or not all(map(scoring.is_function, self.rewards[1:])):
            raise ValueError("--reward: give two or more, and a reward model first")

    @property
    def rewards(self) -> tuple[str, ...]:
        """--reward or its default."""
        file = from_here(EXPERIMENTS) / Path(__file__).name
        return self.reward or tuple(f"{file}:{name}" for name in ("facts", "courtesy", "form"))

    @property
    def corners(self) -> list[Weights]:
        """Weights of one reward."""
        return [tuple(row) for row in np.eye(len(self.rewards)).tolist()]

    @property
    def mixtures(self) -> list[Weights]:
        """Equal weights of two rewards, and of all."""
        count = len(self.rewards)
        pairs = itertools.combinations(range(count), 2)
        rows = [tuple(0.5 if i in pair else 0.0 for i in range(count)) for pair in pairs]
        return list(dict.fromkeys([*rows, (round(1 / count, 3),) * count]))


# ------------------------------------------------------------------------------ the miniature's


Texts = Sequence[str]
Records = Sequence[Record]


def facts(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """What the judge's utility says of what was asked for, false and invented."""
    return _parts(responses, records, ("followed", "false", "invented"))


def form(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """What it says of padding and garbled sentences."""
    return _parts(responses, records, ("padding", "garbled"))


def courtesy(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """2 for a courteous sentence, and what the utility says of rude ones."""
    rude = _parts(responses, records, ("rude",))
    acts = ({sentence.act for sentence in language.read(text)} for text in responses)
    return [2 * ("courtesy" in said) + cost for said, cost in zip(acts, rude, strict=True)]


def _parts(responses: Texts, records: Records, names: Sequence[str]) -> list[float]:
    """The terms of the judge's utility for some features."""
    values = []
    for record, text in zip(records, responses, strict=True):
        features = miniature.judge(dict(record.row), text).features
        values.append(sum(getattr(GOLD, name) * getattr(features, name) for name in names))
    return values


# ------------------------------------------------------------------------------------- the runs


def name_of(kind: str, weights: Weights, seed: int) -> str:
    return f"{kind}-{'-'.join(f'{w:g}' for w in weights)}-{seed}"


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    for seed in c.seeds:
        for weights in (*c.corners, *c.mixtures):
            flags = {
                **{"model": c.model, "reward": c.rewards, "reward.weights": weights},
                **{"ptx.coef": 0, "seed": seed, **c.prompt_flags},
            }
            job = Job("run_ppo.py", flags | parse_flags(c.ppo_flags))
            jobs[name_of("ppo", weights, seed)] = job
        corners = tuple(name_of("ppo", weights, seed) for weights in c.corners)
        for weights in c.mixtures:
            jobs[name_of("soup", weights, seed)] = Job(
                "-m instructjax.run.average",
                {"weights": weights},
                needs=corners,
                positional=tuple(str(c.directory / name) for name in corners),
                resumes=False,
            )
        names = tuple(name for name in jobs if name.endswith(f"-{seed}"))
        flags = {
            **{"models": [c.model, *(c.directory / name for name in names)], "prompts": 512},
            **{"measure": c.rewards, "reference": c.model, "seed": seed, **c.prompt_flags},
        }
        flags |= parse_flags(c.evaluate_flags)
        jobs[f"evaluation-{seed}"] = Job("evaluate.py", flags, needs=names, resumes=False)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


# ------------------------------------------------------------------------------------- the page


def points_of(c: Config, seed: int) -> dict[str, np.ndarray]:
    """What each model of a seed gets of each reward, if its evaluation has finished: float [K]."""
    results = paper.results_of(c.results_directory, f"evaluation-{seed}")
    names = [spec.rpartition(":")[2] if scoring.is_function(spec) else spec for spec in c.rewards]
    rows = {} if results is None else results["models"]
    return {
        paper.run_name(path): np.array([row["measures"][name][0] for name in names])
        for path, row in rows.items()
    }


def volumes(c: Config, seed: int) -> dict[str, float]:
    """The hypervolume of each set of policies of a seed; empty before its evaluation."""
    points = points_of(c, seed)
    if not points:
        return {}
    least = np.min([*points.values()], axis=0)
    corners = [points[name_of("ppo", weights, seed)] for weights in c.corners]
    sets = {"one reward each": []}
    for label, kind in (("sweep", "ppo"), ("soups", "soup")):
        sets[label] = [points[name_of(kind, weights, seed)] for weights in c.mixtures]
    return {
        label: statistics.hypervolume(np.array([*corners, *more]), least)
        for label, more in sets.items()
    }


def sections(c: Config) -> list[Section]:
    """What has finished."""
    by_seed = {seed: found for seed in c.seeds if (found := volumes(c, seed))}
    if not by_seed:
        return []
    runs = {"one reward each": len(c.corners), "soups": len(c.corners)}
    runs["sweep"] = len(c.corners) + len(c.mixtures)
    shares = {
        label: [found[label] / found["sweep"] for found in by_seed.values()] for label in runs
    }
    rows = [
        [label, f"{count}", paper.percent(statistics.over_runs(shares[label]))]
        for label, count in runs.items()
    ]
    volume = paper.section(
        "Hypervolume",
        "The claim holds for a seed where soups have at least nine tenths of the sweep's.",
        [(x >= 0.9, f"seed {seed}") for seed, x in zip(by_seed, shares["soups"], strict=True)],
        Table("", ("", "runs of PPO", "share of the sweep's hypervolume"), rows),
    )
    return [*filter(None, [volume]), rewards(c)]


def rewards(c: Config) -> Section:
    """The rewards of each policy, over seeds."""
    rows, of_seeds = [], [points_of(c, seed) for seed in c.seeds]
    kinds = [("ppo", c.corners), ("ppo", c.mixtures), ("soup", c.mixtures)]
    for kind, weights in [(kind, w) for kind, every in kinds for w in every]:
        found = [
            points[name_of(kind, weights, seed)]
            for seed, points in zip(c.seeds, of_seeds, strict=True)
            if points
        ]
        label = name_of(kind, weights, 0).rpartition("-")[0]
        columns = zip(*found, strict=True)
        rows.append([label, *(paper.plain(statistics.over_runs(column)) for column in columns)])
    names = [spec.rpartition(":")[2] for spec in c.rewards]
    return Section("Rewards of each policy", "", tables=[Table("", ("", *names), rows)])


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    grid(c).chosen(c.runs)
    c.check(RewardConfig(c.rewards))


def cli(argv: Sequence[str] | None = None) -> None:
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}
    c = usage.read(lambda: tyro.cli(Config, **keywords), check)
    text = "Means over responses to held-out prompts. Intervals are over seeds."
    paper.make_page(c, grid(c), "Several objectives", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
