"""Rows -> records: accepted forms, errors and their messages, and 1,000 damaged rows."""

import csv
import gzip
import json
import random
import re

import pytest
import zstandard

from instructjax.data import DataConfig, DataError, read
from instructjax.data.columns import parse_columns
from instructjax.data.fields import NAMES
from instructjax.data.records import parse
from instructjax.data.template import Template


def record(row, kind, columns="", template=Template(), report=None):  # noqa: B008
    return parse(row, "f:1", kind, parse_columns(columns, NAMES[kind]), template, report)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def quiet(spec, kind, **options):
    split = options.pop("split", "all")
    return read(DataConfig(spec, **options), kind, split=split, log=lambda line: None)


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CHAT = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "", "a", "b"),
        ({"question": "a", "answer": "b"}, "", "a", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "", "a", "b"),
        ({"instruction": "a", "input": "x", "output": "b"}, "", "a\n\nx", "b"),
        ({"instruction": "a", "context": "x", "response": "b"}, "", "a\n\nx", "b"),
        ({"messages": [USER, REPLY]}, "", CHAT, " yo"),
        ({"prompt": "hi ", "messages": [USER, REPLY]}, "", CHAT, " yo"),
        ({"prompt": "unused", "messages": [USER, REPLY]}, "messages=messages", CHAT, " yo"),
        ({"prompt": [USER], "completion": [REPLY]}, "", CHAT, " yo"),
        ({"prompt": [USER], "completion": "yo"}, "", CHAT, " yo"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
         "", CHAT, " yo"),
        ({"messages": [{"role": "system", "content": "S"}, USER, REPLY]}, "", "S" + CHAT, " yo"),
        ({"messages": [{"role": "system", "content": ""}, USER, REPLY]}, "", CHAT, " yo"),
        ({"messages": [USER, REPLY, USER, REPLY]}, "", CHAT + " yo" + CHAT, " yo"),
        ({"a": {"b": ["x", "y"]}, "c": "z"}, "prompt=a.b.1,completion=c", "y", "z"),
        ({"a.b": "x", "c": "z"}, "prompt=a.b,completion=c", "x", "z"),
        ({"s": ["x", "y"], "t": ["z"]}, r"prompt={s}\n\nTL;DR, so:,completion=t.0",
         "x y\n\nTL;DR, so:", "z"),
    ],
)  # fmt: skip
def test_demonstrations(row, columns, prompt, completion):
    parsed = record(row, "demonstrations", columns)
    assert (parsed.prompt, parsed.responses, parsed.row) == (prompt, (completion,), row)


HELLO = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "responses", "ranks"),
    [
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [2, 1]}, "", "p", "x y", (2, 1)),
        ({"prompt": "p", "responses": ["x", "y", "z"], "ranks": [1, 1, 3]}, "", "p", "x y z",
         (1, 1, 3)),
        ({"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]}, "", "p", "x y z",
         (2, 1, 2)),
        ({"prompt": "p", "responses": ["x", "y", "z"], "scores": [70, 90, 70]}, "", "p", "x y z",
         (2, 1, 2)),
        ({"m": "p", "r1": "x", "r2": "y", "s1": "9", "s2": "10"},
         "prompt=m,responses=r1+r2,scores=s1+s2", "p", "x y", (2, 1)),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, "", "p", "x y", (1, 2)),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [USER | {"role": "assistant"}]}, "",
         CHAT, " yo| hi", (1, 2)),
        ({"chosen": [USER, REPLY], "rejected": [USER, USER | {"role": "assistant"}]}, "",
         CHAT, " yo| hi", (1, 2)),
        ({"prompt": [USER], "responses": ["x", "y"], "ranks": [1, 2]}, "", CHAT, " x| y", (1, 2)),
        ({"chosen": HELLO + " x", "rejected": HELLO + " y"}, "", HELLO, " x| y", (1, 2)),
        # A response may hold further turns: the prompt is what both share all the same.
        ({"chosen": HELLO + " x\n\nHuman: d\n\nAssistant: e", "rejected": HELLO + " y"}, "", HELLO,
         " x\n\nHuman: d\n\nAssistant: e| y", (1, 2)),
    ],
)  # fmt: skip
def test_comparisons(row, columns, prompt, responses, ranks):
    parsed = record(row, "comparisons", columns)
    split = responses.split("|") if "|" in responses else responses.split(" ")
    assert (parsed.prompt, list(parsed.responses), parsed.ranks) == (prompt, split, ranks)


