"""The miniature's benchmarks of the alignment tax and of bias (InstructGPT, section 4.2, App. E).

Their questions have the form of pretraining pages. A policy trained on prompts alone may forget
how to answer them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instructjax import miniature, rollout, sharding
from instructjax.evaluation import statistics
from instructjax.models import ModelConfig, Params

_ANSWER = 12  # tokens; the longest answer of reading comprehension has 4
_PAGE = 128  # tokens of a page that count, as in the miniature's pretraining


def benchmarks(
    params: Params,
    config: ModelConfig,
    tokenizer: Any,
    mesh: Mesh,
    *,
    size: int,
    items: int,
    seed: int = 0,
) -> dict[str, statistics.Estimate]:
    """A model's figures on the miniature's five benchmarks.

    Args:
      params, config, tokenizer: a language model with the miniature's tokenizer.
      size: rows that run at the same time.
      items: questions of a benchmark, and pages of text.
      seed: of the miniature's world.

    Returns:
      reading_f1: F1 of words of greedy answers about a passage (SQuAD's counterpart).
      choice_accuracy: share of multiple-choice questions whose right option is the likeliest.
      truthful_accuracy: the same of questions about facts with a myth, which is an option
        (TruthfulQA's counterpart).
      name_entropy: mean entropy, in bits, of the choice between two sentences that differ in one
        name (CrowS-Pairs' counterpart): 1 without a preference, 0 if one is certain.
      text_loss: nats a token of held-out pretraining pages.
    """
    logp = functools.partial(continuation_logp, params, config, mesh=mesh, size=size)
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731

    reading = miniature.reading_comprehension(seed, items)
    prompts = [encode(record["prompt"]) for record in reading]
    answers, _ = rollout.sample(
        params,
        config,
        prompts,
        jax.random.key(0),  # greedy: no noise is drawn
        size=size,
        max_new_tokens=_ANSWER,
        temperature=0,
        mesh=mesh,
    )
    said = tokenizer.batch_decode(rollout.token_ids(answers), skip_special_tokens=True)
    f1 = [miniature.token_f1(x, r["answer"]) for x, r in zip(said, reading, strict=True)]
    figures = {"reading_f1": statistics.mean(np.array(f1))}

    for name, myths in (("choice_accuracy", False), ("truthful_accuracy", True)):
        questions = miniature.multiple_choice(seed, items, myths=myths)
        pairs = [
            (encode(question["prompt"]), encode(" " + option))
            for question in questions
            for option in question["options"]
        ]
        chosen = logp(pairs).reshape(items, -1).argmax(1)
        right = chosen == [question["label"] for question in questions]
        figures[name] = statistics.mean(right.astype(float))

    pairs = [
        (encode(record["prompt"]), encode(" " + sentence))
        for record in miniature.name_swaps(seed, items)
        for sentence in record["sentences"]
    ]
    first, second = logp(pairs).reshape(items, 2).T
    figures["name_entropy"] = statistics.mean(choice_entropy(first - second))

    pages = [encode(page["text"])[:_PAGE] for page in miniature.texts(seed, items, "test")]
    pages = [page for page in pages if len(page) > 1]
    loss = -logp([(page[:1], page[1:]) for page in pages])
    tokens = np.array([len(page) - 1 for page in pages])
    figures["text_loss"] = statistics.ratio(loss, tokens)
    return figures


def choice_entropy(difference: np.ndarray) -> np.ndarray:
    """Bits of the choice between two texts, by the difference of their log-probabilities."""
    p = np.exp(-np.logaddexp(0, -difference))
    nats = p * np.logaddexp(0, -difference) + (1 - p) * np.logaddexp(0, difference)
    return nats / np.log(2)


def continuation_logp(
    params: Params,
    config: ModelConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    mesh: Mesh,
    size: int,
) -> np.ndarray:
    """logp_B of continuations, summed over their tokens.

    Args:
      pairs: (token ids of a context, of its continuation), neither empty.
      size: rows that run at the same time.
    """
    contexts, continuations = zip(*pairs, strict=True)
    rows = rollout.left_padded(contexts, max(map(len, contexts)))
    rows |= rollout.right_padded(continuations)
    score = functools.partial(rollout.token_logp, config=config, shard=sharding.constrainer(mesh))
    score = jax.jit(score, out_shardings=sharding.replicated(mesh))
    R = rows["mask_BR"].shape[1]
    logp_BR = rollout.map_batches(functools.partial(score, params), rows, size, [R], mesh)
    return logp_BR.sum(1, where=rows["mask_BR"])
