"""Sampling: prefill, then a decode loop that never leaves the device.

A row's noise is a function of (key, prompt index, sample, position) alone, so a prompt gets the
same tokens in any batch, under any padding and on any mesh.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax import models, sharding
from instructjax.models import Cache, ModelConfig, Params, Shard
from instructjax.models.attention import NEG_INF


@flax.struct.dataclass
class Rollout:
    """Responses, a row per sample: the samples of a prompt stand together."""

    tokens_BR: jax.Array  # int32, the response with its EOS; 0 after it
    mask_BR: jax.Array  # bool, a prefix: True up to and including EOS
    logp_BR: jax.Array  # float32, of each token at the sampling temperature; 0 after the end

    def responses(self) -> list[list[int]]:
        """Token ids of each row, EOS included."""
        tokens, lengths = jax.device_get((self.tokens_BR, self.mask_BR.sum(-1)))
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    samples_per_prompt: int = 1,
    indices: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Samples responses until EOS, or for max_new_tokens.

    Args:
      prompts: lists of token ids, none empty.
      key: of all noise; the same key gives the same responses.
      temperature: logits are divided by it.
      top_k, top_p: sample among the k likeliest tokens, and among the likeliest of total
        probability p; 0 and 1 turn them off. `logp_BR` is of the whole distribution all the same.
      eos_ids: tokens that end a response; default: the config's.
      samples_per_prompt: they share the prompt's prefill.
      indices: of the prompts, in the data: what their noise depends on. Default: 0, 1, ...
      mesh: rows are split over data x fsdp.

    Returns:
      a Rollout of len(prompts) * samples_per_prompt rows.

    Raises:
      ValueError: a prompt is empty, or leaves no room in the model's context.
    """
    longest = max(map(len, prompts))
    if not all(prompts):
        raise ValueError("a prompt is empty")
    if longest + max_new_tokens > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's"
            f" context of {config.max_length}"
        )
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError("temperature must be positive, top_p in (0, 1], top_k not negative")
    width = -(-longest // 32) * 32  # few compiled shapes
    rows = len(prompts)
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = -(-rows // shards) * shards
    tokens, live = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    live[:, -1] = True  # rows that only fill up the mesh
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        live[i, width - len(prompt) :] = True
    at = np.zeros(rows, np.int32)
    at[: len(prompts)] = np.arange(len(prompts)) if indices is None else indices
    batch = (tokens, live, at)
    if mesh is not None:
        batch = jax.device_put(batch, sharding.batched(mesh))
    rollout = _generate(
        params,
        *batch,
        key,
        config=config,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=tuple(eos_ids) or config.eos_ids,
        samples=samples_per_prompt,
        shard=_shard_of(mesh),
    )
    return jax.tree.map(lambda x: x[: len(prompts) * samples_per_prompt], rollout)


@functools.cache
def _shard_of(mesh: Mesh | None) -> Shard:
    # One function a mesh: a new one would compile anew.
    return models.unsharded if mesh is None else sharding.constrainer(mesh)


_STATIC = ("config", "max_new_tokens", "temperature", "top_k", "top_p", "eos_ids", "samples")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "shard"))
def _generate(
    params: Params,
    tokens_BP: jax.Array,
    live_BP: jax.Array,
    index_B: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: tuple[int, ...],
    samples: int,
    shard: Shard,
) -> Rollout:
    B, P = tokens_BP.shape
    R = max_new_tokens
    unembed_VD = models.unembedding(params).astype(config.dtype)
    params = models.unstack(params, config)
    cache = Cache.create(config, B, P + R)
    hidden, cache = models.extend(params, config, cache, tokens_BP, live_BP, shard=shard)
    # The samples of a prompt share its prefill: rows b 0, b 1, ... of each prompt.
    repeat = lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x  # noqa: E731
    cache, hidden_BD = jax.tree.map(repeat, (cache, hidden[:, -1]))
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, repeat(index_B))
    sample_B = jnp.tile(jnp.arange(samples), B)
    row_keys = jax.vmap(jax.random.fold_in)(prompt_keys, sample_B)

    def noise(row_key, r):
        # Of the real vocabulary: its padding must not change the draw.
        gumbel = jax.random.gumbel(jax.random.fold_in(row_key, r), (config.vocab_size,))
        return jnp.pad(gumbel, (0, unembed_VD.shape[0] - config.vocab_size))

    def step(carry):
        r, hidden_BD, cache, done_B, out = carry
        logits_BV = models.token_logits(hidden_BD[:, None], unembed_VD, config, temperature)[:, 0]
        noise_BV = jax.vmap(noise, (0, None))(row_keys, r)
        token_B = jnp.argmax(_restrict(logits_BV, top_k, top_p) + noise_BV, axis=-1)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        live_B = ~done_B
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(  # noqa: E731
            x, jnp.where(live_B, y, 0).astype(x.dtype), r, axis=1
        )
        out = Rollout(put(out.tokens_BR, token_B), put(out.mask_BR, 1), put(out.logp_BR, logp_B))
        ended_B = (
            jnp.isin(token_B, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(done_B)
        )
        # Rows that are done go on sampling; what they give is masked.
        hidden, cache = models.extend(params, config, cache, token_B[:, None], shard=shard)
        return r + 1, hidden[:, 0], cache, done_B | ended_B, out

    def unfinished(carry):
        r, _, _, done_B, _ = carry
        return (r < R) & ~jnp.all(done_B)

    rows = B * samples
    out = Rollout(jnp.zeros((rows, R), jnp.int32), jnp.zeros((rows, R), bool), jnp.zeros((rows, R)))
    start = (jnp.int32(0), hidden_BD, cache, jnp.zeros(rows, bool), out)
    return jax.lax.while_loop(unfinished, step, start)[-1]


def _restrict(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """-inf outside the k likeliest tokens, then outside the nucleus of probability p."""
    if top_k:
        kth = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, NEG_INF, logits_BV)
    if top_p < 1:
        ordered = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        # A token stays if what is likelier has not reached p yet; the likeliest always stays.
        kept = jnp.sum(jnp.cumsum(p, axis=-1) - p < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < least, NEG_INF, logits_BV)
    return logits_BV
