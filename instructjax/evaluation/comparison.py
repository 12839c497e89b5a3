"""Compares models by their responses to the same prompts, as a judge or as labelers rank them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from instructjax.data import Record, files
from instructjax.data.errors import DataError, check_text
from instructjax.evaluation import statistics

Key = tuple[str, str, int]

# Names of `lines` that no measure may have.
COLUMNS = ("model", "prompt", "tools", "response", "ended", "utility", "score", "kl", "where")


@dataclass(frozen=True)
class Answers:
    """A model's responses to P prompts, S to each."""

    keys: Sequence[Key]  # [P], see `keys`
    prompt_rows: Sequence[Mapping[str, Any]]  # [P], see `prompt_row`
    texts: Sequence[Sequence[str]]  # [P][S]
    tokens_PS: np.ndarray  # length by the model's own tokenizer, EOS included
    ended_PS: np.ndarray  # bool, whether a response ends in EOS
    utility_PS: np.ndarray  # by the judge
    score_PS: np.ndarray | None = None  # by the proxy, such as the reward model of training
    kl_PS: np.ndarray | None = None  # nats from the reference, summed over a response
    # More figures of each response by name, [P, S], NaN where one does not apply.
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)
    benchmarks: Mapping[str, statistics.Estimate] = field(default_factory=dict)  # of `tax`

    @property
    def characters_PS(self) -> np.ndarray:
        """Lengths that do not depend on a tokenizer."""
        return np.array([[len(text) for text in of_prompt] for of_prompt in self.texts])

    def take(self, places: Sequence[int]) -> "Answers":
        """The answers to some of the prompts."""
        index = np.array(places)

        def some(x: Any) -> Any:
            if x is None:
                return None
            if isinstance(x, Mapping):  # of measures
                return {name: values_PS[index] for name, values_PS in x.items()}
            return x[index] if isinstance(x, np.ndarray) else [x[i] for i in places]

        names = {f.name for f in fields(self)} - {"benchmarks"}
        return replace(self, **{name: some(getattr(self, name)) for name in names})


def keys(records: Sequence[Record]) -> list[Key]:
    """What tells prompts apart that several models answer: (place, what was said, a number).

    The place alone would not: all prompts of a dialogue tree come from one row. The number counts
    prompts of one row that say the same.
    """
    seen: Counter[tuple[str, str]] = Counter()
    numbered = []
    for record in records:
        said = (record.where, record.said)
        numbered.append((*said, seen[said]))
        seen[said] += 1
    return numbered


def prompt_row(record: Record) -> dict[str, Any]:
    """The prompt as a row of a data file has it, so that it is rendered once more as it was.

    A row of the miniature keeps its request, by which its judge and its critics judge.
    """
    row: dict[str, Any] = {"prompt": record.prompt if record.verbatim else list(record.messages)}
    if record.tools is not None:
        row["tools"] = record.tools
    return row | {k: v for k, v in record.row.items() if k == "request"}


