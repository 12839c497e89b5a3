"""One token of each row: the largest of restricted logits plus noise."""

import functools

import jax
import jax.numpy as jnp

from instructjax.models.attention import NEG_INF


def noise(
    key: jax.Array,
    number_B: jax.Array,
    sample_B: jax.Array,
    position_B: jax.Array,
    vocab_size: int,
    width: int,
) -> jax.Array:
    """Gumbel noise that depends on (key, number, sample index, position) alone.

    Args:
      number_B: see `indices` of `generate`.
      position_B: in the response, from 0.
      vocab_size: real tokens, so that padding of the vocabulary changes no draw.
      width: of the logits; the noise of their padding is 0.

    Returns:
      noise_BV, float32.
    """

    def row_noise(*counters):
        row_key = functools.reduce(jax.random.fold_in, counters, key)
        return jnp.pad(jax.random.gumbel(row_key, (vocab_size,)), (0, width - vocab_size))

    return jax.vmap(row_noise)(number_B, sample_B, position_B)


def restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """-inf outside the k likeliest tokens, then outside the nucleus of probability p.

    Ties stay: a token as likely as the last one kept is kept too.
    """
    if 0 < top_k < logits_BV.shape[1]:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        kept_BV = _likeliest(p_BV, jnp.ones_like(p_BV), top_k)
        logits_BV = jnp.where(kept_BV, logits_BV, NEG_INF)
    if top_p < 1:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        logits_BV = jnp.where(_likeliest(p_BV, p_BV, top_p), logits_BV, NEG_INF)
    return logits_BV


def _likeliest(p_BV: jax.Array, weight_BV: jax.Array, enough: float) -> jax.Array:
    """True at the fewest likeliest tokens whose weights sum to `enough`.

    Bisects on the bits of the probabilities, which have the order of the probabilities. A sort of
    the vocabulary takes longer than the model on CPU, and would gather a split vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(p_BV, jnp.int32)

    def halve(_, bounds):
        low_B, high_B = bounds  # tokens from low up are enough, from high up are not
        middle_B = low_B + (high_B - low_B) // 2
        total_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0), axis=-1)
        is_enough_B = total_B >= enough
        return jnp.where(is_enough_B, middle_B, low_B), jnp.where(is_enough_B, high_B, middle_B)

    zero_B, infinity = jnp.zeros(len(p_BV), jnp.int32), 0x7F800000
    least_B, _ = jax.lax.fori_loop(0, 31, halve, (zero_B, zero_B + infinity))
    return bits_BV >= least_B[:, None]


def argmax(x_BV: jax.Array) -> jax.Array:
    """As jnp.argmax, which on CPU would fuse all that computes x into a scalar loop over V."""
    x_BV = jax.lax.optimization_barrier(x_BV)
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    best_B1 = jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(x_BV == best_B1, ids_BV, x_BV.shape[1]), axis=-1)
