"""What PPO-ptx minimises (InstructGPT, section 3.5, eq. 2): the policy, value and ptx losses.

Each function is a `train.LossFn` once its keywords are bound. A batch is rows of a rollout as in
rollout.py, with the experience of `make_experience`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax import losses, models, rollout, sft, sharding
from instructjax.masked import masked_mean
from instructjax.models import ModelConfig, Params, Shard
from instructjax.train import Batch, Metrics

# (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR, as `losses.ppo_clip`
PolicyLoss = Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]
LossOutput = tuple[jax.Array, tuple[jax.Array, Metrics]]  # (mean, (live tokens, metrics))


def policy_loss(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> LossOutput:
    """The mean of PPO's clipped loss over the live response tokens.

    Args:
      batch: rows of a rollout, with logp_BR of the policy that sampled and advantage_BR.
      key: not used, since dropout is off in PPO.
      loss: (logp_BR, old_logp_BR, advantages_BR, clip) -> loss_BR.
    """
    del key
    logp_BR = rollout.token_logp(params, batch, config=config, temperature=temperature, shard=shard)
    logp_BR = _live_or(logp_BR, batch["logp_BR"], batch)
    loss_BR = loss(logp_BR, batch["logp_BR"], batch["advantage_BR"], clip)
    mean = masked_mean(loss_BR, batch["mask_BR"])
    return mean, (_live_tokens(batch), _policy_metrics(mean, logp_BR, batch, clip))


def value_loss(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    clip: float = 0.2,
    shard: Shard = models.unsharded,
) -> LossOutput:
    """The mean of the clipped value loss over the live response tokens.

    Args:
      batch: rows of a rollout, with value_BR of the rollout's value net and return_BR.
      key: not used.
    """
    del key
    value_BR = rollout.token_values(params, batch, config=config, shard=shard)
    mean, metrics = _value_terms(value_BR, batch, clip)
    return mean, (_live_tokens(batch), metrics)


def joint_loss(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    loss: PolicyLoss = losses.ppo_clip,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> LossOutput:
    """policy loss + value_coef * value loss on one trunk (lm-human-preferences).

    Args:
      params: a policy with a `value_head`; see `with_value_head`.
    """
    del key
    hidden_BRD = rollout.hidden_states(params, config, batch, shard)
    unembed_VD = models.unembedding(params)
    logp_BR = models.token_logp(
        hidden_BRD, unembed_VD, batch["tokens_BR"], config, temperature=temperature, shard=shard
    )
    logp_BR = _live_or(logp_BR, batch["logp_BR"], batch)
    loss_BR = loss(logp_BR, batch["logp_BR"], batch["advantage_BR"], clip)
    mean = masked_mean(loss_BR, batch["mask_BR"])
    metrics = _policy_metrics(mean, logp_BR, batch, clip)
    value_mean, value_metrics = _value_terms(
        _head_values(params, hidden_BRD, config), batch, value_clip
    )
    return mean + value_coef * value_mean, (_live_tokens(batch), metrics | value_metrics)


def ptx_loss(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    *,
    config: ModelConfig,
    shard: Shard = models.unsharded,
) -> LossOutput:
    """The language-modelling loss of pretraining text, a mean over tokens (ours: paper silent).

    Args:
      batch: rows of `data.PackedRows`.
      key: not used.
    """
    mean, (tokens, _) = sft.loss_fn(params, batch, key, config=config, shard=shard)
    return mean, (tokens, {"ptx/loss": mean})


# ---- the value head on the policy's trunk ----


def with_value_head(params: Params, width: int, mesh: Mesh) -> Params:
    """The policy with a value head of zeros on its trunk (lm-human-preferences)."""
    head = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    return {**params, "value_head": sharding.put(head, sharding.replicated(mesh))}


def without_value_head(params: Params) -> Params:
    """The policy alone, as it is sampled and exported."""
    return {name: leaf for name, leaf in params.items() if name != "value_head"}


def head_values(
    params: Params, batch: Batch, *, config: ModelConfig, shard: Shard = models.unsharded
) -> jax.Array:
    """value_BR from the head of `with_value_head`, 0 where masked."""
    hidden_BRD = rollout.hidden_states(params, config, batch, shard)
    return _live_or(_head_values(params, hidden_BRD, config), 0, batch)


# ---- shared parts ----


def _head_values(params: Params, hidden_BRD: jax.Array, config: ModelConfig) -> jax.Array:
    config = dataclasses.replace(config, scalar_head=True)
    return models.scalars({"score": params["value_head"]}, config, hidden_BRD)


def _live_or(x_BR: jax.Array, masked_BR: jax.Array | int, batch: Batch) -> jax.Array:
    """x where the mask is 1. What is masked must not overflow: 0 * inf would be a NaN gradient."""
    return jnp.where(batch["mask_BR"] != 0, x_BR, masked_BR)


def _live_tokens(batch: Batch) -> jax.Array:
    return jnp.sum(batch["mask_BR"] != 0, dtype=jnp.float32)


def _policy_metrics(mean: jax.Array, logp_BR: jax.Array, batch: Batch, clip: float) -> Metrics:
    mask_BR = batch["mask_BR"]
    change_BR = logp_BR - batch["logp_BR"]
    ratio_BR = jnp.exp(change_BR)
    clipped_BR = (jnp.abs(ratio_BR - 1) > clip).astype(jnp.float32)
    return {
        "policy/loss": mean,
        "policy/ratio": masked_mean(ratio_BR, mask_BR),
        "policy/approx_kl": masked_mean(change_BR**2 / 2, mask_BR),
        "policy/clip_fraction": masked_mean(clipped_BR, mask_BR),
        "policy/logp_change": masked_mean(jnp.abs(change_BR), mask_BR),
    }


def _value_terms(value_BR: jax.Array, batch: Batch, clip: float) -> tuple[jax.Array, Metrics]:
    mask_BR, old_BR = batch["mask_BR"], batch["value_BR"]
    value_BR = _live_or(value_BR, old_BR, batch)
    mean = masked_mean(losses.value_clip(value_BR, old_BR, batch["return_BR"], clip), mask_BR)
    clipped_BR = (jnp.abs(value_BR - old_BR) > clip).astype(jnp.float32)
    return mean, {"value/loss": mean, "value/clip_fraction": masked_mean(clipped_BR, mask_BR)}
