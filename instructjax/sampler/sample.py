"""Sampling: prompts in, a Rollout out; and one response as a stream of tokens.

A row's noise is a function of (key, prompt index, sample, position) alone, so a prompt gets the
same tokens in any batch, slot and bucket, under any padding and on any mesh.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from instructjax import models, sharding
from instructjax.models import ModelConfig, Params
from instructjax.sampler import decode
from instructjax.sampler.decode import Batch, Rollout, Settings, State


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    samples_per_prompt: int = 1,
    indices: Sequence[int] | None = None,
    slots: int | None = None,
    widths: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Rollout:
    """Samples responses until EOS, or for max_new_tokens.

    Args:
      prompts: lists of token ids, none empty.
      key: of all noise; the same key gives the same responses.
      min_new_tokens: EOS is not drawn before this many tokens are there.
      temperature: logits are divided by it.
      top_k, top_p: sample among the k likeliest tokens, and among the likeliest of total
        probability p; 0 and 1 turn them off. `logp_BR` is of the whole distribution all the same,
        and so it is where min_new_tokens forbids EOS.
      eos_ids: tokens that end a response; default: the config's.
      samples_per_prompt: they share the prompt's prefill.
      indices: of the prompts, in the data: what their noise depends on. Default: 0, 1, ...
      slots: responses written at a time on the whole mesh, which changes no token; default: a
        quarter of the rows, but 8 to a data shard, and all of them if none can end early.
      widths: that prompts are padded to, see `buckets`; default: multiples of 32.
      mesh: rows are split over data x fsdp, each data shard with slots and a queue of its own.

    Returns:
      a Rollout of len(prompts) * samples_per_prompt rows.

    Raises:
      ValueError: a prompt is empty, leaves no room in the model's context or is wider than all of
        `widths`; a setting is out of range.
    """
    per_shard, settings = plan(
        len(prompts),
        max_new_tokens,
        tuple(eos_ids) or config.eos_ids,
        mesh,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        samples_per_prompt=samples_per_prompt,
        slots=slots,
    )
    batch = _padded(config, settings, prompts, indices, per_shard * _shards(mesh), widths)
    if mesh is not None:
        batch = jax.device_put(batch, sharding.batched(mesh))
    static = {"config": config, "settings": settings, "mesh": mesh}
    out, live_fraction = generate_on_device(params, batch, key, **static)
    out = jax.tree.map(lambda x: x[: len(prompts) * samples_per_prompt], out)
    return out.replace(live_fraction=live_fraction)


def plan(
    prompts: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    mesh: Mesh | None = None,
    *,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    slots: int | None = None,
) -> tuple[int, Settings]:
    """(prompts of a data shard, what its program is compiled for); see `generate`."""
    shards = _shards(mesh)
    per_shard = -(-prompts // shards)
    rows = per_shard * samples_per_prompt
    can_end = bool(eos_ids) and min_new_tokens < max_new_tokens
    default = shards * (max(8, -(-rows // 4)) if can_end else rows)
    shape = samples_per_prompt, min(-(-(default if slots is None else slots) // shards), rows)
    sizes = max_new_tokens, min_new_tokens
    return per_shard, Settings(*sizes, temperature, top_k, top_p, eos_ids, *shape)


def stream(
    params: Params,
    config: ModelConfig,
    prompt: Sequence[int],
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    mesh: Mesh | None = None,
) -> Iterator[int]:
    """Yields the tokens of `generate` for one prompt as they come, EOS included."""
    eos_ids = tuple(eos_ids) or config.eos_ids
    s = Settings(max_new_tokens, 0, temperature, top_k, top_p, eos_ids, samples=1, slots=1)
    batch = _padded(config, s, [prompt], None, 1, ())
    weights = jax.jit(_lay_out, static_argnums=(1, 2))(params, config, mesh)
    state = _begin(weights, batch, config=config, settings=s)
    while state.row_B[0] == 0:  # it is idle when row 0 is done
        state = _advance(weights, batch, key, state, config=config, settings=s)
        yield int(state.out.tokens_BR[0, state.length_B[0] - 1])


def buckets(lengths: Sequence[int], most: int = 4, multiple: int = 16) -> tuple[int, ...]:
    """At most `most` widths to pad prompts of these lengths to, the last one that of the longest.

    A width is a compiled program. Each is added where it saves the most padding.
    """
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    left, chosen = sorted(set(rounded.tolist())), []

    def columns(width: int) -> int:
        widths = np.array(sorted([*chosen, width]))
        return int(widths[np.searchsorted(widths, rounded)].sum())

    chosen.append(left.pop())
    while left and len(chosen) < most:
        chosen.append(min(left, key=columns))
        left.remove(chosen[-1])
    return tuple(sorted(chosen))


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def _padded(config, s: Settings, prompts, indices, rows: int, widths: Sequence[int]) -> Batch:
    """A batch of `rows` rows, once all is known to be in range."""
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt, or a prompt is empty")
    R, longest = s.max_new_tokens, max(map(len, prompts))
    if longest + R > config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and {R} new ones do not fit the model's"
            f" context of {config.max_length}"
        )
    if s.temperature <= 0 or not 0 < s.top_p <= 1 or s.top_k < 0:
        raise ValueError("temperature must be positive, top_p in (0, 1], top_k not negative")
    if not 0 <= s.min_new_tokens <= R or s.slots < 1:
        raise ValueError("min_new_tokens must be in [0, max_new_tokens], slots at least 1")
    fitting = [width for width in widths or [-(-longest // 32) * 32] if width >= longest]
    if not fitting:
        raise ValueError(f"a prompt of {longest} tokens is wider than every width of {widths}")
    P = min(*fitting, config.max_length - R)
    batch = Batch(
        np.zeros((rows, P), np.int32), np.zeros((rows, P), bool), np.full(rows, -1, np.int32)
    )
    for i, prompt in enumerate(prompts):
        batch.tokens_BP[i, P - len(prompt) :] = prompt
        batch.live_BP[i, P - len(prompt) :] = True
    batch.index_B[: len(prompts)] = np.arange(len(prompts)) if indices is None else indices
    return batch


# ---------------------------------------------------------------------------- on the device


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"))
def generate_on_device(params, batch: Batch, key, *, config, settings, mesh: Mesh | None):
    """`generate`'s program: the Rollout of all rows, and the share of live slots."""
    weights = _lay_out(params, config, mesh)
    run = functools.partial(decode.run, config=config, s=settings)
    if mesh is not None:
        # A loop to each data shard; what is split over tensor is left to the compiler, and as its
        # collectives may not be met by some shards alone, all then take their steps together.
        rows, whole = PartitionSpec(sharding.RULES["batch"]), PartitionSpec()
        run = jax.shard_map(
            functools.partial(
                run,
                shard=sharding.constrainer(mesh, sharding.GENERATION),
                together=sharding.RULES["batch"] if mesh.shape["tensor"] > 1 else (),
            ),
            mesh=mesh,
            in_specs=(whole, rows, whole),
            out_specs=rows,
            axis_names=set(sharding.RULES["batch"]),
            check_vma=False,
        )
    out, spent = run(weights, batch, key)
    return out, jnp.sum(out.mask_BR) / (jnp.max(spent) * len(spent))


