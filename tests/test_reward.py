"""The supervised objectives on batches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import models, reward, sft, sharding
from instructjax.models import ModelConfig

SMALL = {"vocab_size": 131, "layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "max_length": 64}
LM = ModelConfig(**SMALL)
WINDOWED = dataclasses.replace(LM, window=4, windowed=(True, False))


@functools.cache
def models_of(config):
    params = models.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 5, params)
    rm_config, rm = models.with_scalar_head(params, config, jax.random.key(1))
    rm["score"]["bias"] = jnp.float32(0.25)
    return params, rm_config, rm


def packed_batch():
    """Two rows: a demonstration (3 + 4) and a text (3); a text (6) and padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 131, (2, 10)).astype(np.int32)
    segments = np.array([[1] * 7 + [2] * 3, [1] * 6 + [0] * 4])
    positions = np.array([[*range(7), *range(3)], [*range(6), 0, 0, 0, 0]])
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]], bool)
    return {
        "tokens_BT": jnp.array(tokens),
        "segments_BT": jnp.array(segments),
        "positions_BT": jnp.array(positions),
        "mask_BT": jnp.array(mask),
    }


@pytest.mark.parametrize("config", [LM, WINDOWED], ids=["full", "window"])
def test_sft_loss_is_that_of_each_document_alone(config):
    params, _, _ = models_of(config)
    batch = packed_batch()
    tokens = batch["tokens_BT"]
    logits_of = jax.jit(functools.partial(models.logits, params, config))
    total, count = 0.0, 0
    for document, first in [(tokens[0, :7], 3), (tokens[0, 7:], 1), (tokens[1, :6], 1)]:
        logp = jax.nn.log_softmax(logits_of(document[None])[0])
        for t in range(first, len(document)):
            total -= float(logp[t - 1, document[t]])
            count += 1
    mean, (weight, metrics) = sft.loss_fn(params, batch, None, config=config)
    assert weight == count == 11
    assert abs(float(mean) - total / count) < 1e-5
    assert metrics["sft/loss"] == mean
    # No token comes before a row's first one, so that is never a target.
    first = {**batch, "mask_BT": batch["mask_BT"].at[:, 0].set(True)}
    assert sft.loss_fn(params, first, None, config=config)[1][0] == 11


def test_tokens_that_do_not_count_get_no_gradient():
    params, _, _ = models_of(LM)
    batch = packed_batch()

    def loss(table, batch):
        changed = {**params, "embed": {**params["embed"], "tokens": table}}
        return sft.loss_fn(changed, batch, None, config=LM)[0]

    # Token t of row b gets the id 10 b + t, so that each position has an embedding of its own.
    ids = {**batch, "tokens_BT": jnp.arange(20).reshape(2, 10)}
    untied = {**params, "unembed": {"kernel": params["embed"]["tokens"]}}
    config = dataclasses.replace(LM, tied=False)

    def loss_of_inputs(table):
        changed = {**untied, "embed": {**untied["embed"], "tokens": table}}
        return sft.loss_fn(changed, ids, None, config=config)[0]

    grads = jax.grad(loss_of_inputs)(params["embed"]["tokens"])
    moved = np.abs(np.asarray(grads)).sum(-1)[:20].reshape(2, 10) > 0
    # Only tokens that come before a target in their document move: neither the last token of a
    # document nor padding.
    assert moved.tolist() == [[True] * 6 + [False] + [True] * 2 + [False], [True] * 5 + [False] * 5]
    none = {**batch, "mask_BT": jnp.zeros((2, 10), bool)}
    assert (jax.grad(loss)(params["embed"]["tokens"], none) == 0).all()


