"""Every family agrees with transformers on torch: imported models and exported ones."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import hf, models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 131,  # over 128: the padded table has two tiles
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 3.5, 4.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
GEMMA2 = {**GQA, "query_pre_attn_scalar": 7, "sliding_window": 5}
NEOX_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

VARIANTS = {
    "gpt2": ("GPT2Config", {**SMALL, "n_inner": 40}),
    "gpt2-untied-relu": (
        "GPT2Config",
        {**SMALL, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "neox": ("GPTNeoXConfig", {**SMALL, "rope_parameters": NEOX_ROPE}),
    "neox-serial-nobias": (
        "GPTNeoXConfig",
        {**SMALL, "use_parallel_residual": False, "attention_bias": False},
    ),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 40}),
    "opt-nobias-untied": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 40, "enable_bias": False, "tie_word_embeddings": False},
    ),
    "llama": ("LlamaConfig", {**GQA, "rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaConfig", {**GQA, "rope_parameters": YARN}),
    "qwen3-yarn-switches": (
        "Qwen3Config",
        {
            **GQA,
            "rope_parameters": {
                **YARN,
                "beta_fast": 2.5,
                "beta_slow": 0.3,
                "truncate": False,
                "mscale": 0.8,
                "mscale_all_dim": 0.5,
            },
        },
    ),
    "neox-yarn": ("GPTNeoXConfig", {**SMALL, "rope_parameters": {**NEOX_ROPE, **YARN}}),
    "llama-dynamic": (
        "LlamaConfig",
        {**GQA, "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    ),
    "llama-longrope": ("LlamaConfig", {**GQA, "rope_parameters": LONGROPE}),
    "llama-biases-single-kv": (
        "LlamaConfig",
        {**GQA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear-tied": (
        "LlamaConfig",
        {**SMALL, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "mistral-window": ("MistralConfig", {**GQA, "sliding_window": 5}),
    "mistral-full": ("MistralConfig", {**GQA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**SMALL, "num_key_value_heads": 2}),
    "qwen2-windows": (
        "Qwen2Config",
        {
            **SMALL,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3-tied": ("Qwen3Config", {**GQA, "tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {**GQA, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", GEMMA2),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3-yarn": (
        "Gemma3TextConfig",
        {
            **GEMMA2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"full_attention": {**YARN, "attention_factor": 1.5}},
        },
    ),
}


def torch_model(variant: str, auto: str, seed: int = 0, **changes):
    """A transformers model with weights so large that every switch changes the output."""
    name, keys = VARIANTS[variant]
    config = getattr(transformers, name)(**{**keys, **changes}, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, auto).from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data = tensor.data + 0.2 * noise if tensor.ndim == 1 else 0.3 * noise
    return model


def batch(lengths=(12, 7, 9), left=True, low=3):
    """Random tokens with padding: (tokens, mask)."""
    rng = np.random.default_rng(0)
    T = max(lengths)
    tokens = rng.integers(low, 131, (len(lengths), T))
    live = np.arange(T)[None] < np.array(lengths)[:, None]
    return tokens, live[:, ::-1].copy() if left else live


def torch_logp(model, tokens, mask) -> np.ndarray:
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    keys = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}
    if model.config.model_type != "opt":  # OPT computes positions itself
        keys["position_ids"] = torch.tensor(positions)
    with torch.no_grad():
        return torch.log_softmax(model(**keys).logits, -1).numpy()


def our_logp(path, tokens, mask, **changes) -> np.ndarray:
    config, params = hf.load(path)
    config = dataclasses.replace(config, **changes)
    run = jax.jit(models.logits, static_argnums=1)
    return np.asarray(jax.nn.log_softmax(run(params, config, tokens, jnp.array(mask))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_and_export(variant, tmp_path):
    model = torch_model(variant, "AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "in")
    tokens, mask = batch()
    want = torch_logp(model, tokens, mask)
    assert want.std() > 0.5  # log-probabilities differ, so that agreement means something
    got = our_logp(tmp_path / "in", tokens, mask)
    assert np.abs(got - want)[mask].max() < 2e-4

    config, params = hf.load(tmp_path / "in")
    hf.save(tmp_path / "out", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert np.array_equal(torch_logp(again, tokens, mask), want)


@pytest.mark.parametrize(
    ("variant", "longer"),
    [
        ("llama-yarn", {}),
        ("qwen3-yarn-switches", {}),
        ("neox-yarn", {}),
        ("gemma3-yarn", {}),
        ("llama-dynamic", {"max_length": 40}),
        ("llama-longrope", {"max_length": 64}),
    ],
)
def test_sequences_around_the_original_length(variant, longer, tmp_path):
    """Shorter and longer than in pretraining; some kinds must be told of longer ones."""
    model = torch_model(variant, "AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    for length in (16, 40):
        tokens, mask = batch(lengths=(length, length))
        want = torch_logp(model, tokens, mask)
        if longer and length > 16:
            with pytest.raises(ValueError, match="40 positions in a model of max_length 16"):
                our_logp(tmp_path, tokens, mask)
        got = our_logp(tmp_path, tokens, mask, **(longer if length > 16 else {}))
        assert np.abs(got - want).max() < 2e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_reward_models(variant, tmp_path):
    """Scores in transformers equal ours at the EOS, up to the exported `reward_bias`."""
    model = torch_model(variant, "AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "lm")
    config, params = hf.load(tmp_path / "lm")
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"] = {"kernel": 5 * params["score"]["kernel"], "bias": jnp.float32(1.75)}
    hf.save(tmp_path / "rm", config, params)

    tokens, mask = batch(left=False)
    ends = mask.sum(-1) - 1
    tokens[np.arange(3), ends] = config.eos_ids[0]
    hidden = models.apply(params, config, tokens, mask_BT=jnp.array(mask))
    ours = np.asarray(models.scalars(params, config, hidden))[np.arange(3), ends]

    exported = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", attn_implementation="eager"
    )
    pad = exported.config.pad_token_id
    assert pad not in config.eos_ids
    padded = torch.tensor(np.where(mask, tokens, pad))
    with torch.no_grad():
        scores = exported(padded, attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()
    constant = 0.0 if config.norm == "layer" else 1.75
    assert getattr(exported.config, "reward_bias", 0.0) == constant
    assert np.std(ours) > 0.1
    np.testing.assert_allclose(scores + constant, ours, atol=2e-4)

    config2, params2 = hf.load(tmp_path / "rm")
    assert config2.scalar_head
    assert config2.vocab_size == config.vocab_size + 1
    hidden = models.apply(params2, config2, tokens, mask_BT=jnp.array(mask))
    again = np.asarray(models.scalars(params2, config2, hidden))[np.arange(3), ends]
    np.testing.assert_allclose(again, ours, atol=2e-4)
