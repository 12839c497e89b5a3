r"""Compares our model and lm-evaluation-harness's `hf` on one checkpoint, on tasks of local files.

    python benchmarks/harness_vs_hf.py --model MODEL --data DATA --limit 200
    python benchmarks/harness_vs_hf.py --model MODEL --data DATA --tasks copa texts --limit 20

MODEL is a Hugging Face directory, such as the export of a run. DATA is a folder with the data sets
eval_multiple_choice and crows_pairs. The tasks are written to OUT/tasks, where
`python -m instructjax.evaluation --include_path OUT/tasks` finds them too.

    copa, openbook_qa, arc_easy, boolq   multiple choice
    winograd_wsc                         one end of a sentence after each of two beginnings
    crows_pairs                          pairs of sentences: is the stereotype likelier?
    lambada                              whether greedy decoding ends a passage with its last word
    texts                                log-likelihood of passages, rolling
    endings                              the passages again, answered by up to 8 new tokens

Hardware: two CPU cores, with a model of 135M parameters. Needs the extras `eval` and `test`.
Result: a table, and OUT/results.json: metrics of both, the largest differences, and seconds.
"""

import ast
import csv
import gzip
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import rich
import tyro
import yaml
from rich.table import Table

from instructjax import hf, ranges, sharding
from instructjax.ranges import Count
from instructjax.run.process import cache_compilations

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}
ENDING = {"doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}"}
TASKS: dict[str, dict[str, Any]] = {
    "copa": CHOICE,
    "openbook_qa": CHOICE,
    "arc_easy": CHOICE,
    "boolq": CHOICE,
    "winograd_wsc": {
        **CHOICE,
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
    "crows_pairs": {**CHOICE, "doc_to_text": "", "target_delimiter": ""},
    "lambada": {
        **ENDING,
        "output_type": "loglikelihood",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}} {{continuation}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "endings": {
        **ENDING,
        "output_type": "generate_until",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}
FILES = {"lambada": "lambada_openai", "texts": "lambada_openai", "endings": "lambada_openai"}


@dataclass(frozen=True)
class Config:
    """Tasks on two models of one checkpoint."""

    model: str
    """The checkpoint: a Hugging Face directory."""
    data: Path
    """The folder of data sets."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which of the tasks."""
    limit: Count = 200
    """Questions of each task, the first ones."""
    batch_size: Count = 8
    """Rows of a batch, of both models."""
    hf_dtype: Literal["float32", "float64"] = "float32"
    """Dtype of `hf`. In float64 it shows the error of ours."""
    out: Path = Path("runs/harness_vs_hf")
    """The folder of tasks and results."""

    def __post_init__(self) -> None:
        ranges.check(self)


def records(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """The questions of a task, with the fields that its YAML reads."""
    if name == "crows_pairs":
        with gzip.open(data / "crows_pairs/crows_pairs_anonymized.csv.gz", "rt") as file:
            for row in csv.DictReader(file):
                yield {"choices": [row["sent_more"], row["sent_less"]], "gold": 0}
        return
    path = data / "eval_multiple_choice" / f"{FILES.get(name, name)}.jsonl.gz"
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            for key, value in row.items():
                if isinstance(value, str) and key in ("choices", "context_options", "gold"):
                    row[key] = ast.literal_eval(value)  # lists as Python writes them
            yield row


def write_tasks(config: Config) -> Path:
    """Writes each task's questions and YAML, and returns their folder."""
    folder = (config.out / "tasks").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.tasks:
        lines = [json.dumps(row) + "\n" for row in records(config.data, name)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        source = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        source |= {"cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source}
        task |= {"test_split": "test", "num_fewshot": 0} | TASKS[name]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def run(config: Config, lm: Any, manager: Any, name: str) -> dict[str, Any]:
    """{metric, value, stderr, seconds, answers}: what the model said to each request."""
    from lm_eval.evaluator import simple_evaluate

    begin = time.perf_counter()
    results: Any = simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, limit=config.limit, bootstrap_iters=1000
    )
    seconds = time.perf_counter() - begin
    metric = TASKS[name]["metric_list"][0]["metric"]
    found = results["results"][name]
    answers = [resp[0] for sample in results["samples"][name] for resp in sample["resps"]]
    return {
        "value": found[f"{metric},none"],
        "stderr": found[f"{metric}_stderr,none"],
        "items": len(results["samples"][name]),
        "seconds": seconds,
        "answers": answers,
    }


def difference(a: list[Any], b: list[Any]) -> dict[str, float]:
    """The largest difference of log-likelihoods, and how many other answers differ.

    `nats` is that of a request, `relative` that divided by the log-likelihood.
    """
    if isinstance(a[0], str):
        return {"texts": sum(x != y for x, y in zip(a, b, strict=True))}
    differ = {}
    if isinstance(a[0], tuple):  # with whether it is greedy
        differ["greedy"] = sum(x[1] != y[1] for x, y in zip(a, b, strict=True))
        a, b = [x[0] for x in a], [x[0] for x in b]
    nats = [(abs(x - y), abs(y)) for x, y in zip(a, b, strict=True)]
    return {"nats": max(d for d, _ in nats), "relative": max(d / y for d, y in nats)} | differ


def main(config: Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    cache_compilations()
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    from instructjax.evaluation.harness import HarnessLM

    manager = TaskManager(include_path=write_tasks(config), include_defaults=False)
    mesh = sharding.make_mesh(devices=jax.devices())
    params: Any
    model, params = hf.load(config.model, mesh)
    tokenizer = hf.load_tokenizer(config.model)
    ours = HarnessLM(model, params, tokenizer, mesh, batch_size=config.batch_size)
    settings = {"device": "cpu", "dtype": config.hf_dtype, "batch_size": config.batch_size}
    make: Any = huggingface.HFLM  # its decorator hides its type
    theirs = make(pretrained=config.model, **settings)
    results: dict[str, Any] = {}
    table = Table("task", "items", "metric", "ours", "hf", "difference", "seconds: ours", "hf")
    for name in config.tasks:
        sides = {
            "ours": run(config, ours, manager, name),
            "hf": run(config, theirs, manager, name),
        }
        answers = [side.pop("answers") for side in sides.values()]
        differ = difference(*answers)
        results[name] = {**sides, "difference": differ, "requests": len(answers[0])}
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        metric = TASKS[name]["metric_list"][0]["metric"]
        shown = [f"{side['value']:.4f}" for side in sides.values()]
        seconds = [f"{side['seconds']:.0f}" for side in sides.values()]
        said = ", ".join(f"{key} {value:.2g}" for key, value in differ.items())
        table.add_row(name, str(sides["hf"]["items"]), metric, *shown, said, *seconds)
        print(f"{name}: {shown}, {said}, seconds {seconds}", flush=True)
    rich.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
