r"""Compares RAFT, best-of-n, DPO, GRPO, RLOO, PPO and PPO-ptx that maximise one reward.

    python experiments/compare_algorithms.py                                 # the miniature
    python experiments/compare_algorithms.py --model MODEL --reward runs/rm --gold runs/gold-rm \
        --data jsonl:prompts.jsonl --comparisons jsonl:pairs.jsonl --pretrain jsonl:text.jsonl \
        --max_new_tokens 128
    python experiments/compare_algorithms.py --dry_run                       # prints the commands

All but DPO maximise --reward, and sample --responses responses in all, unless their own flags give
other steps or batches. The report has the gain by the reward and by a judge, against the KL from
the start and against the number of sampled responses.

    best-of-n-SEED               the best of n samples of the start
    raft-N-SEED                  RAFT: rounds of SFT on the best of N samples (Dong et al. 2023,
                                 arXiv 2304.06767)
    raft-random-SEED             its control: SFT on a random one of them
    dpo-SEED                     DPO on comparisons, without sampling
    grpo-SEED, rloo-SEED         of swap_loss.py
    ppo-SEED, ppo-ptx-SEED       without and with pretraining gradients

A seed draws samples and their order. The start and the reward model are the same for all.

Hardware: two CPU cores, once run_rm.py has made runs/sft and runs/rm.
Result: OUT/report.html, and report.md in --results. A finished run is not repeated, and the same
command continues a run that was stopped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import policy_grids as grids

from instructjax import data, usage
from instructjax.data import DataConfig
from instructjax.evaluation import overoptimisation, paper, statistics
from instructjax.evaluation.figures import lines_svg
from instructjax.evaluation.grid import Grid, Job, flags_of, from_here, parse_flags
from instructjax.evaluation.overoptimisation import Curve
from instructjax.evaluation.report import Section, Table
from instructjax.ranges import Count, CountFrom2
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
POINTS = 12  # evaluations of a run
CONTROL = "raft-random"


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The algorithms and their flags."""

    out: Path | None = Path("runs/algorithms")
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What is maximised."""
    comparisons: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Comparisons for DPO. By default the miniature has its own, and other data leave DPO out."""
    pretrain: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Pretraining text for PPO-ptx. By default the miniature has its own, and other data leave
    PPO-ptx out."""
    responses: Count = 30_720
    """Number of responses that a run samples in training."""
    raft: tuple[CountFrom2, ...] = (4, 8, 16)
    """Values of RAFT's N. The control has the middle one."""
    raft_prompts: Count = 32
    """Number of prompts of a round of RAFT. [Dong et al.: 2,048]"""
    raft_flags: str = ""
    """Further flags of RAFT and its control, quoted as one argument."""
    grpo_flags: str = "--beta 0.1"
    """Further flags of GRPO, quoted as one argument."""
    rloo_flags: str = ""
    """Further flags of RLOO, quoted as one argument."""
    dpo_flags: str = ""
    """Further flags of DPO, quoted as one argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.raft or len(set(self.raft)) < len(self.raft):
            raise ValueError("--raft: give at least one N, each once")
        if self.responses < (most := max(self.algorithms.values())):
            raise ValueError(f"--responses {self.responses}: an update or iteration has {most}")

    @property
    def algorithms(self) -> dict[str, int]:
        """Responses that an update or iteration of each algorithm samples, by the run's name."""
        raft = {f"raft-{n}": n * self.raft_prompts for n in self.raft}
        raft[CONTROL] = self.raft[len(self.raft) // 2] * self.raft_prompts
        sampled = raft | {"grpo": 128, "rloo": 128, "ppo": 256, "ppo-ptx": 256, "dpo": 0}
        if self.data.spec != "miniature" and not self.comparisons.spec:
            del sampled["dpo"]
        if self.data.spec != "miniature" and not self.pretrain.spec:
            del sampled["ppo-ptx"]
        return sampled


# ------------------------------------------------------------------------------------- the runs


def grid(c: Config) -> Grid:
    """The runs. They need no other."""
    jobs: dict[str, Job] = {}
    reward = flags_of(c.reward, "reward") | {"reward": c.reward.spec}
    for seed in c.seeds:
        jobs[f"best-of-n-{seed}"] = grids.best_of_n_job(c, (), seed, **reward)
        for name, sampled in c.algorithms.items():
            steps = c.responses // sampled if sampled else 100
            flags = {
                **{"model": c.model, "steps": steps, "eval_every": -(-steps // POINTS)},
                **{"eval_prompts": 256, "seed": seed, **c.prompt_flags},
            }
            if name != "dpo":
                flags |= reward
            jobs[f"{name}-{seed}"] = job_of(c, name, flags)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def job_of(c: Config, name: str, flags: dict[str, Any]) -> Job:
    """The run of an algorithm."""
    if name in ("ppo", "ppo-ptx"):
        text = flags_of(c.pretrain, "pretrain") if c.pretrain.spec else {}
        text = text if name == "ppo-ptx" else {"ptx.coef": 0}
        own = {"batch_size": c.algorithms[name], "final_prompts": 256, **text}
        own |= {"ppo.missing_eos": "none"}  # as the others have no penalty
        return Job("run_ppo.py", flags | own | parse_flags(c.ppo_flags))
    if name == "dpo":
        flags = {flag: x for flag, x in flags.items() if flag.partition(".")[0] != "data"}
        own = flags_of(c.comparisons, "data") if c.comparisons.spec else {}
        return Job("swap_loss.py", flags | own | parse_flags(c.dpo_flags), positional=("dpo",))
    if name.startswith("raft"):
        own = {"batch_size": c.raft_prompts, "samples": c.algorithms[name] // c.raft_prompts}
        own |= {"keep": "random" if name == CONTROL else "best", **parse_flags(c.raft_flags)}
        return Job("swap_loss.py", flags | own, positional=("raft",))
    own = {"batch_size": c.algorithms[name] // 4, "samples": 4}
    more = parse_flags(c.grpo_flags if name == "grpo" else c.rloo_flags)
    return Job("swap_loss.py", flags | own | more, positional=(name,))


# ------------------------------------------------------------------------------------- the page


def curves_of(c: Config, name: str) -> dict[int, Curve]:
    """The curve of each seed that has finished."""
    curves = {}
    for seed in c.seeds:
        of_start = paper.results_of(c.results_directory, f"best-of-n-{seed}")
        results = paper.results_of(c.results_directory, f"{name}-{seed}")
        if of_start is not None and name == "best-of-n":
            curves[seed] = overoptimisation.of_best_of_n(of_start)
        elif of_start is not None and results is not None:
            curves[seed] = overoptimisation.of_training(results, of_start)
    return curves


def sections(c: Config) -> list[Section]:
    """What has finished."""
    every = {name: curves_of(c, name) for name in ("best-of-n", *c.algorithms)}
    every = {name: curves for name, curves in every.items() if curves}
    if not every:
        return []
    of_seeds = {name: list(curves.values()) for name, curves in every.items()}
    columns = ("", "d at the end", "gold at the end", "proxy at the end")
    rows = [[name, *ends(curves)] for name, curves in of_seeds.items()]
    title = "Against the KL"
    text = (
        "The best of n samples trains nothing. DPO has no proxy, and is measured on the held-out"
        " prompts of its comparisons, the others on those of --data."
    )
    page = [
        Section(title, text, (), [Table("", columns, rows)], overoptimisation.draw(title, of_seeds))
    ]
    page.append(against_responses(c, of_seeds))
    middle = f"raft-{c.raft[len(c.raft) // 2]}"
    pairs = [(middle, CONTROL), ("ppo", middle), ("best-of-n", middle)]
    rows = [
        [f"{ours} less {theirs}", paper.plain(statistics.over_runs(gains))]
        for ours, theirs in pairs
        if (gains := differences(every.get(ours, {}), every.get(theirs, {})))
    ]
    if rows:
        text = "Gold at the end, of runs with the same seed."
        page.append(
            Section("RAFT, its control, and PPO", text, (), [Table("", ("", "gain"), rows)])
        )
    return page


def ends(curves: Sequence[Curve]) -> list[str]:
    """d, gold and proxy at the end of curves of several seeds."""
    figures = [(curve.d[-1], curve.gold[-1], curve.proxy[-1]) for curve in curves]
    return [paper.plain(statistics.over_runs(column)) for column in zip(*figures, strict=True)]


def differences(ours: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> list[float]:
    """Gold at the end of ours, less that of theirs, for each seed that both have."""
    return [ours[seed].gold[-1] - theirs[seed].gold[-1] for seed in ours if seed in theirs]


def against_responses(c: Config, curves: Mapping[str, Sequence[Curve]]) -> Section:
    """Figures of gold and proxy against the responses that were sampled in training."""
    figures = []
    for column in ("gold", "proxy"):
        lines = {}
        for name, sampled in c.algorithms.items():
            if sampled and name in curves:
                curve = overoptimisation.mean(curves[name])
                responses = curve.step * responses_of_a_step(c, name)
                lines[name] = np.stack([responses, getattr(curve, column)], axis=1)
        title = f"{column} against responses"
        figures.append(
            lines_svg(title, lines, "responses sampled", f"gain of {column}, deviations")
        )
    return Section("Against the responses sampled", "DPO samples none.", figures=figures)


def responses_of_a_step(c: Config, name: str) -> int:
    """What an update or iteration sampled, as the run's own config.json says."""
    runs = (c.results_directory / f"{name}-{seed}" / "config.json" for seed in c.seeds)
    config = next(json.loads(file.read_text())["config"] for file in runs if file.exists())
    return config["batch_size"] * config.get("samples", 1)


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    if c.check(grid(c), c.reward) is None:
        return
    if c.comparisons.spec:
        data.check(c.comparisons, "comparisons", "--comparisons")
    if c.pretrain.spec:
        data.check(c.pretrain, "text", "--pretrain")


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    title = "Algorithms against one reward"
    paper.make_page(c, grid(c), title, overoptimisation.TEXT, lambda: sections(c))


if __name__ == "__main__":
    cli()
