"""preflight against counts by hand: CPU programs, HLO text, programs for TPUs that are absent."""

import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from operator import attrgetter
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from instructjax import preflight, sharding
from instructjax.models import PRESETS
from instructjax.preflight import chips, count, hlo, loops, traffic
from instructjax.preflight import program as program_module
from instructjax.preflight.flops import _positions
from instructjax.preflight.program import Memory, _needed

REPOSITORY = Path(__file__).resolve().parents[1]

# The script experiments/preflight.py, not the package instructjax.preflight.
script = importlib.import_module("preflight")
flags_of = importlib.import_module("preflight_config")

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
V5E = "v5e:4x4"


def compile_text(fn, *args, **options) -> str:
    return jax.jit(fn, **options).lower(*args).compile().as_text()


def counts_of(fn, *args, trips=(), **options) -> count.Counts:
    return count.count(hlo.parse(compile_text(fn, *args, **options)), trips)


def array_on(mesh, shape, *spec, dtype=jnp.float32, **options) -> jax.ShapeDtypeStruct:
    where = NamedSharding(mesh, PartitionSpec(*spec), **options)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def collective_totals(counts: count.Counts) -> dict[tuple[str, int], tuple[float, float]]:
    totals: dict[tuple[str, int], tuple[float, float]] = {}
    for x in counts.collectives:
        times, sent = totals.get((x.kind, x.group), (0, 0))
        totals[x.kind, x.group] = times + x.count, sent + x.bytes
    return totals


# ---------------------------------------------------------------------------------------- chips


def test_topologies():
    """Chips, devices and the cloud's name of a slice; every listed slice parses."""
    properties = {
        text: (t.chips, t.devices, t.cloud)
        for text in ("v5e:1x1", "v5e:4x4", "v6e:16x16", "v5p:4x4x4", "v4:2x2x4", "tpu7x:2x2x1")
        for t in [preflight.parse_topology(text)]
    }
    assert properties == {
        "v5e:1x1": (1, 1, "v5litepod-1"),
        "v5e:4x4": (16, 16, "v5litepod-16"),
        "v6e:16x16": (256, 256, "v6e-256"),
        "v5p:4x4x4": (64, 64, "v5p-128"),
        "v4:2x2x4": (16, 16, "v4-32"),
        "tpu7x:2x2x1": (4, 8, "tpu7x of GKE"),
    }
    for kind in chips.CHIPS:
        listed = list(preflight.slices(kind))
        assert [preflight.parse_topology(t.name) for t in listed] == listed
        assert [t.chips for t in listed] == sorted(t.chips for t in listed)


def test_several_slices():
    """Their chips add up. Times across slices are unknown, and no figure for them is given."""
    two = preflight.parse_topology("v5e:4x4", 2)
    assert (two.chips, two.name, two.slice) == (32, "2 x v5e:4x4", "v5e:4x4")
    assert two.cloud == "2 x v5litepod-16"
    joined = dataclasses.replace(program(parameters=1), topology=two)
    assert np.isnan([joined.network_seconds, joined.seconds]).all()
    assert (joined.memory_seconds, joined.fits) == (pytest.approx(2), True)
    assert joined.json()["seconds"]["roofline"] is None
    console = Console(width=120, file=io.StringIO())
    console.print(*preflight.tables([joined]))
    [row] = [x for x in console.file.getvalue().splitlines() if x.split()[:2] == ["step", "197"]]
    assert row.split()[-5:] == ["?", "?", "?", "?", "8"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5litepod-16", "the cloud's name; write v5e:4x4"),
        ("v5p-128", "the cloud's name; write v5p:4x4x4"),
        ("v9:2x2", "not one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "a v5e slice has 2 dimensions"),
        ("v5e:4x4x4", "a v5e slice has 2 dimensions"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, as v5p:2x2x4"),
        ("v5e:4x0", "a v5e slice has 2 dimensions"),
        ("v5e:3x3", "the first two sizes must be even"),
        ("v5p:1x1x1", "the first two sizes must be even"),
    ],
)
def test_wrong_topologies(text, says):
    with pytest.raises(ValueError, match=says):
        preflight.parse_topology(text)


def test_no_such_chip():
    with pytest.raises(ValueError, match="v9: not one of"):
        list(preflight.slices("v9"))


@pytest.mark.parametrize(
    ("text", "group", "links"),
    [
        ("v5e:4x4", 4, 1),  # lines: one link
        ("v5e:4x4", 16, 2),
        ("v5e:16x16", 16, 2),  # rings: both directions
        ("v5e:16x16", 17, 4),
        ("v5e:8x16", 128, 3),  # a ring and a line
        ("v5p:4x4x4", 64, 6),
        ("v5p:2x4x4", 16, 2),  # smaller than a 4x4x4 cube: no rings
        ("v5p:2x2x1", 4, 2),
        ("tpu7x:2x2x1", 4, 0.5),  # two devices share a chip's links
    ],
)
def test_ring_bandwidth(text, group, links):
    topology = preflight.parse_topology(text)
    assert topology.ring_bandwidth(group) == links * topology.chip.link


# -------------------------------------------------------------------------- programs for this CPU


def test_a_matmul():
    """2 m k n FLOPs; both operands are read and the result is written."""
    a, b = jax.ShapeDtypeStruct((24, 40), jnp.float32), jax.ShapeDtypeStruct((40, 56), jnp.float32)
    counts = counts_of(jnp.matmul, a, b)
    assert counts.flops == 2 * 24 * 40 * 56
    assert counts.hbm_bytes == 4 * (24 * 40 + 40 * 56 + 24 * 56)
    assert (counts.host_bytes, counts.collectives) == (0, ())
    assert (counts.assumed, counts.uncounted) == ((), ())
    assert counts.largest[0].shape == "f32[24,56]"
    assert counts.largest[0].bytes == 4 * 24 * 56


def test_batched_matmul():
    a = jax.ShapeDtypeStruct((3, 24, 40), jnp.float32)
    assert counts_of(lambda a: jnp.einsum("bij,bkj->bik", a, a), a).flops == 2 * 3 * 24 * 24 * 40


def test_a_scan_counts_as_often_as_it_runs():
    """Nested, and with its gradient: three matmuls for each one; all trip counts are known."""

    def body(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(inner, x, None, length=3)[0], None

    loss = lambda ws, x: jnp.sum(jax.lax.scan(body, x, ws)[0])  # noqa: E731
    ws = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    once = 2 * 8 * 32 * 32
    assert counts_of(loss, ws, x).flops == 5 * 3 * once
    assert counts_of(jax.grad(loss), ws, x).flops == 3 * 5 * 3 * once


def test_collectives_by_hand():
    """Each kind under shard_map in a loop of 4 turns, over fsdp=4: bytes that a device sends."""
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)

    def step(x, _):  # a device has [8, 16] of float32: 512 bytes
        x = jax.lax.psum(x, "fsdp")  # sends 2 * 3/4 of them
        y = jax.lax.all_gather(x * 2, "fsdp", tiled=True)  # to three others
        x = jax.lax.psum_scatter(y * y, "fsdp", tiled=True)  # 3/4 of [32, 16]
        x = jax.lax.all_to_all(jnp.sin(x), "fsdp", 0, 0, tiled=True)  # 3/4
        ring = [(i, (i + 1) % 4) for i in range(4)]
        return jax.lax.ppermute(jnp.cos(x), "fsdp", ring), None

    def local(x):
        return jax.lax.scan(step, x, None, length=4)[0]

    spec = PartitionSpec("fsdp")
    fn = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    counts = counts_of(fn, array_on(mesh, (32, 16), "fsdp"))
    most = [each.kind for each in counts.collectives]
    assert most[:2] in (["all-gather", "reduce-scatter"], ["reduce-scatter", "all-gather"])
    assert all("/while/body/" in each.where for each in counts.collectives)
    assert collective_totals(counts) == {
        ("all-reduce", 4): (4, 4 * 512 * 2 * 3 / 4),
        ("all-gather", 4): (4, 4 * 512 * 3),
        ("reduce-scatter", 4): (4, 4 * 2048 * 3 / 4),
        ("all-to-all", 4): (4, 4 * 512 * 3 / 4),
        ("collective-permute", 4): (4, 4 * 512),
    }


def test_a_loop_that_depends_on_data():
    def fn(x, n):
        going = lambda s: (s[0] < n) & jnp.any(s[1] < 3)  # noqa: E731
        return jax.lax.while_loop(going, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))

    args = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    counts = counts_of(fn, *args, trips=(7.5,))
    assert counts.flops == 7.5 * 2 * 16**3
    assert counts.assumed == ("jit(fn)/while",)
    for trips in ((), (1, 2)):
        with pytest.raises(ValueError, match=r"1 loops .*jit\(fn\)/while.* given for"):
            counts_of(fn, *args, trips=trips)


