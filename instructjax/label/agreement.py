"""How labelers agree: with one another, by chance-corrected alpha, and with known answers."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from instructjax.evaluation import statistics
from instructjax.label.answers import FLAGS
from instructjax.label.screens import Screen
from instructjax.label.store import Label


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha of one question; None where no two labelers answered it differently
    or alike often enough to tell (all answers are one value, or nobody shares a unit)."""

    question: str
    value: float | None
    units: int  # that two labelers or more have answered


@dataclass(frozen=True)
class Report:
    """What the page of agreement shows.

    Attributes:
      shared: screens that two labelers or more have labeled.
      pairs: (share, half width of the 95 % interval, number) of pairs of responses that two
        labelers order alike, of those that neither ties; None if there are none.
      by_labeler: for each labeler that share with all others; None if there are no pairs.
      alphas: of the order of pairs, the ratings and each flag.
    """

    shared: int
    pairs: tuple[float, float, int] | None
    by_labeler: Mapping[str, tuple[float, float, int] | None]
    alphas: Sequence[Alpha]


def report(labels: Iterable[Label]) -> Report:
    """Agreement of labelers with one another on the screens that they share.

    Args:
      labels: one of each labeler for each screen, as `Store.labels` gives them.
    """
    by_screen: dict[str, dict[str, Mapping[str, Any]]] = {}
    labelers: dict[str, None] = {}
    for label in labels:
        labelers[label.labeler] = None
        if "ranks" in label.answer:
            by_screen.setdefault(label.screen.id, {})[label.labeler] = label.answer
    answers = [given for given in by_screen.values() if len(given) > 1]
    ranks = [{name: answer["ranks"] for name, answer in given.items()} for given in answers]
    alphas = [_alpha("order of two responses", ranks, _signs, "ordinal")]
    rated = [given for given in answers if all("likert" in x for x in given.values())]
    likert = [{name: answer["likert"] for name, answer in given.items()} for given in rated]
    alphas.append(_alpha("rating from 1 to 7", likert, list, "ordinal"))
    for flag, text in FLAGS.items():
        set_ = [
            {name: [flag in names for names in answer["flags"]] for name, answer in given.items()}
            for given in rated
        ]
        alphas.append(_alpha(text, set_, list, "nominal"))
    return Report(
        len(answers),
        _agreement([[*given.values()] for given in ranks]),
        {name: _agreement(_with_others(ranks, name)) for name in sorted(labelers)},
        alphas,
    )


def with_known(
    known: Sequence[Screen], answers: Sequence[Mapping[str, Any]]
) -> tuple[float, float | None]:
    """A labeler's agreement with the screening set.

    Args:
      known: its screens.
      answers: the labeler's to each.

    Returns:
      of the pairs that the set orders, the share that the labeler orders alike. A tie counts half:
      a labeler who ties whatever is hard gains nothing by it. And of the flags that the set or the
      labeler has raised, the share that both have; None where the set has no flags. Most
      flags are raised by neither, so a share of all would be high whatever a labeler does.
    """
    alike, pairs, both, either, has_flags = 0.0, 0, 0, 0, False
    for screen, answer in zip(known, answers, strict=True):
        ranks, given = screen.known_ranks, answer["ranks"]
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if ranks[i] != ranks[j]:
                product = (ranks[i] - ranks[j]) * (given[i] - given[j])
                alike += (product > 0) + 0.5 * (product == 0)
                pairs += 1
        for wanted, raised in zip(screen.known_flags, answer["flags"], strict=False):
            has_flags = True
            both += len({*wanted} & {*raised})
            either += len({*wanted} | {*raised})
    return alike / pairs, (both / either if either else 1.0) if has_flags else None


def _agreement(rankings: Sequence[Sequence[Sequence[int]]]) -> tuple[float, float, int] | None:
    try:
        return statistics.agreement(rankings)
    except ValueError:  # no pair is ordered by two labelers
        return None


def _with_others(
    ranks: Sequence[Mapping[str, Sequence[int]]], name: str
) -> list[list[Sequence[int]]]:
    """Two rankings for each screen and each labeler that one labeler shares it with."""
    return [
        [given[name], other]
        for given in ranks
        if name in given
        for labeler, other in given.items()
        if labeler != name
    ]


def _signs(ranks: Sequence[int]) -> list[int]:
    """Which of two responses is better, for each pair in both directions. In one direction alone,
    agreement that the data's first is better would look like chance where it always is."""
    return [int(np.sign(a - b)) for a, b in itertools.permutations(ranks, 2)]


def _alpha(
    question: str,
    given: Sequence[Mapping[str, Any]],
    units: Callable[[Any], list[Any]],
    level: Literal["ordinal", "nominal"],
) -> Alpha:
    """Alpha over the screens that labelers share.

    Args:
      given: for each screen the values of each of its labelers.
      units: makes of a labeler's values for a screen those of its units.
      level: of measurement.
    """
    import krippendorff  # of the extra `label`

    columns: list[list[Any]] = []  # of each screen
    labelers = sorted({name for screen in given for name in screen})
    for screen in given:
        values = {name: units(value) for name, value in screen.items()}
        width = len(next(iter(values.values())))
        columns.append([values.get(name, [np.nan] * width) for name in labelers])
    if not columns:
        return Alpha(question, None, 0)
    table = np.concatenate([np.array(column, float) for column in columns], axis=1)
    value = None
    if len(np.unique(table[~np.isnan(table)])) > 1:
        value = float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))
    return Alpha(question, value, table.shape[1])
