"""Labels -> what run_rm.py, run_sft.py and evaluate.py --labels read.

    comparisons.jsonl     {"prompt", "responses", "ranks", "labeler", "seconds", "likert", "flags"}
    demonstrations.jsonl  {"prompt", "completion", "labeler", "seconds"}
    rankings.jsonl        {"prompt", "models", "ranks", "labeler", "seconds"}

Answers to a screening set are left out, and so are all answers of labelers who were not admitted.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructjax.data.records import rank
from instructjax.label.store import Label, Store

COMPARISONS, DEMONSTRATIONS = "comparisons.jsonl", "demonstrations.jsonl"
RANKINGS = "rankings.jsonl"


def counted(store: Store) -> list[Label]:
    """The labels that count: of admitted labelers, and of none to a screening set."""
    refused = {name for name, labeler in store.labelers().items() if labeler.admitted is False}
    return [
        label
        for label in store.labels()
        if label.labeler not in refused and not label.screen.known_ranks
    ]


def write(store: Store, directory: Path, log: Callable[[str], None] = print) -> dict[str, int]:
    """Writes those of the three files that have rows; one that an earlier export left is removed.

    Args:
      log: receives the number of labels, of rows and of what was left out.

    Returns:
      the number of rows of each file.
    """
    labels, all_labels = counted(store), store.labels()
    rows: Mapping[str, list[dict[str, Any]]] = {
        COMPARISONS: [*filter(None, map(comparison, labels))],
        DEMONSTRATIONS: [*filter(None, map(demonstration, labels))],
        RANKINGS: [*filter(None, map(ranking, labels))],
    }
    directory.mkdir(parents=True, exist_ok=True)
    people = len({label.labeler for label in labels})
    log(f"{len(labels):,} labels by {people:,} labelers")
    refused = len(all_labels) - len(labels)
    if refused:
        log(f"  {refused:,} left out: of a screening set, or of labelers that it did not admit")
    tied = sum("ranks" in label.answer for label in labels) - len(rows[COMPARISONS])
    if tied:
        log(f"  {tied:,} in no comparison: all responses that are not empty are tied")
    for name, written in rows.items():
        file = directory / name
        if not written:
            file.unlink(missing_ok=True)
        else:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
            part = file.with_name(f"{name}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)  # a kill leaves the earlier one
            log(f"  {len(written):,} rows in {file}")
    return {name: len(written) for name, written in rows.items()}


def comparison(label: Label) -> dict[str, Any] | None:
    """A row for run_rm.py. Empty responses are left out, which it refuses; None if all responses
    that remain are tied."""
    if "ranks" not in label.answer:
        return None
    kept = [i for i, text in enumerate(label.screen.texts) if text.strip()]
    ranks = [*rank([-label.answer["ranks"][i] for i in kept])]
    if len(set(ranks)) < 2 or len({label.screen.texts[i] for i in kept}) < 2:
        return None
    row = _prompt(label) | {"responses": _at(label.screen.responses, kept), "ranks": ranks}
    row |= _who(label)
    more = {key: value for key, value in label.answer.items() if key in ("likert", "flags")}
    return row | {key: _at(value, kept) for key, value in more.items()}


def demonstration(label: Label) -> dict[str, Any] | None:
    """A row for run_sft.py; None of a screen that was not for writing."""
    if "text" not in label.answer:
        return None
    return _prompt(label) | {"completion": label.answer["text"]} | _who(label)


def ranking(label: Label) -> dict[str, Any] | None:
    """A row for evaluate.py --labels, in which a response that several models wrote stands for
    each of them; None where no models are known."""
    if "ranks" not in label.answer or not label.screen.models:
        return None
    of = [(m, i) for i, models in enumerate(label.screen.models) for m in models]
    prompt = label.screen.prompt
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{role}: {text}" for role, text in label.screen.turns)
    ranks = [*rank([-label.answer["ranks"][i] for _, i in of])]
    return {"prompt": prompt, "models": [m for m, _ in of], "ranks": ranks} | _who(label)


def _prompt(label: Label) -> dict[str, Any]:
    tools = {} if label.screen.tools is None else {"tools": label.screen.tools}
    return {"prompt": label.screen.prompt} | tools


def _who(label: Label) -> dict[str, Any]:
    return {"labeler": label.labeler, "seconds": round(label.seconds, 1)}


def _at(values: Sequence[Any], places: Iterable[int]) -> list[Any]:
    return [values[place] for place in places]
