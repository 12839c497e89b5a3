"""From scores and log-probabilities to advantages, as array operations.

All arrays are response-aligned, [B, R]: column r belongs to the r-th response token. A mask is a
prefix of ones. Inputs outside the mask may have any value, and outputs outside the mask are 0.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instructjax.masked import masked_mean

KLKind = Literal["k1", "k2", "k3"]
MissingEOS = Literal["none", "penalty", "fixed"]


def kl_estimate(logp_BR: jax.Array, ref_logp_BR: jax.Array, kind: KLKind = "k1") -> jax.Array:
    """Estimates KL(policy || reference) from tokens that the policy sampled.

    With log r = ref_logp - logp (Schulman, "Approximating KL divergence", 2020):

    k1 = -log r: unbiased, of either sign; the one in the paper's reward (InstructGPT, eq. 2)
    k2 = (log r)^2 / 2: biased, never negative
    k3 = r - 1 - log r: unbiased, never negative

    Args:
      logp_BR, ref_logp_BR: at the temperature of sampling.

    Returns:
      kl_BR, in nats a token.
    """
    chex.assert_equal_shape([logp_BR, ref_logp_BR])
    log_ratio_BR = ref_logp_BR - logp_BR
    if kind == "k1":
        return -log_ratio_BR
    if kind == "k2":
        return log_ratio_BR**2 / 2
    if kind == "k3":
        return jnp.expm1(log_ratio_BR) - log_ratio_BR
    raise ValueError(f"kl_estimate: kind {kind!r} is not k1, k2 or k3")


def score_ended(
    score_B: jax.Array, ended_B: jax.Array, missing_eos: MissingEOS, value: float
) -> jax.Array:
    """The score of responses that ran out of length before EOS; the paper is silent on it.

    none: the reward model's, whatever it reads at the last token
    penalty: that, less `value`
    fixed: `value` in its place (lm-human-preferences: -1)

    Args:
      score_B: of each response.
      ended_B: bool, whether its last live token is an EOS.
    """
    chex.assert_equal_shape([score_B, ended_B])
    if missing_eos == "none":
        return score_B
    if missing_eos == "penalty":
        return jnp.where(ended_B, score_B, score_B - value)
    if missing_eos == "fixed":
        return jnp.where(ended_B, score_B, value)
    raise ValueError(f"missing_eos {missing_eos!r} is not none, penalty or fixed")


def token_rewards(
    score_B: jax.Array, kl_BR: jax.Array, mask_BR: jax.Array, beta: jax.Array | float
) -> jax.Array:
    """What each token is paid: the KL penalty everywhere, the score at the last live token.

    reward[b, r] = -beta kl[b, r] + score[b] [r is the last live token of b]   (InstructGPT, eq. 2)

    Args:
      score_B: float; of a row without a live token it is not paid.
      kl_BR: `kl_estimate`.
      beta: nats to reward; the paper's is 0.02.

    Returns:
      reward_BR, float32; it sums to objective/reward = score - beta kl.
    """
    chex.assert_rank([score_B, kl_BR, mask_BR], [1, 2, 2])
    chex.assert_equal_shape([kl_BR, mask_BR])
    live_BR = mask_BR != 0
    after_BR = jnp.pad(live_BR[:, 1:], ((0, 0), (0, 1)))  # whether the next token is live
    paid_BR = jnp.where(live_BR & ~after_BR, score_B[:, None].astype(jnp.float32), 0)
    return paid_BR - jnp.where(live_BR, beta * kl_BR, 0)


def gae(
    rewards_BR: jax.Array,
    values_BR: jax.Array,
    mask_BR: jax.Array,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    delta[r] = reward[r] + gamma V[r + 1] - V[r]
    A[r] = delta[r] + gamma lam A[r + 1]

    V and A are 0 after the last live token: a response that was cut is not bootstrapped.

    Args:
      rewards_BR: `token_rewards`.
      values_BR: of the state before each token.
      gamma: discount; the paper has none.
      lam: the paper is silent; 0.95 in the earlier OpenAI code.

    Returns:
      (advantages_BR, returns_BR), returns = advantages + values; both 0 where masked.
    """
    chex.assert_rank([rewards_BR, values_BR, mask_BR], 2)
    chex.assert_equal_shape([rewards_BR, values_BR, mask_BR])
    live_BR = mask_BR != 0
    rewards_BR, values_BR = (jnp.where(live_BR, x, 0) for x in (rewards_BR, values_BR))
    next_values_BR = jnp.pad(values_BR[:, 1:], ((0, 0), (0, 1)))
    delta_BR = rewards_BR + gamma * next_values_BR - values_BR

    def back(advantage_B, delta_B):
        advantage_B = delta_B + gamma * lam * advantage_B
        return advantage_B, advantage_B

    # Behind the mask delta is 0, so the recursion enters a response with 0.
    start_B = jnp.zeros(delta_BR.shape[0], delta_BR.dtype)
    advantages_BR = jax.lax.scan(back, start_B, delta_BR.T, reverse=True)[1].T
    return advantages_BR, advantages_BR + values_BR


def whiten(x_BR: jax.Array, mask_BR: jax.Array, shift_mean: bool) -> jax.Array:
    """Scales the live entries to variance 1, over the whole array.

    Args:
      x_BR: of a whole rollout: whitening shares of it would be another algorithm.
      shift_mean: to mean 0 too, as advantages are; rewards keep theirs, or what the policy is
        paid on average would be lost.
    """
    mean = masked_mean(x_BR, mask_BR)
    variance = masked_mean((x_BR - mean) ** 2, mask_BR)
    white_BR = (x_BR - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask_BR != 0, white_BR if shift_mean else white_BR + mean, 0)


def adapt_beta(
    beta: jax.Array | float,
    kl: jax.Array | float,
    episodes: jax.Array | int,
    *,
    target: float,
    horizon: float,
) -> jax.Array:
    """The adaptive KL controller (Ziegler et al. 2019, eq. 3): beta follows a target KL.

    e = clip(kl / target - 1, -0.2, 0.2);  beta *= 1 + e episodes / horizon

    Args:
      kl: objective/kl: summed over a response, averaged over responses, in nats. A target for
        KL averaged over tokens is another number.
      episodes: responses of the iteration.
      target, horizon: 6 nats and 10,000 episodes in the earlier OpenAI code.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return beta * (1 + error * episodes / horizon)
