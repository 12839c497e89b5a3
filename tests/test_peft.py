"""Every family's adapters agree with peft on torch: forward, gradients, files in and out."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_hf import VARIANTS, batch, torch_logp, torch_model

from instructjax import hf, models
from instructjax.hf import tensors

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of peft and torch

RANK, ALPHA = 3, 5


def peft_model(variant, tmp_path, auto="AutoModelForCausalLM", **lora):
    """A peft model with random A and B on every matrix; its base is in tmp_path / "base"."""
    base = torch_model(variant, auto)
    base.save_pretrained(tmp_path / "base")
    task = {"AutoModelForCausalLM": "CAUSAL_LM"}.get(auto, "SEQ_CLS")
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": task}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, **lora})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    model.save_pretrained(tmp_path / "peft")
    return model


def ours(tmp_path, adapter="peft"):
    config, base = hf.load(tmp_path / "base")
    config, trained = hf.load_adapter(tmp_path / adapter, config)
    return config, base, trained


def our_logp(config, params, tokens, mask):
    logits = models.logits(params, config, jnp.array(tokens), jnp.array(mask))
    return jax.nn.log_softmax(logits)


def with_base(tmp_path, adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    return peft.PeftModel.from_pretrained(base, tmp_path / adapter).eval()


def state(model):
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_gradients_and_files(variant, tmp_path):
    model = peft_model(variant, tmp_path)
    tokens, mask = batch()
    want = torch_logp(model, tokens, mask)
    config, base, trained = ours(tmp_path)
    assert config.adapter_scale == ALPHA / RANK

    # Forward. The adapter matters, so that agreement means something.
    got = jax.jit(lambda params: our_logp(config, params, tokens, mask))
    assert np.abs(got({**base, **trained}) - want)[mask].max() < 3e-4
    assert np.abs(got(base) - want)[mask].max() > 0.3

    # Gradients of A and B of every matrix, by peft's names.
    weights = np.random.default_rng(1).normal(size=want.shape).astype(np.float32) * mask[..., None]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weights * got({**base, **x}))))(trained)
    leaves = tensors.flatten(gradient)
    entries = tensors.adapter_entries(config, set(leaves), RANK)
    grads = dict(tensors.file_tensors(entries, leaves, config, np.float32))
    for name, of_torch in torch_gradients(model, tokens, mask, weights).items():
        error = np.linalg.norm(grads.pop(name) - of_torch)
        assert error < 1e-3 * np.linalg.norm(of_torch), name
    assert not grads

    # The files, out and back in: the same tensors here and in peft.
    hf.save_adapter(tmp_path / "out", config, {**base, **trained}, str(tmp_path / "base"))
    again, mine = with_base(tmp_path, "out"), state(model)
    assert set(state(again)) == set(mine)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in state(again).items())
    np.testing.assert_array_equal(torch_logp(again, tokens, mask), want)
    config2, _, trained2 = ours(tmp_path, "out")
    assert config2 == config
    jax.tree.map(np.testing.assert_array_equal, trained2, trained)
    assert hf.adapter_base(tmp_path / "out") == str(tmp_path / "base")

    # Merged weights, as of peft.
    hf.save(tmp_path / "merged", config, {**base, **trained})
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    of_peft = model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, of_peft[name], rtol=1e-5, atol=1e-6)


def torch_gradients(model, tokens, mask, weights):
    """Gradients of the weighted sum of all log-probabilities, by the names in peft's files."""
    keys = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
    if model.config.model_type != "opt":
        keys["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, -1) - 1, 0))
    logp = torch.log_softmax(model(**keys).logits, -1)
    (torch.tensor(weights) * logp).sum().backward()
    return {
        name.replace(".default", ""): tensor.grad.numpy()
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    }


@pytest.mark.parametrize("variant", ["gpt2", "neox", "opt", "llama", "qwen3-tied", "gemma3"])
def test_reward_models(variant, tmp_path):
    """A scalar head travels with the adapter; its bias is in a key that peft ignores."""
    auto = "AutoModelForSequenceClassification"
    base = torch_model(variant, "AutoModelForCausalLM")
    base.save_pretrained(tmp_path / "base")
    config, params = hf.load(tmp_path / "base")
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"] = {"kernel": 5 * params["score"]["kernel"], "bias": jnp.float32(1.75)}
    shared = hf.shares_input(config)
    adapter = models.init_adapter(config, jax.random.key(2), RANK, models.matrices(config), shared)
    params["adapter"] = jax.tree.map(lambda x: x + 0.2, adapter)
    config = dataclasses.replace(config, adapter_scale=2.0)
    hf.save_adapter(tmp_path / "rm", config, params, str(tmp_path / "base"))

    tokens, mask = batch(left=False)
    ends = mask.sum(-1) - 1
    run = jax.jit(
        lambda params: models.apply(params, config, jnp.array(tokens), mask_BT=jnp.array(mask))
    )
    scores = models.scalars(params, config, run(params))
    of_base = getattr(transformers, auto).from_pretrained(
        tmp_path / "base", attn_implementation="eager", num_labels=1, pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(of_base, tmp_path / "rm").eval()
    padded = torch.tensor(np.where(mask, tokens, 0))
    with torch.no_grad():
        got = theirs(padded, attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()
    want = np.asarray(scores)[np.arange(3), ends]
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got + 1.75, want, atol=3e-4)

    config2, trained = hf.load_adapter(tmp_path / "rm", hf.load_config(tmp_path / "base"))
    assert config2.scalar_head
    assert config2.adapter_scale == 2.0
    jax.tree.map(np.testing.assert_array_equal, trained, models.split(params)[0])


def test_some_matrices_and_rank_stabilised_scale(tmp_path):
    model = peft_model("llama", tmp_path, target_modules=["q_proj", "down_proj"], use_rslora=True)
    config, base, trained = ours(tmp_path)
    assert config.adapter_scale == ALPHA / RANK**0.5
    leaves = {"/".join(x.key for x in path) for path, _ in jax.tree.leaves_with_path(trained)}
    assert leaves == {f"adapter/{m}/{x}" for m in ("attention/query", "mlp/down") for x in "ab"}
    tokens, mask = batch()
    got = our_logp(config, {**base, **trained}, tokens, mask)
    assert np.abs(got - torch_logp(model, tokens, mask))[mask].max() < 3e-4


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_not_implemented_is_named(lora, key, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model("llama", tmp_path, target_modules=["q_proj"], **lora)
    with pytest.raises(ValueError, match=rf"adapter_config.json: {key} = .* is not implemented"):
        ours(tmp_path)
