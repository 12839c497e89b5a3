"""The device mesh, and how arrays are split over it.

The mesh has three axes: `data` splits the batch and replicates the parameters, `fsdp` splits both,
`tensor` splits a layer's heads, MLP and vocabulary. The model gives each dimension a logical name;
only the tables below map these names to mesh axes.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis -> the mesh axes that split it.
Rules = dict[str, tuple[str, ...]]
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "sequence": (),
    "layers": (),
    "vocab": ("tensor",),
    "position": (),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "rank": (),  # of an adapter
    "norm": (),  # vectors as wide as a layer: too small to be worth a collective
}

# Also splits the sequence over `tensor` between sublayers (Korthikanti et al. 2022): a chip keeps a
# share of each layer's residuals, and all-gathers and reduce-scatters replace the all-reduces.
SEQUENCE = {**RULES, "sequence": ("tensor",)}

# For decoding, which reads all weights at each token: `fsdp` splits no weights. Each shard of the
# batch decodes its own rows (see sampler/sample.py), and `tensor` splits weights as in training.
GENERATION = {**RULES, "batch": (), "width": ()}


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `data=2,fsdp=-1,tensor=2`. One axis may be -1: it gets the remaining devices.

    Raises:
      ValueError: the text is malformed; the message names the wrong part.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in AXES:
            raise ValueError(f"--mesh {text}: {name!r} is not one of {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"--mesh {text}: {name} is given twice")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(f"--mesh {text}: {name} must be a positive number, or -1 for the rest")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh {text}: only one axis can be -1")
    return sizes


def axis_sizes(
    devices: int, data: int = 1, fsdp: int | None = None, tensor: int = 1
) -> tuple[int, ...]:
    """The sizes of `data`, `fsdp` and `tensor` on so many devices; arguments as of `make_mesh`.

    Raises:
      ValueError: their product is not the number of devices.
    """
    if fsdp is None:
        fsdp = 1 if -1 in (data, tensor) else -1
    given = data, fsdp, tensor
    known = math.prod(size for size in given if size != -1)
    sizes = tuple(devices // known if size == -1 else size for size in given)
    if math.prod(sizes) != devices:
        flag = ",".join(f"{name}={size}" for name, size in zip(AXES, given, strict=True))
        raise ValueError(
            f"--mesh {flag} does not divide {devices} devices: give sizes whose product is"
            f" {devices}, or -1 for one of them"
        )
    return sizes


def make_mesh(
    data: int = 1,
    fsdp: int | None = None,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh of the devices. An axis of -1 gets the devices that the other axes leave.

    TPU slices that only the data-centre network connects lie along `data`, which communicates once
    a step. If the size of `data` is not a multiple of their number, they lie along `fsdp`.

    Args:
      fsdp: size of the axis; default: -1 if no other axis is -1, else 1.
      devices: default: all devices.

    Raises:
      ValueError: the product of the axes is not the number of devices, or neither `data` nor `fsdp`
        is a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = axis_sizes(len(devices), data, fsdp, tensor)
    # Auto lets the compiler shard the arrays between constraints. jax's default, Explicit, rejects
    # about half of ordinary RLHF operations.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(x, "slice_index", 0) for x in devices if x.platform == "tpu"})
    if slices > 1:
        split = next((axis for axis in (0, 1) if sizes[axis] % slices == 0), None)
        if split is None:
            flag = ",".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
            raise ValueError(f"--mesh {flag}: neither data nor fsdp divides over {slices} slices")
        across = [slices if axis == split else 1 for axis in range(3)]
        within = [size // parts for size, parts in zip(sizes, across, strict=True)]
        grid = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        # jax.make_mesh would refuse a mesh that cuts an axis of a three-dimensional slice.
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    name: str = "array",
    rules: Rules = RULES,
) -> PartitionSpec:
    """The mesh axes that split each dimension of one array.

    These are replicated instead: a vocabulary or sequence that the mesh axes do not divide
    (`models.apply` pads the sequence, `apply_shared` does not), and KV heads fewer than the shards.

    Args:
      axes: the logical name of each dimension; None: the dimension is not split.
      shape: the size of each dimension.
      name: the array's name in error messages.
      rules: RULES, SEQUENCE or GENERATION.

    Raises:
      ValueError: an axis has no rule, or its mesh axes do not divide the dimension.
    """
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name}: no sharding rule for the logical axis {axis!r}")
        mesh_axes = rules[axis] if axis is not None else ()
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % parts and (
            axis in ("vocab", "sequence") or (axis == "kv_heads" and size < parts)
        ):
            mesh_axes = ()
        elif size % parts:
            at = "x".join(mesh_axes)
            raise ValueError(f"{name}: {axis} of size {size} does not divide over {at} of {parts}")
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding for each leaf of a tree.

    Args:
      axes: `models.logical_axes(config)`.
      shapes: the same tree with arrays or ShapeDtypeStructs as leaves.
      rules: RULES or GENERATION.
    """

    def leaf_sharding(path, leaf, names):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, name, rules))

    return jax.tree_util.tree_map_with_path(leaf_sharding, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first dimension is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this host must read, those on its devices, in ascending order.

    They depend on the mesh. The hosts of a pod are squares of its grid, so the rows of a host may
    not be contiguous (host 0 of a v5e-16 may have rows 0, 1, 6 and 15), and hosts along the same
    tensor axis have the same rows. `jax.make_array_from_process_local_data` takes the rows in this
    order.

    Raises:
      ValueError: the devices that split a batch do not divide its size.
    """
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide over data x fsdp of {parts} devices"
        )
    places = batched(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices = {place[0].indices(batch_size) for place in places if place is not None}
    return [row for part in sorted(slices) for row in range(*part)]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, as functions are
class Constrainer:
    """The model's `Shard` on a mesh: fixes where activations lie; see `constrainer`."""

    mesh: Mesh
    rules: Rules
    fused: bool

    @property
    def batch(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return self._parts("batch")

    @property
    def sequence(self) -> int:
        """Number of parts that the sequence is split into between sublayers."""
        return self._parts("sequence")

    def _parts(self, axis: str) -> int:
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.rules[axis])

    def _spec(self, x: jax.Array, *axes: str | None) -> PartitionSpec:
        return partition_spec(axes, x.shape, self.mesh, "activation", self.rules)

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrains the sharding of x by the logical names of its axes."""
        spec = self._spec(x, *axes)
        # Inside a shard_map the spec refers to the context's mesh, without the axes mapped over.
        inside = not jax.sharding.get_abstract_mesh().empty
        layout = spec if inside else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(x, layout)

    def by_head(self, attend, q_BNTH, k_BGTH, v_BGTH, places_B3T, window) -> jax.Array:
        """Runs attend(q, k, v, places, window) on each device for that device's rows and heads."""
        queries, keys = (
            self._spec(x, "batch", heads, None, None)
            for x, heads in ((q_BNTH, "heads"), (k_BGTH, "kv_heads"))
        )
        if queries != keys:  # too few key heads to split: give each query head a copy
            group = q_BNTH.shape[1] // k_BGTH.shape[1]
            k_BGTH, v_BGTH = (jnp.repeat(x, group, axis=1) for x in (k_BGTH, v_BGTH))
        places = self._spec(places_B3T, "batch", None, None)
        run = jax.shard_map(  # the compiler cannot split a kernel by itself
            attend,
            mesh=self.mesh,
            in_specs=(queries, queries, queries, places, PartitionSpec()),
            out_specs=queries,
            check_vma=False,
        )
        return run(q_BNTH, k_BGTH, v_BGTH, places_B3T, jnp.asarray(window, jnp.int32))


def constrainer(mesh: Mesh, rules: Rules = RULES) -> Constrainer:
    """The model's `shard` argument on a mesh; on TPUs, attention is the fused kernel."""
    return Constrainer(mesh, rules, fused=mesh.devices.flat[0].platform == "tpu")


def put(tree: Any, layout: Any) -> Any:
    """Lays out arrays over a mesh.

    Args:
      tree: arrays. One that is on a single host's devices must have the same values on all hosts.
      layout: a sharding, or a tree of them.
    """

    def plain(x: jax.Array) -> jax.Array | np.ndarray:
        # Where each host has one device, jax's device_put of a host's own array onto all hosts
        # gives an array that cannot be read.
        return np.asarray(x) if jax.process_count() > 1 and x.is_fully_addressable else x

    return jax.device_put(jax.tree.map(plain, tree), layout)


def fetch(array: jax.Array) -> np.ndarray:
    """Copies a whole array to every host, wherever its shards are."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
