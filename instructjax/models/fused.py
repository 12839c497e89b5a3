"""Attention of whole sequences on TPUs, a Pallas kernel that never holds the logits.

FlashAttention-2 (Dao 2023): a tile of queries meets one tile of keys after another, and keeps a
running maximum, the sum of the weights and the weighted sum of the values. The backward pass
recomputes the weights from their logsumexp.

Each tile computes its attention mask from positions, segments and parents. One kernel therefore
serves padding, windows, packed documents and responses that share a prompt. (JAX's
`splash_attention` has segments but no parents: it would need a mask [T, T] for each row, which in
jax 0.10.2 does not work under jit.) Tiles in which no query sees a key are neither loaded nor
computed.

In a tile, keys are rows and queries are columns: a query's numbers lie along the lanes of a
register, and maxima and sums run down its rows. Suffixes name the dimensions: a tile is [S, Q],
its q is [Q, H], its k and v are [S, H].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from instructjax.models.attention import capped_and_masked, related, sees

NO_WINDOW = np.iinfo(np.int32).max
PADDING = -1  # the segment of keys that no query sees
NOWHERE = -2  # the segment of queries that see no key, not even padding: tiles of it are skipped

# The least maximum, far below any logit and far above NEG_INF: exp(NEG_INF - maximum) is then 0
# even if a query sees nothing.
_FLOOR = -1e20

_TILES = 512, 384, 256, 128  # the largest that divides the length


def places(positions_BT: jax.Array, segments_BT: jax.Array, parents_BT: jax.Array) -> jax.Array:
    """places_B3T, int32 (position, segment, parent) of each token: they decide what it sees.

    Args:
      segments_BT: PADDING at padding; otherwise not negative.
      parents_BT: another segment that the token sees, or its own segment.
    """
    return jnp.stack([positions_BT, segments_BT, parents_BT], axis=1).astype(jnp.int32)


def attend(
    q_BNTH: jax.Array,
    k_BGTH: jax.Array,
    v_BGTH: jax.Array,
    places_B3T: jax.Array,
    window: jax.Array | int,
    softcap: float | None = None,
) -> jax.Array:
    """As `attention.attend`, of a sequence with itself; differentiable in q, k and v.

    Args:
      q_BNTH, k_BGTH, v_BGTH: queries are scaled; each key head serves N / G query heads.
      places_B3T: see `places`.
      window: a query sees this many positions, its own included; NO_WINDOW for all. May be
        traced, for layers that share one scanned body.
      softcap: logits become cap * tanh(logits / cap).

    Returns:
      y_BNTH; 0 at padding, where `attention.attend` gives a mean of some values.
    """
    T = q_BNTH.shape[2]
    short = -T % _TILES[-1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) for x in (q_BNTH, k_BGTH, v_BGTH))
    keys = jnp.pad(places_B3T, ((0, 0), (0, 0), (0, short)), constant_values=PADDING)
    queries = jnp.where(keys[:, 1:2] == PADDING, NOWHERE, keys)
    window_1 = jnp.asarray(window, jnp.int32).reshape(1)
    y: Any = _attend(q, k, v, queries, keys, window_1, softcap)
    return y[:, :, :T]


# ---------------------------------------------------------------------------- tiles


def _tile(length: int) -> int:
    return next(tile for tile in _TILES if length % tile == 0)


def _live_tiles(queries_B3T: jax.Array, keys_B3T: jax.Array, window_1: jax.Array) -> jax.Array:
    """True where a tile of queries sees a key of a tile of keys: [B, T / tile, T / tile]."""
    queries, keys = queries_B3T[:, :, :, None], keys_B3T[:, :, None, :]
    near = related(queries[:, 1], queries[:, 2], keys[:, 1])
    seen_BTT = sees(queries[:, 0], keys[:, 0], near, window_1[0])
    B, T, _ = seen_BTT.shape
    tile = _tile(T)
    return jnp.any(seen_BTT.reshape(B, T // tile, tile, T // tile, tile), axis=(2, 4))


def _last_live(live: jax.Array) -> jax.Array:
    """The number of the last live tile up to each tile of the last axis, or -1.

    A live tile has its own number. While the number stays the same, nothing is loaded.
    """
    number = lax.broadcasted_iota(jnp.int32, live.shape, live.ndim - 1)
    return lax.cummax(jnp.where(live, number, -1), axis=live.ndim - 1)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product summed over an axis of x and an axis of y, in float32."""
    # Products of bfloat16 are exact; at a higher precision they do not compile.
    precision = None if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, ((axes[:1], axes[1:]), ((), ())), precision, preferred_element_type=jnp.float32
    )


