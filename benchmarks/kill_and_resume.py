"""Kills a run at random moments, resumes it each time, and compares it with an undisturbed run.

    python benchmarks/kill_and_resume.py                      # run_sft.py, ten times SIGKILL
    python benchmarks/kill_and_resume.py --script run_rm.py --kills 5
    python benchmarks/kill_and_resume.py --script run_ppo.py --kills 100 --steps 240 \\
        --flags="--batch_size 64 --sample_batch 64 --eval_prompts 64 --final_prompts 64"

A fifth of the kills happen during a start, at a uniformly random moment before the process adds its
first line to metrics.jsonl. The others wait for such a line, and then for a uniformly random time
of up to 1.2 times the time between two checkpoints. So every part of a step or a save may be hit.

Hardware: two CPU cores; about two minutes, and half a minute for each kill of run_ppo.py.
Needs the runs that the script begins with (runs/pretrain, runs/sft, runs/rm): run the script once
before.
Result: a table of the kills, in which kills in a start are marked, and whether parameters,
metrics.jsonl and samples.jsonl are the same, bit for bit. Times are not compared.
"""

import json
import math
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import rich
import tyro
from rich.table import Table

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
EARLY = 0.2  # share of the kills that fall into a start
WHOLE = 1.2  # the latest kill after a line, as a share of the time between two checkpoints


@dataclass(frozen=True)
class Config:
    """Kill and resume."""

    out: Path = Path("runs/kill-and-resume")
    """Directory of the two runs; it is deleted first."""
    script: str = "run_sft.py"
    """Name of a training script in experiments/."""
    kills: int = 10
    """Number of SIGKILLs, each at a random moment. There are fewer if the run ends before."""
    steps: int = 60
    """Number of updates of the run. A kill outside a start uses up --save_every of them or more."""
    save_every: int = 2
    """Number of steps between checkpoints; small, so that kills also hit saves."""
    flags: str = ""
    """More flags of the script, as in a shell."""
    seed: int = 0
    """Seed of the random moments."""


def start(c: Config, out: Path) -> subprocess.Popen[bytes]:
    flags = ["--out", str(out), "--steps", str(c.steps), "--save_every", str(c.save_every)]
    flags += shlex.split(c.flags)
    command = [sys.executable, str(EXPERIMENTS / c.script), *flags, "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"error: {error.decode(errors='replace')}")


class Lines:
    """The lines of metrics.jsonl, from which a process that resumes first cuts the last ones."""

    def __init__(self, out: Path):
        self._file = out / "metrics.jsonl"
        self._bytes, self.count = self._read()

    def _read(self) -> tuple[int, int]:
        content = self._file.read_bytes() if self._file.exists() else b""
        return len(content), content.count(b"\n")

    def wait(self, process: subprocess.Popen[bytes], seconds: float, least: int = 0) -> bool:
        """Waits until a line is added, for some seconds or until the process ends.

        Args:
          least: number of lines that there must then be.

        Returns:
          Whether a line was added.
        """
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            before = self._bytes
            self._bytes, self.count = self._read()
            if self._bytes > before and self.count >= least:  # a cut makes the file shorter
                return True
            time.sleep(0.01)
        return False


def seconds_of_a_step(out: Path) -> float:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["time/step"] for row in rows if "time/step" in row)


def same_lines(a: Path, b: Path) -> bool:
    """Whether two files are equal except for times."""

    def lines(file: Path) -> list[dict]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        timed = ("time/", "throughput/")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]

    return lines(a) == lines(b)


def same_parameters(a: Path, b: Path, step: int) -> bool:
    """Whether the last checkpoints are equal, optimizer included, whatever devices wrote them."""
    import jax

    def arrays(out: Path) -> Any:
        state = (out / "checkpoints" / str(step) / "state").absolute()
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(state).item_metadata.tree
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return reader.restore(state, restore_args=plain)

    equal = jax.tree.map(np.array_equal, arrays(a), arrays(b))
    return all(jax.tree.leaves(equal))


def main(c: Config) -> None:
    alone, killed = c.out / "alone", c.out / "killed"
    shutil.rmtree(c.out, ignore_errors=True)
    began = time.monotonic()
    process = start(c, alone)
    Lines(alone).wait(process, math.inf)
    first_line = time.monotonic() - began
    finish(process)
    latest = WHOLE * c.save_every * seconds_of_a_step(alone)
    print(f"a start takes {first_line:.0f} s; kills up to {latest:.1f} s after a line", flush=True)
    table = Table("kill", "in", "at line", "seconds later", "checkpoints", "half-written")
    moments = random.Random(c.seed)
    hit: Counter[str] = Counter()
    # Kills are spread over the run: each waits for its line of metrics.jsonl, then a random time.
    for kill, line in enumerate(sorted(moments.choices(range(c.steps), k=c.kills)), start=1):
        launched, began = time.time(), time.monotonic()
        process, lines = start(c, killed), Lines(killed)
        if moments.random() < EARLY:
            early = not lines.wait(process, moments.uniform(0, first_line))
            later = time.monotonic() - began if early else 0.0
        else:
            early, later = False, moments.uniform(0, latest)
            lines.wait(process, math.inf)
            first_line = time.monotonic() - began  # the first start also compiles
            if lines.count < line:
                lines.wait(process, math.inf, line)
            time.sleep(later)
        if process.poll() is not None:
            finish(process)
            print(f"the run ended before kill {kill}")
            break
        process.kill()
        process.communicate()
        paths = [*(killed / "checkpoints").glob("[!.]*")]
        whole = [path.name for path in paths if path.name.isdecimal()]
        # What an earlier kill left half-written is older than this start.
        torn = sum(not p.name.isdecimal() and p.stat().st_mtime > launched for p in paths)
        where = "a start" if early else "a step"
        hit[where] += 1
        hit["a save"] += torn > 0
        kept = " ".join(sorted(whole, key=int))
        at = f"{Lines(killed).count}"
        table.add_row(f"{kill}", where, at, f"{later:.2f}", kept, f"{torn}")
        print(f"kill {kill}: in {where}, {at} lines, {torn} half-written", flush=True)
    finish(start(c, killed))
    rich.print(table)
    print(f"{hit['a start']} kills in a start, {hit['a step']} later, {hit['a save']} in a save")
    same = {
        "parameters and optimizer": same_parameters(alone, killed, c.steps),
        "metrics.jsonl": same_lines(alone / "metrics.jsonl", killed / "metrics.jsonl"),
        "samples.jsonl": same_lines(alone / "samples.jsonl", killed / "samples.jsonl"),
    }
    for name, equal in same.items():
        rich.print(f"{name}: {'the same' if equal else 'DIFFERENT'}")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
