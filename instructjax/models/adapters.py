"""LoRA: low-rank adapters of a layer's matrices (Hu et al. 2021, arXiv 2106.09685).

    params["adapter"] = {
        "attention": {"query": {"a": [L, D, J], "b": [L, J, N, H]}, "key": {...}, ...},
        "mlp": {"up": {"a": [L, D, J], "b": [L, J, F]}, ...},
    }

A matrix W with an adapter computes x W + scale (x A) B, with the scale in `ModelConfig`. The tree
is beside `params["layers"]` and is scanned with it. It may lack any matrix. Some families have
one matrix for q, k and v in their files. As in peft, these three then share A, which is at
`attention/a`.

In a model with an adapter, only the adapter and a scalar head are trained; see `split`.
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from instructjax.models.config import ModelConfig
from instructjax.models.layer import AXES, LINEARS, Params, axis_size, low_rank

_TRAINED = ("adapter", "score", "value_head")
QKV = ("attention/query", "attention/key", "attention/value")


def matrices(config: ModelConfig) -> tuple[str, ...]:
    """The paths of a layer's matrices, such as `attention/query`."""
    return tuple(path for path in LINEARS if config.gated or path != "mlp/gate")


def _axes(path: str) -> str:
    """The letters of an adapter's leaf, such as `LDJ` of `attention/query/a`."""
    matrix, _, leaf = path.rpartition("/")
    down, up = low_rank(LINEARS[QKV[0] if matrix == "attention" else matrix])
    return "L" + (down if leaf == "a" else up).split(",")[1].split("->")[0]


def init_adapter(
    config: ModelConfig, key: jax.Array, rank: int, targets: Collection[str], shared: bool
) -> Params:
    """A new adapter in float32, which changes nothing: B is zero, and A as in peft.

    A is uniform within +- 1 / sqrt(size of the input). On a mesh, jit this with out_shardings.

    Args:
      targets: paths of matrices, from `matrices`.
      shared: whether q, k and v share A; then all or none of them are among the targets.
    """
    leaves = []
    for path in LINEARS:
        if path in targets:
            leaves += [f"{path}/b"] if shared and path in QKV else [f"{path}/a", f"{path}/b"]
    if shared and QKV[0] in targets:
        leaves.append("attention/a")
    adapter: Params = {}
    for path, leaf_key in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        shape = [rank if x == "J" else axis_size(config, x) for x in _axes(path)]
        *modules, name = path.split("/")
        tree = adapter
        for module in modules:
            tree = tree.setdefault(module, {})
        tree[name] = jnp.zeros(shape)
        if name == "a":
            bound = math.prod(shape[1:-1]) ** -0.5
            tree[name] = jax.random.uniform(leaf_key, shape, minval=-bound, maxval=bound)
    return adapter


def adapter_axes(adapter: Params) -> Params:
    """A tuple of logical axis names in place of each leaf; see `layer.logical_axes`."""

    def axes(path: Any, leaf: Any) -> tuple[str, ...]:
        letters = _axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        return ("layers", *(AXES[letter] for letter in letters[1:]))

    return jax.tree_util.tree_map_with_path(axes, adapter)


def add_product(kernel: jax.Array, adapter: Params, path: str, scale: float) -> jax.Array:
    """W + scale A B in float32, of one layer; W as it is where it has no adapter.

    Args:
      kernel: W.
      adapter: of the layer.
      path: of the matrix.
    """
    group, name = path.split("/")
    part = adapter.get(group, {})
    if name not in part:
        return kernel
    a, b = part[name].get("a", part.get("a")), part[name]["b"]
    return kernel.astype(jnp.float32) + scale * jnp.tensordot(a, b, 1)


def merge(params: Params, config: ModelConfig) -> Params:
    """The parameters with W + scale A B in place of each W, and without the adapter.

    A sum is rounded once, to its matrix's dtype. Parameters without an adapter stay as they are.

    Args:
      params: stacked, or from `unstack`.
    """
    if "adapter" not in params:
        return params

    def merge_layer(layer_and_adapter: tuple[Params, Params]) -> Params:
        layer, adapter = layer_and_adapter
        merged = {name: dict(part) for name, part in layer.items()}
        for path in LINEARS:
            group, name = path.split("/")
            if name in layer[group]:
                kernel = layer[group][name]["kernel"]
                total = add_product(kernel, adapter, path, config.adapter_scale)
                merged[group][name] = {**layer[group][name], "kernel": total.astype(kernel.dtype)}
        return merged

    kept = {name: tree for name, tree in params.items() if name != "adapter"}
    both = params["layers"], params["adapter"]
    if isinstance(params["layers"], list):
        return kept | {"layers": [merge_layer(pair) for pair in zip(*both, strict=True)]}
    return kept | {"layers": jax.lax.map(merge_layer, both)}  # one layer's sums in float32 at once


def split(params: Params) -> tuple[Params, Params]:
    """(what is trained, what is frozen), of which `whole` makes the parameters again.

    With an adapter, it and a scalar head are trained. Without one all parameters are, and what is
    frozen is {}.
    """
    if "adapter" not in params:
        return params, {}
    trained = {name: tree for name, tree in params.items() if name in _TRAINED}
    return trained, {name: tree for name, tree in params.items() if name not in _TRAINED}


def whole(trained: Any, frozen: Params) -> Any:
    """All parameters, from the two parts that `split` gives."""
    return {**frozen, **trained} if frozen else trained
