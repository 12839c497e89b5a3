"""The reward model: scores of K responses in one pass, the loss of eq. 1, and how good it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructjax import losses, models
from instructjax.masked import masked_mean
from instructjax.models import ModelConfig, Params, Shard

Batch = dict[str, Any]  # rows of data.ComparisonRows


def score(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    shard: Shard = models.unsharded,
) -> jax.Array:
    """The scalar at each response's last token (its EOS, where it is complete).

    One pass over the prompt and one over each response: see `models.apply_shared`.

    Args:
      batch: prompt_BP, prompt_mask_BP, responses_BKR, response_mask_BKR.

    Returns:
      score_BK, float32; anything in an empty slot.
    """
    _, hidden_BKRD = models.apply_shared(
        params,
        config,
        batch["prompt_BP"],
        batch["prompt_mask_BP"],
        batch["responses_BKR"],
        batch["response_mask_BKR"],
        key=key,
        shard=shard,
    )
    last_BK = jnp.maximum(jnp.sum(batch["response_mask_BKR"], axis=-1) - 1, 0)
    hidden_BKD = jnp.take_along_axis(hidden_BKRD, last_BK[..., None, None], axis=2)[:, :, 0]
    return models.scalars(params, config, hidden_BKD)


def loss_fn(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """Mean over prompts with at least one strict pair of `losses.pairwise_ranking`.

    Args:
      batch: rows of `data.ComparisonRows`.
      key: of residual dropout; None turns it off.
      config, shard: bound by `functools.partial` in the script.

    Returns:
      (mean, (prompts that count, metrics)); `rm/accuracy` is the mean over prompts of the share
      of their strict pairs that the scores order rightly.
    """
    score_BK = score(params, config, batch, key=key, shard=shard)
    ranks_BK, mask_BK = batch["ranks_BK"], batch["mask_BK"]
    pairs_BKK = losses.strict_pairs(ranks_BK, mask_BK)
    counts_B = jnp.any(pairs_BKK, axis=(1, 2)).astype(jnp.float32)
    loss_B = losses.pairwise_ranking(score_BK, ranks_BK, mask_BK, batch["margin_B"])
    right_BKK = score_BK[:, :, None] > score_BK[:, None, :]
    mean = masked_mean(loss_B, counts_B)
    accuracy = masked_mean(masked_mean(right_BKK, pairs_BKK, axis=(1, 2)), counts_B)
    return mean, (jnp.sum(counts_B), {"rm/loss": mean, "rm/accuracy": accuracy})


def center(params: Params, mean_score: jax.Array | float) -> Params:
    """Shifts the bias so that what scored `mean_score` on average scores 0.

    InstructGPT, section 3.5: labeler demonstrations score 0 on average before RL.
    """
    kernel, bias = params["score"]["kernel"], params["score"]["bias"]
    return {**params, "score": {"kernel": kernel, "bias": bias - mean_score}}


# ---------------------------------------------------------------------------- evaluation


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The strict pairs of some comparisons, in NumPy."""

    gap: np.ndarray  # float [n], the winner's score minus the loser's
    distance: np.ndarray  # int [n], ranks between them
    prompt: np.ndarray  # int [n], which comparison the pair is of


def pairs_of(scores: np.ndarray, ranks: np.ndarray, mask: np.ndarray) -> Pairs:
    """All strict pairs of comparisons [n, K]; arguments as in `losses.pairwise_ranking`."""
    live = mask.astype(bool)
    better = (ranks[:, :, None] < ranks[:, None, :]) & live[:, :, None] & live[:, None, :]
    prompt, winner, loser = np.nonzero(better)
    gap = scores[prompt, winner] - scores[prompt, loser]
    return Pairs(gap, ranks[prompt, loser] - ranks[prompt, winner], prompt)


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
