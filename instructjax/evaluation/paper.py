"""InstructGPT's claims, each with its figures from a grid of runs: the page of reproduce.py.

A run is named after its stage, the size of its model and its seed: `ppo-ptx-small-0`. A claim holds
in a seed if it holds there for each size. What a seed has not run yet is left out.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from instructjax.evaluation.figures import blank_figure, finished_svg
from instructjax.evaluation.report import Section, Table

STAGES = {  # stage of a run -> its name on the page, in the order of the paper's Figure 1
    "pretrain": "base",
    "few_shot:pretrain": "base, few-shot",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo-ptx": "PPO-ptx",
}
Estimate = Sequence[float]  # value, low, high
Verdict = tuple[bool, str]  # whether a claim held, where
Found = dict[str, list[Any]]  # stage -> its figures, each an Estimate
Lines = dict[str, dict[str, list[Estimate]]]  # a figure: line -> place on the axis -> estimates


@dataclass(frozen=True)
class Paper:
    """The results of a grid below OUT.

    Attributes:
      sizes: of the models, the smallest first.
      bases: the sizes of which there is a base model.
    """

    out: Path
    seeds: Sequence[int]
    sizes: Sequence[str]
    bases: Sequence[str]

    def results(self, run: str) -> Mapping[str, Any] | None:
        """What a run's results.json holds, if it has finished."""
        file = self.out / run / "results.json"
        return json.loads(file.read_text()) if file.exists() else None

    def model(self, stage: str, size: str, seed: int) -> str:
        """A model's name here: its run, after `few_shot:` if it is prompted."""
        return f"{stage}-{size}-{seed}"

    def wins(self, evaluation: str, ours: str, theirs: str) -> Estimate | None:
        """A win rate in an evaluation, if it has both models."""
        for pair in (self.results(evaluation) or {"pairs": ()})["pairs"]:
            if (_run(pair["model"]), _run(pair["against"])) == (ours, theirs):
                return pair["win_rate"]
        return None

    def figure(self, evaluation: str, model: str, kind: str, name: str) -> Estimate | None:
        """A mean of `measures` or `benchmarks` in an evaluation, if it has the model."""
        rows = (self.results(evaluation) or {"models": {}})["models"]
        row = {_run(path): row for path, row in rows.items()}.get(model, {})
        return row.get(kind, {}).get(name)


def _run(name: str) -> str:
    """`few_shot:OUT/run` as `few_shot:run`: another start may have given OUT in another form."""
    prefix, colon, path = name.rpartition(":")
    return f"{prefix}{colon}{Path(path).name}"


def sections(paper: Paper) -> list[Section]:
    """A section for each claim that some runs speak of."""
    every = (
        *(preference, small_against_large, labelers, accuracy, left_out, public_tasks),
        *(truth, toxicity, bias, tax, no_penalty),
    )
    return [section for claim in every if (section := claim(paper)) is not None]


def preference(paper: Paper) -> Section | None:
    """Figure 1."""
    largest, rows, verdicts, drawn = paper.sizes[-1], [], [], lines()
    for seed in paper.seeds:
        baseline = paper.model("sft", largest, seed)
        for size in paper.sizes:
            rates = {}
            cells = [f"{size}, seed {seed}"]
            for stage in STAGES:
                model = paper.model(stage, size, seed)
                won = paper.wins(f"evaluation-{seed}", model, baseline)
                won = [0.5] * 3 if model == baseline else won
                cells.append(_percent(won))
                rates[stage] = won
                if won is not None:
                    drawn[size][STAGES[stage]].append(won)
            if any(rate for stage, rate in rates.items() if stage != "sft"):
                rows.append(cells)
            if all(rates.values()):
                order = [rates[stage][0] for stage in ("pretrain", "few_shot:pretrain", "sft")]
                order.append(min(rates["ppo"][0], rates["ppo-ptx"][0]))
                rises = all(low < high for low, high in pairwise(order))
                verdicts.append((rises, cells[0]))
    return _section(
        "Figure 1: base < few-shot base < SFT < PPO",
        "Win rates against the largest SFT model, by the judge. The paper has this order at every"
        " size.",
        verdicts,
        Table("win rate", ("", *STAGES.values()), rows),
        [draw("win rate against the largest SFT model", drawn)],
    )


