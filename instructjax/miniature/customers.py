"""Prompts: the paper's ten categories in the paper's proportions, sent by customers.

A prompt record is `{"prompt", "category", "customer", "request"}`; requests.py says what a request
holds. Splits are by customer, so that whoever is met in testing was never met in training.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from instructjax.miniature.requests import BUILDERS
from instructjax.miniature.world import PLURAL, generator, make

# InstructGPT, Table 1, in per cent (they sum to 99.9).
CATEGORIES = {
    "generation": 45.6,
    "open qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarization": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed qa": 2.6,
    "extract": 1.9,
}
TONES = {"respectful": 0.10, "insulting": 0.04}  # the share of prompts that ask for one
SPLITS = {"train": range(48), "valid": range(48, 54), "test": range(54, 60)}  # customers
_TONELESS = ("rewrite", "classification", "other", "extract")


@dataclass(frozen=True)
class Customer:
    """Whoever sends prompts: how they open, which of two phrasings they use, what they ask of."""

    name: str
    opening: str
    dialect: int
    topic: str


def check(split: str) -> None:
    """Raises ValueError unless there is such a split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")


@functools.cache
def customers(seed: int, split: str) -> tuple[Customer, ...]:
    """The customers of a split. Raises ValueError for a split that SPLITS lacks."""
    check(split)
    found = []
    for i in SPLITS[split]:
        rng = generator(seed, "customer", i)
        opening = rng.choice(("", "", "hello. ", "i have a task. ", "dear helper, "))
        topic = rng.choice(tuple(PLURAL))
        found.append(Customer(f"customer-{i:02d}", opening, rng.randrange(2), topic))
    return tuple(found)


def prompt(seed: int, rng: random.Random, customer: Customer) -> dict[str, Any]:
    """One prompt record by this customer."""
    category = rng.choices(tuple(CATEGORIES), tuple(CATEGORIES.values()))[0]
    phrasings, request = BUILDERS[category](make(seed), rng, customer.topic)
    ask = phrasings[customer.dialect % len(phrasings)]
    if category not in _TONELESS:
        draw = rng.random()
        if draw < TONES["respectful"]:
            request["tone"] = "respectful"
        elif draw < sum(TONES.values()):
            request["tone"] = "insulting"
    tone = f" be {request['tone']}." if "tone" in request else ""
    return {
        "prompt": f"{customer.opening}{ask}{tone}",
        "category": category,
        "customer": customer.name,
        "request": {"seed": seed, **request},
    }


def prompts(seed: int, n: int, split: str = "train") -> list[dict[str, Any]]:
    """n prompt records of the split's customers; record i is the same whatever n is."""
    return [record for record, _ in stream(seed, "prompts", split, n)]


def stream(seed: int, name: str, split: str, n: int) -> Iterator[tuple[dict, random.Random]]:
    """n prompt records, each with the generator that made it; item i depends on no other item."""
    pool = customers(seed, split)
    for i in range(n):
        rng = generator(seed, name, split, i)
        yield prompt(seed, rng, rng.choice(pool)), rng
