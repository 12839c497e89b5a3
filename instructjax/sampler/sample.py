"""Sampling: prompts in, a Rollout out.

The noise of a token depends on (key, number of its prompt, sample index, position) alone. A prompt
therefore gets the same tokens in any batch, slot and bucket, under any padding and on any mesh.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from instructjax import models, sharding
from instructjax.models import ModelConfig, Params
from instructjax.sampler import decode
from instructjax.sampler.decode import PaddedPrompts, Rollout, Settings
from instructjax.sampler.draw import Distribution


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
      min_new_tokens: no EOS is drawn before this many tokens.
      temperature: logits are divided by it. At 0 the likeliest token is taken, and `logp_BR` is
        that of temperature 1.
      top_k, top_p: sample among the k likeliest tokens, and among the likeliest tokens of total
        probability p; 0 and 1 turn them off. `logp_BR` is of the whole distribution all the same,
        also where min_new_tokens forbids EOS.
      eos_ids: tokens that end a response. Default: the config's.
      samples_per_prompt: the samples share the prompt's prefill.
      indices: what a row's noise depends on: the number of the episode in its stream, or the index
        of the prompt in the data. Two rows with the same number and sample index get the same
        noise. Default: 0, 1, ...
      slots: responses written at a time on the whole mesh; changes no token. Default: a quarter of
        the rows but at least 8 per data shard; all rows if no response can end early.
      widths: lengths that prompts may be padded to, see `buckets`. Default: multiples of 32.
      mesh: rows are split over data x fsdp; each data shard has its own slots and queue.

    Returns:
      a Rollout of len(prompts) * samples_per_prompt rows.

    Raises:
      ValueError: a prompt is empty, leaves no room in the model's context or is longer than all
        `widths`; a setting is out of range.
    """
    eos_ids = tuple(eos_ids) or config.eos_ids
    settings = Settings(config, max_new_tokens, min_new_tokens, eos_ids, samples_per_prompt)
    distribution = Distribution.create(
        temperature,
        top_k or None,
        None if top_p == 1 else top_p,  # None leaves the work out
    )
    per_shard, settings = plan(len(prompts), settings, mesh, slots)
    padded: Any = _checked_and_padded(prompts, indices, per_shard * _shards(mesh), widths, settings)
    if mesh is not None:
        padded = jax.device_put(padded, sharding.batched(mesh))
    rollout, live_fraction = generate_on_device(
        params, padded, key, distribution, settings=settings, mesh=mesh
    )
    rollout = jax.tree.map(lambda x: x[: len(prompts) * samples_per_prompt], rollout)
    return rollout.replace(live_fraction=live_fraction)


