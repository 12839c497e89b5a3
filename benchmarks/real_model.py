"""Aligns a real pretrained chat model on real human data: the runs of docs/real-model.md.

    python benchmarks/real_model.py --model MODEL --data DATA --jobs 2       # on two CPU cores
    python benchmarks/real_model.py --model MODEL --data DATA --size full    # on a GPU
    python benchmarks/real_model.py --model MODEL --data DATA --runs oasst-rm oasst-ppo
    python benchmarks/real_model.py --model MODEL --data DATA --dry_run      # prints the commands

MODEL is SmolLM2-135M-Instruct or another chat model. DATA is a folder with the data sets e2e_nlg,
flagged_licence/e2e_human_ratings, oasst_100_trees, hh_harmless_base_test, dolly_hh_small,
p3_t0_subset and wikitext2_raw. Each run is a command of experiments/. A finished run is not
repeated, and a stopped run continues.

    e2e-rm         reward models on human ratings of restaurant descriptions, K = 5, for each seed
    e2e-folds      the same, each without a third of the labelers
    e2e-sft        a policy from demonstrations of the same task
    e2e-ppo        PPO-ptx from e2e-sft against e2e-rm, with WikiText-2 as text
    oasst-rm       reward models on halves A and B of OASST's ranked replies; B is the gold judge
    oasst-dpo      DPO on half A, judged by B
    oasst-ppo      PPO on other prompts of OASST against A, judged by B
    short-sft      a policy from demonstrations of at most 48 tokens
    one-sentence   PPO from short-sft against a Python function: one sentence, which ends
    oasst-short-ppo    as oasst-ppo, from one-sentence, most of whose responses end
    oasst-best-of-n    the best of up to 16 samples of one-sentence by A, judged by B
    oasst-raft     RAFT from one-sentence against A, judged by B
    public-sft     a policy from P3's public tasks, the data of T0
    public         oasst-short-ppo against public-sft, judged by B, as in the paper's Figure 5
    hh-rm          a reward model on pairs of hh-rlhf, harmless-base, for each seed

Hardware: `--size small` takes an hour or two a run on one CPU core of 130 GFLOP/s; `full` is for a
GPU, where it has not been run.
Result: OUT/NAME for each run, and results.json in --results (or OUT) with the figures of all runs,
which are printed too. With --results a run whose results are there is repeated only if another
needs its model.
"""

import gzip
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich
import tyro
from rich.table import Table

from instructjax.data import files
from instructjax.evaluation.grid import Grid, GridConfig, Job
from instructjax.ranges import Seed

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """Runs on a real model."""

    model: str
    """The chat model to align: a Hugging Face directory."""
    data: Path
    """The folder of data sets."""
    out: Path | None = Path("runs/real")
    """The folder of the runs."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the reward models of e2e-rm and hh-rm."""
    size: Literal["small", "full"] = "small"
    """`small` is cut to what a CPU can do; `full` takes all data and computes in bfloat16."""


# ---------------------------------------------------------------------------- the runs


