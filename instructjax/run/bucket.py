"""A directory of checkpoints in Cloud Storage, which has objects and no folders.

orbax writes a checkpoint where it stays, and `commit_success.txt` last. A folder without that
object at its top is no checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from etils import epath
from etils.epath import backend
from orbax.checkpoint._src.path.atomicity_types import COMMIT_SUCCESS_FILE  # has no public name

from instructjax import hosts

MARK = "instructjax-checkpoints.txt"


def holds(directory: epath.Path) -> bool:
    """Whether the directory is in a bucket."""
    return "://" in str(directory)


def prepare(directory: epath.Path) -> None:
    """Makes the directory by an object in it, and removes checkpoints that are half-written.

    orbax's own option for the latter would also delete all other folders in the directory.

    Raises:
      OSError: the bucket does not exist, or host 0 may not write there.
    """
    if jax.process_index() == 0:
        with errors_named(directory):
            (directory / MARK).write_text("Each folder here is a checkpoint, named by its step.\n")
            for path in directory.iterdir():
                if path.name.isdecimal() and not (path / COMMIT_SUCCESS_FILE).exists():
                    path.rmtree()
    hosts.wait_for_all("the directory of checkpoints is prepared")


def forget_listings(directory: epath.Path) -> None:
    """Makes this process see what other hosts have written: gcsfs keeps its listings for ever."""
    backend.fsspec_backend.fs(directory).invalidate_cache()


def copy(file: epath.Path, target: epath.Path) -> None:
    """Copies an object within its bucket."""
    backend.fsspec_backend.fs(file).cp_file(str(file), str(target))


def raise_outage(directory: epath.Path, error: Exception) -> None:
    """Raises an error unless it tells of damage: a bucket that fails damages no checkpoint.

    On a disk every error counts as damage, as does an object that is missing.
    """
    if holds(directory) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def errors_named(directory: epath.Path) -> Iterator[None]:
    """Raises what gcsfs raises as an OSError of one line that names the directory.

    gcsfs has an exception of its own for HTTP errors, and aiohttp and google.auth have theirs. A
    ValueError or KeyError is passed on: with it orbax says that a checkpoint has another tree. So
    is every error if the directory is on a disk.
    """
    try:
        yield
    except (ValueError, KeyError):
        raise
    except Exception as error:
        if not holds(directory):
            raise
        why = " ".join(str(error).split())
        raise OSError(
            f"--checkpoints {directory} can't be used, {type(error).__name__}: {why}"
        ) from error
