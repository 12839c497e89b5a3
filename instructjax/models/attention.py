"""Which positions see which, rotary embeddings, and attention itself."""

import jax
import jax.numpy as jnp

from instructjax.models.config import Rope

# Stands for -inf: exp() of it is exactly 0, yet a row of nothing else gives no NaN.
NEG_INF = -1e30


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    key_live_BS: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """True where a query sees a key: a live key, not after the query, inside the window.

    Order is by position, not by column, so that one rule serves left padding, packed documents,
    a KV cache filled in any order, and responses that share a prompt.

    Args:
      query_positions_BT, key_positions_BS: positions, counting live tokens from 0.
      key_live_BS: False at padding.
      window: a query sees this many positions, its own included.

    Returns:
      mask_BTS, bool.
    """
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    mask_BTS = (distance_BTS >= 0) & key_live_BS[:, None, :]
    return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Radians a position for each rotated pair, float32 [head_dim * fraction / 2]."""
    rotary_dim = int(head_dim * rope.fraction)
    frequencies = rope.theta ** -(jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between interpolated.
        turns = rope.original_length * frequencies / (2 * jnp.pi)  # in the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0, 1)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies


def rotation(rope: Rope, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, each float32 [B, 1, T, rotary_dim / 2]."""
    frequencies = rope_frequencies(rope, head_dim)
    angles = positions_BT[:, None, :, None] * frequencies.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BNTH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + rotary_dim / 2) of each head; what lies beyond passes through."""
    cos, sin = cos_sin
    half = cos.shape[-1]
    x = x_BNTH.astype(jnp.float32)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x_BNTH.dtype)


def attend(
    q_BNTH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSH: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(scale q k) v, in groups of N / G query heads to a key head (G); [B, N, T, H]."""
    B, N, T, H = q_BNTH.shape
    G = k_BGSH.shape[1]
    q_BGQTH = (q_BNTH * scale).reshape(B, G, N // G, T, H)
    logits = jnp.einsum("BGQTH,BGSH->BGQTS", q_BGQTH, k_BGSH, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask_BTS[:, None, None], logits, NEG_INF)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BGSH.dtype)
    return jnp.einsum("BGQTS,BGSH->BGQTH", weights, v_BGSH).reshape(B, N, T, H)
