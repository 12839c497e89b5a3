r"""Several objectives: averages of policies that each maximise one of them, against a sweep.

    python experiments/rewarded_soups.py                                     # the miniature
    python experiments/rewarded_soups.py --model MODEL --data jsonl:prompts.jsonl \
        --reward runs/rm my_file.py:short --gold runs/gold-rm --max_new_tokens 128
    python experiments/rewarded_soups.py --dry_run                           # prints the commands

Rewarded soups (Rame et al. 2023, arXiv 2306.04488) take one run of PPO for each reward, and trade
the rewards by averaging the weights of these policies. The sweep takes one run of PPO for each
trade, on the weighted sum of the rewards. The report has each policy's mean of each reward, and
the hypervolume of both sets: the volume of the points that some policy exceeds in every reward,
above the lowest values in the report. Both sets have the same weights. They share the policies of
one reward.

    ppo-WEIGHTS-SEED         PPO on a weighted sum, such as 1-0-0 and 0.5-0.5-0
    soup-WEIGHTS-SEED        the weighted mean of the policies with one reward
    evaluation-SEED          all of them and the start, on held-out prompts

A seed draws the samples of PPO and of the evaluation. The start is the same for all.

The miniature's rewards are parts of its judge's utility: facts (what was asked for, nothing false
or invented), courtesy (a courteous sentence, none that is rude) and form (no padding, nothing
garbled). Courtesy and form disagree: a courteous sentence that was not asked for is padding.

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results. The same command continues after a stop.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import policy_grids as grids

from instructjax import scoring, usage
from instructjax.evaluation import comparison, gold, paper, statistics
from instructjax.evaluation.figures import lines_svg
from instructjax.evaluation.grid import Grid, Job, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
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
        taken = {*comparison.COLUMNS, *gold.MEASURES, "model", "disagreement"}
        if taken & {*self.names} or len(set(self.names)) < len(self.names):
            raise ValueError(f"--reward: {', '.join(self.names)}: two alike, or a name in use")
        if len(self.rewards) < 2 or not all(map(scoring.is_function, self.rewards[1:])):
            raise ValueError("--reward: give two or more, and a reward model first")

    @property
    def rewards(self) -> tuple[str, ...]:
        """--reward or its default."""
        file = from_here(EXPERIMENTS) / "miniature_rewards.py"
        return self.reward or tuple(f"{file}:{name}" for name in ("facts", "courtesy", "form"))

    @property
    def names(self) -> list[str]:
        """What evaluate.py calls the rewards."""
        return [x.rpartition(":")[2] if scoring.is_function(x) else x for x in self.rewards]

    @property
    def corners(self) -> list[Weights]:
        """Weights of one reward."""
        return [tuple(row) for row in np.eye(len(self.rewards)).tolist()]

    @property
    def halves(self) -> dict[tuple[int, int], Weights]:
        """Equal weights of two rewards, by their numbers."""
        numbers = range(len(self.rewards))
        pairs = itertools.combinations(numbers, 2)
        return {pair: tuple(0.5 * (i in pair) for i in numbers) for pair in pairs}

    @property
    def mixtures(self) -> list[Weights]:
        """Equal weights of two rewards, and of all."""
        count = len(self.rewards)
        return list(dict.fromkeys([*self.halves.values(), (round(1 / count, 3),) * count]))


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
            **{"measure": c.rewards, "seed": seed, **c.prompt_flags},
        }
        flags |= parse_flags(c.evaluate_flags)
        jobs[f"evaluation-{seed}"] = Job("evaluate.py", flags, needs=names, resumes=False)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


# ------------------------------------------------------------------------------------- the page


def points_of(c: Config, seed: int) -> dict[str, np.ndarray]:
    """What each model of a seed gets of each reward, if its evaluation has finished: float [K]."""
    found = grids.policies_of(c.results_directory, f"evaluation-{seed}")
    return {
        model: np.array([row["measures"][name] for name in c.names]) for model, row in found.items()
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
    few = len(c.corners)
    runs = {"one reward each": few, "soups": few, "sweep": few + len(c.mixtures)}
    shares = {
        name: [found[name] / (found["sweep"] or math.nan) for found in by_seed.values()]
        for name in runs
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
    """The rewards of each policy over seeds, and what two rewards trade for each other."""
    of_seeds = {seed: points for seed in c.seeds if (points := points_of(c, seed))}
    kinds = [("ppo", c.corners), ("ppo", c.mixtures), ("soup", c.mixtures)]
    start = np.array([points[grids.START] for points in of_seeds.values()])
    policies = {  # (kind, weights) -> float [seeds, K]
        (kind, w): np.array([points[name_of(kind, w, seed)] for seed, points in of_seeds.items()])
        for kind, every in kinds
        for w in every
    }
    of_names = {"start": start} | {name_of(*x, 0)[:-2]: found for x, found in policies.items()}
    rows = [
        [name, *(paper.plain(statistics.over_runs(x)) for x in found.T)]
        for name, found in of_names.items()
    ]
    figures = []
    for (i, j), half in c.halves.items():
        lines = {}
        for label, kind in (("sweep", "ppo"), ("soups", "soup")):
            line = [("ppo", c.corners[i]), (kind, half), ("ppo", c.corners[j])]
            lines[label] = np.array([policies[policy].mean(0)[[i, j]] for policy in line])
        title = f"{c.names[i]} and {c.names[j]}"
        figures.append(lines_svg(title, lines, c.names[i], c.names[j]))
    text = "Each figure has the policies of two rewards and, between them, those of equal weights."
    return Section("Rewards of each policy", text, (), [Table("", ("", *c.names), rows)], figures)


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    c.check(grid(c), RewardConfig(c.rewards))


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    text = "Means over responses to held-out prompts. Intervals are over seeds."
    paper.make_page(c, grid(c), "Several objectives", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