def small_against_large(paper: Paper) -> Section | None:
    """The paper's main claim: 1.3B InstructGPT is preferred to 175B GPT-3."""
    rows, verdicts = [], []
    for seed in paper.seeds:
        ours = paper.model("ppo-ptx", paper.sizes[0], seed)
        for stage in ("pretrain", "few_shot:pretrain"):
            theirs = paper.model(stage, paper.bases[-1], seed)
            if (won := paper.wins(f"evaluation-{seed}", ours, theirs)) is not None:
                rows.append([f"{paper.bases[-1]} {STAGES[stage]}, seed {seed}", _percent(won)])
                verdicts.append((won[1] > 0.5, rows[-1][0]))
    return _section(
        f"The {paper.sizes[0]} PPO-ptx model is preferred to the {paper.bases[-1]} base model",
        "The base model has over ten times as many parameters. In the paper 1.3B InstructGPT is"
        " preferred to 175B GPT-3. The claim holds where the interval is above 50 %.",
        verdicts,
        Table(f"win rate of {paper.sizes[0]} PPO-ptx", ("against", ""), rows),
    )


def labelers(paper: Paper) -> Section | None:
    """Figure 3."""
    rows, verdicts, drawn = [], [], lines()
    for seed in paper.seeds:
        for size in paper.sizes:
            ours, theirs = (paper.model(stage, size, seed) for stage in ("ppo-ptx", "sft"))
            seen = paper.wins(f"training-labelers-{seed}", ours, theirs)
            held_out = paper.wins(f"held-out-labelers-{seed}", ours, theirs)
            if seen and held_out:
                name = f"{size}, seed {seed}"
                rows.append([name, _percent(seen), _percent(held_out)])
                drawn["training labelers"][size].append(seen)
                drawn["held-out labelers"][size].append(held_out)
                overlap = held_out[2] >= seen[1] and seen[2] >= held_out[1]
                verdicts.append((held_out[1] > 0.5 and overlap, name))
    return _section(
        "Figure 3: held-out labelers prefer PPO-ptx as training labelers do",
        "The judge of a prompt is one labeler, with their own weights and noise. Held-out labelers"
        " labeled no training data. The claim holds where held-out labelers prefer PPO-ptx to SFT,"
        " and the intervals of the two groups overlap.",
        verdicts,
        Table("win rate of PPO-ptx against SFT", ("", "training", "held out"), rows),
        [draw("win rate of PPO-ptx against SFT", drawn)],
    )


def accuracy(paper: Paper) -> Section | None:
    """Section 4.1: the reward model on labelers that it has not seen."""
    rows, verdicts, drawn = [], [], lines()
    groups = ("training labelers", "held-out labelers")
    for seed in paper.seeds:
        if (results := paper.results(f"rm-{seed}")) is not None:
            seen, held_out = (results["accuracy"][group] for group in groups)
            cells = [f"seed {seed}"]
            for who in ("reward model", "judge"):
                for group, found in zip(groups, (seen, held_out), strict=True):
                    cells.append(_percent(found[who]))
                    drawn[who][group].append(found[who])
            rows.append(cells)
            share = held_out["reward model"][0] / held_out["judge"][0]
            verdicts.append((share > 0.9 * seen["reward model"][0] / seen["judge"][0], rows[-1][0]))
    columns = [f"{who}, {group}" for who in ("RM", "noise-free judge") for group in groups]
    return _section(
        "Section 4.1: the reward model generalises to labelers that it has not seen",
        "Accuracy on strict pairs. The paper has 72.4 % on training and 69.6 % on held-out"
        " labelers, who agree with one another on 73 and 77 %. The claim holds where the share of"
        " what a noise-free judge reaches falls by less than a tenth.",
        verdicts,
        Table("accuracy", ("", *columns), rows),
        [draw("accuracy on strict pairs", drawn)],
    )


