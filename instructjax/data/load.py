"""DataConfig -> records -> tokens. All that is left out is counted and reported."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from instructjax.data.columns import lookup, parse_columns
from instructjax.data.config import DataConfig
from instructjax.data.dialogue import chat_template, expand_tree, is_tree
from instructjax.data.errors import DataError, Report
from instructjax.data.records import FIELDS, Kind, Record, parse
from instructjax.data.sources import rows
from instructjax.data.tokens import Spans, tokenise

Split = Literal["all", "train", "validation"]


@dataclass(frozen=True)
class Dataset:
    """Tokenised records of one kind; entry i of every field belongs to record i."""

    kind: Kind
    records: list[Record]
    prompt: Spans  # [n]; empty spans in text
    response: Spans  # [n, K]; empty spans in empty slots; ends in EOS unless truncated
    ranks: np.ndarray  # int32 [n, K]; 1 is best, 0 in empty slots

    def __len__(self) -> int:
        return len(self.records)

    def take(self, keep: np.ndarray) -> "Dataset":
        """The records where the boolean mask `keep` [n] is True."""
        return Dataset(
            self.kind,
            [record for record, kept in zip(self.records, keep, strict=True) if kept],
            Spans(self.prompt.ids, self.prompt.start[keep], self.prompt.stop[keep]),
            Spans(self.response.ids, self.response.start[keep], self.response.stop[keep]),
            self.ranks[keep],
        )


def read(
    config: DataConfig,
    kind: Kind,
    *,
    split: Split = "all",
    tokenizer: Any = None,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Reads and validates records, without tokenising them.

    Args:
      split: `train` and `validation` share no value of `config.split_by`.
      tokenizer: its chat template renders messages; without one, `dialogue.plain_template` does.
      log: receives the report on rows read, skipped and dropped.
    Raises:
      DataError: a row is bad, or no record is left.
      ValueError: `config.columns` is malformed.
    """
    report = _report(config, split, log)
    records = _read(config, kind, split, tokenizer, report)
    report.print(len(records), kind)
    return records


