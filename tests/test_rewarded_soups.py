"""rewarded_soups.py: its commands, its rewards on judged responses, hypervolumes by hand."""

import json
from dataclasses import replace
from pathlib import Path

import grid_commands
import miniature_rewards
import numpy as np
import pytest
import rewarded_soups
from rewarded_soups import Config

from instructjax import miniature
from instructjax.data import DataConfig, Record

REAL = Config(
    out=Path("OUT"),
    seeds=(3, 5),
    reward=("runs/rm", "f.py:short"),
    data=DataConfig("jsonl:prompts.jsonl"),
    gold=("judge.py:f",),
    ppo_flags="--steps 7",
    max_new_tokens=48,
    evaluate_flags="--temperature 0.9",
)


@pytest.mark.parametrize("c", [REAL, Config(out=Path("OUT"), seeds=(3, 5))])
def test_the_scripts_know_all_flags(c):
    for name, job, flags in grid_commands.parsed(rewarded_soups.grid(c)):
        _, *weights, seed = name.split("-")
        values = tuple(map(float, weights))
        if job.script == "run_ppo.py":
            assert (flags.reward.spec, flags.reward.weights) == (c.rewards, values)
            assert flags.steps == (7 if c is REAL else 120)
            assert (flags.data, flags.gold, flags.ptx.coef) == (c.data, c.gold, 0)
            assert (f"{flags.seed}", flags.max_new_tokens) == (seed, c.max_new_tokens)
        elif job.script == "evaluate.py":
            assert flags.models == (c.model, *(f"OUT/{need}" for need in job.needs))
            assert (flags.measure, flags.max_new_tokens) == (c.rewards, c.max_new_tokens)
            assert (f"{flags.seed}", flags.temperature) == (seed, 0.9 if c is REAL else 1)
        else:
            assert job.script == "-m instructjax.run.average"
            ends = np.eye(len(values)).astype(int).tolist()
            names = [f"ppo-{'-'.join(map(str, end))}-{seed}" for end in ends]
            assert flags.models == tuple(f"OUT/{end}" for end in names)
            assert flags.weights == values
            assert job.needs == tuple(names)


def test_the_weights():
    three, two = Config(), REAL
    assert three.corners == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert three.mixtures == [(0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5), (0.333,) * 3]
    assert two.mixtures == [(0.5, 0.5)]
    assert three.rewards[1].endswith("experiments/miniature_rewards.py:courtesy")


def test_the_rewards_are_parts_of_the_utility():
    """But for courtesy, which the judge does not reward."""
    records, texts = [], []
    for i, row in enumerate(miniature.comparisons(0, 40)):
        record = Record(f"{i}", row, row["prompt"])
        records += [record] * len(row["responses"])
        texts += row["responses"]
    prompts = [record.prompt for record in records]
    facts, courtesy, form = (
        np.array(reward(prompts, texts, records))
        for reward in (miniature_rewards.facts, miniature_rewards.courtesy, miniature_rewards.form)
    )
    utility = [
        miniature.judge(dict(record.row), text).utility
        for record, text in zip(records, texts, strict=True)
    ]
    polite = facts + courtesy + form - utility
    assert {*np.round(polite, 9)} == {0, 2}
    assert (form < 0).any()
    assert (courtesy < 0).any()
    perfect = np.array(utility) == 4  # see judging.GOLD
    assert perfect.any()
    assert (facts[perfect] == 4).all()
    assert (form[perfect] == 0).all()


def write(out: Path, c: Config, seed: int, points: dict[str, list[float]]) -> None:
    names = [spec.rpartition(":")[2] if ".py:" in spec else spec for spec in c.rewards]
    models = {
        f"{'elsewhere' if i == 0 else out}/{name.removeprefix('start ')}": {
            "measures": {key: [x, x, x] for key, x in zip(names, point, strict=True)}
        }
        for i, (name, point) in enumerate(points.items())
    }
    directory = out / f"evaluation-{seed}"
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({"models": models, "pairs": []}))


@pytest.mark.parametrize("start", ["sft", "ppo-1-0-5"])  # a name of the grid's
def test_the_page(start, tmp_path):
    c = replace(REAL, out=tmp_path, seeds=(3, 5))
    assert rewarded_soups.sections(c) == []
    points = {f"start {start}": [0.0, 0.0], "ppo-1-0-5": [4.0, 1.0], "ppo-0-1-5": [1.0, 4.0]}
    points |= {"ppo-0.5-0.5-5": [3.0, 3.0], "soup-0.5-0.5-5": [2.0, 3.0]}
    write(tmp_path, c, 5, points)
    # Both ends: 4 + 4 - 1. With (3, 3): 4 more. With (2, 3): 2 more.
    assert rewarded_soups.volumes(c, 5) == {"one reward each": 7, "sweep": 11, "soups": 9}
    volume, rewards = rewarded_soups.sections(c)
    assert "It failed in: seed 5." in volume.text
    shares = {row[0]: row[1:] for row in volume.tables[0].rows}
    assert shares["soups"] == ["2", "81.8 % (81.8 to 81.8)"]
    assert shares["sweep"] == ["3", "100.0 % (100.0 to 100.0)"]
    table = {row[0]: row[1:] for row in rewards.tables[0].rows}
    assert table["soup-0.5-0.5"] == ["2.00 (2.00 to 2.00)", "3.00 (3.00 to 3.00)"]
    assert table["start"] == ["0.00 (0.00 to 0.00)"] * 2
    assert list(table) == ["start", "ppo-1-0", "ppo-0-1", "ppo-0.5-0.5", "soup-0.5-0.5"]
    (figure,) = rewards.figures
    assert "runs/rm and short" in figure
    assert ">soups<" in figure


def test_wrong_flags(tmp_path, capsys):
    for flags, named in (
        (["--reward", "f.py:f"], "--reward: give two or more"),
        (["--reward", "f.py:f", "runs/rm"], "--reward: give two or more, and a reward model first"),
        (["--reward", "f.py:f", "g.py:f"], "--reward: f, f: two alike, or a name in use"),
        (["--reward", "f.py:f", "g.py:toxic"], "--reward: f, toxic: two alike"),
        (["--data", "jsonl:x", "--gold", "f.py:f"], "--reward: only the miniature has"),
    ):
        with pytest.raises(SystemExit) as end:
            rewarded_soups.cli([*flags, "--out", f"{tmp_path}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
