"""Reports the step and phase of a run without progress, and ends the run if this lasts.

A host makes progress if it finishes a step, begins or ends a phase, or if its main thread computes:
while it loads a model, reads data or evaluates. While it waits for a device, for another host or
for a disk, the main thread uses no processor time. It may use none during a compilation either,
which runs in other threads. Time in which this whole process was stopped, as by Ctrl-Z, does not
count.
"""

import faulthandler
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jax._src.distributed import global_state  # its client has no public name
from jax.errors import JaxRuntimeError

from instructjax import hosts

PLACES = "instructjax/place"  # keys in the coordination service: `instructjax/place/HOST`
QUIET = 60  # seconds without progress from one message to the next
LOOK = 10  # seconds from one look at the main thread to the next
BUSY = 0.005  # share of the time since the last look that a main thread that moves computes
NAMED = 8  # most hosts that a message names


class Watchdog:
    """A context that watches the main thread, and on several hosts tells each what others do.

    A host that has not moved for a minute prints once a minute where it and others stand. A single
    process prints nothing: the progress line shows what it does. When no host has moved for `stall`
    minutes, each prints the stacks of its threads and ends with hosts.RESUMABLE, or with 1 if
    another start would be of no use.

    Args:
      stall: minutes; inf lets the run wait for ever.
      useless: says why another start would be of no use; None: it may be of use.
      look: seconds from one look at the main thread to the next.
      quiet: seconds without progress from one message to the next.
    """

    def __init__(
        self,
        stall: float,
        useless: Callable[[], str | None] = lambda: None,
        look: float = LOOK,
        quiet: float = QUIET,
    ):
        self._stall, self._useless, self._quiet = 60 * stall, useless, quiet
        self._every = min(look, self._stall / 4)
        self._step = 0
        self._phases: list[str] = []  # the innermost last
        self._moved = self._looked = time.monotonic()
        self._computed, self._printed = _computed(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()
        self._tell(math.inf)  # the others must not wait for this host to stand still too

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Counts the beginning and the end of a phase as progress. Phases may nest."""
        self._phases.append(doing)
        self._moved = time.monotonic()
        try:
            yield
        finally:
            self._phases.remove(doing)
            self._moved = time.monotonic()

    def finished(self, step: int) -> None:
        """Counts a finished step as progress."""
        self._step, self._moved = step, time.monotonic()

    # ---- inside ----

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._look()

    def _look(self) -> None:
        before, self._computed = self._computed, _computed()
        last, self._looked = self._looked, time.monotonic()
        if self._computed - before > BUSY * self._every:
            self._moved = self._looked
        elif self._looked - last > 2 * self._every:  # this process did not run
            self._moved += self._looked - last - self._every
        still = self._looked - self._moved
        self._tell(still)
        minutes = int(still / self._quiet)
        if not minutes and still < self._stall:
            self._printed = 0
            return
        others = self._others()
        if still >= self._stall and all(each[2] >= self._stall for each in others.values()):
            self._end(still)
        if global_state.num_processes > 1 and minutes > self._printed:
            self._printed = minutes
            self._say(f"no progress for {still:.0f} s, {_where(*self._place)}{_text(others)}")

    @property
    def _place(self) -> tuple[int, str]:
        """The last finished step, and the phase."""
        return self._step, (self._phases[-1:] or ["in the next step"])[0]

    def _tell(self, still: float) -> None:
        """Tells the other hosts where this one stands."""
        if global_state.num_processes > 1:
            key, place = f"{PLACES}/{global_state.process_id}", json.dumps([*self._place, still])
            with suppress(JaxRuntimeError):  # the service is gone, and jax is about to say so
                client: Any = global_state.client
                client.key_value_set(key, place, allow_overwrite=True)

    def _others(self) -> dict[int, tuple[int, str, float]]:
        """Host -> its step, phase and seconds without progress when it last looked."""
        places = {}
        with suppress(JaxRuntimeError):
            if global_state.num_processes > 1:
                client: Any = global_state.client
                for key, place in client.key_value_dir_get(PLACES):
                    places[int(key.rpartition("/")[2])] = tuple(json.loads(place))
        return {host: places[host] for host in sorted(places) if host != global_state.process_id}

    def _end(self, still: float) -> None:
        code, then = hosts.RESUMABLE, "--resume continues the run; --stall allows more time"
        if (useless := self._useless()) is not None:
            code, then = 1, useless
        message = f"no progress for {still:.0f} s, {_where(*self._place)}; {then}"
        self._say(message)
        faulthandler.dump_traceback(all_threads=True)
        hosts.end(code, message)

    def _say(self, text: str) -> None:
        host = f"host {global_state.process_id}: " if global_state.num_processes > 1 else "error: "
        print(f"{host}{text}", file=sys.stderr, flush=True)


def _computed() -> float:
    """Seconds of processor time of the main thread; 0 where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    ident = threading.main_thread().ident
    return time.clock_gettime(time.pthread_getcpuclockid(ident or 0))


def _where(step: int, phase: str) -> str:
    return f"after step {step:,}, {phase}"


def _text(others: dict[int, tuple[int, str, float]]) -> str:
    """`; host 1 moved 3 s ago, after step 4, ...` for each, those that are behind first."""
    parts = []
    for host in sorted(others, key=lambda host: others[host][0])[:NAMED]:
        step, phase, still = others[host]
        moved = f"moved {still:.0f} s ago, {_where(step, phase)}"
        parts.append(f"host {host} {'has finished' if still == math.inf else moved}")
    return "".join(f"; {part}" for part in [*parts, *(["..."] if len(others) > NAMED else [])])
