"""Proxy and gold score of policies that maximise the proxy, against the KL from the start.

Gao et al. 2022, arXiv 2210.10760, plot both against the square root of the KL from the start. Here
both are gains over the start, in standard deviations over the start's responses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from instructjax.evaluation import paper, statistics
from instructjax.evaluation.figures import lines_svg
from instructjax.evaluation.report import Section, Table

TEXT = (
    "Gains over the start, in standard deviations over its responses. d is the square root of the"
    " KL from the start, in nats. Intervals are over seeds."
)
FALL = 0.2  # gold standard deviations below its maximum that count as over-optimised [ours]
X_LABEL = "square root of the KL from the start, in nats"


class Curve(NamedTuple):
    """What a policy gains as it moves away from the start. All arrays have n places."""

    d: np.ndarray  # square root of the KL from the start
    proxy: np.ndarray  # gain of what is maximised; NaN where that is no score, as for DPO
    gold: np.ndarray
    step: np.ndarray  # updates or iterations before; n of best-of-n


def of_best_of_n(results: Mapping[str, Any]) -> Curve:
    """The best of n samples, from the results of evaluate.py with --reward and --best_of."""
    rows = [(row["kl"], row["score"][0], row["utility"][0], row["n"]) for row in results["best_of"]]
    return _gains(rows, results)


def of_training(results: Mapping[str, Any], start: Mapping[str, Any]) -> Curve:
    """A policy in training, from the results of run_ppo.py or swap_loss.py.

    Args:
      start: the results of evaluate.py on the start with the same --reward, for the deviations.
    """
    rows = [
        (row["kl"], row.get("score", math.nan), row["utility"], row["step"])
        for row in results["evaluations"]
    ]
    return _gains(rows, start)


def _gains(rows: Sequence[Sequence[float]], start: Mapping[str, Any]) -> Curve:
    """Rows of (KL, proxy, gold, step), of which the first is of the start."""
    kl, proxy, gold, step = np.array(rows).T
    (model,) = start["models"].values()
    scales = (model[key] or math.nan for key in ("score_deviation", "utility_deviation"))
    proxy, gold = ((x - x[0]) / scale for x, scale in zip((proxy, gold), scales, strict=True))
    return Curve(np.sqrt(np.maximum(kl, 0)), proxy, gold, step)


def is_overoptimised(curve: Curve) -> bool:
    """Whether gold has fallen from its maximum, and the proxy has risen since."""
    best = int(curve.gold.argmax())
    return curve.gold[best] - curve.gold[-1] > FALL and curve.proxy[best] < curve.proxy[-1]


def mean(curves: Sequence[Curve]) -> Curve:
    """The mean curve of several seeds, place by place, as far as all of them go."""
    length = min(len(curve.d) for curve in curves)
    columns = zip(*curves, strict=True)
    return Curve(*(np.mean([array[:length] for array in arrays], axis=0) for arrays in columns))


def draw(title: str, curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """An SVG of gold and one of the proxy, each with a line for each label: its mean over seeds."""
    means = {label: mean(of_seeds) for label, of_seeds in curves.items() if of_seeds}
    figures = []
    for column in ("gold", "proxy"):
        lines = {label: np.stack([x.d, getattr(x, column)], 1) for label, x in means.items()}
        y_label = f"gain of {column}, deviations"
        figures.append(lines_svg(f"{title}: {column}", lines, X_LABEL, y_label))
    return figures


COLUMNS = (
    *("", "gold at its maximum", "there d is", "gold at the end", "proxy at the end"),
    *("d at the end", "fitted alpha", "fitted beta"),
)


def row(label: str, curves: Sequence[Curve], fit: Any) -> list[str]:
    """COLUMNS of curves of several seeds, each as a mean with its interval.

    Args:
      fit: `statistics.fit_best_of_n` or `statistics.fit_rl`.
    """
    figures = []
    for curve in curves:
        best = int(curve.gold.argmax())
        alpha, beta = fit(curve.d, curve.gold)
        ends = curve.gold[-1], curve.proxy[-1], curve.d[-1]
        figures.append((curve.gold[best], curve.d[best], *ends, alpha, beta))
    return [
        label,
        *(paper.plain(statistics.over_runs(column)) for column in zip(*figures, strict=True)),
    ]


def section(title: str, curves: Mapping[str, Sequence[Curve]], fit: Any) -> Section | None:
    """Curves by label, each of several seeds, as a section with a verdict; None without any.

    Args:
      fit: `statistics.fit_best_of_n` or `statistics.fit_rl`.
    """
    there = {label: of_seeds for label, of_seeds in curves.items() if of_seeds}
    verdicts = [
        (is_overoptimised(curve), f"{label} ({number} of {len(of_seeds)})")
        for label, of_seeds in there.items()
        for number, curve in enumerate(of_seeds, start=1)
    ]
    rows = [row(label, of_seeds, fit) for label, of_seeds in there.items()]
    text = (
        f"Over-optimised: gold falls by more than {FALL} from its maximum, and the proxy rises"
        " meanwhile."
    )
    return paper.section(title, text, verdicts, Table("", COLUMNS, rows), draw(title, there))
