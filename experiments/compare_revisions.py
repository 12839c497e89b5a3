r"""Compares SL-CAI policies by the number of revisions that they were trained on.

    python experiments/compare_revisions.py                                  # the miniature
    python experiments/compare_revisions.py --model MODEL --data jsonl:prompts.jsonl \
        --gold runs/gold-rm --measure harm.py:harm --max_new_tokens 128
    python experiments/compare_revisions.py --dry_run                        # prints the commands

Constitutional AI (Bai et al. 2022, arXiv 2212.08073, sections 3.1 and 3.4). --model responds, and a
critic revises each response several times. SL-CAI-n is trained on the revisions up to the n-th.

    revisions-SEED           critique_revise.py on training prompts
    sl-cai-N-SEED            run_sft.py from --model, one epoch of the revisions up to N
    evaluation-SEED          all of them and --model, by the judge

Hardware: two CPU cores, once run_sft.py has made runs/sft.
Result: OUT/report.html, and report.md in --results. The same command continues after a stop.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import policy_grids as grids
from ai_feedback import RULES

from instructjax import scoring, usage
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
from instructjax.ranges import Count, Share
from instructjax.run import pretrained
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
WINS = "wins against the start"
NOT_DRAWN = ("utility", "kl", "likert", "truthful", "hallucinated")  # of the miniature, in a table


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The revisions."""

    OWN = MappingProxyType(
        {
            "revise_flags": ("critic", "oversight", "prompts", "revisions"),
            "sft_flags": ("data.only",),
            "evaluate_flags": ("measure",),
        }
    )

    out: Path | None = Path("runs/revisions")
    critic: str | None = None
    """Model that criticises and revises. By default `rules` on the miniature, and --model on other
    data."""
    oversight: Share | None = None
    """Probability that a critique of `--critic rules` says the opposite of what it should. By
    default 0.2. [Ours]"""
    revisions: Count = 4
    """Number of revisions of each response; there is one policy for each. [Bai et al., section
    3.2]"""
    prompts: Count = 4000
    """Number of prompts that --model responds to."""
    measure: tuple[str, ...] = ()
    """Further figures of each response, such as its harm, as for evaluate.py."""
    revise_flags: str = ""
    """Further flags of critique_revise.py, quoted as one argument."""
    sft_flags: str = ""
    """Further flags of each run_sft.py, quoted as one argument."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == RULES and not self.in_miniature:
            raise ValueError("--critic rules: it judges no prompts but the miniature's")
        if self.oversight is not None and self.critic_or_default != RULES:
            raise ValueError("--oversight is of `--critic rules` alone")

    @property
    def critic_or_default(self) -> str | None:
        return self.critic or (RULES if self.in_miniature else None)

    @property
    def critic_flags(self) -> dict[str, Any]:
        """--critic of critique_revise.py, and --oversight where it applies."""
        critic = self.critic_or_default
        flags: dict[str, Any] = {} if critic is None else {"critic": critic}
        by_default = 0.2 if self.oversight is None else self.oversight
        return flags | ({"oversight": by_default} if critic == RULES else {})


# ------------------------------------------------------------------------------------- the runs


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    for seed in c.seeds:
        revisions = f"revisions-{seed}"
        flags = {
            **{"model": c.model, "batch_size": 256, "seed": seed, **c.prompt_flags},
            **parse_flags(c.revise_flags),
            **{"revisions": c.revisions, "prompts": c.prompts, **c.critic_flags},
        }
        jobs[revisions] = Job("critique_revise.py", flags)
        for number in range(1, c.revisions + 1):
            flags = {
                **{"model": c.model, "seed": seed, "epochs": 1, **c.comparison_flags},
                **{"data": f"jsonl:{c.directory / revisions / 'revisions.jsonl'}"},
                **parse_flags(c.sft_flags),
                **{"data.only": "revision=" + "|".join(map(str, range(1, number + 1)))},
            }
            jobs[name_of(number, seed)] = Job("run_sft.py", flags, needs=(revisions,))
        policies = tuple(name_of(number, seed) for number in range(1, c.revisions + 1))
        job = grids.evaluation_job(c, policies, seed)
        more = {"measure": c.measure} if c.measure else {}
        jobs[f"evaluation-{seed}"] = dataclasses.replace(job, flags={**job.flags, **more})
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def name_of(number: int, seed: int) -> str:
    return f"sl-cai-{number}-{seed}"


# ------------------------------------------------------------------------------------- the page


def figures_of(c: Config, seed: int) -> list[dict[str, float]]:
    """The figures of --model (number 0) and of SL-CAI-n, if a seed's evaluation has finished."""
    found = grids.policies_of(c.results_directory, f"evaluation-{seed}")
    if not found:
        return []
    names = (grids.START, *(name_of(number, seed) for number in range(1, c.revisions + 1)))
    return [
        {
            **{"utility": row["utility"], "kl": row["kl"], **row["measures"]},
            WINS: row["wins"].get(grids.START, 0.5),
        }
        for row in map(found.__getitem__, names)
    ]