def plan(
    prompts: int, settings: Settings, mesh: Mesh | None = None, slots: int | None = None
) -> tuple[int, Settings]:
    """(prompts of a data shard, the settings with its slots); `slots` as in `generate`."""
    per_shard = -(-prompts // _shards(mesh))
    rows = per_shard * settings.samples
    can_end = settings.eos_ids and settings.min_new_tokens < settings.max_new_tokens
    default = max(8, -(-rows // 4)) if can_end else rows
    shard_slots = default if slots is None else -(-slots // _shards(mesh))
    return per_shard, settings._replace(slots=min(shard_slots, rows))


# ---------------------------------------------------------------------------- padding


def buckets(
    lengths: Sequence[int], most: int = 4, multiple: int = 16, longest: int | None = None
) -> tuple[int, ...]:
    """At most `most` widths, in ascending order, to pad sequences of these lengths to.

    Each width is a compiled program. The greatest holds the longest sequence; each further one is
    chosen to save the most padding.

    Args:
      multiple: widths are multiples of this.
      longest: a width beyond this one, the greatest that a sequence may have, is cut to it.
    """
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    if longest is not None:
        rounded = np.minimum(rounded, longest)
    candidates, chosen = sorted(set(rounded.tolist())), []

    def columns(width: int) -> int:
        widths = np.array(sorted([*chosen, width]))
        return int(widths[np.searchsorted(widths, rounded)].sum())

    chosen.append(candidates.pop())
    while candidates and len(chosen) < most:
        chosen.append(min(candidates, key=columns))
        candidates.remove(chosen[-1])
    return tuple(sorted(chosen))


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BP, mask_BP) of lists of token ids, padded on the left to `width`, in NumPy."""
    tokens_BP = np.zeros((len(prompts), width), np.int32)
    mask_BP = np.zeros((len(prompts), width), bool)
    for tokens_P, mask_P, prompt in zip(tokens_BP, mask_BP, prompts, strict=True):
        tokens_P[width - len(prompt) :] = prompt
        mask_P[width - len(prompt) :] = True
    return tokens_BP, mask_BP


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def check_lengths(prompts: Sequence[Sequence[int]], new: int, context: int) -> int:
    """Length of the longest prompt; raises ValueError if it and `new` tokens do not fit."""
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt, or a prompt is empty")
    longest = max(map(len, prompts))
    if longest + new > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones do not fit the model's"
            f" context of {context}"
        )
    return longest


def _checked_and_padded(
    prompts, indices, rows: int, widths: Sequence[int], s: Settings
) -> PaddedPrompts:
    """The prompts and filler up to `rows`, once all arguments are known to be in range."""
    R, longest = s.max_new_tokens, check_lengths(prompts, s.max_new_tokens, s.config.max_length)
    if not 0 <= s.min_new_tokens <= R or s.slots < 1:
        raise ValueError("min_new_tokens must be in [0, max_new_tokens], slots at least 1")
    fitting = [width for width in widths or [-(-longest // 32) * 32] if width >= longest]
    if not fitting:
        raise ValueError(f"a prompt of {longest} tokens is wider than every width of {widths}")
    filler = rows - len(prompts)
    padded = pad_prompts([*prompts, *[()] * filler], min(*fitting, s.config.max_length - R))
    numbers = np.arange(len(prompts)) if indices is None else np.asarray(indices)
    return PaddedPrompts(*padded, np.pad(numbers.astype(np.int32), (0, filler), constant_values=-1))


# ---------------------------------------------------------------------------- on the device


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def generate_on_device(
    params: Params,
    prompts: PaddedPrompts,
    key: jax.Array,
    distribution: Distribution,
    *,
    settings: Settings,
    mesh: Mesh | None,
) -> tuple[Rollout, jax.Array]:
    """`generate`'s program: (the Rollout of all rows, the share of live slots)."""
    weights = lay_out(params, settings.config, mesh)
    if mesh is None:
        rollout, slot_steps = decode.decode(weights, prompts, key, distribution, settings)
    else:
        # Each data shard runs its own loop, and the compiler splits the work over tensor. All
        # shards must then meet in its collectives, so they take their steps in lockstep.
        axes, whole = sharding.RULES["batch"], PartitionSpec()
        settings = settings._replace(shard=sharding.constrainer(mesh, sharding.GENERATION))
        lockstep_axes = axes if mesh.shape["tensor"] > 1 else ()
        rollout, slot_steps = jax.shard_map(
            functools.partial(decode.decode, settings=settings, lockstep_axes=lockstep_axes),
            mesh=mesh,
            in_specs=(whole, PartitionSpec(axes), whole, whole),
            out_specs=PartitionSpec(axes),
            axis_names=set(axes),
            check_vma=False,
        )(weights, prompts, key, distribution)
    return rollout, jnp.sum(rollout.mask_BR) / (jnp.max(slot_steps) * len(slot_steps))


def lay_out(params: Params, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Weights for decoding: in the compute dtype (`models.cast`), gathered over data and fsdp.

    In float32 an adapter is merged into them. That costs what one row's forward pass of J tokens
    costs, J the rank, and a token then costs what it costs without an adapter. In bfloat16 an
    adapter stays beside them, which adds two small matrix products to each matrix and token: a
    merged matrix is rounded to bfloat16, and most of a small adapter would be lost. With changes of
    3e-5 (standard deviation) to weights of 0.02, 68 % of the entries would stay as they were.

    One tree per layer; on TPUs stacked (see `models.extend`), so that deep models compile soon.
    """
    unembed = {"unembed": {"kernel": models.unembedding(params)}}
    weights = models.cast({**params, **unembed}, config.dtype)
    axes = models.logical_axes(config) | {"unembed": {"kernel": ("vocab", "width")}}
    if "adapter" in weights and config.dtype != "float32":
        weights["adapter"] = jax.tree.map(lambda x: x.astype(config.dtype), weights["adapter"])
        axes |= {"adapter": models.adapter_axes(weights["adapter"])}
    if mesh is None or not sharding.constrainer(mesh).fused:
        weights = models.unstack(weights, config)
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        for name in weights.keys() & {"layers", "adapter"} & axes.keys():
            layer = jax.tree.map(lambda x: x[1:], axes[name], is_leaf=is_axes)
            axes |= {name: [layer] * config.layers}
    if "adapter" not in axes:
        weights = models.merge(weights, config)
    if mesh is None:
        return weights
    layout = sharding.shardings(axes, weights, mesh, sharding.GENERATION)
    return jax.lax.with_sharding_constraint(weights, layout)
