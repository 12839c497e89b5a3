"""The decode loop: everything between the prompts on the device and their responses.

Fewer responses are written at a time (slots) than there are to write (rows). A slot whose response
ends takes the next waiting row within the loop: its prompt was prefilled before with all others,
so a refill copies one row of their caches. When no row waits, the slots that still live move into
half as many, twice. Plain batching is the case of as many slots as rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather

from instructjax import models
from instructjax.models import Cache, ModelConfig, Params, Shard
from instructjax.models.attention import NEG_INF
from instructjax.sampler import draw


@flax.struct.dataclass
class Rollout:
    """Responses, a row per sample: the samples of a prompt stand together."""

    tokens_BR: jax.Array  # int32, the response with its EOS; 0 after it
    mask_BR: jax.Array  # bool, a prefix: True up to and including EOS
    logp_BR: jax.Array  # float32, of each token at the sampling temperature; 0 after the end
    live_fraction: Any = None  # float32 [], share of slots' steps that gave a token

    def responses(self) -> list[list[int]]:
        """Token ids of each row, EOS included."""
        # On several hosts, each gets all.
        tokens, lengths = process_allgather((self.tokens_BR, self.mask_BR.sum(-1)), tiled=True)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class Settings(NamedTuple):
    """What a program is compiled for, besides the model and the arrays' shapes."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]
    samples: int
    slots: int  # of one data shard

    @property
    def sizes(self) -> list[int]:
        """Slots of each loop.

        At the end most slots would be idle, if some responses are long: two more programs take
        the time of half as many slots, and of a quarter.
        """
        several = bool(self.eos_ids) and self.slots >= 16
        return [self.slots, self.slots // 2, self.slots // 4] if several else [self.slots]


class Batch(NamedTuple):
    """Prompts padded on the left. The rows that fill up the mesh have the index -1."""

    tokens_BP: Any  # int32
    live_BP: Any  # bool
    index_B: Any  # int32, what a prompt's noise depends on


@flax.struct.dataclass
class State:
    """What the loop carries. B are slots; the rows are those of one data shard."""

    hidden_BD: jax.Array  # of each slot's last token
    cache: Cache  # P columns for prompts, then R that all slots go round in together
    row_B: jax.Array  # int32, the row that a slot writes; idle: the number of rows
    length_B: jax.Array  # int32, tokens of its response so far
    waiting: jax.Array  # int32 [], the first row that has had no slot yet
    steps: jax.Array  # int32 [], tokens drawn by each slot
    spent: jax.Array  # int32 [], the same summed over slots
    out: Rollout  # of all rows


Prompts = tuple[jax.Array, Cache]  # hidden_BD of the last tokens; caches of P columns


def run(
    weights: Params,
    batch: Batch,
    key: jax.Array,
    *,
    config: ModelConfig,
    s: Settings,
    shard: Shard = models.unsharded,
    together: tuple[str, ...] = (),
) -> tuple[Rollout, jax.Array]:
    """One data shard's responses, and the steps that its slots took, [1].

    Args:
      weights: of `_lay_out`.
      together: mesh axes whose shards go on for as long as any of them has work.
    """
    rows, real = len(batch.index_B) * s.samples, jnp.sum(batch.index_B >= 0) * s.samples
    prompts = prefill(weights, batch, config, s, shard)
    state = take(start(prompts, rows, config, s), prompts, real, s, slot=0, n=s.slots)
    more = functools.partial(step, weights, batch.index_B, key, config=config, s=s, shard=shard)

    def more_than(n: int) -> Callable[[State], jax.Array]:
        def unfinished(state: State) -> jax.Array:
            busy = (state.waiting < real) | (jnp.sum(state.row_B < rows) > n)
            return jax.lax.psum(busy.astype(jnp.int32), together) > 0

        return unfinished

    for size, smaller in zip(s.sizes, [*s.sizes[1:], 0], strict=True):
        turn = more
        if size < s.slots:
            state = compact(state, size)
        elif size < rows:
            turn = lambda state: more(refill(state, prompts, real, s))  # noqa: E731
        state = jax.lax.while_loop(more_than(smaller), turn, state)
    return state.out, state.spent[None]


def prefill(weights, batch: Batch, config, s: Settings, shard: Shard) -> Prompts:
    """The prompts, as many at a time as there are slots."""
    B, P = batch.tokens_BP.shape

    def some(tokens_live):
        hidden, cache = models.extend(weights, config, None, *tokens_live, column=0, shard=shard)
        return hidden[:, -1], cache

    n = -(-B // s.slots)
    if n == 1:
        return some(batch[:2])
    even = [jnp.pad(x, ((0, n * s.slots - B), (0, 0))).reshape(n, -1, P) for x in batch[:2]]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:B], jax.lax.map(some, even))


