"""Records -> tokens -> sharded, resumable batches.

    config.py     DataConfig: the flags of a data set
    errors.py     DataError, which locates a bad row; Report, which counts rows left out
    json_text.py  JSON text -> values; keys that occur twice
    columns.py    --data.columns: which column a field is read from
    fields.py     the fields of a row, under their conventional names or others
    dialogue.py   messages, Anthropic's form and trees of replies -> messages
    conversation.py  a row in any layout -> the conversation before the replies, and the replies
    template.py   messages -> text; the tokens that end a response
    records.py    rows -> records of the four kinds
    paths.py      a path or pattern -> files
    files.py      files -> rows, by suffix
    sources.py    SPEC -> rows
    tokens.py     texts -> token ids, cached
    check.py      whether the set that a DataConfig names is there
    load.py       all of the above: DataConfig -> Dataset
    packing.py    best-fit packing into rows of fixed length
    batches.py    Dataset -> rows -> batches; batch n is a function of (seed, n)
    prepare.py    records -> a TFDS set; tokenizers

Packed demonstrations with a tenth of pretraining text mixed in:

    demos = load(config, "demonstrations", tokenizer, split="train", context=1024)
    text = load(other, "text", tokenizer)
    rows = [PackedRows(demos, 1024), PackedRows(text, 1024)]
    for batch in Stream(rows, 32, seed=0, weights=[0.9, 0.1]).iterate(start=step): ...
"""

from instructjax.data.batches import (
    ComparisonRows,
    PackedComparisonRows,
    PackedRows,
    PromptRows,
    Stream,
)
from instructjax.data.check import check
from instructjax.data.config import DataConfig
from instructjax.data.errors import DataError
from instructjax.data.load import Dataset, encode, load, prompt_ids, read
from instructjax.data.records import Record

__all__ = [
    "ComparisonRows",
    "DataConfig",
    "DataError",
    "Dataset",
    "PackedComparisonRows",
    "PackedRows",
    "PromptRows",
    "Record",
    "Stream",
    "check",
    "encode",
    "load",
    "prompt_ids",
    "read",
]
