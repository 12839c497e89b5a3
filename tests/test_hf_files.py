"""What hf reads and what it refuses: files, shards, dtypes, names, switches, tokenizers."""

import dataclasses
import gzip
import itertools
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from instructjax import hf, models, sharding
from instructjax.hf.families import FAMILIES
from instructjax.models import ModelConfig
from instructjax.run import pretrained

GPT2 = ModelConfig(
    vocab_size=131, layers=2, width=16, heads=4, mlp_width=32, max_length=32, eos_ids=(2,), bos_id=1
)
LLAMA = dataclasses.replace(
    GPT2,
    family="llama",
    kv_heads=2,
    norm="rms",
    positions="rotary",
    gated=True,
    activation="silu",
    tied=False,
)


@pytest.fixture(scope="module")
def params():
    return {c.family: models.init(c, jax.random.key(0)) for c in (GPT2, LLAMA)}


@pytest.fixture
def saved(params, tmp_path):
    """A fresh checkpoint that a test may damage."""
    hf.save(tmp_path / "gpt2", GPT2, params["gpt2"])
    return tmp_path / "gpt2"


def rewrite(path, change):
    """Applies `change` to the dict of a checkpoint's tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def reconfigure(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_equal_but_for_padding(got, want):
    """Leaves are equal; rows of the padded vocabulary, which no file holds, are 0."""
    for name in ("embed", "unembed"):
        for leaf in ("tokens", "kernel"):
            if name in got and leaf in got[name]:
                assert (np.asarray(got[name][leaf], np.float32)[131:] == 0).all()
    cut = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:131], tree)  # noqa: E731
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, cut(got), cut(want))


# ---------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda c: c.family)
def test_several_files(config, params, tmp_path):
    hf.save(tmp_path, config, params[config.family], max_file_size=9000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max((tmp_path / file).stat().st_size for file in files) < 9000 + 2000  # with a header
    loaded_config, loaded = hf.load(tmp_path)
    assert loaded_config == config
    assert_equal_but_for_padding(loaded, params[config.family])
    # A later export into the same directory deletes the old files.
    hf.save(tmp_path, config, params[config.family])
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype, params, tmp_path):
    hf.save(tmp_path, LLAMA, params["llama"], dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(dtype), params["llama"])
    _, loaded = hf.load(tmp_path, dtype=dtype)
    masters = jax.tree.map(lambda x: x.astype("float32"), rounded)
    assert_equal_but_for_padding(loaded, models.cast(masters, dtype))
    assert loaded["final_norm"]["scale"].dtype == jnp.float32
    _, whole = hf.load(tmp_path)
    assert_equal_but_for_padding(whole, masters)
    file = json.loads((tmp_path / "config.json").read_text())
    assert file["dtype"] == dtype


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda c: c.family)
def test_onto_a_mesh_and_back(config, params, tmp_path):
    hf.save(tmp_path / "in", config, params[config.family])
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, sharded = hf.load(tmp_path / "in", mesh)
    _, plain = hf.load(tmp_path / "in")
    shapes = jax.eval_shape(lambda: sharded)
    layout = sharding.shardings(models.logical_axes(config), shapes, mesh)
    jax.tree.map(lambda x, where: x.sharding == where or pytest.fail("layout"), sharded, layout)
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)
    hf.save(tmp_path / "out", config, sharded)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_each_shard_reads_its_own_bytes(params, tmp_path, monkeypatch):
    """Each block that is read has the shape of a device's shard."""
    hf.save(tmp_path, LLAMA, params["llama"])
    seen = []
    make = jax.make_array_from_callback

    def spy(shape, where, read):
        def counted(index):
            block = read(index)
            seen.append((block.shape, where.shard_shape(shape)))
            return block

        return make(shape, where, counted)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    hf.load(tmp_path, sharding.make_mesh(fsdp=2, tensor=4))
    assert len(seen) > 20
    assert all(block == share for block, share in seen)


def test_base_models_and_buffers_and_tied_heads(saved):
    """Names without the prefix, causal-mask buffers and a copy of the tied head are accepted."""
    _, want = hf.load(saved)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.bool_)
        tensors["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"]

    rewrite(saved, change)
    _, got = hf.load(saved)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
        hf.load(saved)