def table_of(of_seeds: Sequence[Sequence[dict[str, float]]]) -> list[list[str]]:
    """A row for each figure, a column for each number of revisions."""
    rows = []
    for key in of_seeds[0][0]:
        estimates = [
            statistics.over_runs([figures[number][key] for figures in of_seeds])
            for number in range(len(of_seeds[0]))
        ]
        rows.append([key, *map(paper.plain, estimates)])
    return rows


def of_critic(c: Config) -> Section | None:
    """What the critic made of the responses, by number of revisions."""
    by_seed: dict[int, list[dict[str, float]]] = {}
    for seed in c.seeds:
        results: Any = paper.results_of(c.results_directory, f"revisions-{seed}")
        if results:
            means = [{k: v[0] for k, v in row.items() if isinstance(v, list)} for row in results]
            by_seed[seed] = means
    if not by_seed or not all(rows[0] for rows in by_seed.values()):
        return None
    count = min(map(len, by_seed.values()))
    verdicts = []
    for seed, rows in by_seed.items():
        for key in ("toxic", "followed") if count > 2 and "toxic" in rows[0] else ():
            verdicts.append((rows[count - 1][key] < rows[1][key], f"{key}, seed {seed}"))
    return paper.section(
        "Revisions",
        "The judge's means of the responses (0) and of the revisions of each number. Bai et al."
        " find that each revision is less harmful and less helpful than the one before (section"
        " 3.4). In the miniature, from the first revision to the last, the share that is toxic"
        " falls, and the share of the request that is followed falls. A rule-based critic mends"
        " most flaws by a new response without any.",
        verdicts,
        Table("", ("", *map(str, range(count))), table_of([x[:count] for x in by_seed.values()])),
    )


def of_policies(c: Config) -> Section | None:
    """What SL-CAI-n is worth, by n."""
    of_seeds = [found for seed in c.seeds if (found := figures_of(c, seed))]
    if not of_seeds:
        return None
    numbers = [f"{number}" for number in range(c.revisions + 1)]
    drawn = paper.lines()
    for key in (x for x in of_seeds[0][0] if x not in NOT_DRAWN):
        for number, place in enumerate(numbers):
            values = [figures[number][key] for figures in of_seeds]
            drawn[key][place].append(statistics.over_runs(values))
    return paper.section(
        "SL-CAI by number of revisions",
        "Means over seeds of --model (0) and of the policies that learned the revisions up to each"
        " number.",
        (),
        Table("", ("", *numbers), table_of(of_seeds)),
        [paper.draw("by number of revisions", drawn, numbers)],
    )


def sections(c: Config) -> list[Section]:
    """What has finished."""
    return [section for section in (of_critic(c), of_policies(c)) if section is not None]


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    mesh = c.check(grid(c))
    if mesh is None:
        return
    if c.critic not in (None, RULES):
        pretrained.check(c.critic, mesh, flag="--critic", scalar_head=False)
    for spec in c.measure:
        scoring.check(RewardConfig((spec,)), mesh, "--measure")


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    text = "Means over responses to held-out prompts, by the judge. Intervals are over seeds."
    paper.make_page(c, grid(c), "Revisions compared", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
