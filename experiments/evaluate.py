r"""Compare models by a judge on held-out prompts: win rates with intervals, at equal length too.

    python experiments/evaluate.py --models runs/sft runs/ppo                # the miniature
    python experiments/evaluate.py --models MODEL MODEL --data jsonl:prompts.jsonl \
        --gold my_file.py:my_judge --samples 4 --max_new_tokens 256

Each model answers each prompt --samples times, independently. The judge gives every response a
utility. A model wins a prompt against another as often as a response of its own has the higher
utility than one of the other's; a tie counts half. Intervals are 95 %, over prompts.

Hardware: two CPU cores suffice for the miniature.
Result: a table of win rates against the first model, OUT/results.json with those of all pairs, and
OUT/responses.jsonl with each response and its utility.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from instructjax import data, ranges, rollout, scoring, sharding, usage
from instructjax.data import DataConfig
from instructjax.evaluation import gold, policies, statistics
from instructjax.offload import freeze
from instructjax.ranges import Count, Positive, Seed
from instructjax.run import checks, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations


@dataclass(frozen=True, kw_only=True)
class Config:
    """The models to compare, the prompts and the judge."""

    models: tuple[str, ...] = ("runs/sft", "runs/ppo")
    """The models: run directories, Hugging Face directories or hub names. The table has win rates
    against the first."""
    data: DataConfig = field(default_factory=DataConfig)
    gold: tuple[str, ...] = ()
    """Judge: reward models and functions, as for --reward of run_ppo.py. Their sum is a response's
    utility. By default the miniature has its own judge; other data need one."""
    split: Literal["validation", "all"] = "validation"
    """Which prompts: those held out by --data.split_by and --data.validation, or all."""
    prompts: Count = 512
    """Number of prompts, the first of the data."""
    samples: Count = 1
    """Responses of each model to each prompt."""
    max_new_tokens: Count = 32
    """Longest response in tokens, EOS included."""
    temperature: Positive = 1.0
    """Number that logits are divided by in sampling."""
    batch_size: Count = 128
    """Responses that are sampled, or scored by a reward model, at the same time. Fewer need less
    memory, and change no token."""
    out: Path = Path("runs/evaluation")
    """Directory of the results; what an earlier comparison left there is written over."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""
    seed: Seed = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if len(set(self.models)) < max(2, len(self.models)):
            raise ValueError(f"--models {' '.join(self.models)}: give at least two, each once")
        if not self.gold and self.data.spec != "miniature":
            raise ValueError("--gold: these data have no judge of their own; name one")
        sharding.parse_mesh(self.mesh)


@dataclass(frozen=True)
class Answers:
    """A model's responses to P prompts, S to each."""

    where: Sequence[str]  # [P], which row of the data each prompt is
    prompts: Sequence[str]  # [P], as the model reads them
    texts: Sequence[Sequence[str]]  # [P][S]
    length_PS: np.ndarray  # tokens, EOS included
    ended_PS: np.ndarray  # bool
    utility_PS: np.ndarray


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    for name in config.models:
        model = pretrained.check(name, mesh, flag="--models", scalar_head=False)
        room = checks.data_tokens("--data", config.data, config.max_new_tokens)
        checks.check_tokens(model, [("--max_new_tokens", config.max_new_tokens, 1), *room])
    if config.gold:
        scoring.check(scoring.RewardConfig(config.gold), mesh, "--gold")
    data.check(config.data, "prompts")


def evaluate(config: Config) -> dict[str, Any]:
    """Compares the models. Returns the contents of results.json."""
    cache_compilations()
    config.out.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    keys = jax.random.split(jax.random.key(config.seed), len(config.models))
    answers = {
        name: answer(config, name, mesh, key) for name, key in zip(config.models, keys, strict=True)
    }
    results = compare(answers)
    if jax.process_index() == 0:
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        with (config.out / "responses.jsonl").open("w", encoding="utf-8") as file:
            for line in lines(answers):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        Console().print(table(results, config.models[0]))
        print(f"wrote {config.out}/results.json and responses.jsonl")
    return results