def test_a_condition_runs_once_more_than_its_loop():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)

    def local(x):
        going = lambda x: jax.lax.psum(jnp.sum(x), "fsdp") < 9  # noqa: E731
        return jax.lax.while_loop(going, lambda x: x * 2, x)

    spec = PartitionSpec("fsdp")
    fn = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    counts = counts_of(fn, array_on(mesh, (32, 16), "fsdp"), trips=(5,))
    assert collective_totals(counts) == {("all-reduce", 4): (6, 6 * 4 * 2 * 3 / 4)}


def test_the_costlier_branch_of_a_conditional_counts():
    args = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    for branches in ((lambda x: x @ x, jnp.sin), (jnp.sin, lambda x: x @ x)):
        fn = lambda x, n, branches=branches: jax.lax.cond(n > 0, *branches, x)  # noqa: E731
        assert counts_of(fn, *args).flops == 2 * 16**3


def test_aliases():
    """The parameters whose memory a result reuses."""
    x, y = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (4, 2))
    fn = lambda x, y: (y + 1, x * 2)  # noqa: E731
    for donated, sizes in (((), 0), ((1,), 64), ((0, 1), 128 + 64)):
        parsed = hlo.parse(compile_text(fn, x, y, donate_argnums=donated))
        assert (parsed.aliased, count.count(parsed).aliased_bytes) == (donated, sizes)


# ------------------------------------------------------------------------------------- HLO text


def module(*computations: str) -> hlo.Module:
    """A module of TPU text; the last computation is the entry."""
    *others, entry = (text.strip("\n") for text in computations)
    return hlo.parse("\n\n".join(["HloModule m, num_partitions=8", *others, f"ENTRY {entry}", ""]))


def test_shapes_and_places():
    text = """
%main (p: f32[8,128]) -> (f32[8,128], (bf16[4], pred[3])) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %c = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%p)
  ROOT %t = ((f32[8,128]{1,0:T(8,128)S(5)}, s32[]), token[], s4[3]{0}) custom-call(%p, \
/*index=1*/%c), custom_call_target="mine", frontend_attributes={kernel_metadata={
"xprof_metadata":"(}"
}}, metadata={op_name="jit(f)/mine"}
}"""
    entry = module(text).entry
    leaves = [[(str(x), x.space) for x in entry.ops[name].result] for name in ("c", "t")]
    assert leaves == [
        [("bf16[8,128]", 1), ("f32[8,128]", hlo.HBM), ("u32[]", 2)],
        [("f32[8,128]", hlo.HOST), ("s32[]", 0), ("token[]", 0), ("s4[3]", 0)],
    ]
    assert [x.bytes for x in entry.ops["t"].result] == [4096, 4, 0, 1.5]
    assert hlo.Buffer("pred", (3, 2), 0).bytes == 6
    assert entry.root is entry.ops["t"]
    assert entry.root.operands == ("p", "c")
    assert entry.root.attribute("custom_call_target") == "mine"
    assert (entry.root.where, entry.ops["c"].where) == ("jit(f)/mine", "c")
    assert [op.name for op in entry.parameters] == ["p"]
    assert [(op.name, i) for op, i in entry.users["p"]] == [("c", 0), ("t", 0)]


def test_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing of the kind")


LOOP = """
%body (p: (s32[], f32[4,4], s32[])) -> (s32[], f32[4,4], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %copied = s32[]{{:T(128)S(6)}} copy(%i)
  %x = f32[4,4]{{1,0}} get-tuple-element(%p), index=1
  %n = s32[]{{:T(128)}} get-tuple-element(%p), index=2
  %by = s32[] constant({by})
  %next = s32[]{{:T(128)}} add({order})
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}, s32[]{{:T(128)}}) tuple(%next, %y, {kept})
}}

%condition (q: (s32[], f32[4,4], s32[])) -> pred[] {{
  %q = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}, s32[]{{:T(128)}}) parameter(0)
  %at = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %to = s32[]{{:T(128)}} get-tuple-element(%q), index=2
  ROOT %lt = pred[]{{:T(512)}} compare({compared}), direction={direction}
}}

ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4]{{1,0}} parameter(0)
  %from = s32[]{{:T(128)}} constant({start})
  %begin = s32[]{{:T(128)S(6)}} copy(%from)
  %bound = s32[]{{:T(128)}} constant({bound})
  %init = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}, s32[]{{:T(128)}}) tuple(%begin, %x, %bound)
  %loop = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}, s32[]{{:T(128)}}) while(%init), \
condition=%condition, body=%body, metadata={{op_name="jit(f)/while"}}
  ROOT %out = f32[4,4]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
USUAL = {
    "start": 0,
    "bound": 6,
    "by": 1,
    "order": "%copied, %by",
    "kept": "%n",
    "compared": "%at, %to",
    "direction": "LT",
}


@pytest.mark.parametrize(
    ("change", "trips"),
    [
        ({}, 6),
        ({"order": "%by, %copied"}, 6),
        ({"start": 2}, 4),
        ({"by": 4}, 2),  # 0, 4
        ({"direction": "LE"}, 7),
        ({"direction": "NE"}, 6),
        ({"compared": "%to, %at", "direction": "GT"}, 6),
        ({"compared": "%to, %at", "direction": "GE"}, 7),
        ({"start": 5, "bound": 0, "by": -1, "direction": "GT"}, 5),
        ({"start": 5, "bound": 0, "by": -1, "direction": "GE"}, 6),
        ({"start": 9}, 0),
        ({"direction": "GT"}, None),  # the index moves away from the bound
        ({"kept": "%next"}, None),  # the bound changes
        ({"order": "%n, %by"}, None),  # the compared element is not an index
        ({"order": "%copied, %copied"}, None),
        ({"compared": "%at, %at"}, None),
    ],
)
def test_trips_are_read_off_a_loop(change, trips):
    """A TPU's text does not state them, and not every loop has a known count."""
    parsed = hlo.parse("HloModule m, num_partitions=1\n" + LOOP.format(**USUAL | change))
    loop = parsed.entry.ops["loop"]
    assert loops.trips(parsed, parsed.entry, loop, {}) == trips
    given = () if trips is not None else (11,)
    assert count.count(parsed, given).flops == (11 if trips is None else trips) * 2 * 4**3


def test_positions_of_a_convolution():
    """Batched matmuls become convolutions with holes on TPU. The reference is a Python loop."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        size, kernel, stride, lhs, rhs = rng.integers(1, 5, 5).tolist()
        pad, result = int(rng.integers(0, 4)), int(rng.integers(1, 7))
        want = 0
        for o in range(result):
            for k in range(kernel):
                at = o * stride + k * rhs - pad
                want += any(at == lhs * i for i in range(size))
        got = _positions(
            size, kernel, result, stride=stride, pad=pad, lhs_dilate=lhs, rhs_dilate=rhs
        )
        assert got == want


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "want"),
    [
        ((8, 16), (16, 32), (8, 32), "dim_labels=bf_io->bf", 8 * 16 * 32),
        # Attention's scores, [2, 3] batches: 7 x 5 of 4.
        (
            *((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 7, 5)),
            "window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01oi->01bf",
            2 * 3 * 7 * 5 * 4,
        ),
        # A projection to two heads.
        (
            *((2, 7, 6, 1), (2, 4, 6), (2, 4, 2, 7)),
            "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_1oi->0o1b",
            None,
        ),
        ((6, 8), (8, 4), (6, 4), "dim_labels=bf_io->bf, feature_group_count=2", 6 * 4 * 4),
        # Positions (-3, -2), (-1, 0) and (1, 2) of 4.
        (
            *((7, 4, 6), (2, 6, 5), (7, 3, 5)),
            "window={size=2 stride=2 pad=3_0}, dim_labels=b0f_0io->b0f",
            3 * 7 * 6 * 5,
        ),
    ],
)
def test_convolutions(left, right, result, attributes, want):
    if want is None:  # the shapes that a TPU's compiler wrote for [2, 7, 6] x [6, 2, 4]
        right, attributes = (2, 4, 6, 1), attributes.replace("1oi->0o1b", "1oi0->0f1b")
        want = 2 * 7 * 6 * 2 * 4
    shapes = [f"f32[{','.join(map(str, dims))}]" for dims in (left, right, result)]
    parsed = module(f"""
