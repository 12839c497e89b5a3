"""Rows, files and flags at random: each loads to what it says, or is refused with its place.

The examples are the same in every run. For others, and more of them:

    INSTRUCTJAX_FUZZ=20000 pytest -n0 tests/test_fuzz_rows.py      # examples of each test
"""

import csv
import gzip
import io
import json
import math
import os
import random
import re
import string
from fractions import Fraction
from pathlib import Path

import bad_rows
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructjax.data import DataConfig, read
from instructjax.data.fields import ALIASES, NAMES

EXAMPLES = int(os.environ.get("INSTRUCTJAX_FUZZ", "0"))


def fuzz(examples):
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.floats(0, 3).map(lambda x: round(x, 1)),
)
TEXTS = st.one_of(
    st.sampled_from(["", " ", "x", "1", "2", "1.0", "nan", "1_0", "[]", "{", "\ud800", "a\0b"]),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "L"]), max_size=4),
    NUMBERS.map(str),
)
KEYS = [*NAMES["comparisons"], *(x for names in ALIASES.values() for x in names), "role", "x"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*KEYS, "content", "from", "value"]), inner, max_size=3),
        st.lists(inner, max_size=3).map(json.dumps),
    ),
    max_leaves=6,
)
BASES = [base for base in bad_rows.KINDS if base is not bad_rows.tree]


@st.composite
def changed_rows(draw):
    """(base, row, whether it is as `base` made it): values replaced, left out or added."""
    base, seed = draw(st.sampled_from(BASES)), draw(st.integers(0, 99))
    row = base(random.Random(seed))
    changes = draw(st.integers(0, 2))
    for _ in range(changes):
        parent, key = row, draw(st.sampled_from(list(row)))
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.booleans()):
            parent = parent[key]
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw(st.sampled_from(keys))
        way = draw(st.sampled_from(["value", "value", "copy", "gone", "add"]))
        if way == "gone":
            del parent[key]
        elif way == "add":
            row[draw(st.sampled_from(KEYS))] = draw(VALUES)
        elif way == "copy":  # of a neighbour, such as another response
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            parent[key] = parent[draw(st.sampled_from(keys))]
        else:
            parent[key] = draw(VALUES)
        if not row:
            break
    return base, row, not changes


def write(path, good, text, layout):
    """Writes the text of a row between two good ones. Returns the place of the row."""
    if layout == "array":
        path = path.with_suffix(".json")
        path.write_text("[" + ", ".join([good, text, good]) + "]")
        return path, f"{path}: item 2"
    path = path.with_suffix(".jsonl.zst" if layout == "zst" else ".jsonl")
    data = "\n".join([good, text, good]).encode()
    path.write_bytes(zstandard.compress(data) if layout == "zst" else data)
    return path, f"{path}:2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(spec, kind, split="all", **options):
    """(records, what the error says): one of the two is empty. What is said can be printed."""
    try:
        records = read(
            DataConfig(spec, **options), kind, split=split, log=lambda line: line.encode()
        )
    except ValueError as error:
        said = str(error)
        said.encode()
        return [], said
    return records, ""


@given(changed_rows(), st.sampled_from(["lines", "array", "zst"]), st.data())
@fuzz(250)
def test_rows(folder, changed, layout, data):
    base, row, sound = changed
    kind = bad_rows.KINDS[base]
    if "message_id" in row:
        return
    text, twice = json.dumps(row), False
    if row and data.draw(st.integers(0, 9)) == 0:
        twice = True
        key = data.draw(st.sampled_from(list(row)))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(data.draw(VALUES))}}}"
    good = json.dumps(base(random.Random("good")))
    path, place = write(folder / "row", good, text, layout)
    records, said = outcome(f"jsonl:{path}", kind)
    if said:
        assert said.startswith(f"{place}: ")
        assert "\n" not in said
        assert not sound or twice
        records, said = outcome(f"jsonl:{path}", kind, on_error="skip")
        assert (len(records), said) == (2, "")
        return
    assert not twice
    assert len(records) == 3
    assert records[1].where == place
    check(kind, row, records[1])


RANKS = st.one_of(st.integers(1, 3), st.sampled_from([True, 1.0, "1", "2", 0, None, "\uff11"]))


@given(st.data())
@fuzz(250)
def test_comparisons(folder, data):
    """Responses, ranks and scores of few values, which often repeat, contradict or are booleans."""
    count = data.draw(st.integers(2, 3))
    row = {"prompt": "p"}
    for name, values in (("responses", st.sampled_from(["x", "y", "z", "w"])), ("ranks", RANKS),
                         ("scores", RANKS)):  # fmt: skip
        if name == "responses" or data.draw(st.booleans()):
            row[name] = data.draw(st.lists(values, min_size=count, max_size=count))
    path = folder / "comparisons.jsonl"
    path.write_text(json.dumps(row))
    records, said = outcome(f"jsonl:{path}", "comparisons")
    if said:
        assert re.match(rf"{re.escape(str(path))}:1: field '(responses|ranks|scores)\b", said)
    for record in records:
        check("comparisons", row, record)


