"""Loads the model that `--model` names, with its tokenizer.

miniature, gpt3-1.3b, ...   a preset of `models.PRESETS`, with random values
runs/sft                    the export/ of a run directory
some/directory              a Hugging Face directory, or peft's of an adapter and its base's name
EleutherAI/pythia-160m      a name on the Hugging Face hub, if no folder EleutherAI exists here
hf:EleutherAI/pythia-160m   a name on the hub in any case
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
from huggingface_hub import errors as hub_errors
from jax.sharding import Mesh

from instructjax import data, hf, hosts, models, sharding
from instructjax.data import template as templates
from instructjax.models import PRESETS, ModelConfig, Params
from instructjax.run import adapters

_NO_TOKENIZER = "a preset has no tokenizer: give --tokenizer DIR"


def load(
    model: str,
    mesh: Mesh,
    *,
    tokenizer: str | None = None,
    template: Literal["auto", "chat", "plain"] | None = None,
    seed: int = 0,
    flag: str = "--model",
    scalar_head: bool | None = None,
    merged: bool = True,
    dtype: str = "float32",
) -> tuple[ModelConfig, Params, Any]:
    """Loads a model onto a mesh, with its tokenizer.

    Args:
      model: as above. A preset goes before a directory of the same name; write `./NAME` for that.
      mesh: the mesh that the parameters are laid out on.
      tokenizer: a Hugging Face directory or a hub name. By default the tokenizer beside the model,
        and the miniature's for its presets. A preset takes its vocabulary from it. A
        model gets rows for tokens that were added to it; without this argument, only if its BOS,
        EOS, padding or chat template use one of them.
      template: `--data.template` of a run that trains on prompts. The form that it gives is
        recorded in the tokenizer; a model that was trained with another form is warned of.
      seed: seed of a preset's random values.
      flag: the flag that named the model, for error messages.
      scalar_head: whether it must be a reward model or a language model; None: it may be either.
      merged: whether an adapter is merged into its base. If not, a run directory's adapter and its
        base are loaded in place of its export.
      dtype: of the parameters, for a model that is not trained; see `hf.load`.

    Returns:
      (config, params, a transformers tokenizer)

    Raises:
      FileNotFoundError: there is no such model; the message lists the places that were tried.
      ValueError: a preset without a tokenizer, a tokenizer whose basic vocabulary is larger than
        the model's, or a model with the other head.
    """
    if model in PRESETS:
        config, params, loaded = _random(model, mesh, tokenizer, seed, flag)
        params = models.cast(params, dtype)
    else:
        where = export_of(model, flag)
        with naming(model, flag):
            if not merged:
                where = adapters.adapter_of(model) or where
            config, params = adapters.load_weights(where, mesh, merged, dtype)
        _check_head(config, scalar_head, f"{flag} {model}")
        loaded = load_tokenizer(tokenizer or where)
        fit = _fit_vocabulary
        config, params = fit(config, params, loaded, mesh, tokenizer is not None, f"{flag} {model}")
        if not scalar_head:  # one that scores ends no response
            _check_ends(config, loaded, f"{flag} {model}")
        config = dataclasses.replace(config, eos_ids=templates.end_ids(loaded, config.eos_ids))
        if tokenizer is not None and (form := _recorded_form(where)) is not None:
            templates.record(loaded, form)  # the form is the model's, not the tokenizer's
    return config, params, _with_form(loaded, template, f"{flag} {model}")


def reader(config: ModelConfig, tokenizer: Any) -> Callable[..., data.Dataset]:
    """`data.load` for a model: with its tokenizer, its ends of a response and its vocabulary."""
    return functools.partial(
        data.load, tokenizer=tokenizer, eos_ids=config.eos_ids, vocab_size=config.vocab_size
    )


def _recorded_form(where: str) -> Any:
    """The form of prompts that a directory's own tokenizer records, if it has one."""
    settings = Path(os.path.expanduser(where)) / "tokenizer_config.json"
    if not os.path.lexists(settings):
        return None
    return hf.read_json(settings).get(templates.RECORDED)


