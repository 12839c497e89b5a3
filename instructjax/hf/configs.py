"""`config.json` to ModelConfig and back, refusing by name whatever we would compute differently."""

import dataclasses
import logging
import typing
from typing import Any

from instructjax.hf.families import FAMILIES
from instructjax.models.config import Activation, ModelConfig, Rope

# Keys that change nothing in a forward pass without dropout.
_HARMLESS = """
architectures attention_dropout attn_pdrop chunk_size_feed_forward classifier_dropout dropout dtype
embd_pdrop eos_token_id hidden_dropout id2label init_std initializer_range is_decoder label2id
layerdrop model_type output_attentions output_hidden_states problem_type resid_pdrop return_dict
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
transformers_version use_cache _name_or_path"""
# Keys that `from_hf` reads one by one.
_READ = """
layer_types max_window_layers rope_parameters sliding_window use_sliding_window
_sliding_window_pattern word_embed_proj_dim"""
# Fields of ModelConfig that `to_hf` writes one by one, or that belong to no checkpoint.
_WRITTEN = "family eos_ids rope local_rope window windowed scalar_head dtype remat unroll dropout"


def transformers() -> Any:
    """The library, without its advice to install PyTorch, which we have no use for."""
    logging.getLogger("transformers").addFilter(_is_not_about_torch)
    import transformers

    return transformers


def _is_not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in str(record.msg)


def from_hf(hf: Any, where: str) -> ModelConfig:
    """The ModelConfig of a transformers config.

    Args:
      hf: a PreTrainedConfig of a model_type in FAMILIES.
      where: the checkpoint, for errors.

    Raises:
      ValueError: names the switch that is not implemented.
    """
    family = FAMILIES[hf.model_type]

    def refuse(key: str, value: Any):
        raise ValueError(
            f"{where}: {key} = {value!r} is not implemented for model_type {hf.model_type}"
        )

    if getattr(hf, "quantization_config", None) is not None:
        refuse("quantization_config", hf.quantization_config)
    known = type(hf)().to_dict()  # what transformers itself reads; it ignores all other keys
    used = {*family.fields.values(), *_HARMLESS.split(), *_READ.split()}
    for key, value in hf.to_dict().items():
        # An absent switch is written as null by some versions and as false by others.
        if key in known and key not in used and (value or None) != (known[key] or None):
            refuse(key, value)
    if getattr(hf, "word_embed_proj_dim", hf.hidden_size) != hf.hidden_size:  # OPT-350m
        refuse("word_embed_proj_dim", hf.word_embed_proj_dim)

    values: dict[str, Any] = dict(family.fixed)
    for ours, theirs in family.fields.items():
        values[ours] = getattr(hf, theirs)
    if values["activation"] not in typing.get_args(Activation):
        refuse(family.fields["activation"], values["activation"])
    if values["mlp_width"] is None:  # GPT-2
        values["mlp_width"] = 4 * values["width"]

    kinds = getattr(hf, "layer_types", None)
    window = getattr(hf, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * values["layers"]
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            refuse("layer_types", kind)
    if "sliding_attention" in kinds:
        values["window"] = window
        values["windowed"] = tuple(kind == "sliding_attention" for kind in kinds)

    if values.get("positions") == "rotary":
        ropes, partial = hf.rope_parameters, hf.model_type == "gpt_neox"
        values["rope"] = _rope(ropes.get("full_attention", ropes), partial, refuse)
        local = _rope(ropes.get("sliding_attention", ropes), partial, refuse)
        values["local_rope"] = None if local == values["rope"] else local
    return ModelConfig(family=hf.model_type, eos_ids=as_ids(hf.eos_token_id), **values)


def as_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a config or a generation config, which may be one, several or null."""
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


_ROPE_KEYS = {
    "theta": "rope_theta",
    "kind": "rope_type",
    "fraction": "partial_rotary_factor",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


def _rope(parameters: dict[str, Any], partial: bool, refuse) -> Rope:
    unknown = sorted(set(parameters) - {*_ROPE_KEYS.values(), "type"})
    if not partial and parameters.get("partial_rotary_factor", 1) != 1:
        unknown.append("partial_rotary_factor")
    if unknown:
        refuse("rope_parameters", {key: parameters[key] for key in unknown})
    if parameters["rope_type"] not in ("default", "linear", "llama3"):
        refuse("rope_type", parameters["rope_type"])
    return Rope(**{o: parameters[t] for o, t in _ROPE_KEYS.items() if t in parameters})


def to_hf(config: ModelConfig) -> Any:
    """The transformers config that this model is exported with.

    Raises:
      ValueError: names a switch that the family's transformers code cannot express.
    """
    family = FAMILIES[config.family]
    # What the family has no key for must have the value that its code has.
    default = ModelConfig(1, layers=1, width=1, heads=1, mlp_width=1, max_length=1)
    fixed = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    fixed |= {"kv_heads": config.heads, "head_dim": config.width // config.heads, **family.fixed}
    for name in fixed.keys() - family.fields.keys() - set(_WRITTEN.split()):
        if getattr(config, name) != fixed[name]:
            raise ValueError(f"{config.family} has no place for {name} = {getattr(config, name)!r}")

    keys: dict[str, Any] = {}
    for ours, theirs in family.fields.items():
        value = getattr(config, ours)
        if keys.setdefault(theirs, value) != value:
            raise ValueError(f"{config.family} has one {theirs} for {ours} = {value!r} and another")
    eos = list(config.eos_ids)
    keys["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    if config.positions == "rotary":
        full = _rope_parameters(config.rope, config.family)
        if config.family == "gemma3_text":
            local = _rope_parameters(config.local_rope or config.rope, config.family)
            full = {"full_attention": full, "sliding_attention": local}
        keys["rope_parameters"] = full
    names = {True: "sliding_attention", False: "full_attention"}
    kinds = [names[windowed] for windowed in config.windowed or (False,) * config.layers]
    if config.family == "mistral":
        if len(set(kinds)) > 1:
            raise ValueError("mistral has one window for all layers")
        keys["sliding_window"] = config.window if any(config.windowed) else None
    elif any(config.windowed):
        keys |= {"layer_types": kinds, "sliding_window": config.window, "use_sliding_window": True}
    elif config.family in ("gemma2", "gemma3_text"):  # whose default has windows
        keys["layer_types"] = kinds
    architecture = "SequenceClassification" if config.scalar_head else "CausalLM"
    auto = transformers().AutoConfig.for_model(config.family, **keys)
    auto.architectures = [f"{type(auto).__name__.removesuffix('Config')}For{architecture}"]
    if config.scalar_head:
        auto.num_labels = 1
    return auto


def _rope_parameters(rope: Rope, family: str) -> dict[str, Any]:
    kept = ["theta", "kind"]
    if rope.kind != "default":
        kept.append("factor")
    if rope.kind == "llama3":
        kept += ["low_freq_factor", "high_freq_factor", "original_length"]
    if family == "gpt_neox":
        kept.append("fraction")
    return {_ROPE_KEYS[name]: getattr(rope, name) for name in kept}
