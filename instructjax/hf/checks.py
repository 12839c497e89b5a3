"""Checks the values of `config.json` before transformers reads them, and names the key."""

import re
import typing
from typing import Annotated, Any

from instructjax import ranges
from instructjax.hf.families import FAMILIES, ROPE_KEYS
from instructjax.models.config import ModelConfig, Rope

# Keys that hold a list or an object, with which transformers stumbles over anything else.
_CONTAINERS: dict[str, type] = {
    **dict.fromkeys(("architectures", "layer_types"), list),
    **dict.fromkeys(("auto_map", "id2label", "label2id", "quantization_config"), dict),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
}
_KINDS: dict[type, str] = {list: "a list", dict: "an object"}
# Numbers that no field of ModelConfig has as they are. transformers makes a name for each label.
_NUMBERS: dict[str, Any] = {
    "num_labels": Annotated[int, ranges.Range(lambda x: 0 <= x <= 10_000, "must be up to 10,000")],
    "original_max_position_embeddings": ranges.Count,
    "reward_bias": Annotated[float, ranges.Range(lambda x: abs(x) < 3e38, "must fit in float32")],
}


def check_raw(raw: dict[str, Any], where: str) -> None:
    """Checks what transformers would stumble over, or would take long to read.

    Args:
      raw: config.json of a supported family.

    Raises:
      ValueError: a size, a number, a switch, a list or an object is none that its field can hold,
        a dtype is no name of one, or another file stands for config.json; the message names the
        key.
    """
    for key, kind in _CONTAINERS.items():
        if not isinstance(raw.get(key), kind | None):
            raise ValueError(f"{where}: {key} = {raw[key]!r} is not {_KINDS[kind]}")
    if "configuration_files" in raw:  # transformers would read one of them, unchecked
        raise ValueError(f"{where}: configuration_files is not implemented")
    for key, hint in _NUMBERS.items():
        if raw.get(key) is not None and (says := ranges.refusal(hint, raw[key])):
            raise ValueError(f"{where}: {key} = {raw[key]!r}: {says}")
    for key in ("rope_parameters", "rope_scaling"):
        _check_ropes(raw.get(key) or {}, f"{where}: {key}")
    keys = {**FAMILIES[raw["model_type"]].fields, "window": "sliding_window"}
    for field in ("bos_id", "pad_id"):  # -1 in some old files
        keys.pop(field, None)
    check_fields(ModelConfig, {field: raw.get(key) for field, key in keys.items()}, keys, where)
    for key in ("dtype", "torch_dtype"):
        dtype = raw.get(key)
        if dtype is not None and not re.fullmatch("b?float[0-9a-z_]+", str(dtype)):
            raise ValueError(f"{where}: {key} = {dtype!r} is not the name of a float dtype")


def _check_ropes(given: dict[str, Any], where: str) -> None:
    """Checks the numbers of rotary embeddings: those of all layers, or of each kind of layer."""
    for name in ("full_attention", "sliding_attention"):
        if not isinstance(given.get(name, {}), dict):
            raise ValueError(f"{where}: {name} = {given[name]!r} is not an object")
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        values = {field: rope.get(key) for field, key in ROPE_KEYS.items()}
        lists = {field: tuple(x) for field, x in values.items() if isinstance(x, list)}
        check_fields(Rope, values | lists, ROPE_KEYS, where)
        for key in ("mscale", "mscale_all_dim"):
            if rope.get(key) is not None and (
                says := ranges.refusal(ranges.NotNegative, rope[key])
            ):
                raise ValueError(f"{where}: {key} = {rope[key]!r}: {says}")


def check_fields(cls: type, values: dict[str, Any], keys: dict[str, str], where: str) -> None:
    """Raises ValueError, with the key of config.json, for a value that its field cannot hold.

    Args:
      values: by field of `cls`, ModelConfig or Rope. None stands for the field's default.
      keys: field -> key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for field, value in values.items():
        several = typing.get_origin(hints[field]) is tuple and isinstance(value, tuple)
        for item in value if several else (value,):
            says = None if item is None else ranges.refusal(hints[field], item)
            if isinstance(item, int) and abs(item) >= 2**63:  # a float overflows at 10^309
                says = "must be below 2^63"
            if says:
                raise ValueError(f"{where}: {keys.get(field, field)} = {item!r}: {says}")


def as_ids(eos: Any, where: str) -> tuple[int, ...]:
    """`eos_token_id` of a config or a generation config, which may be an id, a list or null.

    An id beyond the vocabulary may be an added token, for which the model has no row yet.

    Raises:
      ValueError: it is none of these.
    """
    ids = () if eos in (None, -1) else tuple(eos) if isinstance(eos, list) else (eos,)
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31:
            raise ValueError(
                f"{where}: eos_token_id = {eos!r} is not a token id, or a list of them"
            )
    return ids
