"""Policies on held-out prompts: scores, KL, lengths, and win rates against one another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from instructjax import rollout, scoring
from instructjax.data import Record
from instructjax.evaluation import gold, report, statistics
from instructjax.evaluation.figures import plot_curves
from instructjax.run import Run
from instructjax.train import Batch

# Beyond these an evaluation warns that the reward may be wrong about the responses [ours].
LENGTH_RATIO = 1.5  # of mean lengths, in either direction
DISAGREEMENT_RATIO = 2.0  # of an ensemble of reward models
KL = 10.0  # nats a response

_EVALUATED = ("step", *(f"validation/{name}" for name in ("score", "kl", "length", "utility")))


@dataclass(frozen=True)
class Sampled:
    """One policy's responses to some prompts, and what was measured on them."""

    prompts: Sequence[str]  # as the model reads them, for the files
    turns: Sequence[str]  # the last user turn of each, for the terminal
    texts: Sequence[str]
    length_B: np.ndarray  # tokens, EOS included
    ended_B: np.ndarray  # bool, whether a response ends in EOS
    score_B: np.ndarray | None = None  # the reward; None where nothing is sampled in training
    kl_B: np.ndarray | None = None  # nats, k1 summed over a response; None without a reference
    utility_B: np.ndarray | None = None  # by the gold judge; see `gold.load_judge`
    text_loss: float | None = None  # the policy's loss on held-out pretraining text, nats a token
    disagreement: float | None = None  # of several reward models; see `scoring.Rewards.score`

    def means(self) -> dict[str, float]:
        """The mean of each per-response figure, by name."""
        figures = {
            "score": self.score_B,
            "kl": self.kl_B,
            "length": self.length_B,
            "eos_fraction": self.ended_B,
            "utility": self.utility_B,
        }
        return {k: float(np.mean(values)) for k, values in figures.items() if values is not None}


def measure(
    rows: Batch,
    records: Sequence[Record],
    texts: Sequence[str],
    eos_ids: Sequence[int],
    run_model: gold.RunModel,
    *,
    reward: scoring.Rewards | None = None,
    judge: gold.Judge | None = None,
    kl_B: np.ndarray | None = None,
    text_loss: float | None = None,
) -> Sampled:
    """Measures responses to held-out prompts.

    Args:
      rows, records, texts: of the rollout.
      eos_ids: the model's ids that end a response.
      run_model: runs a function of a batch on all rows; see `scoring.Rewards.score`.
      reward, judge: what gives the score and the utility, if anything does.
      kl_B, text_loss: as in `Sampled`.
    """
    prompts = [record.prompt for record in records]
    score_B, terms = None, {}
    if reward is not None:
        score_B, terms = reward.score(run_model, prompts, texts, records)
    return Sampled(
        prompts=prompts,
        turns=[last_turn(record) for record in records],
        texts=texts,
        length_B=rows["mask_BR"].sum(1),
        ended_B=rollout.ended(rows, eos_ids),
        score_B=score_B,
        kl_B=kl_B,
        utility_B=None if judge is None else judge(run_model, records, texts),
        text_loss=text_loss,
        disagreement=terms.get("disagreement"),
    )


def last_turn(record: Record) -> str:
    """What the user said last, without a chat template. A prompt that is no dialogue is it all."""
    return record.messages[-1]["content"] if record.messages else record.prompt


def log(run: Run, step: int, before: Sampled, now: Sampled) -> None:
    """Logs an evaluation to metrics.jsonl and samples.jsonl, and prints a few responses."""
    metrics = {f"validation/{name}": mean for name, mean in now.means().items()}
    if now.text_loss is not None:
        metrics["ptx/validation_loss"] = now.text_loss
    if now.disagreement is not None:
        metrics["validation/disagreement"] = now.disagreement
    if now.utility_B is not None and before.utility_B is not None:
        same_prompts = before.utility_B[: len(now.utility_B)]
        metrics["validation/win_rate"] = statistics.win_rate(now.utility_B, same_prompts).value
    run.log(step, metrics)
    for i, prompt in enumerate(now.prompts[:4]):
        score = {} if now.score_B is None else {"score": float(now.score_B[i])}
        run.metrics.sample(step, {"prompt": prompt, "response": now.texts[i], **score})
    run.console.print(samples_table(f"iteration {step:,}", before, now))
    for sign in drift(before, now):
        run.console.print(f"warning: iteration {step:,}: {sign}")


def drift(before: Sampled, now: Sampled) -> list[str]:
    """What says that responses have left those that reward models were trained on.

    A reward model is right about responses like those that people compared. Further away its score
    goes on rising while the responses get worse (Gao et al. 2022, arXiv 2210.10760).

    Args:
      before: of the policy at the start, with the prompts of `now` first. Lengths are compared on
        these prompts, disagreement on all that each has.
      now: of the policy in training.
    """
    signs = []
    length, length_before = now.length_B.mean(), before.length_B[: len(now.length_B)].mean()
    if not 1 / LENGTH_RATIO <= length / length_before <= LENGTH_RATIO:
        signs.append(f"responses have {length:.1f} tokens, and had {length_before:.1f}")
    if now.kl_B is not None and (kl := now.kl_B.mean()) > KL:
        signs.append(f"the KL from the reference is {kl:.1f} nats a response")
    if now.disagreement and before.disagreement:
        ratio = now.disagreement / before.disagreement
        if ratio > DISAGREEMENT_RATIO:
            signs.append(f"the reward models disagree {ratio:.1f} times as much as at the start")
    if signs:
        signs[-1] += ". The reward may be wrong about such responses: read some"
    return signs


