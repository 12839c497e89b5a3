"""The tensors of a checkpoint: lists them, reads them shard by shard, writes them."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import einops
import jax
import ml_dtypes
import numpy as np
import safetensors

from instructjax import sharding
from instructjax.hf.directory import printable
from instructjax.hf.families import FAMILIES
from instructjax.models.adapters import add_product
from instructjax.models.config import ModelConfig
from instructjax.models.layer import LINEARS, Params

PEFT_PREFIX = "base_model.model."
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the parameter leaves that it holds."""

    name: str
    leaves: tuple[str, ...]  # paths in the parameter tree; more than one are stacked in the file
    pattern: str  # einops, file -> leaf; the leaf's side begins with `x` where leaves are stacked
    layer: int | None  # index along the first axis of a leaf that holds all layers
    shape: tuple[int, ...]  # in the file
    rank: int = 0  # of an adapter


def entries(config: ModelConfig, present: set[str]) -> list[Entry]:
    """Lists the tensors of a checkpoint of this config. Each leaf is in exactly one entry.

    Args:
      present: paths of all leaves of the parameters.

    Raises:
      ValueError: the family's table has no tensor for a leaf; the message lists such leaves.
    """
    family = FAMILIES[config.family]
    table = {family.prefix + name: row for name, row in family.tensors.items()}
    table[family.head] = ("unembed/kernel", "v d -> v d")
    table["score.weight"] = ("score/kernel", "1 d -> d")
    table["score.bias"] = ("score/bias", " -> ")
    listed: list[Entry] = []
    for template, (target, pattern) in table.items():
        stacked = "{}" in template
        leaves = _expand(f"layers/{target}" if stacked else target)
        if not present.issuperset(leaves):
            continue  # a bias or norm that this config turns off
        shape = _file_shape(pattern, config, len(leaves))
        for layer in range(config.layers) if stacked else [None]:
            listed.append(Entry(template.format(layer), leaves, pattern, layer, shape))
    missing = present - {leaf for entry in listed for leaf in entry.leaves}
    if missing:
        raise ValueError(f"{config.family} has no tensor for {', '.join(sorted(missing))}")
    return listed


def _expand(target: str) -> tuple[str, ...]:
    """`a/{b,c}/d` -> (`a/b/d`, `a/c/d`)"""
    braces = re.search(r"\{(.*)\}", target)
    if braces is None:
        return (target,)
    return tuple(target.replace(braces[0], choice) for choice in braces[1].split(","))


def _sizes(pattern: str, config: ModelConfig, stacked: int, rank: int = 0) -> dict[str, int]:
    c = config
    sizes = dict(v=c.vocab_size, p=c.max_length + c.position_offset, d=c.width, n=c.heads)
    sizes |= dict(g=c.kv_heads, h=c.head_dim, f=c.mlp_width, x=stacked, j=rank)
    return {axis: size for axis, size in sizes.items() if axis in pattern}


def _file_shape(pattern: str, config: ModelConfig, stacked: int, rank: int = 0) -> tuple[int, ...]:
    sizes = {**_sizes(pattern, config, stacked, rank), "1": 1}
    groups = re.findall(r"\(.*?\)|\w", pattern.split(" -> ")[0])
    return tuple(math.prod(sizes[axis] for axis in re.findall(r"\w", group)) for group in groups)


