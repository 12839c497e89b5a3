"""A killed and resumed run ends as one that never stopped. A run says why it stopped.

This file is also the program that the tests run, kill and resume: `python tests/test_run.py`.
"""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from instructjax import sharding, state, train
from instructjax.evaluation.figures import plot_curves
from instructjax.run import FAILED, FINISHED, RESUMABLE, Run, main
from instructjax.run.checkpoint import Checkpoints
from instructjax.run.flags import RunConfig, parse

WIDTH = 256  # large enough for a save to be still going on when the test kills the process


@dataclass(frozen=True, kw_only=True)
class Toy(RunConfig):
    """Noisy linear regression."""

    out: Path = Path("run")
    model: str = "linear"
    steps: int = 30
    save_every: int = 5
    batch_size: int = 8
    learning_rate: float = 1e-2
    nan_at: int = 0
    kill: str = ""
    """`step:N` or `save:N`: SIGKILL after step N, or as soon as its save has begun."""
    pause: float = 0.0


def batch_of(config: Toy, step: int):
    rng = np.random.default_rng([config.seed, step])
    x = rng.normal(size=(config.batch_size, WIDTH)).astype(np.float32)
    x[0, 0] = np.nan if step == config.nan_at else x[0, 0]
    return {"x_BD": x, "y_BD": x[:, ::-1].copy()}


def loss_fn(params, batch, key):
    x = batch["x_BD"] * jax.random.bernoulli(key, 0.9, batch["x_BD"].shape)
    error = jnp.square(x @ params["w"] - batch["y_BD"])
    return error.mean(), (jnp.float32(error.shape[0]), {"toy/worst": error.max()})


def fit(config: Toy) -> state.TrainState:
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh))
    with Run(config, stage="toy", best_metric="validation/loss") as run:
        w = np.random.default_rng(config.seed).normal(size=(WIDTH, WIDTH)).astype(np.float32)
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
        tx = train.adam(config.learning_rate)
        layout = state.shardings({"w": w}, tx)
        step_fn = train.make_train_step(loss_fn, tx, shardings=layout)
        fitted, start, meta = run.restore(state.create({"w": w}, tx))
        assert meta.get("batches", 0) == start == int(fitted.step)
        key = jax.random.key(config.seed)
        for step in run.steps(start, config.steps):
            batch = jax.device_put(batch_of(config, step), sharding.batched(mesh))
            fitted, metrics = step_fn(fitted, batch, jax.random.fold_in(key, step))
            run.log(step, metrics, tokens=config.batch_size)
            score = None
            if step % 5 == 0:
                score = float(jnp.abs(fitted.params["w"]).mean())
                run.log(step, {"validation/loss": score})
                run.metrics.sample(step, {"prompt": "naïve\n", "rank": step})
            if run.should_save(step):
                run.save(step, fitted, {"batches": step}, score)
            if config.kill in (f"step:{step}", f"save:{step}"):
                if config.kill.startswith("step"):
                    run.checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(config.pause)
        plot_curves(config.out, {"loss": ["loss"]}, config.out / "loss.png")
        run.finish({"loss": 0.25, "steps": step}, [config.out / "loss.png"], "python next.py")
        return fitted


