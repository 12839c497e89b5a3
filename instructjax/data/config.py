"""The flags of a data set: what to read, which columns to use, and what to leave out."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from instructjax.ranges import Count, CountOrZero, ShareBelow1


@dataclass(frozen=True)
class DataConfig:
    """A data set: its rows, their columns, its split and its limits on length."""

    spec: Annotated[str, tyro.conf.arg(name="", metavar="SPEC")] = "miniature"
    """Where the rows come from: `miniature`, `jsonl:PATH`, `tfds:NAME[/CONFIG][:SPLIT]` or
    `hf:NAME[/CONFIG][:SPLIT]`. PATH may hold wildcards, unless a file has this name. Each file is
    read by its suffix: .json, .csv, .tsv, .txt or .parquet; any other suffix means JSON lines. All
    but .parquet may have .gz or .zst after it. SPLIT is `train` by default and may be a slice such
    as `train[:1%]`."""
    columns: str = ""
    r"""Which column each field is read from: a name `prompt=question,completion=answer`, a path
    `completion=instances.0.output`, every item of a list `responses=answers.*.text`, a list of
    columns `responses=ref1+ref2`, a template `prompt={question}\n{hint?}`, whose column with `?`
    may be absent, the value that names the best response `ranks=winner:model_a|model_b`, or a
    number that is negative where the first of two responses is better `ranks=preference:signed`.
    Fields not given here are found by their conventional names."""
    only: str = ""
    """Rows to read, by the value of a column: `lang=en`, or `'category=open_qa|closed_qa'` for one
    of several. The column may be a path, and numbers, booleans and null are written as in JSON. By
    default all rows are read."""
    without: str = ""
    """Rows to leave out, by the value of a column, in the form of `only`: `category=brainstorming`.
    By default none is left out."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad row does: `raise` stops the program; `skip` leaves the row out and reports how
    many were left out and why."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How prompts are rendered.
    `chat`: the tokenizer's chat template renders every prompt; a plain prompt is a user's message.
    `plain`: texts stay as they are, and messages get the form of Anthropic's dialogues.
    `auto`: the form that the model was trained with, if its run recorded it; else `chat` if the
    tokenizer has a chat template; else `plain`."""
    txt: Literal["file", "line"] = "file"
    """What one document of a .txt file is: the whole file, or each line that is not blank."""
    dedup: CountOrZero = 0
    """Drop a record whose prompt begins with the same N characters as an earlier prompt; 0 keeps
    all records. What the chat template and system messages add does not count.
    [section 3.2 drops prompts with a long common prefix]"""
    split_by: str = "prompt"
    """Field that divides training from validation, which share none of its values: `prompt`,
    `labeler` or the path of any column. [section 3.2 splits by user ID]"""
    validation: ShareBelow1 | str = 0.1
    """Fraction of the values of `split_by` that goes to validation, or the SPEC of a validation set
    of its own, such as `jsonl:valid.jsonl`. Scripts that train use both sides."""
    max_prompt: Count | None = None
    """Longest prompt, in tokens; by default the context is the only limit."""
    max_response: Count | None = None
    """Longest response, in tokens, EOS included; by default the context is the only limit."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a record over these limits: `drop` leaves it out; `truncate` keeps the end of
    the prompt and the start of the response, which then has no EOS."""
    cache: str | None = "~/.cache/instructjax"
    """Folder that tokenised text is cached in; `None` caches nothing. If the folder cannot be
    written to, the run continues without a cache."""
