"""Averages the weights of several models that began as the same model.

    python -m instructjax.run.average runs/facts runs/courtesy --weights 0.3 0.7 --out runs/soup
    python -m instructjax.run.average runs/rms/export runs/rms/export-1 --out runs/warm

An average of policies that were trained on different rewards trades one reward for the other
(rewarded soups, Rame et al. 2023, arXiv 2306.04488). An average of reward models takes the time of
one, and is less misled by noisy labels than its members (WARM, Rame et al. 2024, arXiv 2401.12187).

Reward models must have begun with one head. run_rm.py draws a head for each seed, so it has to make
a first reward model, and the others from that one:

    python experiments/run_rm.py --steps 100 --out runs/rm-start
    python experiments/run_rm.py --model runs/rm-start --ensemble 4 --out runs/rms

Result: OUT, a Hugging Face directory, which --model takes, or --reward.
"""

import dataclasses
import functools
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

LEAST_COSINE = 0.5  # of heads. Of independent ones it is near 0, after training of one 0.99 [ours]


@dataclass(frozen=True)
class Config:
    """The models, and where their average goes."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Run directories or Hugging Face directories, two or more."""
    out: Path
    """Directory of the average."""
    weights: tuple[Finite, ...] = ()
    """Factor of each model. They are divided by their sum. By default all are equal."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.weights and not sum(self.weights):
            raise ValueError(f"--weights {self.weights}: their sum is 0")


def average(models: Iterable[Any], weights: Sequence[float]) -> Any:
    """The weighted mean of the parameters of some models, in float32.

    The sum is in float64, so that the mean of equal models is that model, bit for bit.

    Args:
      models: trees of equal shapes. They are asked for one at a time.
      weights: a factor for each, which are divided by their sum.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    totals: list[np.ndarray] = []
    structure = None
    for params, share in zip(models, shares, strict=True):
        leaves, structure = jax.tree.flatten(params)
        totals = totals or [np.zeros(leaf.shape) for leaf in leaves]
        for total, leaf in zip(totals, leaves, strict=True):
            total += share * np.asarray(leaf, np.float64)
    assert structure is not None
    return jax.tree.unflatten(structure, [total.astype(np.float32) for total in totals])


def check(config: Config) -> None:
    """Raises ValueError or OSError for models that cannot be averaged, without reading weights."""
    checks.check_directory("--out", config.out)
    if len(config.models) < 2:
        raise ValueError(f"{' '.join(['models', *config.models])}: give at least two")
    first, *others = config.models
    if config.weights and len(config.weights) != len(config.models):
        raise ValueError(f"--weights: {len(config.weights)} for {len(config.models)} models")
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


def _check_heads(expected: Params, found: Params, first: str, other: str) -> None:
    """Raises ValueError for reward models that began with other heads. Training turns them little.

    An average of such models scores less well than any of them.
    """
    ours, theirs = (np.ravel(params["score"]["kernel"]) for params in (expected, found))
    cosine = ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs))
    if cosine < LEAST_COSINE:
        raise ValueError(
            f"{other}: its head is not that of {first} (cosine {cosine:.2f}); begin both from one"
            " reward model, with run_rm.py --model RM"
        )


def main(config: Config) -> None:
    """Loads the models one after the other, and saves their average."""
    members, mesh = config.models, sharding.make_mesh(devices=jax.devices()[:1])
    load = functools.partial(pretrained.load, mesh=mesh, flag="models")
    model, params, tokenizer = load(members[0])

    def load_each() -> Iterator[Params]:
        yield params
        for member in members[1:]:
            other, others_params, others_tokenizer = load(member)
            _check_equal(model, other, members[0], member)
            if model.scalar_head:
                _check_heads(params, others_params, members[0], member)
            if others_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"{member}: its tokenizer differs from that of {members[0]}")
            yield others_params

    averaged = average(load_each(), config.weights or [1.0] * len(members))
    hf.save(config.out.expanduser(), model, jax.tree.map(jnp.asarray, averaged), tokenizer)
    print(f"wrote the average of {len(members)} models to {config.out}")


def cli(argv: Sequence[str] | None = None) -> None:
    program = "python -m instructjax.run.average"
    main(usage.parse(Config, argv, __doc__, check, program))


if __name__ == "__main__":
    cli()
