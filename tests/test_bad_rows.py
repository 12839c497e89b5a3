"""Bad rows of every kind are refused by name; what looks like them and is sound still loads."""

import json
import math
import re
from pathlib import Path

import bad_files
import faults_rows
import pytest
from test_data_load import byte_tokenizer

from instructjax.data import DataConfig, DataError, load, read
from instructjax.data.columns import parse_columns
from instructjax.data.fields import NAMES
from instructjax.data.records import parse
from instructjax.data.sources import rows
from instructjax.data.template import Template

TABLE = Path(__file__).resolve().parents[1] / "docs" / "reliability-rows.md"


def record(row, columns="", report=None):
    kind = "comparisons"
    return parse(row, "f:1", kind, parse_columns(columns, NAMES[kind]), Template(), report)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def test_every_kind_is_refused_by_name():
    kinds = len(bad_files.kinds())
    table, rest = faults_rows.count(faults_rows.Config(rows=2 * kinds))
    assert rest == []
    assert sum(counts[faults_rows.NAMED] for counts in table.values()) == 2 * kinds


def test_the_table_in_the_docs_is_of_these_kinds():
    named = re.findall(
        r"^\| ([^|*]+) \| +(\d+) \| +(\d+) \| 0 \| 0 \| 0 \|$", TABLE.read_text(), re.M
    )
    assert [kind for kind, _, _ in named] == list(bad_files.kinds())
    assert all(count == refused for _, count, refused in named)
    assert sum(int(count) for _, count, _ in named) == 1000


def test_outcomes(tmp_path):
    """A case that loads, one that names too little, one that loses good rows."""
    good = json.dumps({"text": "a"}).encode()
    place = "{folder}/a.jsonl:1: "

    def outcome(data, *says, kept=None):
        case = bad_files.Case(
            "text", {"a.jsonl": data}, "jsonl:{folder}/a.jsonl", (place, *says), {}, kept
        )
        return faults_rows.outcome(case, tmp_path)[0]

    bad = b'{"text": ""}'
    assert outcome(good) == faults_rows.SILENT
    assert outcome(bad, "field 'text'") == faults_rows.NAMED
    assert outcome(bad, "field 'other'") == faults_rows.PARTLY
    assert outcome(good + b"\n" + bad, "field 'text'") == faults_rows.PARTLY
    assert outcome(bad + b"\n" + good, kept=1) == faults_rows.NAMED
    assert outcome(bad + b"\n" + good, kept=2) == faults_rows.PARTLY


# --- comparisons ---

REPEATS = {"prompt": "p", "responses": ["x", "y", "x", "x"], "ranks": [1, 2, 1, 1]}


def test_texts_that_repeat_are_ties(tmp_path):
    """A comparison whose equal texts have equal ranks stays whole, and the report counts them."""
    spec = write(
        tmp_path / "a", REPEATS, {**REPEATS, "ranks": [2, 1, 2, 1]}, {**REPEATS, "ranks": [1] * 4}
    )
    lines = []
    (kept,) = read(DataConfig(spec, on_error="skip"), "comparisons", log=lines.append)
    assert kept.ranks == (1, 2, 1, 1)
    assert (
        f"  2 tied: responses that repeat another of their comparison (first: {tmp_path}/a:1)"
        in (lines[0])
    )
    problem = "field 'responses': has one text twice, with different ranks"
    assert f"  1 skipped: {problem} (first: {tmp_path}/a:2)" in lines[0]
    assert "  1 skipped: field 'ranks': all responses are tied" in lines[0]


def test_ranks_and_scores_that_agree():
    row = {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [1, 3, 2]}
    for scores in ([9, 1, 5], [9, 1, 1], [5, 5, 5], ["9", "-1", "1e0"]):
        assert record({**row, "scores": scores}).ranks == (1, 3, 2)
    finer = {**row, "ranks": [1, 2, 2], "scores": [3, 2, 1]}
    assert record(finer).ranks == (1, 2, 2)
    with pytest.raises(DataError, match=r"'scores': contradicts 'ranks' about 'responses\.2'"):
        record({**row, "scores": [9, 2, 1]})


def test_ranks_of_pairs():
    """Columns of other texts may stand beside a pair; columns that a flag names must fit it."""
    row = {
        "prompt": "p",
        "chosen": "x",
        "rejected": "y",
        "scores": [1, 5, 2],
        "w": "b",
        "v": [2, 1],
    }
    assert record(row).ranks == (1, 2)
    assert record(row, "ranks=w:b|a").ranks == (1, 2)
    for columns, name in (("ranks=w:a|b", "ranks"), ("ranks=v", "ranks")):
        with pytest.raises(
            DataError, match=f"field '{name}': contradicts 'chosen' about 'rejected'"
        ):
            record(row, columns)
    assert record(row, "scores=v").ranks == (1, 2)