def grid(c: Config) -> Grid:
    """The runs."""
    full, out = c.size == "full", c.directory

    def cut(value: Any) -> dict[str, Any]:
        """--steps of the small size."""
        return {} if full else {"steps": value}

    compute = {"model_dtype": "bfloat16", "remat": "none"} if full else {"remat": "dots"}
    compute |= {"save_every": 10, "keep_last": 1}
    ratings = {
        **{"data": f"jsonl:{c.data}/flagged_licence/e2e_human_ratings/e2e_quality_k5.csv.gz"},
        "data.columns": "prompt={mr}\\n,responses=" + "+".join(f"ref{i}" for i in range(1, 6))
        + ",scores=" + "+".join(f"quality{i}" for i in range(1, 6)) + ",labeler=worker",
        **{"data.on_error": "skip", "data.validation": 0.25},
    }  # fmt: skip
    inputs = {"data": f"jsonl:{c.data}/e2e_nlg/devset.csv.gz"}
    halves = {half: f"jsonl:{out}/data/oasst-{half}.jsonl" for half in "ab"}
    lottery = {"data": f"jsonl:{c.data}/oasst_100_trees/prompt_lottery_en_250_text.jsonl.gz"}
    lottery |= {"data.validation": 0.25, "data.max_prompt": 128}
    rm = {"length": 512, "batch_size": 4, "microbatches": 1 if full else 2, **compute}
    # A row of 512 tokens holds a prompt and two responses of these lengths.
    short = {"data.max_prompt": 192, "data.max_response": 160, "data.overlong": "truncate"}
    ppo = {
        **{"batch_size": 128 if full else 32, "ppo.minibatch": 32, "ppo.epochs": 1},
        **{"ppo.microbatches": 1 if full else 4, "ppo.learning_rate": 1e-5},
        **{"ppo.value_learning_rate": 2e-5, "ppo.warmup": 4, "eval_prompts": 32, **compute},
        **{"final_prompts": 256 if full else 64, "eval_every": 10},
    }
    of_model = {"model": c.model}
    every: dict[str, Job] = {}

    for seed in c.seeds:
        flags = {**of_model, **ratings, **rm, "learning_rate": 4e-5, "seed": seed}
        every[f"e2e-rm-{seed}"] = Job("run_rm.py", flags)
    folds = {"folds": 3, "by": "labeler", "learning_rate": 4e-5, **cut(70)}
    every["e2e-folds"] = Job("run_rm.py", {**of_model, **ratings, **rm, **folds})

    demonstrations = {**inputs, "data.columns": "prompt={mr}\\n,completion=ref"}
    sft = {"length": 512, "batch_size": 8, "microbatches": 1 if full else 4, **compute}
    sft |= {"learning_rate": 5e-5, "epochs": 1, "max_new_tokens": 80, **cut(40)}
    every["e2e-sft"] = Job("run_sft.py", {**of_model, **demonstrations, **sft})
    text = {"pretrain": f"jsonl:{c.data}/wikitext2_raw/*.txt.gz", "ptx.length": 128}
    text |= {"ptx.coef": 0.1, "ptx.ratio": 1, "ptx.microbatches": 1 if full else 4}
    each_input = {**inputs, "data.columns": "prompt={mr}\\n", "data.dedup": 1000}
    exploits = {"ppo.missing_eos": "fixed", "ppo.missing_eos_value": -4, "ppo.beta": 0.1}
    first = c.seeds[0]
    every["e2e-ppo"] = Job(
        "run_ppo.py",
        {"model": out / "e2e-sft", "reward": out / f"e2e-rm-{first}", **each_input, **text}
        | ppo | exploits | {"max_new_tokens": 80, "steps": 100 if full else 30},
        needs=("e2e-sft", f"e2e-rm-{first}"),
    )  # fmt: skip

    for half, other in (("a", "b"), ("b", "a")):
        on = {"data": halves[half], "data.validation": halves[other]}
        flags = {**of_model, **on, **rm, "length": 2048, "batch_size": 2, "learning_rate": 2e-5}
        every[f"oasst-rm-{half}"] = Job("run_rm.py", {**flags, "epochs": 2 if full else 1})
    gold = {"gold": out / "oasst-rm-b"}
    dpo = {"learning_rate": 5e-6, "batch_size": 8, "microbatches": 1 if full else 4, **compute}
    dpo |= {"steps": 40 if full else 10, "max_new_tokens": 96, "eval_prompts": 64}
    every["oasst-dpo"] = Job(
        "swap_loss.py",
        {
            **of_model,
            "data": f"jsonl:{out}/data/oasst-a-pairs.jsonl",
            **short,
            **dpo,
            **gold,
        }
        | {"data.validation": 0.25},
        needs=("oasst-rm-b",),
        positional=("dpo",),
    )
    every["oasst-ppo"] = Job(
        "run_ppo.py",
        {**of_model, "reward": out / "oasst-rm-a", **gold, **lottery, **ppo, "ptx.coef": 0}
        | {"max_new_tokens": 96, "steps": 100 if full else 30, "ppo.missing_eos": "none"},
        needs=("oasst-rm-a", "oasst-rm-b"),
    )
    brief = {"data": f"jsonl:{c.data}/dolly_hh_small/*.jsonl.gz"}
    brief |= {"data.max_prompt": 128, "data.max_response": 48}
    every["short-sft"] = Job("run_sft.py", {**of_model, **brief, **sft, "steps": 16})
    function = {"reward": f"{Path(__file__).resolve()}:one_sentence", "ptx.coef": 0, "steps": 40}
    every["one-sentence"] = Job(
        "run_ppo.py",
        {"model": out / "short-sft", **lottery, **ppo, **function, "max_new_tokens": 64},
        needs=("short-sft",),
    )
    # Most of its responses end. Reward models score cut ones arbitrarily.
    start = out / "one-sentence"
    proxy = {"reward": out / "oasst-rm-a", **gold, **lottery, "max_new_tokens": 64}
    dtype = {"model_dtype": compute.get("model_dtype", "float32")}
    needs = ("one-sentence", "oasst-rm-a", "oasst-rm-b")
    every["oasst-short-ppo"] = Job(
        "run_ppo.py",
        {"model": start, **proxy, **ppo, "ptx.coef": 0, "ppo.missing_eos": "penalty"}
        | {"steps": 100 if full else 30},
        needs=needs,
    )
    every["oasst-best-of-n"] = Job(
        "evaluate.py",
        {"models": start, **proxy, **dtype}
        | {"samples": 16, "best_of": (1, 2, 4, 8, 16), "prompts": 64, "batch_size": 32},
        needs=needs,
        resumes=False,
    )
    every["oasst-raft"] = Job(
        "swap_loss.py",
        {"model": start, **proxy, **compute}
        | {"samples": 16, "batch_size": 8, "steps": 64 if full else 10, "learning_rate": 1e-5}
        | {"microbatches": 1 if full else 4, "eval_prompts": 64},
        needs=needs,
        positional=("raft",),
    )

    tasks = {"data": f"jsonl:{c.data}/p3_t0_subset/*.jsonl.gz", "data.max_response": 96}
    every["public-sft"] = Job("run_sft.py", {**of_model, **tasks, **sft})
    models = ("oasst-short-ppo", "public-sft")
    compared = {"models": [out / name for name in models], "prompts": 256, "batch_size": 32}
    compared |= {"max_new_tokens": 64, **dtype}
    every["public"] = Job(
        "evaluate.py",
        {**compared, **lottery, **gold},
        needs=(*models, "oasst-rm-b"),
        resumes=False,
    )

    pairs = {"data": f"jsonl:{c.data}/hh_harmless_base_test/*.jsonl.gz", "data.on_error": "skip"}
    for seed in c.seeds:
        flags = {
            **of_model,
            **pairs,
            **short,
            **rm,
            "learning_rate": 2e-5,
            "seed": seed,
            **cut(120),
        }
        every[f"hh-rm-{seed}"] = Job("run_rm.py", flags)

    here = f"{Path(__file__).resolve().parents[1]}/"
    places = {c.model: "MODEL", f"{c.data}": "DATA", here: ""}
    return Grid(out, every, EXPERIMENTS, c.results_directory, places)


