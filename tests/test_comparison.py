"""Comparisons of models by hand: which prompts count, lengths, the best of n, files of labels."""

import json
from dataclasses import replace
from typing import Any

import chat_layouts
import numpy as np
import pytest

from instructjax import data
from instructjax.data import DataConfig, Dataset, Record
from instructjax.evaluation import comparison, statistics
from instructjax.evaluation.comparison import Answers


def answers(names, utility_PS, length_PS, score_PS=None) -> Answers:
    utility_PS = np.array(utility_PS, float)
    texts = [["x" * length for length in row] for row in length_PS]
    keys = [(name, name, 0) for name in names]
    tokens_PS = np.full(utility_PS.shape, 7)
    ended_PS = np.ones(utility_PS.shape, bool)
    score_PS = None if score_PS is None else np.array(score_PS, float)
    rows = [{"prompt": name} for name in names]
    return Answers(keys, rows, texts, tokens_PS, ended_PS, utility_PS, score_PS)


def test_all_figures_are_of_the_prompts_that_all_answered():
    ours = answers(["1", "2", "4"], [[0, 3], [5, 5], [7, 1]], [[4, 8], [9, 3], [1, 1]])
    theirs = answers(["4", "1"], [[1], [2]], [[2], [2]])
    results = comparison.compare(comparison.shared({"ours": ours, "theirs": theirs}))
    pair, back = results["pairs"]
    assert results["prompts"] == 2
    assert pair["win_rate"].value == (0.5 + 0.75) / 2  # one of two wins; a win and a tie
    assert back["win_rate"].value == (0.5 + 0.25) / 2
    controlled = statistics.length_controlled(np.array([0.5, 0.75]), np.array([4, -1]))
    assert pair["win_rate_at_equal_length"] == controlled
    assert controlled != statistics.length_controlled(np.array([0.5, 0.75]), np.zeros(2))
    assert results["models"]["ours"]["utility"].value == pytest.approx((1.5 + 4) / 2)
    assert results["models"]["ours"]["characters"] == (4 + 8 + 1 + 1) / 4
    assert results["models"]["ours"]["tokens"] == 7
    with pytest.raises(ValueError, match="--models a b: no prompt has room in all of them"):
        comparison.shared({"a": ours, "b": answers(["9"], [[1]], [[2]])})


def test_comparisons_are_of_different_responses_that_ended():
    utility_PS = [[5, 2, 5], [1, 1, 1], [3, 4, 3], [7, 8, 9], [1, 2, 2]]
    given = answers(["1", "2", "3", "4", "5"], utility_PS, [[1, 2, 1]])
    texts = [["a ", "b", " a"], *[["a", "b", "c"]] * 3, [" ", "b", "c"]]
    ended_PS = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]], bool)
    rows, left_out = comparison.comparisons(replace(given, texts=texts, ended_PS=ended_PS))
    assert rows == [
        {"prompt": "1", "responses": ["a ", "b"], "scores": [5, 2]},
        {"prompt": "4", "responses": ["a", "c"], "scores": [7, 9]},
    ]
    assert left_out == {
        "repeated responses": 1,
        "responses that did not end": 2,
        "empty responses": 1,
        "prompts without two responses of different utility": 3,
    }


