"""Rows of a rollout: the shift by one, padding, batches by length, and their way back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import models, rollout, sampler, scoring, sharding
from instructjax.models import ModelConfig, Rope

SMALL = {"vocab_size": 131, "layers": 2, "width": 16, "heads": 4, "mlp_width": 32, "max_length": 64}
LEARNED = ModelConfig(**SMALL)
ROTARY = ModelConfig(
    **SMALL, family="gemma3_text", kv_heads=2, norm="rms", positions="rotary", rope=Rope(100.0),
    gated=True, tied=False, window=3, windowed=(True, False), final_softcap=3.0,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [LEARNED, ROTARY], ids=["learned", "rotary"])
P, R = 6, 8
LENGTHS = [8, 1, 5, 0, 3, 7]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def params_of(config):
    return jax.tree.map(lambda x: x * 5, models.init(config, jax.random.key(0)))


@functools.cache
def value_net(config):
    config, params = models.with_scalar_head(params_of(config), config, jax.random.key(1))
    params["score"]["bias"] = jnp.float32(0.25)
    return config, params


def make_rows(lengths=LENGTHS, seed=0):
    """Prompts of 1 to P tokens, responses of these lengths; 0 is among the tokens."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    mask = np.arange(R) < np.array(lengths)[:, None]
    prompts = [rng.integers(0, 131, rng.integers(1, P + 1)).tolist() for _ in range(B)]
    tokens = rng.integers(0, 131, (B, R)).astype(np.int32)
    tokens[:, 1] = 0
    return rollout.left_padded(prompts, P) | {
        "tokens_BR": tokens,
        "mask_BR": mask,
        "logp_BR": rng.normal(size=(B, R)).astype(np.float32),
        "row_B": np.arange(B),
    }


def alone(rows, b):
    """A row's own tokens, with no padding: (prompt, response)."""
    prompt = rows["prompt_BP"][b][rows["prompt_mask_BP"][b]]
    return prompt.tolist(), rows["tokens_BR"][b][rows["mask_BR"][b]].tolist()


# ---------------------------------------------------------------------------- models on them


@CONFIGS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_is_scored_from_what_is_before_it(config, temperature):
    """Token by token, each response alone; a sampled 0 in its midst is a token like any other."""
    rows, params = make_rows(), params_of(config)
    score = functools.partial(rollout.token_logp, config=config, temperature=temperature)
    got = np.asarray(jax.jit(score)(params, rows))
    all_logits = jax.jit(models.logits, static_argnums=1)
    for b, n in enumerate(LENGTHS):
        prompt, response = alone(rows, b)
        whole = np.array([[*prompt, *response]])
        padded = np.pad(whole, ((0, 0), (0, P + R - whole.shape[1])))  # one shape; causal
        logits = np.asarray(all_logits(params, config, padded)[0], np.float64) / temperature
        for r in range(n):
            row = logits[len(prompt) + r - 1]
            want = row[response[r]] - np.log(np.sum(np.exp(row)))
            assert abs(got[b, r] - want) < 2e-5
        assert (got[b, n:] == 0).all()


@CONFIGS
def test_value_before_a_token_is_the_reward_models_score_of_what_is_before_it(config):
    """A value net that starts as the reward model says, bias included, what the model would say
    of the response cut there."""
    config, params = value_net(config)
    rows = make_rows()
    values = jax.jit(functools.partial(rollout.token_values, config=config))
    got = np.asarray(values(params, rows))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    score = scoring.scorer(config, mesh)
    for cut in range(1, R):
        shorter = {**rows, "mask_BR": rows["mask_BR"] & (np.arange(R) < cut)}
        want = np.asarray(score(params, shorter))
        longer = rows["mask_BR"][:, cut]
        np.testing.assert_allclose(got[longer, cut], want[longer], atol=1e-5)
    apply = jax.jit(models.apply, static_argnums=1)
    hidden = apply(params, config, rows["prompt_BP"], mask_BT=rows["prompt_mask_BP"])
    first = models.scalars(params, config, hidden)[:, -1]
    some = rows["mask_BR"][:, 0]
    np.testing.assert_allclose(got[some, 0], first[some], atol=1e-5)
    assert (got[~rows["mask_BR"]] == 0).all()
    unbiased = {**params, "score": {**params["score"], "bias": jnp.float32(0)}}
    less = values(unbiased, rows)
    np.testing.assert_allclose((got - less)[rows["mask_BR"]], 0.25, atol=1e-6)


