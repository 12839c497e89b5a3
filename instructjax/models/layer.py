"""One transformer layer in linen, and the parameters of a whole decoder as plain nested dicts.

    params = {
        "embed": {"tokens": [V, D], "positions": [S, D]?},
        "layers": {"attention": {...}, "mlp": {...}, ...},   every leaf stacked: [L, ...]
        "final_norm": {"scale": [D], "bias": [D]?},
        "unembed": {"kernel": [V, D]}?              absent where tied
        "score": {"kernel": [D], "bias": []}?       instead, in a reward or value model
        "adapter": {"attention": {...}, ...}?       see adapters.py; stacked likewise
    }

Each parameter is declared with the logical names of its axes, which `sharding.py` maps to a mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from instructjax.models.attention import rotate, rotation
from instructjax.models.config import ModelConfig

Params = dict[str, Any]
At = jax.Array | slice | None  # columns of [B, T]: int32 [B, S]; the same in each row; or all


class Shard(Protocol):
    """Where activations lie: `unsharded` on one device, `sharding.Constrainer` on a mesh."""

    @property
    def fused(self) -> bool: ...  # whether the devices run the attention kernel of fused.py

    @property
    def batch(self) -> int: ...  # parts into which the rows of a batch are split

    @property
    def sequence(self) -> int: ...  # parts into which the sequence is split between sublayers

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Lays out x by the logical names of its axes."""
        ...

    def by_head(self, attend, q_BNTH, k_BGTH, v_BGTH, places_B3T, window, /) -> jax.Array:
        """attend(q, k, v, places, window), which computes each row and head alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """The `Shard` of a program on one device: leaves activations as they are."""

    fused: bool = False
    batch: int = 1
    sequence: int = 1

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return x

    def by_head(self, attend, *arguments: Any) -> jax.Array:
        return attend(*arguments)


unsharded = Unsharded()

_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _named(initializer: Callable, *axes: str) -> Any:
    """The initializer, with the logical names of the axes on its result."""
    return nn.with_logical_partitioning(initializer, axes)


def _normal(std: float, *axes: str) -> Any:
    return _named(nn.initializers.normal(std), *axes)


def _residual_std(config: ModelConfig) -> float:
    """GPT-2's scheme for weights that add to the residual stream, which so keeps its scale."""
    return 0.02 / (2 * config.layers) ** 0.5


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis, in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, size = self.config, x.shape[-1]
        along = (1,) * (x.ndim - 1) + (size,)
        identity = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        scale: Any = self.param("scale", _named(identity, "norm"), (size,))
        y = x.astype(jnp.float32)
        if c.norm == "layer":
            y -= jnp.mean(y, -1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + c.norm_eps)
        y *= (scale + 1 if c.norm_offset else scale).reshape(along)
        if c.norm == "layer":
            bias: Any = self.param("bias", _named(nn.initializers.zeros, "norm"), (size,))
            y += bias.reshape(along)
        return y.astype(c.dtype)


# The logical names of the axis alphabet's letters.
AXES = {"D": "width", "N": "heads", "G": "kv_heads", "H": "head_dim", "F": "mlp", "J": "rank"}

# The matrices of a layer: einsum(equation, x, kernel).
LINEARS = {
    "attention/query": "BTD,DNH->BNTH",
    "attention/key": "BTD,DGH->BGTH",
    "attention/value": "BTD,DGH->BGTH",
    "attention/out": "BNTH,NHD->BTD",
    "mlp/up": "BTD,DF->BTF",
    "mlp/gate": "BTD,DF->BTF",
    "mlp/down": "BTF,FD->BTD",
}
LINEAR_OUTPUT = "linear output"  # its name for a policy of jax.checkpoint


def axis_size(c: ModelConfig, letter: str) -> int:
    """The size of an axis of the layers' matrices, by its letter."""
    sizes = {"L": c.layers, "D": c.width, "N": c.heads, "G": c.kv_heads}
    return (sizes | {"H": c.head_dim, "F": c.mlp_width})[letter]


def low_rank(equation: str) -> tuple[str, str]:
    """The equations of x -> x A and of x A -> (x A) B, for the matrix A B in a matrix's place.

    "BTD,DNH->BNTH"  ->  "BTD,DJ->BTJ", "BTJ,JNH->BNTH"
    """
    x, kernel, result = equation.replace("->", ",").split(",")
    inner = "".join(letter for letter in kernel if letter in x)
    outer = "".join(letter for letter in kernel if letter not in x)
    return f"{x},{inner}J->BTJ", f"BTJ,J{outer}->{result}"


