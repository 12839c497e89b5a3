"""Adapters in the files of peft: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from instructjax import hosts, sharding
from instructjax.hf import tensors
from instructjax.hf.checkpoint import save_tokenizer
from instructjax.hf.directory import TEXTS, read_json, resolve
from instructjax.hf.families import FAMILIES
from instructjax.models import ModelConfig, Params, adapter_axes, init_adapter, matrices

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of adapter_config.json that do not change what a trained adapter computes.
_HARMLESS = """
arrow_config auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
exclude_modules fan_in_fan_out inference_mode layers_pattern layers_to_transform lora_alpha
lora_dropout lora_ga_config megatron_config megatron_core peft_type peft_version qalora_group_size
r reward_bias revision target_modules task_type use_rslora
"""
# These begin with A and B that are not from a change of the base's weights. peft's other ways, such
# as pissa, change the weights that the adapter is added to.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


def shares_input(config: ModelConfig) -> bool:
    """Whether q, k and v are one matrix in the family's file, so that they share A."""
    return any("{" in leaf for leaf, _ in FAMILIES[config.family].tensors.values())


def adapter_base(path: str | os.PathLike) -> str:
    """The model that an adapter changes, as its adapter_config.json names it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it names no model.
    """
    file = resolve(path, TEXTS) / CONFIG
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path names no model")
    return base


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a directory or a name on the hub holds an adapter, and no whole model.

    Errors: as for `load`.
    """
    directory = resolve(path, TEXTS)
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def describe_adapter(path: str | os.PathLike, config: ModelConfig) -> tuple[ModelConfig, int]:
    """(the config that `load_adapter` returns, the rank) of an adapter, without its weights.

    Arguments and errors: as for `load_adapter`.
    """
    directory = resolve(path, TEXTS)
    raw = read_json(directory / CONFIG)
    rank, scale = _checked(raw, str(directory / CONFIG))
    scalar_head = config.scalar_head or raw.get("task_type") == "SEQ_CLS"
    return dataclasses.replace(config, adapter_scale=scale, scalar_head=scalar_head), rank


def load_adapter(
    path: str | os.PathLike, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Loads what peft or `save_adapter` wrote onto a mesh.

    Args:
      path: a directory, or a name on the hub.
      config: of the model that the adapter changes.
      mesh: the mesh that holds the adapter; default: the first device alone.

    Returns:
      (the config with the adapter's scale and, if there is a scalar head, with `scalar_head`;
      {"adapter"} or {"adapter", "score"} in float32, to be put over the base's parameters)

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a key of the config is not implemented, or tensors are missing, unused, of the
        wrong shape or not finite; the message lists them.
    """
    directory, where = resolve(path, [*TEXTS, WEIGHTS]), str(path)
    if not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(f"{where}: no {WEIGHTS}")
    file = directory / CONFIG
    raw = read_json(file)
    rank, scale = _checked(raw, str(file))
    arrays = tensors.open_files([directory / WEIGHTS])
    shared = shares_input(config)
    build = functools.partial(init_adapter, config, rank=rank, shared=shared)
    shapes: Params = {
        "adapter": jax.eval_shape(
            lambda key: build(key, targets=matrices(config)), jax.random.key(0)
        )
    }
    shapes["score"] = {"kernel": jax.ShapeDtypeStruct((config.width,), jnp.float32)}
    every = tensors.adapter_entries(config, set(tensors.flatten(shapes)), rank)
    # A matrix is adapted if its first layer is; then those of all layers must be there.
    first = {entry.name for entry in every if entry.layer in (0, None)} & set(arrays)
    present = {leaf for entry in every if entry.name in first for leaf in entry.leaves}
    wanted = [entry for entry in every if present.issuperset(entry.leaves)]
    arrays = tensors.check_shapes(
        arrays, wanted, set(arrays) - {entry.name for entry in wanted}, where
    )
    if not any(leaf.startswith("adapter/") for leaf in present):
        raise ValueError(f"{where}: {WEIGHTS} adapts no matrix of a layer")

    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    axes = {"adapter": adapter_axes(shapes["adapter"]), "score": {"kernel": ("norm",)}}
    layouts = tensors.flatten(sharding.shardings(axes, shapes, mesh))
    params: Params = {}
    for leaf, like in tensors.flatten(shapes).items():
        if leaf in present:
            read = tensors.reader(leaf, like.shape, np.float32, wanted, arrays, config, where)
            array = jax.make_array_from_callback(like.shape, layouts[leaf], read)
            *modules, name = leaf.split("/")
            tree = functools.reduce(
                lambda tree, module: tree.setdefault(module, {}), modules, params
            )
            tree[name] = array
    if "score" in params:
        bias = jnp.float32(raw.get("reward_bias", 0.0))
        params["score"]["bias"] = sharding.put(bias, sharding.replicated(mesh))
    scalar_head = config.scalar_head or "score" in params
    return dataclasses.replace(config, adapter_scale=scale, scalar_head=scalar_head), params


