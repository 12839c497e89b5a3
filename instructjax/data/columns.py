r"""`--data.columns`: a small language for the column that a field of a record is read from.

    prompt=question                 a column
    completion=instances.0.output   a path into nested objects and lists
    responses=ref1+ref2+ref3        a list of columns
    prompt={question}\nAnswer:      a template; lists of strings in it are joined by spaces

Entries are separated by commas; a comma inside a template is safe unless `name=` follows it. In a
template `\n` and `\t` are line break and tab.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Column = Callable[[Mapping[str, Any]], Any]  # row -> value; KeyError(path) if the row lacks it


def lookup(row: Any, path: str) -> Any:
    """The value at `path` (`a`, `a.b`, `a.0.b`); raises KeyError(path) if the row lacks it."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value = row
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise KeyError(path)
    return value


def _template(source: str) -> Column:
    parts = re.split(r"\{([^{}]+)\}", source.replace("\\n", "\n").replace("\\t", "\t"))

    def fill(row: Mapping[str, Any]) -> str:
        filled = list(parts)
        for i in range(1, len(parts), 2):  # odd entries are the names between braces
            value = lookup(row, parts[i])
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                value = " ".join(value)
            if not isinstance(value, str | int | float):
                raise TypeError(f"'{parts[i]}' is a {type(value).__name__}, not text")
            filled[i] = str(value)
        return "".join(filled)

    return fill


def _column(source: str) -> Column:
    if "{" in source:
        return _template(source)
    if "+" in source:
        return lambda row: [lookup(row, path) for path in source.split("+")]
    return lambda row: lookup(row, source)


def parse_columns(columns: str, fields: tuple[str, ...]) -> dict[str, Column]:
    """`field=column,...` -> {field: column}; `fields` are those of the kind of record.

    Raises:
      ValueError: an entry without `=`, or a field that is not among `fields`.
    """
    parsed = {}
    for entry in re.split(r",(?=\s*\w+=)", columns) if columns else ():
        name, equals, source = entry.partition("=")
        name = name.strip()
        if not equals or not source:
            raise ValueError(f"--data.columns: '{entry}' is not of the form field=column")
        if name not in fields:
            raise ValueError(f"--data.columns: unknown field '{name}'; use one of {list(fields)}")
        parsed[name] = _column(source)
    return parsed
