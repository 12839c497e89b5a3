"""SPEC -> rows, each with its place: file and line, or set and row number.

    miniature                  the built-in world
    jsonl:PATH                 files by suffix: JSON lines, .json (one array), .csv, .tsv, .txt,
                               each plain, .gz or .zst; PATH may hold *, ? and **
    tfds:NAME[/CONFIG][:SPLIT] a TFDS set prepared as ArrayRecord, by name or by its folder
    hf:NAME[:SPLIT]            a data set of the Hugging Face hub or a local folder

A reader yields `(where, row)`. For a row that cannot be read it yields a DataError in place of the
row, and the caller decides whether to stop.
"""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from instructjax.data.errors import DataError

LocatedRows = Iterator[tuple[str, Any]]  # (where, row or DataError)

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
    if spec == "miniature":
        return _miniature(kind, split)
    if scheme == "jsonl" and name:
        return _files(name, txt)
    if scheme == "tfds" and name:
        return _tfds(spec, *_name_and_split(name))
    if scheme == "hf" and name:
        return _hf(spec, *_name_and_split(name))
    hint = f"; for a file write jsonl:{spec}" if Path(spec).exists() else ""
    forms = "miniature, jsonl:PATH, tfds:NAME[/CONFIG][:SPLIT] or hf:NAME[:SPLIT]"
    raise DataError(f"--data {spec}", None, f"is not {forms}{hint}")


def _name_and_split(name: str) -> tuple[str, str]:
    name, _, split = name.partition(":")
    return name, split or "train"


# --- files ---


def _files(pattern: str, txt: str) -> LocatedRows:
    paths = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    paths = [path for path in paths if Path(path).is_file()]
    if not paths:
        raise DataError(f"jsonl:{pattern}", None, "no such file")
    for path in paths:
        name = path.removesuffix(".gz").removesuffix(".zst")
        try:
            data = _decompress(path).removeprefix(b"\xef\xbb\xbf")
        except (EOFError, OSError, zlib.error, ValueError) as error:
            yield path, DataError(path, None, f"cannot be read: {error}")
            continue
        if not data.strip():
            yield path, DataError(path, None, "the file is empty")
        elif name.endswith((".csv", ".tsv")):
            yield from _decoded(_csv, data, path, "\t" if name.endswith(".tsv") else ",")
        elif name.endswith(".txt"):
            yield from _decoded(_txt, data, path, txt)
        elif name.endswith(".json") and data.lstrip().startswith(b"["):
            yield from _decoded(_json, data, path)
        else:
            yield from _jsonl(data, path)


def _decompress(path: str) -> bytes:
    """The decompressed file. Raises on a torn archive, which a stream reader may silently cut."""
    data = Path(path).read_bytes()
    if path.endswith(".gz"):
        return gzip.decompress(data)
    if path.endswith(".zst"):
        import zstandard

        frames = []
        while data:
            frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                frames.append(frame.decompress(data))
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
            if not frame.eof:
                raise EOFError("the file ends within a zstd frame")
            data = frame.unused_data
        return b"".join(frames)
    return data


def _jsonl(data: bytes, path: str) -> LocatedRows:
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line.decode())
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
            yield where, DataError(where, None, problem)
        except json.JSONDecodeError as error:
            problem = (
                f"not JSON: {error.msg} at column {error.colno}" if line.strip() else "is blank"
            )
            yield where, DataError(where, None, problem)
        except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
            yield where, DataError(where, None, f"not usable as JSON: {error}")


def _decoded(
    reader: Callable[..., LocatedRows], data: bytes, path: str, *options: str
) -> LocatedRows:
    """Runs a reader of whole texts; yields a DataError for bytes that are not UTF-8."""
    try:
        yield from reader(data.decode(), path, *options)
    except UnicodeDecodeError as error:
        where = f"{path}:{data[: error.start].count(10) + 1}"
        yield where, DataError(where, None, f"not UTF-8: byte {data[error.start]:#04x}")


def _json(text: str, path: str) -> LocatedRows:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield path, DataError(path, None, f"not JSON: {error}")
        return
    for number, item in enumerate(items, start=1):
        yield f"{path}: item {number}", item


def _csv(text: str, path: str, delimiter: str) -> LocatedRows:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    end = 0  # last line of the row before: a quoted cell may span lines
    try:
        header = reader.fieldnames or ()
        if len(set(header)) < len(header):
            yield path, DataError(path, None, f"two columns have the same name: {list(header)}")
            return
        end = reader.line_num
        for row in reader:
            where, end = f"{path}:{end + 1}", reader.line_num
            if None in row or None in row.values():
                problem = f"does not have the {len(header)} columns of the header"
                yield where, DataError(where, None, problem)
            else:
                yield where, row
    except csv.Error as error:  # such as an open quote, which makes one cell of all that follows
        yield path, DataError(f"{path}:{end + 1}", None, f"not CSV: {error}")


def _txt(text: str, path: str, unit: str) -> LocatedRows:
    text = text.replace("\r\n", "\n")
    if unit == "file":
        yield path, {"text": text}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", {"text": line}


# --- libraries ---


def _tfds(spec: str, name: str, split: str) -> LocatedRows:
    import tensorflow_datasets as tfds

    folder = Path(name).expanduser()
    data_dir = folder.parent if folder.is_dir() else None
    try:
        source: Any = tfds.data_source(
            folder.name if data_dir else name, split=split, data_dir=data_dir
        )
    except (tfds.core.DatasetNotFoundError, NotImplementedError, ValueError) as error:
        problem = "prepare the set as ArrayRecord; name its folder or set $TFDS_DATA_DIR"
        raise DataError(spec, None, f"{str(error).splitlines()[0]} ({problem})") from error
    for i in range(len(source)):
        yield f"{spec} row {i}", _plain(source[i])


def _hf(spec: str, name: str, split: str) -> LocatedRows:
    source: Any
    try:
        import datasets
    except ImportError as error:
        raise DataError(spec, None, "needs `pip install instructjax[hf]`") from error
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").exists():
            source = datasets.load_from_disk(str(folder))[split]
        elif (folder / "dataset_info.json").exists():
            source = datasets.load_from_disk(str(folder))
        else:
            source = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(spec, None, f"{type(error).__name__}: {error}") from error
    for i, row in enumerate(source):
        yield f"{spec} row {i}", row


def _plain(value: Any) -> Any:
    """Converts the NumPy values and bytes of TFDS to the types of JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # refused later, with the field's name
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


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
