"""compare_algorithms.py: its commands, equal numbers of responses, and the page by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import compare_algorithms
import grid_commands
import pytest
from compare_algorithms import Config

from instructjax.data import DataConfig
from instructjax.scoring import RewardConfig

REAL = Config(
    out=Path("OUT"),
    seeds=(3, 5),
    reward=RewardConfig(("runs/a", "f.py:f"), weights=(1, 2)),
    data=DataConfig("jsonl:prompts.jsonl", max_prompt=64),
    comparisons=DataConfig("jsonl:pairs.jsonl", max_response=32),
    pretrain=DataConfig("jsonl:text.jsonl"),
    gold=("judge.py:f",),
    responses=2048,
    raft=(4, 16),
    raft_prompts=16,
    raft_flags="--learning_rate 2e-5",
    grpo_flags="--beta 0.2",
    rloo_flags="--beta 0.3",
    dpo_flags="--beta 0.4",
    ppo_flags="--ppo.beta 0.5",
    max_new_tokens=48,
    evaluate_flags="--temperature 0.9",
)


@pytest.mark.parametrize("c", [REAL, Config(out=Path("OUT"), seeds=(3, 5))])
def test_the_scripts_know_all_flags(c):
    real = c is REAL
    for name, job, flags in grid_commands.parsed(compare_algorithms.grid(c)):
        if job.script == "evaluate.py":
            assert flags.temperature == (0.9 if real else 1)
        elif job.script == "run_ppo.py":
            sampled = flags.steps * flags.batch_size
            assert sampled == c.responses
            assert (flags.ptx.coef == 0) == ("ptx" not in name)
            assert flags.ppo.missing_eos == "none"
            assert flags.ppo.beta == (0.5 if real else 0.15)
            if name.startswith("ppo-ptx"):
                assert flags.pretrain == c.pretrain
        else:
            assert type(flags).__name__.lower() == name.split("-")[0]
            if name.startswith("dpo"):
                assert flags.data == (c.comparisons if real else DataConfig())
            else:
                assert flags.steps * flags.batch_size * flags.samples == c.responses
            if name.startswith("raft"):
                assert flags.keep == ("random" if "random" in name else "best")
                assert f"{flags.samples}" == name.split("-")[1] or "random" in name
                assert flags.learning_rate == (2e-5 if real else 1e-4)
            elif real:
                assert flags.beta == {"grpo": 0.2, "rloo": 0.3, "dpo": 0.4}[name.split("-")[0]]
        if not name.startswith("dpo"):
            assert flags.reward == c.reward
            assert flags.data == c.data
        assert (flags.gold, flags.max_new_tokens) == (c.gold, 48 if real else 32)
        assert name.endswith(f"-{flags.seed}")


def test_what_is_left_out():
    names = {*compare_algorithms.grid(REAL).jobs}
    assert "raft-random-3" in names
    few = replace(REAL, comparisons=DataConfig(""), pretrain=DataConfig(""))
    assert names - {*compare_algorithms.grid(few).jobs} == {
        f"{name}-{seed}" for name in ("dpo", "ppo-ptx") for seed in (3, 5)
    }
    assert compare_algorithms.grid(REAL).jobs["raft-random-3"].flags["samples"] == 16


def write(out: Path, name: str, results: dict, batch: int = 1) -> None:
    (out / name).mkdir()
    config = {"config": {"batch_size": batch} | ({"samples": 4} if "raft" in name else {})}
    (out / name / "config.json").write_text(json.dumps(config))
    (out / name / "results.json").write_text(json.dumps(results))


def evaluations(*gold: float, scored: bool = True) -> dict:
    """What a run writes whose gold has these values."""
    rows = [
        {"step": i, "kl": float(i), "utility": x} | ({"score": i} if scored else {})
        for i, x in enumerate(gold)
    ]
    return {"evaluations": rows}


def test_the_page(tmp_path):
    c = replace(REAL, out=tmp_path)
    assert compare_algorithms.sections(c) == []
    model = {"score_deviation": 2.0, "utility_deviation": 4.0}
    rows = [{"n": n, "kl": n - 1.0, "score": [n], "utility": [n]} for n in (1, 2)]
    for seed in (3, 5):
        write(tmp_path, f"best-of-n-{seed}", {"models": {"m": model}, "best_of": rows})
        write(tmp_path, f"raft-16-{seed}", evaluations(1, 3, 1 + seed))
        write(tmp_path, f"raft-random-{seed}", evaluations(1, 1, 2))
        write(tmp_path, f"dpo-{seed}", evaluations(1, 2, scored=False))
    write(tmp_path, "ppo-5", evaluations(0, 8), batch=7)
    against_kl, against_responses, raft = compare_algorithms.sections(c)
    table = {row[0]: row[1:] for row in against_kl.tables[0].rows}
    assert list(table) == ["best-of-n", "raft-16", "raft-random", "ppo", "dpo"]
    half = 12.706 * math.sqrt(1 / 8) / math.sqrt(2)  # of 3 / 4 and 5 / 4
    assert table["raft-16"][0] == "1.41 (1.41 to 1.41)"
    assert table["raft-16"][1] == f"1.00 ({1 - half:.2f} to {1 + half:.2f})"
    assert table["raft-16"][2] == "1.00 (1.00 to 1.00)"
    assert table["dpo"] == ["1.00 (1.00 to 1.00)", "0.25 (0.25 to 0.25)", ""]
    assert dict(raft.tables[0].rows) == {
        "raft-16 less raft-random": f"0.75 ({0.75 - half:.2f} to {0.75 + half:.2f})",
        "ppo less raft-16": "0.75 (0.75 to 0.75)",  # of seed 5: 2 less 1.25
        "best-of-n less raft-16": f"-0.75 ({-0.75 - half:.2f} to {-0.75 + half:.2f})",
    }
    assert compare_algorithms.responses_of_a_step(c, "raft-16") == 4
    assert compare_algorithms.responses_of_a_step(c, "ppo") == 7
    gold, proxy = against_responses.figures
    assert "dpo" not in gold
    assert ">raft-16<" in gold
    assert ">ppo<" in proxy


def test_wrong_flags(tmp_path, capsys):
    for flags, named in (
        (["--raft", "4", "4"], "--raft: give at least one N, each once"),
        (["--responses", "511"], "--responses 511: an update or iteration has 512"),
        (["--raft_flags", "x"], "--raft_flags: x: expected a flag"),
        (["--model", "miniature", "--reward", "runs/nothing"], "--reward runs/nothing"),
    ):
        with pytest.raises(SystemExit) as end:
            compare_algorithms.cli([*flags, "--out", f"{tmp_path}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
