"""Tokenised records -> batches. Batch n is a pure function of (seed, n).

Order, mixing and packing are computed over all rows before a host takes its share of a batch. So a
checkpoint stores one integer of the input, n, and another number of hosts can resume from it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from instructjax.data.load import Dataset
from instructjax.data.packing import pack

Row = dict[str, Any]  # arrays, which lack the B of their names; prompts hold other objects too


class Rows(Protocol):
    """A source of rows for `Stream`: one of the four classes below."""

    filler: Row  # a row that counts nowhere; completes the last batch of `Stream.once`

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


def sizes(dataset: Dataset) -> np.ndarray:
    """Tokens [n] of each record: its prompt and all its responses."""
    return dataset.prompt.lengths + dataset.response.lengths.sum(1)


def row_length(datasets: Sequence[Dataset], multiple: int = 128) -> int:
    """The least multiple of some tokens that holds any record of the data sets."""
    return rounded_up(max(int(sizes(dataset).max()) for dataset in datasets), multiple)


def rounded_up(tokens: int, multiple: int = 128) -> int:
    """The least multiple of some tokens that holds a number of them."""
    return tokens + -tokens % multiple


def fitting(dataset: Dataset, length: int, log: Callable[[str], None] = print) -> Dataset:
    """The records that fit a row of `length` tokens. Says how many do not.

    Raises:
      ValueError: none fits.
    """
    total = sizes(dataset)
    fits = total <= length
    if fits.all():
        return dataset
    worst = f"{dataset.records[int(total.argmax())].where} has {total.max():,} tokens"
    if not fits.any():
        raise ValueError(f"{worst}, and no record fits a row of {length:,}: raise --length")
    log(f"  {(~fits).sum():,} dropped: over {length:,} tokens, the row's (--length); {worst}")
    return dataset.take(fits)


class PackedRows:
    """Demonstrations or text, packed into rows of `length` tokens.

    A row holds
      tokens_BT [T] int32: the sequences one after the other, then zeros;
      segments_BT [T] int32: 1 in the first sequence, 2 in the second, ..., 0 in padding; a token
        attends within its segment only;
      positions_BT [T] int32: from 0 in each sequence;
      mask_BT [T] bool: whether the token is a target of the loss, predicted from the token before
        it: all of a response with its EOS, and all of a text but its first token.

    A text longer than `length` is cut into sequences of `length`; the first token of each is no
    target. Demonstrations must fit: `load` them with `context=length`.

    Raises:
      ValueError: a demonstration does not fit.
    """

    def __init__(self, dataset: Dataset, length: int, log: Callable[[str], None] = print):
        total = sizes(dataset)
        if dataset.kind != "text" and total.max() > length:
            worst = dataset.records[int(total.argmax())].where
            raise ValueError(f"{worst} has {total.max()} tokens: load with context={length}")
        count = -(-total // length)  # pieces [n] of each document; a demonstration is one piece
        self.document = np.repeat(np.arange(len(total)), count)
        piece = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self.begin = piece * length
        self.size = np.minimum(total[self.document] - self.begin, length)
        self.rows = pack(self.size, length)
        self.dataset, self.length = dataset, length
        self.fill_rate = float(total.sum() / (len(self.rows) * length))
        self.filler = {name: np.zeros_like(array) for name, array in self[0].items()}
        log(
            f"  packed {len(self.size):,} sequences, {total.sum():,} tokens, into"
            f" {len(self):,} rows of {length:,}: {self.fill_rate:.1%} full"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        tokens_T, segments_T, positions_T = np.zeros((3, self.length), np.int32)
        mask_T, start = np.zeros(self.length, bool), 0
        for number, piece in enumerate(self.rows[index], start=1):
            document, begin, size = self.document[piece], self.begin[piece], self.size[piece]
            prompt = self.dataset.prompt[document]
            stop = start + size
            if len(prompt):
                tokens_T[start:stop] = np.concatenate([prompt, self.dataset.response[document, 0]])
            else:
                tokens_T[start:stop] = self.dataset.response[document, 0][begin : begin + size]
            segments_T[start:stop] = number
            positions_T[start:stop] = np.arange(size)
            mask_T[start + max(1, len(prompt)) : stop] = True
            start = stop
        return {
            "tokens_BT": tokens_T,
            "segments_BT": segments_T,
            "positions_BT": positions_T,
            "mask_BT": mask_T,
        }


class ComparisonRows:
    """Comparisons of 2 to 9 responses, one to a row, in one static shape.

    A row holds
      prompt_BP [P] int32 and prompt_mask_BP [P] bool: padded on the left;
      responses_BKR [K, R] int32 and response_mask_BKR [K, R] bool: padded on the right; the mask
        includes EOS;
      ranks_BK [K] int32: 1 is best, equal ranks are ties, 0 is an empty slot;
      mask_BK [K] bool: whether the slot holds a response;
      margin_B [] float32: 0 if the record has none;
      confidence_B [] float32: 1 if the record has none.

    K, P and R are the largest in the data, R rounded up so that `multiple` divides P + R.
    """

    def __init__(self, dataset: Dataset, multiple: int = 128):
        self.dataset = dataset
        self.P = int(dataset.prompt.lengths.max())
        self.R = int(dataset.response.lengths.max())
        self.R += -(self.P + self.R) % multiple
        self.tokens = self.P + dataset.ranks.shape[1] * self.R  # tokens of a row, with padding
        self.filler = {name: np.zeros_like(array) for name, array in self[0].items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        ranks_K = self.dataset.ranks[index]
        prompt = self.dataset.prompt[index]
        prompt_P, prompt_mask_P = np.zeros(self.P, np.int32), np.zeros(self.P, bool)
        prompt_P[self.P - len(prompt) :] = prompt
        prompt_mask_P[self.P - len(prompt) :] = True
        responses_KR = np.zeros((len(ranks_K), self.R), np.int32)
        for k in range(len(ranks_K)):
            response = self.dataset.response[index, k]
            responses_KR[k, : len(response)] = response
        lengths_K = self.dataset.response.lengths[index]
        return {
            "prompt_BP": prompt_P,
            "prompt_mask_BP": prompt_mask_P,
            "responses_BKR": responses_KR,
            "response_mask_BKR": np.arange(self.R) < lengths_K[:, None],
            "ranks_BK": ranks_K,
            "mask_BK": ranks_K > 0,
            "margin_B": np.asarray(self.dataset.records[index].margin, np.float32),
            "confidence_B": np.asarray(self.dataset.records[index].confidence, np.float32),
        }

    def by_comparison(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, K] of the data set's comparisons from the scores [rows, K] of all rows."""
        return scores[: len(self)]


