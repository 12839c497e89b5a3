"""Disturbs runs of the miniature for hours, and compares each with an undisturbed one, bit for bit.

    python benchmarks/soak.py --hours 1
    python benchmarks/soak.py --hours 0 --memory_minutes 60     # watches the memory of one run

A supervisor starts run_ppo.py on two hosts, again and again, with --resume. At random moments it
causes one of these faults:

    kill    SIGKILL to one host
    stop    SIGSTOP to one host, and SIGCONT some seconds later
    term    SIGTERM to one host; the run saves and ends on both
    link    the link between the hosts is cut, and restored some seconds later
    disk    the file system of the run is filled up once this start has saved a checkpoint,
            until the run ends with an error
    flip    SIGKILL to both, and one bit of the newest checkpoint is flipped
    cache   SIGKILL to both, and the compiled programs and token files are removed

Each fault allows some exit codes, see ALLOWED, and any other ends the test. Once a host has ended,
the other must end by itself within a minute. If a host ended before both had joined, the other
waits for it, and the supervisor ends the other. When the run has finished, its parameters,
optimizers, metrics.jsonl and samples.jsonl must equal those of an undisturbed run. Then another
round begins, until the hours are over.

Hardware: two CPU cores, Linux. `disk` needs the right to mount a tmpfs, and `link` that to make
network namespaces; without the right these faults are left out.
Needs runs/sft and runs/rm: run experiments/run_ppo.py once before.
Result: a table of the faults by kind, OUT/soak.jsonl with a line for each start that ended and for
each round, exit code 0 if all rounds were equal.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import tyro
from faults_hosts import ADDRESSES, free_port, namespace, network
from kill_and_resume import EXPERIMENTS, same_lines, same_parameters
from rich.table import Table

from instructjax import ranges
from instructjax.ranges import Count, NotNegative, Positive, Seed
from instructjax.run import FAILED, FINISHED, RESUMABLE

# Small batches and evaluations: a start takes less time, and a fault meets more saves.
FLAGS = "--save_every 2 --batch_size 64 --sample_batch 64 --eval_prompts 64 --final_prompts 64"
FILE_SYSTEM = 2**28  # bytes of the tmpfs that `disk` fills
GRACE = 60  # seconds in which a host ends by itself after the other has
STUCK = 3600  # seconds in which some host ends where nothing is broken any more
NEW_CHECKPOINT = 180  # seconds for which `disk` waits for one
JOINED = b"preset miniature:"  # a script prints this once its hosts have compared their flags

# Exit codes that a fault allows. jax aborts a host whose other is silent, stopped or cut off for
# too long. Gloo gives up a collective after 30 s, which is an error of both hosts.
ABORTED = -signal.SIGABRT
ALLOWED = {
    "kill": {-signal.SIGKILL, ABORTED},
    "stop": {ABORTED, FAILED},
    "term": {RESUMABLE, -signal.SIGTERM},  # SIGTERM itself: before Python heeds signals
    "link": {ABORTED, FAILED},
    "disk": {FAILED},
    "flip": {-signal.SIGKILL},
    "cache": {-signal.SIGKILL},
}


@dataclass(frozen=True)
class Config:
    """A soak test."""

    out: Path = Path("runs/soak")
    """Directory of the runs; it is deleted first."""
    hours: NotNegative = 1.0
    """Hours of disturbance. The last round is finished undisturbed."""
    memory_minutes: NotNegative = 0.0
    """Minutes for which an undisturbed run's memory is watched afterwards, on one host."""
    steps: Count = 30
    """Number of updates of each run."""
    pause: Positive = 20.0
    """Seconds between two faults, on average. A start takes about twenty."""
    seed: Seed = 0
    """Seed of the faults and of their moments."""

    def __post_init__(self) -> None:
        ranges.check(self)