def _checked(raw: dict[str, Any], where: str) -> tuple[int, float]:
    """(rank, scale) of an adapter_config.json; raises ValueError for what is not implemented."""

    def refuse(key: str):
        raise ValueError(f"{where}: {key} = {raw.get(key)!r} is not implemented")

    if raw.get("peft_type") != "LORA":
        refuse("peft_type")
    for key, value in raw.items():
        if key == "init_lora_weights":
            if value not in _INITS:
                refuse(key)
        elif key == "bias":
            if value != "none":
                refuse(key)
        elif key == "modules_to_save":  # peft names both of its heads for reward models
            if not set(value or ()) <= {"score", "classifier"}:
                refuse(key)
        elif (
            value and key not in _HARMLESS.split()
        ):  # what is not asked for is false, empty or null
            refuse(key)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: r = {rank!r} is no rank")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{where}: lora_alpha = {alpha!r} is no number")
    return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def save_adapter(
    path: str | os.PathLike, config: ModelConfig, params: Params, base: str, tokenizer: Any = None
) -> None:
    """Writes an adapter, and a scalar head if there is one, as peft does.

    peft reads them with the model `base`. A scalar head is among its `modules_to_save`, whose
    classes have no bias: it is `reward_bias` in adapter_config.json, which peft ignores. On several
    hosts every host must call this; host 0 writes.

    Args:
      path: the directory, created if missing.
      params: with "adapter", and "score" or not; of the rest nothing is read.
      base: the directory or hub name of the model that the adapter changes.
      tokenizer: the tokenizer to save beside the adapter, if any.

    Raises:
      OSError: a file cannot be written; the message names it.
    """
    trained = {name: params[name] for name in ("adapter", "score") if name in params}
    leaves = tensors.flatten(trained)
    rank = next(leaf.shape[-1] for name, leaf in leaves.items() if name.endswith("/a"))
    bias = leaves.pop("score/bias", None)
    wanted = tensors.adapter_entries(config, set(leaves), rank)
    content = dict(tensors.file_tensors(wanted, leaves, config, np.float32))
    if jax.process_index() == 0:
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)  # written last: without it nothing loads
        try:
            save_file(content, directory / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, too, and no OSError
            raise OSError(f"{directory / WEIGHTS}: {error}") from error
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
        described = _described(config, content, rank, base)
        if bias is not None:
            described["reward_bias"] = float(bias)
        (directory / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    hosts.wait_for_all("an adapter is written")  # not its path: hosts may name it differently


def _described(config: ModelConfig, content: Any, rank: int, base: str) -> dict[str, Any]:
    """adapter_config.json of tensors by peft's names."""
    layer = tensors.PEFT_PREFIX + FAMILIES[config.family].prefix
    modules = {
        name.removeprefix(layer).rpartition(".lora_")[0].split(".", 2)[2]
        for name in content
        if ".lora_" in name
    }
    alpha = config.adapter_scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.scalar_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),  # with the names above them: gpt2 has two c_proj
        "bias": "none",
        "fan_in_fan_out": tensors.inputs_first(config),
        "modules_to_save": ["score"] if config.scalar_head else None,
        "inference_mode": True,
    }
