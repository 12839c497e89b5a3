"""overoptimise.py: its commands, the pairs, and curves of best-of-n and PPO by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import grid_commands
import numpy as np
import overoptimise
import policy_grids
import pytest
from overoptimise import Config

from instructjax.data import DataConfig
from instructjax.evaluation import overoptimisation, statistics
from instructjax.evaluation.overoptimisation import Curve

REAL = Config(
    out=Path("OUT"),
    model="runs/sft",
    rm_models=("small-lm", "large-lm"),
    pairs=(20, 40),
    seeds=(3, 5),
    data=DataConfig("jsonl:prompts.jsonl", max_prompt=64, template="plain"),
    gold=("judge.py:f", "runs/gold"),
    max_new_tokens=48,
    rm_flags="--length 1024 --epochs=2",
    ppo_flags="--ppo.learning_rate 1e-5",
    evaluate_flags="--temperature 0.9 --samples 4",
)


@pytest.mark.parametrize("c", [REAL, Config(out=Path("OUT"), seeds=(3, 5))])
def test_the_scripts_know_all_flags(c):
    for name, job, flags in grid_commands.parsed(overoptimise.grid(c)):
        if job.script == "evaluate.py":
            assert flags.temperature == (0.9 if c is REAL else 1)
            if name == "pairs":
                assert (flags.samples, flags.prompts) == (2, c.prompts)
            used = {flags.models[0], *flags.reward.spec}
        else:
            assert flags.preset == ("small" if c is REAL else "miniature")
            used = {flags.model}
        if job.script == "run_ppo.py":
            used |= {flags.reward.spec[0], flags.value_model}
            assert flags.ppo.learning_rate == (1e-5 if c is REAL else 3e-4)
            assert (flags.ppo.beta, flags.ptx.coef) == (1e-6, 0)
            assert flags.ppo.missing_eos == "none"
        if job.script == "run_rm.py":
            assert flags.data.validation == "jsonl:OUT/pairs-held-out.jsonl"
            assert flags.epochs == (2 if c is REAL else 2.4)
            assert flags.demonstrations.spec == "jsonl:OUT/best-held-out.jsonl"
            assert flags.data.template == flags.demonstrations.template == c.data.template
            used |= {"OUT/pairs"}
        elif c is REAL:
            assert (flags.data, flags.gold) == (c.data, c.gold)
            assert flags.max_new_tokens == 48
        needs = {f"OUT/{need}" for need in job.needs}
        assert needs == {path for path in used if path.startswith("OUT/")}
        if name.endswith(("-3", "-5")):
            assert name.endswith(f"-{flags.seed}")


def test_reward_models_of_each_size_and_of_each_number_of_pairs():
    names = [name for name in overoptimise.grid(REAL).jobs if name.startswith("rm-")]
    expected = ["rm-large-lm-40", "rm-small-lm-40", "rm-large-lm-20"]
    assert names == [f"{name}-{seed}" for seed in (3, 5) for name in expected]
    jobs = overoptimise.grid(REAL).jobs
    assert jobs["ppo-small-lm-40-3"].flags["value_model"] == Path("OUT/rm-large-lm-40-3")
    assert jobs["rm-large-lm-20-5"].flags["data"] == "jsonl:OUT/pairs-20-5.jsonl"
    write: Any = jobs["rm-large-lm-20-5"].prepare
    assert write.args[1:] == (Path("OUT/pairs-20-5.jsonl"), 20, 5, 0)
    assert len(overoptimise.grid(Config()).jobs) == 1 + 5 + 3 * 9 * 3


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def judged(tmp_path, monkeypatch) -> Config:
    """A run `pairs` of 30 rows."""
    monkeypatch.setattr(policy_grids, "HELD_OUT", 4)
    rows = [{"prompt": f"{i}", "responses": ["a", "b"], "scores": [i, -i]} for i in range(1, 31)]
    (tmp_path / "pairs").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs" / "comparisons.jsonl").write_text(lines)
    return Config(out=tmp_path)


def test_pairs_of_a_seed(judged, tmp_path):
    """Fewer pairs are among more. Those of validation are the same for all."""
    written = {}
    for count, seed, flipped in ((5, 0, 0), (20, 0, 0), (20, 1, 0), (20, 0, 0.25), (5, 0, 0.25)):
        file = tmp_path / "x.jsonl"
        policy_grids.write_pairs(judged, file, count, seed, flipped)
        assert [row["prompt"] for row in rows_of(tmp_path / "pairs-held-out.jsonl")] == list("1234")
        best = rows_of(tmp_path / "best-held-out.jsonl")
        assert best == [{"prompt": i, "completion": "a"} for i in "1234"]
        written[count, seed, flipped] = rows_of(file)
        assert len({row["prompt"] for row in written[count, seed, flipped]} - {*"1234"}) == count
    assert written[5, 0, 0] == written[20, 0, 0][:5]
    assert written[5, 0, 0.25] == written[20, 0, 0.25][:5]
    assert written[20, 0, 0] != written[20, 1, 0]
    pairs = list(zip(written[20, 0, 0], written[20, 0, 0.25], strict=True))
    assert all(a["prompt"] == b["prompt"] for a, b in pairs)
    turned = [b["scores"] == a["scores"][::-1] for a, b in pairs]
    assert 0 < sum(turned) < 10
    assert all(flip or a == b for flip, (a, b) in zip(turned, pairs, strict=True))
    with pytest.raises(ValueError, match="pairs has 26 pairs besides 4 for validation, and 27 are"):
        policy_grids.write_pairs(judged, tmp_path / "x.jsonl", 27, 0, 0)
    (tmp_path / "pairs" / "comparisons.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs/comparisons\.jsonl"):
        policy_grids.write_pairs(judged, tmp_path / "x.jsonl", 5, 0, 0)


START = {
    "models": {"runs/sft": {"score_deviation": 2.0, "utility_deviation": 4.0}},
    "best_of": [
        {"n": 1, "kl": 0.0, "score": [1, 0, 2], "utility": [3, 2, 4]},
        {"n": 4, "kl": 0.64, "score": [5, 4, 6], "utility": [5, 4, 6]},
        {"n": 8, "kl": 1.44, "score": [7, 6, 8], "utility": [4, 3, 5]},
    ],
}


def test_curves_by_hand():
    curve = overoptimisation.of_best_of_n(START)
    np.testing.assert_allclose(curve.d, [0, 0.8, 1.2])
    np.testing.assert_allclose(curve.proxy, [0, 2, 3])
    np.testing.assert_allclose(curve.gold, [0, 0.5, 0.25])
    np.testing.assert_array_equal(curve.step, [1, 4, 8])
    rows = [(0, -0.01, 1, 2), (6, 4.0, 2, 3), (12, 9.0, 5, -2)]
    names = ("step", "kl", "score", "utility")
    results = {"evaluations": [dict(zip(names, row, strict=True)) for row in rows]}
    curve = overoptimisation.of_training(results, START)
    np.testing.assert_allclose(curve.d, [0, 2, 3])
    np.testing.assert_allclose(curve.proxy, [0, 0.5, 2])
    np.testing.assert_allclose(curve.gold, [0, 0.25, -1])
    np.testing.assert_array_equal(curve.step, [0, 6, 12])
    assert overoptimisation.is_overoptimised(curve)


def test_over_optimised_is_a_fall_of_gold_while_the_proxy_rises():
    def over(proxy, gold) -> bool:
        d = np.arange(3)
        return overoptimisation.is_overoptimised(Curve(d, *map(np.array, (proxy, gold)), step=d))

    assert over([0, 1, 2], [0, 1, 0.7])
    assert not over([0, 1, 2], [0, 1, 0.9])  # by less than 0.2
    assert not over([0, 1, 0.5], [0, 1, 0.5])  # the proxy falls too
    assert not over([0, 1, 2], [0, 0.5, 1])


def test_the_mean_goes_as_far_as_all_seeds():
    short, long = (Curve(*([np.arange(n) + n] * 4)) for n in (2, 3))
    np.testing.assert_array_equal(overoptimisation.mean([short, long]), [[2.5, 3.5]] * 4)


def test_the_page(tmp_path):
    c = replace(REAL, out=tmp_path, seeds=(3, 5, 7))
    for seed in (3, 5):
        for name in ("large-lm-40", "small-lm-40"):
            results = json.loads(json.dumps(START))
            results["best_of"][2]["utility"][0] += seed + 10 * (name == "large-lm-40")
            for run, written in ((f"best-of-n-{name}-{seed}", results), (f"rm-{name}-{seed}", ACC)):
                (tmp_path / run).mkdir()
                (tmp_path / run / "results.json").write_text(json.dumps(written))
    sections = {section.title: section for section in overoptimise.sections(c)}
    assert list(sections) == [
        "best-of-n, by size of the reward model",
        "best-of-n, by pairs of the reward model",
        "Accuracy of the reward models",
    ]
    by_size = sections["best-of-n, by size of the reward model"]
    assert [row[0] for row in by_size.tables[0].rows] == [
        "small-lm, 40 pairs",
        "large-lm, 40 pairs",
    ]
    assert "Here it held in 0 of 4." in by_size.text
    row = dict(zip(overoptimisation.COLUMNS, by_size.tables[0].rows[0], strict=True))
    half = 12.706 * math.sqrt(1 / 8) / math.sqrt(2)  # of (7 - 3) / 4 and (9 - 3) / 4
    assert row["gold at the end"] == f"1.25 ({1.25 - half:.2f} to {1.25 + half:.2f})"
    assert row["proxy at the end"] == "3.00 (3.00 to 3.00)"
    alphas = [
        statistics.fit_best_of_n(np.array([0, 0.8, 1.2]), np.array([0, 0.5, end])).alpha
        for end in (1, 1.5)
    ]
    assert row["fitted alpha"].startswith(f"{np.mean(alphas):.2f} (")
    assert len(sections["best-of-n, by pairs of the reward model"].tables[0].rows) == 1
    assert all("<svg" in figure for figure in by_size.figures)
    accuracy = sections["Accuracy of the reward models"].tables[0].rows
    assert accuracy[0] == ["small-lm, 40 pairs", "70.0 % (70.0 to 70.0)"]


ACC = {"accuracy": {"held-out prompts": {"reward model": [0.7, 0.6, 0.8]}}}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pairs", "40", "20"], "--pairs rising"),
        (["--rm_models", "a/export", "b/export"], "--rm_models: two are named alike"),
        (["--ppo_flags=--ppo.beta 0"], "--ppo_flags: --ppo.beta 0 measures no KL"),
        (["--ppo_flags=--ppo.beta"], "--ppo_flags: --ppo.beta : expected a number"),
        (["--ppo_flags=--ppo.beta x"], "--ppo_flags: --ppo.beta x: expected a number"),
        (["--evaluate_flags=--max_new_tokens 9"], "--evaluate_flags: --max_new_tokens is set by"),
        (["--seeds", "1", "1"], "--seeds: give at least one, each once"),
        (["--ppo_flags", "3"], "--ppo_flags: 3: expected a flag"),
        (["--data", "jsonl:x.jsonl"], "--gold: these data have no judge"),
        (["--model", "runs/nothing"], "--model runs/nothing: no such directory"),
        (["--runs", "x"], "--runs x: not one of pairs"),
        (["--model", "miniature", "--rm_models", "runs/nothing"], "--rm_models runs/nothing"),
    ],
)
def test_wrong_flags(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        overoptimise.cli([*flags, "--out", f"{tmp_path}"])
    assert end.value.code == 2
    assert named in capsys.readouterr().err
