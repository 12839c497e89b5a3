"""A run keeps its checkpoints in a bucket, through outages and kills. The bucket is an emulator's.

What this can't show: how fast a real bucket is, who may write to it, and how its own faults look.
"""

import dataclasses
import signal
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_hosts import Pair
from test_run import Toy, finish_program, fit, lines_of, run_main, start_program

from instructjax.run import FAILED
from instructjax.run.checkpoint import Checkpoints

# They are not imported yet: gcsfs reads its environment when it is.
for package in ("gcsfs", "gcp_storage_emulator"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from cloud_storage import CloudStorage, Outage  # noqa: E402 (it imports the emulator)


@pytest.fixture(scope="module")
def cloud():
    with CloudStorage() as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environment.items():
            patch.setenv(name, value)
        yield cloud


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run that nothing disturbs, with checkpoints on the disk."""
    out = tmp_path_factory.mktemp("whole")
    np.save(out / "final.npy", fit(Toy(out=out, steps=15)).params["w"])
    return out


def assert_whole(whole: Path, out: Path, fitted) -> None:
    assert np.array_equal(np.load(whole / "final.npy"), fitted.params["w"])
    assert lines_of(whole / "metrics.jsonl") == lines_of(out / "metrics.jsonl")


def folders(cloud: CloudStorage, directory: str) -> set[str]:
    return {name.split("/")[0] for name in cloud.names(directory) if "/" in name}


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_goes_on_after_outages(cloud, whole, tmp_path, capsys, seconds):
    """One while a checkpoint is written, another while it is read."""
    where = f"runs/{seconds}"
    config = Toy(out=tmp_path, checkpoints=f"gs://bucket/{where}", steps=10, save_every=6)
    with cloud.faults(outage := Outage(seconds, "POST", f"{where}/6/state/")):
        fit(config)
    assert outage.refused > 0
    assert folders(cloud, where) == {"6", "10"}
    assert not (tmp_path / "checkpoints").exists()
    assert run_main(config) == FAILED
    error = f"--checkpoints gs://bucket/{where} holds a run: continue it with --resume"
    assert error in capsys.readouterr().err
    with cloud.faults(outage := Outage(seconds, "GET", f"{where}/10/state/d/")):
        resumed = fit(dataclasses.replace(config, steps=15, resume=True))
    assert outage.refused > 0
    assert "resumed after step 10" in capsys.readouterr().out
    assert_whole(whole, tmp_path, resumed)


def test_the_last_and_the_best_are_kept(cloud):
    """Nothing is left of the others."""
    checkpoints = Checkpoints("gs://bucket/best", 1, "loss")
    for step, score in enumerate((0.1, 0.7, 0.3), start=1):
        checkpoints.save(step, {"w": jnp.full(8, float(step))}, {"score": score})
    assert (checkpoints.best(), checkpoints.latest()) == (1, 3)
    assert folders(cloud, "best") == {"1", "3"}
    checkpoints.close()
    error = pytest.raises(OSError, match="--checkpoints gs://bucket/best can't be used, HttpError:")
    with cloud.faults(lambda method, name: 401 if name.endswith("/metrics") else None), error:
        Checkpoints("gs://bucket/best", 1, "loss")  # reads the scores
    again = Checkpoints("gs://bucket/best", 1, "loss")
    assert again.best() == 1
    unreadable = pytest.raises(OSError, match="--checkpoints gs://bucket/best can't be used, Http")
    with cloud.faults(lambda method, name: 401 if "/1/state/" in name else None):
        with unreadable:
            again.restore(1, {"w": jnp.zeros(8)})
        with unreadable:
            again.restore_params(1, {"w": jnp.zeros(8)})
    with pytest.raises(ValueError, match="gs://bucket/best/1 is not a checkpoint of this state"):
        again.restore(1, {"w": jnp.zeros(9)})
    assert np.all(again.restore(1, {"w": jnp.zeros(8)})[0]["w"] == 1)
    again.close()


def test_a_cut_connection_is_tried_again(cloud):
    saved, cut = {"w": jnp.arange(8.0)}, []

    def refuse(method: str, name: str) -> str | None:
        """Each upload of data, and each reading of data, the first time."""
        if "/state/d/" not in name or (method, name) in cut:
            return None
        cut.append((method, name))
        return "cut"

    checkpoints = Checkpoints("gs://bucket/runs/cut", 1)
    with cloud.faults(refuse):
        checkpoints.save(1, saved, {})
        restored, _ = checkpoints.restore(1, saved)
    assert {method for method, _ in cut} >= {"POST", "GET"}
    assert np.array_equal(restored["w"], saved["w"])
    checkpoints.close()


def test_killed_before_the_commit(cloud, tmp_path, capsys):
    """A checkpoint that lacks only its last object is not seen, and is removed."""
    flags = {"checkpoints": "gs://bucket/runs/killed", "save_every": 2, "steps": 6}

    def refuse(method: str, name: str) -> str | None:
        if (method, name) != ("POST", "runs/killed/4/commit_success.txt"):
            return None
        program.send_signal(signal.SIGKILL)
        return "cut"

    with cloud.faults(refuse):
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        program = start_program(tmp_path / "run", *words)
        finish_program(program, -signal.SIGKILL)
    written = set(cloud.names("runs/killed"))
    assert written >= {"2/commit_success.txt", "4/state/commit_success.txt", "4/state/_METADATA"}

    checkpoints = Checkpoints(flags["checkpoints"], 2)
    assert folders(cloud, "runs/killed") == {"2"}
    checkpoints.close()
    for name in written:  # as the killed process left it
        if name.startswith("4/"):
            epath.Path(f"gs://bucket/runs/killed/{name}").write_text("")
    fit(Toy(out=tmp_path / "run", **flags, resume=True))
    assert "resumed after step 2" in capsys.readouterr().out
    assert "6" in folders(cloud, "runs/killed")


def test_damage_is_set_aside_and_an_outage_is_no_damage(cloud):
    checkpoints = Checkpoints("gs://bucket/damaged", 2)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.arange(64.0)}, {})
    checkpoints.wait()
    names = cloud.names("damaged")
    data = next(name for name in names if name.startswith("2/state/ocdbt.process_0/d/"))
    error = pytest.raises(OSError, match="--checkpoints gs://bucket/damaged can't be used, OSError")
    with cloud.faults(lambda method, name: 403 if name.endswith(data) else None), error:
        checkpoints.latest_whole()
    assert checkpoints.latest_whole() == 2
    file = checkpoints.directory / data
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert checkpoints.latest_whole() == 1
    checkpoints.close()
    again = Checkpoints("gs://bucket/damaged", 2)
    assert again.latest_whole() == 1
    again.close()
    moved = [name.removeprefix("2/") for name in names if name.startswith("2/")]
    assert cloud.names("damaged/set_aside/2") == sorted(moved)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_kill_while_a_checkpoint_is_set_aside_loses_no_file(cloud, method):
    """It is whole in its old place or in the new one: --resume_step sets whole ones aside."""
    where = f"aside-{method}"
    checkpoints = Checkpoints(f"gs://bucket/{where}", 2)
    checkpoints.save(1, {"w": jnp.arange(64.0)}, {})
    checkpoints.wait()
    names, asked = sorted(cloud.names(f"{where}/1")), []

    def refuse(asked_method: str, name: str) -> int | None:
        asked.append(name) if asked_method == method else None
        return 401 if len(asked) > 3 else None

    with cloud.faults(refuse), pytest.raises(Exception, match="401"):
        checkpoints.set_aside(1)
    checkpoints.close()
    again = Checkpoints(f"gs://bucket/{where}", 2)
    assert again.steps() == ([1] if method == "POST" else [])
    assert sorted(cloud.names(f"{where}/1" if again.steps() else f"{where}/set_aside/1")) == names
    again.close()


def test_other_folders_in_the_bucket_stay(cloud):
    here = epath.Path("gs://bucket/others")
    names = ["notes.txt", "5.damaged/state/d", "other-run/7/state/d", "7x/commit_success.txt"]
    for name in [*names, "3/state/d"]:
        (here / name).write_text("")
    checkpoints = Checkpoints(here, 1)
    checkpoints.save(1, {"w": jnp.zeros(2)}, {})
    checkpoints.close()
    assert {name for name in cloud.names("others") if not name.startswith("1/")} >= set(names)
    assert "3" not in folders(cloud, "others")


def test_a_bucket_that_cannot_be_used_is_said_at_once(cloud, tmp_path, capsys):
    """A bucket that does not exist, an account that nobody knows, one that may only read."""

    def error_of(where: str) -> str:
        assert run_main(Toy(out=tmp_path / "run", checkpoints=where)) == FAILED
        error = capsys.readouterr().err
        assert error.startswith(f"error: --checkpoints {where} can't be used, ")
        assert error.count("\n") == 1
        assert not list(tmp_path.glob("run/metrics.jsonl"))
        return error

    assert "FileNotFoundError" in error_of("gs://missing/x")
    with cloud.faults(lambda method, name: 401):
        assert "HttpError: refused, 401" in error_of("gs://bucket/unknown")
    with cloud.faults(lambda method, name: 403 if method == "POST" else None):
        assert "OSError: Forbidden: " in error_of("gs://bucket/read-only")


def test_what_another_host_wrote_is_seen(cloud):
    """gcsfs would not look again."""
    import gcsfs

    checkpoints = Checkpoints("gs://bucket/seen", 1)
    note = checkpoints.directory / "note.txt"
    assert note not in list(checkpoints.directory.iterdir())
    gcsfs.GCSFileSystem(skip_instance_cache=True).pipe(str(note), b"from another host")
    assert not note.exists()
    checkpoints.wait()
    assert note in list(checkpoints.directory.iterdir())
    checkpoints.close()


# orbax's event loop ends at the failure, and gcsfs's retries have nobody left to tell.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_write_that_is_refused_leaves_the_last_checkpoint(cloud):
    """As when a permission or a quota ends in the middle of a run."""
    saved = {"w": jnp.arange(8.0)}
    checkpoints = Checkpoints("gs://bucket/refused", 1)
    checkpoints.save(5, saved, {})
    checkpoints.close()

    def refuse(method: str, name: str) -> int | None:
        return 403 if method == "POST" and name.startswith("refused/6/") else None

    for faults, good in (
        (refuse, "the last good one is 5"),
        (
            lambda method, name: None if "holder" in name else 401,
            "those before it cannot be listed",
        ),
    ):
        checkpoints = Checkpoints("gs://bucket/refused", 1)
        error = pytest.raises(OSError, match=f"gs://bucket/refused: .*could not be written, {good}")
        with cloud.faults(faults), error:
            checkpoints.save(6, saved, {})
            checkpoints.wait()  # either of the two notices the failure
    again = Checkpoints("gs://bucket/refused", 1)
    assert again.latest() == 5
    again.save(6, saved, {})
    assert again.latest() == 6
    again.close()


@pytest.mark.slow
def test_two_processes_share_a_bucket(cloud, whole, tmp_path):
    """The bucket is new, so host 1 sees only what host 0 has put there."""
    run = ["toy", "--out", f"{tmp_path}/run", "--checkpoints", "gs://bucket/pair"]
    with Pair(tmp_path, [[*run, "--steps", "10"]]) as pair:
        pair.end(0, 0, timeout=200)
    assert folders(cloud, "pair") == {"5", "10"}
    with Pair(tmp_path, [[*run, "--resume", "--steps", "15"]]) as pair:
        output = pair.end(0, 0, timeout=200)
    assert "resumed after step 10" in output[0]
    want, got = lines_of(whole / "metrics.jsonl"), lines_of(tmp_path / "run/metrics.jsonl")
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in (want, got)), rtol=1e-4)