def test_booleans_as_scores():
    """Only of a column that a flag names: a right solution is better than a wrong one."""
    row = {"prompt": "p", "a": "x", "b": "y", "right": [False, True], "mixed": [False, 1]}
    assert record(row, "responses=a+b,scores=right").ranks == (2, 1)
    row["scores"] = row["right"]
    for columns in ("", ",scores=mixed", ",ranks=right"):
        with pytest.raises(DataError, match=r"\.0': expected a number, got a boolean"):
            record(row, f"responses=a+b{columns}")


def test_large_whole_numbers_are_not_rounded():
    scores = [2**53 + 2, 2**53, str(2**53 + 1)]
    row = {"prompt": "p", "responses": ["x", "y", "z"], "scores": scores}
    assert record(row).ranks == (1, 3, 2)


def test_responses_of_the_same_tokens(tmp_path):
    """Texts that differ only where tokens do not, and responses that are cut to one beginning."""
    tokenizer = byte_tokenizer()

    def loaded(*rows, **options):
        config = DataConfig(write(tmp_path / "a", *rows), cache=None, **options)
        return load(config, "comparisons", tokenizer, context=20, log=lines.append)

    lines, good = [], {"prompt": "p", "chosen": "right", "rejected": "wrong"}
    same = {"prompt": "p", "chosen": "x<eos>", "rejected": "x"}
    with pytest.raises(DataError, match="a:1: field 'responses': two of different ranks have the"):
        loaded(same)
    assert len(loaded(good, same, on_error="skip")) == 1
    alike = {"prompt": "p", "chosen": "abcd", "rejected": "abce"}
    tied = {"prompt": "p", "responses": ["abcd", "abce", "x"], "ranks": [1, 1, 2]}
    data = loaded(good, alike, tied, max_response=3, overlong="truncate")
    assert [r.where[-2:] for r in data.records] == [":1", ":3"]
    assert "1 dropped: responses of different ranks have the same start" in lines[-2]
    assert len(loaded(good, alike, max_response=6)) == 2


@pytest.mark.parametrize("rank", [True, False, 0.5, math.nan, "0", [0]])
def test_ranks_of_trees(tmp_path, rank):
    """A reply without a rank is left out; one whose rank is no whole number is refused."""
    replies = [{"text": t, "role": "assistant", "rank": r} for t, r in (("a", 1), ("b", rank))]
    tree = {"prompt": {"text": "q", "role": "prompter", "replies": replies}}
    with pytest.raises(DataError, match="a:1: field 'rank': expected a whole number, got "):
        read(DataConfig(write(tmp_path / "a", tree)), "comparisons")


def test_arguments_of_tools_with_a_key_twice(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"a": {"b": 1, "b": 2}}'}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(
        DataError, match=r"'messages\.1\.tool_calls\.0\.arguments\.a\.b': stands twice"
    ):
        read(DataConfig(write(tmp_path / "a", {"messages": turns})), "demonstrations")


def test_labelers():
    """pandas makes a column of whole numbers with nulls one of floats."""
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    for labeler, expected in ((3, "3"), (3.0, "3"), ("3", "3"), (None, None), ("", None)):
        assert record({**row, "labeler": labeler}).labeler == expected
    for labeler in (3.5, math.nan, True):
        with pytest.raises(DataError, match="field 'labeler': expected a name"):
            record({**row, "labeler": labeler})


def test_margins():
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    for margin, expected in ((0, 0.0), ("1.5", 1.5), ("", 0.0), (None, 0.0), (3e38, 3e38)):
        assert record({**row, "margin": margin}).margin == expected
    for margin in (-0.5, "-1", 1e39, True, math.nan):
        with pytest.raises(DataError, match=r"^f:1: field 'margin': "):
            record({**row, "margin": margin})


# --- files ---


def places(pattern):
    return [where for where, _ in rows(f"jsonl:{pattern}", "prompts")]


def test_each_file_is_read_once(tmp_path):
    """A link to a folder above it makes a loop; the shortest name of a file stays."""
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "x.jsonl", "a")
    write(tmp_path / "z.jsonl", "a")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b" / "x.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "none")
    assert places(tmp_path / "**" / "*.jsonl") == [
        f"{tmp_path}/b/x.jsonl:1",
        f"{tmp_path}/z.jsonl:1",
    ]
    assert places(tmp_path / "b" / "loop" / "z.jsonl") == [f"{tmp_path}/b/loop/z.jsonl:1"]


