"""From a scored rollout to what an update needs: rewards, advantages, returns."""

import jax
import jax.numpy as jnp

from instructjax import advantages
from instructjax.masked import masked_mean, masked_sum
from instructjax.train import Metrics


def make_experience(
    logp_BR: jax.Array,
    ref_logp_BR: jax.Array,
    value_BR: jax.Array,
    mask_BR: jax.Array,
    score_B: jax.Array,
    ended_B: jax.Array,
    beta: jax.Array,
    *,
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
      logp_BR, ref_logp_BR: of the policy that sampled and of the reference, at the temperature of
        sampling.
      value_BR: of the state before each token.
      mask_BR: live tokens, EOS included.
      score_B: of each whole response.
      ended_B: whether its last live token is an EOS.
      beta: of the KL penalty.
      missing_eos, missing_eos_value: see `advantages.score_ended`.
      clip_score: scores are clipped to +- this.
      whiten_rewards: to variance 1, the mean kept.

    Returns:
      (advantage_BR and return_BR, metrics by the field's names)
    """
    live_B = jnp.any(mask_BR != 0, axis=1)
    score_B = advantages.score_ended(score_B, ended_B, missing_eos, missing_eos_value)
    if clip_score is not None:
        score_B = jnp.clip(score_B, -clip_score, clip_score)
    kl_BR = advantages.kl_estimate(logp_BR, ref_logp_BR)
    reward_BR = advantages.token_rewards(score_B, kl_BR, mask_BR, beta)
    paid_BR = (
        advantages.whiten(reward_BR, mask_BR, shift_mean=False) if whiten_rewards else reward_BR
    )
    advantage_BR, return_BR = advantages.gae(paid_BR, value_BR, mask_BR, gamma, lam)

    def summed(x_BR: jax.Array) -> jax.Array:  # over a response, averaged over responses
        return masked_mean(masked_sum(x_BR, mask_BR, axis=1), live_B)

    length_B = jnp.sum(mask_BR != 0, axis=1, dtype=jnp.int32)
    return_mean = masked_mean(return_BR, mask_BR)
    return_variance = masked_mean((return_BR - return_mean) ** 2, mask_BR)
    error = masked_mean((return_BR - value_BR) ** 2, mask_BR)
    metrics = {
        "objective/score": masked_mean(score_B, live_B),
        "objective/score_std": jnp.sqrt(
            masked_mean((score_B - masked_mean(score_B, live_B)) ** 2, live_B)
        ),
        "objective/kl": summed(kl_BR),
        "objective/kl_k3": summed(advantages.kl_estimate(logp_BR, ref_logp_BR, "k3")),
        "objective/beta": beta,
        "objective/reward": summed(reward_BR),
        # The sampled tokens' own surprise: an unbiased estimate that costs nothing.
        "objective/entropy": summed(-logp_BR),
        # As lm-human-preferences: a constant error counts against the value net.
        "value/explained_variance": 1 - error / jnp.maximum(return_variance, 1e-8),
        "value/mean": masked_mean(value_BR, mask_BR),
        "rollout/length": masked_mean(length_B.astype(jnp.float32), live_B),
        "rollout/eos_fraction": masked_mean(ended_B.astype(jnp.float32), live_B),
    }
    if whiten_advantages:
        advantage_BR = advantages.whiten(advantage_BR, mask_BR, shift_mean=True)
    return {"advantage_BR": advantage_BR, "return_BR": return_BR}, metrics
