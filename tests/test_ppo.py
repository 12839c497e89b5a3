"""PPO-ptx: experience, losses and updates, against loops, by hand, and their invariants."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import run_ppo
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import models, offload, ppo, rollout, sampler, sft, sharding, state
from instructjax.models import ModelConfig, Rope

SMALL = {"vocab_size": 131, "layers": 2, "width": 16, "heads": 4, "mlp_width": 32, "max_length": 64}
CONFIG = ModelConfig(
    **SMALL, family="llama", kv_heads=2, norm="rms", positions="rotary", rope=Rope(100.0),
    gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, tied=False,
    eos_ids=(3, *range(124, 131)),
)  # fmt: skip
P, R = 6, 8
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
EXPERIENCE = ("logp_BR", "advantage_BR", "value_BR", "return_BR")


@functools.cache
def policy():
    return jax.tree.map(lambda x: x * 5, models.init(CONFIG, jax.random.key(0)))


@functools.cache
def value_net():
    config, params = models.with_scalar_head(policy(), CONFIG, jax.random.key(1))
    params["score"]["bias"] = jnp.float32(0.25)
    return config, params


def with_head():
    """The policy with a value head that is no longer 0."""
    params = ppo.with_value_head(policy(), CONFIG.width, sharding.make_mesh(data=8))
    params = jax.device_put(params, jax.devices()[0])
    kernel = jax.random.normal(jax.random.key(2), (CONFIG.width,)) / 4
    return {**params, "value_head": {"kernel": kernel, "bias": jnp.float32(0.5)}}


@functools.cache
def make_rows(seed=0):
    """A rollout of lengths 1 to 8, made by a policy a little different from the one in training."""
    rng = np.random.default_rng(seed)
    lengths = np.array([8, 1, 5, 2, 3, 7, 4, 6])
    B = len(lengths)
    prompts = [rng.integers(0, 131, rng.integers(1, P + 1)).tolist() for _ in range(B)]
    tokens = rng.integers(0, 131, (B, R)).astype(np.int32)
    tokens[:, 1] = 0  # a sampled 0 is a token
    mask = np.arange(R) < lengths[:, None]
    rows = rollout.left_padded(prompts, P) | {"tokens_BR": tokens, "mask_BR": mask}
    logp = logp_of(policy(), rows)
    noise = {name: rng.normal(size=(B, R)).astype(np.float32) for name in EXPERIENCE}
    noise["logp_BR"] = np.asarray(logp) + 0.2 * noise["logp_BR"]
    noise["value_BR"] = 0.3 * noise["value_BR"]
    return rows | {name: np.where(mask, x, 0) for name, x in noise.items()}


@functools.cache
def text_batch(seed=0, B=4, T=12):
    """Packed rows of two documents each, of unequal weight."""
    rng = np.random.default_rng(seed)
    first = rng.integers(2, T - 2, (B, 1))
    at = np.arange(T)
    segments = np.where(at < first, 1, 2) * (at < T - rng.integers(0, 2, (B, 1)))
    return {
        "tokens_BT": rng.integers(0, 131, (B, T)).astype(np.int32),
        "segments_BT": segments.astype(np.int32),
        "positions_BT": np.where(at < first, at, at - first).astype(np.int32),
        "mask_BT": (segments != 0) & (at != 0) & (at != first),
    }


@functools.partial(jax.jit, static_argnames="config")
def logp_of(params, rows, temperature=1.0, config=CONFIG):
    rows = {name: rows[name] for name in ("prompt_BP", "prompt_mask_BP", "tokens_BR", "mask_BR")}
    return rollout.token_logp(params, rows, config=config, temperature=temperature)


@functools.partial(jax.jit, static_argnames="config")
def values_of(params, rows, config=CONFIG):
    values = rollout.token_values if config.scalar_head else ppo.head_values
    return values(params, rows, config=config)


def bind(loss_fn, **keywords):
    return functools.partial(loss_fn, **{"config": CONFIG, **keywords})


POLICY_LOSS = bind(ppo.policy_loss)
PTX_LOSS = bind(ppo.ptx_loss)
# Of each loss: the function, parameters for it, their config, and what its knobs are by default.
LOSSES = {
    "policy": (ppo.policy_loss, policy, CONFIG, {"clip": 0.2, "temperature": 1.0}),
    "value": (
        ppo.value_loss,
        lambda: value_net()[1],
        dataclasses.replace(CONFIG, scalar_head=True),
        {"clip": 0.2},
    ),
    "joint": (
        ppo.joint_loss,
        with_head,
        CONFIG,
        {"clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "temperature": 1.0},
    ),
}


@functools.cache
def gradient_program(name):
    """Knobs are arguments: one program for all their values."""
    loss_fn, _, config, _ = LOSSES[name]

    def run(params, rows, knobs):
        return loss_fn(params, rows, None, config=config, **knobs)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def run_loss(name, rows, params=None, **knobs):
    """(mean, tokens, metrics, gradient) of one of LOSSES."""
    _, make_params, _, defaults = LOSSES[name]
    params = make_params() if params is None else params
    (mean, (tokens, metrics)), grads = gradient_program(name)(params, rows, defaults | knobs)
    return mean, tokens, metrics, grads


@functools.cache
def gradient(name):
    """With the knobs' own defaults."""
    return ppo.Gradient(bind(LOSSES[name][0], config=LOSSES[name][2]))


