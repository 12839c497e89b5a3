"""Several processes as one run: how they find one another, and how they end together.

Nothing here costs anything where there is one process. What a run does on one host alone, and so
could leave the others waiting in a collective for ever: an error, a signal, a file that only some
of them see. So an error is left in the coordination service, where every process looks once a
second; a signal goes through jax's notifier, which picks a step that all have still before them;
and of a file host 0's word counts. A process that is killed says nothing: jax notices that its
heart has stopped, and ends the others.
"""

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
from jax._src.distributed import global_state  # whose client has no public name
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

HEARTBEAT = 20  # seconds after which a silent process counts as dead
ERROR, HEARD = "instructjax/error", "instructjax/heard"  # keys in the coordination service
AGREED = (0, 75)  # exit codes that all processes come to together
DAY = 24 * 3600


def choose_platform() -> None:
    """Keeps jax to the CPU where libtpu is installed and there is neither a TPU nor a GPU.

    libtpu would look for a TPU's hosts, and print errors. To be called before jax has devices.
    """
    accelerators = running_in_cloud_tpu_vm or any(
        Path(device).exists()
        for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    )
    chosen = jax.config.values["jax_platforms"]
    if chosen is None and not accelerators and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", "cpu")


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None where this process is the only one.

    jax itself finds the others under SLURM, Open MPI and on Cloud TPUs, on GKE too. Anywhere else
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them.

    Args:
      environment: os.environ.

    Raises:
      ValueError: JAX_NUM_PROCESSES or JAX_PROCESS_ID is no number.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        found = {name: environment.get(variable) for name, variable in names.items()}
        for name, value in found.items():
            if value is not None and not value.isdecimal():
                raise ValueError(f"{names[name]}={value}: expected a number")
        return {name: None if value is None else int(value) for name, value in found.items()}
    # Alone under srun or mpirun, jax would take one GPU of many.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {}
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment["OMPI_COMM_WORLD_SIZE"]) > 1:
        return {}
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if not running_in_cloud_tpu_vm or (workers is None and "TPU_SKIP_MDS_QUERY" in environment):
        return None
    # A TPU VM without these variables asks its metadata server, and may turn out to be alone.
    return {} if workers is None or "," in workers or slices > 1 else None


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if there are any; leaves when all of them are done.

    Whatever ends the body on one of several hosts, but for the exit codes 0 and 75, ends all:
    each prints that host's message and exits with its code. The exception does not come out.

    Raises:
      ValueError: as `arguments`.
    """
    found = arguments(os.environ)
    if found is not None:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=HEARTBEAT)
    if global_state.num_processes == 1:
        yield
        return
    watch = _Watch()
    try:
        yield
        watch.leave()
    except BaseException as error:
        if isinstance(error, SystemExit) and (error.code or 0) in AGREED:
            watch.leave()
            raise
        watch.fail(error)


class _Watch:
    """Hears of an error on another host, and tells the others of one's own."""

    def __init__(self):
        self._client: Any = global_state.client
        self._host, self._count = global_state.process_id, global_state.num_processes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Returns when all are done: until then each can still hear of another's error."""
        try:
            self._client.wait_at_barrier("instructjax/done", DAY * 1000)
        except JaxRuntimeError as error:
            self.fail(error)
        self._done.set()  # a thread that waits in the client would crash the interpreter's end
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes with an error of this one, unless it came of another's."""
        reason, code = error, 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            reason = error.__cause__ or f"it exited with {error.code}"  # printed already
        else:
            traceback.print_exception(error)
            reason = f"{type(error).__name__}: {error}"
        self._heed()
        if _of_another(error):
            print("the connection to another host failed: waiting for word of it", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(1.5 * HEARTBEAT)  # in which the thread hears it, or jax ends the process
        with suppress(JaxRuntimeError):  # another was faster, or the service is gone
            message = json.dumps([self._host, code, str(reason)[:2000]])
            self._client.key_value_set(ERROR, message)
        self._heed()
        self._end(code)

    def _listen(self) -> None:
        while not self._done.wait(1):
            self._heed()

    def _heed(self) -> None:
        """Ends the process if another has failed."""
        try:
            host, code, message = json.loads(self._client.key_value_try_get(ERROR))
        except JaxRuntimeError:  # nobody has
            return
        if host != self._host:
            print(f"error on host {host}: {message}", file=sys.stderr)
            self._end(code)

    def _end(self, code: int) -> NoReturn:
        """Exits at once: jax's own end waits for the others. Host 0, the service, goes last."""
        with suppress(JaxRuntimeError):
            self._client.key_value_set(f"{HEARD}/{self._host}", "", allow_overwrite=True)
            deadline = time.monotonic() + HEARTBEAT / 2
            while self._host == 0 and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(HEARD)) == self._count:
                    time.sleep(0.5)  # they are on their way out
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _of_another(error: BaseException | None) -> bool:
    """Whether this may be the end of another process, seen from here."""
    while error is not None:
        if isinstance(error, JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        error = error.__cause__ or error.__context__
    return False


class AgreedSignals:
    """SIGTERM and SIGINT to any host, of which all learn before the same step.

    jax's notifier has taken SIGTERM, and a handler of Python's in its place would silence it.
    SIGINT is passed on to it; a second one raises KeyboardInterrupt.

    Args:
      notify: called with the count, 1, on each host when it learns of the signal.
      start: steps made before; the next is `start + 1`.
    """

    def __init__(self, notify: Callable[[int], None], start: int):
        self.count, self._notify, self._start = 0, notify, start

    def __enter__(self) -> "AgreedSignals":
        self._old = signal.signal(signal.SIGINT, self._pass_on)
        # The step that jax picks for a signal is the one after the last that any host has named, so
        # of an earlier signal one of those made before: none may be left out.
        for step in range(self._start + 1):
            self.before(step)
        return self

    def _pass_on(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exc: Any) -> None:
        signal.signal(signal.SIGINT, self._old)

    def before(self, step: int) -> None:
        """To be called before each step, on all hosts."""
        if not self.count and multihost_utils.reached_preemption_sync_point(step):
            self.count = 1
            self._notify(1)


def agree(here: np.ndarray | bool | int) -> np.ndarray:
    """Host 0's value on all hosts: what they do together must not depend on their own."""
    return multihost_utils.broadcast_one_to_all(np.asarray(here))


def wait_for_all(name: str) -> None:
    """Returns when all hosts have come here; `name` says where that is."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
