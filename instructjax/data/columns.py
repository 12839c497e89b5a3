r"""`--data.columns`: a small language for the column that a field of a record is read from.

    prompt=question                    a column
    completion=instances.0.output      a path into nested objects, lists and JSON strings
    responses=answers.*.text           a path through all items of a list: a list
    responses=ref1+ref2+ref3           a list of columns
    prompt={question}\nAnswer:         a template; lists of strings in it are joined by spaces
    prompt={instruction}\n\n{input?}   a column that may be absent, null or blank: then it is left
                                       out, with the white space before it (at the start, after it)
    ranks=winner:model_a|model_b       the value that names each response as the best, in their
                                       order; any other value is a tie
    ranks=preference:signed            negative: the first of two responses is better; positive:
                                       the second; 0: a tie

Entries are separated by commas; a comma inside a template is safe unless `name=` follows it. In a
template `\n` and `\t` are line break and tab; `{{`, `}}` and `\\` are `{`, `}` and a backslash.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from instructjax.data.errors import check_unicode
from instructjax.data.json_text import TWICE, loads

# row -> value. Raises KeyError(path) if the row lacks it, TypeError(problem) if it has no such use.
Column = Callable[[Mapping[str, Any]], Any]

PAIR = ("chosen", "rejected")
# Fields of which --data.columns may name one only: a row has its replies in one of two forms.
EXCLUDES = {"responses": PAIR} | dict.fromkeys(PAIR, ("responses",))


def lookup(row: Any, path: str) -> Any:
    """The value at `path`: `a`, `a.b`, `a.0.b`, or `a.*.b` for a list of every item's `b`.

    A path goes on into a string that holds JSON.

    Raises:
      KeyError(path): the row lacks it.
      TypeError(problem): a string of JSON on the path has a key twice in one object.
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    value, keys = row, path.split(".")
    for i, key in enumerate(keys):
        if isinstance(value, str):
            value = _json(value, path)
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, list) and key == "*":
            rest = ".".join(keys[i + 1 :])
            try:
                return [lookup(item, rest) if rest else item for item in value]
            except KeyError as error:
                raise KeyError(path) from error
        else:
            raise KeyError(path)
    return value


def _json(text: str, path: str) -> Any:
    try:
        value, repeated = loads(text)
    except (ValueError, RecursionError):
        return None
    if repeated is not None:
        raise TypeError(f"'{path}': in the JSON text on this path, '{repeated}' {TWICE}")
    return value


_PART = re.compile(r"\{\{|\}\}|\{[^{}]*\}|\\[nt\\]|.", re.DOTALL)  # of a template
_SPELLED = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_ITSELF = "for a brace itself write {{ or }}"
_ALONE = f"a brace without its partner; {_ITSELF}"


def _template(source: str) -> Column:
    parts = [""]  # text, column, text, ...
    for part in _PART.findall(source):
        if part in _SPELLED:
            parts[-1] += _SPELLED[part]
        elif part in ("{", "}"):
            raise ValueError(f"--data.columns: the template '{source}' has {_ALONE}")
        elif not part.startswith("{"):
            parts[-1] += part
        elif part[1:-1].removesuffix("?").strip():
            parts += [part[1:-1], ""]
        else:
            problem = f"has braces without a column's name in them; {_ITSELF}"
            raise ValueError(f"--data.columns: the template '{source}' {problem}")
    if len(parts) == 1:
        raise ValueError(f"--data.columns: the template '{source}' names no column")

    def fill(row: Mapping[str, Any]) -> str:
        text = parts[0]
        for name, literal in zip(parts[1::2], parts[2::2], strict=True):
            value = _text(row, name)
            if value is None:
                text = text.rstrip()
                text += literal if text else literal.lstrip()
            else:
                text += value + literal
        return text

    return fill


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """The text of a column in a template; None if its name ends in `?` and there is no text."""
    try:
        value = lookup(row, name.removesuffix("?"))
    except KeyError:
        if name.endswith("?"):
            return None
        raise
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = " ".join(value)
    if name.endswith("?") and (value is None or not str(value).strip()):
        return None
    if not isinstance(value, str | int | float):
        raise TypeError(f"'{name}' is a {type(value).__name__}, not text")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"'{name}' is {value}, not text")
    return str(value)


