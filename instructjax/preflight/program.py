"""Compiles jitted functions for a slice, and reports their memory, counts and estimated time."""

import contextlib
import dataclasses
import inspect
import math
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from instructjax.preflight import hlo
from instructjax.preflight.chips import GiB, Topology
from instructjax.preflight.count import Counts, count

# Kind of an argument: the first whose pattern is in its path, `state.opt_state[1][0].mu['embed']`.
KINDS = {
    "optimizer": r"opt_state|ema",
    "gradients": r"grads",
    "cache": r"cache",
    "parameters": r"params|weights|frozen",
}


@dataclass(frozen=True)
class Compilable:
    """A jitted function and its arguments."""

    name: str  # in the tables
    jitted: Any  # result of `jax.jit`
    args: tuple[Any, ...]  # trees of ShapeDtypeStructs, sharded over `topology.make_mesh`'s devices
    static: Mapping[str, Any] = field(default_factory=dict)  # the static arguments, by name
    trips: Sequence[float] = ()  # see `count.count`
    runs: float = 1  # in an iteration of PPO, or a step of SFT or RM
    resident: float = 0  # see `Memory`; `shard_bytes` of the trees that stay
    made: float = 0  # bytes of arrays that it is known to make, such as a cache; for `lower_bound`
    # Shorter calls of the same program: name -> trips. They are listed with 0 runs.
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Sizes of arguments are their shards', without the padding of tiles."""

    parameters: float
    optimizer: float  # moments, and an average of the parameters
    gradients: float  # sums of gradients over several batches, if they are arguments
    cache: float
    other: float  # batches, keys, the padding of all arguments
    outputs: float  # results that do not reuse an argument's memory
    temporaries: float  # activations, gradients, gathered weights; all else if it does not fit
    code: float
    host: float  # arguments in pinned host memory
    resident: float = 0.0  # other models that stay in HBM during the run

    @property
    def peak(self) -> float:
        """Largest use of HBM as laid out by the compiler, arguments and other models included."""
        return sum(dataclasses.astuple(self)) - self.host


@dataclass(frozen=True)
class Program:
    """Memory, counts and times of one program on each device."""

    name: str
    topology: Topology
    memory: Memory
    counts: Counts | None  # None if the program does not fit and so was not compiled
    runs: float  # in the work that a table describes, such as one iteration of PPO

    @property
    def usable(self) -> float:
        """Bytes of HBM that programs on one device can use."""
        return self.topology.chip.usable / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        return self.counts is not None and self.memory.peak <= self.usable

    @property
    def compute_seconds(self) -> float:
        """Seconds of matmuls in one run, at the peak rate; nan if it was not compiled."""
        chip = self.topology.chip
        return self.counts.flops / (chip.flops / chip.devices) if self.counts else float("nan")

    @property
    def memory_seconds(self) -> float:
        """Seconds of HBM traffic in one run, at the peak bandwidth; nan if it was not compiled."""
        chip = self.topology.chip
        rate = chip.hbm_bandwidth / chip.devices
        return self.counts.hbm_bytes / rate if self.counts else float("nan")

    @property
    def network_seconds(self) -> float:
        """Seconds of all collectives of one run in sequence; see `Topology.ring_bandwidth`."""
        if self.counts is None:
            return float("nan")
        rate = self.topology.ring_bandwidth
        return sum(each.bytes / rate(each.group) for each in self.counts.collectives)

    @property
    def seconds(self) -> float:
        """Roofline of one run in seconds: max(compute, HBM) + network.

        It leaves out latencies, copies to and from host memory, the host's own work, and matmuls
        too small to fill a matrix unit. It does not overlap collectives with compute.
        """
        return max(self.compute_seconds, self.memory_seconds) + self.network_seconds

    @property
    def overlapped_seconds(self) -> float:
        """Roofline of one run in seconds if collectives overlap with everything: the longest of
        compute, HBM and network. With `seconds` it bounds the time that the model allows.
        """
        return max(self._parts.values())

    @property
    def bound(self) -> str:
        """What takes longest: `FLOPs`, `HBM` or `network`; `?` if a time is not known."""
        parts = self._parts
        if any(map(math.isnan, parts.values())):
            return "?"
        return max(parts, key=lambda name: parts[name])

    @property
    def _parts(self) -> dict[str, float]:
        """Seconds of each part of one run. One that is not known comes first: max is then nan."""
        times = self.network_seconds, self.compute_seconds, self.memory_seconds
        return dict(zip(("network", "FLOPs", "HBM"), times, strict=True))

    def json(self) -> dict[str, Any]:
        """Bytes, FLOPs and seconds of one device and run, for a file; None if not known."""
        seconds = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
            "overlapped": self.overlapped_seconds,
            "roofline": self.seconds,
        }
        return {
            "name": self.name,
            "topology": self.topology.name,
            "runs": self.runs,
            "memory": dataclasses.asdict(self.memory) | {"peak": self.memory.peak},
            "usable": self.usable,
            "fits": self.fits,
            "counts": self.counts and dataclasses.asdict(self.counts),
            "seconds": self.counts
            and {name: None if math.isnan(x) else x for name, x in seconds.items()},
        }