def shared(answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """The answers to the prompts that all models answered: one may lack room for a long prompt.

    Raises:
      ValueError: there is no such prompt.
    """
    common = set.intersection(*(set(given.keys) for given in answers.values()))
    if not common:
        raise ValueError(f"--models {' '.join(answers)}: no prompt has room in all of them")
    first = next(iter(answers.values()))
    order = [key for key in first.keys if key in common]
    places = {name: {key: i for i, key in enumerate(x.keys)} for name, x in answers.items()}
    return {
        name: given.take([places[name][key] for key in order]) for name, given in answers.items()
    }


def compare(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """The figures of each model, and how often each wins against each other.

    Args:
      answers: by name of the model, from `shared`.
    """
    models = {}
    for name, given in answers.items():
        row: dict[str, Any] = {
            "utility": statistics.mean(given.utility_PS.mean(1)),
            "utility_deviation": float(given.utility_PS.std()),  # of a response
            "tokens": float(given.tokens_PS.mean()),
            "characters": float(given.characters_PS.mean()),
            "eos_fraction": float(given.ended_PS.mean()),
        }
        for column, values_PS in (("score", given.score_PS), ("kl", given.kl_PS)):
            if values_PS is not None:
                row[column] = statistics.mean(values_PS.mean(1))
        if given.score_PS is not None:
            row["score_deviation"] = float(given.score_PS.std())
        if given.measures:
            row["measures"] = {name: _mean_of(x) for name, x in given.measures.items()}
        if given.benchmarks:
            row["benchmarks"] = dict(given.benchmarks)
        models[name] = row
    pairs = []
    for (name, ours), (other, theirs) in permutations(answers.items(), 2):
        won_P = statistics.wins(ours.utility_PS, theirs.utility_PS)
        longer_P = ours.characters_PS.mean(1) - theirs.characters_PS.mean(1)
        rate = statistics.mean(won_P)
        controlled = statistics.length_controlled(won_P, longer_P)
        pairs.append(_pair(name, other, rate) | {"win_rate_at_equal_length": controlled})
    prompts = len(next(iter(answers.values())).keys)
    return {"prompts": prompts, "models": models, "pairs": pairs}


def _mean_of(values_PS: np.ndarray) -> statistics.Estimate:
    """The mean of those that are no NaN; responses to one prompt are one draw."""
    prompt_PS = np.broadcast_to(np.arange(len(values_PS))[:, None], values_PS.shape)
    applies_PS = ~np.isnan(values_PS)
    return statistics.mean(values_PS[applies_PS], prompt_PS[applies_PS])


def _pair(name: str, other: str, rate: statistics.Estimate) -> dict[str, Any]:
    return {"model": name, "against": other, "win_rate": rate}


def lines(answers: Mapping[str, Answers]) -> Iterator[dict[str, Any]]:
    """A line for each response, for a JSON-lines file. Its prompt is that of a row of data."""
    for name, given in answers.items():
        for i, row in enumerate(given.prompt_rows):
            for j, text in enumerate(given.texts[i]):
                line: dict[str, Any] = {"model": name, **row, "response": text}
                line["ended"] = bool(given.ended_PS[i, j])
                line["utility"] = float(given.utility_PS[i, j])
                for column, values_PS in (("score", given.score_PS), ("kl", given.kl_PS)):
                    if values_PS is not None:
                        line[column] = float(values_PS[i, j])
                for column, values_PS in given.measures.items():
                    if not np.isnan(values_PS[i, j]):
                        line[column] = float(values_PS[i, j])
                yield line | {"where": given.keys[i][0]}


def comparisons(given: Answers) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of comparisons for run_rm.py: a prompt, a model's different responses, their utilities.

    Returns:
      (the rows, how many of what were left out)
    """
    rows, left_out = [], Counter[str]()
    for i, row in enumerate(given.prompt_rows):
        judged: dict[str, tuple[str, float]] = {}  # by the text that a template would render
        answers = zip(given.texts[i], given.utility_PS[i], given.ended_PS[i], strict=True)
        for text, utility, ended in answers:
            reply = text.strip()
            if not ended:
                left_out["responses that did not end"] += 1
            elif not reply:
                left_out["empty responses"] += 1
            elif reply in judged:
                left_out["repeated responses"] += 1
            else:
                judged[reply] = text, float(utility)
        responses, scores = [text for text, _ in judged.values()], [x for _, x in judged.values()]
        if len(set(scores)) > 1:
            rows.append({**row, "responses": responses, "scores": scores})
        else:
            left_out["prompts without two responses of different utility"] += 1
    return rows, dict(left_out)


# ------------------------------------------------------------------------------------ best of n


def best_of(given: Answers, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What choosing the best of n samples by `score_PS`, or else by `utility_PS`, would give.

    Args:
      given: a model's answers, with at least max(sizes) samples to each prompt.
      sizes: the values of n.

    Returns:
      for each n its KL from the model, in nats, and the means of utility and of score.
    """
    choice_PS = given.utility_PS if given.score_PS is None else given.score_PS
    rows = []
    for n in sizes:
        row: dict[str, Any] = {"n": n, "kl": statistics.best_of_n_kl(n)}
        for column, values_PS in (("utility", given.utility_PS), ("score", given.score_PS)):
            if values_PS is not None:
                best_P = statistics.best_of_n(choice_PS, values_PS, n)
                row[column] = statistics.mean(best_P)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- labels


def of_labels(file: Path) -> dict[str, Any]:
    """How often each model wins, by a file of rankings.

    A row is `{"prompt", "models", "ranks"}` or `{"prompt", "models", "scores"}`: who wrote each
    response, and its rank (1 is best, equal ranks are ties) or its score, such as a Likert score
    of 1 to 7. Other columns are not read. Rows of one prompt are one draw of the bootstrap.

    Args:
      file: of rows in any format that `data.files` reads.

    Returns:
      as `compare`: for each model the number of its responses and, of lines with scores, the mean
      score; for each pair the win rate.

    Raises:
      DataError: the file cannot be read, or a row is no such object; the message names its place.
    """
    won: dict[tuple[str, str], list[tuple[str, float]]] = {}
    scores: dict[str, list[tuple[str, float]]] = {}
    counts: Counter[str] = Counter()
    prompts = set()
    for where, row in files.read_files(str(file), "file"):
        if isinstance(row, DataError):
            raise row
        prompt, models, better, scored = _label(row, where)
        prompts.add(prompt)
        counts.update(models)
        if scored:
            for model, score in zip(models, better, strict=True):
                scores.setdefault(model, []).append((prompt, score))
        for i, j in permutations(range(len(models)), 2):
            if models[i] != models[j]:
                win = (better[i] > better[j]) + 0.5 * (better[i] == better[j])
                won.setdefault((models[i], models[j]), []).append((prompt, win))
    rows: dict[str, Any] = {model: {"responses": count} for model, count in counts.items()}
    for model, values in scores.items():
        rows[model]["score"] = _clustered(values)
    pairs = [_pair(*names, _clustered(values)) for names, values in won.items()]
    return {"prompts": len(prompts), "models": rows, "pairs": pairs}


def _label(row: Any, where: str) -> tuple[str, list[str], list[float], bool]:
    """(prompt, models, a number for each that is higher for a better one, whether it is a score)"""
    if not isinstance(row, dict):
        raise DataError(where, None, "expected an object")
    prompt, models = check_text(row.get("prompt"), where, "prompt"), row.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(x, str) for x in models):
        raise DataError(where, "models", "expected a list of names, one for each response")
    scored = row.get("scores") is not None
    name = "scores" if scored else "ranks"
    values = row.get(name)
    number = (int, float)
    if not isinstance(values, list) or not all(
        type(x) in number and math.isfinite(x) for x in values
    ):
        raise DataError(where, name, "expected a list of numbers, one for each response")
    if len(values) != len(models):
        raise DataError(where, name, f"{len(values)} for {len(models)} models")
    return prompt, models, [float(x) if scored else -float(x) for x in values], scored


def _clustered(values: Sequence[tuple[str, float]]) -> statistics.Estimate:
    prompts, numbers = zip(*values, strict=True)
    return statistics.mean(np.array(numbers), np.unique(prompts, return_inverse=True)[1])


# -------------------------------------------------------------------------------- the terminal


def tables(results: Mapping[str, Any], first: str, by: str) -> list[Table]:
    """`compare` or `of_labels` on the terminal: wins against the model `first`, and means.

    The means of more than four models do not fit a terminal, and are left out.

    Args:
      by: who judged, for the title.
    """
    rows = {name: dict(row) for name, row in results["models"].items()}
    for pair in results["pairs"]:
        if pair["against"] == first:
            rows[pair["model"]] |= pair
    wins = ("utility", "win_rate", "win_rate_at_equal_length")
    columns = [key for key in wins if any(key in row for row in rows.values())]
    titles = {"win_rate": "wins", "win_rate_at_equal_length": "at equal length"}
    others = f"against {first}, " if len(rows) > 1 else ""
    against = Table(title=f"{others}by {by}, on {results['prompts']:,} prompts")
    against.add_column("", overflow="fold")
    for key in columns:
        against.add_column(titles.get(key, key), justify="right", no_wrap=True)
    for name, row in rows.items():
        against.add_row(name, *(_cell(row[key], key in titles) for key in columns if key in row))
    if len(rows) > 4:
        return [against]

    means = Table("", title="means over responses")
    figures = {name: _means(row) for name, row in results["models"].items()}
    for name in figures:
        means.add_column(name, justify="right", overflow="fold")
    for key in dict.fromkeys(key for row in figures.values() for key in row):
        means.add_row(key, *(row.get(key, "") for row in figures.values()))
    return [against, means]


def _means(row: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a model that are no wins, as text."""
    shown = {"score": "score", "kl": "KL, nats", "characters": "characters", "tokens": "tokens"}
    texts = {title: _cell(row[key]) for key, title in shown.items() if key in row}
    if "responses" in row:
        texts["responses"] = f"{row['responses']:,}"
    if "eos_fraction" in row:
        texts["ends"] = f"{row['eos_fraction']:.1%}"
    more = row.get("measures", {}) | row.get("benchmarks", {})
    return texts | {name: _cell(value) for name, value in more.items()}


def _cell(value: Any, percent: bool = False) -> str:
    """A figure, with its interval on a second line if it has one."""
    form = "{:.1%}" if percent else "{:.2f}"
    if isinstance(value, float):
        return form.format(value)
    return f"{form}\n{form} to {form}".format(*value)


def best_of_table(rows: Sequence[Mapping[str, Any]], model: str) -> Table:
    """`best_of` on the terminal."""
    drawn = Table("n", "KL, nats", "utility", title=f"best of n samples of {model}")
    if "score" in rows[0]:
        drawn.add_column("score")
    for row in rows:
        values = [row[key] for key in ("utility", "score") if key in row]
        cells = ("{:+.2f} ({:+.2f} to {:+.2f})".format(*value) for value in values)
        drawn.add_row(f"{row['n']}", f"{row['kl']:.2f}", *cells)
    return drawn
