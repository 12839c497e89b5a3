"""Files -> rows, each with its place. The suffix of a file says how it is read.

A reader yields `(where, row)`. For a row that cannot be read it yields a DataError in place of the
row and reads on where it can. The error says so where the rest of a file is not read.
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructjax.data import paths
from instructjax.data.errors import DataError
from instructjax.data.json_text import TWICE, Decoder

LocatedRows = Iterator[tuple[str, Any]]  # (where, row or DataError)

# Bytes that are not UTF-8, and control characters that no text file has: all but those from \b to
# \r, escape, and the end of a file under DOS.
NOT_TEXT = re.compile("[\udc80-\udcff\0-\x07\x0e-\x19\x1c-\x1f\x7f]")
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell; Python's own limit is 131,072


def read_files(pattern: str, txt: str) -> LocatedRows:
    """Reads the files that match a pattern, in the order of their names, each by its suffix.

    Args:
      pattern: a path; `*`, `?` and `**` are wildcards, unless a file has just this path.
      txt: whether a document of a .txt file is the whole `file` or a `line`.
    Raises:
      DataError: no file matches, or a .parquet file is met without `pyarrow`.
    """
    names = paths.files(pattern)
    if not names:
        is_folder = os.path.isdir(paths.expand(pattern))
        problem = (
            "is a folder: name its files, as in FOLDER/*.jsonl" if is_folder else "no such file"
        )
        raise DataError(f"jsonl:{pattern}", None, problem)
    for path in names:
        if path.endswith(".parquet"):
            yield from _parquet(path)
            continue
        name = path.removesuffix(".gz").removesuffix(".zst")
        try:
            data = _decompress(path).removeprefix(b"\xef\xbb\xbf")
        except (EOFError, OSError, zlib.error, ValueError) as error:
            yield path, DataError(path, None, f"cannot be read: {error}")
            continue
        if not data.strip():
            yield path, DataError(path, None, "the file is empty")
        elif name.endswith((".csv", ".tsv")):
            yield from _csv(data, path, "\t" if name.endswith(".tsv") else ",")
        elif name.endswith(".txt"):
            yield from _txt_lines(data, path) if txt == "line" else _txt_file(data, path)
        elif _is_json_document(data, name):
            yield from _json_document(data, path)
        else:
            yield from _json_lines(data, path)


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


def _parquet(path: str) -> LocatedRows:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        problem = "a .parquet file needs `pip install instructjax[hf]`"
        raise DataError(path, None, problem) from error
    number = 0
    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        if repeated := next((n for i, n in enumerate(names) if n in names[:i]), None):
            problem = "two columns have this name; no row of this file is read"
            yield path, DataError(path, repeated, problem)
            return
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", plain(row)
                number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        problem = f"cannot be read from row {number} on: {error}"
        yield path, DataError(path, None, problem)


def plain(value: Any) -> Any:
    """Converts NumPy values and bytes to the types of JSON, also within lists and objects."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # refused later, with the field's name
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return [plain(item) for item in value] if isinstance(value, list) else value


# --- JSON ---


def _is_json_document(data: bytes, name: str) -> bool:
    """Whether a value spans lines, or the file is one value that holds the rows; else JSON lines.

    A file whose first line is no JSON is a document too, unless at least half of its lines are.
    """
    first, _, others = data.lstrip().partition(b"\n")
    if not others.strip():
        return name.endswith(".json") or isinstance(_json_value(first), list)
    if _json_value(first) is not None:
        return False
    lines = [line for line in data.split(b"\n") if line.strip()]
    return 2 * sum(_json_value(line) is not None for line in lines) < len(lines)


