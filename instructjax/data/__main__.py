"""Shows a data set, prepares a TFDS set or makes a tokenizer: `python -m instructjax.data`."""

import functools
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from instructjax import hf, ranges, usage
from instructjax.data import paths
from instructjax.data.batches import ComparisonRows, PackedRows, PromptRows, Stream
from instructjax.data.check import check
from instructjax.data.config import DataConfig
from instructjax.data.errors import DataError
from instructjax.data.fields import Kind
from instructjax.data.load import Dataset, Split, load, read
from instructjax.data.prepare import gpt2_tokenizer, train_tokenizer, write_tfds
from instructjax.ranges import Count

_NEEDS_TOKENIZER = "give a folder or a hub name (only the miniature has its own)"


@dataclass(frozen=True)
class Show:
    """Read, tokenise and batch a data set, and print what it holds."""

    kind: Kind
    """Kind of the records to make of the rows."""
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: str | None = None
    """Hugging Face tokenizer, a folder or a hub name; by default the miniature's, for its data."""
    length: Count = 2048
    """Number of tokens of a packed row, and of the context that limits prompt and response."""
    batch_size: Count = 8
    """Number of rows of a batch."""
    split: Split = "all"
    """Which records to read: all, or one side of the split by --data.split_by."""
    example: bool = True
    """Print the first record, decoded from its tokens."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def check(self) -> None:
        """Raises ValueError or OSError for flags that cannot work, before a row is read."""
        if self.tokenizer is not None:
            _check_tokenizer(self.tokenizer)
        elif self.data.spec != "miniature":
            raise ValueError(f"--tokenizer: {_NEEDS_TOKENIZER}")
        check(self.data, self.kind, held_out=self.split == "validation")

    def run(self) -> None:
        tokenizer = _tokenizer(self.tokenizer, self.data.spec)
        begin = time.perf_counter()
        eos_ids = _model_ends(self.tokenizer)
        dataset = load(
            self.data,
            self.kind,
            tokenizer,
            split=self.split,
            context=self.length,
            eos_ids=eos_ids,
        )
        rows = _rows(dataset, self.length)
        seconds = time.perf_counter() - begin
        tokens = int(dataset.prompt.lengths.sum() + dataset.response.lengths.sum())
        print(f"  {tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s")
        for name, lengths in (
            ("prompt", dataset.prompt.lengths),
            ("response", dataset.response.lengths[dataset.ranks > 0]),
        ):
            if lengths.any():
                low, mid, high, longest = np.quantile(lengths, [0.05, 0.5, 0.95, 1]).astype(int)
                print(
                    f"  {name} tokens: median {mid:,}, 5-95 % {low:,}-{high:,}, longest {longest:,}"
                )
        if self.kind == "comparisons":
            _describe_comparisons(dataset)
        stream = Stream(rows, self.batch_size, seed=0)
        batch, begin = stream.batch(0), time.perf_counter()
        for n in range(1, 11):
            stream.batch(n)
        print(f"  a batch, made in {100 * (time.perf_counter() - begin):.1f} ms: ", end="")
        print(", ".join(f"{name} {_shape(value)}" for name, value in batch.items()))
        if self.example:
            print(_example(dataset, tokenizer))


@dataclass(frozen=True)
class Prepare:
    """Write the records of a SPEC as a TFDS set, which `--data tfds:NAME` reads."""

    name: Annotated[str, tyro.conf.Positional]
    """Name of the set, in snake_case."""
    kind: Kind
    """Kind of the records to write."""
    data_dir: str
    """Folder of TFDS sets. Set $TFDS_DATA_DIR to the same folder to read the set by its name."""
    data: DataConfig = field(default_factory=DataConfig)
    split: bool = False
    """Write the splits `train` and `validation`, divided by --data.split_by; else only `train`."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def check(self) -> None:
        """Raises ValueError or OSError for flags that cannot work, before a row is read."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"NAME {self.name}: must be in snake_case")
        data_dir = Path(paths.expand(self.data_dir))
        if (data_dir / self.name).exists():
            raise FileExistsError(
                f"--data_dir {self.data_dir}: {self.name} already exists there; remove it or choose"
                " another name"
            )
        if data_dir.exists() and not data_dir.is_dir():
            raise NotADirectoryError(f"--data_dir {self.data_dir}: is not a directory")
        check(self.data, self.kind, held_out=self.split)

    def run(self) -> None:
        splits: dict[str, Split] = {"train": "train" if self.split else "all"}
        if self.split:
            splits["validation"] = "validation"
        records = {
            name: read(self.data, self.kind, split=split, render=False)
            for name, split in splits.items()
        }
        folder = write_tfds(self.name, self.data_dir, records, self.kind)
        print(f"  written to {folder}: --data tfds:{folder}")


@dataclass(frozen=True)
class Tokenizer:
    """Make a Hugging Face tokenizer from GPT-2's two files, or train a tokenizer on text."""

    out: Annotated[str, tyro.conf.Positional]
    """Folder to write the tokenizer to."""
    gpt2: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe, plain or .gz; by default a byte-level BPE
    tokenizer is trained on the text of --data."""
    vocab_size: Count = 4096
    """Number of tokens of a trained tokenizer, the 256 bytes and EOS included."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text to train on, if --gpt2 is not given."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def check(self) -> None:
        """Raises ValueError or OSError for flags that cannot work, before a row is read."""
        out = Path(paths.expand(self.out))
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"OUT {self.out}: is not a directory")
        if self.gpt2 is None:
            check(self.data, "text", held_out=False)
        elif not os.path.isdir(paths.expand(self.gpt2)):
            raise FileNotFoundError(f"--gpt2 {self.gpt2}: no such directory")

    def run(self) -> None:
        if self.gpt2 is not None:
            print(f"written to {gpt2_tokenizer(self.gpt2, self.out)}")
            return
        texts = [record.responses[0] for record in read(self.data, "text")]
        print(f"written to {train_tokenizer(texts, self.vocab_size, self.out)}")