class PackedComparisonRows:
    """Comparisons packed into rows of `length` tokens, with less padding than ComparisonRows.

    A row holds
      tokens_BT [T] int32: prompt, response, response, ..., the next prompt, ..., then zeros;
      segments_BT [T] int32: a number for each prompt and response, from 1; 0 in padding;
      parents_BT [T] int32: the segment of the prompt, for the prompt's tokens too;
      positions_BT [T] int32: from 0 in each prompt; each response continues its prompt's positions;
      last_BCK [C, K] int32: index into T of the last token of each response;
      ranks_BCK [C, K], mask_BCK [C, K], margin_BC [C], confidence_BC [C]: as in ComparisonRows.

    C is the largest number of comparisons in a row.

    Raises:
      ValueError: a comparison does not fit a row.
    """

    def __init__(self, dataset: Dataset, length: int, log: Callable[[str], None] = print):
        total = sizes(dataset)
        if total.max() > length:
            worst = dataset.records[int(total.argmax())].where
            problem = f"has {total.max()} tokens, which a row of {length} cannot hold (--length)"
            raise ValueError(f"{worst} {problem}")
        self.rows = pack(total, length)
        self.C = max(map(len, self.rows))
        self.dataset, self.tokens = dataset, length
        self.fill_rate = float(total.sum() / (len(self.rows) * length))
        self.filler = {name: np.zeros_like(array) for name, array in self[0].items()}
        log(
            f"  packed {len(dataset):,} comparisons, {total.sum():,} tokens, into"
            f" {len(self):,} rows of {length:,}: {self.fill_rate:.1%} full"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        tokens_T, segments_T, parents_T, positions_T = np.zeros((4, self.tokens), np.int32)
        K, data = self.dataset.ranks.shape[1], self.dataset
        last_CK, ranks_CK = np.zeros((2, self.C, K), np.int32)
        margin_C, confidence_C = np.zeros((2, self.C), np.float32)
        start, segment = 0, 0
        for c, comparison in enumerate(self.rows[index]):
            prompt, parent = data.prompt[comparison], segment + 1
            record = data.records[comparison]
            ranks_CK[c] = data.ranks[comparison]
            margin_C[c], confidence_C[c] = record.margin, record.confidence
            count = np.count_nonzero(ranks_CK[c])
            responses = [data.response[comparison, k] for k in range(count)]
            for k, ids in enumerate([prompt, *responses], start=-1):
                stop, segment = start + len(ids), segment + 1
                tokens_T[start:stop], segments_T[start:stop] = ids, segment
                parents_T[start:stop] = parent
                positions_T[start:stop] = np.arange(len(ids)) + (len(prompt) if k >= 0 else 0)
                start = stop
                if k >= 0:
                    last_CK[c, k] = stop - 1
        return {
            "tokens_BT": tokens_T,
            "segments_BT": segments_T,
            "parents_BT": parents_T,
            "positions_BT": positions_T,
            "last_BCK": last_CK,
            "ranks_BCK": ranks_CK,
            "mask_BCK": ranks_CK > 0,
            "margin_BC": margin_C,
            "confidence_BC": confidence_C,
        }

    def by_comparison(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, K] of the data set's comparisons from the scores [rows, C, K] of all rows."""
        ordered = np.zeros(self.dataset.ranks.shape, scores.dtype)
        for row, comparisons in zip(scores, self.rows, strict=False):  # fillers come last
            ordered[comparisons] = row[: len(comparisons)]
        return ordered


class PromptRows:
    """Prompts for a sampler, of any length.

    A row holds
      prompts: a list of token ids;
      indices [] int32: the index of the prompt in the data, -1 in a filler;
      records: the prompt's Record.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.filler = self[0] | {"indices": np.asarray(-1, np.int32)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return {
            "prompts": self.dataset.prompt[index].tolist(),
            "indices": np.asarray(index, np.int32),
            "records": self.dataset.records[index],
        }


class Stream:
    """An endless sequence of batches; `batch(n)` is a pure function of (seed, n).

    Args:
      sources: one source of rows, or a list of sources whose rows have the same shapes.
      batch_size: rows of a batch, over all hosts.
      seed: seed of the order; each epoch has another order.
      weights: relative shares of the sources' rows; None for equal shares. Every stretch of the
        stream keeps the shares, not only their average.
      host_rows: the rows of each batch that this host takes, ascending, from `sharding.own_rows`;
        None for all rows.
    Raises:
      ValueError: the sources' shapes differ, or the weights do not fit the sources.
    """

    def __init__(
        self,
        sources: Rows | Sequence[Rows],
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        host_rows: Sequence[int] | None = None,
    ):
        import grain  # here, as it imports jax, and importing this module should not

        self.sources = list(sources) if isinstance(sources, Sequence) else [sources]
        shapes = {str({k: np.shape(v) for k, v in _arrays(s.filler)}) for s in self.sources}
        if len(shapes) > 1:
            raise ValueError(f"rows of several shapes cannot be mixed: {sorted(shapes)}")
        if weights is not None and (len(weights) != len(self.sources) or min(weights) <= 0):
            problem = f"weights {weights} for {len(self.sources)} sources"
            raise ValueError(f"{problem}: give one positive weight for each source")
        shuffled = [
            grain.MapDataset.source(source).shuffle(seed=_source_seed(seed, i)).repeat()
            for i, source in enumerate(self.sources)
        ]
        mixed = len(shuffled) > 1
        self.rows: Any = grain.MapDataset.mix(shuffled, weights) if mixed else shuffled[0]
        self.batch_size = batch_size
        self.host_rows = range(batch_size) if host_rows is None else host_rows

    def batch(self, n: int) -> dict[str, Any]:
        """This host's rows of batch n, stacked along a leading B."""
        return _stack([self.rows[n * self.batch_size + i] for i in self.host_rows])

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Batches `start` to `stop` - 1 (None: without end), prepared in the background."""
        import grain

        numbers = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(numbers.map(self.batch).to_iter_dataset(options))

    def once(self) -> Iterator[dict[str, Any]]:
        """Batches of each row once, in the order of the data; fillers complete the last batch."""
        total = sum(map(len, self.sources))
        rows: Iterator[Row] = (source[i] for source in self.sources for i in range(len(source)))
        for _ in range(-(-total // self.batch_size)):
            batch = list(islice(rows, self.batch_size))
            batch += [self.sources[0].filler] * (self.batch_size - len(batch))
            yield _stack([batch[i] for i in self.host_rows])


def _source_seed(seed: int, source: int) -> int:
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def _arrays(row: Row) -> list[tuple[str, np.ndarray]]:
    return [(name, value) for name, value in row.items() if isinstance(value, np.ndarray)]


def _stack(rows: list[Row]) -> dict[str, Any]:
    """Stacks arrays along a new first axis B; other values become lists."""
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    return lists | {name: np.stack(lists[name]) for name, _ in _arrays(rows[0])}
