"""Chooses the checkpoint from which a run continues.

OUT/checkpoint.json says where a run's checkpoints are and which of them was the newest. So a
mistyped --checkpoints, or a checkpoint that has vanished, is an error, and does not look like a run
without checkpoints. Without this file, as on a new machine, only the directory counts.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from instructjax import hosts
from instructjax.run.checkpoint import Checkpoints
from instructjax.run.flags import RunConfig

STARTS = 5  # starts without a new checkpoint, after which a run that stands still is given up


@dataclass(frozen=True)
class Reached:
    """The contents of OUT/checkpoint.json."""

    checkpoints: str | None = None  # --checkpoints; None is OUT/checkpoints
    step: int | None = None  # of the newest checkpoint that was written
    starts: int = 0  # since that checkpoint was written
    went_back_to: int | None = None  # the last start's --resume_step, once that has been done

    @property
    def useless_start(self) -> str | None:
        """Why a run that stands still should not be started again; None: it should be."""
        if self.starts < STARTS:
            return None
        return f"no new checkpoint in {self.starts} starts, so another start would be of no use"

    @staticmethod
    def read(out: Path) -> "Reached":
        """Host 0's record, on all hosts.

        Raises:
          ValueError: the file is damaged.
        """
        file = _file(out)
        try:
            text = file.read_text() if file.exists() else "{}"
            record = Reached(**json.loads(hosts.agree_text(text)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}: damaged; without this file, --resume takes the newest checkpoint"
            ) from error
        return record

    def write(self, out: Path) -> None:
        """Host 0 calls this."""
        part = _file(out).with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self)) + "\n")
        part.replace(_file(out))


def _file(out: Path) -> Path:
    return out / "checkpoint.json"


def directory(config: RunConfig, reached: Reached) -> epath.Path:
    """Directory of the checkpoints: --checkpoints, or where a resumed run's are."""
    if config.resuming and config.checkpoints is None and reached.checkpoints is not None:
        return epath.Path(reached.checkpoints)
    return config.checkpoint_directory


def choose(
    config: RunConfig,
    checkpoints: Checkpoints,
    reached: Reached,
    say: Callable[[str], None],
    chosen: Callable[[int], None],
) -> int | None:
    """The step to go on from; None is the beginning. All hosts call this.

    With --resume that is the newest checkpoint, and damaged ones are set aside. With --resume_step
    the later ones are set aside first. Where --resume is given as well, as by a script that starts
    a run again, the second start goes on from the newest.

    Args:
      chosen: records the step, before a checkpoint is moved: a kill in between must not make the
        next start miss those that were moved.

    Raises:
      ValueError: there is no such checkpoint, it or all of them are damaged, or the newest one has
        vanished.
    """
    if not config.resuming:
        return None
    steps, wanted = checkpoints.steps(), config.resume_step
    listed = ", ".join(map(str, steps)) or "none"
    went_back = config.resume and reached.went_back_to == wanted
    if wanted is not None and not went_back:
        _go_back(wanted, steps, checkpoints, say, chosen)
        return wanted
    if reached.step is not None and max(steps, default=-1) < reached.step:
        raise ValueError(
            f"{config.out} has saved step {reached.step:,} in"
            f" {reached.checkpoints or config.out / 'checkpoints'}, and the checkpoints in"
            f" {checkpoints.directory} are: {listed}. Give the right --checkpoints, go back to one"
            " of these with --resume_step, or start another run with another --out"
        )
    newest = checkpoints.latest()
    whole = checkpoints.latest_whole(chosen)
    if newest is None:
        return None
    if whole is None:
        raise ValueError(
            f"{checkpoints.directory}: no checkpoint is whole; they are in set_aside. Start another"
            " run with another --out"
        )
    if wanted is not None:
        say(f"--resume_step {wanted}: an earlier start went back; without --resume, this one would")
    if whole < newest:
        again = newest - whole
        lost = "1 step is" if again == 1 else f"{again:,} steps are"
        say(f"going on from step {whole:,}: {lost} made again")
    return whole


def check_frozen(
    out: Path, step: int, then: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]
) -> None:
    """Compares the frozen weights of a checkpoint with those that the run has loaded.

    Args:
      then, now: (name, fingerprint) by flag. A flag that only one of them has is not compared.

    Raises:
      ValueError: they are other weights.
    """
    for flag in then.keys() & now.keys():
        (old_name, old), (name, fingerprint) = then[flag], now[flag]
        if old != fingerprint:
            raise ValueError(
                f"{out}: step {step:,} was trained on {old_name} with the fingerprint {old}, and"
                f" {flag} now gives {name} with {fingerprint}: these are other weights. Put the"
                " former ones back, or start another run with another --out"
            )


def _go_back(
    wanted: int,
    steps: list[int],
    checkpoints: Checkpoints,
    say: Callable[[str], None],
    chosen: Callable[[int], None],
) -> None:
    where, listed = checkpoints.directory, ", ".join(map(str, steps)) or "none"
    if wanted not in steps:
        raise ValueError(f"--resume_step {wanted}: not among the checkpoints in {where}: {listed}")
    if (why := checkpoints.damage(wanted)) is not None:
        raise ValueError(
            f"--resume_step {wanted}: {where / str(wanted)} is damaged ({why}); the checkpoints"
            f" are: {listed}"
        )
    chosen(wanted)
    for step in steps:
        if step > wanted:
            say(f"{checkpoints.set_aside(step)}: step {step:,} is later than --resume_step")
