"""Reports the message and the end of a run on two hosts when one of them fails.

    python benchmarks/faults_hosts.py                              # all faults
    python benchmarks/faults_hosts.py --faults stop-1 cut-link

Hardware: two CPU cores; about ten minutes. `cut-link` needs root on Linux: each host then has a
network namespace of its own. The run is run_pretrain.py on a little of the miniature's text.
Result: a table in Markdown. Seconds count from the fault or, where the run never begins, from the
start: to the message, and to the end of the last host that was not killed or stopped.

This file is also the program of each host: run_pretrain.py, with a point at which it can hang.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import tyro

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
HANG = "FAULTS_HOSTS_HANG"  # names a file whose presence makes a host hang, or ask for memory
ADDRESSES = ("10.77.19.1", "10.77.19.2")  # of the hosts in their namespaces
PATIENCE = 420  # seconds to wait for a message or an end
TRIES = 4  # to begin a run
NAMES = Path("/etc/netns")  # `ip netns exec` puts NAMES/NAMESPACE/hosts in place of /etc/hosts


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and the message to look for, in the output of the hosts."""

    what: str
    message: str
    start: tuple[int, ...] = (0, 1)  # hosts that are started
    flags: tuple[str, str] = ("", "")  # of each host
    break_it: Callable[["Pair"], None] | None = None  # once both hosts train
    gone: tuple[int, ...] = ()  # hosts that the fault kills or stops
    namespaces: bool = False


@dataclass(frozen=True)
class Config:
    """Break one of two hosts."""

    faults: tuple[str, ...] = ()
    """Names of the faults to try. [All]"""
    out: Path = Path("runs/faults-hosts")
    """Directory of runs and logs; it is deleted first."""
    at_once: int = 2
    """Number of faults that are tried at the same time."""