@CONFIGS
def test_padding_and_what_is_behind_masks_change_nothing(config):
    rows, params = make_rows(), params_of(config)
    score = jax.jit(functools.partial(rollout.token_logp, config=config))
    want = score(params, rows)
    left = [(0, 0), (5, 0)]
    wider = {
        **rows,
        "prompt_BP": np.pad(rows["prompt_BP"], left, constant_values=7),
        "prompt_mask_BP": np.pad(rows["prompt_mask_BP"], left),
        "tokens_BR": np.pad(rows["tokens_BR"], [(0, 0), (0, 3)], constant_values=9),
        "mask_BR": np.pad(rows["mask_BR"], [(0, 0), (0, 3)]),
    }
    got = score(params, wider)
    np.testing.assert_allclose(got[:, :R], want, atol=1e-5)
    assert (got[:, R:] == 0).all()
    other = {
        **rows,
        "prompt_BP": np.where(rows["prompt_mask_BP"], rows["prompt_BP"], 130),
        "tokens_BR": np.where(rows["mask_BR"], rows["tokens_BR"], 130),
    }
    np.testing.assert_array_equal(score(params, other), want)
    integers = {k: v.astype(np.int32) if "mask" in k else v for k, v in rows.items()}
    np.testing.assert_array_equal(score(params, integers), want)


@CONFIGS
def test_masked_tokens_get_exactly_no_gradient(config):
    """Every place has an embedding row of its own: which of them move the log-probabilities?"""
    config = dataclasses.replace(config, tied=False)
    params, rows = params_of(config), make_rows()
    B = len(LENGTHS)
    rows["prompt_BP"] = np.arange(B * P).reshape(B, P)
    rows["tokens_BR"] = B * P + np.arange(B * R).reshape(B, R)  # 84 of 131

    def loss(table):
        changed = {**params, "embed": {**params["embed"], "tokens": table}}
        return rollout.token_logp(changed, rows, config=config).sum()

    grads = jax.jit(jax.grad(loss))(params["embed"]["tokens"])
    moved = np.abs(np.asarray(grads)).sum(-1) > 0
    live = np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(moved[: B * P].reshape(B, P), rows["prompt_mask_BP"] & (live > 0))
    before_the_last = np.arange(R) < live - 1  # nothing is said after the last token
    np.testing.assert_array_equal(moved[B * P : B * (P + R)].reshape(B, R), before_the_last)


# ---------------------------------------------------------------------------- batches of them


