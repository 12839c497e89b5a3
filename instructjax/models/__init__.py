"""One decoder with family switches.

config.py     sizes, switches, presets
attention.py  attention masks, rotary embeddings, attention
fused.py      attention of whole sequences as a kernel for TPUs
layer.py      the layer, its parameters and their logical axes
adapters.py   LoRA: low-rank adapters of a layer's matrices
decoder.py    whole sequences; a KV cache
heads.py      logits, log-probabilities without all logits, scalars
"""

from instructjax.models.adapters import (
    adapter_axes,
    init_adapter,
    matrices,
    merge,
    split,
    whole,
)
from instructjax.models.config import PRESETS, ModelConfig, Rope
from instructjax.models.decoder import Cache, apply, apply_shared, extend, positions_of, unstack
from instructjax.models.heads import (
    cross_entropy,
    logits,
    scalars,
    token_logits,
    token_logp,
    unembedding,
)
from instructjax.models.layer import (
    Params,
    Shard,
    cast,
    init,
    logical_axes,
    stays_float32,
    unsharded,
    with_scalar_head,
)
