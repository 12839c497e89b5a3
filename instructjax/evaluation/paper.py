"""Reads the results of reproduce.py's grid, and formats a claim of InstructGPT with them.

A run is named after its stage, the size of its model and its seed: `ppo-ptx-small-0`.
"""

import json
import math
import re
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructjax import hosts
from instructjax.evaluation.figures import blank_figure, finished_svg
from instructjax.evaluation.grid import Grid, GridConfig, NotReadyError
from instructjax.evaluation.report import Section, Table, render
from instructjax.run.flags import flat

STAGES = {  # stage of a run -> its name on the page, in the order of the paper's Figure 1
    "pretrain": "base",
    "few_shot:pretrain": "base, few-shot",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo-ptx": "PPO-ptx",
}
Estimate = Sequence[float]  # value, low, high
Verdict = tuple[bool, str]  # whether a claim held, where
Found = dict[str, list[Any]]  # stage -> its figures, each an Estimate
Lines = dict[str, dict[str, list[Estimate]]]  # a figure: line -> place on the axis -> estimates


@dataclass(frozen=True)
class Paper:
    """The results of a grid below OUT.

    Attributes:
      sizes: of the models, the smallest first.
      bases: the sizes of which there is a base model.
    """

    out: Path
    seeds: Sequence[int]
    sizes: Sequence[str]
    bases: Sequence[str]

    def results(self, run: str) -> Mapping[str, Any] | None:
        """What a run's results.json holds, if it has finished."""
        return results_of(self.out, run)

    def model(self, stage: str, size: str, seed: int) -> str:
        """A model's name here: its run, after `few_shot:` if it is prompted."""
        return f"{stage}-{size}-{seed}"

    def wins(self, evaluation: str, ours: str, theirs: str) -> Estimate | None:
        """A win rate in an evaluation, if it has both models."""
        for pair in (self.results(evaluation) or {"pairs": ()})["pairs"]:
            if (run_name(pair["model"]), run_name(pair["against"])) == (ours, theirs):
                return pair["win_rate"]
        return None

    def figure(self, evaluation: str, model: str, kind: str, name: str) -> Estimate | None:
        """A mean of `measures` or `benchmarks` in an evaluation, if it has the model."""
        rows = (self.results(evaluation) or {"models": {}})["models"]
        row = {run_name(path): row for path, row in rows.items()}.get(model, {})
        return row.get(kind, {}).get(name)


def results_of(out: Path, run: str) -> Mapping[str, Any] | None:
    """What OUT/RUN/results.json holds, if the run has finished."""
    file = out / run / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def run_name(name: str) -> str:
    """`few_shot:OUT/run` as `few_shot:run`: another start may have given OUT in another form."""
    path = name.removeprefix("few_shot:")
    return f"{name.removesuffix(path)}{Path(path).name}"


def by_stage(
    paper: Paper,
    wanted: Sequence[tuple[str, str, str]],
    text: Callable[[Estimate | None], str],
    holds: Callable[[Found], bool | None],
) -> tuple[list[list[str]], list[Verdict], list[Lines]]:
    """(a row for each model that has all figures, a verdict for each size and seed, and for each
    figure what to draw).

    Args:
      wanted: the evaluation, kind and name of each figure, see `Paper.figure`.
      text: of a figure, for the table.
      holds: whether the claim holds in the figures of a size and seed; None: some are missing.
    """
    rows, verdicts, drawn = [], [], [lines() for _ in wanted]
    for seed in paper.seeds:
        for size in paper.sizes:
            found: Found = {}
            for stage, shown in STAGES.items():
                model = paper.model(stage, size, seed)
                given = [paper.figure(f"{run}-{seed}", model, *which) for run, *which in wanted]
                figures = [figure for figure in given if figure is not None]
                if len(figures) == len(wanted):
                    found[stage] = figures
                    rows.append([f"{shown}, {size}, seed {seed}", *map(text, figures)])
                    for each, figure in zip(drawn, figures, strict=True):
                        each[size][shown].append(figure)
            if (held := holds(found)) is not None:
                verdicts.append((held, f"{size}, seed {seed}"))
    return rows, verdicts, drawn


SWEPT = {"score": "score", "utility": "utility", "kl": "KL, nats", "text_loss": "text loss"}


def policy_of(paper: Paper, run: str) -> Mapping[str, float] | None:
    """The figures of a trained policy, as it is exported, if the run has finished."""
    results = paper.results(run)
    return None if results is None else results["PPO, averaged weights"]


def swept(paper: Paper, name: str, flag: str, default: str) -> dict[str, Mapping[str, float]]:
    """`beta 0.5` -> the policy of `sweep-beta-0.5-SEED`, of the first seed, by rising value.

    Args:
      name: of the sweep, which ends in that of the flag: `beta`, `no-ptx-beta`.
      flag: the flag, dotted as in config.json.
      default: a run of the grid with the same other flags. It is added, if some of the sweep are.
    """
    start, end = f"sweep-{name}-", f"-{paper.seeds[0]}"
    found = {}
    for path in paper.out.glob(f"{start}*{end}"):
        if (policy := policy_of(paper, path.name)) is not None:
            found[float(path.name.removeprefix(start).removesuffix(end))] = policy
    if found and (policy := policy_of(paper, default)) is not None:
        config = flat(json.loads((paper.out / default / "config.json").read_text()))
        found[float(config[f"config.{flag}"])] = policy
    short = name.rpartition("-")[2]
    return {f"{short} {value:g}": found[value] for value in sorted(found)}


