"""Packing, row formats, and batches as a pure function of (seed, n), on any number of hosts."""

import dataclasses
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax.data import (
    ComparisonRows,
    Dataset,
    PackedComparisonRows,
    PackedRows,
    PromptRows,
    Record,
    Stream,
)
from instructjax.data.batches import fitting, row_length
from instructjax.data.packing import pack
from instructjax.data.tokens import Spans

some = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=10)


def spans(sequences):
    lengths = np.array([len(s) for s in sequences], np.int64)
    stop = np.cumsum(lengths)
    return Spans(np.array([t for s in sequences for t in s], np.int32), stop - lengths, stop)


def dataset(kind, prompts, responses, ranks=None):
    """A Dataset of token lists: `prompts` [n], `responses` [n][K]."""
    most = max(map(len, responses), default=0)
    flat = spans([r for group in responses for r in group])
    live = np.arange(most) < np.array([len(g) for g in responses])[:, None]
    start, stop, rank_nk = (np.zeros(live.shape, d) for d in (np.int64, np.int64, np.int32))
    start[live], stop[live] = flat.start, flat.stop
    rank_nk[live] = [r for group in ranks or [[1] * len(g) for g in responses] for r in group]
    records = [Record(f"f:{i + 1}", {}) for i in range(len(prompts))]
    return Dataset(kind, records, spans(prompts), Spans(flat.ids, start, stop), rank_nk)


def named_tokens(lengths):
    """Token lists in which token i of document d is 1000 * d + i."""
    return [[1000 * d + i for i in range(n)] for d, n in enumerate(lengths, start=1)]


def silent(line):
    pass