def results(sampled: Mapping[str, Sampled]) -> dict[str, Any]:
    """What results.json holds of policies by name. Win rates are against the first of them, by
    `statistics.win_rate` and by `statistics.length_controlled`."""
    base, rows = next(iter(sampled.values())), {}
    for name, policy in sampled.items():
        row: dict[str, Any] = policy.means()
        if policy.score_B is not None:
            row["score_interval"] = statistics.mean(policy.score_B)[1:]
        if policy is not base and policy.utility_B is not None and base.utility_B is not None:
            row["win_rate"] = statistics.win_rate(policy.utility_B, base.utility_B)
            won_B = statistics.wins(policy.utility_B, base.utility_B)
            longer_B = policy.length_B - base.length_B
            row["win_rate_at_equal_length"] = statistics.length_controlled(won_B, longer_B)
        if policy.text_loss is not None:
            row["text_loss"] = policy.text_loss
        rows[name] = row
    return rows


def evaluations(metrics: Path) -> list[dict[str, float]]:
    """What `log` wrote to a metrics.jsonl: step, score, kl, length, utility of each evaluation."""
    with metrics.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        {name.removeprefix("validation/"): x for name, x in row.items() if name in _EVALUATED}
        for row in rows
        if "validation/length" in row
    ]


def finish(
    run: Run,
    sampled: Mapping[str, Sampled],
    seconds: float,
    panels: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Writes results.json, samples_after.jsonl, curves.png and report.html; prints the results.

    Args:
      sampled: policies by name, the one that training began with first.
      panels: what curves.png shows; see `plot_curves`.

    Returns:
      the contents of results.json.
    """
    rows, base = results(sampled) | {"seconds": seconds}, next(iter(sampled.values()))
    if jax.process_index() != 0:
        return rows
    out = run.out
    rows["evaluations"] = evaluations(out / "metrics.jsonl")
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    with (out / "samples_after.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(base.prompts):
            line = {"prompt": prompt} | {name: x.texts[i] for name, x in sampled.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    plot_curves(out, panels, out / "curves.png")
    report.write_for(out)
    shown = table({name: rows[name] for name in sampled}, len(base.prompts))
    names = "metrics.jsonl samples.jsonl samples_after.jsonl results.json curves.png report.html"
    next_command = f"python experiments/sample.py --model {out}"
    wrote = [out / name for name in (*names.split(), "adapter", "export") if (out / name).exists()]
    run.finish({"seconds": seconds}, wrote, next_command, tables=[shown])
    return rows


def table(rows: Mapping[str, Any], prompts: int) -> Table:
    """`results` on the terminal, a column for each policy: so many figures fit no row of 80."""
    figures = {  # key of a policy's figures -> (title, format)
        "score": ("score", "{:+.2f}\n({:+.2f} to {:+.2f})"),
        "kl": ("KL, nats", "{:.2f}"),
        "length": ("length, tokens", "{:.1f}"),
        "eos_fraction": ("ends", "{:.1%}"),
        "utility": ("gold utility", "{:+.2f}"),
        "win_rate": ("win rate by gold", "{:.1%}\n({:.1%} to {:.1%})"),
        "win_rate_at_equal_length": ("at equal length", "{:.1%}\n({:.1%} to {:.1%})"),
        "text_loss": ("text loss", "{:.3f}"),
    }
    drawn = Table("", title=f"on {prompts:,} held-out prompts, one response each")
    for name in rows:
        drawn.add_column(name, justify="right")
    for key, (title, form) in figures.items():
        cells = []
        for row in rows.values():
            value = (row[key], *row["score_interval"]) if key == "score" in row else row.get(key)
            cells.append("" if value is None else form.format(*np.atleast_1d(value)))
        if any(cells):
            drawn.add_row(title, *cells)
    return drawn


def samples_table(title: str, before: Sampled, now: Sampled, count: int = 3) -> Table:
    """A few last user turns, each with its response before training and now, and their scores."""

    def shown(policy: Sampled, i: int) -> str:
        text = policy.texts[i].strip()
        return text if policy.score_B is None else f"{text}  [{policy.score_B[i]:+.2f}]"

    drawn = Table(title=title, show_lines=True, expand=True)
    for name, ratio in (("prompt", 3), ("before", 4), ("now", 4)):
        drawn.add_column(name, ratio=ratio, overflow="fold")
    for i in range(min(count, len(now.texts))):
        drawn.add_row(*map(escape, (now.turns[i].strip(), shown(before, i), shown(now, i))))
    return drawn
