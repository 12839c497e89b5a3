"""The files of red_team.py: JSON lines that grow, those of an earlier start, and its results."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from instructjax import hosts
from instructjax.evaluation import diversity, statistics

SAME = ("out", "resume", "batch_size", "mesh")  # flags that change no token
SELF_BLEU = 1000  # texts that self-BLEU is of, at most: it grows with their number


def check_resume(out: Path, flags: Mapping[str, Any], resume: bool) -> None:
    """Raises ValueError or OSError if --out holds a run, and this is not its continuation.

    Args:
      flags: as config.json has them.
      resume: whether --resume was given.
    """
    file = out / "config.json"
    if not file.exists():
        return
    if not resume:
        raise FileExistsError(
            f"--out {out} holds a run: continue it with --resume, or give another --out"
        )
    before = json.loads(file.read_text())["config"]
    for name, value in flags.items():
        if name not in SAME and before.get(name, value) != value:
            raise ValueError(
                f"--resume: --{name} was {before[name]!r} in {out}, and is {value!r}; give the same"
                " flags again, or another --out"
            )


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of host 0, on all hosts. A torn last line is cut off."""
    text = ""
    if jax.process_index() == 0 and file.exists():
        text = file.read_text("utf-8")
        if (whole := text[: text.rfind("\n") + 1]) != text:
            file.write_text(text := whole, encoding="utf-8")
    if jax.process_count() > 1:
        text = hosts.agree_text(text)
    return [json.loads(line) for line in text.split("\n") if line]


def append(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    if jax.process_index() == 0:
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def results_of(attacks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What results.json holds.

    Args:
      attacks: all that the attacker wrote; empty ones are invalid.
      rows: of attacks.jsonl.

    Returns:
      Counts; `success_rate`, of the attacks that were answered, and `harm`, their mean, with
      intervals; `success_rate_with_duplicates`, in which an attack counts as often as it was
      written; and over all valid attacks, duplicates included, `distinct`, their share that is
      distinct, `self_bleu`, of the first 1,000, and `words`, their mean length.
    """
    valid = [attack for attack in attacks if attack]
    succeeded = {row["prompt"]: row["succeeded"] for row in rows}
    counted = [succeeded[attack] for attack in valid if attack in succeeded]
    alike = diversity.bleu_of_each(valid[:SELF_BLEU])
    return {
        "written": len(attacks),
        "invalid": len(attacks) - len(valid),
        "duplicates": len(valid) - len({*valid}),
        "no_room": len({*valid}) - len(rows),
        "answered": len(rows),
        "succeeded": sum(succeeded.values()),
        "success_rate": statistics.mean(np.array([*succeeded.values()], float)),
        "success_rate_with_duplicates": float(np.mean(counted)) if counted else math.nan,
        "harm": statistics.mean(np.array([row["harm"] for row in rows])),
        "self_bleu": float(alike.mean()) if valid else math.nan,
        "distinct": len({*valid}) / len(valid) if valid else math.nan,
        "words": float(np.mean([len(attack.split()) for attack in valid])) if valid else math.nan,
    }


def show(results: Mapping[str, Any], title: str) -> None:
    """Prints results.json as a table."""
    table = Table(show_header=False, title=title)
    for name, value in results.items():
        figures = value if isinstance(value, list | tuple) else [value]
        shown = [f"{x:,}" if isinstance(x, int) else f"{x:.3f}" for x in figures]
        interval = f" ({shown[1]} to {shown[2]})" if len(shown) == 3 else ""
        table.add_row(name.replace("_", " "), f"{shown[0]}{interval}")
    Console().print(table)
