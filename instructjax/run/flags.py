"""Configs are frozen dataclasses: a field is a flag, its docstring its help, and a run keeps them.

@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    out: Path = Path("runs/sft")
    model: str = "runs/pretrain"
    data: DataConfig = field(default_factory=DataConfig)

config = parse(Config, {"default": Config(), "short": Config(steps=10)}, __doc__)
"""

import argparse
import dataclasses
import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import tyro
from etils import epath
from jax.sharding import Mesh

from instructjax import sharding

PACKAGES = ("instructjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
UNCOMPARED = ("command", "out", "checkpoints", "resume", "data.cache")  # none of them changes a run

ConfigT = TypeVar("ConfigT", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The flags of every script that trains; a script adds its own, `data: DataConfig` among them.

    Raises:
      ValueError: names the flag that is wrong.
    """

    # What `--resume` refuses to change, since the run would silently become another one; a field
    # stands for all within it. Whatever else differs is printed, and the run goes on.
    FIXED: ClassVar[tuple[str, ...]] = ("seed", "model", "batch_size", "data")

    out: Path
    """The run directory."""
    preset: str = ""
    """A named set of defaults; other flags override it."""
    model: str
    """A preset, a run directory, a Hugging Face directory or a hub name."""
    steps: int | None = None
    """Updates in all, those before a --resume included; `None` is the script's own number."""
    seed: int = 0
    """Of initial values, data order, dropout and sampling."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`; by default all are `fsdp`."""
    shard_sequence: bool = False
    """Between sublayers, split activations over `tensor` too, along the sequence: less memory, more
    to send."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint, or start it if it has none."""
    checkpoints: str | None = None
    """Where checkpoints go, if not to OUT/checkpoints. Several hosts need one place that all see: a
    shared directory, or gs://BUCKET/NAME (install instructjax[gcs]), which has not been tested."""
    save_every: int = 500
    """Steps from one checkpoint to the next."""
    keep_last: int = 2
    """Checkpoints to keep, the latest ones; the best one is kept besides."""
    log_every: int = 1
    """Steps from one line of metrics.jsonl to the next; every step is checked for NaN."""
    profile: str | None = None
    """`STEP:COUNT` writes a jax trace of COUNT steps, from STEP on, to OUT/profile."""
    tensorboard: bool = False
    """Write the metrics to OUT/tensorboard too."""
    wandb: str | None = None
    """Send the metrics to this Weights & Biases project too."""

    def __post_init__(self) -> None:
        for name in ("save_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"--steps {self.steps}: must not be negative")
        if (self.checkpoints or "").startswith("gs://") and not importlib.util.find_spec("gcsfs"):
            raise ValueError(
                f"--checkpoints {self.checkpoints} needs: pip install 'instructjax[gcs]'"
            )
        sharding.parse_mesh(self.mesh)
        _ = self.profile_window

    def constrainer(self, mesh: Mesh) -> sharding.Constrainer:
        """Of activations, in training and in scoring with trained weights.

        Raises:
          ValueError: the sequence is to be split over an axis of one device.
        """
        if self.shard_sequence and mesh.shape["tensor"] == 1:
            raise ValueError("--shard_sequence: there is no tensor axis in --mesh to split it over")
        rules = sharding.SEQUENCE if self.shard_sequence else sharding.RULES
        return sharding.constrainer(mesh, rules)

    @property
    def checkpoint_directory(self) -> epath.Path:
        """Where checkpoints go, on a disk or not."""
        return epath.Path(self.checkpoints or self.out / "checkpoints")

    @property
    def profile_window(self) -> range:
        """The steps to trace; empty without --profile."""
        if self.profile is None:
            return range(0)
        step, colon, count = self.profile.partition(":")
        if not (colon and step.isdecimal() and count.isdecimal() and int(step) and int(count)):
            raise ValueError(f"--profile {self.profile}: expected STEP:COUNT, both from 1 up")
        return range(int(step), int(step) + int(count))


def parse(
    cls: type[ConfigT],
    presets: Mapping[str, ConfigT],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> ConfigT:
    """Reads a command line; wrong usage ends the program with 2, `--help` with 0.

    Args:
      cls: the config; a ValueError of its `__post_init__` is wrong usage.
      presets: the defaults that `--preset NAME` picks; the first without it. May be empty.
      description: the first thing that `--help` says, a script's `__doc__`.
      argv: sys.argv[1:] if None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    keywords: dict[str, Any] = {}
    about = (description or "").strip()
    if presets:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=next(iter(presets)))
        name = first.parse_known_args(argv)[0].preset
        if name not in presets:
            print(f"error: --preset {name}: not one of {', '.join(presets)}", file=sys.stderr)
            sys.exit(2)
        keywords["default"] = dataclasses.replace(presets[name], preset=name)
        about += f"\n\nPresets: {', '.join(presets)}; the values below are those of {name}."
    return tyro.cli(cls, args=argv, description=about, use_underscores=True, **keywords)


def write(config: RunConfig, stage: str) -> list[str]:
    """Writes OUT/config.json, all that is needed to run again.

    Returns:
      What differs from the config of the run that --resume continues, a line each.

    Raises:
      ValueError: --resume would make another run of it.
      FileExistsError: --out or --checkpoints holds a run, and --resume was not given.
    """
    file, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    record = {
        "stage": stage,
        "command": shlex.join(["python", *sys.argv]),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "versions": {"python": platform.python_version(), **{x: version(x) for x in PACKAGES}},
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
    directory = config.checkpoint_directory
    steps = [path.name for path in directory.iterdir()] if directory.exists() else []
    saved = any(name.isdecimal() for name in steps)
    holds_run = saved or (metrics.exists() and metrics.stat().st_size > 0)
    if holds_run and not config.resume:
        flag, where = "--out", config.out
        if saved and config.checkpoints is not None:
            flag, where = "--checkpoints", config.checkpoints
        raise FileExistsError(
            f"{flag} {where} holds a run: continue it with --resume, or give another {flag}"
        )
    printed, refused = [], []
    if holds_run and file.exists():
        old, new = _flat(json.loads(file.read_text())), _flat(record)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name) or name.removeprefix("config.") in UNCOMPARED:
                continue
            field = name.removeprefix("config.")
            change = f"{field}: {old.get(name)!r} -> {new.get(name)!r}"
            fixed = field.split(".")[0] in ("stage", *config.FIXED)
            (refused if fixed else printed).append(change)
    if refused:
        raise ValueError(
            f"--resume would make another run of {config.out} ({'; '.join(refused)}): give it the"
            " same again, or another --out"
        )
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(file)
    return printed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"spec": 1}}` -> `{"data.spec": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat
