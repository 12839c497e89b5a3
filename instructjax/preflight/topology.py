"""A mesh over TPUs that this machine does not have; libtpu describes them and compiles for them."""

import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from instructjax import sharding
from instructjax.preflight.chips import Topology


def load_libtpu() -> None:
    """Sets up this process to use libtpu without a TPU, and jax to use the CPU alone.

    libtpu then prints nothing, and other processes may use it. Call before jax looks for devices.

    Raises:
      ModuleNotFoundError: libtpu is not installed; the message names the extra to install.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "preflight compiles with libtpu, which is not installed: pip install"
            " 'instructjax[preflight]' (Linux on x86-64)"
        )
    for name, value in {
        # Otherwise libtpu asks a metadata server for this host's TPU and prints errors when it gets
        # no answer. Compiled programs do not depend on these values.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise the second of two processes aborts
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def make_mesh(topology: Topology, mesh: str = "") -> Mesh:
    """The mesh that a script would make with `--mesh` on that slice.

    Args:
      topology: of `chips.parse_topology`.
      mesh: value of `--mesh`, such as `data=2,fsdp=-1`.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: libtpu knows no such slice, or the mesh does not fit the slice.
    """
    load_libtpu()
    keywords: dict[str, Any] = (
        {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    )
    if math.prod(topology.grid) == 1:
        keywords["chips_per_host_bounds"] = (1, 1, 1)  # libtpu's default is a host of 2x2
    if topology.chip.config is not None:
        keywords["chip_config_name"] = topology.chip.config
    try:
        description = topologies.get_topology_desc(topology.slice, "tpu", **keywords)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology.name}: {str(error).splitlines()[0]}") from error
    return sharding.make_mesh(**sharding.parse_mesh(mesh), devices=description.devices)