@functools.cache
def plain_gradient():
    """The gradient of the PPO term through plain logits; see `plain_policy_mean`."""
    return jax.device_get(jax.jit(jax.value_and_grad(plain_policy_mean))(policy(), make_rows()))


def assert_close(got, want, tolerance=1e-5):
    """By relative norm, leaf by leaf."""

    def compare(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        gap, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert gap <= tolerance * size, (jax.tree_util.keystr(path), gap, size)

    jax.tree_util.tree_map_with_path(compare, got, want)


def metrics_close(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name, value in want.items():
        assert abs(float(got[name]) - float(value)) < tolerance * max(1, abs(float(value))), name


# ---------------------------------------------------------------------------- experience


@functools.cache
def experience_program(**keywords):
    return jax.jit(functools.partial(ppo.make_experience, **keywords))


ARGUMENTS = ["logp_BR", "ref_logp_BR", "value_BR", "mask_BR", "score_B", "ended_B", "beta"]


def experience(**keywords):
    """`make_experience` of arguments in the order of ARGUMENTS."""
    program = experience_program(**keywords)
    return lambda *args: program(**dict(zip(ARGUMENTS, args, strict=True)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 7), min_size=5, max_size=5),
    keywords=st.sampled_from(
        [
            {},
            {"whiten_advantages": False},
            {"missing_eos": "penalty", "missing_eos_value": 0.7, "clip_score": 1.5},
            {"missing_eos": "fixed", "missing_eos_value": -1.0, "gamma": 0.9, "lam": 0.5},
            {"whiten_rewards": True, "whiten_advantages": False},
            {"whiten_rewards": True, "clip_score": 0.5, "lam": 1.0},
        ]
    ),
)
def test_experience_against_loops(seed, lengths, keywords):
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array(lengths)[:, None]
    arrays = [rng.normal(size=(5, 7)).astype(np.float32) for _ in range(3)]
    for x in arrays:
        x[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30], (~mask).sum())
    score, ended = rng.normal(size=5).astype(np.float32), rng.random(5) < 0.5
    score[mask.sum(1) == 0] = rng.choice([np.nan, np.inf, 1e30])
    ended &= mask.any(1)
    outputs, metrics = experience(**keywords)(*arrays, mask, score, ended, np.float32(0.1))
    *want, want_metrics = reference.experience(*arrays, mask, score, ended, 0.1, **keywords)
    if mask.sum() == 1 and keywords.get("whiten_rewards"):
        return  # of one number there is no variance: rounding alone is left
    # To 1e-6, where what numbers are divided by is not smaller than they are.
    plain = {**keywords, "whiten_rewards": False, "whiten_advantages": False}
    raw, returns, _ = reference.experience(*arrays, mask, score, ended, 0.1, **plain)
    nothing = (arrays[0], arrays[1], np.zeros((5, 7)))  # values of 0, no future: the rewards
    rewards, _, _ = reference.experience(
        *nothing, mask, score, ended, 0.1, **{**plain, "gamma": 0.0}
    )
    spreads = [np.std(reference.live(x, mask)) for x in (raw, returns, rewards) if mask.sum() > 1]
    tolerance = 2e-6 / min([1.0, *spreads])
    for name, loops in zip(("advantage_BR", "return_BR"), want, strict=True):
        scale = max(1.0, np.abs(loops).max())
        if mask.sum() != 1:
            np.testing.assert_allclose(outputs[name], loops, atol=tolerance * scale, err_msg=name)
    metrics_close(metrics, want_metrics, tolerance)


