"""JSON text -> values. A key that occurs twice in one object is found, not silently overwritten."""

import json
import re
from collections.abc import Iterator
from typing import Any

TWICE = "stands twice in one object"


class _Repeated(dict):
    """An object whose text has `key` twice."""

    key = ""


class Decoder:
    """Decodes JSON, and finds keys that stand twice in one object."""

    def __init__(self) -> None:
        self._json = json.JSONDecoder(object_pairs_hook=self._object)
        self._repeats = False  # whether any value decoded so far has such a key

    def loads(self, text: str) -> Any:
        """The value of a text. Raises ValueError and RecursionError as `json.loads` does."""
        return self._json.decode(text)

    def values(self, text: str) -> Iterator[tuple[int, Any]]:
        """(line, value) of JSON values one after another. Raises as `loads` does."""
        start_of_value, end, line = re.compile(r"\S"), 0, 1
        while match := start_of_value.search(text, end):
            line += text.count("\n", end, match.start())
            value, end = self._json.raw_decode(text, match.start())
            yield line, value
            line += text.count("\n", match.start(), end)

    def repeated(self, value: Any) -> str | None:
        """The path of a key that stands twice in an object of a decoded value; None without one."""
        stack: list[tuple[str, Any]] = [("", value)] if self._repeats else []
        while stack:
            path, part = stack.pop()
            if isinstance(part, _Repeated):
                return path + part.key
            items = part.items() if isinstance(part, dict) else ()
            items = enumerate(part) if isinstance(part, list) else items
            stack.extend((f"{path}{key}.", item) for key, item in items)
        return None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        keys = [key for key, _ in pairs]
        value, self._repeats = _Repeated(value), True
        value.key = next(key for i, key in enumerate(keys) if key in keys[:i])
        return value


def loads(text: str) -> tuple[Any, str | None]:
    """(value, path of a key that stands twice in one of its objects, or None).

    Raises:
      ValueError, RecursionError: as `json.loads`.
    """
    decoder = Decoder()
    value = decoder.loads(text)
    return value, decoder.repeated(value)
