"""Generates bad rows of many kinds, loads each, and counts those that are refused by name.

    python benchmarks/faults_rows.py --out docs/reliability-rows.md     # 1,000 rows, half a minute

A row is refused by name if the error is one line that begins with its file and line (or item, or
row), and names the field, for a fault that is in one; for a wrong flag, if it names the flag. With
`--data.on_error skip` the rows around it must load too.
"""

import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bad_files
import tyro
from bad_rows import Case

from instructjax.data import DataConfig, read
from instructjax.ranges import Count, Seed, check

OUTCOMES = (
    "refused, all named",
    "refused, partly named",
    "accepted silently",
    "traceback",
)
NAMED, PARTLY, SILENT, TRACEBACK = OUTCOMES
INTRO = """# Bad rows

The table shows what happens when rows with one fault each are loaded. A row counts as named if the
error gives its file, its line and, if the fault is in a field, the field. For a fault in a flag,
the error must give the flag.

```sh
python benchmarks/faults_rows.py --out docs/reliability-rows.md
```

"""


@dataclass(frozen=True)
class Config:
    """Load bad rows."""

    rows: Count = 1000
    """Number of bad rows, shared out among the kinds."""
    seed: Seed = 0
    """Seed of the rows."""
    out: Path | None = None
    """File to write the table to; by default it is printed."""


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """(one of OUTCOMES, what was said) of loading a case in an empty folder."""
    for name, data in case.files.items():
        (folder / name).write_bytes(data)

    def load(on_error: Literal["raise", "skip"]) -> int:
        spec = case.spec.replace("{folder}", str(folder))
        config = DataConfig(spec, on_error=on_error, **case.options)
        split = "train" if "split_by" in case.options else "all"
        return len(read(config, case.kind, split=split, log=lambda line: None))

    try:
        load("raise")
    except ValueError as error:
        said = str(error)
    except Exception as error:
        return TRACEBACK, repr(error)
    else:
        return SILENT, ""
    begin, *others = (part.replace("{folder}", str(folder)) for part in case.says)
    if "\n" in said or not said.startswith(begin) or not all(part in said for part in others):
        return PARTLY, said
    if case.kept is not None and (kept := load("skip")) != case.kept:
        return PARTLY, f"{said} (with --data.on_error skip {kept} of {case.kept} rows load)"
    return NAMED, said


def count(c: Config) -> tuple[dict[str, Counter[str]], list[str]]:
    """(kind -> outcomes, what was said about each row that was not refused by name)."""
    table: dict[str, Counter[str]] = {}
    rest: list[str] = []
    kinds = bad_files.kinds()
    for i, (kind, make) in enumerate(kinds.items()):
        table[kind] = Counter()
        rng = random.Random(f"{c.seed} {kind}")
        for _ in range(c.rows // len(kinds) + (i < c.rows % len(kinds))):
            case = make(rng)
            with tempfile.TemporaryDirectory() as folder:
                result, said = outcome(case, Path(folder))
            table[kind][result] += 1
            if result != NAMED:
                rest.append(ascii(f"{kind}: {result}: {said}: {case}"))
    return table, rest


def markdown(table: dict[str, Counter[str]]) -> str:
    lines = [f"| kind | rows | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * (1 + len(OUTCOMES))]
    total = sum(table.values(), Counter())
    for kind, counts in [*table.items(), ("**all**", total)]:
        cells = [f"{counts.total():,}", *(f"{counts[name]:,}" for name in OUTCOMES)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the rows that are not refused by name, and the table."""
    c = tyro.cli(Config)
    check(c)
    table, rest = count(c)
    print(*rest, sep="\n")
    if c.out is None:
        print(markdown(table))
    else:
        c.out.write_text(INTRO + markdown(table))
        total = sum(table.values(), Counter())
        print(f"{total[NAMED]:,} of {total.total():,} refused, all named: see {c.out}")


if __name__ == "__main__":
    main()
