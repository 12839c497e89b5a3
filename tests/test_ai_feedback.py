"""ai_feedback.py: both orders, soft labels and agreement by hand; answers against logits."""

import dataclasses
import json
from pathlib import Path

import ai_feedback
import ai_labeler
import chat_layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_feedback import Config

from instructjax import data, hf, models, sharding
from instructjax.data import DataConfig, prompt_ids, template
from instructjax.models import ModelConfig

ROWS = [
    {"prompt": "name a river", "responses": ["one", " two ", "hi to"], "ranks": [1, 3, 2]},
    {"prompt": "hi", "responses": ["same", " same"]},
    {
        "prompt": [
            {"role": "user", "content": "say hi"},
            {"role": "assistant", "content": "hi {x}"},
            {"role": "user", "content": "to two"},
        ],
        "responses": ["please", "a river"],
        "ranks": [2, 1],
    },
]


@pytest.fixture
def records(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = chat_layouts.tokenizer("qwen")
    config = DataConfig(f"jsonl:{file}")
    return data.read(
        config, "comparisons", tokenizer=tokenizer, render=False, ranked=False, log=str
    )


def test_pairs_and_their_questions(records):
    pairs = ai_labeler.pairs_of(records, ["P0", "P1", "P2"], 10, seed=0)
    assert [(p.first, p.second) for p in pairs] == [(0, 1), (0, 2), (1, 2), (0, 1)]
    again = ai_labeler.pairs_of(records, ["P0", "P1", "P2"], 2, seed=0)
    assert again == pairs[:2]
    others = [ai_labeler.pairs_of(records, ["P0", "P1", "P2"], 10, seed=i) for i in range(9)]
    assert {p.principle for pairs in others for p in pairs} == {"P0", "P1", "P2"}
    question = pairs[3].question(False, "END")
    assert "user: say hi\nassistant: hi {x}\nuser: to two\n" in question
    assert "Response A:\nplease\n\nResponse B:\na river\n\nEND" in question
    assert question.startswith(pairs[3].principle)
    assert "Response A:\na river\n\nResponse B:\nplease\n\n" in pairs[3].question(True, "END")
    assert "user: name a river\n" in pairs[0].question(False, "END")
    assert "Response B:\ntwo\n" in pairs[0].question(False, "END")


def test_both_orders_are_averaged(records):
    """A labeler that likes "one", and A a little."""
    pairs = ai_labeler.pairs_of(records, ["P"], 10, seed=0)

    def ask(questions):
        a = [text.partition("Response A:\n")[2].partition("\n")[0] for text in questions]
        b = [text.partition("Response B:\n")[2].partition("\n")[0] for text in questions]
        return np.array(
            [0.6 + 0.3 * (x == "one") - 0.3 * (y == "one") for x, y in zip(a, b, strict=True)]
        )

    first_better = ai_labeler.label(pairs, ask, "END")
    np.testing.assert_allclose(first_better, [[0.9, 0.7], [0.9, 0.7], [0.6, 0.4], [0.6, 0.4]])
    results = ai_feedback.results_of(pairs, first_better)
    assert results["share_a"] == pytest.approx(0.6)
    assert results["decided_by_place"] == 0.5
    # The data prefer "one" to both, "hi to" to "two" and "a river" to "please".
    assert results["agreement"][0] == 0.75
    assert results["by_principle"]["P"] == results["agreement"]

    rows = ai_feedback.rows_of(Config(model="M"), pairs, first_better)
    assert len(rows) == 2  # the other two are even
    assert rows[0] == {
        "prompt": "name a river",
        "responses": ["one", " two "],
        "ranks": [1, 2],
        "confidence": pytest.approx(0.8),
        "labeler": "M",
    }
    even = np.array([[0.9, 0.8]] * 4)
    assert ai_feedback.rows_of(Config(model="M"), pairs, even)[3]["prompt"] == ROWS[2]["prompt"]
    worse = ai_feedback.rows_of(Config(model="M", clamp=(0.4, 0.6)), pairs, 1 - first_better)
    assert (worse[0]["ranks"], worse[0]["confidence"]) == ([2, 1], pytest.approx(0.6))
    unranked = [p._replace(record=dataclasses.replace(p.record, ranks=(1, 1, 1))) for p in pairs]
    results = ai_feedback.results_of(unranked, first_better)
    assert "agreement" not in results
    ai_feedback.print_results(results)
    against = ai_feedback.results_of(pairs, 1 - first_better)
    assert against["agreement"][0] == 0.25


def small_model(tokenizer, seed: int = 0):
    ids = {"eos_ids": (tokenizer.eos_token_id,)}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=512, **ids)
    return config, models.init(config, jax.random.key(seed))


