"""One run in one directory, from its config to its exit code, which can resume after any kill.

    def train(config):
        with Run(config, stage="sft") as run:
            ...
            state, start, _ = run.restore(state.create(params, tx))
            for step, batch in zip(run.steps(start, total), stream.iterate(start)):
                state, metrics = train_step(state, batch, jax.random.fold_in(key, step))
                run.log(step, metrics, tokens=batch["tokens_BT"].size)
                if run.should_save(step):
                    run.save(step, state)
            run.finish(...)

    if __name__ == "__main__":
        main(lambda: train(parse(Config, PRESETS, __doc__)))

A step's number is the number of updates made when it is done. So the first step is 1, on batch 0
of the stream, and 0 is before training. `state.step`, the checkpoint and the line of metrics.jsonl
have the same number.
"""

import dataclasses
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from instructjax import hosts
from instructjax.run import bucket, card, flags, memory, resume
from instructjax.run.checkpoint import Checkpoints, abstract
from instructjax.run.flags import RunConfig
from instructjax.run.memory import Memory, ran_out
from instructjax.run.metrics import MetricsWriter, ProgressLine, import_tracker, to_numbers
from instructjax.run.process import (
    Signals,
    cache_compilations,
    claim,
    keep_memory,
    return_memory,
)
from instructjax.run.watchdog import Watchdog

FINISHED, FAILED, RESUMABLE = 0, 1, hosts.RESUMABLE  # exit codes
RETURN_EVERY = 60  # seconds of training after which a small process gives free memory back


def main(fn: Callable[[], None]) -> NoReturn:
    """Runs a script and ends the process with its exit code.

    An error of input, files or training prints one line on stderr and ends with FAILED; one of the
    command line has ended with USAGE already, before anything was loaded (`usage.read`). With
    INSTRUCTJAX_TRACEBACK=1 it shows its traceback, as any other exception does, which is a bug.
    Where several hosts run the script, an error on one of them ends all.
    """
    keep_memory()
    hosts.choose_platform()
    with ExitStack() as stack:
        try:
            stack.enter_context(hosts.joined())
            fn()
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            if os.environ.get("INSTRUCTJAX_TRACEBACK") == "1":
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(FAILED) from error
    sys.exit(FINISHED)


