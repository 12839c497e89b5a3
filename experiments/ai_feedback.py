r"""AI feedback: a model says which of two responses is better, under a written principle.

    python experiments/ai_feedback.py --model MODEL --data jsonl:pairs.jsonl      # ranked or not
    python experiments/ai_feedback.py --model MODEL --data jsonl:runs/evaluation/comparisons.jsonl \
        --principles my_principles.toml --thoughts 128 --clamp 0.4 0.6
    python experiments/ai_feedback.py --model rules --noise 1 --place_bias 0.5    # the miniature
    python experiments/run_rm.py --model runs/sft --data jsonl:runs/ai_feedback/comparisons.jsonl

The model is asked twice about each pair of responses, in both orders. Its probabilities of the
answers A and B are averaged to a soft label (RLAIF, Lee et al. 2023, arXiv 2309.00267). A principle
is drawn for each pair (Constitutional AI, Bai et al. 2022, arXiv 2212.08073). With --thoughts the
model writes some text before it answers.

On the miniature, `--model rules` is a critic that reads as the gold judge does, with errors. A base
model trained on the pages of miniature/critics.py can label too: --principles miniature.

Hardware: two CPU cores suffice for a model of 135M parameters and a few hundred pairs.
Result: OUT/comparisons.jsonl, pairs with ranks and the confidence that run_rm.py reads; and
OUT/results.json: how often the order of the responses decides the answer and, where --data has
ranks, how often the model agrees with them, or on the miniature with the gold judge. The data's
ranks are not used for anything else.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ai_labeler
import constitution
import jax
import numpy as np
from ai_labeler import Pair
from rich.console import Console
from rich.table import Table

from instructjax import data, miniature, ranges, sharding, usage
from instructjax.data import DataConfig, prompt_ids, template
from instructjax.evaluation import comparison
from instructjax.miniature import critics
from instructjax.offload import freeze
from instructjax.ranges import Count, CountOrZero, Finite, NotNegative, Positive, Seed, Share
from instructjax.run import checks, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations

PRINCIPLES = Path(__file__).resolve().parent / "principles.toml"
RULES = "rules"  # as --model


@dataclass(frozen=True, kw_only=True)
class Config:
    """The labeler, what it labels, and its principles."""

    model: str
    """Labeler: a language model, preferably a chat model; or `rules`, the miniature's rule-based
    critic."""
    data: DataConfig = field(default_factory=DataConfig)
    """Comparisons, whose responses are labeled two at a time. They need no ranks."""
    out: Path = Path("runs/ai_feedback")
    """Directory of the labels."""
    principles: str | None = None
    """TOML file of principles, or `miniature` for those in the miniature's words. By default
    `miniature` with `--model rules`, and otherwise principles.toml beside this script."""
    only_principles: tuple[str, ...] = ()
    """Names of the principles to draw from. By default all that have a `choose` question."""
    noise: NotNegative = 0.0
    """Standard deviation of the errors of `--model rules`, in units of the judge's utility."""
    place_bias: Finite = 0.0
    """What `--model rules` adds to its rating of the response that is shown first, in units of the
    judge's utility."""
    pairs: Count = 1000
    """Number of pairs to label, from the start of the data. K responses to a prompt give all their
    pairs."""
    thoughts: CountOrZero = 0
    """Number of tokens that the labeler may write before it answers; 0: it answers at once. [Lee et
    al. and Bai et al. do both]"""
    temperature: Positive = 1.0
    """Temperature of sampling these tokens."""
    clamp: tuple[Share, Share] = (0.0, 1.0)
    """Lowest and highest probability of a label; labels outside are moved to these. [Bai et al.,
    with thoughts: 0.4 and 0.6]"""
    batch_size: Count = 16
    """Questions that run through the model at the same time."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's parameters and of its computation."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`. By default all are along `fsdp`."""
    seed: Seed = 0
    """Seed of the draw of each pair's principle, and of sampling with --thoughts."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.clamp[0] <= 0.5 <= self.clamp[1]:
            raise ValueError(f"--clamp {self.clamp[0]} {self.clamp[1]}: 0.5 must lie between")
        if self.model == RULES and self.constitution_source != constitution.MINIATURE:
            raise ValueError("--principles: `--model rules` knows those of the miniature alone")
        if self.model != RULES and (self.noise or self.place_bias):
            raise ValueError("--noise and --place_bias are of `--model rules` alone")
        sharding.parse_mesh(self.mesh)

    @property
    def constitution_source(self) -> str:
        """--principles or its default."""
        by_default = constitution.MINIATURE if self.model == RULES else f"{PRINCIPLES}"
        return self.principles or by_default

    @property
    def constitution(self) -> constitution.Constitution:
        """The principles that can choose."""
        return constitution.read(self.constitution_source, ("choose",), self.only_principles)


# ------------------------------------------------------------------------------------- results


def rows_of(c: Config, pairs: Sequence[Pair], first_better: np.ndarray) -> list[dict[str, Any]]:
    """Comparisons with soft labels. Pairs that the labeler finds equal are left out."""
    rows = []
    labels = np.clip(ai_labeler.soft_labels(first_better), *c.clamp)
    for pair, p in zip(pairs, labels, strict=True):
        if p != 0.5:
            rows.append(
                {
                    **comparison.prompt_row(pair.record),
                    "responses": [pair.response(pair.first), pair.response(pair.second)],
                    "ranks": [1, 2] if p > 0.5 else [2, 1],
                    "confidence": float(max(p, 1 - p)),
                    "labeler": c.model,
                }
            )
    return rows


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    checks.check_directory("--out", c.out)
    assert c.constitution
    data.check(c.data, "comparisons")
    if c.model == RULES:
        return
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    checks.check_rows("--batch_size", c.batch_size, 1, mesh)
    pretrained.check(c.model, mesh, scalar_head=False)


def ai_feedback(c: Config) -> dict[str, Any]:
    """Labels the pairs. Returns the contents of results.json."""
    pairs, first_better = (label_by_rule if c.model == RULES else label_by_model)(c)
    results = ai_labeler.results_of(pairs, first_better)
    if jax.process_index() == 0:
        c.out.mkdir(parents=True, exist_ok=True)
        rows = rows_of(c, pairs, first_better)
        if len(rows) < len(pairs):
            print(f"{len(pairs) - len(rows):,} pairs are left out: their label is even")
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        file = c.out / "comparisons.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (c.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print_results(results)
        print(f"wrote {file}, {c.out / 'results.json'}")
    return results


def label_by_rule(c: Config) -> tuple[list[Pair], np.ndarray]:
    """The pairs, and P(the first is better) of each in both orders.

    Raises:
      ValueError: the data are not the miniature's.
    """
    tokenizer = miniature.tokenizer()
    records = data.read(c.data, "comparisons", tokenizer=tokenizer, render=False, ranked=False)
    for record in records:
        if not critics.can_judge(record.row):
            raise ValueError(f"--model rules: {record.where} has no request: it judges no such row")
    pairs = ai_labeler.pairs_of(records, c.constitution, c.pairs, c.seed)
    critic = critics.RuleCritic(c.noise, c.place_bias, seed=c.seed)
    return pairs, ai_labeler.label_by_rule(pairs, critic)


def label_by_model(c: Config) -> tuple[list[Pair], np.ndarray]:
    """The pairs that the model has room for, and P(the first is better) of each in both orders.

    Raises:
      ValueError: it has room for none.
    """
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    model, params, tokenizer = pretrained.load(c.model, mesh, scalar_head=False)
    model = dataclasses.replace(model, dtype=c.model_dtype)
    records = data.read(c.data, "comparisons", tokenizer=tokenizer, render=False, ranked=False)
    principles, think = c.constitution, c.thoughts > 0
    pairs = ai_labeler.pairs_of(records, principles, c.pairs, c.seed)
    form = template.of(tokenizer, "auto", model.eos_ids)
    room = model.max_length - c.thoughts - 16  # what is said before the answer, and the answer
    questions = (pair.question(False, principles, think) for pair in pairs)
    fits = [len(prompt_ids(question, tokenizer, form)) < room for question in questions]
    fitting = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    if len(fitting) < len(pairs) and jax.process_index() == 0:
        print(f"{len(pairs) - len(fitting):,} pairs are left out: the model has no room for them")
    if not fitting:
        raise ValueError(f"--model {c.model}: no pair fits its {model.max_length:,} tokens")
    ask = ai_labeler.make_ask(
        model,
        freeze(params, c.model_dtype),
        tokenizer,
        mesh,
        jax.random.key(c.seed),
        size=c.batch_size,
        answers=principles.answers,
        before_answer=principles.before_answer,
        thoughts=c.thoughts,
        temperature=c.temperature,
    )
    with phase(Console(), f"labeling {len(fitting):,} pairs, each in both orders"):
        return fitting, ai_labeler.label(fitting, ask, principles, think)


def print_results(results: Mapping[str, Any]) -> None:
    table = Table(show_header=False, title=f"{results['pairs']:,} pairs")
    table.add_row("mean probability of A", f"{results['share_a']:.1%}")
    table.add_row("pairs whose answer changes with the order", f"{results['decided_by_place']:.1%}")
    agreements = {}
    if "agreement" in results:
        agreements = {"all": results["agreement"], **results["by_principle"]}
    judge = results.get("agreement_with_judge", {})
    for what, estimates in (("the data's ranks", agreements), ("the judge", judge)):
        for name, estimate in estimates.items():
            shown = "{:.1%} ({:.1%} to {:.1%})".format(*estimate)
            table.add_row(f"agreement with {what}: {name}", shown)
    Console().print(table)


def cli(argv: Sequence[str] | None = None) -> None:
    ai_feedback(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
