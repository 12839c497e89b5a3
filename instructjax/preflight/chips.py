"""Cloud TPUs: what one chip can do at best, and the slices that they come in.

Figures are peaks, as published; nothing here was measured. The sources:

[v5e], [v5p], [v6e], [tpu7x]: docs.cloud.google.com/tpu/docs/v5e and so on, "key specifications";
[v4]: the same page of v4, which does not state the bandwidth of its interconnect;
[book]: "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus, "TPU specs".
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip; its `devices` in JAX share all of it equally."""

    name: str  # of --topology, and of libtpu's topologies
    hbm: float  # bytes
    usable: float  # bytes of HBM that the compiler gives programs, by its own out-of-memory errors
    flops: float  # bfloat16 a second; float32 matmuls run at this rate at default precision
    hbm_bandwidth: float  # bytes a second
    link: float  # bytes a second of one link of the interconnect, one way
    wraps: int  # an axis of the slice is a ring where this divides it, else a line; see `_ring`
    cloud: str  # the cloud's name of a slice, of {chips} or {cores}
    slices: tuple[str, ...]  # that the cloud lends, smallest first
    devices: int = 1  # of JAX
    config: str | None = None  # libtpu's chip_config_name


_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # libtpu describes no 1x1

# `usable` is what libtpu 0.0.42.1 says is available when a program is too large. The bandwidths of
# links are [book]'s; the pages' own "bidirectional bandwidth per chip" gives 11 % more: v5e 400
# GB/s over 4 links, v6e 800 over 4, v5p 1200 over 6, both ways together. Where axes wrap: [book].
CHIPS = {
    chip.name: chip
    for chip in (
        # [v4]: 275 TFLOP/s, 32 GiB, 1200 GB/s. Two cores a chip, one device ("megacore").
        Chip(
            *("v4", 32 * GiB, 30.75 * GiB, 275e12, 1200e9, 45e9, 4, "v4-{cores}"),
            slices=_CUBES,
            config="megacore",
        ),
        # [v5e]: 197 TFLOP/s, 16 GB, 819 GB/s (800 GiB/s in later editions).
        Chip(
            *("v5e", 16 * GiB, 15.75 * GiB, 197e12, 819e9, 45e9, 16, "v5litepod-{chips}"),
            slices=_SQUARES,
        ),
        # [v5p]: 459 TFLOP/s, 95 GiB, 2765 GB/s. Two cores a chip, one device. libtpu has 0.74 GiB
        # more than the page.
        Chip(
            *("v5p", 95 * GiB, 95.74 * GiB, 459e12, 2765e9, 90e9, 4, "v5p-{cores}"),
            slices=(*_CUBES, "16x16x24"),
            config="megacore",
        ),
        # [v6e]: 918 TFLOP/s, 32 GB, 1638 GB/s ([tpu7x]'s comparison; 1600 on the page).
        Chip(
            *("v6e", 32 * GiB, 31.25 * GiB, 918e12, 1638e9, 90e9, 16, "v6e-{chips}"),
            slices=_SQUARES,
        ),
        # [tpu7x]: 2307 TFLOP/s, 192 GiB, 7380 GB/s. Two devices a chip, 94.75 GiB usable in each;
        # what they share between them is not modelled. Lent through GKE only, by topology; its
        # list of slices is not verified.
        Chip(
            *("tpu7x", 192 * GiB, 189.5 * GiB, 2307e12, 7380e9, 90e9, 4, "tpu7x of GKE"),
            slices=_CUBES,
            devices=2,
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one type, in a grid; or several such, joined by the data-centre network."""

    chip: Chip
    grid: tuple[int, ...]
    num_slices: int = 1

    @property
    def slice(self) -> str:
        """One of them, as `--topology` takes it: v5e:4x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    @property
    def name(self) -> str:
        """v5e:4x4, or 2 x v5e:4x4."""
        return self.slice if self.num_slices == 1 else f"{self.num_slices} x {self.slice}"

    @property
    def chips(self) -> int:
        return self.num_slices * math.prod(self.grid)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def cloud(self) -> str:
        """What the cloud calls it: v5litepod-16, v5p-128 (64 chips: the number counts cores)."""
        chips = math.prod(self.grid)
        one = self.chip.cloud.format(chips=chips, cores=2 * chips)
        return one if self.num_slices == 1 else f"{self.num_slices} x {one}"

    def _ring(self, length: int) -> bool:
        # In three dimensions only whole cubes of 4x4x4 have the optical links that close a ring.
        divided = [size % self.chip.wraps == 0 for size in self.grid]
        return length % self.chip.wraps == 0 and (len(self.grid) == 2 or all(divided))

    def ring_bandwidth(self, group: int) -> float:
        """Bytes a second that each device of a collective can send, on its best day.

        A group lies along as few axes of the grid as hold it, longest first, and sends both ways
        round each: two links an axis that is a ring, one an axis that is a line. Groups that lie
        across one another are assumed not to meet.

        Args:
          group: devices of the collective, two at least.

        Returns:
          nan of several slices: what crosses the network between them is not told apart.
        """
        if self.num_slices > 1:
            return math.nan
        needed, links, held = -(-group // self.chip.devices), 0, 1
        for length in sorted(self.grid, reverse=True):
            if length == 1:
                break
            links += 2 if self._ring(length) else 1
            held *= length
            if held >= needed:
                break
        return max(links, 1) * self.chip.link / self.chip.devices


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Reads `v5e:4x4`, `v5p:4x4x8`: a type of chip and the grid that they are in.

    Args:
      num_slices: how many of them there are.

    Raises:
      ValueError: says what is wrong and what there is; of the cloud's name, what to write for it.
    """
    kind, _, grid = text.partition(":")
    for chip in CHIPS.values():
        for topology in slices(chip.name):
            if topology.cloud == text:
                raise ValueError(f"--topology {text}: the cloud's name; write {topology.name}")
    if kind not in CHIPS:
        raise ValueError(f"--topology {text}: not one of {', '.join(CHIPS)}, as in v5e:4x4")
    chip = CHIPS[kind]
    dims = len(chip.slices[0].split("x"))
    example = f"{kind}:{chip.slices[2]}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid) or grid.count("x") != dims - 1:
        raise ValueError(f"--topology {text}: a {kind} slice has {dims} dimensions, as {example}")
    sizes = tuple(map(int, grid.split("x")))
    if any(size % 2 for size in sizes[:2]):  # a host holds 2x2 chips
        raise ValueError(f"--topology {text}: the first two dimensions are even, as in {example}")
    return Topology(chip, sizes, num_slices)


def slices(kind: str) -> Iterator[Topology]:
    """The slices of a type of chip, smallest first.

    Raises:
      ValueError: there is no such type.
    """
    if kind not in CHIPS:
        raise ValueError(f"--topology {kind}: not one of {', '.join(CHIPS)}")
    for grid in CHIPS[kind].slices:
        yield Topology(CHIPS[kind], tuple(map(int, grid.split("x"))))
