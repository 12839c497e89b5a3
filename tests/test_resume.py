"""A resumed run goes on from the right checkpoint, and loses no line of its logs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from test_run import Toy, fit, lines_of, run_main

from instructjax.run import FAILED, FINISHED, Run
from instructjax.run.checkpoint import Checkpoints

ONE = {"steps": 12, "save_every": 4, "keep_last": 9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 12 steps with checkpoints 4, 8 and 12 in `ckpt`, beside its --out `run`."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(Toy(out=Path("run"), checkpoints="ckpt", **ONE))
    return folder


@pytest.fixture
def copy(finished, tmp_path, monkeypatch) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "run" / "checkpoint.json"
    record.write_text(record.read_text().replace(str(finished), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(**changes) -> Toy:
    return Toy(**{"out": Path("run"), "checkpoints": "ckpt", "resume": True, **ONE, **changes})


def logs(folder: Path) -> list[bytes]:
    return [(folder / "run" / f"{name}.jsonl").read_bytes() for name in ("metrics", "samples")]


def damage(step_directory: Path) -> None:
    """Flips a bit of the largest file."""
    file = max(step_directory.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_knows_where_its_checkpoints_are(copy, capsys):
    assert run_main(resumed(checkpoints=None, steps=13)) == FINISHED
    assert "run: resumed after step 12" in capsys.readouterr().out
    assert sorted(path.name for path in (copy / "ckpt").glob("[!.]*")) == ["12", "13", "4", "8"]
    assert not (copy / "run" / "checkpoints").exists()


def test_a_mistyped_directory_cuts_nothing(copy, capsys):
    before = logs(copy)
    assert run_main(resumed(checkpoints="cpkt")) == FAILED
    error = capsys.readouterr().err
    assert f"has saved step 12 in {copy}/ckpt" in error
    assert f"the checkpoints in {copy}/cpkt are: none. Give the right --checkpoints" in error
    assert logs(copy) == before
    # The directory may have moved.
    (copy / "ckpt").rename(copy / "moved")
    assert run_main(resumed(checkpoints="moved", steps=13)) == FINISHED


def test_a_vanished_checkpoint_is_an_error_until_one_goes_back(copy, capsys):
    before = logs(copy)
    shutil.rmtree(copy / "ckpt" / "12")
    assert run_main(resumed()) == FAILED
    assert "are: 4, 8. Give the right --checkpoints, go back" in capsys.readouterr().err
    assert run_main(resumed(resume_step=5)) == FAILED
    assert "--resume_step 5: not among the checkpoints in" in capsys.readouterr().err
    assert logs(copy) == before

    # With --resume too, as a script that starts a run again gives it.
    assert run_main(resumed(resume_step=4, steps=9)) == FINISHED
    out = capsys.readouterr().out
    assert "ckpt/set_aside/8: step 8 is later than --resume_step" in out
    assert "run: resumed after step 4" in out
    assert lines_of(copy / "run" / "metrics.cut.jsonl")[0]["step"] == 5
    kept = (copy / "run" / "metrics.jsonl").read_bytes()
    assert lines_of(copy / "run" / "metrics.jsonl")[-1]["step"] == 9
    assert run_main(resumed(resume_step=4, steps=10)) == FINISHED
    assert "run: resumed after step 9" in capsys.readouterr().out
    assert (copy / "run" / "metrics.jsonl").read_bytes().startswith(kept)
    # Without --resume it goes back again, and so it does after a start without --resume_step.
    assert run_main(resumed(resume_step=4, steps=5, resume=False)) == FINISHED
    assert "run: resumed after step 4" in capsys.readouterr().out
    assert run_main(resumed(steps=6)) == FINISHED
    capsys.readouterr()
    said = {7: "run: resumed after step 4", 8: "--resume_step 4: an earlier start went back"}
    for steps, text in said.items():
        assert run_main(resumed(resume_step=4, steps=steps)) == FINISHED
        assert text in capsys.readouterr().out


def test_a_damaged_checkpoint_is_not_gone_back_to(copy, capsys):
    """Nothing is moved, so that another one can be chosen."""
    damage(copy / "ckpt" / "8")
    assert run_main(resumed(resume_step=8)) == FAILED
    error = capsys.readouterr().err
    assert f"--resume_step 8: {copy}/ckpt/8 is damaged (state/ocdbt.process_0/d/" in error
    assert error.endswith("the checkpoints are: 4, 8, 12\n")
    assert not (copy / "ckpt" / "set_aside").exists()


@pytest.mark.parametrize(("step", "reached"), [(None, 8), (4, 4)])
def test_a_kill_after_checkpoints_are_moved_does_not_stop_the_next_start(
    copy, monkeypatch, step, reached
):
    """What was moved, because it is damaged or because the run goes back, has not vanished."""

    class Killed(BaseException):
        pass

    def move(self, step):
        set_aside(self, step)
        raise Killed

    set_aside = Checkpoints.set_aside
    if step is None:
        damage(copy / "ckpt" / "12")
    else:
        shutil.rmtree(copy / "ckpt" / "12")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "set_aside", move)
        with pytest.raises(Killed):
            fit(resumed(resume_step=step))
    assert json.loads((copy / "run" / "checkpoint.json").read_text())["step"] == reached
    assert run_main(resumed()) == FINISHED


def test_fewer_steps_than_are_made_is_an_error(copy, capsys):
    before = (copy / "run" / "config.json").read_bytes()
    assert run_main(resumed(steps=8)) == FAILED
    assert "error: run: 12 steps are made, and 8 are asked for: give" in capsys.readouterr().err
    assert (copy / "run" / "config.json").read_bytes() == before


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(copy, capsys):
    before = lines_of(copy / "run" / "metrics.jsonl")
    damage(copy / "ckpt" / "12")
    damage(copy / "ckpt" / "8")
    assert run_main(resumed()) == FINISHED
    out = capsys.readouterr().out
    for step in (8, 12):
        assert f"{copy}/ckpt/{step} is damaged (state/ocdbt.process_0/d/" in out
        assert f"moved to {copy}/ckpt/set_aside/{step}" in out
    assert "going on from step 4: 8 steps are made again" in out
    assert [x["step"] for x in lines_of(copy / "run" / "metrics.cut.jsonl")] == list(range(5, 13))
    timeless = [
        [{k: v for k, v in row.items() if "/" not in k} for row in rows]
        for rows in (before, lines_of(copy / "run" / "metrics.jsonl"))
    ]
    assert timeless[0] == timeless[1]


def test_a_run_killed_after_a_fallback_goes_on(copy, capsys):
    """The checkpoint that was damaged is no longer the one that the run must find."""
    damage(copy / "ckpt" / "12")
    assert run_main(resumed(nan_at=10)) == FAILED
    assert "going on from step 8" in capsys.readouterr().out
    assert run_main(resumed()) == FINISHED
    assert "run: resumed after step 8" in capsys.readouterr().out


def test_no_whole_checkpoint_is_an_error(copy, capsys):
    before = logs(copy)
    for step in (4, 8, 12):
        damage(copy / "ckpt" / str(step))
    for message in ("ckpt: no checkpoint is whole; they are in set_aside", "are: none. Give"):
        assert run_main(resumed()) == FAILED
        assert message in capsys.readouterr().err
    assert logs(copy) == before


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (None, "metrics.jsonl: 12 of 12 lines are missing, of steps 1 to 12"),
        ([], "metrics.jsonl: 12 of 12 lines are missing, of steps 1 to 12"),
        ([0, 1, 6, 11], "metrics.jsonl: 8 of 12 lines are missing, of steps 3 to 6, 8 to 11"),
    ],
)
def test_missing_lines_are_named(copy, capsys, left, message):
    file = copy / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.unlink()
    if left is not None:
        file.write_text("".join(lines[index] for index in left))
    assert run_main(resumed(steps=13)) == FINISHED
    out = capsys.readouterr().out
    assert f"warning: run: {message}" in out
    assert "samples.jsonl" not in out
    assert run_main(resumed(steps=14)) == FINISHED  # said once: the next checkpoint knows
    assert "missing" not in capsys.readouterr().out


def test_a_changed_line_is_named(copy, capsys):
    file = copy / "run" / "metrics.jsonl"
    text = file.read_text()
    at = text.index('"loss": ') + 8 + 4
    file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    assert run_main(resumed(steps=13)) == FINISHED
    says = "warning: run: metrics.jsonl: the lines up to step 12 are not those that were written"
    assert says in capsys.readouterr().out


def test_damaged_records_are_named(copy, capsys):
    before = logs(copy)
    for name in ("config.json", "checkpoint.json"):
        file = copy / "run" / name
        content = file.read_text()
        for damaged in ("", "[]", content[:-9]):
            file.write_text(damaged)
            assert run_main(resumed()) == FAILED
            assert f"{Path('run') / name}: damaged" in capsys.readouterr().err
        file.write_text(content)
    assert logs(copy) == before


def test_a_start_that_fails_does_not_block_the_next(tmp_path, capsys):
    config = Toy(out=tmp_path / "run", steps=2)
    with pytest.raises(ZeroDivisionError), Run(config, stage="toy"):
        _ = 1 / 0  # as when a model does not load
    assert not (tmp_path / "run" / "config.json").exists()
    assert run_main(dataclasses.replace(config, batch_size=16)) == FINISHED


def test_two_runs_do_not_share_checkpoints(tmp_path, capsys):
    there = str(tmp_path / "there")
    with (
        Run(Toy(out=tmp_path / "a", checkpoints=there), stage="toy"),
        pytest.raises(OSError, match=f"--checkpoints {there}: another process is training there"),
    ):
        Run(Toy(out=tmp_path / "b", checkpoints=there), stage="toy").__enter__()
    assert json.loads((tmp_path / "a" / "checkpoint.json").read_text())["checkpoints"] == there
    # Nor where the first has not named the directory.
    fit(Toy(out=tmp_path / "c", steps=1))
    for out, where in (("a", there), ("c", str(tmp_path / "c" / "checkpoints"))):
        other = Toy(out=tmp_path / "b", checkpoints=where, resume=True)
        taken = pytest.raises(OSError, match=f"--checkpoints {where}: another process is training")
        with Run(Toy(out=tmp_path / out, resume=True), stage="toy"), taken:
            Run(other, stage="toy").__enter__()


def test_checkpoints_may_lie_in_the_run_directory_itself(tmp_path):
    config = Toy(out=tmp_path / "run", checkpoints=f"{tmp_path}/x/../run", steps=2)
    assert run_main(config) == FINISHED
    assert (tmp_path / "run" / "2").exists()
