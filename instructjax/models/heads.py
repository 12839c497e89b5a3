"""From hidden states to logits, log-probabilities of tokens, and scalars.

Logits of a whole batch, [B, T, V] in float32, are the largest array of naive RLHF code: 13 GB at
B=64, T=1024, V=50257. Nothing here holds more than `chunk` positions of them, in either
direction; `logits` does, and is for looking at a model.
"""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from instructjax.models.attention import NEG_INF
from instructjax.models.config import ModelConfig
from instructjax.models.decoder import apply
from instructjax.models.layer import Params, Shard, unsharded


def unembedding(params: Params) -> jax.Array:
    """The matrix [V, D] from hidden states to logits, the embedding itself where tied."""
    if "score" in params:
        raise ValueError("a model with a scalar head has no logits")
    return params["unembed"]["kernel"] if "unembed" in params else params["embed"]["tokens"]


def token_logits(
    hidden_BTD: jax.Array, unembed_VD: jax.Array, config: ModelConfig, temperature: float = 1.0
) -> jax.Array:
    """float32 logits_BTV / temperature; rows of the table beyond the vocabulary get -inf."""
    kernel = unembed_VD.astype(hidden_BTD.dtype)
    logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, kernel, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    logits /= temperature
    if config.vocab_size == unembed_VD.shape[0]:
        return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(ids < config.vocab_size, logits, NEG_INF)


def logits(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, mask_BT: jax.Array | None = None
) -> jax.Array:
    """float32 logits_BTV of the next token at each position, V the real vocabulary.

    For notebooks and tests; training and sampling never hold all of it.
    """
    hidden = apply(params, config, tokens_BT, mask_BT=mask_BT)
    return token_logits(hidden, unembedding(params), config)[..., : config.vocab_size]


