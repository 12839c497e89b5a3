"""A config is a frozen dataclass: a field is a flag, and the field's docstring is the flag's help.

@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    out: Path = Path("runs/sft")
    model: str = "runs/pretrain"
    data: DataConfig = field(default_factory=DataConfig)

config = parse(Config, {"miniature": Config(steps=10), "small": Config()}, __doc__)

`write` keeps the config in OUT/config.json, and compares it there when a run is resumed. tyro shows
the line breaks of a help text, so each of its lines is a sentence.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import jax
import tyro
from etils import epath
from jax.sharding import Mesh

from instructjax import hosts, ranges, sharding, usage
from instructjax.models import ModelConfig
from instructjax.ranges import Count, CountOrZero, NotNegative, PositiveOrInf, Seed, ShareBelow1
from instructjax.run import bucket

PACKAGES = ("instructjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# None of these changes a run, so `--resume` neither refuses nor prints a difference in them.
CACHES = ("data.cache", "pretrain.cache", "demonstrations.cache")
UNCOMPARED = ("command", "out", "checkpoints", "resume", "resume_step", *CACHES)
SMALL = "small"  # the default preset for data other than the miniature's
QUICK = "quick"  # a preset of the miniature whose steps have folders of their own

ConfigT = TypeVar("ConfigT", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """The optimizer, Adam."""

    b1: ShareBelow1 = 0.9
    """Decay of Adam's first moment [App. C: 0.9]."""
    b2: ShareBelow1 = 0.95
    """Decay of Adam's second moment [App. C: 0.95]."""
    eps: NotNegative = 1e-8
    """Added to the root of the second moment [paper silent; ours]."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW: each step shrinks all parameters by this times the learning rate
    [paper silent; ours]."""
    clip_norm: PositiveOrInf = 1.0
    """Gradients are scaled down to this global norm; `inf` turns clipping off.
    In PPO the policy's norm includes the ptx gradient, so with a large --ptx.coef clipping leaves
    little of PPO's own gradient [paper silent; ours]."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The flags of every script that trains. A script adds its own, such as `data: DataConfig`.

    Raises:
      ValueError: a flag is out of range; the message names it.
    """

    # Flags that `--resume` refuses to change, because the run would silently become another one.
    # The name of a nested config stands for all its fields. Every other difference is printed: such
    # flags change how a run is computed or reported, and not what it computes beyond rounding.
    FIXED: ClassVar[tuple[str, ...]] = (
        *("seed", "model", "tokenizer", "model_dtype", "batch_size", "data"),
    )
    # Flags that `headline` states, dotted where they are nested.
    SHOWN: ClassVar[tuple[str, ...]] = ()

    out: Path
    """The run directory, for config, metrics, samples, checkpoints, figures and the export."""
    preset: str = ""
    """Name of a set of defaults, listed above. Other flags override them."""
    model: str
    """The model to start from: a preset, a run directory, a Hugging Face directory or hub name.
    `hf:NAME` always means the hub. A path in runs/ or in a folder that exists never does."""
    tokenizer: str | None = None
    """The tokenizer: a Hugging Face directory or a hub name. By default the model's own."""
    steps: CountOrZero | None = None
    """Number of updates in all, including those before a --resume.
    By default the script computes it from the size of the data."""
    seed: Seed = 0
    """Seed of initial values, data order, dropout and sampling."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""
    shard_sequence: bool = False
    """Split activations between sublayers over `tensor` too, along the sequence.
    This takes less memory and more communication."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products and, in RL, of reward models.
    Trained parameters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products (dots), or all (full).
    Full takes the least memory and the most time."""
    unroll: Count = 1
    """Layers in one turn of the loop over layers.
    On CPU a small model is fastest with all of them in one turn."""
    resume: bool = False
    """Continue the run in --out from its newest whole checkpoint, or start it if it has none."""
    resume_step: CountOrZero | None = None
    """Go back to the checkpoint of this step, and continue from there. Later checkpoints move to
    `set_aside`, and later lines of the logs to *.cut.jsonl. With --resume as well, only the first
    start goes back. Later starts continue from the newest checkpoint."""
    checkpoints: str | None = None
    """Directory for checkpoints, by default OUT/checkpoints or, with --resume, where they are.
    Several hosts need one that all of them see: a shared directory, or gs://BUCKET/NAME.
    A bucket needs instructjax[gcs]. It was tested with an emulator, not with a real bucket."""
    save_every: Count = 500
    """Steps from one checkpoint to the next."""
    keep_last: Count = 2
    """Number of latest checkpoints to keep. The checkpoint with the best score is kept as well."""
    stall: PositiveOrInf = 30.0
    """Minutes without progress on any host after which the run prints all stacks and ends with 75.
    Progress is a finished step, a new phase or work in Python; `inf` turns this off."""
    log_every: Count = 1
    """Steps from one line of metrics.jsonl to the next. Every step is checked for NaN."""
    profile: str | None = None
    """`STEP:COUNT` writes a jax trace of COUNT steps, from STEP on, to OUT/profile."""
    tensorboard: bool = False
    """Write the metrics to OUT/tensorboard as well."""
    wandb: str | None = None
    """Weights & Biases project to send the metrics to as well."""

    def __post_init__(self) -> None:
        ranges.check(self)
        batch_size, parts = (getattr(self, name, 1) for name in ("batch_size", "microbatches"))
        if batch_size % parts:
            raise ValueError(f"--batch_size {batch_size}: not a multiple of --microbatches {parts}")
        if str(self.out) == ".":  # also of --out ''
            raise ValueError("--out: needs a directory of its own")
        on_disk = "a directory on a disk; --checkpoints may be gs://BUCKET/NAME"
        refuse_bucket("--out", self.out, on_disk)
        if self.checkpoints is not None:
            if not re.fullmatch(r"gs://[^/]+/+[^/].*", self.checkpoints):
                refuse_bucket("--checkpoints", self.checkpoints, "a directory or gs://BUCKET/NAME")
            elif importlib.util.find_spec("gcsfs") is None:
                raise ValueError(
                    f"--checkpoints {self.checkpoints} needs: pip install 'instructjax[gcs]'"
                )
        sharding.parse_mesh(self.mesh)
        if self.profile_window and self.steps is not None and self.profile_window[0] > self.steps:
            raise ValueError(f"--profile {self.profile}: the run has {self.steps} steps")

    @property
    def headline(self) -> str:
        """`preset small: learning_rate 2e-05, ...`: what matters most of this run's flags."""
        shown = ((name, functools.reduce(getattr, name.split("."), self)) for name in self.SHOWN)
        return f"preset {self.preset or 'none'}: " + ", ".join(f"{k} {v}" for k, v in shown)

    def command_of(self, script: str, words: str) -> str:
        """The command of another step, in the folders of this one's preset."""
        preset = f"--preset {QUICK} " if self.preset == QUICK else ""
        return f"python experiments/{script} {preset}{words}"

    def compute(self, model: ModelConfig) -> ModelConfig:
        """The model with the flags' dtype, rematerialisation and unrolling."""
        return dataclasses.replace(
            model, dtype=self.model_dtype, remat=self.remat, unroll=self.unroll
        )

    def constrainer(self, mesh: Mesh) -> sharding.Constrainer:
        """Lays out activations, in training and in scoring with trained weights.

        Raises:
          ValueError: --shard_sequence with a `tensor` axis of one device.
        """
        if self.shard_sequence and mesh.shape["tensor"] == 1:
            raise ValueError(
                "--shard_sequence: there is no tensor axis in --mesh to split it over;"
                " give --mesh tensor=2 or more"
            )
        rules = sharding.SEQUENCE if self.shard_sequence else sharding.RULES
        return sharding.constrainer(mesh, rules)

    @property
    def resuming(self) -> bool:
        """Whether to continue a run."""
        return self.resume or self.resume_step is not None

    @property
    def checkpoint_directory(self) -> epath.Path:
        """Directory for checkpoints, on a disk or in a bucket."""
        return epath.Path(self.checkpoints or self.out / "checkpoints")

    @property
    def profile_window(self) -> range:
        """Numbers of the steps to trace, empty without --profile."""
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
    check: Callable[[ConfigT], object] = lambda config: None,
) -> ConfigT:
    """Reads a command line. Wrong usage ends the program with exit code 2, `--help` with 0.

    Args:
      cls: the config class. A ValueError from its `__post_init__` counts as wrong usage.
      presets: the defaults that `--preset NAME` picks, by name; there may be none. Without
        --preset the first is taken, or `small`, if there is one and --data is not the miniature.
      description: what `--help` says first, a script's `__doc__`.
      argv: the words of the command line; None is sys.argv[1:].
      check: checks what the flags name, see `usage.read`. Several hosts compare their flags first.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    keywords: dict[str, Any] = {}
    about = (description or "").strip()
    if presets:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset")
        first.add_argument("--data", default="miniature")
        given = first.parse_known_args(argv)[0]
        name = given.preset or next(iter(presets))
        if given.preset is None and given.data != "miniature" and SMALL in presets:
            name = SMALL
        if name not in presets:
            print(f"error: --preset {name}: not one of {', '.join(presets)}", file=sys.stderr)
            sys.exit(usage.USAGE)
        keywords["default"] = dataclasses.replace(presets[name], preset=name)
        about += f"\n\nPresets: {', '.join(presets)}; the values below are those of {name}."
        if SMALL in presets:
            about += f" Without --preset, data other than the miniature's get {SMALL}."
    keywords |= {"args": argv, "description": about, "use_underscores": True}

    def compare_and_check(config: ConfigT) -> None:
        # A check may ask host 0, for which all hosts must come to it.
        hosts.require_equal("flags", of_all_hosts(config, type(config).__name__.lower()))
        check(config)

    return usage.read(lambda: _expanded(tyro.cli(cls, **keywords)), compare_and_check)


def preset_of(presets: Mapping[str, ConfigT], out: str) -> ConfigT | None:
    """The first preset whose run directory is `out`, with its name; None if none has it."""
    found = (name for name, preset in presets.items() if preset.out == Path(out))
    return next((dataclasses.replace(presets[name], preset=name) for name in found), None)


def _expanded(config: ConfigT) -> ConfigT:
    """The config without the `~` that a shell leaves in `--out=~/run`."""
    checkpoints = config.checkpoints and os.path.expanduser(config.checkpoints)
    out = Path(os.path.expanduser(config.out))
    return dataclasses.replace(config, out=out, checkpoints=checkpoints)


def compare(config: RunConfig, stage: str, directory: epath.Path) -> list[str]:
    """Compares a config with OUT/config.json, if a run is continued.

    Args:
      directory: of the checkpoints.

    Returns:
      A line for each difference that is allowed.

    Raises:
      ValueError: --resume with a change that makes another run (`RunConfig.FIXED`), or config.json
        is damaged.
      FileExistsError: --out or --checkpoints holds a run, and --resume was not given.
      OSError: --checkpoints is in a bucket that can't be used.
    """
    file, metrics = config.out / "config.json", config.out / "metrics.jsonl"
    with bucket.errors_named(directory):
        steps = [path.name for path in directory.iterdir()] if directory.exists() else []
    saved = any(name.isdecimal() for name in steps)
    holds_run = saved or (metrics.exists() and metrics.stat().st_size > 0)
    if holds_run and not config.resuming:
        flag, where = "--out", config.out
        if saved and config.checkpoints is not None:
            flag, where = "--checkpoints", config.checkpoints
        raise FileExistsError(
            f"{flag} {where} holds a run: continue it with --resume, or give another {flag}"
        )
    if not (holds_run and file.exists()):
        return []
    try:
        old, new = flat(json.loads(file.read_text())), flat(_record(config, stage))
        # What wrote the file may have been without some flags.
        old = defaults(config, "config.") | old
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged, so that --resume cannot compare the flags. Remove it to continue"
            " with the flags as they are"
        ) from error
    printed, refused = [], []
    for name in sorted(old.keys() | new.keys()):
        field = name.removeprefix("config.")
        if old.get(name) == new.get(name) or field in UNCOMPARED:
            continue
        change = f"{field}: {old.get(name)!r} -> {new.get(name)!r}"
        fixed = field.split(".")[0] in ("stage", *config.FIXED)
        (refused if fixed else printed).append(change)
    if refused:
        raise ValueError(
            f"--resume would make another run of {config.out} ({'; '.join(refused)}): give the"
            " same flags again, or start another run with another --out"
        )
    return printed


def write(config: RunConfig, stage: str) -> None:
    """Writes OUT/config.json, which holds all that is needed to run again."""
    file = config.out / "config.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps(_record(config, stage), indent=2) + "\n")
    part.replace(file)


def _record(config: RunConfig, stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "command": shlex.join(["python", *sys.argv]),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "versions": {"python": platform.python_version(), **{x: version(x) for x in PACKAGES}},
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """The flags of a script that have a default, with it as JSON, dotted where nested.

    Args:
      config: a dataclass, of any script.
      prefix: what begins each name.
    """
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= defaults(value, f"{name}.")
        elif field.default is not dataclasses.MISSING:
            found[name] = json.loads(json.dumps(field.default, default=str))
    return found


def refuse_bucket(flag: str, path: Path | str, expected: str) -> None:
    """Refuses `gs://...` and the like. A `Path` has it as `gs:/...`, a directory of that name.

    Raises:
      ValueError: names the flag, and says what was expected.
    """
    scheme, colon, name = str(path).partition(":/")
    if colon and "/" not in scheme:
        raise ValueError(f"{flag} {scheme}://{name.lstrip('/')}: expected {expected}")


def of_all_hosts(config: Any, stage: str) -> dict[str, Any]:
    """The stage and the flags of a script that must be the same on all hosts, dotted where nested.

    Args:
      config: a dataclass, of any script.
    """
    flags = flat(json.loads(json.dumps(dataclasses.asdict(config), default=str)))
    return {"stage": stage} | {k: v for k, v in flags.items() if k not in ("out", *CACHES)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"spec": 1}}` -> `{"data.spec": 1}`."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        leaves |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves
