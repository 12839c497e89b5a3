"""Rows of a rollout: a dict of arrays, one row an episode. A name's suffix says how it is padded.

    prompt_BP, prompt_mask_BP    padded on the left, so that a response begins at column P
    tokens_BR, mask_BR, ..._BR   padded on the right; column r is the r-th response token
    ..._B                        one number a row

Rows with an empty mask fill up the last batch, and do not count.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax import models, sampler, sharding
from instructjax.models import ModelConfig, Params, Shard
from instructjax.train import Batch

# ------------------------------------------------------------------------------- models on them


def hidden_states(
    params: Params, config: ModelConfig, rows: Batch, shard: Shard = models.unsharded
) -> jax.Array:
    """Hidden states that predict each response token. RL code shifts by one here and nowhere else.

    Args:
      rows: prompt_BP, prompt_mask_BP, tokens_BR, mask_BR.

    Returns:
      hidden_BRD; column 0 is the prompt's last state.
    """
    P = rows["prompt_BP"].shape[1]
    tokens_BT = jnp.concatenate([rows["prompt_BP"], rows["tokens_BR"]], axis=1)
    masks = rows["prompt_mask_BP"].astype(bool), rows["mask_BR"].astype(bool)
    mask_BT = jnp.concatenate(masks, axis=1)
    # The last token is followed by none: it need not be run.
    return models.apply(
        params,
        config,
        tokens_BT[:, :-1],
        mask_BT=mask_BT[:, :-1],
        at=slice(P - 1, None),
        shard=shard,
    )


def token_logp(
    params: Params,
    rows: Batch,
    *,
    config: ModelConfig,
    temperature: float = 1.0,
    shard: Shard = models.unsharded,
) -> jax.Array:
    """Re-scores a rollout: logp_BR of its tokens at the sampling temperature, 0 where masked."""
    hidden_BRD = hidden_states(params, config, rows, shard)
    unembed_VD = models.unembedding(params)
    logp_BR = models.token_logp(
        hidden_BRD, unembed_VD, rows["tokens_BR"], config, temperature=temperature, shard=shard
    )
    return jnp.where(rows["mask_BR"] != 0, logp_BR, 0)


def token_values(
    params: Params, rows: Batch, *, config: ModelConfig, shard: Shard = models.unsharded
) -> jax.Array:
    """value_BR of the states before each response token, 0 where masked."""
    value_BR = models.scalars(params, config, hidden_states(params, config, rows, shard))
    return jnp.where(rows["mask_BR"] != 0, value_BR, 0)


# ------------------------------------------------------------------------------- making them


def sample(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    size: int | None = None,
    indices: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[Batch, float]:
    """Responses to prompts: `sampler.generate` on `size` prompts at a time.

    The keys and values of all prompts of a part are in memory together, so smaller parts need less
    memory. They give the same tokens, because noise does not depend on the batch.

    Args:
      size: prompts of a part; None: all.
      indices: the number of each prompt's episode, which its noise depends on; default: 0, 1, ...
      settings: keywords of `sampler.generate`, such as max_new_tokens, temperature and mesh.

    Returns:
      (tokens_BR, mask_BR and logp_BR by name, in NumPy, whole on every host; the share of the
      sampler's slots that were in use)
    """
    size, indices = size or len(prompts), range(len(prompts)) if indices is None else indices
    names, parts, live = ("tokens_BR", "mask_BR", "logp_BR"), [], []
    for i in range(0, len(prompts), size):
        numbers = indices[i : i + size]
        sampled = sampler.generate(
            params, config, prompts[i : i + size], key, indices=numbers, **settings
        )
        parts.append([sharding.fetch(getattr(sampled, name)) for name in names])
        live.append(float(sampled.live_fraction))
    arrays = map(np.concatenate, zip(*parts, strict=True))
    return dict(zip(names, arrays, strict=True)), float(np.mean(live))


# ------------------------------------------------------------------------------- batches of them


def left_padded(prompts: Sequence[Sequence[int]], length: int) -> Batch:
    """prompt_BP and prompt_mask_BP of lists of token ids, in NumPy."""
    prompt_BP, mask_BP = sampler.pad_prompts(prompts, length)
    return {"prompt_BP": prompt_BP, "prompt_mask_BP": mask_BP}


def right_padded(responses: Sequence[Sequence[int]], length: int | None = None) -> Batch:
    """tokens_BR and mask_BR of lists of token ids, in NumPy.

    Args:
      length: R; None: that of the longest.
    """
    length = max(map(len, responses)) if length is None else length
    tokens_BR = np.zeros((len(responses), length), np.int32)
    mask_BR = np.zeros((len(responses), length), bool)
    for tokens_R, mask_R, response in zip(tokens_BR, mask_BR, responses, strict=True):
        tokens_R[: len(response)] = response
        mask_R[: len(response)] = True
    return {"tokens_BR": tokens_BR, "mask_BR": mask_BR}


def batches(
    rows: Batch, index: np.ndarray, size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Some rows as batches of responses of like length, each cut to the bucket that holds it.

    Args:
      rows: of a rollout, in NumPy.
      index: which of them.
      size: rows of a batch; the last is filled with empty rows.
      buckets: ascending lengths; the last is R.

    Yields:
      (indices of the batch's rows, -1 where it was filled; the batch)
    """
    lengths = rows["mask_BR"].sum(1)
    index = index[np.argsort(lengths[index], kind="stable")]
    for start in range(0, len(index), size):
        part = index[start : start + size]
        longest = lengths[part].max()
        response = next(bucket for bucket in buckets if bucket >= longest)
        part = np.pad(part, (0, size - len(part)), constant_values=-1)
        yield part, _take(rows, part, response)


def _take(rows: Batch, index: np.ndarray, response: int) -> Batch:
    def take(name: str, x: np.ndarray) -> np.ndarray:
        x = x[:, :response] if name.endswith("_BR") else x
        empty = (index < 0).reshape(-1, *[1] * (x.ndim - 1))
        return np.where(empty, np.zeros((), x.dtype), x[index])

    return {name: take(name, x) for name, x in rows.items()}


def ended(rows: Batch, eos_ids: Sequence[int]) -> np.ndarray:
    """Whether the last live token of each row is an EOS; found by the mask, never by a token."""
    last_B1 = np.maximum(rows["mask_BR"].sum(1, keepdims=True) - 1, 0)
    token_B = np.take_along_axis(rows["tokens_BR"], last_B1, axis=1)[:, 0]
    return np.isin(token_B, eos_ids) & rows["mask_BR"].any(1)


def token_ids(rows: Batch) -> list[list[int]]:
    """Each row's live tokens, EOS included."""
    pairs = zip(rows["tokens_BR"], rows["mask_BR"], strict=True)
    return [tokens[mask].tolist() for tokens, mask in pairs]


def put(rows: Batch, mesh: Mesh) -> Batch:
    """Rows onto a mesh: each host holds all of them, and gives its devices theirs."""
    place = functools.partial(jax.make_array_from_callback, sharding=sharding.batched(mesh))
    return {name: place(x.shape, data_callback=x.__getitem__) for name, x in rows.items()}


def map_batches(
    fn: Callable[[Batch], jax.Array], rows: Batch, size: int, buckets: Sequence[int], mesh: Mesh
) -> np.ndarray:
    """fn of all rows, batch by batch; see `batches`.

    Args:
      fn: rows -> [B] or [B, R], replicated over the mesh.

    Returns:
      float32 [B] or [B, R] in the order of `rows`, 0 where a batch was cut.
    """
    B, R = rows["tokens_BR"].shape
    result = None
    for index, part in batches(rows, np.arange(B), size, buckets):
        # One at a time: emulated devices may start independent programs in different orders, and
        # hang in their collectives.
        values = np.asarray(fn(put(part, mesh)))
        if result is None:
            result = np.zeros((B, R)[: values.ndim], np.float32)
        result[(index[index >= 0], *map(slice, values.shape[1:]))] = values[index >= 0]
    assert result is not None
    return result
