"""Checkpoints are whole or absent, are not torn by a step that donates, and restore on any mesh."""

import json
import resource
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl

from instructjax import sharding, state, train
from instructjax.run import manifest
from instructjax.run.checkpoint import Checkpoints, abstract, nbytes


def state_of(mesh, seed=0, width=64, spec=("fsdp", "tensor")):
    w = np.random.default_rng(seed).normal(size=(width, width)).astype(np.float32)
    params = {
        "w": jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec))),
        "b": jax.device_put(w[0].astype(jnp.bfloat16), sharding.replicated(mesh)),
    }
    return state.create(params, train.adam(1e-3))


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_state_and_meta_come_back_on_any_mesh(tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    saved = state_of(mesh)
    meta = {"step": 3, "config": {"names": ["a", "ü"], "rate": 1e-300}, "score": None}
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest() is None
    checkpoints.save(3, saved, meta)
    assert checkpoints.latest() == 3
    checkpoints.close()

    other = sharding.make_mesh(data=1, fsdp=1, tensor=8)
    target = state_of(other, seed=1)
    restored, read = Checkpoints(tmp_path, keep_last=1).restore(3, abstract(target))
    assert_equal(restored, saved)
    assert read == meta
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(f"{x}"), restored, target)
    assert restored.opt_state[1][0].mu["w"].sharding.mesh == other
    assert restored.params["b"].dtype == jnp.bfloat16


def test_parameters_and_score_are_read_without_the_optimizer(tmp_path, monkeypatch):
    saved = state_of(sharding.make_mesh(data=2, fsdp=2, tensor=2))
    checkpoints = Checkpoints(tmp_path, 1, "loss")
    checkpoints.save(3, saved, {"score": 0.25})
    target = state_of(sharding.make_mesh(tensor=8), seed=1).params
    read = checkpoints.restore_params(3, target)
    assert_equal(read, saved.params)
    assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, target)
    for wrong in ({"v": target["w"]}, {"w": jnp.zeros((8, 9))}):
        with pytest.raises(ValueError, match=f"{tmp_path}/3 has no such parameters"):
            checkpoints.restore_params(3, wrong)

    def refuse(*args, **kwargs):
        raise AssertionError("the score is not in the arrays")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", refuse)
    assert checkpoints.score(3) == 0.25
    assert checkpoints.best() == 3


def test_the_last_and_the_best_are_kept(tmp_path):
    mesh = sharding.make_mesh()
    saved = state_of(mesh, width=8)
    scores = {1: 0.5, 2: 0.1, 3: 0.7, 4: None, 5: 0.3, 6: 0.4, 7: None}

    def steps(mode):
        checkpoints = Checkpoints(tmp_path / mode, 2, "validation/loss", mode)
        for step, score in scores.items():
            checkpoints.save(step, saved, {"score": score})
        best = checkpoints.best()
        checkpoints.close()
        again = Checkpoints(tmp_path / mode, 2, "validation/loss", mode)
        assert again.best() == best
        again.save(8, saved, {})
        assert again.best() == best
        again.close()
        assert Checkpoints(tmp_path / mode, 2, "rm/accuracy", mode).best() is None
        return again.steps(), best

    assert steps("min") == ([2, 7, 8], 2)
    assert steps("max") == ([3, 7, 8], 3)
    plain = Checkpoints(tmp_path / "plain", 2)
    for step, score in scores.items():
        plain.save(step, saved, {"score": score})
    assert plain.best() is None
    plain.close()
    assert plain.steps() == [6, 7]
    assert sorted(path.name for path in (tmp_path / "plain").glob("[!.]*")) == ["6", "7"]


def test_a_donating_step_does_not_tear_a_save(tmp_path):
    """The step that follows overwrites the buffers while they are being written."""
    mesh = sharding.make_mesh()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    running = {"w": jax.device_put(np.zeros((1024, 1024), np.float32), sharding.batched(mesh))}
    checkpoints = Checkpoints(tmp_path, keep_last=8)
    for number in range(6):
        checkpoints.save(number, running, {})
        for _ in range(3):
            running = step(running)
    for number in range(6):
        restored, _ = checkpoints.restore(number, running)
        assert np.unique(restored["w"]).tolist() == [3.0 * number]