def analyse(
    programs: Sequence[Compilable],
    topology: Topology,
    until: Callable[[Program], bool] = lambda program: False,
) -> Generator[list[Program]]:
    """Compiles functions for a slice, two at a time; yields, in order, each one's parts and itself.

    Args:
      topology: the slice that the arguments are sharded over.
      until: stops the analysis if true of a program: no further program is started.
    """
    ended = threading.Event()

    def run(each: Compilable) -> list[Program]:
        analysed = [] if ended.is_set() else _analyse(each, topology)
        # Set here, not in the loop below: a worker would start the next program before that.
        if analysed and until(analysed[-1]):
            ended.set()
        return analysed

    with _uncached(), ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run, each) for each in programs]
        try:
            for future in futures:
                analysed = future.result()
                yield analysed
                if until(analysed[-1]):
                    return
        finally:
            pool.shutdown(cancel_futures=True)


def lower_bound(program: Compilable, topology: Topology) -> Program:
    """The memory that a program takes at least, without compiling it: arguments, other models, and
    what it is known to make.
    """
    sizes = _arguments(program.jitted, program.args) | {"resident": program.resident}
    memory = Memory(**sizes, other=0, outputs=0, temporaries=program.made, code=0)
    return Program(program.name, topology, memory, None, program.runs)


def _analyse(program: Compilable, topology: Topology) -> list[Program]:
    name, jitted, args = program.name, program.jitted, program.args
    bound = lower_bound(program, topology)
    if bound.memory.peak > bound.usable:  # compiling would take long to come to the same answer
        return [bound]
    try:
        compiled = jitted.lower(*args, **program.static).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        arguments = bound.memory.peak - bound.memory.temporaries - program.resident
        more = max(bound.memory.temporaries, needed - arguments)
        return [
            dataclasses.replace(bound, memory=dataclasses.replace(bound.memory, temporaries=more))
        ]
    stats = compiled.memory_analysis()
    arguments = sum(getattr(bound.memory, kind) for kind in KINDS)
    memory = dataclasses.replace(
        bound.memory,
        other=max(0.0, stats.argument_size_in_bytes - arguments),
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    module = hlo.parse(compiled.as_text())
    calls: list[tuple[str, Sequence[float], float]]
    calls = [(part, trips, 0) for part, trips in program.parts.items()]
    calls.append((name, program.trips, program.runs))
    return [
        Program(call_name, topology, memory, count(module, trips), runs)
        for call_name, trips, runs in calls
    ]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Turns off jax's cache on disk: it cannot load a program compiled for absent devices."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # the cache reads its settings only once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def shard_bytes(tree: Any) -> float:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    return float(
        sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )
    )


def _arguments(jitted: Any, args: Sequence[Any]) -> dict[str, float]:
    """Bytes of each kind of argument on one device, and of those in host memory."""
    sizes = dict.fromkeys([*KINDS, "host"], 0.0)
    # A path in the tuple begins with a number; the function's parameter name replaces it.
    names = list(inspect.signature(jitted).parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        name = names[path[0].idx] + jax.tree_util.keystr(path[1:])
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name)), None)
        size = shard_bytes(leaf)
        if leaf.sharding.memory_kind == "pinned_host":
            sizes["host"] += size
        elif kind is not None:
            sizes[kind] += size
    return sizes


def _needed(error: str) -> float | None:
    """Bytes of HBM that an out-of-memory error says a program needs; None for another error."""
    units = {"K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}
    size = r"([\d.]+)([KMGT])"
    total = rf"memory required .*?\({size}\) exceeds available HBM"
    # If the program nearly fits, the message is another: its total includes the chip's reserve.
    excess = rf"memory space hbm\. Used {size} of {size} hbm\. Exceeded hbm capacity by {size}"
    if match := re.search(excess, error):
        _, _, number, unit, excess_number, excess_unit = match.groups()
        return float(number) * units[unit] + float(excess_number) * units[excess_unit]
    match = re.search(total, error)
    return float(match.group(1)) * units[match.group(2)] if match else None
