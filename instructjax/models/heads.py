"""From hidden states to logits, log-probabilities of tokens, and scalars.

Logits of a whole batch, [B, T, V] in float32, are the largest array of naive RLHF code: 13 GB at
B=64, T=1024, V=50257. Here at most `chunk` positions of each row exist at once, forward and
backward. Only `logits` returns all of them, to look at a model.
"""

import dataclasses
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
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    config: ModelConfig,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """float32 logits_BTV / temperature; rows of the table beyond the vocabulary get -inf.

    hidden and unembed may have a leading axis of shards, with one table per shard.
    """
    kernel = unembed_VD.astype(hidden_BTD.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("...BTD,...VD->...BTV", hidden_BTD, kernel, **f32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    logits /= temperature
    if config.vocab_size == logits.shape[-1]:
        return logits
    return jnp.where(_ids(logits) < config.vocab_size, logits, NEG_INF)


def _ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def logits(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, mask_BT: jax.Array | None = None
) -> jax.Array:
    """float32 logits_BTV of the next token at each position, V the real vocabulary.

    For notebooks and tests; training and sampling never hold this array.
    """
    hidden = apply(params, config, tokens_BT, mask_BT=mask_BT)
    return token_logits(hidden, unembedding(params), config)[..., : config.vocab_size]


def scalars(params: Params, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """float32 scalar_BT of a reward or value model at each position: hidden . kernel + bias."""
    if not config.scalar_head:
        raise ValueError("scalars needs a model with a scalar head; see models.with_scalar_head")
    kernel, bias = params["score"]["kernel"], params["score"]["bias"]
    # Without "highest", a TPU multiplies in bfloat16, and a reward has three digits.
    return jnp.matmul(hidden_BTD.astype(jnp.float32), kernel, precision="highest") + bias


def _chunk_size(B: int, T: int, V: int) -> int:
    """Positions whose logits take about 64 MB, but at least 64, as a mesh may split V."""
    most = 2**24 // (B * V)
    return max(1, min(T, max(64, 2 ** int(math.log2(max(most, 1))))))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How rows [B, T, ...] are cut: [n, B, chunk, ...], T padded with zeros.

    On a mesh the rows of each shard stay apart, [n, shards, B / shards, chunk, ...], and each shard
    has a copy of the table. With one table for all shards, the compiler would gather the table and
    sum its gradient at each chunk.
    """

    T: int
    chunk: int
    shard: Shard

    @classmethod
    def of(cls, targets_BT: jax.Array, V: int, chunk: int | None, shard: Shard) -> "_Chunks":
        B, T = targets_BT.shape
        return cls(T, chunk or _chunk_size(-(-B // shard.batch), T, V), shard)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical names of the axes of rows."""
        return ("batch",) if self.shard.batch == 1 else ("batch", None)

    def tables(self, unembed_VD: jax.Array, dtype: Any) -> jax.Array:
        """The table in `dtype`, a copy for each shard."""
        table = unembed_VD.astype(dtype)
        if self.shard.batch == 1:
            return table
        # In the table's layout first, so that its gradient is reduced to that layout alone.
        table = self.shard(table, "vocab", "width")
        copies = jnp.broadcast_to(table, (self.shard.batch, *table.shape))
        return self.shard(copies, "batch", "vocab", None)

    def cut(self, x_BT: jax.Array) -> jax.Array:
        x, at = x_BT, len(self.axes)  # the axis of T
        if self.shard.batch > 1:
            x = x.reshape(self.shard.batch, -1, *x.shape[1:])
            x = self.shard(x, *self.axes, *(None for _ in x.shape[at:]))
        n = -(-self.T // self.chunk)
        padding = [(0, n * self.chunk - self.T if axis == at else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, padding).reshape(*x.shape[:at], n, self.chunk, *x.shape[at + 1 :])
        return jnp.moveaxis(x, at, 0)

    def join(self, x: jax.Array) -> jax.Array:
        """[B, T, ...], the inverse of `cut`."""
        at = len(self.axes)
        x = jnp.moveaxis(x, 0, at)
        return x.reshape(-1, x.shape[at] * self.chunk, *x.shape[at + 2 :])[:, : self.T]


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # A comparison with iota fuses into its consumer and partitions over a sharded vocabulary; a
    # gather does neither.
    return _ids(logits_BTV) == targets_BT[..., None]


def token_logp(
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    targets_BT: jax.Array,
    config: ModelConfig,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    greedy: bool = False,
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
      greedy: also return whether the target is the likeliest token.
      chunk: positions of each row whose logits exist at once; default: `_chunk_size`.
      shard: constrains the logits on a mesh.

    Returns:
      logp_BT float32, or a tuple of it and of what else is asked for: entropy_BT, greedy_BT (bool).
    """
    chex.assert_rank([hidden_BTD, unembed_VD, targets_BT], [3, 2, 2])
    chunks = _Chunks.of(targets_BT, unembed_VD.shape[0], chunk, shard)

    @jax.checkpoint
    def of_chunk(unembed_VD, hidden_BTD, targets_BT):
        logits = token_logits(hidden_BTD, unembed_VD, config, temperature)
        logits = shard(logits, *chunks.axes, None, "vocab")
        if greedy:  # one array, because logits computed twice may differ in the last bit
            logits = jax.lax.optimization_barrier(logits)
        norm = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.sum(jnp.where(_is_target(logits, targets_BT), logits, 0), axis=-1)
        results = [target - norm]
        if entropy:
            results.append(norm - jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1))
        if greedy:
            results.append(target == jnp.max(logits, axis=-1))
        return tuple(results)

    # The table is rounded before it is gathered. Back in float32, gradients of chunks are summed.
    tables = chunks.tables(unembed_VD, hidden_BTD.dtype).astype(unembed_VD.dtype)
    xs = chunks.cut(hidden_BTD), chunks.cut(targets_BT)
    _, results = jax.lax.scan(lambda _, x: ((), of_chunk(tables, *x)), (), xs)
    results = [chunks.join(x) for x in results]
    return tuple(results) if len(results) > 1 else results[0]


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

    Equals a weighted sum of `token_logp` with a quarter fewer FLOPs at the unembedding: as the
    weights are known, each chunk's logits serve both loss and gradient and are not recomputed.

    Args: as `token_logp`; weights_BT is 0 at positions that do not count.

    Returns:
      float32 [], in nats.
    """
    logp_BT = token_logp(hidden_BTD, unembed_VD, targets_BT, config, chunk=chunk, shard=shard)
    return -jnp.sum(logp_BT * weights_BT)


def _cross_entropy_forward(hidden_BTD, unembed_VD, targets_BT, weights_BT, config, chunk, shard):
    chunks = _Chunks.of(targets_BT, unembed_VD.shape[0], chunk, shard)
    tables = chunks.tables(unembed_VD, hidden_BTD.dtype)

    def add_chunk(carry, x):
        loss, d_tables = carry
        hidden, targets, weights = x
        logits, pullback = jax.vjp(lambda h, w: token_logits(h, w, config), hidden, tables)
        logits = shard(logits, *chunks.axes, None, "vocab")
        norm = jax.nn.logsumexp(logits, axis=-1)
        hit = _is_target(logits, targets)
        nll = norm - jnp.sum(jnp.where(hit, logits, 0), axis=-1)
        d_logits = (jnp.exp(logits - norm[..., None]) - hit) * weights[..., None]
        d_hidden, d_table = pullback(d_logits)
        carry = loss + jnp.sum(nll * weights), d_tables + d_table.astype(jnp.float32)
        return carry, (d_hidden, nll)

    xs = chunks.cut(hidden_BTD), chunks.cut(targets_BT), chunks.cut(weights_BT)
    start = jnp.zeros(()), jnp.zeros_like(tables, jnp.float32)
    (loss, d_tables), (d_hidden, nll) = jax.lax.scan(add_chunk, start, xs)
    if shard.batch > 1:
        d_tables = shard(jnp.sum(d_tables, axis=0), "vocab", "width")
    d_unembed_VD = d_tables.astype(unembed_VD.dtype)
    return loss, (chunks.join(d_hidden), d_unembed_VD, chunks.join(nll))


def _cross_entropy_backward(config, chunk, shard, saved, g):
    d_hidden, d_unembed, nll = saved
    return d_hidden * g.astype(d_hidden.dtype), d_unembed * g.astype(d_unembed.dtype), None, nll * g


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
