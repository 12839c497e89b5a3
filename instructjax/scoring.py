"""Scores responses with reward models, Python functions, or a weighted sum of both.

runs/rm                    a reward model: a run directory or a Hugging Face directory. A run with
                           --ensemble gives all its reward models
my_file.py:my_function     a function (prompts, responses, records) -> scores, of texts and Records
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from instructjax import hf, hosts, reward, sharding
from instructjax.data import Record, template
from instructjax.models import ModelConfig, Params, split
from instructjax.offload import Offloaded, to_host
from instructjax.ranges import Finite, NotNegative
from instructjax.run import adapters, pretrained
from instructjax.train import Batch

RewardFn = Callable[[Sequence[str], Sequence[str], Sequence[Record]], Sequence[float]]
Combine = Literal["mean", "min", "mean-std", "mean-variance"]


@dataclass(frozen=True)
class RewardConfig:
    """The flags of rewards; in a script's config it gives `--reward SPEC --reward.weights 1 2`."""

    spec: Annotated[tuple[str, ...], tyro.conf.arg(name="", metavar="SPEC")] = ("runs/rm",)
    """Reward models (run directories or Hugging Face directories) and Python functions
    (`my_file.py:my_function`), one or several."""
    weights: tuple[Finite, ...] = ()
    """Factor of each term of the score: one for all reward models together, then one for each
    function in the order given.
    Default: 1 each."""
    combine: Combine = "mean"
    """How several reward models give one score: their mean, their minimum, or their mean minus
    --reward.spread standard deviations or variances. [Coste et al. 2023, arXiv 2310.02743, compare
    mean, min and mean-variance]"""
    spread: NotNegative = 1.0
    """Factor of the standard deviation, or of the variance, that is subtracted from the mean.
    [Ours]"""