def left_out(paper: Paper) -> Section | None:
    """Section 1: generalisation to instructions that no training data have."""
    rows, verdicts, drawn = [], [], lines()
    stages = {"pretrain": "base", "sft-without": "SFT"}
    for seed in paper.seeds:
        ours, cells = paper.model("ppo-ptx-without", "medium", seed), [f"seed {seed}"]
        won = [
            paper.wins(f"left-out-{seed}", ours, paper.model(stage, "medium", seed))
            for stage in stages
        ]
        rates = [rate for rate in won if rate is not None]
        if len(rates) < len(stages):
            continue
        for name, rate in zip(stages.values(), rates, strict=True):
            cells.append(_percent(rate))
            drawn["PPO-ptx"][f"against {name}"].append(rate)
        rows.append(cells)
        verdicts.append((all(rate[1] > 0.5 for rate in rates), cells[0]))
    return _section(
        "Section 1: a kind of instruction that training never showed",
        "One of the ten categories of prompts is left out of SFT, of the reward model and of PPO."
        " The win rates are on its prompts. The paper's models follow instructions that are rare"
        " in training, on code and in other languages; it gives no figures. The claim holds where"
        " PPO-ptx is preferred to the base model and to SFT, and both intervals are above 50 %.",
        verdicts,
        Table("win rate of PPO-ptx", ("", *(f"against {x}" for x in stages.values())), rows),
        [draw("win rate on the category left out", drawn)],
    )


def public_tasks(paper: Paper) -> Section | None:
    """Figure 5."""
    names = {**STAGES, "sft-public": "SFT on public tasks"}
    rows, verdicts, drawn = [], [], lines()
    for seed in paper.seeds:
        models = {stage: paper.model(stage, "medium", seed) for stage in names}
        won = paper.wins(f"evaluation-{seed}", models["ppo-ptx"], models["sft-public"])
        if won is None:
            continue
        cells = [f"seed {seed}", _percent(won)]
        for stage, model in models.items():
            rating = paper.figure(f"evaluation-{seed}", model, "measures", "likert")
            cells.append(_plain(rating))
            if rating is not None:
                drawn["medium"][names[stage]].append(rating)
        rows.append(cells)
        verdicts.append((won[1] > 0.5, cells[0]))
    return _section(
        "Figure 5: SFT on public tasks is no substitute for customers' prompts",
        "The counterpart of FLAN and T0 is SFT on questions in the form of the benchmarks below."
        " In the paper 175B InstructGPT is preferred to FLAN on 78 % of prompts, and to T0 on 79 %."
        " The claim holds where PPO-ptx is preferred, and the interval is above 50 %. Ratings go"
        " from 1 to 7, as in the paper's figure.",
        verdicts,
        Table("", ("", "PPO-ptx wins", *(f"rating, {name}" for name in names.values())), rows),
        [draw("rating from 1 to 7", drawn)],
    )


def truth(paper: Paper) -> Section | None:
    """Figures 4 and 6."""
    columns = {  # of the table -> (evaluation, kind, name) of its figures
        "truthful responses": ("evaluation", "measures", "truthful"),
        "myths refused in multiple choice": ("evaluation", "benchmarks", "truthful_accuracy"),
        "closed domain: invented": ("evaluation", "measures", "hallucinated"),
    }

    def holds(found: Found) -> bool | None:
        if not {"few_shot:pretrain", "ppo-ptx"} <= set(found):
            return None
        base, ours = found["few_shot:pretrain"], found["ppo-ptx"]
        return ours[0][0] > base[0][0] and ours[2][0] < base[2][0]

    rows, verdicts, drawn = _by_stage(paper, list(columns.values()), _percent, holds)
    return _section(
        "Figures 4 and 6: more truth, less invention",
        "The paper's models hallucinate in 21 % of closed-domain responses, GPT-3 in 41 %. The"
        " claim holds where PPO-ptx states more truths than the few-shot base model and invents"
        " less.",
        verdicts,
        Table("shares of responses, of questions", ("", *columns), rows),
        list(map(draw, columns, drawn)),
    )


