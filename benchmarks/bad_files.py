"""Files with one fault each, and wrong flags, beside `bad_rows`."""

import gzip
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from bad_rows import GONE, KINDS, Case, Make, demonstration, document, pair, rows, words

from instructjax.data.fields import Kind


def table(*bad: tuple[str, str | None], header: str = "prompt,completion") -> Make:
    """A CSV file with one of the bad rows: (line, field)."""

    def make(rng: random.Random) -> Case:
        text, named = rng.choice(bad)
        count = rng.randint(0, 6)
        good = [f'{words(rng)},"{words(rng)}\nmore"' for _ in range(count)]
        text = "\n".join([header, *good, text, "last,row"]) + "\n"
        name, data = "rows.csv", text.encode(errors="surrogateescape")
        if rng.random() < 0.3:
            name, data = "rows.csv.gz", gzip.compress(data)
        says = (f"{{folder}}/{name}:{2 * count + 2}: ",)
        says += () if named is None else (f"field '{named}'",)
        spec = f"jsonl:{{folder}}/{name}"
        return Case("demonstrations", {name: data}, spec, says, {}, count + 1)

    return make


def headed(*headers: tuple[str, str | None]) -> Make:
    """A CSV file with one of the bad headers: (line, field)."""

    def make(rng: random.Random) -> Case:
        header, named = rng.choice(headers)
        text = f"{header}\n{words(rng)},{words(rng)}\n".encode(errors="surrogateescape")
        says = ("{folder}/rows.csv:1: ",) + (() if named is None else (f"field '{named}'",))
        return Case("demonstrations", {"rows.csv": text}, "jsonl:{folder}/rows.csv", says)

    return make


def binary(rng: random.Random) -> Case:
    """A .txt file that is none, whole or line by line."""
    count = rng.randint(1, 6)
    good = [words(rng).encode() for _ in range(count)]
    heads = [
        b"\x7fELF\x02\x01\x01\0",
        b"PK\x03\x04",
        b"\x89PNG\r",
        b"\x1f\x8b\x08",
        "x".encode("utf-16"),
    ]
    data = b"\n".join([*good, rng.choice(heads), b"last"])
    lines = rng.random() < 0.5
    says = (f"{{folder}}/a.txt:{count + 1}: ", "field 'text'")
    options = {"txt": "line" if lines else "file"}
    kept = count + 1 if lines else None
    return Case("text", {"a.txt": data}, "jsonl:{folder}/a.txt", says, options, kept)


