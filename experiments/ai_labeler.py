"""A language model as a labeler: which of two responses is better, under a principle."""

import functools
import itertools
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructjax import rollout, sharding
from instructjax.data import Record, prompt_ids, template
from instructjax.data.tokens import tokenise
from instructjax.models import ModelConfig, Params
from instructjax.train import Batch

QUESTION = """{principle}

The conversation:
{conversation}

Response A:
{a}

Response B:
{b}

{ending}"""
ANSWER = "Which response is better? Answer with A or B alone."
THINK = "Which response is better? Compare them in a few words first."
BEFORE_ANSWER = "\nThe better response is"

# P(A) for each question, from its text.
Ask = Callable[[Sequence[str]], np.ndarray]


class Pair(NamedTuple):
    """Two responses to a prompt, by their numbers, with the principle that they are judged by."""

    record: Record
    first: int
    second: int
    principle: str

    def question(self, swapped: bool, ending: str) -> str:
        """What the labeler reads; with `swapped` the second response is A."""
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        said = self.record.messages or [{"role": "user", "content": self.record.prompt}]
        turns = (f"{message['role']}: {message['content'].strip()}" for message in said)
        return QUESTION.format(
            principle=self.principle,
            conversation="\n".join(turns),
            a=self.text(a),
            b=self.text(b),
            ending=ending,
        )

    def text(self, number: int) -> str:
        """A response as the labeler reads it."""
        return self.record.replies[number].strip()

    def response(self, number: int) -> Any:
        """A response as a row of data has it."""
        record = self.record
        return record.responses[number] if record.verbatim else [record.turns[number]]


def read_principles(file: Path) -> list[str]:
    """The list `principles` of a TOML file; raises ValueError or OSError that names it."""
    if not file.expanduser().is_file():
        raise FileNotFoundError(f"--principles {file}: no such file")
    try:
        principles = tomllib.loads(file.expanduser().read_text("utf-8")).get("principles")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--principles {file}: {error}") from error
    texts = isinstance(principles, list) and all(isinstance(x, str) and x for x in principles)
    if not texts or not principles:
        raise ValueError(f"--principles {file}: expected a list `principles` of texts")
    return principles


def pairs_of(
    records: Sequence[Record], principles: Sequence[str], most: int, seed: int
) -> list[Pair]:
    """The first `most` pairs of different responses, each with a principle that is drawn for its
    number."""
    pairs: list[Pair] = []
    for record in records:
        for first, second in itertools.combinations(range(len(record.replies)), 2):
            if record.replies[first].strip() == record.replies[second].strip():
                continue
            drawn = int(np.random.default_rng([seed, len(pairs)]).integers(len(principles)))
            pairs.append(Pair(record, first, second, principles[drawn]))
            if len(pairs) == most:
                return pairs
    return pairs


def label(pairs: Sequence[Pair], ask: Ask, ending: str) -> np.ndarray:
    """P(the first is better) of each pair: float [n, 2], shown as A and shown as B."""
    questions = [pair.question(swapped, ending) for pair in pairs for swapped in (False, True)]
    as_a_or_b = ask(questions).reshape(-1, 2)
    return np.stack([as_a_or_b[:, 0], 1 - as_a_or_b[:, 1]], axis=1)


def make_ask(
    model: ModelConfig,
    params: Params,
    tokenizer: Any,
    mesh: Mesh,
    key: jax.Array,
    *,
    size: int,
    thoughts: int = 0,
    temperature: float = 1.0,
) -> Ask:
    """P(A) of the answers A and B, by the log-probabilities of the first tokens that differ.

    Args:
      key: key of the thoughts.
      size: questions that run at the same time.
      thoughts: tokens that the model may write before it answers.
      temperature: of sampling these.

    Raises:
      ValueError: the tokenizer has one form for both answers.
    """
    form = template.of(tokenizer, "auto", model.eos_ids)
    space = "" if form.form == "chat" and not thoughts else " "
    said = tokenise([f"{space}A", f"{space}B", BEFORE_ANSWER], tokenizer, response=True)
    of_a, of_b, before = (said[i].tolist() for i in range(3))
    shorter = min(len(of_a), len(of_b))
    differs = next((i for i in range(shorter) if of_a[i] != of_b[i]), None)
    if differs is None:
        raise ValueError("the tokenizer does not tell the answers A and B apart")
    begun, a, b = of_a[:differs], of_a[differs], of_b[differs]  # some split off the space

    def log_odds(params: Params, rows: Batch) -> jax.Array:
        logp_of = functools.partial(
            rollout.token_logp, params, config=model, shard=sharding.constrainer(mesh)
        )
        logp_a, logp_b = (
            logp_of(rows | {"tokens_BR": jnp.full_like(rows["tokens_BR"], x)}) for x in (a, b)
        )
        return (logp_a - logp_b)[:, 0]

    log_odds = jax.jit(log_odds, out_shardings=sharding.replicated(mesh))

    def ask(questions: Sequence[str]) -> np.ndarray:
        ending = "" if form.form == "chat" else "\nAnswer:"
        prompts = [prompt_ids(f"{question}{ending}", tokenizer, form) for question in questions]
        if thoughts:
            sampled, _ = rollout.sample(
                params,
                model,
                prompts,
                key,
                size=size,
                max_new_tokens=thoughts,
                temperature=temperature,
                mesh=mesh,
            )
            written = rollout.token_ids(sampled)
            written = [[x for x in ids if x not in model.eos_ids] for ids in written]
            prompts = [[*p, *ids, *before] for p, ids in zip(prompts, written, strict=True)]
        prompts = [[*prompt, *begun] for prompt in prompts]
        width = -(-max(map(len, prompts)) // 64) * 64
        rows = rollout.left_padded(prompts, min(width, model.max_length - 1))
        rows |= rollout.right_padded([[a]] * len(prompts))
        of_rows = functools.partial(log_odds, params)
        odds_B = rollout.map_batches(of_rows, rows, size, [1], mesh)
        return 1 / (1 + np.exp(-odds_B.astype(np.float64)))

    return ask
