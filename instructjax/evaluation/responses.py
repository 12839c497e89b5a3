"""Samples responses to many prompts, some at a time."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from instructjax import sampler, sharding
from instructjax.models import ModelConfig, Params
from instructjax.train import Batch


def sample_in_parts(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    size: int,
    indices: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[Batch, float]:
    """`sampler.generate` on `size` prompts at a time.

    The keys and values of all prompts of a part are in memory at once, so smaller parts take less
    of it. They give the same tokens, because a prompt's noise depends on its index alone.

    Args:
      prompts: lists of token ids.
      key: key of all noise.
      size: number of prompts in a part.
      indices: the prompts' indices for the noise; by default 0, 1, ...
      settings: keywords of `sampler.generate`, such as max_new_tokens, temperature and mesh.

    Returns:
      (tokens_BR, mask_BR and logp_BR by name, each whole on every host as a NumPy array; the mean
      over the parts of the share of the sampler's slots that were in use)
    """
    indices = range(len(prompts)) if indices is None else indices
    names, parts, live = ("tokens_BR", "mask_BR", "logp_BR"), [], []
    for i in range(0, len(prompts), size):
        part = slice(i, i + size)
        sampled = sampler.generate(
            params, config, prompts[part], key, indices=indices[part], **settings
        )
        parts.append([sharding.fetch(getattr(sampled, name)) for name in names])
        live.append(float(sampled.live_fraction))
    arrays = map(np.concatenate, zip(*parts, strict=True))
    return dict(zip(names, arrays, strict=True)), float(np.mean(live))