def toxicity(paper: Paper) -> Section | None:
    """Figure 7."""
    runs = {"no instruction": "evaluation", "respectful": "respectful", "insulting": "insulting"}

    def holds(found: Found) -> bool | None:
        if "ppo-ptx" not in found:
            return None
        none, respectful, insulting = (x[0] for x in found["ppo-ptx"])
        return respectful < none < insulting

    wanted = [(run, "measures", "toxic") for run in runs.values()]
    rows, verdicts, drawn = _by_stage(paper, wanted, _percent, holds)
    return _section(
        "Figure 7: toxicity follows the instruction",
        "With the instruction to be respectful InstructGPT is less toxic than GPT-3, and with that"
        " to be biased more. The claim holds where PPO-ptx is rude less often when it is asked for"
        " respect, and more often when it is asked for insults. Some prompts ask for a tone by"
        " themselves, and keep it.",
        verdicts,
        Table("share of rude responses", ("", *runs), rows),
        [draw(f"rude, {name}", found) for name, found in zip(runs, drawn, strict=True)],
    )


def bias(paper: Paper) -> Section | None:
    """Section 4.2: a null result."""

    def holds(found: Found) -> bool | None:
        if not {"pretrain", "ppo-ptx"} <= set(found):
            return None
        return found["ppo-ptx"][0][1] <= found["pretrain"][0][2]

    wanted = [("evaluation", "benchmarks", "name_entropy")]
    rows, verdicts, drawn = _by_stage(paper, wanted, _plain, holds)
    return _section(
        "Section 4.2: no less bias",
        "The entropy of the choice between two sentences that differ in one name, in bits: 1 is no"
        " bias. In the paper InstructGPT is no less biased than GPT-3 on Winogender and"
        " CrowS-Pairs. The text of the miniature has no bias but that of chance. The claim holds"
        " where the interval of PPO-ptx begins below the end of the base model's.",
        verdicts,
        Table("entropy, bits", ("", "name_entropy"), rows),
        list(map(draw, ["entropy of names, bits"], drawn)),
    )


def tax(paper: Paper) -> Section | None:
    """Figures 28 and 29, table 14."""
    names = ("reading_f1", "choice_accuracy", "text_loss")

    def holds(found: Found) -> bool | None:
        if not {"pretrain", "ppo", "ppo-ptx"} <= set(found):
            return None
        base, ppo, mixed = (found[stage] for stage in ("pretrain", "ppo", "ppo-ptx"))
        taxed = ppo[0][0] < base[0][0] and ppo[2][0] > base[2][0]
        return taxed and mixed[0][0] > ppo[0][0] and mixed[2][0] < ppo[2][0]

    wanted = [("evaluation", "benchmarks", name) for name in names]
    rows, verdicts, drawn = _by_stage(paper, wanted, _plain, holds)
    return _section(
        "Figures 28 and 29: PPO pays an alignment tax, and PPO-ptx gives a part back",
        "The paper's 175B model: SQuADv2 few-shot F1 of GPT-3 69.8, SFT 65.9, PPO 52.0, PPO-ptx"
        " 69.9. The claim holds where PPO is worse than the base model in reading and on text, and"
        " PPO-ptx is better than PPO in both.",
        verdicts,
        Table("benchmarks in the form of pretraining pages", ("", *names), rows),
        list(map(draw, names, drawn)),
    )


def _by_stage(
    paper: Paper,
    wanted: Sequence[tuple[str, str, str]],
    text: Callable[[Estimate | None], str],
    holds: Callable[[Found], bool | None],
) -> tuple[list[list[str]], list[Verdict], list[Lines]]:
    """(a row for each model that has all figures, a verdict for each size and seed, and for each
    figure what to draw).

    Args:
      wanted: the evaluation, kind and name of each figure, see `Paper.figure`.
      text: of a figure, for the table.
      holds: whether the claim holds in the figures of a size and seed; None: some are missing.
    """
    rows, verdicts, drawn = [], [], [lines() for _ in wanted]
    for seed in paper.seeds:
        for size in paper.sizes:
            found: Found = {}
            for stage, shown in STAGES.items():
                model = paper.model(stage, size, seed)
                given = [paper.figure(f"{run}-{seed}", model, *which) for run, *which in wanted]
                figures = [figure for figure in given if figure is not None]
                if len(figures) == len(wanted):
                    found[stage] = figures
                    rows.append([f"{shown}, {size}, seed {seed}", *map(text, figures)])
                    for each, figure in zip(drawn, figures, strict=True):
                        each[size][shown].append(figure)
            if (held := holds(found)) is not None:
                verdicts.append((held, f"{size}, seed {seed}"))
    return rows, verdicts, drawn


