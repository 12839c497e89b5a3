"""Array losses against loops over pairs, and by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import losses


def loop(scores, ranks, mask, margin):
    """Eq. 1 as it reads: over all pairs of the responses present, ties dropped."""
    out = []
    for s, r, m, d in zip(scores, ranks, mask, margin, strict=True):
        live = [k for k in range(len(s)) if m[k]]
        total, pairs = 0.0, 0
        for i, j in itertools.combinations(live, 2):
            pairs += 1
            if r[i] != r[j]:
                best, worst = (i, j) if r[i] < r[j] else (j, i)
                total -= np.log(1 / (1 + np.exp(-(float(s[best]) - float(s[worst]) - d))))
        out.append(total / pairs if pairs else 0.0)
    return np.array(out)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(2, 9), margin=st.booleans())
def test_pairwise_ranking_against_a_loop(seed, K, margin):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(5, K)).astype(np.float32) * 3
    ranks = rng.integers(1, 4, (5, K))  # ties are common
    mask = rng.random((5, K)) < 0.7
    margins = rng.random(5).astype(np.float32) * margin
    scores[~mask] = rng.choice([np.nan, np.inf, 1e30], (~mask).sum())  # garbage in empty slots
    got = losses.pairwise_ranking(
        jnp.array(scores), ranks, mask, jnp.array(margins) if margin else None
    )
    np.testing.assert_allclose(got, loop(scores, ranks, mask, margins), rtol=1e-5, atol=1e-6)


def test_pairwise_ranking_by_hand():
    # Scores ln 3 apart: sigmoid is 3/4. Of three pairs one is a tie, and the divisor stays 3.
    scores = jnp.array([[np.log(3.0), 0.0, 0.0, 99.0]])
    ranks, mask = jnp.array([[1, 2, 2, 0]]), jnp.array([[1, 1, 1, 0]])
    got = losses.pairwise_ranking(scores, ranks, mask)
    np.testing.assert_allclose(got, [2 * np.log(4 / 3) / 3], rtol=1e-6)


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
