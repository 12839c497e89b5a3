"""The processes of a run wait for one another by name, and notice one that has fallen silent."""

import ctypes
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_watchdog import Service

from instructjax import rendezvous
from instructjax.heartbeat import Heartbeat


class Output:
    """What was printed to stderr so far."""

    def __init__(self, capsys):
        self._capsys, self.text = capsys, ""

    def wait_for(self, part: str) -> None:
        deadline = time.monotonic() + 60
        while part not in self.text:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
            self.text += self._capsys.readouterr().err


@pytest.fixture
def printed(capsys) -> Output:
    return Output(capsys)


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def test_the_hosts_that_have_not_joined_are_named(address, printed):
    """Host 2 comes first, and strangers; host 1 comes, ends and comes back; host 3 comes last."""
    where = address.split(":")
    with ThreadPoolExecutor(4) as pool:
        hosts = [pool.submit(rendezvous.wait, address, 4, 2, 60, 0.2)]
        printed.wait_for(f" s: no answer from host 0 at {address}\n")
        hosts.append(pool.submit(rendezvous.wait, address, 4, 0, 60, 0.2))
        printed.wait_for("host 0 of 4, after ")
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"\xff", b"instructjax one"):
            with socket.create_connection(where) as stranger:
                stranger.sendall(greeting)
        printed.text = ""
        printed.wait_for(" s: 2 hosts (1, 3) have not joined yet\n")
        with socket.create_connection(where) as host_1:
            host_1.sendall(b"instructjax 1")
            printed.wait_for(" s: host 3 has not joined yet\n")
        printed.text = ""
        printed.wait_for(" s: 2 hosts (1, 3) have not joined yet\n")
        hosts += [pool.submit(rendezvous.wait, address, 4, host, 60, 0.2) for host in (1, 3)]
        assert [host.result() for host in hosts] == [True] * 4
    with socket.create_server(("localhost", int(where[1]))):  # the port is free for jax
        pass


def test_a_run_without_all_hosts_gives_up(address, printed):
    with ThreadPoolExecutor(2) as pool:
        hosts = [pool.submit(rendezvous.wait, address, 4, host, 1, 60) for host in (0, 2)]
        assert [host.result() for host in hosts] == [False, False]
    printed.wait_for("host 0 of 4, after 1 s: 2 hosts (1, 3) have not joined; giving up\n")


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"host 0 cannot listen on port {port}: Address already"):
            rendezvous.wait(f"localhost:{port}", 2, 0, 1)


def test_a_place_that_no_cluster_tells_is_refused():
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_"):
        rendezvous.place(None, 1, {"JAX_COORDINATOR_ADDRESS": "a:1"})
    assert rendezvous.place(2, 1, {"JAX_COORDINATOR_ADDRESS": "a:1"}) == ("a:1", 2, 1)


def test_a_host_that_falls_silent_is_named_and_is_heard_again(printed, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "worker-b")
    service = Service()
    with Heartbeat(service, 0, 2, silence=0.5, every=0.02):
        with Heartbeat(service, 1, 2, silence=60, every=0.02):
            while "instructjax/beat/1" not in service.values:
                time.sleep(0.01)
        printed.wait_for("host 0: host 1 (worker-b) has been silent for 0.5 s: it was killed or")
        with Heartbeat(service, 1, 2, silence=60, every=0.02):
            printed.wait_for("host 0: host 1 (worker-b) is heard again\n")
    assert "host 0 (" not in printed.text


def test_a_host_gives_its_name_before_the_first_second_has_passed():
    """A host that dies early is named too."""
    service = Service()
    with Heartbeat(service, 1, 2, every=60):
        deadline = time.monotonic() + 30
        while "instructjax/beat/1" not in service.values:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_service_that_does_not_answer_names_host_0_alone(printed):
    """Nothing is known of the others then."""
    released, service = threading.Event(), Service()
    service.key_value_dir_get = lambda _: released.wait() and []
    with Heartbeat(service, 1, 3, silence=0.2, every=0.02):
        printed.wait_for("host 1: host 0 has been silent for 0.2 s")
        released.set()
    assert "host 2" not in printed.text


def test_a_host_that_was_stopped_itself_names_no_other(capsys):
    """As by SIGSTOP, or by a call that blocks Python. Its threads then go on in any order."""
    with Heartbeat(Service(), 1, 2, silence=0.3, every=0.03):
        for _ in range(4):
            time.sleep(0.1)
            ctypes.PyDLL(None).usleep(400_000)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
