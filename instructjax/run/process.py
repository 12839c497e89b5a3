"""Settings of the whole process: signals, memory, compiled programs, the run directory's lock."""

import ctypes
import fcntl
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

MIN_FREE = 2**26  # bytes of free disk, below which no run starts
KEPT = 2**28  # bytes of the largest block that malloc keeps instead of mapping it anew
KEPT_IF_LARGE = 2**27  # the same, in a process larger than LARGE
UNUSED = 2**29  # free bytes at an arena's end, above which they are given back to the system
MMAP_THRESHOLD = -3  # from glibc's malloc.h
LARGE = 2**31  # bytes of a process, above which `return_memory` gives free memory back


class Signals:
    """Counts SIGTERM and SIGINT, and ends the process at the second one.

    A thread reads the signals from the wakeup descriptor. Python's own handlers run only between
    bytecodes, and so not during minutes of compilation.

    Args:
      handler: called in the main thread, between two bytecodes.
      notify: called at once, in the reading thread, with the count.
    """

    def __init__(self, handler: Callable[..., None], notify: Callable[[int], None]):
        self.count, self._handler, self._notify = 0, handler, notify

    def __enter__(self) -> "Signals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_descriptor = signal.set_wakeup_fd(self._write)
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._old = {number: signal.signal(number, self._handler) for number in numbers}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] in self._old:
                self.count += 1
                self._notify(self.count)
                if self.count > 1:
                    os._exit(128 + byte[0])

    def before(self, step: int) -> None:
        """Called before each step. A single process has no other to agree with."""

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)


def claim(directory: Path, stack: ExitStack, flag: str = "--out") -> None:
    """Makes a directory that `flag` names, and locks it until the stack is closed.

    Raises:
      OSError: the directory cannot be written, another process trains in it, or the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((directory / ".lock").open("w"))
    except OSError as error:
        raise OSError(f"{flag} {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(
            f"{flag} {directory}: another process is training there;"
            f" wait for it, or give another {flag}"
        ) from error
    except OSError:  # a file system without locks
        pass
    if (free := shutil.disk_usage(directory).free) < MIN_FREE:
        raise OSError(
            f"{flag} {directory}: the disk is full, with {free:,} bytes left; free some,"
            f" or give another {flag}"
        )


def cache_compilations() -> None:
    """Keeps compiled programs on disk between runs, unless the user or a test chose a cache."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path("~/.cache/instructjax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        compilation_cache.reset_cache()  # jax reads the setting once, at the first compilation


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    XLA on CPU allocates all temporaries of a step at each call. By default glibc maps large blocks
    anew, and bringing in their pages took a third of a small step's processor time. Blocks from one
    arena keep their pages.

    Blocks above KEPT are still mapped anew: they would leave holes in the arena, which smaller
    blocks fill, and this raised the peak of PPO at 124M parameters by a quarter. KEPT is above the
    temporaries of a step of the miniature (187 MB in PPO). UNUSED is above the temporaries of the
    steps in flight, which are all free at times: otherwise the arena would shrink and grow at each
    step. A large process keeps less, see `return_memory`.

    Call this before JAX starts its threads, each of which would get an arena. It does nothing where
    the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        mallopt(arena_max, 1)
        mallopt(trim_threshold, UNUSED)
        # The documented limit of this setting is 32 MB. Where it is enforced, map nothing anew.
        if not mallopt(MMAP_THRESHOLD, KEPT):
            mallopt(mmap_max, 0)


def return_memory(of_small: bool = False) -> None:
    """Gives the arena's free memory back to the system, if the process is large.

    Call this between the phases of a run. Their blocks differ in size, so the memory that one
    phase, or its compilation, leaves free is of little use to the next. The call took up to 0.1 s
    at 124M parameters, and pages that are needed again must be brought in: a large part of a small
    process's step, so a small process keeps its memory. A large process also maps blocks above
    KEPT_IF_LARGE anew from then on. It does nothing where the C library is not glibc.

    Args:
      of_small: a small process gives its memory back instead, for calls that are minutes apart.
        The free blocks of an arena scatter, so that over an hour new ones find room only at its
        end.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    # getrusage would give the peak, which a process inherits from the one that started it.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    large = pages * resource.getpagesize() > LARGE
    if large == of_small:
        return
    if large:
        libc.mallopt(MMAP_THRESHOLD, KEPT_IF_LARGE)
    libc.malloc_trim(0)
