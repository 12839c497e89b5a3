"""The TPU's attention kernel, interpreted on the CPU, against the plain einsums."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from instructjax import models, sharding
from instructjax.models import fused
from instructjax.models.attention import attend
from instructjax.models.layer import Unsharded


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Interprets the kernel, in tiles so small that 300 tokens are three."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(fused, "_TILES", (128,))


# ---------------------------------------------------------------------------- rows of tokens


@dataclasses.dataclass
class Span:
    """Neighbouring tokens of one document, or padding."""

    length: int
    parent: int | None = None  # the number of the span that it continues, and sees
    live: bool = True


def row(*spans: Span):
    """(positions_T, segments_T, parents_T, live_T, seen_TT within a window, as a function)."""
    positions, segments, parents, live = [], [], [], []
    T = sum(span.length for span in spans)
    seen, at = np.zeros((T, T), bool), np.cumsum([0, *(span.length for span in spans)])
    for number, span in enumerate(spans):
        start, stop, above = at[number], at[number + 1], span.parent
        first = 0
        for column in range(start, stop if span.live else start):
            seen[column, start : column + 1] = True
        if above is not None and span.live:
            seen[start:stop, at[above] : at[above + 1]] = True
            first = spans[above].length
        positions += [first + n if span.live else 0 for n in range(span.length)]
        segments += [number] * span.length
        parents += [number if above is None else above] * span.length
        live += [span.live] * span.length
    distance = np.subtract.outer(positions, positions)
    window = lambda size: seen & (distance < size)  # noqa: E731
    return np.array(positions), np.array(segments), np.array(parents), np.array(live), window


def rows_of(T: int) -> dict:
    """A row for each way in which tokens see one another."""
    pad = functools.partial(Span, live=False)
    spans = {
        "causal": [Span(T)],
        "packed": [Span(T // 3), Span(2), Span(T // 2), pad(T - T // 3 - 2 - T // 2)],
        "padded left and right": [pad(37), Span(T - 60), pad(23)],
        "a tile of padding": [pad(T - 9), Span(9)],
        "parents": [
            *(Span(40), Span(7, parent=0), Span(20, parent=0), Span(11, parent=0)),
            *(Span(5), Span(9, parent=4), Span(1, parent=4), pad(T - 93)),
        ],
    }
    return {name: row(*of_row) for name, of_row in spans.items()}


@pytest.mark.parametrize(
    ("T", "N", "G", "H", "softcap"),
    [(128, 2, 2, 64, None), (300, 4, 2, 16, 3.0)],
    ids=["one whole tile", "three tiles, grouped heads, soft-cap"],
)
def test_the_kernel_is_the_einsums(T, N, G, H, softcap):
    """Values and gradients of every kind of row, with windows and without; padding gives 0."""
    rows = rows_of(T)
    positions, segments, parents, live = (
        np.stack([of_row[part] for of_row in rows.values()]) for part in range(4)
    )
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(len(rows), heads, T, H)).astype(np.float32)  # noqa: E731
    q, k, v, weights = draw(N) * 2 / H**0.5, draw(G), draw(G), draw(N)
    weights *= live[:, None, :, None]

    def with_gradient(attention):
        def loss(q, k, v, sight):
            y = attention(q, k, v, sight)
            return jnp.sum(y * weights), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    placed = np.where(live, segments, fused.PADDING)
    places = fused.places(*map(jnp.array, (positions, placed, parents)))
    ours = with_gradient(
        lambda *qkv_window: fused.attend(*qkv_window[:3], places, qkv_window[3], softcap)
    )
    plain = with_gradient(functools.partial(attend, softcap=softcap))
    for window in (fused.NO_WINDOW, 30, 1):
        mask = jnp.array(np.stack([of_row[4](window) for of_row in rows.values()]))
        (_, got), got_grads = ours(q, k, v, window)
        (_, want), want_grads = plain(q, k, v, mask)
        for b, name in enumerate(rows):
            at = f"{name}, window {window}"
            difference = np.abs(got - want)[b].max(axis=(0, 2))
            assert difference[live[b]].max() < 1e-5, at
            assert not np.any(got[b][:, ~live[b]]), at
            for got_grad, want_grad, of in zip(got_grads, want_grads, "qkv", strict=True):
                assert np.abs(got_grad - want_grad)[b].max() < 2e-5, f"{at}: {of}"


# ---------------------------------------------------------------------------- models

# Layers of two kinds in one scanned body, and key heads fewer than query heads.
CONFIG = models.ModelConfig(
    131, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, max_length=512, norm="rms",
    positions="rotary", window=15, windowed=(True, False), attention_softcap=3.0,
)  # fmt: skip
FUSED = Unsharded(fused=True)


@pytest.fixture(scope="module")
def params():
    """Weights large enough for attention to be far from uniform."""
    params = jax.jit(models.init, static_argnums=0)(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)


def assert_same(run, params, live, shard):
    """Hidden states at live tokens, and gradients of parameters, of run(params, shard)."""
    weights = np.random.default_rng(1).normal(size=(*live.shape, CONFIG.width)) * live[..., None]

    def both(shard):
        def loss(params):
            hidden = run(params, shard)
            return jnp.sum(hidden * weights.astype(np.float32)), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (got_grads, got), (want_grads, want) = both(shard), both(models.unsharded)
    assert np.abs(np.array(got) - want)[live].max() < 1e-5
    for path, want_leaf in jax.tree_util.tree_leaves_with_path(want_grads):
        got_leaf = functools.reduce(lambda tree, key: tree[key.key], path, got_grads)
        difference = np.linalg.norm(np.array(got_leaf) - want_leaf)
        assert difference < 1e-5 * np.linalg.norm(want_leaf), jax.tree_util.keystr(path)


def test_a_model_with_packed_comparisons_on_a_mesh(params):
    """`apply` with segments, parents and positions; rows over data and fsdp, heads over tensor."""
    rows = [of_row for name, of_row in rows_of(100).items() if name != "causal"]
    positions, segments, parents, live = (
        jnp.array(np.stack([of_row[part] for of_row in rows])) for part in range(4)
    )
    tokens = jnp.array(np.random.default_rng(0).integers(0, 131, live.shape))
    where = {"positions_BT": positions, "segments_BT": segments, "parents_BT": parents}
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def run(params, shard):
        return models.apply(params, CONFIG, tokens, mask_BT=live, **where, shard=shard)

    on_mesh = dataclasses.replace(sharding.constrainer(mesh), fused=True)
    assert_same(run, params, np.array(live), on_mesh)


def test_a_model_with_shared_prompts(params):
    """`apply_shared`: prompts padded on the left, responses on the right, one slot empty."""
    B, P, K, R = 2, 40, 3, 20
    rng = np.random.default_rng(0)
    prompt, responses = rng.integers(0, 131, (B, P)), rng.integers(0, 131, (B, K, R))
    prompt_live = np.arange(P) >= np.array([[0], [33]])
    response_live = np.arange(R) < np.array([[20, 12, 3], [1, 15, 0]])[..., None]

    def run(params, shard):
        arrays = map(jnp.array, (prompt, prompt_live, responses, response_live))
        hidden = models.apply_shared(params, CONFIG, *arrays, shard=shard)
        return jnp.concatenate([hidden[0], hidden[1].reshape(B, K * R, -1)], axis=1)

    assert_same(
        run, params, np.concatenate([prompt_live, response_live.reshape(B, K * R)], axis=1), FUSED
    )


def test_a_model_with_left_padding_alone(params):
    """`apply` finds positions and segments itself."""
    live = np.arange(100) >= np.array([[0], [60], [99]])
    tokens = jnp.array(np.random.default_rng(0).integers(0, 131, live.shape))
    apply = jax.jit(models.apply, static_argnums=1, static_argnames="shard")
    got, want = (
        apply(params, CONFIG, tokens, mask_BT=jnp.array(live), shard=shard)
        for shard in (FUSED, models.unsharded)
    )
    assert np.abs(np.array(got) - want)[live].max() < 1e-5
    # 100 tokens are no whole number of a TPU's tiles: the layers see 112.
    lowered = apply.lower(params, CONFIG, tokens, mask_BT=jnp.array(live), shard=FUSED).as_text()
    mlp = set(re.findall(rf"tensor<3x(\d+)x{CONFIG.mlp_width}xf32>", lowered))
    assert mlp == {"112"}


@pytest.mark.parametrize("G", [8, 4, 2], ids=["a head each", "groups split", "groups copied"])
def test_each_device_has_the_keys_of_its_queries(G):
    """Query heads 2n and 2n + 1 on a device, whether or not key heads divide over tensor."""
    shard = sharding.constrainer(sharding.make_mesh(fsdp=2, tensor=4))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.normal(size=(4, heads, 6, 2)), jnp.float32) for heads in (8, G, G))
    places = jnp.array(rng.integers(0, 9, (4, 3, 6)))

    def mix(q, k, v, places, window):
        return attend(q, k, v, places[:, :1] - places[:, 1, :, None] < window)

    got = jax.jit(functools.partial(shard.by_head, mix))(q, k, v, places, 3)
    np.testing.assert_allclose(got, mix(q, k, v, places, 3), atol=1e-6)
    assert not got.sharding.is_fully_replicated


def test_only_tpus_take_it(params):
    """A mesh of CPUs does not, nor float16, which the kernel's compiler cannot load."""
    assert not sharding.constrainer(sharding.make_mesh()).fused
    half = dataclasses.replace(CONFIG, dtype="float16")
    tokens = jnp.zeros((1, 8), int)
    jaxpr = lambda config: str(  # noqa: E731
        jax.make_jaxpr(lambda params: models.apply(params, config, tokens, shard=FUSED))(params)
    )
    assert "pallas_call" in jaxpr(CONFIG)
    assert "pallas_call" not in jaxpr(half)