def adapter_entries(config: ModelConfig, present: set[str], rank: int) -> list[Entry]:
    """Lists the tensors of an adapter of this config, by peft's names.

    Of each matrix that is adapted there are A [rank, inputs] and B [outputs, rank]. Where a file's
    matrix holds q, k and v, so does B, and A is theirs together: the leaf `adapter/attention/a`.

    Args:
      present: paths of all leaves: of the adapter, and of a scalar head.
    """
    family = FAMILIES[config.family]
    listed: list[Entry] = []
    for template, (target, pattern) in family.tensors.items():
        if not target.endswith("/kernel"):
            continue
        paths = _expand(target.removesuffix("/kernel"))
        holder = paths[0] if len(paths) == 1 else paths[0].rpartition("/")[0]
        _, kernel, result = LINEARS[paths[0]].replace("->", ",").split(",")
        file_axes, leaf_axes = pattern.split(" -> ")
        x = "x " if leaf_axes.startswith("x ") else ""
        # The pattern may have n where the kernel has G, in a family without shared KV heads.
        axes = list(zip(leaf_axes.removeprefix(x).split(), kernel, strict=True))
        inner = [axis for axis, letter in axes if letter not in result]
        outer = [axis for axis, letter in axes if letter in result]
        groups = re.findall(r"\(.*?\)|\w", file_axes)
        of_inputs, of_outputs = sorted(groups, key=lambda group: not set(inner) & set(group))
        rows = {
            "lora_A": ((f"{holder}/a",), f"j {of_inputs} -> {' '.join(inner)} j"),
            "lora_B": (
                tuple(f"{path}/b" for path in paths),
                f"{of_outputs} j -> {x}j {' '.join(outer)}",
            ),
        }
        for part, (leaves, of_part) in rows.items():
            leaves = tuple(f"adapter/{leaf}" for leaf in leaves)
            if not present.issuperset(leaves):
                continue
            shape = _file_shape(of_part, config, len(leaves), rank)
            for layer in range(config.layers):
                name = template.format(layer).removesuffix("weight") + part
                name = f"{PEFT_PREFIX}{family.prefix}{name}.weight"
                listed.append(Entry(name, leaves, of_part, layer, shape, rank))
    if "score/kernel" in present:
        pattern = "1 d -> d"
        shape = _file_shape(pattern, config, 1)
        listed.append(Entry(f"{PEFT_PREFIX}score.weight", ("score/kernel",), pattern, None, shape))
    return listed


def inputs_first(config: ModelConfig) -> bool:
    """Whether the family's file holds [inputs, outputs], as torch's linear layers do not."""
    rows = FAMILIES[config.family].tensors.values()
    return next(pattern for leaf, pattern in rows if leaf == "mlp/up/kernel").startswith("d")


# ---------------------------------------------------------------------------- reading


