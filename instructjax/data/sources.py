"""SPEC -> rows, each with its place: file and line, or set and row number.

    miniature                  the built-in world
    jsonl:PATH                 files by suffix: JSON lines, .json, .csv, .tsv, .txt, each plain, .gz
                               or .zst, and .parquet; PATH may hold *, ? and **
    tfds:NAME[/CONFIG][:SPLIT] a TFDS set prepared as ArrayRecord, by name or by its folder
    hf:NAME[/CONFIG][:SPLIT]   a data set of the Hugging Face hub or a local folder

A reader yields `(where, row)`. For a row that cannot be read it yields a DataError in place of the
row, and the caller decides whether to stop.
"""

import os
import re
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from instructjax.data import paths
from instructjax.data.errors import DataError
from instructjax.data.fields import NUMERAL, is_blank
from instructjax.data.files import LocatedRows, plain, read_files

FORMS = "miniature, jsonl:PATH, tfds:NAME[/CONFIG][:SPLIT] or hf:NAME[/CONFIG][:SPLIT]"

# Records of each kind in the miniature's training split; the validation split has a tenth as many.
MINIATURE = {"demonstrations": 8_000, "comparisons": 20_000, "prompts": 20_000, "text": 20_000}


def rows(spec: str, kind: str, split: str = "all", txt: str = "file") -> LocatedRows:
    """Reads a SPEC.

    Args:
      kind: the kind of records that the miniature makes; other sources ignore it.
      split: the split that the miniature makes; other sources ignore it.
      txt: whether a document of a .txt file is the whole `file` or a `line`.
    Raises:
      DataError: the SPEC has another form, or names nothing that exists.
    """
    scheme, _, name = spec.partition(":")
    is_set = bool(name.partition(":")[0])
    if spec == "miniature":
        return _miniature(kind, split)
    if scheme == "jsonl" and name:
        reader = read_files(name, txt)
    elif scheme == "tfds" and is_set:
        reader = _tfds(spec, *_name_and_split(name))
    elif scheme == "hf" and is_set:
        reader = _hf(spec, *_name_and_split(name))
    else:
        hint = f"; for a file write jsonl:{spec}" if os.path.exists(spec) else ""
        raise DataError(f"--data {spec}", None, f"is not {FORMS}{hint}")
    return reader if kind == "text" else _trees(reader)


def _name_and_split(name: str) -> tuple[str, str | None]:
    name, _, split = name.partition(":")
    return name, split or None


def _trees(rows: LocatedRows) -> LocatedRows:
    """Joins messages that name their parents, as in OpenAssistant's tables; other rows pass.

    A tree is a row {"prompt": message}, and each message has its "replies", as in OpenAssistant's
    export of trees. A tree has the place of its first message. Messages whose parent is not among
    the rows become errors.
    """
    messages: dict[str, tuple[str, dict]] = {}  # id -> (where, message)
    for where, row in rows:
        if not (
            isinstance(row, dict) and row.keys() >= {"message_id", "parent_id", "role", "text"}
        ):
            yield where, row
        elif str(row["message_id"]) in messages:
            yield where, DataError(where, "message_id", "is the id of an earlier row")
        else:
            rank = {"rank": _rank(row["rank"])} if "rank" in row else {}
            messages[str(row["message_id"])] = (where, {**row, **rank, "replies": []})
    problems = _parents(messages)
    roots = []
    for name, (where, message) in messages.items():
        parent = message["parent_id"]
        if problems[name]:
            yield where, DataError(where, "parent_id", problems[name])
        elif parent in (None, ""):
            roots.append((where, {"prompt": message}))
        else:
            messages[str(parent)][1]["replies"].append(message)
    yield from roots


def _rank(cell: Any) -> Any:
    """The rank in a cell: each cell of a CSV file is a string, and a blank one is a null."""
    if not isinstance(cell, str):
        return cell
    if is_blank(cell):
        return None
    return float(cell) if NUMERAL.fullmatch(cell) else cell


def _parents(messages: dict[str, tuple[str, dict]]) -> dict[str, str]:
    """id -> why the chain of parents of that message leads to no root; "" if it does."""
    problems: dict[str, str] = {}
    for start in messages:
        chain, name = dict[str, None](), start
        while name in messages and name not in problems and name not in chain:
            chain[name] = None
            parent = messages[name][1]["parent_id"]
            name = "" if parent is None else str(parent)
        if name in chain:
            problem = "its chain of parents is a loop"
        else:
            problem = problems.get(name, f"no row has the id {name!r}" if name else "")
        problems |= dict.fromkeys(chain, problem)
    return problems


