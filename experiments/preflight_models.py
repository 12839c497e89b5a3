"""Sizes of models that people train, for preflight.py without a network.

The values are from the config.json of each on the Hugging Face hub. Keys that change neither sizes
nor programs, such as the tokens that end a response, are left out.
"""

from typing import Any

from instructjax.models import ModelConfig, Rope


def _llama(layers: int, width: int, heads: int, mlp_width: int, **others: Any) -> ModelConfig:
    """Llama's switches, which Qwen3 shares but for the norms of queries and keys."""
    switches: dict[str, Any] = {
        **{"family": "llama", "norm": "rms", "activation": "silu", "gated": True},
        **{"qkv_bias": False, "out_bias": False, "mlp_bias": False, "positions": "rotary"},
    }
    sizes = {"layers": layers, "width": width, "heads": heads, "mlp_width": mlp_width}
    return ModelConfig(**sizes, **switches | others)


def _llama3(layers: int, width: int, mlp_width: int, factor: float, tied: bool) -> ModelConfig:
    rope = Rope(theta=500_000, kind="llama3", factor=factor)
    common: dict[str, Any] = {"vocab_size": 128_256, "kv_heads": 8, "max_length": 131_072}
    return _llama(layers, width, 32, mlp_width, rope=rope, tied=tied, **common)


def _qwen3(layers: int, width: int, heads: int, mlp_width: int) -> ModelConfig:
    common: dict[str, Any] = {"vocab_size": 151_936, "kv_heads": 8, "max_length": 40_960}
    common |= {"family": "qwen3", "qk_norm": True, "norm_eps": 1e-6, "rope": Rope(theta=1e6)}
    return _llama(layers, width, heads, mlp_width, head_dim=128, **common)


SMOLLM2 = _llama(
    *(30, 576, 9, 1536), vocab_size=49_152, kv_heads=3, max_length=8192, rope=Rope(theta=1e5)
)
PYTHIA = ModelConfig(
    *(50_304, 24, 1024, 16, 4096, 2048),
    family="gpt_neox",
    parallel=True,
    activation="gelu",
    tied=False,
    positions="rotary",
    rope=Rope(fraction=0.25),
)
# In ascending order of their parameters.
MODELS = {
    "smollm2-135m": SMOLLM2,
    "pythia-410m": PYTHIA,
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072),
    "llama-3.2-1b": _llama3(16, 2048, 8192, factor=32, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728),
    "llama-3.1-8b": _llama3(32, 4096, 14_336, factor=8, tied=False),
}