%main (a: {shapes[0]}, b: {shapes[1]}) -> {shapes[2]} {{
  %a = {shapes[0]}{{1,0}} parameter(0)
  %b = {shapes[1]}{{1,0}} parameter(1)
  ROOT %c = {shapes[2]}{{1,0}} convolution(%a, %b), {attributes}
}}""")
    assert count.count(parsed).flops == 2 * want


@pytest.mark.parametrize(
    ("where", "config", "want"),
    [
        ("jit(f)/mine/pallas_call", '{"cost_estimate":{"flops":"12345"}}', 12345),
        ("online-softmax", "{}", 2 * 2 * 5 * 128 * 64),
        ("jit(f)/mine/pallas_call", "{}", None),
    ],
)
def test_kernels(where, config, want):
    """A kernel's own estimate and the compiler's softmax are counted; others are listed."""
    operands = "%q, %v" if where == "online-softmax" else "%m, %q, %k"
    counts = count.count(
        module(f"""
%main (m: s8[1,4,4], q: bf16[2,5,128], k: bf16[2,7,128], v: bf16[2,128,64]) -> bf16[2,5,128] {{
  %m = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[2,5,128]{{2,1,0}} parameter(1)
  %k = bf16[2,7,128]{{2,1,0}} parameter(2)
  %v = bf16[2,128,64]{{2,1,0}} parameter(3)
  ROOT %o = bf16[2,5,128]{{2,1,0}} custom-call({operands}), custom_call_target="tpu_custom_call", \
metadata={{op_name="{where}"}}, backend_config={{"custom_call_config":{config}}}
}}""")
    )
    assert counts.flops == (want or 0)
    assert counts.uncounted == (() if want else (where,))
    operand_bytes = 2 * 2 * 128 * 64 if "%v" in operands else 16 + 2 * 2 * 7 * 128
    assert counts.hbm_bytes == operand_bytes + 2 * (2 * 5 * 128 + 2 * 5 * 128)


@pytest.mark.parametrize(
    ("attributes", "want"),
    [
        ("replica_groups={{0,4,8},{1,5,9}}, x={{1}}", 3),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}, x=1", 2),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 2),
        ("source_target_pairs={{0,0},{1,2},{2,3},{3,1}}", 3),
        ("source_target_pairs={{0,1},{1,2},{2,3}}", 4),
        ("replica_groups={}", 64),
    ],
)
def test_group_sizes(attributes, want):
    op = hlo.Op("x", "all-reduce", (), (), "", f", channel_id=1, {attributes}, metadata={{}}")
    assert count.group_size(op, 64) == want


FUSED = """
%slice_update (a: f32[9,64], b: f32[9,64], i: s32[], c: f32[1,64], d: f32[2]) -> \
(f32[1,64], f32[9,64], f32[2]) {
  %a = f32[9,64]{1,0} parameter(0)
  %b = f32[9,64]{1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %c = f32[1,64]{1,0} parameter(3)
  %d = f32[2]{0} parameter(4)
  %flat = f32[9,1,64]{2,1,0} bitcast(%a)
  %slice = f32[1,1,64]{2,1,0} dynamic-slice(%flat, %i, %i, %i), dynamic_slice_sizes={1,1,64}
  %row = f32[1,64]{1,0} bitcast(%slice)
  %sum = f32[1,64]{1,0} add(%row, %c)
  %updated = f32[9,64]{1,0} dynamic-update-slice(%b, %sum, %i, %i)
  %same = f32[9,64]{1,0} bitcast(%updated)
  ROOT %t = (f32[1,64]{1,0}, f32[9,64]{1,0}, f32[2]{0}) tuple(%sum, %same, %d)
}
"""


@pytest.mark.parametrize(
    ("places", "hbm", "host"),
    [
        # A row of 256 bytes is sliced from a, read from c, written alone and into b. d is free.
        (("", "", ""), 4 * 256, 0),
        (("S(1)", "", ""), 3 * 256, 0),  # the sliced array is in vector memory
        (("S(5)", "", ""), 3 * 256, 256),  # the sliced array is in host memory
        (("", "S(1)", ""), 3 * 256, 0),  # the updated array is in vector memory
        (("", "", "S(1)"), 3 * 256, 0),  # the new row is in vector memory
    ],
)
def test_traffic_of_a_fusion(places, hbm, host):
    a, b, row = (f"{{1,0:T(8,128){place}}}" for place in places)
    parsed = module(
        FUSED,
        f"""
%main (a: f32[9,64], b: f32[9,64], i: s32[], c: f32[1,64], d: f32[2]) -> f32[1,64] {{
  %a = f32[9,64]{a} parameter(0)
  %b = f32[9,64]{b} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  %c = f32[1,64]{{1,0:T(8,128)}} parameter(3)
  %d = f32[2]{{0}} parameter(4)
  %f = (f32[1,64]{row}, f32[9,64]{b}, f32[2]{{0}}) fusion(%a, %b, %i, %c, %d), kind=kLoop, \
calls=%slice_update
  ROOT %out = f32[1,64]{row} get-tuple-element(%f), index=0
}}""",
    )
    counts = count.count(parsed)
    assert (counts.hbm_bytes, counts.host_bytes) == (hbm, host)


def test_traffic_of_copies_slices_and_gathers():
    """An asynchronous op counts where it starts; a copy to vector memory only reads HBM."""
    parsed = module("""
%main (h: f32[64], x: f32[64,8], i: s32[4,1], u: f32[4,8]) -> f32[64,8] {
  %h = f32[64]{0:T(128)S(5)} parameter(0)
  %x = f32[64,8]{1,0} parameter(1)
  %i = s32[4,1]{1,0:S(1)} parameter(2)
  %u = f32[4,8]{1,0:S(1)} parameter(3)
  %in = (f32[64]{0:T(128)}, f32[64]{0:T(128)S(5)}, u32[]{:S(2)}) copy-start(%h)
  %in.done = f32[64]{0:T(128)} copy-done(%in)
  %near = (f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %near.done = f32[64,8]{1,0:S(1)} copy-done(%near)
  %part = ((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16]}
  %part.done = f32[16,8]{1,0:S(1)} slice-done(%part)
  %there = (f32[64,8]{1,0}, f32[64,8]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %there.done = f32[64,8]{1,0:S(1)} collective-permute-done(%there)
  %rows = f32[4,8]{1,0:S(1)} gather(%x, %i), offset_dims={1}
  %new = f32[64,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %put = f32[64,8]{1,0} scatter(%new, %i, %u), to_apply=%add
}""")
    largest = count.count(parsed, largest=6).largest
    sizes = [x.bytes for x in largest]
    assert len(sizes) == 6
    assert sizes == sorted(sizes, reverse=True)
    assert (largest[0].shape, sizes[0]) == ("f32[64,8]", 2048)
    by_op = {
        op.name: dict(traffic.traffic(parsed, parsed.entry, op)) for op in parsed.entry.ops.values()
    }
    by_op = {name: {k: v for k, v in moved.items() if v} for name, moved in by_op.items()}
    assert by_op == {
        **{name: {} for name in by_op},
        "in": {hlo.HOST: 256, hlo.HBM: 256},
        "near": {hlo.HBM: 2048, 1: 2048},
        "part": {hlo.HBM: 512, 1: 512},
        "there": {hlo.HBM: 2048, 1: 2048},
        "rows": {hlo.HBM: 128, 1: 16 + 128},
        "put": {hlo.HBM: 128, 1: 16 + 128},
    }


def test_asynchronous_collectives_count_once():
    """A TPU fuses one all-gather into every op that overlaps it; a reduce-scatter is a fusion."""
    gather = 'replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}'
    parsed = module(
        f"""
%begin (p: f32[8,16]) -> (f32[8,16], f32[32,16]) {{
  %p = f32[8,16]{{1,0}} parameter(0)
  %g = f32[32,16]{{1,0}} all-gather(%p), channel_id=7, {gather}
  ROOT %c = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}""",
        f"""
%end (p.1: f32[8,16], q.1: f32[32,16]) -> f32[32,16] {{
  %p.1 = f32[8,16]{{1,0}} parameter(0)
  %q.1 = f32[32,16]{{1,0}} parameter(1)
  %g.1 = f32[32,16]{{1,0}} all-gather(%p.1), channel_id=7, {gather}
  ROOT %d = f32[32,16]{{1,0}} custom-call(%p.1, %q.1, %g.1), \
custom_call_target="AsyncCollectiveDone"
}}""",
        """
%all-reduce-scatter.3 (r: f32[32,16]) -> f32[8,16] {
  %r = f32[32,16]{1,0} parameter(0)
  %s = f32[32,16]{1,0} all-reduce(%r), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}
  %z = u32[] constant(0)
  ROOT %mine = f32[8,16]{1,0} dynamic-slice(%s, %z, %z), dynamic_slice_sizes={8,16}
}""",
        """
%main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %b = (f32[8,16]{1,0}, f32[32,16]{1,0}) fusion(%x), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %b0 = f32[8,16]{1,0} get-tuple-element(%b), index=0
  %b1 = f32[32,16]{1,0} get-tuple-element(%b), index=1
  %e = f32[32,16]{1,0} fusion(%b0, %b1), kind=kCustom, \
output_to_operand_aliasing={{}: (1, {})}, calls=%end
  ROOT %out = f32[8,16]{1,0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.3
}""",
    )
    counts = count.count(parsed)
    whole, share = 4 * 32 * 16, 4 * 8 * 16
    assert collective_totals(counts) == {
        ("all-gather", 4): (1, 3 * share),
        ("reduce-scatter", 4): (1, whole * 3 / 4),
    }
    # The gather reads a share and writes the whole; the reduce-scatter does the opposite.
    assert counts.hbm_bytes == 2 * (whole + share)


def test_collectives_of_another_core():
    """A computation that TPU7x runs on its sparse cores."""
    parsed = module(
        """
%called (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8]
}, execution_thread="sparsecore"
""",
        """
%main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %s = ((bf16[4,8]{1,0}, token[]), bf16[16,8]{1,0}) call-start(%x), \
async_execution_thread="sparsecore", to_apply=%called
  ROOT %d = bf16[16,8]{1,0} call-done(%s)
}""",
    )
    counts = count.count(parsed)
    assert collective_totals(counts) == {("all-gather", 4): (1, 3 * 64)}
    assert counts.hbm_bytes == 64 + 256


# ------------------------------------------------------------------------------------- verdicts

COUNTS = count.Counts(
    flops=197e12,
    hbm_bytes=2 * 819e9,
    host_bytes=0,
    collectives=(
        count.Collective("all-gather", 4, "jit(f)/dot", 1, 80e9),
        count.Collective("all-gather", 4, "jit(f)/add", 2, 10e9),
    ),
    aliased_bytes=0,
    largest=(count.Array("f32[8]", 32, "jit(f)/add"),),
    assumed=(),
    uncounted=(),
)
GIB = 2**30


def program(**sizes) -> preflight.Program:
    zeros = dict.fromkeys((field.name for field in dataclasses.fields(Memory)), 0.0)
    memory = Memory(**zeros | {name: size * GIB for name, size in sizes.items()})
    return preflight.Program("step", preflight.parse_topology(V5E), memory, COUNTS, runs=8)


def test_roofline():
    """1 s of matmuls beside 2 s of HBM, then 90 GB over one link of 45 GB/s."""
    rated = program(parameters=1)
    parts = rated.compute_seconds, rated.memory_seconds, rated.network_seconds
    assert parts == pytest.approx((1, 2, 2))
    assert rated.seconds == pytest.approx(4)
    assert rated.overlapped_seconds == pytest.approx(2)
    half = dataclasses.replace(rated, topology=preflight.parse_topology("tpu7x:2x2x1"))
    assert half.compute_seconds == pytest.approx(197e12 / (2307e12 / 2))
    assert half.memory_seconds == pytest.approx(2 * 819e9 / (7380e9 / 2))
    assert half.usable == 94.75 * GIB


@pytest.mark.parametrize(
    ("flops", "hbm", "sent", "want"),
    [(3, 2, 1, "FLOPs"), (2, 3, 1, "HBM"), (1, 2, 3, "network")],
)
def test_what_takes_longest(flops, hbm, sent, want):
    """Seconds of each part; nothing is said of programs on several slices."""
    collective = count.Collective("all-gather", 4, "", 1, sent * 45e9)
    work = {"flops": flops * 197e12, "hbm_bytes": hbm * 819e9, "collectives": (collective,)}
    rated = dataclasses.replace(program(), counts=dataclasses.replace(COUNTS, **work))
    assert rated.bound == want
    assert rated.overlapped_seconds == pytest.approx(3)
    joined = dataclasses.replace(rated, topology=preflight.parse_topology(V5E, 2))
    assert joined.bound == "?"
    assert math.isnan(joined.overlapped_seconds)


def test_what_fits():
    """Everything but host memory counts against the usable HBM."""
    assert program(parameters=10, temporaries=5.5, host=99).fits
    assert "fits, 15.50 of 15.75 GiB (98 %)" in preflight.verdict(program(other=10, outputs=5.5))
    too_large = program(parameters=2, optimizer=4, temporaries=10.5)
    assert not too_large.fits
    lines = preflight.verdict(too_large).splitlines()
    assert lines[0] == "step: does not fit, 0.75 GiB over 15.75"
    assert [line.split(" of ")[0].strip() for line in lines[1:3]] == ["10.50 GiB", "6.00 GiB"]
    assert "--remat full" in lines[1]
    assert "more fsdp in --mesh" in lines[2]
    frozen = preflight.verdict(program(parameters=14, cache=4, temporaries=0.1))
    assert frozen.index("--offload") < frozen.index("of cache")
    assert "--remat" not in frozen  # it would save next to nothing
    rollout = dataclasses.replace(program(temporaries=16), name="rollout")
    assert "--sample_batch" in preflight.verdict(rollout)
    assert "--remat" not in preflight.verdict(rollout)
    uncompiled = dataclasses.replace(program(temporaries=1), counts=None)
    assert not uncompiled.fits
    assert math.isnan(uncompiled.seconds)


def test_a_verdict_says_where_most_is_sent_from():
    lines = preflight.verdict(program()).splitlines()
    assert lines[1:] == [
        "  89 % of bytes sent: all-gather, 1 times, at jit(f)/dot",
        "  11 % of bytes sent: all-gather, 2 times, at jit(f)/add",
    ]


def test_a_verdict_names_what_is_not_known():
    counts = dataclasses.replace(COUNTS, assumed=("jit(f)/while",), uncounted=("jit(f)/mine",))
    text = preflight.verdict(dataclasses.replace(program(), counts=counts))
    assert "kernels of unknown FLOPs, not counted: jit(f)/mine" in text
    assert "loops with assumed trip counts: jit(f)/while" in text


def test_tables_and_json():
    programs = [program(parameters=1, optimizer=2, host=3), dataclasses.replace(program(), runs=1)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*preflight.tables(programs))
    text = console.export_text()
    assert "v5e:4x4 (v5litepod-16), 16 devices, 15.75 GiB of HBM usable in each" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("step")]
    assert rows[0] == ["step", "1.00", "2.00", *["0.00"] * 5, "3.00", "3.00"]
    work = ["197", "1,000", "1,638", "2,000", "90", "2,000"]
    assert rows[2] == ["step", *work, "network", "2,000", "4,000", "8"]
    assert rows[4] == ["step", "all-gather", "4", "3", "90,000", "2,000"]
    assert "all runs" in text
    [total] = [line.split() for line in text.splitlines() if line.strip().startswith("all runs")]
    assert total == ["all", "runs", "18,000", "36,000"]  # 9 runs of 2 s to 4 s
    kept = json.loads(json.dumps(programs[0].json()))
    assert kept["memory"]["peak"] == 3 * GIB
    assert kept["seconds"]["roofline"] == pytest.approx(4)
    assert kept["seconds"]["overlapped"] == pytest.approx(2)
    assert kept["counts"]["collectives"][0]["bytes"] == 80e9
    uncompiled = dataclasses.replace(programs[0], counts=None)
    assert uncompiled.json()["seconds"] is None
    assert len(preflight.tables([uncompiled])) == 1


def test_what_the_compiler_says_of_too_large_a_program():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (6.37T) exceeds available HBM (15.75G)."
    )
    assert _needed(message) == 6.37 * 2**40
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of"
        " memory in memory space hbm. Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 7.41M."
        "\n\nTotal hbm usage >= 16.01G:\n    reserved        258.12M"
    )
    assert _needed(message) == 15.75 * 2**30 + 7.41 * 2**20
    assert _needed("INTERNAL: something else") is None


# ---------------------------------------------------------------------------------- absent TPUs


@pytest.fixture(scope="module")
def described():
    topology = preflight.parse_topology(V5E)
    return topology, preflight.make_mesh(topology, "fsdp=4,tensor=4")


def compile_program(name, jitted, args, topology) -> preflight.Program:
    [[result]] = preflight.analyse([preflight.Compilable(name, jitted, args)], topology)
    return result


def scan_loss(ws, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])


@needs_libtpu
def test_a_sharded_scan_on_tpu(described):
    """Six layers over fsdp and tensor: the exact FLOPs, and memory by kind of argument."""
    topology, mesh = described

    def fit(state, opt_state, x):
        grads = jax.grad(scan_loss)(state["params"], x)
        return {"params": state["params"] - grads}, opt_state + grads

    ws = array_on(mesh, (6, 512, 512), None, "fsdp", "tensor")
    x = array_on(mesh, (256, 512), "fsdp")
    jitted = jax.jit(fit, donate_argnums=(0, 1))
    result = compile_program("fit", jitted, ({"params": ws}, ws, x), topology)
    assert result.counts is not None
    # The gradient of the first layer's input is not needed, but a scan computes it.
    assert result.counts.flops == 3 * 6 * 2 * 256 * 512 * 512 / 16
    assert {each.group for each in result.counts.collectives} == {4}
    weights = 4 * 6 * 512 * 512 / 16
    arguments = result.memory.parameters, result.memory.optimizer, result.memory.other
    assert arguments == (weights, weights, 4 * 256 * 512 / 4)
    assert result.memory.outputs < 1e4  # both are donated
    assert result.fits
    assert not result.counts.assumed


@needs_libtpu
def test_collectives_by_hand_on_tpu(described):
    topology, mesh = described

    def local(x):  # [1024, 1024] of bfloat16: 2 MiB a device; for less XLA uses all-reduces
        x = jax.lax.psum(x, "fsdp")
        y = jax.lax.all_gather(jnp.tanh(x), "tensor", tiled=True)
        return jax.lax.psum_scatter(y * y, "fsdp", tiled=True, scatter_dimension=1)

    fn = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=PartitionSpec("fsdp"),
        out_specs=PartitionSpec("fsdp"),
        check_vma=False,
    )
    x = array_on(mesh, (4096, 1024), "fsdp", dtype=jnp.bfloat16)
    result = compile_program("collectives", jax.jit(fn), (x,), topology)
    assert result.counts is not None
    mib = 2**20
    assert collective_totals(result.counts) == {
        ("all-reduce", 4): (1, 2 * 3 / 4 * 2 * mib),
        ("all-gather", 4): (1, 3 * 2 * mib),
        ("reduce-scatter", 4): (1, 3 / 4 * 8 * mib),
    }


@needs_libtpu
def test_host_memory_on_tpu(described):
    """Arguments in host memory are counted separately, and so is copying them to the device."""
    topology, mesh = described
    weights = array_on(mesh, (2048, 2048), "fsdp", memory_kind="pinned_host")
    x = array_on(mesh, (64, 2048), "fsdp")

    def use(params, x):
        return x @ jax.device_put(params, NamedSharding(mesh, PartitionSpec("fsdp")))

    result = compile_program("use", jax.jit(use), (weights, x), topology)
    assert result.counts is not None
    share = 4 * 2048 * 2048 / 4
    assert (result.memory.host, result.memory.parameters) == (share, 0)
    assert result.counts.host_bytes == share


@needs_libtpu
def test_programs_come_in_their_order(described):
    """Results keep the order of the programs; an error is raised at its program's turn."""
    topology, mesh = described
    x = array_on(mesh, (64, 64), "fsdp")

    def slow(x):
        for _ in range(20):
            x = jnp.tanh(x @ x.T @ x)
        return x

    def wrong(x):
        raise ValueError("it is wrong")

    fns = {"slow": slow, "fast": jnp.tanh, "wrong": wrong, "never": jnp.tanh}
    programs = [preflight.Compilable(name, jax.jit(fn), (x,)) for name, fn in fns.items()]
    results = preflight.analyse(programs, topology)
    assert [next(results)[0].name, next(results)[0].name] == ["slow", "fast"]
    with pytest.raises(ValueError, match="it is wrong"):
        next(results)


@needs_libtpu
def test_nothing_begins_after_the_end(described, monkeypatch):
    """The second of four stops the analysis while the first compiles: the others never start."""
    topology, mesh = described
    second, begun = threading.Event(), []
    real = program_module._analyse

    def analyse(each, topology):
        begun.append(each.name)
        if each.name == "first":
            assert second.wait(60)
            time.sleep(0.2)  # long enough for a third to start
        return real(each, topology)

    def until(program):
        if program.name == "second":
            second.set()
        return program.name == "second"

    monkeypatch.setattr(program_module, "_analyse", analyse)
    x = array_on(mesh, (64, 64), "fsdp")
    names = "first", "second", "third", "fourth"
    programs = [preflight.Compilable(name, jax.jit(jnp.tanh), (x,)) for name in names]
    results = list(preflight.analyse(programs, topology, until))
    assert [each.name for [each] in results] == ["first", "second"]
    assert sorted(begun) == ["first", "second"]


@needs_libtpu
def test_too_large_for_a_tpu(described):
    """The compiler rejects it: the excess is known, and `usable` is the compiler's own limit."""
    topology, mesh = described
    x = array_on(mesh, (2**17, 2**17), "fsdp", "tensor")  # 4 GiB a device
    jitted = jax.jit(lambda params: (params + 1, params * 2, params - 3))
    result = compile_program("sums", jitted, (x,), topology)
    assert result.counts is None
    assert not result.fits
    assert (result.memory.parameters, result.memory.peak) == (4 * GIB, 16 * GIB)
    # What it was known to make is among the temporaries that the compiler needs.
    known = preflight.Compilable("sums", jitted, (x,), made=2.0 * GIB)
    [[again]] = preflight.analyse([known], topology)
    assert again.memory == result.memory
    limit = f"exceeds available HBM ({result.usable / GIB}G)"
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(limit)):
        jitted.lower(x).compile()


@needs_libtpu
@pytest.mark.parametrize(
    ("text", "mesh", "says"),
    [("v5p:4x4x4", "fsdp=-1,tensor=3", "does not divide"), ("v5e:4x4", "fsdp=3", "not divide")],
)
def test_meshes_that_do_not_fit(text, mesh, says):
    with pytest.raises(ValueError, match=says):
        preflight.make_mesh(preflight.parse_topology(text), mesh)


@needs_libtpu
def test_a_mesh_may_cut_an_axis_of_the_slice():
    mesh = preflight.make_mesh(preflight.parse_topology("v5p:4x4x4"), "fsdp=-1,tensor=2")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 32, "tensor": 2}


