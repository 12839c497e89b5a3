"""Sampling: whose noise it is, what its log-probabilities are of, and its statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from instructjax import models, sampler, sharding
from instructjax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40, layers=2, width=16, heads=2, mlp_width=32, max_length=128, eos_ids=(3,)
)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


@functools.cache
def params():
    return jax.tree.map(lambda x: x * 4, models.init(CONFIG, jax.random.key(0)))


def generate(prompts=PROMPTS, seed=0, **changes):
    changes = {"max_new_tokens": 24, **changes}
    return sampler.generate(params(), CONFIG, prompts, jax.random.key(seed), **changes)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_equal_a_second_pass(temperature):
    rollout = generate(temperature=temperature)
    for prompt, response, logp in zip(
        PROMPTS, rollout.responses(), np.asarray(rollout.logp_BR), strict=True
    ):
        logits = models.logits(params(), CONFIG, jnp.array([prompt + response]))[0]
        again = jax.nn.log_softmax(logits / temperature)[len(prompt) - 1 : -1]
        want = np.take_along_axis(np.asarray(again), np.array(response)[:, None], 1)[:, 0]
        np.testing.assert_allclose(logp[: len(response)], want, atol=5e-5)
        assert (logp[len(response) :] == 0).all()


def test_a_response_ends_with_its_eos():
    rollout = generate(PROMPTS * 8, indices=range(32))
    mask, tokens = np.asarray(rollout.mask_BR), np.asarray(rollout.tokens_BR)
    lengths = mask.sum(-1)
    assert (mask == (np.arange(24) < lengths[:, None])).all()
    ended = 0
    for row, n in zip(tokens, lengths, strict=True):
        assert 3 not in row[: n - 1]
        ended += row[n - 1] == 3
        assert row[n - 1] == 3 or n == 24
    assert ended > 3
    assert len(set(lengths.tolist())) > 3
    several = generate(PROMPTS * 8, indices=range(32), eos_ids=(3, *range(20, 40)))
    assert np.asarray(several.mask_BR).sum() < mask.sum()


def test_noise_belongs_to_the_prompt():
    """The same tokens in another order, batch, padding or mesh; others for another key or index."""
    whole = generate().responses()
    order = [2, 0, 3, 1]
    assert generate([PROMPTS[i] for i in order], indices=order).responses() == [
        whole[i] for i in order
    ]
    assert generate([PROMPTS[2]], indices=[2]).responses() == [whole[2]]
    long = [16] * 40  # a wider bucket
    assert generate([*PROMPTS, long]).responses()[:4] == whole
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layout = sharding.shardings(models.logical_axes(CONFIG), params(), mesh)
    placed = jax.device_put(params(), layout)
    key = jax.random.key(0)
    meshed = sampler.generate(placed, CONFIG, PROMPTS[:3], key, max_new_tokens=24, mesh=mesh)
    assert meshed.responses() == whole[:3]
    assert generate(seed=1).responses() != whole
    assert generate([PROMPTS[0]] * 2, indices=[0, 7]).responses()[0] == whole[0]
    assert generate([PROMPTS[0]] * 2, indices=[0, 7]).responses()[1] != whole[0]


def test_samples_of_a_prompt():
    """Differ from one another; the first is that of a single sample."""
    several = generate(samples_per_prompt=3).responses()
    assert several[::3] == generate().responses()
    assert all(len({tuple(row) for row in several[i : i + 3]}) == 3 for i in range(0, 12, 3))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 12, "top_p": 0.8}],
    ids=str,
)
def test_frequencies(changes):
    """20,000 first tokens against the model's own probabilities, by a chi-square test."""
    prompt = [5, 6, 7]
    rollout = generate([prompt], max_new_tokens=1, samples_per_prompt=20000, **changes)
    counts = np.bincount(np.asarray(rollout.tokens_BR)[:, 0], minlength=40)
    z = np.asarray(models.logits(params(), CONFIG, jnp.array([prompt]))[0, -1], np.float64)
    p = np.exp(z / changes.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    if "top_k" in changes:
        p[order[changes["top_k"] :]] = 0
        p /= p.sum()
    if "top_p" in changes:
        kept = np.searchsorted(np.cumsum(p[order]), changes["top_p"]) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    assert (counts[p == 0] == 0).all()
    often = p * 20000 >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * 20000
    used = expected > 0
    assert used.sum() > 3
    assert stats.chisquare(observed[used], expected[used]).pvalue > 0.001


def test_bad_arguments():
    for changes, message in [
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"max_new_tokens": 127}, "do not fit the model's context of 128"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(**changes)


def test_an_unfinished_vocabulary_is_never_sampled():
    """Rows of the padded table (40 of 128 are real) have no probability."""
    hot = generate([[5]] * 64, indices=range(64), temperature=50.0, max_new_tokens=8)
    assert np.asarray(hot.tokens_BR).max() < 40
    wide = dataclasses.replace(CONFIG, vocab_size=128)
    other = sampler.generate(
        params(), wide, [[5]] * 8, jax.random.key(0), max_new_tokens=8, temperature=50.0
    )
    assert np.asarray(other.tokens_BR).max() >= 40
