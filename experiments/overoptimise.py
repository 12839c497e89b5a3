r"""Over-optimisation of a reward model: how a judge rates policies that maximise its score.

    python experiments/overoptimise.py                                       # the miniature
    python experiments/overoptimise.py --model MODEL --rm_models A B C --data jsonl:prompts.jsonl \
        --gold runs/gold-rm --pairs 2000 8000 32000 --prompts 50000 --max_new_tokens 128 \
        --rm_flags='--length 1024'
    python experiments/overoptimise.py --dry_run                             # prints the commands

The procedure is that of Gao et al. 2022, arXiv 2210.10760. The judge ranks pairs of the policy's
own responses, without noise. Reward models learn from these pairs: each size from the largest
number of pairs, and the middle size from each number of pairs. Best-of-n, and PPO without a KL
penalty, maximise each reward model. The report has the gains of gold and proxy against the square
root of the KL, with the fits of the paper's section 1.

    pairs                    two responses of the policy to each prompt, and their gold scores
    pretrain-NAME            a base model, where --rm_models has a preset
    rm-NAME-PAIRS-SEED       a reward model
    best-of-n-NAME-..., ppo-NAME-...    best-of-n and PPO on its score

A seed draws pairs, heads of reward models, and samples. The policy at the start and its responses
are the same for all. In all PPO runs of a seed, the value net starts from the reward model of the
middle size and the most pairs, so that the runs differ in the reward alone.

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results. A finished run is not repeated, and the same
command continues a run that was stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policy_grids as grids

from instructjax import usage
from instructjax.evaluation import overoptimisation, paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here
from instructjax.evaluation.overoptimisation import Curve
from instructjax.evaluation.report import Section, Table
from instructjax.ranges import Count

EXPERIMENTS = Path(__file__).resolve().parent
SIZES = ("miniature-20k", "miniature-45k", "miniature-small", "miniature", "miniature-large")
FITS = {"best-of-n": statistics.fit_best_of_n, "PPO": statistics.fit_rl}


@dataclass(frozen=True, kw_only=True)
class Config(grids.ProxyConfig):
    """The reward models."""

    out: Path | None = Path("runs/overoptimise")
    rm_models: tuple[str, ...] = SIZES
    """Models that reward models start from, the smallest first. A preset is pretrained on the
    miniature's text."""
    pairs: tuple[Count, ...] = (500, 1000, 2000, 4000, 8000)
    """Numbers of comparisons that a reward model learns from, the smallest first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rm_models or not self.pairs or list(self.pairs) != sorted(set(self.pairs)):
            raise ValueError("--rm_models and --pairs: give at least one, and --pairs rising")
        names = [Path(model).name for model in self.rm_models]
        if len(set(names)) < len(names):
            raise ValueError(f"--rm_models: two are named alike: {', '.join(names)}")

    @property
    def middle(self) -> str:
        """The model whose reward models learn from each number of pairs."""
        return self.rm_models[len(self.rm_models) // 2]

    @property
    def axes(self) -> dict[str, list[tuple[str, int]]]:
        """The (model, pairs) of the reward models along each axis. They share one."""
        return {
            "size": [(model, self.pairs[-1]) for model in self.rm_models],
            "pairs": [(self.middle, count) for count in self.pairs],
        }


def name_of(model: str, count: int, seed: int) -> str:
    return f"{Path(model).name}-{count}-{seed}"


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {"pairs": grids.pairs_job(c, c.prompts)}
    bases = {model: grids.add_base(c, jobs, model) for model in c.rm_models}
    shared = (c.middle, c.pairs[-1])
    cells = dict.fromkeys([shared, *c.axes["size"], *c.axes["pairs"]])
    for seed in c.seeds:
        value = f"rm-{name_of(*shared, seed)}"
        for model, count in cells:
            name = name_of(model, count, seed)
            rm, reward = f"rm-{name}", {"reward": c.directory / f"rm-{name}"}
            jobs[rm] = grids.rm_job(c, bases[model], count, seed)
            jobs[f"best-of-n-{name}"] = grids.best_of_n_job(c, (rm,), seed, **reward)
            flags = reward | {"value_model": c.directory / value}
            jobs[f"ppo-{name}"] = grids.ppo_job(c, (rm, value), seed, **flags)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


# ------------------------------------------------------------------------------------- the page


def sections(c: Config) -> list[Section]:
    """What has finished."""
    page = []
    for axis, cells in c.axes.items():
        for method, fit in FITS.items():
            curves = {label_of(cell): curves_of(c, method, cell) for cell in cells}
            title = f"{method}, by {axis} of the reward model"
            page.append(overoptimisation.section(title, curves, fit))
    return [*filter(None, [*page, accuracies(c)])]


def curves_of(c: Config, method: str, cell: tuple[str, int]) -> list[Curve]:
    """The curve of each seed that has finished."""
    curves = []
    for seed in c.seeds:
        of_start, of_ppo = (
            paper.results_of(c.results_directory, f"{kind}-{name_of(*cell, seed)}")
            for kind in ("best-of-n", "ppo")
        )
        if of_start is not None and method == "best-of-n":
            curves.append(overoptimisation.of_best_of_n(of_start))
        elif of_start is not None and of_ppo is not None:
            curves.append(overoptimisation.of_training(of_ppo, of_start))
    return curves


def label_of(cell: tuple[str, int]) -> str:
    return f"{Path(cell[0]).name}, {cell[1]:,} pairs"


def accuracies(c: Config) -> Section | None:
    """Accuracy on pairs that no reward model learned from."""
    rows = []
    for cell in dict.fromkeys([*c.axes["size"], *c.axes["pairs"]]):
        names = [f"rm-{name_of(*cell, seed)}" for seed in c.seeds]
        results = [paper.results_of(c.results_directory, name) for name in names]
        shares: list[Any] = [
            x["accuracy"]["held-out prompts"]["reward model"][0] for x in results if x
        ]
        if shares:
            rows.append([label_of(cell), paper.percent(statistics.over_runs(shares))])
    table = Table("", ("", "accuracy"), rows)
    return Section("Accuracy of the reward models", tables=[table]) if rows else None


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    c.check_all(grid(c), "--rm_models", c.rm_models)


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    title = "Over-optimisation of a reward model"
    paper.make_page(c, grid(c), title, overoptimisation.TEXT, lambda: sections(c))


if __name__ == "__main__":
    cli()
