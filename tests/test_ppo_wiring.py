"""What binds run_ppo.py's flags to the library: every flag away from its default, against loops.

`mutations.py` breaks this wiring on purpose, and lists the test that notices.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import optax
import pytest
import reference
import run_ppo
from ppo_config import PPO, PTX, Adam, Config

from instructjax import hf, models, ppo, rollout, sharding, state
from instructjax.data import DataConfig
from instructjax.models import ModelConfig
from instructjax.scoring import RewardConfig

MODEL = ModelConfig(
    vocab_size=61, layers=1, width=16, heads=2, mlp_width=32, max_length=32, eos_ids=(3, 50, 51, 52)
)
P, R, B = 6, 8, 8
CONFIG = Config(
    data=DataConfig("miniature"),
    batch_size=B,
    max_new_tokens=R,
    temperature=0.7,
    seed=5,
    ppo=PPO(
        minibatch=4, epochs=2, buckets=2, clip=0.1, value_clip=0.05, beta=0.3, kl_target=0.7,
        kl_horizon=50, gamma=0.9, lam=0.5, whiten_advantages=False, whiten_rewards=True,
        clip_score=0.8, missing_eos="penalty", missing_eos_value=0.6, value_coef=0.4,
        learning_rate=3e-2, value_learning_rate=7e-2, warmup=3, ema=0.6,
    ),
    adam=Adam(b1=0.7, b2=0.8, eps=1e-3, clip_norm=0.5),
    ptx=PTX(coef=3.0, ratio=1, length=12),
)  # fmt: skip
MESH = functools.cache(lambda: sharding.make_mesh(devices=jax.devices()[:1]))


def with_ppo(**changes) -> Config:
    return dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, **changes))


@functools.cache
def nets():
    """The parameters of a policy, and the config and parameters of a value net."""
    policy = jax.tree.map(lambda x: x * 3, models.init(MODEL, jax.random.key(0)))
    value_model, value = models.with_scalar_head(policy, MODEL, jax.random.key(1))
    value["score"]["bias"] = jnp.float32(0.25)
    return policy, value_model, jax.tree.map(lambda x: x * 1.5, value)


def make_programs(config: Config) -> run_ppo.Programs:
    policy, value_model, value = jax.device_put(nets()[0]), nets()[1], nets()[2]
    policy, value = jax.device_put((policy, value), sharding.replicated(MESH()))
    if config.ppo.value == "shared":
        policy = ppo.with_value_head(policy, MODEL.width, MESH())
        return run_ppo.Programs(config, MODEL, None, policy, None, MESH(), (P,))
    return run_ppo.Programs(config, MODEL, value_model, policy, value, MESH(), (P,))


@pytest.fixture(scope="module")
def programs() -> run_ppo.Programs:
    return make_programs(CONFIG)


@functools.cache
def make_rows():
    """A scored rollout of lengths 1 to 8 with made-up log-probabilities, values and experience."""
    rng = np.random.default_rng(0)
    mask = np.arange(R) < np.array([8, 1, 5, 2, 3, 7, 4, 6])[:, None]
    prompts = [rng.integers(4, 50, rng.integers(1, P + 1)).tolist() for _ in range(B)]
    rows = rollout.left_padded(prompts, P)
    rows |= {"tokens_BR": rng.integers(4, 50, (B, R)).astype(np.int32), "mask_BR": mask}
    noise = {name: rng.normal(size=(B, R)) for name in ("logp", "value", "advantage", "return")}
    noise["logp"] = plain_logp(rows, CONFIG.temperature) + 0.1 * noise["logp"]
    return rows | {f"{k}_BR": np.where(mask, x, 0).astype(np.float32) for k, x in noise.items()}


def plain_logp(rows, temperature, params=None):
    """log p of each response token from plain logits."""
    tokens = jnp.concatenate([rows["prompt_BP"], rows["tokens_BR"]], 1)
    live = jnp.concatenate([rows["prompt_mask_BP"], rows["mask_BR"]], 1)
    logits = models.logits(nets()[0] if params is None else params, MODEL, tokens, live)
    logp = jax.nn.log_softmax(logits[:, rows["prompt_BP"].shape[1] - 1 : -1] / temperature)
    return jnp.take_along_axis(logp, rows["tokens_BR"][..., None], -1)[..., 0]


def text_batch():
    rng = np.random.default_rng(3)
    ones = np.ones((4, 12), np.int32)
    return {
        "tokens_BT": rng.integers(4, 50, (4, 12)).astype(np.int32),
        "segments_BT": ones,
        "positions_BT": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "mask_BT": np.arange(12) > np.zeros((4, 1)),
    }


def plain_text_loss(params):
    batch = text_batch()
    logp = jax.nn.log_softmax(models.logits(params, MODEL, batch["tokens_BT"])[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, batch["tokens_BT"][:, 1:, None], -1))


def plain_policy_loss(params, rows, clip, temperature):
    ratio = jnp.exp(plain_logp(rows, temperature, params) - rows["logp_BR"])
    a = rows["advantage_BR"]
    loss = -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - clip, 1 + clip) * a)
    return jnp.sum(jnp.where(rows["mask_BR"], loss, 0)) / rows["mask_BR"].sum()


# ---------------------------------------------------------------------------- scoring a rollout


def test_the_sampler_and_the_log_probabilities_have_the_flags_temperature(programs):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 50, n).tolist() for n in (1, 6, 3, 2)]
    rows, live = programs.sample(nets()[0], prompts, [7, 8, 9, 9], jax.random.key(0))
    assert rows["tokens_BR"].shape == (4, R)
    assert 0 < live <= 1
    want = np.where(rows["mask_BR"], plain_logp(rows, 0.7), 0)
    np.testing.assert_allclose(rows["logp_BR"], want, atol=1e-4)
    np.testing.assert_allclose(programs.logp(nets()[0], rows), want, atol=1e-4)
    other = np.where(rows["mask_BR"], plain_logp(rows, 1.0), 0)
    assert np.abs(other - want).max() > 0.1


def test_noise_depends_on_key_and_number(programs):
    prompts = [[5, 6, 7]] * 4
    tokens = lambda numbers, key: programs.sample(  # noqa: E731
        nets()[0], prompts, numbers, jax.random.key(key)
    )[0]["tokens_BR"].tolist()
    drawn = tokens([1, 2, 3, 1], 0)
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] != drawn[2]
    assert tokens([1, 2, 3, 1], 1) != drawn


def test_values_are_the_value_nets(programs):
    _, value_model, value = nets()
    current = ppo.PPOState(policy=None, value=state.create(value, optax.sgd(1.0)), ema=None, beta=0)
    rows = make_rows()
    want = rollout.token_values(value, rows, config=value_model)
    np.testing.assert_allclose(programs.values(current, rows), want, atol=1e-5)
    assert np.abs(np.asarray(want)).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"whiten_advantages": True, "whiten_rewards": False, "clip_score": None},
        {"missing_eos": "fixed", "missing_eos_value": None, "gamma": 1.0},  # default: -1
        {"missing_eos": "penalty", "missing_eos_value": None, "clip_score": None},  # default: 1
    ],
    ids=str,
)
def test_experience_has_the_flags(changes):
    config, rows = with_ppo(**changes), make_rows()
    rng = np.random.default_rng(2)
    ref_logp = rows["logp_BR"] + rng.normal(size=(B, R)).astype(np.float32)
    score, ended = rng.normal(size=B).astype(np.float32), np.arange(B) % 2 == 0
    arrays = {"logp_BR": rows["logp_BR"], "ref_logp_BR": ref_logp, "value_BR": rows["value_BR"]}
    arrays |= {"mask_BR": rows["mask_BR"], "score_B": score, "ended_B": ended}
    experience, metrics = make_programs(config).make_experience(**arrays, beta=jnp.float32(0.3))
    flags = config.ppo
    value = {"fixed": -1.0, "penalty": 1.0}[flags.missing_eos]
    want_advantage, want_return, want_metrics = reference.experience(
        *arrays.values(), 0.3, gamma=flags.gamma, lam=flags.lam, missing_eos=flags.missing_eos,
        missing_eos_value=value if flags.missing_eos_value is None else flags.missing_eos_value,
        clip_score=flags.clip_score, whiten_rewards=flags.whiten_rewards,
        whiten_advantages=flags.whiten_advantages,
    )  # fmt: skip
    np.testing.assert_allclose(experience["advantage_BR"], want_advantage, atol=2e-5)
    np.testing.assert_allclose(experience["return_BR"], want_return, atol=2e-5)
    for name, want in want_metrics.items():
        assert abs(float(metrics[name]) - want) < 2e-5 * max(1, abs(want)), name


# ---------------------------------------------------------------------------- an update


@pytest.fixture(scope="module")
def updated(programs):
    """(state before, state after, metrics) of two updates."""
    policy, _, value = nets()
    current = ppo.PPOState(
        policy=state.create(policy, programs.policy_tx),
        value=state.create(value, programs.value_tx),
        ema=jax.tree.map(jnp.copy, policy),
        beta=jnp.float32(0.3),
    )
    states, metrics = [jax.tree.map(np.array, current)], []
    for _ in range(2):
        rows = make_rows()
        minibatch = programs.minibatch(rows, np.arange(B))
        current, update = programs.update(current, *minibatch, programs.text_batches(text_batch()))
        states.append(jax.tree.map(np.array, current))
        metrics.append(jax.device_get(update))
    return states, metrics


def adam_steps(params, gradient_of, peak):
    """Two steps of clipped Adam in NumPy float64, with the warm-up of CONFIG."""
    flags, updates = CONFIG.adam, CONFIG.ppo.warmup * CONFIG.ppo.epochs * B // CONFIG.ppo.minibatch
    leaves, tree = jax.tree.flatten(params)
    leaves = [np.asarray(x, np.float64) for x in leaves]
    first, second = [0 * x for x in leaves], [0 * x for x in leaves]
    steps, norms = [], []
    for t in (1, 2):
        grads = jax.tree.leaves(gradient_of(jax.tree.unflatten(tree, map(np.float32, leaves))))
        norms.append(np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads)))
        grads = [np.asarray(g, np.float64) * min(1, flags.clip_norm / norms[-1]) for g in grads]
        rate = 0.1 * peak + 0.9 * peak * (t - 1) / updates
        first = [flags.b1 * m + (1 - flags.b1) * g for m, g in zip(first, grads, strict=True)]
        second = [flags.b2 * v + (1 - flags.b2) * g**2 for v, g in zip(second, grads, strict=True)]
        leaves = [
            x - rate * (m / (1 - flags.b1**t)) / (np.sqrt(v / (1 - flags.b2**t)) + flags.eps)
            for x, m, v in zip(leaves, first, second, strict=True)
        ]
        steps.append(jax.tree.unflatten(tree, leaves))
    return steps, norms


def assert_moved_alike(got, want, start, tolerance):
    """Compares how far parameters went from the start: by relative norm over the whole tree."""
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    got, want = flat(got) - flat(start), flat(want) - flat(start)
    assert np.linalg.norm(want) > 0
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


def test_the_policys_update_has_the_flags(updated):
    """PPO's gradient at --ppo.clip and --temperature plus --ptx.coef times the text's, clipped and
    followed by Adam with --adam.* at the warm-up's learning rate; the average by --ppo.ema."""
    states, metrics = updated
    rows, policy = make_rows(), nets()[0]

    def loss(params):
        return plain_policy_loss(params, rows, 0.1, 0.7) + 3.0 * plain_text_loss(params)

    steps, norms = adam_steps(policy, jax.jit(jax.grad(loss)), peak=3e-2)
    for i in range(2):
        assert metrics[i]["optim/grad_norm"] == pytest.approx(norms[i], rel=1e-3)
        assert_moved_alike(states[i + 1].policy.params, steps[i], policy, 1e-2)
    ema = policy
    for i in range(2):
        ema = jax.tree.map(lambda old, new: 0.6 * old + 0.4 * new, ema, states[i + 1].policy.params)
        assert_moved_alike(states[i + 1].ema, ema, policy, 1e-5)
    first = metrics[0]
    assert norms[0] > CONFIG.adam.clip_norm  # the clip matters
    assert first["policy/loss"] == pytest.approx(
        float(plain_policy_loss(policy, rows, 0.1, 0.7)), rel=1e-4
    )
    assert first["ptx/loss"] == pytest.approx(float(plain_text_loss(policy)), rel=1e-5)
    assert first["policy/clip_fraction"] > 0