class Supervised:
    """run_ppo.py in a directory, started again and again.

    Args:
      hosts: number of processes.
      separate: each process is in a network namespace of its own.
    """

    def __init__(self, out: Path, steps: int, hosts: int, separate: bool = False):
        self.out, self._steps, self._hosts, self._separate = out, steps, hosts, separate
        self.log = out.parent / f"{out.name}.log"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._log_began = 0  # bytes of the log when the run was started
        self._newest = 0  # the newest checkpoint then

    def start(self, *flags: str) -> None:
        words = ["--out", f"{self.out}", "--steps", f"{self._steps}", *FLAGS.split()]
        words += ["--data.cache", f"{self.out.parent / 'tokens'}", *flags, "--resume"]
        env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{self.out.parent / 'compiled'}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "PYTHONUNBUFFERED": "1",
        }
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        self._newest = max(self.checkpoints(), default=0)
        address = f"{ADDRESSES[0] if self._separate else 'localhost'}:{free_port()}"
        self.processes = []
        for host in range(self._hosts):
            joined = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": f"{self._hosts}",
                "JAX_PROCESS_ID": f"{host}",
            }
            enter = ["ip", "netns", "exec", namespace(host)] if self._separate else []
            with self.log.open("ab") as log:
                process = subprocess.Popen(
                    [*enter, sys.executable, f"{EXPERIMENTS / 'run_ppo.py'}", *words],
                    stdout=log,
                    stderr=log,
                    env=env | joined if self._hosts > 1 else env,
                )
            self.processes.append(process)

    def codes(self) -> list[int | None]:
        """The exit code of each host, None while it runs."""
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float) -> bool:
        """Waits until all hosts have ended, or for some seconds; returns whether they have."""
        end = time.monotonic() + seconds
        while None in self.codes():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def wait_for_one(self, seconds: float) -> bool:
        """Waits until a host has ended, or for some seconds; returns whether one has."""
        end = time.monotonic() + seconds
        while {*self.codes()} == {None}:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    @property
    def joined(self) -> bool:
        """Whether the hosts of this start have found one another."""
        with self.log.open("rb") as log:
            log.seek(self._log_began)
            return JOINED in log.read()

    @property
    def has_saved(self) -> bool:
        """Whether there is a checkpoint that was not there at this start."""
        return max(self.checkpoints(), default=0) > self._newest

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        names = [path.name for path in (self.out / "checkpoints").glob("[0-9]*")]
        return sorted(int(name) for name in names if name.isdecimal())


# ---------------------------------------------------------------------------- faults


def kill(run: Supervised, chance: random.Random) -> str:
    host = chance.randrange(len(run.processes))
    run.processes[host].kill()
    run.processes[host].wait()
    return f"host {host}"


def stop(run: Supervised, chance: random.Random) -> str:
    host, seconds = chance.randrange(len(run.processes)), chance.uniform(1, 20)
    run.processes[host].send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    run.processes[host].send_signal(signal.SIGCONT)
    return f"host {host}, {seconds:.0f} s"


def term(run: Supervised, chance: random.Random) -> str:
    host = chance.randrange(len(run.processes))
    run.processes[host].send_signal(signal.SIGTERM)
    if not run.wait_for_one(300):  # the current step is finished, or the first one
        raise RuntimeError(f"no host ended in 300 s after SIGTERM to host {host}; see {run.log}")
    return f"host {host}"


def link(run: Supervised, chance: random.Random) -> str:
    seconds = chance.uniform(1, 20)
    set_link = ["ip", "-n", namespace(1), "link", "set", "eth1"]
    subprocess.run([*set_link, "down"], check=True)
    time.sleep(seconds)
    subprocess.run([*set_link, "up"], check=True)
    return f"{seconds:.0f} s"


def disk(run: Supervised, chance: random.Random) -> str:
    end = time.monotonic() + NEW_CHECKPOINT
    while not run.has_saved and time.monotonic() < end:
        if run.wait_for_one(0.1):
            return "a host had ended before"
    what = "mid-run" if run.has_saved else "at the start"
    filler, end = run.out / "filler", time.monotonic() + 600
    try:
        with filler.open("wb", buffering=0) as file:
            while not run.wait_for_one(0.1):  # again and again: old checkpoints are removed
                if time.monotonic() > end:
                    raise RuntimeError(f"no host ended in 600 s on a full disk; see {run.log}")
                with suppress(OSError):
                    while True:
                        file.write(bytes(2**16))
    finally:
        run.wait(GRACE)  # the other host meets the full disk too
        filler.unlink()
    return what


