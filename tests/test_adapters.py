"""LoRA: adapters in every way to run a model, their gradients, merging, and where they lie."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_models import CONFIGS, GEMMA3, GPT2, MISTRAL, params_of, tokens_of

from instructjax import models, sampler, sft, sharding, state, train
from instructjax.models import adapters, layer

SCALE = 1.5
RANK = 3


def adapted(config, shared=None, targets=None):
    """(config, parameters with a random adapter, B not zero)."""
    shared = config.family == "gpt2" if shared is None else shared
    targets = models.matrices(config) if targets is None else targets
    adapter = models.init_adapter(config, jax.random.key(2), RANK, targets, shared)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    config = dataclasses.replace(config, adapter_scale=SCALE)
    return config, {**params_of(plain(config)), "adapter": tree.unflatten(noisy)}


def plain(config):
    """The config as `params_of` knows it."""
    how = {"dtype": "float32", "remat": "none", "unroll": 1, "adapter_scale": 1.0}
    return dataclasses.replace(config, **how)


def a_and_b(adapter, path):
    """A [L, inputs, J] and B [L, J, outputs] of a matrix, in NumPy."""
    group, name = path.split("/")
    part = adapter[group][name]
    a, b = (np.asarray(x, np.float64) for x in (part.get("a", adapter[group].get("a")), part["b"]))
    return a.reshape(len(a), -1, RANK), b.reshape(len(b), RANK, -1)


def kernel_of(params, path):
    group, name = path.split("/")
    return np.asarray(params["layers"][group][name]["kernel"], np.float64)


def merged_by_loops(config, params):
    """W[i, o] + scale sum_j A[i, j] B[j, o] of every matrix, by path."""
    kernels = {}
    for path in models.matrices(config):
        kernel = kernel_of(params, path)
        a, b = a_and_b(params["adapter"], path)
        flat = kernel.reshape(len(kernel), a.shape[1], b.shape[2]).copy()
        for number in range(config.layers):
            for j in range(RANK):
                flat[number] += SCALE * np.outer(a[number, :, j], b[number, j])
        kernels[path] = flat.reshape(kernel.shape)
    return kernels


def with_kernels(params, kernels):
    base = jax.tree.map(lambda x: x, models.split(params)[1])
    for path, kernel in kernels.items():
        group, name = path.split("/")
        base["layers"][group][name]["kernel"] = jnp.asarray(kernel, jnp.float32)
    return base


# ---------------------------------------------------------------------------- equations, init


def test_equations():
    assert layer.low_rank("BTD,DNH->BNTH") == ("BTD,DJ->BTJ", "BTJ,JNH->BNTH")
    assert layer.low_rank("BNTH,NHD->BTD") == ("BNTH,NHJ->BTJ", "BTJ,JD->BTD")
    assert layer.low_rank("BTF,FD->BTD") == ("BTF,FJ->BTJ", "BTJ,JD->BTD")


def test_a_new_adapter():
    """A is uniform within 1 / sqrt(inputs), B is 0; q, k and v share A where asked to."""
    targets = models.matrices(MISTRAL)
    adapter = models.init_adapter(MISTRAL, jax.random.key(0), 8, targets, shared=False)
    assert adapter["attention"]["out"]["a"].shape == (3, 4, 10, 8)
    assert adapter["attention"]["key"]["b"].shape == (3, 8, 2, 10)
    inputs = {"attention/query": 24, "attention/out": 40, "mlp/up": 24, "mlp/down": 40}
    for path, size in inputs.items():
        group, name = path.split("/")
        a, b = adapter[group][name]["a"], adapter[group][name]["b"]
        assert not b.any()
        assert 0.9 * size**-0.5 < np.abs(a).max() <= size**-0.5
        assert abs(np.std(a) - (3 * size) ** -0.5) < 0.1 * size**-0.5
        assert a.dtype == b.dtype == jnp.float32
    first, second = adapter["mlp"]["up"]["a"], adapter["mlp"]["gate"]["a"]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])  # each layer has its own

    shared = models.init_adapter(GPT2, jax.random.key(0), 8, adapters.QKV, shared=True)
    shapes = jax.tree.map(lambda x: x.shape, shared)
    b = {"b": (3, 8, 4, 6)}
    assert shapes == {"attention": {"a": (3, 24, 8), "query": b, "key": b, "value": b}}
    assert models.matrices(GPT2) == (*adapters.QKV, "attention/out", "mlp/up", "mlp/down")


# ---------------------------------------------------------------------------- running a model


@CONFIGS
def test_merged_weights(config):
    config, params = adapted(config)
    want = merged_by_loops(config, params)
    for merged in (
        models.merge(params, config),
        restacked(models.merge(models.unstack(params, config), config)),
    ):
        assert "adapter" not in merged
        for path, kernel in want.items():
            np.testing.assert_allclose(kernel_of(merged, path), kernel, rtol=1e-5, atol=1e-5)
    assert models.merge(merged, config) is merged


def restacked(params):
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
@CONFIGS
def test_apply_is_that_of_the_merged_weights(config, unroll, remat):
    config, params = adapted(dataclasses.replace(config, unroll=unroll, remat=remat))
    merged = with_kernels(params, merged_by_loops(config, params))
    tokens = tokens_of(2, 12)
    _, base = models.split(params)
    apply = jax.jit(models.apply, static_argnums=1)
    want, got = apply(merged, config, tokens), apply(params, config, tokens)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.abs(want - apply(base, config, tokens)).max() > 0.1
    at = jnp.array([[3, 7], [0, 11]])
    some = jax.jit(functools.partial(models.apply, at=at), static_argnums=1)(params, config, tokens)
    np.testing.assert_allclose(
        some, np.take_along_axis(got, np.asarray(at)[..., None], 1), atol=2e-4
    )

    def loss(params, adapter):
        return jnp.sum(jnp.sin(models.apply({**params, **adapter}, config, tokens)))

    # dA = scale dW B', dB = scale A' dW, and a shared A gets the sum of three.
    of_kernels = jax.jit(jax.grad(loss))(merged, {})
    grads = jax.jit(jax.grad(loss, argnums=1))(base, {"adapter": params["adapter"]})["adapter"]
    want_a = {}
    for path in models.matrices(config):
        a, b = a_and_b(params["adapter"], path)
        group, name = path.split("/")
        d_kernel = kernel_of(of_kernels, path).reshape(3, a.shape[1], b.shape[2])
        got_b = grads[group][name]["b"]
        want_b = SCALE * np.einsum("LIJ,LIO->LJO", a, d_kernel)
        assert_near(got_b, want_b)
        holder = f"{path}/a" if "a" in params["adapter"][group][name] else f"{group}/a"
        want_a[holder] = want_a.get(holder, 0) + SCALE * np.einsum("LIO,LJO->LIJ", d_kernel, b)
    for path, want in want_a.items():
        got = functools.reduce(lambda tree, key: tree[key], path.split("/"), grads)
        assert_near(got, want)


def assert_near(got, want):
    got = np.asarray(got, np.float64).reshape(want.shape)
    assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


@pytest.mark.parametrize("targets", [("attention/query", "mlp/down"), ("attention/out",)])
def test_some_matrices_alone(targets):
    config, params = adapted(MISTRAL, targets=targets)
    tokens = tokens_of(2, 12)
    want = models.apply(models.merge(params, config), config, tokens)
    np.testing.assert_allclose(models.apply(params, config, tokens), want, atol=2e-4)
    changed = [p for p in models.matrices(config) if not same_kernel(params, config, p)]
    assert changed == list(targets)


@pytest.mark.parametrize("targets", [None, ("attention/out",)], ids=["all", "one"])
def test_dots_keeps_the_products_of_all_matrices(targets):
    """Its backward pass computes attention's products and x A again, and no x W."""
    config, params = adapted(MISTRAL, targets=targets)
    trained, frozen = models.split(params)

    def products(remat):
        c = dataclasses.replace(config, remat=remat)

        def loss(trained):
            return jnp.sum(models.apply({**frozen, **trained}, c, tokens_of(2, 12)))

        return str(jax.make_jaxpr(jax.grad(loss))(trained)).count("dot_general[")

    again = {remat: products(remat) - products("none") for remat in ("dots", "full")}
    assert again["full"] - again["dots"] >= 6


