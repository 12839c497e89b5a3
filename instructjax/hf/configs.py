"""`config.json` to ModelConfig and back; refuses by name every key that is not implemented."""

import dataclasses
import functools
import logging
import typing
from typing import Any

from instructjax.hf.families import FAMILIES, HARMLESS, ROPE_KEYS
from instructjax.models.config import Activation, ModelConfig, Rope

# Keys that `from_hf` reads besides those in `families.toml`.
_READ = """
layer_types max_window_layers rope_parameters sliding_window use_sliding_window
_sliding_window_pattern word_embed_proj_dim"""
# Fields of ModelConfig that have no key in config.json.
_NO_KEY = "scalar_head dtype remat unroll dropout"


@functools.cache
def transformers() -> Any:
    """The library, without its warning that PyTorch is missing: nothing here needs PyTorch."""
    quiet = lambda record: "PyTorch was not found" not in str(record.msg)  # noqa: E731
    logging.getLogger("transformers").addFilter(quiet)
    import transformers

    return transformers


def from_hf(hf: Any, where: str) -> ModelConfig:
    """The ModelConfig of a transformers config.

    Args:
      hf: a PreTrainedConfig whose model_type is in FAMILIES.
      where: name of the checkpoint, for error messages.

    Raises:
      ValueError: the config sets a key that is not implemented; the message names the key.
    """
    family = FAMILIES[hf.model_type]

    def refuse(key: str, value: Any):
        raise ValueError(
            f"{where}: {key} = {value!r} is not implemented for model_type {hf.model_type}"
        )

    if getattr(hf, "quantization_config", None) is not None:
        refuse("quantization_config", hf.quantization_config)
    # The keys that transformers reads. It keeps other keys as attributes and ignores them.
    known = type(hf)().to_dict()
    given = {key: value for key, value in hf.to_dict().items() if key in known}
    used = {*family.fields.values(), *HARMLESS, *_READ.split()}
    for key, value in given.items():
        # Some versions write a switch that is off as null, others as false.
        if key not in used and (value or None) != (known[key] or None):
            refuse(key, value)
    if given.get("word_embed_proj_dim", hf.hidden_size) != hf.hidden_size:  # OPT-350m
        refuse("word_embed_proj_dim", hf.word_embed_proj_dim)

    values = family.fixed | {field: getattr(hf, key) for field, key in family.fields.items()}
    for name in ("bos_id", "pad_id"):  # some old files write -1 for "no such token"
        values[name] = None if (values[name] or 0) < 0 else values[name]
    if values["activation"] not in typing.get_args(Activation):
        refuse(family.fields["activation"], values["activation"])
    if values["mlp_width"] is None:  # GPT-2
        values["mlp_width"] = 4 * values["width"]

    window = given.get("sliding_window")
    default = ["full_attention" if window is None else "sliding_attention"]
    kinds = given.get("layer_types") or default * values["layers"]
    for kind in set(kinds) - {"full_attention", "sliding_attention"}:
        refuse("layer_types", kind)
    if "sliding_attention" in kinds:
        values["window"] = window
        values["windowed"] = tuple(kind == "sliding_attention" for kind in kinds)

    if values.get("positions") == "rotary":
        ropes, partial = hf.rope_parameters, "partial_rotary_factor" in known["rope_parameters"]
        values["rope"] = _rope(ropes.get("full_attention", ropes), partial, refuse)
        local = _rope(ropes.get("sliding_attention", ropes), partial, refuse)
        values["local_rope"] = None if local == values["rope"] else local
    return ModelConfig(family=hf.model_type, eos_ids=as_ids(hf.eos_token_id), **values)


def as_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a config or a generation config, which may be an id, a list or null."""
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _rope(parameters: dict[str, Any], partial: bool, refuse) -> Rope:
    unknown = sorted(set(parameters) - {*ROPE_KEYS.values(), "type"})
    if not partial and parameters.get("partial_rotary_factor", 1) != 1:
        unknown.append("partial_rotary_factor")
    if unknown:
        refuse("rope_parameters", {key: parameters[key] for key in unknown})
    if parameters["rope_type"] not in ("default", "linear", "llama3"):
        refuse("rope_type", parameters["rope_type"])
    return Rope(**{field: parameters[k] for field, k in ROPE_KEYS.items() if k in parameters})


def to_hf(config: ModelConfig) -> Any:
    """The transformers config that this model is exported with.

    Raises:
      ValueError: the family's config class cannot express a field; the message names the field.
    """
    family, auto = FAMILIES[config.family], transformers().AutoConfig
    known = auto.for_model(config.family).to_dict()
    # Normalise fields that have two spellings: the export is read back and compared below.
    c = config
    if not any(c.windowed):
        c = dataclasses.replace(c, windowed=(), window=None)
    if c.query_scalar is None and "query_scalar" in family.fields:
        c = dataclasses.replace(c, query_scalar=c.head_dim)

    keys: dict[str, Any] = {key: getattr(c, field) for field, key in family.fields.items()}
    eos = list(c.eos_ids)
    keys["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    if c.positions == "rotary":
        keys["rope_parameters"] = rope = _rope_parameters(c.rope, known)
        if "full_attention" in known["rope_parameters"]:
            local = _rope_parameters(c.local_rope or c.rope, known)
            keys["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if "layer_types" in known:
        names = {True: "sliding_attention", False: "full_attention"}
        keys["layer_types"] = [names[windowed] for windowed in c.windowed or (False,) * c.layers]
    if c.windowed or "layer_types" not in known:
        keys |= {"sliding_window": c.window, "use_sliding_window": bool(c.windowed)}
    hf = auto.for_model(c.family, **{key: keys[key] for key in keys if key in known})

    back = from_hf(hf, "export")
    for field in dataclasses.fields(ModelConfig):
        value = getattr(c, field.name)
        if field.name not in _NO_KEY.split() and getattr(back, field.name) != value:
            raise ValueError(f"config.json of {c.family} cannot hold {field.name} = {value!r}")
    stem = type(hf).__name__.removesuffix("Config")
    hf.architectures = [family.causal or f"{stem}ForCausalLM"]
    if c.scalar_head:
        hf.architectures, hf.num_labels = [f"{stem}ForSequenceClassification"], 1
    return hf


def _rope_parameters(rope: Rope, known: dict[str, Any]) -> dict[str, Any]:
    kept = ["theta", "kind"]
    if rope.kind != "default":
        kept.append("factor")
    if rope.kind == "llama3":
        kept += ["low_freq_factor", "high_freq_factor", "original_length"]
    if "partial_rotary_factor" in known["rope_parameters"]:
        kept.append("fraction")
    return {ROPE_KEYS[name]: getattr(rope, name) for name in kept}