def start_program(out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--out", str(out), *flags]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish_program(program: subprocess.Popen, code: int) -> str:
    stdout, stderr = program.communicate(timeout=60)
    assert program.returncode == code, stdout + stderr
    return stdout + stderr


def lines_of(file: Path) -> list[dict]:
    """The lines without times, which are all that may differ between runs."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines_of(a / name) == lines_of(b / name)
    assert np.array_equal(np.load(a / "final.npy"), np.load(b / "final.npy"))


def test_killed_and_resumed_is_the_run_itself(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = start_program(whole)
    output = finish_program(start_program(killed, "--kill", "step:8"), -signal.SIGKILL)
    assert [row["step"] for row in lines_of(killed / "metrics.jsonl")][-1] >= 7  # past the save
    output = finish_program(start_program(killed, "--resume", "--kill", "save:15"), -signal.SIGKILL)
    assert "resumed after step 5" in output
    assert "kill: 'step:8' -> 'save:15'" in output
    assert list(killed.glob("checkpoints/15.*tmp*"))
    assert not (killed / "checkpoints" / "15").exists()

    stopped = start_program(killed, "--resume", "--pause", "0.1", "--save_every", "100")
    deadline = time.monotonic() + 60
    while lines_of(killed / "metrics.jsonl")[-1]["step"] < 17:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    output = finish_program(stopped, RESUMABLE)
    assert "resumed after step 10" in output
    command = output.split("continue with\n  ")[1]
    assert command.startswith("python ")
    assert command.rstrip().endswith("--resume --pause 0.1 --save_every 100")
    assert not list(killed.glob("checkpoints/*tmp*"))
    step = max(int(p.name) for p in (killed / "checkpoints").glob("[!.]*"))
    assert f"stopped after step {step}" in output
    assert lines_of(killed / "metrics.jsonl")[-1]["step"] == step < 30

    output = finish_program(start_program(killed, "--resume"), FINISHED)
    assert f"resumed after step {step}" in output
    finish_program(program, FINISHED)
    assert_same_run(whole, killed)
    assert [row["step"] for row in lines_of(whole / "metrics.jsonl")] == list(range(1, 31))


def test_second_signal_ends_at_once(tmp_path):
    program = start_program(tmp_path / "run", "--pause", "30", "--save_every", "1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and lines_of(metrics)):  # step 1 is saved, the program sleeps
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert "second signal" in finish_program(program, 128 + signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_outside_the_loop_ends_the_run(tmp_path, capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end, Run(Toy(out=tmp_path), stage="toy"):  # noqa: PT012
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert end.value.code == RESUMABLE
    assert "stopped after step 0; continue with\n  python " in capsys.readouterr().out
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_after_a_loop_left_by_break_ends_the_run(tmp_path, capsys, number):
    """As after --ppo.max_kl, when the run goes on to export and to report."""
    with pytest.raises(SystemExit) as end, Run(Toy(out=tmp_path), stage="toy") as run:  # noqa: PT012
        for step, _ in zip(run.steps(0, 30), range(30), strict=False):
            run.log(step, {"loss": 0.5})
            if step == 3:
                break
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert end.value.code == RESUMABLE
    assert "stopping; a second signal stops at once" in capsys.readouterr().out


def test_a_loop_left_by_break_ends_its_trace(tmp_path):
    with Run(Toy(out=tmp_path, profile="2:20"), stage="toy") as run:
        for step in run.steps(0, 30):
            if step == 3:
                break
        assert list(tmp_path.glob("profile/**/*.xplane.pb"))


def run_main(config: Toy) -> int:
    with pytest.raises(SystemExit) as end:
        main(lambda: fit(config) and None)
    return end.value.code


def test_nan_stops_the_run(tmp_path, capsys):
    config = Toy(out=tmp_path, nan_at=12, steps=20)
    assert run_main(config) == FAILED
    error = capsys.readouterr().err
    assert error.startswith("error: step 12: ")
    assert "loss is nan" in error
    assert "optim/grad_norm is nan" in error
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '10'}" in error
    assert error.count("\n") == 1
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == list(range(1, 12))


def test_step_with_nan_is_not_saved(tmp_path, capsys):
    assert run_main(Toy(out=tmp_path, nan_at=10, steps=20)) == FAILED
    assert "error: step 10: " in capsys.readouterr().err
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() == 5


def test_another_mesh_goes_on_with_the_same_losses(tmp_path, capsys):
    want = fit(Toy(out=tmp_path / "a", mesh="data=2,fsdp=2,tensor=2", steps=10))
    fit(Toy(out=tmp_path / "b", mesh="data=2,fsdp=2,tensor=2", steps=5))
    got = fit(Toy(out=tmp_path / "b", mesh="fsdp=8", steps=10, resume=True))
    assert "mesh: 'data=2,fsdp=2,tensor=2' -> 'fsdp=8'" in capsys.readouterr().out
    assert got.params["w"].sharding.mesh.shape["fsdp"] == 8
    np.testing.assert_allclose(got.params["w"], want.params["w"], atol=1e-4)
    losses = [[row["loss"] for row in lines_of(tmp_path / x / "metrics.jsonl")] for x in "ab"]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_directory_of_another_run_is_refused(tmp_path, capsys):
    config = Toy(out=tmp_path, steps=5)
    fit(config)
    before = (tmp_path / "metrics.jsonl").read_bytes(), (tmp_path / "config.json").read_bytes()
    assert run_main(config) == FAILED
    assert "continue it with --resume, or give another" in capsys.readouterr().err
    for change in ({"seed": 1}, {"batch_size": 16}, {"model": "other"}):
        assert run_main(dataclasses.replace(config, resume=True, **change)) == FAILED
        (name,) = change
        assert f"{name}: {getattr(config, name)!r} -> " in capsys.readouterr().err
    with pytest.raises(ValueError, match="stage: 'toy' -> 'rm'"):
        Run(dataclasses.replace(config, resume=True), stage="rm").__enter__()
    assert before[0] == (tmp_path / "metrics.jsonl").read_bytes()
    assert before[1] == (tmp_path / "config.json").read_bytes()

    with Run(Toy(out=tmp_path, resume=True), stage="toy"), pytest.raises(OSError, match="another"):
        Run(Toy(out=tmp_path, resume=True), stage="toy").__enter__()


def test_checkpoints_may_lie_elsewhere(tmp_path, capsys, monkeypatch):
    """Another run directory may continue from them."""
    monkeypatch.chdir(tmp_path)
    fit(Toy(out=Path("a"), checkpoints="there", steps=5))
    assert not Path("a/checkpoints").exists()
    assert run_main(Toy(out=Path("b"), checkpoints="there", steps=8)) == FAILED
    error = "--checkpoints there holds a run: continue it with --resume, or give another --checkp"
    assert error in capsys.readouterr().err
    assert run_main(Toy(out=Path("b"), checkpoints="there", steps=8, resume=True)) == FINISHED
    assert "b: resumed after step 5" in capsys.readouterr().out
    assert [row["step"] for row in lines_of(Path("b/metrics.jsonl"))] == [6, 7, 8]
    assert run_main(Toy(out=Path("c"), checkpoints="there", nan_at=9, resume=True)) == FAILED
    assert f"last good checkpoint: {tmp_path}/there/8" in capsys.readouterr().err


def test_a_bucket_needs_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--checkpoints gs://b/x needs: .*instructjax\[gcs\]"):
        Toy(checkpoints="gs://b/x")


@pytest.mark.parametrize(("tracker", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_missing_tracker_is_said_before_anything_is_written(
    tmp_path, monkeypatch, tracker, value
):
    monkeypatch.setitem(sys.modules, "tensorboardX" if tracker == "tensorboard" else tracker, None)
    config = Toy(out=tmp_path / "run", **{tracker: value})
    with pytest.raises(ValueError, match=rf"--{tracker} needs: .*instructjax\[{tracker}\]"):
        Run(config, stage="toy").__enter__()
    assert not (tmp_path / "run").exists()


def test_allowed_changes_are_printed(tmp_path, capsys):
    fit(Toy(out=tmp_path, steps=3))
    changed = Toy(out=tmp_path, steps=8, resume=True, log_every=4, learning_rate=0.1)
    assert run_main(changed) == FINISHED
    out = capsys.readouterr().out
    assert "steps: 3 -> 8" in out
    assert "learning_rate: 0.01 -> 0.1" in out
    # Every fourth step, those with an evaluation, and the last.
    assert [row["step"] for row in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 8]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"]["steps"] == 8
    assert config["versions"]["jax"] == jax.__version__
    hardware = json.loads((tmp_path / "hardware.json").read_text())
    assert (hardware["kind"], hardware["devices"], hardware["hosts"]) == ("cpu", 8, 1)
    assert "arrays" in hardware["memory"]["counted"]


def test_resume_of_nothing_starts(tmp_path, capsys):
    fit(Toy(out=tmp_path / "new", steps=1, resume=True))
    assert "no checkpoint to resume" in capsys.readouterr().out


def test_unwritable_or_full_is_said_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert run_main(Toy(out=tmp_path / "file" / "run")) == FAILED
    assert f"error: --out {tmp_path / 'file' / 'run'} cannot be written" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")
    need = 4 * 3 * WIDTH * WIDTH * 4  # 2 last, best and the one being written; Adam has 3 copies
    for free, message in ((2**20, "the disk is full"), (need, "lower --keep_last")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(0, 0, free))
        monkeypatch.setattr("instructjax.run.process.MIN_FREE", 2**21)
        assert run_main(Toy(out=tmp_path / "run")) == FAILED
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not lines_of(
        tmp_path / "run" / "metrics.jsonl"
    )


def test_full_disk_at_a_save_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    save = Checkpoints.save

    def fill(self, step, *args):
        if step == 10:
            usage = namedtuple("usage", "total used free")
            monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", fill)
    assert run_main(Toy(out=tmp_path)) == FAILED
    error = capsys.readouterr().err
    assert "the checkpoint of step 10 could not be written, the last good one is 5" in error
    monkeypatch.undo()
    assert run_main(Toy(out=tmp_path, steps=12, resume=True)) == FINISHED
    assert "resumed after step 5" in capsys.readouterr().out


def test_finish_says_what_came_of_it(tmp_path, capsys):
    assert run_main(Toy(out=tmp_path, steps=2, profile="2:1")) == FINISHED
    out = capsys.readouterr().out
    assert "toy  step 2/2  loss " in out
    assert "tokens/s" in out
    assert f"wrote {tmp_path / 'loss.png'}\nnext: python next.py\n" in out
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bugs_keep_their_traceback(capsys, monkeypatch):
    def bug():
        raise TypeError("a bug")

    def bad_file():
        raise FileNotFoundError(2, "No such file or directory", "x.jsonl")

    with pytest.raises(TypeError):
        main(bug)
    with pytest.raises(SystemExit) as end:
        main(bad_file)
    assert end.value.code == FAILED
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: 'x.jsonl'\n"
    monkeypatch.setenv("INSTRUCTJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(bad_file)


def program(config: Toy) -> None:
    fitted = fit(config)
    np.save(config.out / "final.npy", fitted.params["w"])


if __name__ == "__main__":
    main(lambda: program(parse(Toy, {}, __doc__)))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_mapped_again():
    """Blocks that are freed and allocated again cause no page faults after keep_memory. A block
    above KEPT does, because it would leave a hole in the arena."""
    program = """
import ctypes, resource
from instructjax.run.process import KEPT, keep_memory

def faults(size, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * size for _ in range(count)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

anew = max(faults(2**26, 6) for _ in range(3))
keep_memory()
blocks = (2 * KEPT, 1), (2**26, 6)  # the large block first, while no free block could hold it
large, kept = (min(faults(*block) for _ in range(3)) for block in blocks)
print(anew, kept, large, ctypes.CDLL(None).mallopt(-3, KEPT))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    anew, kept, large, obeyed = map(int, done.stdout.split())
    if anew < 100:
        pytest.skip("with huge pages there is nothing to keep")
    assert kept < anew / 100
    assert large > anew / 4 or not obeyed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_script_has_one_arena(tmp_path):
    """Also on a new machine, where matplotlib has no cache of fonts. Later threads would share an
    arena that a thread took before keep_memory, and it is too small for a step's temporaries."""
    program = """
import ctypes, sys
import jax
import run_ppo
from instructjax.run.process import keep_memory

keep_memory()
jax.block_until_ready(jax.numpy.ones(8) + 1)
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""
    experiments = Path(__file__).resolve().parents[1] / "experiments"
    new = {"MPLCONFIGDIR": str(tmp_path / "mpl"), "PYTHONPATH": str(experiments)}
    file = tmp_path / "arenas.xml"
    subprocess.run([sys.executable, "-c", program, file], env=os.environ | new, check=True)
    assert file.read_text().count("<heap nr=") == 1


def test_free_memory_is_returned_once_a_minute(tmp_path, capsys, monkeypatch):
    """Each step takes 25 s, so that memory is returned after the third, sixth and ninth."""
    module, now, returned = sys.modules[Run.__module__], [0.0], []
    monkeypatch.setattr(
        module, "return_memory", lambda of_small: returned.append((now[0], of_small))
    )
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with Run(Toy(out=tmp_path), stage="toy") as run:
        for _ in run.steps(0, 10):
            now[0] += 25
    assert returned == [(75, True), (150, True), (225, True)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_process_returns_what_is_free():
    """Every second of 200 blocks of 1 MB is freed, so 100 MB lie free between the others. A block
    that a small process would keep is mapped anew."""
    program = """
import ctypes, resource
from instructjax.run import process

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

process.keep_memory()
blocks = [b"x" * 2**20 for _ in range(200)]
del blocks[::2]
before = resident()
process.return_memory()
small = before - resident()
process.return_memory(of_small=True)
asked = before - resident()
blocks = [b"x" * 2**20 for _ in range(200)]
del blocks[::2]
before = resident()
process.LARGE = 0
process.return_memory(of_small=True)
assert abs(before - resident()) < 10
process.return_memory()
large = before - resident()
process.keep_memory()
size = (process.KEPT + process.KEPT_IF_LARGE) // 2
kept = min(faults(size) for _ in range(3))
process.return_memory()
anew = min(faults(size) for _ in range(3))
obeyed = ctypes.CDLL(None).mallopt(process.MMAP_THRESHOLD, process.KEPT)
print(small, asked, large, kept, anew, obeyed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    small, asked, large, kept, anew, obeyed = map(float, done.stdout.split())
    assert abs(small) < 10
    assert asked > 80
    assert large > 80
    assert kept < 20
    assert anew > kept or not obeyed
