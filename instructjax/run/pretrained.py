"""Loads the model that `--model` names, with its tokenizer.

miniature, gpt3-1.3b, ...   a preset of `models.PRESETS`, with random values
runs/sft                    the export/ of a run directory
some/directory              a Hugging Face directory
EleutherAI/pythia-160m      a name on the Hugging Face hub
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from instructjax import hf, hosts, models, sharding
from instructjax.data import template as templates
from instructjax.models import PRESETS, ModelConfig, Params


def load(
    model: str,
    mesh: Mesh,
    *,
    tokenizer: str | None = None,
    template: Literal["auto", "chat", "plain"] | None = None,
    seed: int = 0,
    flag: str = "--model",
) -> tuple[ModelConfig, Params, Any]:
    """Loads a model onto a mesh, with its tokenizer.

    Args:
      model: as above. A preset goes before a directory of the same name; write `./NAME` for that.
      mesh: the mesh that the parameters are laid out on.
      tokenizer: a Hugging Face directory or a hub name. By default the tokenizer beside the model,
        and the miniature's for the preset `miniature`. A preset takes its vocabulary from it. A
        model gets rows for tokens that were added to it; without this argument, only if its BOS,
        EOS, padding or chat template use one of them.
      template: `--data.template` of a run that trains on prompts. The form that it gives is
        recorded in the tokenizer; a model that was trained with another form is warned of.
      seed: seed of a preset's random values.
      flag: the flag that named the model, for error messages.

    Returns:
      (config, float32 params, a transformers tokenizer)

    Raises:
      FileNotFoundError: there is no such model; the message lists the places that were tried.
      ValueError: a preset without a tokenizer, or a tokenizer whose basic vocabulary is larger than
        the model's.
    """
    if model in PRESETS:
        config, params, loaded = _random(model, mesh, tokenizer, seed, flag)
        return config, params, _with_form(loaded, template, f"{flag} {model}")
    directory = Path(model)
    if (directory / "export" / "config.json").is_file():
        directory = directory / "export"
    elif (directory / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{flag} {model}: this run has no export/ yet; finish it with --resume first"
        )
    where = directory if directory.is_dir() else model
    try:
        config, params = hf.load(where, mesh)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{flag} {model}: not a preset ({', '.join(PRESETS)}), not a run directory with"
            f" export/, and not a Hugging Face model: {error}"
        ) from error
    loaded = _tokenizer(tokenizer or str(where))
    try:
        new = hf.new_tokens(loaded, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{flag} {model}: {error}; give --tokenizer the model's own") from error
    if new:
        names = ", ".join(new) if len(new) < 6 else f"{len(new)} tokens"
        if tokenizer is not None or hf.in_use(loaded, new):
            config, params = hf.grow(config, params, max(new.values()) + 1, mesh)
            note = f"its vocabulary grows to {config.vocab_size:,} tokens by {names}"
        else:
            note = f"the model has no {names}, which the tokenizer has and does not use"
        if jax.process_index() == 0:
            print(f"{flag} {model}: {note}")
    config = dataclasses.replace(config, eos_ids=templates.end_ids(loaded, config.eos_ids))
    return config, params, _with_form(loaded, template, f"{flag} {model}")


def _with_form(tokenizer: Any, choice: Any, model: str) -> Any:
    """The tokenizer with the form of prompts that the run trains with, if it trains on prompts."""
    if choice is not None:
        before, form = templates.recorded(tokenizer), templates.of(tokenizer, choice).form
        if before not in (None, form):
            print(f"warning: {model} was trained on {before} prompts: these are {form} prompts")
        templates.record(tokenizer, form)
    return tokenizer


def finished(run: Path) -> bool:
    """Whether a run has written its export, as host 0 sees the directory."""
    return bool(hosts.agree((run / "export" / "config.json").is_file()))


def _random(
    preset: str, mesh: Mesh, tokenizer: str | None, seed: int, flag: str
) -> tuple[ModelConfig, Params, Any]:
    if tokenizer is not None:
        loaded = _tokenizer(tokenizer)
    elif preset == "miniature":
        from instructjax import miniature

        loaded = miniature.tokenizer()
    else:
        raise ValueError(f"{flag} {preset}: a preset has no tokenizer: give --tokenizer DIR")
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


def _tokenizer(where: str) -> Any:
    try:
        return hf.load_tokenizer(where)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where} has no tokenizer: give --tokenizer DIR ({reason})") from error
