"""Reads a command line into a config. Wrong usage is one line on stderr and exit code 2."""

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

USAGE = 2  # the exit code of a wrong command line

ConfigT = TypeVar("ConfigT")

# Not every OSError: a supervisor starts a program again after one of the network or of a disk.
_WRONG = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def parse(
    kind: type[ConfigT],
    argv: Sequence[str] | None,
    description: str | None,
    check: Callable[[ConfigT], object],
    prog: str | None = None,
) -> ConfigT:
    """`read` of the flags of a dataclass, with `~` expanded in --out, as of `--out=~/run`.

    Args:
      argv: the words; None: those of the process.
      description: what --help says first.
      check: as for `read`.
      prog: the program's name in --help, if it is not the file's.
    """
    keywords: Any = {"args": argv, "description": description, "use_underscores": True}

    def expanded() -> ConfigT:
        config: Any = tyro.cli(kind, prog=prog, **keywords)
        out = getattr(config, "out", None)
        if isinstance(out, Path):
            config = dataclasses.replace(config, out=out.expanduser())
        return config

    return read(expanded, check)


def read(parse: Callable[[], ConfigT], check: Callable[[ConfigT], object]) -> ConfigT:
    """Reads a command line and checks what it names.

    A wrong flag ends the program with exit code 2. If the config or `check` refuses it, one line on
    stderr says so. What is no flag, or no value of a flag's type, gets tyro's box, which shows the
    flags that resemble it.

    Args:
      parse: returns the config; calls tyro.
      check: raises ValueError or OSError, with a message that begins with the flag, for what the
        flags name and combine. Nothing has been loaded or written yet.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = parse()
    except SystemExit as end:
        error: BaseException | None = end
        while error is not None and not _names_a_flag(error):
            error = error.__context__
        text = f"error: {error}\n" if error is not None else printed.getvalue()
        print(text, end="", file=sys.stderr)
        raise SystemExit(end.code) from error
    try:
        check(config)
    except _WRONG as error:
        if os.environ.get("INSTRUCTJAX_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE) from error
    return config


def _names_a_flag(error: BaseException) -> bool:
    """Whether this is a config's refusal, which tyro has caught to print its box."""
    return isinstance(error, ValueError) and str(error).startswith("--")
