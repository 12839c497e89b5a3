"""Texts -> token ids, in parallel, cached on disk under a hash of all that they depend on.

Prompt and response are tokenised separately, as the sampler sees them: it gets a prompt, with BOS
if the tokenizer adds one, and appends one token after the other.
"""

import copy
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructjax.data.errors import DataError

CHUNK = 4_000_000  # characters tokenised at once: occupies all cores, and bounds the memory


@dataclass(frozen=True)
class Spans:
    """Token sequences within one flat array: sequence i is `ids[start[i]:stop[i]]`."""

    ids: np.ndarray  # int32 [all tokens]
    start: np.ndarray  # int64, any shape
    stop: np.ndarray  # int64, the same shape

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.start

    def __getitem__(self, index: int | tuple[int, ...]) -> np.ndarray:
        return self.ids[self.start[index] : self.stop[index]]


def eos_id(tokenizer: Any) -> int:
    """The id that ends a response; raises DataError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"tokenizer {name}", None, "has no EOS token, which must end every response"
        )
    return int(tokenizer.eos_token_id)


def tokenise(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    bos: bool,
    eos: bool,
    cache: str | None,
    log: Callable[[str], None] = print,
) -> Spans:
    """Tokenises each text, or reads the result of an earlier call with the same arguments.

    Args:
      tokenizer: a tokenizer of `transformers`; its Rust backend, if any, uses all cores.
      bos: begin with BOS if the tokenizer adds one; a BOS spelled out in the text is not doubled.
      eos: end in EOS; an EOS spelled out at the end of the text is not doubled.
      cache: folder of the cache, or None.
    Returns:
      Spans of shape [texts].
    Raises:
      DataError: `eos` is set and the tokenizer has no EOS.
    """
    begin = [tokenizer.bos_token_id] if bos and _adds_bos(tokenizer) else []
    end = [eos_id(tokenizer)] if eos else []
    file = None
    if cache is not None and texts:
        specials = json.dumps([begin, end, tokenizer.bos_token, tokenizer.eos_token])
        digest = _digest(texts, _fingerprint(tokenizer), specials)
        file = Path(cache).expanduser() / "tokens" / f"{digest}.npz"
        if (spans := _load(file, len(texts), log)) is not None:
            return spans
    if begin:
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    if end:
        texts = [_without_eos(text, tokenizer.eos_token) for text in texts]
    ids, lengths = _encode(texts, tokenizer, begin, end)
    stop = np.cumsum(lengths)
    spans = Spans(ids, stop - lengths, stop)
    if file is not None:
        _save(file, ids, lengths)
    return spans


def _encode(
    texts: Sequence[str], tokenizer: Any, begin: list[int], end: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    encode = _encoder(tokenizer)
    parts, lengths, first = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64), 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and size < CHUNK:
            size += len(texts[last])
            last += 1
        for i, ids in enumerate(encode(list(texts[first:last])), start=first):
            parts.append(np.asarray([*begin, *ids, *end], np.int32))
            lengths[i] = len(parts[-1])
        first = last
    return np.concatenate(parts), lengths


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """A function texts -> ids, without special tokens, truncation or padding."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = copy.deepcopy(backend)  # a saved tokenizer may have truncation switched on
    backend.no_truncation()
    backend.no_padding()
    # Twice as fast as calling the tokenizer, which also makes masks and offsets.
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids


def _without_eos(text: str, eos: str) -> str:
    """The text without an EOS spelled out at its end, as P3 and chat templates have it."""
    return text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text


# --- the cache ---


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.to_str()
    return f"{type(tokenizer)} {sorted(tokenizer.get_vocab().items())}"


def _digest(texts: Sequence[str], *parts: str) -> str:
    digest = hashlib.sha256()
    for text in (*parts, *texts):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _load(file: Path, count: int, log: Callable[[str], None]) -> Spans | None:
    """The cached spans, or None if the file is missing or damaged (its arrays carry CRCs)."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as source, np.load(source) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
        if len(lengths) != count or lengths.sum() != len(ids):
            raise ValueError("lengths that don't add up")
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        log(f"{file} is damaged ({error}): tokenising again")
        return None
    stop = np.cumsum(lengths)
    return Spans(ids, stop - lengths, stop)


def _save(file: Path, ids: np.ndarray, lengths: np.ndarray) -> None:
    """Writes another file and renames it, so that no reader on any host sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.uname().nodename}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            np.savez(out, ids=ids, lengths=lengths)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