def sweep_rows(policies: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    return [
        [name, *(f"{policy[column]:.2f}" for column in SWEPT)] for name, policy in policies.items()
    ]


def section(
    title: str, text: str, verdicts: Sequence[Verdict], table: Table, figures: Sequence[str] = ()
) -> Section | None:
    """A claim with its verdict; None if no run speaks of it."""
    if not table.rows:
        return None
    if verdicts:
        held = [where for holds, where in verdicts if holds]
        failed = [where for holds, where in verdicts if not holds]
        text += f" Here it held in {len(held)} of {len(verdicts)}."
        if failed:
            text += f" It failed in: {'; '.join(failed)}."
    return Section(title, text, tables=[table], figures=figures)


def lines() -> Lines:
    """No lines yet; one begins when it is named."""
    return defaultdict(lambda: defaultdict(list))


def draw_sweep(
    title: str, policies: Mapping[str, Mapping[str, float]], columns: Sequence[str]
) -> str:
    """An SVG with a line for each column of SWEPT."""
    drawn = lines()
    for column in columns:
        for name, policy in policies.items():
            drawn[SWEPT[column]][name].append([policy[column]] * 3)
    return draw(title, drawn)


def draw(title: str, drawn: Lines, order: Sequence[str] = ()) -> str:
    """An SVG of lines through the means over seeds, with a bar for each seed's interval.

    Args:
      order: places on the axis that come first; others follow as they are found.
    """
    figure = blank_figure(4.6, 3.0, fit_margins=False)
    axes = figure.add_subplot()
    found = dict.fromkeys(place for line in drawn.values() for place in line)
    places = [place for place in dict.fromkeys((*order, *found)) if place in found]
    for number, (name, line) in enumerate(drawn.items()):
        beside = 0.12 * (number - (len(drawn) - 1) / 2)  # so that no line covers another's bars
        at_place = sorted(line, key=places.index)
        x = np.array([places.index(place) for place in at_place]) + beside
        means = [np.mean([estimate[0] for estimate in line[place]]) for place in at_place]
        (plotted,) = axes.plot(x, means, marker="o", markersize=4, linewidth=1, label=name)
        for at, place in zip(x, at_place, strict=True):
            estimates = line[place]
            beside = 0.03 * (np.arange(len(estimates)) - (len(estimates) - 1) / 2)
            _, low, high = np.array(estimates).T
            axes.vlines(at + beside, low, high, color=plotted.get_color(), linewidth=1)
    axes.set_xticks(
        range(len(places)),
        [textwrap.fill(place, 10, break_on_hyphens=False) for place in places],
        fontsize="small",
    )
    return finished_svg(figure, axes, title, "", "")


def percent(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate[0]):  # no response to which it applies
        return ""
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in estimate))


def plain(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate[0]):
        return ""
    return "{:.2f} ({:.2f} to {:.2f})".format(*estimate)


def make_page(
    config: GridConfig, runs: Grid, title: str, text: str, sections: Callable[[], Sequence[Section]]
) -> None:
    """Makes the runs that --runs chooses, and writes the page of those that have finished.

    Args:
      text, sections: of the page, see `write_page`.
    """
    chosen = runs.chosen(config.runs)
    if config.dry_run:
        runs.print_commands(chosen)
        return
    for directory in (config.directory, config.results_directory):
        directory.mkdir(parents=True, exist_ok=True)
    unfinished, not_ready = [], None
    try:
        unfinished = runs.make(chosen, config.jobs)
    except NotReadyError as error:
        not_ready = error
    print(f"wrote {write_page(title, text, sections(), config)}")
    if not_ready is not None:
        print(not_ready, file=sys.stderr)
        sys.exit(hosts.RESUMABLE)
    if unfinished:
        sys.exit(f"error: not finished: {', '.join(unfinished)}; the same command goes on")


def write_page(title: str, text: str, sections: Sequence[Section], config: GridConfig) -> Path:
    """Writes OUT/report.html, and RESULTS/report.md with its figures as files. Returns the first.

    Args:
      text: what stands above the sections.
    """
    about = [
        ("command", shlex.join(["python", *sys.argv])),
        ("seeds", " ".join(map(str, config.of_seeds))),
    ]
    every = [Section("", text, about), *sections]
    write_markdown(title, every, config.results_directory)
    file = config.directory / "report.html"
    file.write_text(render(title, every), encoding="utf-8")
    return file


def write_markdown(title: str, sections: Sequence[Section], directory: Path) -> None:
    """Writes a page without samples as DIRECTORY/report.md, and its figures, which are SVG files in
    DIRECTORY/figures."""
    (directory / "figures").mkdir(exist_ok=True)
    for of_an_earlier_page in (directory / "figures").glob("*.svg"):
        of_an_earlier_page.unlink()
    blocks = [f"# {title}"]
    for part in sections:
        blocks += [f"## {part.title}"] if part.title else []
        blocks += [part.text, *(f"- {name}: `{value}`" for name, value in part.about)]
        for table in part.tables:
            rows = [table.columns, ["---"] * len(table.columns), *table.rows]
            shown = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            blocks += [f"{table.title}:", shown] if table.title else [shown]
        slug = re.sub(r"\W+", "-", part.title.lower()).strip("-")
        for number, svg in enumerate(filter(None, part.figures), start=1):
            file = f"figures/{slug}-{number}.svg"
            (directory / file).write_text(svg, encoding="utf-8")
            blocks.append(f"![{part.title}]({file})")
    (directory / "report.md").write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
