"""Writes records as a TFDS set, and makes tokenizers."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instructjax.data import paths
from instructjax.data.errors import DataError
from instructjax.data.fields import Kind
from instructjax.data.records import Record
from instructjax.hf import configs


def write_tfds(
    name: str,
    data_dir: str,
    splits: Mapping[str, list[Record]],
    kind: Kind,
) -> Path:
    """Writes records as a TFDS set of ArrayRecord files.

    The set holds the fields of the records and no other columns. Conversations are stored as JSON
    text, not as a chat template renders them. Neither writing nor reading needs TensorFlow.

    Args:
      name: the set's name, in snake_case. The set is read as `tfds:NAME` if $TFDS_DATA_DIR is
        `data_dir`, else as `tfds:FOLDER`.
      splits: the records of each split, all of one kind; their order is kept.
    Returns:
      The folder `data_dir/name`.
    Raises:
      DataError: the folder exists, or `data_dir` begins with `~` and names no user.
    """
    import tensorflow_datasets as tfds

    folder = Path(paths.expand(data_dir)) / name
    if str(folder).startswith("~"):
        raise DataError(f"--data_dir {data_dir}", None, "no such user")
    if folder.exists():
        raise DataError(str(folder), None, "already exists; remove it or choose another name")
    text, sequence = tfds.features.Text(), tfds.features.Sequence
    columns: dict[str, Any] = {
        "demonstrations": {"prompt": text, "completion": text},
        "comparisons": {
            "prompt": text,
            "responses": sequence(text),
            "ranks": sequence(np.int32),
            "labeler": text,
            "margin": np.float32,
            "confidence": np.float32,
        },
        "prompts": {"prompt": text},
        "text": {"text": text},
    }[kind]
    if any(record.tools is not None for rows in splits.values() for record in rows):
        columns["tools"] = text

    def example(record: Record) -> dict[str, Any]:
        if kind == "text":
            return {"text": record.responses[0]}
        prompt, responses = record.prompt, list(record.responses)
        if not record.verbatim:
            prompt = json.dumps(list(record.messages))
            responses = [json.dumps([turn]) for turn in record.turns]
        row: dict[str, Any] = {"prompt": prompt}
        if kind == "demonstrations":
            row["completion"] = responses[0]
        if kind == "comparisons":
            row |= {"responses": responses, "ranks": list(record.ranks)}
            row |= {"labeler": record.labeler or "", "margin": record.margin}
            row["confidence"] = record.confidence
        if "tools" in columns:
            row["tools"] = "" if record.tools is None else json.dumps(record.tools)
        return row

    class Records(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path: Any = None  # TFDS would need importlib_resources to find the builder's module

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(columns)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: enumerate(map(example, records)) for split, records in splits.items()}

        def _generate_examples(self) -> None:  # abstract in the base class, and not called
            raise NotImplementedError

    Records.name = name
    Records(data_dir=str(folder.parent), file_format="array_record").download_and_prepare()
    return folder


def gpt2_tokenizer(source: str, out: str) -> Path:
    """Makes a Hugging Face tokenizer folder from OpenAI's files.

    Args:
      source: a folder with encoder.json and vocab.bpe (or vocab.json and merges.txt), plain or .gz.
      out: the folder to write.
    Raises:
      DataError: a file is missing.
    """
    folder, out = Path(paths.expand(source)), paths.expand(out)
    vocab = json.loads(_read_first(folder, "encoder.json", "vocab.json"))
    lines = _read_first(folder, "vocab.bpe", "merges.txt").split("\n")
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    configs.transformers().GPT2Tokenizer(vocab=vocab, merges=merges).save_pretrained(out)
    return Path(out)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str) -> Path:
    """Trains a byte-level BPE tokenizer on texts, with `<|endoftext|>` as its EOS.

    Args:
      texts: the texts to train on.
      vocab_size: largest number of tokens, the 256 bytes and EOS included.
      out: the folder to write.
    """
    from tokenizers import ByteLevelBPETokenizer

    eos, out = "<|endoftext|>", paths.expand(out)
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size, special_tokens=[eos], show_progress=False)
    fast = configs.transformers().PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend._tokenizer, eos_token=eos)
    tokenizer.save_pretrained(out)
    return Path(out)


def _read_first(folder: Path, *names: str) -> str:
    """The text of the first of the files that the folder holds, plain or .gz."""
    for name in names:
        if (folder / name).exists():
            return (folder / name).read_text(encoding="utf-8")
        if (folder / f"{name}.gz").exists():
            return gzip.decompress((folder / f"{name}.gz").read_bytes()).decode()
    raise DataError(str(folder), None, f"holds neither {' nor '.join(names)}, plain or .gz")
