"""Checks of the flags of a run, before anything is loaded or written.

Each script has a `check(config)`, which calls these, `pretrained.check`, `data.check` and
`scoring.check`. So a wrong flag is found in the first seconds, and not after an earlier step.
"""

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from instructjax import sharding
from instructjax.models import ModelConfig
from instructjax.run.flags import RunConfig, compare
from instructjax.run.metrics import import_tracker


def check_run(config: RunConfig, stage: str, first: Collection[Path] = ()) -> Mesh:
    """Checks the flags that all training scripts have.

    Args:
      stage: as for `Run`.
      first: the run directories of the earlier steps that the script is going to run.

    Returns:
      the mesh of --mesh.

    Raises:
      ValueError: --mesh does not fit the devices, a package is missing, or --resume would make
        another run.
      OSError: --out or --checkpoints cannot be written, or holds a run without --resume.
    """
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    config.constrainer(mesh)
    if config.out in first:
        raise ValueError(
            f"--out {config.out}: an earlier step is run first, and writes there; give another"
        )
    if jax.process_index() == 0:  # which alone writes, and the others may not see its directories
        if config.tensorboard:
            import_tracker("tensorboard")
        if config.wandb is not None:
            import_tracker("wandb")
        check_directory("--out", config.out)
        if "://" not in (config.checkpoints or ""):  # a bucket is asked when the run begins
            if config.checkpoints is not None:
                check_directory("--checkpoints", Path(config.checkpoints))
            compare(config, stage, config.checkpoint_directory)
    return mesh


def check_directory(flag: str, directory: Path) -> None:
    """Raises OSError unless a directory can be made there, or is there and can be written."""
    there = directory.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{flag} {directory}: {there} is not a directory; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {directory}: {there} cannot be written; give another")


def check_rows(flag: str, rows: int, microbatches: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless each microbatch divides over the devices that share it.

    Args:
      flag: what gave the number of rows; the message begins with it.
      mesh: an abstract mesh does, for devices that are not there.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shards * microbatches) == 0:
        return
    said = f"{flag} {rows}: does not divide over {shards} shards of the batch"
    said += f", in {microbatches} microbatches" if microbatches > 1 else ""
    said += f"; give a multiple of {shards * microbatches}"
    if microbatches > 1 and rows % shards == 0:
        said += ", or fewer microbatches"
    divide = [n for n in range(1, mesh.size) if mesh.size % n + rows % (n * microbatches) == 0]
    if divide:
        said += f", or more tensor in --mesh, as fsdp={divide[-1]},tensor={mesh.size // divide[-1]}"
    raise ValueError(said)


def fit_microbatches(config: Any, mesh: Mesh) -> Any:
    """A script's config with fewer --microbatches, if with those given a device would have no row.

    That changes no result. A device then has at least one row of a microbatch at a time.

    Args:
      config: has `batch_size`, a multiple of the devices that share it, and `microbatches`.
    """
    fitting, given = fitting_microbatches(config, mesh), config.microbatches
    if fitting == given:
        return config
    if jax.process_index() == 0:
        rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
        print(f"{fitting} microbatches instead of {given}, because each device has {rows} rows")
    return dataclasses.replace(config, microbatches=fitting)


def fitting_microbatches(config: Any, mesh: Mesh | AbstractMesh) -> int:
    """The number of microbatches of `fit_microbatches`."""
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])  # of a device
    return next(n for n in range(config.microbatches, 0, -1) if rows % n == 0)


def check_tokens(model: ModelConfig | None, counts: Sequence[tuple[str, int | None, int]]) -> None:
    """Raises ValueError if a number of tokens is more than the model's context holds.

    Args:
      model: None: it is not known yet.
      counts: (flag, its value, tokens that the context must hold besides); no value is no limit.
    """
    if model is None:
        return
    for flag, value, besides in counts:
        longest = model.max_length - besides
        if value is not None and value > longest:
            raise ValueError(
                f"{flag} {value}: the model's context is {model.max_length} tokens; give at most"
                f" {max(longest, 0)}"
            )


def data_tokens(flag: str, config: object, response: int = 1) -> list[tuple[str, int | None, int]]:
    """`check_tokens` of a DataConfig's limits.

    Args:
      response: tokens that a prompt leaves room for.
    """
    limits = {"max_prompt": response, "max_response": 1}
    return [(f"{flag}.{name}", getattr(config, name), n) for name, n in limits.items()]
