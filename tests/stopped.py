"""A run that stops between two steps, as a kill there would stop it."""

import contextlib
from collections.abc import Iterator

import pytest

from instructjax.run import Run


class StopError(Exception):
    """Ends a run."""


@contextlib.contextmanager
def before_step(step: int) -> Iterator[None]:
    """Runs a script that ends before this step. A run that does not get there fails the test."""

    def steps(self: Run, begin: int, total: int, whole=Run.steps) -> Iterator[int]:
        for number in whole(self, begin, total):
            if number == step:
                raise StopError
            yield number

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", steps)
        with pytest.raises(StopError):
            yield
