r"""AI feedback against people's: the same pairs by several labelers, then reward models and PPO.

    python experiments/compare_labelers.py                                   # the miniature
    python experiments/compare_labelers.py --model runs/sft --data jsonl:prompts.jsonl \
        --people my_file.py:my_function --labelers MODEL --gold runs/gold-rm --max_new_tokens 128
    python experiments/compare_labelers.py --dry_run                         # prints the commands

RLAIF (Lee et al. 2023, arXiv 2309.00267): a model labels in place of people. Each labeler labels
the same pairs of the policy's responses; pairs that it finds even are left out.

    pairs                    the policy's responses, and what people say of them
    critic                   in the miniature, a base model that has learned from pages of critics
    labels-LABELER           what a model says, or a rule-based critic with errors
    rm-, ppo-LABELER-SEED    a reward model for each labeler and for `people`, and PPO against it
    evaluation-SEED          all of these and --model, by the judge

`mixed` has people's labels of one half of the pairs, and of the other a rule-based critic's, under
a principle that is drawn for each pair, as RL-CAI has (Bai et al. 2022, arXiv 2212.08073).

Hardware: two CPU cores, once run_sft.py has made runs/sft. Result: OUT/report.html.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import constitution
import policy_grids as grids
from line_files import read_lines, write_lines

from instructjax import miniature, usage
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.grid import Grid, Job, from_here, parse_flags
from instructjax.evaluation.report import Section, Table
from instructjax.miniature import critics
from instructjax.ranges import Count, Finite, NotNegative
from instructjax.run import pretrained
from instructjax.scoring import RewardConfig

EXPERIMENTS = Path(__file__).resolve().parent
PEOPLE, CRITIC, MIXED, LABELS = "people", "critic", "mixed", "comparisons.jsonl"
PAGES = 30_000  # of the miniature's corpus, and as many of critics
ABLE = ("followed", "padding", "rude")  # what the base model that reads critics can judge
COLUMNS = ("utility", "kl", "against the start", "against people")


@dataclass(frozen=True, kw_only=True)
class Config(grids.PolicyConfig):
    """The labelers."""

    OWN = MappingProxyType({"ai_flags": ("model", "data", "pairs"), "rm_flags": ("data",)})

    out: Path | None = Path("runs/labelers")
    people: tuple[str, ...] = ()
    """Whose labels AI feedback is compared with: functions and reward models, as for --reward of
    run_ppo.py. By default the miniature's training labelers, one for each prompt."""
    labelers: tuple[str, ...] = ()
    """Language models that label, best chat models. By default none besides the miniature's."""
    noise: tuple[NotNegative, ...] = (0.0, 3.0)
    """Standard deviations of the errors of rule-based critics, in units of the judge's utility. The
    miniature has such critics, one for each noise and each --place_bias."""
    place_bias: tuple[Finite, ...] = (0.0, 2.0)
    """How much better the response that is shown first seems to them, likewise."""
    prompts: Count = 8000
    """Number of prompts that the policy answers twice. Those whose two responses people find equal
    give no pair."""
    ai_flags: str = ""
    """More flags of each ai_feedback.py of --labelers, likewise."""
    rm_flags: str = ""
    """More flags of each run_rm.py, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, named in (("--people", self.people), ("--labelers", self.labelers)):
            if not named and not self.in_miniature:
                raise ValueError(f"{flag}: only the miniature has some of its own; name one")
        names = [Path(model).name for model in self.labelers]
        taken = [PEOPLE, *self.critics]
        if len({*taken, *names}) < len(taken) + len(names):
            raise ValueError(f"--labelers: two of one name, or a name in use: {', '.join(names)}")

    @property
    def people_specs(self) -> tuple[str, ...]:
        return self.people or (f"{from_here(EXPERIMENTS)}/reproduce.py:training_labelers",)

    @property
    def critics(self) -> dict[str, dict[str, Any]]:
        """The flags of each ai_feedback.py by a critic of the miniature, by name."""
        if not self.in_miniature:
            return {}
        overall = {"only_principles": critics.OVERALL}
        asked: dict[str, dict[str, Any]] = {}
        for noise, bias in itertools.product(self.noise, self.place_bias):
            rules = {"model": "rules", "noise": noise, "place_bias": bias}
            asked.setdefault(MIXED, rules)
            asked[f"rules-{noise:g}-{bias:g}"] = rules | overall
        made = {"model": self.directory / CRITIC, "principles": constitution.MINIATURE}
        return asked | {CRITIC: made | {"only_principles": ABLE}}

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """The flags of each ai_feedback.py, by the name of its labeler."""
        words = parse_flags(self.ai_flags)
        return self.critics | {Path(x).name: {"model": x, **words} for x in self.labelers}


# ------------------------------------------------------------------------------------- the runs


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    jobs["pairs"] = grids.pairs_job(c, c.prompts, c.people_specs)
    if c.in_miniature:
        text = c.directory / "critic.jsonl"
        flags = {"model": "miniature", "preset": "miniature", "data": f"jsonl:{text}"}
        jobs[CRITIC] = Job("run_pretrain.py", flags, prepare=functools.partial(write_text, text))
    for name, flags in c.asked.items():
        needs = ("pairs", CRITIC) if name == CRITIC else ("pairs",)
        own = {"data": f"jsonl:{c.directory / 'pairs' / 'comparisons.jsonl'}", "pairs": c.prompts}
        jobs[f"labels-{name}"] = Job("ai_feedback.py", flags | own, needs=needs, resumes=False)
    for name, seed in itertools.product([PEOPLE, *c.asked], c.seeds):
        add_policy(c, jobs, name, seed)
    for seed in c.seeds:
        policies = tuple(f"ppo-{name}-{seed}" for name in [PEOPLE, *c.asked])
        jobs[f"evaluation-{seed}"] = grids.evaluation_job(c, policies, seed)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_policy(c: Config, jobs: dict[str, Job], name: str, seed: int) -> None:
    """A reward model on a labeler's comparisons, and PPO against it."""
    labels = {PEOPLE: ("pairs",), MIXED: ("pairs", f"labels-{MIXED}")}
    labels = labels.get(name, (f"labels-{name}",))
    file, prepare = c.directory / labels[0] / "comparisons.jsonl", None
    if name == MIXED:
        file = c.directory / "mixed.jsonl"
        prepare = functools.partial(write_mixed, file, *(c.directory / x for x in labels))
    flags = {"model": c.model, "data": f"jsonl:{file}", "seed": seed, **c.comparison_flags}
    rm = f"rm-{name}-{seed}"
    flags |= parse_flags(c.rm_flags)
    jobs[rm] = Job("run_rm.py", flags, needs=labels, prepare=prepare)
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
    others = {COLUMNS[2]: paper.run_name(c.model), COLUMNS[3]: f"ppo-{PEOPLE}-{seed}"}
    figures = {}
    for name in [PEOPLE, *c.asked] if found else ():
        row = found[f"ppo-{name}-{seed}"]
        wins = {column: row["wins"][x] for column, x in others.items() if x in row["wins"]}
        figures[name] = {"utility": row["utility"], "kl": row["kl"], **wins}
    return figures


def labelers(c: Config) -> Section | None:
    """What each labeler says of the pairs that people order."""
    rows = []
    for name in c.asked:
        if results := paper.results_of(c.results_directory, f"labels-{name}"):
            judge = results.get("agreement_with_judge", {}).get(critics.OVERALL)
            shares = [f"{results[x]:.0%}" for x in ("share_a", "decided_by_place")]
            agreements = map(paper.percent, (results.get("agreement"), judge))
            rows.append([name, f"{results['pairs']:,}", *agreements, *shares])
    columns = (
        "",
        "pairs",
        "agreement with people",
        "with the judge",
        "says A",
        "decided by the place",
    )
    text = "Of the pairs that people order. Intervals are over prompts."
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