def _ranks(path: str, rule: str) -> Column:
    """The ranks that a column implies, 1 for the best; None where the column is null."""
    names = rule.split("|")

    def named(row: Mapping[str, Any]) -> list[int] | None:
        value = lookup(row, path)
        if isinstance(value, bool):
            value = json.dumps(value)
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            raise TypeError(f"'{path}' is a {type(value).__name__}, not a value or a name")
        tied = str(value) not in names
        return [1 if tied or name == str(value) else 2 for name in names]

    def signed(row: Mapping[str, Any]) -> list[int] | None:
        value = lookup(row, path)
        if value is None:
            return None
        try:
            preference = math.nan if isinstance(value, bool) else float(value)
        except (OverflowError, TypeError, ValueError):
            preference = math.nan
        if math.isnan(preference):
            raise TypeError(f"'{path}' is {value!r:.40}, not a number")
        return [1 + (preference > 0), 1 + (preference < 0)]

    if rule == "signed" and path:
        return signed
    if len(set(names)) < max(2, len(names)) or not all(names) or not path:
        problem = f"'{path}:{rule}' is neither {path}:signed nor of the form {path}:first|second"
        raise ValueError(f"--data.columns: {problem}")
    return named


def _column(field: str, source: str) -> Column:
    if "{" in source:
        return _template(source)
    if field == "ranks" and ":" in source:
        return _ranks(*source.split(":", 1))
    if "}" in source:
        raise ValueError(f"--data.columns: '{source}' has {_ALONE}")
    if "+" in source:
        paths = source.split("+")
        if not all(paths):
            raise ValueError(f"--data.columns: '{source}' has a + without a column on both sides")
        return lambda row: [lookup(row, path) for path in paths]
    return lambda row: lookup(row, source)


def parse_columns(columns: str, fields: tuple[str, ...]) -> dict[str, Column]:
    """`field=column,...` -> {field: column}; `fields` are those of the kind of record.

    A rule for `ranks` gives a rank for each response that it knows: 1 for the best and 2 for the
    others, or 1 for all if they are tied. It gives None where the column is null.

    Raises:
      ValueError: an entry without `=`, a field that is not among `fields`, is given twice or
        excludes another, a malformed template or rule for `ranks`, or half of a surrogate pair.
    """
    check_unicode("--data.columns", columns)
    parsed: dict[str, Column] = {}
    for entry in re.split(r",(?=\s*\w+=)", columns) if columns else ():
        name, equals, source = entry.partition("=")
        name = name.strip()
        if not equals or not source:
            raise ValueError(f"--data.columns: '{entry}' is not of the form field=column")
        if name not in fields:
            raise ValueError(f"--data.columns: unknown field '{name}'; use one of {list(fields)}")
        for other in (name, *EXCLUDES.get(name, ())):
            if other in parsed:
                problem = f"'{other}' is given too: a row's replies are in one of the two"
                problem = "is given twice" if other == name else problem
                raise ValueError(f"--data.columns: field '{name}': {problem}")
        parsed[name] = _column(name, source)
    return parsed


def parse_filter(source: str, flag: str) -> tuple[str, tuple[str, ...]]:
    """`column=value|value` -> (column, values).

    Raises:
      ValueError: the source has another form, or holds half of a surrogate pair.
    """
    check_unicode(flag, source)
    column, equals, rest = source.partition("=")
    values = tuple(rest.split("|"))
    if not column or not equals or not all(values):
        raise ValueError(f"{flag} {source}: is not of the form column=value or column=value|value")
    return column, values


def spelled(value: Any) -> str:
    """A value as `parse_filter` has it: a string as it is, `true`, `null`, 3 also for 3.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, default=str)
    return str(value)
