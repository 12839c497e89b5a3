"""The runs of a grid with the flags that their scripts read from their commands."""

import importlib
from collections.abc import Iterator
from typing import Any

import swap_loss
import tyro

from instructjax.evaluation.grid import Grid, Job
from instructjax.run import average, parse

# Scripts whose flags are a dataclass without presets.
TYRO = ("evaluate.py", "ai_feedback.py", "critique_revise.py", "red_team.py")


def parsed(runs: Grid) -> Iterator[tuple[str, Job, Any]]:
    """(name, job, flags) of each run, which stands after those that it needs, in OUT/NAME."""
    before = set[str]()
    for name, job in runs.jobs.items():
        assert set(job.needs) <= before
        before.add(name)
        words = runs.command(name)
        if job.script == "-m instructjax.run.average":
            assert words[1:3] == ["-m", "instructjax.run.average"]
            flags = tyro.cli(average.Config, args=words[3:], use_underscores=True)
        elif job.script in TYRO:
            script = importlib.import_module(job.script.removesuffix(".py"))
            flags = tyro.cli(script.Config, args=words[2:], use_underscores=True)
        elif job.script == "swap_loss.py":
            configs = swap_loss.DPO | swap_loss.GRPO | swap_loss.RLOO | swap_loss.RAFT
            flags = parse(configs, {}, swap_loss.__doc__, words[2:])
        else:
            script = importlib.import_module(job.script.removesuffix(".py"))
            flags = parse(script.Config, script.PRESETS, script.__doc__, words[2:])
        assert flags.out == runs.out / name
        assert getattr(flags, "resume", False) == job.resumes
        yield name, job, flags
