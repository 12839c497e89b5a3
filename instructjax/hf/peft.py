"""Adapters in the files of peft: adapter_config.json and adapter_model.safetensors.

A third file, adapter_base.json, holds a fingerprint of the base's weights. The fingerprint is not
in adapter_config.json, because peft warns of unknown keys, and before 0.14 refused them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from instructjax import hosts, sharding
from instructjax.hf import tensors
from instructjax.hf.checkpoint import save_tokenizer
from instructjax.hf.directory import (
    TEXTS,
    check_tokenizer,
    hub_name,
    read_json,
    resolve,
    weight_files,
)
from instructjax.hf.directory import WEIGHTS as MODEL_WEIGHTS
from instructjax.hf.families import FAMILIES
from instructjax.models import ModelConfig, Params, adapter_axes, init_adapter, matrices

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
_PLACES, _RUN = 16, 64  # of a fingerprint: places in each tensor, and values from each place on
# Keys of adapter_config.json that are read, or do not change what a trained adapter computes.
_KNOWN = """
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


class Adapter(NamedTuple):
    """What an adapter's files say, besides the values of its weights."""

    config: ModelConfig  # with the adapter's scale and, if there is a scalar head, `scalar_head`
    rank: int
    targets: tuple[str, ...]  # the paths of the matrices that it changes


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a directory or a name on the hub holds an adapter, and no whole model.

    Errors: as for `load`.
    """
    directory = resolve(path, TEXTS)
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def adapter_base(path: str | os.PathLike) -> str:
    """The model that an adapter changes: a directory, or a name on the hub.

    A run directory in adapter_config.json stands for its export/.

    Raises:
      FileNotFoundError: there is no adapter_config.json.
      ValueError: it names no model.
    """
    directory = resolve(path, TEXTS)
    base = read_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{directory / CONFIG}: base_model_name_or_path names no model")
    local = Path(os.path.expanduser(base))
    if (local / "export" / "config.json").is_file():
        return str(local / "export")
    # `save_adapter` gets absolute paths and names on the hub. Such a name is not one of a folder
    # here, even if its first part is: the fingerprint tells whether the hub has the right weights.
    ours = (directory / BASE).is_file()
    relative = not (local.is_absolute() or local.exists() or base.startswith("."))
    return f"hf:{base}" if ours and relative and hub_name(base) is None else base


def check_base(path: str | os.PathLike, base: str) -> None:
    """Compares an adapter's base with the fingerprint that `save_adapter` recorded, if it did.

    Args:
      path: of the adapter.
      base: directory or hub name of the weights that it is going to be put on.

    Raises:
      ValueError: these are other weights than those that it was trained on.
    """
    file = resolve(path, TEXTS) / BASE
    if not file.is_file():
        return
    trained_on, found = read_json(file).get("fingerprint"), fingerprint(base)
    if trained_on != found:
        raise ValueError(
            f"{path}: this adapter was trained on weights with the fingerprint {trained_on}, and"
            f" its base {base} now has {found}: these are other weights"
        )


def fingerprint(path: str | os.PathLike) -> str:
    """Tells the weights of a model, or of an adapter and its base, from others.

    It is a hash over the name, dtype and shape of each tensor and some of its values, up to 16
    times 64. So it reads little, does not depend on how tensors are spread over files, and any
    training changes it. A few values that are changed by hand may escape it.

    Returns:
      16 hexadecimal digits.

    Errors: as for `load`.
    """
    directory, digest = resolve(path, [*TEXTS, *MODEL_WEIGHTS, WEIGHTS]), hashlib.sha256()
    if is_adapter(path):
        digest.update(fingerprint(adapter_base(path)).encode())
        arrays = tensors.open_files([directory / WEIGHTS])
    else:
        arrays = tensors.open_files(weight_files(directory, str(path)))
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        values = array.reshape(-1)
        last = max(0, values.size - _RUN)
        for place in range(_PLACES):
            start = last * place // (_PLACES - 1)
            digest.update(values[start : start + _RUN].tobytes())
    return digest.hexdigest()[:16]


def with_tokenizer(path: str) -> str:
    """The directory or hub name itself, or an adapter's base if it has no tokenizer of its own."""
    if not is_adapter(path):
        return path
    try:
        check_tokenizer(path)
    except ValueError:
        return adapter_base(path)
    return path


