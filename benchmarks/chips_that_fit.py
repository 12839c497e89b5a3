"""The largest model that fits one chip or eight, by stage, with and without LoRA: docs/pods.md.

    python benchmarks/chips_that_fit.py                    # all rows; those of --out are not remade
    python benchmarks/chips_that_fit.py --slices v5e:1x1   # some

Each row is a command of experiments/preflight.py, which compiles with libtpu. Nothing is run.

Hardware: any Linux machine on x86-64; one to ten minutes a row on two cores.
Result: a Markdown table, and OUT/ROW.json with the largest model of a row and its peak.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = (
    *("smollm2-135m", "pythia-410m", "qwen3-0.6b", "llama-3.2-1b", "qwen3-1.7b", "qwen3-4b"),
    "llama-3.1-8b",
)
COMMON = (
    *("--preset", "small", "--model_dtype", "bfloat16", "--length", "1024"),
    *("--data.max_prompt", "256", "--max_new_tokens", "128"),
)
HEADER = "| slice | stage | LoRA | largest model | further flags | peak, GiB | program |"


@dataclass(frozen=True)
class Config:
    """Rows of the table."""

    slices: tuple[str, ...] = ("v5e:1x1", "v6e:1x1", "v5e:2x4", "v6e:2x4")
    """Slices, as preflight.py's --topology."""
    stages: tuple[str, ...] = ("sft", "rm", "ppo")
    """Stages, as preflight.py's --stages."""
    ranks: tuple[int, ...] = (0, 16)
    """Ranks of LoRA; 0 trains all weights."""
    out: Path = REPOSITORY / "docs" / "results" / "chips"
    """The folder of the rows' results."""


def row(config: Config, topology: str, stage: str, rank: int) -> str:
    """A row of the table; compiled if OUT has no result of it."""
    out = config.out / f"{topology.replace(':', '-')}-{stage}{f'-lora{rank}' if rank else ''}.json"
    if not out.exists():
        of_row = ["--topology", topology, "--stages", stage, "--lora.rank", f"{rank}"]
        script = REPOSITORY / "experiments" / "preflight.py"
        unfinished = out.with_suffix(".part")
        command = [sys.executable, script, *of_row, *COMMON, "--out", unfinished, "--fit", *MODELS]
        subprocess.run(list(map(str, command)), check=True)
        unfinished.rename(out)
    [fit] = json.loads(out.read_text())
    if fit["model"] is None:
        return f"| {topology} | {stage} | {rank or ''} | none | | | |"
    peak, usable = fit["peak"] / 2**30, fit["usable"] / 2**30
    flags = f"`{fit['flags']}`" if fit["flags"] else ""
    return (
        f"| {topology} | {stage} | {rank or ''} | {fit['model']} | {flags} |"
        f" {peak:.2f} of {usable:.2f} | {fit['program']} |"
    )


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    print(f"python experiments/preflight.py --topology SLICE --stages STAGE {' '.join(COMMON)} \\")
    print(f"    --lora.rank RANK --fit {' '.join(MODELS)}\n")
    cells = [(s, t, r) for s in config.slices for t in config.stages for r in config.ranks]
    rows = [row(config, *cell) for cell in cells]
    print("\n".join([HEADER, "|" + "---|" * HEADER.count(" | ") + "---|", *rows]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