@dataclass(frozen=True)
class Rewards:
    """The terms of a score; see `load`."""

    models: list[tuple[Callable[[Params, Batch], jax.Array], Offloaded]]
    functions: list[tuple[str, RewardFn]]  # by SPEC
    weights: tuple[float, ...]
    combine: Combine
    spread: float
    flag: str = "--reward"  # the flag that named the terms, for errors

    def combined(self, scores_NB: np.ndarray) -> np.ndarray:
        """score_B from the scores of N reward models."""
        if self.combine == "min":
            return scores_NB.min(0)
        mean_B = scores_NB.mean(0)
        match self.combine:
            case "mean-std":
                return mean_B - self.spread * scores_NB.std(0)
            case "mean-variance":
                return mean_B - self.spread * scores_NB.var(0)
        return mean_B

    def score(
        self,
        run_model: Callable[[Callable[[Batch], jax.Array]], np.ndarray],
        prompts: Sequence[str],
        responses: Sequence[str],
        records: Sequence[Record],
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The weighted sum of all terms, for each response of a rollout.

        Args:
          run_model: runs a function of a batch on all rows of the rollout and returns score_B, as
            `rollout.map_batches`.
          prompts, responses, records: of the rollout, for the functions.

        Returns:
          (score_B float32, the mean of each term by name; of several reward models also
          "disagreement", the standard deviation over them, averaged over the responses)

        Raises:
          ValueError: a function raised, or did not return one finite number for each response.
        """
        terms: dict[str, np.ndarray] = {}
        spread = {}
        if self.models:
            scores_NB = np.stack(
                [run_model(functools.partial(fn, params.on_device())) for fn, params in self.models]
            )
            terms["model"] = self.combined(scores_NB)
            if len(scores_NB) > 1:
                spread["disagreement"] = float(scores_NB.std(0).mean())
        for name, function in self.functions:
            score_B = _call(f"{self.flag} {name}", function, prompts, responses, records)
            # It may be random, or a service: host 0's scores count.
            terms[name.rpartition(":")[2]] = hosts.agree(score_B)
        total_B = np.zeros(len(responses), np.float32)
        for weight, term_B in zip(self.weights, terms.values(), strict=True):
            total_B += weight * term_B.astype(np.float32)
        means = {name: float(term_B.mean()) for name, term_B in terms.items()}
        return total_B, means | spread


def load(
    config: RewardConfig,
    mesh: Mesh,
    tokenizer: Any,
    dtype: str,
    offload: bool = False,
    flag: str = "--reward",
    base: adapters.Base | None = None,
) -> Rewards:
    """Loads every term of the score.

    Args:
      tokenizer: the policy's; reward models must have the same tokens.
      dtype: dtype of the reward models' parameters and of their computation.
      offload: keep the reward models in host memory while they do not score.
      flag: the flag that named the terms, for errors.
      base: frozen weights that are on the devices, which reward models that are adapters of them
        share.

    Raises:
      ValueError: a file lacks the function, a language model stands for a reward model, a
        vocabulary differs from the policy's, or the number of weights is wrong.
      FileNotFoundError: there is no such model or file.
    """
    functions = [(name, load_function(name, flag)) for name in filter(is_function, config.spec)]
    weights = _weights(config, flag)
    models = []
    for spec in config.spec:
        for path in () if is_function(spec) else members(spec):
            model, params = load_model(path, mesh, tokenizer, dtype, flag, base)
            own, shared = split(params) if base is not None else (params, {})
            run = functools.partial(_score_shared, scorer(model, mesh), shared)
            models.append((run, to_host(own, offload)))
    return Rewards(models, functions, weights, config.combine, config.spread, flag)


def check(
    config: RewardConfig, mesh: Mesh, flag: str = "--reward", coming: Collection[str] = ()
) -> None:
    """Finds what would keep `load` from loading the terms, without reading weights.

    Errors are those of `load`, but for vocabularies that differ.

    Args:
      coming: reward models that an earlier step is going to make.
    """
    _weights(config, flag)
    for spec in config.spec:
        if is_function(spec):
            load_function(spec, flag)
        elif spec not in coming:
            for path in members(spec):
                pretrained.check(path, mesh, flag=flag, scalar_head=True)


def _weights(config: RewardConfig, flag: str) -> tuple[float, ...]:
    """The factor of each term.

    Raises:
      ValueError: there are no terms, two of one name, or another number of weights.
    """
    names = [spec.rpartition(":")[2] for spec in config.spec if is_function(spec)]
    terms = ["the reward models"] * (len(names) < len(config.spec))
    terms += [spec for spec in config.spec if is_function(spec)]
    if not terms:
        raise ValueError(f"{flag}: give at least one reward model or function")
    if len({"model", "disagreement", *names}) <= len(names) + 1:
        raise ValueError(
            f"{flag}: two functions of one name, or one named `model` or `disagreement`"
        )
    weights = config.weights or (1.0,) * len(terms)
    if len(weights) != len(terms):
        given = " ".join(map(str, weights))
        raise ValueError(f"{flag}.weights {given}: {len(terms)} are needed: {', '.join(terms)}")
    return weights


def load_model(
    path: str,
    mesh: Mesh,
    tokenizer: Any,
    dtype: str,
    flag: str,
    base: adapters.Base | None = None,
) -> tuple[ModelConfig, Params]:
    """Loads a reward model, frozen in `dtype`, and checks that it has the tokenizer's tokens.

    Args:
      path: as for `pretrained.load`.
      flag: the flag that named it, for errors.
      base: weights in `dtype`; the model of an adapter on them has them as they are, and the
        adapter beside them.

    Raises:
      ValueError: it is a language model, or its tokens have other ids.
      FileNotFoundError: there is no such model.
    """
    with pretrained.naming(path, flag):
        adapter = adapter_on(base, path)
    if base is None or adapter is None:
        how: Any = {"flag": flag, "scalar_head": True, "dtype": dtype}
        config, params, model_tokenizer = pretrained.load(path, mesh, **how)
    else:
        with pretrained.naming(path, flag):
            config, params = base.adapted(adapter, mesh)
        model_tokenizer = pretrained.load_tokenizer(adapter)
    learned, form = template.recorded(model_tokenizer), template.recorded(tokenizer)
    if None not in (learned, form) and learned != form and jax.process_index() == 0:
        print(f"warning: {flag} {path} was trained on {learned} prompts: these are {form} prompts")
    # An exported reward model may have a row more, for padding; every token of the policy's must
    # have the same id.
    model_vocab, policy_vocab = model_tokenizer.get_vocab(), tokenizer.get_vocab()
    differing = [token for token, i in policy_vocab.items() if model_vocab.get(token) != i]
    if differing:
        raise ValueError(
            f"{flag} {path}: the vocabulary is not the policy's: {len(differing):,} of its"
            f" {len(policy_vocab):,} tokens are missing or have another id, such as"
            f" {differing[0]!r}"
        )
    return dataclasses.replace(config, dtype=dtype), params


def adapter_on(base: adapters.Base | None, path: str) -> str | None:
    """The adapter of a reward model, if it is one of a language model's weights `base`.

    None also for a run whose adapter is of weights that were moved or have changed since: its
    export has those that it was trained on.

    Raises:
      ValueError: it is no run with an export, and `base` has other weights than it was trained on.
    """
    if base is None:
        return None
    run, _, member = path.rpartition("/export-")  # of an ensemble
    adapter = adapters.adapter_of(path)
    if run and (of_member := Path(os.path.expanduser(run)) / f"adapter-{member}").is_dir():
        adapter = str(of_member)
    if adapter is None or not adapters.same(base.name, hf.adapter_base(adapter)):
        return None
    try:
        hf.check_base(adapter, base.name)
    except ValueError:
        if (Path(pretrained.export_of(path, "--reward")) / "config.json").is_file():
            return None
        raise
    return adapter


def _score_shared(
    score: Callable[[Params, Batch], jax.Array], shared: Params, own: Params, rows: Batch
) -> jax.Array:
    return score({**shared, **own}, rows)


def scorer(config: ModelConfig, mesh: Mesh) -> Callable[[Params, Batch], jax.Array]:
    """Compiles (params, rows of a rollout) -> score_B, read at the last live token."""

    def score(params: Params, rows: Batch) -> jax.Array:
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

    As in an import, a file is run once in a process, so that a check costs a run nothing. A file
    that was edited since is run again.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be run, or has no such function; names flag, file and reason.
    """
    path, _, name = spec.rpartition(":")
    file = Path(os.path.expanduser(path))
    if not path.endswith(".py") or not name:
        raise ValueError(f"{flag} {spec}: expected my_file.py:my_function")
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {spec}: there is no file {file}")
    # A name that shadows no other module.
    key = f"{file.resolve()}:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    if key not in sys.modules:
        module_spec: Any = importlib.util.spec_from_file_location(key, file)
        module = sys.modules[key] = importlib.util.module_from_spec(module_spec)
        sys.path.insert(0, str(file.parent.resolve()))  # the file may import its neighbours
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[key]
            raise ValueError(f"{flag} {spec}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.pop(0)
    module = sys.modules[key]
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: {file} has no function {name!r}")
    return function


def _call(name: str, function: RewardFn, prompts: Any, responses: Any, records: Any) -> np.ndarray:
    try:
        scores = function(prompts, responses, records)
        scores = np.asarray(scores, np.float64)
    except Exception as error:
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    if scores.shape != (len(responses),):
        raise ValueError(f"{name}: gave shape {list(scores.shape)} for {len(responses)} responses")
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"{name}: {scores[worst]} for the response {responses[worst]!r}")
    return scores


def members(spec: str) -> list[str]:
    """The models that `spec` of --reward names: it, and the others of a run of --ensemble."""
    number = lambda path: int(path.name.rpartition("-")[2])  # noqa: E731
    run = Path(os.path.expanduser(spec))
    members = [path for path in run.glob("export-*") if path.name[7:].isdecimal()]
    return [spec, *map(str, sorted(members, key=number))]
