"""Labelers write demonstrations and rank responses, each with other weights, with noise and ties.

The noise is calibrated: two labelers agree on about 73 % of the pairs that both order, as measured
by `statistics.agreement` (InstructGPT, section 3.4: 72.6 +- 1.5 % among training labelers).
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instructjax.miniature.customers import stream
from instructjax.miniature.judging import GOLD, Features, judge, utility
from instructjax.miniature.world import generator
from instructjax.miniature.writers import Flaws, write

TRAINING, HELD_OUT = 15, 5  # number of labelers
NOISE = 1.35  # mean of the labelers' standard deviations, in units of utility
GRADE = 1.0  # ratings come in steps of this much utility; equal ratings are ties
# The flaws of an average labeler's demonstration, and of an average model's draft.
DEMONSTRATION = Flaws(0.3, 0.08, 0.06, 0.15, 0.2, 0.12, 0.45, 0.1, 0.03)
DRAFT = Flaws(0.45, 0.12, 0.15, 0.15, 0.22, 0.20, 0.20, 0.06, 0.06, 0.25)


@dataclass(frozen=True)
class Labeler:
    """A labeler, who ranks responses and writes demonstrations."""

    name: str
    seed: int  # seed of the world that they belong to
    weights: Features  # their weights of the judge's features
    noise: float  # standard deviation of their ratings, in units of utility
    flaws: Flaws  # flaws of their demonstrations


@functools.cache
def pool(seed: int, held_out: bool = False) -> tuple[Labeler, ...]:
    """The training labelers, or the held-out labelers, who label no training data."""
    first, n = (TRAINING, HELD_OUT) if held_out else (0, TRAINING)
    return tuple(_labeler(seed, i) for i in range(first, first + n))


def _labeler(seed: int, i: int) -> Labeler:
    rng = generator(seed, "labeler", i)
    weights = Features(*(w * rng.lognormvariate(0, 0.25) for w in vars(GOLD).values()))
    noise = NOISE * rng.uniform(0.8, 1.2)
    skill = rng.uniform(0.5, 1.5)
    return Labeler(f"labeler-{i:02d}", seed, weights, noise, _scaled(DEMONSTRATION, skill))


def _scaled(flaws: Flaws, by: float) -> Flaws:
    return Flaws(*(min(by * p, 1.0) for p in vars(flaws).values()))


def rate(labeler: Labeler, record: dict[str, Any], responses: Sequence[str]) -> list[int]:
    """The labeler's ratings of the responses, in whole steps of GRADE; higher is better.

    The noise is a pure function of the labeler's seed and name, the prompt, and the position of the
    response; so ratings can be repeated.
    """
    ratings = []
    for place, response in enumerate(responses):
        rng = generator(labeler.seed, "rating", labeler.name, record["prompt"], place)
        value = utility(judge(record, response).features, labeler.weights)
        ratings.append(round((value + rng.gauss(0, labeler.noise)) / GRADE))
    return ratings


def likert(value: float) -> int:
    """A utility as a rating from 1 to 7, without noise: InstructGPT's overall quality (Table 3).

    A perfect response has 7. Another has 1 less for each GRADE of utility that it lacks; a half
    counts upwards.
    """
    return min(7, max(1, math.floor(7.5 - (GOLD.followed - value) / GRADE)))


def rank(labeler: Labeler, record: dict[str, Any], responses: Sequence[str]) -> list[int]:
    """Ranks of the responses: 1 is best, equal ranks are ties, the ranks have no gaps."""
    ratings = rate(labeler, record, responses)
    order = sorted(set(ratings), reverse=True)
    return [order.index(rating) + 1 for rating in ratings]


def compare(labeler: Labeler, record: dict[str, Any], responses: Sequence[str]) -> dict[str, Any]:
    """A comparison record: the prompt record with responses, ranks and labeler added."""
    ranks = rank(labeler, record, responses)
    return {**record, "responses": list(responses), "ranks": ranks, "labeler": labeler.name}


def demonstrations(seed: int, n: int, split: str = "train") -> list[dict[str, Any]]:
    """n demonstration records by training labelers, for prompts of the split's customers."""
    records = []
    for record, rng in stream(seed, "demonstrations", split, n):
        labeler = rng.choice(pool(seed))
        completion = write(record["request"], labeler.flaws, rng)
        records.append({**record, "completion": completion, "labeler": labeler.name})
    return records


def comparisons(
    seed: int, n: int, split: str = "train", held_out: bool = False
) -> list[dict[str, Any]]:
    """n comparison records of K = 4 to 9 drafts, each ranked by one labeler."""
    records = []
    for record, rng in stream(seed, "comparisons", split, n):
        responses = drafts(record, rng.randint(4, 9), rng)
        records.append(compare(rng.choice(pool(seed, held_out)), record, responses))
    return records


def screens(
    seed: int, n: int, split: str = "test", held_out: bool = False, raters: int = 4
) -> list[list[dict[str, Any]]]:
    """n sets of drafts, each ranked by `raters` labelers: a comparison record for each labeler."""
    sets = []
    for record, rng in stream(seed, "screens", split, n):
        responses = drafts(record, rng.randint(4, 9), rng)
        panel = rng.sample(pool(seed, held_out), raters)
        sets.append([compare(labeler, record, responses) for labeler in panel])
    return sets


def drafts(record: dict[str, Any], k: int, rng: random.Random) -> list[str]:
    """k different responses, as if sampled from one model; the flaws scale with a hardness."""
    hardness = rng.uniform(0.2, 0.8)
    texts: dict[str, None] = {}  # a set that keeps its order
    while len(texts) < k:
        # The hardness grows, so that a prompt with one short right answer gets k responses too.
        texts[write(record["request"], _scaled(DRAFT, hardness), rng)] = None
        hardness += 0.02
    return list(texts)
