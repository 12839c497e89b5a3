"""Losses as functions of arrays: no parameters, no config, no reduction, no stop_gradient."""

import chex
import jax
import jax.numpy as jnp

from instructjax.masked import masked_sum


def token_cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target token.

    l[b, t] = -log softmax(logits[b, t])[targets[b, t]]

    Holds the logits, so it is for small vocabularies and for reading; training uses
    `models.cross_entropy`, which does not.

    Args:
      logits_BTV: float.
      targets_BT: int32 in [0, V).

    Returns:
      nll_BT in nats, float32.
    """
    chex.assert_rank([logits_BTV, targets_BT], [3, 2])
    logp_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]


def strict_pairs(ranks_BK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """True at [b, w, l] where response w of prompt b was ranked better than l; ties are not."""
    chex.assert_equal_shape([ranks_BK, mask_BK])
    live_BK = mask_BK != 0
    better_BKK = ranks_BK[:, :, None] < ranks_BK[:, None, :]
    return better_BKK & live_BK[:, :, None] & live_BK[:, None, :]


def pairwise_ranking(
    scores_BK: jax.Array,
    ranks_BK: jax.Array,
    mask_BK: jax.Array,
    margin_B: jax.Array | None = None,
    confidence_B: jax.Array | None = None,
) -> jax.Array:
    """The reward model's loss, all pairs of a prompt as one element (InstructGPT, eq. 1).

    l[b] = -1 / C(K, 2) sum over w better than l of log sigmoid(s[b, w] - s[b, l] - margin[b])

    With a confidence c below 1, log sigmoid(x) becomes c log sigmoid(x) + (1 - c) log sigmoid(-x).

    Ties are dropped, yet C(K, 2) counts all pairs of the responses present, as printed. A prompt
    of ties alone gives 0 and no gradient.

    Args:
      scores_BK: the reward model's scalars.
      ranks_BK: int, 1 is best, equal ranks are ties.
      mask_BK: whether the slot holds a response.
      margin_B: how much better the winner has to be (Llama 2, eq. 2); default 0.
      confidence_B: probability that the winner is better, from 0.5: a soft label, as a model gives
        it (Lee et al. 2023, arXiv 2309.00267); default 1.

    Returns:
      loss_B.
    """
    chex.assert_rank([scores_BK, ranks_BK, mask_BK], 2)
    chex.assert_equal_shape([scores_BK, ranks_BK, mask_BK])
    pairs_BKK = strict_pairs(ranks_BK, mask_BK)
    # An empty slot's score may be anything: it is cut off before the sigmoid, not after.
    gap_BKK = jnp.where(pairs_BKK, scores_BK[:, :, None] - scores_BK[:, None, :], 0)
    if margin_B is not None:
        gap_BKK -= margin_B[:, None, None]
    loss_BKK = -jax.nn.log_sigmoid(gap_BKK)
    if confidence_B is not None:
        share_BKK = confidence_B[:, None, None]
        loss_BKK = share_BKK * loss_BKK - (1 - share_BKK) * jax.nn.log_sigmoid(-gap_BKK)
    loss_B = masked_sum(loss_BKK, pairs_BKK, axis=(1, 2))
    present_B = jnp.sum(mask_BK != 0, axis=1)
    return loss_B / jnp.maximum(present_B * (present_B - 1) / 2, 1)


def ppo_clip(
    logp_BR: jax.Array, old_logp_BR: jax.Array, advantages_BR: jax.Array, clip: float
) -> jax.Array:
    """PPO's clipped policy loss (Schulman et al. 2017, eq. 7).

    l[b, r] = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)),  ratio = exp(logp - old_logp)

    Args:
      logp_BR: of each response token under the policy in training.
      old_logp_BR: under the policy that sampled it, at the same temperature.
      advantages_BR: float.
      clip: 0.2 in the paper (App. C.4).

    Returns:
      loss_BR.
    """
    chex.assert_rank([logp_BR, old_logp_BR, advantages_BR], 2)
    chex.assert_equal_shape([logp_BR, old_logp_BR, advantages_BR])
    ratio_BR = jnp.exp(logp_BR - old_logp_BR)
    clipped_BR = jnp.clip(ratio_BR, 1 - clip, 1 + clip)
    return jnp.maximum(-advantages_BR * ratio_BR, -advantages_BR * clipped_BR)


def value_clip(
    values_BR: jax.Array, old_values_BR: jax.Array, returns_BR: jax.Array, clip: float
) -> jax.Array:
    """The value loss, clipped about the values of the rollout (openai/baselines, ppo2).

    l[b, r] = max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2) / 2

    Args:
      values_BR: of the state before each response token.
      old_values_BR: when the rollout was made.
      returns_BR: G, of `advantages.gae`.
      clip: the paper is silent; 0.2 in the earlier OpenAI code. Infinity turns it off.

    Returns:
      loss_BR.
    """
    chex.assert_rank([values_BR, old_values_BR, returns_BR], 2)
    chex.assert_equal_shape([values_BR, old_values_BR, returns_BR])
    near_BR = jnp.clip(values_BR, old_values_BR - clip, old_values_BR + clip)
    return jnp.maximum((values_BR - returns_BR) ** 2, (near_BR - returns_BR) ** 2) / 2


def dpo(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    beta: float,
) -> jax.Array:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7).

    l[b] = -log sigmoid(beta ((log pi - log ref)(chosen) - (log pi - log ref)(rejected)))

    Args:
      chosen_logp_B, rejected_logp_B: summed over the response's tokens, EOS included.
      ref_chosen_logp_B, ref_rejected_logp_B: the same under the reference.
      beta: strength of the pull to the reference; 0.1 is usual.

    Returns:
      loss_B.
    """
    arrays = [chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B]
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    chosen_B = chosen_logp_B - ref_chosen_logp_B
    rejected_B = rejected_logp_B - ref_rejected_logp_B
    return -jax.nn.log_sigmoid(beta * (chosen_B - rejected_B))
