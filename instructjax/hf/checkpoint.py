"""Loads and saves a Hugging Face directory: config.json, safetensors, tokenizer, model card."""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from instructjax import hosts, sharding
from instructjax.hf import checks, configs, tensors, vocabulary
from instructjax.hf.directory import TEXTS, WEIGHTS, describe, read_json, resolve, weight_files
from instructjax.hf.families import FAMILIES
from instructjax.models import ModelConfig, Params, init, logical_axes, stays_float32

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params]:
    """Loads a Hugging Face checkpoint onto a mesh. Each host reads only its devices' shards.

    A `...ForSequenceClassification` checkpoint with one label becomes a model with a scalar head,
    whose bias is `reward_bias` of `config.json`.

    Args:
      path: a directory with `config.json` and safetensors, or a model's name on the hub.
      mesh: the mesh that holds the parameters; default: the first device alone.
      dtype: dtype of the parameters in memory, whatever the file's dtype is. What `models.cast`
        keeps in float32 is in float32, so that a frozen model is never in memory in both.

    Returns:
      (config, params)

    Raises:
      FileNotFoundError: `path` is neither a checkpoint nor a hub model, or a file is missing.
      ValueError: a file is damaged, an architecture or a config key is not implemented, or tensors
        are missing, unused, duplicated, of the wrong shape or not finite; the message lists them.
    """
    directory = resolve(path, TEXTS + WEIGHTS)
    where = str(path)
    arrays = tensors.open_files(weight_files(directory, where))
    raw, config = _read_config(directory, where)
    if config.layers > len(arrays):
        raise ValueError(
            f"{where}: config.json has {config.layers:,} layers, and the weights have"
            f" {len(arrays):,} tensors"
        )
    if config.scalar_head:  # transformers' classes have no bias
        arrays.setdefault("score.bias", np.asarray(raw.get("reward_bias", 0.0)))

    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    layout = sharding.shardings(logical_axes(config), shapes, mesh)
    leaves, layouts = tensors.flatten(shapes), tensors.flatten(layout)
    wanted = tensors.entries(config, set(leaves))
    arrays = tensors.check_names(arrays, config, wanted, where)

    def read(leaf: str) -> jax.Array:
        shape, of_leaf = leaves[leaf].shape, "float32" if stays_float32(leaf) else dtype
        read_block = tensors.reader(leaf, shape, jnp.dtype(of_leaf), wanted, arrays, config, where)
        return jax.make_array_from_callback(shape, layouts[leaf], read_block)

    large = sum(leaf.size for leaf in leaves.values()) > 2**29
    loaded = {
        leaf: read(leaf)
        for leaf in rich.progress.track(leaves, f"Loading {where}", disable=not large)
    }
    return config, jax.tree.unflatten(jax.tree.structure(shapes), list(loaded.values()))


def load_config(path: str | os.PathLike) -> ModelConfig:
    """Reads a checkpoint's ModelConfig, not its weights. Arguments and errors: as for `load`."""
    return _read_config(resolve(path, TEXTS), str(path))[1]


