"""A language model as a labeler: it says which of two responses is better, under a principle."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from constitution import Constitution, Principle
from jax.sharding import Mesh

from instructjax import rollout, sharding
from instructjax.data import Record, prompt_ids, template
from instructjax.data.tokens import tokenise
from instructjax.evaluation import statistics
from instructjax.miniature import critics
from instructjax.models import ModelConfig, Params
from instructjax.train import Batch

BEFORE_ANSWER = "\nThe better response is"

# P(A) for each question, from its text.
Ask = Callable[[Sequence[str]], np.ndarray]


class Pair(NamedTuple):
    """Two responses to a prompt, by their numbers, with the principle that they are judged by."""

    record: Record
    first: int
    second: int
    principle: Principle

    def question(self, swapped: bool, constitution: Constitution, think: bool = False) -> str:
        """What the labeler reads; with `swapped` the second response is A."""
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        texts = self.text(a), self.text(b)
        return constitution.question(self.record, *texts, self.principle, think=think)

    def text(self, number: int) -> str:
        """A response as the labeler reads it."""
        return self.record.replies[number].strip()

    def response(self, number: int) -> Any:
        """A response as a row of data has it."""
        record = self.record
        return record.responses[number] if record.verbatim else [record.turns[number]]


def pairs_of(
    records: Sequence[Record], constitution: Constitution, most: int, seed: int
) -> list[Pair]:
    """The first `most` pairs of different responses, each with a principle that is drawn for its
    number."""
    pairs: list[Pair] = []
    for record in records:
        for first, second in itertools.combinations(range(len(record.replies)), 2):
            if record.replies[first].strip() == record.replies[second].strip():
                continue
            principle = constitution.draw(seed, len(pairs))
            pairs.append(Pair(record, first, second, principle))
            if len(pairs) == most:
                return pairs
    return pairs


def label(
    pairs: Sequence[Pair], ask: Ask, constitution: Constitution, think: bool = False
) -> np.ndarray:
    """P(the first is better) of each pair: float [n, 2], shown as A and shown as B."""
    questions = [
        pair.question(swapped, constitution, think) for pair in pairs for swapped in (False, True)
    ]
    as_a_or_b = ask(questions).reshape(-1, 2)
    return np.stack([as_a_or_b[:, 0], 1 - as_a_or_b[:, 1]], axis=1)


def soft_labels(first_better: np.ndarray) -> np.ndarray:
    """The mean over both orders, float [n]; exactly 0.5 where the two cancel but for rounding."""
    return np.round(first_better.mean(1), 9)


def label_by_rule(pairs: Sequence[Pair], critic: critics.RuleCritic) -> np.ndarray:
    """As `label`, by the miniature's rule-based critic. Records need a "request".

    P(A) is logistic in how much better A seems, in units of utility.
    """
    better = []
    for pair in pairs:
        row, name = dict(pair.record.row), pair.principle.name
        first, second = pair.text(pair.first), pair.text(pair.second)
        shown_first = critic.better(row, first, second, name)
        better.append((shown_first, -critic.better(row, second, first, name)))
    return 1 / (1 + np.exp(-np.array(better)))


def results_of(pairs: Sequence[Pair], first_better: np.ndarray) -> dict[str, Any]:
    """How the labeler's answers depend on the place, and agree with the ranks of the data.

    Returns:
      `share_a`, the mean of P(A); `decided_by_place`, the share of pairs whose answer changes with
      the order; and over the pairs that the data orders, if there are any, `agreement`, and by
      principle. Records of the miniature also have `agreement_with_judge`, by principle, over the
      pairs that the judge orders by that principle. A label that is even counts half.
    """
    label, (as_a, as_b) = soft_labels(first_better), first_better.T
    of_prompt = np.array([p.record.where for p in pairs])
    principles = np.array([pair.principle.name for pair in pairs])

    def agreements(gaps: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """Agreement with an order in which the first is better where a gap is positive."""
        agrees = np.where(label == 0.5, 0.5, (label > 0.5) == (gaps > 0))
        ordered, by_principle = gaps != 0, {}
        for principle in dict.fromkeys(principles.tolist()):
            chosen = ordered & (principles == principle)
            if chosen.any():
                by_principle[principle] = statistics.mean(agrees[chosen], of_prompt[chosen])
        if not ordered.any():
            return None, {}
        return statistics.mean(agrees[ordered], of_prompt[ordered]), by_principle

    results: dict[str, Any] = {
        "pairs": len(pairs),
        "share_a": float(np.mean([as_a, 1 - as_b])),
        "decided_by_place": float(np.mean((as_a > 0.5) != (as_b > 0.5))),
    }
    ranks = [p.record.ranks[p.second] - p.record.ranks[p.first] for p in pairs]
    agreement, by_principle = agreements(np.array(ranks))
    if agreement is not None:
        results |= {"agreement": agreement, "by_principle": by_principle}
    if all(critics.can_judge(pair.record.row) for pair in pairs):
        results["agreement_with_judge"] = agreements(judged(pairs))[1]
    return results


def judged(pairs: Sequence[Pair]) -> np.ndarray:
    """How much better the first response is by the judge's feature of the pair's principle; 0 for
    a principle that is not the miniature's."""
    known = {principle.name for principle in critics.PRINCIPLES}
    gaps = []
    for pair in pairs:
        row, name = dict(pair.record.row), pair.principle.name
        texts = (pair.text(pair.first), pair.text(pair.second))
        first, second = (critics.term(row, x, name) if name in known else 0.0 for x in texts)
        gaps.append(first - second)
    return np.array(gaps)


def make_ask(
    model: ModelConfig,
    params: Params,
    tokenizer: Any,
    mesh: Mesh,
    key: jax.Array,
    *,
    size: int,
    answers: tuple[str, str] = ("A", "B"),
    before_answer: str = "",
    thoughts: int = 0,
    temperature: float = 1.0,
) -> Ask:
    """P(A) of two answers A and B, by the log-probabilities of the first tokens that differ.

    Args:
      key: key of the thoughts.
      size: questions that run at the same time.
      answers: A and B.
      before_answer: what follows a question if there is no chat template.
      thoughts: tokens that the model may write before it answers.
      temperature: of sampling these.

    Raises:
      ValueError: the tokenizer has one form for both answers.
    """
    form = template.of(tokenizer, "auto", model.eos_ids)
    space = "" if form.form == "chat" and not thoughts else " "
    said = tokenise([*(f"{space}{x}" for x in answers), BEFORE_ANSWER], tokenizer, response=True)
    of_a, of_b, before = (said[i].tolist() for i in range(3))
    shorter = min(len(of_a), len(of_b))
    differs = next((i for i in range(shorter) if of_a[i] != of_b[i]), None)
    if differs is None:
        raise ValueError(f"the tokenizer does not tell {answers[0]} and {answers[1]} apart")
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
        ending = "" if form.form == "chat" else before_answer
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