def test_base_models_of_opt(tmp_path):
    """OPT's base model keeps a part of the prefix in its names."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.OPTModel(transformers.OPTConfig(vocab_size=131, **sizes))
    model.save_pretrained(tmp_path)
    _, params = hf.load(tmp_path)
    want = model.decoder.embed_tokens.weight.detach()
    assert torch.equal(torch.tensor(np.asarray(params["embed"]["tokens"])[:131]), want)


def test_the_generation_config(saved):
    import transformers

    written = transformers.GenerationConfig.from_pretrained(saved)
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (1, 2, None)


def test_an_interrupted_save_never_loads_as_a_mixture(params, tmp_path, monkeypatch):
    config, rm = models.with_scalar_head(params["llama"], LLAMA, jax.random.key(1))
    hf.save(tmp_path, LLAMA, params["llama"])
    assert (tmp_path / "generation_config.json").exists()

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:  # while weights are written, the old export is intact
        patch.setattr(hf.checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            hf.save(tmp_path, config, rm)
    assert hf.load(tmp_path)[0] == LLAMA
    with monkeypatch.context() as patch:  # after that, nothing loads
        patch.setattr(hf.checkpoint, "_model_card", full)
        with pytest.raises(OSError, match="No space"):
            hf.save(tmp_path, config, rm)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hf.load(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors.part").write_bytes(b"left behind")
    hf.save(tmp_path, config, rm)
    loaded, _ = hf.load(tmp_path)
    assert (loaded.scalar_head, loaded.eos_ids) == (True, (2,))
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}


def test_a_full_disk_is_an_error_that_names_the_file(params, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # in place of a full disk
    try:
        with pytest.raises(OSError, match=r"model\.safetensors\.part: "):
            hf.save(tmp_path, LLAMA, params["llama"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_hub_models(saved, monkeypatch):
    """Only the files that are needed are fetched; a repository of pickles is refused as such."""
    requests = []

    def fetch(name, allow_patterns, ignore_patterns):
        requests.append((name, allow_patterns, ignore_patterns))
        return str(saved)

    monkeypatch.setattr(hf.directory.huggingface_hub, "snapshot_download", fetch)
    hf.load_config("org/model")
    hf.load("org/model")
    assert not any("safetensors" in pattern for pattern in requests[0][1])
    assert "model*.safetensors" in requests[1][1]
    assert requests[0][2] == ["*/*"]
    (saved / "model.safetensors").unlink()
    monkeypatch.setattr(
        hf.directory.huggingface_hub, "list_repo_files", lambda _: ["pytorch_model.bin"]
    )
    with pytest.raises(ValueError, match=r"org/model has only pytorch_model\.bin"):
        hf.load("org/model")


def test_all_tokens_that_end_a_turn(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    config, _ = hf.load(saved)
    assert config.eos_ids == (2, 7)
    assert hf.load_config(saved) == config


# ---------------------------------------------------------------------------- names and shapes


def test_names_and_shapes_are_checked(saved):
    rewrite(saved, lambda t: t.update({"transformer.h.0.extra": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"unused transformer\.h\.0\.extra"):
        hf.load(saved)
    rewrite(saved, lambda t: (t.pop("transformer.h.0.extra"), t.pop("transformer.ln_f.weight")))
    with pytest.raises(ValueError, match=r"missing transformer\.ln_f\.weight"):
        hf.load(saved)
    rewrite(saved, lambda t: t.update({"transformer.ln_f.weight": np.ones(17, np.float32)}))
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is \[17\], not \[16\]"):
        hf.load(saved)


def test_one_name_in_two_files(params, tmp_path):
    hf.save(tmp_path, GPT2, params["gpt2"], max_file_size=9000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    both = {**load_file(second), **load_file(first)}
    save_file(both, second)
    with pytest.raises(ValueError, match=r"is in two files: .*00001.* and .*00002"):
        hf.load(tmp_path)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00002"):
        hf.load(tmp_path)


def test_damaged_files(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.load(saved)
    (saved / "model.safetensors").write_bytes(whole)
    rewrite(saved, lambda t: t.update({"x": np.zeros(2, np.float64)}))
    with pytest.raises(ValueError, match="x has dtype F64"):
        hf.load(saved)
    (saved / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json: not JSON"):
        hf.load_config(saved)
    reconfigure(saved, n_embd="x")
    with pytest.raises(ValueError, match=r"gpt2/config\.json: [\s\S]*n_embd"):
        hf.load_config(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        hf.load_config(saved)


def test_pickles_are_refused_with_the_way_out(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin[\s\S]*save_pretrained"):
        hf.load(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        hf.load(saved)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory, and the hub"):
        hf.load("nowhere")


# ---------------------------------------------------------------------------- switches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported are gemma, "),
        ({"activation_function": "quick_gelu"}, "activation_function = 'quick_gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_switches_of_gpt2_are_refused_by_name(saved, changes, message):
    reconfigure(saved, **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type = 'proportional'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}},
            "mrope_section",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_act": "relu6"}, "hidden_act = 'relu6'"),
    ],
    ids=["rope", "mrope", "partial", "activation"],
)
def test_switches_of_llama_are_refused_by_name(params, tmp_path, changes, message):
    hf.save(tmp_path, LLAMA, params["llama"])
    reconfigure(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path)


def test_switches_of_other_families_are_refused(tmp_path):
    for family, changes, message in [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 7}, "word_embed_proj_dim = 7"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_type of sliding_attention = 'linear'",
        ),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **changes}))
        with pytest.raises(ValueError, match=message):
            hf.load_config(tmp_path)


def test_remote_code_is_never_run(saved):
    bomb = saved / "modeling_bomb.py"
    bomb.write_text("raise SystemExit('ran')")
    reconfigure(saved, auto_map={"AutoConfig": "modeling_bomb.Bomb"})
    hf.load(saved)
    reconfigure(saved, model_type="bomb")
    with pytest.raises(ValueError, match="model_type 'bomb' is not supported"):
        hf.load(saved)


def test_what_a_family_cannot_express_is_not_exported(params, tmp_path):
    windows = {"windowed": (True, True), "window": 4}
    for config, changes, field in [
        (GPT2, {"qk_norm": True}, "qk_norm"),
        (GPT2, {"final_softcap": 3.0}, "final_softcap"),
        (GPT2, {"kv_heads": 2}, "kv_heads"),
        (GPT2, windows, "window"),
        (LLAMA, windows, "window"),
        (LLAMA, {"local_rope": models.Rope(theta=3.0)}, "local_rope"),
        (LLAMA, {"rope": models.Rope(fraction=0.5)}, "rope"),
        (LLAMA, {"out_bias": False}, "out_bias|qkv_bias"),
    ]:
        changed = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match=rf"of {config.family} cannot hold ({field}) ="):
            hf.configs.to_hf(changed)
    # A leaf without a tensor is an error too.
    extra = {**params["gpt2"], "extra": jnp.zeros(3)}
    with pytest.raises(ValueError, match="gpt2 has no tensor for extra"):
        hf.save(tmp_path, GPT2, extra)


def test_keys_of_other_families_are_ignored_as_transformers_ignores_them(params, tmp_path):
    hf.save(tmp_path, LLAMA, params["llama"])
    reconfigure(tmp_path, sliding_window=4, layer_types=["sliding_attention"] * 2, summary=1)
    assert hf.load_config(tmp_path) == LLAMA


def test_keys_that_change_nothing(params, tmp_path):
    """`pretraining_tp` splits matrix products without changing them; the others affect training."""
    hf.save(tmp_path, LLAMA, params["llama"])
    reconfigure(tmp_path, pretraining_tp=2, attention_dropout=0.1, initializer_range=0.5)
    assert hf.load_config(tmp_path) == LLAMA


# Public config.json files, abridged: old names, keys of other versions, nulls.
PUBLIC = {
    "pythia-160m": (
        {
            "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 768,
            "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
            "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float16",
        },
        {"rope": models.Rope(fraction=0.25), "parallel": True, "tied": False, "pad_id": None},
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "head_dim": 64,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 8192, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "eos_token_id": [128001, 128008, 128009], "pad_token_id": -1,
        },
        {
            "rope": models.Rope(theta=500000.0, kind="llama3", factor=32.0),
            "kv_heads": 8, "tied": True, "eos_ids": (128001, 128008, 128009), "pad_id": None,
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "sliding_window": 4096, "rope_theta": 10000.0,
        },
        {"window": 4096, "windowed": (True,) * 32, "qkv_bias": False},
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "intermediate_size": 4864, "rope_theta": 1000000.0, "tie_word_embeddings": True,
            "sliding_window": 32768, "max_window_layers": 24, "use_sliding_window": False,
            "use_mrope": False,
        },
        {"windowed": (), "qkv_bias": True, "out_bias": False, "rope": models.Rope(theta=1e6)},
    ),
    "gemma-2b": (
        {
            "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "head_dim": 256,
            "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
            "intermediate_size": 16384, "hidden_act": "gelu", "rope_theta": 10000.0,
            "hidden_activation": None, "rope_scaling": None,
        },
        {"activation": "gelu_pytorch_tanh", "norm_offset": True, "kv_heads": 1},
    ),
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
            "head_dim": 256, "num_hidden_layers": 26, "num_attention_heads": 4,
            "num_key_value_heads": 1, "intermediate_size": 6912, "sliding_window": 512,
            "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000,
            "query_pre_attn_scalar": 256, "cache_implementation": "hybrid",
        },
        {
            "window": 512, "rope": models.Rope(theta=1e6), "local_rope": models.Rope(),
            "windowed": tuple((i + 1) % 6 != 0 for i in range(26)), "qk_norm": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_configs_as_the_hub_has_them(name, tmp_path):
    keys, expected = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = hf.load_config(tmp_path)
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.width == keys["hidden_size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_as_it_is_read(family, tmp_path):
    """transformers' defaults are read, written and read again; the named classes exist."""
    transformers = hf.configs.transformers()
    default = transformers.AutoConfig.for_model(family)
    config = hf.configs.from_hf(default, family)
    again = hf.configs.from_hf(hf.configs.to_hf(config), family)
    assert again == config
    assert config.family == family
    for scalar in (False, True):
        written = hf.configs.to_hf(dataclasses.replace(config, scalar_head=scalar))
        assert hasattr(transformers, written.architectures[0])


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        (
            "llama",
            {"rope": models.Rope(5e5, kind="llama3", factor=8.0, original_length=16)},
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("qwen2", {"rope": models.Rope(1e6)}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            "gpt_neox",
            {"rope": models.Rope(3.0, fraction=0.5)},
            {"rotary_emb_base": 3.0, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "gemma3_text",
            {"rope": models.Rope(7.0, kind="linear", factor=2.0), "local_rope": models.Rope(5.0)},
            {
                "rope_theta": 7.0,
                "rope_local_base_freq": 5.0,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
    ],
)
def test_rotary_keys_of_transformers_4(family, changes, keys, tmp_path):
    """config.json has them beside the keys of version 5, and is read back as it was written."""
    default = hf.configs.from_hf(hf.configs.transformers().AutoConfig.for_model(family), family)
    config = dataclasses.replace(default, **changes)
    hf_config = hf.configs.to_hf(config)
    hf_config.dtype = "bfloat16"
    (tmp_path / "config.json").write_text(hf.configs.to_json(hf_config))
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in keys} == keys
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert hf.load_config(tmp_path) == config


# ---------------------------------------------------------------------------- reward models


def test_reward_bias_is_read_back(params, tmp_path):
    config, rm = models.with_scalar_head(params["llama"], LLAMA, jax.random.key(1))
    rm["score"]["bias"] = jnp.float32(-2.5)
    hf.save(tmp_path, config, rm)
    loaded_config, loaded = hf.load(tmp_path)
    assert loaded["score"]["bias"] == -2.5
    assert loaded_config.pad_id == 131
    assert "Add -2.5" in (tmp_path / "README.md").read_text()
    # The new row of the embedding is 0, and the others are unchanged.
    table = np.asarray(loaded["embed"]["tokens"])
    assert (table[131:] == 0).all()
    np.testing.assert_array_equal(table[:131], params["llama"]["embed"]["tokens"][:131])


def test_a_pad_row_beyond_the_padded_table(tmp_path):
    full = dataclasses.replace(LLAMA, vocab_size=128)
    config, rm = models.with_scalar_head(
        models.init(full, jax.random.key(0)), full, jax.random.key(1)
    )
    hf.save(tmp_path, config, rm)
    loaded_config, loaded = hf.load(tmp_path)
    assert (loaded_config.vocab_size, loaded_config.pad_id) == (129, 128)
    assert loaded["embed"]["tokens"].shape == (256, 16)


def test_several_labels_are_refused(params, tmp_path):
    config, rm = models.with_scalar_head(params["llama"], LLAMA, jax.random.key(1))
    hf.save(tmp_path, config, rm)
    reconfigure(tmp_path, id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(ValueError, match="num_labels is 2"):
        hf.load(tmp_path)


# ---------------------------------------------------------------------------- tokenizers


def word_tokenizer(words, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


WORDS = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(128))]


def test_a_tokenizer_without_padding_gets_a_pad_token(params, tmp_path):
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>", pad_token="<eos>")
    config, rm = models.with_scalar_head(params["llama"], LLAMA, jax.random.key(1))
    hf.save(tmp_path, config, rm, tokenizer)
    loaded = hf.load_tokenizer(tmp_path)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|pad|>", 131)
    assert hf.load_config(tmp_path).pad_id == 131
    assert tokenizer.pad_token == "<eos>"  # the caller's tokenizer is unchanged
    assert loaded("w3 w7")["input_ids"] == tokenizer("w3 w7")["input_ids"] == [6, 10]


def test_tokenizers_as_transformers_4_reads_them(params, tmp_path):
    """Its classes of single families add BOS, and it knows no list `extra_special_tokens`."""
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>", extra_special_tokens=["w1", "w2"])
    hf.save(tmp_path, GPT2, params["gpt2"], tokenizer)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert written["additional_special_tokens"] == ["w1", "w2"]
    assert "extra_special_tokens" not in written
    loaded = hf.load_tokenizer(tmp_path)
    assert loaded.extra_special_tokens == ["w1", "w2"]
    assert loaded.decode([3, 4, 6], skip_special_tokens=True) == "w0 w3"


def test_a_tokenizer_larger_than_the_model_is_refused(params, tmp_path):
    larger = word_tokenizer([*WORDS, "more"])
    with pytest.raises(ValueError, match="the tokenizer has 132 tokens, the model 131"):
        hf.save(tmp_path / "out", GPT2, params["gpt2"], larger)
    hf.save(tmp_path / "gpt2", GPT2, params["gpt2"])
    larger.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match=r"--model .*gpt2: the tokenizer has 132 .*--tokenizer the"
    ):
        load_with(tmp_path / "gpt2", tokenizer=str(tmp_path / "tokenizer"))


