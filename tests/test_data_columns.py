"""The language of --data.columns: paths, templates, and rules for ranks."""

import json

import pytest

from instructjax.data.columns import lookup, parse_columns

ROW = {
    "answers": [{"text": "a", "votes": {"up": 1}}, {"text": "b", "votes": {"up": 2}}],
    "turns": '["one", {"text": "two"}]',
    "matrix": [[{"x": 1}], [{"x": 2}, {"x": 3}]],
    "title": " ",
    "body": "B",
    "plain": "x",
    "null": None,
}


def value(entry, row=ROW):
    field = entry.partition("=")[0]
    return parse_columns(entry, (field,))[field](row)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("answers.*.text", ["a", "b"]),
        ("answers.*.votes.up", [1, 2]),
        ("answers.*", ROW["answers"]),
        ("answers.1.votes.up", 2),
        ("matrix.*.*.x", [[1], [2, 3]]),
        ("matrix.*.0.x", [1, 2]),
        ("turns.0", "one"),
        ("turns.1.text", "two"),
    ],
)
def test_paths(path, expected):
    assert lookup(ROW, path) == expected


@pytest.mark.parametrize(
    "path", ["answers.*.score", "answers.2", "body.*", "plain.0", "title.a", "null.a", "answers.-1"]
)
def test_paths_that_are_not_there(path):
    with pytest.raises(KeyError) as caught:
        lookup(ROW, path)
    assert caught.value.args == (path,)


def test_a_path_of_stars_reaches_into_json_strings():
    rows = {"list": [json.dumps({"x": 1}), json.dumps({"x": 2})]}
    assert lookup(rows, "list.*.x") == [1, 2]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"{body}\n\n{plain}", "B\n\nx"),
        (r"{body}\n\n{plain?}", "B\n\nx"),
        (r"{body}\n\n{null?}", "B"),
        (r"{body}\n\n{title?}", "B"),
        (r"{body}\n\n{absent?}\n", "B\n"),
        (r"{absent?}\n\n{body}", "B"),
        (r"{plain}, {null?}\t{body}", "x,\tB"),
    ],
)
def test_templates(template, expected):
    assert value("prompt=" + template) == expected


def test_braces_and_backslashes_in_templates():
    """As in Python's formats, so that a template can hold TeX."""
    row = {"x": "1+1", "y": "{x}"}
    assert value(r"prompt={x}\nAnswer in \boxed{{}}.", row) == "1+1\nAnswer in \\boxed{}."
    assert value(r"prompt=\\text{{{x}}}\\n{y}", row) == r"\text{1+1}\n{x}"


def test_templates_without_text():
    with pytest.raises(KeyError):
        value("prompt={absent}")
    for name in ("null", "answers", "answers?"):
        with pytest.raises(TypeError, match="not text"):
            value(f"prompt={{{name}}}")


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("w:model_a|model_b", {"model_a": [1, 2], "model_b": [2, 1], "tie": [1, 1], "": [1, 1]}),
        ("w:0|1", {0: [1, 2], 1: [2, 1], "1": [2, 1], -1: [1, 1], 0.5: [1, 1]}),
        ("w:0|1|2", {2: [2, 2, 1], 3: [1, 1, 1]}),
        ("w:0|1|3", {1.0: [2, 1, 2], 1.5: [1, 1, 1]}),
        ("w:true|false", {True: [1, 2], False: [2, 1]}),
        ("w:signed", {-3: [1, 2], 0: [1, 1], 2: [2, 1], "-1": [1, 2], 0.25: [2, 1]}),
    ],
)
def test_ranks(rule, values):
    for cell, expected in [*values.items(), (None, None)]:
        assert value(f"ranks={rule}", {"w": cell}) == expected, cell


def test_ranks_of_paths():
    assert value("ranks=judge.0.w:a|b", {"judge": [{"w": "b"}]}) == [2, 1]
    with pytest.raises(KeyError):
        value("ranks=judge.w:a|b", {"judge": {}})
    with pytest.raises(TypeError, match="'w' is 'better', not a number"):
        value("ranks=w:signed", {"w": "better"})
    for cell in (True, float("nan"), "nan", [], {}):
        with pytest.raises(TypeError, match=r"'w' is .*, not a number"):
            value("ranks=w:signed", {"w": cell})
    for cell in ([], {}):
        with pytest.raises(TypeError, match=r"'w' is a .*, not a value or a name"):
            value("ranks=w:a|b", {"w": cell})
    # Other fields may have columns with a colon in their names.
    assert value("prompt=a:b", {"a:b": "x"}) == "x"


@pytest.mark.parametrize("rule", ["w:index", "w:a", "w:", "w:a|", "w:a|a"])
def test_malformed_ranks(rule):
    with pytest.raises(ValueError, match=r"is neither w:signed nor of the form w:first\|second"):
        parse_columns(f"ranks={rule}", ("ranks",))


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("a={x", "a brace without its partner"),
        ("a=x}", "a brace without its partner"),
        ("a={x}}", "a brace without its partner"),
        ("a={{x}}", "names no column"),
        ("a={x}{{}", "a brace without its partner"),
        ("a={}", "braces without a column's name in them"),
        ("a={x} { }", "braces without a column's name in them"),
        ("a={?}", "braces without a column's name in them"),
        ("a=x+", r"a \+ without a column on both sides"),
        ("a=+x", r"a \+ without a column on both sides"),
        ("a=x,b=y,a=z", "field 'a': is given twice"),
        ("responses=x,rejected=y", "field 'rejected': 'responses' is given too"),
        ("chosen=x,responses=y", "field 'responses': 'chosen' is given too"),
        ("a=\udcff", r"--data\.columns a=\\udcff: is not valid Unicode"),
    ],
)
def test_malformed_columns(columns, problem):
    with pytest.raises(ValueError, match=rf"^--data\.columns.*{problem}|^{problem}$"):
        parse_columns(columns, ("a", "b", "responses", "chosen", "rejected"))


def test_ranks_need_a_column():
    for rule in ("signed", "a|b"):
        with pytest.raises(ValueError, match="is neither :signed nor of the form"):
            parse_columns(f"ranks=:{rule}", ("ranks",))


def test_keys_that_stand_twice_in_json_text():
    with pytest.raises(TypeError, match=r"'turns\.0\.x': in the JSON text .*, '0\.x' stands"):
        lookup({"turns": '[{"x": 1, "x": 2}]'}, "turns.0.x")
