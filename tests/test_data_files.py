"""Readers of files: layouts of JSON, torn rows and long cells of CSV, Parquet, message tables."""

import builtins
import contextlib
import csv
import io
import json
import re

import pytest

from instructjax import data
from instructjax.data import DataConfig
from instructjax.data.errors import DataError
from instructjax.data.sources import rows


def read(path, kind="demonstrations", txt="file"):
    """(where without its folder, row or the text of its error) of each row."""
    folder = str(path.parent) + "/"
    return [
        (where.removeprefix(folder), str(row).removeprefix(folder) if _is_error(row) else row)
        for where, row in rows(f"jsonl:{path}", kind, txt=txt)
    ]


def _is_error(row):
    return isinstance(row, DataError)


ONE, TWO = {"text": "a", "n": [1, {"m": 2}]}, {"text": "b\nc", "n": []}
PRETTY = [json.dumps(row, indent=2) for row in (ONE, TWO)]
WRAPPED = {"version": 1, "about": {"x": "y"}, "tags": ["t"], "data": [ONE, TWO]}


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.json", json.dumps([ONE, TWO]), ["a.json: item 1", "a.json: item 2"]),
        ("a.json", json.dumps([ONE, TWO], indent=1), ["a.json: item 1", "a.json: item 2"]),
        ("a.jsonl", json.dumps([ONE, TWO], indent=1), ["a.jsonl: item 1", "a.jsonl: item 2"]),
        ("a.jsonl", json.dumps([ONE, TWO]) + "\n", ["a.jsonl: item 1", "a.jsonl: item 2"]),
        ("a.json", "[\n" + ",\n".join(map(json.dumps, (ONE, TWO))) + "\n]\n",
         ["a.json: item 1", "a.json: item 2"]),
        ("a.json", json.dumps(WRAPPED), ["a.json: 'data' item 1", "a.json: 'data' item 2"]),
        ("a.jsonl", json.dumps(WRAPPED, indent=4).replace("\n", "\r\n"),
         ["a.jsonl: 'data' item 1", "a.jsonl: 'data' item 2"]),
        ("a.json", "\n".join(map(json.dumps, (ONE, TWO))), ["a.json:1", "a.json:2"]),
        ("a.jsonl", "\n".join(PRETTY), ["a.jsonl:1", "a.jsonl:10"]),
        ("a.json", "\n\n" + " \n\n".join(PRETTY) + "\n\n", ["a.json:3", "a.json:13"]),
    ],
)  # fmt: skip
def test_layouts_of_json(tmp_path, name, text, places):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / name) == list(zip(places, (ONE, TWO), strict=True))


@pytest.mark.parametrize(
    "row",
    [
        ONE,
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"prompt": {"text": "q", "role": "prompter", "replies": []}},
    ],
)
def test_one_object_is_one_row(tmp_path, row):
    for name, text in (("a.json", json.dumps(row)), ("a.jsonl", json.dumps(row, indent=1))):
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name) == [(name, row)]
    (tmp_path / "b.jsonl").write_text(json.dumps(WRAPPED) + "\n")  # JSON lines: a row
    assert read(tmp_path / "b.jsonl") == [("b.jsonl:1", WRAPPED)]


def test_json_with_faults(tmp_path):
    """JSON lines are told from a document by most lines, not by the first alone."""
    path = tmp_path / "a.json"
    for broken in ('{"text": ', '"text": "x"}', "", '{"text": "\udcff"}'):
        lines = "\n".join([broken, json.dumps(ONE), json.dumps(TWO), "x"])
        path.write_bytes(lines.encode(errors="surrogateescape"))
        (_, error), *others, (_, last) = read(path)
        assert others == [("a.json:2", ONE), ("a.json:3", TWO)]
        assert error.startswith("a.json:1: ")
        assert last == "a.json:4: not JSON: Expecting value at column 1"
    path.write_text(PRETTY[0] + "\n,\n" + PRETTY[1])
    fault = "not JSON: Expecting value: line 10 column 1 (char 64); no row of this file is read"
    assert read(path) == [("a.json", f"a.json: {fault}")]
    path.write_bytes(PRETTY[0].replace("a", "\udcff").encode(errors="surrogateescape"))
    assert read(path) == [("a.json", "a.json:2: not UTF-8: byte 0xff; no row of this file is read")]
    path.write_text(json.dumps({"train": [ONE], "test": [TWO]}))
    ((_, error),) = read(path)
    assert "a.json: holds several lists of rows: write each of ['train', 'test']" in error


