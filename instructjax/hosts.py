"""Several processes as one run: they find one another, and all end when one ends.

An event on one host alone could leave the others waiting in a collective without end. So an error
is written to jax's coordination service, which every process reads once a second. A signal goes
through jax's notifier, which picks a step that no process has started yet. Where a decision depends
on a file that only some hosts see, all hosts use host 0's value. A killed process writes nothing:
the others name it (heartbeat.py), and jax ends them because the killed process sends no heartbeats.
With one process, this module costs nothing.
"""

import faulthandler
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.distributed import global_state  # its client has no public name
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from instructjax import rendezvous
from instructjax.heartbeat import Heartbeat

HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as dead
ERROR, HEARD = "instructjax/error", "instructjax/heard"  # keys in the coordination service
RESUMABLE = 75  # exit code of a run that a supervisor may start again; sysexits' "try again later"
AGREED = (0, RESUMABLE)  # exit codes that all processes end with after the same step
DAY = 24 * 3600


def choose_platform() -> None:
    """Selects the CPU if libtpu is installed but the machine has neither a TPU nor a GPU.

    libtpu would look for a TPU's hosts and print errors. Call this before jax looks for devices.
    """
    accelerators = running_in_cloud_tpu_vm or any(
        Path(device).exists()
        for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    )
    chosen = jax.config.values["jax_platforms"]
    if chosen is None and not accelerators and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", "cpu")


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None if this process is the only one.

    jax itself finds the other processes under SLURM and Open MPI, on Cloud TPUs and on GKE.
    Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe them.

    Args:
      environment: os.environ.

    Raises:
      ValueError: JAX_NUM_PROCESSES or JAX_PROCESS_ID is not a number.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        values = {name: environment.get(variable) for name, variable in names.items()}
        for name, value in values.items():
            if value is not None and not value.isdecimal():
                raise ValueError(f"{names[name]}={value}: expected a number")
        return {name: None if value is None else int(value) for name, value in values.items()}
    # A single process under srun or mpirun joins nothing: jax would give it one GPU of many.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {}
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment["OMPI_COMM_WORLD_SIZE"]) > 1:
        return {}
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if not running_in_cloud_tpu_vm or (workers is None and "TPU_SKIP_MDS_QUERY" in environment):
        return None
    # Without these variables jax asks the TPU VM's metadata server, which may name no other host.
    return {} if workers is None or "," in workers or slices > 1 else None


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if there are any; exits when all of them are done.

    While some are missing, host 0 prints their numbers once a minute. After five minutes all exit
    with RESUMABLE.

    On several hosts, an exception in the body of one ends all of them, except SystemExit with code
    0 or 75: each host prints that host's message and exits with its code. It is not raised.

    Raises:
      ValueError: see `arguments`.
    """
    join = arguments(os.environ)
    if join is not None:
        names = join.get("num_processes"), join.get("process_id")
        address, count, host = rendezvous.place(*names, os.environ)
        if count > 1 and not rendezvous.wait(address, count, host):
            sys.exit(RESUMABLE)
        jax.distributed.initialize(address, count, host, heartbeat_timeout_seconds=HEARTBEAT)
    if global_state.num_processes == 1:
        yield
        return
    watch = _Watch()
    with Heartbeat(global_state.client, global_state.process_id, global_state.num_processes):
        try:
            yield
            watch.leave()
        except BaseException as error:
            if isinstance(error, SystemExit) and (error.code or 0) in AGREED:
                watch.leave()
                raise
            watch.fail(error)


def end(code: int, message: str) -> NoReturn:
    """Ends this process and all others with an exit code, from any thread.

    The others print the message, and those that exit with RESUMABLE the stacks of their threads.
    """
    if global_state.num_processes > 1:
        _report(code, message)
        _let_others_go_first()
    _exit(code)


class _Watch:
    """Ends this process on another host's error, and reports this host's error to the others."""

    def __init__(self):
        self._client: Any = global_state.client
        self._host = global_state.process_id
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Returns when all hosts are done; until then each still reacts to another's error."""
        try:
            self._client.wait_at_barrier("instructjax/done", DAY * 1000)
        except JaxRuntimeError as error:
            self.fail(error)
        self._done.set()  # a thread still waiting in the client would crash the interpreter's exit
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes with this host's error, unless another host's error caused it."""
        reason, code = error, 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            reason = error.__cause__ or f"it exited with {error.code}"  # already printed here
        else:
            traceback.print_exception(error)
            reason = f"{type(error).__name__}: {error}"
        self._exit_on_error()
        if may_be_remote(error):
            print("the connection to another host failed: waiting for its error", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(1.5 * HEARTBEAT)  # until the thread reads the error or jax ends the process
        _report(code, str(reason))
        self._exit_on_error()
        _let_others_go_first()
        _exit(code)

    def _listen(self) -> None:
        while not self._done.wait(1):
            self._exit_on_error()

    def _exit_on_error(self) -> None:
        """Ends the process if another host has reported an error."""
        try:
            host, code, message = json.loads(self._client.key_value_try_get(ERROR))
        except JaxRuntimeError:  # no host has
            return
        if host != self._host:
            print(f"error on host {host}: {message}", file=sys.stderr)
            if code == RESUMABLE:  # the run stood still: this host may be the one that hangs
                faulthandler.dump_traceback(all_threads=True)
            _let_others_go_first()
            _exit(code)


def _report(code: int, message: str) -> None:
    """Leaves a message and an exit code for the others, unless one of them was faster."""
    client: Any = global_state.client
    with suppress(JaxRuntimeError):  # another host was faster, or the service is gone
        client.key_value_set(ERROR, json.dumps([global_state.process_id, code, message[:2000]]))


def _let_others_go_first() -> None:
    """Says that this host exits. Host 0, which holds the service, waits until all have said so."""
    client: Any = global_state.client
    with suppress(JaxRuntimeError):
        client.key_value_set(f"{HEARD}/{global_state.process_id}", "", allow_overwrite=True)
        deadline = time.monotonic() + HEARTBEAT / 2
        while global_state.process_id == 0 and time.monotonic() < deadline:
            if len(client.key_value_dir_get(HEARD)) == global_state.num_processes:
                time.sleep(0.5)  # all others are exiting
                break
            time.sleep(0.1)


def _exit(code: int) -> NoReturn:
    """Exits at once, without jax's shutdown, which waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def may_be_remote(error: BaseException | None) -> bool:
    """Whether the end of another process may have caused this error."""
    while error is not None:
        if isinstance(error, JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if isinstance(error, ValueError) and "Gloo" in str(error):  # of collectives on CPU
            return True
        error = error.__cause__ or error.__context__
    return False


class AgreedSignals:
    """Announces a SIGTERM or SIGINT to any host on all hosts, before the same step.

    jax's notifier handles SIGTERM; a Python handler would replace it and so silence it. SIGINT is
    passed on to the notifier; a second SIGINT raises KeyboardInterrupt.

    Args:
      notify: called with the number of signals, 1, on each host before that step.
      start: number of steps already made; the next is `start + 1`.
    """

    def __init__(self, notify: Callable[[int], None], start: int):
        self.count, self._notify, self._start = 0, notify, start

    def __enter__(self) -> "AgreedSignals":
        self._old = signal.signal(signal.SIGINT, self._pass_on)
        # On a signal jax picks the step after the last one that any host has passed to it. After an
        # early signal that is one of the steps made before, so each of them is passed too.
        for step in range(self._start + 1):
            self.before(step)
        return self

    def _pass_on(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exc: Any) -> None:
        signal.signal(signal.SIGINT, self._old)

    def before(self, step: int) -> None:
        """Call this before each step, on all hosts."""
        if not self.count and multihost_utils.reached_preemption_sync_point(step):
            self.count = 1
            self._notify(1)


def agree(value: np.ndarray | bool | int) -> np.ndarray:
    """Returns host 0's value on all hosts, so that they all take the same decision."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def agree_text(text: str) -> str:
    """Returns host 0's text on all hosts."""
    data = np.frombuffer(text.encode(), np.uint8)
    padded = np.zeros(int(agree(data.size)), np.uint8)
    padded[: data.size] = data[: padded.size]
    return agree(padded).tobytes().decode()


def wait_for_all(name: str) -> None:
    """Returns when all hosts have called it; `name` describes the place in the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def require_equal(name: str, values: Mapping[str, Any]) -> None:
    """Returns when all hosts have called it with the same values. It needs no device.

    Args:
      name: what the values are, such as `flags`.
      values: JSON by name, in which the names of flags are those of the command line.

    Raises:
      ValueError: a value is not host 0's; the message names each such flag.
    """
    if global_state.num_processes == 1:
        return
    client: Any = global_state.client
    key, host = f"instructjax/{name}", global_state.process_id
    if host == 0:
        client.key_value_set(key, json.dumps(values), allow_overwrite=True)
    client.wait_at_barrier(f"{key} are known", DAY * 1000)
    first, here = json.loads(client.key_value_try_get(key)), json.loads(json.dumps(values))
    differing = [
        f"--{each} is {here.get(each)!r} here and {first.get(each)!r} on host 0"
        for each in here | first
        if here.get(each) != first.get(each)
    ]
    if differing:
        raise ValueError(
            f"host {host}: {'; '.join(differing)}: start all hosts with the same flags"
        )
    client.wait_at_barrier(f"{key} are equal", DAY * 1000)