def test_a_path_that_exists_is_no_pattern(tmp_path):
    for name in ("a[1].jsonl", "a1.jsonl", "a*.jsonl", "[b]/c1.jsonl", "d1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "a")
    for pattern, names in (
        ("a[1].jsonl", ["a[1].jsonl"]),
        ("a*.jsonl", ["a*.jsonl"]),
        ("a?.jsonl", ["a*.jsonl", "a1.jsonl"]),
        ("[b]/*.jsonl", ["[b]/c1.jsonl"]),
        ("d[12].jsonl", ["d1.jsonl"]),
    ):
        assert places(tmp_path / pattern) == [f"{tmp_path}/{name}:1" for name in names]
    with pytest.raises(DataError, match="is a folder: name its files"):
        places(tmp_path)
    with pytest.raises(DataError, match=r"x00/\[: no such file$"):
        places(tmp_path / "\0/[")


@pytest.mark.parametrize("scheme", ["jsonl", "hf", "tfds"])
def test_sources_that_do_not_exist(scheme, tmp_path):
    for name in ("", ":", ":x", "/", "~nouser/x", "a\0b", "\udcff", "x" * 5000, f"{tmp_path}/none"):
        spec = f"{scheme}:{name}"
        with pytest.raises(DataError) as caught:
            list(rows(spec, "prompts"))
        said = str(caught.value)
        assert said.startswith(("--data ", spec.encode("unicode_escape").decode()))
        assert "\n" not in said


def test_a_set_that_breaks_off(monkeypatch):
    """The rows before a damaged one are read; the error says from where on none is."""
    datasets = pytest.importorskip("datasets")

    def broken(*arguments, **options):
        yield {"prompt": b"a"}
        raise RuntimeError("a bad\nblock")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    first, (where, error) = rows("hf:a/b", "prompts")
    assert first == ("hf:a/b row 0", {"prompt": "a"})
    assert where == "hf:a/b"
    assert str(error) == "hf:a/b: cannot be read from row 1 on: RuntimeError: a bad block"


def test_control_characters_of_text_files(tmp_path):
    """Pages, tabs, escapes of colour and the end of a DOS file are text."""
    text = "a\x0cb\tc\x1b[1md\r\n\x1a"
    (tmp_path / "a.txt").write_bytes(text.encode())
    ((_, row),) = rows(f"jsonl:{tmp_path}/a.txt", "text")
    assert row == {"text": text.replace("\r\n", "\n")}


def test_messages_are_on_one_line_of_printable_characters(tmp_path):
    """What a terminal cannot print would end the report with a traceback."""
    spec = write(tmp_path / "a", {"prompt": "p", "x": 1}, {"prompt": "q", "b\ud800\n": 1})
    lines = []
    config = DataConfig(spec, on_error="skip", split_by="b.c", validation=0.5)
    with pytest.raises(DataError) as caught:
        read(config, "prompts", split="train", log=lines.append)
    str(caught.value).encode()
    read(DataConfig(spec), "prompts", log=lines.append)
    assert r"columns that nothing reads: x, b\ud800\n" in lines[-1]
    write(tmp_path / "a", {"text": "", "b\ud800\n": 1})
    with pytest.raises(DataError, match=r"^[^\n]*: field 'prompt': is missing; the row has "):
        read(DataConfig(spec), "prompts")
    (tmp_path / "b").write_text('{"text": "t", "a\\n\\ud800": {"b": 1, "b": 2}}')
    with pytest.raises(DataError, match=r"b:1: field 'a\\n\\ud800\.b': stands twice"):
        read(DataConfig(f"jsonl:{tmp_path}/b"), "text")
    spec = write(tmp_path / "a", {"x": '{"a": 1, "\ud800": 1, "\ud800": 2}'})
    with pytest.raises(DataError, match=r"'\\ud800' stands twice in one object$"):
        read(DataConfig(spec, columns="prompt=x.a"), "prompts")


def test_parents_that_form_a_loop(tmp_path):
    """A chain that leads into a loop is refused too; trees beside it load."""

    def message(name, parent):
        return {"message_id": name, "parent_id": parent, "role": "prompter", "text": name}

    links = ("a", None), ("b", "a"), ("c", "d"), ("d", "c"), ("e", "d"), ("f", "f"), ("g", "gone")
    spec = write(tmp_path / "a", *(message(*link) for link in (*links, ("h", "g"))))
    errors = {
        where[-2:]: str(row) for where, row in rows(spec, "prompts") if isinstance(row, DataError)
    }
    assert sorted(errors) == [":3", ":4", ":5", ":6", ":7", ":8"]
    assert all("chain of parents is a loop" in errors[f":{i}"] for i in (3, 4, 5, 6))
    assert all("field 'parent_id': no row has the id 'gone'" in errors[f":{i}"] for i in (7, 8))
    assert [r.prompt for r in read(DataConfig(spec, on_error="skip"), "prompts", log=str)] == [
        "\n\nHuman: a\n\nAssistant:",
        "\n\nHuman: a\n\nHuman: b\n\nAssistant:",
    ]
