"""Accuracy of a reward model on held-out pairs, with intervals, by groups, and its calibration."""

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
from instructjax.evaluation import statistics

GAIN = "gain over words"  # of the reward model over the bag of words


@dataclass(frozen=True)
class Pairs:
    """The strict pairs of comparisons, in NumPy: two responses to one prompt, of unequal ranks."""

    gap: np.ndarray  # float [n], score of the better response minus that of the worse
    distance: np.ndarray  # int [n], rank of the worse response minus that of the better
    prompt: np.ndarray  # int [n], number of the comparison that the pair comes from

    def take(self, keep: np.ndarray) -> "Pairs":
        """The pairs that a boolean mask [n] selects."""
        return Pairs(self.gap[keep], self.distance[keep], self.prompt[keep])


def pairs_of(scores: np.ndarray, ranks: np.ndarray) -> Pairs:
    """All strict pairs of comparisons.

    Args:
      scores: float score_BK.
      ranks: int rank_BK; 1 is best, equal ranks are ties, 0 is an empty slot.
    """
    live = ranks > 0
    better = (ranks[:, :, None] < ranks[:, None, :]) & live[:, :, None] & live[:, None, :]
    prompt, winner, loser = np.nonzero(better)
    gap = scores[prompt, winner] - scores[prompt, loser]
    return Pairs(gap, ranks[prompt, loser] - ranks[prompt, winner], prompt)


def joined(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, with prompts numbered on from one part to the next."""
    first = np.cumsum([0, *(pairs.prompt.max(initial=0) + 1 for pairs in parts)])
    return Pairs(
        np.concatenate([pairs.gap for pairs in parts]),
        np.concatenate([pairs.distance for pairs in parts]),
        np.concatenate([pairs.prompt + at for pairs, at in zip(parts, first, strict=False)]),
    )


def right(pairs: Pairs) -> np.ndarray:
    """1 for each pair whose better response scores higher, 1/2 for equal scores, else 0."""
    return (pairs.gap > 0) + 0.5 * (pairs.gap == 0)


def share(pairs: Pairs) -> float:
    """Share of the pairs whose better response scores higher. Equal scores count half."""
    return float(right(pairs).mean())


def accuracy(pairs: Pairs, draws: int = 1000) -> statistics.Estimate:
    """`share` with a 95 % interval.

    Args:
      pairs: strict pairs.
      draws: bootstrap samples.

    Returns:
      NaN without pairs.
    """
    return statistics.mean(right(pairs), pairs.prompt, draws)


def gain(pairs: Pairs, baseline: Pairs, draws: int = 1000) -> statistics.Estimate:
    """The accuracy of one method minus that of another, with a 95 % interval.

    Both are of the same pairs, so what makes a pair hard for both drops out, and the interval is
    shorter than those of the two accuracies suggest.

    Args:
      pairs, baseline: the same strict pairs in the same order, with the gaps of either method.
      draws: bootstrap samples.

    Returns:
      NaN without pairs.
    """
    return statistics.mean(right(pairs) - right(baseline), pairs.prompt, draws)


def calibration(pairs: Pairs, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The data of a reliability diagram: how many pairs of predicted preference p are preferred.

    The predicted preference is sigmoid(gap) (InstructGPT, eq. 1). Each pair counts from both sides,
    so that the diagram is symmetric about (1/2, 1/2).

    Returns:
      (mean prediction, observed share, number of pairs), each [bins]. The first two are NaN in an
      empty bin.
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
    """The value of a record's field, as text.

    Raises:
      ValueError: the record has no such field; names its file and line.
    """
    if name == "labeler" and record.labeler is not None:
        return record.labeler
    try:
        return str(lookup(record.row, name))
    except KeyError:
        raise ValueError(f"{record.where}: no field '{name}' to group by") from None
    except TypeError as error:
        raise ValueError(f"{record.where}: {error}") from None


def accuracies(
    methods: dict[str, dict[str, np.ndarray]], groups: dict[str, Dataset], fields: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The accuracy of each method on each part of the held-out pairs.

    The parts are the groups, the 20 commonest values of each field, and the pairs by the distance
    of their ranks.

    Args:
      methods: method -> group -> score_BK of the group's comparisons. Two of the methods are
        "reward model" and "bag of words".
      groups: group -> comparisons.
      fields: fields of the records.

    Returns:
      part -> {"pairs": number of pairs, method: (accuracy, low, high), ..., GAIN: `gain` of the
      reward model over the bag of words}

    Raises:
      ValueError: a record lacks one of the fields.
    """

    def pairs_in(scores: dict[str, np.ndarray], keep: Mapping[str, Any]) -> Pairs:
        """The pairs of those comparisons of each group that `keep` selects."""
        kept = (pairs_of(scores[n][keep[n]], groups[n].ranks[keep[n]]) for n in keep)
        return joined(list(kept))

    whole = {name: slice(None) for name in groups}
    parts: dict[str, Mapping[str, Any]] = {name: {name: slice(None)} for name in groups}
    for field in fields:
        values = {name: [value_of(r, field) for r in d.records] for name, d in groups.items()}
        for value, _ in Counter(itertools.chain(*values.values())).most_common(20):
            parts[f"{field}: {value}"] = {
                name: np.array(of_records) == value for name, of_records in values.items()
            }
    pairs = {
        label: {method: pairs_in(scores, keep) for method, scores in methods.items()}
        for label, keep in parts.items()
    }
    every = {method: pairs_in(scores, whole) for method, scores in methods.items()}
    for distance in (1, 2, 3, 4):
        label = f"ranks apart: {distance}{' or more' * (distance == 4)}"
        pairs[label] = {
            method: of_method.take(np.minimum(of_method.distance, 4) == distance)
            for method, of_method in every.items()
        }
    return {
        label: {
            "pairs": len(row["reward model"].gap),
            **{method: accuracy(of_method) for method, of_method in row.items()},
            GAIN: gain(row["reward model"], row["bag of words"]),
        }
        for label, row in pairs.items()
        if len(row["reward model"].gap)
    }


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    """`accuracies` as a table in per cent. Half the interval stands beside the reward model's, and
    beside its gain."""
    others = [name for name in next(iter(rows.values())) if name not in ("pairs", "reward model")]
    title = "Held-out pairs in the labelers' order, %"
    columns = ("", "pairs", "reward model", *others)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for label, row in rows.items():
        cells = []
        for name in ("reward model", *others):
            mean, low, high = (100 * x for x in row[name])
            half = f" +- {(high - low) / 2:.1f}" if name in ("reward model", GAIN) else ""
            cells.append(f"{mean:{'+' if name == GAIN else ''}.1f}{half}")
        table.add_row(label, f"{row['pairs']:,}", *cells)
    return table
