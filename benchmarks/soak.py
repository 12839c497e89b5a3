"""Disturbs runs of the miniature for hours, and compares each with an undisturbed one, bit for bit.

    python benchmarks/soak.py --hours 1
    python benchmarks/soak.py --hours 0 --memory_minutes 60     # watches the memory of one run

A supervisor starts run_ppo.py on two hosts, again and again, with --resume. At random moments it
does one of:

    kill    SIGKILL to one host
    stop    SIGSTOP to one host, and SIGCONT some seconds later
    term    SIGTERM to one host; the run saves and ends on both
    link    the link between the hosts is cut, and mended some seconds later
    disk    the file system of the run is filled up, until the run ends with an error
    flip    SIGKILL to both, and one bit of the newest checkpoint is flipped
    cache   SIGKILL to both, and the compiled programs and token files are removed

A host must then end by itself within a minute of the other. When the run has finished, its
parameters, optimizers, metrics.jsonl and samples.jsonl must equal those of an undisturbed run.
Then another round begins, until the hours are over.

Hardware: two CPU cores, Linux. `disk` needs the right to mount a tmpfs, and `link` that to make
network namespaces; without the right these faults are left out.
Needs runs/sft and runs/rm: run experiments/run_ppo.py once before.
Result: a table of the faults by kind, OUT/soak.jsonl with a line for each, exit code 0 if all
rounds were equal.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

    def start(self, *flags: str) -> None:
        words = ["--out", f"{self.out}", "--steps", f"{self._steps}", *FLAGS.split()]
        words += ["--data.cache", f"{self.out.parent / 'tokens'}", *flags, "--resume"]
        env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{self.out.parent / 'compiled'}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
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

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until all hosts have ended, or for some seconds; returns whether they have."""
        end = None if seconds is None else time.monotonic() + seconds
        while None in self.codes():
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

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
    end = time.monotonic() + 300
    # Before Python heeds signals, SIGTERM ends a host at once, and the other waits for it to join.
    while -signal.SIGTERM not in run.codes() and not run.wait(1):
        if time.monotonic() > end:
            break
    codes = run.codes()
    if -signal.SIGTERM not in codes and not {*codes} <= {RESUMABLE, FINISHED}:
        raise RuntimeError(f"exit codes {codes} after SIGTERM; see {run.log}")
    return f"host {host}"


def link(run: Supervised, chance: random.Random) -> str:
    seconds = chance.uniform(1, 20)
    set_link = ["ip", "-n", namespace(1), "link", "set", "eth1"]
    subprocess.run([*set_link, "down"], check=True)
    time.sleep(seconds)
    subprocess.run([*set_link, "up"], check=True)
    return f"{seconds:.0f} s"


def disk(run: Supervised, chance: random.Random) -> str:
    filler = run.out / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            pass
    ended = run.wait(600)
    filler.unlink()
    if not ended or not {FAILED, FINISHED} & {*run.codes()}:
        raise RuntimeError(f"exit codes {run.codes()} with a full disk; see {run.log}")
    return ""


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


def disturb(
    c: Config, run: Supervised, chance: random.Random, faults: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """Takes a run to its end. Returns the faults on the way.

    Raises:
      RuntimeError: the run ended with a code that no fault explains.
    """
    done: list[dict[str, Any]] = []
    run.start()
    since_start: list[dict[str, Any]] = []
    while True:
        over = time.monotonic() > end
        if run.wait(None if over else chance.expovariate(1 / c.pause)):
            if not since_start and {*run.codes()} != {FINISHED}:
                raise RuntimeError(f"exit codes {run.codes()} without a fault; see {run.log}")
        else:
            name, began = chance.choice(sorted(faults)), time.monotonic()
            fault = {"fault": name, "what": faults[name](run, chance)}
            done.append(fault)
            since_start.append(fault)
            fault["seconds"] = round(time.monotonic() - began, 1)
            fault["checkpoint"] = max(run.checkpoints(), default=None)
        if {*run.codes()} == {None}:  # the fault was short
            continue
        if not run.wait(GRACE):
            since_start[-1]["hangs"] = run.codes().index(None)
            run.kill()
        if since_start:
            since_start[-1]["exit codes"] = run.codes()
        if {*run.codes()} == {FINISHED}:
            return done
        run.start()
        since_start = []


def same(alone: Path, disturbed: Path, step: int) -> dict[str, bool]:
    return {
        "parameters and optimizers": same_parameters(alone, disturbed, step),
        "metrics.jsonl": same_lines(alone / "metrics.jsonl", disturbed / "metrics.jsonl"),
        "samples.jsonl": same_lines(alone / "samples.jsonl", disturbed / "samples.jsonl"),
    }


def soak(c: Config, separate: bool) -> bool:
    """Disturbs runs for hours. Returns whether each was equal to the undisturbed one."""
    chance, done, equal_rounds, rounds = random.Random(c.seed), [], 0, 0
    faults: dict[str, Any] = {"kill": kill, "stop": stop, "term": term, "flip": flip}
    faults |= {"cache": cache} | ({"link": link} if separate else {})
    alone = Supervised(c.out / "alone", c.steps, 2, separate)
    alone.start()
    alone.wait()
    if {*alone.codes()} != {FINISHED}:
        sys.exit(f"error: the undisturbed run failed; see {alone.log}")
    end = time.monotonic() + 3600 * c.hours
    while time.monotonic() < end:
        rounds += 1
        with small_file_system(c.out / f"round-{rounds}") as mounted:
            run = Supervised(c.out / f"round-{rounds}", c.steps, 2, separate)
            chosen = faults | ({"disk": disk} if mounted else {})
            try:
                faults_of_run = disturb(c, run, chance, chosen, end)
            finally:
                run.kill()
            equal = same(alone.out, run.out, c.steps)
        equal_rounds += all(equal.values())
        done += faults_of_run
        print(f"round {rounds}: {len(faults_of_run)} faults, {equal}", flush=True)
        with (c.out / "soak.jsonl").open("a") as log:
            log.writelines(json.dumps({"round": rounds, **x}) + "\n" for x in faults_of_run)
            log.write(json.dumps({"round": rounds, **equal}) + "\n")
    title = f"{rounds} rounds of {c.steps} updates, {equal_rounds} equal bit for bit"
    table = Table("fault", "times", "the run ended", "a host did not within a minute", title=title)
    for name in sorted(faults | {"disk": disk}):
        of_name = [fault for fault in done if fault["fault"] == name]
        ended = sum("exit codes" in fault for fault in of_name)
        table.add_row(name, *map(str, (len(of_name), ended, sum("hangs" in x for x in of_name))))
    rich.print(table)
    return equal_rounds == rounds


def resident(pid: int) -> int:
    """Bytes of a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch_memory(c: Config) -> tuple[float, float]:
    """(the peak of the first sixth, the peak of the last) of an undisturbed run's memory, in GB.

    A sixth of an hour is ten minutes. OUT/memory.json has the memory of each second.
    """
    run = Supervised(c.out / "memory", 1_000_000, 1)
    run.start("--save_every", "50")
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