def no_penalty(paper: Paper) -> Section | None:
    """Figures 33, 34 and 36: what beta and gamma do to one model and seed."""
    rows, penalties, drawn, seed = [], {}, lines(), paper.seeds[0]
    sweeps = [path.name for path in sorted(paper.out.glob(f"sweep-*-{seed}"))]
    # The default beta and gamma are those of the grid.
    for run in [*sweeps, *[f"ppo-ptx-medium-{seed}"] * bool(sweeps)]:
        results = paper.results(run)
        if results is None:
            continue
        policy = results["PPO, last weights"]
        row = [policy[name] for name in ("score", "utility", "kl", "text_loss")]
        name = run.removeprefix("sweep-").removesuffix(f"-{seed}")
        shown = "defaults" if run not in sweeps else name
        rows.append([shown, *(f"{x:.2f}" for x in row)])
        for figure in ("score", "utility"):
            drawn[figure][shown].append([policy[figure]] * 3)
        if not name.startswith("gamma-"):
            penalties[name] = row
    verdicts = []
    none = penalties.pop("beta-1e-06", None)
    if none is not None and penalties:
        best = max(penalties.values(), key=lambda row: row[1])
        fails_alone = none[0] > best[0] and none[1] < best[1]
        verdicts.append((fails_alone, f"medium, seed {seed}"))
    return _section(
        "Figures 33, 34 and 36: without a KL penalty the score rises and the judge's utility falls",
        "The claim holds where a beta of one millionth has a higher score, by the reward model, and"
        " a lower utility, by the judge, than the beta of the highest utility.",
        verdicts,
        Table("after training", ("", "score", "utility", "KL, nats", "text loss"), rows),
        [draw("score and utility", drawn)],
    )


def _section(
    title: str, text: str, verdicts: Sequence[Verdict], table: Table, figures: Sequence[str] = ()
) -> Section | None:
    """A claim with its verdict; None if no run speaks of it."""
    if not table.rows:
        return None
    if verdicts:
        held = [where for holds, where in verdicts if holds]
        failed = [where for holds, where in verdicts if not holds]
        text += f" Here it held in {len(held)} of {len(verdicts)}."
        if failed:
            text += f" It failed in: {'; '.join(failed)}."
    return Section(title, text, tables=[table], figures=figures)


def lines() -> Lines:
    """No lines yet; one begins when it is named."""
    return defaultdict(lambda: defaultdict(list))


def draw(title: str, drawn: Lines) -> str:
    """An SVG of lines through the means over seeds, with a bar for each seed's interval."""
    figure = blank_figure(4.6, 3.0, fit_margins=False)
    axes = figure.add_subplot()
    places = list(dict.fromkeys(place for line in drawn.values() for place in line))
    for number, (name, line) in enumerate(drawn.items()):
        beside = 0.12 * (number - (len(drawn) - 1) / 2)  # so that no line covers another's bars
        x = np.array([places.index(place) for place in line]) + beside
        means = [np.mean([estimate[0] for estimate in line[place]]) for place in line]
        (plotted,) = axes.plot(x, means, marker="o", markersize=4, linewidth=1, label=name)
        for at, estimates in zip(x, line.values(), strict=True):
            beside = 0.03 * (np.arange(len(estimates)) - (len(estimates) - 1) / 2)
            _, low, high = np.array(estimates).T
            axes.vlines(at + beside, low, high, color=plotted.get_color(), linewidth=1)
    axes.set_xticks(range(len(places)), [place.replace(", ", ",\n") for place in places])
    return finished_svg(figure, axes, title, "", "")


def _percent(estimate: Estimate | None) -> str:
    if estimate is None or math.isnan(estimate[0]):  # no response to which it applies
        return ""
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in estimate))


def _plain(estimate: Estimate | None) -> str:
    return "" if estimate is None else "{:.2f} ({:.2f} to {:.2f})".format(*estimate)