def same_kernel(params, config, path):
    return np.array_equal(kernel_of(params, path), kernel_of(models.merge(params, config), path))


@CONFIGS
def test_shared_prompts_and_the_cache(config):
    config, params = adapted(config)
    merged = models.merge(params, config)
    prompt, responses = tokens_of(2, 5), tokens_of(2, 6).reshape(2, 2, 3)
    lives = jnp.ones((2, 5), bool), jnp.ones((2, 2, 3), bool)
    run = jax.jit(models.apply_shared, static_argnums=1)
    got, want = (run(x, config, prompt, lives[0], responses, lives[1]) for x in (params, merged))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), got, want)

    tokens = tokens_of(2, 9)
    whole = models.apply(merged, config, tokens)
    extend = jax.jit(models.extend, static_argnums=1)
    for stacked in (True, False):
        weights = params if stacked else models.unstack(params, config)
        cache = models.Cache.create(config, 2, 9, stacked)
        first, cache = extend(weights, config, cache, tokens[:, :8], column=0)
        last, _ = extend(weights, config, cache, tokens[:, 8:], column=8)
        np.testing.assert_allclose(jnp.concatenate([first, last], 1), whole, atol=2e-4)


@CONFIGS
def test_sampling_merges(config):
    config, params = adapted(config)
    settings = {"max_new_tokens": 6, "eos_ids": (2,)}
    prompts, key = [[5, 6, 7], [8, 9]], jax.random.key(0)
    got = sampler.generate(params, config, prompts, key, **settings)
    want = sampler.generate(models.merge(params, config), config, prompts, key, **settings)
    assert np.array_equal(got.tokens_BR, want.tokens_BR)
    assert np.array_equal(got.logp_BR, want.logp_BR)
    _, base = models.split(params)
    assert not np.array_equal(
        got.tokens_BR, sampler.generate(base, config, prompts, key, **settings).tokens_BR
    )