def test_comparisons_that_are_to_be_ranked():
    """Without ranks all are 1; those that are there are read."""
    columns: dict = {}
    for more, ranks in (({}, (1, 1)), ({"ranks": [1, 1]}, (1, 1)), ({"ranks": [2, 1]}, (2, 1))):
        row = {"prompt": "p", "responses": ["x", "y"], **more}
        parsed = parse(row, "f:1", "comparisons", columns, Template(), ranked=False)
        assert (parsed.responses, parsed.ranks) == (("x", "y"), ranks)
        if ranks == (1, 1):
            with pytest.raises(DataError, match="ranks"):
                record(row, "comparisons")
    wrong = {"prompt": "p", "responses": ["x", "y"], "ranks": [0, 1]}
    with pytest.raises(DataError, match="from 1"):
        parse(wrong, "f:1", "comparisons", columns, Template(), ranked=False)


def test_labelers_and_margins():
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert record(row, "comparisons").labeler is None
    assert record(row, "comparisons").margin == 0
    parsed = record({**row, "labeler": 7, "margin": 0.5}, "comparisons")
    assert (parsed.labeler, parsed.margin) == ("7", 0.5)
    assert parsed.confidence == 1
    for given in (0.5, "0.5", 1):
        assert record({**row, "confidence": given}, "comparisons").confidence == float(given)
    for given in (0.49, 1.01, True, "sure"):
        with pytest.raises(DataError, match=r"field 'confidence': "):
            record({**row, "confidence": given}, "comparisons")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("a", "a"),
        ({"prompt": "a", "completion": ""}, "a"),
        ({"messages": [USER]}, CHAT),
        ({"messages": [USER, REPLY]}, CHAT),
        ({"prompt": [USER]}, CHAT),
        ({"chosen": HELLO + " x", "rejected": HELLO}, HELLO),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, CHAT),
    ],
)
def test_prompts(row, prompt):
    assert (record(row, "prompts").prompt, record(row, "prompts").responses) == (prompt, ())


def test_text():
    assert record({"text": " a\n"}, "text").responses == (" a\n",)
    assert record("a", "text").responses == ("a",)


TREE = {
    "prompt": {
        "text": "q",
        "role": "prompter",
        "replies": [
            {"text": "second", "role": "assistant", "rank": 1, "replies": []},
            {
                "text": "first",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "text": "more",
                        "role": "prompter",
                        "replies": [{"text": "only", "role": "assistant", "rank": 0}],
                    }
                ],
            },
            {"text": "unranked", "role": "assistant"},
        ],
    }
}


