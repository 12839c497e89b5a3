"""Damages each file of a finished run in several ways, resumes the run, and reports the results.

    python benchmarks/faults_checkpoints.py

A run of run_pretrain.py has ended with checkpoints 2, 4 and 5. Each trial copies it, damages one
file of the newest checkpoint or of the run directory, and resumes it. The result is compared with
the undamaged run: parameters, optimizer, metrics.jsonl and samples.jsonl.

Hardware: CPU; about 20 minutes of one core.
Result: a Markdown table, a row for each file, with the number of ways that it was damaged and what
happened; exit code 1 if a damage changed the result without a message.
"""

import contextlib
import io
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from kill_and_resume import EXPERIMENTS, same_lines, same_parameters
from rich.console import Console
from rich.progress import track

sys.path.append(str(EXPERIMENTS))
import run_pretrain

from instructjax.run import run

STEPS, BEFORE = 5, 4


@dataclass(frozen=True)
class Config:
    """Damage to checkpoints."""

    out: Path = Path("runs/faults-checkpoints")
    """Directory of the runs; it is deleted first."""


def train(out: Path, *flags: str) -> tuple[bool, str]:
    """Runs run_pretrain.py in this process; returns whether it finished, and what it printed."""
    words = ["--out", str(out), "--steps", str(STEPS), "--save_every", "2", "--keep_last", "9"]
    words += ["--batch_size", "2", "--eval_batches", "1", *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            run.main(lambda: run_pretrain.cli(words))
        except SystemExit as end:
            return not end.code, printed.getvalue()
        except Exception as error:  # a traceback, which is what the table counts
            return False, f"traceback: {type(error).__name__}: {error}"


def damages(content: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    """(what is done, the new content; None: the file is gone).

    Args:
      other: the content of the same file in an older checkpoint.
    """
    for name, at in (("first", 0), ("middle", len(content) // 2), ("last", len(content) - 1)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        yield f"a bit of the {name} byte", bytes(flipped)
    yield "cut in half", content[: len(content) // 2]
    yield "emptied", b""
    yield "removed", None
    yield "a byte more", content + b"\0"
    yield "zeros", bytes(len(content))
    if other != content:
        yield "an older file", other


def outcome(whole: Path, damaged: Path) -> str:
    """What happened when a damaged run was resumed."""
    finished, printed = train(damaged, "--resume")
    lines = printed.splitlines()
    if not finished:
        last = next((line for line in lines if line.startswith("error: ")), lines[-1])
        return "refused by name" if last.startswith("error: ") else last[:80]
    same = same_parameters(whole, damaged, STEPS)
    for name in ("metrics.jsonl", "samples.jsonl"):
        same = same and same_lines(whole / name, damaged / name)
    start = next((line for line in lines if "resumed after step" in line), "step 0").split()[-1]
    named = any("is damaged" in line or line.startswith("warning") for line in lines)
    result = "same result" if same else "OTHER RESULT"
    return f"{'named, ' if named else ''}continued from step {start}, {result}"


def main(c: Config) -> None:
    shutil.rmtree(c.out, ignore_errors=True)
    whole, trial = c.out / "whole", c.out / "trial"
    finished, printed = train(whole)
    if not finished:
        sys.exit(printed)
    newest, older = (whole / "checkpoints" / str(step) for step in (STEPS, BEFORE))
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    pairs = {path: older / path.relative_to(newest) for path in files}
    logs = ("config.json", "checkpoint.json", "metrics.jsonl", "samples.jsonl")
    pairs |= {whole / name: whole / name for name in (*logs, "checkpoints/.holder")}
    table: dict[str, Counter[str]] = defaultdict(Counter)
    progress = Console(stderr=True)
    for path, old in track(list(pairs.items()), "files", console=progress):
        content = path.read_bytes()
        if not content:
            continue
        for _, changed in damages(content, old.read_bytes() if old.exists() else content):
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(whole, trial)
            file = trial / path.relative_to(whole)
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            name = "/".join(path.relative_to(whole).parts)
            # The names of data files are hashes.
            kind = name.rsplit("/d/", 1)[0] + "/d/..." if "/d/" in name else name
            table[kind][outcome(whole, trial)] += 1

    total = sum(sum(counts.values()) for counts in table.values())
    print(f"{total} kinds of damage\n")
    print("| file | damages | what happened |\n| --- | --- | --- |")
    for name, counts in table.items():
        said = "; ".join(f"{count} {what}" for what, count in counts.most_common())
        print(f"| `{name}` | {sum(counts.values())} | {said} |")
    silent = [
        what
        for counts in table.values()
        for what in counts
        if what.startswith((f"continued from step {STEPS}, OTHER", "traceback"))
    ]
    sys.exit(1 if silent else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
