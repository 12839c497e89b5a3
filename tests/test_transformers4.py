"""Exports in transformers 4.57, which reads other keys of config.json than version 5."""

import json
import os
import subprocess
import venv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import hf, models

torch = pytest.importorskip("torch")

from test_hf import VARIANTS, batch, our_logp, torch_logp, torch_model  # noqa: E402
from test_hf_files import WORDS, word_tokenizer  # noqa: E402

pytestmark = pytest.mark.slow

PROGRAM = """
import json, pathlib, sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert transformers.__version__.startswith("4.57")
root = pathlib.Path(sys.argv[1])
inputs = np.load(root / "inputs.npz")
for path in sorted(root.glob("*/config.json")):
    directory = path.parent
    scores = directory.name.endswith("-score")
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    options = dict(attn_implementation="eager", trust_remote_code=False)
    model, info = auto.from_pretrained(directory, output_loading_info=True, **options)
    assert model.dtype == torch.float32
    assert not any(info.values()), info
    results = {}
    for name, tokens in inputs.items():
        with torch.no_grad():
            results[name] = model.eval()(torch.tensor(tokens)).logits.numpy()
    np.savez(directory / "logits.npz", **results)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = tokenizer("w3 w1 w7")
    ends = tokenizer.eos_token, tokenizer.pad_token, tokenizer.additional_special_tokens
    decoded = tokenizer.decode(encoded["input_ids"], skip_special_tokens=True)
    if not scores:
        settings = transformers.GenerationConfig.from_pretrained(directory)
        assert (settings.bos_token_id, settings.eos_token_id) == (1, 2)
    (directory / "tokens.json").write_text(json.dumps([dict(encoded), *ends, decoded]))
"""


@pytest.fixture(scope="module")
def python4(tmp_path_factory) -> str:
    """A Python with transformers 4.57: of $INSTRUCTJAX_TRANSFORMERS4, or of a new environment."""
    if python := os.environ.get("INSTRUCTJAX_TRANSFORMERS4"):
        return python
    directory = tmp_path_factory.mktemp("transformers4")
    venv.create(directory, with_pip=True)
    python = str(directory / "bin" / "python")
    wanted = ["transformers==4.57.*", f"torch=={torch.__version__.split('+')[0]}"]
    install = [python, "-m", "pip", "install", "--quiet", *wanted]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {done.stderr[-300:]}")
    return python


@pytest.fixture(scope="module")
def exports(python4, tmp_path_factory):
    """Exports of all variants, and what transformers 4.57 computes with them."""
    root = tmp_path_factory.mktemp("exports")
    inputs = {str(length): batch(lengths=(length, length))[0] for length in (12, 40)}
    np.savez(root / "inputs.npz", **inputs)
    tokenizer = word_tokenizer(WORDS, eos_token="<eos>", extra_special_tokens=["w1"])
    for variant in VARIANTS:
        torch_model(variant, "AutoModelForCausalLM").save_pretrained(root / "in" / variant)
        config, params = hf.load(root / "in" / variant)
        hf.save(root / variant, config, params, tokenizer)
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"]["bias"] = jnp.float32(0.0)
    hf.save(root / f"{variant}-score", config, params, tokenizer)
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [python4, "-c", PROGRAM, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities(variant, exports):
    """Below and above the original length of yarn, dynamic and longrope."""
    logits = np.load(exports / variant / "logits.npz")
    model = torch_model(variant, "AutoModelForCausalLM")
    for length in (12, 40):
        tokens, mask = batch(lengths=(length, length))
        got = torch.log_softmax(torch.tensor(logits[str(length)]), -1).numpy()
        assert np.abs(got - torch_logp(model, tokens, mask)).max() < 1e-4
    tokens, mask = batch(lengths=(12, 12))
    got = torch.log_softmax(torch.tensor(logits["12"]), -1).numpy()
    assert np.abs(got - our_logp(exports / variant, tokens, mask)).max() < 2e-4


def test_scores(exports):
    (directory,) = exports.glob("*-score")
    config, params = hf.load(directory)
    tokens = batch(lengths=(12, 12))[0]
    hidden = models.apply(params, config, jnp.array(tokens))
    want = models.scalars(params, config, hidden)[:, -1:]
    np.testing.assert_allclose(np.load(directory / "logits.npz")["12"], want, atol=1e-4)


def test_tokenizer(exports):
    for path in exports.glob("*/tokens.json"):
        encoded, eos, pad, extra, decoded = json.loads(path.read_text())
        assert encoded == {"input_ids": [6, 4, 10], "attention_mask": [1, 1, 1]}
        pad_token = "<|pad|>" if path.parent.name.endswith("-score") else None
        assert (eos, pad, extra, decoded) == ("<eos>", pad_token, ["w1"], "w3 w7")
