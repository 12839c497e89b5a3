"""Cloud TPUs: the peak rates of one chip, and the slices that exist.

Figures are published peaks; nothing here was measured. Sources:

[v5e], [v5p], [v6e], [tpu7x]: docs.cloud.google.com/tpu/docs/v5e and so on, "key specifications";
[v4]: the same page for v4, which does not state the bandwidth of its interconnect;
[book]: "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus, "TPU specs".
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

GiB = 2**30


@dataclass(frozen=True)
class Chip:
    """One type of chip. The JAX devices of a chip share its memory and rates equally."""

    name: str  # as in --topology and in libtpu's topologies
    hbm: float  # bytes
    usable: float  # bytes of HBM that a program can use, from the compiler's out-of-memory errors
    flops: float  # bfloat16 a second; float32 matmuls run at this rate at default precision
    hbm_bandwidth: float  # bytes a second
    link: float  # bytes a second of one link of the interconnect, one way
    wraps: int  # an axis of the slice is a ring if this divides its size, else a line; see `_ring`
    cloud: str  # template of the cloud's name of a slice, with {chips} or {cores}
    slices: tuple[str, ...]  # grids that the cloud offers, smallest first
    kinds: tuple[str, ...]  # jax's names of it, `device_kind`
    devices: int = 1  # JAX devices
    config: str | None = None  # libtpu's chip_config_name


_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# `usable` is the HBM that libtpu 0.0.42.1 reports as available when a program is too large. `link`
# and `wraps` are from [book]. The pages' "bidirectional bandwidth per chip" gives 11 % more: v5e
# 400 GB/s over 4 links, v6e 800 over 4, v5p 1200 over 6, summed over both directions.
CHIPS = {
    chip.name: chip
    for chip in (
        # [v4]: 275 TFLOP/s, 32 GiB, 1200 GB/s. Two cores a chip, one device ("megacore").
        Chip(
            *("v4", 32 * GiB, 30.75 * GiB, 275e12, 1200e9, 45e9, 4, "v4-{cores}"),
            slices=_CUBES,
            kinds=("TPU v4",),
            config="megacore",
        ),
        # [v5e]: 197 TFLOP/s, 16 GB, 819 GB/s (800 GiB/s in later editions).
        Chip(
            *("v5e", 16 * GiB, 15.75 * GiB, 197e12, 819e9, 45e9, 16, "v5litepod-{chips}"),
            slices=_SQUARES,
            kinds=("TPU v5 lite", "TPU v5e"),
        ),
        # [v5p]: 459 TFLOP/s, 95 GiB, 2765 GB/s. Two cores a chip, one device. libtpu reports 0.74
        # GiB more than the page.
        Chip(
            *("v5p", 95 * GiB, 95.74 * GiB, 459e12, 2765e9, 90e9, 4, "v5p-{cores}"),
            slices=(*_CUBES, "16x16x24"),
            kinds=("TPU v5", "TPU v5p"),
            config="megacore",
        ),
        # [v6e]: 918 TFLOP/s, 32 GB, 1638 GB/s ([tpu7x]'s comparison; 1600 on the page).
        Chip(
            *("v6e", 32 * GiB, 31.25 * GiB, 918e12, 1638e9, 90e9, 16, "v6e-{chips}"),
            slices=_SQUARES,
            kinds=("TPU v6 lite", "TPU v6e"),
        ),
        # [tpu7x]: 2307 TFLOP/s, 192 GiB, 7380 GB/s. Two devices a chip, 94.75 GiB usable in each;
        # traffic between the two is not modelled. GKE alone offers it, by topology; the list of
        # slices is not verified.
        Chip(
            *("tpu7x", 192 * GiB, 189.5 * GiB, 2307e12, 7380e9, 90e9, 4, "tpu7x of GKE"),
            slices=_CUBES,
            kinds=("TPU7x",),
            devices=2,
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice, a grid of chips of one type, or several equal slices on the data-centre network."""

    chip: Chip
    grid: tuple[int, ...]
    num_slices: int = 1

    @property
    def slice(self) -> str:
        """One slice as `--topology` takes it: v5e:4x4."""
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
        """The cloud's name: v5litepod-16, v5p-128 (64 chips: the number counts cores)."""
        chips = math.prod(self.grid)
        name = self.chip.cloud.format(chips=chips, cores=2 * chips)
        return name if self.num_slices == 1 else f"{self.num_slices} x {name}"

    def _ring(self, length: int) -> bool:
        # In three dimensions only grids of whole 4x4x4 cubes have the optical links for a ring.
        divided = [size % self.chip.wraps == 0 for size in self.grid]
        return length % self.chip.wraps == 0 and (len(self.grid) == 2 or all(divided))

    def ring_bandwidth(self, group: int) -> float:
        """Bytes a second that each device of a collective can send, at most.

        A group is assumed to lie along as few axes of the grid as can hold it, longest first, and
        to send in both directions: over two links of an axis that is a ring, one of an axis that is
        a line. Different groups are assumed not to share links.

        Args:
          group: number of devices of the collective, at least two.

        Returns:
          Bytes a second; nan if there are several slices, whose network is not modelled.
        """
        if self.num_slices > 1:
            return math.nan
        chips, links, capacity = -(-group // self.chip.devices), 0, 1
        for length in sorted(self.grid, reverse=True):
            if length == 1:
                break
            links += 2 if self._ring(length) else 1
            capacity *= length
            if capacity >= chips:
                break
        return max(links, 1) * self.chip.link / self.chip.devices


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Parses a type of chip and a grid of such chips, as in `v5e:4x4` or `v5p:4x4x8`.

    Args:
      num_slices: number of such slices.

    Raises:
      ValueError: the text is not such a topology; a name of the cloud's gets the right spelling.
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
    example = f"{kind}:{chip.slices[3 if dims == 2 else 2]}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid) or grid.count("x") != dims - 1:
        raise ValueError(f"--topology {text}: a {kind} slice has {dims} dimensions, as {example}")
    sizes = tuple(map(int, grid.split("x")))
    # A host holds 2x2 chips, or one.
    if any(size % 2 for size in sizes[:2]) and grid not in chip.slices:
        raise ValueError(f"--topology {text}: the first two sizes must be even, as in {example}")
    return Topology(chip, sizes, num_slices)


def slices(kind: str) -> Iterator[Topology]:
    """Yields the slices of a type of chip, smallest first.

    Raises:
      ValueError: there is no such type of chip.
    """
    if kind not in CHIPS:
        raise ValueError(f"--topology {kind}: not one of {', '.join(CHIPS)}")
    for grid in CHIPS[kind].slices:
        yield Topology(CHIPS[kind], tuple(map(int, grid.split("x"))))
