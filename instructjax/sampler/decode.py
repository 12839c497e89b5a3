"""The decode loop: from padded prompts to responses, all on the device.

A row is a response to write. A slot writes one row at a time, and there may be fewer slots than
rows. All prompts are prefilled first. A slot whose response has ended takes the next waiting row,
which costs a copy of its prompt's cache. When no row waits, the busy slots move into half as many,
and later into a quarter. With as many slots as rows, this is plain batching.

Six rows in four slots. A cell is the row that the slot writes; a dot marks the row's last token.
(Slots shrink from 16 up; here they shrink from four.)

    step       0    1    2  |  3  |  4    5
    column    P+0  P+1  P+2 | P+3 | P+4  P+5
    slot 0     0    0    0  |  0. |  2    2.
    slot 1     1.   4    4. |  2  |
    slot 2     2    2    2  |
    slot 3     3    3.   5. |

Row 4 refills slot 1 before step 1, and row 5 refills slot 3 before step 2. After step 2 no row
waits and two slots are busy, so rows 0 and 2 move into two slots; after step 3, row 2 moves into
one. At each step all slots write the same column, P + step % R. The token that is overwritten
there is R steps old, so its response has ended.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather

from instructjax import models
from instructjax.models import Cache, ModelConfig, Params, Shard
from instructjax.models.attention import NEG_INF
from instructjax.sampler import draw
from instructjax.sampler.draw import Distribution


@flax.struct.dataclass
class Rollout:
    """Responses, one row per sample; the samples of a prompt are neighbours."""

    tokens_BR: jax.Array  # int32, the response with its EOS; 0 after it
    mask_BR: jax.Array  # bool, a prefix: True up to and including EOS
    logp_BR: jax.Array  # float32, of each token at the sampling temperature; 0 after the end
    live_fraction: Any = None  # float32 [], share of the slots' steps that gave a token

    def responses(self) -> list[list[int]]:
        """Token ids of each row, EOS included; every host gets all rows."""
        tokens, lengths = process_allgather((self.tokens_BR, self.mask_BR.sum(-1)), tiled=True)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class Settings(NamedTuple):
    """What a program is compiled for, besides the arrays' shapes."""

    config: ModelConfig
    max_new_tokens: int
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    samples: int = 1  # of each prompt
    slots: int = 1  # of one data shard
    shard: Shard = models.unsharded


class PaddedPrompts(NamedTuple):
    """Prompts padded on the left. Rows that only fill up the mesh have the number -1."""

    tokens_BP: Any  # int32
    mask_BP: Any  # bool
    number_B: Any  # int32, what a prompt's noise depends on


class Prefilled(NamedTuple):
    """Prompts after their prefill."""

    hidden_BD: jax.Array  # of each prompt's last token
    cache: Cache  # of P columns


class Slots(NamedTuple):
    """What each slot (B) holds."""

    hidden_BD: jax.Array  # of the last token
    cache: Cache  # P columns of the prompt, then R columns of responses
    row_B: jax.Array  # int32, the row that the slot writes; the number of rows if it is idle
    length_B: jax.Array  # int32, tokens of the response so far


@flax.struct.dataclass
class State:
    """What the loop of one data shard carries."""

    slots: Slots
    real_rows: jax.Array  # int32 [], rows to write; the rows after them fill up the mesh
    next_row: jax.Array  # int32 [], the first row that has had no slot yet
    steps: jax.Array  # int32 [], steps so far
    slot_steps: jax.Array  # int32 [], the number of slots, summed over these steps
    rollout: Rollout  # of all rows


def decode(
    weights: Params,
    prompts: PaddedPrompts,
    key: jax.Array,
    distribution: Distribution,
    settings: Settings,
    lockstep_axes: tuple[str, ...] = (),
) -> tuple[Rollout, jax.Array]:
    """Writes the responses of one data shard.

    Args:
      weights: see `sample.lay_out`.
      lockstep_axes: mesh axes whose shards go on for as long as any of them has work.

    Returns:
      (the rollout of all rows, the steps that its slots took [1]).
    """
    state, prefilled = begin(weights, prompts, settings)
    rows, n = len(state.rollout.mask_BR), settings.slots

    def has_work(state: State, next_size: int) -> jax.Array:
        busy = jnp.sum(state.slots.row_B < rows)
        work = (state.next_row < state.real_rows) | (busy > next_size)
        return jax.lax.psum(work.astype(jnp.int32), lockstep_axes) > 0

    def step(state: State) -> State:
        if len(state.slots.row_B) == n < rows:  # later loops begin when no row waits
            state = refill(state, prefilled)
        return draw_and_extend(weights, prompts.number_B, key, distribution, state, settings)

    # The loop shrinks at the end, so that the last, long responses take less time.
    sizes = [n, n // 2, n // 4, 0] if settings.eos_ids and n >= 16 else [n, 0]
    for size, next_size in itertools.pairwise(sizes):
        if size < n:
            state = compact(state, size)
        state = jax.lax.while_loop(functools.partial(has_work, next_size=next_size), step, state)
    return state.rollout, state.slot_steps[None]


def begin(weights: Params, prompts: PaddedPrompts, settings: Settings) -> tuple[State, Prefilled]:
    """Prefills all prompts and gives the first rows to the slots."""
    prefilled = prefill(weights, prompts, settings)
    (B, P), n, R = prompts.tokens_BP.shape, settings.slots, settings.max_new_tokens
    rows = B * settings.samples
    idle = Slots(
        hidden_BD=jnp.zeros_like(prefilled.hidden_BD, shape=(n, settings.config.width)),
        cache=Cache.create(settings.config, n, P + R, prefilled.cache.stacked),
        row_B=jnp.full(n, rows),
        length_B=jnp.full(n, 0),
    )
    empty = [jnp.zeros((rows, R), dtype) for dtype in (jnp.int32, bool, jnp.float32)]
    real_rows = jnp.sum(prompts.number_B >= 0) * settings.samples
    zero = jnp.int32(0)
    state = State(idle, real_rows, zero, zero, zero, Rollout(*empty))
    return assign_rows(state, prefilled, slot=0, n=n), prefilled


def prefill(weights: Params, prompts: PaddedPrompts, settings: Settings) -> Prefilled:
    """Runs the model on the prompts, as many at a time as there are slots."""
    B, P = prompts.tokens_BP.shape

    def run(tokens_mask) -> Prefilled:
        where: Any = {"column": 0, "shard": settings.shard}
        hidden, cache = models.extend(weights, settings.config, None, *tokens_mask, **where)
        return Prefilled(hidden[:, -1], cache)

    turns = -(-B // settings.slots)
    if turns == 1:
        return run(prompts[:2])
    padding = (0, turns * settings.slots - B), (0, 0)
    stacked = [jnp.pad(x, padding).reshape(turns, -1, P) for x in prompts[:2]]
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:B], jax.lax.map(run, stacked))