def _check_tokenizer(name: str) -> None:
    try:
        hf.check_tokenizer(hf.with_tokenizer(name))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--tokenizer {error}") from error


def _tokenizer(name: str | None, spec: str) -> Any:
    if name is None and spec == "miniature":
        from instructjax import miniature

        return miniature.tokenizer()
    if name is None:
        raise DataError("--tokenizer", None, _NEEDS_TOKENIZER)
    try:
        return hf.load_tokenizer(hf.with_tokenizer(name))
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {name}", None, str(error)) from error


def _model_ends(name: str | None) -> tuple[int, ...]:
    """The ids that end a response of the model beside the tokenizer, if there is one."""
    if name is None:
        return ()
    try:
        return hf.load_config(hf.adapter_base(name) if hf.is_adapter(name) else name).eos_ids
    except (FileNotFoundError, ValueError):
        return ()


def _rows(dataset: Dataset, length: int) -> PackedRows | ComparisonRows | PromptRows:
    if dataset.kind == "comparisons":
        return ComparisonRows(dataset)
    return PromptRows(dataset) if dataset.kind == "prompts" else PackedRows(dataset, length)


def _describe_comparisons(dataset: Dataset) -> None:
    ranks = [record.ranks for record in dataset.records]
    sizes = {k: sum(len(r) == k for r in ranks) for k in range(2, 10)}
    pairs = [(a, b) for r in ranks for i, a in enumerate(r) for b in r[:i]]
    ties = sum(a == b for a, b in pairs) / len(pairs)
    labelers = {record.labeler for record in dataset.records} - {None}
    print(f"  K: {', '.join(f'{n:,} of {k}' for k, n in sizes.items() if n)};", end=" ")
    print(f"{len(pairs):,} pairs, {ties:.1%} ties; {len(labelers)} labelers")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, np.ndarray) else f"({len(value)})"


def _example(dataset: Dataset, tokenizer: Any) -> str:
    lines = [f"--- {dataset.records[0].where}"]
    if len(dataset.prompt[0]):
        lines.append(f"prompt: {tokenizer.decode(dataset.prompt[0])!r}")
    for slot, rank in enumerate(dataset.ranks[0].tolist()):
        ids = dataset.response[0, slot]
        label = f"rank {rank}" if dataset.kind == "comparisons" else dataset.kind
        dots = " ..." if len(ids) > 200 else ""
        if rank:
            lines.append(f"{label}: {tokenizer.decode(ids[:200])!r}{dots}")
    return "\n".join(lines)


def cli(argv: Sequence[str] | None = None) -> None:
    """Runs a command. Exits with 2 on wrong usage, with 1 on data that cannot be used."""
    commands: Any = {"show": Show, "prepare": Prepare, "tokenizer": Tokenizer}
    keywords: Any = {"description": __doc__, "prog": "python -m instructjax.data", "args": argv}
    parse: Callable[[], Any] = functools.partial(
        tyro.extras.subcommand_cli_from_dict, commands, **keywords
    )
    command = usage.read(parse, operator.methodcaller("check"))
    try:
        command.run()
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
