"""Loads a checkpoint's tokenizer, and tries its chat template, a program of unknown origin."""

import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from jinja2 import nodes

from instructjax.hf import configs
from instructjax.hf.directory import TEXTS, describe, read_json, read_text, resolve

_FILES = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab")
_TEMPLATE = "chat_template.jinja"
_SECONDS = 5.0  # of a processor; the longest templates, of 20,000 characters, take one
_DIALOGUE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
# A power can take for ever in one operation. The others read files, of which there are none.
_REFUSED = {
    nodes.Pow: "**",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Extends: "extends",
}
_FAULTS = (
    jinja2.TemplateSyntaxError,
    jinja2.sandbox.SecurityError,
    MemoryError,
    RecursionError,
    SyntaxError,  # of the Python that jinja makes of a template
    TimeoutError,
    UnicodeError,
)


def load_tokenizer(path: str | os.PathLike) -> Any:
    """Loads a checkpoint's tokenizer, a transformers PreTrainedTokenizerBase.

    Raises:
      FileNotFoundError: as for `load`.
      ValueError: a file is damaged, transformers cannot make a tokenizer of the directory, or its
        chat template is broken, reaches for what is not its own, or does not end.
    """
    directory, auto = resolve(path, TEXTS), configs.transformers().AutoTokenizer
    for name in _FILES:
        if os.path.lexists(directory / f"{name}.json"):
            read_json(directory / f"{name}.json")
    if os.path.lexists(directory / _TEMPLATE):
        read_text(directory / _TEMPLATE)
    try:
        tokenizer = auto.from_pretrained(directory, trust_remote_code=False)
    except BaseException as error:  # transformers and tokenizers raise many kinds
        if _is_interruption(error):
            raise
        culprit = _culprit(directory)
        raise ValueError(f"{culprit}: the tokenizer cannot be loaded: {describe(error)}") from error
    _check_templates(tokenizer, directory)
    return tokenizer


def _culprit(directory: Path) -> Path:
    """The file that keeps a tokenizer from loading, as far as can be told."""
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if file.is_file():
        try:
            tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:
            if _is_interruption(error):
                raise
            return file
    return settings if settings.is_file() else directory


def _is_interruption(error: BaseException) -> bool:
    """Whether an exception is no error; a panic in Rust is one, and no Exception."""
    return not isinstance(error, Exception) and type(error).__name__ != "PanicException"


# ---------------------------------------------------------------------------- chat templates


def _check_templates(tokenizer: Any, directory: Path) -> None:
    """Renders a short dialogue with each chat template of a tokenizer.

    A template may decline this dialogue, or want variables that it lacks: rows of data will tell.

    Raises:
      ValueError: as `load_tokenizer`; the message names the file.
    """
    given = tokenizer.chat_template
    alone = directory / _TEMPLATE
    where = alone if alone.is_file() else directory / "tokenizer_config.json"
    for template in given.values() if isinstance(given, dict) else [given]:
        if template is None:
            continue
        if not isinstance(template, str):
            raise ValueError(f"{where}: chat_template = {template!r} is not text")
        try:
            _parse(template)
            for turns in (1, 2):
                _render(tokenizer, template, _DIALOGUE[:turns])
        except _FAULTS as error:
            raise ValueError(f"{where}: chat_template: {describe(error)}") from error


def _parse(template: str) -> None:
    """Raises one of _FAULTS for what no template may hold, before anything of it is run."""
    template.encode()  # half of a surrogate pair, which no tokenizer takes
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    for node in environment.parse(template).find_all(tuple(_REFUSED)):
        raise jinja2.TemplateSyntaxError(f"{_REFUSED[type(node)]} is refused", node.lineno)


class _Generation(jinja2.ext.Extension):
    """The block in which templates for transformers mark what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _render(tokenizer: Any, template: str, messages: list[dict[str, str]]) -> None:
    """Raises one of _FAULTS, if there is one.

    The clock is read at each line of Python that the template and jinja run: also in filters, and
    in the compiler, which computes constants. A signal would reach the main thread alone, and a
    thread cannot stop another. One call into C is waited for, however long it takes: two lists that
    are nested 60 deep take for ever to compare, and `'x' * 10000000000` takes 10 GB.
    """
    end = time.thread_time() + _SECONDS  # does not count what other processes take

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line" and time.thread_time() > end:
            raise _EndlessError
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except _EndlessError:
        raise TimeoutError(f"took over {_SECONDS:g} s for {len(_DIALOGUE)} words") from None
    except _FAULTS:
        raise
    except Exception:  # a template is a program: it may raise anything about the dialogue
        return
    finally:
        sys.settrace(before)


class _EndlessError(BaseException):
    """No Exception: jinja's compiler catches those, and leaves the constant to the rendering."""
