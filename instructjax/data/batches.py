"""Tokenised records -> batches, of which number n is a pure function of (seed, n).

The order of rows, the mixing of sources and the packing are settled over all rows before a host
takes its share, so what a checkpoint has to keep of the input is the integer n, and another number
of hosts can take over from there.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from instructjax.data.load import Dataset
from instructjax.data.packing import pack

Row = dict[str, Any]  # arrays without their leading B; lists and records in prompts
Batch = dict[str, Any]


class Rows(Protocol):
    """What a batch is made of: rows that `Stream` reads in an order of its own."""

    filler: Row  # counts nowhere; completes the last batch of a single pass

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


class PackedRows:
    """Demonstrations or text, packed into rows of `length` tokens.

    A row holds
      tokens [T] int32: the sequences one after the other, then zeros;
      segments [T] int32: 1 in the first sequence, 2 in the second, ..., 0 where it is empty;
        a token may attend within its own segment alone;
      positions [T] int32: from 0 in each sequence;
      mask [T] bool: whether the token, as predicted from the one before it, counts in the loss:
        all of a response with its EOS; of a text all but its first token.

    A text longer than `length` is cut into sequences of `length`; nothing of it is lost but the
    first token of each as a target. Demonstrations must fit: `load` them with `context=length`.
    """

    def __init__(self, dataset: Dataset, length: int, log: Callable[[str], None] = print):
        total = dataset.prompt.lengths + dataset.response.lengths[:, 0]
        if dataset.kind != "text" and total.max() > length:
            worst = dataset.records[int(total.argmax())].where
            raise ValueError(f"{worst} has {total.max()} tokens: load with context={length}")
        count = -(-total // length)  # pieces of each document
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
        tokens, segments, positions = np.zeros((3, self.length), np.int32)
        mask, at = np.zeros(self.length, bool), 0
        for number, piece in enumerate(self.rows[index], start=1):
            document, begin, size = self.document[piece], self.begin[piece], self.size[piece]
            prompt = self.dataset.prompt[document]
            place = slice(at, at + size)
            if len(prompt):
                tokens[place] = np.concatenate([prompt, self.dataset.response[document, 0]])
            else:
                tokens[place] = self.dataset.response[document, 0][begin : begin + size]
            segments[place] = number
            positions[place] = np.arange(size)
            mask[at + max(1, len(prompt)) : at + size] = True
            at += size
        return {
            "tokens_BT": tokens,
            "segments_BT": segments,
            "positions_BT": positions,
            "mask_BT": mask,
        }


class ComparisonRows:
    """Comparisons, of 2 to 9 responses each, under one static shape.

    A row holds
      prompt [P] int32 and prompt_mask [P] bool: padded on the left;
      responses [K, R] int32 and response_mask [K, R] bool: padded on the right, EOS included;
      ranks [K] int32: 1 is best, equal ranks are ties, 0 in an empty slot;
      mask [K] bool: whether the slot holds a response;
      margin [] float32: 0 where the record has none.

    K and P are the largest in the data; R is, rounded up so that `multiple` divides P + R.
    """

    def __init__(self, dataset: Dataset, multiple: int = 128):
        self.dataset = dataset
        self.P = int(dataset.prompt.lengths.max())
        self.R = int(dataset.response.lengths.max())
        self.R += -(self.P + self.R) % multiple
        self.tokens = self.P + dataset.ranks.shape[1] * self.R  # of a row
        self.filler = {name: np.zeros_like(array) for name, array in self[0].items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        ranks = self.dataset.ranks[index]
        prompt = self.dataset.prompt[index]
        padded, prompt_mask = np.zeros(self.P, np.int32), np.zeros(self.P, bool)
        padded[self.P - len(prompt) :] = prompt
        prompt_mask[self.P - len(prompt) :] = True
        responses = np.zeros((len(ranks), self.R), np.int32)
        for slot in range(len(ranks)):
            response = self.dataset.response[index, slot]
            responses[slot, : len(response)] = response
        lengths = self.dataset.response.lengths[index]
        return {
            "prompt_BP": padded,
            "prompt_mask_BP": prompt_mask,
            "responses_BKR": responses,
            "response_mask_BKR": np.arange(self.R) < lengths[:, None],
            "ranks_BK": ranks,
            "mask_BK": ranks > 0,
            "margin_B": np.asarray(self.dataset.records[index].margin, np.float32),
        }

    def by_comparison(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, K] in the order of the data, of what the rows' own gave in that order."""
        return scores[: len(self)]


