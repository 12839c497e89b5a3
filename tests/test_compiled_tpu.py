"""Train steps compiled for a slice of TPUs, which takes no TPU; nothing is run.

What the compiler made of them is read from its HLO: the attention kernel, and what it moves.
"""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from instructjax import models, reward, sft, sharding, state, train

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")

# Sizes that no two axes share, whole or on their device: B 8 or 2, heads 8 or 2, layers 5.
B, T, P, K, R = 8, 384, 128, 4, 64
CONFIG = models.ModelConfig(
    1024, layers=5, width=256, heads=8, kv_heads=4, head_dim=64, mlp_width=640, max_length=512,
    norm="rms", positions="rotary", window=100, windowed=(True, False, True, False, True),
    attention_softcap=30.0, dtype="bfloat16",
)  # fmt: skip


def compiled_step(objective, config, shapes):
    """The HLO of objective.loss_fn's train step on 16 chips of v5e, fsdp=4 by tensor=4."""
    # Several processes may compile at once; libtpu takes them all for users of one TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = sharding.make_mesh(fsdp=4, tensor=4, devices=topology.devices)
    tx = train.adam(1e-3)

    def like(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    layout = sharding.shardings(models.logical_axes(config), params, mesh)
    params = jax.tree.map(like, params, layout)
    layout = state.shardings(params, tx)
    step_0 = jax.ShapeDtypeStruct((), jnp.int32)
    start = state.TrainState(step_0, params, jax.eval_shape(tx.init, params))
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batched(mesh))
        for name, (shape, dtype) in shapes.items()
    }
    key = like(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    loss_fn = functools.partial(objective.loss_fn, config=config, shard=sharding.constrainer(mesh))
    step = train.make_train_step(loss_fn, tx, shardings=layout)
    return step.lower(jax.tree.map(like, start, layout), batch, key).compile().as_text()


@pytest.fixture(scope="module")
def uncached():
    """What is compiled for devices that are not there can be cached, but not read back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which settles at its first use whether it is one
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def sft_step(uncached):
    row = ((B, T), "int32")
    shapes = {
        "tokens_BT": row,
        "segments_BT": row,
        "positions_BT": row,
        "mask_BT": ((B, T), "bool"),
    }
    return compiled_step(sft, CONFIG, shapes)


@pytest.fixture(scope="module")
def rm_step(uncached):
    shapes = {
        "prompt_BP": ((B, P), "int32"),
        "prompt_mask_BP": ((B, P), "bool"),
        "responses_BKR": ((B, K, R), "int32"),
        "response_mask_BKR": ((B, K, R), "bool"),
        "ranks_BK": ((B, K), "int32"),
        "mask_BK": ((B, K), "bool"),
        "margin_B": ((B,), "float32"),
    }
    return compiled_step(reward, dataclasses.replace(CONFIG, scalar_head=True), shapes)


def sizes(text):
    return [int(size) for size in text.split(",") if size]


@pytest.mark.parametrize("step", ["sft_step", "rm_step"])
def test_attention_is_the_kernel(step, request):
    """Forward, and the two of the backward pass; no floating-point array has T twice."""
    hlo = request.getfixturevalue(step)
    assert hlo.count('custom_call_target="tpu_custom_call"') == 3
    arrays = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", hlo)
    assert max(sizes(array).count(T) for array in arrays) == 1


@pytest.mark.parametrize("step", ["sft_step", "rm_step"])
def test_only_weights_are_gathered(step, request):
    """Of one layer at a time: no queries, keys or values, nor anything else of tokens."""
    hlo = request.getfixturevalue(step)
    gathered = [sizes(array) for array in re.findall(r"\[([\d,]+)\][^=]* all-gather\(", hlo)]
    assert gathered
    assert not [array for array in gathered if T in array or CONFIG.layers in array]
    assert " all-to-all(" not in hlo
