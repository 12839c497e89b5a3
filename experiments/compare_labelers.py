r"""Compares AI feedback with people's: several labelers of the same pairs, reward models and PPO.

    python experiments/compare_labelers.py                                   # the miniature
    python experiments/compare_labelers.py --model runs/sft --data jsonl:prompts.jsonl \
        --people my_file.py:my_function --labelers MODEL --gold runs/gold-rm --max_new_tokens 128
    python experiments/compare_labelers.py --dry_run                         # prints the commands

RLAIF (Lee et al. 2023, arXiv 2309.00267): a model labels in place of people. Each labeler labels
the same pairs of the policy's responses; pairs that it labels as ties are left out.

    pairs                    the policy's responses, and people's labels
    critic                   in the miniature, a base model trained on pages of critics
    labels-LABELER           the labels of a model
    labels-LABELER-SEED      the labels of a rule-based critic, with errors drawn from that seed
    rm-, ppo-LABELER-SEED    a reward model for each labeler and for `people`, and PPO against it
    evaluation-SEED          all of these and --model, by the judge

`mixed` has people's labels for one half of the pairs. For the other half it has those of a
rule-based critic, under a principle that is drawn for each pair, as in RL-CAI (Bai et al. 2022,
arXiv 2212.08073).

Hardware: two CPU cores, once run_sft.py has made runs/sft. Result: OUT/report.html.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import policy_grids as grids
from ai_feedback import RULES
from labelers_config import CRITIC, MIXED, PEOPLE, Config
from line_files import read_lines, write_lines

from instructjax import miniature, usage
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
from instructjax.miniature import critics
from instructjax.run import pretrained
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
LABELS = "comparisons.jsonl"
PAGES = 30_000  # of the miniature's corpus, and as many of critics
COLUMNS = ("utility", "kl", "against the start", "against people")


# ------------------------------------------------------------------------------------- the runs


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    jobs["pairs"] = grids.pairs_job(c, c.prompts, c.people_specs)
    if c.in_miniature:
        text = c.directory / "critic.jsonl"
        flags = {"model": "miniature", "preset": "miniature", "data": f"jsonl:{text}"}
        jobs[CRITIC] = Job("run_pretrain.py", flags, prepare=functools.partial(write_text, text))
    own = {"data": f"jsonl:{c.directory / 'pairs' / 'comparisons.jsonl'}", "pairs": c.prompts}
    for name, seed in itertools.product(c.asked, c.seeds):
        needs = ("pairs", CRITIC) if name == CRITIC else ("pairs",)
        flags = c.asked[name] | own
        if c.asked[name]["model"] == RULES:  # other errors would else be one draw for all seeds
            flags["seed"] = seed
        jobs[c.labels_of(name, seed)] = Job("ai_feedback.py", flags, needs=needs, resumes=False)
    for name, seed in itertools.product([PEOPLE, *c.asked], c.seeds):
        add_policy(c, jobs, name, seed)
    for seed in c.seeds:
        policies = tuple(f"ppo-{name}-{seed}" for name in [PEOPLE, *c.asked])
        jobs[f"evaluation-{seed}"] = grids.evaluation_job(c, policies, seed)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_policy(c: Config, jobs: dict[str, Job], name: str, seed: int) -> None:
    """A reward model on a labeler's comparisons, and PPO against it."""
    labels = ["pairs"] if name in (PEOPLE, MIXED) else []
    if name != PEOPLE:
        labels.append(c.labels_of(name, seed))
    file, prepare = c.directory / labels[0] / "comparisons.jsonl", None
    if name == MIXED:
        file = c.directory / f"mixed-{seed}.jsonl"
        prepare = functools.partial(write_mixed, file, *(c.directory / x for x in labels))
    flags = {"model": c.model, "data": f"jsonl:{file}", "seed": seed, **c.comparison_flags}
    rm = f"rm-{name}-{seed}"
    flags |= parse_flags(c.rm_flags)
    jobs[rm] = Job("run_rm.py", flags, needs=tuple(labels), prepare=prepare)
    flags = {"model": c.model, "reward": c.directory / rm, "seed": seed, **c.prompt_flags}
    if not c.in_miniature:  # which has text of its own
        flags["ptx.coef"] = 0
    jobs[f"ppo-{name}-{seed}"] = Job("run_ppo.py", flags | parse_flags(c.ppo_flags), needs=(rm,))