def comparison_batch(seed=0, B=3, K=4, P=6, R=5):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, R + 1, (B, K))
    mask = np.arange(K) < np.array([[K], [2], [3]])
    return {
        "prompt_BP": jnp.array(rng.integers(3, 131, (B, P))),
        "prompt_mask_BP": jnp.array(np.arange(P) >= rng.integers(0, P - 1, (B, 1))),
        "responses_BKR": jnp.array(rng.integers(3, 131, (B, K, R))),
        "response_mask_BKR": jnp.array((np.arange(R) < lengths[..., None]) & mask[..., None]),
        "ranks_BK": jnp.array(np.where(mask, [[1, 2, 2, 3], [1, 1, 0, 0], [2, 1, 3, 0]], 0)),
        "mask_BK": jnp.array(mask),
        "margin_B": jnp.zeros(B),
        "confidence_B": jnp.ones(B),
    }


@pytest.mark.parametrize("config", [LM, WINDOWED], ids=["full", "window"])
def test_scores_equal_separate_passes(config):
    """The score is that at the last token of prompt and response, run alone without padding."""
    _, rm_config, rm = models_of(config)
    batch = comparison_batch()
    got = reward.score(rm, rm_config, batch)

    @jax.jit
    def score_alone(tokens_T):
        hidden_BTD = models.apply(rm, rm_config, tokens_T[None])
        return models.scalars(rm, rm_config, hidden_BTD)[0, -1]

    for b, k in zip(*np.nonzero(batch["mask_BK"]), strict=True):
        prompt = batch["prompt_BP"][b][batch["prompt_mask_BP"][b]]
        response = batch["responses_BKR"][b, k][batch["response_mask_BKR"][b, k]]
        want = score_alone(np.concatenate([prompt, response]))
        assert abs(got[b, k] - want) < 1e-5


def test_margins_and_confidences_reach_the_loss():
    """By hand: one pair, whose winner has the higher score by `gap`."""
    _, rm_config, rm = models_of(LM)
    batch = jax.tree.map(lambda x: x[1:2], comparison_batch())
    scores = reward.score(rm, rm_config, batch)[0, :2]
    batch["ranks_BK"] = jnp.array([[1, 2, 0, 0]])
    batch |= {"margin_B": jnp.array([0.25]), "confidence_B": jnp.array([0.7])}
    gap = float(scores[0] - scores[1]) - 0.25
    expected = 0.7 * math.log(1 + math.exp(-gap)) + 0.3 * math.log(1 + math.exp(gap))
    mean, (weight, _) = reward.loss_fn(rm, batch, None, config=rm_config)
    assert float(mean) == pytest.approx(expected, rel=1e-5)
    assert weight == 1


@pytest.mark.parametrize("config", [LM, WINDOWED], ids=["full", "window"])
def test_packed_comparisons_are_scored_as_those_in_slots(config):
    """Scores, loss and gradient are equal. One row has one comparison, one has two, two are empty.
    The layers are scanned, or unrolled so that the last one runs at the scored positions alone."""
    _, rm_config, rm = models_of(config)
    slots = comparison_batch()
    slots["margin_B"] = jnp.array([0.5, 0.0, 1.5])
    slots["confidence_B"] = jnp.array([0.9, 1.0, 0.6])
    flat = jax.tree.map(np.asarray, slots)
    T, K = 48, flat["ranks_BK"].shape[1]
    tokens, segments, parents, positions = np.zeros((4, 4, T), np.int32)
    last, ranks = np.zeros((2, 4, 2, K), np.int32)
    margin, confidence = np.zeros((2, 4, 2), np.float32)
    place = {0: (0, 0), 1: (1, 0), 2: (1, 1)}  # comparison -> row, which of its comparisons
    ends = [0, 0]
    for i, (row, c) in place.items():
        prompt = flat["prompt_BP"][i][flat["prompt_mask_BP"][i]]
        ranks[row, c], margin[row, c] = flat["ranks_BK"][i], flat["margin_B"][i]
        confidence[row, c] = flat["confidence_B"][i]
        for k in range(-1, int(flat["mask_BK"][i].sum())):
            live = flat["response_mask_BKR"][i, k]
            span = prompt if k < 0 else flat["responses_BKR"][i, k][live]
            at = slice(ends[row], ends[row] + len(span))
            ends[row] = at.stop
            tokens[row, at], segments[row, at], parents[row, at] = span, 10 * c + k + 2, 10 * c + 1
            positions[row, at] = np.arange(len(span)) + (0 if k < 0 else len(prompt))
            if k >= 0:
                last[row, c, k] = at.stop - 1
    packed = {
        "tokens_BT": tokens, "segments_BT": segments, "parents_BT": parents,
        "positions_BT": positions, "last_BCK": last, "ranks_BCK": ranks, "mask_BCK": ranks > 0,
        "margin_BC": margin, "confidence_BC": confidence,
    }  # fmt: skip
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    on_mesh = jax.device_put(packed, sharding.batched(mesh))
    layout = sharding.shardings(models.logical_axes(rm_config), rm, mesh)

    def run(params, batch, **changes):
        shard = changes.pop("shard", models.unsharded)
        config = dataclasses.replace(rm_config, **changes)

        def mean(params):
            loss, (weight, _) = reward.loss_fn(params, batch, None, config=config, shard=shard)
            return loss, (weight, reward.score(params, config, batch, shard=shard))

        return jax.device_get(jax.jit(jax.value_and_grad(mean, has_aux=True))(params))

    (want, (_, scores_BK)), want_grads = run(rm, slots)
    for (loss, (weight, scores_BCK)), grads in (
        run(rm, packed),
        run(rm, packed, unroll=2),
        run(jax.device_put(rm, layout), on_mesh, unroll=2, shard=sharding.constrainer(mesh)),
    ):
        for i, (row, c) in place.items():
            live = flat["mask_BK"][i]
            np.testing.assert_allclose(scores_BCK[row, c][live], scores_BK[i][live], atol=1e-5)
        assert abs(loss - want) < 1e-6
        assert weight == 2
        for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * max(1, float(np.linalg.norm(y))))


