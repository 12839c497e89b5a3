"""A run's files are cut back and continued to the byte; trackers; the progress line; curves."""

import errno
import functools
import io
import json
import re
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

from instructjax.evaluation.figures import lines_svg, plot_curves, smoothed
from instructjax.run import Run, RunConfig
from instructjax.run import run as run_module
from instructjax.run.log import Log
from instructjax.run.metrics import MetricsWriter, ProgressLine, to_numbers


def write_steps(directory, first, last, resume_step):
    writer = MetricsWriter(directory, resume_step)
    for step in range(first, last + 1):
        writer.write(step, {"loss": 1 / step, "note/count": step})
        for number in range(2):
            writer.sample(step, {"prompt": "naïve\n", "number": number})
    writer.close()


def contents(directory):
    return [(directory / f"{name}.jsonl").read_bytes() for name in ("metrics", "samples")]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"step": 8', b'{"step": 8, "loss": 1}'])
def test_resumed_files_are_those_of_one_run(tmp_path, torn):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    write_steps(whole, 1, 9, None)
    write_steps(killed, 1, 7, None)
    for name in ("metrics", "samples"):
        with (killed / f"{name}.jsonl").open("ab") as file:
            file.write(torn)
    write_steps(killed, 8, 8, 7)
    write_steps(killed, 6, 9, 5)
    assert contents(killed) == contents(whole)


def test_lines_are_in_the_file_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, {"loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    writer.close()


def test_start_empties_and_step_0_is_kept(tmp_path):
    write_steps(tmp_path, 1, 3, None)
    write_steps(tmp_path, 1, 1, None)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0, "note/count": 1}\n'
    writer = MetricsWriter(tmp_path, None)
    writer.write(0, {"loss": 4.0})
    writer.write(1, {"loss": 3.0})
    writer.close()
    MetricsWriter(tmp_path, 0).close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": 4.0}


def test_foreign_line_is_an_error_not_a_cut(tmp_path):
    write_steps(tmp_path, 1, 3, None)
    before = contents(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(before[0].replace(b'{"step": 2', b'{"stop": 2'))
    with pytest.raises(ValueError, match=f"{file}:2: not a JSON object with a step"):
        MetricsWriter(tmp_path, 3)
    assert len(file.read_bytes()) == len(before[0])


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_float_keeps_every_bit(value):
    numbers = to_numbers({"x": jnp.float32(value), "y": float(value)})
    again = json.loads(json.dumps(numbers))
    subnormal = 0 < abs(value) < np.finfo(np.float32).tiny  # devices flush these to 0
    assert subnormal or np.float32(again["x"]) == np.float32(value)
    assert again["y"] == value


def test_numbers_of_devices():
    got = to_numbers({"a": jnp.int32(3), "b": jnp.bfloat16(0.5), "c": 2, "d": np.float64(0.1)})
    assert got == {"a": 3, "b": 0.5, "c": 2, "d": 0.1}
    assert [type(value) for value in got.values()] == [int, float, int, float]
    with pytest.raises(ValueError, match=r"metric x has shape \(2,\)"):
        to_numbers({"x": jnp.zeros(2)})


def test_nan_in_a_sample_names_the_file(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    with pytest.raises(ValueError, match=r"samples.jsonl: step 4: "):
        writer.sample(4, {"score": float("nan")})
    writer.close()
    assert contents(tmp_path) == [b"", b""]


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricsWriter(tmp_path, None, tensorboard=True)
    writer.write(3, {"loss": 0.5, "rm/accuracy": 0.75})
    writer.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events, at = file.read_bytes(), [], 0
    while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        events.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(3, "loss", 0.5), (3, "rm/accuracy", 0.75)]


def test_wandb_run_is_continued(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        define_metric=lambda *args, **kwargs: None,
        log=lambda row: calls.append(row),
        finish=lambda: calls.append("finish"),
    )

    def init(**kwargs):
        calls.append((kwargs["project"], kwargs["id"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resume_step in (None, 2, None):
        writer = MetricsWriter(tmp_path, resume_step, wandb="rlhf")
        writer.write(3, {"loss": 0.5})
        writer.close()
    ids = [call[1] for call in calls[::3]]
    assert ids[0] == ids[1] != ids[2]
    assert calls[:3] == [("rlhf", ids[0]), {"step": 3, "loss": 0.5}, "finish"]


@pytest.mark.parametrize(
    ("module", "extra", "options"),
    [("tensorboardX", "tensorboard", {"tensorboard": True}), ("wandb", "wandb", {"wandb": "x"})],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, extra, options):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"--{extra} needs: pip install 'instructjax\[{extra}\]'"):
        MetricsWriter(tmp_path, None, **options)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write_steps(tmp_path, 1, 3, None)
    assert not list(tmp_path.iterdir())


def progress_line(terminal, **options) -> tuple[ProgressLine, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, force_interactive=terminal)
    return ProgressLine(console, "sft", **options), text


def progress(terminal, every=0.0):
    line, text = progress_line(terminal, every=every)
    line.begin(10, 20)
    for step, seconds in ((11, 60.0), (12, 2.0), (13, 2.0)):
        speed = {"time/step": seconds, "throughput/tokens_per_second": 1000 / seconds}
        line.update(step, {"loss": 1.5, **speed})
    line.stop()
    return text.getvalue()


def test_progress_says_loss_speed_and_time_left():
    lines = progress(terminal=False).splitlines()
    assert len(lines) == 3
    # The median of the three steps is 2 s, and seven steps are left.
    assert lines[2] == "sft  step 13/20  loss 1.5000  500 tokens/s  0:00:14 left"
    assert len(progress(terminal=False, every=100.0).splitlines()) == 1
    assert "loss 1.5000  500 tokens/s  0:00:14 left" in progress(terminal=True)


def test_a_long_phase_is_one_plain_line():
    line, text = progress_line(terminal=False, patience=0.1)
    for _ in range(2):
        with line.phase("scoring"):
            time.sleep(0.3)
        with line.phase("waiting"):
            pass
    with line.phase("evaluating"), line.phase("sampling"):
        time.sleep(0.3)
    phase = line.phase("exporting")
    phase.__enter__()
    line.stop()
    time.sleep(0.3)
    printed = text.getvalue().splitlines()
    assert printed[0] == "sft  scoring ..."
    assert sorted(printed[1:]) == ["sft  evaluating ...", "sft  sampling ..."]


def test_a_long_phase_is_shown_below_the_bar_while_it_lasts():
    line, text = progress_line(terminal=True, patience=0.3)
    line.begin(0, 20)
    line.update(1, {"loss": 1.5})
    with line.phase("waiting"):
        pass
    with line.phase("evaluating"):
        time.sleep(1.7)
        with line.phase("sampling"):
            time.sleep(0.8)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    line.stop()
    assert "waiting" not in shown
    assert re.search(r"1/20 loss 1.5000\s+. evaluating  0:00:01", shown)
    assert shown.index("evaluating") < shown.index("sampling")
    assert "sampling" not in text.getvalue()[len(text.getvalue()) - 30 :]


@pytest.mark.parametrize("start", [0, 5])
def test_the_first_step_has_no_throughput_and_phases_are_timed(tmp_path, start):
    """It compiles, after a resume too. Each step has the seconds of its own phases."""
    with Run(RunConfig(out=tmp_path, model=""), "toy") as run:
        for step in run.steps(start, start + 3):
            with run.phase("sampling", "rollout"):
                time.sleep(0.1 if step == start + 2 else 0)
            run.log(step, {"loss": 1.0}, tokens=10)
            if step == start + 2:
                with run.phase("evaluating", "evaluation"):
                    time.sleep(0.2)
                run.log(step, {"validation/loss": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["throughput/tokens_per_second" in row for row in rows] == [False, True, True]
    assert ["time/evaluation" in row for row in rows] == [False, True, False]
    assert [row["time/rollout"] >= 0.1 for row in rows] == [False, True, False]
    assert rows[1]["time/evaluation"] >= 0.2
    assert all(row["time/step"] >= row["time/rollout"] for row in rows)


def test_a_run_says_what_it_does_outside_of_its_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "ProgressLine", functools.partial(ProgressLine, patience=0.2))
    with Run(RunConfig(out=tmp_path, model=""), "toy") as run:
        time.sleep(0.4)
        for step in run.steps(0, 3):
            time.sleep(0.4)
            run.log(step, {"loss": 1.0}, tokens=10)
            assert bool(run._line._phases) == (step == 1)  # metrics are read one step late
        time.sleep(0.4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith("...")]
    phases = ["loading models and data", "compiling and running the first step"]
    assert said == [f"toy  {phase} ..." for phase in (*phases, "exporting and evaluating")]


def test_curves_are_drawn(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    for step in range(1, 301):
        more = {"validation/loss": 2 - step / 300} if step % 50 == 0 else {}
        writer.write(step, {"loss": 3 - step / 150, **more})
    writer.close()
    panels = {"loss": ["loss", "validation/loss"], "accuracy": ["rm/accuracy"]}
    plot_curves(tmp_path, panels, tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")[..., :3]
    left, right = np.split(picture, 2, axis=1)
    blue, orange = to_rgb("C0"), to_rgb("C1")  # of matplotlib's cycle
    for colour in (blue, orange):
        assert (np.abs(left - colour).max(-1) < 0.02).sum() > 50
    assert (np.abs(right - blue).max(-1) < 0.02).sum() == 0  # "not logged"


def test_small_numbers_leave_room_for_the_label():
    svg = lines_svg("learning rate", {"x": np.array([[0, 0], [9, 3e-4]])}, "step", "learning rate")
    ticks = re.findall(r">([\d.]+)</text>", svg)
    assert "3.0" in ticks
    assert max(map(len, ticks)) <= 4


def test_a_running_mean_by_hand():
    few = np.array([[1, 5.0], [4, 7.0]])
    np.testing.assert_array_equal(smoothed(few), few)
    assert len(smoothed(np.zeros((0, 2)))) == 0
    many = np.stack([10 * np.arange(150), np.arange(150) ** 2], axis=1)
    mean = smoothed(many)  # over three points, at the last of them
    assert mean.shape == (148, 2)
    assert mean[0].tolist() == [20, pytest.approx((0 + 1 + 4) / 3)]
    assert mean[-1].tolist() == [1490, pytest.approx((147**2 + 148**2 + 149**2) / 3)]


def test_a_full_disk_is_named_with_the_log(tmp_path, monkeypatch):
    log = Log(tmp_path / "metrics.jsonl", None)

    def flush():
        raise OSError(errno.ENOSPC, "No space left on device")

    full = SimpleNamespace(name=log._file.name, write=lambda text: None, flush=flush)
    log.close()
    monkeypatch.setattr(log, "_file", full)
    with pytest.raises(OSError, match=f"^{tmp_path}/metrics.jsonl: No space left on device$"):
        log.append({"step": 1})
