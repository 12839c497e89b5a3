"""Tokens of a tokenizer that have no row in the embedding, and new rows for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instructjax import sharding
from instructjax.models import ModelConfig, Params, logical_axes


def new_tokens(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """Added tokens with ids from vocab_size on: {token: id}, in the order of their ids.

    Raises:
      ValueError: tokens of the basic vocabulary have such ids, so that any text may hold them.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size)
    if any(token not in added for _, token in beyond):
        raise ValueError(
            f"the tokenizer has {beyond[-1][0] + 1:,} tokens, the model {vocab_size:,}"
        )
    return {token: i for i, token in beyond}


def in_use(tokenizer: Any, tokens: dict[str, int]) -> bool:
    """Whether a token is BOS, EOS or padding, or occurs in a chat template."""
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else "".join(templates.values())
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return any(token in ends or token in text for token in tokens)


def grow(
    config: ModelConfig, params: Params, vocab_size: int, mesh: Mesh
) -> tuple[ModelConfig, Params]:
    """Adds rows up to vocab_size, each the mean of the existing rows.

    A new token's logit is then the mean of the others' logits, so that it begins with a probability
    of at most one over their number, whatever the context (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
      params: as from `hf.load(path, mesh)`, with embed/tokens and possibly unembed/kernel [V, D].
      vocab_size: new number of tokens, at least the model's.
      mesh: the mesh that holds the parameters.
    """
    old, grown = config.vocab_size, dataclasses.replace(config, vocab_size=vocab_size)

    def add_rows(table_VD: jax.Array) -> jax.Array:
        mean_D = jnp.mean(table_VD[:old], axis=0, dtype=jnp.float32).astype(table_VD.dtype)
        more = grown.padded_vocab_size - table_VD.shape[0]
        return jnp.pad(table_VD, ((0, more), (0, 0))).at[old:vocab_size].set(mean_D[None])

    axes = logical_axes(grown)
    params = {**params}
    for part, name in (("embed", "tokens"), ("unembed", "kernel")):
        if part in params:
            table = params[part][name]
            shape = jax.eval_shape(add_rows, table)
            layout = sharding.shardings(axes[part][name], shape, mesh)
            params[part] = {**params[part], name: jax.jit(add_rows, out_shardings=layout)(table)}
    return grown, params
