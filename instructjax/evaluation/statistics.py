"""Means and win rates with 95 % intervals, and the best of n samples.

Responses to one prompt are not independent. So the intervals are over prompts: a bootstrap draws
prompts, each with all that was measured on it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, gammaln, stdtrit

_NEWTON_STEPS = 25  # 8 are enough unless one side wins always


class Estimate(NamedTuple):
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values: np.ndarray, group: np.ndarray | None = None, draws: int = 1000) -> Estimate:
    """The mean, with a percentile bootstrap over groups; NaN without values.

    Args:
      values: float [n].
      group: int [n], the prompt that each value comes from. By default each is of its own.
      draws: bootstrap samples.
    """
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan)
    if group is None:
        group = np.arange(len(values))
    _, group = np.unique(group, return_inverse=True)
    total, count = np.bincount(group, values), np.bincount(group)
    picks = _picks(len(total), draws)
    low, high = np.quantile(total[picks].sum(1) / count[picks].sum(1), [0.025, 0.975])
    return Estimate(float(np.mean(values)), float(low), float(high))


def ratio(numerator: np.ndarray, denominator: np.ndarray, draws: int = 1000) -> Estimate:
    """The sum of one over the sum of the other, such as a loss a token, with a bootstrap.

    Args:
      numerator, denominator: float [n], of groups that are drawn together.
    """
    picks = _picks(len(numerator), draws)
    low, high = np.quantile(numerator[picks].sum(1) / denominator[picks].sum(1), [0.025, 0.975])
    return Estimate(float(numerator.sum() / denominator.sum()), float(low), float(high))


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """won_P: how often a response of ours is better than one of theirs. A tie counts half.

    Args:
      ours: utilities [P] or [P, A] of responses to P prompts.
      theirs: utilities [P] or [P, B] of independent responses to the same prompts. Each of ours is
        compared with each of theirs.
    """
    a, b = ours.reshape(len(ours), -1, 1), theirs.reshape(len(theirs), 1, -1)
    return ((a > b) + 0.5 * (a == b)).mean((1, 2))


def win_rate(ours: np.ndarray, theirs: np.ndarray, draws: int = 1000) -> Estimate:
    """The mean of `wins` over prompts."""
    return mean(wins(ours, theirs), draws=draws)


def length_controlled(
    won: np.ndarray, length_difference: np.ndarray, draws: int = 1000
) -> Estimate:
    """The win rate that equally long responses would have.

    A logistic model of a win on tanh(difference / its standard deviation), whose length term is
    then set to 0 (Dubois et al. 2024, length-controlled AlpacaEval, without the term for how hard
    a prompt is). The slope has a Gaussian prior of variance 1.

    Args:
      won: float [P], of `wins`.
      length_difference: float [P], the length of our response minus that of theirs.
      draws: bootstrap samples of prompts; the model is fitted to each.
    """
    spread = np.std(length_difference)
    x = np.tanh(length_difference / spread) if spread else np.zeros(len(won))
    picks = _picks(len(won), draws)
    fitted = _logistic(np.stack([x, *x[picks]]), np.stack([won, *won[picks]]))
    low, high = np.quantile(fitted[1:], [0.025, 0.975])
    return Estimate(float(fitted[0]), float(low), float(high))


def best_of_n(score_PN: np.ndarray, utility_PN: np.ndarray, n: int) -> np.ndarray:
    """utility_P that the best of n samples by score has, in the mean over all subsets of n.

    With the i-th lowest of N scores, C(i - 1, n - 1) of the C(N, n) subsets have their best there
    (the unbiased estimator of Nakano et al. 2021, appendix I).

    Args:
      score_PN: of N samples for each of P prompts, what the choice goes by. Equal scores take turns
        in the order of the samples.
      utility_PN: what is averaged: `score_PN` itself, or another judge's.
      n: 1 <= n <= N.
    """
    N = score_PN.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} of {N} samples: n must be from 1 to {N}")
    i = np.arange(n, N + 1)
    log_weight = np.full(N, -np.inf)
    log_weight[n - 1 :] = _log_choose(i - 1, n - 1) - _log_choose(N, n)
    order = np.argsort(score_PN, axis=1, kind="stable")
    return np.take_along_axis(utility_PN, order, 1) @ np.exp(log_weight)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy that is sampled: log n - (n - 1) / n nats (Stiennon 2020).

    This is an upper bound, and exact where no two responses are equal.
    """
    return math.log(n) - (n - 1) / n


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of a figure over runs of other seeds, with the interval of Student's t.

    Of one run, the interval is that value.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, mean, mean)
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