def flip(run: Supervised, chance: random.Random) -> str:
    run.kill()
    steps = run.checkpoints()
    if len(steps) < 2:
        return "no checkpoint to flip yet"
    newest = run.out / "checkpoints" / f"{steps[-1]}"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [path for path in files if path.name != "commit_success.txt"]
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{file.relative_to(run.out)}"


def cache(run: Supervised, chance: random.Random) -> str:
    run.kill()
    for name in ("compiled", "tokens"):
        shutil.rmtree(run.out.parent / name, ignore_errors=True)
    return ""


@contextmanager
def small_file_system(directory: Path) -> Iterator[bool]:
    """Mounts a tmpfs, so that a full disk harms nothing else; yields whether that was allowed."""
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM}", "soak", f"{directory}"]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", f"{directory}"], check=False)


# ---------------------------------------------------------------------------- rounds


def wrong_end(faults: Sequence[str], codes: Sequence[int | None], joined: bool) -> str | None:
    """What is wrong with the end of a start, if anything is.

    Args:
      faults: the names of the faults that hit this start.
      codes: the exit code of each host; None: it still ran GRACE seconds after the other.
      joined: whether the hosts had found one another.
    """
    allowed: set[int | None] = {FINISHED, None}.union(*(ALLOWED[name] for name in faults))
    if -signal.SIGTERM in codes:
        allowed.add(ABORTED)  # the other host, if they had just joined
    after = ", ".join(faults) or "no fault"
    if not {*codes} <= allowed:
        return f"exit codes {[*codes]} after {after}"
    # Before they have joined, a host waits for the other for five minutes: it may be started again.
    if None in codes and (joined or not faults):
        hosts = [host for host, code in enumerate(codes) if code is None]
        return f"host {hosts[0]} still ran {GRACE} s after the other's {[*codes]}, after {after}"
    return None


def disturb(
    c: Config, run: Supervised, chance: random.Random, faults: dict[str, Any], end: float
) -> Iterator[dict[str, Any]]:
    """Takes a run to its end. Yields each start's faults, exit codes and newest checkpoint.

    Raises:
      RuntimeError: a host ended with a code that no fault explains, or did not end.
    """
    codes: list[int | None] = []
    while {*codes} != {FINISHED}:
        run.start()
        since_start: list[dict[str, Any]] = []
        while {*run.codes()} == {None}:
            over = time.monotonic() > end
            if run.wait_for_one(STUCK if over else chance.expovariate(1 / c.pause)):
                break
            if over:
                raise RuntimeError(f"no host ended in {STUCK} s; see {run.log}")
            name, began = chance.choice(sorted(faults)), time.monotonic()
            fault = {"fault": name, "what": faults[name](run, chance)}
            since_start.append(fault | {"seconds": round(time.monotonic() - began, 1)})
        run.wait(GRACE)
        codes, joined = run.codes(), run.joined
        if why := wrong_end([fault["fault"] for fault in since_start], codes, joined):
            raise RuntimeError(f"{why}; see {run.log}")
        run.kill()
        newest = max(run.checkpoints(), default=None)
        yield {"faults": since_start, "exit codes": codes, "joined": joined, "checkpoint": newest}


def same(alone: Path, disturbed: Path, step: int) -> dict[str, bool]:
    return {
        "parameters and optimizers": same_parameters(alone, disturbed, step),
        "metrics.jsonl": same_lines(alone / "metrics.jsonl", disturbed / "metrics.jsonl"),
        "samples.jsonl": same_lines(alone / "samples.jsonl", disturbed / "samples.jsonl"),
    }