@needs_libtpu
@pytest.mark.parametrize(
    ("mesh", "across"), [("data=2,fsdp=4", "data"), ("fsdp=8", "fsdp"), ("fsdp=4,tensor=2", "fsdp")]
)
def test_slices_lie_along_data_or_fsdp(mesh, across):
    """The other axes lie within a slice."""
    grid = preflight.make_mesh(preflight.parse_topology("v5e:2x2", 2), mesh)
    slices = np.vectorize(lambda device: device.slice_index)(grid.devices)
    axis = grid.axis_names.index(across)
    first, second = np.split(slices, 2, axis)
    assert (set(first.flat), set(second.flat)) == ({0}, {1})


@needs_libtpu
def test_slices_lie_along_no_tensor():
    with pytest.raises(ValueError, match="tensor=8: neither data nor fsdp divides over 2 slices"):
        preflight.make_mesh(preflight.parse_topology("v5e:2x2", 2), "fsdp=1,tensor=8")


@needs_libtpu
def test_a_program_without_room_for_its_arguments_is_not_compiled():
    topology = preflight.parse_topology("v5e:2x2")
    mesh = preflight.make_mesh(topology)

    def f(params):
        return jnp.sum(params)

    x = array_on(mesh, (2**32,), "fsdp")  # float32, 4 GiB in each of four
    for resident, compiled in ((11 * GIB, True), (12 * GIB, False)):
        jitted = mock.Mock(wraps=jax.jit(f), __signature__=inspect.signature(f))
        compilable = preflight.Compilable("f", jitted, (x,), resident=resident)
        [[result]] = preflight.analyse([compilable], topology)
        assert (result.fits, jitted.lower.called) == (compiled, compiled)
        assert result.memory.peak >= 4 * GIB + resident
        assert preflight.lower_bound(compilable, topology).memory.peak == 4 * GIB + resident


