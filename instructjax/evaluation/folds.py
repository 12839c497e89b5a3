"""Cross-validation over who labeled, or any field: each fold leaves out a part of its values."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.data import Dataset
from instructjax.evaluation.ranking import value_of


def leave_out(
    seen: Dataset, unseen: Dataset, by: str, fold: int, folds: int, seed: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """Training data without the fold's values of a field; held-out data with and without them.

    Args:
      seen, unseen: training and held-out comparisons.
      by: a field of their records.
      fold: which, from 0 to below `folds`.
      seed: of the values' order.

    Returns:
      (training data, {"BY seen": ..., "BY unseen": ...}).

    Raises:
      ValueError: there are fewer values than folds, or a fold leaves nothing on one side.
    """
    values = sorted({value_of(record, by) for record in (*seen.records, *unseen.records)})
    if len(values) < folds:
        raise ValueError(f"--folds {folds}: there are {len(values)} values of {by}")
    order = np.random.default_rng(seed).permutation(len(values))
    left_out = {values[i] for i in order[fold::folds]}

    def part(dataset: Dataset, out: bool) -> Dataset:
        held = [value_of(record, by) in left_out for record in dataset.records]
        if out not in held:
            raise ValueError(f"--by {by}: fold {fold} has no comparisons on one side")
        return dataset.take(np.array(held) == out)

    groups = {f"{by} seen": part(unseen, False), f"{by} unseen": part(unseen, True)}
    return part(seen, False), groups


def summary(
    found: Sequence[Mapping[str, Mapping[str, Any]]], by: str
) -> dict[str, dict[str, float]]:
    """Mean and spread over the folds of each method's accuracy on each side.

    Args:
      found: of each fold, `ranking.accuracies` of the groups of `leave_out`.
    """
    results = {}
    for side in (f"{by} seen", f"{by} unseen"):
        for method in found[0][side].keys() - {"pairs"}:
            shares = [one[side][method][0] for one in found]
            results[f"{method}, {side}"] = {
                "mean": float(np.mean(shares)),
                "spread": float(np.std(shares, ddof=1)),
            }
    return results