def _lay_out(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Weights for decoding, in the compute dtype, gathered over data and fsdp.

    A tree a layer; on TPUs stacked (see `models.extend`), so that deep models compile soon.
    """

    def cast(tree: Params, vector: int) -> Params:
        """All but the norms' vectors, which compute in float32."""
        return jax.tree.map(lambda x: x.astype(config.dtype) if x.ndim > vector else x, tree)

    weights = cast({**params, "unembed": {"kernel": models.unembedding(params)}}, vector=1)
    weights |= {"layers": cast(params["layers"], vector=2)}
    axes = models.logical_axes(config) | {"unembed": {"kernel": ("vocab", "width")}}
    if mesh is None or not sharding.constrainer(mesh).fused:
        weights = models.unstack(weights, config)
        names = axes["layers"]
        layer = jax.tree.map(lambda x: x[1:], names, is_leaf=lambda x: isinstance(x, tuple))
        axes |= {"layers": [layer] * config.layers}
    if mesh is None:
        return weights
    layout = sharding.shardings(axes, weights, mesh, sharding.GENERATION)
    return jax.lax.with_sharding_constraint(weights, layout)


# ---------------------------------------------------------------------------- a token at a time


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def _begin(weights, batch: Batch, *, config, settings) -> State:
    prompts = decode.prefill(weights, batch, config, settings, models.unsharded)
    idle = decode.start(prompts, 1, config, settings)
    return decode.take(idle, prompts, jnp.int32(1), settings, slot=0, n=1)


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnames="state")
def _advance(weights, batch: Batch, key, state, *, config, settings) -> State:
    return decode.step(weights, batch.index_B, key, state, config=config, s=settings)
