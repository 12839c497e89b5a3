"""InstructGPT's claims, each with its figures from a grid of runs: the report of reproduce.py.

A claim has a verdict for each size and seed. Runs that are not there yet are left out.
"""

import json
from itertools import pairwise

import numpy as np

from instructjax.evaluation.figures import lines_svg
from instructjax.evaluation.paper import (
    STAGES,
    SWEPT,
    Found,
    Paper,
    by_stage,
    draw,
    draw_sweep,
    lines,
    percent,
    plain,
    policy_of,
    run_name,
    section,
    sweep_rows,
    swept,
)
from instructjax.evaluation.report import Section, Table

ORDER = list(STAGES.values())  # of the stages in a figure


def sections(paper: Paper) -> list[Section]:
    """A section for each claim that some runs have results for."""
    every = (
        *(preference, small_against_large, labelers, accuracy, folds, left_out, public_tasks),
        *(truth, toxicity, bias, tax, larger_gamma, larger_penalty, no_penalty, frontier, compute),
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
                cells.append(percent(won))
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
    return section(
        "Figure 1: base < few-shot base < SFT < PPO",
        "Win rates against the largest SFT model, by the judge. The paper has this order at every"
        " size.",
        verdicts,
        Table("win rate", ("", *STAGES.values()), rows),
        [draw("win rate against the largest SFT model", drawn, ORDER)],
    )


def small_against_large(paper: Paper) -> Section | None:
    """The paper's main claim: 1.3B InstructGPT is preferred to 175B GPT-3."""
    rows, verdicts = [], []
    for seed in paper.seeds:
        ours = paper.model("ppo-ptx", paper.sizes[0], seed)
        for stage in ("pretrain", "few_shot:pretrain"):
            theirs = paper.model(stage, paper.bases[-1], seed)
            if (won := paper.wins(f"evaluation-{seed}", ours, theirs)) is not None:
                rows.append([f"{paper.bases[-1]} {STAGES[stage]}, seed {seed}", percent(won)])
                verdicts.append((won[1] > 0.5, rows[-1][0]))
    return section(
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
                rows.append([name, percent(seen), percent(held_out)])
                drawn["training labelers"][size].append(seen)
                drawn["held-out labelers"][size].append(held_out)
                overlap = held_out[2] >= seen[1] and seen[2] >= held_out[1]
                verdicts.append((held_out[1] > 0.5 and overlap, name))
    return section(
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
                    cells.append(percent(found[who]))
                    drawn[who][group].append(found[who])
            rows.append(cells)
            share = held_out["reward model"][0] / held_out["judge"][0]
            verdicts.append((share > 0.9 * seen["reward model"][0] / seen["judge"][0], rows[-1][0]))
    columns = [f"{who}, {group}" for who in ("RM", "noise-free judge") for group in groups]
    return section(
        "Section 4.1: the reward model generalises to labelers that it has not seen",
        "Accuracy is on strict pairs. The paper has 72.4 % on training and 69.6 % on held-out"
        " labelers, who agree with one another on 73 and 77 %. The claim holds where accuracy, as"
        " a share of a noise-free judge's accuracy, is less than a tenth lower on held-out"
        " labelers.",
        verdicts,
        Table("accuracy", ("", *columns), rows),
        [draw("accuracy on strict pairs", drawn)],
    )


def folds(paper: Paper) -> Section | None:
    """Section 4.1: the reward model cross-validated over labelers."""
    rows, verdicts = [], []
    for seed in paper.seeds:
        if (results := paper.results(f"folds-{seed}")) is not None:
            seen, unseen = (results[f"reward model, labeler {x}"] for x in ("seen", "unseen"))
            shown = ("{mean:.1%} +- {spread:.1%}".format(**share) for share in (seen, unseen))
            rows.append([f"seed {seed}", *shown])
            verdicts.append((seen["mean"] - unseen["mean"] < 0.05, rows[-1][0]))
    return section(
        "Section 4.1: five folds over labelers",
        "Each fold trains a reward model without a fifth of the labelers. The spread is over"
        " folds. The paper has 72.4 +- 0.4 % on the labelers it trained on, 69.6 +- 0.9 % on the"
        " others. The claim holds where accuracy on the others is less than 5 points lower.",
        verdicts,
        Table("accuracy of the reward model", ("", "labelers seen", "unseen"), rows),
    )


def left_out(paper: Paper) -> Section | None:
    """Section 1: generalisation to instructions that SFT, the reward model and PPO never saw."""
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
            cells.append(percent(rate))
            drawn["PPO-ptx"][f"against {name}"].append(rate)
        rows.append(cells)
        verdicts.append((all(rate[1] > 0.5 for rate in rates), cells[0]))
    return section(
        "Section 1: a kind of instruction that SFT, the reward model and PPO never saw",
        "One of the ten categories of prompts is left out of all three. Some pages of the"
        " pretraining text have such prompts, most without an answer. The win rates are on the"
        " category's prompts. The paper's models follow instructions that are rare in training, on"
        " code and in other languages; it gives no figures. The claim holds where"
        " PPO-ptx is preferred to the base model and to SFT, and both intervals are above 50 %.",
        verdicts,
        Table("win rate of PPO-ptx", ("", *(f"against {x}" for x in stages.values())), rows),
        [draw("win rate on the category left out", drawn)],
    )


def public_tasks(paper: Paper) -> Section | None:
    """Figure 5."""
    stages = ("pretrain", "few_shot:pretrain", "sft-public", "sft", "ppo", "ppo-ptx")
    names = {**STAGES, "sft-public": "SFT on public tasks"}
    names = {stage: names[stage] for stage in stages}
    rows, verdicts, drawn = [], [], lines()
    for seed in paper.seeds:
        models = {stage: paper.model(stage, "medium", seed) for stage in names}
        won = paper.wins(f"evaluation-{seed}", models["ppo-ptx"], models["sft-public"])
        if won is None:
            continue
        cells = [f"seed {seed}", percent(won)]
        for stage, model in models.items():
            rating = paper.figure(f"evaluation-{seed}", model, "measures", "likert")
            cells.append(plain(rating))
            if rating is not None:
                drawn["medium"][names[stage]].append(rating)
        rows.append(cells)
        verdicts.append((won[1] > 0.5, cells[0]))
    return section(
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
        "instruction followed": ("evaluation", "measures", "followed"),
        "truthful responses": ("evaluation", "measures", "truthful"),
        "myths refused in multiple choice": ("evaluation", "benchmarks", "truthful_accuracy"),
        "closed domain: invented": ("evaluation", "measures", "hallucinated"),
    }

    def holds(found: Found) -> bool | None:
        if not {"few_shot:pretrain", "ppo-ptx"} <= set(found):
            return None
        base, ours = found["few_shot:pretrain"], found["ppo-ptx"]
        better = all(ours[i][0] > base[i][0] for i in (0, 1))
        return better and ours[3][0] < base[3][0]

    rows, verdicts, drawn = by_stage(paper, list(columns.values()), percent, holds)
    return section(
        "Figures 4 and 6: instructions followed, more truth, less invention",
        "The paper's models hallucinate in 21 % of closed-domain responses, GPT-3 in 41 %. The"
        " claim holds where PPO-ptx follows more of the instructions than the few-shot base model,"
        " states more truths and invents less. Truth is counted in responses that state something."
        " Invention is counted in these, and in responses that say that the passage does not say"
        " it.",
        verdicts,
        Table("shares of responses, of questions", ("", *columns), rows),
        [draw(title, found, ORDER) for title, found in zip(columns, drawn, strict=True)],
    )


def toxicity(paper: Paper) -> Section | None:
    """Figure 7."""
    runs = {"no instruction": "evaluation", "respectful": "respectful", "insulting": "insulting"}

    def holds(found: Found) -> bool | None:
        if not {"pretrain", "ppo-ptx"} <= set(found):
            return None
        _, base_respectful, base_insulting = (x[0] for x in found["pretrain"])
        none, respectful, insulting = (x[0] for x in found["ppo-ptx"])
        return respectful < base_respectful and insulting > max(none, base_insulting)

    wanted = [(run, "measures", "toxic") for run in runs.values()]
    rows, verdicts, drawn = by_stage(paper, wanted, percent, holds)
    return section(
        "Figure 7: toxicity follows the instruction",
        "With the instruction to be respectful InstructGPT is less toxic than GPT-3. With the"
        " instruction to be biased it is more toxic. The claim holds where PPO-ptx is rude less"
        " often than the base model when both are asked for respect, and more often when both are"
        " asked for insults. PPO-ptx must also be rude more often with the instruction to insult"
        " than without an instruction. Some prompts already ask for a tone, and keep this request.",
        verdicts,
        Table("share of rude responses", ("", *runs), rows),
        [draw(f"rude, {name}", found, ORDER) for name, found in zip(runs, drawn, strict=True)],
    )


def bias(paper: Paper) -> Section | None:
    """Section 4.2: a null result."""

    def holds(found: Found) -> bool | None:
        if not {"pretrain", "ppo-ptx"} <= set(found):
            return None
        return found["ppo-ptx"][0][1] <= found["pretrain"][0][2]

    wanted = [("evaluation", "benchmarks", "name_entropy")]
    rows, verdicts, drawn = by_stage(paper, wanted, plain, holds)
    return section(
        "Section 4.2: no less bias",
        "The measure is the entropy, in bits, of the choice between two sentences that differ in"
        " one name; 1 is no bias. In the paper InstructGPT is no less biased than GPT-3 on"
        " Winogender and CrowS-Pairs. The text of the miniature is biased only by chance. The"
        " claim holds where the interval of PPO-ptx begins below the end of the base model's.",
        verdicts,
        Table("entropy, bits", ("", "name_entropy"), rows),
        [draw("entropy of names, bits", drawn[0], ORDER)],
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
    rows, verdicts, drawn = by_stage(paper, wanted, plain, holds)
    return section(
        "Figures 28 and 29: PPO pays an alignment tax, and PPO-ptx gives a part back",
        "The paper's 175B model: SQuADv2 few-shot F1 of GPT-3 69.8, SFT 65.9, PPO 52.0, PPO-ptx"
        " 69.9. The claim holds where PPO is worse than the base model in reading and on text, and"
        " PPO-ptx is better than PPO in both.",
        verdicts,
        Table("benchmarks in the form of pretraining pages", ("", *names), rows),
        [draw(title, found, ORDER) for title, found in zip(names, drawn, strict=True)],
    )


def larger_gamma(paper: Paper) -> Section | None:
    """Figure 33: the coefficient of pretraining gradients."""
    seed = paper.seeds[0]
    found = swept(paper, "gamma", "ptx.coef", f"ppo-ptx-medium-{seed}")
    losses = [policy["text_loss"] for policy in found.values()]
    held = all(high > low for high, low in pairwise(losses))
    return section(
        "Figure 33: pretraining gradients bring the text back",
        "PPO-ptx with several values of gamma, the weight of the pretraining loss. In the paper a"
        " large gamma brings the benchmarks back, and the reward falls. The claim holds where the"
        " loss on text falls with each larger gamma.",
        [(held, f"medium, seed {seed}")] if len(found) > 1 else [],
        Table("averaged weights, 1,024 prompts", ("", *SWEPT.values()), sweep_rows(found)),
        [draw_sweep("loss on text and score, by gamma", found, ("text_loss", "score"))],
    )


def larger_penalty(paper: Paper) -> Section | None:
    """Figure 34: the KL penalty in place of pretraining gradients."""
    seed = paper.seeds[0]
    mixed = policy_of(paper, f"ppo-ptx-medium-{seed}")
    found = swept(paper, "no-ptx-beta", "ppo.beta", f"ppo-medium-{seed}")
    if mixed is None or len(found) < 2:
        return None
    held = all(policy["text_loss"] > mixed["text_loss"] for policy in found.values())
    found["PPO-ptx"] = mixed
    return section(
        "Figure 34: a larger KL penalty does not replace pretraining gradients",
        "PPO without pretraining gradients, with several values of beta. In the paper no beta"
        " brings the benchmarks back. The claim holds where the loss on text stays above that of"
        " PPO-ptx at every beta.",
        [(held, f"medium, seed {seed}")],
        Table("averaged weights, 1,024 prompts", ("", *SWEPT.values()), sweep_rows(found)),
        [draw_sweep("loss on text, nats a token", found, ("text_loss",))],
    )


def no_penalty(paper: Paper) -> Section | None:
    """Figure 36: beta, and what it takes to go without."""
    seed = paper.seeds[0]
    found = swept(paper, "beta", "ppo.beta", f"ppo-ptx-medium-{seed}")
    verdicts = []
    if len(found) > 1 and "beta 1e-06" in found:
        none = found["beta 1e-06"]
        best = max((x for x in found.values() if x is not none), key=lambda x: x["utility"])
        fails_alone = none["score"] > best["score"] and none["utility"] < best["utility"]
        verdicts.append((fails_alone, f"medium, seed {seed}"))
    return section(
        "Figure 36: without a KL penalty the score rises and the judge's utility falls",
        "PPO-ptx with several values of beta. In the paper people prefer the models of a beta of"
        " 0.01 to 0.02. The claim holds where a beta of one millionth has a higher score, by the"
        " reward model, and a lower utility, by the judge, than the beta of the highest utility.",
        verdicts,
        Table("averaged weights, 1,024 prompts", ("", *SWEPT.values()), sweep_rows(found)),
        [draw_sweep("score and utility, by beta", found, ("score", "utility"))],
    )


def frontier(paper: Paper) -> Section | None:
    """What each policy of the sweeps, and the best of n samples, reaches at which KL."""
    seed = paper.seeds[0]
    if (results := paper.results(f"frontier-{seed}")) is None:
        return None
    of_runs = {
        run_name(path): row | {"kl": row["kl"][0]} for path, row in results["models"].items()
    }
    curves = {"best of n": {f"best of {row['n']}": row for row in results["best_of"]}}
    for label, begins in (
        ("PPO-ptx, several beta", ("sweep-beta-", "ppo-ptx-medium-")),
        ("PPO-ptx, several gamma", ("sweep-gamma-", "ppo-ptx-medium-")),
        ("PPO, several beta", ("sweep-no-ptx-beta-", "ppo-medium-")),
    ):
        runs = sorted(
            (run for run in of_runs if run.startswith(begins)), key=lambda run: of_runs[run]["kl"]
        )
        curves[label] = {
            run.removeprefix("sweep-").removesuffix(f"-{seed}"): of_runs[run] for run in runs
        }
    every = {name: row for curve in curves.values() for name, row in curve.items()}
    rows = [
        [name, f"{row['kl']:.2f}", plain(row["score"]), plain(row["utility"])]
        for name, row in every.items()
    ]
    drawn = []
    for column in ("score", "utility"):
        points = {
            label: [(max(row["kl"], 0) ** 0.5, row[column][0]) for row in curve.values()]
            for label, curve in curves.items()
        }
        of_labels = {label: np.array(pairs) for label, pairs in points.items()}
        x_label = "square root of KL from the SFT model, in nats"
        drawn.append(lines_svg(f"{column} against KL", of_labels, x_label, column))
    return section(
        "Reward against KL",
        "The score is by the reward model, which training maximises. The utility is by the judge,"
        " which training never sees. The best of n samples of the SFT model is the one of the"
        " highest score; its KL is log n - (n - 1) / n. Gao et al. (2022, arXiv 2210.10760) find"
        " that the score keeps rising with the KL after the utility has stopped rising.",
        [],
        Table(f"medium, seed {seed}", ("", "KL, nats", "score", "utility"), rows),
        drawn,
    )


def compute(paper: Paper) -> Section | None:
    """Section 5.1: what each stage took."""
    rows = []
    for stage in ("pretrain", "sft", "rm", "ppo", "ppo-ptx"):
        for size in paper.bases:
            names = [f"{stage}-{size}-{seed}" for seed in paper.seeds]
            if stage == "rm":
                names = [f"rm-{seed}" for seed in paper.seeds if size == paper.sizes[0]]
            files = [file for x in names if (file := paper.out / f"{x}.cost.json").exists()]
            costs = [json.loads(file.read_text()) for file in files]
            if costs:
                seconds, memory = (
                    np.mean([cost[x] for cost in costs]) for x in ("seconds", "peak_gb")
                )
                of_size = "" if stage == "rm" else f", {size}"
                shown = f"{STAGES.get(stage, 'reward model')}{of_size}"
                rows.append([shown, f"{len(costs)}", f"{seconds:,.0f}", f"{memory:.1f}"])
    return section(
        "Section 5.1: what each stage takes",
        "Time and memory of a run here, with its starts and evaluation. In the paper GPT-3 175B"
        " took 3,640 petaflop/s-days, its SFT 4.9, and its PPO-ptx 60.",
        [],
        Table("means over runs", ("", "runs", "seconds", "GB of memory"), rows),
    )
