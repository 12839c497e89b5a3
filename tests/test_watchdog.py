"""A run that stands still says so and ends; one that works does not."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import test_run

from instructjax.run import FAILED, RESUMABLE, Run, watchdog
from instructjax.run.watchdog import Watchdog


class Service:
    """The part of jax's coordination service that keeps values."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [pair for pair in self.values.items() if pair[0].startswith(prefix)]


class Hosts:
    """Watchdogs of several hosts, with a clock of their own; they look every ten seconds."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int, stall: float):
        self.now, self.computed, self.ended, self.service = 0.0, 0.0, [], Service()
        patch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(watchdog, "_computed", lambda: self.computed)
        patch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: print("stacks"))
        patch.setattr(watchdog.hosts, "end", lambda code, text: self.ended.append((code, text)))
        self.patch, self.count = patch, count
        self.dogs = [Watchdog(stall) for _ in range(count)]

    def on(self, host: int) -> Watchdog:
        state = SimpleNamespace(
            num_processes=self.count,
            process_id=host,
            client=self.service if self.count > 1 else None,
        )
        self.patch.setattr(watchdog, "global_state", state)
        return self.dogs[host]

    def pass_by(self, seconds: int) -> None:
        for _ in range(0, seconds, 10):
            self.now += 10
            for host in range(self.count):
                self.on(host)._look()


def test_hosts_that_wait_say_where_all_stand_once_a_minute(monkeypatch, capsys):
    hosts = Hosts(monkeypatch, 2, stall=30)
    hosts.pass_by(20)
    hosts.on(0).finished(8)
    hosts.on(1).finished(7)
    with hosts.on(0).phase("updating the policy"):
        hosts.pass_by(30)
        with hosts.on(1).phase("scoring the responses"):
            hosts.pass_by(20)
            assert capsys.readouterr().err == ""
            hosts.pass_by(10)
            line = "host 0: no progress for 60 s, after step 8, updating the policy;"
            line += " host 1 moved 20 s ago, after step 7, scoring the responses\n"
            assert capsys.readouterr().err == line
            hosts.pass_by(20)
            assert capsys.readouterr().err == ""
            hosts.pass_by(40)
            err = capsys.readouterr().err
            assert err.count("host 0: no progress for 120 s") == err.count("host 1: no prog") == 1
    hosts.pass_by(50)
    hosts.on(1)._tell(float("inf"))  # its run is left
    hosts.now += 10
    hosts.on(0)._look()
    assert capsys.readouterr().err.endswith("after step 8, in the next step; host 1 has finished\n")
    assert not hosts.ended


def test_the_end_waits_until_no_host_moves(monkeypatch, capsys):
    hosts = Hosts(monkeypatch, 2, stall=5)
    for _ in range(10):
        hosts.pass_by(60)
        hosts.on(1).finished(3)
    assert not hosts.ended
    hosts.pass_by(290)
    assert not hosts.ended
    hosts.pass_by(10)
    code, message = hosts.ended[0]
    assert code == RESUMABLE
    assert message.startswith("no progress for 300 s, after step 3, in the next step; --resume")
    assert "stacks" in capsys.readouterr().out


def test_a_finished_host_keeps_none_alive(monkeypatch):
    hosts = Hosts(monkeypatch, 2, stall=5)
    hosts.on(1)._tell(float("inf"))
    for _ in range(30):
        hosts.now += 10
        hosts.on(0)._look()
    assert hosts.ended


def test_a_single_process_is_silent_until_the_end(monkeypatch, capsys):
    hosts = Hosts(monkeypatch, 1, stall=5)
    hosts.pass_by(290)
    assert capsys.readouterr().err == ""
    hosts.pass_by(10)
    assert hosts.ended
    assert capsys.readouterr().err.startswith("error: no progress for 300 s, after step 0")


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    """As by Ctrl-Z, or while a virtual machine moves."""
    hosts = Hosts(monkeypatch, 1, stall=5)
    hosts.pass_by(200)
    hosts.now += 3600
    hosts.on(0)._look()
    hosts.pass_by(80)
    assert not hosts.ended
    hosts.pass_by(20)
    assert hosts.ended


def test_a_run_that_stands_still_at_each_start_is_given_up(tmp_path, monkeypatch):
    """Not if a start has made a checkpoint."""
    config = test_run.Toy(out=tmp_path, steps=5)
    ends = []
    for start in range(1, 9):
        with Run(config, stage="toy") as run:
            config = dataclasses.replace(config, resume=True)
            if start == 2:
                run.save(1, {"w": jnp.zeros(8)})
                run.checkpoints.wait()
            with monkeypatch.context() as patch:
                hosts = Hosts(patch, 1, stall=5)
                hosts.dogs = [Watchdog(5, lambda run=run: run._reached.useless_start)]
                hosts.pass_by(300)
            ends.append(hosts.ended[0])
    assert [code for code, _ in ends] == [RESUMABLE] * 6 + [FAILED] * 2
    assert "in the next step; no new checkpoint in 5 starts, so another" in ends[6][1]


@pytest.mark.parametrize("stall", [5, float("inf")])
def test_work_of_the_main_thread_is_progress_and_inf_never_ends(monkeypatch, stall):
    hosts = Hosts(monkeypatch, 1, stall)
    for _ in range(60):
        if stall == 5:
            hosts.computed += 0.06  # of ten seconds
        hosts.pass_by(10)
    assert not hosts.ended
    hosts.computed += 0.04
    hosts.pass_by(300)
    assert bool(hosts.ended) == (stall == 5)


def test_only_the_main_threads_time_counts():
    def compute() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    before, thread = watchdog._computed(), threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert watchdog._computed() - before < 0.1
    compute()
    assert watchdog._computed() - before > 0.1


def test_a_program_that_stands_still_prints_its_stacks_and_can_resume(tmp_path):
    program = test_run.start_program(tmp_path / "a", "--pause", "300", "--stall", "0.03")
    output = test_run.finish_program(program, RESUMABLE)
    assert "error: no progress for " in output
    assert "tests/test_run.py" in output.partition("(most recent call first)")[2]
    assert "Traceback" not in output