def write_text(file: Path) -> None:
    """Writes the miniature's corpus and as many pages of critics, in random order."""
    pages = miniature.texts(0, PAGES) + critics.pages(0, PAGES)
    random.Random(0).shuffle(pages)
    write_lines(file, [{"text": page["text"]} for page in pages])


def write_mixed(file: Path, people: Path, critic: Path) -> None:
    """Writes every second comparison of people's, and the critic's of the other prompts."""
    of_people = read_lines(people / LABELS)[::2]
    taken = [row["prompt"] for row in of_people]
    others = [row for row in read_lines(critic / LABELS) if row["prompt"] not in taken]
    write_lines(file, [*of_people, *others])


# ------------------------------------------------------------------------------------- the page


def figures_of(c: Config, seed: int) -> dict[str, dict[str, float]]:
    """The COLUMNS of a seed's policies, by labeler, once its evaluation has finished."""
    found = grids.policies_of(c.results_directory, f"evaluation-{seed}")
    others = {COLUMNS[2]: grids.START, COLUMNS[3]: f"ppo-{PEOPLE}-{seed}"}
    figures = {}
    for name in [PEOPLE, *c.asked] if found else ():
        row = found[f"ppo-{name}-{seed}"]
        wins = {column: row["wins"][x] for column, x in others.items() if x in row["wins"]}
        figures[name] = {"utility": row["utility"], "kl": row["kl"], **wins}
    return figures


def mean_of(estimates: Sequence[Sequence[float] | None]) -> statistics.Estimate | None:
    """The mean of a figure over some runs, with that of its intervals; None where it is missing."""
    given = [x for x in estimates if x is not None]
    return statistics.Estimate(*np.mean(given, 0).tolist()) if given else None


def labelers(c: Config) -> Section | None:
    """What each labeler says of the pairs that people order."""
    rows = []
    for name in c.asked:
        runs = dict.fromkeys(c.labels_of(name, seed) for seed in c.seeds)
        found = [x for run in runs if (x := paper.results_of(c.results_directory, run))]
        if found:
            judge = [x.get("agreement_with_judge", {}).get(critics.OVERALL) for x in found]
            means = [mean_of([x.get("agreement") for x in found]), mean_of(judge)]
            shares = [
                f"{np.mean([x[column] for x in found]):.0%}"
                for column in ("share_a", "decided_by_place")
            ]
            pairs = f"{round(np.mean([x['pairs'] for x in found])):,}"
            rows.append([name, pairs, *map(paper.percent, means), *shares])
    columns = (
        "",
        "pairs",
        "agreement with people",
        "with the judge",
        "says A",
        "decided by the place",
    )
    text = (
        "Of the pairs that people order. Intervals are over prompts, and means over the seeds of a"
        " rule-based critic."
    )
    return paper.section("Labelers", text, (), Table("", columns, rows))


def policies(c: Config) -> Section | None:
    """The policies of each labeler's reward models, against the start and against people's."""
    of_seeds = [found for seed in c.seeds if (found := figures_of(c, seed))]
    rows, verdicts, drawn = [], [], paper.lines()
    for name in [PEOPLE, *c.asked] if of_seeds else ():
        means = {
            column: statistics.over_runs([found[name][column] for found in of_seeds])
            for column in of_seeds[0][name]
        }
        cells = [paper.plain(means[column]) for column in COLUMNS[:2]]
        rows.append([name, *cells, *(paper.percent(means.get(x)) for x in COLUMNS[2:])])
        drawn["wins"][name].append(means[COLUMNS[2]])
        if COLUMNS[3] in means:
            value, _, high = means[COLUMNS[3]]
            verdicts.append((high >= 0.5, f"{name} ({value:.0%})"))
    return paper.section(
        "RLAIF against RLHF",
        "Lee et al. find both equal head to head. The claim holds for a labeler if the interval of"
        " its policies' wins against those of people's labels holds a half, or is above it.",
        verdicts,
        Table("", ("", *COLUMNS), rows),
        [paper.draw(COLUMNS[2], drawn)] if rows else (),
    )


def sections(c: Config) -> list[Section]:
    return [section for section in (labelers(c), policies(c)) if section is not None]


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    mesh = c.check(grid(c), RewardConfig(c.people_specs), "--people")
    if mesh is not None:
        for model in c.labelers:
            pretrained.check(model, mesh, flag="--labelers", scalar_head=False)


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    text = "Means over responses to held-out prompts, by the judge. Intervals are over seeds."
    paper.make_page(c, grid(c), "Labelers compared", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