def load_with(path, **options):
    return pretrained.load(str(path), sharding.make_mesh(data=1, fsdp=2, tensor=4), **options)


CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("tokens", "template", "explicit", "grows"),
    [
        ({"extra_special_tokens": ["<image>"]}, None, False, False),
        ({"extra_special_tokens": ["<image>"]}, CHAT, False, False),
        ({"extra_special_tokens": ["<image>", "<|user|>"]}, CHAT, False, True),
        ({"pad_token": "<pad>"}, None, False, True),
        ({"extra_special_tokens": ["<image>"]}, None, True, True),
    ],
    ids=["unused", "not-in-template", "template", "pad", "explicit"],
)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda c: c.family)
def test_tokens_added_to_a_model(
    config, tokens, template, explicit, grows, params, tmp_path, capsys
):
    """Rows are added for tokens that the tokenizer uses, or that are given with --tokenizer."""
    hf.save(tmp_path / "in", config, params[config.family])
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>")
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = template
    where = tmp_path / ("tokenizer" if explicit else "in")
    tokenizer.save_pretrained(where)
    options = {"tokenizer": str(where)} if explicit else {}
    loaded_config, loaded, loaded_tokenizer = load_with(tmp_path / "in", **options)
    size = len(tokenizer) if grows else 131
    said = f"vocabulary grows to {size} tokens by" if grows else "the model has no <image>, which"
    assert said in capsys.readouterr().out
    assert loaded_config == dataclasses.replace(config, vocab_size=size)
    before = params[config.family]
    for part, name in (("embed", "tokens"), ("unembed", "kernel")):
        if part in before:
            old = np.asarray(before[part][name])[:131]
            new = np.asarray(loaded[part][name])
            np.testing.assert_array_equal(new[:131], old)
            mean = np.tile(old.mean(0), (size - 131, 1))
            np.testing.assert_allclose(new[131:size], mean, atol=1e-7)
            assert (new[size:] == 0).all()
    logits = models.logits(loaded, loaded_config, jnp.array([[3, size - 1]]))
    assert logits.shape == (1, 2, size)
    assert np.isfinite(logits).all()

    hf.save(tmp_path / "out", loaded_config, loaded, loaded_tokenizer)
    again_config, again, _ = load_with(tmp_path / "out")
    assert again_config == loaded_config
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    got = exported(torch.tensor([[3, size - 1]])).logits.detach().numpy()
    np.testing.assert_allclose(got, logits, atol=1e-4)