def torn(rng: random.Random) -> Case:
    """An archive that is cut or damaged: the place is the file."""
    text = "".join(json.dumps(document(rng)) + "\n" for _ in range(200)).encode()
    name, pack = rng.choice([("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
    data = pack(text)
    ways = [data[: rng.randrange(1, len(data))], text, data[:-1], b"\0" + data, b""]
    says = (f"{{folder}}/{name}: ",)
    return Case("text", {name: rng.choice(ways)}, f"jsonl:{{folder}}/{name}", says)


def parquet(rng: random.Random) -> Case:
    """A Parquet file with a bad cell, two columns of one name, or damage."""
    import pyarrow
    from pyarrow import parquet

    count, at = 6, rng.randrange(6)
    texts: list[Any] = [words(rng).encode() for _ in range(count)]
    names, place, named = ["prompt", "completion"], f": row {at}", "completion"
    way = rng.choice(["null", "blank", "bytes", "twice", "cut", "number"])
    texts[at] = {"null": None, "blank": b" ", "bytes": b"\xff"}.get(way, texts[at])
    column = pyarrow.array(texts, pyarrow.binary())
    if way == "number":
        column, place = pyarrow.array(range(count)), ": row 0"
    if way == "twice":
        names, place, named = ["prompt", "prompt"], "", "prompt"
    prompts = pyarrow.array([words(rng) for _ in range(count)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        parquet.write_table(pyarrow.Table.from_arrays([prompts, column], names=names), path)
        data = path.read_bytes()
    says = (f"{{folder}}/a.parquet{place}: ", f"field '{named}'")
    if way == "cut":
        data, says = data[: rng.randrange(1, len(data))], ("{folder}/a.parquet: ",)
    kept = count - 1 if way in ("null", "blank", "bytes") else None
    return Case("demonstrations", {"a.parquet": data}, "jsonl:{folder}/a.parquet", says, {}, kept)


def messages(rng: random.Random) -> Case:
    """A table of messages with a fault in what names their parents."""
    good = {"message_id": "a", "parent_id": None, "role": "prompter", "text": words(rng)}
    bad, named = rng.choice(
        [
            ([good | {"message_id": "b", "parent_id": "b"}], "parent_id"),
            ([good | {"message_id": "b", "parent_id": "gone"}], "parent_id"),
            ([good], "message_id"),
            ([good | {"message_id": x, "parent_id": y} for x, y in ("bc", "cb")], "parent_id"),
        ]
    )
    data = "".join(json.dumps(row) + "\n" for row in (good, *bad)).encode()
    says = ("{folder}/a.jsonl:2: ", f"field '{named}'")
    return Case("prompts", {"a.jsonl": data}, "jsonl:{folder}/a.jsonl", says, {}, 1)


def files() -> Iterator[tuple[str, Make]]:
    yield "csv: too few cells", table(("a", "completion"))
    yield "csv: too many cells", table(("a,b,c", None), ("a,b,", None))
    yield "csv: a blank line", table(("", None))
    yield "csv: broken quotes", table(('"a"b,c', None))
    yield "csv: a blank cell", table((",b", "prompt"), ("a,", "completion"), (" ,b", "prompt"))
    yield "csv: not UTF-8", table(("\udcff,b", "prompt"), ("a,\udce9", "completion"))
    yield "csv: control characters", table(("\0,b", "prompt"), ("a,x\x01", "completion"))
    yield (
        "csv: a bad header",
        headed(("a,a", "a"), ("", None), ('"a"b,c', None), ("a,\udcff", None), ("a,\0", None)),
    )
    yield "binary content as .txt", binary
    yield "archives that are cut or damaged", torn
    yield "parquet: cells, columns and damage", parquet
    yield "tables of messages: parents", messages


# --- flags ---


def flag(name: str, *values: str, base: Any = demonstration, **others: Any) -> Make:
    """A wrong value of a flag `--data.NAME`, which the error names."""

    def make(rng: random.Random) -> Case:
        data = (json.dumps(base(rng)) + "\n").encode()
        options = {name: rng.choice(values), **others}
        spec, says = "jsonl:{folder}/a.jsonl", (f"--data.{name}",)
        return Case(KINDS[base], {"a.jsonl": data}, spec, says, options)

    return make


def mapped(columns: str, row: dict[str, Any], *values: Any, named: str, **options: Any) -> Make:
    """A row whose value of column `x` does not do for the flags; the value of `row` does."""

    def make(rng: random.Random) -> Case:
        kind: Kind = "comparisons" if "chosen" in row else "demonstrations"
        bad = {**row, "x": rng.choice(values)}
        bad = {key: value for key, value in bad.items() if value is not GONE}
        lines = [json.dumps(r) for r in (row, bad, row)]
        data, says = "\n".join(lines).encode(), ("{folder}/a.jsonl:2: ", f"field '{named}'")
        flags = {"columns": columns, **options}
        return Case(kind, {"a.jsonl": data}, "jsonl:{folder}/a.jsonl", says, flags, 2)

    return make


def source(*specs: str) -> Make:
    """A SPEC that names nothing; the error begins with it, or with the flag."""

    def make(rng: random.Random) -> Case:
        spec = rng.choice(specs)
        return Case("prompts", {}, spec, ("", spec.encode("unicode_escape").decode()))

    return make


def flags() -> Iterator[tuple[str, Make]]:
    braces = ["prompt={prompt", "prompt=prompt}", "prompt={{prompt}}", "prompt={a}{", "prompt=}x{"]
    yield "columns: braces without a partner", flag("columns", *braces)
    empty = ["prompt={}", "prompt=a {} b", "prompt={?}", "prompt={ }", "completion={prompt}{}"]
    yield "columns: empty braces", flag("columns", *empty)
    twice = ["prompt=a,prompt=b", "prompt=a,completion=b,prompt=a", "prompt={a},prompt=b"]
    yield "columns: two for one field", flag("columns", *twice)
    both = ["responses=a,chosen=b", "rejected=a,responses=b+c"]
    yield "columns: replies in two forms", flag("columns", *both, base=pair)
    other = ["promt=a", "prompt", "=a", "prompt=", "ranks=a", "\udcff=a", "prompt=\udcff"]
    yield "columns: no field or no column", flag("columns", *other)
    lists = ["responses=a+", "responses=+a", "responses=a++b"]
    rules = ["ranks=w:", "ranks=w:a", "ranks=w:a|a", "ranks=:a|b", "ranks=:signed", *lists]
    yield "columns: malformed rules", flag("columns", *rules, base=pair)
    row = {"x": "a", "completion": "b"}
    text = mapped("prompt={x}", row, None, [], {}, [1], float("nan"), GONE, named="prompt")
    yield "columns: a template's column is no text", text
    values = (None, GONE, 3, "", " ")
    yield (
        "columns: a column is missing or no text",
        mapped("prompt=x", row, *values, named="prompt"),
    )
    deep = {"x": '{"a": "b"}', "completion": "b"}
    values = ('{"a": "b", "a": "c"}', "{", "3", "{}", '{"a": {"b": 1, "b": 2}}')
    yield "columns: JSON text on a path", mapped("prompt=x.a", deep, *values, named="prompt")
    signs = {"prompt": "p", "a": "b", "chosen": "c", "x": -1}
    rule = "responses=a+chosen,ranks=x:signed"
    values = (None, True, "better", [], {}, float("nan"), 0, GONE)
    yield "columns: a sign that is no number", mapped(rule, signs, *values, named="ranks")
    rule = "responses=a+chosen,ranks=x:-1|1"
    values = (None, [], {}, "tie", GONE)
    yield "columns: a name of no response", mapped(rule, signs, *values, named="ranks")
    yield "split_by: empty or not Unicode", flag("split_by", "", "\udcff", "a\ud800")
    row = {"prompt": "a", "completion": "b", "x": {"y": 1}}
    values, share = (GONE, None, [], {}, {"y": None}, "text", '{"y": 1, "y": 2}'), 0.0
    by_y = mapped("", row, *values, named="x.y", split_by="x.y", validation=share)
    yield "split_by: a field that the row lacks", by_y
    yield "sources that do not exist", source(
        "jsonl:~nouser/x", "hf:~nouser/x", "tfds:~nouser/x", "hf::", "tfds::", "hf::train", "hf:/",
        "jsonl:", "jsonl:{folder}", "jsonl:{folder}/none", "jsonl:{folder}/[1].json", "x", "",
        "jsonl:a\0b", "jsonl:\udcff", "jsonl:" + "x" * 5000, "{folder}", "hf:{folder}",
    )  # fmt: skip


def kinds() -> dict[str, Make]:
    """Kind of fault -> a function that makes a case of it."""
    return {**dict(rows()), **dict(files()), **dict(flags())}
