"""The mesh, and where each array lies on it.

Three axes: `data` splits the batch and copies the parameters, `fsdp` splits both, `tensor` splits
heads, MLP and vocabulary within a layer. The model names its axes logically; this table is the
only place where they meet the mesh.
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
    "norm": (),  # vectors of one layer's width: not worth a collective
}

# Between sublayers the sequence is split over tensor too (Korthikanti et al. 2022): a chip keeps a
# share of each layer's residuals, and all-gathers and reduce-scatters take the all-reduces' place.
SEQUENCE = {**RULES, "sequence": ("tensor",)}

# For decoding, which reads all weights at each token: whole on every data shard, whose rows are
# its own affair (see sampler.py), and split over tensor as ever.
GENERATION = {**RULES, "batch": (), "width": ()}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data=2,fsdp=-1,tensor=2`; at most one axis may be -1, the devices that are left.

    Raises:
      ValueError: names the part that is wrong.
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


def make_mesh(
    data: int = 1,
    fsdp: int | None = None,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices, or those given; -1 is what the other axes leave.

    Slices of TPUs that only the data-centre network joins lie along `data`, whose copies of the
    parameters meet once a step; where `data` does not divide, along `fsdp`.

    Args:
      fsdp: default: -1, if no other axis is.

    Raises:
      ValueError: the axes' product is not the number of devices, or neither axis divides over the
        slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp is None:
        fsdp = 1 if -1 in (data, tensor) else -1
    asked = [data, fsdp, tensor]
    given = math.prod(size for size in asked if size != -1)
    sizes = [len(devices) // given if size == -1 else size for size in asked]
    wanted = "--mesh " + ",".join(f"{name}={size}" for name, size in zip(AXES, asked, strict=True))
    if math.prod(sizes) != len(devices):
        raise ValueError(f"{wanted} does not divide {len(devices)} devices")
    # Auto: the compiler shards what is between constraints. Explicit axis types, the default,
    # refuse about half of ordinary RLHF operations.
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(x, "slice_index", 0) for x in devices if x.platform == "tpu"})
    if slices > 1:
        joined = next((axis for axis in (0, 1) if sizes[axis] % slices == 0), None)
        if joined is None:
            raise ValueError(f"{wanted}: neither data nor fsdp divides over {slices} slices")
        across = [slices if axis == joined else 1 for axis in range(3)]
        within = [size // over for size, over in zip(sizes, across, strict=True)]
        grid = create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        # As jax.make_mesh, which refuses a mesh that cuts an axis of a three-dimensional slice.
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    name: str = "array",
    rules: Rules = RULES,
) -> PartitionSpec:
    """Where the dimensions of one array lie.

    A vocabulary or a sequence that does not divide the axis (`models.apply` pads it, the einsums
    of `apply_shared` do not), and KV heads fewer than it, are replicated.

    Args:
      axes: the logical name of each dimension; None is not sharded.
      shape: its sizes.
      name: of the tensor, for errors.
      rules: RULES, SEQUENCE or GENERATION.

    Raises:
      ValueError: an axis without a rule, or a size that its mesh axis does not divide.
    """
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name}: no sharding rule for the logical axis {axis!r}")
        over = rules[axis] if axis is not None else ()
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
        if size % parts and (
            axis in ("vocab", "sequence") or (axis == "kv_heads" and size < parts)
        ):
            over = ()
        elif size % parts:
            at = "x".join(over)
            raise ValueError(f"{name}: {axis} of size {size} does not divide over {at} of {parts}")
        entries.append(over or None)
    return PartitionSpec(*entries)


def shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding for each leaf of a tree.

    Args:
      axes: `models.logical_axes(config)`.
      shapes: the same tree of arrays or ShapeDtypeStructs.
      rules: RULES or GENERATION.
    """

    def one(path, leaf, names):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, name, rules))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """First dimension split over data and fsdp: what a batch is put with."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this host's devices, ascending: all that it has to read.

    They depend on the mesh. A pod's hosts are squares of its grid, so that the rows of one host
    need be no block (on a v5e-16 host 0 may have rows 0, 1, 6 and 15), and hosts that share a
    tensor axis have the same ones. `jax.make_array_from_process_local_data` puts them, in this
    order, where they belong.

    Raises:
      ValueError: the devices that split a batch do not divide it.
    """
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide over data x fsdp of {parts} devices"
        )
    places = batched(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices = {place[0].indices(batch_size) for place in places if place is not None}
    return [row for part in sorted(slices) for row in range(*part)]


@dataclasses.dataclass(frozen=True, eq=False)  # compared, like a function, by identity
class Constrainer:
    """The model's `Shard` on a mesh."""

    mesh: Mesh
    rules: Rules
    fused: bool

    @property
    def batch(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self._parts("batch")

    @property
    def sequence(self) -> int:
        """Into how many parts the sequence is split between sublayers."""
        return self._parts("sequence")

    def _parts(self, axis: str) -> int:
        return math.prod(self.mesh.shape[over] for over in self.rules[axis])

    def _spec(self, x: jax.Array, *axes: str | None) -> PartitionSpec:
        return partition_spec(axes, x.shape, self.mesh, "activation", self.rules)

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, constrained by the logical names of its axes."""
        spec = self._spec(x, *axes)
        # Within a shard_map the mesh is the context's, some of whose axes are dealt with.
        inside = not jax.sharding.get_abstract_mesh().empty
        layout = spec if inside else NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(x, layout)

    def by_head(self, attend, q_BNTH, k_BGTH, v_BGTH, places_B3T, window) -> jax.Array:
        """attend(q, k, v, places, window) on each device for its own rows and heads.

        The compiler splits no kernel.
        """
        queries, keys = (
            self._spec(x, "batch", heads, None, None)
            for x, heads in ((q_BNTH, "heads"), (k_BGTH, "kv_heads"))
        )
        if queries != keys:  # Key heads too few to split: to each query head its own.
            group = q_BNTH.shape[1] // k_BGTH.shape[1]
            k_BGTH, v_BGTH = (jnp.repeat(x, group, axis=1) for x in (k_BGTH, v_BGTH))
        places = self._spec(places_B3T, "batch", None, None)
        run = jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(queries, queries, queries, places, PartitionSpec()),
            out_specs=queries,
            check_vma=False,
        )
        return run(q_BNTH, k_BGTH, v_BGTH, places_B3T, jnp.asarray(window, jnp.int32))


def constrainer(mesh: Mesh, rules: Rules = RULES) -> Constrainer:
    """The model's `shard` on a mesh: on TPUs, with fused attention."""
    return Constrainer(mesh, rules, fused=mesh.devices.flat[0].platform == "tpu")


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on every host, wherever its shards lie."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
