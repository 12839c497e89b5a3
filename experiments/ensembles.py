r"""Several reward models instead of one: which combination can be maximised for longer.

    python experiments/ensembles.py                                          # the miniature
    python experiments/ensembles.py --model MODEL --rm_model MODEL --data jsonl:prompts.jsonl \
        --gold runs/gold-rm --pairs 8000 --prompts 20000 --max_new_tokens 128 \
        --rm_flags='--length 1024'
    python experiments/ensembles.py --dry_run                                # prints the commands

As in overoptimise.py, a judge ranks pairs of the policy's own responses, reward models learn from
them, and best-of-n and PPO without a KL penalty maximise a score. The scores are

    single           that of one reward model
    mean             the mean of --members reward models of other seeds
    min              their least score                    (Coste et al. 2023, arXiv 2310.02743)
    mean-variance    their mean less --spread variances   (likewise)
    member           that of one of --members reward models that start from one reward model;
                     best-of-n alone
    average          that of the mean of these members' weights (Rame et al. 2024, WARM,
                     arXiv 2401.12187): one forward pass

Each is made from the judge's own labels (clean), and from labels of which a share is reversed
(flipped), as both papers do.

    pairs, pretrain-NAME                     as in overoptimise.py
    rm-LABELS-SEED                           the --members reward models
    rm-start-..., rm-members-..., rm-average-...    the reward models that are averaged
    best-of-n-SCORE-LABELS-SEED, ppo-...     best-of-n and PPO on a score

A seed draws pairs, flips, heads of reward models, and samples.

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results. A finished run is not repeated, and the same
command continues a run that was stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policy_grids as grids

from instructjax import usage
from instructjax.evaluation import overoptimisation, paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here
from instructjax.evaluation.overoptimisation import Curve
from instructjax.evaluation.report import Section, Table
from instructjax.ranges import Count, CountFrom2, NotNegative, Share

EXPERIMENTS = Path(__file__).resolve().parent
LABELS = ("clean", "flipped")
SCORES = ("single", "mean", "min", "mean-variance", "member", "average")
FITS = {"best-of-n": statistics.fit_best_of_n, "PPO": statistics.fit_rl}


@dataclass(frozen=True, kw_only=True)
class Config(grids.ProxyConfig):
    """The reward models and their scores."""

    out: Path | None = Path("runs/ensembles")
    rm_model: str = "miniature-small"
    """Model that reward models start from. A preset is pretrained on the miniature's text."""
    pairs: Count = 2000
    """Number of comparisons that a reward model learns from."""
    members: CountFrom2 = 5
    """Number of reward models. [Coste et al.: 5]"""
    flipped: Share = 0.25
    """Share of the comparisons whose order is reversed in `flipped`. [Both papers: a quarter]"""
    spread: NotNegative = 1.0
    """Variances that `mean-variance` subtracts from the mean. [Ours]"""
    start_steps: Count = 20
    """Number of updates of the reward model that the averaged reward models start from. [Ours; Rame
    et al. train the head alone first]"""


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {"pairs": grids.pairs_job(c, c.prompts)}
    base = grids.add_base(c, jobs, c.rm_model)
    for seed in c.seeds:
        for labels in LABELS:
            add_reward_models(c, jobs, base, labels, seed)
            for score in SCORES:
                add_maximisers(c, jobs, score, labels, seed)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_reward_models(
    c: Config, jobs: dict[str, Job], base: grids.Base, labels: str, seed: int
) -> None:
    """Reward models with heads of their own, and some of one head, with their average."""
    end = f"{labels}-{seed}"
    flips = c.flipped if labels == "flipped" else 0.0
    start, members = f"rm-start-{end}", f"rm-members-{end}"
    # Member i has the seed of the flag plus i: no two grids' seeds share one.
    own = {"seed": seed * c.members}
    ensemble = own | {"ensemble": c.members}
    jobs[f"rm-{end}"] = grids.rm_job(c, base, c.pairs, seed, flips, ensemble)
    steps = own | {"steps": c.start_steps}
    jobs[start] = grids.rm_job(c, base, c.pairs, seed, flips, steps)
    begun = grids.Base(c.directory / start, (start,))
    jobs[members] = grids.rm_job(c, begun, c.pairs, seed, flips, ensemble)
    exports = ["export", *(f"export-{i}" for i in range(1, c.members))]
    jobs[f"rm-average-{end}"] = Job(
        "-m instructjax.run.average",
        {},
        needs=(members,),
        positional=tuple(str(c.directory / members / export) for export in exports),
        resumes=False,
    )


