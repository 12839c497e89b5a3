"""The reward model: scores of K responses in one pass, and the loss of InstructGPT's equation 1."""

import jax
import jax.numpy as jnp

from instructjax import losses, models
from instructjax.masked import masked_mean
from instructjax.models import ModelConfig, Params, Shard
from instructjax.train import Batch, Metrics


def score(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    shard: Shard = models.unsharded,
) -> jax.Array:
    """The scalar at each response's last token, which is EOS if the response is complete.

    The prompt runs once for all its responses, which stand in fixed slots (`models.apply_shared`)
    or are packed one after the other (`models.apply` with parents).

    Args:
      batch: rows of `data.ComparisonRows` or of `data.PackedComparisonRows`.
      key: key of residual dropout; None turns dropout off.

    Returns:
      float32 score_BK, or score_BCK for packed rows. The score of an empty slot means nothing.
    """
    if "last_BCK" in batch:
        B, C, K = batch["last_BCK"].shape
        hidden_BSD = models.apply(
            params,
            config,
            batch["tokens_BT"],
            mask_BT=batch["segments_BT"] != 0,
            positions_BT=batch["positions_BT"],
            segments_BT=batch["segments_BT"],
            parents_BT=batch["parents_BT"],
            at=batch["last_BCK"].reshape(B, C * K),
            key=key,
            shard=shard,
        )
        return models.scalars(params, config, hidden_BSD).reshape(B, C, K)
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
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean of `losses.pairwise_ranking` over the prompts that have at least one strict pair.

    Args:
      batch: rows of `data.ComparisonRows` or of `data.PackedComparisonRows`.
      key: key of residual dropout; None turns dropout off.
      config, shard: bound by `functools.partial` in the script.

    Returns:
      (mean, (number of those prompts, metrics)). `rm/accuracy` is the share of a prompt's strict
      pairs that the scores order as the ranks do, averaged over the prompts.
    """
    score_BK = score(params, config, batch, key=key, shard=shard)
    if "last_BCK" in batch:  # the C comparisons of a packed row become rows of their own
        names = ("ranks_BCK", "mask_BCK", "margin_BC", "confidence_BC")
        ranks_BK, mask_BK, margin_B, confidence_B = (jnp.concatenate(batch[x]) for x in names)
        score_BK = jnp.concatenate(score_BK)
    else:
        names = ("ranks_BK", "mask_BK", "margin_B", "confidence_B")
        ranks_BK, mask_BK, margin_B, confidence_B = (batch[x] for x in names)
    pairs_BKK = losses.strict_pairs(ranks_BK, mask_BK)
    counts_B = jnp.any(pairs_BKK, axis=(1, 2)).astype(jnp.float32)
    loss_B = losses.pairwise_ranking(score_BK, ranks_BK, mask_BK, margin_B, confidence_B)
    right_BKK = score_BK[:, :, None] > score_BK[:, None, :]
    mean = masked_mean(loss_B, counts_B)
    accuracy = masked_mean(masked_mean(right_BKK, pairs_BKK, axis=(1, 2)), counts_B)
    return mean, (jnp.sum(counts_B), {"rm/loss": mean, "rm/accuracy": accuracy})


def center(params: Params, mean_score: jax.Array | float) -> Params:
    """Shifts the bias so that responses with a mean score of `mean_score` get a mean of 0.

    InstructGPT, section 3.5: labeler demonstrations have a mean score of 0 before RL.
    """
    kernel, bias = params["score"]["kernel"], params["score"]["bias"]
    return {**params, "score": {"kernel": kernel, "bias": bias - mean_score}}
