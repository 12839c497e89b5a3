"""Checks the sources that a DataConfig names, without reading the rows."""

import importlib.util
import os
from pathlib import Path

from instructjax.data import paths
from instructjax.data.columns import parse_columns, parse_filter
from instructjax.data.config import DataConfig
from instructjax.data.errors import DataError
from instructjax.data.fields import NAMES, Kind
from instructjax.data.sources import FORMS

_NEEDS = "needs: pip install 'instructjax[hf]'"


def check(config: DataConfig, kind: Kind, flag: str = "--data", held_out: bool = True) -> None:
    """Finds what would keep `load` from reading a set, before its rows are read.

    Args:
      flag: the flag that gave the config, for error messages.
      held_out: whether the validation side is read too.

    Raises:
      ValueError: a SPEC has another form or needs a package, a file is empty, `columns`,
        `only` or `without` is malformed, or nothing is held out.
      FileNotFoundError: a SPEC names a file or folder that does not exist.
    """
    _check_spec(flag, config, config.spec)
    try:
        parse_columns(config.columns, NAMES[kind])
        for name, source in (("only", config.only), ("without", config.without)):
            if source:
                parse_filter(source, f"--data.{name}")
    except DataError:
        raise
    except ValueError as error:
        raise ValueError(str(error).replace("--data.", f"{flag}.", 1)) from error
    if isinstance(config.validation, str):
        _check_spec(f"{flag}.validation", config, config.validation)
    elif held_out and config.validation == 0 and config.spec != "miniature":
        raise ValueError(
            f"{flag}.validation 0: nothing is held out to validate on; give a share, as 0.1, or"
            " the SPEC of a set"
        )


def _check_spec(flag: str, config: DataConfig, spec: str) -> None:
    scheme, _, name = spec.partition(":")
    if spec == "miniature":
        return
    if scheme not in ("jsonl", "tfds", "hf") or not name:
        hint = f"; for a file write jsonl:{spec}" if os.path.exists(spec) else ""
        raise ValueError(f"{flag} {spec}: is not {FORMS}{hint}")
    if scheme == "jsonl":
        _check_files(f"{flag} {spec}", name, config.on_error)
        return
    if scheme == "hf" and importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{flag} {spec} {_NEEDS}")
    if scheme == "hf" and os.path.isfile(paths.expand(name)):
        raise ValueError(f"{flag} {spec}: is a file: write jsonl:{name}")
    # What follows the folder may be a colon and a split, or a slash and a configuration.
    folder = Path(paths.expand(name.partition(":")[0]))
    there = os.path.isdir(folder) or os.path.isdir(folder.parent)
    if name.startswith(("/", "~", ".")) and not there:
        raise FileNotFoundError(f"{flag} {spec}: no such folder")


def _check_files(flag: str, pattern: str, on_error: str) -> None:
    files = paths.files(pattern)
    if not files:
        folder = os.path.isdir(paths.expand(pattern))
        hint = f"; for the files of a folder write jsonl:{pattern.rstrip('/')}/*" if folder else ""
        raise FileNotFoundError(f"{flag}: no such file{hint}")
    if any(path.endswith(".parquet") for path in files) and not importlib.util.find_spec("pyarrow"):
        raise ValueError(f"{flag} {_NEEDS}")
    empty = [path for path in files if not os.path.getsize(path)]
    if empty and (on_error == "raise" or len(empty) == len(files)):
        raise ValueError(f"{flag}: {empty[0]} is empty")
