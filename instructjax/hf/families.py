"""The families as data: the names of their tensors, and how their `config.json` reads.

A row of a tensor table is a name in the checkpoint, the leaf of ours that it holds, and an einops
pattern from the file's shape to ours. `{}` is the layer; leaves in braces are stacked in the file
along `x`, the first axis on our side. Axes: v vocabulary, p positions, d width, n heads, g KV
heads, h head dimension, f MLP width. Rows of biases and norms that a config turns off have no leaf
and are left out.

A config table pairs our field with their key; `fixed` are the switches that a family's code has
no key for. A further family is one more entry of FAMILIES.
"""

import dataclasses
from typing import Any

Table = dict[str, tuple[str, str]]  # name -> (leaf, pattern)


@dataclasses.dataclass(frozen=True)
class Family:
    """How one Hugging Face `model_type` is read and written."""

    prefix: str  # of all names but the head's; checkpoints of the base model alone lack it
    head: str  # name of the unembedding where it is not tied
    tensors: Table
    fields: dict[str, str]  # ModelConfig field -> config.json key, copied as they are
    fixed: dict[str, Any]  # ModelConfig field -> value
    buffers: str  # regular expression of names that hold no weights
    causal: str = ""  # the language model's class, where it is not ...ForCausalLM


def _table(text: str) -> Table:
    rows = (line.split(None, 2) for line in text.strip().splitlines())
    return {name: (leaf, pattern) for name, leaf, pattern in rows}