def test_experience_by_hand():
    """Two responses: one ended, of two tokens and 0.75; one cut, of one token."""
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-3.0, 5.0, 5.0], [jnp.inf] * 3])
    ref = jnp.array([[-2.0, -1.5, 0.0], [-3.5, 0.0, 0.0], [0.0] * 3])
    value = jnp.array([[0.5, 0.25, jnp.nan], [0.5, 9.0, 9.0], [jnp.nan] * 3])
    args = (
        logp,
        ref,
        value,
        mask,
        jnp.array([0.75, 5.0, jnp.nan]),
        jnp.array([True, False, False]),
    )
    named = dict(zip(ARGUMENTS, (*args, 0.5), strict=True))
    outputs, metrics = ppo.make_experience(
        **named, lam=0.5, missing_eos="penalty", missing_eos_value=1.0, clip_score=3.0,
        whiten_advantages=False,
    )  # fmt: skip
    # KL 1 and -0.5; 0.5. Paid -0.5 and 0.25 + 0.75; 5 - 1 clipped to 3, less 0.25.
    # delta: -0.5 + 0.25 - 0.5 = -0.75 and 1 - 0.25 = 0.75; 2.75 - 0.5.
    np.testing.assert_array_equal(
        outputs["advantage_BR"], [[-0.375, 0.75, 0], [2.25, 0, 0], [0] * 3]
    )
    np.testing.assert_array_equal(outputs["return_BR"], [[0.125, 1.0, 0], [2.75, 0, 0], [0] * 3])
    exact = {
        "objective/score": (0.75 + 3) / 2,
        "objective/score_std": 1.125,
        "objective/kl": (0.5 + 0.5) / 2,
        "objective/reward": (0.5 + 2.75) / 2,
        "objective/entropy": (3 + 3) / 2,
        "objective/beta": 0.5,
        "value/mean": 1.25 / 3,
        "rollout/length": 1.5,
        "rollout/eos_fraction": 0.5,
        # k3 of log r = -1, 0.5 and -0.5: e^-1, e^0.5 - 1.5, e^-0.5 - 0.5.
        "objective/kl_k3": (0.36787944 + 0.14872127 + 0.10653066) / 2,
        # Returns 1/8, 1, 11/4: mean 31/24, variance 1.19097; squared errors 9/64, 9/16, 81/16.
        "value/explained_variance": 1 - (0.140625 + 0.5625 + 5.0625) / 3 / 1.1909722,
    }
    metrics_close(metrics, exact, 1e-6)
    white, _ = ppo.make_experience(**named, lam=0.5, missing_eos="none", clip_score=2.0)
    # 2 - 0.25 - 0.5 = 1.25: advantages -0.375, 0.75, 1.25 of mean 13/24, deviation 0.679563.
    want = [[-1.348906, 0.306570, 0], [1.042336, 0, 0], [0] * 3]
    np.testing.assert_allclose(white["advantage_BR"], want, atol=1e-5)


def test_without_a_penalty_the_reward_is_the_score():
    rows = make_rows()
    score = np.arange(8, dtype=np.float32) / 4
    value, mask = rows["value_BR"], rows["mask_BR"]
    ended = np.ones(8, bool)
    run = experience(whiten_advantages=False, lam=1.0)
    with_ref, metrics = run(rows["logp_BR"], value, value, mask, score, ended, jnp.float32(0))
    dropped, _ = run(rows["logp_BR"], rows["logp_BR"], value, mask, score, ended, jnp.float32(0))
    assert float(metrics["objective/kl"]) != 0
    assert metrics["objective/reward"] == metrics["objective/score"] == score.mean()
    np.testing.assert_array_equal(with_ref["return_BR"], dropped["return_BR"])
    np.testing.assert_allclose(with_ref["return_BR"], np.where(mask, score[:, None], 0), atol=1e-6)


