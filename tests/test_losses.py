"""Array losses against loops over pairs and tokens, and by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import losses


def loop(scores, ranks, mask, margin, confidence):
    """Eq. 1 as it reads: over all pairs of the responses present, ties dropped."""
    out = []
    for s, r, m, d, c in zip(scores, ranks, mask, margin, confidence, strict=True):
        live = [k for k in range(len(s)) if m[k]]
        total, pairs = 0.0, 0
        for i, j in itertools.combinations(live, 2):
            pairs += 1
            if r[i] != r[j]:
                best, worst = (i, j) if r[i] < r[j] else (j, i)
                gap, sure = float(s[best]) - float(s[worst]) - float(d), float(c)
                total += sure * math.log(1 + math.exp(-gap))
                total += (1 - sure) * math.log(1 + math.exp(gap))
        out.append(total / pairs if pairs else 0.0)
    return np.array(out)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(2, 9), given=st.tuples(*[st.booleans()] * 2))
def test_pairwise_ranking_against_a_loop(seed, K, given):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(5, K)).astype(np.float32) * 3
    ranks = rng.integers(1, 4, (5, K))  # ties are common
    mask = rng.random((5, K)) < 0.7
    margins = rng.random(5).astype(np.float32) * given[0]
    confidences = 1 - rng.random(5).astype(np.float32) / 2 * given[1]
    scores[~mask] = rng.choice([np.nan, np.inf, 1e30], (~mask).sum())  # garbage in empty slots
    remarks = ((margins, given[0]), (confidences, given[1]))
    arrays = (jnp.array(values) if present else None for values, present in remarks)
    got = losses.pairwise_ranking(jnp.array(scores), ranks, mask, *arrays)
    expected = loop(scores, ranks, mask, margins, confidences)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_pairwise_ranking_by_hand():
    # Scores ln 3 apart: sigmoid is 3/4. Of three pairs one is a tie, and the divisor stays 3.
    scores = jnp.array([[np.log(3.0), 0.0, 0.0, 99.0]])
    ranks, mask = jnp.array([[1, 2, 2, 0]]), jnp.array([[1, 1, 1, 0]])
    got = losses.pairwise_ranking(scores, ranks, mask)
    np.testing.assert_allclose(got, [2 * np.log(4 / 3) / 3], rtol=1e-6)
    # Certain labels are the default, bit for bit. A label of 3/4 is learned at these scores.
    certain = losses.pairwise_ranking(scores, ranks, mask, confidence_B=jnp.ones(1))
    assert (certain == got).all()
    soft = lambda s: losses.pairwise_ranking(s, ranks, mask, confidence_B=jnp.full(1, 0.75))  # noqa: E731
    entropy = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    np.testing.assert_allclose(soft(scores), [2 * entropy / 3], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda s: soft(s).sum())(scores), 0, atol=1e-7)


def test_gradients_of_empty_slots_and_ties_are_zero():
    scores = jnp.array([[0.3, -1.0, 2.0, jnp.nan], [1.0, 2.0, 3.0, 4.0]])
    ranks, mask = jnp.array([[1, 2, 2, 1], [2, 2, 2, 2]]), jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    grads = jax.grad(lambda s: losses.pairwise_ranking(s, ranks, mask).sum())(scores)
    assert grads[0, 3] == 0
    assert (grads[0, :3] != 0).all()
    assert (grads[1] == 0).all()


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        losses.pairwise_ranking(jnp.zeros((2, 3)), jnp.zeros((2, 2)), jnp.zeros((2, 3)))


# ---------------------------------------------------------------------------- PPO


def tokens_of(seed, scale):
    """Four arrays [5, 7] and a mask of prefixes, garbage behind it."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < rng.integers(0, 8, (5, 1))
    arrays = [(rng.normal(size=(5, 7)) * scale).astype(np.float32) for _ in range(3)]
    for x in arrays:
        x[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30], (~mask).sum())
    return *arrays, mask


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.9]))
def test_ppo_clip_against_a_loop(seed, clip):
    logp, old, advantages, mask = tokens_of(seed, 0.5)
    got = jax.jit(losses.ppo_clip)(logp, old, advantages, clip)
    want = reference.ppo_clip(logp, old, advantages, mask, clip)
    np.testing.assert_allclose(np.where(mask, got, 0), want, rtol=1e-6, atol=1e-6)