def check(kind, row, record):
    """Whether the record says what the row says, read without the library."""
    texts = [record.prompt, *record.responses] if kind != "text" else record.responses
    assert all(text.strip() and text.encode() for text in texts)
    if kind == "comparisons":
        ranks, responses = record.ranks, record.responses
        assert 2 <= len(responses) == len(ranks) <= 9
        assert len(set(ranks)) > 1
        assert min(ranks) == 1
        assert len(set(zip(responses, ranks, strict=True))) == len(set(responses))
        given = row.get("responses") or [row.get("chosen"), row.get("rejected")]
        if all(isinstance(text, str) for text in given) and plain(row):
            assert responses == tuple(given)
            if "responses" in row:
                for name, sign in (("ranks", 1), ("scores", -1)):
                    check_order(row.get(name), ranks, sign)
        if row.get("margin") not in (None, "") and not blank(row["margin"]):
            assert record.margin == float(number(row["margin"]))
            assert 0 <= record.margin < math.inf
    if kind == "demonstrations" and set(row) == {"prompt", "completion"} and plain(row):
        assert (record.prompt, record.responses) == (row["prompt"], (row["completion"],))
    if kind == "text" and isinstance(row.get("text"), str):
        assert record.responses == (row["text"],)


def check_order(values, ranks, sign):
    if values is None:
        return
    numbers = [sign * number(value) for value in values]
    for a, rank_a in zip(numbers, ranks, strict=True):
        for b, rank_b in zip(numbers, ranks, strict=True):
            assert not (a < b and rank_a > rank_b), (values, ranks)


def number(value):
    """The exact value of a number or numeral."""
    assert not isinstance(value, bool)
    assert isinstance(value, int | float | str)
    if isinstance(value, str):
        assert set(value.strip()) <= set(string.digits + "+-.eE")
    return Fraction(value)


def blank(value):
    return isinstance(value, str | list | dict) and (not value or str(value).strip() in ("", "[]"))


def plain(row):
    """Whether a row's texts are no dialogues and no other column adds to them."""
    others = {"system", "system_prompt", "history", "tools", "input", "context", "messages"}
    others |= {"conversations", "conversation"}
    texts = [row.get("prompt"), *row.values()]
    return not others & set(row) and all(
        isinstance(text, str) and not re.search(r"\n\n(Human|Assistant):|^\s*\[", text)
        for text in texts[:1]
    )


# --- damaged files ---


def table(rows, delimiter):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def files():
    """Name -> a good file of demonstrations."""
    rows = [bad_rows.demonstration(random.Random(i)) | {"n": i} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    made = {
        "a.jsonl": lines,
        "a.json": json.dumps({"data": rows}).encode(),
        "a.csv": table(rows, ","),
        "a.tsv": table(rows, "\t"),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.txt": lines,
    }
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return made
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return made | {"a.parquet": out.getvalue().to_pybytes()}


FILES = files()


@given(st.sampled_from(list(FILES)), st.data())
@fuzz(150)
def test_damaged_files(folder, name, data):
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged)))
        way = data.draw(st.sampled_from(["change", "insert", "cut", "remove"]))
        piece = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b'"', b"\n", b"{"])))
        if way == "cut":
            del damaged[at:]
        else:
            damaged[at : at + {"change": len(piece), "insert": 0, "remove": 3}[way]] = piece
    path = folder / name
    path.write_bytes(damaged)
    kind = "text" if name == "a.txt" else "demonstrations"
    none_left = f"jsonl:{path}: no {kind} are left\n"
    records, said = outcome(f"jsonl:{path}", kind)
    assert records or said.startswith((f"{path}:", none_left))
    some, said = outcome(f"jsonl:{path}", kind, on_error="skip")
    assert len(some) >= len(records)
    assert some or said.startswith(none_left)


# --- flags ---

PIECES = ["prompt", "completion", "ranks", "responses", "=", ",", "{", "}", "?", "+", ":", "|"]
PIECES += ["signed", ".", "*", "a", "b", "0", "n", " ", "\\n", "\ud800", "é"]
ROW = {"a": "x", "b": {"a": [1, "y"]}, "n": '[{"a": "z", "a": 2}]', "prompt": "p"}


@given(
    st.one_of(
        st.lists(st.sampled_from(PIECES), max_size=9).map("".join),
        st.lists(st.sampled_from(PIECES), max_size=6).map(lambda p: "prompt=" + "".join(p)),
        st.lists(st.sampled_from(PIECES[7:]), max_size=6).map(lambda p: "ranks=" + "".join(p)),
    ),
    st.sampled_from(["prompts", "demonstrations", "comparisons"]),
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
)
@fuzz(250)
def test_flags(folder, columns, kind, split_by):
    path = folder / "flags.jsonl"
    path.write_text(json.dumps(ROW))
    options = {"columns": columns, "split_by": split_by, "validation": 0.0}
    records, said = outcome(f"jsonl:{path}", kind, split="train", **options)
    names = rf"{re.escape(str(path))}:1: field |--data\.(columns|split_by)\b"
    assert records or re.match(names, said)


@given(
    st.lists(st.sampled_from([*"ab[]*?~{}!-/ ", "\0", "\udcff", "**/", "**/*", "é"]), max_size=8)
)
@fuzz(100)
def test_paths(folder, pieces):
    tree = folder / "tree"
    (tree / "a").mkdir(parents=True, exist_ok=True)
    for name in ("a[b]", "b", "a/b"):
        (tree / name).write_text('{"prompt": "p"}')
    if not (tree / "a" / "loop").exists():
        (tree / "a" / "loop").symlink_to(tree)
    pattern = str(tree) + "/" + "".join(pieces)
    records, said = outcome(f"jsonl:{pattern}", "prompts")
    if said:
        assert said.startswith(f"jsonl:{tree}/")
        return
    places = [Path(record.where.removesuffix(":1")).resolve() for record in records]
    assert len(set(places)) == len(places) >= 1
    if os.path.isfile(pattern):
        assert places == [Path(pattern).resolve()]