class Run:
    """A context that holds the run directory, its files and checkpoints, signals and the terminal.

    On SIGTERM or SIGINT the current step is finished and saved, and the program ends with
    RESUMABLE. A second signal ends it at once. On several hosts, host 0 writes the files, and a
    signal to any host stops all of them after the same step. A signal before the first step waits
    for that step.

    Args:
      config: the script's config.
      stage: `sft`, `rm`, ...: the run's name in config.json and on the terminal.
      best_metric: the metric that the `score` of `save` is. If given, the best checkpoint is kept.
      best_mode: whether the least or the greatest score is the best.

    If nothing moves for --stall minutes, the program ends with RESUMABLE too, or with FAILED if it
    has been started several times since the last checkpoint. If memory runs out, the error that
    the context raises says where, and which flags help.

    Raises:
      ValueError: --resume with a config that makes another run, or a flag that differs over hosts.
      MemoryError: a device or the machine has run out of memory.
      OSError: the directory holds a run and --resume was not given, another process trains in it,
        or it cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ):
        self.config, self.stage, self.out = config, stage, Path(config.out)
        self._best: tuple[str | None, Literal["min", "max"]] = best_metric, best_mode
        self.console = Console(quiet=jax.process_index() != 0)
        self._stack = ExitStack()
        self._outer_phase = ExitStack()
        self._seconds: dict[str, float] = {}  # of timed phases, for the next line of metrics
        self._pending: tuple[int, dict[str, Any], bool] | None = None
        self._first = self._total = self._saved = self._written = -1
        self._clock = time.perf_counter()
        self._training = self._tracing = False
        self._reached = resume.Reached()
        self._frozen: dict[str, tuple[str, str]] = {}
        self._watchdog = Watchdog(config.stall, lambda: self._reached.useless_start)
        self._memory = Memory()

    def __enter__(self) -> "Run":
        with ExitStack() as stack:  # undoes the first lines if a later one fails
            stack.enter_context(self._watchdog)
            self._outer_phase.enter_context(self._watchdog.phase("starting"))
            hosts.require_equal("flags", flags.of_all_hosts(self.config, self.stage))
            cache_compilations()
            if jax.process_index() == 0:
                # A program that ends just after orbax has begun to clean up prints a traceback.
                if self.config.tensorboard:
                    import_tracker("tensorboard")
                if self.config.wandb is not None:
                    import_tracker("wandb")
                claim(self.out, stack)
            self._reached = resume.Reached.read(self.out)
            directory = resume.directory(self.config, self._reached)
            if jax.process_index() == 0:
                if not bucket.holds(directory) and Path(directory).resolve() != self.out.resolve():
                    claim(Path(directory), stack, "--checkpoints")
                for change in flags.compare(self.config, self.stage, directory):
                    self._say(f"{self.out}: changed since: {change}")
            # orbax logs each failure from several threads with tracebacks. `Checkpoints` raises it.
            absl = logging.getLogger("absl")
            stack.callback(absl.setLevel, absl.level)
            absl.setLevel(logging.CRITICAL)
            best_metric, best_mode = self._best
            self.checkpoints = Checkpoints(
                directory,
                self.config.keep_last,
                best_metric,
                best_mode,
                say=self._say,
                on_written=lambda step: self._remember(step, starts=0),
            )
            stack.callback(self.checkpoints.close)
            inside = directory == epath.Path(self.out / "checkpoints")
            self._elsewhere = None if inside else os.fspath(self.checkpoints.directory)
            self._latest = resume.choose(
                self.config, self.checkpoints, self._reached, self._say, self._remember
            )
            self._written = -1 if self._latest is None else self._latest
            starts = self._reached.starts + 1 if self.config.resuming else 1
            self._remember(self._latest, went_back_to=self.config.resume_step, starts=starts)
            self.metrics = MetricsWriter(
                self.out, self._latest, self.config.tensorboard, self.config.wandb
            )
            stack.callback(self.metrics.close)
            signals = Signals(self._on_signal, self._stop_asked)
            if jax.process_count() > 1:
                signals = hosts.AgreedSignals(self._stop_asked, self._latest or 0)
            self._signals = stack.enter_context(signals)
            self._line = ProgressLine(self.console, self.stage)
            stack.callback(self._stop_display)
            self._set_outer_phase("loading models and data")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        why = None
        if ran_out(error):
            try:
                last = self.checkpoints.latest()
            except OSError:  # the one being written failed too, which `_close` says
                last = self._reached.step
            why = self._memory.explain(error, self.config, self._written, last)
        self._close(kind, error)
        if why is not None:
            raise MemoryError(why) from error

    def _close(self, kind: Any, error: Any) -> None:
        stopped = kind is SystemExit and error.code == RESUMABLE
        if kind is not None and not stopped and jax.process_count() > 1:
            self._line.stop()
            return  # closing would wait for the other hosts, which `main` is about to end
        try:
            with self._stack:
                if kind is None:
                    self._flush()
        except OSError as failure:  # from a checkpoint that was being written
            if kind is None or stopped:
                raise
            print(f"error: {failure}", file=sys.stderr)  # the first error is the one to raise
        if stopped:
            command = ["python", *sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])]
            step = max(self._saved, self._latest or 0)
            self._say(f"stopped after step {step:,}; continue with\n  {shlex.join(command)}")

    @contextmanager
    def phase(self, doing: str, timed: str | None = None) -> Iterator[None]:
        """Says on the terminal what the run is doing, once that has taken 3 s. Phases may nest.

        Outside of all phases, a run loads models and data, compiles its first step, and at the end
        exports and evaluates; these are phases of their own.

        Args:
          doing: a few words, such as `sampling 256 responses`. Also a decorator of a function.
          timed: if given, the seconds are logged as `time/TIMED` with the step's metrics.
        """
        began = time.perf_counter()
        with self._watchdog.phase(doing), self._memory.phase(doing), self._line.phase(doing):
            yield
        if timed is not None:
            self._seconds[f"time/{timed}"] = time.perf_counter() - began

    # ---- the loop ----

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._signals.count > 0

    def restore(
        self, state: Any, frozen: Mapping[str, tuple[str, str]] | None = None
    ) -> tuple[Any, int, dict[str, Any]]:
        """Returns the latest checkpoint's state with --resume, and otherwise the state given.

        Args:
          state: a pytree of arrays. Its buffers are freed before a checkpoint replaces it.
          frozen: name and fingerprint, by flag, of weights that the state means nothing without.
            Each checkpoint records them.

        Returns:
          (state, steps made, the `meta` given to `save`)

        Raises:
          OSError: the disk has no room for the checkpoints.
          ValueError: the checkpoint was made with other frozen weights.
        """
        self._frozen = dict(frozen or {})
        self.checkpoints.check_space(state)
        if self._latest is None:
            if self.config.resuming:
                self._say(f"{self.out}: no checkpoint to resume; starting at step 0")
            return state, 0, {}
        target = abstract(state)
        for leaf in jax.tree.leaves(state):
            if isinstance(leaf, jax.Array):
                leaf.delete()
        state, meta = self.checkpoints.restore(self._latest, target)
        resume.check_frozen(self.out, self._latest, meta.get("frozen", {}), self._frozen)
        self._say(f"{self.out}: resumed after step {self._latest:,}")
        marks, log_every = meta.get("logs", {}), self.config.log_every
        for problem in self.metrics.problems(marks, self._latest, log_every):
            self._say(f"warning: {self.out}: {problem}")
        return state, self._latest, meta

    def steps(self, start: int, total: int) -> Iterator[int]:
        """Yields `start + 1` to `total`, with a progress line and the profiler's window.

        After a signal it ends the program, once the step has been saved. A caller may leave the
        loop by `break`.

        Raises:
          ValueError: --profile begins after the last step, the hosts count different steps, or more
            steps are made already.
        """
        window = self.config.profile_window
        if window and window[0] > total:
            raise ValueError(f"--profile {self.config.profile}: the run has {total} steps")
        if total != (total_on_host_0 := int(hosts.agree(total))):
            raise ValueError(
                f"the data give {total} steps on this host, and {total_on_host_0} on host 0:"
                " all hosts must read the same data"
            )
        if start > total:
            raise ValueError(
                f"{self.out}: {start:,} steps are made, and {total:,} are asked for: give more"
                " --steps, or go back with --resume_step"
            )
        self._write_config()
        self._first, self._total, self._saved, self._training = start + 1, total, start, True
        self._line.begin(start, total)
        self._watchdog.finished(start)
        self._set_outer_phase("compiling and running the first step")
        self._clock = returned = time.perf_counter()
        try:
            for step in range(start + 1, total + 1):
                if time.perf_counter() - returned > RETURN_EVERY:
                    return_memory(of_small=True)
                    returned = time.perf_counter()
                if self.stopping and self._saved == step - 1:
                    sys.exit(RESUMABLE)
                self._signals.before(step)
                if window and step == window[0]:
                    self._flush()
                    jax.profiler.start_trace(self.out / "profile")
                    self._tracing = True
                yield step
                if self._tracing and (step == window[-1] or step == total):
                    self._flush()
                    self._stop_trace()
            self._flush()
        finally:  # after a `break` too, so that the next signal ends the run
            self._stop_trace()
            self._line.end()
            self._set_outer_phase("exporting and evaluating")
            self._training = False
        if self.stopping:
            sys.exit(RESUMABLE)

    def log(self, step: int, metrics: Mapping[str, Any], tokens: int = 0) -> None:
        """Takes a step's metrics. They are read from their devices when the next step's arrive.

        A second call for the same step, after an evaluation, adds to the step's line.

        Args:
          metrics: name -> scalar, on a device or not, from a train step or an evaluation.
          tokens: number of tokens of the step. If given, `time/step` (all seconds since the step
            before was logged, or since the loop began) and `throughput/tokens_per_second` are
            added. The first step after a start or a resume compiles, and has no throughput.

        Raises:
          FloatingPointError: a metric of the step before is NaN or infinite.
          ValueError: the step's line is written already, because `save` came before this call.
        """
        if step <= self._written:
            raise ValueError(f"the metrics of step {step} are written already: log before saving")
        metrics = {**metrics, **self._seconds}
        self._seconds.clear()
        if self._pending is not None and self._pending[0] == step:
            self._pending = step, {**self._pending[1], **metrics}, True
            return
        self._flush()
        if tokens:
            now = time.perf_counter()
            seconds, self._clock = now - self._clock, now
            metrics["time/step"] = seconds
            if step > self._first:
                metrics["throughput/tokens_per_second"] = tokens / seconds
        self._pending = step, metrics, step in (0, self._total)

    def should_save(self, step: int) -> bool:
        """Every --save_every steps, at the last step, and when a signal has asked the run to stop.

        Only saving may depend on it: an evaluation that did would be made at other steps in a run
        that was stopped.
        """
        return step % self.config.save_every == 0 or step == self._total or self.stopping

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:
        """Saves a checkpoint once the step's metrics are read. On return `state` may be donated.

        Args:
          state: a pytree of arrays, such as a TrainState.
          meta: JSON that `restore` returns, with `step` and `score` added.
          score: the value of `best_metric`.

        Raises:
          FloatingPointError: a metric of this step is NaN or infinite, so nothing is saved.
          OSError: this checkpoint, or the one before, could not be written.
        """
        self._flush()
        self.metrics.sync()
        meta = {**(meta or {}), "step": step, "score": score, "logs": self.metrics.marks()}
        if self._frozen:
            meta["frozen"] = self._frozen
        with self.phase("saving a checkpoint"):
            self.checkpoints.save(step, state, meta)
        self._saved = step

    def finish(
        self,
        summary: Mapping[str, Any],
        wrote: Sequence[Path | str],
        next_command: str = "",
        tables: Sequence[Table] = (),
    ) -> None:
        """Prints the results, the files written and the command to run next.

        The results go to the model card of each export as well.

        Args:
          summary: results by name.
          wrote: files and directories; those with a model card are exports.
          tables: more results, printed before the summary.
        """
        self.checkpoints.wait()
        self._write_config()
        table = Table(show_header=False)
        for name, value in summary.items():
            table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value}")
        for results in tables:
            self.console.print(results)
        self._say(f"{self.stage} finished in {self.out}")
        self.console.print(table)
        self._report_memory("whole run")
        for path in wrote:
            if (Path(path) / "README.md").is_file():
                card.extend(Path(path), self.config, self.stage, [*tables, table])
            self._say(f"wrote {path}")
        if next_command:
            self._say(f"next: {next_command}")

    # ---- inside ----

    def _write_config(self) -> None:
        """Writes config.json once the run has started: a start that failed leaves none behind."""
        if jax.process_index() == 0:
            flags.write(self.config, self.stage)

    def _remember(self, step: int | None, **changes: Any) -> None:
        """Records in OUT/checkpoint.json that the run goes on from this checkpoint, if killed."""
        changes |= {"checkpoints": self._elsewhere, "step": step}
        self._reached = dataclasses.replace(self._reached, **changes)
        if jax.process_index() == 0:
            self._reached.write(self.out)

    def _flush(self) -> None:
        """Reads the metrics that are waiting, and so blocks until their step is done."""
        if self._pending is None:
            return
        (step, metrics, always), self._pending = self._pending, None
        values = to_numbers(metrics)
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            last = self.checkpoints.latest()
            where = self.checkpoints.directory / str(last)
            good = "no checkpoint was saved" if last is None else f"last good checkpoint: {where}"
            raise FloatingPointError(f"step {step}: {', '.join(bad)}; {good}")
        self._written = step
        self._watchdog.finished(step)
        if always or step % self.config.log_every == 0:
            self.metrics.write(step, values)
        if self._training and step >= self._first:
            self._outer_phase.close()  # the first step is done
            self._line.update(step, values)
            if step == self._first:
                self._report_memory("first step")

    def _on_signal(self, *_: Any) -> None:
        """Ends the program at once, unless there is a step to finish."""
        if not self._training:
            sys.exit(RESUMABLE)

    def _stop_asked(self, count: int) -> None:
        if count == 1:
            when = " after this step" if self._training else ""
            again = "" if jax.process_count() > 1 else "; a second signal stops at once"
            self._say(f"stopping{when}{again}")
        else:
            self.console.show_cursor(True)

    def _say(self, text: str) -> None:
        """Prints a line without wrapping or colours, so that it can be copied."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _report_memory(self, when: str) -> None:
        """Says how much memory the run took so far, and writes it to OUT/hardware.json."""
        report = self._memory.report()
        for line in memory.lines(report, when):
            self._say(line)
        if jax.process_index() == 0:
            memory.write_hardware(self.out, report)

    def _set_outer_phase(self, doing: str) -> None:
        self._outer_phase.close()
        self._outer_phase.enter_context(self.phase(doing))

    def _stop_trace(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._say(f"wrote {self.out / 'profile'}")

    def _stop_display(self) -> None:
        self._stop_trace()
        self._outer_phase.close()
        self._line.stop()
