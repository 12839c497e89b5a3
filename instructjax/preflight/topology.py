"""A mesh over TPUs that are not there: libtpu describes them, and compiles for them."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from instructjax import sharding
from instructjax.preflight.chips import Topology


def load_libtpu() -> None:
    """Settles this process for libtpu without a TPU: silent, beside others, jax on the CPU alone.

    To be called before jax has looked for devices.

    Raises:
      ModuleNotFoundError: libtpu is not installed; names the extra that brings it.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "preflight compiles with libtpu, which is not installed: pip install"
            " 'instructjax[preflight]' (Linux on x86-64)"
        )
    for name, value in {
        # libtpu would ask a metadata server what TPU this host has, and complain on stderr of
        # getting no answer; nothing that is compiled depends on what it is told here.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else the second of two processes aborts
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def make_mesh(topology: Topology, mesh: str = "") -> Mesh:
    """The mesh that a script would make with `--mesh` on that slice.

    Args:
      topology: of `chips.parse_topology`.
      mesh: `data=..,fsdp=..,tensor=..`.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: libtpu knows no such slice, or the mesh does not fit it.
    """
    load_libtpu()
    keywords: dict[str, Any] = (
        {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    )
    if topology.chip.config is not None:
        keywords["chip_config_name"] = topology.chip.config
    try:
        described = topologies.get_topology_desc(topology.slice, "tpu", **keywords)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology.name}: {str(error).splitlines()[0]}") from error
    return sharding.make_mesh(**sharding.parse_mesh(mesh), devices=described.devices)
