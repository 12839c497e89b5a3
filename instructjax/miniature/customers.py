"""Prompts of the paper's ten categories, in the paper's proportions, sent by customers.

A prompt record is `{"prompt", "category", "customer", "request"}`; requests.py describes requests.
Splits are by customer: no customer of the test split sends a training prompt.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from instructjax.miniature.requests import BUILDERS
from instructjax.miniature.world import PLURAL, generator, make

# InstructGPT, Table 1, in per cent; the sum is 99.9.
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
TONES = {"respectful": 0.10, "insulting": 0.04}  # share of the prompts that ask for a tone
SPLITS = {"train": range(48), "valid": range(48, 54), "test": range(54, 60)}  # customers
_TONELESS = ("rewrite", "classification", "other", "extract")


@dataclass(frozen=True)
class Customer:
    """A sender of prompts."""

    name: str
    opening: str  # begins each prompt
    dialect: int  # 0 or 1: which of two phrasings they use
    topic: str  # their favourite kind of subject


def check(split: str) -> None:
    """Raises ValueError if SPLITS lacks the split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")


@functools.cache
def customers(seed: int, split: str) -> tuple[Customer, ...]:
    """The customers of a split. Raises ValueError if SPLITS lacks the split."""
    check(split)
    senders = []
    for i in SPLITS[split]:
        rng = generator(seed, "customer", i)
        opening = rng.choice(("", "", "hello. ", "i have a task. ", "dear helper, "))
        topic = rng.choice(tuple(PLURAL))
        senders.append(Customer(f"customer-{i:02d}", opening, rng.randrange(2), topic))
    return tuple(senders)


def prompt(seed: int, rng: random.Random, customer: Customer) -> dict[str, Any]:
    """One prompt record of this customer."""
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
    """n prompt records of the split's customers; record i does not depend on n."""
    return [record for record, _ in stream(seed, "prompts", split, n)]


def stream(seed: int, name: str, split: str, n: int) -> Iterator[tuple[dict, random.Random]]:
    """n prompt records, each with its random generator; item i depends on no other item."""
    pool = customers(seed, split)
    for i in range(n):
        rng = generator(seed, name, split, i)
        yield prompt(seed, rng, rng.choice(pool)), rng