def answer(config: Config, name: str, mesh: Mesh, key: jax.Array) -> Answers:
    """Samples a model's responses, and judges them. One model is in memory at a time.

    Raises:
      ValueError: no prompt leaves room for a response.
    """
    P, S, R = config.prompts, config.samples, config.max_new_tokens
    with phase(Console(), f"{name}: loading"):
        model, params, tokenizer = pretrained.load(
            name, mesh, template=config.data.template, flag="--models", scalar_head=False
        )
        judge = gold.load_judge(config.gold, config.data.spec, mesh, tokenizer, config.model_dtype)
        assert judge is not None
        params = freeze(params, config.model_dtype)
        model = dataclasses.replace(model, dtype=config.model_dtype)
        read = pretrained.reader(model, tokenizer)
        context = model.max_length - R + 1
        records = read(config.data, "prompts", split=config.split, context=context)
        records = records.take(np.arange(len(records)) < P)
    prompts = [records.prompt[i].tolist() for i in range(len(records))]
    with phase(Console(), f"{name}: sampling {len(prompts) * S:,} responses"):
        sampled, _ = rollout.sample(
            params,
            model,
            prompts,
            key,
            size=max(1, config.batch_size // S),
            samples_per_prompt=S,
            max_new_tokens=R,
            temperature=config.temperature,
            mesh=mesh,
        )
    del params
    each = [prompt for prompt in prompts for _ in range(S)]
    rows = rollout.left_padded(each, max(map(len, prompts))) | sampled
    texts = tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
    run_model = functools.partial(
        rollout.map_batches, rows=rows, size=config.batch_size, buckets=[R], mesh=mesh
    )
    with phase(Console(), f"{name}: judging"):
        repeated = [record for record in records.records for _ in range(S)]
        measured = policies.measure(rows, repeated, texts, model.eos_ids, run_model, judge=judge)
    assert measured.utility_B is not None
    return Answers(
        where=[record.where for record in records.records],
        prompts=[record.prompt for record in records.records],
        texts=[texts[i : i + S] for i in range(0, len(texts), S)],
        length_PS=measured.length_B.reshape(-1, S),
        ended_PS=measured.ended_B.reshape(-1, S),
        utility_PS=measured.utility_B.reshape(-1, S),
    )


def compare(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """What results.json holds: the figures of each model, and how often each wins against another.

    Two models are compared on the prompts that both answered: one may lack room for a long prompt.
    """
    models = {
        name: {
            "prompts": len(given.where),
            "utility": statistics.mean(given.utility_PS.mean(1)),
            "length": float(given.length_PS.mean()),
            "eos_fraction": float(given.ended_PS.mean()),
        }
        for name, given in answers.items()
    }
    pairs = []
    for (name, ours), (other, theirs) in itertools.permutations(answers.items(), 2):
        place = {where: i for i, where in enumerate(theirs.where)}
        both = [(i, place[where]) for i, where in enumerate(ours.where) if where in place]
        if not both:
            raise ValueError(f"--models {name} and {other}: no prompt has room in both")
        a, b = np.array(both).T
        won_P = statistics.wins(ours.utility_PS[a], theirs.utility_PS[b])
        longer_P = ours.length_PS[a].mean(1) - theirs.length_PS[b].mean(1)
        pairs.append(
            {
                "model": name,
                "against": other,
                "prompts": len(both),
                "win_rate": statistics.mean(won_P),
                "win_rate_at_equal_length": statistics.length_controlled(won_P, longer_P),
            }
        )
    return {"models": models, "pairs": pairs}


def lines(answers: Mapping[str, Answers]) -> Iterator[dict[str, Any]]:
    """The lines of responses.jsonl."""
    for name, given in answers.items():
        for i, prompt in enumerate(given.prompts):
            for text, utility in zip(given.texts[i], given.utility_PS[i], strict=True):
                line = {"model": name, "prompt": prompt, "response": text}
                yield line | {"utility": float(utility), "where": given.where[i]}


def table(results: Mapping[str, Any], first: str) -> Table:
    """`compare` on the terminal, against the first model."""
    against = {pair["model"]: pair for pair in results["pairs"] if pair["against"] == first}
    prompts = results["models"][first]["prompts"]
    drawn = Table(title=f"against {first}, by the judge, on {prompts:,} prompts")
    drawn.add_column("", overflow="fold")
    for title in ("utility", "length", "ends", "wins", "at equal length"):
        drawn.add_column(title, justify="right", no_wrap=True)
    for name, model in results["models"].items():
        cells = ["{:+.2f}\n{:+.2f} to {:+.2f}".format(*model["utility"])]
        cells += [f"{model['length']:.1f}", f"{model['eos_fraction']:.1%}"]
        for key in ("win_rate", "win_rate_at_equal_length"):
            if name in against:
                cells.append("{:.1%}\n{:.1%} to {:.1%}".format(*against[name][key]))
        drawn.add_row(name, *cells)
    return drawn


def cli(argv: Sequence[str] | None = None) -> None:
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}
    evaluate(usage.read(lambda: tyro.cli(Config, **keywords), check))


if __name__ == "__main__":
    main(cli)
