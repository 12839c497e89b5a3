"""ai_feedback.py: both orders, soft labels and agreement by hand; answers against logits."""

import dataclasses
import json

import ai_feedback
import ai_labeler
import chat_layouts
import constitution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_feedback import Config
from constitution import Constitution, Principle

from instructjax import data, hf, miniature, models, sharding
from instructjax.data import DataConfig, prompt_ids, template
from instructjax.miniature import critics
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


THREE = Constitution(tuple(Principle(f"P{i}", f"choose {i}") for i in range(3)))
ONE = Constitution((Principle("P", "choose"),))


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
    pairs = ai_labeler.pairs_of(records, THREE, 10, seed=0)
    assert [(p.first, p.second) for p in pairs] == [(0, 1), (0, 2), (1, 2), (0, 1)]
    again = ai_labeler.pairs_of(records, THREE, 2, seed=0)
    assert again == pairs[:2]
    others = [ai_labeler.pairs_of(records, THREE, 10, seed=i) for i in range(9)]
    assert {p.principle.name for pairs in others for p in pairs} == {"P0", "P1", "P2"}
    question = pairs[3].question(False, THREE)
    assert "user: say hi\nassistant: hi {x}\nuser: to two\n" in question
    assert (
        "Response A:\nplease\n\nResponse B:\na river\n\nWhich response is better? Answer"
        in question
    )
    assert question.startswith(pairs[3].principle.choose)
    assert "Response A:\na river\n\nResponse B:\nplease\n\n" in pairs[3].question(True, THREE)
    assert "user: name a river\n" in pairs[0].question(False, THREE)
    assert "Response B:\ntwo\n" in pairs[0].question(False, THREE)


def test_both_orders_are_averaged(records):
    """A labeler that likes "one", and A a little."""
    pairs = ai_labeler.pairs_of(records, ONE, 10, seed=0)

    def ask(questions):
        a = [text.partition("Response A:\n")[2].partition("\n")[0] for text in questions]
        b = [text.partition("Response B:\n")[2].partition("\n")[0] for text in questions]
        return np.array(
            [0.6 + 0.3 * (x == "one") - 0.3 * (y == "one") for x, y in zip(a, b, strict=True)]
        )

    first_better = ai_labeler.label(pairs, ask, ONE)
    np.testing.assert_allclose(first_better, [[0.9, 0.7], [0.9, 0.7], [0.6, 0.4], [0.6, 0.4]])
    results = ai_labeler.results_of(pairs, first_better)
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
    results = ai_labeler.results_of(unranked, first_better)
    assert "agreement" not in results
    ai_feedback.print_results(results)
    against = ai_labeler.results_of(pairs, 1 - first_better)
    assert against["agreement"][0] == 0.25


def small_model(tokenizer, seed: int = 0):
    ids = {"eos_ids": (tokenizer.eos_token_id,)}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=512, **ids)
    return config, models.init(config, jax.random.key(seed))


@pytest.mark.parametrize("layout", ["qwen", "plain"])
@pytest.mark.parametrize(("thoughts", "answers"), [(0, ("A", "B")), (3, ("hi", "to"))])
def test_answers_against_logits(layout, thoughts, answers, monkeypatch):
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
        config,
        params,
        tokenizer,
        mesh,
        jax.random.key(0),
        size=2,
        answers=answers,
        before_answer="\nSo:",
        thoughts=thoughts,
    )
    got = ask(questions)
    form = template.of(tokenizer)
    assert form.form == ("plain" if layout == "plain" else "chat")
    space = "" if layout == "qwen" and not thoughts else " "
    *begun, a = tokenizer(f"{space}{answers[0]}")["input_ids"]
    b = tokenizer(f"{space}{answers[1]}")["input_ids"][-1]
    for question, ids, p in zip(questions, written, got, strict=True):
        prompt = prompt_ids(question + "\nSo:" * (layout == "plain"), tokenizer, form)
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


def test_the_rule_based_labeler(tmp_path):
    """By the judge without noise; its bias cancels in the label, and shows in the answers."""
    words = ["--model", "rules", "--pairs", "300", "--only_principles", "rude", "utility"]
    results = {}
    for name, more in {
        "exact": [],
        "biased": ["--place_bias", "2"],
        "noisy": ["--noise", "3"],
        "seed": ["--noise", "3", "--seed", "1"],
    }.items():
        ai_feedback.cli([*words, *more, "--out", f"{tmp_path / name}"])
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    judge = {name: figures["agreement_with_judge"] for name, figures in results.items()}
    assert set(judge["exact"]) == {"rude", "utility"}
    assert [x[0] for x in judge["exact"].values()] == [1, 1]
    assert results["exact"]["share_a"] == pytest.approx(0.5)
    assert results["exact"]["decided_by_place"] == 0
    assert results["biased"]["share_a"] > 0.7
    assert results["biased"]["decided_by_place"] > 0.5
    assert [x[0] for x in judge["biased"].values()] == [1, 1]
    assert 0.5 < judge["noisy"]["utility"][0] < 0.95
    assert results["noisy"]["agreement"] != results["seed"]["agreement"]
    made = [
        (tmp_path / name / "comparisons.jsonl").read_text().splitlines()
        for name in ("exact", "biased")
    ]
    assert len(made[0]) == len(made[1]) < 300  # most responses are equally kind, whatever the bias
    lines = made[0]
    assert all(json.loads(line)["confidence"] > 0.5 for line in lines)


