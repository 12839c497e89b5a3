"""Jitted functions compiled for a slice: their memory, their counts, an estimate of their time."""

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

# What an argument is, by the first of these that its path has: `state.opt_state[1][0].mu['embed']`.
KINDS = {
    "optimizer": r"opt_state|ema",
    "gradients": r"grads",
    "cache": r"cache",
    "parameters": r"params|weights",
}


@dataclass(frozen=True)
class Compilable:
    """A jitted function, with what it is called with."""

    name: str  # for the table
    jitted: Any  # of `jax.jit`
    args: tuple[Any, ...]  # trees of ShapeDtypeStructs, sharded over `topology.make_mesh`'s devices
    static: Mapping[str, Any] = field(default_factory=dict)  # the static arguments, by name
    trips: Sequence[float] = ()  # see `count.count`
    runs: float = 1  # in an iteration of PPO; of SFT and RM, in a step
    resident: float = 0  # see `Memory`; `shard_bytes` of those trees
    # Calls of the same program that do less, by name: their trips. They are listed with no runs.
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Those of arguments are their shards', without the padding of tiles."""

    parameters: float
    optimizer: float  # moments, and an average of the parameters
    gradients: float  # that are arguments: of several batches, added up
    cache: float
    other: float  # batches, keys, the padding of all arguments
    outputs: float  # that take over no argument's memory
    temporaries: float  # activations, gradients, gathered weights; where it does not fit, all else
    code: float
    host: float  # arguments that rest in pinned host memory
    resident: float = 0.0  # what is no argument and stays in HBM all the while: other models

    @property
    def peak(self) -> float:
        """HBM at most: what the compiler laid out, arguments included."""
        return sum(dataclasses.astuple(self)) - self.host


@dataclass(frozen=True)
class Program:
    """What is known of one program, for each device."""

    name: str
    topology: Topology
    memory: Memory
    counts: Counts | None  # None where the compiler gave up: it does not fit
    runs: float  # in what the programs of a table make together, such as one iteration of PPO

    @property
    def usable(self) -> float:
        """Bytes of HBM that there are."""
        return self.topology.chip.usable / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        return self.counts is not None and self.memory.peak <= self.usable

    @property
    def compute_seconds(self) -> float:
        """Of one run, at the peak rate of matmuls; nan where it was not compiled."""
        chip = self.topology.chip
        return self.counts.flops / (chip.flops / chip.devices) if self.counts else float("nan")

    @property
    def memory_seconds(self) -> float:
        """Of one run, at the peak bandwidth of HBM."""
        chip = self.topology.chip
        rate = chip.hbm_bandwidth / chip.devices
        return self.counts.hbm_bytes / rate if self.counts else float("nan")

    @property
    def network_seconds(self) -> float:
        """Of one run: all its collectives one after another; see `Topology.ring_bandwidth`."""
        if self.counts is None:
            return float("nan")
        rate = self.topology.ring_bandwidth
        return sum(each.bytes / rate(each.group) for each in self.counts.collectives)

    @property
    def seconds(self) -> float:
        """Roofline of one run: max(compute, HBM), then the network.

        Not in it: latencies, moves to and from host memory, the host's own work, and matmuls whose
        shapes fill no matrix unit. Nor that the compiler hides collectives behind compute.
        """
        return max(self.compute_seconds, self.memory_seconds) + self.network_seconds

    def json(self) -> dict[str, Any]:
        """For a file: bytes, FLOPs and seconds of one device and run; None what is not known."""
        seconds = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
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
    """Compiles functions for a slice, two at a time; of each in turn, its parts and itself.

    Args:
      topology: the slice that the arguments are over.
      until: ends it with the first program of which it is true: no other begins after that.
    """
    ended = threading.Event()

    def run(each: Compilable) -> list[Program]:
        found = [] if ended.is_set() else _analyse(each, topology)
        # Here, and not where results are read: by then a worker would have begun the next.
        if found and until(found[-1]):
            ended.set()
        return found

    with _uncached(), ThreadPoolExecutor(max_workers=2) as pool:
        begun = [pool.submit(run, each) for each in programs]
        try:
            for each in begun:
                found = each.result()
                yield found
                if until(found[-1]):
                    return
        finally:
            pool.shutdown(cancel_futures=True)


def held(program: Compilable, topology: Topology) -> Program:
    """What is known before a program is compiled: what its arguments and other models take."""
    sizes = _arguments(program.jitted, program.args) | {"resident": program.resident}
    memory = Memory(**sizes, other=0, outputs=0, temporaries=0, code=0)
    return Program(program.name, topology, memory, None, program.runs)


def _analyse(program: Compilable, topology: Topology) -> list[Program]:
    name, jitted, args = program.name, program.jitted, program.args
    known = held(program, topology)
    if known.memory.peak > known.usable:  # the compiler would take its time to say so
        return [known]
    try:
        compiled = jitted.lower(*args, **program.static).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        rest = max(0.0, needed - (known.memory.peak - program.resident))
        return [
            dataclasses.replace(known, memory=dataclasses.replace(known.memory, temporaries=rest))
        ]
    stats = compiled.memory_analysis()
    arguments = sum(getattr(known.memory, kind) for kind in KINDS)
    memory = dataclasses.replace(
        known.memory,
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
        Program(called, topology, memory, count(module, trips), runs)
        for called, trips, runs in calls
    ]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without jax's cache on disk, which cannot read back what was compiled for no real device."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it looks at its settings once
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
    """Bytes of each kind of argument on one device, and in host memory."""
    sizes = dict.fromkeys([*KINDS, "host"], 0.0)
    # A pytree's path begins with a number; what the function calls the argument says more.
    names = list(inspect.signature(jitted).parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(args)):
        said = names[path[0].idx] + jax.tree_util.keystr(path[1:])
        kind = next((kind for kind, words in KINDS.items() if re.search(words, said)), None)
        held = shard_bytes(leaf)
        if leaf.sharding.memory_kind == "pinned_host":
            sizes["host"] += held
        elif kind is not None:
            sizes[kind] += held
    return sizes


def _needed(error: str) -> float | None:
    """Bytes of HBM that the compiler says a program would take; None of another error."""
    units = {"K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}
    size = r"([\d.]+)([KMGT])"
    total = rf"memory required .*?\({size}\) exceeds available HBM"
    # Of what nearly fits it says more, with what the chip reserves for itself in the total.
    excess = rf"memory space hbm\. Used {size} of {size} hbm\. Exceeded hbm capacity by {size}"
    if found := re.search(excess, error):
        _, _, number, unit, *over = found.groups()
        return float(number) * units[unit] + float(over[0]) * units[over[1]]
    found = re.search(total, error)
    return float(found.group(1)) * units[found.group(2)] if found else None
