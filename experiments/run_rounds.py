r"""Rounds of RLHF: label the newest policy's responses, retrain the reward model, run PPO again.

    python experiments/run_rounds.py                                         # the miniature
    python experiments/run_rounds.py --rounds 4 --memory all newest --start sft last --seeds 0 1 2
    python experiments/run_rounds.py --model runs/sft --data jsonl:prompts.jsonl --labels page \
        --gold runs/gold-rm --max_new_tokens 128                             # people label
    python experiments/run_rounds.py --dry_run                               # prints the commands

The paper reports one round, and notes that reward model and policy can be trained again on newer
comparisons (InstructGPT, section 3.1). Llama 2 had five rounds (Touvron et al. 2023, arXiv
2307.09288).

A round takes the policy of the previous round. The first round takes --model:

    samples-ROUND-...       its responses to prompts, with the ratings of --labels
    rm-ROUND-...            a reward model on the comparisons of all rounds, or of the newest alone
    ppo-ROUND-...           PPO against it, from --model or from the policy of the round before
    evaluation-SEED         all policies by the judge, against --model

The names end in -MEMORY-START-SEED, where these differ.

With --labels page people label. The script then stops before each reward model, and prints what to
label and where the labels go. The same command continues.

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import policy_grids as grids
from line_files import replace

from instructjax import usage
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.grid import Grid, Job, NotReadyError, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
from instructjax.ranges import Count, Seed
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
PAGE = "page"
COLUMNS = ("utility", "kl", "wins")


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The rounds."""

    out: Path | None = Path("runs/rounds")
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of samples, heads of reward models and PPO."""
    rounds: Count = 2
    """Number of rounds."""
    labels: tuple[str, ...] = ()
    """Who rates the responses: `page` for people, or functions and reward models, as for --reward
    of run_ppo.py. By default the miniature's training labelers, one for each prompt."""
    memory: tuple[Literal["all", "newest"], ...] = ("all",)
    """Which comparisons a reward model learns from: those of `all` rounds or those of the `newest`.
    With both values, the grid has runs of each."""
    start: tuple[Literal["sft", "last"], ...] = ("sft",)
    """What PPO starts from in later rounds: --model (`sft`) or the policy of the `last` round. This
    model is the reference too. With both values, the grid has runs of each."""
    prompts: Count = 2000
    """Number of prompts of a round. All rounds have the same prompts."""
    samples: Count = 4
    """Responses to a prompt, from 2 to 9."""
    rm_flags: str = ""
    """Further flags of each run_rm.py, quoted as one argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.samples <= 9:
            raise ValueError(f"--samples {self.samples}: must be from 2 to 9")
        if PAGE in self.labels and len(self.labels) > 1:
            raise ValueError("--labels: give either page, or functions and reward models")
        if not self.labels and self.data.spec != "miniature":
            raise ValueError("--labels: only the miniature has labelers of its own; give some")

    @property
    def labelers(self) -> tuple[str, ...]:
        """--labels or its default, for --gold of evaluate.py."""
        by_default = f"{from_here(EXPERIMENTS)}/reproduce.py:training_labelers"
        return self.labels or (by_default,)


# ------------------------------------------------------------------------------------- the runs


def name_of(kind: str, number: int, way: tuple[str, str], seed: int) -> str:
    """The name of a run; all ways share a first policy, and so the samples of two rounds."""
    ways = way
    if number <= (2 if kind == "samples" else 1):
        ways = ()
    elif kind == "rm" and number == 2:  # before it, PPO has begun at one model
        ways = way[:1]
    return "-".join([kind, f"{number}", *ways, f"{seed}"])


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    ways = [(memory, start) for memory in c.memory for start in c.start]
    for seed in c.seeds:
        for way in ways:
            for number in range(1, c.rounds + 1):
                add_round(c, jobs, number, way, seed)
        trained = tuple(x for x in jobs if x.startswith("ppo-") and x.endswith(f"-{seed}"))
        jobs[f"evaluation-{seed}"] = grids.evaluation_job(c, trained, seed)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_round(
    c: Config, jobs: dict[str, Job], number: int, way: tuple[str, str], seed: int
) -> None:
    """The three runs of a round, if they are not there."""
    memory, start = way
    samples, rm, ppo = (name_of(kind, number, way, seed) for kind in ("samples", "rm", "ppo"))
    before = name_of("ppo", number - 1, way, seed) if number > 1 else None
    policy = c.directory / before if before else c.model
    flags = {
        **{"models": policy, "batch_size": 512, "seed": 1000 * number + seed},
        **{**c.prompt_flags, **parse_flags(c.evaluate_flags)},
        **{"split": "train", "prompts": c.prompts, "samples": c.samples},
    }
    if c.labels != (PAGE,):
        flags |= {"comparisons": [], "gold": c.labelers}
    needs = (before,) if before else ()
    jobs.setdefault(samples, Job("evaluate.py", flags, needs=needs, resumes=False))

    rounds = range(1 if memory == "all" else number, number + 1)
    of_rounds = [name_of("samples", i, way, seed) for i in rounds]
    file = c.directory / f"{rm}.jsonl"
    flags = {"model": c.model, "data": f"jsonl:{file}", "seed": seed, **c.comparison_flags}
    write = functools.partial(write_labels, c, file, of_rounds)
    flags |= parse_flags(c.rm_flags)
    jobs.setdefault(rm, Job("run_rm.py", flags, needs=tuple(of_rounds), prepare=write))

    model = policy if start == "last" else c.model
    flags = {"model": model, "reward": c.directory / rm, "seed": seed, **c.prompt_flags}
    if c.data.spec != "miniature":  # which has text of its own
        flags["ptx.coef"] = 0
    needs = (rm, before) if before and start == "last" else (rm,)
    jobs.setdefault(ppo, Job("run_ppo.py", flags | parse_flags(c.ppo_flags), needs=needs))


def write_labels(c: Config, file: Path, of_rounds: Sequence[str]) -> None:
    """Writes the comparisons of some rounds to one file.

    Raises:
      NotReadyError: people have not labeled a round; the message says what to do.
    """
    lines: list[str] = []
    for samples in of_rounds:
        labels = c.directory / samples / "comparisons.jsonl"
        if c.labels == (PAGE,):
            folder = c.directory / f"{samples}-labels"
            labels = folder / "comparisons.jsonl"
            if not labels.exists():
                command = f"python -m instructjax.label --out {folder}.db"
                raise NotReadyError(
                    f"{samples}: people are to label its responses:\n"
                    f"  {command} --data jsonl:{c.directory / samples}/responses.jsonl\n"
                    f"  {command} --export {folder}\n"
                    "Then the same command goes on."
                )
        lines += [line for line in labels.read_text("utf-8").split("\n") if line]
    replace(file, "".join(f"{line}\n" for line in lines))


# ------------------------------------------------------------------------------------- the page


def figures_of(c: Config, way: tuple[str, str], number: int) -> dict[int, dict[str, float]]:
    """Utility, KL and win rate against --model of a policy, by seed."""
    figures = {}
    for seed in c.seeds:
        if found := grids.policies_of(c.results_directory, f"evaluation-{seed}"):
            row = found[name_of("ppo", number, way, seed)]
            figures[seed] = {
                "utility": row["utility"],
                "kl": row["kl"],
                "wins": row["wins"][grids.START],
            }
    return figures


def sections(c: Config) -> list[Section]:
    """What has finished."""
    rows, drawn, last = [], paper.lines(), {}
    for way in ((memory, start) for memory in c.memory for start in c.start):
        for number in range(1, c.rounds + 1):
            if figures := figures_of(c, way, number):
                columns = {key: [row[key] for row in figures.values()] for key in COLUMNS}
                means = {key: statistics.over_runs(values) for key, values in columns.items()}
                cells = [
                    paper.percent(means["wins"]),
                    *(paper.plain(means[k]) for k in COLUMNS[:2]),
                ]
                rows.append([" ".join(way), f"{number}", *cells])
                drawn[" ".join(way)][f"round {number}"].append(means["utility"])
                last[way] = figures
    if not rows:
        return []
    text = "`all` and `newest` are the comparisons, `sft` and `last` where PPO begins."
    table = Table("", ("", "round", "wins against the start", "utility", "KL, nats"), rows)
    figure = paper.draw("utility by round", drawn)
    page = [Section("Policies by round", text, tables=[table], figures=[figure])]
    (first, of_first), *others = last.items()
    if others:
        rows = []
        for way, figures in others:
            gains = [of_first[seed]["utility"] - figures[seed]["utility"] for seed in figures]
            rows.append([" ".join(way), paper.plain(statistics.over_runs(gains))])
        title = f"{' '.join(first)} after the last round"
        table = Table("", ("", "difference"), rows)
        page.append(Section(title, "Utility less another way's, seed by seed.", tables=[table]))
    return page


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    c.check(grid(c), None if c.labels == (PAGE,) else RewardConfig(c.labelers), "--labels")


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    text = "Means over responses to held-out prompts, by the judge. Intervals are over seeds."
    paper.make_page(c, grid(c), "Rounds", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
