"""benchmarks/real_model.py: its commands, its data and its figures, without a real model."""

import dataclasses
import gzip
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import real_model
import tyro
from real_model import Config

from instructjax.evaluation.grid import Grid, Job
from instructjax.run import parse


def config(tmp_path, **flags):
    return Config(model="MODEL", data=Path("DATA"), out=tmp_path / "out", **flags)


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_scripts_know_all_flags(tmp_path, size):
    c = config(tmp_path, size=size, seeds=(0, 1))
    grid = real_model.grid(c)
    assert [name for name in grid.jobs if name.startswith("e2e-rm")] == ["e2e-rm-0", "e2e-rm-1"]
    before: set[str] = set()
    for name, job in grid.jobs.items():
        assert before.issuperset(job.needs), name  # as `Grid.chosen` takes it
        before.add(name)
        script = importlib.import_module(job.script.removesuffix(".py"))
        argv = grid.command(name)[2:]
        if job.script == "swap_loss.py":
            flags = parse(script.DPO | script.RAFT, {}, script.__doc__, argv)
        elif job.script == "evaluate.py":
            flags = tyro.cli(script.Config, args=argv, use_underscores=True)
            used = {*flags.models, *flags.gold, *flags.reward.spec} - {"MODEL"}
            assert used == {str(c.directory / need) for need in job.needs}
        else:
            flags = parse(script.Config, script.PRESETS, script.__doc__, argv)
            assert flags.preset == "small"
        assert flags.out == c.directory / name
        assert job.script == "evaluate.py" or flags.resume
        assert (flags.model_dtype == "bfloat16") == (size == "full")
        assert set(job.needs) <= set(grid.jobs)


def test_kept_runs_are_those_of_any_machine():
    results = Path(real_model.__file__).parents[1] / "docs" / "results" / "real"
    kept = [file.name.removesuffix(".cost.json") for file in results.glob("*.cost.json")]
    assert "oasst-rm-a" in kept
    for folder in ("/x", "y"):
        c = Config(model=f"{folder}/m", data=Path(f"{folder}/d"), results=results)
        real_model.grid(c).check(kept)  # raises if a kept run was made with other flags
        other = dataclasses.replace(c, size="full")
        with pytest.raises(ValueError, match="was made with --microbatches 2, and not with"):
            real_model.grid(other).check(kept)


def test_runs_are_chosen_with_what_they_need(tmp_path):
    every = {"x": Job("", {}), "y-1": Job("", {}, needs=("x",)), "z": Job("", {}, needs=("y-1",))}
    grid = Grid(tmp_path, every, tmp_path)
    assert grid.chosen(["z"]) == ["x", "y-1", "z"]
    assert grid.chosen(["y"]) == ["x", "y-1"]
    assert grid.chosen([]) == ["x", "y-1", "z"]
    grid = real_model.grid(config(tmp_path, seeds=(0, 3)))
    names = grid.chosen(["oasst-ppo", "hh-rm"])
    assert names == ["oasst-rm-a", "oasst-rm-b", "oasst-ppo", "hh-rm-0", "hh-rm-3"]
    with pytest.raises(ValueError, match="--runs oasst-pp: not one of e2e-rm-0"):
        grid.chosen(["oasst-pp"])