def test_keys_that_stand_twice(tmp_path):
    """Each is named with its path, and the rows beside it are read."""
    bad, good = '{"text": "a", "n": [{"m": 1, "k": 2, "m": 3}]}', json.dumps(ONE)
    problem = "field 'n.0.m': stands twice in one object"
    for name, text, where in (
        ("a.jsonl", f"{good}\n{bad}\n{good}\n", "a.jsonl:2"),
        ("b.json", f"[{good}, {bad}, {good}]", "b.json: item 2"),
        ("c.json", f'{{"v": 1, "data": [{good}, {bad}, {good}]}}', "c.json: 'data' item 2"),
        ("d.jsonl", f"{PRETTY[0]}\n{bad[:7]}\n{bad[7:]}\n{PRETTY[0]}", "d.jsonl:10"),
    ):
        (tmp_path / name).write_text(text)
        assert [row for _, row in read(tmp_path / name)] == [ONE, f"{where}: {problem}", ONE]
    (tmp_path / "e.json").write_text('{"text": "a", "text": "a"}')
    problem = "field 'text': stands twice in one object"
    assert read(tmp_path / "e.json") == [("e.json", f"e.json: {problem}")]
    (tmp_path / "f.json").write_text(f'{{"data": [{good}], "v": 1, "data": [{good}]}}')
    problem = "field 'data': stands twice in one object; no row of this file is read"
    assert read(tmp_path / "f.json") == [("f.json", f"f.json: {problem}")]


def table(*lines, delimiter=","):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(lines)
    return out.getvalue()


def test_csv_cells_of_any_length(tmp_path):
    limit = csv.field_size_limit()
    long = "word, \n" * 50_000
    (tmp_path / "a.csv").write_text(table(["p", "q"], ["1", long], ["2", "x"]), newline="")
    assert read(tmp_path / "a.csv") == [
        ("a.csv:2", {"p": "1", "q": long}),
        ("a.csv:50003", {"p": "2", "q": "x"}),
    ]
    assert csv.field_size_limit() == limit
    next(rows(f"jsonl:{tmp_path}/a.csv", "text"))  # a reader that is not run to its end
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("torn", "problem"),
    [
        (b'"open,1', "not CSV: unexpected end of data"),
        (b'"a"b,1', "not CSV: ',' expected after '\"'"),
        (b"one", "field 'q': is missing: the row does not have the 2 columns of the header"),
        (b"one,2,3", "does not have the 2 columns of the header"),
        (b"\xff,1", "field 'p': not UTF-8: byte 0xff"),
        (b"1,a\0b", "field 'q': not text: the control character 0x00"),
        (b"", "is blank"),
    ],
)
def test_csv_reads_on_after_a_torn_row(tmp_path, torn, problem):
    good = b'x,"1\n2"\n'
    (tmp_path / "a.csv").write_bytes(b"p,q\n" + good + torn + b"\ny,3\nz,4\n")
    assert read(tmp_path / "a.csv") == [
        ("a.csv:2", {"p": "x", "q": "1\n2"}),
        ("a.csv:4", f"a.csv:4: {problem}"),
        ("a.csv:5", {"p": "y", "q": "3"}),
        ("a.csv:6", {"p": "z", "q": "4"}),
    ]


@pytest.mark.parametrize("header", [b'"p,q', b"p,\xff", b"p,p", b"", b",,", b"p,\0"])
def test_csv_needs_its_header(tmp_path, header):
    (tmp_path / "a.csv").write_bytes(header + b"\ny,3\nz,4\n")
    ((_, error),) = read(tmp_path / "a.csv")
    assert error.startswith("a.csv:1: ")
    assert error.endswith("; no row of this file is read")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("blank", ["", "\n", "  \n\n", "{end} \t{end}"])
def test_blank_lines_at_the_end(tmp_path, end, blank):
    """pandas and datasets read no row from them."""
    blank = blank.format(end=end)
    lines = [json.dumps(ONE), json.dumps(TWO), ""]
    (tmp_path / "a.jsonl").write_text(end.join(lines) + blank, newline="")
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:1", ONE), ("a.jsonl:2", TWO)]
    for commas in ("", f",{end}", f" ,{end},{end}"):
        text = end.join(["p,q", "x,1", "y,2", ""]) + commas + blank
        (tmp_path / "a.csv").write_text(text, newline="")
        assert read(tmp_path / "a.csv") == [
            ("a.csv:2", {"p": "x", "q": "1"}),
            ("a.csv:3", {"p": "y", "q": "2"}),
        ]


def test_csv_with_empty_columns_and_rows(tmp_path):
    """Spreadsheets leave them at the right and at the bottom, and pandas writes an index."""
    (tmp_path / "a.csv").write_text(",p,q,,\n0,x,1,,note\n,,,,\n1,y,2,,\n,,,,\n,,,,\n")
    row = {"Unnamed: 0": "0", "p": "x", "q": "1", "Unnamed: 3": "", "Unnamed: 4": "note"}
    assert read(tmp_path / "a.csv") == [
        ("a.csv:2", row),
        ("a.csv:3", "a.csv:3: is blank"),
        ("a.csv:4", row | {"Unnamed: 0": "1", "p": "y", "q": "2", "Unnamed: 4": ""}),
    ]


