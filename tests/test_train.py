"""Meshes, states and steps: the same numbers on one device and on eight."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructjax import masked, models, sharding, state, train
from instructjax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=131, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, max_length=32,
    family="llama", positions="rotary", norm="rms", gated=True, activation="silu", tied=False,
)  # fmt: skip
GPT2_VOCABULARY = ModelConfig(
    vocab_size=50257, layers=2, width=16, heads=8, mlp_width=32, max_length=32
)


def loss_fn(params, batch, key, *, config, shard=models.unsharded):
    """Mean next-token loss over live targets, as a user would write it."""
    del key
    tokens, mask = batch["tokens_BT"], batch["mask_BT"]
    hidden = models.apply(params, config, tokens, shard=shard)[:, :-1]
    unembed, weights = models.unembedding(params), mask[:, 1:].astype(jnp.float32)
    total = models.cross_entropy(hidden, unembed, tokens[:, 1:], weights, config, 64, shard)
    weight = weights.sum()
    mean = total / jnp.maximum(weight, 1)
    return mean, (weight, {"sft/loss": mean})


def batch_of(config, B=8, T=12, seed=0):
    rng = np.random.default_rng(seed)
    live = np.arange(T)[None] < rng.integers(2, T, (B, 1))  # rows of unequal weight
    return {"tokens_BT": rng.integers(0, config.vocab_size, (B, T)), "mask_BT": live}


def params_of(config, mesh=None):
    shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    layout = mesh and sharding.shardings(models.logical_axes(config), shapes, mesh)
    init = jax.jit(functools.partial(models.init, config), out_shardings=layout)
    return init(jax.random.key(0))


def gradient(config, mesh=None, microbatches=1, rules=sharding.RULES):
    shard = models.unsharded if mesh is None else sharding.constrainer(mesh, rules)
    batch = batch_of(config)
    if mesh is not None:
        batch = jax.device_put(batch, sharding.batched(mesh))
    fn = functools.partial(loss_fn, config=config, shard=shard)
    run = jax.jit(
        lambda p, b: train.accumulate_gradients(fn, p, b, jax.random.key(0), microbatches)
    )
    return run(params_of(config, mesh), batch)


@functools.cache
def reference(config):
    return jax.device_get(gradient(config))


def assert_same(got, want, tolerance):
    """Gradients by relative norm per leaf, metrics by value."""
    (grads, metrics), (want_grads, want_metrics) = jax.device_get(got), want

    def close(path, a, b):
        name, size = jax.tree_util.keystr(path), np.linalg.norm(b)
        if "'key']['bias']" in name and size < 1e-9:  # without rope its true gradient is 0
            assert np.linalg.norm(a) < 1e-9, name
            return
        assert np.linalg.norm(a - b) < tolerance * size, (name, np.linalg.norm(a - b) / size)

    jax.tree_util.tree_map_with_path(close, grads, want_grads)
    for name, value in want_metrics.items():
        assert abs(metrics[name] - value) < tolerance * abs(value), name


# ---------------------------------------------------------------------------- meshes


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8, "fsdp": 1}, {"fsdp": 8}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_equal_one(axes):
    assert_same(gradient(CONFIG, sharding.make_mesh(**axes)), reference(CONFIG), 1e-5)


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_sequence_split_between_sublayers_changes_nothing(tensor):
    mesh = sharding.make_mesh(tensor=tensor)
    split = gradient(CONFIG, mesh, rules=sharding.SEQUENCE)
    assert_same(split, reference(CONFIG), 1e-5)


def test_a_sequence_that_does_not_divide_is_padded_and_split():
    """12 tokens are padded to 16, 2 on each of 8 devices."""
    config = dataclasses.replace(GPT2_VOCABULARY, vocab_size=136)
    mesh = sharding.make_mesh(tensor=8)
    split = gradient(config, mesh, rules=sharding.SEQUENCE)
    assert_same(split, gradient(config), 1e-5)
    shard, tokens = sharding.constrainer(mesh, sharding.SEQUENCE), batch_of(config)["tokens_BT"]
    run = jax.jit(functools.partial(models.apply, config=config, shard=shard))
    params = params_of(config, mesh)
    assert "f32[8,2,16]" in run.lower(params, tokens_BT=tokens).compile().as_text()
    assert run(params, tokens_BT=tokens).shape == (8, 12, 16)


def test_a_sequence_that_does_not_divide_is_whole():
    mesh = sharding.make_mesh(tensor=8)
    spec = functools.partial(sharding.partition_spec, mesh=mesh, rules=sharding.SEQUENCE)
    assert spec(("batch", "sequence", None), (2, 16, 4))[1] == "tensor"
    assert spec(("batch", "sequence", None), (2, 12, 4))[1] is None


@pytest.mark.parametrize("axes", [*MESHES, {"tensor": 8}], ids=str)
def test_eight_devices_equal_one_with_the_vocabulary_of_gpt2(axes):
    mesh = sharding.make_mesh(**axes)
    assert_same(gradient(GPT2_VOCABULARY, mesh), reference(GPT2_VOCABULARY), 1e-5)


def test_tensor_axis_alone_equals_one_device():
    """Eight heads are split eight ways, and the two KV heads are replicated."""
    config = dataclasses.replace(CONFIG, heads=8, head_dim=4)
    mesh = sharding.make_mesh(tensor=8)
    assert_same(gradient(config, mesh), reference(config), 1e-5)
    params = params_of(config, mesh)["layers"]["attention"]
    assert params["query"]["kernel"].sharding.spec[2] == "tensor"
    assert params["key"]["kernel"].sharding.spec[2] is None


def test_each_leaf_is_split_over_what_its_rule_says():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = params_of(CONFIG, mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    norms = 5 * 32 * 4  # bytes of two norms per layer and the last one, which are replicated
    biases = sum(
        leaf.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "bias" in jax.tree_util.keystr(path)
    )
    assert here == (total - norms - biases) // 4 + norms + biases // 2
    bias = params["layers"]["attention"]["query"]["bias"]  # [layers, heads, head_dim]
    assert tuple(bias.sharding.spec) == (None, "tensor", None)


@pytest.mark.parametrize("name", models.PRESETS)
def test_every_preset_has_a_rule_for_each_axis(name):
    config = models.PRESETS[name]
    shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    layout = sharding.shardings(models.logical_axes(config), shapes, mesh)
    placed = jax.tree_util.tree_leaves_with_path(layout["layers"])
    kernels = [x.spec for path, x in placed if "kernel" in jax.tree_util.keystr(path)]
    assert len(kernels) == (7 if config.gated else 6)  # four of attention, the rest of the MLP
    assert all({"fsdp", "tensor"} <= set(spec) for spec in kernels)


@pytest.mark.parametrize(
    ("changes", "axes", "message"),
    [
        (
            {"heads": 6, "head_dim": 8, "kv_heads": 2},
            {"tensor": 4},
            "attention/.*: heads of size 6",
        ),
        (
            {"mlp_width": 30},
            {"tensor": 4},
            "mlp/.*: mlp of size 30 does not divide over tensor of 4",
        ),
        (
            {"width": 36, "heads": 4},
            {"fsdp": 8},
            "tokens: width of size 36 does not divide over fsdp of 8",
        ),
        ({"heads": 12, "kv_heads": 6, "head_dim": 8}, {"tensor": 4}, "key/.*: kv_heads of size 6"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes, axes, message):
    config = dataclasses.replace(CONFIG, **changes)
    fsdp = axes.get("fsdp")
    with pytest.raises(ValueError, match=message):
        params_of(config, sharding.make_mesh(fsdp=fsdp, tensor=axes.get("tensor", 1)))


def test_a_vocabulary_always_fits():
    mesh = sharding.make_mesh(fsdp=1, tensor=3, devices=jax.devices()[:3])
    assert sharding.partition_spec(("vocab", None), (50304, 7), mesh)[0] == "tensor"
    assert sharding.partition_spec(("vocab", None), (256, 7), mesh)[0] is None


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"embed: no sharding rule .* 'colour'"):
        sharding.partition_spec(("colour",), (8,), sharding.make_mesh(), "embed")


def test_parse_mesh():
    assert sharding.parse_mesh("data=2,fsdp=-1,tensor=2") == {"data": 2, "fsdp": -1, "tensor": 2}
    assert dict(sharding.make_mesh(**sharding.parse_mesh("data=2,tensor=2")).shape) == {
        "data": 2, "fsdp": 2, "tensor": 2,
    }  # fmt: skip
    for text, message in {
        "expert=2": "'expert' is not one of data, fsdp, tensor",
        "data=two": "data must be a positive number, or -1 for the rest",
        "data=0": "data must be a positive number",
        "data": "data must be a positive number",
        "data=-1,fsdp=-1": "only one axis can be -1",
        "data=2,data=2": "data is given twice",
    }.items():
        with pytest.raises(ValueError, match=message):
            sharding.parse_mesh(text)
    with pytest.raises(ValueError, match="data=3,fsdp=-1,tensor=1 does not divide 8 devices"):
        sharding.make_mesh(data=3)
    assert dict(sharding.make_mesh(data=-1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, tensor=-1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}


# ---------------------------------------------------------------------------- steps


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_equal_the_whole_batch(microbatches):
    assert_same(gradient(CONFIG, microbatches=microbatches), reference(CONFIG), 1e-6)


def test_microbatches_on_a_mesh():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert_same(gradient(CONFIG, mesh, microbatches=2), reference(CONFIG), 1e-5)


def test_accumulation_by_hand():
    """Rows of weight 1 and 3 have means 10 w and 2 w, so the gradient is (10 + 6) / 4 = 4."""

    def fn(params, batch, key):
        del key
        mean = masked.masked_mean(batch["x"] * params["w"], batch["mask"])
        return mean, (batch["mask"].sum(), {"mean": mean})

    x = jnp.array([[10.0, 7, 7], [1, 2, 3], [jnp.nan, 0, 0], [0, 0, 0]])
    mask = jnp.array([[1.0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]])
    for microbatches in (1, 2, 4):
        batch = {"x": x.at[2, 0].set(5.0), "mask": mask}
        grads, metrics = train.accumulate_gradients(
            fn, {"w": jnp.float32(1)}, batch, jax.random.key(0), microbatches
        )
        assert grads["w"] == 4
        assert metrics == {"loss": 4, "mean": 4}
    with pytest.raises(ValueError, match="a batch of 4 rows has no 3 equal microbatches"):
        train.accumulate_gradients(fn, {"w": 1.0}, {"x": x, "mask": mask}, jax.random.key(0), 3)


def test_masked_mean_by_hand():
    x, mask = (
        jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.inf, 0.0]]),
        jnp.array([[1, 1, 0], [1, 0, 0]]),
    )
    assert masked.masked_sum(x, mask) == 9
    assert masked.masked_mean(x, mask) == 3
    np.testing.assert_array_equal(masked.masked_mean(x, mask, axis=1), [2, 5])
    assert masked.masked_mean(x, jnp.zeros((2, 3))) == 0
    # A mask that has to be broadcast would count too few entries.
    for reduce in (masked.masked_sum, masked.masked_mean):
        with pytest.raises(AssertionError, match=r"\(2, 3\)"):
            reduce(x, mask[:, :1])


@pytest.fixture(scope="module")
def trained():
    """Three steps on a mesh: (mesh, caller's params, states, metrics, traces)."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = params_of(CONFIG, mesh)
    tx = train.adam(1e-2)
    fn = functools.partial(loss_fn, config=CONFIG, shard=sharding.constrainer(mesh))

    @chex.assert_max_traces(n=1)
    def counted(params, batch, key):
        return fn(params, batch, key)

    step = train.make_train_step(counted, tx, shardings=state.shardings(params, tx))
    current, metrics, first = state.create(params, tx), [], None
    batch = jax.device_put(batch_of(CONFIG), sharding.batched(mesh))
    for i in range(3):
        before = current
        current, m = step(current, batch, jax.random.key(i))
        first = first or before
        metrics.append(jax.device_get(m))
    return {"params": params, "first": first, "last": current, "metrics": metrics, "step": step}


def test_a_step_learns_and_compiles_once(trained):
    losses = [m["loss"] for m in trained["metrics"]]
    assert losses[0] > losses[1] > losses[2]
    assert trained["metrics"][0]["sft/loss"] == losses[0]
    assert trained["step"]._cache_size() == 1
    assert trained["last"].step == 3


def test_the_state_is_donated_and_the_callers_parameters_are_not(trained):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained["first"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trained["params"]))


