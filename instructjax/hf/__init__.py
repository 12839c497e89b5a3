"""Hugging Face checkpoints in and out, without torch.

families.toml   tensor names and config keys of each family, as data
families.py     reads families.toml
configs.py      config.json <-> ModelConfig
tensors.py      safetensors <-> parameter leaves, shard by shard
checkpoint.py   loads and saves a directory
"""

from instructjax.hf.checkpoint import hub_name, load, load_config, load_tokenizer, save

__all__ = ["hub_name", "load", "load_config", "load_tokenizer", "save"]