def start(prompts: Prompts, rows: int, config: ModelConfig, s: Settings) -> State:
    """All slots idle."""
    hidden_BD, cache = prompts
    P, R, idle_B = cache.live_BS.shape[1], s.max_new_tokens, jnp.full(s.slots, rows)
    zero = jnp.int32(0)
    return State(
        hidden_BD=jnp.zeros((s.slots, config.width), hidden_BD.dtype),
        cache=Cache.create(config, s.slots, P + R, cache.stacked),
        row_B=idle_B,
        length_B=jnp.zeros_like(idle_B),
        waiting=zero,
        steps=zero,
        spent=zero,
        out=Rollout(
            jnp.zeros((rows, R), jnp.int32), jnp.zeros((rows, R), bool), jnp.zeros((rows, R))
        ),
    )


def take(state: State, prompts: Prompts, real: jax.Array, s: Settings, slot, n: int) -> State:
    """The next n waiting rows, if so many are real, go to `slot` and the slots after it."""
    row_n = state.waiting + jnp.arange(n)
    put = lambda x, y: jax.lax.dynamic_update_slice(x, y, (slot, *[0] * (x.ndim - 1)))  # noqa: E731
    copied = jax.tree.map(lambda x: x[row_n // s.samples], prompts)
    hidden_BD, cache = jax.tree.map(put, (state.hidden_BD, state.cache), copied)
    # The response before this one, if there was any, is no longer seen.
    clean = jnp.zeros((n, s.max_new_tokens), bool)
    seen = jnp.concatenate([copied[1].live_BS, clean], axis=1)
    return dataclasses.replace(
        state,
        hidden_BD=hidden_BD,
        cache=cache.replace(live_BS=put(cache.live_BS, seen)),
        row_B=put(state.row_B, jnp.where(row_n < real, row_n, len(state.out.mask_BR))),
        length_B=put(state.length_B, jnp.zeros_like(row_n)),
        waiting=state.waiting + n,
    )


def refill(state: State, prompts: Prompts, real: jax.Array, s: Settings) -> State:
    """Idle slots take waiting rows, one a turn: the work is that of the rows that are copied."""
    rows = len(state.out.mask_BR)

    def due(state: State) -> jax.Array:
        return (state.waiting < real) & jnp.any(state.row_B == rows)

    def one(state: State) -> State:
        return take(state, prompts, real, s, jnp.argmax(state.row_B), 1)  # an idle one

    return jax.lax.while_loop(due, one, state)


def step(
    weights: Params,
    index_B: jax.Array,
    key: jax.Array,
    state: State,
    *,
    config: ModelConfig,
    s: Settings,
    shard: Shard = models.unsharded,
) -> State:
    """One more token in each slot. Idle slots draw one too, which goes nowhere."""
    rows, R = state.out.mask_BR.shape
    row_B, length_B, live_B = state.row_B, state.length_B, state.row_B < rows
    unembed_VD = weights["unembed"]["kernel"]
    hidden_BTD = state.hidden_BD[:, None]
    logits_BV = models.token_logits(hidden_BTD, unembed_VD, config, s.temperature)[:, 0]
    logits_BV = allowed_BV = shard(logits_BV, "batch", "vocab")
    eos = jnp.array(s.eos_ids, jnp.int32)
    if s.eos_ids and s.min_new_tokens:
        early_B1 = (length_B < s.min_new_tokens)[:, None]
        ends_1V = jnp.isin(jnp.arange(logits_BV.shape[1]), eos)[None]
        allowed_BV = jnp.where(early_B1 & ends_1V, NEG_INF, logits_BV)
    whose = index_B[row_B // s.samples], row_B % s.samples, length_B
    noise_BV = draw.noise(key, *whose, config.vocab_size, logits_BV.shape[1])
    token_B = draw.argmax(draw.restrict(allowed_BV, s.top_k, s.top_p) + noise_BV)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    put = lambda x, y: x.at[row_B, length_B].set(y, mode="drop")  # noqa: E731
    out = jax.tree.map(put, state.out, Rollout(token_B, live_B, logp_B))

    # All slots write the same column, and go round in the last R of them: what a slot overwrites
    # there is R steps old, of a response that has ended.
    column = state.cache.live_BS.shape[1] - R + state.steps % R
    new = token_B[:, None], live_B[:, None]
    hidden, cache = models.extend(weights, config, state.cache, *new, column=column, shard=shard)
    ended_B = (length_B + 1 == R) | jnp.isin(token_B, eos)
    return dataclasses.replace(
        state,
        hidden_BD=hidden[:, 0],
        cache=cache,
        row_B=jnp.where(ended_B, rows, row_B),
        length_B=length_B + 1,
        steps=state.steps + 1,
        spent=state.spent + len(row_B),
        out=out,
    )


def compact(state: State, size: int) -> State:
    """Moves the slots that are not idle into `size` ones."""
    first = jnp.argsort(state.row_B)[:size]  # idle ones come last
    slots = state.hidden_BD, state.cache, state.row_B, state.length_B
    hidden_BD, cache, row_B, length_B = jax.tree.map(lambda x: x[first], slots)
    return dataclasses.replace(
        state, hidden_BD=hidden_BD, cache=cache, row_B=row_B, length_B=length_B
    )