def test_sampling_in_bfloat16_keeps_the_adapter_apart():
    """Merged into bfloat16 weights, a small one would be lost."""
    config, params = adapted(GPT2)
    low, mesh = dataclasses.replace(config, dtype="bfloat16"), sharding.make_mesh(data=4, tensor=2)
    lay_out = jax.jit(sampler.sample.lay_out, static_argnums=(1, 2))
    for where in (None, mesh):
        laid_out = lay_out(params, low, where)
        for name in ("layers", "adapter"):
            want = jax.tree.map(lambda x: x[2].astype(x.dtype), params[name])
            for got, leaf in zip(
                jax.tree.leaves(laid_out[name][2]), jax.tree.leaves(want), strict=True
            ):
                np.testing.assert_array_equal(got, leaf.astype(got.dtype))
        assert laid_out["adapter"][2]["mlp"]["up"]["b"].dtype == jnp.bfloat16
    spec = laid_out["adapter"][2]["mlp"]["up"]["b"].sharding.spec
    assert tuple(spec) == (None, "tensor")

    prompts, key = [[5, 6, 7], [8, 9, 3], [10, 11, 4], [12, 1, 3]], jax.random.key(0)
    rollout = sampler.generate(params, low, prompts, key, max_new_tokens=4, mesh=mesh)
    tokens = jnp.concatenate([jnp.array(prompts), rollout.tokens_BR], 1)
    for p, off in ((params, False), (models.split(params)[1], True)):
        logp = jax.nn.log_softmax(models.logits(p, config, tokens)[:, 2:-1])
        logp_BR = np.take_along_axis(logp, np.asarray(rollout.tokens_BR)[..., None], 2)[..., 0]
        assert (np.abs(logp_BR - rollout.logp_BR).mean() > 0.5) == off


@pytest.mark.parametrize("rank", [0, 4])
@CONFIGS
def test_a_new_adapter_changes_no_bit(config, rank):
    config = dataclasses.replace(config, adapter_scale=2.0)
    base, tokens = params_of(plain(config)), tokens_of(2, 9)
    targets = models.matrices(config)
    adapter = models.init_adapter(config, jax.random.key(0), rank, targets, shared=False)
    apply = jax.jit(models.apply, static_argnums=1)
    assert np.array_equal(
        apply(base, config, tokens), apply({**base, "adapter": adapter}, config, tokens)
    )
    for dtype in ("float32", "bfloat16"):
        base = models.cast(base, dtype)
        merged = models.merge({**base, "adapter": adapter}, config)
        jax.tree.map(np.testing.assert_array_equal, merged, base)


# ---------------------------------------------------------------------------- training


def sft_batch(rows=2, length=10):
    tokens = tokens_of(rows, length)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return {
        "tokens_BT": tokens,
        "segments_BT": jnp.ones_like(tokens),
        "positions_BT": positions,
        "mask_BT": jnp.ones_like(tokens, bool),
    }


