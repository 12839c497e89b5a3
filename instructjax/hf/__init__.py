"""Hugging Face checkpoints in and out, without torch.

families.toml   tensor names and config keys of each family, as data
families.py     reads families.toml
checks.py       what config.json may hold
configs.py      config.json <-> ModelConfig
tensors.py      safetensors <-> parameter leaves, shard by shard
directory.py    the files of a directory, local or from the hub
tokenizer.py    loads a tokenizer, and tries its chat template
vocabulary.py   tokens beyond the embedding, and rows for them
checkpoint.py   loads and saves a directory
peft.py         adapters, as peft reads and writes them
"""

from instructjax.hf.checkpoint import load, load_config, save
from instructjax.hf.directory import check_tokenizer, hub_name, read_json, weight_files
from instructjax.hf.peft import (
    adapter_base,
    check_base,
    describe_adapter,
    fingerprint,
    is_adapter,
    load_adapter,
    save_adapter,
    shares_input,
    with_tokenizer,
)
from instructjax.hf.tokenizer import load_tokenizer
from instructjax.hf.vocabulary import grow, in_use, new_tokens

__all__ = [
    "adapter_base",
    "check_base",
    "check_tokenizer",
    "describe_adapter",
    "fingerprint",
    "grow",
    "hub_name",
    "in_use",
    "is_adapter",
    "load",
    "load_adapter",
    "load_config",
    "load_tokenizer",
    "new_tokens",
    "read_json",
    "save",
    "save_adapter",
    "shares_input",
    "weight_files",
    "with_tokenizer",
]