def test_whitening_is_over_the_whole_rollout_on_any_devices():
    rows = make_rows()
    args = [rows[n] for n in ("logp_BR", "return_BR", "value_BR", "mask_BR")]
    args += [rows["return_BR"][:, 0], np.ones(8, bool)]
    mesh = sharding.make_mesh(data=8)
    placed = [jax.device_put(x, sharding.batched(mesh)) for x in args]
    run = experience(whiten_rewards=True)
    outputs, metrics = run(*args, jnp.float32(0.1))
    spread, spread_metrics = run(*placed, jnp.float32(0.1))
    assert_close(spread, outputs, 1e-6)
    metrics_close(spread_metrics, metrics, 1e-6)
    live = np.asarray(outputs["advantage_BR"])[rows["mask_BR"]]
    assert abs(live.mean()) < 1e-6
    assert abs(live.std() - 1) < 1e-5
    assert abs(live[: len(live) // 2].mean()) > 1e-3  # of the whole, and not of each share


# ---------------------------------------------------------------------------- the first step


@pytest.fixture(scope="module", params=[0.7, 1.0])
def sampled(request):
    """(temperature, rows as the policy itself sampled them)."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 131, n).tolist() for n in (1, 6, 3, 2, 5, 4, 6, 2)]
    sample = sampler.generate(
        policy(), CONFIG, prompts, jax.random.key(0), max_new_tokens=R, temperature=request.param
    )
    rows = rollout.left_padded(prompts, P)
    rows |= {
        name: np.asarray(getattr(sample, name)) for name in ("tokens_BR", "mask_BR", "logp_BR")
    }
    return request.param, rows


@jax.jit
@jax.grad
def reinforce(params, rows, temperature):
    logp = rollout.token_logp(params, rows, config=CONFIG, temperature=temperature)
    return -jnp.sum(logp * rows["advantage_BR"]) / rows["mask_BR"].sum()


@pytest.mark.parametrize("rescored", [True, False], ids=["rescored", "sampler"])
def test_at_the_first_step_kl_is_0_and_ratio_1(sampled, rescored):
    temperature, rows = sampled
    tolerance = 1e-6 if rescored else 5e-5
    again = np.asarray(logp_of(policy(), rows, temperature))
    if rescored:
        rows = rows | {"logp_BR": again}
    zeros, score = np.zeros(rows["mask_BR"].shape, np.float32), np.ones(8, np.float32)
    ended = rollout.ended(rows, CONFIG.eos_ids)
    assert 0 < ended.sum() < 8
    outputs, metrics = experience()(
        rows["logp_BR"], again, zeros, rows["mask_BR"], score, ended, np.float32(0.02)
    )
    assert np.abs(rows["logp_BR"] - again).max() < tolerance
    assert abs(metrics["objective/kl"]) < tolerance * R
    assert abs(metrics["objective/reward"] - 1) < tolerance * R
    rows = rows | {"advantage_BR": np.asarray(outputs["advantage_BR"])}
    mean, tokens, loss_metrics, grads = run_loss("policy", rows, temperature=temperature)
    assert tokens == rows["mask_BR"].sum()
    assert abs(loss_metrics["policy/ratio"] - 1) < tolerance
    assert loss_metrics["policy/approx_kl"] < tolerance**2
    assert loss_metrics["policy/logp_change"] < tolerance
    assert loss_metrics["policy/clip_fraction"] == 0
    # At ratio 1 the loss is minus the mean advantage, and the gradient is that of A log p.
    assert abs(mean + outputs["advantage_BR"][rows["mask_BR"]].mean()) < 10 * tolerance
    assert mean == loss_metrics["policy/loss"]

    assert_close(grads, reinforce(policy(), rows, temperature), 1e-4)


def test_another_temperature_is_another_policy(sampled):
    temperature, rows = sampled
    other = np.asarray(logp_of(policy(), rows, 1.7 - temperature))
    assert np.abs(other - rows["logp_BR"]).max() > 0.1


def test_eos_is_the_last_live_token_and_has_a_gradient(sampled):
    """With an advantage at the last token alone, its own probability rises."""
    temperature, rows = sampled
    ended = rollout.ended(rows, CONFIG.eos_ids)
    last = rows["mask_BR"].sum(1) - 1
    tokens = rows["tokens_BR"][np.arange(8), last]
    assert np.isin(tokens[ended], CONFIG.eos_ids).all()
    assert (last[~ended] == R - 1).all()
    for b in np.flatnonzero(ended):
        assert not np.isin(rows["tokens_BR"][b, : last[b]], CONFIG.eos_ids).any()
    advantage = np.zeros(rows["mask_BR"].shape, np.float32)
    advantage[ended, last[ended]] = 1
    rows = rows | {"advantage_BR": advantage}
    *_, grads = run_loss("policy", rows, temperature=temperature)
    better = jax.tree.map(lambda p, g: p - 1e-3 * g / optax.tree.norm(grads), policy(), grads)
    rise = np.asarray(logp_of(better, rows, temperature) - logp_of(policy(), rows, temperature))
    assert rise[ended, last[ended]].mean() > 1e-4
    unembed = np.asarray(grads["unembed"]["kernel"])
    assert (np.abs(unembed[tokens[ended]]).sum(-1) > 0).all()


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("policy", {}),
        ("policy", {"clip": 0.05, "temperature": 0.7}),
        ("value", {}),
        ("value", {"clip": float("inf")}),
        ("joint", {}),
        ("joint", {"clip": 0.1, "value_clip": 0.5, "value_coef": 0.3, "temperature": 0.7}),
    ],
    ids=str,
)
def test_a_loss_is_a_mean_over_live_tokens(name, knobs):
    _, params, config, defaults = LOSSES[name]
    rows = make_rows()
    mean, tokens, metrics, _ = run_loss(name, rows, **knobs)
    knobs, mask = defaults | knobs, rows["mask_BR"]
    assert tokens == mask.sum() == 36
    want, expected = 0.0, {}
    if name != "value":
        clip, old = knobs["clip"], rows["logp_BR"]
        logp = np.asarray(logp_of(policy(), rows, knobs["temperature"]))
        want = reference.ppo_clip(logp, old, rows["advantage_BR"], mask, clip).sum() / 36
        ratio = np.exp(reference.live(logp, mask) - reference.live(old, mask))
        expected = {
            "policy/loss": want,
            "policy/ratio": ratio.mean(),
            "policy/approx_kl": (np.log(ratio) ** 2 / 2).mean(),
            "policy/logp_change": np.abs(np.log(ratio)).mean(),
            "policy/clip_fraction": ((ratio < 1 - clip) | (ratio > 1 + clip)).mean(),
        }
        assert expected["policy/clip_fraction"] > 0
    if name != "policy":
        clip, old = knobs["clip" if name == "value" else "value_clip"], rows["value_BR"]
        values = np.asarray(values_of(params(), rows, config))
        assert (values[~mask] == 0).all()
        loss = reference.value_clip(values, old, rows["return_BR"], mask, clip).sum() / 36
        want += knobs.get("value_coef", 1.0) * loss
        moved = np.abs(reference.live(values, mask) - reference.live(old, mask)) > clip
        expected |= {"value/loss": loss, "value/clip_fraction": moved.mean()}
    metrics_close(metrics, expected)
    assert abs(mean - want) < 1e-5 * max(1, want)


def test_a_loss_function_of_the_users():
    rows, mask = make_rows(), make_rows()["mask_BR"]

    def mine(logp_BR, old_logp_BR, advantages_BR, clip):
        return clip * (logp_BR - old_logp_BR) ** 2 + advantages_BR

    mean_of = jax.jit(lambda p: ppo.policy_loss(p, rows, None, config=CONFIG, loss=mine, clip=3.0))
    mean, (tokens, _) = mean_of(policy())
    change = reference.live(logp_of(policy(), rows), mask) - reference.live(rows["logp_BR"], mask)
    want = np.mean(3 * change**2 + reference.live(rows["advantage_BR"], mask))
    assert abs(mean - want) < 1e-5
    assert tokens == 36


def test_joint_loss_is_both_losses_on_one_trunk():
    rows, params = make_rows(), with_head()
    mean, _, metrics, grads = run_loss("joint", rows, value_coef=0.3)
    policy_mean, _, policy_metrics, policy_grads = run_loss("policy", rows)
    trunk = {name: leaf for name, leaf in policy().items() if name != "unembed"}
    trunk["score"] = params["value_head"]
    value_mean, _, value_metrics, value_grads = run_loss("value", rows, trunk)
    assert abs(mean - policy_mean - 0.3 * value_mean) < 1e-6 * max(1, abs(mean))
    metrics_close(metrics, policy_metrics | value_metrics, 1e-6)
    value_grads["value_head"] = value_grads.pop("score")
    value_grads["unembed"] = jax.tree.map(jnp.zeros_like, policy_grads["unembed"])
    policy_grads["value_head"] = jax.tree.map(jnp.zeros_like, value_grads["value_head"])
    assert_close(grads, jax.tree.map(lambda a, b: a + 0.3 * b, policy_grads, value_grads), 1e-5)


def test_a_new_value_head_says_0_and_is_not_exported():
    params = ppo.with_value_head(policy(), CONFIG.width, sharding.make_mesh(data=8))
    assert params["value_head"]["kernel"].sharding.is_fully_replicated
    params = jax.device_put(params, jax.devices()[0])
    np.testing.assert_array_equal(values_of(params, make_rows()), np.zeros((8, R)))
    chex.assert_trees_all_equal(ppo.without_value_head(params), policy())


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_leaks_from_behind_the_mask(name):
    """NaN and infinities there change neither loss nor gradient, bit for bit."""
    rows = make_rows()
    want = run_loss(name, rows)
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        dirty = {x: np.where(rows["mask_BR"], rows[x], np.float32(garbage)) for x in EXPERIENCE}
        dirty["tokens_BR"] = np.where(rows["mask_BR"], rows["tokens_BR"], 130)
        chex.assert_trees_all_equal(run_loss(name, rows | dirty), want)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_masked_tokens_get_exactly_no_gradient(name):
    """Each place has an embedding of its own: padding and the last token move nothing."""
    rows = make_rows() | {"tokens_BR": (48 + np.arange(64).reshape(8, R)).astype(np.int32)}
    rows["prompt_BP"] = np.arange(48, dtype=np.int32).reshape(8, P)
    rows["logp_BR"] = np.asarray(logp_of(policy(), rows))  # so that nothing is clipped
    rows["value_BR"] = np.asarray(values_of(value_net()[1], rows, value_net()[0]))
    *_, grads = run_loss(name, rows)
    moved = np.abs(np.asarray(grads["embed"]["tokens"])).sum(-1) > 0
    np.testing.assert_array_equal(moved[:48].reshape(8, P), rows["prompt_mask_BP"])
    before_the_last = np.arange(R) < rows["mask_BR"].sum(1, keepdims=True) - 1
    np.testing.assert_array_equal(moved[48:112].reshape(8, R), before_the_last)


def test_dropout_is_off():
    """No loss draws a random number, given a model with dropout and a key; nor do scores."""
    wet = functools.partial(dataclasses.replace, dropout=0.5)
    rows, key = make_rows(), jax.random.key(0)

    def draws(fn, *args):
        return "random" in str(jax.make_jaxpr(fn)(*args))

    for loss_fn, params, config, _ in LOSSES.values():
        assert not draws(bind(loss_fn, config=wet(config)), params(), rows, key)
    score = functools.partial(rollout.token_logp, config=wet(CONFIG))
    assert not draws(score, policy(), rows)
    ptx_loss = bind(ppo.ptx_loss, config=wet(CONFIG))
    assert draws(ptx_loss, policy(), text_batch(), key)
    add = ppo.Gradient(ptx_loss).add
    assert not draws(add, None, None, policy(), text_batch(), 1.0, 1.0)


# ---------------------------------------------------------------------------- gradients in parts


def cut(rows, size, buckets, put=lambda part: part):
    every = np.arange(len(rows["mask_BR"]))
    return [put(part) for _, part in rollout.batches(rows, every, size, buckets)]


@pytest.mark.parametrize(
    ("size", "buckets", "names"),
    [(3, [4, 8], ("joint",)), (16, [8], ("policy",))],
    ids=str,
)
def test_microbatches_buckets_and_filler_change_nothing(size, buckets, names):
    rows = make_rows()
    for name in names:
        _, _, metrics, grads = run_loss(name, rows)
        parts = cut(rows, size, buckets)
        got, got_metrics = gradient(name)(LOSSES[name][1](), parts, 36)
        assert_close(got, grads, 5e-6)
        metrics_close(got_metrics, metrics, 2e-6)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_longer_padding_changes_nothing(name):
    rows, wider = make_rows(), {}
    for each, x in rows.items():
        sides = {"BP": (5, 0), "BR": (0, 4)}[each[-2:]]
        value = {"tokens_BR": 7, "prompt_BP": 9}.get(each, 0)
        wider[each] = np.pad(x, [(0, 0), sides], constant_values=value)
    want, _, metrics, grads = run_loss(name, rows)
    got, _, got_metrics, got_grads = run_loss(name, wider)
    assert abs(got - want) < 1e-6 * max(1, want)
    metrics_close(got_metrics, metrics)
    assert_close(got_grads, grads)


@pytest.mark.parametrize("name", ["policy", "value"])
def test_eight_devices_equal_one(name):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    loss_fn, params, config, _ = LOSSES[name]
    rows = make_rows()
    _, _, metrics, grads = run_loss(name, rows)
    layout = sharding.shardings(models.logical_axes(config), params(), mesh)
    placed = jax.device_put(params(), layout)
    parts = cut(rows, 8, [8], functools.partial(rollout.put, mesh=mesh))
    shard = sharding.constrainer(mesh)
    mean_gradient = ppo.Gradient(bind(loss_fn, config=config, shard=shard), layout)
    got, got_metrics = mean_gradient(placed, parts, 36)
    assert_close(got, grads)
    metrics_close(got_metrics, metrics)
    jax.tree.map(lambda x, where: chex.assert_equal(x.sharding, where), got, layout)


# ---------------------------------------------------------------------------- updates


def make_state(params, policy_tx, value=None, value_tx=None):
    return ppo.PPOState(
        policy=state.create(params, policy_tx),
        value=None if value is None else state.create(value, value_tx),
        ema=jax.tree.map(jnp.copy, params),
        beta=jnp.float32(0.02),
    )


def make_update(
    policy_loss, value_loss, ptx_loss, policy_tx, value_tx,
    ptx_coef=27.8, ema_decay=0.992, policy_layout=None,
):  # fmt: skip
    """`run_ppo.Programs.update` of losses and optimizers of our own."""
    programs = object.__new__(run_ppo.Programs)
    programs.config = SimpleNamespace(ptx=SimpleNamespace(coef=ptx_coef))
    layout = policy_layout and policy_layout.params
    programs.policy_gradient = ppo.Gradient(policy_loss, layout)
    programs.ptx_gradient = ppo.Gradient(ptx_loss, layout)
    programs.value_gradient = ppo.Gradient(value_loss)
    programs.policy_step = ppo.make_step(policy_tx, policy_layout, ema_decay)
    programs.value_step = value_tx and ppo.make_step(value_tx)
    programs.count_targets = jax.jit(sft.count_targets)
    return lambda state, batches, tokens, texts=(): programs.update(state, batches, tokens, texts)


def plain_policy_mean(params, rows):
    """The clipped objective through plain logits, a mean over all live tokens."""
    tokens = jnp.concatenate([rows["prompt_BP"], rows["tokens_BR"]], 1)
    live = jnp.concatenate([rows["prompt_mask_BP"], rows["mask_BR"]], 1)
    logp = jax.nn.log_softmax(models.logits(params, CONFIG, tokens, live))[:, P - 1 : -1]
    logp = jnp.take_along_axis(logp, rows["tokens_BR"][..., None], -1)[..., 0]
    ratio, a = jnp.exp(logp - rows["logp_BR"]), rows["advantage_BR"]
    loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
    return jnp.sum(jnp.where(rows["mask_BR"], loss, 0)) / rows["mask_BR"].sum()


def plain_text_mean(params, batches):
    """Mean over all tokens of all batches, each document alone in a row of its own."""
    total, count = 0.0, 0
    documents = [
        batch["tokens_BT"][b][batch["segments_BT"][b] == s]
        for batch in batches
        for b in range(len(batch["tokens_BT"]))
        for s in (1, 2)
    ]
    longest = max(map(len, documents))
    padded = np.stack([np.pad(d, (0, longest - len(d))) for d in documents])
    live = np.arange(longest) < np.array([len(d) for d in documents])[:, None]
    logp = jax.nn.log_softmax(models.logits(params, CONFIG, padded, live))
    logp = jnp.take_along_axis(logp[:, :-1], padded[:, 1:, None], -1)[..., 0]
    total, count = -jnp.sum(logp * live[:, 1:]), live[:, 1:].sum()
    return total / count


KEEPS = optax.chain(optax.trace(decay=0.0), optax.sgd(0.01))  # opt_state[0].trace: the gradient


@functools.cache
def plain_text_gradient():
    """Two batches of text of other shapes and numbers of targets, with their gradient."""
    texts = [text_batch(0), text_batch(1, B=3, T=9)]
    fn = jax.jit(jax.value_and_grad(lambda params: plain_text_mean(params, texts)))
    return texts, *jax.device_get(fn(policy()))


def test_an_update_is_the_ppo_gradient_and_gamma_times_the_pretraining_gradient():
    """Two means with denominators of their own, each over batches of several shapes."""
    parts = cut(make_rows(), 3, [4, 8])
    assert len({part["tokens_BR"].shape for part in parts}) == 2
    want_mean, want = plain_gradient()
    texts, text_mean, want_text = plain_text_gradient()
    assert len({int(batch["mask_BT"].sum()) for batch in texts}) == 2
    mixed = jax.tree.map(lambda a, b: a + 27.8 * b, want, want_text)
    update = make_update(POLICY_LOSS, None, PTX_LOSS, KEEPS, None)
    new, metrics = update(make_state(policy(), KEEPS), parts, 36, texts)
    assert_close(new.policy.opt_state[0].trace, mixed, 1e-5)
    text_alone = jax.tree.map(lambda a, b: (a - b) / 27.8, new.policy.opt_state[0].trace, want)
    assert_close(text_alone, want_text, 1e-5)
    norm = optax.tree.norm(mixed)
    assert abs(metrics["optim/grad_norm"] - norm) < 1e-5 * norm
    assert abs(metrics["policy/loss"] - want_mean) < 1e-5
    assert abs(metrics["ptx/loss"] - text_mean) < 1e-5 * text_mean  # without its coefficient


def test_without_the_mix_the_update_is_plain_ppo():
    """gamma = 0, and no ptx loss at all, bit for bit; the gradient is that of the PPO term."""
    rows = make_rows()
    without = make_update(POLICY_LOSS, None, None, KEEPS, None)
    zero = make_update(POLICY_LOSS, None, PTX_LOSS, KEEPS, None, ptx_coef=0.0)
    want, metrics = without(make_state(policy(), KEEPS), [rows], 36)
    got, _ = zero(make_state(policy(), KEEPS), [rows], 36, [text_batch()])
    chex.assert_trees_all_equal(got, want)
    assert_close(want.policy.opt_state[0].trace, plain_gradient()[1], 1e-5)
    assert "ptx/loss" not in metrics
    assert got.value is None


@pytest.fixture(scope="module")
def updates():
    """Three updates with two optimizers, and what was seen of them."""
    traces = {"policy": 0, "value": 0, "ptx": 0}
    config, value = value_net()

    def counted(name, loss_fn, **keywords):
        bound = bind(loss_fn, **keywords)

        def loss(params, batch, key):
            traces[name] += 1
            assert key is None
            return bound(params, batch, key)

        return loss

    policy_tx, value_tx = optax.sgd(0.01), optax.sgd(0.02)
    update = make_update(
        counted("policy", ppo.policy_loss),
        counted("value", ppo.value_loss, config=config),
        counted("ptx", ppo.ptx_loss),
        policy_tx,
        value_tx,
        ptx_coef=2.0,
        ema_decay=0.9,
    )
    rows = make_rows()
    current = make_state(policy(), policy_tx, value, value_tx)
    copied = functools.partial(jax.tree.map, np.array)  # a view would keep what is donated
    states, donated, counts, metrics = [copied(current)], [], [], []
    for _ in range(3):
        before = current
        current, update_metrics = update(
            current, cut(rows, 3, [4, 8]), 36, [text_batch(0), text_batch(1), text_batch(2)]
        )
        states.append(copied(current))
        donated.append(before)
        counts.append(dict(traces))
        metrics.append(jax.device_get(update_metrics))
    return {"states": states, "donated": donated, "counts": counts, "metrics": metrics}


def followed(old, new, learning_rate, grads):
    """Whether a step of SGD was along the gradient: by norm, as rounding differs by processor."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    step, want = flat(old) - flat(new), learning_rate * flat(grads)
    assert np.linalg.norm(step - want) < 1e-3 * np.linalg.norm(want)


def test_ema_and_two_optimizers(updates):
    rows = make_rows()
    texts = [text_batch(0), text_batch(1), text_batch(2)]
    policy_grad = jax.jit(
        jax.grad(lambda p: plain_policy_mean(p, rows) + 2 * plain_text_mean(p, texts))
    )
    ema = jax.tree.map(lambda x: np.asarray(x, np.float64), policy())
    for i, (old, new) in enumerate(zip(updates["states"], updates["states"][1:], strict=False)):
        followed(old.policy.params, new.policy.params, 0.01, policy_grad(old.policy.params))
        *_, grads = run_loss("value", rows, old.value.params)
        followed(old.value.params, new.value.params, 0.02, grads)
        norm = optax.tree.norm(grads)
        assert abs(updates["metrics"][i]["optim/value_grad_norm"] - norm) < 1e-5 * norm
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, new.policy.params)
        assert_close(new.ema, ema, 1e-6)
        assert new.policy.step == new.value.step == i + 1
        assert new.beta == old.beta


def test_without_an_average_the_policy_is_the_same(updates):
    config, value = value_net()
    tx = optax.sgd(0.01)
    update = make_update(
        bind(ppo.policy_loss),
        bind(ppo.value_loss, config=config),
        bind(ppo.ptx_loss),
        *(tx, optax.sgd(0.02)),
        ptx_coef=2.0,
        ema_decay=0,
    )
    current = dataclasses.replace(make_state(policy(), tx, value, optax.sgd(0.02)), ema=None)
    texts = [text_batch(0), text_batch(1), text_batch(2)]
    current, _ = update(current, cut(make_rows(), 3, [4, 8]), 36, texts)
    assert current.ema is None
    chex.assert_trees_all_equal(current.policy.params, updates["states"][1].policy.params)


def test_each_program_compiles_once_a_shape(updates):
    """The first batch, and one of the other shape to add; so for texts: then none again."""
    first, *later = updates["counts"]
    assert first == {"policy": 2, "value": 2, "ptx": 2}
    assert all(count == first for count in later)


def test_the_state_is_donated_and_the_callers_parameters_are_not(updates):
    for before in updates["donated"]:
        gone = (before.policy, before.value, before.ema)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gone))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((policy(), value_net()[1])))


