"""Kills a run at random moments, resumes it each time, and compares it with an undisturbed run.

    python benchmarks/kill_and_resume.py                      # run_sft.py, ten times SIGKILL
    python benchmarks/kill_and_resume.py --script run_rm.py --kills 5
    python benchmarks/kill_and_resume.py --script run_ppo.py --kills 100 --steps 104 \\
        --flags="--batch_size 64 --sample_batch 64 --eval_prompts 64 --final_prompts 64"

Hardware: two CPU cores; about two minutes, and half a minute for each kill of run_ppo.py.
Needs the runs that the script begins with (runs/pretrain, runs/sft, runs/rm): run the script once
before.
Result: a table of the kills, and whether parameters, metrics.jsonl and samples.jsonl are the same,
bit for bit. Times are not compared.
"""

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import rich
import tyro
from rich.table import Table

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@dataclass(frozen=True)
class Config:
    """Kill and resume."""

    out: Path = Path("runs/kill-and-resume")
    """Directory of the two runs; it is deleted first."""
    script: str = "run_sft.py"
    """Name of a training script in experiments/."""
    kills: int = 10
    """Number of SIGKILLs, each at a random moment."""
    steps: int = 60
    """Number of updates of the run."""
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


def lines_of(out: Path) -> int:
    lines = out / "metrics.jsonl"
    return lines.read_bytes().count(b"\n") if lines.exists() else 0


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
    finish(start(c, alone))
    table = Table("kill", "at line", "seconds later", "checkpoints", "half-written")
    moments = random.Random(c.seed)
    # Kills are spread over the run: each waits for its line of metrics.jsonl, then a random time.
    for kill, line in enumerate(sorted(moments.sample(range(c.steps), c.kills)), start=1):
        process, later = start(c, killed), moments.uniform(0, 0.5)
        while lines_of(killed) < line and process.poll() is None:
            time.sleep(0.01)
        time.sleep(later)
        if process.poll() is not None:
            sys.exit(f"error: kill {kill} came after the end: give more --steps")
        process.kill()
        process.communicate()
        names = [p.name for p in (killed / "checkpoints").glob("[!.]*")]
        whole = [name for name in names if name.isdecimal()]
        kept = " ".join(sorted(whole, key=int))
        table.add_row(f"{kill}", f"{line}", f"{later:.2f}", kept, f"{len(names) - len(whole)}")
    finish(start(c, killed))
    rich.print(table)
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