def describe_adapter(path: str | os.PathLike, config: ModelConfig) -> Adapter:
    """Reads an adapter's config, and the names and shapes of its tensors.

    Arguments and errors: as for `load_adapter`, but for values that are not finite.
    """
    return _open(path, config)[0]


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
      ValueError: a key of the config is not implemented, it is a reward model without a head, or
        tensors are missing, unused, of the wrong shape or not finite; the message lists them.
    """
    described, raw, wanted, arrays = _open(path, config)
    shapes = _shapes(config, described.rank)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    axes = {"adapter": adapter_axes(shapes["adapter"]), "score": {"kernel": ("norm",)}}
    layouts = tensors.flatten(sharding.shardings(axes, shapes, mesh))
    present = {leaf for entry in wanted for leaf in entry.leaves}
    params: Params = {}
    for leaf, like in tensors.flatten(shapes).items():
        if leaf in present:
            read = tensors.reader(leaf, like.shape, np.float32, wanted, arrays, config, str(path))
            array = jax.make_array_from_callback(like.shape, layouts[leaf], read)
            *modules, name = leaf.split("/")
            tree = functools.reduce(
                lambda tree, module: tree.setdefault(module, {}), modules, params
            )
            tree[name] = array
    if "score" in params:
        bias = jnp.float32(raw.get("reward_bias", 0.0))
        params["score"]["bias"] = sharding.put(bias, sharding.replicated(mesh))
    return described.config, params


def _shapes(config: ModelConfig, rank: int) -> Params:
    """ShapeDtypeStructs of an adapter of all matrices, and of a scalar head."""
    build = functools.partial(init_adapter, config, rank=rank, shared=shares_input(config))
    adapter = jax.eval_shape(lambda key: build(key, targets=matrices(config)), jax.random.key(0))
    score = {"kernel": jax.ShapeDtypeStruct((config.width,), jnp.float32)}
    return {"adapter": adapter, "score": score}


def _open(
    path: str | os.PathLike, config: ModelConfig
) -> tuple[Adapter, dict[str, Any], list[tensors.Entry], dict[str, np.ndarray]]:
    """(what the files say, adapter_config.json, the tensors that are there, their memory maps)."""
    directory, where = resolve(path, [*TEXTS, WEIGHTS]), str(path)
    raw = read_json(directory / CONFIG)
    rank, scale = _checked(raw, str(directory / CONFIG))
    if not (directory / WEIGHTS).is_file():
        raise FileNotFoundError(f"{where}: no {WEIGHTS}")
    arrays = tensors.open_files([directory / WEIGHTS])
    every = tensors.adapter_entries(config, set(tensors.flatten(_shapes(config, rank))), rank)
    # A matrix is adapted if its first layer is; then those of all layers must be there.
    first = {entry.name for entry in every if entry.layer in (0, None)} & set(arrays)
    present = {leaf for entry in every if entry.name in first for leaf in entry.leaves}
    wanted = [entry for entry in every if present.issuperset(entry.leaves)]
    arrays = tensors.check_shapes(
        arrays, wanted, set(arrays) - {entry.name for entry in wanted}, where
    )
    targets = tuple(path for path in matrices(config) if f"adapter/{path}/b" in present)
    if not targets:
        raise ValueError(f"{where}: {WEIGHTS} adapts no matrix of a layer")
    scalar_head = config.scalar_head or "score/kernel" in present
    if raw.get("task_type") == "SEQ_CLS" and not scalar_head:
        raise ValueError(
            f"{where}: task_type is SEQ_CLS, as of a reward model, and {WEIGHTS} has no"
            f" {tensors.PEFT_PREFIX}score.weight"
        )
    described = dataclasses.replace(config, adapter_scale=scale, scalar_head=scalar_head)
    return Adapter(described, rank, targets), raw, wanted, arrays


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
        # A way that is not asked for is false, empty or null.
        elif value and key not in _KNOWN.split():
            refuse(key)
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: r = {rank!r} is no rank")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{where}: lora_alpha = {alpha!r} is no number")
    return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def save_adapter(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    base: str,
    tokenizer: Any = None,
    *,
    fingerprint: str | None = None,
) -> None:
    """Writes an adapter, and a scalar head if there is one, as peft does.

    peft reads them with the model `base`. A scalar head is among its `modules_to_save`, whose
    classes have no bias: it is `reward_bias` in adapter_config.json, which peft ignores. On several
    hosts every host must call this; host 0 writes.

    Args:
      path: the directory, created if missing.
      params: with "adapter", and "score" or not; of the rest nothing is read.
      base: the model that the adapter changes: an absolute path, or a name on the hub. The `hf:`
        before a name is left out in the file, since peft does not know it.
      tokenizer: the tokenizer to save beside the adapter, if any.
      fingerprint: of the base's weights, for `check_base`.

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
        # adapter_config.json is written last: without it nothing loads.
        (directory / CONFIG).unlink(missing_ok=True)
        (directory / BASE).unlink(missing_ok=True)
        try:
            save_file(content, directory / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, too, and no OSError
            raise OSError(f"{directory / WEIGHTS}: {error}") from error
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)
        if fingerprint is not None:
            (directory / BASE).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
        described = _described(config, content, rank, base.removeprefix("hf:"))
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