def save(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    *,
    dtype: str | None = None,
    max_file_size: int = 5 * 10**9,
) -> None:
    """Writes a directory that `transformers` loads, with tokenizer and generation config.

    A model with a scalar head becomes a `...ForSequenceClassification`. That class has no bias.
    Families with LayerNorm fold the bias into the final norm. Families with RMSNorm keep it in
    `config.json` as `reward_bias`, which a reader must add to the scores. The class scores the
    rightmost token that is not padding, so the export gets a pad id other than EOS and, if the
    embedding has no row for that id, a row of zeros. On several hosts every host must call `save`;
    host 0 writes, and all hosts return once it has finished.

    An adapter among the parameters is merged, one layer at a time. `save_adapter` writes it apart.

    Args:
      path: the directory, created if missing. Weights of an earlier export in it are replaced.
      tokenizer: the tokenizer to save beside the weights, if any.
      dtype: dtype of the weights in the file; default: the parameters' dtype, and float32 for
        merged weights, which would lose much of a small adapter in bfloat16.
      max_file_size: largest size of one safetensors file, in bytes.

    Raises:
      ValueError: the family cannot express the config, or the tokenizer uses tokens that the model
        does not have. Added tokens that it does not use may be missing; see `vocabulary.in_use`.
      OSError: a file cannot be written; the message names it.
    """
    directory = Path(path)
    if tokenizer is not None:
        new = vocabulary.new_tokens(tokenizer, config.vocab_size)
        if vocabulary.in_use(tokenizer, new):
            raise ValueError(
                f"the model has {config.vocab_size:,} tokens and none of {', '.join(new)}; save the"
                " tokenizer that the model was trained with"
            )
    reward_bias = float(params["score"]["bias"]) if config.scalar_head else 0.0
    if config.scalar_head:
        if config.norm == "layer" and reward_bias:
            params, reward_bias = _fold_bias(params), 0.0
        config, params, tokenizer = _with_pad(config, params, tokenizer)
    adapter = params.get("adapter")
    leaves = tensors.flatten({name: tree for name, tree in params.items() if name != "adapter"})
    leaves.pop("score/bias", None)
    wanted = tensors.entries(config, set(leaves))
    own_dtype = leaves["embed/tokens"].dtype if adapter is None else jnp.float32
    file_dtype = jnp.dtype(dtype or own_dtype)
    hf_config = configs.to_hf(config)
    hf_config.dtype = file_dtype.name
    if reward_bias:
        hf_config.reward_bias = reward_bias

    files = huggingface_hub.split_state_dict_into_shards_factory(
        {entry.name: entry for entry in wanted},
        get_storage_size=lambda entry: math.prod(entry.shape) * file_dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_size,
    )
    writer = jax.process_index() == 0
    if writer:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("model*.safetensors.part"):
            stale.unlink()
    for name, names in files.filename_to_tensors.items():
        group = [entry for entry in wanted if entry.name in names]
        content = dict(tensors.file_tensors(group, leaves, config, file_dtype, adapter))
        if writer:
            part = directory / f"{name}.part"
            try:
                save_file(content, part, metadata={"format": "pt"})
            except SafetensorError as error:  # of a full disk, too, and no OSError
                raise OSError(f"{part}: {error}") from error
    if writer:
        _publish(directory, files, config, hf_config, tokenizer, reward_bias)
    hosts.wait_for_all("an export is written")  # not its path: hosts may name it differently


def _publish(
    directory: Path,
    files: huggingface_hub.StateDictSplit,
    config: ModelConfig,
    hf_config: Any,
    tokenizer: Any,
    reward_bias: float,
) -> None:
    """Replaces an earlier export by the new weights, then writes the other files."""
    # An earlier export stays intact up to this line. config.json is deleted first and written
    # last, so a directory that an interruption leaves incomplete does not load.
    for pattern in ("config.json", "generation_config.json", "model*.safetensors", "*.index.json"):
        for stale in directory.glob(pattern):
            stale.unlink()
    for name in files.filename_to_tensors:
        os.replace(directory / f"{name}.part", directory / name)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if not config.scalar_head:
        ids = {key: getattr(hf_config, key) for key in _IDS}
        configs.transformers().GenerationConfig(**ids).save_pretrained(directory)
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)
    (directory / "README.md").write_text(_model_card(config, reward_bias))
    (directory / "config.json").write_text(configs.to_json(hf_config))


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes a tokenizer that versions 4 and 5 of transformers read alike.

    Version 4 has no class TokenizersBackend and no list `extra_special_tokens`. Its classes of
    single families rebuild parts of tokenizer.json: its LlamaTokenizer adds BOS.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    content = read_json(file)
    if tokenizer.is_fast:  # all of it is in tokenizer.json
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        content["model_input_names"] = tokenizer.model_input_names
    content["additional_special_tokens"] = content.pop("extra_special_tokens", [])
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------- config.json