def test_an_end_that_was_added_to_a_model(params, tmp_path):
    hf.save(tmp_path, GPT2, params["gpt2"])
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>")
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(tmp_path)
    end = tokenizer.eos_token_id
    assert end >= GPT2.vocab_size
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": end}))
    config, _, _ = load_with(tmp_path)
    assert config.vocab_size == end + 1
    assert end in config.eos_ids
    said = r"eos_token_id 9000 of config\.json or generation_config\.json: the model has 132 tokens"
    settings.write_text(json.dumps({"eos_token_id": [end, 9000]}))
    with pytest.raises(ValueError, match=said):
        load_with(tmp_path)

    smaller = word_tokenizer(WORDS[:50], eos_token="<eos>")
    smaller.save_pretrained(tmp_path)
    settings.write_text(json.dumps({"eos_token_id": 130}))
    with pytest.raises(ValueError, match=r"eos_token_id 130 .*: the tokenizer has no such token"):
        load_with(tmp_path)


def test_rows_beyond_the_padded_table(tmp_path):
    """A table of 128 rows without padding grows by a tile, on every device of a mesh."""
    config = dataclasses.replace(LLAMA, vocab_size=128)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    hf.save(tmp_path, config, models.init(config, jax.random.key(0)))
    config, params = hf.load(tmp_path, mesh)
    grown_config, grown = hf.grow(config, params, 130, mesh)
    layout = sharding.shardings(models.logical_axes(grown_config), grown, mesh)
    jax.tree.map(lambda x, where: x.sharding == where or pytest.fail("layout"), grown, layout)
    assert grown["embed"]["tokens"].shape == (256, 16)
    mean = np.asarray(params["unembed"]["kernel"]).mean(0)
    np.testing.assert_allclose(grown["unembed"]["kernel"][128:130], [mean] * 2, atol=1e-7)
    assert (np.asarray(grown["unembed"]["kernel"])[130:] == 0).all()


