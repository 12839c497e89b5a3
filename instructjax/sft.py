"""Supervised fine-tuning and pretraining: the loss of packed rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from instructjax import models
from instructjax.models import ModelConfig, Params, Shard
from instructjax.train import Batch, Metrics


def loss_fn(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean negative log-likelihood of the target tokens, each given the tokens before it.

    The targets of a demonstration are its completion with EOS, those of a text all tokens but the
    first (InstructGPT, section 3.5: SFT, and the pretraining data mixed into it).

    Args:
      batch: rows of `data.PackedRows`: tokens_BT, segments_BT, positions_BT and mask_BT, which is
        True where a token is a target.
      key: key of residual dropout at config.dropout; None turns dropout off.
      config, shard: bound by `functools.partial` in the script.

    Returns:
      (mean in nats per token, (number of targets, metrics)).
    """
    tokens_BT = batch["tokens_BT"]
    hidden_BTD = models.apply(
        params,
        config,
        tokens_BT,
        mask_BT=batch["segments_BT"] != 0,
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
        key=key,
        shard=shard,
    )
    # The shift by one: the state at t predicts the token at t + 1. The last state predicts none.
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = target_weights(batch)
    unembed_VD = models.unembedding(params)
    total: Any = models.cross_entropy(
        hidden_BTD, unembed_VD, targets_BT, weights_BT, config, None, shard
    )
    weight = jnp.sum(weights_BT)
    mean = total / jnp.maximum(weight, 1)
    return mean, (weight, {"sft/loss": mean})


def target_weights(batch: Batch) -> jax.Array:
    """Weights of the targets, float32 weights_BT: the tokens' mask, one column earlier."""
    return jnp.roll(batch["mask_BT"], -1, axis=1).at[:, -1].set(False).astype(jnp.float32)


def count_targets(batches: Sequence[dict[str, Any]]) -> jax.Array:
    """Tokens that count as targets in all batches together, float32 []."""
    return sum((jnp.sum(target_weights(batch)) for batch in batches), jnp.zeros(()))
