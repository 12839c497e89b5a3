"""DataConfig -> records -> tokens. Everything that is left out is counted and reported."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from instructjax.data import template as templates
from instructjax.data.columns import lookup, parse_columns, parse_filter, spelled
from instructjax.data.config import DataConfig
from instructjax.data.dialogue import Messages, expand_tree, is_tree, parse_anthropic
from instructjax.data.errors import DataError, Report, check_unicode
from instructjax.data.fields import NAMES, Kind
from instructjax.data.records import Record, parse
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
    render: bool = True,
    ranked: bool = True,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Reads and validates records, without tokenising them.

    Args:
      split: `train` and `validation` share no value of `config.split_by`.
      tokenizer: its chat template renders conversations; see `template.py` and `config.template`.
      render: False leaves conversations unrendered, for `prepare`.
      ranked: False also reads comparisons without ranks; all of them are 1 then.
      log: receives the report on rows read, skipped and dropped.
    Raises:
      DataError: a row is bad, or no record is left.
      ValueError: `config.columns` is malformed.
    """
    report = _report(config, split, log)
    template = templates.of(tokenizer, config.template) if render else None
    records = _read(config, kind, split, template, report, ranked)
    report.print(len(records), kind)
    return records


def load(
    config: DataConfig,
    kind: Kind,
    tokenizer: Any,
    *,
    split: Split = "all",
    context: int | None = None,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Reads, validates and tokenises records, and applies the limits on length.

    Args:
      context: tokens of the model's context, or of a packed row. A prompt that leaves no room
        for a response, and a response that does not fit beside its prompt, are truncated, or the
        record is dropped (`config.overlong`). Text has no limits.
      eos_ids: the model's ids that end a response. Those of the tokenizer are added.
      vocab_size: rows of the model's embedding; None checks no ids.
      split, log: as in `read`.
    Raises:
      DataError: a row is bad, no record is left, a token has no embedding, or the tokenizer does
        not know over a tenth of the tokens.
      ValueError: `config.columns` is malformed, or the tokenizer lacks `config.template`.
    """
    report = _report(config, split, log)
    template = templates.of(tokenizer, config.template, eos_ids)
    records = _read(config, kind, split, template, report)
    dataset = encode(records, kind, tokenizer, eos_ids=eos_ids, cache=config.cache, log=log)
    _check_ids(dataset, tokenizer, vocab_size, report)
    dataset = _limit(dataset, config, context, report, tokenizer.bos_token_id)
    report.print(len(dataset), kind)
    if kind != "text":
        log(f"  {_describe(config, tokenizer, eos_ids)}")
    return dataset


def encode(
    records: list[Record],
    kind: Kind,
    tokenizer: Any,
    *,
    eos_ids: Sequence[int] = (),
    cache: str | None = None,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Tokenises records. A response ends in the first id at which a rollout would end.

    Args:
      eos_ids: the model's ids that end a response; see `template.end_ids`.
    Raises:
      DataError: there is no id to end a response with.
    """
    end_ids = templates.end_ids(tokenizer, eos_ids)
    if not end_ids:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(f"tokenizer {name}", None, "has no EOS token to end a response with")
    log = _once(log)  # a folder that takes no file is named once, not for prompts and responses
    texts = [response for record in records for response in record.responses]
    eos_id = end_ids[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    ending: dict[str, Any] = {"bos": True, "eos_id": eos_id}
    if kind != "text":
        ending = {"eos_id": eos_id, "end_ids": end_ids, "response": True}
    flat = tokenise(texts, tokenizer, **ending, cache=cache, log=log)
    if kind == "text":
        empty = np.zeros(len(records), np.int64)
        prompt = Spans(np.zeros(0, np.int32), empty, empty)
    else:
        prompts = [record.prompt for record in records]
        prompt = tokenise(prompts, tokenizer, bos=True, cache=cache, log=log)
    count = np.array([len(record.responses) for record in records], np.int64)
    live = np.arange(count.max(initial=0)) < count[:, None]  # [n, K]
    start, stop, ranks = (np.zeros(live.shape, dtype) for dtype in (np.int64, np.int64, np.int32))
    start[live], stop[live] = flat.start, flat.stop
    ranks[live] = [rank for r in records for rank in r.ranks or [1] * len(r.responses)]
    return Dataset(kind, records, prompt, Spans(flat.ids, start, stop), ranks)


def prompt_ids(
    conversation: Messages | str, tokenizer: Any, template: templates.Template
) -> list[int]:
    """The ids of a prompt, as `load` gives them.

    Args:
      conversation: messages, the last of which awaits a reply, or the text of a plain prompt.

    Raises:
      DataError: the template cannot render the messages.
    """
    text = conversation
    if template.form == "chat" and isinstance(text, str):
        text = parse_anthropic(text) or [{"role": "user", "content": text}]
    if not isinstance(text, str):
        text = template.prompt(text, "the conversation", "messages")
    return tokenise([text], tokenizer, bos=True)[0].tolist()


def _report(config: DataConfig, split: Split, log: Callable[[str], None]) -> Report:
    name = config.spec if split == "all" else f"{config.spec} ({split})"
    # The miniature's labelers at times tie all responses; that must not stop a run.
    return Report(name, "skip" if config.spec == "miniature" else config.on_error, log)


def _read(
    config: DataConfig,
    kind: Kind,
    split: Split,
    template: templates.Template | None,
    report: Report,
    ranked: bool = True,
) -> list[Record]:
    columns = parse_columns(config.columns, NAMES[kind])
    check_unicode("--data.split_by", config.split_by)
    if not config.split_by:
        raise ValueError("--data.split_by is empty: name a field")
    spec, validation_spec = config.spec, config.validation
    own_validation = isinstance(validation_spec, str)
    if own_validation and split == "validation":
        spec = validation_spec
    noted = None if spec == "miniature" else report  # its rows hold what its judge reads
    given = ("--data.only", config.only, True), ("--data.without", config.without, False)
    filters = [_Filter(*words) for words in given if words[1]]
    settings: Any = {"columns": columns, "template": template, "report": noted, "ranked": ranked}
    records: list[Record] = []
    for where, row in rows(spec, kind, split, config.txt):
        report.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            unwanted = next((each for each in filters if not each.keeps(row, where)), None)
            if unwanted is not None:
                report.count("left out", f"by {unwanted.name}")
                continue
            tree = kind != "text" and is_tree(row)
            parts = expand_tree(row, kind, where, report) if tree else [row]
            records.extend([parse(part, where, kind, **settings) for part in parts])
        except DataError as error:
            report.bad(error)
    for each in filters:
        for column in (each.column, each.column.partition(".")[0]):
            report.unread.pop(column, None)
        for value in each.unmatched:
            report.log(f"{report.name}: no row has {value!r}, which {each.name} names")
    if config.dedup:
        records = _deduplicate(records, config.dedup, report)
    # The miniature makes its own splits, by customer.
    if split != "all" and spec != "miniature" and not own_validation:
        records = _split(records, config, split, report)
    return records


class _Filter:
    """--data.only or --data.without: which rows are read, by the value of a column.

    Attributes:
      name: the flag and its value.
      unmatched: the values that no row had.
    """

    def __init__(self, flag: str, source: str, wanted: bool):
        self.name, self._flag, self._wanted = f"{flag} {source}", flag, wanted
        self.column, self._values = parse_filter(source, flag)
        self.unmatched = dict.fromkeys(self._values)  # in their order

    def keeps(self, row: Any, where: str) -> bool:
        """Whether a row is read. Raises DataError if it lacks the column."""
        value = spelled(_value(row, self.column, where, self._flag))
        self.unmatched.pop(value, None)
        return (value in self._values) == self._wanted


def _value(row: Any, column: str, where: str, flag: str) -> Any:
    """The value of a column that a flag names. Raises DataError if the row lacks it."""
    try:
        return lookup(row, column)
    except KeyError as error:
        raise DataError(where, column, f"is missing, and {flag} names it") from error
    except TypeError as error:
        raise DataError(where, column, str(error)) from error


def _deduplicate(records: list[Record], length: int, report: Report) -> list[Record]:
    """Keeps the first record of those whose prompts (or texts) share `length` characters."""
    first: dict[str, Record] = {}
    for record in records:
        kept = first.setdefault(record.said[:length], record)
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
            value = record.said
        elif name == "labeler" and record.labeler is not None:
            value = record.labeler
        else:
            flag = "--data.split_by"
            try:
                value = _value(record.row, name, record.where, flag)
                if value is None:
                    raise DataError(record.where, name, f"is missing, and {flag} names it")
            except DataError as error:
                report.bad(error)
                continue
        digest = hashlib.sha256(str(value).encode(errors="surrogatepass")).digest()
        held_out = int.from_bytes(digest[:8]) < config.validation * 2**64
        if held_out == (split == "validation"):
            kept.append(record)
        else:
            others += 1
    other = "train" if split == "validation" else "validation"
    report.count("left out", f"for {other}, split by '{config.split_by}'", times=others)
    return kept


def _describe(config: DataConfig, tokenizer: Any, eos_ids: Sequence[int]) -> str:
    """How prompts are rendered and where responses end, for the log."""
    forms = {"chat": "in the model's chat template", "plain": "plain, without a chat template"}
    form = forms[templates.of(tokenizer, config.template).form]
    ends = tokenizer.convert_ids_to_tokens(list(templates.end_ids(tokenizer, eos_ids)))
    return f"prompts are {form}; responses end in {' or '.join(ends)}"


def _check_ids(dataset: Dataset, tokenizer: Any, vocab_size: int | None, report: Report) -> None:
    """Refuses ids without an embedding, and data in words that the tokenizer does not know."""
    parts = dataset.prompt.ids, dataset.response.ids
    largest = max(int(ids.max(initial=0)) for ids in parts)
    if vocab_size is not None and largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        problem = f"holds the token {token!r}, which has no row in the embedding of {vocab_size:,}"
        raise DataError(report.name, None, problem)
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return
    count = sum(int((ids == unknown).sum()) for ids in parts)
    if count:  # a text may spell the token out, as it does one that separates documents
        texts = (text for record in dataset.records for text in (record.prompt, *record.responses))
        count = max(0, count - sum(text.count(tokenizer.unk_token) for text in texts))
    total = sum(map(len, parts))
    share = count / max(1, total)
    if share > 0.1:
        problem = f"the tokenizer does not know {share:.0%} of the tokens: choose another --model"
        raise DataError(report.name, None, f"{problem} or --tokenizer")
    if share:
        report.log(f"{report.name}: the tokenizer does not know {count:,} of {total:,} tokens")


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

    same = _same_tokens(dataset.response, dataset.ranks)
    refuse(same, "responses", lambda i: "two of different ranks have the same tokens")
    refuse(dataset.prompt.lengths == 0, "prompt", lambda i: "has no tokens")
    prompt = dataset.prompt
    limits: list[tuple[int, Any, str]] = []  # (longest, what a longer prompt is cut to, reason)
    if (limit := config.max_prompt) is not None:
        limits.append((limit, limit, f"prompts over {limit:,} tokens (--data.max_prompt)"))
    if context is not None:
        # A prompt that is cut leaves room for the whole response, or has half of the context.
        cut_to = np.maximum(context - response.max(1, initial=1), context // 2)
        reason = f"prompts that leave no room for a response in a context of {context:,}"
        limits.append((context - 1, cut_to, reason))
    for longest, cut_to, reason in limits:
        too_long = prompt.lengths > longest
        if not truncate:
            drop(too_long, reason)
        elif too_long.any():
            prompt = _keep_end(prompt, np.where(too_long, cut_to, prompt.lengths), bos_id)
            count = int((too_long & keep).sum())
            report.count("cut", f"{reason}: they keep their end, and BOS", times=count)
    room = np.full(len(records), np.iinfo(np.int64).max)
    if context is not None:
        room = context - prompt.lengths
    room = np.minimum(room, config.max_response or room)
    too_long = live & (response > room[:, None])
    stop = dataset.response.stop
    if truncate:
        stop = np.where(too_long, dataset.response.start + room[:, None], stop)
        reason = "responses too long: they lose their end and EOS"
        report.count("cut", reason, times=int(too_long[keep].sum()))
        cut = Spans(dataset.response.ids, dataset.response.start, stop)
        drop(_same_tokens(cut, dataset.ranks), "responses of different ranks have the same start")
    else:
        drop(too_long.any(1), "response too long (--data.max_response, or the context)")
    response_spans = Spans(dataset.response.ids, dataset.response.start, stop)
    return replace(dataset, prompt=prompt, response=response_spans).take(keep)


def _once(log: Callable[[str], None]) -> Callable[[str], None]:
    """A log that leaves out lines that it has had."""
    lines: set[str] = set()

    def log_new(line: str) -> None:
        if line not in lines:
            lines.add(line)
            log(line)

    return log_new


def _same_tokens(response: Spans, ranks: np.ndarray) -> np.ndarray:
    """Whether [n] two responses of a record have the same tokens, and different ranks."""
    same, lengths = np.zeros(len(ranks), bool), response.lengths  # [n], [n, K]
    better = (ranks[:, :, None] < ranks[:, None]) & (ranks[:, :, None] > 0)
    for i, a, b in np.argwhere(better & (lengths[:, :, None] == lengths[:, None])):
        same[i] |= np.array_equal(response[i, a], response[i, b])
    return same


def _keep_end(prompt: Spans, lengths: np.ndarray, bos_id: int | None) -> Spans:
    """The last `lengths` [n] tokens of each prompt. One that began with BOS still does."""
    start = prompt.stop - lengths
    with_bos = np.flatnonzero(start > prompt.start)
    with_bos = with_bos[prompt.ids[prompt.start[with_bos]] == bos_id]
    ids = prompt.ids
    if len(with_bos):
        ids = ids.copy()
        ids[start[with_bos]] = bos_id
    return Spans(ids, start, prompt.stop)