def test_half_written_is_removed(tmp_path):
    saved = state_of(sharding.make_mesh(), width=8)
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, saved, {})
    checkpoints.close()
    for step in (2, 7):
        (tmp_path / f"{step}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
        (tmp_path / f"{step}.orbax-checkpoint-tmp" / "state" / "half").write_text("")
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() == 1
    checkpoints.save(2, saved, {})
    assert checkpoints.latest() == 2
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["1", "2"]


# The first failure ends orbax's event loop, and later failures become unraisable exceptions.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The kernel refuses the write in the background, as with a quota or a disk that fills up."""
    told = []  # to the other hosts, at once
    monkeypatch.setattr(Checkpoints, "_end_all", lambda self, error: told.append(str(error)))
    saved = state_of(sharding.make_mesh(), width=256)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(5, saved, {})
    checkpoints.wait()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        # Either of the two calls may notice the failure.
        with pytest.raises(OSError, match=r"last good one is 5: .*too large") as error:  # noqa: PT012
            checkpoints.save(6, saved, {})
            checkpoints.wait()
        assert str(tmp_path) in str(error.value)
        assert "too large" in told[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    again = Checkpoints(tmp_path, keep_last=1)
    assert again.latest() == 5
    assert_equal(again.restore(5, saved)[0], saved)
    again.save(6, saved, {})
    assert again.latest() == 6


def test_full_disk_is_found_before_the_write(tmp_path, monkeypatch):
    saved = {"w": jnp.zeros((64, 64)), "n": jnp.zeros((), jnp.int32)}
    assert nbytes(saved) == 64 * 64 * 4 + 4
    checkpoints = Checkpoints(tmp_path, 2, "loss")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 4 * nbytes(saved)))
    checkpoints.check_space(saved)  # two, the best, and the one being written
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 4 * nbytes(saved) - 1))
    with pytest.raises(OSError, match=r"4 checkpoints of 16,388 bytes .* --keep_last"):
        checkpoints.check_space(saved)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, nbytes(saved) - 1))
    with pytest.raises(OSError, match="there is none before it: it needs 16,388 bytes"):
        checkpoints.save(1, saved, {})
    assert not list(tmp_path.glob("[!.]*"))


def test_what_does_not_fit_is_named(tmp_path):
    saved = {"w": jnp.zeros((8, 8))}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, saved, {})
    with pytest.raises(ValueError, match="there is a checkpoint of step 1 already"):
        checkpoints.save(1, saved, {})
    for wrong in ({"w": jnp.zeros((8, 9))}, {"v": jnp.zeros((8, 8))}):
        with pytest.raises(ValueError, match=f"{tmp_path}/1 is not a checkpoint of this state"):
            checkpoints.restore(1, wrong)


def test_the_end_of_another_host_is_not_blamed_on_the_checkpoint(tmp_path, monkeypatch):
    saved = {"w": jnp.zeros((8, 8))}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, saved, {})

    def restore(*_, **__):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    with pytest.raises(ValueError, match=r"^UNKNOWN: Gloo AllGather failed"):
        checkpoints.restore(1, saved)


