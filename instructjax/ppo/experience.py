"""Computes rewards, advantages and returns from a scored rollout."""

import jax
import jax.numpy as jnp

from instructjax import advantages
from instructjax.masked import masked_mean, masked_sum
from instructjax.train import Metrics


def make_experience(
    *,
    logp_BR: jax.Array,
    ref_logp_BR: jax.Array | None,
    value_BR: jax.Array,
    mask_BR: jax.Array,
    score_B: jax.Array,
    ended_B: jax.Array,
    beta: jax.Array,
    gamma: float = 1.0,
    lam: float = 0.95,
    missing_eos: advantages.MissingEOS = "none",
    missing_eos_value: float = 1.0,
    clip_score: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[dict[str, jax.Array], Metrics]:
    """Rewards, advantages and returns of a whole rollout, from all devices at once.

    Args:
      logp_BR: log-probabilities under the policy that sampled, at the sampling temperature.
      ref_logp_BR: the same under the reference; None: no KL penalty and no KL metrics.
      value_BR: V of the state before each token.
      mask_BR: 1 at live tokens, EOS included.
      score_B: the reward of each whole response.
      ended_B: whether the last live token of a response is an EOS.
      beta: coefficient of the KL penalty.
      missing_eos, missing_eos_value: see `advantages.score_ended`.
      clip_score: scores are clipped to [-clip_score, clip_score].
      whiten_rewards: scale rewards to variance 1 and keep their mean.
      whiten_advantages: shift and scale advantages to mean 0 and variance 1.

    Returns:
      ({"advantage_BR", "return_BR"}, metrics by the field's names)
    """
    live_B = jnp.any(mask_BR != 0, axis=1)
    score_B = advantages.score_ended(score_B, ended_B, missing_eos, missing_eos_value)
    if clip_score is not None:
        score_B = jnp.clip(score_B, -clip_score, clip_score)
    kl_BR = jnp.zeros_like(logp_BR)
    if ref_logp_BR is not None:
        kl_BR = advantages.kl_estimate(logp_BR, ref_logp_BR)
    reward_BR = advantages.token_rewards(score_B, kl_BR, mask_BR, beta)
    scaled_BR = reward_BR
    if whiten_rewards:
        scaled_BR = advantages.whiten(reward_BR, mask_BR, shift_mean=False)
    advantage_BR, return_BR = advantages.gae(scaled_BR, value_BR, mask_BR, gamma, lam)

    def response_mean(x_BR: jax.Array) -> jax.Array:  # summed over a response, then averaged
        return masked_mean(masked_sum(x_BR, mask_BR, axis=1), live_B)

    length_B = jnp.sum(mask_BR != 0, axis=1, dtype=jnp.int32)
    score_mean, return_mean = masked_mean(score_B, live_B), masked_mean(return_BR, mask_BR)
    return_variance = masked_mean((return_BR - return_mean) ** 2, mask_BR)
    value_error = masked_mean((return_BR - value_BR) ** 2, mask_BR)
    metrics = {
        "objective/score": score_mean,
        "objective/score_std": jnp.sqrt(masked_mean((score_B - score_mean) ** 2, live_B)),
        "objective/reward": response_mean(reward_BR),
        # -log p of the sampled tokens: an unbiased estimate that needs no other logits.
        "objective/entropy": response_mean(-logp_BR),
        # As in lm-human-preferences: a constant error counts against the value net.
        "value/explained_variance": 1 - value_error / jnp.maximum(return_variance, 1e-8),
        "value/mean": masked_mean(value_BR, mask_BR),
        "rollout/length": masked_mean(length_B.astype(jnp.float32), live_B),
        "rollout/eos_fraction": masked_mean(ended_B.astype(jnp.float32), live_B),
    }
    if ref_logp_BR is not None:
        metrics |= {
            "objective/kl": response_mean(kl_BR),
            "objective/kl_k3": response_mean(advantages.kl_estimate(logp_BR, ref_logp_BR, "k3")),
            "objective/beta": beta,
        }
    if whiten_advantages:
        advantage_BR = advantages.whiten(advantage_BR, mask_BR, shift_mean=True)
    return {"advantage_BR": advantage_BR, "return_BR": return_BR}, metrics