def assign_rows(state: State, prefilled: Prefilled, slot: jax.Array | int, n: int) -> State:
    """Gives the next n rows to n slots, from `slot` on; a slot without a real row is idle."""
    rows, R = state.rollout.mask_BR.shape
    samples = rows // len(prefilled.hidden_BD)
    row_n = state.next_row + jnp.arange(n)
    hidden_nD, cache = jax.tree.map(lambda x: x[row_n // samples], prefilled)
    # The R columns of the slot's last response are no longer seen.
    cache = cache.replace(live_BS=jnp.pad(cache.live_BS, ((0, 0), (0, R))))
    row_or_idle_n = jnp.where(row_n < state.real_rows, row_n, rows)
    given = Slots(hidden_nD, cache, row_or_idle_n, jnp.zeros_like(row_n))
    put = lambda x, new: jax.lax.dynamic_update_slice(x, new, (slot, *[0] * (x.ndim - 1)))  # noqa: E731
    slots = jax.tree.map(put, state.slots, given)
    return dataclasses.replace(state, slots=slots, next_row=state.next_row + n)


def refill(state: State, prefilled: Prefilled) -> State:
    """Gives waiting rows to idle slots, one at a time: the work is that of the rows copied."""
    idle = len(state.rollout.mask_BR)

    def unfilled(state: State) -> jax.Array:
        return (state.next_row < state.real_rows) & jnp.any(state.slots.row_B == idle)

    def refill_slot(state: State) -> State:
        return assign_rows(state, prefilled, slot=jnp.argmax(state.slots.row_B), n=1)

    return jax.lax.while_loop(unfilled, refill_slot, state)


def draw_and_extend(
    weights: Params,
    number_B: jax.Array,
    key: jax.Array,
    distribution: Distribution,
    state: State,
    settings: Settings,
) -> State:
    """Draws a token in each slot and runs the model on it. The tokens of idle slots are dropped."""
    (hidden_BD, cache, row_B, length_B), s = state.slots, settings
    rows, R = state.rollout.mask_BR.shape
    live_B = row_B < rows

    hidden_B1D, unembed_VD = hidden_BD[:, None], weights["unembed"]["kernel"]
    logits_B1V = models.token_logits(hidden_B1D, unembed_VD, s.config, distribution.divisor)
    logits_BV = logits_B1V[:, 0]
    logits_BV = allowed_BV = s.shard(logits_BV, "batch", "vocab")
    eos = jnp.array(s.eos_ids, jnp.int32)
    if s.eos_ids and s.min_new_tokens:
        early_B1 = (length_B < s.min_new_tokens)[:, None]
        ends_1V = jnp.isin(jnp.arange(logits_BV.shape[1]), eos)[None]
        allowed_BV = jnp.where(early_B1 & ends_1V, NEG_INF, logits_BV)
    counters = number_B[row_B // s.samples], row_B % s.samples, length_B
    noise_BV = draw.noise(key, *counters, s.config.vocab_size, logits_BV.shape[1])
    token_B = draw.draw(allowed_BV, noise_BV, distribution)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    record = lambda x_BR, new_B: x_BR.at[row_B, length_B].set(new_B, mode="drop")  # noqa: E731
    rollout = jax.tree.map(record, state.rollout, Rollout(token_B, live_B, logp_B))

    column = cache.live_BS.shape[1] - R + state.steps % R
    new = token_B[:, None], live_B[:, None]
    hidden, cache = models.extend(weights, s.config, cache, *new, column=column, shard=s.shard)
    ended_B = (length_B + 1 == R) | jnp.isin(token_B, eos)
    return dataclasses.replace(
        state,
        slots=Slots(hidden[:, 0], cache, jnp.where(ended_B, rows, row_B), length_B + 1),
        steps=state.steps + 1,
        slot_steps=state.slot_steps + len(row_B),
        rollout=rollout,
    )


def compact(state: State, size: int) -> State:
    """Moves the busy slots into `size` slots."""
    first = jnp.argsort(state.slots.row_B)[:size]  # idle ones come last
    return dataclasses.replace(state, slots=jax.tree.map(lambda x: x[first], state.slots))
