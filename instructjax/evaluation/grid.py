"""Runs of the scripts that depend on one another. Each is made once, after the runs that it needs.

The flags of a script that makes such a grid, and its runs.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from instructjax import hosts, ranges
from instructjax.ranges import Count, Seed


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The flags of a script that makes a grid of runs."""

    out: Path | None = None
    """Directory of the runs and of the report."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the runs. The text above says what a seed draws."""
    runs: tuple[str, ...] = ()
    """Names of the runs to make, or beginnings of names, such as ppo. The runs that these need are
    made too. By default all."""
    results: Path | None = None
    """Directory of the results of each finished run, without its model, and of report.md. A run
    whose results are there is repeated only if another run needs its model, so a grid can be
    finished on another machine. By default --out."""
    jobs: Count = 1
    """Number of runs at the same time. They share the cores evenly. On two cores, 2 is faster for
    small models, because one run does not use both cores fully."""
    dry_run: bool = False
    """Print the commands and stop."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds: give at least one, each once")

    @property
    def directory(self) -> Path:
        """--out, with `~` expanded."""
        assert self.out is not None
        return self.out.expanduser()

    @property
    def of_seeds(self) -> tuple[int, ...]:
        """The seeds that are run."""
        return self.seeds

    @property
    def results_directory(self) -> Path:
        """--results or --out."""
        return self.directory if self.results is None else self.results.expanduser()


class NothingToDoError(Exception):
    """A run has nothing to read, and is left out. The message says why."""


class NotReadyError(Exception):
    """A run waits for something from outside, such as labels by people. The message says what."""


@dataclass(frozen=True)
class Job:
    """A run of a script of experiments/. Its name is its directory below OUT."""

    script: str  # or, with a `-m ` before it, a module
    flags: Mapping[str, Any]  # without --out; a sequence gives a flag several values
    needs: tuple[str, ...] = ()  # names of runs that must have finished
    positional: tuple[str, ...] = ()
    resumes: bool = True  # whether the script takes --resume
    # Is called before the run begins, or goes on. ValueError, OSError: the run has failed;
    # NothingToDoError: it counts as finished. What the files that it writes are made from should
    # show in the flags, see `digest`, as a finished run is compared by these.
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Grid:
    """Some runs below one directory."""

    out: Path
    jobs: Mapping[str, Job]  # by name, each after those that it needs
    scripts: Path  # the directory experiments/
    results: Path | None = None  # where results of finished runs are kept; None: nowhere else
    # Paths of this machine, such as a data set's, and what kept results have in place of each. That
    # of `out` is OUT.
    places: Mapping[str, str] = field(default_factory=dict)

    def command(self, name: str) -> list[str]:
        """The words of a run's command."""
        job = self.jobs[name]
        module = job.script.removeprefix("-m ")
        script = [str(self.scripts / job.script)] if module == job.script else ["-m", module]
        words = [sys.executable, *script, *job.positional]
        for flag, values in _words(job).items():
            words += [f"--{flag}", *values] if flag else []
        return [*words, "--out", str(self.out / name), *["--resume"] * job.resumes]

    def check(self, runs: Sequence[str]) -> None:
        """Raises ValueError if `runs` are not `chosen`, or have finished with other flags."""
        for name in self.chosen(runs):
            for folder in dict.fromkeys((self.out, self.results or self.out)):
                cost = folder / f"{name}.cost.json"
                if cost.exists():
                    self._compare(name, cost)

    def _compare(self, name: str, cost: Path) -> None:
        """Raises ValueError if a run that has finished was made with other flags than now."""
        flags = self._flags(name)
        recorded = json.loads(cost.read_text()).get("flags", flags)  # an old file has none
        for flag in {**recorded, **flags}:
            before, now = (
                " ".join([f"--{flag}", *x[flag]]) if flag in x else f"no --{flag}"
                for x in (recorded, flags)
            )
            if before != now:
                raise ValueError(
                    f"{cost}: {name} was made with {before}, and not with {now}; give another"
                    " --out and --results, or remove this file"
                )

    def _flags(self, name: str) -> dict[str, list[str]]:
        """A run's flags wherever its grid is."""
        words = _words(self.jobs[name])
        return {k: [*map(self.anywhere, x)] for k, x in words.items()}

    def anywhere(self, value: str) -> str:
        """A flag's value as a finished run's flags have it: `jsonl:runs/rounds/a.jsonl` in the grid
        of runs/rounds is `jsonl:OUT/a.jsonl`."""
        return self._anywhere(value, flag=True)

    @property
    def _names(self) -> dict[str, str]:
        """What stands in place of each path of this machine."""
        return {f"{self.out}": "OUT", **self.places}

    def _anywhere(self, text: str, flag: bool = False) -> str:
        """A text without the absolute paths of this machine, of which the longest come first.

        Args:
          flag: whether it is the value of a flag. One may begin with a relative path, after
            `jsonl:` and the like, and have others after a comma or `*`. One without a `/` is a
            folder there: `prompt=data,data=x` names columns. In other texts that could be any word.
        """
        names = self._names
        for path in sorted(names, key=len, reverse=True):
            escaped = re.escape(path)
            after = "" if path.endswith("/") else r"(?!\.?[\w~-])"  # not in /a.jsonl or /ab
            patterns = []
            if path.startswith("/"):
                patterns = [rf"(?<![\w./~-]){escaped}{after}"]
            elif flag:
                in_list = after if "/" in path else "(?=/)"
                patterns = [rf"(?<![^:]){escaped}{after}", rf"(?<=[,*]){escaped}{in_list}"]
            for pattern in patterns:
                text = re.sub(pattern, lambda _, name=names[path]: name, text)
        return text

    def _anywhere_in(self, written: str) -> str:
        """JSON whose strings hold no absolute path of this machine."""

        def string(found: re.Match[str]) -> str:
            text = json.loads(found[0])
            return found[0] if (moved := self._anywhere(text)) == text else json.dumps(moved)

        return re.sub(r'"(?:[^"\\]|\\.)*"', string, written)

    def has_finished(self, name: str) -> bool:
        """Whether a run has ended well: its cost is written after that."""
        return (self.out / f"{name}.cost.json").exists()

    def has_results(self, name: str) -> bool:
        """Whether the results of a run are kept, here or from another machine."""
        return ((self.results or self.out) / f"{name}.cost.json").exists()

    def needed(self, names: Sequence[str]) -> list[str]:
        """Some runs and those that they need, without those whose results are enough."""
        wanted = [name for name in names if not self.has_results(name)]
        return self.chosen(wanted) if wanted else []

    def keep_results(self) -> None:
        """Copies to `results` what a page needs of the finished runs."""
        if self.results is None:
            return
        for name in self.jobs:
            if self.has_finished(name) and not self.has_results(name):
                # The cost last: it says that all is there.
                for part in (f"{name}/results.json", f"{name}/config.json", f"{name}.cost.json"):
                    if (written := self.out / part).exists():
                        kept = self.results / part
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        part_of_file = kept.with_name(f"{kept.name}.part")
                        part_of_file.write_text(self._anywhere_in(written.read_text()))
                        part_of_file.replace(kept)  # a kill leaves a whole file or none

    def make(self, names: Sequence[str], at_once: int = 1) -> list[str]:
        """Makes those of some runs whose results are not kept, and what they need; see `run_all`.

        SIGTERM stops them. Results are kept in any case.

        Raises:
          NotReadyError: as of `run_all`.
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.keep_results()  # of a start that was killed
        try:
            return self.run_all(self.needed(names), at_once)
        finally:
            self.keep_results()

    def print_commands(self, names: Sequence[str]) -> None:
        for name in names:
            print(shlex.join(["python", *self.command(name)[1:]]))

    def chosen(self, runs: Sequence[str], flag: str = "--runs") -> list[str]:
        """The names that some words stand for, and what these need; without words, all.

        Args:
          runs: names of runs, or how names begin: `e2e` for all `e2e-...`.
          flag: what gave the words, for errors.

        Raises:
          ValueError: a word stands for no run.
        """
        names = set() if runs else set(self.jobs)
        for word in runs:
            named = {name for name in self.jobs if name == word or name.startswith(f"{word}-")}
            if not named:
                raise ValueError(f"{flag} {word}: not one of {', '.join(self.jobs)}")
            names |= named
        for name in reversed(list(self.jobs)):  # what a run needs stands before it
            names |= set(self.jobs[name].needs if name in names else ())
        return [name for name in self.jobs if name in names]

    def run(
        self,
        name: str,
        cores: set[int] | None = None,
        started: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
    ) -> bool:
        """Makes a run with its output in OUT/NAME.log, unless it has finished before.

        OUT/NAME.cost.json gets its seconds, those of starts that were stopped included, and its
        largest memory. Until it ends well, they are in OUT/NAME.spent.json.

        Args:
          cores: processor cores that it may use; None: all.
          started: gets the process.

        Returns:
          whether it succeeded.
        """
        if self.has_finished(name):
            print(f"{name} has finished before", flush=True)
            return True
        print(f"{time.strftime('%H:%M')} {name}", flush=True)
        log, spent = self.out / f"{name}.log", self.out / f"{name}.spent.json"
        cost = {"seconds": 0.0, "peak_gb": 0.0}
        if spent.exists():
            cost = json.loads(spent.read_text())
        if (prepare := self.jobs[name].prepare) is not None:
            try:
                prepare()
            except (ValueError, OSError) as error:
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                return False
            except NothingToDoError as error:
                print(f"{name} is left out: {error}", flush=True)
                self._finish(name, cost)
                return True
        began = time.perf_counter()
        with log.open("a") as file:
            process = subprocess.Popen(self.command(name), stdout=file, stderr=file)
            started(process)
            if cores is not None:
                os.sched_setaffinity(process.pid, cores)
            _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), says how much memory
            process.returncode = os.waitstatus_to_exitcode(status)
        cost["seconds"] += time.perf_counter() - began
        cost["peak_gb"] = max(cost["peak_gb"], usage.ru_maxrss / 1e6)
        if process.returncode == hosts.RESUMABLE:
            print(f"{name} was stopped, and has saved", file=sys.stderr, flush=True)
        elif process.returncode:
            print(f"{name} failed:\n{log.read_text()[-2000:]}", file=sys.stderr, flush=True)
        if process.returncode:
            spent.write_text(json.dumps(cost) + "\n")
            return False
        self._finish(name, cost)
        return True

    def _finish(self, name: str, cost: Mapping[str, float]) -> None:
        written = {**cost, "flags": self._flags(name)}
        (self.out / f"{name}.cost.json").write_text(json.dumps(written) + "\n")
        (self.out / f"{name}.spent.json").unlink(missing_ok=True)

    def run_all(self, names: Sequence[str], at_once: int = 1) -> list[str]:
        """Makes runs, each after those that it needs.

        Where one fails, the others go on, but for those that need it. SystemExit, as from a handler
        of SIGTERM, stops those that run, with SIGTERM. They are waited for, as they save.

        Args:
          at_once: runs at the same time. They share the cores evenly.

        Returns:
          the names of all that have not finished.

        Raises:
          NotReadyError: none failed, all that could be made is made, and some run waits.
        """
        cores = sorted(os.sched_getaffinity(0)) if at_once > 1 else []
        shares = [set(cores[i::at_once]) or None for i in range(at_once)]
        waiting, finished = list(names), set[str]()
        running: dict[Any, tuple[str, set[int] | None]] = {}
        not_ready: dict[str, str] = {}  # why, by name
        failed = set[str]()
        processes: list[subprocess.Popen[bytes]] = []
        stopping, lock = threading.Event(), threading.Lock()

        def started(process: subprocess.Popen[bytes]) -> None:
            with lock:
                processes.append(process)
                if stopping.is_set():
                    _stop(process)

        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            try:
                while True:
                    ready = [name for name in waiting if set(self.jobs[name].needs) <= finished]
                    for name in ready[: len(shares)]:
                        share = shares.pop()
                        waiting.remove(name)
                        running[pool.submit(self.run, name, share, started)] = name, share
                    if not running and not_ready and not failed:
                        raise NotReadyError("\n".join(not_ready.values()))
                    if not running:
                        for message in not_ready.values():
                            print(message, file=sys.stderr)
                        return [name for name in names if name not in finished]
                    done, _ = concurrent.futures.wait(
                        running, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        name, share = running.pop(future)
                        shares.append(share)
                        try:
                            (finished if future.result() else failed).add(name)
                        except NotReadyError as error:
                            not_ready[name] = f"{error}"
            except SystemExit:
                with lock:
                    stopping.set()
                    for process in processes:
                        _stop(process)
                raise


def _words(job: Job) -> dict[str, list[str]]:
    """The values of each flag of a run, and under "" what has no flag."""
    words = {"": [*job.positional]}
    for flag, value in job.flags.items():
        words[flag] = [str(x) for x in (value if isinstance(value, tuple | list) else [value])]
    return words


def from_here(path: Path) -> Path:
    """A path from the current directory, if it is below that: a command then names no folder of
    this machine."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def flags_of(config: Any, name: str) -> dict[str, Any]:
    """The flags that give a script the same config, for `Job.flags`, where they differ from the
    defaults: {"data": "jsonl:a.jsonl", "data.max_prompt": 64}.

    Args:
      config: a dataclass whose `spec` has the flag --NAME itself, such as `DataConfig`.
    """
    flags = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if value != each.default:
            flags[name if each.name == "spec" else f"{name}.{each.name}"] = value
    return flags


def digest(*settings: Any) -> str:
    """Eight characters that tell settings apart, for the name of a file that is made from them.

    Args:
      settings: as JSON can have them; others as text. Paths as `Grid.anywhere` has them, or the
        same files elsewhere are others.
    """
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]


def parse_flags(text: str) -> dict[str, list[str]]:
    """`--ppo.beta 0.1 --mesh data=2` -> {"ppo.beta": ["0.1"], "mesh": ["data=2"]}, for `Job.flags`.

    Names have `_` in place of `-`, as the scripts read both.

    Raises:
      ValueError: it does not begin with a flag.
    """
    flags: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags.pop(name, None)  # the last of one name counts, and stands last: it gets the words
            flags[name] = [value] if equals else []
        elif flags:
            flags[next(reversed(flags))].append(word)
        else:
            raise ValueError(f"{word}: expected a flag, such as --steps 100")
    return flags


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, if the process still runs. Not by `send_signal`, which `Grid.run` would miss."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