def _logits(window, queries_ref, keys_ref, q_ref, k_ref, softcap):
    """(logits_SQ of a tile, the function that pulls their gradient back through cap and mask)."""
    position, segment, parent = (queries_ref[0, i : i + 1, :] for i in range(3))  # [1, Q]
    key_position, key_segment = (keys_ref[0, i, :][:, None] for i in range(2))  # [S, 1]
    seen_SQ = sees(position, key_position, related(segment, parent, key_segment), window)
    dots_SQ = _dot(k_ref[0, 0], q_ref[0, 0], (1, 1))
    return jax.vjp(lambda dots: capped_and_masked(dots, seen_SQ, softcap), dots_SQ)


def _weights(
    window, queries_ref, keys_ref, q_ref, k_ref, v_ref, dy_ref, lse_ref, mean_ref, *, softcap
):
    """(weights_SQ of a tile, the gradient of its dot products) in the backward pass.

    Args:
      mean_ref: the weighted mean of the weights' gradients, which is the sum of dy * y.
    """
    logits_SQ, back = _logits(window, queries_ref, keys_ref, q_ref, k_ref, softcap)
    weights_SQ = jnp.exp(logits_SQ - lse_ref[0, 0])
    dweights_SQ = _dot(v_ref[0, 0], dy_ref[0, 0], (1, 1))
    (ddots_SQ,) = back(weights_SQ * (dweights_SQ - mean_ref[0, 0]))
    return weights_SQ, ddots_SQ


# ---------------------------------------------------------------------------- kernels


def _forward_kernel(
    window_ref, live_ref, queries_ref, keys_ref, q_ref, k_ref, v_ref, y_ref, lse_ref,
    top_ref, total_ref, sum_ref, *, softcap
):  # fmt: skip
    b, i, j = (pl.program_id(axis) for axis in (0, 3, 4))

    @pl.when(j == 0)
    def begin():
        top_ref[...] = jnp.full_like(top_ref, _FLOOR)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(live_ref[b, i, j] == j)
    def add():
        logits_SQ, _ = _logits(window_ref[0], queries_ref, keys_ref, q_ref, k_ref, softcap)
        top_1Q = jnp.maximum(top_ref[...], jnp.max(logits_SQ, axis=0, keepdims=True))
        weights_SQ = jnp.exp(logits_SQ - top_1Q)
        before_1Q = jnp.exp(top_ref[...] - top_1Q)  # rescales the sums so far
        v_SH = v_ref[0, 0]
        total_ref[...] = before_1Q * total_ref[...] + jnp.sum(weights_SQ, axis=0, keepdims=True)
        sum_ref[...] = before_1Q * sum_ref[...] + _dot(v_SH, weights_SQ.astype(v_SH.dtype), (0, 0))
        top_ref[...] = top_1Q

    @pl.when(j == pl.num_programs(4) - 1)
    def end():
        total_1Q = jnp.where(total_ref[...] == 0, 1, total_ref[...])
        y_ref[0, 0] = (sum_ref[...] / total_1Q).T.astype(y_ref.dtype)
        lse_ref[0, 0] = top_ref[...] + jnp.log(total_1Q)


def _query_kernel(window_ref, live_ref, *refs, softcap):
    *read, dq_ref, sum_ref = refs
    _, _, _, k_ref, *_ = read
    b, i, j = (pl.program_id(axis) for axis in (0, 3, 4))

    @pl.when(j == 0)
    def begin():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(live_ref[b, i, j] == j)
    def add():
        _, ddots_SQ = _weights(window_ref[0], *read, softcap=softcap)
        sum_ref[...] += _dot(ddots_SQ.astype(k_ref.dtype), k_ref[0, 0], (0, 0))

    @pl.when(j == pl.num_programs(4) - 1)
    def end():
        dq_ref[0, 0] = sum_ref[...].astype(dq_ref.dtype)


