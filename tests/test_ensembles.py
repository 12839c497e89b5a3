"""ensembles.py: its commands, which score each run maximises, and differences by seed."""

import json
import math
from pathlib import Path

import ensembles
import grid_commands
import pytest
from ensembles import Config

from instructjax.evaluation import overoptimisation


def grid(**flags):
    return ensembles.grid(Config(out=Path("OUT"), seeds=(3, 5), **flags))


def test_the_scripts_know_all_flags():
    for name, job, flags in grid_commands.parsed(grid()):
        if job.script.startswith("-m "):
            (members,) = job.needs
            exports = [f"OUT/{members}/export{i}" for i in ("", "-1", "-2", "-3", "-4")]
            assert list(flags.models) == exports
            used = {members}
        elif job.script == "evaluate.py":
            used = {spec.split("/")[1] for spec in flags.reward.spec}
        else:
            assert flags.preset == "miniature"
            used = {flags.model.split("/")[1]} if flags.model.startswith("OUT/") else set()
            if job.script == "run_ppo.py":
                used = {path.split("/")[1] for path in (*flags.reward.spec, flags.value_model)}
            elif job.script == "run_rm.py":
                used |= {"pairs"}
                assert ("flipped" in name) == flags.data.spec.endswith("-flipped-0.25.jsonl")
        assert used == set(job.needs)


def test_which_reward_models_and_which_score():
    jobs = grid(members=3, spread=0.5, flipped=0.4, start_steps=7, pairs=30).jobs
    assert jobs["rm-clean-3"].flags["ensemble"] == 3
    assert jobs["rm-start-clean-3"].flags["steps"] == 7
    assert jobs["rm-members-flipped-5"].flags["model"] == Path("OUT/rm-start-flipped-5")
    for run in ("rm-clean-5", "rm-start-clean-5", "rm-members-clean-5"):
        assert jobs[run].flags["seed"] == 15  # members have 15, 16, 17; those of seed 4: 12 to 14
    assert jobs["rm-members-flipped-5"].flags["ensemble"] == 3
    for name, flips in (("clean", 0), ("flipped", 0.4)):
        for run in (f"rm-{name}-5", f"rm-start-{name}-5", f"rm-members-{name}-5"):
            file = f"pairs-30-5{'-flipped-0.4' if flips else ''}.jsonl"
            assert jobs[run].prepare.args[1:] == (Path("OUT") / file, 30, 5, flips)
    rewards = {
        "single": {"reward": "rm-clean-3/export"},
        "mean": {"reward": "rm-clean-3"},
        "min": {"reward": "rm-clean-3", "reward.combine": "min"},
        "mean-variance": {"reward": "rm-clean-3", "reward.combine": "mean-variance"},
        "average": {"reward": "rm-average-clean-3"},
        "member": {"reward": "rm-members-clean-3/export"},
    }
    for score, expected in rewards.items():
        for kind in ("best-of-n", "ppo"):
            if (kind, score) != ("ppo", "member"):
                flags = jobs[f"{kind}-{score}-clean-3"].flags
                assert flags["reward"] == Path("OUT") / expected["reward"]
                assert flags.get("reward.combine") == expected.get("reward.combine")
                assert flags.get("reward.spread") == (0.5 if score == "mean-variance" else None)
                if kind == "ppo":
                    assert flags["value_model"] == Path("OUT/rm-clean-3")
    assert "ppo-member-clean-3" not in jobs


def results(end: float) -> dict:
    """What evaluate.py writes of best-of-n, whose gold ends at a gain of `end`."""
    rows = [{"n": 1, "kl": 0.0, "score": [0], "utility": [1]}]
    rows.append({"n": 2, "kl": 1.0, "score": [2], "utility": [1 + 2 * end]})
    return {
        "models": {"m": {"score_deviation": 1.0, "utility_deviation": 2.0}},
        "best_of": rows,
    }


def test_differences_are_by_seed(tmp_path):
    """Seed 7 has no single reward model. The average is compared with its members."""
    c = Config(out=tmp_path, seeds=(3, 5, 7))
    ends = {"single": (1, 2), "mean": (2, 4, 9), "member": (1.5, 2), "average": (2, 2)}
    for score, values in ends.items():
        for seed, end in zip(c.seeds, values, strict=False):
            run = tmp_path / f"best-of-n-{score}-clean-{seed}"
            run.mkdir()
            (run / "results.json").write_text(json.dumps(results(end)))
    curves, difference = ensembles.sections(c)
    assert curves.title == "best-of-n, clean labels"
    assert [row[0] for row in curves.tables[0].rows] == ["single", "mean", "member", "average"]
    half = 12.706 * math.sqrt(0.5) / math.sqrt(2)
    assert difference.tables[0].rows == [
        ["mean", f"1.50 ({1.5 - half:.2f} to {1.5 + half:.2f})"],
        ["average", f"0.25 ({0.25 - half / 2:.2f} to {0.25 + half / 2:.2f})"],
    ]
    assert overoptimisation.COLUMNS[3] == "gold at the end"


def test_wrong_flags(tmp_path, capsys):
    for flags, named in (
        (["--members", "1"], "--members 1: must be at least 2"),
        (["--flipped", "1.5"], "--flipped 1.5: must be from 0 to 1"),
        (["--rm_model", "runs/nothing", "--model", "miniature"], "--rm_model runs/nothing"),
    ):
        with pytest.raises(SystemExit) as end:
            ensembles.cli([*flags, "--out", f"{tmp_path}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
