"""The config of a decoder: one frozen dataclass of sizes and switches, and the presets.

A family is data: a `ModelConfig` here and a table in `hf/families.toml`. No code asks which
family it is running.
"""

import dataclasses
from typing import Annotated, Literal

from instructjax.ranges import Count, CountOrZero, NotNegative, Positive, Range, ShareAbove0

# More would take transformers minutes to count to.
Layers = Annotated[int, Range(lambda x: 1 <= x <= 10_000, "must be from 1 to 10,000")]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]  # as transformers


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding; the frequency of pair i is theta^(-2i / rotary dimension).

    The other kinds lower some frequencies, so that more positions fit than in pretraining:

      linear    divides all by `factor`
      llama3    divides low ones (Llama 3.1)
      yarn      divides low ones (Peng et al. 2023, arXiv 2309.00071)
      dynamic   raises theta with the sequence's length beyond `original_length`
      longrope  divides pair i by long_factor[i] if the sequence is longer than `original_length`,
                else by short_factor[i] (Ding et al. 2024, arXiv 2402.13753)

    In dynamic and longrope a position's rotation depends on the sequence's length. transformers
    takes the longest sequence of each call, so that keys in a cache are of other frequencies than
    later queries. Here the length is the model's `max_length`, whatever a program is given, so that
    sampling, scoring and training agree. `hf.load` sets it to the original length: every sequence
    that fits is computed as in transformers, and longer ones are refused. With a larger
    `max_length` a sequence is computed as in a call of transformers that is `max_length` long.
    """

    theta: Positive = 10_000.0
    fraction: ShareAbove0 = 1.0  # share of each head that is rotated (Pythia: 0.25)
    kind: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    factor: Positive = 1.0  # positions are stretched by this; longrope: new / original length
    original_length: Count = 8192  # positions in pretraining
    low_freq_factor: Positive = 1.0  # llama3: wavelengths over original_length / this are stretched
    high_freq_factor: Positive = 4.0  # llama3: those under original_length / this are left alone
    beta_fast: Positive = 32.0  # yarn: pairs that turn this often in original_length are left alone
    beta_slow: Positive = 1.0  # yarn: pairs that turn less often than this are stretched
    truncate: bool = True  # yarn: these two limits are rounded to whole pairs
    attention_factor: Positive = 1.0  # yarn, longrope: rotated queries and keys are scaled by this
    short_factor: tuple[Positive, ...] = ()  # longrope: of each pair
    long_factor: tuple[Positive, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether rotations depend on the sequence's length."""
        return self.kind in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder. Hashable, so that jit can take it as a static argument."""

    vocab_size: Count  # real tokens; tables are padded to `padded_vocab_size` rows
    layers: Layers
    width: Count
    heads: Count
    mlp_width: Count
    max_length: Count
    kv_heads: Count = 0  # 0: as many as heads
    head_dim: Count = 0  # 0: width / heads
    family: str = "gpt2"  # the Hugging Face `model_type` of an export

    norm: Literal["layer", "rms"] = "layer"
    norm_eps: NotNegative = 1e-5
    norm_offset: bool = False  # Gemma stores RMSNorm scales minus one
    post_norms: bool = False  # Gemma 2 and 3 also norm the output of a sublayer
    parallel: bool = False  # GPT-NeoX: attention and MLP both read the layer's input
    activation: Activation = "gelu_new"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    tied: bool = True  # the unembedding is the embedding
    scale_embedding: bool = False  # Gemma multiplies embeddings by sqrt(width)
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: CountOrZero = 0  # OPT's table begins with two unused rows
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of windowed layers, where it differs (Gemma 3)
    window: Count | None = None  # tokens that a query of a windowed layer sees, its own included
    windowed: tuple[bool, ...] = ()  # which layers are windowed; (): none
    query_scalar: Positive | None = None  # attention logits are scaled by this^-1/2; None: head_dim
    attention_softcap: Positive | None = None  # logits become cap * tanh(logits / cap)
    final_softcap: Positive | None = None
    scalar_head: bool = False  # a reward or value model: a scalar replaces the unembedding

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    # How the model is computed; not part of a checkpoint.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of matmuls and activations
    remat: Literal["none", "dots", "full"] = "none"  # what a layer's backward pass recomputes
    unroll: int = 1  # layers per turn of the scan; more is faster on CPU and compiles longer
    dropout: float = 0.0  # of each sublayer's output; off unless a key is passed
    adapter_scale: float = 1.0  # an adapter adds this times (x A) B

    def __post_init__(self):
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv_heads evenly")
        if self.windowed and len(self.windowed) != self.layers:
            raise ValueError(f"windowed has {len(self.windowed)} entries for {self.layers} layers")
        if any(self.windowed) and self.window is None:
            raise ValueError("windowed layers need a window")
        pairs = int(self.head_dim * self.rope.fraction) // 2
        factors = len(self.rope.short_factor), len(self.rope.long_factor)
        if self.rope.kind == "longrope" and factors != (pairs, pairs):
            raise ValueError(f"longrope has {factors} short and long factors for {pairs} pairs")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: a multiple of 128, as 50257 divides by nothing useful."""
        return -(-self.vocab_size // 128) * 128


def _gpt3(layers: int, width: int, heads: int) -> ModelConfig:
    """GPT-3 (Brown et al. 2020, table 2.1) as InstructGPT uses it, context 2k.

    Attention is dense in every layer; GPT-3 alternates dense and banded sparse ones.
    """
    ids = {"bos_id": 50256, "eos_ids": (50256,)}
    return ModelConfig(50257, layers, width, heads, mlp_width=4 * width, max_length=2048, **ids)


def _miniature(layers: int, width: int, heads: int) -> ModelConfig:
    """A small Llama for the miniature; the tokenizer sets the vocabulary.

    Its loss on the same text is lower than that of a GPT-2 of this size.
    """
    return ModelConfig(
        1024, layers, width, heads=heads, mlp_width=11 * width // 4, max_length=256,
        family="llama", norm="rms", activation="silu", gated=True, qkv_bias=False, out_bias=False,
        mlp_bias=False, positions="rotary", unroll=layers,
    )  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    # The GPT-3 paper lists 24 heads of 128, which do not fit width 2048; here 16 heads of 128.
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-6b": _gpt3(32, 4096, 32),
    "gpt3-175b": _gpt3(96, 12288, 96),
    "miniature": _miniature(2, 128, 4),  # 0.45M parameters
    "miniature-small": _miniature(2, 64, 4),  # 0.16M
    "miniature-large": _miniature(4, 192, 6),  # 2.0M
    "miniature-45k": _miniature(1, 32, 2),  # for reward models of overoptimise.py
    "miniature-20k": _miniature(1, 16, 2),
    "tiny": ModelConfig(4096, 4, 256, heads=4, mlp_width=1024, max_length=1024, unroll=4),
}
