"""What a run settles for its whole process: signals, memory, compiled programs, its directory."""

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

MIN_FREE = 2**26  # bytes, below which no run starts
KEPT = 2**28  # bytes of the largest block that is not mapped anew
KEPT_IF_LARGE = 2**27  # the same in a process above LARGE
UNUSED = 2**29  # bytes at an arena's end that are given back
MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 2**31  # bytes of a process that gives back all that is free, between a run's phases


class Signals:
    """Counts SIGTERM and SIGINT; ends the process at the second.

    A thread reads them from the wakeup descriptor, since Python runs its own handlers only
    between bytecodes: never during minutes of compilation.

    Args:
      handler: runs in the main thread, when that comes to it.
      notify: runs in the thread with the count, at once.
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
        """A step begins; there is no other process to agree with."""

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)


def claim(directory: Path, stack: ExitStack) -> None:
    """Makes a run's directory, which is this process' own until the stack is closed.

    Raises:
      OSError: it cannot be written, another process is training there, or the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((directory / ".lock").open("w"))
    except OSError as error:
        raise OSError(f"--out {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"--out {directory}: another process is training there") from error
    except OSError:  # a file system without locks
        pass
    if (free := shutil.disk_usage(directory).free) < MIN_FREE:
        raise OSError(f"--out {directory}: the disk is full, {free:,} bytes are free")


def cache_compilations() -> None:
    """Keeps compiled programs between runs, where neither the user nor a test chose a place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path("~/.cache/instructjax/xla").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        compilation_cache.reset_cache()  # it looks once, at the first compilation


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next step, where it would return it to the system.

    XLA on CPU allocates all of a step's temporaries at each call. By default large blocks are
    mapped anew, and bringing in their pages took a third of a small step's processor time; from
    one arena they come back warm. Blocks above KEPT are mapped as ever, and an end of the arena
    above UNUSED goes back: the holes that large blocks leave in an arena, into which smaller ones
    go, raised the peak of PPO at 124M parameters by a quarter. KEPT is above the temporaries of a
    step of the miniature (PPO's have 187 MB), and UNUSED above those of the steps in flight, which
    are free together: or the arena would shrink and grow at each. A large process keeps less, see
    `return_memory`.
    To be called before JAX starts its threads, each of which would get an arena. Elsewhere than on
    glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        mallopt(arena_max, 1)
        mallopt(trim_threshold, UNUSED)
        # Its documented limit is 32 MB; where that is enforced, nothing is mapped anew.
        if not mallopt(MMAP_THRESHOLD, KEPT):
            mallopt(mmap_max, 0)


def return_memory() -> None:
    """Gives what is free in the middle of the arena back to the system, if the process is large.

    To be called between the phases of a run, whose blocks differ in size: what one phase, or its
    compilation, leaves free is of little use to the next. The call took up to 0.1 s at 124M
    parameters, and pages that are needed again must be brought in; a small process, of whose steps
    that would be a large part, keeps what it has. For the same reason a large one maps blocks
    above KEPT_IF_LARGE anew from then on.
    Elsewhere than on glibc it does nothing.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    # Not the peak that getrusage tells, which a process inherits from the one that started it.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * resource.getpagesize() > LARGE:
        libc.mallopt(MMAP_THRESHOLD, KEPT_IF_LARGE)
        libc.malloc_trim(0)