def test_ppo_clip_by_hand():
    # Ratios 1, 1.5 and 0.5 against advantages of both signs, clipped at 20 %. What raises the
    # objective is clipped and gets no gradient; what lowers it is not.
    logp = jnp.log(jnp.array([[1.0, 1.5, 0.5, 1.0, 1.5, 0.5, 1.1]]))
    advantages = jnp.array([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0, 2.0]])

    def loss(logp):
        loss_BR = losses.ppo_clip(logp, jnp.zeros((1, 7)), advantages, 0.2)
        return loss_BR.sum(), loss_BR

    grad, got = jax.grad(loss, has_aux=True)(logp)
    np.testing.assert_allclose(got, [[-2.0, -2.4, -1.0, 2.0, 3.0, 1.6, -2.2]], rtol=1e-6)
    np.testing.assert_allclose(grad, [[-2.0, 0.0, -1.0, 2.0, 3.0, 0.0, -2.2]], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, float("inf")]))
def test_value_clip_against_a_loop(seed, clip):
    values, old, returns, mask = tokens_of(seed, 1.0)
    got = jax.jit(losses.value_clip)(values, old, returns, clip)
    want = reference.value_clip(values, old, returns, mask, clip)
    np.testing.assert_allclose(np.where(mask, got, 0), want, rtol=1e-6, atol=1e-6)


def test_value_clip_by_hand():
    # From 0: to 0.5 is clipped to 0.2. Returns of 1, 0.4 and -1: the larger of the two errors.
    values, returns = jnp.array([[0.5, 0.5, 0.5, 0.1]]), jnp.array([[1.0, 0.4, -1.0, 1.0]])

    def loss(values, clip):
        loss_BR = losses.value_clip(values, jnp.zeros((1, 4)), returns, clip)
        return loss_BR.sum(), loss_BR

    grad, got = jax.grad(loss, has_aux=True)(values, 0.2)
    np.testing.assert_allclose(got, [[0.32, 0.02, 1.125, 0.405]], rtol=1e-5)
    np.testing.assert_allclose(grad, [[0.0, 0.0, 1.5, -0.9]], rtol=1e-6)
    grad, got = jax.grad(loss, has_aux=True)(values, float("inf"))  # the plain squared error
    np.testing.assert_allclose(got, [[0.125, 0.005, 1.125, 0.405]], rtol=1e-5)
    np.testing.assert_allclose(grad, [[-0.5, 0.1, 1.5, -0.9]], rtol=1e-6)


# ---------------------------------------------------------------------------- DPO


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0]))
def test_dpo_against_the_formula(seed, beta):
    """Eq. 7 in probabilities: sigmoid of beta times the log of a ratio of ratios."""
    logp = -np.random.default_rng(seed).random((4, 6)).astype(np.float32) * 5
    got = losses.dpo(*map(jnp.array, logp), beta)
    for b, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(logp.T.astype(float)):
        ratio = np.exp(chosen) / np.exp(ref_chosen) / (np.exp(rejected) / np.exp(ref_rejected))
        want = -np.log(ratio**beta / (1 + ratio**beta))
        assert abs(float(got[b]) - want) < 1e-6 * max(1, want)


def test_dpo_by_hand():
    # At the reference ln 2. Then beta (1 - (-2) - (0 - 0)) = ln 3: -log(3/4), and its mirror.
    logp = [jnp.array([x]) for x in (1.0, -2.0, 0.0, 0.0)]
    beta = np.log(3) / 3
    np.testing.assert_allclose(losses.dpo(*[logp[2]] * 4, beta), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(losses.dpo(*logp, beta), [np.log(4 / 3)], rtol=1e-6)
    mirrored = losses.dpo(logp[1], logp[0], *logp[2:], beta)
    np.testing.assert_allclose(mirrored, [np.log(4)], rtol=1e-6)
    # The reference moves it the other way; the gradient is -beta sigmoid(-margin) of the chosen.
    swapped = losses.dpo(*logp[2:], *logp[:2], beta)
    np.testing.assert_allclose(swapped, [np.log(4)], rtol=1e-6)
    grads = jax.grad(lambda *x: losses.dpo(*x, beta).sum(), (0, 1))(*logp)
    np.testing.assert_allclose(np.ravel(grads), [-beta / 4, beta / 4], rtol=1e-5)


def test_shapes_of_rl_losses_are_checked():
    x = jnp.zeros((2, 3))
    for loss in (losses.ppo_clip, losses.value_clip):
        with pytest.raises(AssertionError):
            loss(x, x, x[:, :1], 0.2)  # would be broadcast, without a word
        with pytest.raises(AssertionError):
            loss(x[0], x[0], x[0], 0.2)
    with pytest.raises(AssertionError):
        losses.dpo(x, x, x, x, 0.1)
