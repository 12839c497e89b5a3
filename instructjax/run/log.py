"""A log of a run: a file of JSON lines with ascending steps, which a resumed run continues."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Log:
    """Opens a log for a run that starts, or that continues after a step.

    Args:
      file: the file, made if it does not exist.
      step: of the checkpoint that the run continues from. The lines after it go to *.cut.jsonl.
        None: all of them do.

    Raises:
      ValueError: the file holds a line that this class cannot have written.
    """

    def __init__(self, file: Path, step: int | None):
        self._name = file.name
        self._steps: list[int] = []  # of the lines that were there
        self._checksum = end = 0
        file.touch()
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if step is None or not line.endswith(b"\n"):  # torn by a kill
                    break
                try:
                    line_step = int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}:{number}: not a JSON object with a step") from error
                if line_step > step:
                    break
                self._steps.append(line_step)
                self._checksum, end = zlib.crc32(line, self._checksum), end + len(line)
            lines.seek(end)
            rest = lines.read()
        if rest:
            with file.with_suffix(".cut.jsonl").open("ab") as cut:
                cut.write(rest if rest.endswith(b"\n") else rest + b"\n")
            os.truncate(file, end)
        self._count = len(self._steps)
        self._file = file.open("a", encoding="utf-8")

    @property
    def mark(self) -> list[int]:
        """[lines, their CRC-32], which a checkpoint stores for `problem`."""
        return [self._count, self._checksum]

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line with the key `step`, in which floats keep every bit.

        Raises:
          ValueError: a number is not finite.
          OSError: the line could not be written.
        """
        try:
            text = json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise ValueError(f"{self._file.name}: step {line['step']}: {error}") from error
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:  # of a full disk, for one, which names no file
            raise OSError(f"{self._file.name}: {error.strerror}") from error
        self._count, self._checksum = self._count + 1, zlib.crc32(text.encode(), self._checksum)

    def problem(self, mark: Sequence[int], step: int, every: int | None) -> str | None:
        """How the lines differ from those that were there when a checkpoint was saved.

        Args:
          mark: from the checkpoint.
          step: of the checkpoint.
          every: steps from one line to the next, if that is known.
        """
        if list(mark) == self.mark:
            return None
        missing = mark[0] - self._count
        if missing <= 0:
            return f"{self._name}: the lines up to step {step:,} are not those that were written"
        says = f"{self._name}: {missing:,} of {mark[0]:,} lines are missing"
        unlogged = sorted(set(range(every, step + 1, every)) - set(self._steps)) if every else []
        # Lines of evaluations may lie between. Then the steps are not known.
        return says + (f", of steps {_ranges(unlogged, every)}" if len(unlogged) == missing else "")

    def sync(self) -> None:
        """Forces the lines onto the disk, because a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _ranges(steps: Sequence[int], apart: int | None) -> str:
    """[1, 2, 3, 7] -> `1 to 3, 7`, where neighbours are `apart`."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + (apart or 1):
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