def test_runs_wait_for_what_they_need_and_are_not_made_twice(tmp_path, monkeypatch, capsys):
    script = (
        "import json, pathlib, sys\n"
        "out, need, log = map(pathlib.Path, sys.argv[1:4])\n"
        "assert str(need) == '.' or (need / 'results.json').exists(), need\n"
        "with log.open('a') as file: print(out.name, file=file)\n"
        "out.mkdir(exist_ok=True)\n"
        "(out / 'results.json').write_text(json.dumps({'x': {'score': 0.5}}))\n"
    )
    c = config(tmp_path)
    c.directory.mkdir()
    every = {"c": Job("", {}, needs=("b",)), "a": Job("", {}), "b": Job("", {}, needs=("a",))}

    def command(grid, name):
        needs = grid.jobs[name].needs
        need = str(c.directory / needs[0]) if needs else ""
        return [sys.executable, "-c", script, str(c.directory / name), need, str(tmp_path / "log")]

    monkeypatch.setattr(Grid, "command", command)
    for _ in range(2):
        assert Grid(c.directory, every, tmp_path).run_all(list(every), at_once=2) == []
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c"]
    real_model.report(c, Grid(c.directory, {**every, "not run": Job("", {})}, tmp_path))
    results = json.loads((c.directory / "results.json").read_text())
    assert set(results) == {"a", "b", "c"}
    assert results["b"]["x"] == {"score": 0.5}
    assert set(results["b"]) == {"x", "seconds", "peak_gb"}  # of the cost, not its flags
    assert results["b"]["seconds"] > 0
    assert 0.001 < results["b"]["peak_gb"] < 10
    (c.directory / "sft").mkdir()  # SFT writes no results.json
    (c.directory / "sft.cost.json").write_text("{}")
    (c.directory / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n')
    grid = Grid(c.directory, {**every, "sft": Job("run_sft.py", {})}, tmp_path)
    grid.run_all(["sft"])
    real_model.report(c, grid)
    results = json.loads((c.directory / "results.json").read_text())
    assert results["sft"]["last step"] == {"step": 2, "loss": 0.5}
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c"]
    assert set(results) == {"a", "b", "c", "sft"}
    pair = {"model": "x/ours", "against": "y/theirs", "win_rate": [0.6, 0.5, 0.7]}
    pair["win_rate_at_equal_length"] = [0.55, 0.5, 0.6]
    (c.directory / "a" / "results.json").write_text(json.dumps({"models": {}, "pairs": [pair]}))
    capsys.readouterr()
    real_model.report(c, grid)
    results = json.loads((c.directory / "results.json").read_text())
    assert results["a"]["ours against theirs"]["win_rate"] == [0.6, 0.5, 0.7]
    assert "ours against" in capsys.readouterr().out
    best_of = {"models": {}, "pairs": [], "best_of": [{"n": 4, "kl": 0.6, "score": [1, 0, 2]}]}
    (c.directory / "a" / "results.json").write_text(json.dumps(best_of))
    real_model.report(c, grid)
    assert json.loads((c.directory / "results.json").read_text())["a"]["best of 4"]["score"] == [
        1,
        0,
        2,
    ]


def test_where_a_run_fails_the_others_go_on(tmp_path, monkeypatch, capsys):
    code = {"a": "1 / 0", "b": "1", "c": "1", "d": "1"}
    monkeypatch.setattr(Grid, "command", lambda grid, name: [sys.executable, "-c", code[name]])
    every = {
        "a": Job("", {}),
        "b": Job("", {}, needs=("a",)),
        "c": Job("", {}),
        "d": Job("", {}, needs=("c",)),
    }
    assert Grid(tmp_path, every, tmp_path).run_all(list(every), at_once=2) == ["a", "b"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_sigterm_stops_the_runs(tmp_path):
    """They save before they end, and nothing after them begins."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    pathlib.Path('saved').write_text('1')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').write_text('1')\n"
        "time.sleep(60)\n"
    )
    grid = (
        "import pathlib, signal, sys\n"
        "from instructjax.evaluation.grid import Grid, Job\n"
        f"Grid.command = lambda grid, name: [sys.executable, '-c', {child!r}]\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "jobs = {'a': Job('', {}), 'b': Job('', {})}\n"
        "Grid(pathlib.Path(), jobs, pathlib.Path()).run_all(['a', 'b'])\n"
    )
    command = [sys.executable, "-c", grid]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "a was stopped, and has saved\n"
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "b.log").exists()
    assert not (tmp_path / "a.cost.json").exists()
    assert json.loads((tmp_path / "a.spent.json").read_text())["seconds"] > 0


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*DATA/oasst_100_trees/en_100_tree"):
        real_model.main(config(tmp_path, runs=("oasst-rm",)))


def test_halves_and_pairs_by_hand(tmp_path):
    def message(role, text, rank=None, replies=()):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    second = message("prompter", "And why?", 0, [message("assistant", "So.", 0)])
    replies = [
        message("assistant", "no", 2),
        message("assistant", "yes", 0, [second]),
        message("assistant", "?", None),
        message("assistant", "hm", 1),
    ]
    trees = [{"prompt": message("prompter", f"Is it {i}?", None, replies)} for i in range(3)]
    c = Config(model="MODEL", data=tmp_path, out=tmp_path / "out")
    (tmp_path / "oasst_100_trees").mkdir()
    with gzip.open(tmp_path / "oasst_100_trees" / "en_100_tree.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(tree) + "\n" for tree in trees)
    real_model.write_halves(c)

    def read(name):
        lines = (c.directory / "data" / name).read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert read("oasst-a.jsonl") == [trees[0], trees[2]]
    assert read("oasst-b.jsonl") == [trees[1]]
    assert read("oasst-a-pairs.jsonl") == [
        {
            "prompt": [{"role": "user", "content": f"Is it {i}?"}],
            "chosen": "yes",
            "rejected": "no",
        }
        for i in (0, 2)  # the second question has one ranked reply alone
    ]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (" It is red.", 1.0),
        ("Is it? It is! Yes.", 0.0),
        ("It is version 1.5 of it.", 1.0),
        ("It is", -1.0),
        ("", -1.0),
        ("One. Two. Thr", -1.0),
        ("a. " * 9, -1.0),
    ],
)
def test_one_sentence(response, score):
    assert real_model.one_sentence([""], [response], [None]) == [score]


def test_overlap_by_hand(tmp_path):
    assert real_model.f1("The cat sat", "the cat SAT.", 1) == 1
    assert real_model.f1("a b c", "b c d e", 1) == pytest.approx(2 * 2 / 7)
    assert real_model.f1("a b c", "b c d e", 2) == pytest.approx(2 * 1 / 5)
    assert real_model.f1("", "a", 1) == 0
    c = Config(model="MODEL", data=tmp_path, out=tmp_path)
    (tmp_path / "e2e_nlg").mkdir()
    with gzip.open(tmp_path / "e2e_nlg" / "devset.csv.gz", "wt") as file:
        file.write('mr,ref\n"n[A], b[C]",a b c\n"n[A], b[C]",x y\nn[B],z\n')
    (tmp_path / "run").mkdir()
    sample = {"prompt": "<user>\nn[A], b[C]\n<bot>\n", "SFT": "a b d", "PPO": "x y"}
    (tmp_path / "run" / "samples_after.jsonl").write_text(json.dumps(sample) + "\n")
    shares = real_model.overlaps(c, "run")
    assert shares == {"SFT": pytest.approx((2 / 3, 1 / 2)), "PPO": pytest.approx((1, 1))}
