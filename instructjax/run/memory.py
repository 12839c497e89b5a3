"""Memory of a run: its peak by phase, the compiler's count, and advice if memory runs out."""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from instructjax.run.flags import RunConfig

MiB, GiB = 2**20, 2**30
PACKAGE = Path(__file__).parents[1]
REST = "the rest"  # what a run does outside of all phases


class Memory:
    """Peaks of a process's memory, by phase.

    The peak of a device cannot be set back, so a phase is known only if it raised the peak. Where a
    device does not report its memory, as on CPU, the process's resident memory is taken.
    """

    def __init__(self):
        self._phases = [REST]  # the innermost last
        self._peak = 0
        self._arrays = 0.0  # the most bytes of arrays at any report
        self._rises: dict[str, int] = {}  # phase -> the peak in bytes, when it last raised it
        self._failed: tuple[Any, str] = None, ""  # an error, and the innermost phase it left

    @contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Attributes a rise of the peak, and an error, to this phase. Phases may nest."""
        self._read()
        self._phases.append(doing)
        try:
            yield
        except Exception as error:
            if self._failed[0] is not error:
                self._failed = error, doing
            raise
        finally:
            self._read()
            self._phases.remove(doing)

    def report(self) -> dict[str, str]:
        """The peak by phase, and the arrays and temporaries that were counted; {} if none is known.

        The count is at most what was needed: the arrays that are alive now, or were at an earlier
        report if they took more, and the largest temporaries and new outputs of any program, which
        need not have run beside them. Preflight counts each program with its own arrays.
        """
        self._read()
        if not self._peak:
            return {}
        stats = _stats()
        of = f" of {_size(stats['bytes_limit'])}" if "bytes_limit" in stats else ""
        what = "a device's memory" if stats else "this process's resident memory"
        rises = ", ".join(f"{phase} {_size(peak)}" for phase, peak in self._rises.items())
        report = {"of": what, "peak": f"{_size(self._peak)}{of}", "phases": rises}
        with suppress(JaxRuntimeError):  # a platform that does not count
            name, temporaries = largest_program()
            self._arrays = max(self._arrays, array_bytes())
            parts = f"arrays {_size(self._arrays)}, temporaries {_size(temporaries)} of {name}"
            report["counted"] = f"{_size(self._arrays + temporaries)} ({parts})"
        return report

    def explain(self, error: BaseException, config: RunConfig, step: int, last: int | None) -> str:
        """One line: where memory ran out, what asked for it, which flags help, the last checkpoint.

        Args:
          error: one for which `ran_out` is true.
          step: the last step that is finished; 0 or less if none is.
          last: step of the last checkpoint.
        """
        doing = self._failed[1] if self._failed[0] is error else ""
        frames = traceback.extract_tb(error.__traceback__)
        script = Path(sys.argv[0]).resolve().parent
        own = [x for x in frames if {PACKAGE, script} & {*Path(x.filename).resolve().parents}]
        where = f" ({os.path.relpath(own[-1].filename)}:{own[-1].lineno})" if own else ""
        reason = " ".join(str(cause_of(error)).split())[:300]
        kept = "no checkpoint was saved"
        if last is not None:
            kept = f"the checkpoint of step {last} is whole"
        flags = ", ".join(flags_that_help(config, doing))
        after = f"after step {step:,}" if step > 0 else "before a step was finished"
        doing = f", {doing}" if doing else ""
        return f"out of memory {after}{doing}{where}: {reason}; less memory: {flags}; {kept}"

    def _read(self) -> None:
        peak = _stats().get("peak_bytes_in_use") or _resident_peak()
        if peak > self._peak:
            self._peak = peak
            self._rises.pop(self._phases[-1], None)  # the last rise comes last
            self._rises[self._phases[-1]] = peak


def lines(report: dict[str, str], when: str) -> list[str]:
    """What the terminal shows of `Memory.report`."""
    said = []
    if report:
        peak = f"{report['peak']} ({report['phases']})"
        said.append(f"memory, {when}: peak of {report['of']} {peak}")
    if "counted" in report:
        said.append(f"memory, {when}: counted on a device: {report['counted']}")
    return said


def write_hardware(out: Path, report: dict[str, str]) -> None:
    """Writes the devices of all hosts and `Memory.report` to OUT/hardware.json."""
    first = jax.devices()[0]
    hardware = {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "memory": report,
    }
    part = out / "hardware.part"
    part.write_text(json.dumps(hardware, indent=2) + "\n")
    part.replace(out / "hardware.json")


def ran_out(error: BaseException | None) -> bool:
    """Whether a device or the machine had no memory left."""
    return cause_of(error) is not None


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error among an error's causes that says that memory ran out; None if none does."""
    while error is not None:
        if isinstance(error, MemoryError):
            return error
        # jax raises a JaxRuntimeError, and a ValueError where a program is started.
        if isinstance(error, RuntimeError | ValueError) and "RESOURCE_EXHAUSTED" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def flags_that_help(config: RunConfig, doing: str) -> list[str]:
    """The flags of this script that lower its memory, beyond their present values."""
    flags = []
    for name in ("microbatches", "ppo.microbatches", "ptx.microbatches"):
        with suppress(AttributeError):
            flags.append(f"--{name} above {attrgetter(name)(config)}")
    if hasattr(config, "sample_batch"):
        now = attrgetter("sample_batch")(config) or attrgetter("batch_size")(config)
        first = 0 if doing.startswith("sampling") else len(flags)
        flags.insert(first, f"--sample_batch below {now}")
    if config.remat != "full":
        flags.append("--remat full")
    if getattr(config, "offload", True) is False:
        flags.append("--offload")
    if jax.device_count() > 1:
        flags.append("--mesh with more devices along fsdp and tensor")
        if not config.shard_sequence:
            flags.append("--shard_sequence with a tensor axis")
    return [*flags, "a smaller --batch_size"]


def array_bytes() -> float:
    """Bytes of all arrays on the first local device, without those in host memory."""
    device = jax.local_devices()[0]
    kind = device.default_memory().kind
    total = 0.0
    for array in jax.live_arrays():
        layout = array.sharding
        if device in layout.device_set and layout.memory_kind in (None, kind):
            count = 1
            for size in layout.shard_shape(array.shape):
                count *= size
            total += count * array.dtype.itemsize
    return total


def largest_program() -> tuple[str, int]:
    """The compiled program with most bytes of temporaries and new outputs on a device, and those.

    Raises:
      JaxRuntimeError: the platform does not count.
    """
    largest, most = None, -1
    for program in jax.local_devices()[0].client.live_executables():
        stats = program.get_compiled_memory_stats()
        size = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        if size > most:
            largest, most = program, size
    return (largest.hlo_modules()[0].name, most) if largest else ("no program", 0)


def _size(number: float) -> str:
    return f"{number / GiB:.2f} GiB" if number >= GiB else f"{number / MiB:.0f} MiB"


def _stats() -> dict[str, int]:
    """Memory of the local device with the highest peak; nothing where devices do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(stats, key=lambda each: each.get("peak_bytes_in_use", 0))


def _resident_peak() -> int:
    """Bytes of the process's largest resident memory; 0 where the system is not Linux."""
    with suppress(OSError):
        # getrusage would count the process that started this one.
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(match.group(1)) if match else 0
    return 0
