"""Names a host that has fallen silent, before jax ends the run.

jax's coordination service notices a dead host, and jax then ends all others from C++. Its message
has the number of the dead host among twenty lines of a stack. If host 0 is dead, which runs the
service, the message has no number. So each host also writes a heartbeat to the service every
second, and reads those of the others.
"""

import itertools
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from jax.errors import JaxRuntimeError

BEATS = "instructjax/beat"  # keys in the coordination service: `instructjax/beat/HOST`
EVERY = 1  # seconds from one beat to the next
SILENCE = 10  # seconds without a beat after which a host is named; jax needs at least 14


class Heartbeat:
    """A context in which this host beats, and prints the name of a host that does not.

    Args:
      client: jax's client of the coordination service.
      host, count: this host's number, and the number of hosts.
      silence: seconds without a beat after which a host is named.
      every: seconds from one beat to the next.
    """

    def __init__(
        self, client: Any, host: int, count: int, silence: float = SILENCE, every: float = EVERY
    ):
        self._client, self._host, self._silence, self._every = client, host, silence, every
        self._beats: dict[int, list[Any]] = {}  # host -> [number of its last beat, its name]
        self._heard = dict.fromkeys(range(count), time.monotonic())
        self._done = threading.Event()
        # A call to a service that does not answer does not return, so another thread looks on.
        loops = (self._beat, self._look)
        self._threads = [threading.Thread(target=each, daemon=True) for each in loops]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _beat(self) -> None:
        for number in itertools.count():  # the first one at once: it brings the name
            with suppress(JaxRuntimeError):  # the service is gone, and jax is about to say so
                beat = json.dumps([number, socket.gethostname()])
                self._client.key_value_set(f"{BEATS}/{self._host}", beat, allow_overwrite=True)
                for key, beat in self._client.key_value_dir_get(BEATS):
                    host, beat = int(key.rpartition("/")[2]), json.loads(beat)
                    if beat != self._beats.get(host):
                        self._beats[host], self._heard[host] = beat, time.monotonic()
                self._heard[0] = time.monotonic()  # it has answered
            if self._done.wait(self._every):
                return

    def _look(self) -> None:
        named: set[int] = set()
        last = time.monotonic()
        while not self._done.wait(self._every):
            before, now = last, time.monotonic()
            last = now
            if now - before > 2 * self._every:  # this process was stopped, and heard no one
                for host in self._heard:
                    self._heard[host] += now - before
            silent = {host for host, heard in self._heard.items() if now - heard > self._silence}
            if 0 in silent:  # nothing can be known of the others
                silent = {0} | named
            for host in sorted(silent - named):
                self._say(
                    f"{self._name(host)} has been silent for {self._silence} s: it was killed or"
                    " stopped, its machine is down, the network to it is cut, or a call blocks its"
                    " Python; unless it is heard again, jax ends the run"
                )
            for host in sorted(named - silent):
                self._say(f"{self._name(host)} is heard again")
            named = silent

    def _name(self, host: int) -> str:
        return f"host {host} ({self._beats[host][1]})" if host in self._beats else f"host {host}"

    def _say(self, text: str) -> None:
        print(f"host {self._host}: {text}", file=sys.stderr, flush=True)