def test_the_value_nets_update_has_the_flags(updated):
    states, metrics = updated
    rows, (_, value_model, value) = make_rows(), nets()

    def loss(params):
        values = rollout.token_values(params, rows, config=value_model)
        near = rows["value_BR"] + jnp.clip(values - rows["value_BR"], -0.05, 0.05)
        squares = [(x - rows["return_BR"]) ** 2 for x in (values, near)]
        return jnp.sum(jnp.where(rows["mask_BR"], jnp.maximum(*squares) / 2, 0)) / 36

    steps, norms = adam_steps(value, jax.jit(jax.grad(loss)), peak=7e-2)
    for i in range(2):
        assert metrics[i]["optim/value_grad_norm"] == pytest.approx(norms[i], rel=1e-3)
        assert_moved_alike(states[i + 1].value.params, steps[i], value, 1e-2)
    assert metrics[0]["value/loss"] == pytest.approx(float(loss(value)), rel=1e-4)
    assert metrics[0]["value/clip_fraction"] > 0


def test_on_a_shared_trunk_the_value_loss_has_the_flags():
    """policy loss + --ppo.value_coef times the value loss, clipped at --ppo.value_clip."""
    shared = make_programs(with_ppo(value="shared"))
    rows, policy = make_rows(), nets()[0]
    head = {"kernel": jnp.full(MODEL.width, 0.1), "bias": jnp.float32(0.5)}
    params = {**policy, "value_head": head}
    grads, metrics = shared.policy_gradient(params, *shared.minibatch(rows, np.arange(B)))

    def value_loss(params):
        trunk = {k: v for k, v in params.items() if k not in ("unembed", "value_head")}
        trunk["score"] = params["value_head"]
        config = dataclasses.replace(MODEL, scalar_head=True)
        return ppo.value_loss(trunk, rows, None, config=config, clip=0.05)[0]

    def loss(params):
        return plain_policy_loss(params, rows, 0.1, 0.7) + 0.4 * value_loss(params)

    zeros = jax.tree.map(np.zeros_like, params)
    assert_moved_alike(grads, jax.jit(jax.grad(loss))(params), zeros, 1e-4)
    assert metrics["value/loss"] == pytest.approx(float(value_loss(params)), rel=1e-4)