# --- libraries ---


def _tfds(spec: str, name: str, split: str | None) -> LocatedRows:
    import tensorflow_datasets as tfds

    folder = Path(paths.expand(name))
    data_dir = folder.parent if os.path.isdir(folder) else None
    try:
        source: Any = tfds.data_source(
            folder.name if data_dir else name, split=split or "train", data_dir=data_dir
        )
    except Exception as error:  # builders of many sets: they may raise anything
        problem = "prepare the set as ArrayRecord; name its folder or set $TFDS_DATA_DIR"
        reason = str(error).partition("\n")[0] or type(error).__name__  # then lists all sets
        raise DataError(spec, None, f"{reason} ({problem})") from error
    yield from _rows_of((source[i] for i in range(len(source))), spec)


def _rows_of(source: Iterable[Any], spec: str) -> LocatedRows:
    """The rows of a library's data set, up to the first that the library cannot read."""
    rows, number = iter(source), 0
    while True:
        try:
            row = plain(next(rows))
        except StopIteration:
            return
        except Exception as error:  # a damaged file: libraries may raise anything
            problem = f"cannot be read from row {number} on: {_one_line(error)}"
            yield spec, DataError(spec, None, problem)
            return
        yield f"{spec} row {number}", row
        number += 1


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _hf(spec: str, name: str, split: str | None) -> LocatedRows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(spec, None, "needs `pip install instructjax[hf]`") from error
    folder = Path(paths.expand(name))
    if os.path.isfile(folder):
        raise DataError(spec, None, f"is a file: write jsonl:{name}")
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            source = _hf_saved(datasets.load_from_disk(str(folder)), split)
        elif folder.is_dir():
            source = _hf_load(spec, str(folder), None, split or "train")
        elif name.count("/") > 1 and folder.parent.is_dir():
            source = _hf_load(spec, str(folder.parent), folder.name, split or "train")
        elif name.startswith(("/", "~", ".")):
            raise DataError(spec, None, "no such folder")
        else:
            owner_and_name, config = name.split("/")[:2], "/".join(name.split("/")[2:])
            source = _hf_load(spec, "/".join(owner_and_name), config or None, split or "train")
    except DataError:
        raise
    except Exception as error:  # the readers of many formats: they may raise anything
        raise DataError(spec, None, _one_line(error)) from error
    yield from _rows_of(source, spec)


def _hf_load(spec: str, name: str, config: str | None, split: str) -> Any:
    """Loads a set; `config` is one of its configurations or one of its folders."""
    import datasets

    load = partial(datasets.load_dataset, name, split=split)
    try:
        return load(config)
    except ValueError as error:
        names = re.search(r"(?:available configs|Available): (\[.*\])", str(error))
        if names is None:
            raise
        if config is None:
            problem = (
                f"has the configurations {names[1]}: choose one, as in hf:{name}/CONFIG:{split}"
            )
            raise DataError(spec, None, problem) from error
        try:
            return load(data_dir=config)
        except OSError as no_folder:
            problem = f"'{config}' is neither a folder nor among the configurations {names[1]}"
            raise DataError(spec, None, problem) from no_folder
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # The hub keeps a copy of such a set as Parquet files, in a folder for each configuration.
        return load(data_dir=config or "default", revision="refs/convert/parquet")


def _hf_saved(source: Any, split: str | None) -> Any:
    """The rows of a split, or of a slice such as `train[:1%]`, of what `save_to_disk` wrote."""
    import datasets

    if isinstance(source, datasets.Dataset):
        if split is None:
            return source
        source = {str(source.split or "train"): source}
    lengths = {name: len(rows) for name, rows in source.items()}
    parts = datasets.ReadInstruction.from_spec(split or "train").to_absolute(lengths)
    return chain(*(source[part.splitname].select(range(part.from_, part.to)) for part in parts))


def _miniature(kind: str, split: str) -> LocatedRows:
    from instructjax import miniature

    make = {
        "demonstrations": miniature.demonstrations,
        "comparisons": miniature.comparisons,
        "prompts": miniature.prompts,
        "text": miniature.texts,
    }[kind]
    part = "valid" if split == "validation" else "train"
    count = MINIATURE[kind] // (10 if part == "valid" else 1)
    for i, row in enumerate(make(0, count, split=part)):
        yield f"miniature ({part}): {kind} {i}", row
