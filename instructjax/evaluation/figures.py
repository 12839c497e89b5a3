"""Figures: curves of a run's metrics, a reward model's accuracy and calibration, KL frontiers.

The files of a run are PNG, the figures of report.html SVG.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markupsafe
import numpy as np

from instructjax.evaluation import ranking
from instructjax.evaluation.ranking import Pairs


def blank_figure(width: float, height: float, fit_margins: bool = True) -> Any:
    """An empty matplotlib figure, `width` by `height` inches.

    Args:
      fit_margins: to its labels, which takes half of the time of drawing.
    """
    # Not imported above: without its cache of fonts matplotlib starts a thread on import. That
    # thread would get a malloc arena before `process.keep_memory` can prevent it. Later threads
    # would share it, and it is too small for a step's temporaries.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if fit_margins else None)


def shown_label(text: str) -> str:
    """A label that matplotlib shows as it is: no formula between dollars, not hidden for its _."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def plot_curves(
    directory: Path | str, keys_by_panel: Mapping[str, Sequence[str]], file: Path | str
) -> None:
    """Draws curves of DIRECTORY/metrics.jsonl as a PNG.

    Args:
      keys_by_panel: a panel's title, which also labels its y axis -> keys of the metrics in it.
      file: the PNG to write.
    """
    with (Path(directory) / "metrics.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    count = len(keys_by_panel)
    figure = blank_figure(4.8 * min(count, 3), 3.4 * -(-count // 3))
    for number, (title, keys) in enumerate(keys_by_panel.items(), start=1):
        axes = figure.add_subplot(-(-count // 3), min(count, 3), number)
        for key in keys:
            points = np.array([(row["step"], row[key]) for row in rows if key in row])
            if not len(points):
                continue
            mean = smoothed(points)
            marker = "." if len(points) <= 30 else ""
            (line,) = axes.plot(*mean.T, marker=marker, label=key)
            if len(mean) < len(points):  # the points lie faintly under their running mean
                axes.plot(*points.T, color=line.get_color(), alpha=0.25, linewidth=0.8, zorder=1)
        axes.set(title=title, xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="grey")
    figure.savefig(file, dpi=150)


def smoothed(points: np.ndarray) -> np.ndarray:
    """[m, 2]: points [n, 2] or, if they are many, their running mean over a fiftieth of them."""
    if not len(points):
        return points
    window = max(1, len(points) // 50)
    mean = np.convolve(points[:, 1], np.full(window, 1 / window), mode="valid")
    return np.stack([points[window - 1 :, 0], mean], axis=1)


def lines_svg(title: str, lines: Mapping[str, np.ndarray], x_label: str, y_label: str) -> str:
    """An SVG of lines through points [n, 2], by label. Lines of one point are left out."""
    figure = blank_figure(4.6, 3.0, fit_margins=False)
    axes = figure.add_subplot()
    for label, points in lines.items():
        if len(points) > 1:
            marker = "." if len(points) <= 30 else ""
            axes.plot(*points.T, marker=marker, label=shown_label(label), linewidth=1.3)
    return finished_svg(figure, axes, title, x_label, y_label)


def finished_svg(figure: Any, axes: Any, title: str, x_label: str, y_label: str) -> str:
    """The SVG of a figure with one panel, safe within a page; empty if nothing was drawn."""
    import matplotlib  # see `blank_figure` for why it is not imported above

    if not axes.lines:
        return ""
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))  # 0.00030 would push the label out
    figure.subplots_adjust(left=0.17, right=0.97, bottom=0.16, top=0.9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    # Ids that depend on the title: those of two figures on a page must differ. Text stays text.
    style: dict[Any, Any] = {
        "svg.hashsalt": title,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    drawn = io.StringIO()
    with matplotlib.rc_context(style):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return markupsafe.Markup(svg[svg.index("<svg") :])


def reliability(pairs: Pairs, file: Path | str, bins: int = 10) -> None:
    """Draws a reliability diagram: predicted preference against observed share, as a PNG.

    Args:
      pairs: strict pairs of held-out comparisons. Each counts from both sides, so the diagram is
        symmetric about (1/2, 1/2).
      file: the PNG to write.
      bins: number of bins of the predicted preference.
    """
    predicted, observed, count = ranking.calibration(pairs, bins)
    figure = blank_figure(4.2, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="calibrated")
    axes.plot(predicted, observed, marker="o", markersize=4, label="reward model")
    edges = np.linspace(0, 1, bins + 1)
    share = count / max(count.sum(), 1)
    axes.bar(
        edges[:-1], share, 1 / bins, align="edge", alpha=0.2, color="grey", label="share of pairs"
    )
    axes.set(
        title="Calibration on held-out pairs",
        xlabel="predicted: sigmoid of the difference of scores",
        ylabel="share preferred by labelers",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def accuracies(rows: Mapping[str, tuple[float, float, float]], file: Path | str) -> None:
    """Draws accuracies as horizontal bars with 95 % intervals, as a PNG.

    Args:
      rows: label -> (accuracy, low, high), each from 0 to 1, in order from top to bottom.
      file: the PNG to write.
    """
    figure = blank_figure(6, 0.9 + 0.27 * len(rows))
    axes = figure.add_subplot()
    at = np.arange(len(rows))[::-1]
    share, low, high = 100 * np.array(list(rows.values())).reshape(-1, 3).T
    around = np.clip([share - low, high - share], 0, None)
    axes.barh(at, share, xerr=around, height=0.7, alpha=0.8, error_kw={"linewidth": 0.9})
    axes.axvline(50, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(at, list(rows), fontsize="small")
    axes.set(title="Accuracy on held-out pairs", xlabel="% of strict pairs", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def frontier(
    curves: Mapping[str, Mapping[str, Sequence[float]]], columns: Sequence[str], file: Path | str
) -> None:
    """Draws what is gained against the square root of the KL that it takes, as a PNG.

    Args:
      curves: label -> {"kl": nats from the reference, a column: its values, ...}. One point is
        drawn as a marker, several as a curve in the order of their KL.
      columns: a panel each, such as utility and score.
      file: the PNG to write.
    """
    figure = blank_figure(4.8 * len(columns), 3.8)
    for number, column in enumerate(columns, start=1):
        axes = figure.add_subplot(1, len(columns), number)
        for label, curve in curves.items():
            if column in curve:
                order = np.argsort(curve["kl"])
                distance = np.sqrt(np.maximum(curve["kl"], 0))[order]
                axes.plot(
                    distance, np.asarray(curve[column])[order], marker="o", label=shown_label(label)
                )
        axes.set(xlabel="square root of KL from the reference, in nats", ylabel=column)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