def _fit_vocabulary(
    config: ModelConfig, params: Params, tokenizer: Any, mesh: Mesh, chosen: bool, model: str
) -> tuple[ModelConfig, Params]:
    """Rows for tokens that were added, if the tokenizer uses them or was `chosen` by a flag."""
    try:
        new = hf.new_tokens(tokenizer, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{model}: {error}; give --tokenizer the model's own") from error
    if not new:
        return config, params
    names = ", ".join(new) if len(new) < 6 else f"{len(new)} tokens"
    note = f"the model has no {names}, which the tokenizer has and does not use"
    if chosen or hf.in_use(tokenizer, new):
        config, params = hf.grow(config, params, max(new.values()) + 1, mesh)
        note = f"its vocabulary grows to {config.vocab_size:,} tokens by {names}"
    if jax.process_index() == 0:
        print(f"{model}: {note}")
    return config, params


def _check_ends(config: ModelConfig, tokenizer: Any, model: str) -> None:
    """Raises ValueError if a response cannot end as the model's config says."""
    for i in config.eos_ids:
        said = f"{model}: eos_token_id {i} of config.json or generation_config.json"
        if i >= config.vocab_size:
            raise ValueError(f"{said}: the model has {config.vocab_size:,} tokens")
        if tokenizer.convert_ids_to_tokens(i) is None:
            raise ValueError(f"{said}: the tokenizer has no such token")


def _with_form(tokenizer: Any, choice: Any, model: str) -> Any:
    """The tokenizer with the form of prompts that the run trains with, if it trains on prompts."""
    if choice is not None:
        before, form = templates.recorded(tokenizer), templates.of(tokenizer, choice).form
        if before not in (None, form) and jax.process_index() == 0:
            print(f"warning: {model} was trained on {before} prompts: these are {form} prompts")
        templates.record(tokenizer, form)
    return tokenizer


def describe(model: str, flag: str = "--model") -> ModelConfig:
    """The config of a model, without its weights. Arguments and errors: as for `load`."""
    if model in PRESETS:
        return PRESETS[model]
    where = export_of(model, flag)
    with naming(model, flag):
        return adapters.load_config(where)


def check(
    model: str,
    mesh: Mesh,
    *,
    tokenizer: str | None = None,
    flag: str = "--model",
    scalar_head: bool | None = None,
) -> ModelConfig | None:
    """Finds what would keep `load` from loading a model, without reading weights.

    Arguments and errors: as for `load`; also ValueError if the mesh does not divide the model.

    Returns:
      the config, or None for a model of a hub that cannot be reached. It may be in reach later.
    """
    try:
        if tokenizer is not None:
            _check_tokenizer(export_of(tokenizer, "--tokenizer"))
        config = describe(model, flag)
        if model in PRESETS and not _of_miniature(model) and tokenizer is None:
            raise ValueError(f"{flag} {model}: {_NO_TOKENIZER}")
        if model not in PRESETS:
            where = export_of(model, flag)
            with naming(model, flag):
                if tokenizer is None:
                    hf.check_tokenizer(hf.with_tokenizer(where))
                if hf.is_adapter(where):
                    where = adapters.base_of(where)
                if hf.hub_name(where) is None:
                    hf.weight_files(Path(os.path.expanduser(where)), where)
    except FileNotFoundError as error:
        if _unreachable(error):
            return None
        raise
    _check_head(config, scalar_head, f"{flag} {model}")
    if mesh.shape["tensor"] > 1 or config.width % mesh.shape["fsdp"]:
        shapes = jax.eval_shape(functools.partial(models.init, config), jax.random.key(0))
        try:
            sharding.shardings(models.logical_axes(config), shapes, mesh)
        except ValueError as error:
            sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
            raise ValueError(f"--mesh {sizes}: {flag} {model}: {error}") from error
    return config


def _check_tokenizer(where: str) -> None:
    try:
        hf.check_tokenizer(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--tokenizer {error}") from error
    except ValueError as error:
        raise ValueError(f"--tokenizer {error}") from error


def _unreachable(error: BaseException) -> bool:
    """Whether the hub gave no answer, for which neither the flag nor a file is to blame."""
    causes: list[BaseException] = []
    while error.__cause__ is not None:
        causes.append(error := error.__cause__)
    asked = (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError)
    answered = (hub_errors.RepositoryNotFoundError, hub_errors.OfflineModeIsEnabled)
    return any(isinstance(x, asked) for x in causes) and not any(
        isinstance(x, answered) for x in causes
    )


def _check_head(config: ModelConfig, scalar_head: bool | None, where: str) -> None:
    if scalar_head is not None and config.scalar_head != scalar_head:
        kinds = ("a language model", "a reward model")
        raise ValueError(f"{where}: {kinds[config.scalar_head]}, not {kinds[scalar_head]}")


def hub_base(model: str) -> str | None:
    """The hub's model that a model is, or that the runs behind it began with, if there is one."""
    if model in PRESETS:
        return None
    if (name := hf.hub_name(model)) is not None:
        return name
    if Path(os.path.expanduser(model)).is_dir() and hf.is_adapter(model):
        return hub_base(hf.adapter_base(model))
    card = Path(os.path.expanduser(export_of(model, "--model"))) / "README.md"
    if not card.is_file():
        return None
    known = huggingface_hub.metadata_load(card) or {}
    return known.get("base_model") if "instructjax" in known.get("tags", ()) else None


def finished(run: Path) -> bool:
    """Whether a run has written its export, as host 0 sees the directory."""
    return bool(hosts.agree((run / "export" / "config.json").is_file()))


def export_of(model: str, flag: str) -> str:
    """The export/ of a run directory; any other model as it is."""
    if hf.hub_name(model) is not None:
        return model
    directory = Path(os.path.expanduser(model))
    if (directory / "export" / "config.json").is_file():
        return str(directory / "export")
    is_run = (directory / "checkpoints").is_dir() or (directory / "metrics.jsonl").is_file()
    if is_run and not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{flag} {model}: this run has no export/ yet; finish it with --resume first"
        )
    return model


@contextlib.contextmanager
def naming(model: str, flag: str) -> Iterator[None]:
    """Adds the flag to an error, and the places that were tried to that of a missing model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error
    except FileNotFoundError as error:
        if hf.hub_name(model) is None:
            raise FileNotFoundError(f"{flag} {error}") from error
        raise FileNotFoundError(
            f"{flag} {model}: not a preset ({', '.join(PRESETS)}), not a run directory with"
            f" export/, and not a Hugging Face model: {error}"
        ) from error


def _of_miniature(preset: str) -> bool:
    return preset.partition("-")[0] == "miniature"


def _random(
    preset: str, mesh: Mesh, tokenizer: str | None, seed: int, flag: str
) -> tuple[ModelConfig, Params, Any]:
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
    elif _of_miniature(preset):
        from instructjax import miniature

        loaded = miniature.tokenizer()
    else:
        raise ValueError(f"{flag} {preset}: {_NO_TOKENIZER}")
    config = dataclasses.replace(
        PRESETS[preset],
        vocab_size=len(loaded),
        bos_id=loaded.bos_token_id,
        eos_ids=templates.end_ids(loaded),
        pad_id=loaded.pad_token_id,
    )
    build = functools.partial(models.init, config)
    key = jax.random.key(seed)
    layout = sharding.shardings(models.logical_axes(config), jax.eval_shape(build, key), mesh)
    return config, jax.jit(build, out_shardings=layout)(key), loaded


def load_tokenizer(where: str) -> Any:
    """A transformers tokenizer, from a directory, a run or the hub; errors as for `load`."""
    where = export_of(where, "--tokenizer")
    try:
        where = hf.with_tokenizer(where)
        hf.check_tokenizer(where)
        return hf.load_tokenizer(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--tokenizer {error}") from error
    except ValueError as error:
        hint = "" if "--tokenizer" in str(error) else "; --tokenizer DIR names another"
        raise ValueError(f"{error}{hint}") from error