@pytest.mark.parametrize(
    ("rescore", "dtype", "want"),
    [
        *((None, "float32", False), (None, "bfloat16", True)),
        *((True, "float32", True), (False, "bfloat16", False)),
    ],
)
def test_behaviour_is_rescored_in_bfloat16_or_when_asked_for(rescore, dtype, want):
    config = dataclasses.replace(with_ppo(rescore=rescore), model_dtype=dtype)
    assert make_programs(config).rescore is want


def test_a_loss_of_the_users_replaces_ppos(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def loss(logp, old_logp, advantages, clip):\n    return 0 * logp + 7 + clip\n")
    config = dataclasses.replace(CONFIG, loss=f"{file}:loss")
    programs = make_programs(config)
    minibatch = programs.minibatch(make_rows(), np.arange(B))
    _, metrics = programs.policy_gradient(nets()[0], *minibatch)
    assert float(metrics["policy/loss"]) == pytest.approx(7.1, rel=1e-5)


def test_warm_up_counts_iterations(programs):
    """From a tenth to the whole in --ppo.warmup iterations of four updates each."""
    rates = [float(programs.learning_rate(update)) for update in range(20)]
    want = [3e-2 * (0.1 + 0.9 * min(update / 12, 1)) for update in range(20)]
    np.testing.assert_allclose(rates, want, rtol=1e-5)


def test_minibatches_are_new_orders_of_all_rows():
    """Each epoch of each iteration takes every row once, in an order of its own."""
    orders = {}
    for seed in (5, 6):
        for step in (1, 2):
            index = run_ppo.minibatches(dataclasses.replace(CONFIG, seed=seed), step)
            assert [len(part) for part in index] == [4, 4, 4, 4]
            for epoch in (0, 1):
                order = np.concatenate(index[2 * epoch : 2 * epoch + 2])
                assert sorted(order) == list(range(B))
                orders[seed, step, epoch] = tuple(order)
    assert len(set(orders.values())) == 8


def test_minibatches_are_put_by_microbatches_and_buckets():
    config = with_ppo(microbatches=2)
    # Of lengths 8, 1, 2 and 3.
    batches, tokens = make_programs(config).minibatch(make_rows(), np.array([0, 1, 3, 4]))
    assert tokens == 14
    assert [batch["tokens_BR"].shape for batch in batches] == [(2, R), (2, R)]
    assert [int(batch["mask_BR"].sum()) for batch in batches] == [3, 11]
    halves = dataclasses.replace(CONFIG, ptx=dataclasses.replace(CONFIG.ptx, microbatches=2))
    parts = make_programs(halves).text_batches(text_batch())
    np.testing.assert_array_equal(parts[1]["tokens_BT"], text_batch()["tokens_BT"][1::2])


@pytest.mark.parametrize("kl", [0.1, 0.65, 5.0])
def test_beta_adapts_to_the_flags_target(programs, kl):
    current = ppo.PPOState(policy=None, value=None, ema=None, beta=jnp.float32(0.3))
    metrics = {"objective/kl": jnp.float32(kl)}
    want = reference.adapt_beta(0.3, kl, B, target=0.7, horizon=50)
    assert float(programs.adapt_beta(current, metrics).beta) == pytest.approx(want, rel=1e-5)
    fixed = make_programs(with_ppo(kl_target=None))
    assert fixed.adapt_beta(current, metrics) is current


# ---------------------------------------------------------------------------- what it starts from


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(tokenizer, directory, a policy's config and parameters, parameters of two reward models)."""
    from instructjax import miniature

    tokenizer, out = miniature.tokenizer(), tmp_path_factory.mktemp("value")
    config = dataclasses.replace(
        MODEL, vocab_size=len(tokenizer), eos_ids=(tokenizer.eos_token_id,), pad_id=0
    )
    reward_models = {}
    for seed, name in ((0, "rm"), (1, "other")):
        base = models.init(config, jax.random.key(seed))
        model, params = models.with_scalar_head(base, config, jax.random.key(seed + 10))
        params["score"]["bias"] = jnp.float32(0.5 + seed)
        hf.save(out / name, model, params, tokenizer)
        reward_models[name] = params
    return tokenizer, out, config, models.init(config, jax.random.key(2)), reward_models


@pytest.mark.parametrize("named", [False, True])
def test_the_value_net_starts_as_the_reward_model(exported, named):
    """As the first of --reward that is a model, its bias included; or as --value_model."""
    tokenizer, out, model, policy, reward_models = exported
    specs = ("my_file.py:length", f"{out}/rm", f"{out}/other")
    config = dataclasses.replace(
        CONFIG, reward=RewardConfig(specs), value_model=f"{out}/other" if named else None
    )
    _, value_model, value = run_ppo.load_value_net(config, MESH(), model, policy, tokenizer)
    rows = make_rows()
    want = rollout.token_values(reward_models["other" if named else "rm"], rows, config=value_model)
    np.testing.assert_allclose(
        rollout.token_values(value, rows, config=value_model), want, atol=1e-5
    )


def test_every_mutation_is_still_one_place_in_the_tree():
    root = Path(__file__).resolve().parents[1]
    for mutation in mutations.MUTATIONS:
        count = (root / mutation.file).read_text().count(mutation.old)
        assert count == 1, (mutation.name, count)
        assert mutation.old != mutation.new