def open_files(files: list[Path]) -> dict[str, np.ndarray]:
    """Opens every tensor of some safetensors files as a memory map, without reading it.

    The library's own slices cannot be bfloat16 NumPy arrays, and its jax slices are copied to a
    device. A memory map gives strided views of any dtype, so a shard reads only its own bytes.

    Raises:
      ValueError: a file is damaged, a dtype is not supported, or two files hold the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy"):
                pass  # opening makes the library check the header: sizes, overlaps, order
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file: {error}") from error
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size), object_pairs_hook=_without_twins(file))
        header.pop("__metadata__", None)
        for name, info in header.items():
            if name in tensors:
                raise ValueError(f"{name} is in two files: {file_of[name]} and {file}")
            dtype = _DTYPES.get(info["dtype"])
            if dtype is None and not info["dtype"].startswith(("BOOL", "U8", "I")):
                raise ValueError(f"{file}: {name} has dtype {info['dtype']}, not {list(_DTYPES)}")
            offset = 8 + size + info["data_offsets"][0]
            shape = tuple(info["shape"])
            # Integers and booleans are buffers (causal masks), or `check_names` refuses them.
            if dtype is None:
                tensors[name] = np.broadcast_to(np.uint8(0), shape)
            elif math.prod(shape) == 0:  # has no bytes to map
                tensors[name] = np.empty(shape, dtype)
            else:
                tensors[name] = np.memmap(file, dtype, "r", offset, shape)
            file_of[name] = file
    return tensors


def _without_twins(file: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A JSON hook that raises ValueError where an object has one key twice."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f"{file}: the header names {key} {count} times")
        return dict(pairs)

    return to_dict


def check_names(
    tensors: dict[str, np.ndarray], config: ModelConfig, wanted: list[Entry], where: str
) -> dict[str, np.ndarray]:
    """Checks every name and shape, and returns the wanted tensors by their full names.

    Raises:
      ValueError: tensors are missing, unused, of another shape or of integers; the message lists
        their names.
    """
    family = FAMILIES[config.family]
    heads = (family.head, "score.weight", "score.bias")
    # A checkpoint of the base model alone lacks the first part of the prefix.
    root = family.prefix.split(".")[0] + "."
    if not any(name.startswith(root) for name in tensors):
        tensors = {n if n in heads else root + n: t for n, t in tensors.items()}
    buffers = re.compile(family.buffers)
    names = {entry.name for entry in wanted}
    unused = {n for n in set(tensors) - names if not buffers.fullmatch(n)}
    if config.tied and family.head in unused:
        embedding = family.prefix + next(iter(family.tensors))
        if not np.array_equal(tensors[family.head], tensors[embedding]):
            raise ValueError(
                f"{where}: tie_word_embeddings is true, but {family.head} is not {embedding}"
            )
        unused.remove(family.head)
    return check_shapes(tensors, wanted, unused, where)


def check_shapes(
    tensors: dict[str, np.ndarray], wanted: list[Entry], unused: Collection[str], where: str
) -> dict[str, np.ndarray]:
    """The last part of `check_names`, with the same errors."""
    names = {entry.name for entry in wanted}
    missing = sorted(names - set(tensors))
    if missing:
        raise ValueError(f"{where}: missing {_listing(missing)}")
    if unused:
        raise ValueError(f"{where}: unused {_listing(sorted(unused))}")
    wrong = [
        f"{entry.name} is {list(tensors[entry.name].shape)}, not {list(entry.shape)}"
        for entry in wanted
        if tensors[entry.name].shape != entry.shape
    ]
    wrong += [
        f"{entry.name} holds integers or booleans, not one of {list(_DTYPES)}"
        for entry in wanted
        if tensors[entry.name].dtype == np.uint8
    ]
    if wrong:
        raise ValueError(f"{where}: {_listing(wrong, '; ')}")
    return {name: tensors[name] for name in names}


def _listing(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(map(printable, items[:20]))
    return shown + (f"{separator}and {len(items) - 20} more" if len(items) > 20 else "")


def reader(
    leaf: str,
    shape: tuple[int, ...],
    dtype: Any,
    wanted: list[Entry],
    tensors: dict[str, np.ndarray],
    config: ModelConfig,
    where: str,
) -> Callable[[Any], np.ndarray]:
    """A function that reads any block of one leaf, for `jax.make_array_from_callback`.

    Rows of the padded vocabulary have no tensor and are 0. The function raises ValueError, with
    the name of the tensor and a count, for values that are not finite in `dtype`.
    """
    views: list[tuple[str, np.ndarray]] = []
    for entry in wanted:  # layers in order
        if leaf in entry.leaves:
            sizes = _sizes(entry.pattern, config, len(entry.leaves), entry.rank)
            # The patterns only split and transpose, so this is a view of the file.
            view = einops.rearrange(tensors[entry.name], entry.pattern, **sizes)
            view = view[entry.leaves.index(leaf)] if "x" in sizes else view
            views.append((entry.name, view))
    stacked = leaf.startswith(("layers/", "adapter/"))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        lengths = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        block = np.zeros(lengths, dtype)
        rows = zip(block, views[index[0]], strict=True) if stacked else [(block, views[0])]
        for row, (name, view) in rows:
            part = view[index[1:] if stacked else index]
            with np.errstate(over="ignore"):  # reported below
                row[tuple(slice(n) for n in part.shape)] = part
            finite = np.isfinite(row)
            if not finite.all():
                count = finite.size - np.count_nonzero(finite)
                raise ValueError(
                    f"{where}: {name} has {count:,} values that are NaN or infinite in"
                    f" {np.dtype(dtype).name}, of {finite.size:,}"
                )
        return block

    return read


# ---------------------------------------------------------------------------- writing


def file_tensors(
    wanted: list[Entry],
    leaves: dict[str, jax.Array],
    config: ModelConfig,
    dtype: Any,
    adapter: Params | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor in the file's shape) of each entry, fetching one layer at a time.

    Args:
      adapter: merged into the layers' matrices.
    """
    for entry in wanted:
        parts = []
        for leaf in entry.leaves:
            part = leaves[leaf]
            if entry.layer is not None:
                part = _layer(part, entry.layer)
            if adapter is not None and leaf.endswith("/kernel") and entry.layer is not None:
                path = leaf.removeprefix("layers/").removesuffix("/kernel")
                of_layer = jax.tree.map(lambda x, i=entry.layer: _layer(x, i), adapter)
                part = _add_product(part, of_layer, path, config.adapter_scale)
            part = sharding.fetch(part)
            parts.append(part[: config.vocab_size] if entry.pattern.startswith("v ") else part)
        file_axes, leaf_axes = entry.pattern.split(" -> ")
        whole = np.stack(parts) if leaf_axes.startswith("x ") else parts[0]
        sizes = _sizes(entry.pattern, config, len(entry.leaves), entry.rank)
        tensor = einops.rearrange(whole, f"{leaf_axes} -> {file_axes}", **sizes)
        yield entry.name, np.ascontiguousarray(tensor.astype(dtype))


@jax.jit
def _layer(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


_add_product = jax.jit(add_product, static_argnums=(2, 3))


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by their path, such as `layers/attention/query/kernel`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}
