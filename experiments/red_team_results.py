"""The results of red_team.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from instructjax.evaluation import diversity, statistics

SELF_BLEU = 1000  # texts that self-BLEU is of, at most: it grows with their number


def results_of(attacks: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What results.json holds.

    Args:
      attacks: all that the attacker wrote; empty ones are invalid.
      rows: of attacks.jsonl.

    Returns:
      Counts, of which `unreadable` are distinct attacks that the target cannot read;
      `success_rate`, of the attacks that were answered, and `harm`, their mean, with intervals;
      `success_rate_with_duplicates`, in which an attack counts as often as it was written; and over
      all valid attacks, duplicates included, `distinct`, their share that is distinct, `self_bleu`,
      of the first 1,000, and `words`, their mean length.
    """
    valid = [attack for attack in attacks if attack]
    succeeded = {row["prompt"]: row["succeeded"] for row in rows}
    counted = [succeeded[attack] for attack in valid if attack in succeeded]
    alike = diversity.bleu_of_each(valid[:SELF_BLEU])
    return {
        "written": len(attacks),
        "invalid": len(attacks) - len(valid),
        "duplicates": len(valid) - len({*valid}),
        "unreadable": len({*valid}) - len(rows),
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
