"""evaluate.py: win rates by hand, and two small models from the command line to the files."""

import json
from pathlib import Path

import evaluate
import jax
import numpy as np
import pytest

from instructjax import hf, miniature, models, rollout, sharding
from instructjax.evaluation import statistics
from instructjax.models import ModelConfig

JUDGE = "def length(prompts, responses, records):\n    return [len(r) for r in responses]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two small random models, prompts, and a judge that likes long responses."""
    out, tokenizer = tmp_path_factory.mktemp("world"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=24, **ids)
    for seed, name in enumerate(("a", "b")):
        hf.save(out / name, config, models.init(config, jax.random.key(seed)), tokenizer)
    texts = [f"list {word} animals." for word in ("one", "two", "white", "black", "small")]
    texts.append("list " + "white " * 30 + "animals.")  # leaves no room
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))
    (out / "judge.py").write_text(JUDGE)
    return out


def run(world: Path, out: Path, *flags: str) -> dict:
    words = ["--models", f"{world}/a", f"{world}/b", "--data", f"jsonl:{world}/prompts.jsonl"]
    words += ["--gold", f"{world}/judge.py:length", "--split", "all", "--data.cache", "None"]
    evaluate.cli([*words, "--out", f"{out}", "--batch_size", "8", *flags])
    return json.loads((out / "results.json").read_text())


def test_two_models(world, tmp_path, capsys):
    flags = ["--samples", "3", "--max_new_tokens", "6", "--temperature", "0.7", "--seed", "5"]
    results = run(world, tmp_path, *flags)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == [f"{world}/a"] * 15 + [f"{world}/b"] * 15
    assert [row["utility"] for row in rows] == [len(row["response"]) for row in rows]
    utility = np.array([row["utility"] for row in rows]).reshape(2, 5, 3)
    first, back = results["pairs"]
    assert (first["model"], first["against"]) == (f"{world}/a", f"{world}/b")
    assert first["prompts"] == 5
    assert first["win_rate"] == [*statistics.win_rate(utility[0], utility[1])]
    assert first["win_rate"][0] + back["win_rate"][0] == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "by the judge, on 5 prompts" in " ".join(printed.split())  # a title may be wrapped
    rate, low, high = back["win_rate"]
    assert f"{rate:.1%}" in printed
    assert f"{low:.1%} to {high:.1%}" in printed

    # The second model's responses are those of its own key.
    mesh = sharding.make_mesh(devices=jax.devices())
    config, params = hf.load(world / "b", mesh)
    tokenizer = hf.load_tokenizer(str(world / "b"))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows[15::3]]
    key = jax.random.split(jax.random.key(5), 2)[1]
    settings = {"samples_per_prompt": 3, "max_new_tokens": 6, "temperature": 0.7, "mesh": mesh}
    sampled, _ = rollout.sample(params, config, prompts, key, size=2, **settings)
    texts = tokenizer.batch_decode(rollout.token_ids(sampled), skip_special_tokens=True)
    assert [row["response"] for row in rows[15:]] == texts
    of_b = results["models"][f"{world}/b"]
    assert of_b["length"] == pytest.approx(sampled["mask_BR"].sum(1).mean())
    assert of_b["utility"][0] == pytest.approx(utility[1].mean())


def answers(where, utility_PS, length_PS) -> evaluate.Answers:
    utility_PS = np.array(utility_PS, float)
    texts = [["x"] * utility_PS.shape[1]] * len(where)
    ended_PS = np.ones(utility_PS.shape, bool)
    return evaluate.Answers(where, where, texts, np.array(length_PS), ended_PS, utility_PS)


def test_models_are_compared_on_the_prompts_that_both_answered():
    ours = answers(["1", "2", "4"], [[0, 3], [5, 5], [1, 1]], [[4, 8], [9, 3], [1, 1]])
    theirs = answers(["4", "1"], [[1], [2]], [[2], [2]])
    results = evaluate.compare({"ours": ours, "theirs": theirs})
    pair, back = results["pairs"]
    assert pair["prompts"] == back["prompts"] == 2
    assert pair["win_rate"].value == (0.5 + 0.5) / 2  # one of two wins; a tie
    controlled = statistics.length_controlled(np.array([0.5, 0.5]), np.array([4, -1]))
    assert pair["win_rate_at_equal_length"] == controlled
    assert results["models"]["ours"]["utility"].value == pytest.approx((1.5 + 5 + 1) / 3)
    with pytest.raises(ValueError, match="no prompt has room in both"):
        evaluate.compare({"ours": ours, "theirs": answers(["9"], [[1]], [[2]])})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--models", "runs/sft"], "--models runs/sft: give at least two"),
        (["--data", "jsonl:prompts.jsonl"], "--gold: these data have no judge"),
        (["--batch_size", "12"], "--batch_size 12: does not divide over 8 shards"),
        (["--models", "runs/nothing", "runs/sft"], "--models runs/nothing: no such directory"),
    ],
)
def test_wrong_flags(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        evaluate.cli(flags)
    assert end.value.code == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
