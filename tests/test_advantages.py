"""From scores to advantages, against loops over tokens and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import advantages

B, R = 5, 7
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, 0.0], np.float32)


def close(got, want, tolerance=1e-6):
    """To 1e-6, relative where numbers are over 1."""
    assert np.shape(got) == np.shape(want)
    scale = max(1.0, float(np.max(np.abs(want), initial=0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@st.composite
def rollouts(draw):
    """Two arrays [B, R] with garbage behind a mask of prefixes, empty rows among them; a score."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    length = np.array(draw(st.lists(st.integers(0, R), min_size=B, max_size=B)))
    mask = np.arange(R) < length[:, None]
    x, y = (rng.normal(size=(B, R)).astype(np.float32) for _ in range(2))
    for array in (x, y):
        array[~mask] = rng.choice(GARBAGE, (~mask).sum())
    score = rng.normal(size=B).astype(np.float32) * 2
    score[length == 0] = np.nan
    mask = mask.astype(draw(st.sampled_from([bool, np.int32, np.float32])))
    return x, y, mask, score


examples = settings(max_examples=40, deadline=None)


# ---------------------------------------------------------------------------- KL


@examples
@given(rollouts(), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_against_a_loop(rollout, kind):
    logp, ref, mask, _ = rollout
    got = jax.jit(advantages.kl_estimate, static_argnums=2)(logp, ref, kind)
    close(np.where(mask != 0, got, 0), reference.kl(logp, ref, mask, kind))


def test_kl_by_hand():
    # p = 1/2 and q = 1/4 of the token: r = 1/2, -log r = ln 2. Then p = 1/4, q = 1/2: r = 2.
    logp, ref = jnp.log(jnp.array([[1 / 2, 1 / 4]])), jnp.log(jnp.array([[1 / 4, 1 / 2]]))
    ln2 = 0.6931471805599453
    close(advantages.kl_estimate(logp, ref), [[ln2, -ln2]])
    close(advantages.kl_estimate(logp, ref, "k2"), [[0.2402265, 0.2402265]])
    close(advantages.kl_estimate(logp, ref, "k3"), [[-1 / 2 + ln2, 1 - ln2]])
    with pytest.raises(ValueError, match="kind 'k4' is not k1, k2 or k3"):
        advantages.kl_estimate(logp, ref, "k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError):
        advantages.kl_estimate(logp, ref[:, :1])


def test_k1_and_k3_are_unbiased():
    """Over the tokens of a distribution, weighted by the policy's own probabilities."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    kl = np.sum(p * np.log(p / q))
    for kind in ("k1", "k3"):
        got = advantages.kl_estimate(jnp.log(p)[None], jnp.log(q)[None], kind)
        assert abs(np.sum(p * np.asarray(got)) - kl) < 1e-6
    tiny = advantages.kl_estimate(jnp.array([[-1.0]]), jnp.array([[-1.0001]]), "k3")
    assert abs(float(tiny[0, 0]) / 5e-9 - 1) < 2e-3  # (log r)^2 / 2, not lost in cancellation


# ---------------------------------------------------------------------------- rewards


@examples
@given(rollouts(), st.sampled_from([0.0, 0.02, 1.5]))
def test_rewards_against_a_loop(rollout, beta):
    kl, _, mask, score = rollout
    got = jax.jit(advantages.token_rewards)(score, kl, mask, beta)
    close(got, reference.token_rewards(score, kl, mask, beta))


def test_rewards_by_hand():
    kl = jnp.array([[1.0, 2.0, jnp.nan], [4.0, 5.0, 6.0], [1.0, 1.0, 1.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    got = advantages.token_rewards(jnp.array([3.0, -1.0, 9.0]), kl, mask, 0.5)
    np.testing.assert_array_equal(got, [[-0.5, 2.0, 0.0], [-2.0, -2.5, -4.0], [0.0, 0.0, 0.0]])


def test_fractional_scores_arrive_unchanged():
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], np.int32)  # nothing takes its dtype
    got = advantages.token_rewards(jnp.array([0.75, -0.1, 1e-3]), jnp.zeros((3, 3)), mask, 0.02)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(
        got, np.array([[0, 0.75, 0], [-0.1, 0, 0], [0, 0, 1e-3]], np.float32)
    )
    whole = advantages.token_rewards(jnp.array([3, 1, 2]), jnp.full((3, 3), 0.5), mask, 0.5)
    np.testing.assert_array_equal(whole, [[-0.25, 2.75, 0], [0.75, 0, 0], [-0.25, -0.25, 1.75]])


def test_responses_that_did_not_end():
    score, ended = jnp.array([0.75, 0.75, -2.0]), jnp.array([True, False, False])
    score_ended = functools.partial(advantages.score_ended, score, ended)
    np.testing.assert_array_equal(score_ended("none", 1.5), score)
    np.testing.assert_array_equal(score_ended("penalty", 1.5), [0.75, -0.75, -3.5])
    np.testing.assert_array_equal(score_ended("fixed", -1.0), [0.75, -1.0, -1.0])
    with pytest.raises(ValueError, match="'worst' is not none, penalty or fixed"):
        score_ended("worst", 1.0)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------- advantages


@examples
@given(rollouts(), st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_against_a_loop(rollout, gamma, lam):
    rewards, values, mask, _ = rollout
    got = jax.jit(advantages.gae)(rewards, values, mask, gamma, lam)
    for ours, loops in zip(got, reference.gae(rewards, values, mask, gamma, lam), strict=True):
        close(ours, loops)


def test_gae_by_hand():
    # delta = (0 + 2 - 1, 0 + 4 - 2, 8 - 4) = (1, 2, 4); gamma lam = 1/2: 4, 2 + 2, 1 + 2.
    rewards, values = jnp.array([[0.0, 0, 8, 5]]), jnp.array([[1.0, 2, 4, 7]])
    mask = jnp.array([[1, 1, 1, 0]])
    advantage, returns = advantages.gae(rewards, values, mask, 1.0, 0.5)
    np.testing.assert_array_equal(advantage, [[3, 4, 4, 0]])
    np.testing.assert_array_equal(returns, [[4, 6, 8, 0]])
    # gamma = 1/2 halves what the next value is worth: delta = (0, 0, 4), gamma lam = 1/4.
    advantage, returns = advantages.gae(rewards, values, mask, 0.5, 0.5)
    np.testing.assert_array_equal(advantage, [[0.25, 1, 4, 0]])
    np.testing.assert_array_equal(returns, [[1.25, 3, 8, 0]])
    # lam = 1, no discount: the return is the reward to go, whatever the values are.
    _, returns = advantages.gae(rewards, values, mask, 1.0, 1.0)
    np.testing.assert_array_equal(returns, [[8, 8, 8, 0]])


@examples
@given(rollouts(), st.booleans())
def test_whitening_against_a_loop(rollout, shift_mean):
    x, _, mask, _ = rollout
    got = jax.jit(advantages.whiten, static_argnums=2)(x, mask, shift_mean)
    if mask.sum() == 1:  # of one number the deviation is the root of 1e-8: rounding shows
        close(got, reference.whiten(x, mask, shift_mean), 1e-3)
    else:
        deviation = float(np.std(x[mask != 0])) if mask.any() else 1.0
        close(got, reference.whiten(x, mask, shift_mean), 1e-6 * max(1, 1 / deviation))


def test_whitening_by_hand():
    # Mean 3, deviation 2.
    x, mask = jnp.array([[1.0, 5.0, 99.0], [jnp.nan, 0.0, 0.0]]), jnp.array([[1, 1, 0], [0, 0, 0]])
    close(advantages.whiten(x, mask, shift_mean=True), [[-1.0, 1, 0], [0, 0, 0]])
    close(advantages.whiten(x, mask, shift_mean=False), [[2.0, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(advantages.whiten(x, 0 * mask, shift_mean=True), 0 * mask)
    same = advantages.whiten(jnp.full((2, 3), 0.5), jnp.ones((2, 3)), shift_mean=True)
    np.testing.assert_array_equal(same, jnp.zeros((2, 3)))


# ---------------------------------------------------------------------------- beta


@examples
@given(st.floats(0, 50), st.floats(1e-3, 2), st.integers(1, 512))
def test_adaptive_beta_against_the_formula(kl, beta, episodes):
    got = advantages.adapt_beta(jnp.float32(beta), kl, episodes, target=6.0, horizon=10_000)
    close(got, reference.adapt_beta(beta, kl, episodes, 6.0, 10_000))


def test_adaptive_beta_by_hand():
    adapt = functools.partial(advantages.adapt_beta, 0.5, target=6.0, horizon=10_000.0)
    close(adapt(6.0, 64), 0.5)
    close(adapt(6.6, 1000), 0.5 * 1.01)  # 10 % over the target, a tenth of the horizon
    close(adapt(60.0, 1000), 0.5 * 1.02)  # never over 20 %
    close(adapt(-3.0, 1000), 0.5 * 0.98)  # an estimate may be negative
    close(jax.jit(adapt)(jnp.float32(5.4), 1000), 0.5 * 0.99)
