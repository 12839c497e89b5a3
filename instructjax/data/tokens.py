"""Texts -> token ids, in parallel, cached on disk under a hash of all that they depend on.

Prompt and response are tokenised separately, as the sampler sees them: it gets a prompt, with BOS
if the tokenizer adds one, and appends one token after the other. `decode(prompt + response)` is the
text.
"""

import copy
import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instructjax.data import paths
from instructjax.data.errors import printable

CHECKSUM = hashlib.sha256().digest_size  # bytes at the start of a cache file
# The EOS of GPT-2, Pythia, SmolLM2 and Qwen; of Llama 3; of Llama 2, Mistral and T5; of Gemma.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
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


def tokenise(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    bos: bool = False,
    eos_id: int | None = None,
    end_ids: Collection[int] = (),
    response: bool = False,
    cache: str | None = None,
    log: Callable[[str], None] = print,
) -> Spans:
    """Tokenises each text, or reads the result of an earlier call with the same arguments.

    Args:
      tokenizer: a tokenizer of `transformers`; its Rust backend, if any, uses all cores.
      bos: begin with BOS if the tokenizer adds one; a BOS spelled out in the text is not doubled.
      eos_id: end in this id. If the text ends in it, spelled out, or in another model's EOS (P3 has
        `<|endoftext|>`), this is left out.
      end_ids: any of these ends the sequence too: what follows the first is left out.
      response: the texts go on from a prompt, so they get no space that they do not have.
      cache: folder of the cache, or None.
    Returns:
      Spans of shape [texts].
    """
    begin = [tokenizer.bos_token_id] if bos and _adds_bos(tokenizer) else []
    marks = () if eos_id is None else _end_marks(tokenizer, eos_id, end_ids)
    file = None
    if cache is not None and texts:
        settings = json.dumps(
            [begin, tokenizer.bos_token, eos_id, sorted(end_ids), marks, response]
        )
        digest = _digest(texts, _fingerprint(tokenizer), settings)
        file = Path(paths.expand(cache)) / "tokens" / f"{digest}.tokens"
        if (spans := _load(file, len(texts), log)) is not None:
            return spans
    if begin:
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    if marks:
        texts = [_without(marks, text) for text in texts]
    encode = _encoder(tokenizer)
    if response:
        encode = _continuing(encode)

    def finish(ids: list[int]) -> list[int]:
        last = next((i for i, token in enumerate(ids) if token in end_ids), None)
        if last is not None:
            return [*begin, *ids[: last + 1]]
        return [*begin, *ids] if eos_id is None else [*begin, *ids, eos_id]

    ids, lengths = _encode(texts, encode, finish)
    if file is not None:
        _save(file, ids, lengths, log)
    return _spans(ids, lengths)


def _spans(ids: np.ndarray, lengths: np.ndarray) -> Spans:
    stop = np.cumsum(lengths)
    return Spans(ids, stop - lengths, stop)


Encode = Callable[[list[str]], list[list[int]]]  # texts -> ids


def _encode(
    texts: Sequence[str], encode: Encode, finish: Callable[[list[int]], list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    parts, lengths, first = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64), 0
    while first < len(texts):
        last, size = first, 0
        while last < len(texts) and size < CHUNK:
            size += len(texts[last])
            last += 1
        for i, ids in enumerate(encode(list(texts[first:last])), start=first):
            parts.append(np.asarray(finish(ids), np.int32))
            lengths[i] = len(parts[-1])
        first = last
    return np.concatenate(parts), lengths


def _continuing(encode: Encode) -> Encode:
    """An encoder of texts that go on from another: no space is put before them.

    Llama-2's and Mistral's first tokenizers, and some others, put a space before every text. So the
    text is encoded after a line break, whose ids are removed.
    """
    plain, after_break = encode(["a", "\na"])
    if after_break[-len(plain) :] == plain:
        return encode  # this tokenizer puts no space before a text

    def continuing(texts: list[str]) -> list[list[int]]:
        left = dict(enumerate(texts))
        encoded: dict[int, list[int]] = {}
        for before in ("\n", ":", "]", "a"):  # one whose ids do not merge with the text's
            (prefix,) = encode([before])
            joined = encode([before + text for text in left.values()])
            for i, ids in zip(list(left), joined, strict=True):
                if ids[: len(prefix)] == prefix:
                    encoded[i] = ids[len(prefix) :]
                    del left[i]
        for i, ids in zip(left, encode(list(left.values())), strict=True):
            encoded[i] = ids
        return [encoded[i] for i in range(len(texts))]

    return continuing


def _encoder(tokenizer: Any) -> Encode:
    """A function texts -> ids, without special tokens, truncation or padding."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if backend.truncation or backend.padding:  # a saved tokenizer may have them switched on
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    # Twice as fast as calling the tokenizer, which also makes masks and offsets.
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids


def _end_marks(tokenizer: Any, eos_id: int, end_ids: Collection[int]) -> tuple[str, ...]:
    """How EOS is spelled, and the EOS of other models that are tokens and end nothing here."""
    eos, *ends = tokenizer.convert_ids_to_tokens([eos_id, *sorted(end_ids)])
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return (eos, *(mark for mark in ENDS_OF_TEXT if mark in added and mark not in (eos, *ends)))


def _without(marks: tuple[str, ...], text: str) -> str:
    """The text without the marks that are spelled out at its end."""
    while (text_left := text.rstrip()).endswith(marks):
        text = next(text_left.removesuffix(mark) for mark in marks if text_left.endswith(mark))
    return text


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
    """The cached spans, or None if there is no such file, or a damaged one."""
    if not os.path.isfile(file):
        return None
    try:
        data = file.read_bytes()
    except OSError as error:
        log(printable(f"{file} cannot be read ({error.strerror}): tokenising again"))
        return None
    content = data[CHECKSUM:]
    if data[:CHECKSUM] != _checksum(file, content):
        log(printable(f"{file} is damaged: tokenising again"))
        return None
    lengths, ids = content[: 8 * count], content[8 * count :]
    return _spans(np.frombuffer(ids, np.int32), np.frombuffer(lengths, np.int64))


def _save(file: Path, ids: np.ndarray, lengths: np.ndarray, log: Callable[[str], None]) -> None:
    """Writes the checksum, the lengths and the ids. A folder that takes no file stops nothing.

    Writes another file and renames it, so that no reader on any host sees half a file.
    """
    content = lengths.astype(np.int64).tobytes() + ids.astype(np.int32).tobytes()
    part = file.with_suffix(f".{os.uname().nodename}.{os.getpid()}.part")
    try:
        if str(file).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "no such user")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(_checksum(file, content) + content)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or error
        log(printable(f"--data.cache {file.parent.parent}: tokens are not cached: {reason}"))


def _checksum(file: Path, content: bytes) -> bytes:
    """The checksum of a cache file, which is that of its name too: a renamed file is no cache."""
    return hashlib.sha256(file.stem.encode() + content).digest()
