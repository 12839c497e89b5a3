"""What PPO-ptx minimises, over rows as in responses.py (InstructGPT, section 3.5, eq. 2)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax import losses, models, rollout, sft, sharding
from instructjax.masked import masked_mean
from instructjax.models import ModelConfig, Params, Shard
from instructjax.rollout import Rows
from instructjax.train import Metrics

# (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR, as `losses.ppo_clip`
PolicyLoss = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]
ValueLoss = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]


def policy_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean of an array loss over response tokens; a `train.LossFn` once its keywords are bound.

    Args:
      rows: those of a rollout, with the behaviour's logp_BR and advantage_BR.
      key: not used: dropout is off in PPO.
      loss: (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR.
    """
    del key
    logp_BR = rollout.token_logp(params, rows, config=config, temperature=temperature, shard=shard)
    mean, metrics = _policy_terms(logp_BR, rows, loss, clip)
    return mean, (_tokens(rows), metrics)


def value_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: ValueLoss = losses.value_clip,
    clip: float = 0.2,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Mean of an array loss over response tokens; see `policy_loss`.

    Args:
      rows: those of a rollout, with value_BR of the time of the rollout and return_BR.
      loss: (value_BR, old_value_BR, return_BR, clip) -> loss_BR.
    """
    del key
    value_BR = rollout.token_values(params, rows, config=config, shard=shard)
    mean, metrics = _value_terms(value_BR, rows, loss, clip)
    return mean, (_tokens(rows), metrics)


def joint_loss(
    params: Params,
    rows: Rows,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Policy and value loss over one trunk, as in lm-human-preferences: `policy + coef * value`.

    Args:
      params: of a policy, with `value_head` beside its own leaves; see `with_value_head`.
    """
    del key
    hidden_BRD = rollout.hidden_states(params, config, rows, shard)
    unembed_VD = models.unembedding(params)
    logp_BR = models.token_logp(
        hidden_BRD, unembed_VD, rows["tokens_BR"], config, temperature=temperature, shard=shard
    )
    policy, policy_metrics = _policy_terms(logp_BR, rows, loss, clip)
    value_BR = _head_values(params, hidden_BRD, config)
    value, value_metrics = _value_terms(value_BR, rows, losses.value_clip, value_clip)
    return policy + value_coef * value, (_tokens(rows), policy_metrics | value_metrics)


def ptx_loss(
    params: Params,
    batch: dict[str, Any],
    key: jax.Array | None,
    *,
    config: ModelConfig,
    shard: Shard = models.unsharded,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """The language-modelling loss of pretraining text, a mean over tokens (ours: paper silent)."""
    mean, (tokens, _) = sft.loss_fn(params, batch, key, config=config, shard=shard)
    return mean, (tokens, {"ptx/loss": mean})


def with_value_head(params: Params, width: int, mesh: Mesh) -> Params:
    """A policy with a value head of zeros on its trunk (lm-human-preferences)."""
    head = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    return {**params, "value_head": jax.device_put(head, sharding.replicated(mesh))}


def without_value_head(params: Params) -> Params:
    """The policy alone, as it is exported."""
    return {name: leaf for name, leaf in params.items() if name != "value_head"}


def head_values(
    params: Params, rows: Rows, *, config: ModelConfig, shard: Shard = models.unsharded
) -> jax.Array:
    """value_BR of the head that `with_value_head` put on the trunk, 0 where masked."""
    hidden_BRD = rollout.hidden_states(params, config, rows, shard)
    return jnp.where(rows["mask_BR"] != 0, _head_values(params, hidden_BRD, config), 0)


def _head_values(params: Params, hidden_BRD: jax.Array, config: ModelConfig) -> jax.Array:
    config = dataclasses.replace(config, scalar_head=True)
    return models.scalars({"score": params["value_head"]}, config, hidden_BRD)


def _policy_terms(logp_BR: jax.Array, rows: Rows, loss: PolicyLoss, clip: float) -> Any:
    mask_BR, old_BR = rows["mask_BR"], rows["logp_BR"]
    # What is behind the mask must not overflow: 0 * inf in the backward pass would be NaN.
    logp_BR = jnp.where(mask_BR != 0, logp_BR, old_BR)
    mean = masked_mean(loss(logp_BR, old_BR, rows["advantage_BR"], clip), mask_BR)
    change_BR = logp_BR - old_BR
    ratio_BR = jnp.exp(change_BR)
    clipped_BR = (jnp.abs(ratio_BR - 1) > clip).astype(jnp.float32)
    return mean, {
        "policy/loss": mean,
        "policy/ratio": masked_mean(ratio_BR, mask_BR),
        "policy/approx_kl": masked_mean(change_BR**2 / 2, mask_BR),
        "policy/clip_fraction": masked_mean(clipped_BR, mask_BR),
        "policy/logp_change": masked_mean(jnp.abs(change_BR), mask_BR),
    }


def _value_terms(value_BR: jax.Array, rows: Rows, loss: ValueLoss, clip: float) -> Any:
    mask_BR, old_BR = rows["mask_BR"], rows["value_BR"]
    value_BR = jnp.where(mask_BR != 0, value_BR, old_BR)  # see _policy_terms
    mean = masked_mean(loss(value_BR, old_BR, rows["return_BR"], clip), mask_BR)
    clipped_BR = (jnp.abs(value_BR - old_BR) > clip).astype(jnp.float32)
    return mean, {"value/loss": mean, "value/clip_fraction": masked_mean(clipped_BR, mask_BR)}


def _tokens(rows: Rows) -> jax.Array:
    return jnp.sum(rows["mask_BR"] != 0, dtype=jnp.float32)
