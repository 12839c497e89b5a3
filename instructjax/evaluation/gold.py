"""The gold judge, which scores policies and never trains them.

The miniature's judge has no noise. For other data, the gold judge is a reward model or a function
that training does not use. This module also makes the miniature's comparisons on test prompts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import miniature, scoring
from instructjax.data import Dataset, Record, encode
from instructjax.train import Batch

# What `measures` sees in a response to a prompt of the miniature.
MEASURES = ("likert", "followed", "truthful", "hallucinated", "toxic")

RunModel = Callable[[Callable[[Batch], jax.Array]], np.ndarray]  # see `scoring.Rewards.score`
# (run_model of a rollout, its records, its texts) -> utility_B
Judge = Callable[[RunModel, Sequence[Record], Sequence[str]], np.ndarray]


def load_judge(
    specs: Sequence[str], data: str, mesh: Mesh, tokenizer: Any, dtype: str
) -> Judge | None:
    """The judge of --gold, or else the miniature's on the miniature's data, or else None.

    Args:
      specs: reward models and functions, as for --reward. Their sum is the utility. Reward models
        stay in host memory while they do not score.
      data: the SPEC of the prompts.
      mesh, tokenizer, dtype: as for `scoring.load`, which also names the errors.
    """
    if specs:
        config = scoring.RewardConfig(tuple(specs))
        rewards = scoring.load(config, mesh, tokenizer, dtype, offload=True, flag="--gold")

        def judge(run_model: RunModel, records: Sequence[Record], texts: Sequence[str]) -> Any:
            prompts = [record.prompt for record in records]
            return rewards.score(run_model, prompts, texts, records)[0]

        return judge
    if data == "miniature":
        return lambda run_model, records, texts: utilities(records, texts)
    return None


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


def measures(records: Sequence[Record], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What else the noise-free judge sees in a response to each record's prompt.

    Returns:
      float [B] by name: likert (1 to 7), followed (0 to 1), truthful, hallucinated and toxic (0 or
      1); NaN where the judge has no verdict, as of the truth of a response that states nothing.
    """
    pairs = zip(records, texts, strict=True)
    verdicts = [miniature.judge(dict(record.row), text) for record, text in pairs]
    rows = [
        (
            miniature.likert(verdict.utility),
            verdict.features.followed,
            verdict.truthful,
            verdict.hallucinated,
            verdict.toxic,
        )
        for verdict in verdicts
    ]
    columns = np.array(rows, float).reshape(-1, len(MEASURES)).T  # None is NaN
    return dict(zip(MEASURES, columns, strict=True))


def judged(dataset: Dataset) -> np.ndarray:
    """utility_BK of the responses in comparisons, 0 in an empty slot.

    The noise-free judge's scores are those of a perfect reward model.
    """
    utility_BK = np.zeros(dataset.ranks.shape)
    for i, record in enumerate(dataset.records):
        count = len(record.responses)
        utility_BK[i, :count] = utilities([record] * count, record.responses)
    return utility_BK
