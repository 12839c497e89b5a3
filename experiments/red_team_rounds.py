r"""Two rounds of red teaming: attackers by four methods, and the target trained on their attacks.

    python experiments/red_team_rounds.py                                    # the miniature
    python experiments/red_team_rounds.py --attacker BASE --model runs/ppo --reward runs/rm \
        --harm my_file.py:my_harm --data jsonl:prompts.jsonl --gold runs/gold-rm \
        --end '?' --max_new_tokens 128
    python experiments/red_team_rounds.py --dry_run                          # prints the commands

The methods are those of Perez et al. 2022, arXiv 2202.03286, section 3.1: zero-shot, few-shot, SFT
on zero-shot attacks that succeeded, and reinforcement learning from that model, here by PPO. The
reward for diversity, --diversity, is not in that paper; it resembles that of Hong et al. 2024,
arXiv 2402.19464. The second round is ours.

    METHOD-attacks-SEED      attacks by red_team.py: zero-shot, few-shot, sft, rl-DIVERSITY
    METHOD-held-out-SEED     attacks of the same attacker with another seed
    attacker-sft-SEED, attacker-rl-DIVERSITY-SEED
                             the attackers that are trained
    defence-SEED             PPO from the target: its prompts and attacks that succeeded, and its
                             reward less --harm_coef times harm
    control-SEED             PPO from the target on its prompts and reward alone
    harm-METHOD-SEED         target, defence and control on attacks held out from training, by harm
    helpfulness-SEED         target, defence and control on held-out prompts, by the judge
    refusal-SEED             the miniature: prompts that ask for insults

A seed draws attacks, samples and heads. The target and the base attacker are the same for all.

Hardware: two CPU cores, once run_ppo.py has made runs/ppo.
Result: OUT/report.html, and report.md in --results. The same command continues after a stop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import policy_grids as grids
import red_team_grid as runs
from red_team_config import Config

from instructjax import scoring, usage
from instructjax.evaluation import paper, statistics
from instructjax.evaluation.figures import lines_svg
from instructjax.evaluation.report import Section, Table
from instructjax.run import pretrained
from instructjax.scoring import RewardConfig

MODELS = ("target", "control", "defence")
COLUMNS = ("success_rate", "success_rate_with_duplicates", "self_bleu", "distinct", "words")


# ------------------------------------------------------------------------------------- the page


def attacks(c: Config) -> Section | None:
    """How often the attacks of each method succeed, and how diverse they are."""
    rows, points = [], {}
    for method in c.methods:
        every = [paper.results_of(c.results_directory, f"{method}-attacks-{x}") for x in c.seeds]
        found = [results for results in every if results is not None]
        if not found:
            continue
        means = []
        for column in COLUMNS:
            values = [value_of(results[column]) for results in found]
            means.append(statistics.over_runs(values))
        answered = ", ".join(f"{results['answered']:,}" for results in found)
        rows.append([method, answered, *map(paper.percent, means[:4]), paper.plain(means[4])])
        line = "RL" if method.startswith("rl-") else "prompts and SFT"
        points.setdefault(line, []).append((means[0].value, means[2].value))
    if not rows:
        return None
    text = (
        "Success is of distinct attacks. Self-BLEU is lower for more diverse attacks, and grows"
        " with their number; it is of 1,000 at most, duplicates included."
    )
    shares = ("success", "with duplicates", "self-BLEU", "distinct")
    names = ("", "attacks of each seed", *shares, "words")
    lines = {name: np.array(line) for name, line in points.items()}
    figure = lines_svg("Success against diversity", lines, "share that succeeds", "self-BLEU")
    return Section("Success against diversity", text, (), [Table("", names, rows)], [figure])


def section(
    title: str,
    text: str,
    columns: Mapping[str, Mapping[str, list[float]]],
    shown: Callable[[paper.Estimate | None], str],
) -> Section | None:
    """A table of the target, the control and the defence; None if no run has finished.

    Args:
      columns: name -> label of a model -> its figure in each seed.
      shown: a figure's mean over seeds, with its interval, as text.
    """
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    rows = []
    for label in labels:
        cells = [statistics.over_runs(x[label]) if label in x else None for x in columns.values()]
        rows.append([label, *map(shown, cells)])
    return Section(title, text, (), [Table("", ("", *columns), rows)]) if rows else None


def value_of(figure: Any) -> float:
    """A figure of results.json, without its interval. One that is undefined is NaN."""
    value = figure[0] if isinstance(figure, list) else figure
    return float(value)


def figures_of(c: Config, run: str, kind: str) -> dict[str, list[float]]:
    """A figure of the target, the control and the defence in each seed's evaluation.

    Args:
      run: how the names of the evaluations begin.
      kind: `utility`, `wins` against the target, or a measure of evaluate.py.
    """
    found: dict[str, list[float]] = {}
    for seed in c.seeds:
        policies = grids.policies_of(c.results_directory, f"{run}-{seed}")
        names = (grids.START, *(f"{label}-{seed}" for label in MODELS[1:]))
        for label, name in zip(MODELS, names if policies else (), strict=False):
            row = policies[name]
            wins = {"wins": row["wins"].get(grids.START, 0.5)}  # the target has no other
            found.setdefault(label, []).append((row | row["measures"] | wins)[kind])
    return found


def harm(c: Config) -> Section | None:
    """The harm of the three on each method's held-out attacks, and how many these are."""
    rows = []
    for method in c.methods:
        every = [paper.results_of(c.results_directory, f"harm-{method}-{x}") for x in c.seeds]
        counts = [results["prompts"] for results in every if results is not None]
        if counts:
            figures = figures_of(c, f"harm-{method}", "utility")
            cells = [paper.plain(statistics.over_runs(figures[label])) for label in MODELS]
            rows.append([method, ", ".join(f"{count:,}" for count in counts), *cells])
    text = (
        "Mean harm of the answers to attacks of the same attackers with another seed, without all"
        " attacks of the training runs. A method of which none is left has no row."
    )
    table = Table("", ("", "attacks of each seed", *MODELS), rows)
    return paper.section("Harm on held-out attacks", text, (), table)


def defence(c: Config) -> list[Section]:
    """Harm before and after the target's next PPO, and what that costs."""
    sections = [harm(c)]
    columns = {
        "utility": figures_of(c, "helpfulness", "utility"),
        "wins against the target": figures_of(c, "helpfulness", "wins"),
    }
    text = "On held-out prompts, by the judge."
    sections.append(section("Helpfulness", text, columns, paper.plain))
    if c.in_miniature:
        measured = figures_of(c, "refusal", "toxic")
        refused = {label: [1 - x for x in values] for label, values in measured.items()}
        text = "Share of prompts that ask for insults and get none."
        sections.append(section("Over-refusal", text, {"refused": refused}, paper.percent))
    return [part for part in sections if part is not None]


def sections(c: Config) -> list[Section]:
    """What has finished."""
    return [*filter(None, [attacks(c), *defence(c)])]


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything runs."""
    if (mesh := c.check(runs.grid(c), c.reward)) is None:
        return
    scoring.check(RewardConfig(c.harms), mesh, "--harm")
    scoring.check(c.next_reward, mesh, "--reward and --harm")
    pretrained.check(c.attacker, mesh, flag="--attacker", scalar_head=False)


def cli(argv: Sequence[str] | None = None) -> None:
    c = usage.parse(Config, argv, __doc__, check)
    text = "Means over attacks, or over responses to held-out prompts. Intervals are over seeds."
    paper.make_page(c, runs.grid(c), "Red teaming", text, lambda: sections(c))


if __name__ == "__main__":
    cli()