@pytest.mark.parametrize("layout", chat_layouts.LAYOUTS)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_prompt_of_comparisons_is_rendered_as_it_was(layout, template, tmp_path):
    tokenizer = chat_layouts.tokenizer(layout)
    turns = [{"role": role, "content": f"Hi {role}"} for role in ("user", "assistant", "user")]
    prompts = [{"prompt": "name a river, please "}, {"messages": turns}, {"prompt": turns[:1]}]
    if (layout, template) == ("qwen", "chat"):
        prompts.append({"messages": turns[:1], "tools": [{"name": "river"}]})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def load(name: str, kind: Any) -> Dataset:
        config = DataConfig(f"jsonl:{tmp_path}/{name}.jsonl", template=template, cache=None)
        return data.load(config, kind, tokenizer)

    before = load("prompts", "prompts")
    rows = [
        {**comparison.prompt_row(record), "responses": ["one", "two"], "scores": [0, 1]}
        for record in before.records
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = load("rows", "comparisons")
    assert len(after) == len(before) == len(prompts)
    for i in range(len(prompts)):
        assert after.prompt[i].tolist() == before.prompt[i].tolist()


def test_measures_are_means_of_what_applies():
    given = answers(["1", "2"], [[0, 0], [0, 0]], [[1, 1], [1, 1]])
    toxic = np.array([[1, np.nan], [0, 0]])
    results = comparison.compare({"a": replace(given, measures={"toxic": toxic}), "b": given})
    estimate = results["models"]["a"]["measures"]["toxic"]
    assert estimate.value == pytest.approx(1 / 3)
    assert (estimate.low, estimate.high) == (0, 1)  # one prompt has 1, the other 0
    assert "measures" not in results["models"]["b"]
    rows = list(comparison.lines({"a": replace(given, measures={"toxic": toxic})}))
    assert [row.get("toxic") for row in rows] == [1, None, 0, 0]


def test_prompts_of_one_row_are_told_apart():
    def record(said: str) -> Record:
        return Record("f:1", {}, said, messages=[{"role": "user", "content": said}])

    keys = comparison.keys([record("a"), record("b"), record("a")])
    assert keys == [("f:1", "a", 0), ("f:1", "b", 0), ("f:1", "a", 1)]


def test_the_best_of_n_is_chosen_by_the_score():
    given = answers(["1", "2"], [[0, 3], [4, 8]], [[1, 1], [1, 1]], [[9, 1], [2, 5]])
    (row,) = comparison.best_of(given, [2])
    assert row["utility"].value == (0 + 8) / 2
    assert row["score"].value == (9 + 5) / 2
    (row,) = comparison.best_of(answers(["1"], [[0, 3]], [[1, 1]]), [2])
    assert row["utility"].value == 3
    assert "score" not in row


def test_labels_of_a_prompt_are_one_draw(tmp_path):
    """Twenty labelers of one prompt are no twenty prompts: the interval stays as wide."""
    file = tmp_path / "labels.jsonl"
    lines = [
        {"prompt": f"{p}", "models": ["a", "b"], "ranks": [1, 2] if p % 2 else [2, 1]}
        for p in range(30)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    once = comparison.of_labels(file)["pairs"][0]["win_rate"]
    file.write_text("".join(20 * (json.dumps(line) + "\n") for line in lines))
    assert comparison.of_labels(file)["pairs"][0]["win_rate"] == pytest.approx(once)
    assert once.high - once.low > 0.25


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"models": ["a"], "ranks": [1]}', "field 'prompt': expected a string"),
        ('{"prompt": "x", "models": "ab", "ranks": [1, 2]}', "field 'models': expected a list"),
        ('{"prompt": "x", "models": [], "ranks": []}', "field 'models': expected a list"),
        ('{"prompt": "x", "models": ["a", "b"]}', "field 'ranks': expected a list of numbers"),
        ('{"prompt": "x", "models": ["a", "b"], "ranks": [1, true]}', "field 'ranks': expected"),
        ('{"prompt": "x", "models": ["a", "b"], "scores": [1, NaN]}', "field 'scores': expected"),
        ('{"prompt": "x", "models": ["a", "b"], "scores": [1, 1e999]}', "field 'scores': expected"),
        ('{"prompt": "x", "models": ["a", "b"], "ranks": [1]}', "field 'ranks': 1 for 2 models"),
    ],
)
def test_bad_labels(line, problem, tmp_path):
    good = {"prompt": "x", "models": ["a", "b"], "ranks": [1, 2]}
    file = tmp_path / "labels.jsonl"
    file.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=f"labels.jsonl:2: .*{problem}"):
        comparison.of_labels(file)


def test_the_tables_of_many_models():
    """The table of means has a column for each model; four fit a terminal."""
    given = answers(["1", "2"], [[0], [1]], [[1], [1]])
    for count in (4, 5):
        results = comparison.compare({f"m{i}": given for i in range(count)})
        drawn = comparison.tables(results, "m0", "the judge")
        assert len(drawn) == (2 if count == 4 else 1)
        assert drawn[0].row_count == count


@pytest.mark.parametrize(
    ("content", "problem"), [(b"\n", "the file is empty"), (b"\xff\n", "UTF-8")]
)
def test_files_without_labels(content, problem, tmp_path):
    (tmp_path / "labels.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"labels.jsonl.*{problem}"):
        comparison.of_labels(tmp_path / "labels.jsonl")