def test_trees(tmp_path):
    """A tree gives a comparison for each prompter's message; replies without rank are counted."""
    spec, lines = write(tmp_path / "t.jsonl", TREE), []
    (ranked,) = read(DataConfig(spec), "comparisons", log=lines.append)
    assert ranked.responses == (" second", " first")
    assert ranked.ranks == (2, 1)
    assert "2 left out: replies with no rank, or none to rank against" in lines[0]
    shown = quiet(spec, "demonstrations")
    start = "\n\nHuman: q\n\nAssistant:"
    assert [(r.prompt, r.responses[0]) for r in shown] == [
        (start, " first"),
        (start + " first\n\nHuman: more\n\nAssistant:", " only"),
    ]
    assert [r.prompt for r in quiet(spec, "prompts")] == [r.prompt for r in shown]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("demonstrations", [], "expected an object, got a list"),
        ("demonstrations", "a", "expected an object, got a string"),
        ("demonstrations", {"prompt": "a"}, r"field 'completion': is missing; the row has \['prom"),
        ("demonstrations", {"prompt": "a", "completion": " "}, "field 'completion': is empty"),
        ("demonstrations", {"prompt": "a", "completion": 1}, "expected a string, got the number 1"),
        ("demonstrations", {"prompt": None, "completion": "b"}, "'prompt': is missing; the row"),
        ("demonstrations", {"prompt": "\ud800", "completion": "b"}, "field 'prompt': .*surrogate"),
        ("demonstrations", {"instruction": "a", "input": 3, "output": "b"}, "field 'input'"),
        ("demonstrations", {"messages": [USER]}, "field 'messages': .*assistant's reply"),
        ("demonstrations", {"messages": [{"role": "tool", "content": "x"}, REPLY]}, "roles.*tool"),
        ("demonstrations", {"messages": [USER, {"role": "assistant"}]}, r"'messages\.1\.content'"),
        ("demonstrations", {"messages": [USER, 3]}, r"messages\.1': expected an object with ro"),
        ("prompts", {"messages": []}, "field 'messages': expected a list of messages"),
        ("prompts", {"messages": [REPLY]}, "holds no message that a reply"),
        ("text", {"txt": "a"}, r"field 'text': is missing; the row has \['txt'\]"),
        ("comparisons", {"prompt": "p"}, "field 'responses': is missing"),
        ("comparisons", {"prompt": "p", "responses": "xy", "ranks": [1, 2]}, "expected a list"),
        ("comparisons", {"prompt": "p", "responses": ["x"], "ranks": [1]},
         "expected 2 to 9 responses, got 1"),
        ("comparisons", {"prompt": "p", "responses": ["x"] * 10, "ranks": [1] * 10},
         "expected 2 to 9 responses, got 10"),
        ("comparisons", {"prompt": "p", "responses": ["x", ""], "ranks": [1, 2]}, "responses.1"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"]}, "field 'ranks': is missing"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [1]},
         "field 'ranks': 1 ranks for 2 responses"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [0, 1]}, "ranks run"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 3]}, "ranks run"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 1.5]}, "ranks run"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [1, float("nan")]},
         r"field 'ranks\.1': expected a number"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 1]},
         "field 'ranks': all responses are tied"),
        ("comparisons", {"prompt": "p", "responses": ["x", "y"], "scores": [5, 5]},
         "field 'scores': all responses are tied"),
        ("comparisons", {"prompt": "p", "chosen": "x", "rejected": "x"}, "equals 'chosen'"),
        ("comparisons", {"chosen": "x", "rejected": "y"}, "field 'prompt': is missing, and"),
        ("comparisons", {"chosen": HELLO + " x", "rejected": HELLO}, "field 'rejected': is empty"),
        ("comparisons", {"chosen": [USER, REPLY], "rejected": [REPLY, REPLY]}, "same messages"),
        ("comparisons", {"prompt": "p", "chosen": "x", "rejected": "y", "margin": "far"},
         "field 'margin': expected a number, got 'far'"),
        ("comparisons", {"prompt": "p", "chosen": "x", "rejected": "y", "labeler": [1]},
         "field 'labeler': expected a name"),
    ],
)  # fmt: skip
def test_refusals(kind, row, message):
    with pytest.raises(DataError, match=rf"^f:1: .*{message}"):
        record(row, kind)


def test_columns_that_are_not_there():
    with pytest.raises(ValueError, match="unknown field 'promt'; use one of"):
        parse_columns("promt=a", NAMES["prompts"])
    with pytest.raises(ValueError, match="'prompt' is not of the form"):
        parse_columns("prompt", NAMES["prompts"])
    with pytest.raises(DataError, match=r"^f:1: field 'prompt': no column 'b\.0' among \['a'\]"):
        record({"a": "x"}, "prompts", "prompt=b.0")
    with pytest.raises(DataError, match="field 'prompt': 'a' is a dict, not text"):
        record({"a": {}}, "prompts", "prompt={a}")


def test_a_template_that_rewrites_the_prompt_is_refused():
    class Rewriting:
        chat_template = "of any kind"

        def apply_chat_template(self, messages, **options):
            return f"{len(messages)}{messages[0]['content']}"

    with pytest.raises(DataError, match="renders the prompt differently"):
        record(
            {"messages": [USER, REPLY]}, "demonstrations", template=Template("chat", Rewriting())
        )


