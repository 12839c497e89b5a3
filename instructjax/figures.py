"""Pictures of a reward model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from instructjax.evaluation import ranking
from instructjax.evaluation.ranking import Pairs
from instructjax.metrics import blank_figure


def reliability(pairs: Pairs, file: Path | str, bins: int = 10) -> None:
    """A reliability diagram: predicted preference against how often it was so.

    Args:
      pairs: held-out, strict; each is seen from both sides, so the diagram is symmetric.
      file: the PNG.
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
    """Horizontal bars of accuracy with 95 % intervals.

    Args:
      rows: label -> (accuracy, low, high), each 0 to 1, from top to bottom.
      file: the PNG.
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
