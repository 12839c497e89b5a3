"""What a response is worth: reward models, Python functions, or a weighted mix of both.

runs/rm                    a reward model: a run directory or a Hugging Face directory; a run of
                           several (--ensemble) gives them all
my_file.py:my_function     (prompts, responses, records) -> scores, of texts and Records
"""

import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from instructjax import hosts, reward, sharding
from instructjax.data import Record
from instructjax.models import ModelConfig, Params
from instructjax.offload import Resting, freeze, rest
from instructjax.rollout import Rows
from instructjax.run import pretrained

RewardFn = Callable[[Sequence[str], Sequence[str], Sequence[Record]], Sequence[float]]


@dataclass(frozen=True)
class RewardConfig:
    """The flags of rewards; in a script's config it gives `--reward SPEC --reward.weights 1 2`."""

    spec: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="SPEC")] = ("runs/rm",)
    """Reward models (run directories or Hugging Face directories) and Python functions
    (`my_file.py:my_function`), one or several."""
    weights: tuple[float, ...] = ()
    """Of the reward models, taken together, and of each function, in this order; default: 1."""
    combine: Literal["mean", "min", "mean-std"] = "mean"
    """Several reward models give their mean, the least of them, or the mean less --reward.spread
    standard deviations."""
    spread: float = 1.0
    """Standard deviations that `mean-std` takes off."""


