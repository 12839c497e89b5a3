"""Damaged model directories: each is refused with one message that names the file or the key."""

import json
import os
import re
import shutil
import signal
import struct
import sys
from pathlib import Path

import bad_models
import faults_models
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from instructjax import hf, sharding

WEIGHTS = "model.safetensors"
TABLE = Path(__file__).resolve().parents[1] / "docs" / "reliability-models.md"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    bad_models.write_whole(root)
    return root


@pytest.fixture
def broken(whole, tmp_path) -> Path:
    """A copy of the GPT-2 checkpoint, for a test to damage."""
    shutil.copytree(whole / "gpt2", tmp_path / "broken")
    return tmp_path / "broken"


@pytest.fixture(autouse=True)
def _no_hang():
    """What waits for a pipe fails after a minute."""

    def fail(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)


def refusal(read, directory: Path) -> str | None:
    """The message of a refusal; None if the directory is read. Other exceptions fail the test."""
    try:
        read(directory)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------- all kinds

KINDS = faults_models.kinds()
MENDED = [  # what once was accepted, hung, was a traceback or was refused without a name
    ("sizes that do not fit together", "head_dim"),
    ("sizes that do not fit together", "n_embd"),
    ("reward models", "num_labels"),
    ("reward models", "reward_bias"),
    ("rotary embeddings", "mscale"),
    ("rotary embeddings", "rope_type"),
    ("rotary embeddings", "full_attention"),
    ("generation_config.json: ends", "299"),
    ("tensors of integers", "int8"),
    ("a tokenizer's other parts", "Precompiled"),
    ("templates: reach", "popen"),
    ("templates: do not end", "macro f(n)"),
    ("templates: do not end", "map('string')"),
    ("templates: do not end", "slice"),
    ("templates: do not end", "center(1"),
    ("a FIFO in place", "chat_template.jinja"),
    ("a directory in place", "chat_template.jinja"),
    ("a file of a terabyte", "chat_template.jinja"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_each_kind(whole, kind, tmp_path):
    found = faults_models.outcome(KINDS[kind][0], whole, tmp_path)
    assert found.result in (faults_models.REFUSED, faults_models.HARMLESS), found


@pytest.mark.parametrize(("kind", "variant"), MENDED)
def test_what_was_mended(whole, kind, variant, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.tokenizer, "_SECONDS", 1.0)
    faults = [x for name in KINDS if name.startswith(kind) for x in KINDS[name]]
    faults = [x for x in faults if variant in x.variant]
    assert faults
    for i, fault in enumerate(faults):
        (tmp_path / str(i)).mkdir()
        found = faults_models.outcome(fault, whole, tmp_path / str(i))
        assert found.result == faults_models.REFUSED, (fault, found)


def test_the_table_in_the_docs_is_of_these_kinds():
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| ", TABLE.read_text(), re.M)
    assert {kind: int(count) for kind, count, _, _ in rows} == {k: len(v) for k, v in KINDS.items()}
    assert all(int(count) == int(refused) + int(loaded) for _, count, refused, loaded in rows)


# ---------------------------------------------------------------------------- config.json

WRONG = [0, -1, "x", None, 1.5, [], {}, True, 1e30, float("nan"), 10**12]
# What a model can do without, or what is text for readers.
IGNORED = {"_name_or_path", "transformers_version", "initializer_range", "use_cache"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_wrong_values_are_refused_with_their_key(whole, family, tmp_path):
    raw = json.loads((whole / family / "config.json").read_text())
    refused = {}
    for key in sorted({*raw, *bad_models.SIZES[family]} - IGNORED):
        for value in WRONG:
            (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
            message = refusal(hf.load_config, tmp_path)
            refused[key, str(value)] = message is not None
            named = {key, "rope_parameters"} if key == "rope_scaling" else {key}
            assert message is None or any(name in message for name in named), (key, value, message)
    for key in bad_models.SIZES[family]:
        for value in map(str, WRONG):
            if value != "None":  # a default
                assert refused[key, value], (key, value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05: must not be negative"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': must be a number"),
        ("llama", {"num_key_value_heads": 3}, "4 heads do not share 3 kv_heads"),
        ("gpt2", {"n_layer": 1_000_000}, "n_layer = 1000000: must be from 1 to 10,000"),
        ("gpt2", {"n_embd": 15}, "15"),
        (
            "llama",
            {"tie_word_embeddings": "no"},
            "tie_word_embeddings = 'no': must be true or false",
        ),
        ("gpt2", {"eos_token_id": [2, "x"]}, "eos_token_id"),
        ("llama", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta = 0.0: must be positive"),
        ("gpt2", {"architectures": "GPT2LMHeadModel"}, "architectures"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type"),
        ("gpt2", {"dtype": "x"}, "dtype = 'x'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_values_out_of_range_by_hand(whole, tmp_path, family, changes, message):
    raw = json.loads((whole / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    with pytest.raises(ValueError, match=message):
        hf.load_config(tmp_path)


def test_more_layers_than_weights(broken):
    raw = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**raw, "n_layer": 9_000}))
    with pytest.raises(ValueError, match=r"config\.json has 9,000 layers, and the weights have 28"):
        hf.load(broken)


# ---------------------------------------------------------------------------- JSON of all files

READ = {  # by what reads the file
    "config.json": hf.load_config,
    "generation_config.json": hf.load_config,
    "model.safetensors.index.json": hf.load,
    "tokenizer.json": hf.load_tokenizer,
    "tokenizer_config.json": hf.load_tokenizer,
}


@pytest.mark.parametrize("file", READ)
def test_what_is_no_json_object_is_refused(broken, file):
    (broken / WEIGHTS).unlink() if "index" in file else None
    for kind, text in bad_models.NO_OBJECTS.items():
        (broken / file).write_bytes(text)
        message = refusal(READ[file], broken)
        assert message is not None, kind
        assert f"broken/{file}: " in message, kind
    for kind, make in bad_models.NO_FILES.items():
        bad_models.instead(file, make)(broken)
        message = refusal(READ[file], broken) or ""
        says = "has over 1,073,741,824 bytes" if "terabyte" in kind else "not a regular file"
        assert f"broken/{file}: {says}" in message, kind
        (broken / file).rmdir() if kind == "a directory" else None


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"model": {"type": "X"}}, {"version": 9}], ids=str
)
def test_a_tokenizer_that_is_none_is_refused(broken, content):
    (broken / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"broken/tokenizer\.json: the tokenizer cannot be loaded"):
        hf.load_tokenizer(broken)


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", "{{ messages.nothing() }}"])
def test_a_debugger_goes_on_after_a_template(broken, text):
    def tracer(*_):
        return None

    bad_models.edit("tokenizer_config.json", chat_template=text)(broken)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        hf.load_tokenizer(broken)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("eos", ["x", {}, [None], True, -5, 1.5, 10**12], ids=str)
def test_ends_that_are_no_ids_are_refused(broken, eos):
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = "):
        hf.load_config(broken)


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", 3, None, ["x"]],
    ids=str,
)
def test_an_index_names_files_beside_it_alone(broken, name):
    shutil.copy(broken / WEIGHTS, broken.parent / WEIGHTS)
    (broken / WEIGHTS).unlink()
    index = {"weight_map": {"transformer.wte.weight": name}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: weight_map names .*, not a file beside"):
        hf.load(broken)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x"], ids=str)
def test_an_index_without_files(broken, weight_map):
    (broken / WEIGHTS).unlink()
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map names no files"):
        hf.load(broken)


def test_what_is_no_file_of_weights(broken):
    data = (broken / WEIGHTS).read_bytes()
    for cut in (0, 4, 8, 100, len(data) - 1):
        (broken / WEIGHTS).write_bytes(data[:cut])
        assert "broken/model.safetensors: " in (refusal(hf.load, broken) or ""), cut
    (broken / WEIGHTS).unlink()
    os.mkfifo(broken / WEIGHTS)
    assert "not a regular file" in (refusal(hf.load, broken) or "")
    (broken / WEIGHTS).unlink()
    (broken / WEIGHTS).symlink_to("nowhere")
    assert "a link to nothing" in (refusal(hf.load, broken) or "")


def test_a_header_that_names_a_tensor_twice(broken):
    data = (broken / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].decode().rstrip()
    first = '"transformer.wte.weight":' + json.dumps(json.loads(header)["transformer.wte.weight"])
    header = (header[:-1] + "," + first + "}").encode()
    (broken / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors: .*wte\.weight"):
        hf.load(broken)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("value", "count"), [(np.nan, 1), (np.inf, 3), (-np.inf, 512)], ids=["NaN", "inf", "-inf"]
)
def test_weights_that_are_not_finite(broken, dtype, value, count):
    tensors = {name: x.astype(dtype) for name, x in load_file(broken / WEIGHTS).items()}
    tensors["transformer.h.1.mlp.c_fc.weight"].reshape(-1)[-count:] = value
    save_file(tensors, broken / WEIGHTS)
    message = rf"h\.1\.mlp\.c_fc\.weight has {count} values that are NaN or infinite in float32, of"
    with pytest.raises(ValueError, match=message):
        hf.load(broken)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight has "):
        hf.load(broken, sharding.make_mesh(data=2, fsdp=2, tensor=2))


def test_weights_that_the_dtype_cannot_hold(broken):
    tensors = load_file(broken / WEIGHTS)
    tensors["transformer.wpe.weight"][3, :2] = 1e5, -1e30
    save_file(tensors, broken / WEIGHTS)
    hf.load(broken)
    hf.load(broken, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"wpe\.weight has 2 values .* in float16, of 512"):
        hf.load(broken, dtype="float16")
