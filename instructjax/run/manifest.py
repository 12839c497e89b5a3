"""Checksums of a checkpoint's files, written before it gets its name and checked before it is read.

Each host writes the checksums of its own array files to `state/checksums.HOST.json`, in the thread
that wrote these files. Host 0 then writes those of all other files, including these lists, to
`checksums.json`. Both happen in the temporary directory, or in a bucket before the commit file. So
a kill leaves a checkpoint with its checksums, or no checkpoint.

    {"state/d/51c8...": [4096, 2774301541], ...}          # name: bytes, CRC-32
"""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.future import ChainedFuture

from instructjax.run import bucket

WHOLE = "checksums.json"
SCORE = "metrics/"  # orbax's folder of a checkpoint's score
CHUNK = 2**24  # bytes read at a time
COMMIT_FILE = "commit_success.txt"  # written by orbax at the very end, as the metadata's time is
STEP_METADATA, COMMIT_TIME = "_CHECKPOINT_METADATA", "commit_timestamp_nsecs"
METADATA_WAIT = 60  # seconds
MESSAGE = 512  # bytes of what a host says about damage

Sums = dict[str, list[int]]


class SummedState(ocp.StandardCheckpointHandler):
    """Writes a state, and the checksums of the files that this host wrote.

    Args:
      failed: gets an error of the writing, in the thread that writes, before orbax does. orbax
        would let the other hosts wait for this one for minutes.
    """

    def __init__(self, failed: Callable[[Exception], None]):
        super().__init__()
        self._failed = failed
        self.step_directory = epath.Path()  # of the checkpoint that is being written

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        futures = await super().async_save(directory, *args, **kwargs) or []
        folder = getattr(directory, "path", directory)  # it may be about to be made
        self.step_directory = folder.parent
        return [_Written(futures, lambda: _write_own(folder), self._failed)]


class _Written(ChainedFuture):
    """Waits for futures, then calls back. `failed` gets what either raises."""

    def __init__(
        self, futures: Any, callback: Callable[[], None], failed: Callable[[Exception], None]
    ):
        super().__init__(futures, callback)
        self._failed = failed

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        except Exception as error:
            self._failed(error)
            raise


def _write_own(folder: epath.Path) -> None:
    host = jax.process_index()
    arrays = folder / f"ocdbt.process_{host}"
    # A host has written nothing if each array is small, and another host has it too.
    names = _names(arrays) if arrays.exists() else ()
    sums = {f"{arrays.name}/{name}": summed(arrays / name) for name in names}
    (folder / f"checksums.{host}.json").write_text(json.dumps(sums))


def write(step_directory: epath.Path) -> None:
    """Writes checksums.json of a checkpoint that is complete but for its name. Host 0 calls it."""
    left_out = set(_listed_by_hosts(step_directory))
    if not _metadata_is_written(step_directory / STEP_METADATA):
        left_out.add(STEP_METADATA)  # what is written later would pass for damage
    sums = {
        name: summed(step_directory / name)
        for name in _names(step_directory)
        if name not in left_out and not name.endswith(COMMIT_FILE)
    }
    (step_directory / WHOLE).write_text(json.dumps(sums))


def _metadata_is_written(file: epath.Path) -> bool:
    """Waits up to METADATA_WAIT for the names of handlers, which a thread of orbax's writes."""
    end = time.monotonic() + METADATA_WAIT
    while time.monotonic() < end:
        try:
            if json.loads(file.read_text()).get("item_handlers"):
                return True
        except (OSError, ValueError, AttributeError):  # not there yet, or half written
            pass
        time.sleep(0.02)
    return False


def exists(step_directory: epath.Path) -> bool:
    return (step_directory / WHOLE).exists()


def move(step_directory: epath.Path, target: epath.Path) -> None:
    """Moves a checkpoint, so that a kill leaves it whole in its old place or in the new one.

    A bucket has no folders to rename. There a checkpoint counts while its commit file exists, so
    that is the last to be copied and the first to be removed.
    """
    if not bucket.holds(step_directory):
        step_directory.rename(target)
        return
    names = [COMMIT_FILE, *(name for name in _names(step_directory) if name != COMMIT_FILE)]
    for name in reversed(names):
        bucket.copy(step_directory / name, target / name)
    for name in names:
        (step_directory / name).unlink()


def damage(step_directory: epath.Path, part: str = "") -> str | None:
    """What is wrong with a checkpoint: the first file that differs from its checksum, and how.

    Every file is read once, by one of the hosts. All hosts call this, and get the same answer.

    Args:
      step_directory: a checkpoint for which `exists`.
      part: how the names of the files to read begin.
    """
    try:
        sums = _read(step_directory / WHOLE)
        sums = {name: values for name, values in sums.items() if name.startswith(part)}
        lists = [name for name in sums if _is_host_list(name)]
        problem = _first_problem(step_directory, {name: sums.pop(name) for name in lists})
        sums |= {} if problem or part else _listed_by_hosts(step_directory)
    except (OSError, ValueError) as error:
        bucket.raise_outage(step_directory, error)
        sums, problem = {}, str(error)
    # The largest files are dealt out first, in an order that is the same on all hosts.
    dealt = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
    share = dict(dealt[jax.process_index() :: jax.process_count()])
    problem = problem or _first_problem(step_directory, share)
    if jax.process_count() == 1:
        return problem
    text = np.zeros(MESSAGE, np.uint8)
    encoded = (problem or "").encode()[:MESSAGE]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    texts = np.asarray(multihost_utils.process_allgather(text)).reshape(-1, MESSAGE)
    problems = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in texts]
    return next(filter(None, problems), None)


def _first_problem(step_directory: epath.Path, sums: Sums) -> str | None:
    for name, (size, checksum) in sums.items():
        file = step_directory / name
        try:
            now = summed(file)
        except OSError as error:
            bucket.raise_outage(step_directory, error)
            return f"{name}: {error.strerror or type(error).__name__}"
        if now[0] != size:
            return f"{name}: {now[0]:,} bytes instead of {size:,}"
        if now[1] != checksum:
            return f"{name}: its checksum differs"
    return None


def summed(file: epath.Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    if file.name == STEP_METADATA:
        # The commit adds its time. A damaged file is summed as it is, which gives another sum.
        content = file.read_bytes()
        try:
            metadata = json.loads(content)
            metadata.pop(COMMIT_TIME, None)
            content = json.dumps(metadata, sort_keys=True).encode()
        except (ValueError, AttributeError):
            pass
        return [len(content), zlib.crc32(content)]
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return [size, checksum]


def _is_host_list(name: str) -> bool:
    return name.startswith("state/checksums.")


def _listed_by_hosts(step_directory: epath.Path) -> Sums:
    """The sums in state/checksums.*.json, with names relative to the checkpoint."""
    state = step_directory / "state"
    return {
        f"state/{name}": values
        for file in state.glob("checksums.*.json")
        for name, values in _read(file).items()
    }


def _read(file: epath.Path) -> Sums:
    """Raises ValueError if the file is not a list of checksums, OSError if it cannot be read."""
    try:
        sums = json.loads(file.read_text())
        pairs = all([type(number) for number in pair] == [int, int] for pair in sums.values())
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file.name}: not a list of checksums") from error
    if not pairs:
        raise ValueError(f"{file.name}: not a list of checksums")
    return sums


def _names(directory: epath.Path) -> Iterator[str]:
    """Names of all files below a directory, relative to it, in order."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in _names(path))
        else:
            yield path.name
