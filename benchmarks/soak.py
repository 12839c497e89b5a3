"""Disturbs runs of the miniature for hours, and compares each with an undisturbed one, bit for bit.

    python benchmarks/soak.py --hours 1
    python benchmarks/soak.py --hours 0 --memory_minutes 60     # watches the memory of one run

A supervisor starts run_ppo.py again and again with --resume. At random moments it does one of:

    kill    SIGKILL
    stop    SIGSTOP, and SIGCONT some seconds later
    term    SIGTERM, after which the run saves and ends
    disk    the file system of the run is filled up, until the run ends with an error
    flip    SIGKILL, and one bit of the newest checkpoint is flipped
    cache   SIGKILL, and the compiled programs and token files are removed

When the run has finished, its parameters, optimizers, metrics.jsonl and samples.jsonl must equal
those of an undisturbed run. Then another round begins, until the hours are over.

Hardware: two CPU cores, Linux. `disk` needs the right to mount a tmpfs; without it that fault is
left out.
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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import tyro
from kill_and_resume import EXPERIMENTS, same_lines, same_parameters
from rich.table import Table

from instructjax import ranges
from instructjax.ranges import Count, NotNegative, Positive, Seed
from instructjax.run import FAILED, FINISHED, RESUMABLE

FILE_SYSTEM = 2**28  # bytes of the tmpfs that `disk` fills


@dataclass(frozen=True)
class Config:
    """A soak test."""

    out: Path = Path("runs/soak")
    """Directory of the runs; it is deleted first."""
    hours: NotNegative = 1.0
    """Hours of disturbance. The last round is finished undisturbed."""
    memory_minutes: NotNegative = 0.0
    """Minutes for which an undisturbed run's memory is watched afterwards."""
    steps: Count = 30
    """Number of updates of each run."""
    pause: Positive = 12.0
    """Seconds between two faults, on average. A start takes about ten."""
    seed: Seed = 0
    """Seed of the faults and of their moments."""

    def __post_init__(self) -> None:
        ranges.check(self)


class Supervised:
    """run_ppo.py in a directory, started again and again."""

    def __init__(self, c: Config, out: Path):
        self.out, self._config = out, c
        self.log = c.out / f"{out.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> subprocess.Popen[bytes]:
        words = ["--out", str(self.out), "--steps", str(self._config.steps), "--save_every", "2"]
        words += ["--data.cache", str(self.out.parent / "tokens"), *flags, "--resume"]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.out.parent / "compiled")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(EXPERIMENTS / "run_ppo.py"), *words],
                stdout=log,
                stderr=log,
                env=os.environ | cache,
            )
        return self.process

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        names = [path.name for path in (self.out / "checkpoints").glob("[0-9]*")]
        return sorted(int(name) for name in names if name.isdecimal())


# ---------------------------------------------------------------------------- faults


def kill(run: Supervised, chance: random.Random) -> str:
    assert run.process is not None
    run.process.kill()
    run.process.wait()
    return ""


def stop(run: Supervised, chance: random.Random) -> str:
    assert run.process is not None
    seconds = chance.uniform(1, 10)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    run.process.send_signal(signal.SIGCONT)
    return f"{seconds:.0f} s"


def term(run: Supervised, chance: random.Random) -> str:
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(300)
    if code not in (RESUMABLE, FINISHED, -signal.SIGTERM):  # the last: before Python has begun
        raise RuntimeError(f"exit code {code} after SIGTERM")
    return f"exit code {code}"


def disk(run: Supervised, chance: random.Random) -> str:
    assert run.process is not None
    filler = run.out / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            pass
    code = run.process.wait(600)
    filler.unlink()
    if code not in (FAILED, FINISHED):
        raise RuntimeError(f"exit code {code} with a full disk")
    return f"exit code {code}"


def flip(run: Supervised, chance: random.Random) -> str:
    kill(run, chance)
    steps = run.steps()
    if len(steps) < 2:
        return "nothing to flip yet"
    newest = run.out / "checkpoints" / str(steps[-1])
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    files = [path for path in files if path.name != "commit_success.txt"]
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return str(file.relative_to(run.out))


def cache(run: Supervised, chance: random.Random) -> str:
    kill(run, chance)
    for name in ("compiled", "tokens"):
        shutil.rmtree(run.out.parent / name, ignore_errors=True)
    return ""