def _key_kernel(window_ref, live_ref, *refs, softcap):
    *read, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = refs
    _, _, q_ref, _, _, dy_ref, *_ = read
    b, j, m, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))

    @pl.when((m == 0) & (i == 0))
    def begin():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(live_ref[b, j, i] == i)
    def add():
        weights_SQ, ddots_SQ = _weights(window_ref[0], *read, softcap=softcap)
        dk_sum_ref[...] += _dot(ddots_SQ.astype(q_ref.dtype), q_ref[0, 0], (1, 0))
        dv_sum_ref[...] += _dot(weights_SQ.astype(dy_ref.dtype), dy_ref[0, 0], (1, 0))

    @pl.when((m == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def end():
        dk_ref[0, 0] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum_ref[...].astype(dv_ref.dtype)


# ---------------------------------------------------------------------------- grids


# The arrays that all kernels read, by the names of their blocks.
_READ = "queries", "keys", "of q", "of k", "of k"


def _run(
    kernel, read, arrays, outputs, scratch, window_1, live, *, by_key, matmuls, softcap
) -> Any:
    """Runs a kernel on all rows, heads and tiles.

    Args:
      read, arrays: the names of blocks and the arrays that it reads; `_READ` comes first.
      outputs: (name of blocks, shape) of each output.
      scratch: shapes of the float32 sums.
      live: see `_live_tiles`.
      by_key: a tile of keys meets the tiles of queries, of every head of its group, in turn;
        otherwise a tile of queries meets the tiles of keys in turn.
      matmuls: matrix products [queries, keys] in a tile.
    """
    (B, N, T, H), G = arrays[2].shape, arrays[3].shape[1]
    group, tile = N // G, _tile(T)
    tiles = T // tile

    def block(shape, index):
        """A block; `index` maps a step's (row, head, tile, key head, key tile) to its place."""

        def of_step(b, g, *further):
            if by_key:
                j, m, i, _, last = further
                i = jnp.maximum(last[b, j, i], 0)
            else:
                m, i, j, _, last = further
                j = jnp.maximum(last[b, i, j], 0)
            return index(b, g * group + m, i, g, j)

        return pl.BlockSpec(shape, of_step)

    blocks = {
        "queries": block((1, 3, tile), lambda b, n, i, g, j: (b, 0, i)),
        "keys": block((1, 3, tile), lambda b, n, i, g, j: (b, 0, j)),
        "of q": block((1, 1, tile, H), lambda b, n, i, g, j: (b, n, i, 0)),
        "of k": block((1, 1, tile, H), lambda b, n, i, g, j: (b, g, j, 0)),
        "numbers of q": block((1, 1, 1, tile), lambda b, n, i, g, j: (b, n, 0, i)),
    }
    # The tiles that a causal mask leaves; how many of them are empty depends on the data.
    met = B * N * tiles * (tiles + 1) // 2 * tile**2
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *(x for _, x in outputs)))
    cost = pl.CostEstimate(flops=2 * matmuls * met * H, transcendentals=met, bytes_accessed=moved)
    return pl.pallas_call(
        functools.partial(kernel, softcap=softcap),
        cost_estimate=cost,
        out_shape=[shape for _, shape in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, G, tiles, group, tiles) if by_key else (B, G, group, tiles, tiles),
            in_specs=[blocks[name] for name in read],
            out_specs=[blocks[name] for name, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
    )(window_1, _last_live(live.swapaxes(1, 2) if by_key else live), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, queries, keys, window_1, softcap):
    return _forward(q, k, v, queries, keys, window_1, softcap)[0]


def _forward(q, k, v, queries, keys, window_1, softcap):
    (B, N, T, H), tile = q.shape, _tile(q.shape[2])
    arrays, live = (queries, keys, q, k, v), _live_tiles(queries, keys, window_1)
    outputs = [("of q", q), ("numbers of q", jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32))]
    sums = [(1, tile), (1, tile), (H, tile)]
    options: Any = {"by_key": False, "matmuls": 2, "softcap": softcap}
    y, lse_BN1T = _run(_forward_kernel, _READ, arrays, outputs, sums, window_1, live, **options)
    return y, (arrays, window_1, live, y, lse_BN1T)


def _backward(softcap, kept, dy):
    arrays, window_1, live, y, lse_BN1T = kept
    _, _, q, k, v = arrays
    sums = [(_tile(q.shape[2]), q.shape[3])]
    mean_BN1T = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)[:, :, None]
    arrays = *arrays, dy, lse_BN1T, mean_BN1T
    read = *_READ, "of q", "numbers of q", "numbers of q"

    def run(kernel, outputs, sums, by_key, matmuls):
        options: Any = {"by_key": by_key, "matmuls": matmuls, "softcap": softcap}
        return _run(kernel, read, arrays, outputs, sums, window_1, live, **options)

    (dq,) = run(_query_kernel, [("of q", q)], sums, by_key=False, matmuls=3)
    dk, dv = run(_key_kernel, [("of k", k), ("of k", v)], sums * 2, by_key=True, matmuls=4)
    return dq, dk, dv, None, None, None


_attend.defvjp(_forward, _backward)
