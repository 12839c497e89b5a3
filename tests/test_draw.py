"""One token: the tokens that may be drawn, and the noise that decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.sampler import draw

# Integers: sums of their exponentials differ by far more than rounding, unless they are equal.
ROWS = st.lists(st.integers(-6, 6), min_size=7, max_size=7, unique=True)


def plain_restrict(z, top_k, top_p):
    """The tokens that stay, by sorting, in float64."""
    order = np.argsort(-z)
    kept = order[: top_k or len(z)]
    p = np.exp(z[kept] - z.max())
    p /= p.sum()
    before = np.cumsum(p) - p  # the probability of all that is likelier
    return set(kept[before < top_p].tolist())


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(0, 9), st.sampled_from([0.05, 0.33, 0.61, 0.9, 0.99, 1.0]))
def test_restrict_against_a_sort(row, top_k, top_p):
    got = np.asarray(draw.restrict(jnp.array([row, row[::-1]], jnp.float32), top_k, top_p))
    for z, x in zip((row, row[::-1]), got, strict=True):
        kept = plain_restrict(np.array(z, np.float64), top_k, top_p)
        assert set(np.flatnonzero(x > -1e29).tolist()) == kept
        assert all(x[i] == z[i] for i in kept)


def test_restrict_by_hand():
    # 0.5, 0.25, 0.125, 0.125: the two last are as likely as each other
    z = jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]]))

    def kept(top_k, top_p):
        return np.flatnonzero(draw.restrict(z, top_k, top_p)[0] > -1e29).tolist()

    assert kept(1, 1.0) == [1]
    assert kept(3, 1.0) == [0, 1, 2, 3]
    assert kept(0, 0.5) == [1]
    assert kept(0, 0.51) == [0, 1]
    assert kept(0, 0.76) == [0, 1, 2, 3]
    assert kept(2, 0.66) == [1]  # of 2/3 and 1/3
    assert kept(2, 0.67) == [0, 1]


@pytest.mark.parametrize("width", [5, 128])
def test_noise_is_the_rows_own(width):
    key, three = jax.random.key(0), jnp.arange(3)
    noise = draw.noise(key, three, three + 4, three + 8, 5, width)
    alone = draw.noise(key, three[1:2], three[1:2] + 4, three[1:2] + 8, 5, width)
    np.testing.assert_array_equal(noise[1], alone[0])
    assert (noise[:, 5:] == 0).all()
    # Gumbel: mean 0.5772, variance pi^2 / 6
    many = draw.noise(key, *[jnp.zeros(100, jnp.int32)] * 2, jnp.arange(100), 1000, 1000)
    assert abs(many.mean() - 0.5772) < 0.02
    assert abs(many.var() - np.pi**2 / 6) < 0.05
    # Each of the counters matters, and they are not interchangeable.
    first = draw.noise(key, *[jnp.array([x]) for x in (1, 2, 3)], 5, 5)
    for other in [(2, 1, 3), (1, 3, 2), (0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert (draw.noise(key, *[jnp.array([x]) for x in other], 5, 5) != first).all()


def test_argmax():
    x = jnp.array([[1.0, 3.0, 3.0], [2.0, -1e30, 0.0], [-1e30, -1e30, -5.0]])
    np.testing.assert_array_equal(jax.jit(draw.argmax)(x), [1, 0, 2])