@needs_libtpu
def test_every_chip_is_described_silently():
    """Without JAX_PLATFORMS, nothing is printed to stderr, and jax uses the CPU."""
    code = """
from instructjax import preflight
from instructjax.preflight.chips import CHIPS
for kind in CHIPS:
    topology = next(preflight.slices(kind))
    devices = preflight.make_mesh(topology).devices.flat
    assert len(devices) == topology.devices
    assert devices[0].device_kind in topology.chip.kinds
import jax
print(jax.config.jax_platforms, jax.devices()[0].platform)
"""
    hidden = ("JAX_PLATFORMS", "TPU_", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("cpu cpu\n", "", 0)


@needs_libtpu
def test_a_decoding_loop_on_tpu(described):
    """Each shard has its own rows, weights are split over tensor, and `trips` sets the turns."""
    topology, mesh = described
    weights = array_on(mesh, (256, 512), None, "tensor", dtype=jnp.bfloat16)

    def more(state, weights, *, limit):
        x, n = state
        going = (n < limit) & jnp.any(x > 0)
        return jax.lax.psum(going.astype(jnp.int32), "fsdp") > 0

    def decode(weights, x, *, limit):
        def local(weights, x):
            turn = lambda s: (jnp.tanh(s[0] @ weights @ weights.T), s[1] + 1)  # noqa: E731
            going = lambda s: more(s, weights, limit=limit)  # noqa: E731
            return jax.lax.while_loop(going, turn, (x, 0))[0]

        rows = PartitionSpec("fsdp")
        specs = {"in_specs": (PartitionSpec(), rows), "out_specs": rows, "check_vma": False}
        return jax.shard_map(local, mesh=mesh, axis_names={"fsdp"}, **specs)(weights, x)

    jitted = jax.jit(decode, static_argnames="limit")
    x = array_on(mesh, (64, 256), "fsdp", dtype=jnp.bfloat16)
    decode = preflight.Compilable(
        *("decode", jitted, (weights, x)),
        static={"limit": 9},
        trips=(7,),
        runs=3,
        parts={"nothing": (0,)},
    )
    [[nothing, whole]] = preflight.analyse([decode], topology)
    assert (nothing.name, nothing.runs, nothing.counts.flops) == ("nothing", 0, 0)
    assert nothing.memory == whole.memory
    assert whole.counts is not None
    assert whole.counts.flops == 7 * 2 * 2 * 16 * 256 * 512 / 4
    assert whole.counts.assumed == ("jit(decode)/shard_map/while",)
    assert whole.memory.parameters == 2 * 256 * 512 / 4
    assert whole.runs == 3


# -------------------------------------------------------------------------------------- script


@needs_libtpu
def test_the_script_searches(tmp_path, capsys):
    """The SFT step of a preset on the smallest slice that fits the mesh; figures go to a file."""
    out = tmp_path / "figures.json"
    call = "--preset miniature --model miniature --topology v5e --search --mesh fsdp=4,tensor=2"
    call += " --stages sft"
    script.cli([*call.split(), "--out", f"{out}"])
    output = capsys.readouterr().out
    assert "v5e:2x2 fsdp=4,tensor=2: --mesh data=1,fsdp=4,tensor=2 does not divide 4" in output
    assert "v5e:2x4 (v5litepod-8), 8 devices" in output
    assert "SFT step: fits" in output
    last = "everything fits with --topology v5e:2x4"
    assert output.splitlines()[-1] == last
    [result] = json.loads(out.read_text())
    counts, c = result["counts"], PRESETS["miniature"]
    tokens, layer = 8 * 128, c.width * (4 * c.width + 3 * c.mlp_width)
    attention = 2 * c.layers * 8 * 128 * 128 * c.width  # a matmul of scores, all heads
    matmuls = 2 * tokens * (c.layers * layer + c.width * c.padded_vocab_size)
    # The kernel has two matmuls forward, and three and four backward, where some are recomputed.
    assert counts["flops"] == (3 * matmuls + 9 * attention) / 8
    # Adam's two moments are as large as the parameters: float32, all but norms split over devices.
    memory = result["memory"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)


SFT = ["--stages", "sft"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset", "nothing"], "--preset nothing: not one of"),
        (["--model", "runs/nothing"], "--model runs/nothing: no such directory"),
        (["--preset", "miniature"], "implies no model: give --model"),
        ([*SFT, "--batch_size", "6"], "6: does not divide over 4 shards .*, as fsdp=2,tensor=2"),
        (["--batch_size", "6"], "--batch_size 6: not a multiple of --ppo.minibatch 64"),
        (
            [*SFT, "--batch_size", "4", "--microbatches", "3"],
            "--batch_size 4: not a multiple of --microbatches 3",
        ),
        (["--fit", "qwen3-4b", "--model", "gpt3-6b"], "--fit: not with --model"),
        (["--fit", "runs/none"], "--fit runs/none: no such directory"),
        (["--lora.rank", "2", "--lora.targets", "gate"], "--lora.targets gate: a layer of gpt2"),
        (["--ptx.ratio", "0"], "--ptx.ratio 0: must be at least 1"),
        (["--max_new_tokens", "2048"], "--max_new_tokens 2048: the model's context is 2048 tokens"),
        (["--length", "4096"], "--length 4096: the model's context is 2048 tokens"),
        (
            [*SFT, "--length", "4096", "--fit", "qwen3-0.6b", "pythia-410m"],
            "--length 4096: the model's context is 2048 tokens",
        ),
        (["--ptx.length", "4096"], "--ptx.length 4096: the model's context is 2048 tokens"),
    ],
)
@needs_libtpu
def test_what_the_script_refuses(flags, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.cli(["--topology", "v5e:2x2", *flags])
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "held", "work", "given", "tried"),
    [
        ("value gradient", 4, 20, {}, [{}, {"ppo.microbatches": 2}]),  # 2 microbatches fit
        ("value gradient", 4, 40, {}, [{}, {"ppo.microbatches": 4}]),  # 2 microbatches cannot fit
        ("value gradient", 4, 1000, {}, [{}]),  # 128 parts of 64 episodes
        ("ptx gradient", 4, 20, {}, [{}, {"ptx.microbatches": 16}]),  # twice the preset's 8
        ("value gradient", 4, 20, {"microbatches": 1}, [{"microbatches": 1}]),
        ("value gradient", 4, 20, {"ppo": flags_of.PPO(microbatches=1)}, [{"ppo.microbatches": 1}]),
        ("rollout", 4, 20, {}, [{}, {"sample_batch": 256}]),
        ("rollout", 4, 40, {}, [{}, {"sample_batch": 128}]),
        ("rollout", 4, 40, {"sample_batch": 512}, [{"sample_batch": 512}]),
        ("rollout", 4, 11 * 512, {}, [{}]),  # needs less than one prompt per shard
        ("policy step", 4, 20, {}, [{}]),
        ("value gradient", 16, 20, {}, [{}]),  # too large even without temporaries
    ],
)
def test_a_search_makes_parts_smaller(monkeypatch, capsys, name, held, work, given, tried):
    """The search tries the next mesh if smaller parts cannot help, or if a flag fixes them."""
    trials = []

    def analyse(config, topology, mesh, all_must_fit):
        assert all_must_fit
        if topology.devices == 1:
            raise ValueError("too small")
        names = "microbatches", "ppo.microbatches", "ptx.microbatches", "sample_batch"
        parts = {name: attrgetter(name)(config) for name in names}
        trials.append((mesh, {name: x for name, x in parts.items() if x is not None}))
        if mesh != "fsdp=4,tensor=1":
            return []  # no program is too large
        share = (config.sample_batch or 512) / 512 / (config.ppo.microbatches or 1)
        share /= (config.ptx.microbatches or 8) / 8
        temporaries = work * share * GIB
        memory = Memory(held * GIB, *[0.0] * 5, temporaries=temporaries, code=0.0, host=0.0)
        return [preflight.Program(name, topology, memory, COUNTS, 1)]

    monkeypatch.setattr(script, "analyse", analyse)
    script.search(script.Config(topology="v5e", search=True, **given))
    assert [parts for mesh, parts in trials if mesh == "fsdp=4,tensor=1"] == tried
    flags = "".join(f" --{name} {size}" for name, size in tried[-1].items())
    line = f"everything fits with --topology v5e:2x2{flags}\n"
    assert (line in capsys.readouterr().out) == (len(tried) == 2)


@needs_libtpu
def test_a_search_compiles_the_largest_programs_first(monkeypatch):
    """If they do not fit, the others are not compiled."""
    compiled = []

    def analyse(programs, topology, until):
        compiled.extend(each.name for each in programs)
        memory = Memory(*[0.0] * 6, temporaries=99 * GIB, code=0.0, host=0.0)
        yield [preflight.Program(compiled[0], topology, memory, COUNTS, 1)]

    monkeypatch.setattr(preflight, "analyse", analyse)
    config = script.Config(topology="v5e", search=True, stages=("ppo",), preset="instructgpt-1.3b")
    topology = preflight.parse_topology("v5e:4x8")
    script.analyse(config, topology, "fsdp=8,tensor=4", all_must_fit=True)
    assert compiled == [
        *("rollout", "policy step", "value step"),
        *("policy gradient", "ptx gradient", "value gradient"),
        *("reference", "reward model", "value net", "policy, re-scored"),
    ]


# ------------------------------------------------------------ the script's flags and its programs


def compilables(stage, model="miniature", preset="miniature", **flags):
    """The programs of a stage by name, on one device of this machine."""
    config = script.Config(topology="v5e:1x1", stages=(stage,), preset=preset, model=model, **flags)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return {each.name: each for each in script.programs_of(stage, config, mesh)}


