"""Waits until all processes of a run have started, and prints which are missing.

jax's coordination service waits too, but in C++, and does not name the missing hosts. So host 0
first listens on the service's port itself. Each other host connects and sends its number. When all
have done so, host 0 answers and closes the port, and jax's service takes the port over. A host that
ends or is restarted meanwhile closes its connection, and counts as missing again.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from jax._src.clusters import ClusterEnv

LIMIT = 300  # seconds to wait for all hosts, jax's own limit
EVERY = 60  # seconds from one message to the next
GREETING, ANSWER = "instructjax", b"go"
LONGEST = 64  # bytes of a greeting


def place(
    count: int | None, host: int | None, environment: Mapping[str, str]
) -> tuple[str, int, int]:
    """Returns the address that jax's coordination service will have, the number of processes and
    this one's number.

    Args:
      count, host: the numbers, if known; otherwise jax asks the cluster for them.
      environment: os.environ.

    Raises:
      ValueError: the cluster does not tell them.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    # [] because without local devices jax would look for this process's own.
    address, count, host, _ = ClusterEnv.auto_detect_unset_distributed_params(
        address, count, host, [], None, LIMIT
    )
    if address is None or count is None or host is None:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID: set all three;"
            " no cluster tells the missing ones"
        )
    return address, count, host


def wait(address: str, count: int, host: int, limit: float = LIMIT, every: float = EVERY) -> bool:
    """Waits for all hosts; every minute, host 0 prints who is missing. Returns whether all came.

    Args:
      address: `HOST:PORT` of jax's coordination service, which must not have been started yet.
      count: number of hosts.
      host: this host's number.
      limit: seconds after which it gives up.
      every: seconds from one message to the next.

    Raises:
      OSError: host 0 cannot listen on the port.
    """
    name, _, port = address.rpartition(":")
    if host == 0:
        return _gather(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"), port, count, limit, every)
    return _report((name.strip("[]"), int(port)), host, limit, every)


def _gather(bind: str | None, port: str, count: int, limit: float, every: float) -> bool:
    """Host 0's part: collects the others' greetings, and answers when it has all."""
    name, _, port = (bind or f"[::]:{port}").rpartition(":")
    name, dual = name.strip("[]"), False
    if name == "::":
        dual = socket.has_dualstack_ipv6()
        name = name if dual else ""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        server = socket.create_server((name, int(port)), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise OSError(f"host 0 cannot listen on port {port}: {error.strerror}") from error
    joined: dict[int, socket.socket] = {}
    began = said = time.monotonic()
    with server:
        server.settimeout(0.5)
        while True:
            for host in [host for host, each in joined.items() if not _is_open(each)]:
                joined.pop(host).close()
            missing = sorted(set(range(1, count)) - joined.keys())
            now = time.monotonic()
            if not missing or now - began > limit:
                break
            if now - said >= every:
                said = now
                _say(f"host 0 of {count}", now - began, f"{_hosts(missing)} not joined yet")
            with suppress(OSError):  # no one came
                connection, _ = server.accept()
                if (number := _greeting(connection)) is None:
                    connection.close()
                else:
                    joined[number] = connection
    for connection in joined.values():
        with connection, suppress(OSError):
            connection.settimeout(5)
            connection.sendall(ANSWER if not missing else b"no")
            connection.recv(1)  # until the other end is closed: the port is then free at once
    if missing:
        _say(f"host 0 of {count}", limit, f"{_hosts(missing)} not joined; giving up")
    return not missing


def _report(address: tuple[str, int], host: int, limit: float, every: float) -> bool:
    """Another host's part: greets host 0, again and again until host 0 answers."""
    began = said = time.monotonic()
    place_of_0 = f"{address[0]}:{address[1]}"
    while (now := time.monotonic()) - began < limit:
        if now - said >= every:
            said = now
            _say(f"host {host}", now - began, f"no answer from host 0 at {place_of_0}")
        with suppress(OSError), socket.create_connection(address, timeout=5) as connection:
            connection.sendall(f"{GREETING} {host}".encode())
            # Longer than host 0 waits: it must not count this host as missing when it gives up.
            connection.settimeout(limit + 10)
            answer = connection.recv(len(ANSWER))
            if answer:
                return answer == ANSWER
        time.sleep(0.2)
    _say(f"host {host}", limit, f"no answer from host 0 at {place_of_0}; giving up")
    return False


def _greeting(connection: socket.socket) -> int | None:
    """The number of the host that has connected; None if it is no host of a run."""
    with suppress(OSError, ValueError):
        connection.settimeout(5)
        greeting, number = connection.recv(LONGEST).decode().split()
        connection.settimeout(None)
        return int(number) if greeting == GREETING else None
    return None


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end has neither closed the connection nor broken it off."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _hosts(numbers: list[int]) -> str:
    """`host 3 has`, `hosts 3, 5 have`; of many, the first twenty."""
    text = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    return f"host {text} has" if len(numbers) == 1 else f"{len(numbers)} hosts ({text}) have"


def _say(who: str, seconds: float, what: str) -> None:
    print(f"{who}, after {seconds:.0f} s: {what}", file=sys.stderr, flush=True)