def test_the_labels_of_a_rule(tmp_path):
    """sigmoid(better + bias) shown first, and 1 - sigmoid(worse + bias) shown second."""
    request = {"seed": 0, "story": 1, "about": "Mira"}
    row = {"prompt": "p", "responses": ["Mira was happy.", "Mira was happy. go away."]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "request": request}) + "\n")
    config = DataConfig(f"jsonl:{tmp_path}/rows.jsonl")
    tokenizer = miniature.tokenizer()
    records = data.read(
        config, "comparisons", tokenizer=tokenizer, render=False, ranked=False, log=str
    )
    rude = constitution.read("miniature", ("choose",), ("rude",))
    pairs = ai_labeler.pairs_of(records, rude, 9, seed=0)
    critic = critics.RuleCritic(place_bias=0.5)
    got = ai_labeler.label_by_rule(pairs, critic)
    np.testing.assert_allclose(got, [[1 / (1 + np.exp(-1.5)), 1 / (1 + np.exp(-0.5))]])
    np.testing.assert_array_equal(ai_labeler.judged(pairs), [1.0])


def test_the_miniature_s_questions(records):
    principles = constitution.read("miniature", ("choose",))
    assert len(principles.principles) == 7
    assert len(constitution.read("miniature", ("critique", "revision")).principles) == 6
    assert principles.answers == ("one", "two")
    assert principles.before_answer == ""
    pair = ai_labeler.pairs_of(records, principles, 1, seed=0)[0]
    choose = pair.principle.choose
    expected = f"name a river\none: two\ntwo: one\n{choose}"
    assert pair.question(True, principles, think=True) == expected
    said = ["a", "b?", "c.", "d."]
    assert principles.dialogue(records[0], said[:2]) == "name a river\na\nb?"
    assert principles.dialogue(records[0], said) == "name a river\na\nb? c.\nd."


def test_a_dialogue_in_messages(records):
    principles = constitution.read(str(ai_feedback.PRINCIPLES), constitution.PARTS)
    said = principles.dialogue(records[2], ["a", "b", "c", "d"])
    assert said[:3] == ROWS[2]["prompt"]
    roles = [message["role"] for message in said[3:]]
    assert roles == ["assistant", "user", "assistant", "user"]
    assert [message["content"] for message in said[3:]] == ["a", "b", "c", "d"]


def test_wrong_flags(tmp_path, capsys):
    table = '[[principles]]\nname = "x"\n'
    files = {
        "empty": "principles = []",
        "broken": "principles = [",
        "numbers": "principles = [1]",
        "nameless": '[[principles]]\nchoose = "x"\n',
        "misspelled": f'{table}chose = "y"\n',
        "twice": f'{table}choose = "y"\n{table}choose = "z"\n',
        "cannot": f'{table}critique = "y"\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    cases = [
        (["--principles", f"{tmp_path}/{x}.toml"], f"--principles {tmp_path}/{x}") for x in files
    ]
    cases += [
        (["--principles", "none.toml"], "--principles none.toml: no such file"),
        (["--only_principles", "harms"], "--only_principles harms: there are task, truth"),
        (["--clamp", "0.6", "0.7"], "--clamp 0.6 0.7: 0.5 must lie between"),
        (["--model", "runs/nothing"], "--model runs/nothing: no such directory"),
        (["--model", "rules", "--principles", "x.toml"], "--principles: `--model rules` knows"),
        (["--noise", "1"], "--noise and --place_bias are of `--model rules` alone"),
        (["--place_bias", "1"], "--noise and --place_bias are of `--model rules` alone"),
    ]
    for flags, named in cases:
        model = [] if "--model" in flags else ["--model", "miniature"]
        with pytest.raises(SystemExit) as end:
            ai_feedback.cli([*model, *flags, "--out", f"{tmp_path / 'out'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    rules = ["--model", "rules", "--data", f"jsonl:{tmp_path}/rows.jsonl"]
    with pytest.raises(ValueError, match=r"--model rules: .*rows.jsonl:1 has no request"):
        ai_feedback.cli([*rules, "--out", f"{tmp_path / 'out'}"])
