"""What only the miniature offers: comparisons on test prompts, and a judge without noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from instructjax import miniature
from instructjax.data import Dataset, Record, encode


def comparisons(tokenizer: Any, n: int, held_out: bool = False) -> Dataset:
    """Comparisons on the prompts of test customers, which no setting was chosen by.

    Args:
      n: how many to make. Those whose responses all have the same rank are left out.
      held_out: ranked by labelers who made no training data, instead of those who did.
    """
    records = []
    for i, row in enumerate(miniature.comparisons(0, n, "test", held_out=held_out)):
        if len(set(row["ranks"])) > 1:
            responses, ranks = tuple(row["responses"]), tuple(row["ranks"])
            where = f"miniature (test): comparisons {i}"
            records.append(Record(where, row, row["prompt"], responses, ranks, row["labeler"]))
    return encode(records, "comparisons", tokenizer)


def utilities(records: Sequence[Record], texts: Sequence[str]) -> np.ndarray:
    """utility_B that the noise-free judge gives to one response to each record's prompt.

    Args:
      records: records of the miniature, of any kind that has a prompt.
      texts: the responses, without special tokens.
    """
    pairs = zip(records, texts, strict=True)
    return np.array([miniature.judge(dict(record.row), text).utility for record, text in pairs])


def judged(dataset: Dataset) -> np.ndarray:
    """utility_BK of the responses in comparisons, 0 in an empty slot.

    The noise-free judge's scores are those of a perfect reward model.
    """
    utility_BK = np.zeros(dataset.ranks.shape)
    for i, record in enumerate(dataset.records):
        count = len(record.responses)
        utility_BK[i, :count] = utilities([record] * count, record.responses)
    return utility_BK
