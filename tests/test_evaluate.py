"""evaluate.py: win rates by hand, and two small models from the command line to the files."""

import json
from pathlib import Path

import evaluate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import data, hf, miniature, models, rollout, sharding
from instructjax.evaluation import statistics, tax
from instructjax.models import ModelConfig

JUDGE = """
def length(prompts, responses, records):
    return [len(r) for r in responses]

def spaces(prompts, responses, records):
    return [r.count(" ") for r in responses]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two small random models, prompts, and a judge that likes long responses."""
    out, tokenizer = tmp_path_factory.mktemp("world"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=96, **ids)
    for seed, name in enumerate(("a", "b")):
        hf.save(out / name, config, models.init(config, jax.random.key(seed)), tokenizer)
    texts = [f"list {word} animals." for word in ("one", "two", "white", "black", "small")]
    texts.append("list " + "white " * 95 + "animals.")  # leaves no room
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))
    (out / "judge.py").write_text(JUDGE)
    return out


def test_a_home_in_out(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", f"{tmp_path}")
    run(world, Path("~/q"), "--prompts", "1", "--max_new_tokens", "1")
    assert (tmp_path / "q" / "results.json").is_file()


def run(world: Path, out: Path, *flags: str) -> dict:
    words = ["--models", f"{world}/a", f"{world}/b", "--data", f"jsonl:{world}/prompts.jsonl"]
    words += ["--gold", f"{world}/judge.py:length", "--split", "all", "--data.cache", "None"]
    evaluate.cli([*words, "--out", f"{out}", "--batch_size", "8", *flags])
    return json.loads((out.expanduser() / "results.json").read_text())


def test_two_models(world, tmp_path, capsys):
    flags = ["--samples", "3", "--max_new_tokens", "6", "--temperature", "0.7", "--seed", "5"]
    results = run(world, tmp_path, *flags)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == [f"{world}/a"] * 15 + [f"{world}/b"] * 15
    assert [row["utility"] for row in rows] == [len(row["response"]) for row in rows]
    utility = np.array([row["utility"] for row in rows]).reshape(2, 5, 3)
    first, back = results["pairs"]
    assert (first["model"], first["against"]) == (f"{world}/a", f"{world}/b")
    assert results["prompts"] == 5
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
    assert of_b["tokens"] == pytest.approx(sampled["mask_BR"].sum(1).mean())
    assert of_b["characters"] == pytest.approx(np.mean([len(text) for text in texts]))
    assert of_b["utility"][0] == pytest.approx(utility[1].mean())


def test_reward_against_kl(world, tmp_path, capsys):
    """KL, the proxy and the best of n are those of the responses that were written."""
    flags = ["--samples", "4", "--max_new_tokens", "6", "--temperature", "0.7"]
    flags += ["--reference", f"{world}/a", "--reward", f"{world}/judge.py:spaces"]
    flags += ["--measure", f"{world}/judge.py:spaces", "--reward.weights", "2"]
    results = run(world, tmp_path, *flags, "--best_of", "1", "4")
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [2 * row["response"].count(" ") for row in rows]
    of_a, of_b = results["models"].values()
    assert of_a["kl"] == pytest.approx([0, 0, 0], abs=1e-4)
    assert of_a["measures"] == {"spaces": pytest.approx([x / 2 for x in of_a["score"]])}
    for name in ("utility", "score"):
        assert of_b[f"{name}_deviation"] == pytest.approx(np.std([row[name] for row in rows[20:]]))
    a, b = (hf.load(world / name) for name in ("a", "b"))
    tokenizer = hf.load_tokenizer(str(world / "a"))

    def logp(model, prompt: list[int], response: list[int]) -> float:
        config, params = model
        logits_BTV = models.logits(params, config, jnp.array([prompt + response]))
        logp_RV = jax.nn.log_softmax(logits_BTV[0, len(prompt) - 1 : -1] / 0.7)
        return float(logp_RV[np.arange(len(response)), np.array(response)].sum())

    kls = []
    for row in rows[20:]:
        prompt, response = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        if len(response) == 6 and len(kls) < 4:  # others have an EOS, which the text lacks
            kl = logp(b, prompt, response) - logp(a, prompt, response)
            kls.append((kl, row["kl"]))
    assert len(kls) == 4
    np.testing.assert_allclose(*np.array(kls).T, atol=1e-3)
    assert of_b["kl"][0] == pytest.approx(np.mean([row["kl"] for row in rows[20:]]), abs=1e-6)
    one, four = results["best_of"]
    assert (one["n"], four["n"]) == (1, 4)
    assert one["score"] == pytest.approx(of_a["score"])
    scores = np.array([row["score"] for row in rows[:20]]).reshape(5, 4)
    assert four["score"][0] == pytest.approx(scores.max(1).mean())
    assert four["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    curves = evaluate.frontier(
        evaluate.Config(reference=f"{world}/a", models=(f"{world}/a", "b")), results
    )
    assert curves[f"{world}/b"] == {
        "kl": [of_b["kl"][0]],
        "utility": [of_b["utility"][0]],
        "score": [of_b["score"][0]],
    }
    best = curves[f"best of n, {world}/a"]
    assert best["score"] == [one["score"][0], four["score"][0]]
    other = evaluate.Config(reference="elsewhere", models=(f"{world}/a", "b"))
    assert set(evaluate.frontier(other, results)) == {f"{world}/a", f"{world}/b"}
    printed = capsys.readouterr().out
    assert "best of n samples" in printed
    assert "spaces" in printed


def test_prompts_of_a_tree(world, tmp_path):
    """All prompts of a tree have one place in the file; each is compared with itself."""
    message: dict = {"text": "list black animals.", "role": "prompter", "replies": []}
    for _ in range(2):  # the user speaks three times
        reply = {"text": "white " * 9, "role": "assistant", "rank": 0, "replies": [message]}
        text = "list " + "white " * 15 + "animals."
        message = {"text": text, "role": "prompter", "replies": [reply]}
    (tmp_path / "tree.jsonl").write_text(json.dumps({"prompt": message}) + "\n")
    flags = ["--data", f"jsonl:{tmp_path}/tree.jsonl", "--max_new_tokens", "4"]
    results = run(world, tmp_path / "out", *flags)
    assert results["prompts"] == 3
    lines = (tmp_path / "out" / "responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows[:3]] == [row["prompt"] for row in rows[3:]]
    assert [len(row["prompt"]) for row in rows[:3]] == [1, 3, 5]  # messages, as a row has them
    won = [
        (a["utility"] > b["utility"]) + (a["utility"] == b["utility"]) / 2
        for a, b in zip(rows[:3], rows[3:], strict=True)
    ]
    assert results["pairs"][0]["win_rate"][0] == pytest.approx(np.mean(won))


def test_comparisons_of_one_model(world, tmp_path, capsys):
    """Responses that ended, ranked by the judge, in rows that run_rm.py reads."""
    flags = ["--models", f"{world}/a", "--samples", "6", "--max_new_tokens", "40", "--comparisons"]
    results = run(world, tmp_path, *flags)
    assert results["pairs"] == []
    said = capsys.readouterr().out
    assert "comparisons.jsonl leaves out " in said
    assert f"{tmp_path}/comparisons.jsonl" in said.replace("\n", "")
    assert "is empty" not in said
    assert "against" not in said
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    run(world, tmp_path / "cut", *flags[:4], "--max_new_tokens", "1", "--comparisons")
    assert "warning: comparisons.jsonl is empty" in capsys.readouterr().out
    records = data.read(data.DataConfig(f"jsonl:{tmp_path}/comparisons.jsonl"), "comparisons")
    assert records
    for record in records:
        utility = {x["response"]: x["utility"] for x in rows if x["prompt"] == record.prompt}
        assert 2 <= len(record.responses) <= len(utility)
        better = {(a, b) for a in record.responses for b in record.responses if len(a) > len(b)}
        rank = dict(zip(record.responses, record.ranks, strict=True))
        assert all(rank[a] < rank[b] for a, b in better)
        assert all(utility[text] == len(text) for text in record.responses)
        ended = {x["response"] for x in rows if x["ended"]}
        assert {*record.responses} <= ended
    assert not all(x["ended"] for x in rows)


def test_the_prompts_of_training(world, tmp_path):
    """--split train has those that --split validation lacks."""
    said = []
    for split in ("train", "validation", "all"):
        flags = ["--split", split, "--data.validation", "0.4", "--max_new_tokens", "2"]
        run(world, tmp_path / split, *flags)
        lines = (tmp_path / split / "responses.jsonl").read_text().splitlines()
        said.append({json.loads(line)["prompt"] for line in lines})
    train, validation, every = said
    assert train | validation == every
    assert not train & validation
    assert train


def test_what_the_miniature_measures(world, tmp_path, capsys):
    """Prompts are those that --data.columns makes; their judge needs no flag."""
    flags = ["--models", f"{world}/a", f"{world}/b", "--out", f"{tmp_path}", "--prompts", "8"]
    flags += ["--data.columns", "prompt={prompt} be respectful.", "--data.cache", "None"]
    evaluate.cli([*flags, "--max_new_tokens", "4"])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert all(row["prompt"].endswith(" be respectful.") for row in rows)
    measures = results["models"][f"{world}/b"]["measures"]
    assert list(measures) == ["likert", "followed", "truthful", "hallucinated", "toxic"]
    assert measures["toxic"][0] == np.mean([row["toxic"] for row in rows[8:]])
    ratings = [miniature.likert(row["utility"]) for row in rows[8:]]
    assert measures["likert"][0] == pytest.approx(np.mean(ratings))


def test_few_shot_and_benchmarks(world, tmp_path, capsys):
    """The model continues three demonstrations and the prompt, up to the end of a line."""
    flags = ["--models", f"{world}/a", f"few_shot:{world}/a", "--out", f"{tmp_path}"]
    flags += ["--prompts", "40", "--max_new_tokens", "8", "--data.cache", "None", "--shots", "2"]
    evaluate.cli([*flags, "--benchmarks", "8"])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    count = results["prompts"]
    assert 1 < count < 40  # some leave no room for it beside the demonstrations
    assert "prompts are left out" in capsys.readouterr().out
    few_shot = [row["response"] for row in rows if row["model"].startswith("few_shot:")]
    assert len(few_shot) == count
    assert len(rows) == count + 40  # those of the other model that have no counterpart, too
    assert all("\n" not in text for text in few_shot)
    assert any("\n" in row["response"] for row in rows[:40])
    assert results["models"][f"few_shot:{world}/a"]["eos_fraction"] < 1
    benchmarks = results["models"][f"{world}/a"]["benchmarks"]
    mesh = sharding.make_mesh(devices=jax.devices())
    config, params = hf.load(world / "a", mesh)
    expected = tax.benchmarks(params, config, miniature.tokenizer(), mesh, size=8, items=8)
    assert benchmarks["text_loss"] == pytest.approx([*expected["text_loss"]], rel=1e-4)

    tokenizer = miniature.tokenizer()
    plain = evaluate.Config(shots=2, max_new_tokens=8, prompts=40)
    records, given = evaluate.read_prompts(plain, config, tokenizer, few_shot=True)
    examples = [f"{x['prompt']}\n{x['completion']}" for x in miniature.demonstrations(0, 2)]
    text = "\n\n".join([*examples, records.records[0].prompt]) + "\n"
    assert given[0] == tokenizer(text)["input_ids"]
    assert len(given) == len(records) == count


def test_a_model_that_fails_loses_no_responses_of_others(world, tmp_path):
    """Both demonstrations together leave no room, which is known once the second model is there."""
    flags = ["--models", f"{world}/a", f"few_shot:{world}/a", "--out", f"{tmp_path}"]
    flags += ["--prompts", "3", "--max_new_tokens", "8", "--data.cache", "None", "--shots", "20"]
    with pytest.raises(ValueError, match="--shots 20: these demonstrations leave no room"):
        evaluate.cli(flags)
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 3


def test_first_lines():
    """A line that the model did not end has no EOS."""
    tokenizer = miniature.tokenizer()
    end, a, b = tokenizer.eos_token_id, *tokenizer("list two")["input_ids"]
    sampled = {"tokens_BR": np.array([[a, b, end], [a, b, a], [end, 0, 0], [a, b, b]])}
    sampled["mask_BR"] = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
    texts = ["list two", "\nlist two list", "", "list\ntwo two"]
    lines, rows = evaluate.first_lines(texts, sampled, [end], tokenizer)
    assert lines == ["list two", "list two list", "", "list"]
    assert rollout.token_ids(rows) == [[a, b, end], [a, b, a], [end], [a, end]]


def test_labels(tmp_path, capsys):
    lines = [
        {"prompt": "p", "models": ["sft", "ppo"], "ranks": [2, 1]},
        {"prompt": "p", "models": ["ppo", "sft"], "scores": [5, 5]},
        {"prompt": "q", "models": ["ppo", "base", "sft"], "scores": [6, 1, 7]},
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.cli(["--labels", f"{file}", "--out", f"{tmp_path}/out", "--models", "none", "sft"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rates = {(x["model"], x["against"]): x["win_rate"][0] for x in results["pairs"]}
    assert rates["ppo", "sft"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert rates["ppo", "base"] == 1
    assert results["models"]["ppo"]["responses"] == 3
    assert results["models"]["ppo"]["score"][0] == 5.5
    printed = " ".join(capsys.readouterr().out.split())
    assert "against sft, by labelers, on 2 prompts" in printed
    assert not (tmp_path / "out" / "responses.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--models", "a", "b", "a"], "--models a b a: give at least one, each once"),
        (["--comparisons"], "--comparisons: needs --samples from 2 to 9, not 1"),
        (["--comparisons", "--labels", "x.jsonl"], "--comparisons: not with --labels"),
        (["--reward.weights", "2"], "--reward: its other flags need"),
        (["--comparisons", "--samples", "10"], "--comparisons: needs --samples from 2 to 9"),
        (["--data", "jsonl:prompts.jsonl"], "--gold: these data have no judge"),
        (["--benchmarks", "8", "--data", "jsonl:x", "--gold", "x.py:f"], "--benchmarks: only the"),
        (["--models", "few_shot:x", "y", "--reference", "y"], "--reference: the KL of a few_shot:"),
        (["--measure", "judge.py:toxic"], "--measure judge.py:toxic: toxic is the name of"),
        (["--measure", "judge.py:kl"], "--measure judge.py:kl: kl is the name of another"),
        (["--best_of", "2"], "--best_of 2: more than --samples 1"),
        (["--labels", "none.jsonl"], "--labels none.jsonl: no such file"),
        (["--out", "gs://bucket/x"], "--out gs://bucket/x: expected a directory on a disk"),
        (["--reference", "runs/nothing"], "no such directory"),
        (["--reward", "nothing.py:f"], "--reward nothing.py:f: there is no file"),
        (["--batch_size", "12"], "--batch_size 12: does not divide over 8 shards"),
        (["--models", "runs/nothing", "runs/sft"], "--models runs/nothing: no such directory"),
    ],
)
def test_wrong_flags(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    functions = "def toxic(prompts, responses, records): ...\nkl = toxic\n"
    (tmp_path / "judge.py").write_text(functions)
    with pytest.raises(SystemExit) as end:
        evaluate.cli(flags)
    assert end.value.code == 2
    assert named in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"judge.py", "__pycache__"}