def test_metrics_of_an_update_have_the_fields_names(updates):
    assert set(updates["metrics"][0]) == {
        "policy/loss", "policy/ratio", "policy/approx_kl", "policy/clip_fraction",
        "policy/logp_change", "value/loss", "value/clip_fraction", "ptx/loss",
        "optim/grad_norm", "optim/value_grad_norm",
    }  # fmt: skip
    for metrics in updates["metrics"]:
        assert all(np.isfinite(value) for value in metrics.values())
    assert updates["metrics"][0]["value/loss"] > updates["metrics"][2]["value/loss"]


def test_a_state_goes_to_the_host_and_comes_back():
    mesh = sharding.make_mesh(**MESH)
    placed = sharding.shardings(models.logical_axes(CONFIG), policy(), mesh)
    params, tx = jax.device_put(policy(), placed), optax.adam(0.1)
    for current in (make_state(params, tx), make_state(params, tx, params, tx)):
        on_host = offload.to_host(current, True)
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(on_host.tree)}
        assert kinds == {"pinned_host"}
        returned = on_host.on_device()
        chex.assert_trees_all_equal(returned, current)
        layouts = (jax.tree.map(lambda x: x.sharding, tree) for tree in (returned, current))
        chex.assert_trees_all_equal(*layouts)