class PackedComparisonRows:
    """Comparisons packed into rows of `length` tokens: short ones leave fixed slots half empty.

    A row holds
      tokens [T] int32: prompt, response, response, ..., the next prompt, ..., then zeros;
      segments [T] int32: a number of its own for each prompt and response, 0 where it is empty;
      parents [T] int32: the segment of the prompt, in prompts too;
      positions [T] int32: from 0 in each prompt; each response goes on from its prompt's;
      last [C, K] int32: where the last token of each response is;
      ranks [C, K], mask [C, K] and margin [C], as in ComparisonRows, of the C comparisons.

    C is the most comparisons of a row. Each must fit: `load` them and leave longer ones out.
    """

    def __init__(self, dataset: Dataset, length: int, log: Callable[[str], None] = print):
        total = dataset.prompt.lengths + dataset.response.lengths.sum(1)
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
        tokens, segments, parents, positions = np.zeros((4, self.tokens), np.int32)
        K, data = self.dataset.ranks.shape[1], self.dataset
        last, ranks = np.zeros((2, self.C, K), np.int32)
        margin, at, segment = np.zeros(self.C, np.float32), 0, 0
        for c, comparison in enumerate(self.rows[index]):
            prompt, parent = data.prompt[comparison], segment + 1
            ranks[c], margin[c] = data.ranks[comparison], data.records[comparison].margin
            responses = [data.response[comparison, k] for k in range(np.count_nonzero(ranks[c]))]
            for k, span in enumerate([prompt, *responses], start=-1):
                place, segment = slice(at, at + len(span)), segment + 1
                tokens[place], segments[place], parents[place] = span, segment, parent
                positions[place] = np.arange(len(span)) + (len(prompt) if k >= 0 else 0)
                at += len(span)
                if k >= 0:
                    last[c, k] = at - 1
        return {
            "tokens_BT": tokens,
            "segments_BT": segments,
            "parents_BT": parents,
            "positions_BT": positions,
            "last_BCK": last,
            "ranks_BCK": ranks,
            "mask_BCK": ranks > 0,
            "margin_BC": margin,
        }

    def by_comparison(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n, K] in the order of the data, of the rows' own [rows, C, K] in their order."""
        found = np.zeros(self.dataset.ranks.shape, scores.dtype)
        for row, comparisons in zip(scores, self.rows, strict=False):  # fillers come last
            found[comparisons] = row[: len(comparisons)]
        return found


class PromptRows:
    """Prompts for a sampler, of any length.

    A row holds
      prompts: a list of token ids;
      indices [] int32: which prompt of the data this is, -1 in a filler;
      records: its Record.
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
      sources: rows, or several of one shape.
      batch_size: rows of a batch over all hosts.
      seed: of the order, which is new in each epoch.
      weights: the share of rows from each source, in proportion; equal if None. It is kept to in
        every stretch of the stream, not only on average.
      own: the rows of each batch that this host takes, ascending, as `sharding.own_rows` finds
        them; all if None.
    """

    def __init__(
        self,
        sources: Rows | Sequence[Rows],
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        own: Sequence[int] | None = None,
    ):
        import grain  # and with it jax, so not before it is needed

        self.sources = list(sources) if isinstance(sources, Sequence) else [sources]
        shapes = {str({k: np.shape(v) for k, v in _arrays(s.filler)}) for s in self.sources}
        if len(shapes) > 1:
            raise ValueError(f"rows of several shapes cannot be mixed: {sorted(shapes)}")
        if weights is not None and (len(weights) != len(self.sources) or min(weights) <= 0):
            raise ValueError(f"weights {weights} for {len(self.sources)} sources")
        shuffled = [
            grain.MapDataset.source(source).shuffle(seed=_source_seed(seed, i)).repeat()
            for i, source in enumerate(self.sources)
        ]
        one = len(shuffled) == 1
        self.rows: Any = shuffled[0] if one else grain.MapDataset.mix(shuffled, weights)
        self.batch_size, self.own = batch_size, range(batch_size) if own is None else own

    def batch(self, n: int) -> Batch:
        """This host's rows of batch n, stacked along a leading B."""
        return _stack([self.rows[n * self.batch_size + i] for i in self.own])

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches from number `start` on, prepared in the background."""
        import grain

        numbers = grain.MapDataset.range(start, sys.maxsize if stop is None else stop)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(numbers.map(self.batch).to_iter_dataset(options))

    def once(self) -> Iterator[Batch]:
        """Each row once, in the order of the data, as evaluation needs; fillers complete it."""
        total = sum(map(len, self.sources))
        rows: Iterator[Row] = (source[i] for source in self.sources for i in range(len(source)))
        for _ in range(-(-total // self.batch_size)):
            batch = list(islice(rows, self.batch_size))
            batch += [self.sources[0].filler] * (self.batch_size - len(batch))
            yield _stack([batch[i] for i in self.own])


def _source_seed(seed: int, source: int) -> int:
    return int(np.random.SeedSequence([seed, source]).generate_state(1)[0])


def _arrays(row: Row) -> list[tuple[str, np.ndarray]]:
    return [(name, value) for name, value in row.items() if isinstance(value, np.ndarray)]


def _stack(rows: list[Row]) -> Batch:
    """Arrays along a new first axis, anything else as lists."""
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    return lists | {name: np.stack(lists[name]) for name, _ in _arrays(rows[0])}