@contextmanager
def small_file_system(directory: Path) -> Iterator[bool]:
    """Mounts a tmpfs, so that a full disk harms nothing else; yields whether that was allowed."""
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM}", "soak", str(directory)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=False)


# ---------------------------------------------------------------------------- rounds


def disturb(
    c: Config, run: Supervised, chance: random.Random, faults: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """Takes a run to its end. Returns the faults on the way.

    Raises:
      RuntimeError: the run ended with a code that no fault explains.
    """
    done: list[dict[str, Any]] = []
    process = run.start()
    while True:
        try:
            over = time.monotonic() > end
            code = process.wait(None if over else chance.expovariate(1 / c.pause))
        except subprocess.TimeoutExpired:
            name = chance.choice(sorted(faults))
            began = time.monotonic()
            said = faults[name](run, chance)
            steps = run.steps()
            done.append({"fault": name, "said": said, "checkpoint": steps[-1] if steps else None})
            done[-1]["seconds"] = round(time.monotonic() - began, 1)
            if process.poll() is not None and process.returncode != FINISHED:
                process = run.start()
            continue
        if code == FINISHED:
            return done
        raise RuntimeError(f"exit code {code} without a fault; see {run.log}")


def same(alone: Path, disturbed: Path, step: int) -> dict[str, bool]:
    return {
        "parameters and optimizers": same_parameters(alone, disturbed, step),
        "metrics.jsonl": same_lines(alone / "metrics.jsonl", disturbed / "metrics.jsonl"),
        "samples.jsonl": same_lines(alone / "samples.jsonl", disturbed / "samples.jsonl"),
    }


def resident(pid: int) -> int:
    """Bytes of a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch_memory(c: Config) -> tuple[float, float]:
    """(the peak of the first sixth, the peak of the last) of an undisturbed run's memory, in GB.

    A sixth of an hour is ten minutes.
    """
    run = Supervised(c, c.out / "memory")
    process = run.start("--steps", "1000000", "--save_every", "50")
    end = time.monotonic() + 60 * c.memory_minutes
    sizes = []
    while time.monotonic() < end:
        time.sleep(1)
        if process.poll() is not None:
            raise RuntimeError(f"exit code {process.returncode}; see {run.log}")
        sizes.append(resident(process.pid) / 1e9)
    process.kill()
    process.wait()
    sixth = max(1, len(sizes) // 6)
    return max(sizes[:sixth]), max(sizes[-sixth:])


def main(c: Config) -> None:
    shutil.rmtree(c.out, ignore_errors=True)
    c.out.mkdir(parents=True)
    chance, counts, wrong, rounds = random.Random(c.seed), Counter[str](), 0, 0
    faults: dict[str, Any] = {"kill": kill, "stop": stop, "term": term, "flip": flip}
    faults |= {"cache": cache}
    if c.hours:
        alone = Supervised(c, c.out / "alone")
        if alone.start().wait():
            sys.exit(f"error: the undisturbed run failed; see {alone.log}")
    end = time.monotonic() + 3600 * c.hours
    while time.monotonic() < end:
        rounds += 1
        with small_file_system(c.out / f"round-{rounds}") as mounted:
            run = Supervised(c, c.out / f"round-{rounds}")
            chosen = faults | ({"disk": disk} if mounted else {})
            done = disturb(c, run, chance, chosen, end)
            equal = same(c.out / "alone", run.out, c.steps)
        counts.update(fault["fault"] for fault in done)
        wrong += not all(equal.values())
        print(f"round {rounds}: {len(done)} faults, {equal}", flush=True)
        with (c.out / "soak.jsonl").open("a") as log:
            log.writelines(json.dumps({"round": rounds, **fault}) + "\n" for fault in done)
            log.write(json.dumps({"round": rounds, **equal}) + "\n")
    table = Table("fault", "times", title=f"{rounds} rounds, {rounds - wrong} equal bit for bit")
    for name, count in sorted(counts.items()):
        table.add_row(name, f"{count}")
    if c.hours:
        rich.print(table)
    grew = False
    if c.memory_minutes:
        first, last = watch_memory(c)
        grew = last > 1.01 * first
        print(f"memory: {first:.3f} GB in the first sixth, {last:.3f} GB in the last")
    sys.exit(1 if wrong or grew else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
