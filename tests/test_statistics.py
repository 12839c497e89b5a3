"""Intervals hold the truth as often as they say; win rates equal hand-worked cases."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from instructjax.evaluation import statistics

EXPERIMENTS = 1000


def coverage(estimates: list[statistics.Estimate], truth: float) -> float:
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


def test_the_interval_of_a_mean_holds_the_truth():
    """Four values a prompt, which share half of their variance."""
    rng, group = np.random.default_rng(1), np.repeat(np.arange(150), 4)
    estimates, ungrouped = [], []
    for _ in range(EXPERIMENTS):
        values = 0.3 + rng.normal(size=150)[group] + rng.normal(size=600)
        estimates.append(statistics.mean(values, group, draws=400))
        ungrouped.append(statistics.mean(values, draws=200))
    assert coverage(estimates, 0.3) == pytest.approx(0.95, abs=0.02)
    assert coverage(ungrouped, 0.3) < 0.85  # without the prompts it is too short


def test_the_interval_of_a_win_rate_holds_the_truth():
    rng, estimates = np.random.default_rng(2), []
    for _ in range(EXPERIMENTS):
        ours, theirs = rng.normal(0.5, 1, (200, 2)), rng.normal(0, 1, (200, 2))
        estimates.append(statistics.win_rate(ours, theirs, draws=400))
    assert coverage(estimates, stats.norm.cdf(0.5 / math.sqrt(2))) == pytest.approx(0.95, abs=0.02)


def test_wins_by_hand():
    won = statistics.wins(np.array([[1, 3], [2, 2]]), np.array([[2, 3, 0], [2, 9, 9]]))
    # 1 beats 0; 3 beats 2 and 0 and ties with 3. Then 2 ties with 2, twice.
    np.testing.assert_allclose(won, [(1 + 2.5) / 6, (0.5 + 0.5) / 6])
    np.testing.assert_array_equal(
        statistics.wins(np.array([1, 2, 3]), np.array([2, 2, 2])), [0, 0.5, 1]
    )
    ours, theirs = np.array([1.0, 0.5, 2.0, 0.0]), np.array([0.0, 0.5, 3.0, -1.0])
    rate, back = statistics.win_rate(ours, theirs), statistics.win_rate(theirs, ours)
    assert rate.value == 1 - back.value == (1 + 0.5 + 0 + 1) / 4
    assert 0 <= rate.low < rate.value < rate.high <= 1
    assert statistics.win_rate(ours, ours) == (0.5, 0.5, 0.5)
    assert np.isnan(statistics.mean(np.zeros(0)).value)


def test_a_length_controlled_win_rate_is_that_of_equal_lengths():
    """The judge likes length; at equal length, ours wins in 60 %."""
    rng, a = np.random.default_rng(3), math.log(0.6 / 0.4)
    shares, estimates = [], []
    for _ in range(150):
        difference = rng.normal(40, 50, 300)  # ours are longer
        chance = expit(a + 1.2 * np.tanh(difference / difference.std()))
        won = (rng.random(300) < chance).astype(float)
        shares.append(won.mean())
        estimates.append(statistics.length_controlled(won, difference, draws=100))
    assert np.mean(shares) > 0.67
    assert np.mean([e.value for e in estimates]) == pytest.approx(0.6, abs=0.015)
    assert coverage(estimates, 0.6) == pytest.approx(0.95, abs=0.05)


def test_the_logistic_fit_is_that_of_an_optimizer():
    rng = np.random.default_rng(4)
    won, difference = rng.choice([0, 0.5, 1], 80), rng.normal(3, 20, 80)
    x = np.tanh(difference / difference.std())

    def loss(parameters):
        logit = parameters[0] + parameters[1] * x
        return np.sum(np.logaddexp(0, logit) - won * logit) + parameters[1] ** 2 / 2

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
    got = statistics.length_controlled(won, difference, draws=2).value
    assert got == pytest.approx(expit(best[0]), abs=1e-6)


def test_a_side_that_always_wins():
    assert statistics.length_controlled(np.ones(50), np.arange(50.0)).value == pytest.approx(1)
    assert statistics.length_controlled(np.ones(50), np.ones(50)).low == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(5)
    score, utility = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    by_subset = [
        [utility[p, max(subset, key=lambda i, p=p: score[p, i])] for p in range(3)]
        for subset in itertools.combinations(range(6), n)
    ]
    got = statistics.best_of_n(score, utility, n)
    np.testing.assert_allclose(got, np.mean(by_subset, 0), rtol=1e-12)


def test_best_of_n_of_many_samples():
    score = np.random.default_rng(6).normal(size=(400, 1000))
    got = statistics.best_of_n(score, score, 16).mean()
    assert got == pytest.approx(1.766, abs=0.01)  # of 16 normal variates (Harter 1961)
    with pytest.raises(ValueError, match="the best of 7 of 6 samples"):
        statistics.best_of_n(score[:, :6], score[:, :6], 7)


def test_the_kl_of_best_of_n():
    """The best of n of a uniform variate has the density n x^(n - 1)."""
    for n in (1, 2, 16):
        x = (np.arange(1_000_000) + 0.5) / 1_000_000
        density = n * x ** (n - 1)
        assert statistics.best_of_n_kl(n) == pytest.approx(
            np.mean(density * np.log(density)), abs=1e-4
        )


def test_the_interval_over_runs_holds_the_truth():
    rng = np.random.default_rng(6)
    estimates = [statistics.over_runs(2 + rng.normal(size=3)) for _ in range(EXPERIMENTS)]
    assert coverage(estimates, 2) == pytest.approx(0.95, abs=0.02)
    # Student's t of 2 degrees of freedom is 4.303; the deviation of 1, 2, 3 is 1.
    by_hand = 2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)
    assert statistics.over_runs([1, 3, 2]) == pytest.approx(by_hand, abs=1e-3)
    assert statistics.over_runs([1.5]) == (1.5, 1.5, 1.5)


def test_fits_of_overoptimisation_by_hand():
    """Exact data give their coefficients back."""
    d = np.array([0.2, 0.5, 1.0, 1.7, 3.0])
    best_of_n = statistics.fit_best_of_n(d, d * (1.5 - 0.25 * d))
    np.testing.assert_allclose(best_of_n, [1.5, 0.25])
    rl = statistics.fit_rl(np.append(0, d), np.append(0, d * (1.5 - 0.5 * np.log(d))))
    np.testing.assert_allclose(rl, [1.5, 0.5])


def test_hypervolume_by_hand():
    reference = np.zeros(2)
    # Two rectangles of 2 and of 3, which share 1; a dominated point, and one below the reference.
    points = np.array([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0], [5.0, -1.0]])
    assert statistics.hypervolume(points, reference) == 2 + 3 - 1
    assert statistics.hypervolume(points[::-1] + 7, reference + 7) == 2 + 3 - 1
    assert statistics.hypervolume(points[3:], reference) == 0
    assert statistics.hypervolume(np.array([[2.0], [5.0]]), np.array([1.0])) == 4
    # Three boxes of 1 x 2 x 3, 3 x 1 x 2 and 2 x 3 x 1: 6 each, less three overlaps of 2, plus 1.
    boxes = np.array([[1.0, 2, 3], [3, 1, 2], [2, 3, 1]])
    overlaps = [np.minimum(boxes[i], boxes[j]).prod() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert statistics.hypervolume(boxes, np.zeros(3)) == 18 - sum(overlaps) + 1


def test_hypervolume_against_samples():
    rng = np.random.default_rng(7)
    points, samples = rng.random((6, 3)), rng.random((200_000, 3))
    below = (samples[:, None] < points).all(2).any(1).mean()
    assert statistics.hypervolume(points, np.zeros(3)) == pytest.approx(below, abs=0.005)


def test_agreement_by_hand():
    # Of the pairs (0,1), (0,2), (1,2): both raters order (0,1) and (0,2) alike; a ties (1,2).
    a, b = [1, 2, 2], [1, 3, 2]
    assert statistics.agreement([[a, b]])[::2] == (1.0, 2)
    # A second prompt has b's order reversed: 2 of 4 pairs agree, all of one prompt.
    share, interval, pairs = statistics.agreement([[a, b], [a, [3, 1, 2]]])
    assert (share, pairs) == (0.5, 4)
    assert interval == pytest.approx(1.96 * 2**0.5 / 4)  # residuals +1 and -1
    with pytest.raises(ValueError, match="no pair"):
        statistics.agreement([[[1, 1], [1, 2]]])
