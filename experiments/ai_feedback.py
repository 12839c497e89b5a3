r"""AI feedback: a model says which of two responses is better, under a written principle.

    python experiments/ai_feedback.py --model MODEL --data jsonl:pairs.jsonl      # ranked or not
    python experiments/ai_feedback.py --model MODEL --data jsonl:runs/evaluation/comparisons.jsonl \
        --principles my_principles.toml --thoughts 128 --clamp 0.4 0.6
    python experiments/run_rm.py --model runs/sft --data jsonl:runs/ai_feedback/comparisons.jsonl

The model is asked twice about each pair of responses, which change places, and its probabilities of
the answers A and B are averaged over both: a soft label (RLAIF, Lee et al. 2023, arXiv 2309.00267).
A principle is drawn for each pair (Constitutional AI, Bai et al. 2022, arXiv 2212.08073). With
--thoughts it writes some text first, and answers after that.

Hardware: two CPU cores suffice for a model of 135M parameters and a few hundred pairs.
Result: OUT/comparisons.jsonl, pairs with ranks and the confidence that run_rm.py reads; and
OUT/results.json: how often the place decides and, where --data has ranks, how often the model
agrees with them. The data's ranks are used for nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ai_labeler
import jax
import numpy as np
import tyro
from ai_labeler import Pair, read_principles
from rich.console import Console
from rich.table import Table

from instructjax import data, ranges, sharding, usage
from instructjax.data import DataConfig, prompt_ids, template
from instructjax.evaluation import comparison, statistics
from instructjax.offload import freeze
from instructjax.ranges import Count, CountOrZero, Positive, Seed, Share
from instructjax.run import checks, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations

PRINCIPLES = Path(__file__).resolve().parent / "principles.toml"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The labeler, what it labels, and its principles."""

    model: str
    """Labeler: a language model, best a chat model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Comparisons, whose responses are labeled two at a time. They need no ranks."""
    out: Path = Path("runs/ai_feedback")
    """Directory of the labels."""
    principles: Path = PRINCIPLES
    """TOML file with a list `principles` of texts."""
    pairs: Count = 1000
    """Number of pairs, the first of the data. All pairs of a prompt's responses are labeled."""
    thoughts: CountOrZero = 0
    """Tokens that the labeler may write before it answers. [Lee et al. and Bai et al. do both]"""
    temperature: Positive = 1.0
    """Temperature of sampling these."""
    clamp: tuple[Share, Share] = (0.0, 1.0)
    """Least and largest probability of a label. [Bai et al., with thoughts: 0.4 and 0.6]"""
    batch_size: Count = 16
    """Questions that run through the model at the same time."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's parameters and of its computation."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`. By default all are along `fsdp`."""
    seed: Seed = 0
    """Seed of the principle of each pair, and of thoughts."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.clamp[0] <= 0.5 <= self.clamp[1]:
            raise ValueError(f"--clamp {self.clamp[0]} {self.clamp[1]}: 0.5 must lie between")
        sharding.parse_mesh(self.mesh)


# ------------------------------------------------------------------------------------- results


def rows_of(c: Config, pairs: Sequence[Pair], first_better: np.ndarray) -> list[dict[str, Any]]:
    """Comparisons with soft labels. Pairs that the labeler finds equal are left out."""
    rows = []
    for pair, p in zip(pairs, np.clip(first_better.mean(1), *c.clamp), strict=True):
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


def results_of(pairs: Sequence[Pair], first_better: np.ndarray) -> dict[str, Any]:
    """How the labeler's answers depend on the place, and agree with the ranks of the data.

    Returns:
      `share_a`, the mean of P(A); `decided_by_place`, the share of pairs whose answer changes with
      the order; and over the pairs that the data orders, if there are any, `agreement`, and by
      principle. A label that is even counts half.
    """
    label, (as_a, as_b) = first_better.mean(1), first_better.T
    gaps = np.array([p.record.ranks[p.second] - p.record.ranks[p.first] for p in pairs])
    agrees = np.where(label == 0.5, 0.5, (label > 0.5) == (gaps > 0))
    ordered = gaps != 0
    of_prompt = np.array([p.record.where for p in pairs])
    by_principle = {}
    for principle in dict.fromkeys(pair.principle for pair in pairs):
        chosen = ordered & np.array([pair.principle == principle for pair in pairs])
        if chosen.any():
            by_principle[principle] = statistics.mean(agrees[chosen], of_prompt[chosen])
    results = {
        "pairs": len(pairs),
        "share_a": float(np.mean([as_a, 1 - as_b])),
        "decided_by_place": float(np.mean((as_a > 0.5) != (as_b > 0.5))),
    }
    if ordered.any():
        agreement = statistics.mean(agrees[ordered], of_prompt[ordered])
        results |= {"agreement": agreement, "by_principle": by_principle}
    return results


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    checks.check_directory("--out", c.out)
    read_principles(c.principles)
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    checks.check_rows("--batch_size", c.batch_size, 1, mesh)
    pretrained.check(c.model, mesh, scalar_head=False)
    data.check(c.data, "comparisons")


def ai_feedback(c: Config) -> dict[str, Any]:
    """Labels the pairs. Returns the contents of results.json."""
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    model, params, tokenizer = pretrained.load(c.model, mesh, scalar_head=False)
    model = dataclasses.replace(model, dtype=c.model_dtype)
    records = data.read(c.data, "comparisons", tokenizer=tokenizer, render=False, ranked=False)
    pairs = ai_labeler.pairs_of(records, read_principles(c.principles), c.pairs, c.seed)
    ending = ai_labeler.THINK if c.thoughts else ai_labeler.ANSWER
    form = template.of(tokenizer, "auto", model.eos_ids)
    tokens = [len(prompt_ids(pair.question(False, ending), tokenizer, form)) for pair in pairs]
    room = model.max_length - c.thoughts - 16  # what is said before the answer, and the answer
    fitting = [pair for pair, count in zip(pairs, tokens, strict=True) if count < room]
    if len(fitting) < len(pairs):
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
        thoughts=c.thoughts,
        temperature=c.temperature,
    )
    with phase(Console(), f"labeling {len(fitting):,} pairs, each in both orders"):
        first_better = ai_labeler.label(fitting, ask, ending)
    results = results_of(fitting, first_better)
    if jax.process_index() == 0:
        c.out.mkdir(parents=True, exist_ok=True)
        rows = rows_of(c, fitting, first_better)
        if len(rows) < len(fitting):
            print(f"{len(fitting) - len(rows):,} pairs are left out: their label is even")
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        file = c.out / "comparisons.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (c.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print_results(results)
        print(f"wrote {file}, {c.out / 'results.json'}")
    return results


def print_results(results: Mapping[str, Any]) -> None:
    table = Table(show_header=False, title=f"{results['pairs']:,} pairs")
    table.add_row("mean probability of A", f"{results['share_a']:.1%}")
    table.add_row("pairs whose answer changes with the order", f"{results['decided_by_place']:.1%}")
    agreements = {}
    if "agreement" in results:
        agreements = {"all": results["agreement"], **results["by_principle"]}
    for name, estimate in agreements.items():
        shown = "{:.1%} ({:.1%} to {:.1%})".format(*estimate)
        table.add_row(f"agreement with the data's ranks: {name}", shown)
    Console().print(table)


def cli(argv: Sequence[str] | None = None) -> None:
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}

    def parse() -> Config:
        config = tyro.cli(Config, **keywords)
        return dataclasses.replace(config, out=config.out.expanduser())

    ai_feedback(usage.read(parse, check))


if __name__ == "__main__":
    main(cli)