def soak(c: Config, separate: bool) -> bool:
    """Disturbs runs for hours. Returns whether each was equal to the undisturbed one."""
    chance, equal_rounds, rounds = random.Random(c.seed), 0, 0
    starts: list[dict[str, Any]] = []
    faults: dict[str, Any] = {"kill": kill, "stop": stop, "term": term, "flip": flip}
    faults |= {"cache": cache} | ({"link": link} if separate else {})
    alone = Supervised(c.out / "alone", c.steps, 2, separate)
    alone.start()
    alone.wait(STUCK)
    codes = alone.codes()
    alone.kill()
    if {*codes} != {FINISHED}:
        sys.exit(f"error: the undisturbed run failed; see {alone.log}")
    end = time.monotonic() + 3600 * c.hours
    while time.monotonic() < end:
        rounds += 1
        with small_file_system(c.out / f"round-{rounds}") as mounted:
            run = Supervised(c.out / f"round-{rounds}", c.steps, 2, separate)
            chosen = faults | ({"disk": disk} if mounted else {})
            try:
                for start in disturb(c, run, chance, chosen, end):
                    starts.append(start)
                    with (c.out / "soak.jsonl").open("a") as log:
                        print(json.dumps({"round": rounds, **start}), file=log)
            finally:
                run.kill()
            equal = same(alone.out, run.out, c.steps)
        equal_rounds += all(equal.values())
        print(f"round {rounds}: {len(starts)} starts so far, {equal}", flush=True)
        with (c.out / "soak.jsonl").open("a") as log:
            print(json.dumps({"round": rounds, **equal}), file=log)
    title = f"{rounds} rounds of {c.steps} updates, {equal_rounds} equal bit for bit"
    rich.print(table_of(starts, title))
    return equal_rounds == rounds


def table_of(starts: Sequence[dict[str, Any]], title: str) -> Table:
    """A row for each set of faults that hit one start, with the ends of these starts."""
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for start in starts:
        names = sorted({fault["fault"] for fault in start["faults"]})
        codes = ("waits" if code is None else f"{code}" for code in start["exit codes"])
        ends[", ".join(names) or "none"][" ".join(codes)] += 1
    table = Table("faults of a start", "starts", "exit codes of the hosts", title=title)
    for names, codes in sorted(ends.items()):
        table.add_row(names, f"{codes.total()}", said(codes))
    faults = Counter(fault["fault"] for start in starts for fault in start["faults"])
    table.caption = f"{faults.total()} faults: {said(faults)}"
    return table


def said(counts: Counter[str]) -> str:
    return "; ".join(f"{count} x {what}" for what, count in counts.most_common())


def resident(pid: int) -> int:
    """Bytes of a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch_memory(c: Config) -> tuple[float, float]:
    """(the peak of the first sixth, the peak of the last) of an undisturbed run's memory, in GB.

    A sixth of an hour is ten minutes. OUT/memory.json has the memory of each second.
    """
    run = Supervised(c.out / "memory", 1_000_000, 1)
    run.start("--save_every", "100")
    end = time.monotonic() + 60 * c.memory_minutes
    sizes = []
    while time.monotonic() < end:
        time.sleep(1)
        if run.codes() != [None]:
            raise RuntimeError(f"exit codes {run.codes()}; see {run.log}")
        sizes.append(resident(run.processes[0].pid) / 1e9)
    run.kill()
    (c.out / "memory.json").write_text(json.dumps(sizes) + "\n")
    sixth = max(1, len(sizes) // 6)
    return max(sizes[:sixth]), max(sizes[-sixth:])


def main(c: Config) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was mounted goes
    shutil.rmtree(c.out, ignore_errors=True)
    c.out.mkdir(parents=True)
    good = True
    if c.hours:
        with ExitStack() as stack:
            try:
                stack.enter_context(network(True))
                separate = True
            except (OSError, subprocess.CalledProcessError):
                separate = False
            good = soak(c, separate)
    if c.memory_minutes:
        first, last = watch_memory(c)
        good &= last <= 1.01 * first
        print(f"memory: {first:.3f} GB in the first sixth, {last:.3f} GB in the last")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
