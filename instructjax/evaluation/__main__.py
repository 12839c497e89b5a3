r"""Runs tasks of EleutherAI's lm-evaluation-harness on a model: `pip install 'instructjax[eval]'`.

    python -m instructjax.evaluation --model runs/ppo --tasks hellaswag truthfulqa_mc2 --limit 100
    python -m instructjax.evaluation --model NAME --tasks gsm8k --num_fewshot 5 --batch_size 64
    python -m instructjax.evaluation --model runs/sft --tasks my_task --include_path my_tasks

A task is a name of the harness or a YAML file of your own below --include_path. The harness's own
tasks download their data. Results equal those of the harness's `hf` model on the same checkpoint.

Hardware: any that holds the model.
Result: a table of metrics with standard errors, and OUT/results.json, as the harness has it.
"""

# A module, not a script of experiments/: from there, tasks of the harness that import the package
# `evaluate` of Hugging Face would get evaluate.py.

import dataclasses
import difflib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from instructjax import hosts, ranges, sharding, usage
from instructjax.offload import freeze
from instructjax.ranges import Count, CountOrZero, Seed
from instructjax.run import checks, flags, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations

BOOTSTRAP = 1000  # resamples for the standard error of a metric that is no mean, such as BLEU


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model, and the tasks to run on it."""

    model: str = "runs/sft"
    """The model: a preset, a run directory, a Hugging Face directory or a hub name."""
    tokenizer: str | None = None
    """The tokenizer: a Hugging Face directory or a hub name. By default the model's own."""
    tasks: tuple[str, ...]
    """Names of tasks or groups of tasks, such as hellaswag; * and ? stand for any letters."""
    include_path: Path | None = None
    """Directory of your own tasks, as YAML files."""
    num_fewshot: CountOrZero | None = None
    """Examples before each question. By default what the task says."""
    limit: Count | None = None
    """Run this many questions of each task, the first ones. By default all."""
    apply_chat_template: bool = False
    """Put each question into the tokenizer's chat template, as a user's message."""
    batch_size: Count = 16
    """Rows that are scored, or prompts that are answered, at the same time."""
    out: Path = Path("runs/harness")
    """Directory of the results. Results of an earlier evaluation are overwritten."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""
    seed: Seed = 1234
    """Seed of the choice of examples, and of sampling in tasks that sample. The default is that of
    the harness."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.tasks:
            raise ValueError("--tasks: give at least one")
        flags.refuse_bucket("--out", self.out, "a directory on a disk")
        sharding.parse_mesh(self.mesh)


def check(config: Config) -> Any:
    """The harness's tasks, by name, once nothing speaks against the flags.

    Raises:
      ValueError, OSError: flags that cannot work. Nothing has been loaded yet.
    """
    hosts.require_equal("flags", flags.of_all_hosts(config, "harness"))
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'instructjax[eval]'")
    checks.check_directory("--out", config.out)
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    pretrained.check(config.model, mesh, tokenizer=config.tokenizer, scalar_head=False)
    if config.include_path is not None and not config.include_path.is_dir():
        raise NotADirectoryError(f"--include_path {config.include_path}: no such directory")
    return find_tasks(config)


def find_tasks(config: Config) -> Any:
    """A TaskManager that knows the tasks.

    Raises:
      ValueError: it does not know one.
    """
    from lm_eval.tasks import TaskManager

    if config.include_path is not None:
        # To read the YAML files of all tasks takes seconds.
        own = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(config.tasks) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=config.include_path)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"--tasks {name}: the harness has no such task{hint}")
    return manager


def evaluate(config: Config, manager: Any) -> dict[str, Any]:
    """Runs the tasks.

    Args:
      manager: from `check`.

    Returns:
      the contents of results.json.

    Raises:
      ValueError: --apply_chat_template, and the tokenizer has no chat template.
    """
    from lm_eval.evaluator import simple_evaluate

    from instructjax.evaluation.harness import HarnessLM

    # Its bootstrap would fork processes, which can hang where JAX has started threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    config.out.mkdir(parents=True, exist_ok=True)
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    with phase(Console(stderr=True), f"{config.model}: loading"):
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed, scalar_head=False
        )
        model = dataclasses.replace(model, dtype=config.model_dtype)
        params = freeze(params, config.model_dtype)
    if config.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(f"--apply_chat_template: {config.model} has no chat template")
    results: Any = simple_evaluate(
        model=HarnessLM(
            model, params, tokenizer, mesh, batch_size=config.batch_size, seed=config.seed
        ),
        tasks=manager.match_tasks(list(config.tasks)),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        batch_size=config.batch_size,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        fewshot_random_seed=config.seed,
    )
    results["config"] |= {"model": config.model, "flags": flags.of_all_hosts(config, "harness")}
    if jax.process_index() == 0:
        file = config.out / "results.json"
        file.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
        Console().print(table(results, config.model))
        print(f"wrote {file}")
    return results


def table(results: dict[str, Any], model: str) -> Table:
    """Metrics of tasks and groups, with standard errors.

    Args:
      results: of `lm_eval.simple_evaluate`.
    """
    drawn = Table("task", "questions", "shots", "metric", "value", "stderr", title=model)
    for name, metrics in results["results"].items():
        counts = results["n-samples"].get(name, {})
        first = [name, str(counts.get("effective", "")), str(results["n-shot"].get(name, ""))]
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric}, {chosen}"
            drawn.add_row(*first, shown, number(value), number(error))
            first = ["", "", ""]
    return drawn


def number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def cli(argv: Sequence[str] | None = None) -> None:
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}
    found: list[Any] = []

    def parse() -> Config:
        config = tyro.cli(Config, prog="python -m instructjax.evaluation", **keywords)
        return dataclasses.replace(config, out=config.out.expanduser())  # of `--out=~/run`

    config = usage.read(parse, lambda config: found.append(check(config)))
    evaluate(config, found.pop())


if __name__ == "__main__":
    main(cli)
