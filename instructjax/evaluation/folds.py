"""Cross-validation over labelers, or the values of another field: each fold leaves out a part."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instructjax.data import Dataset
from instructjax.evaluation.ranking import value_of


def leave_out(
    seen: Dataset, unseen: Dataset, by: str, fold: int, folds: int, seed: int = 0
) -> tuple[Dataset, dict[str, Dataset]]:
    """Leaves the fold's values of a field out of the training data, and splits the held-out data.

    Args:
      seen, unseen: training and held-out comparisons.
      by: a field of their records, such as `labeler`.
      fold: number of the fold, from 0 to folds - 1.
      folds: number of folds that share the field's values out among them.
      seed: seed of the order in which the values are dealt out.

    Returns:
      (training data, {"BY seen": held-out data whose value was trained on, "BY unseen": the other
      held-out data})

    Raises:
      ValueError: there are fewer values than folds, or a fold leaves nothing on one side.
    """
    values = sorted({value_of(record, by) for record in (*seen.records, *unseen.records)})
    if len(values) < folds:
        raise ValueError(f"--folds {folds}: there are only {len(values)} values of {by}")
    order = np.random.default_rng(seed).permutation(len(values))
    left_out = {values[i] for i in order[fold::folds]}

    def part(dataset: Dataset, out: bool) -> Dataset:
        is_out = [value_of(record, by) in left_out for record in dataset.records]
        if out not in is_out:
            raise ValueError(
                f"--by {by}: fold {fold} has comparisons on one side only; give fewer --folds"
            )
        return dataset.take(np.array(is_out) == out)

    groups = {f"{by} seen": part(unseen, False), f"{by} unseen": part(unseen, True)}
    return part(seen, False), groups


def summary(
    results_by_fold: Sequence[Mapping[str, Mapping[str, Any]]], by: str
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over folds of each method's accuracy, on seen and unseen values.

    Args:
      results_by_fold: `ranking.accuracies` of each fold's groups from `leave_out`.
      by: the field.
    """
    results = {}
    for side in (f"{by} seen", f"{by} unseen"):
        for method in results_by_fold[0][side].keys() - {"pairs"}:
            shares = [accuracies[side][method][0] for accuracies in results_by_fold]
            results[f"{method}, {side}"] = {
                "mean": float(np.mean(shares)),
                "spread": float(np.std(shares, ddof=1)),
            }
    return results
