"""Files of experiments: JSON lines, atomic writes, and the flags of an earlier start."""

import json
import shlex
import sys
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from instructjax import hosts

SAME = ("out", "resume", "batch_size", "mesh")  # flags that change no token


def check_resume(
    out: Path,
    stage: str,
    flags: Mapping[str, Any],
    resume: bool,
    defaults: Mapping[str, Any],
    free: Collection[str] = (),
) -> None:
    """Raises ValueError or OSError if --out holds a run, and this is not its continuation.

    Args:
      stage: the script's name.
      flags: as config.json has them.
      resume: whether --resume was given.
      defaults: of the flags; what a run has used that knew no such flag.
      free: more flags that may differ.
    """
    file = out / "config.json"
    if not file.exists():
        return
    if not resume:
        raise FileExistsError(
            f"--out {out} holds a run: continue it with --resume, or give another --out"
        )
    recorded = json.loads(file.read_text())
    # Without a stage it is an earlier version's, and its flags must do.
    if (other := recorded.get("stage", stage)) != stage:
        raise ValueError(
            f"--resume: {out} holds a run of {other}, not of {stage}; give another --out"
        )
    before = {**defaults, **recorded["config"]}
    for name, value in flags.items():
        if name not in (*SAME, *free) and before.get(name) != value:
            raise ValueError(
                f"--resume: --{name} was {before.get(name)!r} in {out}, and is {value!r}; give the"
                " same flags again, or another --out"
            )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that a finished run has written. It stays as it is.

    Raises:
      FileNotFoundError: there is no such file: to read none would leave out a run's work.
      ValueError: a line is no JSON, such as a torn last one; the message names it.
    """
    rows = []
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error}") from error
    return rows


def read_log(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a script's own file of host 0, on all hosts, to go on from: none if there
    is no file yet. A torn last line is cut off the file."""
    text = ""
    if jax.process_index() == 0 and file.exists():
        data = file.read_bytes()  # its end may be within a character
        if (whole := data[: data.rfind(b"\n") + 1]) != data:
            file.write_bytes(whole)
        text = whole.decode()
    if jax.process_count() > 1:
        text = hosts.agree_text(text)
    return [json.loads(line) for line in text.split("\n") if line]


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows on host 0."""
    if jax.process_index() == 0:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(_lines(rows))


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`replace` by rows, on host 0."""
    if jax.process_index() == 0:
        replace(file, _lines(rows))


def replace(file: Path, text: str) -> None:
    """Writes a file at once: a kill leaves it as it was or whole, and others may read it, or write
    the same."""
    part = file.with_name(f"{file.name}.{threading.get_ident()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def record(out: Path, stage: str, flags: Mapping[str, Any]) -> None:
    """Makes OUT, with the script's name, the command and its flags in config.json."""
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        command = shlex.join(["python", *sys.argv])
        written = {"stage": stage, "command": command, "config": flags}
        replace(out / "config.json", json.dumps(written, indent=2) + "\n")