def test_an_optimizer_that_keeps_rows_and_columns():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, tx = params_of(CONFIG, mesh), optax.adafactor(1e-3)
    step = train.make_train_step(
        functools.partial(loss_fn, config=CONFIG, shard=sharding.constrainer(mesh)),
        tx,
        shardings=state.shardings(params, tx),
    )
    new, metrics = step(state.create(params, tx), batch_of(CONFIG), jax.random.key(0))
    assert new.step == 1
    assert jnp.isfinite(metrics["loss"])


def test_every_microbatch_has_another_key():
    def fn(params, batch, key):
        return params["w"] * jax.random.uniform(key), (batch.shape[0], {})

    def run(microbatches):
        batch, params = jnp.zeros((4, 1)), {"w": jnp.float32(1)}
        key = jax.random.key(0)
        return train.accumulate_gradients(fn, params, batch, key, microbatches)[0]["w"]

    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_allclose(run(4), np.mean([jax.random.uniform(k) for k in keys]), rtol=1e-6)


def test_moments_lie_where_their_parameters_lie(trained):
    last = trained["last"]
    adam = last.opt_state[1][0]
    for moments in (adam.mu, adam.nu):
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, moments, last.params)
        assert all(jax.tree.leaves(same))


def test_gradients_are_split_as_the_parameters_are():
    """The compiler can then reduce-scatter them, and no device holds a whole gradient.

    The optimizer keeps the gradient here, and only the step decides where that lies.
    """
    mesh = sharding.make_mesh(data=2, fsdp=4)
    params = params_of(CONFIG, mesh)
    keep = optax.GradientTransformation(
        lambda params: (), lambda grads, _, params: (optax.tree.zeros_like(grads), grads)
    )
    fn = functools.partial(loss_fn, config=CONFIG, shard=sharding.constrainer(mesh))
    layout = state.shardings(params, keep)
    step = train.make_train_step(fn, keep, shardings=layout.replace(opt_state=None))
    batch = jax.device_put(batch_of(CONFIG), sharding.batched(mesh))
    new, _ = step(state.create(params, keep), batch, jax.random.key(0))
    where = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), new.opt_state)
    assert where == jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), params)


