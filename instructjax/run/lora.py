"""The flags of LoRA, and the model that a run with them starts from."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from instructjax import hf, models, sharding
from instructjax.models import PRESETS, ModelConfig, Params
from instructjax.offload import freeze
from instructjax.ranges import CountOrZero, Positive
from instructjax.run import adapters, pretrained


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters in place of training all weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: CountOrZero = 0
    """Rank of the adapters; 0 trains all weights.
    Above 0 the model itself is frozen, in --model_dtype, and only adapters and a scalar head are
    trained, averaged and kept in checkpoints. They take about ten times the learning rate of all
    weights. [Hu et al., section 7.2: 1 to 64; peft: 8]
    If --model is a run with adapters, they are trained on, and its --lora flags are to be given
    again. `--model RUN/export` begins with new adapters on its merged weights."""
    alpha: Positive | None = None
    """What the adapters add is multiplied by this over the rank.
    By default it is the rank, so that the factor is 1. [Hu et al., section 4.1]"""
    targets: tuple[Literal["query", "key", "value", "out", "up", "gate", "down"], ...] = ()
    """The matrices of each layer that get an adapter. By default all of them.
    [Dettmers et al. 2023, arXiv 2305.14314, section 4: all are needed; Hu et al.: query, value]"""

    def __post_init__(self) -> None:
        for name in ("alpha", "targets"):
            if getattr(self, name) and not self.rank:
                raise ValueError(f"--lora.{name}: has no effect without --lora.rank above 0")

    @property
    def scale(self) -> float:
        """What adapters add is multiplied by this."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def paths(self, config: ModelConfig) -> tuple[str, ...]:
        """The paths of the targets in a layer of a model.

        Raises:
          ValueError: the model has no such matrix, or has it as a part of another one.
        """
        every = {path.rpartition("/")[2]: path for path in models.matrices(config)}
        for name in self.targets:
            if name not in every:
                raise ValueError(f"--lora.targets {name}: a layer of {config.family} has none")
        qkv = {"query", "key", "value"}
        if hf.shares_input(config) and 0 < len(qkv & set(self.targets)) < 3:
            raise ValueError(
                f"--lora.targets {' '.join(self.targets)}: in {config.family} query, key and value"
                " are one matrix; give all three or none"
            )
        return tuple(path for name, path in every.items() if name in (self.targets or every))


def check(lora: LoRA, model: str, config: ModelConfig | None) -> None:
    """Raises ValueError or OSError for flags that cannot work, before weights are read.

    Args:
      model: --model, which is there.
      config: its config; None: it is not known yet.
    """
    if not lora.rank or config is None:
        return
    if model in PRESETS:
        raise ValueError(
            f"--lora.rank {lora.rank}: --model {model} has random weights, which would stay so"
        )
    lora.paths(config)
    if (start := adapters.adapter_of(model)) is not None:
        pretrained.describe(adapters.base_of(start), "--model: the base of its adapter,")
        described, rank = hf.describe_adapter(start, config)
        if (rank, described.adapter_scale) != (lora.rank, lora.scale):
            have = f"have rank {rank} and alpha {described.adapter_scale * rank:g}"
            raise ValueError(_other(lora, model, have))


def load(
    lora: LoRA, model: str, mesh: Mesh, dtype: str, seed: int, **how: Any
) -> tuple[ModelConfig, Params, Any]:
    """`pretrained.load`, with adapters and a frozen base in `dtype` if the rank is above 0.

    Args:
      dtype: of the frozen weights; the adapters are float32.
      seed: of new adapters.
      how: other keywords of `pretrained.load`.

    Raises:
      ValueError: the model's adapters are others than the flags say.
    """
    config, params, tokenizer = pretrained.load(model, mesh, seed=seed, merged=not lora.rank, **how)
    if not lora.rank:
        return config, params, tokenizer
    trained, frozen = models.split(params)
    if "adapter" not in params:
        config, new = with_adapter(lora, config, mesh, seed)
        trained, frozen = new, params
    del params
    want = jax.eval_shape(functools.partial(_init, lora, config), jax.random.key(0))
    shapes = [jax.tree.map(lambda x: x.shape, x) for x in (trained["adapter"], want)]
    if shapes[0] != shapes[1] or config.adapter_scale != lora.scale:
        raise ValueError(_other(lora, model, "have another rank, alpha or targets"))
    return config, {**freeze(frozen, dtype), **trained}, tokenizer


def with_adapter(
    lora: LoRA, config: ModelConfig, mesh: Mesh, seed: int
) -> tuple[ModelConfig, Params]:
    """(the config with the adapters' scale, {"adapter"}) of new adapters for a model."""
    init, key = functools.partial(_init, lora, config), jax.random.fold_in(jax.random.key(seed), 1)
    shapes = jax.eval_shape(init, key)
    layout = sharding.shardings(models.adapter_axes(shapes), shapes, mesh)
    adapter = jax.jit(init, out_shardings=layout)(key)
    return dataclasses.replace(config, adapter_scale=lora.scale), {"adapter": adapter}


def _init(lora: LoRA, config: ModelConfig, key: jax.Array) -> Params:
    shared = hf.shares_input(config)
    return models.init_adapter(config, key, lora.rank, lora.paths(config), shared)


def base_of(model: str) -> str:
    """The directory or hub name of the weights that adapters of a run from --model change."""
    adapter = adapters.adapter_of(model)
    base = pretrained.export_of(model, "--model") if adapter is None else adapters.base_of(adapter)
    return hf.hub_name(base) or base


def shared_base(
    lora: LoRA, model: str, config: ModelConfig, params: Params
) -> adapters.Base | None:
    """The frozen weights of `load`, for other models that are adapters of them; None without LoRA.

    Args:
      config: as the model is computed.
    """
    if not lora.rank:
        return None
    return adapters.Base(base_of(model), config, models.split(params)[1])


def _other(lora: LoRA, model: str, have: str) -> str:
    return (
        f"--lora.rank {lora.rank}: the adapters of --model {model} {have}; give the --lora flags"
        f" they were trained with, or --model {model}/export for new ones on the merged weights"
    )