class Linear(nn.Einsum):
    """einsum(equation, x, kernel) + bias and, where there is an adapter, scale (x A) B.

    The matrix A B is never formed: its gradient would cost as much as that of the kernel.

    Args:
      x: the input.
      low_BTJ: x A, if matrices that read the same input share A.
    """

    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, low_BTJ: jax.Array | None = None) -> jax.Array:  # type: ignore[override]
        y = super().__call__(x)
        b = self.get_variable("adapter", "b")
        if b is not None:
            down, up = low_rank(str(self.einsum_str))
            if low_BTJ is None:
                low_BTJ = jnp.einsum(down, x, self.get_variable("adapter", "a").astype(y.dtype))
            y += jnp.einsum(up, self.scale * low_BTJ, b.astype(y.dtype))
        # In a model with adapters the matrices without one are named too: `--remat dots` keeps
        # named results alone. Where no policy asks for it, the name changes no program.
        return checkpoint_name(y, LINEAR_OUTPUT)


def _linear(c: ModelConfig, path: str, bias: bool, std: float = 0.02) -> Linear:
    """The matrix `path` of a layer; its bias has the kernel axes that are in the result."""
    equation, name = LINEARS[path], path.rpartition("/")[2]
    kernel, result = equation.split(",")[1].split("->")
    axes = [AXES[letter] for letter in kernel]
    kept = [AXES[letter] for letter in kernel if letter in result]
    inits = {"kernel_init": _normal(std, *axes), "bias_init": _named(nn.initializers.zeros, *kept)}
    shape = [axis_size(c, letter) for letter in kernel]
    how: Any = {"use_bias": bias, "dtype": c.dtype, "scale": c.adapter_scale, "name": name}
    return Linear(shape, equation, **how, **inits)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cos_sin, mix, shard, at):
        c = self.config

        # An adapter of a family whose file has one matrix for q, k and v has one A for them.
        a, low_BTJ = self.get_variable("adapter", "a"), None
        if a is not None:
            low_BTJ = jnp.einsum("BTD,DJ->BTJ", x_BTD, a.astype(x_BTD.dtype))

        def project(name, axis, at=None):
            low = None if low_BTJ is None else take(low_BTJ, at)
            y = _linear(c, f"attention/{name}", c.qkv_bias)(take(x_BTD, at), low)
            return shard(y, "batch", axis, None, None)

        q_BNTH = project("query", "heads", at)
        k_BGTH = project("key", "kv_heads")
        v_BGTH = project("value", "kv_heads")
        if c.qk_norm:
            q_BNTH = Norm(c, name="query_norm")(q_BNTH)
            k_BGTH = Norm(c, name="key_norm")(k_BGTH)
        if cos_sin is not None:
            cos, sin = cos_sin
            q_BNTH = rotate(q_BNTH, (take(cos, at), take(sin, at)))
            k_BGTH = rotate(k_BGTH, cos_sin)
        y_BNTH, kept = mix(q_BNTH * (c.query_scalar or c.head_dim) ** -0.5, k_BGTH, v_BGTH)
        return _linear(c, "attention/out", c.out_bias, _residual_std(c))(y_BNTH), kept


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, shard):
        c, act = self.config, _ACTIVATIONS[self.config.activation]
        y_BTF = _linear(c, "mlp/up", c.mlp_bias)(x_BTD)
        if c.gated:
            y_BTF *= act(_linear(c, "mlp/gate", c.mlp_bias)(x_BTD))
        else:
            y_BTF = act(y_BTF)
        y_BTF = shard(y_BTF, "batch", None, "mlp")
        return _linear(c, "mlp/down", c.mlp_bias, _residual_std(c))(y_BTF)


def take(x_BT: jax.Array, at: At) -> jax.Array:
    """x at some of its columns, [B, S, ...]; all of x where `at` is None."""
    if at is None:
        return x_BT
    if isinstance(at, slice):
        return x_BT[:, at]
    return jnp.take_along_axis(x_BT, at.reshape(*at.shape, *[1] * (x_BT.ndim - 2)), axis=1)


class Layer(nn.Module):
    """One transformer layer.

    Args:
      x_BTD: the residual stream.
      cos_sin: rotation of the tokens' positions, or None.
      key: dropout key, or None.
      mix: attention: (scaled q_BNTH, k_BGTH, v_BGTH) -> (y_BNTH, anything to keep).
      shard: see `Shard`.
      at: columns whose new residual stream is computed; other tokens give only keys and values,
        and dropout draws nothing for them.

    Returns:
      (the new residual stream, [B, S, D] at `at`; the second output of `mix`).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cos_sin, key, *, mix, shard, at=None):
        c = self.config

        def branch(name, y_BTD, key):
            """What a sublayer adds to the residual."""
            y_BTD = shard(y_BTD, "batch", "sequence", None)
            if c.post_norms:
                y_BTD = Norm(c, name=f"{name}_post_norm")(y_BTD)
            if key is None or c.dropout == 0:
                return y_BTD
            keep = jax.random.bernoulli(key, 1 - c.dropout, y_BTD.shape)
            return jnp.where(keep, y_BTD / (1 - c.dropout), 0)

        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        # A sequence that is split between sublayers is whole within them.
        normed = shard(Norm(c, name="attention_norm")(x_BTD), "batch", None, None)
        y_BTD, kept = Attention(c, name="attention")(normed, cos_sin, mix, shard, at)
        x_BTD = take(x_BTD, at)
        after = x_BTD + branch("attention", y_BTD, attention_key)
        normed = Norm(c, name="mlp_norm")(x_BTD if c.parallel else after)
        normed = shard(normed, "batch", None, None)
        after += branch("mlp", MLP(c, name="mlp")(normed, shard), mlp_key)
        return shard(after, "batch", "sequence", None), kept


# ---------------------------------------------------------------------------- parameters


def _boxed_init(config: ModelConfig, key: jax.Array) -> Params:
    """Parameters in boxes that name their logical axes."""
    c = config
    keys = jax.random.split(key, 4)
    x_BTD = jnp.zeros((1, 1, c.width))
    position_BT = jnp.zeros((1, 1), jnp.int32)
    cos_sin = None
    if c.positions == "rotary":
        cos_sin = rotation(c.rope, c.head_dim, position_BT, c.max_length)

    def init_layer(key):
        no_mix = lambda q, k, v: (q, None)  # noqa: E731
        return Layer(c).init(key, x_BTD, cos_sin, None, mix=no_mix, shard=unsharded)["params"]

    def table(key, axis, rows):
        return _normal(0.02, axis, "width")(key, (rows, c.width))

    layers = jax.vmap(init_layer)(jax.random.split(keys[0], c.layers))
    params: Params = {
        "embed": {"tokens": table(keys[1], "vocab", c.padded_vocab_size)},
        "layers": meta.add_axis(layers, 0, {nn.PARTITION_NAME: "layers"}),
        "final_norm": Norm(c).init(key, x_BTD)["params"],
    }
    if c.positions == "learned":
        rows = c.max_length + c.position_offset
        params["embed"]["positions"] = table(keys[2], "position", rows)
    if c.scalar_head:
        params["score"] = _boxed_score(c, keys[3])
    elif not c.tied:
        params["unembed"] = {"kernel": table(keys[3], "vocab", c.padded_vocab_size)}
    return params


def _boxed_score(config: ModelConfig, key: jax.Array) -> Params:
    # Standard deviation 1 / sqrt(d + 1) as in lm-human-preferences (Stiennon et al. 2020, App. B).
    kernel = _normal((config.width + 1) ** -0.5, "norm")(key, (config.width,))
    return {"kernel": kernel, "bias": _named(nn.initializers.zeros)(key, ())}


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random float32 parameters (GPT-2's scheme). On a mesh, jit it with out_shardings."""
    return meta.unbox(_boxed_init(config, key))


def cast(params: Params, dtype: str) -> Params:
    """Casts all but norms and the scalar head, which compute in float32 in a trained model too.

    An adapter, which is far smaller than what it adapts, stays in float32 as well.
    """

    def cast_leaf(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if stays_float32(jax.tree_util.keystr(path)) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, params)


def stays_float32(name: str) -> bool:
    """Whether `cast` leaves a parameter as it is, by the names on the way to it."""
    return any(part in name for part in ("norm", "score", "adapter"))


def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init`, with a tuple of logical axis names in place of each array."""
    boxed = jax.eval_shape(lambda key: _boxed_init(config, key), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def with_scalar_head(
    params: Params, config: ModelConfig, key: jax.Array
) -> tuple[ModelConfig, Params]:
    """Replaces the unembedding by a scalar projection, as reward models begin (App. C.2)."""
    kept = {name: leaf for name, leaf in params.items() if name != "unembed"}
    kept["score"] = meta.unbox(_boxed_score(config, key))
    return dataclasses.replace(config, scalar_head=True), kept
