"""adapter_config.json and adapter_model.safetensors without peft; test_peft.py compares with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_adapters import RANK, SCALE, adapted
from test_models import GPT2, MISTRAL

from instructjax import hf, models, sharding

MODEL = dataclasses.replace(MISTRAL, windowed=(), window=None)
WEIGHTS = "adapter_model.safetensors"


def saved(config, tmp_path, targets=None, **keys):
    config, params = adapted(config, targets=targets)
    hf.save_adapter(tmp_path, config, params, "some/base")
    if keys:
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(content | keys))
    return config, params


def test_names_and_layout(tmp_path):
    """q, k and v of GPT-2 are thirds of one B; A is [rank, inputs], B [outputs, rank]."""
    _, params = saved(GPT2, tmp_path)
    files, adapter = load_file(tmp_path / WEIGHTS), params["adapter"]
    prefix = "base_model.model.transformer.h.1.attn.c_attn"
    a, b = files[f"{prefix}.lora_A.weight"], files[f"{prefix}.lora_B.weight"]
    np.testing.assert_array_equal(a, adapter["attention"]["a"][1].T)
    for i, name in enumerate(("query", "key", "value")):
        third = np.asarray(adapter["attention"][name]["b"][1]).reshape(RANK, 24).T
        np.testing.assert_array_equal(b[24 * i : 24 * i + 24], third)
    assert len(files) == 3 * 4 * 2
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert content["target_modules"] == modules
    assert (content["r"], content["lora_alpha"]) == (RANK, SCALE * RANK)
    assert content["fan_in_fan_out"]
    assert content["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("targets", [None, ("attention/out", "mlp/up")], ids=["all", "two"])
@pytest.mark.parametrize("config", [GPT2, MODEL], ids=lambda c: c.family)
def test_a_round_trip(config, targets, tmp_path):
    config, params = saved(config, tmp_path, targets)
    plain = dataclasses.replace(config, adapter_scale=1.0)
    assert hf.adapter_base(tmp_path) == "some/base"
    again, trained = hf.load_adapter(tmp_path, plain)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, trained, models.split(params)[0])
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    _, on_mesh = hf.load_adapter(tmp_path, plain, mesh)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, trained)
    assert on_mesh["adapter"]["mlp"]["up"]["b"].sharding.spec[2] == "tensor"


def test_a_merged_export(tmp_path):
    """hf.save merges layer by layer; from a bfloat16 base, to float32."""
    config, params = adapted(GPT2)
    hf.save(tmp_path / "merged", config, params)
    config2, loaded = hf.load(tmp_path / "merged")
    assert config2.adapter_scale == 1.0
    want = models.merge(params, config)
    tables = jax.tree.map(lambda x: np.asarray(x)[:131], (loaded["embed"], want["embed"]))
    np.testing.assert_array_equal(tables[0]["tokens"], tables[1]["tokens"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), loaded["layers"], want["layers"]
    )
    trained, frozen = models.split(params)
    hf.save(tmp_path / "low", config, models.cast(frozen, "bfloat16") | trained)
    _, low = hf.load(tmp_path / "low")
    change = np.asarray(low["layers"]["mlp"]["up"]["kernel"], np.float64) - np.asarray(
        models.cast(frozen, "bfloat16")["layers"]["mlp"]["up"]["kernel"], np.float64
    )
    a, b = (np.asarray(params["adapter"]["mlp"]["up"][x], np.float64) for x in "ab")
    np.testing.assert_allclose(change, SCALE * np.einsum("lij,ljo->lio", a, b), atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not implemented"),
        ({"use_dora": True}, "use_dora = True is not implemented"),
        ({"rank_pattern": {"q": 1}}, "rank_pattern = .* is not implemented"),
        ({"bias": "all"}, "bias = 'all' is not implemented"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not implemented"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .* is not implemented"),
        ({"of_a_later_version": 1}, "of_a_later_version = 1 is not implemented"),
        ({"r": 0}, "r = 0 is no rank"),
        ({"lora_alpha": "2"}, "lora_alpha = '2' is no number"),
        ({"r": 4}, r"lora_A.weight is \[3, 24\], not \[4, 24\]"),
    ],
)
def test_a_wrong_config_is_named(keys, said, tmp_path):
    config, _ = saved(MODEL, tmp_path, **keys)
    with pytest.raises(ValueError, match=said):
        hf.load_adapter(tmp_path, config)


def test_wrong_tensors_are_named(tmp_path):
    config, _ = saved(MODEL, tmp_path)
    files = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
    tensor = files.pop(name)
    save_file(files, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"missing {name}"):
        hf.load_adapter(tmp_path, config)
    save_file({**files, name: tensor, "lm_head.lora_A.weight": tensor}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"unused lm_head.lora_A.weight"):
        hf.load_adapter(tmp_path, config)
    save_file({**files, name: np.full_like(tensor, np.nan)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name} has .* NaN"):
        hf.load_adapter(tmp_path, config)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {WEIGHTS}"):
        hf.load_adapter(tmp_path, config)


def test_no_base_is_named(tmp_path):
    saved(MODEL, tmp_path, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="base_model_name_or_path names no model"):
        hf.adapter_base(tmp_path)