@pytest.mark.parametrize("layout", ["qwen", "plain"])
@pytest.mark.parametrize("thoughts", [0, 3])
def test_answers_against_logits(layout, thoughts, monkeypatch):
    tokenizer = chat_layouts.tokenizer("qwen")
    if layout == "plain":
        tokenizer.chat_template = None
    config, params = small_model(tokenizer)
    params = jax.tree.map(lambda x: 3 * x, params)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    questions = ["Hi one. Say hi to two", "name a river, please"]
    written = [[7, tokenizer.eos_token_id], [8, 9, 7]]

    def sample(*args, size, max_new_tokens, **_):
        assert (size, max_new_tokens) == (2, 3)
        return ai_labeler.rollout.right_padded(written), 1.0

    monkeypatch.setattr(ai_labeler.rollout, "sample", sample)
    ask = ai_labeler.make_ask(
        config, params, tokenizer, mesh, jax.random.key(0), size=2, thoughts=thoughts
    )
    got = ask(questions)
    form = template.of(tokenizer)
    assert form.form == ("plain" if layout == "plain" else "chat")
    space = "" if layout == "qwen" and not thoughts else " "
    *begun, a = tokenizer(f"{space}A")["input_ids"]
    b = tokenizer(f"{space}B")["input_ids"][-1]
    for question, ids, p in zip(questions, written, got, strict=True):
        prompt = prompt_ids(question + "\nAnswer:" * (layout == "plain"), tokenizer, form)
        if thoughts:
            said = [x for x in ids if x != tokenizer.eos_token_id]
            prompt = [*prompt, *said, *tokenizer("\nThe better response is")["input_ids"]]
        logits = models.logits(params, config, jnp.array([[*prompt, *begun]]))[0, -1]
        odds = float(logits[a] - logits[b])
        assert p == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4)
    assert abs(got[0] - got[1]) > 1e-3


def test_from_the_command_line(tmp_path, capsys):
    tokenizer = chat_layouts.tokenizer("qwen")
    config, params = small_model(tokenizer)
    hf.save(tmp_path / "lm", config, params, tokenizer)
    long = {"prompt": "name " * 600, "responses": ["a", "b"], "ranks": [1, 2]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, long]))
    out = tmp_path / "out"
    words = ["--model", f"{tmp_path}/lm", "--data", f"jsonl:{file}", "--out", f"{out}"]
    ai_feedback.cli([*words, "--batch_size", "8", "--thoughts", "2", "--seed", "3"])
    said = capsys.readouterr().out
    assert "1 pairs are left out" in said
    results = json.loads((out / "results.json").read_text())
    assert results["pairs"] == 4
    made = data.read(
        DataConfig(f"jsonl:{out}/comparisons.jsonl"), "comparisons", tokenizer=tokenizer, log=str
    )
    assert 1 <= len(made) <= 4
    assert all(0.5 < record.confidence < 1 for record in made)
    assert {record.labeler for record in made} == {f"{tmp_path}/lm"}


def test_wrong_flags(tmp_path, capsys):
    files = {"empty": "principles = []", "broken": "principles = [", "numbers": "principles = [1]"}
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    cases = [
        (["--principles", f"{tmp_path}/{x}.toml"], f"--principles {tmp_path}/{x}") for x in files
    ]
    cases += [
        (["--principles", "none.toml"], "--principles none.toml: no such file"),
        (["--clamp", "0.6", "0.7"], "--clamp 0.6 0.7: 0.5 must lie between"),
        (["--model", "runs/nothing"], "--model runs/nothing: no such directory"),
    ]
    for flags, named in cases:
        model = [] if "--model" in flags else ["--model", "miniature"]
        with pytest.raises(SystemExit) as end:
            ai_feedback.cli([*model, *flags, "--out", f"{tmp_path / 'out'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
    assert len(ai_labeler.read_principles(Path(ai_feedback.PRINCIPLES))) == 4
