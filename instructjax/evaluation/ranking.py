"""How often a reward model orders held-out pairs as labelers did: intervals, parts, calibration."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from instructjax.data import Dataset, Record
from instructjax.data.columns import lookup


@dataclass(frozen=True)
class Pairs:
    """The strict pairs of some comparisons, in NumPy."""

    gap: np.ndarray  # float [n], the winner's score minus the loser's
    distance: np.ndarray  # int [n], ranks between them
    prompt: np.ndarray  # int [n], which comparison the pair is of

    def take(self, keep: np.ndarray) -> "Pairs":
        """The pairs where the boolean mask [n] holds."""
        return Pairs(self.gap[keep], self.distance[keep], self.prompt[keep])


def pairs_of(scores: np.ndarray, ranks: np.ndarray) -> Pairs:
    """All strict pairs of comparisons.

    Args:
      scores: float [n, K].
      ranks: int [n, K]; 1 is best, equal ranks are ties, 0 is an empty slot.
    """
    live = ranks > 0
    better = (ranks[:, :, None] < ranks[:, None, :]) & live[:, :, None] & live[:, None, :]
    prompt, winner, loser = np.nonzero(better)
    gap = scores[prompt, winner] - scores[prompt, loser]
    return Pairs(gap, ranks[prompt, loser] - ranks[prompt, winner], prompt)


def joined(several: Sequence[Pairs]) -> Pairs:
    """Pairs of several data sets as of one."""
    first = np.cumsum([0, *(pairs.prompt.max(initial=0) + 1 for pairs in several)])
    return Pairs(
        np.concatenate([pairs.gap for pairs in several]),
        np.concatenate([pairs.distance for pairs in several]),
        np.concatenate([pairs.prompt + at for pairs, at in zip(several, first, strict=False)]),
    )


def share(pairs: Pairs) -> float:
    """Share of the pairs whose winner scores higher; equal scores are half right."""
    return float(((pairs.gap > 0) + 0.5 * (pairs.gap == 0)).mean())


def accuracy(pairs: Pairs, draws: int = 1000) -> tuple[float, float, float]:
    """Share of pairs whose winner scores higher, with a 95 % interval.

    Equal scores are half right. The pairs of a prompt are not independent, so the interval is a
    bootstrap over prompts.

    Returns:
      (accuracy, low, high); NaN without pairs.
    """
    if not len(pairs.gap):
        return float("nan"), float("nan"), float("nan")
    right = (pairs.gap > 0) + 0.5 * (pairs.gap == 0)
    _, group = np.unique(pairs.prompt, return_inverse=True)
    total, count = np.bincount(group, right), np.bincount(group)
    picks = np.random.default_rng(0).integers(0, len(total), (draws, len(total)))
    drawn = total[picks].sum(1) / count[picks].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(right.mean()), float(low), float(high)


def calibration(pairs: Pairs, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A reliability diagram: of pairs with predicted preference p, how many are so.

    Each pair is seen from both sides, so that the diagram is symmetric about (1/2, 1/2).

    Returns:
      (mean prediction, observed share, pairs), each [bins]; NaN in an empty bin.
    """
    p = 1 / (1 + np.exp(-np.concatenate([pairs.gap, -pairs.gap])))
    happened = np.repeat([1.0, 0.0], len(pairs.gap))
    which = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(which, p, minlength=bins) / count
        observed = np.bincount(which, happened, minlength=bins) / count
    return predicted, observed, count


def value_of(record: Record, name: str) -> str:
    """A field of a record, as text; raises ValueError where it has none."""
    if name == "labeler" and record.labeler is not None:
        return record.labeler
    try:
        return str(lookup(record.row, name))
    except KeyError:
        raise ValueError(f"{record.where}: no field '{name}' to group by") from None


def accuracies(
    methods: dict[str, dict[str, np.ndarray]], groups: dict[str, Dataset], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each method on each part of the held-out pairs: label -> method -> (share, low, high).

    The parts are the groups, the values of each field (the 20 commonest), and ranks apart.

    Args:
      methods: name -> group -> scores [n, K] of its comparisons.
      groups: name -> comparisons.
      fields: of the records.
    """

    def pairs_in(scores: dict[str, np.ndarray], keep: Mapping[str, Any]) -> Pairs:
        """Of each group's comparisons, those that `keep` picks."""
        few = (pairs_of(scores[n][keep[n]], groups[n].ranks[keep[n]]) for n in keep)
        return joined(list(few))

    whole = {name: slice(None) for name in groups}
    parts: dict[str, Mapping[str, Any]] = {name: {name: slice(None)} for name in groups}
    for field in fields:
        values = {name: [value_of(r, field) for r in d.records] for name, d in groups.items()}
        for value, _ in Counter(itertools.chain(*values.values())).most_common(20):
            keep = {name: np.array(found) == value for name, found in values.items()}
            parts[f"{field}: {value}"] = keep
    pairs = {
        label: {method: pairs_in(scores, keep) for method, scores in methods.items()}
        for label, keep in parts.items()
    }
    every = {method: pairs_in(scores, whole) for method, scores in methods.items()}
    for distance in (1, 2, 3, 4):
        label = f"ranks apart: {distance}{' or more' * (distance == 4)}"
        pairs[label] = {
            method: found.take(np.minimum(found.distance, 4) == distance)
            for method, found in every.items()
        }
    return {
        label: {"pairs": len(next(iter(row.values())).gap)}
        | {method: accuracy(found) for method, found in row.items()}
        for label, row in pairs.items()
        if len(next(iter(row.values())).gap)
    }


def table_of(found: dict[str, dict[str, Any]]) -> Table:
    """Per cent of the pairs in the labelers' order; of the reward model with half its interval."""
    others = [name for name in next(iter(found.values())) if name not in ("pairs", "reward model")]
    title = "Held-out pairs in the labelers' order, %"
    columns = ("", "pairs", "reward model", *others)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for label, row in found.items():
        share, low, high = (100 * x for x in row["reward model"])
        ours = f"{share:.1f} +- {(high - low) / 2:.1f}"
        rest = (f"{100 * row[name][0]:.1f}" for name in others)
        table.add_row(label, f"{row['pairs']:,}", ours, *rest)
    return table