def shape(tree, name):
    return tree[name].shape


EVERY = {
    *("rollout", "reference", "reward model", "value net"),
    *("policy gradient", "ptx gradient", "value gradient", "policy step", "value step"),
}


@pytest.mark.parametrize(
    ("flags", "more", "less"),
    [
        ({}, set(), set()),
        ({"ppo": flags_of.PPO(beta=0.0)}, set(), {"reference"}),
        ({"ppo": flags_of.PPO(value="shared")}, set(), {"value gradient", "value step"}),
        ({"ppo": flags_of.PPO(rescore=True)}, {"policy, re-scored"}, set()),
        ({"ptx": flags_of.PTX(coef=0.0)}, set(), {"ptx gradient"}),
        ({"lora": flags_of.LoRA(rank=2)}, set(), set()),
    ],
)
def test_flags_of_ppo_choose_its_programs(flags, more, less):
    assert set(compilables("ppo", **flags)) == (EVERY | more) - less


def test_lengths_and_parts_reach_the_programs():
    """Prompts of 40 tokens, responses of 24, 2 rows of 48 tokens of text an episode."""
    programs = compilables(
        "ppo",
        data=flags_of.Data(max_prompt=40),
        max_new_tokens=24,
        batch_size=32,
        sample_batch=8,
        ppo=flags_of.PPO(minibatch=16, microbatches=4),
        ptx=flags_of.PTX(ratio=2, length=48, microbatches=8),
    )
    _, prompts, *_ = programs["rollout"].args
    assert prompts.tokens_BP.shape == (8, 40)
    assert programs["rollout"].static["settings"].max_new_tokens == 24
    assert shape(programs["reference"].args[1], "tokens_BR") == (16, 24)
    for name, rows in (("policy gradient", (4, 24)), ("value gradient", (4, 24))):
        batch = programs[name].args[3]
        assert (shape(batch, "tokens_BR"), shape(batch, "prompt_BP")) == (rows, (4, 40))
    assert shape(programs["ptx gradient"].args[3], "tokens_BT") == (4, 48)
    runs = {name: each.runs for name, each in programs.items()}
    assert (runs["rollout"], runs["reference"]) == (4, 2)
    assert (runs["policy gradient"], runs["ptx gradient"], runs["policy step"]) == (8, 16, 2)


def test_microbatches_hold_as_many_rows_of_text_as_episodes():
    """--microbatches is for both; the flag of each goes before it."""
    of = {"batch_size": 32, "microbatches": 4, "ptx": flags_of.PTX(ratio=2)}
    programs = compilables("ppo", ppo=flags_of.PPO(minibatch=16), **of)
    batches = [programs[f"{name} gradient"].args[3] for name in ("policy", "ptx")]
    assert shape(batches[0], "tokens_BR")[0] == shape(batches[1], "tokens_BT")[0] == 4
    of["ptx"] = flags_of.PTX(ratio=2, microbatches=2)
    programs = compilables("ppo", ppo=flags_of.PPO(minibatch=16, microbatches=2), **of)
    batches = [programs[f"{name} gradient"].args[3] for name in ("policy", "ptx")]
    assert shape(batches[0], "tokens_BR")[0] == 8
    assert shape(batches[1], "tokens_BT")[0] == 16


LIMITS = flags_of.Data(max_prompt=200, max_response=100)  # 300, by 128


@pytest.mark.parametrize(
    ("stage", "flags", "want"),
    [
        ("sft", {}, (8, 128)),
        ("sft", {"length": 96, "batch_size": 4}, (4, 96)),
        ("sft", {"preset": "small", "model": "gpt3-1.3b"}, (8, 2048)),
        ("sft", {"preset": "small", "data": LIMITS}, (8, 256)),  # the context
        ("sft", {"preset": "small", "model": "gpt3-1.3b", "data": LIMITS}, (8, 384)),
        ("rm", {}, (6, 288)),
        ("rm", {"length": 200}, (6, 200)),
        ("rm", {"preset": "small"}, (8, 1280)),  # 128 + 9 x 128
        ("rm", {"preset": "instructgpt-1.3b", "length": 256}, (64, 256)),  # that of 6b
        ("rm", {"preset": "small", "data": flags_of.Data(max_response=20)}, (8, 512)),  # 236 + 180
        ("rm", {"preset": "small", "model": "gpt3-1.3b"}, (8, 4096)),  # 1,024 + 9 x 1,024
    ],
)
def test_rows_of_sft_and_rm(stage, flags, want):
    [program] = compilables(stage, **flags).values()
    assert shape(program.args[1], "tokens_BT") == want


def size_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("shared", [True, False], ids=["shared base", "own base"])
def test_lora_keeps_adapters_and_one_base(shared):
    """What is on the device beside a program's arguments, against a count by hand, in float32.

    A is 2 x (width of the input), B is 2 x (width of the output), of 7 matrices in 2 layers.
    """
    c = PRESETS["miniature"]
    D, F, V = c.width, c.mlp_width, c.padded_vocab_size
    base = 4 * (V * D + 2 * (4 * D * D + 3 * D * F + 2 * D) + D)
    adapter = 4 * 2 * 2 * (4 * 2 * D + 3 * (D + F))
    head = 4 * (D + 1)
    flags = {} if shared else {"reward_model": "miniature"}
    lora = flags_of.LoRA(rank=2)
    programs = compilables("ppo", lora=lora, ppo=flags_of.PPO(ema=0.9), **flags)
    # The policy's adapter with two moments and an average, the value net's with two moments and a
    # head, the reference's; and what the reward model and the value net have besides.
    held = base + 4 * adapter + 3 * (adapter + head) + adapter
    held += adapter + head if shared else 2 * base + head
    used = {
        "rollout": base + adapter,
        "reference": base + adapter,
        "reward model": base + head + (adapter if shared else 0),
        "value net": base + adapter + head,
        "policy gradient": base + adapter,
        "ptx gradient": base + adapter,
        "value gradient": base + adapter + head,
        "policy step": 4 * adapter,
        "value step": 3 * (adapter + head),
    }
    assert set(used) == set(programs)
    for name, each in programs.items():
        # Optimizers and schedules have counters of a few bytes.
        assert each.resident == pytest.approx(held - used[name], abs=64), name
        assert size_of(each.args) >= used[name], name


