"""Damages Hugging Face directories in many ways, loads each, and counts those refused by name.

    python benchmarks/faults_models.py --out docs/reliability-models.md     # four minutes

Each directory is a copy of a whole one with one fault, of `bad_models` and the modules beside it.
It is loaded as the scripts load `--model`. It is refused by name if the first line of the error
holds the directory and the file, key or tensor. What may load must load as the whole one does: with
the same config, weights and vocabulary. None may run code, take 60 seconds, or raise anything but
an error of input.
"""

import contextlib
import io
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bad_models
import bad_tokenizers
import bad_weights
import jax
import numpy as np
import tyro
from bad_models import Fault

from instructjax import hf, sharding
from instructjax.run import pretrained

OUTCOMES = (REFUSED, HARMLESS, UNNAMED, ACCEPTED, TRACEBACK, HUNG, RAN) = (
    "refused by name",
    "loads as if whole",
    "refused without a name",
    "accepted",
    "traceback",
    "hung",
    "ran code",
)
SECONDS = 60  # until a directory counts as one that hangs
INTRO = """# Damaged model directories

The table shows what happens when a model directory with one fault is loaded. A directory is refused
by name if the first line of the error names it and the file, key or tensor. It loads as if whole if
config, weights and vocabulary are those without the fault. The example is the first error of the
kind, in which DIR is the directory. Where a directory loads, the example also says why. Seconds are
the longest of the kind, on two CPU cores that also did other work.

```sh
python benchmarks/faults_models.py --out docs/reliability-models.md
```

"""


@dataclass(frozen=True)
class Config:
    """Load damaged model directories."""

    out: Path | None = None
    """File to write the table to; by default it is printed."""


@dataclass(frozen=True)
class Outcome:
    """What came of loading a directory."""

    result: str  # one of OUTCOMES
    seconds: float
    said: str  # first line of the error, or why the directory may load


class _HungError(BaseException):
    """No Exception, so that nothing between the alarm and `load` catches it."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raises _HungError after SECONDS."""

    def fail(*_: Any) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def kinds() -> dict[str, list[Fault]]:
    """All faults by their kind."""
    return dict([*bad_models.kinds(), *bad_weights.kinds(), *bad_tokenizers.kinds()])


def load(fault: Fault, directory: Path) -> Any:
    """(config, params, tokenizer) by the reader that meets the fault."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with contextlib.redirect_stdout(io.StringIO()):
        if fault.dtype != "float32":  # no script asks for another
            return *hf.load(directory, mesh, fault.dtype), hf.load_tokenizer(directory)
        return pretrained.load(str(directory), mesh, template="auto")


def same(a: Any, b: Any) -> bool:
    """Whether two results of `load` are equal, bit for bit."""
    leaves = zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True)
    vocabularies = (x[2].get_vocab() for x in (a, b))
    return (
        a[0] == b[0]
        and all(np.array_equal(x, y) for x, y in leaves)
        and next(vocabularies) == next(vocabularies)
    )


def outcome(fault: Fault, whole: Path, folder: Path) -> Outcome:
    """Damages a copy of a whole directory and loads it.

    Args:
      whole: as `bad_models.write_whole` makes it.
      folder: an empty folder.
    """
    directory = folder / "model"
    shutil.copytree(whole / fault.model, directory)
    fault.damage(directory)
    begin = time.perf_counter()
    loaded = None
    try:
        with _alarm():
            loaded = load(fault, directory)
    except (ValueError, OSError) as error:
        said = str(error).splitlines()[0]
        named = all(name in said for name in (str(directory), *fault.names))
        result = REFUSED if named else UNNAMED
    except _HungError:
        result, said = HUNG, ""
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        result, said = TRACEBACK, repr(error)
    else:
        result, said = ACCEPTED, fault.harmless or ""
    seconds = time.perf_counter() - begin
    if loaded is not None and fault.harmless and same(loaded, load(fault, whole / fault.model)):
        result = HARMLESS
    if bad_models.marker(directory).exists():
        result = RAN
    return Outcome(result, seconds, said.replace(str(directory), "DIR"))


def markdown(table: dict[str, list[Outcome]]) -> str:
    """A row for each kind of fault."""
    lines = [
        "| kind | directories | refused by name | load as if whole | seconds | for example |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for kind, outcomes in table.items():
        counts = Counter(x.result for x in outcomes)
        said = list(dict.fromkeys(x.said for x in outcomes if x.result == HARMLESS))
        said = [f"`{x.said}`" for x in outcomes if x.result == REFUSED][:1] + said
        cells = f"{len(outcomes)} | {counts[REFUSED]} | {counts[HARMLESS]}"
        seconds = max(x.seconds for x in outcomes)
        example = ascii("; ".join(said))[1:-1].replace("|", "\\|").replace("\\'", "'")
        lines.append(f"| {kind} | {cells} | {seconds:.1f} | {example[:240]} |")
    return "\n".join(lines) + "\n"


def summary(table: dict[str, list[Outcome]]) -> tuple[str, bool]:
    """(the last line, whether all is well)"""
    counts = Counter(x.result for outcomes in table.values() for x in outcomes)
    line = (
        f"{counts[REFUSED]} of {counts.total()} were refused with the file, key or tensor, and"
        f" {counts[HARMLESS]} loaded as if whole; "
    )
    bad = {name: counts[name] for name in OUTCOMES[2:] if counts[name]}
    if bad:
        return line + ", ".join(f"{count} {name}" for name, count in bad.items()), False
    return line + "none ran code, hung or gave a traceback", True


def main() -> None:
    """Prints the directories that are not refused by name, the table and the summary."""
    c = tyro.cli(Config)
    table: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as root:
        bad_models.write_whole(Path(root))
        for kind, faults in kinds().items():
            table[kind] = []
            for fault in faults:
                with tempfile.TemporaryDirectory() as folder:
                    found = outcome(fault, Path(root), Path(folder))
                table[kind].append(found)
                if found.result not in (REFUSED, HARMLESS):
                    print(ascii(f"{kind}: {fault.variant}: {found.result}: {found.said}"))
    line, well = summary(table)
    if c.out is None:
        print(markdown(table))
    else:
        c.out.write_text(f"{INTRO}{markdown(table)}\n{line}.\n")
    print(line)
    sys.exit(not well)


if __name__ == "__main__":
    main()