def _read_config(directory: Path, where: str) -> tuple[dict[str, Any], ModelConfig]:
    file = directory / "config.json"
    if not os.path.lexists(file):
        raise FileNotFoundError(f"{where}: no config.json")
    raw = read_json(file)
    _check_family(raw.get("model_type"), str(file))
    checks.check_raw(raw, str(file))
    try:
        auto = configs.transformers().AutoConfig
        hf = auto.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers' checks name the key, not the file
        raise ValueError(f"{file}: {describe(error)}") from error
    _check_family(hf.model_type, str(file))  # transformers may read one family as another
    config = configs.from_hf(hf, str(file))
    architectures = raw.get("architectures") or []
    if any(str(name).endswith("SequenceClassification") for name in architectures):
        if hf.num_labels != 1:
            raise ValueError(f"{file}: num_labels is {hf.num_labels}; a reward model has 1")
        config = dataclasses.replace(config, scalar_head=True)
    generation = directory / "generation_config.json"
    if os.path.lexists(generation):  # lists every token that ends a turn of a chat model
        eos = read_json(generation).get("eos_token_id")
        ids = checks.as_ids(eos, str(generation))
        eos_ids = tuple(dict.fromkeys(config.eos_ids + ids))
        config = dataclasses.replace(config, eos_ids=eos_ids)
    return raw, config


def _check_family(model_type: Any, where: str) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported are {known}"
        )


# ---------------------------------------------------------------------------- reward models


def _fold_bias(params: Params) -> Params:
    """Moves the score's bias into the final LayerNorm's bias: beta += b w / |w|^2."""
    w, b, norm = params["score"]["kernel"], params["score"]["bias"], params["final_norm"]
    square = jnp.vdot(w, w)
    if not square:
        raise ValueError("the score's bias cannot be exported: the score's kernel is all zeros")
    return {**params, "final_norm": {**norm, "bias": norm["bias"] + b * w / square}}


def _with_pad(
    config: ModelConfig, params: Params, tokenizer: Any
) -> tuple[ModelConfig, Params, Any]:
    """Gives a reward model a pad id other than EOS, and the embedding a row for that id."""
    pad, ends = config.pad_id, set(config.eos_ids)
    if tokenizer is not None:
        pad, ends = tokenizer.pad_token_id, ends | {tokenizer.eos_token_id}
    if pad is None or pad in ends:
        pad = config.vocab_size
        if tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            pad = tokenizer.pad_token_id
    if pad >= config.vocab_size:
        table = params["embed"]["tokens"]
        missing = max(0, pad + 1 - table.shape[0])
        table = jnp.pad(table, ((0, missing), (0, 0))).at[config.vocab_size : pad + 1].set(0)
        params = {**params, "embed": {**params["embed"], "tokens": table}}
        config = dataclasses.replace(config, vocab_size=pad + 1)
    return dataclasses.replace(config, pad_id=pad), params, tokenizer


_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [instructjax, rlhf]
---
# A {family} {kind}

Written by instructjax. To load it, with DIR for this directory:

```python
from instructjax import hf

config, params = hf.load(DIR)
tokenizer = hf.load_tokenizer(DIR)
```

In transformers, use `{auto}.from_pretrained(DIR)`.
"""
_REWARD = """
The score of a sequence is read at its EOS: pad on the right with id {pad_id}. Add {bias!r}
(`reward_bias` in config.json) to each score of transformers, whose class has no bias. Rankings do
not depend on the bias.
"""


def _model_card(config: ModelConfig, reward_bias: float) -> str:
    names = ("text-generation", "language model", "AutoModelForCausalLM")
    if config.scalar_head:
        names = ("text-classification", "reward model", "AutoModelForSequenceClassification")
    task, kind, auto = names
    card = _CARD.format(family=config.family, task=task, kind=kind, auto=auto)
    return card + _REWARD.format(pad_id=config.pad_id, bias=reward_bias) * config.scalar_head
