"""The flags of a data set: what to read, how to map it, and what to leave out."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class DataConfig:
    """Where records come from; in a script's config it gives `--data SPEC --data.dedup 50`."""

    spec: Annotated[str, tyro.conf.arg(name="", metavar="SPEC")] = "miniature"
    """`miniature`, `jsonl:PATH` (globs; .gz, .zst; .csv, .tsv, .json, .txt too),
    `tfds:NAME[/CONFIG][:SPLIT]` or `hf:NAME[:SPLIT]`."""
    columns: str = ""
    r"""Where to find each field: `prompt=question,completion=answer`, a path `instances.0.output`,
    a list `responses=ref1+ref2`, or a template `prompt={question}\n`."""
    on_error: Literal["raise", "skip"] = "raise"
    """A bad row stops the program, or is counted and reported."""
    txt: Literal["file", "line"] = "file"
    """One document of a .txt file: the whole file, or each line that is not blank."""
    dedup: int = 0
    """Drop a record whose prompt shares its first N characters with an earlier one; 0 keeps all."""
    split_by: str = "prompt"
    """Training and validation share no value of this field: `labeler`, `prompt` or any column."""
    validation: float = 0.1
    """Share of those values that goes to validation, where a script asks for a split."""
    max_prompt: int | None = None
    """Longest prompt, in tokens."""
    max_response: int | None = None
    """Longest response, in tokens, EOS included."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What is longer is dropped, or cut: a prompt to its end, a response to its start (no EOS)."""
    cache: str | None = "~/.cache/instructjax"
    """Where tokenised text is kept; `None` keeps nothing."""

    def __post_init__(self) -> None:
        for name, value in (("max_prompt", self.max_prompt), ("max_response", self.max_response)):
            if value is not None and value < 1:
                raise ValueError(f"--data.{name} {value}: must be at least 1")
        if self.dedup < 0 or not 0 <= self.validation < 1:
            raise ValueError(
                "--data.dedup must not be negative, --data.validation from 0 to below 1"
            )
