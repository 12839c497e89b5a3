"""The part of an export's model card that says how a run made the model."""

import dataclasses
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from rich.console import Console
from rich.table import Table

from instructjax.run import pretrained
from instructjax.run.flags import UNCOMPARED, RunConfig, flat


def extend(export: Path, config: RunConfig, stage: str, tables: Sequence[Table]) -> None:
    """Adds base model, data, flags and figures to the model card that `hf.save` wrote.

    Args:
      export: directory of the export. The run's config.json is beside it, in `config.out`.
      tables: the figures, as the terminal shows them.
    """
    file = export / "README.md"
    data = huggingface_hub.metadata_load(file) or {}
    data["tags"] = [*data.get("tags", ()), stage]
    if (base := pretrained.hub_base(config.model)) is not None:
        data["base_model"] = base
    run = json.loads((config.out / "config.json").read_text())
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("instructjax", "jax"))
    sources, changed = _flags(config)
    text = f"""
## How it was made

Stage `{stage}`, from `{config.model}`, on {run["devices"]}, with {versions}. The command was

{_block([run["command"]], "sh")}
Data and rewards, with all their flags:

{_block(sources)}
Other flags that differ from the defaults:

{_block(changed or ["none"])}
## Figures

{_block([_text(table) for table in tables])}"""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(text)
    huggingface_hub.metadata_save(file, data)


def _flags(config: RunConfig) -> tuple[list[str], list[str]]:
    """The flags of data and rewards, and other flags with another value than the script's default.

    Flags that say where files are kept are left out.
    """
    values, defaults = {}, {}
    for field in dataclasses.fields(config):
        values[field.name] = getattr(config, field.name)
        make = field.default_factory
        defaults[field.name] = field.default if make is dataclasses.MISSING else make()
    sources, changed = [], []
    usual = _words(defaults)
    for name, words in _words(values).items():
        if name in UNCOMPARED:
            continue
        flag = f"--{name.removesuffix('.spec')} {words}"
        if getattr(values[name.split(".")[0]], "spec", None):
            sources.append(flag)
        elif words != usual[name]:
            changed.append(flag)
    return sources, changed


def _words(values: Mapping[str, Any]) -> dict[str, str]:
    """The flags' dotted names, and their values as on the command line."""
    nested = {
        name: vars(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }
    return {
        name: shlex.join(map(str, value if isinstance(value, tuple) else [value]))
        for name, value in flat(nested).items()
    }


def _block(lines: Sequence[str], language: str = "") -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def _text(table: Table) -> str:
    shown = io.StringIO()
    Console(file=shown, width=100, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in shown.getvalue().strip("\n").splitlines())
