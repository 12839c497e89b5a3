"""The scripts' programs compiled for a TPU slice, without a TPU; nothing is run.

The tests read the compiled HLO: the attention kernel, collectives, and the arrays that are kept.
"""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import ppo_config
import preflight_programs
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from instructjax import models, preflight, reward, sft, sharding, state, train
from instructjax.data import DataConfig

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")

# No other size, whole or as a shard, equals T or the number of layers: the tests search for them.
B, T, P, K, R = 8, 384, 128, 4, 64
CONFIG = models.ModelConfig(
    1024, layers=5, width=256, heads=8, kv_heads=4, head_dim=64, mlp_width=640, max_length=512,
    norm="rms", positions="rotary", window=100, windowed=(True, False, True, False, True),
    attention_softcap=30.0, dtype="bfloat16",
)  # fmt: skip


def compiled_step(objective, config, shapes, rules=sharding.RULES):
    """The train step of objective.loss_fn on 16 chips of v5e, fsdp=4 by tensor=4: (HLO, bytes of
    the state on a chip, bytes of arguments whose memory is reused)."""
    # Several processes may compile at once; libtpu would think that they share a TPU.
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
    shard = sharding.constrainer(mesh, rules)
    loss_fn = functools.partial(objective.loss_fn, config=config, shard=shard)
    step = train.make_train_step(loss_fn, tx, shardings=layout)
    start = jax.tree.map(like, start, layout)
    compiled = step.lower(start, batch, key).compile()
    donated = compiled.memory_analysis().alias_size_in_bytes
    return compiled.as_text(), preflight.shard_bytes(start), donated


@pytest.fixture(scope="module")
def uncached():
    """jax can write a program for absent devices to its cache, but cannot read it back."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # the cache reads its settings only once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


TEXT = dict.fromkeys(("tokens_BT", "segments_BT", "positions_BT"), ((B, T), "int32"))
TEXT |= {"mask_BT": ((B, T), "bool")}


@pytest.fixture(scope="module")
def sft_step(uncached):
    return compiled_step(sft, CONFIG, TEXT)


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
        "confidence_B": ((B,), "float32"),
    }
    return compiled_step(reward, dataclasses.replace(CONFIG, scalar_head=True), shapes)


def sizes(text):
    return [int(size) for size in text.split(",") if size]


@pytest.mark.parametrize("step", ["sft_step", "rm_step"])
def test_attention_is_the_kernel(step, request):
    """One kernel forward, two in the backward pass; no floating-point array has T twice."""
    hlo, *_ = request.getfixturevalue(step)
    assert hlo.count('custom_call_target="tpu_custom_call"') == 3
    arrays = re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", hlo)
    assert max(sizes(array).count(T) for array in arrays) == 1


@pytest.mark.parametrize("step", ["sft_step", "rm_step"])
def test_only_weights_are_gathered(step, request):
    """Weights are gathered a layer at a time; no queries, keys, values or other activations are."""
    hlo, *_ = request.getfixturevalue(step)
    gathered = [sizes(array) for array in re.findall(r"\[([\d,]+)\][^=]* all-gather\(", hlo)]
    assert gathered
    assert not [array for array in gathered if T in array or CONFIG.layers in array]
    assert " all-to-all(" not in hlo


@pytest.mark.parametrize("step", ["sft_step", "rm_step"])
def test_a_step_reuses_the_states_memory(step, request):
    _, state_bytes, donated = request.getfixturevalue(step)
    assert donated >= 0.95 * state_bytes


def test_a_split_sequence_leaves_a_share_of_each_layers_residuals(uncached):
    """The residuals kept for the backward pass: 2 rows, a fourth of the tokens."""
    config = dataclasses.replace(CONFIG, remat="full")
    hlo, *_ = compiled_step(sft, config, TEXT, sharding.SEQUENCE)
    assert f"[{CONFIG.layers},2,{T // 4},256]" in hlo
    assert f"[{CONFIG.layers},2,{T},256]" not in hlo


# ---------------------------------------------------------------------------- PPO

# The vocabulary is so large that the logits of a shard's tokens exceed the 64 MB of a chunk.
WORDS, CHUNK = 2**18, 2**26
POLICY = dataclasses.replace(
    CONFIG, vocab_size=WORDS, layers=3, windowed=(), window=None, eos_ids=(1,)
)  # fmt: skip
PPO = ppo_config.Config(
    model="policy",
    data=DataConfig("jsonl:prompts", max_prompt=256),
    pretrain=DataConfig("jsonl:text"),
    batch_size=64,
    max_new_tokens=256,
    ppo=ppo_config.PPO(minibatch=16, epochs=1, ema=0.95),
    ptx=ppo_config.PTX(ratio=1, length=384),
    model_dtype="bfloat16",
    remat="dots",
)


GRADIENTS = "policy gradient", "ptx gradient", "value gradient"


@pytest.fixture(scope="module")
def ppo():
    """run_ppo.py's programs, except scoring, on 16 chips: name -> (arguments, Program)."""
    topology = preflight.parse_topology("v5e:4x4")
    mesh = preflight.make_mesh(topology, "fsdp=4,tensor=4")
    names = ("rollout", *GRADIENTS, "policy step", "value step")
    compilables = preflight_programs.ppo_programs(PPO, POLICY, POLICY, mesh)
    programs = [each for each in compilables if each.name in names]
    assert len(programs) == len(names)
    results = zip(programs, preflight.analyse(programs, topology), strict=True)
    return {each.name: (each.args, parts[-1]) for each, parts in results}