def load(
    config: DataConfig,
    kind: Kind,
    tokenizer: Any,
    *,
    split: Split = "all",
    context: int | None = None,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Reads, validates and tokenises records, and applies the limits on length.

    Args:
      context: tokens of the model's context, or of a packed row. A prompt that leaves no room
        for a response is a bad row. A response that does not fit beside its prompt is truncated,
        or its record dropped (`config.overlong`). Text has no limits.
      split, log: as in `read`.
    Raises:
      DataError: a row is bad, or no record is left.
      ValueError: `config.columns` is malformed.
    """
    report = _report(config, split, log)
    records = _read(config, kind, split, tokenizer, report)
    dataset = encode(records, kind, tokenizer, cache=config.cache, log=log)
    dataset = _limit(dataset, config, context, report, tokenizer.bos_token_id)
    report.print(len(dataset), kind)
    return dataset


def encode(
    records: list[Record],
    kind: Kind,
    tokenizer: Any,
    *,
    cache: str | None = None,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Tokenises records; responses end in EOS."""
    texts = [response for record in records for response in record.responses]
    flat = tokenise(texts, tokenizer, bos=kind == "text", eos=True, cache=cache, log=log)
    if kind == "text":
        empty = np.zeros(len(records), np.int64)
        prompt = Spans(np.zeros(0, np.int32), empty, empty)
    else:
        prompts = [record.prompt for record in records]
        prompt = tokenise(prompts, tokenizer, bos=True, eos=False, cache=cache, log=log)
    count = np.array([len(record.responses) for record in records], np.int64)
    live = np.arange(count.max(initial=0)) < count[:, None]  # [n, K]
    start, stop, ranks = (np.zeros(live.shape, dtype) for dtype in (np.int64, np.int64, np.int32))
    start[live], stop[live] = flat.start, flat.stop
    ranks[live] = [rank for r in records for rank in r.ranks or [1] * len(r.responses)]
    return Dataset(kind, records, prompt, Spans(flat.ids, start, stop), ranks)


def _report(config: DataConfig, split: Split, log: Callable[[str], None]) -> Report:
    name = config.spec if split == "all" else f"{config.spec} ({split})"
    # The miniature's labelers at times tie all responses; that must not stop a run.
    return Report(name, "skip" if config.spec == "miniature" else config.on_error, log)


def _read(
    config: DataConfig, kind: Kind, split: Split, tokenizer: Any, report: Report
) -> list[Record]:
    columns, render = parse_columns(config.columns, FIELDS[kind]), chat_template(tokenizer)
    records: list[Record] = []
    for where, row in rows(config.spec, kind, split, config.txt):
        report.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            parts = expand_tree(row, kind, where, report) if is_tree(row) else [row]
            records.extend([parse(part, where, kind, columns, render) for part in parts])
        except DataError as error:
            report.bad(error)
    if config.dedup:
        records = _deduplicate(records, config.dedup, report)
    if split != "all" and config.spec != "miniature":  # split by its customers
        records = _split(records, config, split, report)
    return records


def _deduplicate(records: list[Record], length: int, report: Report) -> list[Record]:
    """Keeps the first record of those whose prompts (or texts) share `length` characters."""
    first: dict[str, Record] = {}
    for record in records:
        kept = first.setdefault(_prompt_or_text(record)[:length], record)
        if kept is not record:
            reason = f"an earlier prompt begins with the same {length} characters (--data.dedup)"
            report.count("dropped", reason, record.where)
    return list(first.values())


def _split(records: list[Record], config: DataConfig, split: Split, report: Report) -> list[Record]:
    """Assigns each value of `split_by` to a split by its hash, whatever the order of rows."""
    kept, others = [], 0
    for record in records:
        name = config.split_by
        if name == "prompt":
            value = _prompt_or_text(record)
        elif name == "labeler" and record.labeler is not None:
            value = record.labeler
        else:
            try:
                value = lookup(record.row, name)
            except KeyError:
                problem = "is missing, and --data.split_by names it"
                report.bad(DataError(record.where, name, problem))
                continue
        digest = hashlib.sha256(str(value).encode()).digest()
        held_out = int.from_bytes(digest[:8]) < config.validation * 2**64
        if held_out == (split == "validation"):
            kept.append(record)
        else:
            others += 1
    other = "train" if split == "validation" else "validation"
    report.count("left out", f"for {other}, split by '{config.split_by}'", times=others)
    return kept


def _prompt_or_text(record: Record) -> str:
    return record.prompt or record.responses[0]


def _limit(
    dataset: Dataset, config: DataConfig, context: int | None, report: Report, bos_id: int | None
) -> Dataset:
    """Applies `max_prompt`, `max_response` and `context`; refuses records without tokens."""
    records, response = dataset.records, dataset.response.lengths  # [n, K]
    keep, truncate = np.ones(len(records), bool), config.overlong == "truncate"

    def drop(index: Any, reason: str) -> None:
        for i in np.flatnonzero(index & keep):
            report.count("dropped", reason, records[i].where)
        keep[index] = False

    def refuse(index: Any, field: str, problem: Callable[[int], str]) -> None:
        for i in np.flatnonzero(index & keep):
            report.bad(DataError(records[i].where, field, problem(int(i))))
        keep[index] = False

    live = dataset.ranks > 0
    refuse((live & (response <= 1)).any(1), "response", lambda i: "has no tokens")
    if dataset.kind == "text":
        return dataset.take(keep)

    refuse(dataset.prompt.lengths == 0, "prompt", lambda i: "has no tokens")
    ids, start, limit = dataset.prompt.ids, dataset.prompt.start, config.max_prompt
    if limit is not None:
        too_long = dataset.prompt.lengths > limit
        reason = f"prompts over {limit:,} tokens"
        if truncate:
            with_bos = np.flatnonzero(too_long)
            with_bos = with_bos[ids[start[with_bos]] == bos_id]
            start = np.maximum(start, dataset.prompt.stop - limit)
            if len(with_bos):
                ids = ids.copy()
                ids[start[with_bos]] = bos_id
            count = int((too_long & keep).sum())
            report.count("cut", f"{reason}: they keep their end, and BOS", times=count)
        else:
            drop(too_long, f"{reason} (--data.max_prompt)")
    prompt = Spans(ids, start, dataset.prompt.stop)
    room = np.full(len(records), np.iinfo(np.int64).max)
    if context is not None:
        room = context - prompt.lengths
        refuse(
            room < 1,
            "prompt",
            lambda i: (
                f"{prompt.lengths[i]:,} tokens leave no room for a response in a context of"
                f" {context:,} (see --data.max_prompt)"
            ),
        )
    room = np.minimum(room, config.max_response or room)
    too_long = live & (response > room[:, None])
    stop = dataset.response.stop
    if truncate:
        stop = np.where(too_long, dataset.response.start + room[:, None], stop)
        reason = "responses too long: they lose their end and EOS"
        report.count("cut", reason, times=int(too_long[keep].sum()))
    else:
        drop(too_long.any(1), "response too long (--data.max_response, or the context)")
    response_spans = Spans(dataset.response.ids, dataset.response.start, stop)
    return replace(dataset, prompt=prompt, response=response_spans).take(keep)
