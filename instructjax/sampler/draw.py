"""One token of each row: the largest of restricted logits plus noise."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instructjax.models.attention import NEG_INF


class Distribution(NamedTuple):
    """What tokens are drawn from. The numbers are traced: others need no other program."""

    temperature: Any  # float32 []; 0: the likeliest token is taken
    top_k: Any = None  # int32 []; 0: all tokens; None: all, and no work for it
    top_p: Any = None  # float32 []; 1: all tokens; None: all, and no work for it

    @classmethod
    def create(
        cls, temperature: float, top_k: int | None = None, top_p: float | None = None
    ) -> "Distribution":
        """A distribution whose numbers have been checked.

        Raises:
          ValueError: a number is out of range.
        """
        if temperature < 0 or (top_k or 0) < 0 or not 0 < (1 if top_p is None else top_p) <= 1:
            raise ValueError(
                f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature and top_k"
                " must not be negative, and top_p must be in (0, 1]"
            )
        kinds = np.float32, np.int32, np.float32
        numbers = zip(kinds, (temperature, top_k, top_p), strict=True)
        return cls(*(None if number is None else kind(number) for kind, number in numbers))

    @property
    def divisor(self) -> jax.Array:
        """What logits are divided by. Log-probabilities at temperature 0 are those at 1."""
        return jnp.where(self.temperature > 0, self.temperature, 1)


def draw(logits_BV: jax.Array, noise_BV: jax.Array, distribution: Distribution) -> jax.Array:
    """token_B.

    Args:
      logits_BV: divided by `distribution.divisor`.
      noise_BV: from `noise`.
    """
    temperature, top_k, top_p = distribution
    noise_BV = jnp.where(temperature > 0, noise_BV, 0)
    return argmax(restrict(logits_BV, top_k, top_p) + noise_BV)


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


def restrict(logits_BV: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """-inf outside the k likeliest tokens, then outside the nucleus of probability p.

    Ties stay: a token as likely as the last one kept is kept too.

    Args:
      top_k, top_p: see `Distribution`.
    """
    if top_k is not None:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        enough = jnp.where(top_k > 0, top_k, jnp.inf)
        kept_BV = _likeliest(p_BV, jnp.ones_like(p_BV), enough)
        logits_BV = jnp.where(kept_BV, logits_BV, NEG_INF)
    if top_p is not None:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        enough = jnp.where(top_p < 1, top_p, jnp.inf)
        logits_BV = jnp.where(_likeliest(p_BV, p_BV, enough), logits_BV, NEG_INF)
    return logits_BV


def _likeliest(p_BV: jax.Array, weight_BV: jax.Array, enough: jax.Array) -> jax.Array:
    """True at the fewest likeliest tokens whose weights sum to `enough`; at all, if none do.

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
