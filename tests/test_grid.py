"""Grids of runs: flags that changed, runs that wait, and flags as text."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from instructjax.data import DataConfig
from instructjax.evaluation import grid, paper
from instructjax.evaluation.grid import Grid, GridConfig, Job, NothingToDoError, NotReadyError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A run is an empty program."""
    monkeypatch.setattr(Grid, "command", lambda *_: [sys.executable, "-c", "pass"])


def runs_in(out: Path, **flags) -> Grid:
    return Grid(
        out, {"a": Job("x.py", {"data": f"jsonl:{out}/f", **flags}, positional=("p",))}, out
    )


def test_a_finished_run_with_other_flags_is_refused(tmp_path):
    runs = runs_in(tmp_path, steps=3, models=("m", "n"))
    assert runs.run_all(["a"]) == []
    runs.check([])
    cost = tmp_path / "a.cost.json"
    moved = tmp_path / "moved"  # with the same files elsewhere
    moved.mkdir()
    (moved / "a.cost.json").write_text(cost.read_text())
    runs_in(moved, steps=3, models=["m", "n"]).check([])
    for flags, said in (
        ({"steps": 4, "models": ("m", "n")}, "a was made with --steps 3, and not with --steps 4"),
        ({"steps": 3}, "a was made with --models m n, and not with no --models"),
        ({"steps": 3, "models": ("m", "n"), "seed": 1}, "with no --seed, and not with --seed 1"),
    ):
        with pytest.raises(ValueError, match=said):
            runs_in(tmp_path, **flags).check(["a"])
    # Results that another grid has left in the same folder are compared too.
    new = tmp_path / "new"
    elsewhere = Grid(new, runs_in(new, steps=4).jobs, new, results=tmp_path)
    with pytest.raises(ValueError, match=rf"^{cost}: a was made with --steps 3"):
        elsewhere.check([])
    cost.write_text('{"seconds": 1}')  # of an earlier version
    elsewhere.check([])
    runs_in(tmp_path, steps=4).check([])
    with pytest.raises(ValueError, match="--runs b: not one of a"):
        runs.check(["b"])


def test_kept_results_name_no_path_of_this_machine(tmp_path):
    def grid_of(place: str, folder: str) -> Grid:
        jobs = {"a": Job("x.py", {"data": f"jsonl:{place}/f", "model": f"{place}/m", "size": "m"})}
        out, results = tmp_path / folder, tmp_path / "results"
        return Grid(out, jobs, tmp_path, results, {place: "DATA", f"{place}/m": "MODEL", "m": "M"})

    first = grid_of("/mnt/é", "one")
    out = first.out
    (out / "a").mkdir(parents=True)
    said = {
        f"{out}/a": [0.10, "/mnt/é/f,/mnt/é/m"],
        "m": "a m, /mnt/é2 /mnt/é.y /y/mnt/é or /mnt/é.",
    }
    said |= {"command": f"f --data=jsonl:/mnt/é/*.gz --out '{out}' ü"}
    (out / "a" / "config.json").write_text(
        json.dumps(said, ensure_ascii=False).replace("0.1", "0.10")
    )
    (out / "a" / "results.json").write_text(r'{"no": "/mnt/\u00e9/f", "x": 1e5}')
    assert first.make(["a"]) == []
    kept = tmp_path / "results"
    written = (kept / "a" / "config.json").read_text()
    assert json.loads(written) == {
        "OUT/a": [0.1, "DATA/f,MODEL"],
        "m": "a m, /mnt/é2 /mnt/é.y /y/mnt/é or DATA.",
        "command": "f --data=jsonl:DATA/*.gz --out 'OUT' ü",
    }
    assert "[0.10, " in written  # all else is as it was
    assert (kept / "a" / "results.json").read_text() == '{"no": "DATA/f", "x": 1e5}'
    flags = json.loads((kept / "a.cost.json").read_text())["flags"]
    assert flags == {"": [], "data": ["jsonl:DATA/f"], "model": ["MODEL"], "size": ["M"]}
    grid_of("/home/y", "two").check([])  # another machine's data


