"""Attention masks, rotary embeddings, and attention itself."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from instructjax.models.config import Rope

# In place of -inf: exp(NEG_INF) is exactly 0, and a row of NEG_INF alone gives no NaN.
NEG_INF = -1e30


def sees(query_position, key_position, allowed, window: jax.Array | int | None) -> jax.Array:
    """True where a query sees a key: the key is allowed, not after it and inside the window.

    Args:
      query_position, key_position: int32, of shapes that broadcast.
      allowed: True where padding and segments let the query see the key.
      window: a query sees this many positions, its own included.
    """
    distance = query_position - key_position
    seen = (distance >= 0) & allowed
    return seen if window is None else seen & (distance < window)


def related(query_segment, query_parent, key_segment) -> jax.Array:
    """True where a key is in the query's segment, or in its parent: the prompt of a response.

    Segments and parents are int32, of shapes that broadcast; without parents, None.
    """
    same = query_segment == key_segment
    return same if query_parent is None else same | (query_parent == key_segment)


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    key_live_BS: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """True where a query sees a live key: `sees` of all pairs.

    Positions decide, not columns, so one rule serves left padding, packed documents, a KV cache
    filled in any order, and responses that share a prompt.

    Args:
      query_positions_BT, key_positions_BS: positions, counting live tokens from 0.
      key_live_BS: False at padding.
      window: a query sees this many positions, its own included.

    Returns:
      mask_BTS, bool.
    """
    keys = key_positions_BS[:, None, :], key_live_BS[:, None, :]
    return sees(query_positions_BT[:, :, None], *keys, window)


def rope_frequencies(rope: Rope, head_dim: int, length: int = 0) -> jax.Array:
    """Radians per position of each rotated pair, float32 [head_dim * fraction / 2].

    Args:
      length: of the sequences, for the kinds that depend on it; see `Rope`.
    """
    rotary_dim, theta, original = int(head_dim * rope.fraction), rope.theta, rope.original_length
    if rope.kind == "dynamic":
        stretch = rope.factor * length / original - (rope.factor - 1)
        theta *= max(stretch, 1) ** (rotary_dim / (rotary_dim - 2))
    frequencies = theta ** -(jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "longrope":
        factors = rope.long_factor if length > original else rope.short_factor
        return frequencies / jnp.array(factors)
    # Long wavelengths are stretched, short ones kept, and those in between interpolated.
    if rope.kind == "llama3":  # linearly in the number of turns in the original context
        turns = original * frequencies / (2 * jnp.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0, 1)
    elif rope.kind == "yarn":  # linearly in the number of the pair
        turning = lambda turns: math.log(original / (turns * 2 * math.pi), theta) * rotary_dim / 2  # noqa: E731
        first, last = turning(rope.beta_fast), turning(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        ramp = (jnp.arange(rotary_dim // 2) - first) / max(last - first, 0.001)
        keep = 1 - jnp.clip(ramp, 0, 1)
    else:
        return frequencies
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def rotation(
    rope: Rope, head_dim: int, positions_BT: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, each float32 [B, T, rotary_dim / 2].

    They are multiplied by the attention factor. Arguments: as for `rope_frequencies`.
    """
    frequencies = rope_frequencies(rope, head_dim, length).reshape(1, 1, -1)
    angles = positions_BT[..., None] * frequencies
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def rotate(x_BNTH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + rotary_dim / 2) of each head; dimensions from rotary_dim on stay."""
    cos, sin = (angle[:, None] for angle in cos_sin)  # the same for each head
    half = cos.shape[-1]
    x = x_BNTH.astype(jnp.float32)
    a, b, tail = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, tail], -1).astype(x_BNTH.dtype)


def attend(
    q_BNTH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSH: jax.Array,
    mask_BTS: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(q k) v, [B, N, T, H]; each of the G key heads serves N / G query heads."""
    B, N, _, H = q_BNTH.shape
    G = k_BGSH.shape[1]
    # The query heads of a group become further rows. As a separate dimension, mostly of size 1,
    # they made XLA on CPU copy the logits: attention took 1.4 times as long.
    q_BGTH, mask = q_BNTH.reshape(B, G, -1, H), jnp.tile(mask_BTS, (1, N // G, 1))
    logits = jnp.einsum("BGTH,BGSH->BGTS", q_BGTH, k_BGSH, preferred_element_type=jnp.float32)
    logits = capped_and_masked(logits, mask[:, None], softcap)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BGSH.dtype)
    return jnp.einsum("BGTS,BGSH->BGTH", weights, v_BGSH).reshape(q_BNTH.shape)


def attend_parts(
    q_BNTH: jax.Array,
    parts: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    softcap: float | None = None,
) -> jax.Array:
    """`attend` to keys in several arrays, without concatenating them.

    Args:
      parts: (k_BGSH, v_BGSH, mask_BTS) of each.

    Returns:
      y_BNTH.
    """
    B, N, _, H = q_BNTH.shape
    G = parts[0][0].shape[1]
    q_BGTH, f32 = q_BNTH.reshape(B, G, -1, H), {"preferred_element_type": jnp.float32}
    logits = [
        capped_and_masked(
            jnp.einsum("BGTH,BGSH->BGTS", q_BGTH, k_BGSH, **f32),
            jnp.tile(mask_BTS, (1, N // G, 1))[:, None],
            softcap,
        )
        for k_BGSH, _, mask_BTS in parts
    ]
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - top) for x in logits]
    total, y = jnp.zeros_like(top), jnp.zeros(q_BGTH.shape, jnp.float32)
    for x, (_, v_BGSH, _) in zip(weights, parts, strict=True):
        total += jnp.sum(x, axis=-1, keepdims=True)
        y += jnp.einsum("BGTS,BGSH->BGTH", x.astype(v_BGSH.dtype), v_BGSH, **f32)
    return (y / total).astype(q_BNTH.dtype).reshape(q_BNTH.shape)


def attend_shared(
    q_BNTH: jax.Array,
    k_BGTH: jax.Array,
    v_BGTH: jax.Array,
    prompt_mask_BPP: jax.Array,
    response_mask_BKRS: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of one prompt and K responses that share it, T = P + K R.

    The prompt sees itself; each response sees the prompt and itself (S = P + R). The work is
    P^2 + K R (P + R) instead of (P + K R)^2.

    Args:
      q_BNTH, k_BGTH, v_BGTH: of the prompt, then of each response.
      prompt_mask_BPP: True where a prompt token sees another.
      response_mask_BKRS: True where a response token sees the prompt (P), then its response (R).

    Returns:
      y_BNTH.
    """
    B, N, _, H = q_BNTH.shape
    G, P = k_BGTH.shape[1], prompt_mask_BPP.shape[1]
    K, R = response_mask_BKRS.shape[1:3]
    prompt = attend(q_BNTH[:, :, :P], k_BGTH[:, :, :P], v_BGTH[:, :, :P], prompt_mask_BPP, softcap)

    k_BGPH, v_BGPH = k_BGTH[:, :, :P], v_BGTH[:, :, :P]
    k_BGKSH, v_BGKSH = (x[:, :, P:].reshape(B, G, K, R, H) for x in (k_BGTH, v_BGTH))
    # As in `attend`, the heads of a group become further rows, here of each response.
    q = q_BNTH[:, :, P:].reshape(B, G, -1, K, R, H).swapaxes(2, 3).reshape(B, G, K, -1, H)
    mask = jnp.tile(response_mask_BKRS, (1, 1, N // G, 1))[:, None]
    f32 = {"preferred_element_type": jnp.float32}
    of_prompt = jnp.einsum("BGTH,BGPH->BGTP", q.reshape(B, G, -1, H), k_BGPH, **f32)
    of_prompt = capped_and_masked(of_prompt, mask[..., :P].reshape(B, 1, -1, P), softcap)
    of_response = capped_and_masked(
        jnp.einsum("BGKTH,BGKSH->BGKTS", q, k_BGKSH, **f32), mask[..., P:], softcap
    )
    # One softmax over both parts. Concatenating them would copy all logits, in both directions.
    tops = [jnp.max(x, axis=-1).reshape(q.shape[:-1]) for x in (of_prompt, of_response)]
    top = jax.lax.stop_gradient(jnp.maximum(*tops))[..., None]
    on_prompt = jnp.exp(of_prompt - top.reshape(*of_prompt.shape[:-1], 1))
    on_response = jnp.exp(of_response - top)
    total = jnp.sum(on_prompt, axis=-1).reshape(q.shape[:-1]) + jnp.sum(on_response, axis=-1)
    y = jnp.einsum("BGTP,BGPH->BGTH", on_prompt.astype(q.dtype), v_BGPH, **f32).reshape(q.shape)
    y += jnp.einsum("BGKTS,BGKSH->BGKTH", on_response.astype(q.dtype), v_BGKSH, **f32)
    y = (y / total[..., None]).astype(q.dtype)
    y = y.reshape(B, G, K, -1, R, H).swapaxes(2, 3).reshape(B, N, K * R, H)
    return jnp.concatenate([prompt, y], axis=2)


def capped_and_masked(logits: jax.Array, mask: jax.Array, softcap: float | None) -> jax.Array:
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(mask, logits, NEG_INF)