def test_tokens_that_the_model_lacks_are_not_exported(params, tmp_path):
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>", pad_token="<pad>")
    with pytest.raises(ValueError, match="has 131 tokens and none of <pad>; save the tokenizer"):
        hf.save(tmp_path, GPT2, params["gpt2"], tokenizer)


def test_the_vocabulary_of_gpt2(shared_data, tmp_path):
    """A page of text gets the ids of the plain BPE algorithm, and survives a round trip."""
    from transformers import GPT2Tokenizer

    source = shared_data / "gpt2_bpe"
    encoder = json.loads(gzip.decompress((source / "encoder.json.gz").read_bytes()))
    merges = gzip.decompress((source / "vocab.bpe.gz").read_bytes()).decode()
    (tmp_path / "vocab.json").write_text(json.dumps(encoder))
    (tmp_path / "merges.txt").write_text(merges)
    gpt2 = GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer = hf.load_tokenizer(tmp_path / "gpt2")
    novel = next((shared_data / "novels_public_domain").glob("*.txt.gz"))
    page = gzip.decompress(novel.read_bytes()).decode("utf-8")[5000:8000]
    ids = tokenizer(page)["input_ids"]
    assert len(tokenizer) == 50257
    assert ids == plain_bpe(page, encoder, merges)
    assert tokenizer.decode(ids) == page
    # The ids of OpenAI's own encoder.
    assert tokenizer("Hello, world!")["input_ids"] == [15496, 11, 995, 0]


