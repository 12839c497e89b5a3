"""`config.json` to ModelConfig and back. A key that is not implemented is refused by name."""

import dataclasses
import functools
import json
import logging
import math
import re
import typing
from typing import Any

from instructjax.hf import checks
from instructjax.hf.families import FAMILIES, HARMLESS, ROPE_KEYS
from instructjax.models.config import Activation, ModelConfig, Rope

# Keys that `from_hf` reads besides those in `families.toml`.
_READ = """
layer_types max_window_layers rope_parameters sliding_window use_sliding_window
_sliding_window_pattern word_embed_proj_dim"""
# Fields of ModelConfig that have no key in config.json.
_NO_KEY = "scalar_head dtype remat unroll dropout adapter_scale"
# Fields of Rope that a kind of rotary embedding uses besides theta and fraction.
_ROPE_FIELDS = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor original_length low_freq_factor high_freq_factor",
    "yarn": "factor original_length attention_factor beta_fast beta_slow truncate",
    "longrope": "factor original_length attention_factor short_factor long_factor",
}


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
        read = functools.partial(
            _rope, context=values["max_length"], partial=partial, refuse=refuse
        )
        values["rope"] = rope = read(ropes.get("full_attention", ropes))
        local = read(ropes.get("sliding_attention", ropes))
        if "sliding_attention" in ropes and local.kind != "default":  # no key before version 5
            refuse("rope_type of sliding_attention", local.kind)
        values["local_rope"] = None if local == rope else local
        if rope.by_length:  # see Rope
            values["max_length"] = min(values["max_length"], rope.original_length)
    for rope in (values.get("rope"), values.get("local_rope")):
        if rope is not None:
            checks.check_fields(Rope, dataclasses.asdict(rope), ROPE_KEYS, where)
    values["eos_ids"] = checks.as_ids(hf.eos_token_id, where)
    try:
        config = ModelConfig(family=hf.model_type, **values)
    except ValueError as error:  # sizes that do not fit together
        words = re.findall(r"\w+", str(error))
        keys = [f"{word} is {family.fields[word]}" for word in words if word in family.fields]
        names = f" ({', '.join(keys)})" if keys else ""
        raise ValueError(f"{where}: {error}{names}") from error
    if config.positions == "rotary" and config.rope.fraction == 1 and config.head_dim % 2:
        refuse("head_dim", config.head_dim)  # rotations take pairs
    return config


def _rope(parameters: dict[str, Any], context: int, partial: bool, refuse) -> Rope:
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - {*ROPE_KEYS.values(), "type", "mscale", "mscale_all_dim"})
    if not partial and given.get("partial_rotary_factor", 1) != 1:
        unknown.append("partial_rotary_factor")
    if unknown:
        refuse("rope_parameters", {key: given[key] for key in unknown})
    kind = str(given.get("rope_type"))
    if kind not in _ROPE_FIELDS:
        refuse("rope_type", kind)
    if kind in ("yarn", "longrope"):
        original = given["original_max_position_embeddings"]
        factor = given.setdefault("factor", context / original)
        given.setdefault("attention_factor", _attention_factor(kind, factor, original, given))
    names = ["theta", "kind", "fraction", *_ROPE_FIELDS[kind].split()]
    values: dict[str, Any] = {"original_length": context} if kind == "dynamic" else {}
    for name in names:
        if (value := given.get(ROPE_KEYS[name])) is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    return Rope(**values)


def _attention_factor(kind: str, factor: float, original: int, given: dict[str, Any]) -> float:
    """What transformers scales rotated queries and keys by if config.json does not say."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    scale = lambda m: 0.1 * m * math.log(factor) + 1  # noqa: E731
    of_part, of_all = given.get("mscale"), given.get("mscale_all_dim")
    return scale(of_part) / scale(of_all) if of_part and of_all else scale(1)


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
    if c.rope.by_length:
        c = dataclasses.replace(c, max_length=c.rope.original_length)
    if c.query_scalar is None and "query_scalar" in family.fields:
        c = dataclasses.replace(c, query_scalar=c.head_dim)

    keys: dict[str, Any] = {key: getattr(c, field) for field, key in family.fields.items()}
    eos = list(c.eos_ids)
    keys["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    if c.rope.kind == "longrope":
        keys["max_position_embeddings"] = round(c.rope.factor * c.rope.original_length)
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
    names = ["theta", "kind", *_ROPE_FIELDS[rope.kind].split()]
    if "partial_rotary_factor" in known["rope_parameters"]:
        names.append("fraction")
    values = {ROPE_KEYS[name]: getattr(rope, name) for name in names}
    return {k: list(value) if isinstance(value, tuple) else value for k, value in values.items()}


def to_json(hf: Any) -> str:
    """config.json of a config of `to_hf`, which versions 4 and 5 of transformers read alike.

    Version 5 writes `dtype` and `rope_parameters` alone. vLLM and llama.cpp read version 4's keys.
    """
    content = hf.to_diff_dict()
    content["torch_dtype"] = content["dtype"]
    if ropes := content.get("rope_parameters"):
        rope = ropes.get("full_attention", ropes)
        local = ropes.get("sliding_attention", rope)
        values = {"theta": rope["rope_theta"], "local_theta": local["rope_theta"]}
        values["fraction"] = rope.get("partial_rotary_factor")
        content |= {key: values[name] for name, key in FAMILIES[hf.model_type].rope.items()}
        elsewhere = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in rope.items() if key not in elsewhere}
        content["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        if rope["rope_type"] == "longrope":
            length = "original_max_position_embeddings"
            content[length] = rope[length]
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
