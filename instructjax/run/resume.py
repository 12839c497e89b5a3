"""Which checkpoint a run goes on from.

OUT/checkpoint.json says where a run's checkpoints are and which of them was the newest. So a
mistyped --checkpoints, or a checkpoint that has vanished, is an error, and is not taken for a run
that has saved nothing yet. Without this file, as on a new machine, the directory alone counts.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from instructjax import hosts
from instructjax.run.checkpoint import Checkpoints
from instructjax.run.flags import RunConfig


@dataclass(frozen=True)
class Reached:
    """The contents of OUT/checkpoint.json."""

    checkpoints: str | None = None  # --checkpoints; None is OUT/checkpoints
    step: int | None = None  # of the newest checkpoint that was written
    went_back_to: int | None = None  # --resume_step, once that has been done

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
    config: RunConfig, checkpoints: Checkpoints, reached: Reached, say: Callable[[str], None]
) -> int | None:
    """The step to go on from; None is the beginning. All hosts call this.

    With --resume that is the newest checkpoint, and damaged ones are set aside. With --resume_step
    the later ones are set aside first. Where --resume is given as well, as by a script that starts
    a run again, the second start goes on from the newest.

    Raises:
      ValueError: there is no such checkpoint, none is whole, or the newest one has vanished.
    """
    if not config.resuming:
        return None
    steps, wanted = checkpoints.steps(), config.resume_step
    listed = ", ".join(map(str, steps)) or "none"
    go_back = wanted is not None and not (config.resume and reached.went_back_to == wanted)
    if go_back:
        if wanted not in steps:
            raise ValueError(
                f"--resume_step {wanted}: not among the checkpoints in {checkpoints.directory}:"
                f" {listed}"
            )
        for step in steps:
            if step > wanted:
                say(f"{checkpoints.set_aside(step)}: step {step:,} is later than --resume_step")
    elif reached.step is not None and max(steps, default=-1) < reached.step:
        raise ValueError(
            f"{config.out} has saved step {reached.step:,} in"
            f" {reached.checkpoints or config.out / 'checkpoints'}, and the checkpoints in"
            f" {checkpoints.directory} are: {listed}. Give the right --checkpoints, go back to one"
            " of these with --resume_step, or start another run with another --out"
        )
    newest = checkpoints.latest()
    whole = checkpoints.latest_whole()
    if newest is None:
        return None
    if whole is None:
        raise ValueError(
            f"{checkpoints.directory}: no checkpoint is whole; they are in set_aside. Start another"
            " run with another --out"
        )
    if whole < newest:
        say(f"going on from step {whole:,}: {newest - whole:,} steps are made again")
    return whole
