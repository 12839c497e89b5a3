"""One response as a stream of tokens, by two programs, whatever the lengths and the settings.

One function runs the model on a few tokens and draws the next. It is compiled for a chunk of a
prompt and for a single token. The KV cache has as many columns as the context, and column i holds
token i. It is kept from one prompt to the next, so of a longer conversation only the new part runs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax import models, sharding
from instructjax.models import Cache, ModelConfig, Params
from instructjax.sampler import draw
from instructjax.sampler.draw import Distribution
from instructjax.sampler.sample import check_lengths, lay_out

CHUNK = 64  # tokens of a prompt that run at a time
CONTEXT = 1024  # contexts of `stream` are multiples of this, so that prompts share programs


def stream(
    params: Params,
    config: ModelConfig,
    prompt: Sequence[int],
    key: jax.Array,
    *,
    max_new_tokens: int,
    mesh: Mesh | None = None,
    **settings: Any,
) -> Iterator[int]:
    """Yields the tokens of `generate` for one prompt as they come, EOS included.

    For several prompts, a `Session` keeps the weights and the cache.

    Args:
      settings: other keywords of `Session.stream`.
    """
    context = -(-(len(prompt) + max_new_tokens) // CONTEXT) * CONTEXT
    session = Session(params, config, context=context, mesh=mesh)
    return session.stream(prompt, key, max_new_tokens=max_new_tokens, **settings)


class Session:
    """A model that answers one prompt after another.

    Args:
      context: longest prompt and answer together, in tokens; cut to the model's context. Memory
        for keys and values, and the time of a token, grow with it.
      mesh: the work is split over tensor; the other axes repeat it.
    """

    def __init__(
        self, params: Params, config: ModelConfig, *, context: int, mesh: Mesh | None = None
    ):
        self.config, self.context, self._mesh = config, min(context, config.max_length), mesh
        self._weights = jax.jit(lay_out, static_argnums=(1, 2))(params, config, mesh)
        self._ids: list[int] = []  # tokens in the cache
        self._cache: Cache | None = None

    def stream(
        self,
        prompt: Sequence[int],
        key: jax.Array,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_ids: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yields the tokens of an answer as they come, EOS included; settings as in `generate`.

        Raises:
          ValueError: the prompt is empty or leaves no room in the context; a setting is out of
            range.
        """
        check_lengths([prompt], max_new_tokens, self.context)
        distribution = Distribution.create(temperature, top_k, top_p)
        ends = set(eos_ids or self.config.eos_ids)
        size, ids = min(CHUNK, self.context), list(prompt)
        column = self._reuse(ids[:-1])
        while column < len(ids):
            column = min(column, self.context - size)  # a chunk may run some tokens again
            chunk = ids[column : column + size]
            token = self._run(chunk, size, column, key, 0, distribution)
            column += len(chunk)
        for position in range(1, max_new_tokens + 1):
            ids.append(int(token))
            yield ids[-1]
            if ids[-1] in ends or position == max_new_tokens:
                return
            token = self._run(ids[-1:], 1, len(ids) - 1, key, position, distribution)

    def _reuse(self, ids: list[int]) -> int:
        """Number of first tokens that the cache holds already."""
        if self._cache is None or self._cache.live_BS.is_deleted():  # by an interrupt in a step
            stacked = isinstance(self._weights["layers"], dict)
            self._cache, self._ids = Cache.create(self.config, 1, self.context, stacked), []
            if self._mesh is not None:
                self._cache = jax.device_put(self._cache, sharding.replicated(self._mesh))
        pairs = zip(ids, self._ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(self._ids)))

    def _run(self, chunk, size: int, column: int, key, position: int, distribution) -> jax.Array:
        tokens_1T = np.zeros((1, size), np.int32)
        tokens_1T[0, : len(chunk)] = chunk
        del self._ids[column:]
        numbers = map(np.int32, (len(chunk), column, position))
        token, self._cache = _run_and_draw(
            *(self._weights, self._cache, tokens_1T, *numbers, key, distribution),
            config=self.config,
            mesh=self._mesh,
        )
        self._ids += chunk
        return token


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def _run_and_draw(
    weights: Params,
    cache: Cache,
    tokens_1T: jax.Array,
    count: jax.Array,
    column: jax.Array,
    position: jax.Array,
    key: jax.Array,
    distribution: Distribution,
    *,
    config: ModelConfig,
    mesh: Mesh | None,
) -> tuple[jax.Array, Cache]:
    """Runs the model on `count` tokens from `column` on, and draws the one that follows.

    Args:
      weights: see `lay_out`.
      cache: its columns from `column` on are overwritten or no longer seen.
      position: of the drawn token in the response.

    Returns:
      (the drawn token, int32 []; the cache with the tokens).
    """
    T, S = tokens_1T.shape[1], cache.live_BS.shape[1]
    cache = dataclasses.replace(cache, live_BS=(jnp.arange(S) < column)[None])
    mask_1T = (jnp.arange(T) < count)[None]
    hidden_1TD, cache = models.extend(weights, config, cache, tokens_1T, mask_1T, column=column)
    hidden_11D = jax.lax.dynamic_slice_in_dim(hidden_1TD, count - 1, 1, axis=1)
    unembed_VD = weights["unembed"]["kernel"]
    logits_1V = models.token_logits(hidden_11D, unembed_VD, config, distribution.divisor)[:, 0]
    zero_1 = jnp.zeros(1, jnp.int32)  # the number of the prompt, and of the sample
    size = config.vocab_size, logits_1V.shape[1]
    noise_1V = draw.noise(key, zero_1, zero_1, position[None], *size)
    token = draw.draw(logits_1V, noise_1V, distribution)[0]
    if mesh is not None:  # else a second call might find the cache laid out in another way
        whole = sharding.replicated(mesh)
        token, cache = jax.lax.with_sharding_constraint((token, cache), whole)
    return token, cache
