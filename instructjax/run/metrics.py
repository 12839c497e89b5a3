"""Writes a run's numbers to metrics.jsonl, samples.jsonl, trackers and the terminal."""

import importlib
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.spinner import Spinner
from rich.text import Text

from instructjax.run.log import Log


class MetricsWriter:
    """Writes metrics.jsonl and samples.jsonl and, on demand, to TensorBoard and Weights & Biases.

    Only host 0 writes. A resumed run writes the same lines as one that was never stopped, except
    for the keys `time/*` and `throughput/*`.

    Args:
      directory: the run directory.
      resume_step: cuts both files back to the lines up to this step; None empties them. What is cut
        is added to metrics.cut.jsonl and samples.cut.jsonl.
      tensorboard: write to DIRECTORY/tensorboard too.
      wandb: name of the project to send metrics to.

    Raises:
      ValueError: a tracker is not installed, or a file holds a line that this class cannot have
        written.
    """

    def __init__(
        self,
        directory: Path | str,
        resume_step: int | None,
        tensorboard: bool = False,
        wandb: str | None = None,
    ):
        self._logs: dict[str, Log] = {}
        self._tensorboard = self._wandb = None
        if jax.process_index() != 0:
            return
        directory = Path(directory)
        if tensorboard:
            self._tensorboard = _tensorboard(directory, resume_step)
        if wandb is not None:
            self._wandb = _wandb(wandb, directory, resume_step)
        for name in ("metrics", "samples"):
            self._logs[name] = Log(directory / f"{name}.jsonl", resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a line `{"step": step, ...}` to metrics.jsonl, in which floats keep every bit."""
        if not self._logs:
            return
        self._logs["metrics"].append({"step": step, **metrics})
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Adds a line `{"step": step, ...}` to samples.jsonl, such as a prompt and a response.

        Call this before the step's checkpoint is saved: a kill between the two would lose the line.
        """
        if self._logs:
            self._logs["samples"].append({"step": step, **sample})

    def marks(self) -> dict[str, list[int]]:
        """The state of each file, which a checkpoint stores for `problems`."""
        return {name: log.mark for name, log in self._logs.items()}

    def problems(
        self, marks: Mapping[str, Sequence[int]], step: int, log_every: int
    ) -> Iterator[str]:
        """Says how the files of a resumed run differ from those that it left.

        Args:
          marks: from `marks` when the checkpoint was saved.
          step: of the checkpoint.
          log_every: steps from one line of metrics.jsonl to the next.
        """
        for name, log in self._logs.items():
            every = log_every if name == "metrics" else None
            if name in marks and (problem := log.problem(marks[name], step, every)):
                yield problem

    def sync(self) -> None:
        """Forces both files onto the disk, because a checkpoint relies on their lines."""
        for log in self._logs.values():
            log.sync()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def import_tracker(extra: Literal["tensorboard", "wandb"]) -> Any:
    """The module of a tracker.

    Raises:
      ValueError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("tensorboardX" if extra == "tensorboard" else extra)
    except ImportError as error:
        raise ValueError(f"--{extra} needs: pip install 'instructjax[{extra}]'") from error


def _tensorboard(directory: Path, resume_step: int | None) -> Any:
    writer = import_tracker("tensorboard").SummaryWriter
    purge = None if resume_step is None else resume_step + 1  # these steps are written again
    return writer(str(directory / "tensorboard"), purge_step=purge)


def _wandb(project: str, directory: Path, resume_step: int | None) -> Any:
    wandb = import_tracker("wandb")
    # The id is kept in the run directory, so that a resumed run continues its curves. The curves'
    # step is a metric: wandb's own counter cannot go back to the step of a checkpoint.
    file = directory / "wandb_id"
    if resume_step is None or not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    run = wandb.init(
        project=project, name=str(directory), dir=directory, id=file.read_text(), resume="allow"
    )
    run.define_metric("*", step_metric="step")
    return run


def to_numbers(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """Reads scalars from their devices, and so waits for the step that computes them.

    Raises:
      ValueError: a metric is not a scalar.
    """
    numbers: dict[str, float | int] = {}
    for name, value in jax.device_get(dict(metrics)).items():
        array = np.asarray(value)
        if array.ndim:
            raise ValueError(f"metric {name} has shape {array.shape}, expected a scalar")
        numbers[name] = int(array) if array.dtype.kind in "biu" else float(array)
    return numbers


class ProgressLine:
    """A live line with a bar, the loss, tokens per second and the time left.

    The line below it names a phase that takes long, such as an evaluation, and the time it has
    taken. Where stdout is no terminal, both are plain lines: one of the steps every `every`
    seconds, and one of each phase that takes long, when that happens for the first time.

    Args:
      patience: seconds that a phase lasts before it is shown.
    """

    def __init__(self, console: Console, stage: str, every: float = 10, patience: float = 3):
        self._console, self._stage, self._every, self._patience = console, stage, every, patience
        self._recent: deque[tuple[float, float]] = deque(maxlen=20)  # (seconds, tokens/s) of steps
        self._printed = -float("inf")
        self._phases: list[tuple[str, float]] = []  # (phase, when it began), the innermost last
        self._announced: set[str] = set()  # phases that have had their plain line
        self._bar: Progress | None = None
        self._stopped = False
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        if console.is_interactive:
            self._live = Live(console=console, get_renderable=self._render, transient=True)
            self._live.start()

    def begin(self, start: int, total: int) -> None:
        """Shows the bar of steps, at `start`."""
        self._total = total
        self._recent.clear()
        if self._live is not None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), auto_refresh=False)
            self._task = self._bar.add_task(self._stage, total=total, completed=start, text="")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the loss, score, KL, time and throughput of a finished step, where it has them."""
        shown = {"loss": "loss", "score": "objective/score", "KL": "objective/kl"}
        parts = [f"{name} {metrics[key]:.4f}" for name, key in shown.items() if key in metrics]
        if "throughput/tokens_per_second" in metrics:
            self._recent.append((metrics["time/step"], metrics["throughput/tokens_per_second"]))
            # Medians, because some steps compile and others wait for an evaluation.
            seconds, speed = (median(values) for values in zip(*self._recent, strict=True))
            left = timedelta(seconds=round(seconds * (self._total - step)))
            parts += [f"{speed:,.0f} tokens/s", f"{left} left"]
        text = "  ".join(parts)
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._every or step == self._total:
            self._printed = now
            self._say(f"step {step:,}/{self._total:,}  {text}")

    def end(self) -> None:
        """Leaves the bar as it is, above all that follows."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._console.print(bar)

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Shows what is done meanwhile, once it has taken `patience` seconds."""
        phase = doing, time.monotonic()
        self._phases.append(phase)
        timer = threading.Timer(self._patience, self._announce, [doing])
        timer.daemon = True
        if self._live is None:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._phases.remove(phase)

    def stop(self) -> None:
        self.end()
        self._stopped = True
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Group:
        """The live lines. rich asks for them from a thread of its own, four times a second."""
        now = time.monotonic()
        lasting = [phase for phase in list(self._phases) if now - phase[1] > self._patience]
        bar, shown = self._bar, Group()
        if bar is not None:
            shown.renderables.append(bar)
        for doing, began in lasting[-1:]:
            self._spinner.update(text=Text(f"{doing}  {timedelta(seconds=int(now - began))}"))
            shown.renderables.append(self._spinner)
        return shown

    def _announce(self, doing: str) -> None:
        if doing not in self._announced and not self._stopped:
            self._announced.add(doing)
            self._say(f"{doing} ...")

    def _say(self, text: str) -> None:
        line = f"{self._stage}  {text}" if self._stage else text
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def phase(console: Console, doing: str) -> Iterator[None]:
    """Says what a script does that takes no steps, if it takes more than 3 s."""
    line = ProgressLine(console, "")
    try:
        with line.phase(doing):
            yield
    finally:
        line.stop()