# --- files ---

ROWS = [{"text": f'line {i}: ünïcode, "quoted"\nsecond'} for i in range(5)]


def test_every_file_format_gives_the_same(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"}\n", b"}\r\n"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:70]) + gzip.compress(lines[70:]))
    frames = zstandard.compress(lines[:70]) + zstandard.compress(lines[70:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, ["text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for path in sorted(tmp_path.iterdir()):
        assert [r.row for r in quiet(f"jsonl:{path}", "text")] == ROWS, path
    wheres = [r.where for r in quiet(f"jsonl:{tmp_path}/a.csv", "text")]
    assert wheres == [f"{tmp_path}/a.csv:{line}" for line in (2, 4, 6, 8, 10)]
    assert len(quiet(f"jsonl:{tmp_path}/a.*", "text")) == 6 * len(ROWS)


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (whole,) = quiet(f"jsonl:{tmp_path}/a.txt", "text")
    assert whole.responses == ("one\n\ntwo\n",)
    lines = quiet(f"jsonl:{tmp_path}/a.txt", "text", txt="line")
    assert [(r.where[-2:], r.responses[0]) for r in lines] == [(":1", "one"), (":3", "two")]


BIG = json.dumps({"text": random.Random(0).randbytes(40_000).hex()}).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON: .* at column 10"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', r"a\.jsonl:2: is blank"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r":2: not UTF-8: byte 0xe9 at column 11"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not usable as JSON"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not usable as JSON"),
        ("a.jsonl.gz", gzip.compress(BIG)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", BIG, r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.zst", zstandard.compress(BIG)[:-9], "cannot be read: the file ends within"),
        ("a.jsonl.zst", BIG, r"a\.jsonl\.zst: cannot be read"),
        ("a.json", b'[{"text": "a"},', r"a\.json: not JSON"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json: item 2: expected an object"),
        ("a.csv", b"text,b\nx,1\ny\n", r"a\.csv:3: field 'b': is missing: the row does not"),
        ("a.csv", b"text,b\nx,1\ny,1,1\n", r"a\.csv:3: does not have the 2 columns"),
        ("a.csv", b'text,b\nx,1\n"y,1\nz,1\n', r"a\.csv:3: not CSV: unexpected end"),
        ("a.csv", b"text,text\nx,1\n", r"a\.csv:1: field 'text': two columns have the"),
        ("a.csv", b"text,b\nx,1\n\xff,1\n", r"a\.csv:3: field 'text': not UTF-8: byte 0xff"),
        ("a.csv", b"text,b\n", r"no text are left(.|\n)*0 rows read"),
        ("a.txt", b"a\nb\n\xff", r"a\.txt:3: field 'text': not UTF-8"),
        ("a.txt", b" \n", r"a\.txt: the file is empty"),
    ],
)
def test_broken_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        quiet(f"jsonl:{tmp_path}/{name}", "text")
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')  # skipping must still read it
    texts = [r.responses[0] for r in quiet(f"jsonl:{tmp_path}/*", "text", on_error="skip")]
    assert texts[-1] == "good"
    assert set(texts) <= {"a", "b", "x", "z", "good"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsonl:nowhere.jsonl", "jsonl:nowhere.jsonl: no such file"),
        ("csv:x", "--data csv:x: is not miniature, jsonl:PATH"),
        (__file__, f"for a file write jsonl:{re.escape(__file__)}"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=message):
        quiet(spec, "text")


# --- damaged rows ---

GOOD = {
    "demonstrations": [
        {"prompt": "a question", "completion": "an answer"},
        {"messages": [USER, REPLY, USER, REPLY]},
    ],
    "comparisons": [
        {"prompt": "a question", "responses": ["good", "fair", "poor"], "ranks": [1, 2, 2]},
        {"prompt": "a question", "chosen": "good", "rejected": "poor"},
        {"chosen": HELLO + " good", "rejected": HELLO + " poor"},
    ],
    "prompts": [{"prompt": "a question"}, {"messages": [USER, REPLY, USER]}],
    "text": [{"text": "some prose"}],
}


def damage(row, rng):
    """Bytes of the row with one fault, which leaves no usable record."""
    row = json.loads(json.dumps(row))
    line = json.dumps(row)
    key = rng.choice(list(row))

    def instead(value):
        return json.dumps({**row, key: value}).encode()

    ways = [
        lambda: line[: rng.randrange(1, len(line))].encode(),
        lambda: line.encode()[: (at := rng.randrange(len(line)))] + b"\xff" + line.encode()[at:],
        lambda: json.dumps({k: v for k, v in row.items() if k != key}).encode(),
        lambda: instead(rng.choice([None, 3, -1.5, True, {}, {"a": "b"}, "", " \n", [], [[]]])),
        lambda: instead("half a \ud83d pair"),
        lambda: json.dumps(rng.choice([None, 7, [row], "", []])).encode(),
        lambda: b"",
        lambda: b" \t",
    ]
    cut = rng.choice([i for i, c in enumerate(line) if c in '"{}'])
    ways.append(lambda: (line[:cut] + line[cut + 1 :]).encode())
    if "ranks" in row:
        bad = [[1, 2], [1, 2, 3, 4], [0, 1, 2], [2, 2, 2], [1, 2, 4], [1, 2, "x"], [1, 2, None]]
        bad += [[1, 2, float("nan")], [1, 2.5, 3], [2, 2, 3], "123", {"a": 1}]
        ways.append(lambda: json.dumps({**row, "ranks": rng.choice(bad)}).encode())
        few = [["good"], ["x"] * 10, ["good", "fair", ""], ["good", "fair", 3], "good", [USER] * 3]
        ways.append(lambda: json.dumps({**row, "responses": rng.choice(few)}).encode())
    if "messages" in row:
        at, turns = rng.randrange(len(row["messages"])), row["messages"]
        worse = [{"role": "user"}, {"content": "x"}, {"role": "ghost", "content": "x"}, "x", None]
        worse += [{"role": 3, "content": "x"}, {"role": "user", "content": ["x"]}]
        broken = [*turns[:at], rng.choice(worse), *turns[at + 1 :]]
        ways.append(lambda: json.dumps({"messages": broken}).encode())
    if "chosen" in row:
        ways.append(lambda: json.dumps({**row, "rejected": row["chosen"]}).encode())
    return rng.choice(ways)()


def test_a_thousand_damaged_rows(tmp_path):
    """Each is refused with its line number, and all sound rows between them are read."""
    rng, path, damaged = random.Random(0), tmp_path / "rows.jsonl", 0
    for kind, samples in GOOD.items():
        lines, sound = [], []
        for number in range(1, 501):
            row = rng.choice(samples)
            if number % 2:
                lines.append(damage(row, rng))
                damaged += 1
            else:
                lines.append(json.dumps(row).encode())
                sound.append(f"{path}:{number}")
        path.write_bytes(b"\n".join(lines) + b"\n")
        said = []
        records = read(DataConfig(f"jsonl:{path}", on_error="skip"), kind, log=said.append)
        assert [record.where for record in records] == sound
        assert "500 rows read" in said[0]
        for line in lines[::2]:
            good = json.dumps(samples[0]).encode()
            before = [good] * rng.randrange(1, 9)
            path.write_bytes(b"\n".join([*before, line, good]) + b"\n")
            with pytest.raises(DataError, match=rf"^{re.escape(str(path))}:{len(before) + 1}: "):
                quiet(f"jsonl:{path}", kind)
    assert damaged == 1000


def test_a_message_in_the_spellings_of_two_libraries():
    """Files that were merged have both; a blank one is none, and `human` is a user."""
    turns = [
        {"role": "user", "from": "human", "content": "q", "value": ""},
        {"role": "", "from": "gpt", "content": None, "value": "a"},
    ]
    record = parse({"messages": turns}, "f:1", "demonstrations", {}, Template())
    assert (record.messages[0], record.responses) == ({"role": "user", "content": "q"}, (" a",))
