"""The only reductions: every mean over tokens, responses or prompts goes through here."""

import chex
import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None):
    """Sum of x where mask; what lies under a zero may be anything, NaN included."""
    chex.assert_equal_shape([x, mask])  # a mask of fewer entries would be too small a divisor
    return jnp.sum(jnp.where(mask != 0, x * mask, 0), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None):
    """Mean of x weighted by mask (0 and 1, or weights); 0 where nothing counts.

    The divisor is the number of live entries, never that of all of them.
    """
    total = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(x, mask, axis) / jnp.where(total == 0, 1, total)
