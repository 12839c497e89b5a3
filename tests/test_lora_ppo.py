"""run_ppo.py with LoRA: one frozen base, adapters for all that is trained, and exact resume."""

import dataclasses
import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_ppo
import stopped
from safetensors.numpy import load_file, save_file
from test_run_ppo import FEW, SMALL, metrics_of

from instructjax import hf, miniature, models, scoring, sharding
from instructjax.data import sources
from instructjax.hf import tensors
from instructjax.models import ModelConfig
from instructjax.run import lora, resume
from instructjax.run.lora import LoRA
from instructjax.scoring import RewardConfig, load

LORA = LoRA(rank=3, alpha=6.0)
FLAGS = ["--lora.rank", "3", "--lora.alpha", "6", "--ppo.learning_rate", "0.003"]
FLAGS += ["--ppo.value_learning_rate", "0.003"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base; sft and rm, runs with adapters on it; rm-own, a reward model of its own weights."""
    out, tokenizer = tmp_path_factory.mktemp("models"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 2, 16, heads=2, mlp_width=32, max_length=96, **ids)
    base = models.init(config, jax.random.key(0))
    hf.save(out / "base", config, base, tokenizer)
    reward_config, reward = models.with_scalar_head(base, config, jax.random.key(1))
    reward["score"] = {"kernel": 10 * reward["score"]["kernel"], "bias": jnp.float32(0.375)}
    other = jax.tree.map(lambda x: x + 0.02, reward["layers"])
    hf.save(out / "rm-own", reward_config, {**reward, "layers": other}, tokenizer)
    for i, (name, model, params) in enumerate(
        (("sft", config, base), ("rm", reward_config, reward))
    ):
        model = dataclasses.replace(model, adapter_scale=LORA.scale)
        adapter = models.init_adapter(
            model, jax.random.key(i), LORA.rank, models.matrices(model), shared=True
        )
        whole = {**params, "adapter": jax.tree.map(lambda x: x + 0.03, adapter)}
        hf.save(out / name / "export", model, whole, tokenizer)
        how = {"fingerprint": hf.fingerprint(out / "base")}
        hf.save_adapter(out / name / "adapter", model, whole, str(out / "base"), tokenizer, **how)
    return out


def flags(world, model="sft", reward="rm", *more):
    return ["--model", f"{world}/{model}", "--reward", f"{world}/{reward}", *FEW, *FLAGS, *more]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Three iterations, uninterrupted, with an average."""
    out = tmp_path_factory.mktemp("ppo") / "whole"
    run_ppo.cli([*flags(world), "--out", str(out), "--steps", "3", "--save_every", "1"])
    return out


def parts_of(world, reward="rm", **changes) -> Any:
    """(config, base, reward models, value net) as run_ppo.py makes them."""
    config = dataclasses.replace(
        run_ppo.PRESETS["miniature"],
        **{"reward": RewardConfig((f"{world}/{reward}",)), "lora": LORA},
        **{"model": f"{world}/sft", **changes},
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, params, tokenizer, origin = run_ppo.load_policy(config, mesh)
    base = lora.shared_base(origin, model, params)
    assert base is not None
    rewards = load(config.reward, mesh, tokenizer, config.model_dtype, config.offload, base=base)
    policy, _, value = run_ppo.load_value_net(config, mesh, model, params, tokenizer, base)
    assert value is not None
    return config, policy, base, rewards, value


def test_one_base_is_in_memory(world):
    """Policy, reward model, value net: the same arrays, not copies; in the compute dtype."""
    for offload in (False, True):
        _, policy, base, rewards, value = parts_of(world, model_dtype="bfloat16", offload=offload)
        ((run, own),) = rewards.models
        shared = run.args[1]
        assert set(own.tree) == {"adapter", "score"}
        for tree in (policy, shared, value):
            for name in ("embed", "layers", "final_norm"):
                pairs = zip(
                    jax.tree.leaves(tree[name]), jax.tree.leaves(base.params[name]), strict=True
                )
                assert all(mine is its for mine, its in pairs)
        assert base.params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
        assert base.params["final_norm"]["scale"].dtype == jnp.float32
        assert policy["adapter"]["mlp"]["up"]["a"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, value["adapter"], own.on_device()["adapter"])


def test_frozen_weights_are_read_in_the_compute_dtype(world, monkeypatch):
    """So that a device never holds a frozen model in float32: neither the base nor a reward model.
    An adapter that is merged is added in float32, and the sum rounded once.
    """
    read, reader = [], tensors.reader

    def recorded(leaf, shape, dtype, *rest):
        read.append((leaf, np.dtype(dtype)))
        return reader(leaf, shape, dtype, *rest)

    monkeypatch.setattr(tensors, "reader", recorded)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    _, _, tokenizer, _ = lora.load(LORA, f"{world}/sft", mesh, "bfloat16", 0)
    scoring.load_model(f"{world}/rm-own", mesh, tokenizer, "bfloat16", "--reward")
    kinds = {dtype for leaf, dtype in read if not models.stays_float32(leaf)}
    assert kinds == {jnp.dtype("bfloat16")}
    read.clear()
    _, merged = scoring.load_model(f"{world}/rm/adapter", mesh, tokenizer, "bfloat16", "--reward")
    assert {dtype for _, dtype in read} == {np.dtype("float32")}
    assert merged["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert merged["score"]["kernel"].dtype == jnp.float32


def test_a_reward_model_of_other_weights_has_its_own(world):
    """The value net is an adapter on the reward model's weights, and begins as its copy."""
    _, _, base, rewards, value = parts_of(world, "rm-own")
    assert models.split(value)[0].keys() == {"adapter", "score"}
    mine, its = (x["layers"]["mlp"]["up"]["kernel"] for x in (value, base.params))
    assert mine is not its
    assert not value["adapter"]["mlp"]["up"]["b"].any()
    np.testing.assert_allclose(value["score"]["bias"], 0.0, atol=0)  # folded into the last norm
    ((_, own),) = rewards.models
    assert "adapter" not in own.tree
    jax.tree.map(np.testing.assert_array_equal, value["layers"], own.tree["layers"])


def test_each_member_of_an_ensemble_is_found(world, tmp_path):
    """By its adapter on the policy's base, or by its own weights."""
    for kind, name in (("rm", "shared"), ("rm-own", "own")):
        export = "export" if kind == "rm" else ""
        for member in ("", "-1"):
            shutil.copytree(world / kind / export, tmp_path / name / f"export{member}")
            if kind == "rm":
                shutil.copytree(world / kind / "adapter", tmp_path / name / f"adapter{member}")
        if kind == "rm":
            file = tmp_path / name / "adapter-1" / "adapter_model.safetensors"
            save_file({key: 2 * x for key, x in load_file(file).items()}, file)
        _, _, base, rewards, _ = parts_of(tmp_path, name, model=f"{world}/sft")
        assert len(rewards.models) == 2
        if kind == "rm":
            first, second = (own.tree["adapter"] for _, own in rewards.models)
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), first, second)
        for run, own in rewards.models:
            kernel = {**run.args[1], **own.tree}["layers"]["mlp"]["up"]["kernel"]
            its = base.params["layers"]["mlp"]["up"]["kernel"]
            assert (kernel is its) == (name == "shared")


def test_a_reward_model_on_another_base_has_its_own_weights(world, tmp_path):
    """With an export beside its adapter, or of peft's files alone."""
    config, base = hf.load(world / "base")
    other = jax.tree.map(lambda x: x + 0.01, base)
    hf.save(tmp_path / "base", config, other)
    shutil.copytree(world / "rm" / "adapter", tmp_path / "rm")
    (tmp_path / "rm" / "adapter_base.json").unlink()
    settings = tmp_path / "rm" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(f"{world}/base", f"{tmp_path}/base"))
    _, _, shared, rewards, value = parts_of(tmp_path, "rm", model=f"{world}/sft")
    ((_, own),) = rewards.models
    config, trained = hf.load_adapter(tmp_path / "rm", config)
    want = models.merge({**other, **trained}, config)["layers"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), own.tree["layers"], want)
    assert not np.allclose(own.tree["layers"]["mlp"]["up"]["kernel"], layer_of(shared.params))
    assert not value["adapter"]["mlp"]["up"]["b"].any()  # a new one


