"""Running the decoder: whole sequences, and new tokens against a KV cache.

`apply` runs whole sequences under `lax.scan`, to train and to score. `extend` runs new tokens
against a cache: under `lax.scan` if the layers' weights are stacked, else layer by layer.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from instructjax.models import fused
from instructjax.models.attention import (
    attend,
    attend_parts,
    attend_shared,
    attention_mask,
    related,
    rotation,
)
from instructjax.models.config import ModelConfig
from instructjax.models.layer import (
    LINEAR_OUTPUT,
    At,
    Layer,
    Norm,
    Params,
    Shard,
    take,
    unsharded,
)

# Rows of a TPU's tile in bfloat16 (8 in float32). A sequence that ends within a tile, such as all
# 2,048 tokens of a rollout but the last, took more than twice as long to compile.
_TILE_ROWS = 16


def positions_of(mask_BT: jax.Array) -> jax.Array:
    """Positions count live tokens from 0, so that left padding shifts nothing.

    mask 0 0 1 1 1  ->  positions 0 0 0 1 2
    """
    return jnp.maximum(jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1, 0)


def _check_length(config: ModelConfig, length: int) -> None:
    # A lookup beyond the table would silently be clamped to its last row.
    limited = config.positions == "learned" or config.rope.by_length
    if limited and length > config.max_length:
        raise ValueError(f"{length} positions in a model of max_length {config.max_length}")


def _embed(params: Params, c: ModelConfig, tokens_BT, positions_BT, shard: Shard) -> jax.Array:
    # The table is gathered over fsdp like other weights. A lookup in a table with split columns
    # would move the whole batch instead.
    table = shard(params["embed"]["tokens"].astype(c.dtype), "vocab", None)
    x = table[tokens_BT]
    if c.scale_embedding:
        x *= jnp.asarray(c.width**0.5, x.dtype)
    if c.positions == "learned":
        table = shard(params["embed"]["positions"].astype(c.dtype), None, None)
        x += table[positions_BT + c.position_offset]
    return shard(x, "batch", "sequence", None)


def _rotations(c: ModelConfig, positions_BT: jax.Array):
    """cos and sin for (full, windowed) layers; None where positions are learned."""
    if c.positions == "learned":
        return None, None
    run = functools.partial(
        rotation, head_dim=c.head_dim, positions_BT=positions_BT, length=c.max_length
    )
    full = run(c.rope)
    return full, run(c.local_rope) if c.local_rope else full


def _final_norm(params: Params, c: ModelConfig, x_BTD: jax.Array) -> Any:
    return Norm(c).apply({"params": params["final_norm"]}, x_BTD)


def _variables(params: Params) -> dict[str, Any]:
    """What `Layer.apply` takes, of all layers: stacked leaves, or a list of trees each."""
    names = {"params": "layers", "adapter": "adapter"}
    return {collection: params[name] for collection, name in names.items() if name in params}


def _scan(
    params: Params, c: ModelConfig, tokens_BT, positions_BT, sights, mix, key, shard, last=None
) -> Any:
    """(hidden states after the final norm, the second output of `mix` of each layer, stacked).

    Args:
      sights: what (full, windowed) layers see, a pytree each; `mix` gets that of its layer.
      mix: attention, (q_BNTH, k_BGTH, v_BGTH, sight, layer number) -> (y_BNTH, anything to keep).
      last: (at, sights at these columns) if the last layer runs there alone and keeps nothing.
    """
    rotations = _rotations(c, positions_BT)
    layer = Layer(c)

    def body(x_BTD, per_layer, at=None, sights=sights):
        variables, windowed, number, layer_key = per_layer

        def pick(full_and_local):  # both kinds of layer share one scanned body
            full, local = full_and_local
            choose = functools.partial(jnp.where, windowed)
            return jax.tree.map(choose, local, full) if any(c.windowed) else full

        sight, cos_sin = pick(sights), pick(rotations)
        run_mix = functools.partial(mix, sight=sight, layer=number)
        return layer.apply(variables, x_BTD, cos_sin, layer_key, mix=run_mix, shard=shard, at=at)

    def remat(run):  # "dots" keeps results of matmuls and recomputes all else and attention
        keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        if "adapter" in params:  # else x W and (x A) B would be kept, not their sum
            keep_dots = jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT)
        policy = keep_dots if c.remat == "dots" else None
        return run if c.remat == "none" else jax.checkpoint(run, policy=policy)

    x_BTD = _embed(params, c, tokens_BT, positions_BT, shard)
    keys = None if key is None else jax.random.split(key, c.layers)
    windowed_L = jnp.array(c.windowed or (False,) * c.layers)
    stacked = _variables(params), windowed_L, jnp.arange(c.layers), keys
    if last is not None:
        final = jax.tree.map(lambda x: x[-1], stacked)
        stacked = jax.tree.map(lambda x: x[:-1], stacked)
    x_BTD, kept = jax.lax.scan(remat(body), x_BTD, stacked, unroll=c.unroll)
    if last is not None:
        at, last_sights = last
        x_BTD, _ = remat(functools.partial(body, at=at, sights=last_sights))(x_BTD, final)
    return _final_norm(params, c, x_BTD), kept


def _fuses(config: ModelConfig, shard: Shard) -> bool:
    return shard.fused and config.dtype != "float16"  # the kernel's compiler has no float16


def apply(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    parents_BT: jax.Array | None = None,
    at: At = None,
    key: jax.Array | None = None,
    shard: Shard = unsharded,
) -> jax.Array:
    """Hidden states after the final norm.

    With `at` and unrolled layers, the last layer computes only keys and values at other positions,
    which saves nearly half for few positions and two layers. A split sequence computes them all. So
    do scanned layers, whose weights would be copied from the stack, and the fused kernel, which
    takes as many queries as keys.

    Args:
      params, config: of the model.
      tokens_BT: int32 in [0, vocab_size).
      mask_BT: True at live tokens; no token sees the others. Default: all are live.
      positions_BT: Default: `positions_of(mask_BT)`. Packed documents restart at 0.
      segments_BT: not negative; a token sees only its segment. Default: one segment.
      parents_BT: with segments_BT, another segment that the token sees: a response's prompt.
      at: columns whose hidden states are returned. Default: all.
      key: turns on residual dropout at config.dropout (InstructGPT, App. C.1: 0.2 in SFT).
      shard: constrains activations on a mesh.

    Returns:
      hidden_BTD in config.dtype; hidden_BSD at `at`.
    """
    T = tokens_BT.shape[1]
    if mask_BT is None:
        mask_BT = jnp.ones(tokens_BT.shape, bool)
    if positions_BT is None:
        _check_length(config, T)
        positions_BT = positions_of(mask_BT)
    # A split sequence must divide evenly, and the TPU's kernel compiles faster for whole tiles.
    multiple = math.lcm(shard.sequence, _TILE_ROWS if _fuses(config, shard) else 1)
    if short := -T % multiple:
        pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, short)))
        tokens_BT, mask_BT, positions_BT = pad(tokens_BT), pad(mask_BT), pad(positions_BT)
        segments_BT, parents_BT = (None if x is None else pad(x) for x in (segments_BT, parents_BT))

    live_BT = mask_BT.astype(bool)

    def mask(window: int | None, at: At = None) -> jax.Array:
        seen = attention_mask(take(positions_BT, at), positions_BT, live_BT, window)
        if segments_BT is not None:
            parents = None if parents_BT is None else take(parents_BT, at)[:, :, None]
            segments = take(segments_BT, at)[:, :, None]
            seen &= related(segments, parents, segments_BT[:, None, :])
        return seen

    last = None
    if _fuses(config, shard):
        segments = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
        segments = jnp.where(live_BT, segments, fused.PADDING)
        parents = segments if parents_BT is None else parents_BT
        places_B3T = fused.places(positions_BT, segments, parents)
        run = functools.partial(fused.attend, softcap=config.attention_softcap)

        def mix(q, k, v, sight, layer):
            return shard.by_head(run, q, k, v, places_B3T, sight), None

        sights = fused.NO_WINDOW, config.window
    else:

        def mix(q, k, v, sight, layer):
            return attend(q, k, v, sight, config.attention_softcap), None

        sights = mask(None), mask(config.window)
        if at is not None and config.unroll >= config.layers and shard.sequence == 1:
            last = at, (mask(None, at), mask(config.window, at))
    hidden, _ = _scan(params, config, tokens_BT, positions_BT, sights, mix, key, shard, last=last)
    return hidden if last else take(hidden[:, :T], at)


def apply_shared(
    params: Params,
    config: ModelConfig,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    responses_BKR: jax.Array,
    response_mask_BKR: jax.Array,
    *,
    key: jax.Array | None = None,
    shard: Shard = unsharded,
) -> tuple[jax.Array, jax.Array]:
    """Hidden states of K responses to one prompt, which is computed once.

    Equals `apply` of each response behind its prompt: a response sees the prompt and itself, and
    its positions follow the prompt's.

    Args:
      prompt_BP, prompt_mask_BP: padded on the left.
      responses_BKR, response_mask_BKR: padded on the right; an absent one is masked throughout.
      key, shard: as in `apply`.

    Returns:
      (hidden_BPD of the prompts, hidden_BKRD of the responses).
    """
    B, P = prompt_BP.shape
    K, R = responses_BKR.shape[1:]
    _check_length(config, P + R)
    prompt_live, response_live = prompt_mask_BP.astype(bool), response_mask_BKR.astype(bool)
    prompt_position = positions_of(prompt_live)
    length_B11 = jnp.sum(prompt_live, axis=-1, dtype=jnp.int32).reshape(B, 1, 1)
    response_position = length_B11 + positions_of(response_live)

    tokens_BT, positions_BT, live_BT = (
        jnp.concatenate([prompt, responses.reshape(B, K * R)], axis=1)
        for prompt, responses in (
            (prompt_BP, responses_BKR),
            (prompt_position, response_position),
            (prompt_live, response_live),
        )
    )
    if _fuses(config, shard):  # the prompt is segment 0, and the parent of each response
        segments_T = jnp.concatenate([jnp.zeros(P, int), jnp.repeat(jnp.arange(1, K + 1), R)])
        segments_BT = jnp.broadcast_to(segments_T, (B, P + K * R))
        hidden = apply(
            params, config, tokens_BT, mask_BT=live_BT, positions_BT=positions_BT,
            segments_BT=segments_BT, parents_BT=jnp.zeros_like(segments_BT), key=key, shard=shard,
        )  # fmt: skip
        return hidden[:, :P], hidden[:, P:].reshape(B, K, R, -1)

    def masks(window: int | None) -> tuple[jax.Array, jax.Array]:
        queries = response_position.reshape(B, K * R)
        on_prompt = attention_mask(queries, prompt_position, prompt_live, window)
        position, live = (x.reshape(B * K, R) for x in (response_position, response_live))
        on_response = attention_mask(position, position, live, window)
        parts = on_prompt.reshape(B, K, R, P), on_response.reshape(B, K, R, R)
        prompt = attention_mask(prompt_position, prompt_position, prompt_live, window)
        return prompt, jnp.concatenate(parts, axis=-1)

    def mix(q, k, v, sight, layer):
        return attend_shared(q, k, v, *sight, softcap=config.attention_softcap), None

    both = masks(None), masks(config.window)
    hidden, _ = _scan(params, config, tokens_BT, positions_BT, both, mix, key, shard)
    return hidden[:, :P], hidden[:, P:].reshape(B, K, R, -1)


# ---------------------------------------------------------------------------- cached decoding


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far. Columns may be in any order: positions decide."""

    keys: Any  # rotated; a tuple of [B, G, S, H], one per layer, or stacked: [B, L, G, S, H]
    values: Any  # likewise
    positions_BS: jax.Array  # int32, of the token in each column
    live_BS: jax.Array  # bool, False at padding and at columns that are not yet written

    @classmethod
    def create(cls, config: ModelConfig, batch: int, columns: int, stacked=False) -> "Cache":
        """An empty cache in config.dtype for `batch` rows of at most `columns` tokens.

        Args:
          stacked: whether the weights that `extend` gets with this cache are stacked.
        """
        _check_length(config, columns)

        def empty() -> Any:
            shape = (config.kv_heads, columns, config.head_dim)
            if stacked:
                return jnp.zeros((batch, config.layers, *shape), config.dtype)
            return tuple(jnp.zeros((batch, *shape), config.dtype) for _ in range(config.layers))

        return cls(
            keys=empty(),
            values=empty(),
            positions_BS=jnp.zeros((batch, columns), jnp.int32),
            live_BS=jnp.zeros((batch, columns), bool),
        )

    @property
    def stacked(self) -> bool:
        return not isinstance(self.keys, tuple)