def test_rm_loss_is_a_mean_over_prompts_with_a_strict_pair():
    _, config, rm = models_of(LM)
    batch = comparison_batch()  # the second prompt has only a tie
    s = np.asarray(reward.score(rm, config, batch), np.float64)
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    pairs = {0: [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)], 2: [(1, 0), (1, 2), (0, 2)]}
    divisor = {0: 6, 2: 3}
    loss = [
        -sum(log_sigmoid(s[b, i] - s[b, j]) for i, j in p) / divisor[b] for b, p in pairs.items()
    ]
    right = [np.mean([s[b, i] > s[b, j] for i, j in p]) for b, p in pairs.items()]
    mean, (weight, metrics) = reward.loss_fn(rm, batch, None, config=config)
    assert weight == 2
    assert abs(mean - np.mean(loss)) < 1e-6
    assert abs(metrics["rm/accuracy"] - np.mean(right)) < 1e-6


def test_masked_tokens_get_no_gradient():
    """An empty slot's tokens, padding and a prompt with ties alone have no gradient."""
    _, config, rm = models_of(LM)
    batch = comparison_batch()
    B, K, R = batch["responses_BKR"].shape
    P = batch["prompt_BP"].shape[1]
    batch["prompt_BP"] = jnp.arange(B * P).reshape(B, P)
    batch["responses_BKR"] = B * P + jnp.arange(B * K * R).reshape(B, K, R)

    def loss(table):
        changed = {**rm, "embed": {**rm["embed"], "tokens": table}}
        return reward.loss_fn(changed, batch, None, config=config)[0]

    moved = np.abs(np.asarray(jax.grad(loss)(rm["embed"]["tokens"]))).sum(-1) > 0
    prompts, responses = moved[: B * P].reshape(B, P), moved[B * P : B * P + B * K * R]
    counts = np.array([True, False, True])[:, None]
    np.testing.assert_array_equal(prompts, batch["prompt_mask_BP"] & counts)
    live = np.asarray(batch["response_mask_BKR"]) & counts[..., None]
    np.testing.assert_array_equal(responses.reshape(B, K, R), live)


def test_center():
    _, config, rm = models_of(LM)
    batch = comparison_batch()
    before = reward.score(rm, config, batch)
    after = reward.score(reward.center(rm, jnp.mean(before)), config, batch)
    np.testing.assert_allclose(after, before - jnp.mean(before), atol=1e-6)
