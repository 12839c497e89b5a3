"""benchmarks/soak.py: which ends of two hosts it accepts, without a run."""

import pytest
from soak import wrong_end

KILLED, ABORTED, TERMINATED = -9, -6, -15


@pytest.mark.parametrize(
    ("faults", "codes"),
    [
        ([], [0, 0]),
        (["kill"], [KILLED, ABORTED]),
        (["kill"], [0, KILLED]),
        (["stop"], [ABORTED, ABORTED]),
        (["link"], [1, 1]),
        (["term"], [75, 75]),
        (["term"], [0, 0]),
        (["term"], [ABORTED, TERMINATED]),
        (["disk"], [1, 1]),
        (["flip"], [KILLED, KILLED]),
        (["cache"], [KILLED, KILLED]),
        (["link", "term"], [75, ABORTED]),
    ],
)
def test_ends_that_a_fault_explains(faults, codes):
    assert wrong_end(faults, codes, joined=True) is None


@pytest.mark.parametrize(
    ("faults", "codes"),
    [
        ([], [1, 1]),
        ([], [ABORTED, ABORTED]),
        (["kill"], [KILLED, 1]),
        (["kill"], [KILLED, 75]),
        (["stop"], [75, 75]),
        (["term"], [1, 1]),
        (["term"], [75, ABORTED]),
        (["disk"], [ABORTED, 1]),
        (["disk", "stop"], [1, 2]),
        (["flip"], [KILLED, ABORTED]),
        (["cache"], [KILLED, 1]),
    ],
)
def test_other_ends_are_named(faults, codes):
    for joined in (True, False):
        wrong = wrong_end(faults, codes, joined)
        assert wrong == f"exit codes {codes} after {', '.join(faults) or 'no fault'}"


@pytest.mark.parametrize("codes", [[KILLED, None], [None, KILLED]])
def test_a_host_that_runs_on_hangs_unless_it_waits_for_the_other_to_join(codes):
    assert wrong_end(["kill"], codes, joined=False) is None
    wrong = wrong_end(["stop", "kill"], codes, joined=True)
    host = codes.index(None)
    assert wrong == f"host {host} still ran 60 s after the other's {codes}, after stop, kill"


def test_without_a_fault_no_host_runs_on():
    assert wrong_end([], [0, None], joined=False) is not None
