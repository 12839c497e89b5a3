"""The files of a model's directory: where they are, and whether they are files that can be read."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub

TEXTS = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["model*.safetensors"]
_LARGEST_TEXT = 2**30  # bytes; the largest tokenizer.json have 0.04 of it
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")
_SCRIPTS = {name: f"run_{name}.py" for name in ("pretrain", "sft", "rm", "ppo")}  # of runs/NAME
_SCRIPTS |= {name: f"swap_loss.py {name}" for name in ("dpo", "grpo", "rloo", "raft")}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = """\
Opening pickled weights can run code, so they are refused. Convert them once (needs torch):
  python -c "from transformers import AutoModelForCausalLM as M; \
M.from_pretrained('{path}').save_pretrained('{path}-safetensors')"
Then copy the tokenizer's files into the new directory."""


def hub_name(path: str | os.PathLike) -> str | None:
    """The name that `path` has on the hub, or None if `path` can only be local.

    `hf:NAME` always means the hub. A path never does if it exists, is absolute, starts with `.` or
    `~`, or lies under `runs/` or in a folder that exists: anyone may own such a name on the hub.
    """
    name = os.fspath(path)
    if name.startswith("hf:"):
        return name.removeprefix("hf:")
    local = Path(os.path.expanduser(name))
    first, *inner = local.parts or (".",)
    claimed = name.startswith((".", "~")) or first == "runs" or os.path.lexists(local)
    claimed |= bool(inner) and os.path.lexists(first)  # of an absolute path this is the root
    return None if claimed else name


def resolve(path: str | os.PathLike, patterns: list[str]) -> Path:
    """The directory itself, or a download of the hub model's files that match the patterns."""
    name = hub_name(path)
    if name is None:
        directory = Path(os.path.expanduser(path))
        if directory.is_dir():
            return directory
        if directory.exists():
            raise ValueError(f"{path} is a file: give the directory that holds config.json")
        raise FileNotFoundError(f"{path}: no such directory{_hint(directory)}")
    try:
        local = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
        weightless = WEIGHTS[0] in patterns and not any(Path(local).glob("*.safetensors"))
        remote = huggingface_hub.list_repo_files(name) if weightless else []
    except (OSError, huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{path}: no such directory, and the hub gave no model of that name: {reason}"
        ) from error
    _refuse_pickles(remote, name)
    return Path(local)


def _hint(missing: Path) -> str:
    """How to make or to name the model whose directory is missing."""
    first, *inner = missing.parts
    if first == "runs" and inner:
        script = _SCRIPTS.get(inner[0])
        made_by = "" if script is None else f"; python experiments/{script} makes it"
        finished = sorted(file.parts[1] for file in Path().glob("runs/*/export/config.json"))
        return f"{made_by}; finished runs in runs/: {', '.join(finished) or 'none'}"
    if first not in ("/", "..") and len(inner) == 1:
        return f"; {first}/ is a folder here, so the hub is not asked: hf:{missing} asks it"
    return ""


def _refuse_pickles(files: list[str], where: str) -> None:
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        raise ValueError(f"{where} has only {', '.join(pickles)}. {_CONVERT.format(path=where)}")


def weight_files(directory: Path, where: str) -> list[Path]:
    """The safetensors of a directory: the only file, or those that the index names.

    Raises:
      FileNotFoundError: there are none, or one that the index names is missing.
      ValueError: the index is damaged or names a file elsewhere, or there are pickles alone.
    """
    single = directory / "model.safetensors"
    if os.path.lexists(single):
        _check_regular(single)
        return [single]
    index = directory / "model.safetensors.index.json"
    if os.path.lexists(index):
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise ValueError(f"{index}: weight_map names no files")
        for name in file_of.values():
            plain = isinstance(name, str) and name not in ("", "..") and Path(name).name == name
            if not plain:
                raise ValueError(f"{index}: weight_map names {name!r}, not a file beside the index")
        files = sorted(set(file_of.values()))
        if absent := [name for name in files if not os.path.lexists(directory / name)]:
            names = ", ".join(map(printable, absent))
            raise FileNotFoundError(f"{index} names files that are not there: {names}")
        for name in files:
            _check_regular(directory / name)
        return [directory / name for name in files]
    _refuse_pickles([file.name for file in directory.iterdir()], where)
    raise FileNotFoundError(f"{where}: no model.safetensors and no model.safetensors.index.json")


def check_tokenizer(path: str | os.PathLike) -> None:
    """Looks for a tokenizer's files, which `load_tokenizer` reads.

    Raises:
      FileNotFoundError, ValueError: as `resolve`; ValueError also if there are none.
    """
    directory = resolve(path, TEXTS)
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZERS):
        raise ValueError(f"{path} has no tokenizer: give --tokenizer DIR")


def _check_regular(file: Path) -> None:
    if not file.is_file():  # a pipe would be waited for
        raise ValueError(f"{file}: not a regular file, or a link to nothing")


def printable(name: str) -> str:
    """A name out of a file, without what would move a terminal's cursor or be no Unicode."""
    return name if name.isprintable() else ascii(name)


def describe(error: BaseException) -> str:
    """An exception of another library on one line, with the name of its type."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def read_text(file: Path) -> str:
    """Reads a file of a model's directory.

    Raises:
      ValueError: it is no regular file, too large, or not UTF-8; the message names it.
    """
    _check_regular(file)
    if file.stat().st_size > _LARGEST_TEXT:  # reading it might take all memory
        raise ValueError(f"{file}: has over {_LARGEST_TEXT:,} bytes")
    try:
        return file.read_text("utf-8")
    except UnicodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file of a model's directory.

    Raises:
      ValueError: as `read_text`, or it is no JSON, or no object; the message names it.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a JSON {type(content).__name__}, not an object")
    return content
