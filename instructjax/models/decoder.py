"""Running the decoder: whole sequences, and new tokens against a KV cache.

`apply` runs whole sequences under `lax.scan`, to train and to score. `extend` runs new tokens
against a cache, layer by layer: a cache that is scanned over would be copied whole at each token.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from instructjax.models.attention import attention_mask, rotation
from instructjax.models.config import ModelConfig
from instructjax.models.layer import Layer, Norm, Params, Shard, unsharded


def positions_of(mask_BT: jax.Array) -> jax.Array:
    """Positions count live tokens from 0, so that left padding shifts nothing.

    mask 0 0 1 1 1  ->  positions 0 0 0 1 2
    """
    return jnp.maximum(jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1, 0)


def _embed(params: Params, c: ModelConfig, tokens_BT, positions_BT, shard: Shard) -> jax.Array:
    # Gathered over fsdp like any other weight: a lookup in a table whose columns are split would
    # move the whole batch instead.
    table = shard(params["embed"]["tokens"].astype(c.dtype), "vocab", None)
    x = table[tokens_BT]
    if c.scale_embedding:
        x *= jnp.asarray(c.width**0.5, x.dtype)
    if c.positions == "learned":
        table = shard(params["embed"]["positions"].astype(c.dtype), None, None)
        x += table[positions_BT + c.position_offset]
    return shard(x, "batch", None, None)


def _rotations(c: ModelConfig, positions_BT: jax.Array):
    """cos and sin for (full, windowed) layers; None where positions are learned."""
    if c.positions == "learned":
        return None, None
    full = rotation(c.rope, c.head_dim, positions_BT)
    return full, rotation(c.local_rope, c.head_dim, positions_BT) if c.local_rope else full


def _final_norm(params: Params, c: ModelConfig, x_BTD: jax.Array) -> Any:
    return Norm(c).apply({"params": params["final_norm"]}, x_BTD)


def apply(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    key: jax.Array | None = None,
    shard: Shard = unsharded,
) -> jax.Array:
    """Hidden states after the final norm.

    Args:
      params, config: of the model.
      tokens_BT: int32 in [0, vocab_size).
      mask_BT: True at live tokens; the others are seen by none. Default: all.
      positions_BT: default: `positions_of(mask_BT)`. Packed documents restart at 0.
      segments_BT: a token sees only its own segment. Default: one.
      key: turns on residual dropout at config.dropout (InstructGPT, App. C.1: 0.2 in SFT).
      shard: constrains activations on a mesh.

    Returns:
      hidden_BTD in config.dtype.
    """
    c = config
    if mask_BT is None:
        mask_BT = jnp.ones(tokens_BT.shape, bool)
    if positions_BT is None:
        positions_BT = positions_of(mask_BT)
    live_BT = mask_BT.astype(bool)
    full_mask = attention_mask(positions_BT, positions_BT, live_BT)
    if segments_BT is not None:
        full_mask &= segments_BT[:, :, None] == segments_BT[:, None, :]
    full_rotation, local_rotation = _rotations(c, positions_BT)
    local_mask = full_mask & attention_mask(positions_BT, positions_BT, live_BT, c.window)
    layer = Layer(c)

    def body(x_BTD, per_layer):
        layer_params, windowed, layer_key = per_layer
        mask, cos_sin = full_mask, full_rotation
        if any(c.windowed):  # both kinds of layer share one scanned body
            mask = jnp.where(windowed, local_mask, full_mask)
            if c.local_rope is not None:
                pick = functools.partial(jnp.where, windowed)
                cos_sin = jax.tree.map(pick, local_rotation, full_rotation)
        passed = {"write": lambda k, v: (k, v), "shard": shard}
        x_BTD, _ = layer.apply({"params": layer_params}, x_BTD, cos_sin, mask, layer_key, **passed)
        return x_BTD, None

    if c.remat == "full":
        body = jax.checkpoint(body)
    elif c.remat == "dots":  # keeps matmul results, recomputes attention and the rest
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, policy=policy)

    x_BTD = _embed(params, c, tokens_BT, positions_BT, shard)
    keys = None if key is None else jax.random.split(key, c.layers)
    windowed_L = jnp.array(c.windowed or (False,) * c.layers)
    x_BTD, _ = jax.lax.scan(body, x_BTD, (params["layers"], windowed_L, keys))
    return _final_norm(params, c, x_BTD)


# ---------------------------------------------------------------------------- cached decoding


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far. Slots fill from 0, the same slot for every row."""

    keys: tuple[jax.Array, ...]  # a layer each: [B, G, S, H], rotated
    values: tuple[jax.Array, ...]  # a layer each: [B, G, S, H]
    positions_BS: jax.Array  # int32, of the token in each slot
    live_BS: jax.Array  # bool, False at padding and at slots not yet written
    length: jax.Array  # int32 [], slots written

    @classmethod
    def create(cls, config: ModelConfig, batch: int, slots: int) -> "Cache":
        """An empty cache in config.dtype for `batch` rows of at most `slots` tokens."""
        shape = (batch, config.kv_heads, slots, config.head_dim)
        return cls(
            keys=tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers)),
            values=tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers)),
            positions_BS=jnp.zeros((batch, slots), jnp.int32),
            live_BS=jnp.zeros((batch, slots), bool),
            length=jnp.zeros((), jnp.int32),
        )


def unstack(params: Params, config: ModelConfig) -> Params:
    """Layers as a list of trees in place of stacked leaves, so that `extend` slices nothing."""
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.layers)
    ]
    return {**params, "layers": layers}


def extend(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    shard: Shard = unsharded,
) -> tuple[jax.Array, Cache]:
    """Runs T more tokens of each row: a prompt (prefill) or, with T = 1, a decoding step.

    Args:
      params: of `init`, or its `unstack`, as a loop should be given.
      cache: with at least T free slots (a full cache overwrites its last ones).
      tokens_BT, mask_BT: the new tokens; padding may lie anywhere and is never seen.

    Returns:
      (hidden_BTD of the new tokens after the final norm, the longer cache).
    """
    c = config
    if mask_BT is None:
        mask_BT = jnp.ones(tokens_BT.shape, bool)
    before_B1 = jnp.sum(cache.live_BS, axis=-1, keepdims=True, dtype=jnp.int32)
    positions_BT = before_B1 + positions_of(mask_BT)
    start = cache.length
    put = jax.lax.dynamic_update_slice
    positions_BS = put(cache.positions_BS, positions_BT, (0, start))
    live_BS = put(cache.live_BS, mask_BT.astype(bool), (0, start))
    rotations = _rotations(c, positions_BT)
    masks = [attention_mask(positions_BT, positions_BS, live_BS, w) for w in (None, c.window)]

    layers = params["layers"]
    if isinstance(layers, dict):
        layers = unstack(params, c)["layers"]
    x_BTD = _embed(params, c, tokens_BT, positions_BT, shard)
    keys, values = [], []
    for i, layer_params in enumerate(layers):
        windowed = bool(c.windowed) and c.windowed[i]

        def write(k, v, i=i):
            at = (0, 0, start, 0)
            return put(cache.keys[i], k, at), put(cache.values[i], v, at)

        x_BTD, (k, v) = Layer(c).apply(
            {"params": layer_params},
            x_BTD,
            rotations[windowed],
            masks[windowed],
            None,
            write=write,
            shard=shard,
        )
        keys.append(k)
        values.append(v)
    length = start + tokens_BT.shape[1]
    return _final_norm(params, c, x_BTD), Cache(
        tuple(keys), tuple(values), positions_BS, live_BS, length
    )