class Overoptimisation(NamedTuple):
    """Coefficients of a gold score's gain over d, the square root of the KL from the start.

    The gain is d (alpha - beta d) for best-of-n, and d (alpha - beta log d) for reinforcement
    learning (Gao et al. 2022, arXiv 2210.10760, section 1).
    """

    alpha: float
    beta: float


def fit_best_of_n(d: np.ndarray, gain: np.ndarray) -> Overoptimisation:
    """Least squares of d (alpha - beta d)."""
    return Overoptimisation(*np.linalg.lstsq(np.stack([d, -(d**2)], axis=1), gain)[0].tolist())


def fit_rl(d: np.ndarray, gain: np.ndarray) -> Overoptimisation:
    """Least squares of d (alpha - beta log d). Points of d = 0 have no part in it."""
    d, gain = d[d > 0], gain[d > 0]
    columns = np.stack([d, -d * np.log(d)], axis=1)
    return Overoptimisation(*np.linalg.lstsq(columns, gain)[0].tolist())


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of all that some point is above in every column, and that is above the reference.

    It is a sum of slices along the last column, from one point's value to the next lower one.

    Args:
      points: float [n, K], what n policies have of K rewards.
      reference: float [K].
    """
    points = points[(points > reference).all(1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max() - reference[0])
    points = points[np.argsort(-points[:, -1])]
    lower = np.append(points[1:, -1], reference[-1])
    return sum(
        float(height) * hypervolume(points[: i + 1, :-1], reference[:-1])
        for i, height in enumerate(points[:, -1] - lower)
        if height
    )


def _log_choose(n: np.ndarray | int, k: int) -> np.ndarray:
    return gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(np.subtract(n, k) + 1)


def _logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """sigmoid(a) of D fits y ~ sigmoid(a + b x), x and y [D, n], by Newton's method."""
    a, b = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(_NEWTON_STEPS):
        p = expit(a[:, None] + b[:, None] * x)
        error, weight = y - p, p * (1 - p)
        to_a, to_b = error.sum(1), (error * x).sum(1) - b
        aa, ab, bb = weight.sum(1) + 1e-9, (weight * x).sum(1), (weight * x * x).sum(1) + 1
        determinant = aa * bb - ab**2
        a = np.clip(a + (bb * to_a - ab * to_b) / determinant, -30, 30)
        b = b + (aa * to_b - ab * to_a) / determinant
    return expit(a)


def _picks(n: int, draws: int) -> np.ndarray:
    """int [draws, n], which of n are in each bootstrap sample."""
    return np.random.default_rng(0).integers(0, n, (draws, n))


def agreement(rankings: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float, int]:
    """How often two raters order a pair of responses alike, of the pairs that neither ties.

    Args:
      rankings: for each prompt, two or more raters' values of the same K responses. The values are
        all ranks or all scores.
    Returns:
      The share of agreement, the half width of its 95 % interval, and the number of pairs. The
      interval treats prompts, not pairs, as independent.
    Raises:
      ValueError: no pair is ordered by two raters.
    """
    shares = []  # (agreeing, ordered) pairs of each prompt
    for raters in rankings:
        agreeing = ordered = 0
        for a, b in itertools.combinations(raters, 2):
            for i, j in itertools.combinations(range(len(a)), 2):
                product = (a[i] - a[j]) * (b[i] - b[j])
                agreeing += product > 0
                ordered += product != 0
        shares.append((agreeing, ordered))
    pairs = sum(ordered for _, ordered in shares)
    if not pairs:
        raise ValueError("no pair of responses is ordered by two raters")
    share = sum(agreeing for agreeing, _ in shares) / pairs
    variance = sum((agreeing - share * ordered) ** 2 for agreeing, ordered in shares)
    return share, 1.96 * variance**0.5 / pairs, pairs
