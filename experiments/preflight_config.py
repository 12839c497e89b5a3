"""The flags of preflight.py, and the configs of the training scripts that they give."""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import ppo_config
import run_rm
import run_sft
from preflight_models import MODELS

from instructjax import models, ranges, sharding
from instructjax.models import ModelConfig
from instructjax.ranges import Count, CountFrom2, NotNegative, ShareBelow1
from instructjax.run import RunConfig, pretrained
from instructjax.run.flags import refuse_bucket
from instructjax.run.lora import LoRA

# The models that the paper's presets train; other presets need --model.
PAPER_MODELS = {"1.3b": "gpt3-1.3b", "6b": "gpt3-6b", "175b": "gpt3-175b"}

Stage = Literal["sft", "rm", "ppo"]

# Flags of the scripts that have the same name and meaning here.
SAME = (
    *("model_dtype", "remat", "batch_size", "microbatches", "shard_sequence", "lora"),
    *("length", "max_new_tokens", "sample_batch", "offload"),
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The longest prompts and responses of the data."""

    max_prompt: Count | None = None
    """Longest prompt in tokens. [The preset's value, else 1,024]"""
    max_response: Count | None = None
    """Longest response in tokens. [The preset's value, else 1,024]
    A comparison is taken to have 9 of them."""


@dataclass(frozen=True, kw_only=True)
class PPO:
    """run_ppo.py's flags that change what it compiles or keeps. By default the preset's values."""

    minibatch: Count | None = None
    """Episodes per update."""
    microbatches: Count | None = None
    """Parts of a minibatch whose gradients are accumulated. [--microbatches if given]"""
    beta: NotNegative | None = None
    """Coefficient of the KL penalty; 0 drops the reference model."""
    ema: ShareBelow1 | None = None
    """Decay of the average of the policy's weights; 0 keeps none."""
    value: Literal["separate", "shared"] | None = None
    """A value net of its own, or a head on the policy's trunk."""
    rescore: bool | None = None
    """Whether another pass of the policy computes the behaviour log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class PTX:
    """run_ppo.py's flags of pretraining text. By default the preset's values."""

    coef: NotNegative | None = None
    """Coefficient of the ptx gradient; 0 is plain PPO."""
    ratio: Count | None = None
    """Rows of pretraining text per episode."""
    length: CountFrom2 | None = None
    """Tokens of a row of pretraining text."""
    microbatches: Count | None = None
    """Parts of an update's text whose gradients are accumulated.
    [--microbatches x the ratio if given]"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The programs to compile, and the slice to compile them for."""

    topology: str
    """A slice, such as v5e:1x1 or v5p:4x4x4; with --search a type of chip, such as v5e."""
    num_slices: Count = 1
    """Number of such slices, joined by the data-centre network, whose time is not estimated."""
    search: bool = False
    """Try the slices of this type, smallest first, with each mesh in turn, until one fits."""
    fit: tuple[str, ...] = ()
    """Models to try in place of --model. The output names the largest that fits the slice, for each
    stage. Its mesh and microbatches are searched for, as with --search."""
    stages: tuple[Stage, ...] = ("sft", "rm", "ppo")
    """Stages whose programs are compiled."""
    preset: str = "instructgpt-6b"
    """Preset of run_sft.py, run_rm.py and run_ppo.py.
    The reward model has no preset of the paper's other sizes: it takes instructgpt-6b for them."""
    model: str | None = None
    """Policy: a run directory, a Hugging Face directory, a hub name or a preset of models.
    No network is needed for smollm2-135m, pythia-410m, qwen3-0.6b, llama-3.2-1b, qwen3-1.7b,
    qwen3-4b and llama-3.1-8b. [The size of --preset]"""
    reward_model: str | None = None
    """Reward model and value net: as --model. [--model if given, else gpt3-6b, as in the paper]
    With --lora.rank and without this flag, both are adapters of the policy's weights, as when
    --reward was trained with LoRA from the same model."""
    mesh: str = ""
    """Number of devices along each axis, such as `data=2,fsdp=-1`; by default all are `fsdp`."""
    model_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matmuls, activations and frozen weights. [The preset's value]"""
    remat: Literal["none", "dots", "full"] | None = None
    """Activations that the backward pass recomputes. [The preset's value]"""
    batch_size: Count | None = None
    """Rows of a step of SFT and RM, episodes of an iteration of PPO. [The preset's value]"""
    length: CountFrom2 | None = None
    """Tokens of a row of SFT and RM.
    [The preset's value, else what run_sft.py and run_rm.py make at most of the longest prompts and
    responses: 2,048 for SFT and 4,096 for RM, or less]"""
    max_new_tokens: Count | None = None
    """Longest sampled response, in tokens. [The preset's value]"""
    data: Data = field(default_factory=Data)
    lora: LoRA = field(default_factory=LoRA)
    ppo: PPO = field(default_factory=PPO)
    ptx: PTX = field(default_factory=PTX)
    microbatches: Count | None = None
    """Number of parts of a batch (in PPO: of a minibatch and of its ptx text) whose gradients are
    accumulated. [The preset's value]"""
    sample_batch: Count | None = None
    """Number of prompts that run_ppo.py samples at a time. [All prompts of an iteration]"""
    shard_sequence: bool = False
    """Split activations between sublayers over the `tensor` axis too, as the scripts' flag does."""
    offload: bool = False
    """Move models to host memory while they are not in use, as run_ppo.py's flag does."""
    out: Path | None = None
    """File that all figures are written to, as JSON."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.out is not None:
            refuse_bucket("--out", self.out, "a file on a disk")
        sharding.parse_mesh(self.mesh)
        if not self.stages:
            raise ValueError("--stages: give at least one of sft, rm, ppo")
        for flag in ("model", "reward_model", "search"):
            if self.fit and getattr(self, flag):
                raise ValueError(f"--fit: not with --{flag}")


def script_config(stage: Stage, config: Config) -> RunConfig:
    """The config of a stage's script: its preset, changed by the flags that were given.

    Raises:
      ValueError: there is no such preset, or its script refuses a flag.
    """
    presets: dict[str, Any] = {
        "sft": run_sft.PRESETS,
        "rm": run_rm.PRESETS,
        "ppo": ppo_config.PRESETS,
    }[stage]
    name = config.preset
    if stage == "rm" and name.startswith("instructgpt-"):
        name = "instructgpt-6b"  # the paper's one reward model
    if name not in presets:
        raise ValueError(f"--preset {config.preset}: not one of {', '.join(presets)}")
    script = presets[name]
    fields = {field.name for field in dataclasses.fields(script)}
    values = {name: getattr(config, name) for name in SAME if name in fields}
    values = {name: value for name, value in values.items() if value is not None}
    values["data"] = given(script.data, config.data)
    if isinstance(script, ppo_config.Config):
        ppo, ptx = given(script.ppo, config.ppo), given(script.ptx, config.ptx)
        if config.microbatches and config.ppo.microbatches is None:
            ppo = dataclasses.replace(ppo, microbatches=config.microbatches)
        if config.microbatches and config.ptx.microbatches is None:
            # A microbatch then has as many rows of text as episodes.
            ptx = dataclasses.replace(ptx, microbatches=config.microbatches * ptx.ratio)
        values |= {"ppo": ppo, "ptx": ptx}
    return dataclasses.replace(script, **values)


def given(part: Any, flags: Data | PPO | PTX) -> Any:
    """A part of a script's config, with the flags of it that were given."""
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    return dataclasses.replace(part, **{k: v for k, v in values.items() if v is not None})


def describe_reward_model(config: Config) -> ModelConfig:
    """Sizes of the reward model: --reward_model, --model, or 6B as in the paper (section 3.5)."""
    if config.reward_model is not None:
        return describe_model(config.reward_model, "--reward_model")
    return describe(dataclasses.replace(config, model=config.model or "gpt3-6b"))


def describe(config: Config) -> ModelConfig:
    """The policy's sizes; reads no weights.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: neither --model nor --preset names one.
    """
    size = config.preset.removeprefix("instructgpt-").split("-")[0]
    model = config.model or PAPER_MODELS.get(size)
    if model is None:
        raise ValueError(f"--preset {config.preset} implies no model: give --model NAME|DIR")
    return describe_model(model, "--model")


def describe_model(model: str, flag: str) -> ModelConfig:
    """The sizes of a language model, or of a reward model's trunk."""
    sizes = MODELS.get(model) or pretrained.describe(model, flag)
    return dataclasses.replace(sizes, scalar_head=False)


def parameters(model: ModelConfig) -> int:
    """Number of parameters."""
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
