"""The files and tables that critique_revise.py makes from its chains."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from line_files import write_lines
from revision_chains import Chain, Speaker
from rich.console import Console
from rich.table import Table

from instructjax import data, rollout
from instructjax.data import Record
from instructjax.data.records import parse
from instructjax.evaluation import comparison, gold, statistics
from instructjax.miniature import critics


def rows_of(records: Sequence[Record], chains: Sequence[Chain]) -> list[dict[str, Any]]:
    """The revisions as demonstrations."""
    return [
        {**comparison.prompt_row(record), "completion": text, "revision": i, "principle": name}
        for record, chain in zip(records, chains, strict=True)
        for i, (text, name) in enumerate(zip(chain.texts[1:], chain.principles, strict=True), 1)
    ]


def results_of(
    records: Sequence[Record], chains: Sequence[Chain], judge: Callable[[list[str]], Any]
) -> list[dict[str, Any]]:
    """Figures of the responses (number 0) and of the revisions of each number.

    A chain that has ended keeps its last revision.

    Args:
      judge: texts -> [n] by the name of a figure.
    """
    rows = []
    for number in range(max(len(chain.texts) for chain in chains)):
        texts = [chain.texts[min(number, len(chain.texts) - 1)] for chain in chains]
        revised = [chain for chain in chains if 0 < number < len(chain.texts)]
        changed = [chain.texts[number] != chain.texts[number - 1] for chain in revised]
        row: dict[str, Any] = {"revision": number, "revised": len(revised)}
        row["words"] = float(np.mean([len(text.split()) for text in texts]))
        if changed:
            row["changed"] = float(np.mean(changed))
        for name, values in judge(texts).items():
            row[name] = statistics.mean(values[~np.isnan(values)])
        if number and all(critics.can_judge(record.row) for record in records):
            row["critique_right"] = critiques_right(records, chains, number)
        rows.append(row)
    return rows


def critiques_right(
    records: Sequence[Record], chains: Sequence[Chain], number: int
) -> dict[str, float]:
    """The share of critiques that say what the judge sees, by principle: of the miniature's."""
    by_name = {principle.name: principle for principle in critics.PRINCIPLES}
    right: dict[str, list[bool]] = {}
    for record, chain in zip(records, chains, strict=True):
        if number < len(chain.texts) and chain.principles[number - 1] in by_name:
            principle = by_name[chain.principles[number - 1]]
            kept = critics.keeps(dict(record.row), chain.texts[number - 1], principle.name)
            expected = principle.kept if kept else principle.broken
            said = chain.critiques[number - 1] == expected
            right.setdefault(principle.name, []).append(said)
    return {name: float(np.mean(said)) for name, said in sorted(right.items())}


def make_judge(
    specs: Sequence[str],
    spec: str,
    records: Sequence[Record],
    policy: Speaker,
    dtype: str,
) -> Callable[[list[str]], dict[str, np.ndarray]]:
    """Texts of responses to the prompts -> the judge's figures of each, by name.

    Args:
      specs: the judge; see `gold.load_judge`.
      spec: of the prompts.
      policy: the model that responded; its tokens and its template are the judge's.
      dtype: of reward models.
    """
    tokenizer, eos_ids = policy.tokenizer, policy.model.eos_ids
    judged = gold.load_judge(specs, spec, policy.mesh, tokenizer, dtype)

    def judge(texts: list[str]) -> dict[str, np.ndarray]:
        if judged is None:
            return {}
        rows = [
            comparison.prompt_row(x) | {"completion": text}
            for x, text in zip(records, texts, strict=True)
        ]
        demonstrations = [parse(row, "", "demonstrations", {}, policy.form) for row in rows]
        encoded = data.encode(demonstrations, "demonstrations", tokenizer, eos_ids=eos_ids)
        prompts = [encoded.prompt[i].tolist() for i in range(len(texts))]
        responses = [encoded.response[i, 0].tolist() for i in range(len(texts))]
        tokens = rollout.left_padded(prompts, max(map(len, prompts)))
        tokens |= rollout.right_padded(responses)
        run_model = functools.partial(
            rollout.map_batches,
            rows=tokens,
            size=policy.size,
            buckets=[tokens["mask_BR"].shape[1]],
            mesh=policy.mesh,
        )
        figures = {"utility": judged(run_model, records, texts)}
        if spec == "miniature":
            figures |= gold.measures(records, texts)
        return figures

    return judge


def finish(
    out: Path,
    records: Sequence[Record],
    chains: Sequence[Chain],
    judge: Callable[[list[str]], dict[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Judges, writes and prints. Returns the contents of results.json.

    Args:
      chains: at least one has a response; `judge` is of the records of these.
    """
    pairs = [pair for pair in zip(records, chains, strict=True) if pair[1].texts]
    begun = [record for record, _ in pairs], [chain for _, chain in pairs]
    results, rows = results_of(*begun, judge), rows_of(*begun)
    file = out / "revisions.jsonl"
    write_lines(file, rows)
    if jax.process_index() == 0:
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print_results(results)
        for why, count in Counter(chain.ended for chain in chains if chain.ended).items():
            print(f"{count:,} chains have ended early: {why}; more --max_new_tokens end more texts")
        print(f"wrote {len(rows):,} revisions of {len(pairs):,} responses: {file}")
    return results


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Prints the means; results.json has the intervals."""
    table = Table("", *(f"{row['revision']}" for row in results), title="By number of revisions")
    for name in dict.fromkeys(name for row in results for name in row if name != "revision"):
        cells = []
        for value in (row.get(name) for row in results):
            if isinstance(value, dict):
                value = float(np.mean(list(value.values()))) if value else None
            value = value[0] if isinstance(value, tuple) else value
            cells.append("" if value is None else f"{value:.3g}")
        table.add_row(name.replace("_", " "), *cells)
    Console().print(table)