def test_lines_of_text_are_decoded_one_by_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\xff\n \ntwo")
    assert read(tmp_path / "a.txt", "text", "line") == [
        ("a.txt:1", {"text": "one"}),
        ("a.txt:2", "a.txt:2: field 'text': not UTF-8: byte 0xff at column 1"),
        ("a.txt:4", {"text": "two"}),
    ]


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = [{"p": f"ü{i}", "m": [{"role": "user", "n": None}], "b": b"x"} for i in range(2000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(lines), path, row_group_size=900)
    (tmp_path / "b.jsonl").write_text('{"p": "b"}\n')
    located = read(tmp_path / "*")
    places = [f"a.parquet: row {i}" for i in range(2000)]
    assert [where for where, _ in located] == [*places, "b.jsonl:1"]
    assert located[0] == ("a.parquet: row 0", lines[0] | {"b": "x"})
    assert [row["p"] for _, row in located] == [*(line["p"] for line in lines), "b"]

    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["p", "p"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    problem = "field 'p': two columns have this name; no row of this file is read"
    assert read(tmp_path / "twice.parquet") == [("twice.parquet", f"twice.parquet: {problem}")]
    buffers = pyarrow.array([b"x", b"\xff"], pyarrow.binary()).buffers()
    no_utf8 = pyarrow.StringArray.from_buffers(2, *buffers[1:])
    parquet.write_table(pyarrow.table({"p": no_utf8}), tmp_path / "twice.parquet")
    ((_, error),) = read(tmp_path / "twice.parquet")
    assert error.startswith("twice.parquet: cannot be read from row 0 on: 'utf-8' codec")
    (tmp_path / "twice.parquet").unlink()

    data = path.read_bytes()
    path.write_bytes(data[:-9])
    (_, error), _ = read(tmp_path / "*")
    assert error.startswith("a.parquet: cannot be read from row 0 on: ")
    path.write_bytes(data)
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"a\.parquet: .* needs `pip install instructjax\[hf\]`"):
        read(path)


def message(name, parent, role="assistant", **more):
    return {"message_id": name, "parent_id": parent, "text": f"text {name}", "role": role, **more}


def test_tables_of_messages_become_trees(tmp_path):
    """OpenAssistant's table: rows name their parents, and may come in any order."""
    path = tmp_path / "a.jsonl"
    table = [
        message("c", "r", rank=1),
        message("r", None, "prompter"),
        message("s", "", "prompter"),
        message("d", "r", rank=0),
        message("e", "d", "prompter"),
        message("x", "gone"),
        message("s", "r"),
        {"prompt": "another layout"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    leaf = table[4] | {"replies": []}
    replies = [table[0] | {"replies": []}, table[3] | {"replies": [leaf]}]
    assert read(path) == [
        ("a.jsonl:7", "a.jsonl:7: field 'message_id': is the id of an earlier row"),
        ("a.jsonl:8", table[7]),
        ("a.jsonl:6", "a.jsonl:6: field 'parent_id': no row has the id 'gone'"),
        ("a.jsonl:2", {"prompt": table[1] | {"replies": replies}}),
        ("a.jsonl:3", {"prompt": table[2] | {"replies": []}}),
    ]
    assert [row for _, row in read(path, "text")] == table  # each message is a text


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables_of_messages_as_pandas_writes_them(tmp_path, suffix):
    """A column of ranks that has a null is of floats, and in CSV a null is an empty cell."""
    pandas = pytest.importorskip("pandas")
    table = [
        message("r", None, "prompter"),
        *(message(name, "r", rank=rank) for name, rank in (("c", 1), ("d", 0), ("e", None))),
    ]
    frame, path = pandas.DataFrame(table), tmp_path / f"a.{suffix}"
    if suffix == "csv":
        frame.to_csv(path)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    (record,) = data.read(DataConfig(f"jsonl:{path}"), "comparisons", log=str)
    assert (record.responses, record.ranks) == ((" text c", " text d"), (2, 1))
    (record,) = data.read(DataConfig(f"jsonl:{path}"), "demonstrations", log=str)
    assert record.responses == (" text d",)


@pytest.mark.parametrize("scheme", ["", "jsonl:", "hf:", "hf:/", "tfds:/"])
def test_a_check_of_what_no_path_can_be(scheme):
    """Such as a row in place of a path, which is longer than a name of a file may be."""
    for name in ("x" * 5000, "a\0b", "~nouser/x"):
        with contextlib.suppress(ValueError, FileNotFoundError):
            data.check(DataConfig(scheme + name), "text")


def test_a_check_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"write jsonl:{re.escape(str(tmp_path))}/\*$"):
        data.check(DataConfig(f"jsonl:{tmp_path}/"), "text")
