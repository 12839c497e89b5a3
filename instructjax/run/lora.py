"""The flags of LoRA, and the model that a run with them starts from."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from instructjax import hf, models, sharding
from instructjax.models import PRESETS, ModelConfig, Params
from instructjax.ranges import CountOrZero, Positive
from instructjax.run import adapters, pretrained


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters in place of training all weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: CountOrZero = 0
    """Rank of the adapters; 0 trains all weights.
    Above 0 the model itself is frozen, in --model_dtype, and only adapters and a scalar head are
    trained, averaged and kept in checkpoints. They need about ten times the learning rate of all
    weights. OUT gets adapter/ beside export/. [Hu et al., section 7.2: 1 to 64; peft: 8]
    If --model is a run with adapters, their training continues, and the same --lora flags must be
    given. `--model RUN/export` starts with new adapters on its merged weights."""
    alpha: Positive | None = None
    """The output of an adapter is multiplied by alpha / rank.
    By default alpha is the rank, so that this factor is 1. [Hu et al., section 4.1]"""
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


class Origin(NamedTuple):
    """What `load` has put the trained adapter on."""

    base: str  # the frozen weights: an absolute path, or `hf:` and a name on the hub
    fingerprint: str  # of these weights; see `hf.fingerprint`
    adapter: str | None  # full name of the adapter that came with --model; None: it is new


def check(lora: LoRA, model: str, config: ModelConfig | None, tokenizer: str | None = None) -> None:
    """Raises ValueError or OSError for flags that cannot work, before weights are read.

    Args:
      model: --model, which is there.
      config: its config; None: it is not known yet.
      tokenizer: --tokenizer.
    """
    if not lora.rank or config is None:
        return
    flag = f"--lora.rank {lora.rank}"
    if model in PRESETS:
        raise ValueError(f"{flag}: --model {model} has random weights, which would stay so")
    paths = lora.paths(config)
    adapter = adapters.adapter_of(model)
    _check_vocabulary(flag, model, config, tokenizer, adapter)
    if adapter is None:
        return
    with pretrained.naming(model, "--model"):
        base = adapters.base_of(adapter)
    of_base = pretrained.describe(base, "--model: the base of its adapter,")
    with pretrained.naming(model, "--model"):
        have = hf.describe_adapter(adapter, of_base)
    scale, names = have.config.adapter_scale, [path.rpartition("/")[2] for path in have.targets]
    if have.rank != lora.rank or not math.isclose(scale, lora.scale):
        other = f"rank {have.rank} and alpha {scale * have.rank:g}"
    elif have.targets != paths:
        other = f"--lora.targets {' '.join(names)}"
    else:
        return
    merged = pretrained.export_of(model, "--model")
    anew = f", or --model {merged} for new ones on the merged weights" if merged != model else ""
    raise ValueError(
        f"{flag}: the adapters of --model {model} have {other}; give the --lora flags they were"
        f" trained with{anew}"
    )


def _check_vocabulary(
    flag: str, model: str, config: ModelConfig, tokenizer: str | None, adapter: str | None
) -> None:
    """Raises ValueError if `pretrained.load` would give the model rows for new tokens.

    The base of an adapter would have to be a model with these rows, and there is none.
    """
    where = f"--model {model}" if tokenizer is None else f"--tokenizer {tokenizer}"
    own = adapter or pretrained.export_of(model, "--model")
    loaded = pretrained.load_tokenizer(tokenizer or own)
    try:
        new = hf.new_tokens(loaded, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if new and (tokenizer is not None or hf.in_use(loaded, new)):
        raise ValueError(
            f"{where}: the tokenizer has {', '.join(list(new)[:5])}, which the model has not, and"
            f" with {flag} it gets no rows for new tokens; train all weights first"
        )


def load(
    lora: LoRA, model: str, mesh: Mesh, dtype: str, seed: int, **how: Any
) -> tuple[ModelConfig, Params, Any, Origin | None]:
    """`pretrained.load`, with adapters and a frozen base in `dtype` if the rank is above 0.

    Args:
      dtype: of the frozen weights; the adapters are float32.
      seed: of new adapters.
      how: other keywords of `pretrained.load`.

    Returns:
      what `pretrained.load` returns, and where the adapters came from; None without adapters.

    Errors: as for `check` and `pretrained.load`.
    """
    if not lora.rank:
        return *pretrained.load(model, mesh, seed=seed, **how), None
    check(lora, model, pretrained.describe(model), how.get("tokenizer"))
    adapter = adapters.adapter_of(model)
    base = pretrained.export_of(model, "--model") if adapter is None else adapters.base_of(adapter)
    of_adapter = None if adapter is None else adapters.full_name(adapter)
    origin = Origin(adapters.full_name(base), hf.fingerprint(base), of_adapter)
    how |= {"merged": False, "dtype": dtype}
    config, params, tokenizer = pretrained.load(model, mesh, seed=seed, **how)
    if adapter is None:
        frozen = params
        config, trained = with_adapter(lora, config, mesh, seed)
    else:
        trained, frozen = models.split(params)
    return config, models.whole(trained, frozen), tokenizer, origin


def with_adapter(
    lora: LoRA, config: ModelConfig, mesh: Mesh, seed: int
) -> tuple[ModelConfig, Params]:
    """(the config with the adapters' scale, {"adapter"}) of new adapters for a model."""
    key, shared = jax.random.fold_in(jax.random.key(seed), 1), hf.shares_input(config)

    def init(key: jax.Array) -> Params:
        return models.init_adapter(config, key, lora.rank, lora.paths(config), shared)

    shapes = jax.eval_shape(init, key)
    layout = sharding.shardings(models.adapter_axes(shapes), shapes, mesh)
    adapter = jax.jit(init, out_shardings=layout)(key)
    return dataclasses.replace(config, adapter_scale=lora.scale), {"adapter": adapter}


def shared_base(origin: Origin | None, config: ModelConfig, params: Params) -> adapters.Base | None:
    """The frozen weights of `load`, for other models that are adapters of them; None without LoRA.

    Args:
      config: as the model is computed.
    """
    if origin is None:
        return None
    return adapters.Base(origin.base, config, models.split(params)[1])


def frozen_weights(origin: Origin | None) -> dict[str, tuple[str, str]]:
    """What `Run.restore` gets: the names and the fingerprints of the frozen weights, and of the
    adapter that training began from, which the reference keeps."""
    if origin is None:
        return {}
    weights = {"--model": (origin.base, origin.fingerprint)}
    if origin.adapter is not None:
        weights["--model's adapter"] = (origin.adapter, hf.fingerprint(origin.adapter))
    return weights


def export(
    out: Path,
    origin: Origin | None,
    config: ModelConfig,
    params: Params,
    tokenizer: Any,
    member: int = 0,
) -> list[Path]:
    """Writes a trained model to OUT/export and, before that, its adapter to OUT/adapter.

    A run with an export counts as finished, so the export is the last that is written.

    Args:
      origin: from `load`; None: there is no adapter.
      params: all parameters; of a model with adapters, the adapter beside its base.
      member: number in an ensemble. The members after 0 have it in their directories' names.

    Returns:
      the directories.
    """
    behind, wrote = f"-{member}" if member else "", []
    if origin is not None:
        wrote.append(out / f"adapter{behind}")
        how: Any = {"fingerprint": origin.fingerprint}
        hf.save_adapter(wrote[-1], config, params, origin.base, tokenizer, **how)
    wrote.append(out / f"export{behind}")
    hf.save(wrote[-1], config, params, tokenizer)
    return wrote