def layer_of(params):
    return params["layers"]["mlp"]["up"]["kernel"]


def test_a_base_that_has_changed_is_refused(world, tmp_path):
    """By the adapter that is trained on, and by those that share its base."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shutil.copytree(world / "sft", tmp_path / "sft")
    config, base = hf.load(world / "base")
    hf.save(
        tmp_path / "base", config, jax.tree.map(lambda x: x + 0.01, base), miniature.tokenizer()
    )
    settings = tmp_path / "sft" / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(f"{world}/base", f"{tmp_path}/base"))
    said = r"--model .*trained on weights with the fingerprint \w+, and its base .* now has \w+"
    with pytest.raises(ValueError, match=said):
        lora.load(LORA, f"{tmp_path}/sft", mesh, "float32", 0)
    (tmp_path / "sft" / "adapter" / "adapter_base.json").unlink()
    lora.load(LORA, f"{tmp_path}/sft", mesh, "float32", 0)

    shutil.copytree(world / "rm", tmp_path / "rm")
    record = tmp_path / "rm" / "adapter" / "adapter_base.json"
    record.write_text('{"fingerprint": "0123"}')
    _, _, shared, rewards, value = parts_of(tmp_path, "rm", model=f"{world}/sft")
    ((_, own),) = rewards.models  # its export is whole
    _, want = hf.load(world / "rm" / "export")
    np.testing.assert_array_equal(layer_of(own.tree), layer_of(want))
    assert layer_of(value) is not layer_of(shared.params)
    shutil.rmtree(tmp_path / "rm" / "export")
    with pytest.raises(ValueError, match=r"^--reward .*fingerprint 0123, and its base"):
        parts_of(tmp_path, "rm", model=f"{world}/sft")


def test_where_adapters_come_from(world, monkeypatch):
    """Relative names are written in full; a start with adapters is told from one without."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.chdir(world)
    fingerprint = hf.fingerprint(world / "base")
    for model, adapter in (("./base", None), ("./sft", f"{world}/sft/adapter")):
        config, params, _, origin = lora.load(LORA, model, mesh, "float32", 0)
        assert origin == (str(world / "base"), fingerprint, adapter)
        start = run_ppo.start_of(origin, params)
        assert set(start) == ({"adapter"} if adapter else set())
        assert config.adapter_scale == LORA.scale
        frozen = lora.frozen_weights(origin)
        assert frozen.keys() == {"--model", *(["--model's adapter"] if adapter else [])}
        for flag in frozen:  # the reference has the adapter, which another SFT would change
            with pytest.raises(ValueError, match=f"{flag} now gives {world}.* other weights"):
                resume.check_frozen(world, 1, {flag: ["x", "0"]}, frozen)
    assert lora.load(LoRA(), "./base", mesh, "float32", 0)[3] is None


def test_checkpoints_hold_adapters_alone(world, whole):
    kept = (whole / "checkpoints" / "3" / "state" / "_METADATA").read_text()
    assert "adapter" in kept
    assert "ema" in kept
    assert not any(f"'{name}'" in kept for name in ("layers", "embed", "final_norm"))
    frozen = json.loads((whole / "checkpoints" / "3" / "meta" / "metadata").read_text())["frozen"]
    its = {"--model": world / "base", "--model's adapter": world / "sft" / "adapter"}
    assert frozen == {flag: [str(path), hf.fingerprint(path)] for flag, path in its.items()}


def test_the_first_iteration_begins_at_the_reference(whole):
    first, last = metrics_of(whole)[1], metrics_of(whole)[3]
    assert abs(first["objective/kl"]) < 5e-5 * 6
    assert first["rollout/logp_mismatch"] < 5e-5
    assert last["objective/kl_k3"] > 1e-7


def test_the_export_is_the_base_with_the_trained_adapter(world, whole):
    config, base = hf.load(world / "base")
    config, trained = hf.load_adapter(whole / "adapter", config)
    assert hf.adapter_base(whole / "adapter") == f"{world}/base"
    _, merged = hf.load(whole / "export")
    want = models.merge({**base, **trained}, config)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    _, before = hf.load_adapter(world / "sft" / "adapter", hf.load_config(world / "base"))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), trained, before)
    assert min(jax.tree.leaves(moved)) > 0


def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(world, whole, tmp_path):
    argv = [*flags(world), "--out", str(tmp_path / "ppo"), "--steps", "3", "--save_every", "1"]
    with stopped.before_step(2):
        run_ppo.cli(argv)
    run_ppo.cli([*argv, "--resume"])
    assert metrics_of(tmp_path / "ppo") == metrics_of(whole)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "ppo" / name).read_bytes() == (whole / name).read_bytes()


def test_one_device_and_offload_compute_the_same(world, whole, tmp_path):
    argv = [*flags(world), "--steps", "1", "--out", str(tmp_path / "ppo"), "--offload"]
    run_ppo.cli([*argv, "--mesh", "tensor=2,data=2,fsdp=2"])
    got, want = metrics_of(tmp_path / "ppo")[1], metrics_of(whole)[1]
    for name in ("objective/score", "value/loss", "ptx/loss", "optim/grad_norm", "policy/loss"):
        assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("reward", "more"),
    [
        ("rm", ("--model_dtype", "bfloat16", "--remat", "dots")),
        ("rm", ("--ppo.value", "shared")),
        ("rm-own", ("--ppo.beta", "0")),
    ],
    ids=["bfloat16", "value_head", "other_reward_model_and_no_reference"],
)
def test_other_ways_to_run(world, reward, more, tmp_path, capsys):
    out, own = tmp_path / "ppo", reward == "rm-own"
    steps = "2" if own else "1"
    run_ppo.cli([*flags(world, "sft", reward, *more), "--steps", steps, "--out", str(out)])
    assert (out / "adapter" / "adapter_config.json").exists()
    said = capsys.readouterr().out
    assert f"wrote {out}/adapter\n" in said
    # Of this policy of random weights; test_run_ppo.py has when it is said.
    assert "warning: 100% of SFT's responses are cut" in " ".join(said.split())
    rows = metrics_of(out)
    assert rows[1]["optim/grad_norm"] > 0
    meta = json.loads((out / "checkpoints" / steps / "meta" / "metadata").read_text())
    assert ("--reward" in meta["frozen"]) == own
    if own:  # the value net's adapter, on the reward model's weights, learns
        assert rows[1]["optim/value_grad_norm"] > 0
        assert rows[2]["value/loss"] != rows[1]["value/loss"]
        assert rows[1]["value/clip_fraction"] == 0  # the rollout's values are of these weights too
        name, fingerprint = meta["frozen"]["--reward"]
        assert (name, fingerprint) == (f"{world}/rm-own", hf.fingerprint(world / "rm-own"))


def test_new_adapters_and_rewards_that_are_functions(world, tmp_path):
    """The reference is the base with no adapter, and the value net has the policy's base."""
    (tmp_path / "long.py").write_text(
        "def long(prompts, responses, records):\n    return [float(len(x)) for x in responses]\n"
    )
    argv = ["--model", f"{world}/base", "--reward", f"{tmp_path}/long.py:long", *FEW, *FLAGS]
    run_ppo.cli([*argv, "--steps", "2", "--out", str(tmp_path / "ppo")])
    rows = metrics_of(tmp_path / "ppo")
    assert abs(rows[1]["objective/kl"]) < 5e-5 * 6
    assert rows[2]["objective/kl_k3"] > 0
    config = json.loads((tmp_path / "ppo" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{world}/base"
    hf.check_base(tmp_path / "ppo" / "adapter", f"{world}/base")
    assert "score" not in json.dumps(config["modules_to_save"])


def test_an_update_computes_no_gradient_of_a_frozen_matrix(world):
    """The gradients of policy, text and value net; that of all weights has such products."""
    config, policy, _, _, value = parts_of(world)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model, *_ = run_ppo.load_policy(config, mesh)
    value_model = dataclasses.replace(model, scalar_head=True)
    batch = {
        "prompt_BP": jnp.ones((3, 5), jnp.int32),
        "prompt_mask_BP": jnp.ones((3, 5), bool),
        "tokens_BR": jnp.ones((3, 4), jnp.int32),
        "mask_BR": jnp.ones((3, 4), bool),
        **{f"{name}_BR": jnp.ones((3, 4)) for name in ("logp", "value", "advantage", "return")},
    }
    names = ("tokens_BT", "segments_BT", "positions_BT", "mask_BT")
    text = dict.fromkeys(names, jnp.ones((3, 7), jnp.int32))

    def products(policy: Any, value: Any):
        (policy, frozen), (value, value_frozen) = models.split(policy), models.split(value)
        programs: Any = run_ppo.Programs(
            config, model, value_model, policy, value, mesh, (5,), frozen, value_frozen
        )
        for gradient, params, rows in (
            (programs.policy_gradient, policy, batch),
            (programs.ptx_gradient, policy, text),
            (programs.value_gradient, value, batch),
        ):
            arguments = None, None, params, rows, 1.0, 8, gradient.frozen
            compiled = gradient.add.lower(*arguments).compile().as_text()
            shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled)
            yield {frozenset(map(int, shape.split(","))) for shape in shapes}

    full, head = frozenset({16, 32}), frozenset({16, model.padded_vocab_size})
    for found in products(policy, value):
        assert not found & {full, head}
    plain = [{k: v for k, v in x.items() if k != "adapter"} for x in (policy, value)]
    found = list(products(*plain))
    assert all(full in shapes for shapes in found)
    assert head in found[0]