def _json_value(line: bytes) -> Any:
    """The value of a line of JSON, or None."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_lines(data: bytes, path: str) -> LocatedRows:
    decoder, lines = Decoder(), data.split(b"\n")
    while not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            yield where, _unrepeated(decoder, decoder.loads(line.decode()), where)
        except UnicodeDecodeError as error:
            yield where, DataError(where, None, _bad_byte(line, error))
        except json.JSONDecodeError as error:
            problem = (
                f"not JSON: {error.msg} at column {error.colno}" if line.strip() else "is blank"
            )
            yield where, DataError(where, None, problem)
        except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
            yield where, DataError(where, None, f"not usable as JSON: {error}")


def _unrepeated(decoder: Decoder, value: Any, where: str, then: str = "") -> Any:
    """The value, or the error of a key that stands twice in one of its objects."""
    repeated = decoder.repeated(value)
    return value if repeated is None else DataError(where, repeated, TWICE + then)


def _json_document(data: bytes, path: str) -> LocatedRows:
    """Reads an array of rows, an object that wraps one, or objects one after another."""
    decoder = Decoder()
    try:
        values = list(decoder.values(data.decode()))
    except UnicodeDecodeError as error:
        yield path, _not_utf8(data, path, error)
        return
    except (ValueError, RecursionError) as error:
        yield path, DataError(path, None, f"not JSON: {error}; no row of this file is read")
        return
    if len(values) > 1:
        for line, value in values:
            where = f"{path}:{line}"
            yield where, _unrepeated(decoder, value, where)
        return
    value, prefix = values[0][1], f"{path}:"
    if isinstance(value, dict):
        lists = [key for key, items in value.items() if _is_rows(items)]
        if len(lists) == 1 and decoder.repeated(value) in value:  # of the object itself
            then = "; no row of this file is read"
            yield path, _unrepeated(decoder, value, path, then)
            return
        if len(lists) == 1:
            value, prefix = value[lists[0]], f"{path}: '{lists[0]}'"
        elif len(lists) == len(value) > 1:
            problem = f"holds several lists of rows: write each of {lists} to a file of its own"
            yield path, DataError(path, None, problem)
            return
    if not isinstance(value, list):
        yield path, _unrepeated(decoder, value, path)
        return
    for number, item in enumerate(value, start=1):
        where = f"{prefix} item {number}"
        yield where, _unrepeated(decoder, item, where)


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of rows: of objects other than the messages of a dialogue."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not {"role", "from"} & value[0].keys()
    )


# --- CSV and text ---


def _csv(data: bytes, path: str, delimiter: str) -> LocatedRows:
    header: list[str] | None = None
    blank: list[str] = []  # places of blank rows, which are none at the end of a file
    for line, cells in _csv_rows(data.decode(errors="surrogateescape"), delimiter):
        where, field = f"{path}:{line}", None
        text = str(cells) if isinstance(cells, csv.Error) else "".join(cells)
        if header and not text.strip():
            blank.append(where)
            continue
        yield from ((place, DataError(place, None, "is blank")) for place in blank)
        blank.clear()
        if isinstance(cells, csv.Error):  # such as an open quote
            problem = f"not CSV: {cells}"
        elif not text.strip():
            problem = "is blank"
        elif NOT_TEXT.search(text):
            column = next(i for i, cell in enumerate(cells) if NOT_TEXT.search(cell))
            field = header[column] if header and column < len(header) else None
            problem = _binary(cells[column])
        elif header is None:
            names = [name if name.strip() else f"Unnamed: {i}" for i, name in enumerate(cells)]
            if len(set(names)) == len(names):
                header = names
                continue
            field = next(name for i, name in enumerate(names) if name in names[:i])
            problem = f"two columns have the same name: {cells}"
        elif len(cells) != len(header):
            problem = f"does not have the {len(header)} columns of the header"
            if len(cells) < len(header):
                field, problem = header[len(cells)], f"is missing: the row {problem}"
        else:
            yield where, dict(zip(header, cells, strict=True))
            continue
        if header is None:  # rows mean nothing without it
            yield where, DataError(where, field, f"{problem}; no row of this file is read")
            return
        yield where, DataError(where, field, problem)


def _csv_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(line, cells) of each row, none if it is blank; goes on at the next line after an error."""
    lines = list(io.StringIO(text, newline=""))
    start = end = 0  # lines before the reader's first row, and before its next row
    while start < len(lines):
        reader = csv.reader(
            map(lines.__getitem__, range(start, len(lines))), delimiter=delimiter, strict=True
        )
        try:
            while (cells := _next_row(reader)) is not None:
                yield end + 1, cells
                end = start + reader.line_num
            return
        except csv.Error as error:
            yield end + 1, error
            start = end = end + 1


def _next_row(reader: Any) -> list[str] | None:
    """The reader's next row, or None; cells may be of any length.

    The limit on the length of a cell is a global of the process: it is changed for this call only.
    """
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _txt_file(data: bytes, path: str) -> LocatedRows:
    text = data.decode(errors="surrogateescape")
    if sign := NOT_TEXT.search(text):
        where = f"{path}:{text.count(chr(10), 0, sign.start()) + 1}"
        problem = f"{_binary(text)}; no row of this file is read"
        yield where, DataError(where, "text", problem)
    else:
        yield path, {"text": text.replace("\r\n", "\n")}


def _txt_lines(data: bytes, path: str) -> LocatedRows:
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        text = line.removesuffix(b"\r").decode(errors="surrogateescape")
        if sign := NOT_TEXT.search(text):
            problem = f"{_binary(text)} at column {sign.start() + 1}"
            yield where, DataError(where, "text", problem)
        elif text.strip():
            yield where, {"text": text}


def _binary(text: str) -> str:
    """The problem of a text that has a sign of `NOT_TEXT`."""
    sign = NOT_TEXT.search(text)
    assert sign
    if sign[0] >= "\udc80":
        return f"not UTF-8: byte {ord(sign[0]) - 0xDC00:#04x}"
    return f"not text: the control character {ord(sign[0]):#04x}"


def _bad_byte(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"


def _not_utf8(data: bytes, path: str, error: UnicodeDecodeError) -> DataError:
    """The error of a file that can only be read as a whole."""
    where = f"{path}:{data[: error.start].count(10) + 1}"
    problem = f"not UTF-8: byte {data[error.start]:#04x}; no row of this file is read"
    return DataError(where, None, problem)