def unstack(params: Params, config: ModelConfig) -> Params:
    """The parameters, with layers as a list of trees in place of stacked leaves; see `extend`."""

    stacked = {name: params[name] for name in ("layers", "adapter") if name in params}
    layer = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    layers = range(config.layers)
    return params | {name: [layer(tree, i) for i in layers] for name, tree in stacked.items()}


def extend(
    params: Params,
    config: ModelConfig,
    cache: Cache | None,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    column: jax.Array | int,
    shard: Shard = unsharded,
) -> tuple[jax.Array, Cache]:
    """Runs T more tokens of each row: a prompt (prefill) or, with T = 1, a decoding step.

    Stacked weights are scanned, so one layer is compiled. On TPUs its matmuls read the weights and
    the cache in place. XLA on CPU copies them at each token, so there the weights should be
    unstacked.

    Args:
      params: of `init`, or its `unstack`.
      cache: the tokens so far, stacked if the weights are; None is an empty cache of T columns.
        A row's positions follow the number of its live columns.
      tokens_BT, mask_BT: the new tokens; padding may lie anywhere and is never seen.
      column: the first of the T columns that the new tokens overwrite.

    Returns:
      (hidden_BTD of the new tokens after the final norm, the cache with these tokens).

    Raises:
      ValueError: only one of weights and cache is stacked.
    """
    c = config
    if mask_BT is None:
        mask_BT = jnp.ones(tokens_BT.shape, bool)
    stacked, live_BT = isinstance(params["layers"], dict), mask_BT.astype(bool)
    if cache is not None and cache.stacked != stacked:
        raise ValueError("weights and cache must both be stacked, or neither (models.unstack)")
    B, T = tokens_BT.shape
    old = Cache.create(c, B, T, stacked) if cache is None else cache
    before_B1 = jnp.sum(old.live_BS, axis=-1, keepdims=True, dtype=jnp.int32)
    positions_BT = before_B1 + positions_of(mask_BT)
    put, at = jax.lax.dynamic_update_slice, (0, 0, column, 0)
    positions_BS = put(old.positions_BS, positions_BT, (0, column))
    live_BS = put(old.live_BS, live_BT, (0, column))

    if stacked:
        # The scan only reads the cache, as a part apart from the new tokens, which are written
        # behind it for all layers at once. A cache that the scan carried would be copied at each
        # token, from the layout for refills to the layout that the scan's body prefers.
        seen = [(positions_BT, live_BT)]
        if cache is not None:
            kept_BS = put(old.live_BS, jnp.zeros_like(live_BT), (0, column))
            seen.append((old.positions_BS, kept_BS))

        def sight(window: int | None) -> list[jax.Array]:
            return [attention_mask(positions_BT, *part, window) for part in seen]

        def of_layer(every_BLGSH: jax.Array, layer: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(every_BLGSH, layer, axis=1, keepdims=False)

        def mix_parts(q, k, v, sight, layer):
            keys_values = [(k, v)]
            if cache is not None:
                keys_values.append((of_layer(old.keys, layer), of_layer(old.values, layer)))
            parts = [(*kv, mask) for kv, mask in zip(keys_values, sight, strict=True)]
            return attend_parts(q, parts, c.attention_softcap), (k, v)

        sights = sight(None), sight(c.window)
        hidden_BTD, new = _scan(params, c, tokens_BT, positions_BT, sights, mix_parts, None, shard)
        keys, values = (
            put(every_BLGSH, jnp.moveaxis(new_LBGTH, 0, 1), (0, *at))
            for every_BLGSH, new_LBGTH in zip((old.keys, old.values), new, strict=True)
        )
        return hidden_BTD, Cache(keys, values, positions_BS, live_BS)

    rotations = _rotations(c, positions_BT)
    x_BTD = _embed(params, c, tokens_BT, positions_BT, shard)
    masks = [attention_mask(positions_BT, positions_BS, live_BS, w) for w in (None, c.window)]
    kept = []
    layers = _variables(params)
    for i in range(c.layers):
        variables = {collection: trees[i] for collection, trees in layers.items()}
        windowed = bool(c.windowed) and c.windowed[i]

        def mix(q, k, v, i=i, mask=masks[windowed]):
            k, v = put(old.keys[i], k, at), put(old.values[i], v, at)
            return attend(q, k, v, mask, c.attention_softcap), (k, v)

        inputs = variables, x_BTD, rotations[windowed], None
        x_BTD, keys_values = Layer(c).apply(*inputs, mix=mix, shard=shard)
        kept.append(keys_values)
    keys, values = zip(*kept, strict=True)
    return _final_norm(params, c, x_BTD), Cache(keys, values, positions_BS, live_BS)