@dataclass(frozen=True)
class Rewards:
    """The terms of a score; see `load`."""

    models: list[tuple[Callable[[Params, Rows], jax.Array], Resting]]
    functions: list[tuple[str, RewardFn]]  # by the flag's words
    weights: tuple[float, ...]
    combine: Literal["mean", "min", "mean-std"]
    spread: float

    def of_models(self, scores_NB: np.ndarray) -> np.ndarray:
        """One score a response of those of N models."""
        mean_B = scores_NB.mean(0)
        if self.combine == "min":
            return scores_NB.min(0)
        return mean_B - self.spread * scores_NB.std(0) if self.combine == "mean-std" else mean_B

    def score(
        self,
        over: Callable[[Callable[[Rows], jax.Array]], np.ndarray],
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Record],
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The weighted sum of all terms.

        Args:
          over: a function of rows -> its values for the whole rollout, as `rollout.map_batches`.
          prompts, responses, records: of the rollout, for the functions.

        Returns:
          (score_B float32, the mean of each term by name)

        Raises:
          ValueError: a function raised, or gave something else than a finite number a response;
            names it.
        """
        terms: dict[str, np.ndarray] = {}
        if self.models:
            each = [over(functools.partial(fn, resting.awake())) for fn, resting in self.models]
            terms["model"] = self.of_models(np.stack(each))
        for name, function in self.functions:
            scores_B = _call(name, function, prompts, responses, records)
            terms[name.rpartition(":")[2]] = hosts.agree(scores_B)  # it may be random, or a service
        total_B = np.zeros(len(responses), np.float32)
        for weight, term in zip(self.weights, terms.values(), strict=True):
            total_B += weight * term.astype(np.float32)
        return total_B, {name: float(term.mean()) for name, term in terms.items()}


def load(
    config: RewardConfig, mesh: Mesh, tokenizer: Any, dtype: str, offload: bool = False
) -> Rewards:
    """Loads every term.

    Args:
      tokenizer: the policy's; reward models must share its tokens.
      dtype: of the models' parameters and of their computation.
      offload: the models rest in host memory while they do not score.

    Raises:
      ValueError: a file without the function, a language model in place of a reward model, another
        vocabulary than the policy's, or weights of the wrong number.
      FileNotFoundError: there is no such model or file.
    """
    models = []
    functions: list[tuple[str, RewardFn]] = []
    for spec in config.spec:
        if is_function(spec):
            functions.append((spec, load_function(spec, "--reward")))
        else:
            for member in _members(spec):
                own, params = load_model(member, mesh, tokenizer, dtype, f"--reward {spec}")
                models.append((scorer(own, mesh), rest(params, offload)))
    names = ["the reward models"] * bool(models) + [name for name, _ in functions]
    if not names:
        raise ValueError("--reward: give at least one reward model or function")
    if len({"model", *(name.rpartition(":")[2] for name, _ in functions)}) <= len(functions):
        raise ValueError("--reward: two functions of one name, or one named `model`")
    weights = config.weights or (1.0,) * len(names)
    if len(weights) != len(names):
        given = " ".join(map(str, weights))
        raise ValueError(f"--reward.weights {given}: {len(names)} are needed: {', '.join(names)}")
    return Rewards(models, functions, weights, config.combine, config.spread)


def load_model(
    path: str, mesh: Mesh, tokenizer: Any, dtype: str, flag: str
) -> tuple[ModelConfig, Params]:
    """A reward model, frozen in its dtype, whose tokens are the tokenizer's.

    Args:
      path: a run directory, a Hugging Face directory or a hub name.
      flag: what to call it in errors.

    Raises:
      ValueError: it is a language model, or its tokens have other ids.
    """
    config, params, own = pretrained.load(path, mesh, flag=flag)
    if not config.scalar_head:
        raise ValueError(f"{flag}: {path} is a language model, not a reward model")
    # An exported reward model may have a row more, for padding; every token of the policy's must
    # have the same id.
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    other = [token for token, i in ours.items() if theirs.get(token) != i]
    if other:
        raise ValueError(
            f"{flag}: the vocabulary of {path} is not the policy's: {len(other):,} of its"
            f" {len(ours):,} tokens are missing or have another id, such as {other[0]!r}"
        )
    return dataclasses.replace(config, dtype=dtype), freeze(params, dtype)


def scorer(config: ModelConfig, mesh: Mesh) -> Callable[[Params, Rows], jax.Array]:
    """Compiles (params, rows) -> score_B, read at the last live token; rows as in responses.py."""

    def score(params: Params, rows: Rows) -> jax.Array:
        shared = {
            "prompt_BP": rows["prompt_BP"],
            "prompt_mask_BP": rows["prompt_mask_BP"],
            "responses_BKR": rows["tokens_BR"][:, None],
            "response_mask_BKR": rows["mask_BR"][:, None],
        }
        return reward.score(params, config, shared, shard=sharding.constrainer(mesh))[:, 0]

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


# ------------------------------------------------------------------------------- functions of users


def is_function(spec: str) -> bool:
    """Whether a SPEC names a function in a file: `my_file.py:my_function`."""
    return spec.rpartition(":")[0].endswith(".py")


def load_function(spec: str, flag: str) -> Callable[..., Any]:
    """`my_file.py:my_function` -> the function.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be run, or has no such function; names flag, file and reason.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if not path.endswith(".py") or not name:
        raise ValueError(f"{flag} {spec}: expected my_file.py:my_function")
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {spec}: there is no file {file}")
    found: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(file.parent.resolve()))  # as if the file were run: it may import others
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{flag} {spec}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: {file} has no function {name!r}")
    return function


def _call(name: str, function: RewardFn, prompts: Any, responses: Any, records: Any) -> np.ndarray:
    try:
        scores = function(prompts, responses, records)
        scores = np.asarray(scores, np.float64)
    except Exception as error:
        raise ValueError(f"--reward {name}: {type(error).__name__}: {error}") from error
    if scores.shape != (len(responses),):
        raise ValueError(
            f"--reward {name}: gave shape {list(scores.shape)} for {len(responses)} responses"
        )
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"--reward {name}: {scores[worst]} for the response {responses[worst]!r}")
    return scores


def _members(spec: str) -> list[str]:
    """A run's `export`, `export-1`, ...; anything else as it is."""
    members = [str(path) for path in sorted(Path(spec).glob("export-*"), key=_number)]
    return [spec, *members]


def _number(path: Path) -> float:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else math.inf