def damaged_copies(whole: Path, work: Path):
    """Copies of a checkpoint, each with one file damaged, and the name of that file."""
    names = [str(path.relative_to(whole)) for path in sorted(whole.rglob("*")) if path.is_file()]
    for name in (name for name in names if not name.endswith("commit_success.txt")):
        content = (whole / name).read_bytes()
        flipped = [bytearray(content) for _ in range(3)]
        for copy, at in zip(flipped, (0, len(content) // 2, len(content) - 1), strict=True):
            copy[at] ^= 1 << at % 8
        for damaged in (*flipped, content[:-1], b"", content + b"\0", None):
            shutil.copytree(whole, work)
            (work / name).unlink()
            if damaged is not None:
                (work / name).write_bytes(damaged)
            yield name, work
            shutil.rmtree(work)


def test_every_damage_to_a_file_is_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, "loss")
    checkpoints.save(1, state_of(sharding.make_mesh()), {"score": 0.5})
    checkpoints.close()
    assert manifest.damage(epath.Path(tmp_path / "1")) is None
    tried = set()
    for name, damaged in damaged_copies(tmp_path / "1", tmp_path / "copy"):
        directory = epath.Path(damaged)
        if name == "checksums.json" and not (damaged / name).exists():
            assert not manifest.exists(directory)
            continue
        problem = manifest.damage(directory)
        assert problem is not None, name
        if "checksums" not in name:  # a damaged list may name any of its files
            assert problem.startswith(f"{name}: "), (name, problem)
        tried.add(name)
    kinds = ("_CHECKPOINT_METADATA", "meta/metadata", "state/d/", "state/ocdbt.process_0/d/")
    assert all(any(name.startswith(kind) for name in tried) for kind in kinds)


def test_checksums_wait_for_metadata_that_is_written_late(tmp_path, monkeypatch):
    """A thread of orbax's adds to it, and may come after the files are summed on a busy machine."""
    update = _MetadataStoreImpl.update

    def late(*args, **kwargs):
        time.sleep(0.5)
        update(*args, **kwargs)

    monkeypatch.setattr(_MetadataStoreImpl, "update", late)
    for step, wait in ((1, 60), (2, 0.1)):  # and too late to be waited for
        monkeypatch.setattr(manifest, "METADATA_WAIT", wait)
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(step, {"w": jnp.zeros((8, 8))}, {})
        checkpoints.close()
        assert manifest.damage(epath.Path(tmp_path / f"{step}")) is None
        sums = json.loads((tmp_path / f"{step}" / "checksums.json").read_text())
        assert (manifest.STEP_METADATA in sums) == (wait == 60)


def test_damaged_checkpoints_are_set_aside(tmp_path, capsys):
    saved = state_of(sharding.make_mesh(), width=8)
    checkpoints = Checkpoints(tmp_path, 3, "loss")
    for step, score in ((2, 0.5), (4, 0.1), (6, 0.3)):
        checkpoints.save(step, saved, {"score": score})
    checkpoints.wait()
    (tmp_path / "6/meta/metadata").write_text("{}")
    (tmp_path / "2/checksums.json").unlink()
    assert checkpoints.latest_whole() == 4
    assert f"{tmp_path}/6 is damaged (meta/metadata: 2 bytes instead of" in capsys.readouterr().out
    assert (tmp_path / "set_aside/6/meta/metadata").read_text() == "{}"
    checkpoints.save(6, saved, {"score": 0.2})
    checkpoints.set_aside(6)
    assert (tmp_path / "set_aside/6.2/checksums.json").exists()

    assert checkpoints.best() == 4
    large = max((tmp_path / "4/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 16
    large.write_bytes(content)
    assert checkpoints.best() == checkpoints.latest_whole() == 2
    out = capsys.readouterr().out
    assert f"{large.relative_to(tmp_path / '4')}: its checksum differs" in out
    assert f"warning: {tmp_path}/2 has no checksums" in out
    assert_equal(checkpoints.restore(2, saved)[0], saved)


def test_a_save_that_orbax_declines_is_an_error(tmp_path):
    """With 2, 4 and 6 there, orbax does not save 3, and says nothing."""
    saved = {"w": jnp.zeros((8, 8))}
    checkpoints = Checkpoints(tmp_path, 5)
    for step in (2, 4, 6):
        checkpoints.save(step, saved, {})
    with pytest.raises(OSError, match=r"step 3 could not be written.*--resume_step"):
        checkpoints.save(3, saved, {})
    for step in (6, 4):
        checkpoints.set_aside(step)
    checkpoints.save(3, saved, {})
    assert checkpoints.steps() == [2, 3]


def test_a_copy_that_a_user_made_is_left_alone(tmp_path):
    saved = {"w": jnp.zeros((8, 8))}
    checkpoints = Checkpoints(tmp_path, 5)
    checkpoints.save(4, saved, {})
    checkpoints.wait()
    shutil.copytree(tmp_path / "4", tmp_path / "5.copy")
    checkpoints.save(5, saved, {})
    checkpoints.close()
    assert manifest.damage(epath.Path(tmp_path / "5")) is None
    assert (tmp_path / "5.copy").exists()


def test_a_host_that_has_nothing_to_write_lists_nothing(tmp_path):
    """If each array is small, and on other hosts too. orbax makes no folder for it then."""
    manifest._write_own(epath.Path(tmp_path))
    assert (tmp_path / "checksums.0.json").read_text() == "{}"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"loss": 0.9}', None])
@pytest.mark.parametrize("step", [1, 3])
def test_a_damaged_score_is_named(tmp_path, capsys, content, step):
    """orbax reads all scores when it looks for checkpoints, before a run has chosen one."""
    checkpoints = Checkpoints(tmp_path, 3, "loss")
    for each in (1, 2, 3):
        checkpoints.save(each, {"w": jnp.zeros((8, 8))}, {"score": 0.1 * each})
    checkpoints.close()
    file = tmp_path / str(step) / "metrics" / "metrics"
    file.unlink()
    if content is not None:
        file.write_text(content)
    again = Checkpoints(tmp_path, 3, "loss")
    assert again.latest_whole() == 5 - max(step, 2)
    assert f"{tmp_path}/{step} is damaged (metrics/metrics: " in capsys.readouterr().out
    assert again.best() == {1: 2, 3: 1}[step]
    assert (tmp_path / "set_aside" / str(step)).exists()
    again.close()


def test_files_are_dealt_out_in_one_order_on_all_hosts(tmp_path, monkeypatch):
    """Each is then read by one of them, whatever the order in which a host lists them."""
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, {"w": jnp.zeros((8, 8))}, {})
    checkpoints.close()
    listed = manifest._listed_by_hosts(epath.Path(tmp_path / "1"))
    same = {name: [1, 0] for name in listed}
    read: list[str] = []
    monkeypatch.setattr(manifest, "_first_problem", lambda _, sums: read.extend(sums))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(manifest.multihost_utils, "process_allgather", lambda text: text)
    for host, order in enumerate((same, dict(reversed(same.items())))):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(manifest, "_listed_by_hosts", lambda _, order=order: order)
        manifest.damage(epath.Path(tmp_path / "1"))
    assert sorted(name for name in read if name in same) == sorted(same)


def test_a_run_that_takes_checkpoints_over_ends_the_other(tmp_path):
    saved, first = {"w": jnp.zeros((8, 8))}, Checkpoints(tmp_path, 5)
    first.save(1, saved, {})
    first.wait()
    (tmp_path / ".holder").unlink()  # by a user, and no run has taken it over
    first._claim.check()
    second = Checkpoints(tmp_path, 5)
    second.save(2, saved, {})
    second.wait()
    with pytest.raises(OSError, match="has taken these checkpoints over"):
        first.save(3, saved, {})


def test_what_was_written_is_told(tmp_path):
    written = []
    checkpoints = Checkpoints(tmp_path, 1, on_written=written.append)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.zeros((8, 8))}, {})
        assert step not in written
    checkpoints.close()
    assert written == [1, 2]