def _fields(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


_GPT2 = _table("""
wte.weight               embed/tokens                        v d -> v d
wpe.weight               embed/positions                     p d -> p d
h.{}.ln_1.weight         attention_norm/scale                d -> d
h.{}.ln_1.bias           attention_norm/bias                 d -> d
h.{}.attn.c_attn.weight  attention/{query,key,value}/kernel  d (x n h) -> x d n h
h.{}.attn.c_attn.bias    attention/{query,key,value}/bias    (x n h) -> x n h
h.{}.attn.c_proj.weight  attention/out/kernel                (n h) d -> n h d
h.{}.attn.c_proj.bias    attention/out/bias                  d -> d
h.{}.ln_2.weight         mlp_norm/scale                      d -> d
h.{}.ln_2.bias           mlp_norm/bias                       d -> d
h.{}.mlp.c_fc.weight     mlp/up/kernel                       d f -> d f
h.{}.mlp.c_fc.bias       mlp/up/bias                         f -> f
h.{}.mlp.c_proj.weight   mlp/down/kernel                     f d -> f d
h.{}.mlp.c_proj.bias     mlp/down/bias                       d -> d
ln_f.weight              final_norm/scale                    d -> d
ln_f.bias                final_norm/bias                     d -> d
""")

_NEOX = _table("""
embed_in.weight                             embed/tokens                        v d -> v d
layers.{}.input_layernorm.weight            attention_norm/scale                d -> d
layers.{}.input_layernorm.bias              attention_norm/bias                 d -> d
layers.{}.attention.query_key_value.weight  attention/{query,key,value}/kernel  (n x h) d -> x d n h
layers.{}.attention.query_key_value.bias    attention/{query,key,value}/bias    (n x h) -> x n h
layers.{}.attention.dense.weight            attention/out/kernel                d (n h) -> n h d
layers.{}.attention.dense.bias              attention/out/bias                  d -> d
layers.{}.post_attention_layernorm.weight   mlp_norm/scale                      d -> d
layers.{}.post_attention_layernorm.bias     mlp_norm/bias                       d -> d
layers.{}.mlp.dense_h_to_4h.weight          mlp/up/kernel                       f d -> d f
layers.{}.mlp.dense_h_to_4h.bias            mlp/up/bias                         f -> f
layers.{}.mlp.dense_4h_to_h.weight          mlp/down/kernel                     d f -> f d
layers.{}.mlp.dense_4h_to_h.bias            mlp/down/bias                       d -> d
final_layer_norm.weight                     final_norm/scale                    d -> d
final_layer_norm.bias                       final_norm/bias                     d -> d
""")

_QKV = _table("""
embed_tokens.weight                embed/tokens            v d -> v d
layers.{}.self_attn.q_proj.weight  attention/query/kernel  (n h) d -> d n h
layers.{}.self_attn.q_proj.bias    attention/query/bias    (n h) -> n h
layers.{}.self_attn.k_proj.weight  attention/key/kernel    (g h) d -> d g h
layers.{}.self_attn.k_proj.bias    attention/key/bias      (g h) -> g h
layers.{}.self_attn.v_proj.weight  attention/value/kernel  (g h) d -> d g h
layers.{}.self_attn.v_proj.bias    attention/value/bias    (g h) -> g h
""")

_OPT = _QKV | _table("""
embed_positions.weight                 embed/positions       p d -> p d
layers.{}.self_attn.out_proj.weight    attention/out/kernel  d (n h) -> n h d
layers.{}.self_attn.out_proj.bias      attention/out/bias    d -> d
layers.{}.self_attn_layer_norm.weight  attention_norm/scale  d -> d
layers.{}.self_attn_layer_norm.bias    attention_norm/bias   d -> d
layers.{}.fc1.weight                   mlp/up/kernel         f d -> d f
layers.{}.fc1.bias                     mlp/up/bias           f -> f
layers.{}.fc2.weight                   mlp/down/kernel       d f -> f d
layers.{}.fc2.bias                     mlp/down/bias         d -> d
layers.{}.final_layer_norm.weight      mlp_norm/scale        d -> d
layers.{}.final_layer_norm.bias        mlp_norm/bias         d -> d
final_layer_norm.weight                final_norm/scale      d -> d
final_layer_norm.bias                  final_norm/bias       d -> d
""")

_LLAMA = _QKV | _table("""
layers.{}.self_attn.q_norm.weight          attention/query_norm/scale  h -> h
layers.{}.self_attn.k_norm.weight          attention/key_norm/scale    h -> h
layers.{}.self_attn.o_proj.weight          attention/out/kernel        d (n h) -> n h d
layers.{}.self_attn.o_proj.bias            attention/out/bias          d -> d
layers.{}.mlp.up_proj.weight               mlp/up/kernel               f d -> d f
layers.{}.mlp.up_proj.bias                 mlp/up/bias                 f -> f
layers.{}.mlp.gate_proj.weight             mlp/gate/kernel             f d -> d f
layers.{}.mlp.gate_proj.bias               mlp/gate/bias               f -> f
layers.{}.mlp.down_proj.weight             mlp/down/kernel             d f -> f d
layers.{}.mlp.down_proj.bias               mlp/down/bias               d -> d
layers.{}.input_layernorm.weight           attention_norm/scale        d -> d
layers.{}.post_attention_layernorm.weight  mlp_norm/scale              d -> d
norm.weight                                final_norm/scale            d -> d
""")

# Gemma 2 and 3 norm twice, and give the name post_attention_layernorm to another norm.
_GEMMA2 = _LLAMA | _table("""
layers.{}.post_attention_layernorm.weight    attention_post_norm/scale  d -> d
layers.{}.pre_feedforward_layernorm.weight   mlp_norm/scale             d -> d
layers.{}.post_feedforward_layernorm.weight  mlp_post_norm/scale        d -> d
""")

_IDS = _fields("vocab_size=vocab_size bos_id=bos_token_id pad_id=pad_token_id")
_COMMON = _IDS | {"tied": "tie_word_embeddings"}
_SIZES = _COMMON | _fields("""
width=hidden_size layers=num_hidden_layers heads=num_attention_heads
max_length=max_position_embeddings""")
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_GPT2_KEYS = _COMMON | _fields("""
width=n_embd layers=n_layer heads=n_head max_length=n_positions mlp_width=n_inner
norm_eps=layer_norm_epsilon activation=activation_function""")
_NEOX_KEYS = _SIZES | _fields("""
mlp_width=intermediate_size norm_eps=layer_norm_eps activation=hidden_act
parallel=use_parallel_residual qkv_bias=attention_bias out_bias=attention_bias""")
_OPT_KEYS = _SIZES | _fields("""
mlp_width=ffn_dim activation=activation_function
qkv_bias=enable_bias out_bias=enable_bias mlp_bias=enable_bias""")
_QWEN2_KEYS = _SIZES | _fields("""
kv_heads=num_key_value_heads mlp_width=intermediate_size norm_eps=rms_norm_eps
activation=hidden_act""")
_LLAMA_KEYS = _QWEN2_KEYS | {"head_dim": "head_dim"}
_BIASED_KEYS = _LLAMA_KEYS | _ATTENTION_BIAS
_GEMMA2_KEYS = _BIASED_KEYS | _fields("""
activation=hidden_activation query_scalar=query_pre_attn_scalar
attention_softcap=attn_logit_softcapping final_softcap=final_logit_softcapping""")

_RMS = {"norm": "rms", "positions": "rotary", "gated": True}
_PLAIN_MLP = {**_RMS, "mlp_bias": False}
_NO_BIAS = {**_PLAIN_MLP, "qkv_bias": False, "out_bias": False}
_GEMMA_FIXED = {**_PLAIN_MLP, "norm_offset": True, "scale_embedding": True}
_GEMMA2_FIXED = {**_GEMMA_FIXED, "post_norms": True}

_ROTARY = {"positions": "rotary"}
_OPT_FIXED = {"position_offset": 2}
_INV_FREQ = r".*rotary_emb\.inv_freq"
_GPT2_MASKS = r".*\.attn\.(masked_)?bias"
_NEOX_MASKS = rf".*\.attention\.(masked_)?bias|{_INV_FREQ}"


def _llama(
    fields: dict[str, str], fixed: dict[str, Any], tensors: Table = _LLAMA, causal: str = ""
) -> Family:
    return Family("model.", "lm_head.weight", tensors, fields, fixed, _INV_FREQ, causal)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "transformer.", "lm_head.weight", _GPT2, _GPT2_KEYS, {}, _GPT2_MASKS, "GPT2LMHeadModel"
    ),
    "gpt_neox": Family("gpt_neox.", "embed_out.weight", _NEOX, _NEOX_KEYS, _ROTARY, _NEOX_MASKS),
    "opt": Family("model.decoder.", "lm_head.weight", _OPT, _OPT_KEYS, _OPT_FIXED, r"(?!)"),
    "llama": _llama(_BIASED_KEYS | {"mlp_bias": "mlp_bias"}, _RMS),
    "mistral": _llama(_LLAMA_KEYS, _NO_BIAS),
    "qwen2": _llama(_QWEN2_KEYS, {**_NO_BIAS, "qkv_bias": True}),
    "qwen3": _llama(_BIASED_KEYS, {**_PLAIN_MLP, "qk_norm": True}),
    "gemma": _llama(_BIASED_KEYS, _GEMMA_FIXED),
    "gemma2": _llama(_GEMMA2_KEYS, _GEMMA2_FIXED, _GEMMA2),
    "gemma3_text": _llama(
        _GEMMA2_KEYS, {**_GEMMA2_FIXED, "qk_norm": True}, _GEMMA2, "Gemma3ForCausalLM"
    ),
}