def test_left_padded():
    rows = rollout.left_padded([[4, 0], [7], [1, 2, 3]], 3)
    np.testing.assert_array_equal(rows["prompt_BP"], [[0, 4, 0], [0, 0, 7], [1, 2, 3]])
    np.testing.assert_array_equal(rows["prompt_mask_BP"], [[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"shape|broadcast"):
        rollout.left_padded([[1, 2, 3, 4]], 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, R), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from([[8], [4, 8], [1, 2, 5, 8]]),
    st.randoms(use_true_random=False),
)
def test_batches_hold_each_row_once_and_whole(lengths, size, buckets, random):
    rows = make_rows(lengths)
    index = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    order = []
    for part, batch in rollout.batches(rows, index, size, buckets):
        width = batch["tokens_BR"].shape[1]
        assert batch["prompt_BP"].shape == (size, P)
        assert width == min(b for b in buckets if b >= max(lengths[i] for i in part if i >= 0))
        for b, i in enumerate(part):
            if i < 0:  # an empty row
                assert not any(np.any(x[b]) for x in batch.values())
                continue
            order.append(i)
            assert batch["row_B"][b] == i
            for name, x in rows.items():
                cut = x[i][:width] if name.endswith("_BR") else x[i]
                np.testing.assert_array_equal(batch[name][b], cut)
        assert {name: x.dtype for name, x in batch.items()} == {
            name: x.dtype for name, x in rows.items()
        }
    assert sorted(order) == sorted(index)
    assert [lengths[i] for i in order] == sorted(lengths[i] for i in index)  # alike together


def test_where_a_response_ends():
    rows = {
        "tokens_BR": np.array(
            [[5, 3, 0, 3], [5, 3, 6, 0], [3, 3, 3, 3], [4, 0, 0, 0], [0, 0, 1, 1]]
        ),
        "mask_BR": np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]),
    }
    rows["mask_BR"] = rows["mask_BR"].astype(bool)
    # EOS last; EOS in its midst alone; an empty row; another EOS; a 0 that is no padding
    np.testing.assert_array_equal(rollout.ended(rows, (3, 4)), [1, 0, 0, 1, 0])
    np.testing.assert_array_equal(rollout.ended(rows, (3,)), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(rollout.ended(rows, (0,)), [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(rollout.ended(rows, ()), [0] * 5)
    assert rollout.token_ids(rows) == [[5, 3], [5, 3, 6], [], [4], [0, 0]]


@pytest.mark.parametrize("size", [1, 4, 6, 16])
@pytest.mark.parametrize("buckets", [[8], [2, 4, 8]], ids=str)
def test_map_batches_returns_what_one_batch_returns(size, buckets):
    rows = make_rows()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def per_token(rows):
        return rows["row_B"][:, None] * 100.0 + rows["tokens_BR"]  # whole numbers

    got = rollout.map_batches(per_token, rows, size, buckets, mesh)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got[rows["mask_BR"]], per_token(rows)[rows["mask_BR"]])
    masked = rollout.map_batches(
        lambda rows: jnp.where(rows["mask_BR"], per_token(rows), 0), rows, size, buckets, mesh
    )
    np.testing.assert_array_equal(masked, np.where(rows["mask_BR"], per_token(rows), 0))
    per_row = rollout.map_batches(lambda rows: rows["row_B"] + 0.75, rows, size, buckets, mesh)
    np.testing.assert_array_equal(per_row, np.arange(6) + 0.75)


def test_map_batches_of_a_model_on_a_mesh():
    rows, params = make_rows(), params_of(LEARNED)
    mesh = sharding.make_mesh(**MESH)
    shard = sharding.constrainer(mesh)
    placed = jax.device_put(params, sharding.shardings(models.logical_axes(LEARNED), params, mesh))
    score = functools.partial(rollout.token_logp, config=LEARNED)
    meshed = jax.jit(functools.partial(score, shard=shard), out_shardings=sharding.replicated(mesh))
    got = rollout.map_batches(functools.partial(meshed, placed), rows, 4, [4, 8], mesh)
    np.testing.assert_allclose(got, jax.jit(score)(params, rows), atol=1e-5)


# ---------------------------------------------------------------------------- sampling in parts

SAMPLED = ModelConfig(
    vocab_size=64, layers=1, width=16, heads=2, mlp_width=32, max_length=32, eos_ids=(3,)
)


@pytest.mark.parametrize("samples", [1, 2])
def test_parts_give_the_tokens_of_one_call(samples):
    params, key = models.init(SAMPLED, jax.random.key(0)), jax.random.key(1)
    prompts = [[5 + i] * (1 + i) for i in range(5)]
    mesh = sharding.make_mesh(data=2, fsdp=4)
    settings = {"max_new_tokens": 6, "samples_per_prompt": samples, "mesh": mesh}
    for indices in (None, [7, 0, 7, 3, 9]):
        whole = sampler.generate(params, SAMPLED, prompts, key, indices=indices, **settings)
        rows, live = rollout.sample(
            params, SAMPLED, prompts, key, size=2, indices=indices, **settings
        )
        np.testing.assert_array_equal(rows["tokens_BR"], whole.tokens_BR)
        np.testing.assert_array_equal(rows["mask_BR"], whole.mask_BR)
        np.testing.assert_allclose(rows["logp_BR"], whole.logp_BR, atol=1e-4)
        assert rows["tokens_BR"].shape == (5 * samples, 6)
        assert 0 < live <= 1
