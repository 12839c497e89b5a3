"""Rows with one fault each, of many kinds, and what the error about each must say.

These are rows of JSON; `bad_files` has files and flags. `faults_rows.py` loads them and counts.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import zstandard

from instructjax.data.fields import Kind


@dataclass(frozen=True)
class Case:
    """A file with one fault, or a wrong flag, and what the error must say."""

    kind: Kind
    files: dict[str, bytes]  # name -> content
    spec: str  # {folder} stands for the folder of the files
    says: tuple[str, ...]  # the error begins with the first and holds the others
    options: dict[str, Any] = field(default_factory=dict)  # of DataConfig
    kept: int | None = None  # good rows of the file; None where they cannot be read


Make = Callable[[random.Random], Case]


# --- rows of JSON ---

WORDS = ("amber", "brook", "cedar", "dune", "elm", "fjord", "grove", "heath", "isle", "jade")
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, 4)) + f" {rng.randrange(10**6)}"


def ranked(rng: random.Random, name: str = "ranks") -> dict[str, Any]:
    responses = [words(rng) for _ in range(rng.randint(3, 9))]
    numbers = list(range(1, len(responses) + 1))
    rng.shuffle(numbers)
    return {"prompt": words(rng), "responses": responses, name: numbers}


def scored(rng: random.Random) -> dict[str, Any]:
    return ranked(rng, "scores")


def pair(rng: random.Random) -> dict[str, Any]:
    return {"prompt": words(rng), "chosen": words(rng), "rejected": words(rng)}


def demonstration(rng: random.Random) -> dict[str, Any]:
    return {"prompt": words(rng), "completion": words(rng)}


def dialogue(rng: random.Random) -> dict[str, Any]:
    turns = [USER, REPLY] * rng.randint(1, 3)
    return {"messages": [turn | {"content": words(rng)} for turn in turns]}


def tree(rng: random.Random) -> dict[str, Any]:
    replies = [{"text": words(rng), "role": "assistant", "rank": i} for i in range(3)]
    return {"prompt": {"text": words(rng), "role": "prompter", "replies": replies}}


def document(rng: random.Random) -> dict[str, Any]:
    return {"text": words(rng)}


KINDS: dict[Any, Kind] = {
    ranked: "comparisons",
    scored: "comparisons",
    pair: "comparisons",
    tree: "comparisons",
    demonstration: "demonstrations",
    dialogue: "demonstrations",
    document: "text",
}


def located(
    rng: random.Random, base: Any, bad: str, named: str | None, layouts: str = "", **options: Any
) -> Case:
    """A file of good rows and a bad one, the JSON text `bad`, in one of the layouts of JSON."""
    good = [json.dumps(base(rng)) for _ in range(rng.randint(1, 8))]
    # A blank line at the end is no fault.
    at = rng.randrange(len(good) + bool(bad.strip()))
    rows = [*good[:at], bad, *good[at:]]
    layout = rng.choice((layouts or "lines gz zst array wrapped").split())
    name, place = "rows.jsonl", f":{at + 1}"
    text = "\n".join(rows) + "\n"
    if layout == "array":
        name, place, text = "rows.json", f": item {at + 1}", "[" + ",\n".join(rows) + "]"
    elif layout == "wrapped":
        name, place = "rows.json", f": 'data' item {at + 1}"
        text = '{"version": 1, "data": [' + ",\n".join(rows) + "]}"
    data = text.encode(errors="surrogateescape")
    if layout == "gz":
        name, data = "rows.jsonl.gz", gzip.compress(data)
    elif layout == "zst":
        name, data = "rows.jsonl.zst", zstandard.compress(data)
    says = (f"{{folder}}/{name}{place}: ",) + ((f"field '{named}'",) if named is not None else ())
    spec = f"jsonl:{{folder}}/{name}"
    return Case(KINDS[base], {name: data}, spec, says, options, len(good))


GONE = object()


def edit(
    base: Any, path: str, *values: Any, named: str | None = None, many: bool = False, **options: Any
) -> Make:
    """Puts one of the values at a path of a good row; `*` is any index.

    Args:
      named: the field that the error names, by default the path.
      many: the value is a function of the value that stands there.
    """

    def make(rng: random.Random) -> Case:
        row: Any = base(rng)
        *before, last = path.split(".")
        parent: Any = row
        for key in before:
            parent = parent[int(key)] if isinstance(parent, list) else parent[key]
        if last == "*":
            last = str(rng.randrange(len(parent)))
        name = ".".join([*before, last])
        value = rng.choice(values)
        key: Any = int(last) if isinstance(parent, list) else last
        if value is GONE:
            del parent[key]
        else:
            parent[key] = value(parent[key]) if many else value
        expected = name if named is None else named.replace("*", last)
        return located(rng, base, json.dumps(row), expected, **options)

    return make


def repeat(base: Any, path: str) -> Make:
    """Writes a key of an object twice, with another value."""

    def make(rng: random.Random) -> Case:
        row: Any = base(rng)
        parent = row
        *before, key = path.split(".")
        for name in before:
            parent = parent[int(name)] if isinstance(parent, list) else parent[name]
        parent[key + " "] = parent[key] if rng.random() < 0.5 else rng.choice([None, 1, "x", []])
        text = json.dumps(row).replace(f'"{key} "', f'"{key}"')
        return located(rng, base, text, path)

    return make


def whole(base: Any, change: Callable[[dict, random.Random], Any], named: str | None) -> Make:
    """Changes a row as a whole."""

    def make(rng: random.Random) -> Case:
        row = base(rng)
        return located(rng, base, json.dumps(change(row, rng)), named)

    return make


def line(base: Any, *texts: str, random_cut: bool = False) -> Make:
    """A line that is no row; the error names file and line."""

    def make(rng: random.Random) -> Case:
        text = json.dumps(base(rng))
        text = text[: rng.randrange(1, len(text))] if random_cut else rng.choice(texts)
        return located(rng, base, text, None, "lines gz zst")

    return make


def same(count: int | None, name: str) -> Callable[[dict, random.Random], dict]:
    """Makes the first `count` responses equal, or all."""

    def change(row: dict, rng: random.Random) -> dict:
        n = count or len(row["responses"])
        return row | {"responses": [row["responses"][0]] * n + row["responses"][n:]}

    return change


def contradicting(row: dict, rng: random.Random) -> dict:
    return row | {"scores": [float(rank) for rank in row["ranks"]]}


NUMBERS = [True, False, None, float("nan"), float("inf"), -float("inf"), "one", "1_0", "", "NaN"]
NUMBERS += ["0x1", "\uff11", "1,5", [1], {"a": 1}, 10**400]
BLANK = ["", " ", "\n\t", "\u3000"]
HALF = ["half \ud83d", "\udc00", "a\udfffb"]


def numbers(base: Any, name: str) -> Iterator[tuple[str, Make]]:
    yield f"{name}: a boolean", edit(base, f"{name}.*", True, False)
    yield f"{name}: NaN, infinite or too large", edit(base, f"{name}.*", *NUMBERS[3:6], 10**400)
    yield f"{name}: a string that is no numeral", edit(base, f"{name}.*", *NUMBERS[6:13])
    yield f"{name}: null, a list or an object", edit(base, f"{name}.*", None, [1], {"a": 1})
    yield f"{name}: not a list", edit(base, name, "12", 3, {"0": 1}, True)
    longer = (lambda v: [*v, 1], lambda v: v[1:], lambda v: [])
    yield f"{name}: too few or too many", edit(base, name, *longer, many=True)
    yield f"{name}: all tied", edit(base, name, lambda v: [1] * len(v), many=True)


def rows() -> Iterator[tuple[str, Make]]:
    yield from numbers(ranked, "ranks")
    yield from numbers(scored, "scores")
    yield "ranks: below 1, above K or fractions", edit(ranked, "ranks.*", 0, -1, 10, 1.5, 10**30)
    no_best = edit(ranked, "ranks", lambda v: [max(2, x) for x in v], many=True)
    yield "ranks: none is the best", no_best
    missing = edit(ranked, "ranks", GONE, None)
    yield "ranks and scores: missing", missing
    yield "ranks and scores that contradict", whole(ranked, contradicting, "scores")
    for base, name in ((ranked, "ranks"), (scored, "scores")):
        last = whole(base, same(None, name), None)
        yield f"one text as all responses ({name})", last
        again = whole(base, same(2, name), "responses")
        yield f"one text with two of the {name}", again
    yield (
        "pairs: chosen equals rejected",
        whole(pair, lambda row, rng: row | {"rejected": row["chosen"]}, "rejected"),
    )
    counts = (lambda v: v[:1], lambda v: [], lambda v: [*v, *map(str, range(9))])
    yield "responses: none, one or over nine", edit(ranked, "responses", *counts, many=True)
    yield "responses: not a list", edit(ranked, "responses", "text", {"a": "b"}, 3)
    yield "responses: one is blank", edit(ranked, "responses.*", *BLANK)
    yield "responses: one is no text", edit(ranked, "responses.*", None, 3, True, 1.5, 10**30)
    yield "responses: half of a surrogate pair", edit(ranked, "responses.*", *HALF)
    yield "pairs: a reply is missing or blank", edit(pair, "rejected", GONE, None, *BLANK)
    margins = [*NUMBERS[:2], *NUMBERS[3:8], "1e999", 1e39, -0.5, [1], 10**400]
    yield "margin: not a finite number from 0 on", edit(pair, "margin", *margins)
    yield "margin of K responses", edit(ranked, "margin", *margins)
    yield "labeler: not a name", edit(pair, "labeler", True, False, [1], {"a": 1}, 1.5, *HALF)
    for base, name in ((ranked, "prompt"), (demonstration, "completion"), (document, "text")):
        yield f"{name}: missing, null or blank", edit(base, name, GONE, None, *BLANK)
        yield f"{name}: no text", prefix(edit(base, name, 3, -1.5, True, [[]], 10**30))
        yield f"{name}: half of a surrogate pair", edit(base, name, *HALF)
    yield "messages: not a list", edit(dialogue, "messages", 3, True, "text", 1.5)
    yield "messages: one is no object", edit(dialogue, "messages.0", None, 3, "x", [], True)
    yield (
        "messages: a role is missing or unknown",
        edit(dialogue, "messages.0.role", GONE, None, 3, "ghost", "USER", [], {}),
    )
    yield (
        "messages: a content is missing, blank or no text",
        edit(dialogue, "messages.0.content", GONE, None, 3, True, *BLANK, *HALF, {}),
    )
    images = [[{"type": "image"}], ["x"], [{"type": "text"}], [{"text": 3}]]
    parts = edit(dialogue, "messages.0.content", *images, named="messages.0.content.0")
    yield "messages: a part that is no text", prefix(parts)
    yield "messages: role and from contradict", edit(dialogue, "messages.0.from", "gpt", "system")
    yield "messages: content and value contradict", edit(dialogue, "messages.0.value", "other", 3)
    yield (
        "messages: the last is no reply",
        edit(dialogue, "messages", lambda v: v[:-1], lambda v: [*v, USER], many=True),
    )
    yield (
        "a prompt that its messages do not hold",
        whole(dialogue, lambda row, rng: row | {"prompt": words(rng)}, "messages"),
    )
    yield (
        "system: contradicts the dialogue",
        whole(
            dialogue,
            lambda row, rng: {
                "messages": [{"role": "system", "content": "a"}, *row["messages"]],
                "system": "b",
            },
            "system",
        ),
    )
    yield (
        "history: malformed",
        prefix(
            edit(
                demonstration,
                "history",
                ["x"],
                [["x"]],
                [["a", 3]],
                [[" ", "b"]],
                named="history.0",
            )
        ),
    )
    yield "tools: not a list of JSON", edit(demonstration, "tools", "[", "{}", 3, {"a": 1}, True)
    repeated = edit(demonstration, "tools", '[{"name": "f", "name": "g"}]', named="tools.0.name")
    yield "a key twice in JSON text: tools", repeated
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    yield (
        "a key twice in JSON text: messages",
        edit(demonstration, "prompt", twice, named="prompt.0.content"),
    )
    yield "a key twice in a row", repeat(demonstration, "completion")
    yield "a key twice in a row of ranks", repeat(ranked, "ranks")
    yield "a key twice in a message", repeat(dialogue, "messages.0.content")
    ranks = [True, False, 0.5, "0", [1]]
    yield "trees: a rank that is no whole number", edit(
        tree, "prompt", *(lambda v, r=r: ranked_as(v, "rank", r) for r in ranks), many=True,
        named="rank",
    )  # fmt: skip
    yield (
        "trees: a ranked reply of another role",
        edit(tree, "prompt", lambda v: ranked_as(v, "role", "prompter"), many=True, named="role"),
    )
    yield "not an object", line(ranked, "3", "null", '["x"]', "true", '"text"', "[]")
    yield "a line that is cut", line(demonstration, random_cut=True)
    yield "a blank line", line(demonstration, "", " ", "\t")
    yield "a line that is not JSON", line(document, "{'text': 'a'}", "text", "{,}", '{"a": 01}')
    yield "a line that is not UTF-8", line(document, '{"text": "\udcff"}', '{"\udce9": "a"}')
    yield (
        "a number or nesting beyond limits",
        line(document, "[" * 100_000, '{"text": ' + "1" * 5000 + "}"),
    )


def prefix(make: Make) -> Make:
    """Expects the beginning of the field's name alone: the rest depends on the value."""

    def made(rng: random.Random) -> Case:
        case = make(rng)
        return replace(case, says=tuple(part.removesuffix("'") for part in case.says))

    return made


def ranked_as(node: dict, key: str, value: Any) -> dict:
    return node | {"replies": [node["replies"][0] | {key: value}, *node["replies"][1:]]}