def test_a_value_net_on_the_policys_weights_is_not_held_twice():
    """A shared value head, no average, no reference: the policy's state and the reward model."""
    c = PRESETS["miniature"]
    D, F, V = c.width, c.mlp_width, c.padded_vocab_size
    base = 4 * (V * D + 2 * (4 * D * D + 3 * D * F + 2 * D) + D)
    head = 4 * (D + 1)
    programs = compilables("ppo", ppo=flags_of.PPO(value="shared", beta=0.0, ema=0.0))
    held = 3 * (base + head) + base + head
    for name, used in (
        ("rollout", base + head),
        ("reward model", base + head),
        ("value net", base + head),
        ("policy gradient", base + head),
        ("policy step", 3 * (base + head)),
    ):
        assert programs[name].resident == pytest.approx(held - used, abs=64), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_offload_leaves_the_policy_on_the_device_in_a_rollout(ema):
    """And an average at most, beside which the last weights are evaluated."""
    c = PRESETS["miniature"]
    policy = 4 * (c.padded_vocab_size * c.width + 2 * (4 * c.width**2 + 3 * c.width * c.mlp_width))
    policy += 4 * (2 * 2 * c.width + c.width)
    programs = compilables("ppo", offload=True, ppo=flags_of.PPO(ema=ema))
    assert programs["rollout"].resident == (policy if ema else 0)
    # One frozen model at a time is there for a pass; what is trained stays.
    held = 3 * policy * 2 + 3 * 4 * (c.width + 1) + (policy if ema else 0)
    assert programs["reference"].resident == pytest.approx(held, abs=64)
    assert programs["policy gradient"].resident == pytest.approx(held - policy, abs=64)


def test_fewer_microbatches_where_a_device_would_have_no_row():
    """As the scripts do: 8 rows on 8 devices are one part, whatever the preset or a flag says."""
    topology = preflight.parse_topology("v5e:2x4")
    for stage, flag in (("sft", None), ("rm", 4)):
        flags = {"preset": "small", "model": "miniature", "microbatches": flag}
        config = script.Config(topology="v5e:2x4", stages=(stage,), **flags)
        assert script.fitted(stage, config, topology, "").microbatches == 1
        assert script.fitted(stage, config, topology, "fsdp=4,tensor=2").microbatches == 2
    [step] = compilables("sft", preset="small", microbatches=8, batch_size=8).values()
    assert shape(step.args[1], "tokens_BT") == (8, 256)


def test_text_that_is_switched_off_may_be_longer_than_the_context():
    flags = {"stages": ("ppo",), "preset": "small", "model": "miniature", "max_new_tokens": 32}
    config = script.Config(topology="v5e:1x1", **flags, ptx=flags_of.PTX(coef=0.0, length=512))
    script.check(config)
    with pytest.raises(ValueError, match=r"--ptx\.length 512: the model's context is 256"):
        script.check(dataclasses.replace(config, ptx=flags_of.PTX(length=512)))


def test_lora_in_steps_of_sft_and_rm():
    """Adapters (and a head) are trained; the rest is an argument that gets no gradient."""
    for stage, head in (("sft", 0), ("rm", 4 * (128 + 1))):
        [full] = compilables(stage).values()
        [lora] = compilables(stage, lora=flags_of.LoRA(rank=2, targets=("query",))).values()
        trained = 4 * 2 * 2 * (2 * 128) + head
        assert size_of(lora.args[0].params) == trained
        assert size_of(lora.args[3]) == size_of(full.args[0].params) - head
        assert full.args[3] == {}


def test_the_sampler_makes_weights_unless_frozen_ones_serve():
    """Trained in float32 and sampled in bfloat16: a copy. The base of adapters needs none."""
    c = PRESETS["miniature"]
    D, F, V = c.width, c.mlp_width, c.padded_vocab_size
    weights = 2 * (V * D + 2 * (4 * D * D + 3 * D * F)) + 4 * (2 * 2 * D + D)  # norms are float32
    bfloat16 = {"model_dtype": "bfloat16"}
    assert compilables("ppo", **bfloat16)["rollout"].made == weights
    assert compilables("ppo", **bfloat16, lora=flags_of.LoRA(rank=2))["rollout"].made == 0
    assert compilables("ppo")["rollout"].made == 0  # in float32
    merged = compilables("ppo", lora=flags_of.LoRA(rank=2))["rollout"].made
    assert merged == 2 * (weights - 4 * (2 * 2 * D + D)) + 4 * (2 * 2 * D + D)


def test_what_a_program_makes_counts_before_it_is_compiled():
    topology = preflight.parse_topology("v5e:1x1")
    x = array_on(sharding.make_mesh(devices=jax.devices()[:1]), (4, 256))
    args = {"jitted": jax.jit(jnp.sin), "args": (x,), "resident": 10.0 * GIB}
    for made, fits in ((5.0, True), (6.0, False)):
        bound = preflight.lower_bound(preflight.Compilable("f", **args, made=made * GIB), topology)
        assert (bound.memory.peak <= bound.usable) == fits


@needs_libtpu
def test_one_chip(capsys):
    """SFT of the miniature on one v5e with LoRA. The table names what was compiled."""
    call = "--topology v5e:1x1 --preset miniature --model miniature --stages sft --lora.rank 2"
    script.cli(call.split())
    output = capsys.readouterr().out
    assert "v5e:1x1, sft: 8 rows of 128 tokens" in output
    assert "v5e:1x1 (v5litepod-1), 1 devices, 15.75 GiB" in output
    assert "SFT step: fits" in output


def test_fit_names_the_largest_model_that_fits(monkeypatch, capsys, tmp_path):
    """Largest first; each stage by itself; smaller ones are not tried once one fits."""
    tried = []

    def analyse(config, topology, mesh, all_must_fit):
        tried.append((config.stages, config.model))
        large = {"sft": "llama-3.2-1b", "ppo": "qwen3-0.6b"}
        fits, name = large[config.stages[0]] == config.model, "policy step"
        if config.model == "qwen3-0.6b":  # four times the preset's 8 parts fit
            fits, name = config.ppo.microbatches == 32, "policy gradient"
        memory = Memory(*[1.0 * GIB] * 6, temporaries=(1 if fits else 30) * GIB, code=0, host=0)
        part = preflight.Program("prefill", topology, memory, COUNTS, 0)
        return [part, preflight.Program(name, topology, memory, COUNTS, 1)]

    monkeypatch.setattr(script, "analyse", analyse)
    models = "smollm2-135m", "qwen3-4b", "qwen3-0.6b", "llama-3.2-1b"
    flags = {"stages": ("sft", "ppo"), "preset": "small", "out": tmp_path / "fit.json"}
    config = script.Config(topology="v5e:1x1", fit=models, **flags)
    script.run_preflight(config)
    assert tried == [
        *((("sft",), model) for model in ("qwen3-4b", "llama-3.2-1b")),
        *((("ppo",), model) for model in ("qwen3-4b", "llama-3.2-1b", *["qwen3-0.6b"] * 2)),
    ]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "sft: llama-3.2-1b fits; at most 7.00 of 15.75 GiB (policy step)",
        "ppo: qwen3-0.6b fits with --ppo.microbatches 32; at most 7.00 of 15.75 GiB (policy"
        " gradient)",
    ]
    written = json.loads(config.out.read_text())
    assert [(fit["stage"], fit["model"]) for fit in written] == [
        ("sft", "llama-3.2-1b"),
        ("ppo", "qwen3-0.6b"),
    ]
    none = dataclasses.replace(config, fit=models[1:2], stages=("ppo",))
    script.run_preflight(none)
    assert capsys.readouterr().out.splitlines()[-1] == "ppo: none fits"


def test_built_in_sizes():
    """Parameters, in millions, as each model's page on the Hugging Face hub has them."""
    counts = {name: flags_of.parameters(config) for name, config in flags_of.MODELS.items()}
    assert {name: round(n / 1e6, 1) for name, n in counts.items()} == {
        "smollm2-135m": 134.5,
        "pythia-410m": 405.3,
        "qwen3-0.6b": 596.0,
        "llama-3.2-1b": 1235.8,
        "qwen3-1.7b": 1720.6,
        "qwen3-4b": 4022.5,
        "llama-3.1-8b": 8030.3,
    }
    assert list(counts.values()) == sorted(counts.values())


@needs_libtpu
def test_a_search_in_vain(capsys):
    """It says why each slice fails. An error that holds on every slice is raised at once."""
    call = ["--topology", "v5e", "--search", "--stages", "sft"]
    call += ["--mesh", "fsdp=4", "--batch_size", "6"]
    with pytest.raises(ValueError, match="no slice of v5e is large enough"):
        script.cli(call)
    lines = capsys.readouterr().out.splitlines()
    tried = [line.split(": ")[0] for line in lines]
    assert tried == [f"v5e:{x} fsdp=4" for x in chips.CHIPS["v5e"].slices]
    with pytest.raises(SystemExit, match="2"):
        script.cli([*call, "--preset", "nothing"])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: --preset nothing: not one of")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"instructjax\[preflight\]"):
        preflight.make_mesh(preflight.parse_topology(V5E))
    with pytest.raises(OSError, match=r"instructjax\[preflight\]"):
        script.cli(["--topology", V5E])