def scalars(params: Params, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """float32 scalar_BT of a reward or value model at each position: hidden . kernel + bias."""
    if not config.scalar_head:
        raise ValueError("scalars needs a model with a scalar head; see models.with_scalar_head")
    kernel, bias = params["score"]["kernel"], params["score"]["bias"]
    # Without "highest", a TPU multiplies in bfloat16: three digits of a reward.
    return jnp.matmul(hidden_BTD.astype(jnp.float32), kernel, precision="highest") + bias


def _chunk_size(B: int, T: int, V: int) -> int:
    """Positions whose logits come to about 64 MB, but at least 64: B may be spread over a mesh."""
    most = 2**24 // (B * V)
    return max(1, min(T, max(64, 2 ** int(math.log2(max(most, 1))))))


def _chunked(x_BT: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...], T padded with zeros; B stays whole and sharded."""
    B, T = x_BT.shape[:2]
    n = -(-T // chunk)
    padding = [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, padding).reshape(B, n, chunk, *x_BT.shape[2:]).swapaxes(0, 1)


def _unchunked(x: jax.Array, T: int) -> jax.Array:
    n, B, chunk = x.shape[:3]
    return x.swapaxes(0, 1).reshape(B, n * chunk, *x.shape[3:])[:, :T]


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # A comparison with iota fuses into what uses it and partitions over a sharded vocabulary; a
    # gather does neither.
    return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]


def token_logp(
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    targets_BT: jax.Array,
    config: ModelConfig,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    shard: Shard = unsharded,
) -> Any:
    """Log-probability of a token at each position, without the logits.

    Row t of the result is log softmax(hidden[t] . unembed / temperature)[targets[t]]: the caller
    lines hidden states up with the tokens that follow them. The backward pass recomputes each
    chunk's logits. Where the weights of the tokens are known beforehand, `cross_entropy` below
    is cheaper.

    Args:
      hidden_BTD: hidden states after the final norm.
      unembed_VD: `unembedding(params)`.
      targets_BT: int32 in [0, vocab_size).
      config: its vocab_size and final_softcap are used.
      temperature: of the sampling distribution.
      entropy: also return each position's entropy in nats.
      chunk: positions of each row whose logits exist at once; default: `_chunk_size`.
      shard: constrains the logits on a mesh.

    Returns:
      logp_BT float32, or (logp_BT, entropy_BT).
    """
    chex.assert_rank([hidden_BTD, unembed_VD, targets_BT], [3, 2, 2])

    @jax.checkpoint
    def one(unembed_VD, hidden_BTD, targets_BT):
        logits = token_logits(hidden_BTD, unembed_VD, config, temperature)
        logits = shard(logits, "batch", None, "vocab")
        norm = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.sum(jnp.where(_is_target(logits, targets_BT), logits, 0), axis=-1)
        if not entropy:
            return target - norm, ()
        mean = jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1)
        return target - norm, norm - mean

    B, T = targets_BT.shape
    chunk = chunk or _chunk_size(B, T, unembed_VD.shape[0])
    xs = (_chunked(hidden_BTD, chunk), _chunked(targets_BT, chunk))
    _, (logp, ent) = jax.lax.scan(lambda _, x: ((), one(unembed_VD, *x)), (), xs)
    return (_unchunked(logp, T), _unchunked(ent, T)) if entropy else _unchunked(logp, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: ModelConfig,
    chunk: int | None = None,
    shard: Shard = unsharded,
) -> jax.Array:
    """Weighted sum of -log p(target), with the gradient computed in the forward pass.

    sum_bt weights[b, t] * -log softmax(hidden[b, t] . unembed)[targets[b, t]]

    The same as summing `token_logp`, for a quarter fewer FLOPs at the unembedding: the weights
    are known, so each chunk's logits serve its loss and its gradient, and are not recomputed.

    Args: as `token_logp`; weights_BT is 0 at positions that do not count.

    Returns:
      float32 [], in nats.
    """
    logp_BT = token_logp(hidden_BTD, unembed_VD, targets_BT, config, chunk=chunk, shard=shard)
    return -jnp.sum(logp_BT * weights_BT)


def _cross_entropy_forward(hidden_BTD, unembed_VD, targets_BT, weights_BT, config, chunk, shard):
    B, T = targets_BT.shape
    chunk = chunk or _chunk_size(B, T, unembed_VD.shape[0])
    unembed = unembed_VD.astype(hidden_BTD.dtype)

    def one(carry, x):
        loss, d_unembed_VD = carry
        hidden, targets, weights = x
        logits, pullback = jax.vjp(lambda h, w: token_logits(h, w, config), hidden, unembed)
        logits = shard(logits, "batch", None, "vocab")
        norm = jax.nn.logsumexp(logits, axis=-1)
        hit = _is_target(logits, targets)
        nll = norm - jnp.sum(jnp.where(hit, logits, 0), axis=-1)
        d_logits = (jnp.exp(logits - norm[..., None]) - hit) * weights[..., None]
        d_hidden, d_unembed = pullback(d_logits)
        carry = loss + jnp.sum(nll * weights), d_unembed_VD + d_unembed.astype(jnp.float32)
        return carry, (d_hidden, nll)

    xs = (_chunked(hidden_BTD, chunk), _chunked(targets_BT, chunk), _chunked(weights_BT, chunk))
    start = jnp.zeros(()), jnp.zeros(unembed_VD.shape, jnp.float32)
    (loss, d_unembed_VD), (d_hidden, nll) = jax.lax.scan(one, start, xs)
    d_unembed_VD = d_unembed_VD.astype(unembed_VD.dtype)
    return loss, (_unchunked(d_hidden, T), d_unembed_VD, _unchunked(nll, T))


def _cross_entropy_backward(config, chunk, shard, saved, g):
    d_hidden, d_unembed, nll = saved
    return d_hidden * g.astype(d_hidden.dtype), d_unembed * g.astype(d_unembed.dtype), None, nll * g


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
