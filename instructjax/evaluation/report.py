"""One page for one run or several: results, curves, reward against KL, samples, flags that differ.

    python -m instructjax.evaluation.report runs/ppo                  # writes runs/ppo/report.html
    python -m instructjax.evaluation.report runs/ppo runs/ppo-2 --out compared.html

The page needs no network. What models wrote is escaped: it is never run as markup.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro

from instructjax import usage
from instructjax.evaluation import figures
from instructjax.run.flags import flat

_SAMPLES, _POINTS = 300, 200  # rows of a table of samples, points of a curve
_PANELS = {  # title -> keys of metrics.jsonl; a panel without data is not drawn
    "loss, nats": ("sft/loss", "rm/loss", "dpo/loss", "loss", "validation/loss"),
    "accuracy on pairs": ("rm/accuracy", "dpo/accuracy", "validation/accuracy"),
    "score": ("objective/score", "validation/score"),
    "disagreement of the reward models": ("reward/disagreement", "validation/disagreement"),
    "gold utility": ("validation/utility",),
    "win rate by gold": ("validation/win_rate",),
    "KL, nats a response": ("objective/kl", "validation/kl"),
    "length, tokens": ("rollout/length", "validation/length"),
    "entropy, nats a response": ("objective/entropy",),
    "share of responses that end": ("rollout/eos_fraction", "validation/eos_fraction"),
    "value loss": ("value/loss",),
    "explained variance of the value net": ("value/explained_variance",),
    "share of clipped tokens": ("policy/clip_fraction", "value/clip_fraction"),
    "pretraining text, nats a token": ("ptx/loss", "ptx/validation_loss"),
    "gradient norm": ("optim/grad_norm", "optim/value_grad_norm"),
    "learning rate": ("optim/learning_rate",),
    "tokens a second": ("throughput/tokens_per_second",),
}
_UNCOMPARED = ("command", "config.out")


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: int = 0  # rows beyond those shown
    search: bool = False  # whether the table is of long texts, with a field to search them


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    text: str = ""
    about: Sequence[tuple[str, str]] = ()  # (name, value)
    tables: Sequence[Table] = ()
    figures: Sequence[str] = ()  # SVGs; empty ones are left out


@dataclass(frozen=True)
class RunData:
    """What a run directory holds for its page."""

    name: str
    config: Mapping[str, Any]  # of config.json
    metrics: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    samples_after: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]


def read(directory: Path) -> RunData:
    """Reads a run directory.

    Raises:
      FileNotFoundError: it has no metrics.jsonl.
      ValueError: a file is damaged; the message names it.
    """
    if not (directory / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{directory}: no run directory: it has no metrics.jsonl")

    def load(name: str, missing: Any, parse: Callable[[str], Any]) -> Any:
        file = directory / name
        try:
            return parse(file.read_text("utf-8")) if file.is_file() else missing
        except ValueError as error:
            raise ValueError(f"{file}: damaged: {error}") from error

    def lines(text: str) -> list[Any]:
        # Not splitlines(), which also cuts at the line separators of Unicode within a text.
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    return RunData(
        name=str(directory),
        config=load("config.json", {}, json.loads),
        metrics=load("metrics.jsonl", [], lines),
        samples=load("samples.jsonl", [], lines),
        samples_after=load("samples_after.jsonl", [], lines),
        results=load("results.json", {}, json.loads),
    )


def write(directories: Sequence[Path], file: Path) -> Path:
    """Writes the page of some runs. Returns `file`. Errors: as `read`."""
    file.write_text(page([read(directory) for directory in directories]), encoding="utf-8")
    return file


def write_for(directory: Path) -> None:
    """Writes RUN/report.html at the end of a run. A page that fails is a warning, as all else of
    the run is written."""
    try:
        write([directory], directory / "report.html")
    except Exception as error:
        print(f"warning: {directory / 'report.html'} was not made: {error}")


def page(runs: Sequence[RunData]) -> str:
    """The page of some runs, as HTML."""
    several = len(runs) > 1
    sections = [Section("Flags", tables=[differing_flags(runs)])] if several else []
    for run in runs:
        tables = list(result_tables(run.results))
        sections.append(Section(run.name if several else "", about=_about(run), tables=tables))
    frontiers = [draw_frontier(column, runs) for column in ("score", "utility")]
    sections.append(Section("Reward against KL", figures=frontiers))
    curves = [draw_panel(title, runs, keys) for title, keys in _PANELS.items()]
    sections.append(Section("Curves", figures=curves))
    for run in runs:
        title = f"Samples of {run.name}" if several else "Samples"
        sections.append(Section(title, tables=sample_tables(run)))
    return render(", ".join(run.name for run in runs), sections)


def render(title: str, sections: Sequence[Section]) -> str:
    """A page as HTML. Sections that hold nothing are left out."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("instructjax.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(title=title, sections=sections)