@dataclass
class Pair:
    """Two processes of run_pretrain.py."""

    out: Path
    namespaces: bool
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def hang(self) -> Path:
        return self.out / "hang"

    def log(self, host: int) -> Path:
        return self.out / f"{host}.log"

    def start(self, host: int, port: int, flags: str) -> None:
        address = ADDRESSES[0] if self.namespaces else "localhost"
        enter = ["ip", "netns", "exec", namespace(host)] if self.namespaces else []
        command = [
            *enter,
            sys.executable,
            __file__,
            "--out",
            f"{self.out}/run",
            "--steps",
            "100000",
        ]
        command += ["--eval_every", "100000", "--batch_size", "4", "--length", "32"]
        command += ["--data.cache", "None", *flags.split()]
        env = {
            **os.environ,
            **{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": "1"},
            **{"JAX_COORDINATOR_ADDRESS": f"{address}:{port}", "JAX_NUM_PROCESSES": "2"},
            **{"JAX_PROCESS_ID": str(host), HANG: str(self.hang)},
        }
        with self.log(host).open("w") as log:
            self.processes[host] = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    def steps(self) -> int:
        file = self.out / "run" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def fail(self, how: str) -> None:
        self.hang.write_text(how)

    def send(self, host: int, number: signal.Signals) -> None:
        self.processes[host].send_signal(number)


FAULTS = {
    "flag-learning-rate": Fault(
        "--learning_rate differs", "--learning_rate is", flags=("", "--learning_rate 0.1")
    ),
    "flag-mesh": Fault("--mesh differs", "--mesh is", flags=("", "--mesh data=2")),
    "flag-save-every": Fault(
        "--save_every differs", "--save_every is", flags=("", "--save_every 7")
    ),
    "missing-1": Fault("host 1 is not started", "host 1 has not joined", start=(0,)),
    "missing-0": Fault("host 0 is not started", "no answer from host 0", start=(1,)),
    "kill-1": Fault(
        "SIGKILL to host 1",
        r"host 1 \(.*\) has been silent",
        break_it=lambda pair: pair.send(1, signal.SIGKILL),
        gone=(1,),
    ),
    "kill-0": Fault(
        "SIGKILL to host 0",
        "JAX distributed service detected fatal errors",
        break_it=lambda pair: pair.send(0, signal.SIGKILL),
        gone=(0,),
    ),
    "stop-1": Fault(
        "SIGSTOP to host 1",
        r"host 1 \(.*\) has been silent",
        break_it=lambda pair: pair.send(1, signal.SIGSTOP),
        gone=(1,),
    ),
    "stop-0": Fault(
        "SIGSTOP to host 0",
        r"host 0 \(.*\) has been silent",
        break_it=lambda pair: pair.send(0, signal.SIGSTOP),
        gone=(0,),
    ),
    "cut-link": Fault(
        "the link is cut",
        r"has been silent",
        break_it=lambda pair: command("ip", "-n", namespace(1), "link", "set", "eth1", "down"),
        namespaces=True,
    ),
    "hang": Fault(
        "host 1 hangs in Python, --stall 1.5",
        "no progress for",
        flags=("--stall 1.5", "--stall 1.5"),
        break_it=lambda pair: pair.fail("wait"),
    ),
    "memory": Fault(
        "host 1 has no memory left",
        "out of memory",
        break_it=lambda pair: pair.fail("memory"),
    ),
}


def command(*words: str) -> None:
    subprocess.run(words, check=True)


def namespace(host: int) -> str:
    return f"faults-hosts-{os.getpid()}-{host}"


@contextmanager
def network(wanted: bool) -> Iterator[None]:
    """Two network namespaces that are joined by a cable, if they are wanted."""
    if not wanted:
        yield
        return
    made = []
    try:
        for host in (0, 1):
            command("ip", "netns", "add", namespace(host))
            made.append(host)
            (NAMES / namespace(host)).mkdir(parents=True)
            # Gloo listens at the address of the host's name.
            names = f"127.0.0.1 localhost\n{ADDRESSES[host]} {socket.gethostname()}\n"
            (NAMES / namespace(host) / "hosts").write_text(names)
            command("ip", "-n", namespace(host), "link", "set", "lo", "up")
        ends = ["eth0", "netns", namespace(0), "type", "veth", "peer", "eth1", "netns"]
        command("ip", "link", "add", *ends, namespace(1))
        for host, address in enumerate(ADDRESSES):
            device = f"eth{host}"
            command("ip", "-n", namespace(host), "addr", "add", f"{address}/24", "dev", device)
            command("ip", "-n", namespace(host), "link", "set", device, "up")
        yield
    finally:
        for host in made:
            command("ip", "netns", "del", namespace(host))
            shutil.rmtree(NAMES / namespace(host))


def row_of(name: str, out: Path) -> str:
    """Tries a fault; returns a row of the table.

    Two processes on a busy machine may compile at different speeds, and Gloo, which joins the CPUs,
    gives up after 30 s. Then the run never began, and the fault is tried again.
    """
    for number in range(TRIES):
        with suppress(NoStepsError):
            return attempt(FAULTS[name], out / f"{name}-{number}")
    return f"| {FAULTS[name].what} | the run did not begin | | | |"


def attempt(fault: Fault, folder: Path) -> str:
    folder.mkdir()
    pair, port = Pair(folder, fault.namespaces), free_port()
    with network(fault.namespaces):
        try:
            for host in fault.start:
                pair.start(host, port, fault.flags[host])
            if fault.break_it is not None:
                wait_for_steps(pair)
                fault.break_it(pair)
            return row(fault, pair)
        finally:
            for process in pair.processes.values():
                process.kill()
                process.wait()


def row(fault: Fault, pair: Pair) -> str:
    began, said, message = time.monotonic(), 0.0, ""
    waiting = [host for host in fault.start if host not in fault.gone]
    while any(pair.processes[host].poll() is None for host in waiting) or not message:
        text = "" if message else "".join(pair.log(host).read_text() for host in waiting)
        if found := re.search(f".*{fault.message}.*", text):
            said, message = time.monotonic() - began, found.group()
        if time.monotonic() - began > PATIENCE:
            break
        time.sleep(0.05)
    ended = time.monotonic() - began
    codes = [str(code_of(pair.processes[host])) for host in waiting]
    return f"| {fault.what} | {said:.0f} | {ended:.0f} | {', '.join(codes)} | `{message[:200]}` |"


def code_of(process: subprocess.Popen[bytes]) -> int | None:
    code = process.poll()
    return code if code is None or code >= 0 else 128 - code  # as a shell tells it


def wait_for_steps(pair: Pair) -> None:
    deadline = time.monotonic() + PATIENCE
    while pair.steps() < 3:
        ended = [process.poll() for process in pair.processes.values()] != [None, None]
        if ended or time.monotonic() > deadline:
            raise NoStepsError
        time.sleep(0.05)


class NoStepsError(Exception):
    """The run did not begin."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def main(config: Config) -> None:
    shutil.rmtree(config.out, ignore_errors=True)
    config.out.mkdir(parents=True)
    names = config.faults or tuple(FAULTS)
    print("| fault | seconds to the message | to the end | exit codes | message |")
    print("|---|---|---|---|---|")
    with ThreadPoolExecutor(config.at_once) as pool:
        for line in pool.map(lambda name: row_of(name, config.out.resolve()), names):
            print(line, flush=True)


def host() -> None:
    """run_pretrain.py. Host 1 hangs or asks for memory once the file is there."""
    sys.path.insert(0, str(EXPERIMENTS))
    import jax
    import jax.numpy as jnp
    import run_pretrain

    from instructjax import run
    from instructjax.data import sources

    sources.MINIATURE = {**sources.MINIATURE, "text": 400}  # read in a second
    log, file = run.Run.log, Path(os.environ[HANG])

    def log_or_fail(self: run.Run, *args, **keywords) -> None:
        if jax.process_index() == 1 and file.exists():
            if file.read_text() == "memory":
                jnp.zeros(2**50).block_until_ready()
            threading.Event().wait()
        log(self, *args, **keywords)

    with mock.patch.object(run.Run, "log", log_or_fail):
        run.main(run_pretrain.cli)


if __name__ == "__main__":
    if HANG in os.environ:
        host()
    else:
        main(tyro.cli(Config, description=__doc__, use_underscores=True))