def add_maximisers(c: Config, jobs: dict[str, Job], score: str, labels: str, seed: int) -> None:
    """Best-of-n and PPO by a score."""
    end = f"{labels}-{seed}"
    rm = {"member": f"rm-members-{end}", "average": f"rm-average-{end}"}.get(score, f"rm-{end}")
    of_one = score in ("single", "member")
    reward: dict[str, Any] = {"reward": c.directory / rm / ("export" if of_one else "")}
    if score in ("min", "mean-variance"):
        reward["reward.combine"] = score
    if score == "mean-variance":
        reward["reward.spread"] = c.spread
    jobs[f"best-of-n-{score}-{end}"] = grids.best_of_n_job(c, (rm,), seed, **reward)
    if score != "member":
        value = {"value_model": c.directory / f"rm-{end}"}  # its first member
        needs = (rm, f"rm-{end}")
        jobs[f"ppo-{score}-{end}"] = grids.ppo_job(c, needs, seed, **reward, **value)


# ------------------------------------------------------------------------------------- the page


def curves_of(c: Config, method: str, score: str, labels: str) -> dict[int, Curve]:
    """The curve of each seed that has finished."""
    curves = {}
    for seed in c.seeds:
        of_start, of_ppo = (
            paper.results_of(c.results_directory, f"{kind}-{score}-{labels}-{seed}")
            for kind in ("best-of-n", "ppo")
        )
        if of_start is not None and method == "best-of-n":
            curves[seed] = overoptimisation.of_best_of_n(of_start)
        elif of_start is not None and of_ppo is not None:
            curves[seed] = overoptimisation.of_training(of_ppo, of_start)
    return curves


def sections(c: Config) -> list[Section]:
    """What has finished."""
    page: list[Section | None] = []
    for labels in LABELS:
        for method, fit in FITS.items():
            curves = {score: curves_of(c, method, score, labels) for score in SCORES}
            of_seeds = {score: list(by_seed.values()) for score, by_seed in curves.items()}
            page.append(overoptimisation.section(f"{method}, {labels} labels", of_seeds, fit))
            page.append(differences(f"{method}, {labels} labels: against one model", curves))
    return [*filter(None, page)]


def differences(title: str, curves: Mapping[str, Mapping[int, Curve]]) -> Section | None:
    """What gold gains at the end of a curve, less what one reward model gives with that seed."""
    rows = []
    for score, by_seed in curves.items():
        baseline = curves["member" if score == "average" and curves["member"] else "single"]
        shared = [seed for seed in by_seed if seed in baseline]
        if shared and by_seed is not baseline and score != "member":
            gains = [by_seed[seed].gold[-1] - baseline[seed].gold[-1] for seed in shared]
            rows.append([score, paper.plain(statistics.over_runs(gains))])
    text = "Gold at the end, less that of one reward model with the same seed."
    return Section(title, text, tables=[Table("", ("", "difference"), rows)]) if rows else None


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    c.check_all(grid(c), "--rm_model", (c.rm_model,))


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    title = "Several reward models in place of one"
    paper.make_page(c, grid(c), title, overoptimisation.TEXT, lambda: sections(c))


if __name__ == "__main__":
    cli()