@some
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90))
def test_pack_keeps_everything_and_fills_rows(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(n <= capacity for n in used)
    assert all(a + b > capacity for a, b in pairwise(used))  # none could merge


def test_pack_by_hand():
    # 6 goes first; 5 opens a row; 4 fills the row of 6; 3 and then 2 fill the row of 5.
    assert pack([5, 4, 6, 3, 2], 10) == [[2, 1], [0, 3, 4]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="lengths from 5 to 11: each must be from 1 to 10"):
        pack([5, 11], 10)
    with pytest.raises(ValueError, match="lengths from 0"):
        pack([0], 10)


def test_a_packed_row_by_hand():
    data = dataset("demonstrations", [[11, 12], [21]], [[[13, 2]], [[22, 23, 2]]])
    (row,) = PackedRows(data, 10, silent)
    assert row["tokens_BT"].tolist() == [11, 12, 13, 2, 21, 22, 23, 2, 0, 0]
    assert row["segments_BT"].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row["positions_BT"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0]
    assert (
        row["mask_BT"].tolist() == [False, False, True, True, False, True, True, True] + [False] * 2
    )


def test_a_long_text_by_hand():
    (first, second) = PackedRows(
        dataset("text", [[], []], [[[1, 2, 3, 4, 5, 6]], [[7]]]), 4, silent
    )
    assert first["tokens_BT"].tolist() == [1, 2, 3, 4]
    assert first["mask_BT"].tolist() == [False, True, True, True]
    assert second["tokens_BT"].tolist() == [5, 6, 7, 0]
    assert second["segments_BT"].tolist() == [1, 1, 2, 0]
    assert second["positions_BT"].tolist() == [0, 1, 0, 0]
    assert second["mask_BT"].tolist() == [False, True, False, False]


@some
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_packed_demonstrations(sizes):
    """No token is lost, each response token is a target once, none attends to another document."""
    sequences = named_tokens([p + r for p, r in sizes])
    prompts = [s[:p] for s, (p, _) in zip(sequences, sizes, strict=True)]
    responses = [[s[p:]] for s, (p, _) in zip(sequences, sizes, strict=True)]
    rows = PackedRows(dataset("demonstrations", prompts, responses), 20, silent)
    seen, targets = Counter(), Counter()
    for row in rows:
        tokens, segments, positions = (row[n] for n in ("tokens_BT", "segments_BT", "positions_BT"))
        live = segments > 0
        seen.update(tokens[live].tolist())
        targets.update(tokens[row["mask_BT"]].tolist())
        may_attend = (segments[:, None] == segments) & np.tri(20, dtype=bool) & live[:, None]
        assert (tokens // 1000 == tokens[:, None] // 1000)[may_attend].all()
        # A token attends to all earlier tokens of its document, at the right distance.
        assert (may_attend.sum(1) == positions + 1)[live].all()
        assert (tokens[live] % 1000 == positions[live]).all()
        assert not row["mask_BT"][~live].any()
    assert seen == Counter(t for s in sequences for t in s)
    assert targets == Counter(t for (r,) in responses for t in r)
    assert rows.fill_rate == pytest.approx(sum(seen.values()) / (20 * len(rows)))


@some
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(4, 32))
def test_packed_texts(sizes, length):
    """All but the first token of each piece is a target, and pieces begin every `length` tokens."""
    texts = named_tokens(sizes)
    rows = PackedRows(dataset("text", [[]] * len(texts), [[t] for t in texts]), length, silent)
    seen, targets = Counter(), Counter()
    for row in rows:
        live = row["segments_BT"] > 0
        seen.update(row["tokens_BT"][live].tolist())
        targets.update(row["tokens_BT"][row["mask_BT"]].tolist())
        assert (row["tokens_BT"][live] % 1000 % length == row["positions_BT"][live]).all()
    assert seen == Counter(t for text in texts for t in text)
    assert targets == Counter(t for text in texts for t in text if t % 1000 % length)


def test_demonstrations_must_fit_a_row():
    data = dataset("demonstrations", [[1], [1]], [[[2]], [[3] * 9]])
    with pytest.raises(ValueError, match=r"^f:2 has 10 tokens: load with context=8"):
        PackedRows(data, 8, silent)


def test_comparisons_by_hand():
    data = dataset(
        "comparisons", [[1], [2, 3]], [[[4, 9], [5, 6, 9]], [[7], [8], [7, 9]]], [[2, 1], [1, 1, 3]]
    )
    rows = ComparisonRows(data, multiple=8)
    batch = next(Stream(rows, 2, seed=0).once())
    assert batch["prompt_BP"].tolist() == [[0, 1], [2, 3]]
    assert batch["prompt_mask_BP"].tolist() == [[False, True], [True, True]]
    assert batch["responses_BKR"].shape == (2, 3, 6)  # P + R = 8
    assert batch["responses_BKR"][0].tolist() == [[4, 9] + [0] * 4, [5, 6, 9] + [0] * 3, [0] * 6]
    assert batch["response_mask_BKR"].sum(-1).tolist() == [[2, 3, 0], [1, 1, 2]]
    assert batch["response_mask_BKR"][0, 1].tolist() == [True] * 3 + [False] * 3
    assert batch["ranks_BK"].tolist() == [[2, 1, 0], [1, 1, 3]]
    assert batch["mask_BK"].tolist() == [[True, True, False], [True] * 3]
    assert batch["margin_B"].tolist() == [0, 0]
    assert batch["confidence_B"].tolist() == [1, 1]
    dtypes = {name: str(array.dtype) for name, array in batch.items()}
    assert dtypes == {
        "prompt_BP": "int32",
        "prompt_mask_BP": "bool",
        "responses_BKR": "int32",
        "response_mask_BKR": "bool",
        "ranks_BK": "int32",
        "mask_BK": "bool",
        "margin_B": "float32",
        "confidence_B": "float32",
    }


def test_packed_comparisons_by_hand():
    """The longest comparison (9 tokens) goes first, then one that fits after it (5 tokens)."""
    data = dataset(
        "comparisons",
        [[1], [2, 3], [1]],
        [[[4, 9], [5, 9]], [[6, 9], [7, 8, 9], [8, 9]], [[4, 4, 9], [9]]],
        [[2, 1], [1, 1, 3], [1, 2]],
    )
    records: Any = data.records
    records[0] = dataclasses.replace(records[0], margin=0.5, confidence=0.75)
    rows = PackedComparisonRows(data, 15, silent)
    assert rows.rows == [[1, 0], [2]]
    batch = next(Stream(rows, 2, seed=0).once())
    expected = {
        "tokens_BT": [2, 3, 6, 9, 7, 8, 9, 8, 9, 1, 4, 9, 5, 9, 0],
        "segments_BT": [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 6, 7, 7, 0],
        "parents_BT": [1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 5, 5, 5, 5, 0],
        "positions_BT": [0, 1, 2, 3, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2, 0],
        "last_BCK": [[3, 6, 8], [11, 13, 0]],
        "ranks_BCK": [[1, 1, 3], [2, 1, 0]],
        "mask_BCK": [[True] * 3, [True, True, False]],
        "margin_BC": [0, 0.5],
        "confidence_BC": [1, 0.75],
    }
    assert {name: array[0].tolist() for name, array in batch.items()} == expected
    assert batch["ranks_BCK"][1].tolist() == [[1, 2, 0], [0, 0, 0]]
    # Scores of rows go back to the order of the data; those of a filler at the end are left out.
    scores = np.arange(18.0).reshape(3, 2, 3)
    assert rows.by_comparison(scores).tolist() == [[3, 4, 5], [0, 1, 2], [6, 7, 8]]


def test_comparisons_must_fit_a_row():
    data = dataset("comparisons", [[1], [1]], [[[2], [3]], [[3] * 5, [4] * 4]], [[1, 2], [1, 2]])
    with pytest.raises(ValueError, match=r"^f:2 has 10 tokens, which a row of 8 cannot hold"):
        PackedComparisonRows(data, 8, silent)


def test_a_row_is_as_long_as_the_longest_record():
    """A comparison's length is that of its prompt and of all its responses."""
    short = dataset("comparisons", [[1]], [[[2] * 3, [3] * 4]], [[1, 2]])  # 8 tokens
    long = dataset("comparisons", [[1], [1]], [[[2], [3]], [[3] * 5, [4] * 3]], [[1, 2], [1, 2]])
    assert row_length([short], multiple=8) == 8
    assert row_length([short, long], multiple=8) == 16
    assert row_length([long]) == 128
    lines = []
    assert fitting(long, 9, lines.append) is long
    assert lines == []
    assert [record.where for record in fitting(long, 8, lines.append).records] == ["f:1"]
    assert lines == ["  1 dropped: over 8 tokens, the row's (--length); f:2 has 9 tokens"]
    with pytest.raises(ValueError, match=r"f:2 has 9 .* no record fits a row of 2: raise --length"):
        fitting(long, 2, lines.append)


# --- streams ---


def prompt_rows(count, offset=0):
    return PromptRows(dataset("prompts", [[offset + i] for i in range(count)], [[]] * count))


def ids(batch):
    return [token for (token,) in batch["prompts"]]


@few
@given(
    count=st.integers(1, 20),
    share=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    stop_at=st.integers(0, 9),
    more=st.integers(0, 7),
)
def test_streams_resume_and_shard(count, share, seed, stop_at, more):
    """Stopped at any step and restored, on 1 or 2 hosts, a stream goes on as it would have."""
    rows, size = [prompt_rows(count), prompt_rows(more + 1, 100)], 2 * share
    whole = [ids(b) for b in islice(Stream(rows, size, seed=seed).iterate(), 10)]
    halves = range(share), range(share, size)
    hosts = [Stream(rows, size, seed=seed, host_rows=half) for half in halves]
    resumed = [
        ids(left) + ids(right)
        for left, right in zip(*(h.iterate(stop_at, 10) for h in hosts), strict=True)
    ]
    assert resumed == whole[stop_at:]
    again = Stream(rows, size, seed=seed)
    assert [ids(b) for b in again.iterate(stop_at, 10)] == whole[stop_at:]
    assert ids(again.batch(stop_at)) == whole[stop_at]  # and without the batches before


@few
@given(count=st.integers(1, 40), size=st.integers(1, 8), seed=st.integers(0, 99))
def test_an_epoch_has_each_row_once(count, size, seed):
    stream = Stream(prompt_rows(count), size, seed=seed)
    order = [i for n in range(-(-3 * count // size)) for i in ids(stream.batch(n))]
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_order_depends_on_seed_and_epoch():
    first, other = (Stream(prompt_rows(50), 50, seed=s) for s in (0, 1))
    orders = [ids(first.batch(0)), ids(first.batch(1)), ids(other.batch(0)), ids(other.batch(1))]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(50)) not in orders


def test_mixtures_keep_their_shares():
    """Every ten rows have nine demonstrations and one text; each source repeats on its own."""
    stream = Stream([prompt_rows(30), prompt_rows(4, 1000)], 20, seed=3, weights=[0.9, 0.1])
    batches = [ids(stream.batch(n)) for n in range(20)]
    assert [sum(i >= 1000 for i in batch) for batch in batches] == [2] * 20
    texts = [i for batch in batches for i in batch if i >= 1000]
    assert Counter(texts) == {1000: 10, 1001: 10, 1002: 10, 1003: 10}
    equal = Stream([prompt_rows(30), prompt_rows(30, 1000)], 20, seed=3)
    assert sum(i >= 1000 for i in ids(equal.batch(0))) == 10
    # Two sources of one length have different orders.
    assert [i for i in ids(equal.batch(0)) if i < 1000] != [
        i - 1000 for i in ids(equal.batch(0)) if i >= 1000
    ]


def test_a_single_pass_sees_every_row_once_and_marks_fillers():
    hosts = [Stream(prompt_rows(7), 4, seed=0, host_rows=rows).once() for rows in ([0, 3], [1, 2])]
    indices = [b["indices"].tolist() for pair in zip(*hosts, strict=True) for b in pair]
    assert indices == [[0, 3], [1, 2], [4, -1], [5, 6]]
    data = dataset("comparisons", [[1]], [[[4], [5]]], [[1, 2]])
    (batch,) = Stream(ComparisonRows(data), 2, seed=0).once()
    assert batch["mask_BK"].tolist() == [[True, True], [False, False]]
    packed = PackedRows(dataset("text", [[]], [[[1, 2]]]), 4, silent)
    (batch,) = Stream(packed, 2, seed=0).once()
    assert batch["mask_BT"].sum(1).tolist() == [1, 0]


def test_stream_errors():
    packed = [PackedRows(dataset("text", [[]], [[[1, 2]]]), n, silent) for n in (4, 8)]
    for sources in (packed, [packed[0], prompt_rows(4)]):
        with pytest.raises(ValueError, match="several shapes"):
            Stream(sources, 2, seed=0)
    for weights in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"weights .* for 2 sources"):
            Stream([prompt_rows(4)] * 2, 2, seed=0, weights=weights)
    # Prompts are lists: prompts of different lengths may be mixed.
    long = PromptRows(dataset("prompts", [[1, 2, 3]], [[]]))
    assert len(Stream([prompt_rows(1), long], 2, seed=0).batch(0)["prompts"]) == 2