def test_flags_of_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"data": "DATA", "data/m": "MODEL"}
    flags = {
        "data": "jsonl:data/f",
        "x": "jsonl:runs/a/f",
        "y": ("runs/ab", "data/m/n"),
        "z": "data",
    }
    for out in (Path("runs/a"), tmp_path / "a"):
        flags |= {"x": f"jsonl:{out}/f", "data.columns": "prompt=data"}
        out.mkdir(parents=True)
        assert Grid(out, {"a": Job("x.py", flags)}, tmp_path, None, names).run_all(["a"]) == []
        assert json.loads((out / "a.cost.json").read_text())["flags"] == {
            **{"": [], "data": ["jsonl:DATA/f"], "x": ["jsonl:OUT/f"]},
            **{"y": ["runs/ab", "MODEL/n"], "z": ["DATA"], "data.columns": ["prompt=data"]},
        }


def test_relative_folders_in_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"data": "DATA"}
    flags = {
        "data": "jsonl:runs/a/x,runs/a/y,data/z,runs/ab/w,runs/a",
        "mix": "0.5*runs/a/x,2*data/z",
        "data.columns": "prompt=data,data=b",
        "inner": "jsonl:more/runs/a/x,more/data/z",
    }
    out = Path("runs/a")
    out.mkdir(parents=True)
    runs = Grid(out, {"a": Job("x.py", flags)}, tmp_path, None, names)
    assert runs.run_all(["a"]) == []
    cost = out / "a.cost.json"
    recorded = json.loads(cost.read_text())["flags"]
    assert recorded == {
        **{"": [], "data": ["jsonl:OUT/x,OUT/y,DATA/z,runs/ab/w,OUT"]},
        **{"mix": ["0.5*OUT/x,2*DATA/z"], "data.columns": ["prompt=data,data=b"]},
        "inner": ["jsonl:more/runs/a/x,more/data/z"],
    }


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    out: Path | None = None


def test_a_run_that_waits_stops_no_other(tmp_path, capsys):
    """What can be made is made, the page is written, and the exit code says that it can go on."""

    def wait():
        raise NotReadyError("label this first")

    def fail():
        raise ValueError("too few pairs")

    jobs = {
        "a": Job("", {}, prepare=wait),
        "b": Job("", {}, needs=("a",)),
        "c": Job("", {}, prepare=fail),
        "d": Job("", {}),
    }
    runs = Grid(tmp_path, jobs, tmp_path)
    with pytest.raises(SystemExit, match="not finished: a, b, c; the same command goes on"):
        paper.make_page(Config(out=tmp_path), runs, "T", "", list)
    printed = capsys.readouterr()
    assert "label this first\n" in printed.err
    assert "c failed: too few pairs\n" in printed.err
    assert "report.html" in printed.out
    assert [name for name in jobs if runs.has_finished(name)] == ["d"]
    del jobs["c"]  # now none fails
    with pytest.raises(SystemExit) as end:
        paper.make_page(Config(out=tmp_path), runs, "T", "", list)
    assert end.value.code == 75
    assert capsys.readouterr().err == "label this first\n"


def test_a_run_without_work_is_left_out(tmp_path, capsys):
    def nothing():
        raise NothingToDoError("no attack is left")

    jobs = {"a": Job("", {"x": 1}, prepare=nothing), "b": Job("", {}, needs=("a",))}
    assert Grid(tmp_path, jobs, tmp_path).run_all(["a", "b"]) == []
    assert "a is left out: no attack is left\n" in capsys.readouterr().out
    assert not (tmp_path / "a.log").exists()
    assert json.loads((tmp_path / "a.cost.json").read_text()) == {
        **{"seconds": 0.0, "peak_gb": 0.0},
        "flags": {"": [], "x": ["1"]},
    }
    assert (tmp_path / "b.cost.json").exists()


def test_a_digest_tells_settings_apart():
    first = grid.digest({"a": 1, "b": Path("x")}, ["c"])
    assert first == "a4821e93"  # in every process: it names files that a later start looks for
    assert first not in (grid.digest({"a": 2, "b": Path("x")}, ["c"]), grid.digest({"a": 1}, "c"))


def test_flags_as_text():
    parsed = grid.parse_flags("--ppo.beta 0.1 --mesh=data=2 --models a 'b c' --resume --eval-x a-b")
    assert parsed == {
        "ppo.beta": ["0.1"],
        "mesh": ["data=2"],
        "models": ["a", "b c"],
        "resume": [],
        "eval_x": ["a-b"],
    }
    assert grid.parse_flags("--a-b 1 --c 2 --a_b 3 4") == {"c": ["2"], "a_b": ["3", "4"]}
    config = DataConfig("jsonl:x", max_prompt=3)
    assert grid.flags_of(config, "data") == {"data": "jsonl:x", "data.max_prompt": 3}
    assert grid.flags_of(DataConfig(), "data") == {}
    assert json.dumps(parsed)
