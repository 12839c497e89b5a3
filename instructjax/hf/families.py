"""Reads the table of model families, `families.toml`; its format is described there."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """How one Hugging Face `model_type` is read and written."""

    prefix: str  # of all names but the head's; checkpoints of the base model alone lack it
    head: str  # name of the unembedding where it is not tied
    tensors: dict[str, tuple[str, str]]  # name -> (leaf, einops pattern)
    fields: dict[str, str]  # ModelConfig field -> config.json key with the same value
    fixed: dict[str, Any]  # ModelConfig field -> value
    buffers: str = r"(?!)"  # regular expression of names that hold no weights; default: none
    causal: str | None = None  # the language model's class; default: ...ForCausalLM
    rope: dict[str, str] = dataclasses.field(default_factory=dict)  # value -> key before version 5


def _families(data: dict[str, Any]) -> dict[str, Family]:
    tables: dict[str, dict[str, Any]] = {}
    for model_type, new in data.items():
        rows = [line.split(None, 2) for line in new.get("tensors", "").splitlines() if line]
        new["tensors"] = {name: (leaf, pattern) for name, leaf, pattern in rows}
        base = tables[new.pop("like")] if "like" in new else {}
        table = {**base, **new}
        for key in ("tensors", "fields", "fixed"):
            table[key] = {**base.get(key, {}), **new.get(key, {})}
        for field in table["fixed"]:  # the earlier family has a key for it, this family does not
            table["fields"].pop(field, None)
        tables[model_type] = table
    return {model_type: Family(**table) for model_type, table in tables.items()}


_DATA = tomllib.loads(Path(__file__).with_name("families.toml").read_text("utf-8"))
_COMMON = _DATA.pop("common")
HARMLESS: list[str] = _COMMON["harmless"].split()  # keys of config.json
ROPE_KEYS: dict[str, str] = _COMMON["rope"]  # Rope field -> key of rope_parameters
FAMILIES = _families(_DATA)