def plain_bpe(text, encoder, merges):
    """GPT-2's encoder (openai/gpt-2 `encoder.py`): the lowest-ranked merge comes first."""
    import regex

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in kept}
    symbols |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in symbols)}
    ranks = {tuple(line.split()): i for i, line in enumerate(merges.splitlines()[1:])}
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for word in regex.findall(words, text):
        parts = [symbols[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, 10**9))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids += [encoder[part] for part in parts]
    return ids


# ---------------------------------------------------------------------------- the package


def test_a_wheel_has_every_file(tmp_path):
    """The families' table is included although it is not Python."""
    pytest.importorskip("setuptools", minversion="77")
    root = Path(__file__).resolve().parents[1]
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(root / "instructjax", tmp_path / "instructjax", ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = (file for file in (tmp_path / "instructjax").rglob("*") if file.is_file())
    wanted = {str(file.relative_to(tmp_path)) for file in files}
    assert "instructjax/hf/families.toml" in wanted
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_no_torch_no_tensorflow_no_noise(saved):
    """A process without torch loads, saves and prints nothing."""
    program = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torch", "tensorflow", "datasets")
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
import instructjax
assert not any(m in sys.modules for m in ("transformers", "flax", "optax", "jax"))
config, params = instructjax.hf.load(sys.argv[1])
instructjax.hf.save(sys.argv[1] + "-again", config, params)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