def _about(run: RunData) -> list[tuple[str, str]]:
    """What a run was, by name."""
    config = run.config.get("config", {})
    about = {name: run.config.get(name) for name in ("stage", "command", "devices")}
    about |= {name: config.get(name) for name in ("preset", "model", "seed")}
    about["data"] = config.get("data", {}).get("spec")
    about["steps"] = max((row.get("step", 0) for row in run.metrics), default=0)
    versions = run.config.get("versions", {})
    about["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    return [(name, str(value)) for name, value in about.items() if value not in (None, "")]


# ------------------------------------------------------------------------------------- results


def result_tables(results: Mapping[str, Any], title: str = "results") -> Iterator[Table]:
    """Tables of what results.json holds, whichever script wrote it.

    A mapping of figures is a row; mappings and lists of rows are tables; so it goes down the tree.
    """
    rows = {name: value for name, value in results.items() if _is_row(value)}
    alone = {name: value for name, value in results.items() if _is_figure(value)}
    if rows:
        yield _table(title, rows)
    if alone:
        yield Table(title, ("", "value"), [(name, _text(x)) for name, x in alone.items()])
    for name, value in results.items():
        if isinstance(value, list) and value and all(map(_is_row, value)):
            yield _table(name, {f"{i}": row for i, row in enumerate(value, 1)})
        elif isinstance(value, dict) and name not in rows:
            yield from result_tables(value, name)


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [
        (name, *(_text(row[c]) if c in row else "" for c in columns)) for name, row in rows.items()
    ]
    return Table(title, ("", *columns), cells)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and any(map(_is_figure, value.values())) and all(
        _is_figure(x) or isinstance(x, str) for x in value.values()
    )  # fmt: skip


def _is_figure(value: Any) -> bool:
    """Whether a value is a number, or (value, low, high) or (low, high)."""
    if isinstance(value, list):
        return len(value) in (2, 3) and all(isinstance(x, int | float) for x in value)
    return isinstance(value, int | float)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        first = f"{_text(value[0])} " if len(value) == 3 else ""
        return f"{first}({_text(value[-2])} to {_text(value[-1])})"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


# ------------------------------------------------------------------------------------- figures


def draw_panel(title: str, runs: Sequence[RunData], keys: Sequence[str]) -> str:
    """An SVG of some metrics of all runs against the step; empty if none was logged."""
    lines = {}
    for run in runs:
        for key in keys:
            label = key if len(runs) == 1 else f"{run.name}: {key}"
            mean = figures.smoothed(_points(run, "step", key))
            lines[label] = mean[:: max(1, len(mean) // _POINTS)]
    return figures.lines_svg(title, lines, "step", title)


def draw_frontier(column: str, runs: Sequence[RunData]) -> str:
    """An SVG of validation scores against the square root of KL; empty if none was logged."""
    lines = {}
    for run in runs:
        kl, value = _points(run, "validation/kl", f"validation/{column}").T
        lines[run.name] = np.stack([np.sqrt(np.maximum(kl, 0)), value], axis=1)
    x_label = "square root of KL from the SFT model, in nats"
    return figures.lines_svg(f"{column} against KL", lines, x_label, column)


def _points(run: RunData, x: str, y: str) -> np.ndarray:
    """[n, 2], the finite pairs of two metrics of one line."""
    pairs = [(row[x], row[y]) for row in run.metrics if x in row and y in row]
    finite = [pair for pair in pairs if all(isinstance(v, int | float) for v in pair)]
    return np.array([pair for pair in finite if all(map(math.isfinite, pair))]).reshape(-1, 2)


# ------------------------------------------------------------------------------ samples, flags


def sample_tables(run: RunData) -> list[Table]:
    """Responses side by side: of the policies that were compared, or of the first and last step."""
    if run.samples_after:
        columns = list(dict.fromkeys(name for row in run.samples_after for name in row))
        rows = [[str(row.get(name, "")) for name in columns] for row in run.samples_after]
        return [_cut("samples after training", columns, rows)]
    ranked = [row for row in run.samples if isinstance(row.get("responses"), list)]
    tables = []
    if ranked:
        rows = []
        for row in ranked:
            scores = row.get("scores", [math.nan] * len(row["responses"]))
            of_row = zip(row["responses"], row.get("ranks", []), scores, strict=True)
            text = "\n".join(f"rank {rank}, score {s:+.2f}: {x}" for x, rank, s in of_row)
            rows.append([str(row.get("prompt", "")), text])
        tables.append(_cut("ranked responses", ("prompt", "responses"), rows))
    plain = [row for row in run.samples if isinstance(row.get("response"), str)]
    if plain:
        steps = sorted({row["step"] for row in plain})
        ends = list(dict.fromkeys((steps[0], steps[-1])))
        by_prompt: dict[str, dict[int, str]] = {}
        for row in plain:
            score = f"\n[score {row['score']:+.2f}]" if "score" in row else ""
            by_prompt.setdefault(row["prompt"], {})[row["step"]] = row["response"] + score
        rows = [[p, *(said.get(step, "") for step in ends)] for p, said in by_prompt.items()]
        columns = ("prompt", *(f"step {step:,}" for step in ends))
        tables.append(_cut("samples", columns, rows))
    return tables


def _cut(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(title, columns, rows[:_SAMPLES], max(0, len(rows) - _SAMPLES), search=True)


def differing_flags(runs: Sequence[RunData]) -> Table:
    """The flags and versions that all runs have and some differ in."""
    configs = [flat(run.config) for run in runs]
    names = sorted(set.intersection(*map(set, configs)) - {*_UNCOMPARED})
    rows = []
    for name in names:
        values = [str(config[name]) for config in configs]
        if len(set(values)) > 1:
            rows.append([name.removeprefix("config."), *values])
    return Table("what differs", ("", *(run.name for run in runs)), rows)


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Config:
    """The runs to show."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    out: Path | None = None
    """File of the page, by default RUN/report.html, or report.html here for several runs."""

    @property
    def file(self) -> Path:
        if self.out is not None:
            return self.out.expanduser()
        return (self.runs[0] if len(self.runs) == 1 else Path()) / "report.html"


def check(config: Config) -> None:
    """Raises ValueError or OSError for runs that cannot be read."""
    if not config.runs:
        raise ValueError("RUNS: give at least one run directory")
    for directory in config.runs:
        read(directory)


def cli(argv: Sequence[str] | None = None) -> None:
    config = usage.parse(Config, argv, __doc__, check)
    print(f"wrote {write(config.runs, config.file)}")


if __name__ == "__main__":
    cli()