def test_prompts_can_be_sampled_a_few_at_a_time():
    mesh = preflight.make_mesh(preflight.parse_topology("v5e:4x4"), "fsdp=4,tensor=4")
    for size, runs in ((None, 1), (16, 4)):
        config = dataclasses.replace(PPO, sample_batch=size)
        rollout = next(preflight_programs.ppo_programs(config, POLICY, POLICY, mesh))
        assert rollout.args[1].tokens_BP.shape == (size or 64, 256)
        assert rollout.runs == runs


def test_decoding_moves_activations_alone(ppo):
    """The loop gathers no weights and sends nothing to the host. What shards send each other at a
    token is smaller than the smallest matrix of a layer."""
    (params, *_), rollout = ppo["rollout"]
    each_token = [each for each in rollout.counts.collectives if each.count >= PPO.max_new_tokens]
    assert len(each_token) >= 2  # attention's and the MLP's
    assert all("/while/" in each.where for each in each_token)
    assert not [each for each in each_token if each.kind == "all-gather"]
    kernels = [leaf.size // POLICY.layers for leaf in jax.tree.leaves(params["layers"])]
    smallest = min(size for size in kernels if size > POLICY.width**2 / 2)
    in_bfloat16_over_tensor = 2 * smallest / 4
    assert max(each.bytes / each.count for each in each_token) < in_bfloat16_over_tensor
    assert rollout.counts.host_bytes == 0


def test_no_program_has_all_logits(ppo):
    """[4 rows, 256, words / 4] in float32 would be 268 MB."""
    for _, program in ppo.values():
        arrays = [(sizes(x.shape.split("[")[1][:-1]), x.bytes) for x in program.counts.largest]
        logits = [bytes for shape, bytes in arrays if {WORDS, WORDS // 4} & set(shape)]
        assert logits
        assert max(logits) <= CHUNK


@pytest.mark.parametrize("name", ["policy gradient", "ptx gradient"])
def test_the_table_moves_once_for_all_chunks(ppo, name):
    """The unembedding is gathered once, and its gradient is summed over the shards once, perhaps
    in two halves, although there are at least four chunks."""
    (params, *_), program = ppo[name]
    share = params["embed"]["tokens"].size // 4  # over tensor
    large = [each for each in program.counts.collectives if each.bytes / each.count > share]
    assert len(large) >= 2
    assert max(each.count for each in large) <= 2


@pytest.mark.parametrize("name", [*GRADIENTS, "policy step", "value step"])
def test_state_and_gradients_are_donated_and_sharded(ppo, name):
    """The first two arguments are donated, and a chip holds a sixteenth of each: sums of gradients
    and metrics in a gradient, the state and the average in a step."""
    (first, second, *_), program = ppo[name]
    donated = preflight.shard_bytes((first, second))
    assert program.counts.aliased_bytes >= 0.95 * donated
    layers = (first["layers"],) if name in GRADIENTS else (first.params["layers"], first.opt_state)
    for tree in (first, second, *layers):
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        if whole > 2**10:  # metrics are scalars, on all chips
            assert preflight.shard_bytes(tree) <= 1.05 * whole / 16