def one_sentence(prompts: Sequence[str], responses: Sequence[str], records: Any) -> list[float]:
    """1 for a response that is one sentence and stops there, less 0.5 for each sentence more.

    A response without a closing mark, such as one that was cut, gets -1.
    """
    scores = []
    for response in responses:
        text = response.strip()
        sentences = len(re.findall(r"[.!?](?=\s|$)", text))
        closed = text.endswith((".", "!", "?"))
        scores.append(1 - 0.5 * min(sentences - 1, 4) if closed else -1.0)
    return scores


# ---------------------------------------------------------------------------- data


def write_halves(c: Config) -> None:
    """OASST's trees in two halves, and the first half as pairs of the best and the worst reply."""
    out = c.directory / "data"
    out.mkdir(parents=True, exist_ok=True)
    source = c.data / "oasst_100_trees" / "en_100_tree.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        trees = [json.loads(line) for line in lines]
    for half, start in (("a", 0), ("b", 1)):
        with (out / f"oasst-{half}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(tree) + "\n" for tree in trees[start::2])
    with (out / "oasst-a-pairs.jsonl").open("w", encoding="utf-8") as file:
        for tree in trees[0::2]:
            file.writelines(json.dumps(pair) + "\n" for pair in best_and_worst([tree["prompt"]]))


def best_and_worst(turns: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A comparison of the best and the worst ranked reply below each message of a tree.

    Args:
      turns: messages from the tree's root to the one whose replies are read.
    """
    replies = turns[-1]["replies"]
    ranked = sorted((r for r in replies if r.get("rank") is not None), key=lambda r: r["rank"])
    if len(ranked) > 1 and turns[-1]["role"] == "prompter":
        roles = {"prompter": "user", "assistant": "assistant"}
        prompt = [{"role": roles[t["role"]], "content": t["text"]} for t in turns]
        yield {"prompt": prompt, "chosen": ranked[0]["text"], "rejected": ranked[-1]["text"]}
    for reply in replies:
        yield from best_and_worst([*turns, reply])


# ---------------------------------------------------------------------------- results


def overlaps(c: Config, name: str) -> dict[str, tuple[float, float]]:
    """F1 of words and of word pairs with the closest human reference, by policy of an E2E run."""
    references = defaultdict(list)
    for _, row in files.read_files(f"{c.data}/e2e_nlg/devset.csv.gz", "file"):
        references[row["mr"]].append(row["ref"])
    lines = (c.directory / name / "samples_after.jsonl").read_text().splitlines()
    shares = defaultdict(list)
    for sample in map(json.loads, lines):
        prompt = sample.pop("prompt")
        closest = references[next(line for line in prompt.split("\n") if line in references)]
        for policy, text in sample.items():
            shares[policy].append([max(f1(text, x, n) for x in closest) for n in (1, 2)])
    return {policy: tuple(np.mean(of_texts, 0).tolist()) for policy, of_texts in shares.items()}


def f1(text: str, reference: str, n: int) -> float:
    """F1 of the words (n = 1) or word pairs (n = 2) of two texts."""
    words = (re.findall(r"\w+", x.lower()) for x in (text, reference))
    ours, theirs = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in words)
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


def report(c: Config, runs: Grid) -> None:
    """Prints the figures of all runs that have finished, and writes them to OUT/results.json."""
    figures: dict[str, Any] = {}
    for name in filter(runs.has_results, runs.jobs):
        of_run = c.results_directory / name / "results.json"
        metrics = c.directory / name / "metrics.jsonl"
        results: dict[str, Any] = {}
        if of_run.exists():
            results = json.loads(of_run.read_text())
        elif metrics.exists():  # of SFT
            results = {"last step": json.loads(metrics.read_text().splitlines()[-1])}
        if "best_of" in results:  # of evaluate.py
            results = {f"best of {row['n']}": row for row in results["best_of"]}
        elif "pairs" in results:
            results = {
                f"{Path(pair['model']).name} against {Path(pair['against']).name}": {
                    key: pair[key] for key in ("win_rate", "win_rate_at_equal_length")
                }
                for pair in results["pairs"]
            }
        cost = json.loads((c.results_directory / f"{name}.cost.json").read_text())
        figures[name] = results | {key: x for key, x in cost.items() if key != "flags"}
        if name == "e2e-ppo" and runs.has_finished(name):
            for policy, shares in overlaps(c, name).items():
                figures[name][policy] |= dict(zip(("word_f1", "pair_f1"), shares, strict=True))
    written = c.results_directory / "results.json"
    if written.exists():  # some figures are of files that another machine has
        earlier = json.loads(written.read_text())
        figures = {name: earlier.get(name, {}) | x for name, x in figures.items()}
    written.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table("run", "of", "figures", title=f"{written}")
    for name, results in figures.items():
        rows = results.get("accuracy", results)
        rows = {label: row for label, row in rows.items() if isinstance(row, dict)}
        for label, row in rows.items():
            shown = ", ".join(f"{key} {rounded(value)}" for key, value in row.items())
            table.add_row(name, label, shown)
            name = ""
    rich.print(table)


def rounded(value: Any) -> str:
    numbers = np.atleast_1d(value).tolist()
    return " ".join(f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in numbers)


def main(c: Config) -> None:
    runs = grid(c)
    try:
        names = runs.chosen(c.runs)
        runs.check(c.runs)
        if c.dry_run:
            runs.print_commands(names)
            return
        for directory in (c.directory, c.results_directory):
            directory.mkdir(parents=True, exist_ok=True)
        if any(name.startswith("oasst") for name in runs.needed(names)):
            write_halves(c)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    unfinished = runs.make(names, c.jobs)
    report(c, runs)
    if unfinished:
        sys.exit(f"error: not finished: {', '.join(unfinished)}; the same command goes on")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