def gradients_of(config, params, batch, shard: models.Shard = models.unsharded) -> Any:
    """The compiled gradient of the SFT loss of what `split` says is trained."""
    trained, frozen = models.split(params)

    def loss(trained, frozen, batch):
        return sft.loss_fn({**frozen, **trained}, batch, None, config=config, shard=shard)[0]

    return jax.jit(jax.grad(loss)).lower(trained, frozen, batch).compile()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_no_gradient_of_a_frozen_matrix_is_computed(unroll, remat):
    """The program has no product of a matrix's shape; the one that trains everything has."""
    c, params = adapted(dataclasses.replace(MISTRAL, unroll=unroll, remat=remat))
    _, base = models.split(params)
    # Gradients of mlp/up, mlp/down and the unembedding; no other array has these sizes.
    sizes = {frozenset({c.width, c.mlp_width}), frozenset({c.width, c.padded_vocab_size})}

    def products(params):
        text = gradients_of(c, params, sft_batch()).as_text()
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
        return {frozenset(map(int, shape.split(","))) for shape in shapes} & sizes

    assert products(base) == sizes
    assert products(params) == set()


def test_a_step_of_what_is_trained():
    """Frozen parameters are neither donated nor changed, and microbatches average as ever."""
    config, params = adapted(MISTRAL)
    trained, frozen = models.split(params)
    batch, key = sft_batch(rows=4), jax.random.key(0)
    batch["mask_BT"] = jnp.arange(10)[None] < jnp.array([[10], [3], [5], [9]])
    loss_fn = functools.partial(sft.loss_fn, config=config)
    grads = gradients_of(config, params, batch)(trained, frozen, batch)
    want = jax.tree.map(lambda x, g: x - 0.1 * g, trained, grads)
    for microbatches in (1, 2):
        step = train.make_train_step(loss_fn, optax.sgd(0.1), microbatches)
        after, metrics = step(state.create(trained, optax.sgd(0.1)), batch, key, frozen)
        assert set(after.params) == {"adapter"}
        change = jax.tree.map(lambda x, y: x - y, (after.params, want), (trained, trained))
        jax.tree.map(lambda x, y: assert_near(x, np.asarray(y, np.float64)), *change)
        mean, _ = loss_fn(params, batch, None)
        np.testing.assert_allclose(metrics["loss"], mean, rtol=1e-5)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_split():
    config, params = adapted(GPT2)
    trained, frozen = models.split(params)
    assert set(trained) == {"adapter"}
    assert set(frozen) == {"embed", "layers", "final_norm"}
    assert models.split(frozen) == (frozen, {})
    _, reward = models.with_scalar_head(params, config, jax.random.key(0))
    assert set(models.split(reward)[0]) == {"adapter", "score"}
    assert set(models.split({**params, "value_head": {}})[0]) == {"adapter", "value_head"}


# ---------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("config", [GPT2, GEMMA3], ids=lambda c: c.family)
def test_a_mesh_computes_what_one_device_does(config):
    config, params = adapted(config)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    trained, frozen = models.split(params)
    axes = models.logical_axes(config), {"adapter": models.adapter_axes(trained["adapter"])}
    layouts = [
        sharding.shardings(tree, leaves, mesh)
        for tree, leaves in zip(axes, (frozen, trained), strict=True)
    ]
    laid_out = sharding.put(frozen, layouts[0]) | sharding.put(trained, layouts[1])
    batch = sft_batch(rows=4)
    want = gradients_of(config, params, batch)(trained, frozen, batch)
    on_mesh = jax.device_put(batch, sharding.batched(mesh))
    split = models.split(laid_out)
    got = gradients_of(config, laid_out, on_mesh, sharding.constrainer(mesh))(*split, on_mesh)
    jax.tree.map(lambda x, y: assert_near(x, np.asarray(y, np.float64)), got, want)

    prompts, key = [[5, 6, 7], [8, 9], [10, 11], [12]], jax.random.key(0)
    sampled = [
        sampler.generate(x, config, prompts, key, max_new_tokens=4, eos_ids=(2,), mesh=where)
        for x, where in ((params, None), (laid_out, mesh))
    ]
    assert sampled[0].responses() == sampled[1].responses()


def test_an_adapter_lies_as_its_matrices_do():
    _, params = adapted(MISTRAL)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    adapter = params["adapter"]
    layout = sharding.shardings(models.adapter_axes(adapter), adapter, mesh)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.spec)
        for path, x in jax.tree_util.tree_leaves_with_path(layout)
    }
    assert specs["attention/query/a"] == (None, "fsdp", None)
    assert specs["attention/query/b"] == (None, None, "tensor", None)
    assert specs["attention/key/b"] == (None, None, None, None)  # two heads, replicated as in RULES
    assert specs["attention/out/a"] == (None, "tensor", None, None)
    assert specs["attention/out/b"] == (None, None, "fsdp")
    assert specs["mlp/down/a"] == (None, "tensor", None)
