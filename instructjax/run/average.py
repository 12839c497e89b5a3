"""Averages the weights of several models of one architecture that began as the same model.

    python -m instructjax.run.average runs/rm --out runs/rm-average      # of run_rm.py --ensemble 5
    python -m instructjax.run.average runs/facts runs/courtesy --weights 0.3 0.7 --out runs/soup

An average of reward models is less fooled by noise in their labels than one of them, and scores at
the cost of one (WARM, Rame et al. 2024, arXiv 2401.12187). An average of policies that were trained
on different rewards trades one reward for the other (rewarded soups, Rame et al. 2023, arXiv
2306.04488).

Result: OUT, a Hugging Face directory, which --model and --reward take.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from instructjax import hf, ranges, sharding, usage
from instructjax.models import ModelConfig, Params
from instructjax.ranges import Finite
from instructjax.run import checks, pretrained


@dataclass(frozen=True)
class Config:
    """The models, and where their average goes."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Run directories or Hugging Face directories, two or more. A run with --ensemble gives all its
    models."""
    out: Path
    """Directory of the average."""
    weights: tuple[Finite, ...] = ()
    """Factor of each model. They are divided by their sum. By default all are equal."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.weights and not sum(self.weights):
            raise ValueError(f"--weights {self.weights}: their sum is 0")

    @property
    def members(self) -> list[str]:
        """The directories of all models."""
        return [member for model in self.models for member in pretrained.ensemble(model)]


def average(models: Iterable[Params], weights: Sequence[float]) -> Params:
    """The weighted mean of the parameters of some models, in float32.

    The sum is in float64, so that the mean of equal models is that model, bit for bit.

    Args:
      models: trees of equal shapes. They are asked for one at a time.
      weights: a factor for each, which are divided by their sum.
    """
    total: Any = None
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    for params, share in zip(models, shares, strict=True):
        part = jax.tree.map(lambda x, share=share: share * np.asarray(x, np.float64), params)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(np.float32, total)


def check(config: Config) -> None:
    """Raises ValueError or OSError for models that cannot be averaged, without reading weights."""
    checks.check_directory("--out", config.out)
    members = config.members
    if len(members) < 2:
        given = " ".join(["models", *config.models])
        raise ValueError(f"{given}: give at least two, or a run with --ensemble")
    first, *others = members
    if config.weights and len(config.weights) != len(members):
        raise ValueError(f"--weights: {len(config.weights)} for {len(members)} models")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    expected = pretrained.check(first, mesh, flag="models")
    for other in others:
        found = pretrained.check(other, mesh, flag="models")
        if expected is not None and found is not None:
            _check_equal(expected, found, first, other)


def _check_equal(expected: ModelConfig, found: ModelConfig, first: str, other: str) -> None:
    for field in dataclasses.fields(ModelConfig):
        wanted, value = (getattr(config, field.name) for config in (expected, found))
        if value != wanted:
            raise ValueError(
                f"{other}: has {field.name} {value}, and {first} has {wanted}; only models of one"
                " architecture can be averaged"
            )


def main(config: Config) -> None:
    """Loads the models one after the other, and saves their average."""
    members, mesh = config.members, sharding.make_mesh(devices=jax.devices()[:1])
    model, params, tokenizer = pretrained.load(members[0], mesh, flag="models")

    def load_each() -> Iterator[Params]:
        yield params
        for member in members[1:]:
            other, others_params, others_tokenizer = pretrained.load(member, mesh, flag="models")
            _check_equal(model, other, members[0], member)
            if others_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{member}: its tokenizer differs from that of {members[0]}")
            yield others_params

    averaged = average(load_each(), config.weights or [1.0] * len(members))
    hf.save(config.out.expanduser(), model, jax.tree.map(jnp.asarray, averaged), tokenizer)
    print(f"wrote the average of {len(members)} models to {config.out}")


def cli(argv: Sequence[str] | None = None) -> None:
    program = "python -m instructjax.run.average"
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}
    main(usage.read(lambda: tyro.cli(Config, prog=program, **keywords), check))


if __name__ == "__main__":
    cli()