def test_a_step_equals_sgd_by_hand():
    tx = optax.sgd(0.5)
    params = params_of(CONFIG)
    grads, metrics = reference(CONFIG)
    step = train.make_train_step(functools.partial(loss_fn, config=CONFIG), tx)
    new, got = step(state.create(params, tx), batch_of(CONFIG), jax.random.key(0))
    jax.tree.map(
        lambda p, g, n: np.testing.assert_allclose(n, p - 0.5 * g, atol=1e-6),
        params, grads, new.params,
    )  # fmt: skip
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(got["optim/grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-6)


def test_weight_decay_shrinks_every_parameter_by_its_share():
    """AdamW: p - lr (update + decay p), and the same moments as without."""
    params = {"a": jnp.array([2.0]), "b": jnp.array([[-4.0]])}
    grads = {"a": jnp.array([0.3]), "b": jnp.array([[0.4]])}
    plain, decayed = train.adam(0.1), train.adam(0.1, weight_decay=0.5)
    update, moments = plain.update(grads, plain.init(params), params)
    shrunk, same_moments = decayed.update(grads, decayed.init(params), params)
    for name in params:
        np.testing.assert_allclose(shrunk[name], update[name] - 0.1 * 0.5 * params[name], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, moments[1][0], same_moments[1][0])


def test_the_learning_rate_rises_and_decays_to_a_tenth():
    """Four steps of warm-up: 1/5, 2/5, 3/5, 4/5 of the peak, then the peak and half a cosine."""
    for warmup in (4, 0.2):  # steps, or their share of the 20 steps
        rate = train.cosine(3.0, 20, warmup)
        np.testing.assert_allclose(
            [rate(n) for n in range(5)], [0.6, 1.2, 1.8, 2.4, 3.0], rtol=1e-5
        )
        np.testing.assert_allclose([rate(12), rate(20)], [3.0 * 0.55, 0.3], rtol=1e-5)
    rate = train.cosine(3.0, 20)
    np.testing.assert_allclose([rate(0), rate(10), rate(20)], [3.0, 3.0 * 0.55, 0.3], rtol=1e-5)
    assert np.isfinite(train.cosine(3.0, 0, 0.1)(0))
    np.testing.assert_allclose(train.cosine(3.0, 2, 40)(1), 2.0, rtol=1e-5)  # the rise is cut


def test_adam_clips_the_global_norm():
    """A gradient of norm 50 gives the update of the same gradient scaled to norm 1."""
    grads, params = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}, {"a": 0.0, "b": 0.0}
    tx = train.adam(1.0, eps=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    # Bias-corrected Adam's first step is -g / (|g| + eps), g = (0.6, 0.8) once clipped.
    np.testing.assert_allclose(updates["a"], [-0.6 / 1.6], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [-0.8 / 1.8], rtol=1e-5)
