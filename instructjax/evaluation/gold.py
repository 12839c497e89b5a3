"""What only the miniature has: test comparisons by labelers of either pool, and a perfect judge."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from instructjax import miniature
from instructjax.data import Dataset, Record, encode


def comparisons(tokenizer: Any, n: int, held_out: bool = False) -> Dataset:
    """Comparisons on test customers' prompts, by which no setting was chosen.

    Args:
      n: how many, less those that are ties throughout.
      held_out: by labelers who are in no training data, or else by those who are.
    """
    records = []
    for i, row in enumerate(miniature.comparisons(0, n, "test", held_out=held_out)):
        if len(set(row["ranks"])) > 1:
            responses, ranks = tuple(row["responses"]), tuple(row["ranks"])
            where = f"miniature (test): comparisons {i}"
            records.append(Record(where, row, row["prompt"], responses, ranks, row["labeler"]))
    return encode(records, "comparisons", tokenizer)


def judged(dataset: Dataset) -> np.ndarray:
    """Utilities [n, K] by the noise-free judge: what a perfect reward model would say."""
    found = np.zeros(dataset.ranks.shape)
    for i, record in enumerate(dataset.records):
        found[i, : len(record.responses)] = [
            miniature.judge(dict(record.row), response).utility for response in record.responses
        ]
    return found


def utilities(records: Sequence[Record], texts: Sequence[str]) -> np.ndarray:
    """utility_B of one response to each record's prompt, by the noise-free judge."""
    pairs = zip(records, texts, strict=True)
    return np.array([miniature.judge(dict(record.row), text).utility for record, text in pairs])
