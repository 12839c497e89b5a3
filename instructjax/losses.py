"""Losses as functions of arrays: no parameters, no config, no reduction, no stop_gradient."""

import chex
import jax
import jax.numpy as jnp


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