def test_an_update_on_a_mesh_equals_one_on_one_device():
    """On three axes; the state keeps its layout, so no program is compiled again.

    There the last layer runs at the responses alone.
    """
    mesh = sharding.make_mesh(**MESH)
    shard, traces = sharding.constrainer(mesh), []
    bound = bind(ppo.joint_loss, shard=shard, config=dataclasses.replace(CONFIG, unroll=2))

    def loss(params, batch, key):
        traces.append(1)
        return bound(params, batch, key)

    placed = sharding.shardings(models.logical_axes(CONFIG), policy(), mesh)
    head = jax.device_put(with_head()["value_head"], sharding.replicated(mesh))
    params = {**jax.device_put(policy(), placed), "value_head": head}
    current = make_state(params, KEEPS)
    beta = jax.device_put(current.beta, sharding.replicated(mesh))
    current = dataclasses.replace(current, beta=beta)
    layout = state.shardings(params, KEEPS)
    ptx_loss = bind(ppo.ptx_loss, shard=shard)
    update = make_update(loss, None, ptx_loss, KEEPS, None, ptx_coef=2.0, policy_layout=layout)
    put = functools.partial(rollout.put, mesh=mesh)
    texts = [put(text_batch(0))]
    for step in range(2):
        current, metrics = update(current, cut(make_rows(), 4, [8], put), 36, texts)
        if step == 0:
            _, _, want_metrics, want = run_loss("joint", make_rows())
            text_loss = lambda p: ppo.ptx_loss(p, text_batch(0), None, config=CONFIG)[0]  # noqa: E731
            want_text = {**jax.jit(jax.grad(text_loss))(policy()), "value_head": None}
            want_text["value_head"] = jax.tree.map(jnp.zeros_like, want["value_head"])
            mixed = jax.tree.map(lambda a, b: a + 2 * b, want, want_text)
            assert_close(jax.device_get(current.policy.opt_state[0].trace), mixed)
            metrics_close({name: metrics[name] for name in want_metrics}, want_metrics)
    assert len(traces) == 2  # the first batch, and one that is added to it
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, current.policy), layout)
