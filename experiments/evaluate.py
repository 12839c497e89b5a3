r"""Compares models by a judge on held-out prompts: win rates with intervals, at equal length too.

    python experiments/evaluate.py --models runs/sft runs/ppo                # the miniature
    python experiments/evaluate.py --models MODEL MODEL --data jsonl:prompts.jsonl \
        --gold my_file.py:my_judge --samples 4 --max_new_tokens 256
    python experiments/evaluate.py --models runs/sft runs/ppo --reference runs/sft \
        --reward runs/rm --samples 16 --best_of 1 2 4 8 16                   # reward against KL
    python experiments/evaluate.py --models runs/pretrain few_shot:runs/pretrain runs/ppo \
        --benchmarks 512                                                 # and the alignment tax
    python experiments/evaluate.py --labels rankings.jsonl                   # what labelers said
    python experiments/evaluate.py --models runs/sft --split train --samples 4 --comparisons \
        --gold my_file.py:my_judge --data jsonl:prompts.jsonl       # comparisons, for run_rm.py

Each model answers each prompt --samples times, independently. The judge gives every response a
utility. A model's win rate against another on a prompt is the share of pairs of their responses in
which its own has the higher utility; a tie counts half. Intervals are 95 %, over prompts.

A line of --labels is `{"prompt": "...", "models": ["sft", "ppo"], "ranks": [2, 1]}`: who wrote each
response, and its rank (1 is best, equal ranks are ties). `scores` may replace `ranks`, such as
Likert scores of 1 to 7; their means are reported too.

Hardware: two CPU cores suffice for the miniature.
Result: a table of win rates against the first model; OUT/results.json with those of all pairs,
OUT/responses.jsonl with each response and its utility, with --best_of or --reference
OUT/frontier.png, and with --comparisons OUT/comparisons.jsonl.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from instructjax import data, hosts, miniature, ranges, rollout, scoring, sharding, usage
from instructjax.data import DataConfig, Record
from instructjax.evaluation import comparison, figures, gold, policies, tax
from instructjax.models import ModelConfig, Params
from instructjax.offload import freeze
from instructjax.ranges import Count, Positive, Seed
from instructjax.run import checks, flags, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations
from instructjax.scoring import RewardConfig
from instructjax.train import Batch

FEW_SHOT = "few_shot:"  # before a model's name
RESPONSES, COMPARISONS = "responses.jsonl", "comparisons.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The models to compare, the prompts and the judge."""

    models: tuple[str, ...] = ("runs/sft", "runs/ppo")
    """The models: run directories, Hugging Face directories or hub names. The table has win rates
    against the first. `few_shot:MODEL` puts --shots demonstrations before each prompt, for base
    models; its answer ends at the end of the line."""
    demonstrations: DataConfig = field(default_factory=lambda: DataConfig(spec=""))
    """Demonstrations for few_shot:MODEL. By default the miniature's, with its data."""
    shots: Count = 3
    """Number of demonstrations before a prompt, from the start of --demonstrations."""
    labels: Path | None = None
    """File of rankings by labelers, in the form above. Wins are counted from it, and no model is
    loaded."""
    data: DataConfig = field(default_factory=DataConfig)
    gold: tuple[str, ...] = ()
    """Judge: reward models and functions, as for --reward of run_ppo.py. Their sum is a response's
    utility. By default the miniature has its own judge; other data need one."""
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(()))
    """Proxy: the reward that training maximised, as for --reward of run_ppo.py. Each response gets
    this score beside its utility, and --best_of chooses by it. By default there is no proxy."""
    measure: tuple[str, ...] = ()
    """Further figures of each response, such as toxicity: functions or reward models as for --gold.
    The mean of each is reported under its own name. The miniature adds those of its judge: a
    rating from 1 to 7, and whether a response follows its request, is truthful, invents something,
    is toxic."""
    benchmarks: Count | None = None
    """Number of questions of each of the miniature's benchmarks, of the alignment tax and of bias,
    which are reported for each model. By default none are asked. `python -m
    instructjax.evaluation` has benchmarks for other models."""
    reference: str | None = None
    """Reference model of the KL, such as runs/sft. By default no KL is measured."""
    best_of: tuple[Count, ...] = ()
    """Values of n for best-of-n of the first model. The figures are averaged over all subsets of n
    of its --samples responses. The best is the one of the highest score by --reward, or by the
    judge without --reward."""
    comparisons: bool = False
    """Also write OUT/comparisons.jsonl, which run_rm.py reads: the first model's --samples
    responses to each prompt, ranked by their utility. Responses that are empty or did not end are
    left out, and so are prompts whose responses all have one utility."""
    split: Literal["validation", "train", "all"] = "validation"
    """Which prompts: those held out by --data.split_by and --data.validation, those that training
    reads, or all."""
    prompts: Count = 512
    """Number of prompts, from the start of the data."""
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
    """Directory of the results. Results of an earlier comparison are overwritten."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`, where -1 takes those that are left.
    By default all devices are along `fsdp`."""
    seed: Seed = 0
    """Seed of sampling."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.labels is None and not len(set(self.models)) == len(self.models) > 0:
            raise ValueError(f"--models {' '.join(self.models)}: give at least one, each once")
        if self.labels is None and not self.gold and self.data.spec != "miniature":
            raise ValueError("--gold: these data have no judge of their own; name one")
        if self.benchmarks is not None and self.data.spec != "miniature":
            raise ValueError("--benchmarks: only the miniature's models can answer them")
        few_shot = any(name.startswith(FEW_SHOT) for name in self.models)
        if few_shot and not self.demonstrations.spec and self.data.spec != "miniature":
            raise ValueError("--demonstrations: few_shot: needs some for these data")
        if few_shot and self.reference is not None:
            raise ValueError("--reference: the KL of a few_shot: model cannot be measured")
        if max(self.best_of, default=0) > self.samples:
            raise ValueError(f"--best_of {max(self.best_of)}: more than --samples {self.samples}")
        if self.comparisons and self.labels is not None:
            raise ValueError("--comparisons: not with --labels, which loads no model")
        if not self.reward.spec and self.reward != RewardConfig(()):
            raise ValueError("--reward: its other flags need a reward model or a function")
        if self.comparisons and not 2 <= self.samples <= 9:
            raise ValueError(f"--comparisons: needs --samples from 2 to 9, not {self.samples}")
        flags.refuse_bucket("--out", self.out, "a directory on a disk")
        sharding.parse_mesh(self.mesh)


def check(config: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    hosts.require_equal("flags", flags.of_all_hosts(config, "evaluate"))
    checks.check_directory("--out", config.out)
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    if config.labels is not None:
        if not config.labels.expanduser().is_file():
            raise FileNotFoundError(f"--labels {config.labels}: no such file")
        return
    checks.check_rows("--batch_size", config.batch_size, 1, mesh)
    for flag, rewards in (("--gold", RewardConfig(config.gold)), ("--reward", config.reward)):
        if rewards.spec:
            scoring.check(rewards, mesh, flag)
    names = [*gold.MEASURES] if config.data.spec == "miniature" else []
    for spec in config.measure:
        scoring.check(RewardConfig((spec,)), mesh, "--measure")
        names.append(measure_name(spec))
        if names.count(names[-1]) > 1 or names[-1] in comparison.COLUMNS:
            raise ValueError(f"--measure {spec}: {names[-1]} is the name of another figure")
    named = [("--models", name.removeprefix(FEW_SHOT)) for name in config.models]
    if config.reference is not None:
        named.append(("--reference", config.reference))
    for flag, name in named:
        model = pretrained.check(name, mesh, flag=flag, scalar_head=False)
        room = checks.data_tokens("--data", config.data, config.max_new_tokens)
        checks.check_tokens(model, [("--max_new_tokens", config.max_new_tokens, 1), *room])
    data.check(config.data, "prompts")
    if any(name.startswith(FEW_SHOT) for name in config.models):
        data.check(shown_demonstrations(config), "demonstrations", "--demonstrations")


def evaluate(config: Config) -> dict[str, Any]:
    """Compares the models. Returns the contents of results.json."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.labels is not None:
        results = comparison.of_labels(config.labels)
        names = [name for name in config.models if name in results["models"]]
        write(config, results, (names or sorted(results["models"]))[0], "labelers")
        return results
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
    keys = jax.random.split(jax.random.key(config.seed), len(config.models))
    given: dict[str, comparison.Answers] = {}
    for name, key in zip(config.models, keys, strict=True):
        given[name] = answer(config, name, mesh, key)
        # At once: a later model may fail.
        if jax.process_index() == 0:
            with (config.out / RESPONSES).open(
                "a" if len(given) > 1 else "w", encoding="utf-8"
            ) as file:
                for line in comparison.lines({name: given[name]}):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    answers, first = comparison.shared(given), config.models[0]
    results = comparison.compare(answers)
    left_out = max(len(x.keys) for x in given.values()) - results["prompts"]
    if left_out and jax.process_index() == 0:
        print(f"{left_out:,} prompts are left out: a model has no room for them")
    if config.best_of:
        results["best_of"] = comparison.best_of(answers[first], config.best_of)
    written = [RESPONSES]
    if config.comparisons:
        rows, left_out = comparison.comparisons(answers[first])
        if jax.process_index() == 0:
            for what, count in left_out.items():
                print(f"{COMPARISONS} leaves out {count:,} {what}")
            if not rows:
                print(f"warning: {COMPARISONS} is empty; more --max_new_tokens end more responses")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (config.out / COMPARISONS).write_text(text, encoding="utf-8")
        written.append(COMPARISONS)
    write(config, results, first, "the judge", written)
    return results


def write(config: Config, results: Any, first: str, by: str, written: Sequence[str] = ()) -> None:
    """Prints the table and writes the files, on host 0.

    Args:
      results: from `comparison`.
      first: the model that the table's win rates are against.
      by: who judged, for the title.
      written: names of files that are there already.
    """
    if jax.process_index() != 0:
        return
    out, wrote = config.out, ["results.json", *written]
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if curves := frontier(config, results):
        columns = ["utility", "score"] if config.reward.spec else ["utility"]
        figures.frontier(curves, columns, out / "frontier.png")
        wrote.append("frontier.png")
    console = Console()
    for table in comparison.tables(results, first, by):
        console.print(table)
    if "best_of" in results:
        console.print(comparison.best_of_table(results["best_of"], first))
    print(f"wrote {', '.join(str(out / name) for name in wrote)}")


def frontier(config: Config, results: Any) -> dict[str, Any]:
    """The curves of frontier.png: models by their KL from the reference, and the best of n.

    The best of n is a curve from the first model. It is left out where the reference is another
    one, from which its KL is not known.
    """
    columns = ("utility", "score")
    curves = {
        name: {"kl": [row["kl"][0]], **{c: [row[c][0]] for c in columns if c in row}}
        for name, row in results["models"].items()
        if "kl" in row
    }
    rows = results.get("best_of", ())
    if rows and config.reference in (None, config.models[0]):
        curves[f"best of n, {config.models[0]}"] = {
            "kl": [row["kl"] for row in rows],
            **{c: [row[c][0] for row in rows] for c in columns if c in rows[0]},
        }
    return curves


def answer(config: Config, name: str, mesh: Mesh, key: jax.Array) -> comparison.Answers:
    """Samples a model's responses, and judges them. One model at a time is on the devices.

    Raises:
      ValueError: no prompt leaves room for a response.
    """
    S, few_shot = config.samples, name.startswith(FEW_SHOT)
    with phase(Console(), f"{name}: loading"):
        model, params, tokenizer = load(config, name.removeprefix(FEW_SHOT), "--models", mesh)
        records, given = read_prompts(config, model, tokenizer, few_shot)
    with phase(Console(), f"{name}: sampling {len(given) * S:,} responses"):
        responses, _ = rollout.sample(
            params,
            model,
            given,
            key,
            size=max(1, config.batch_size // S),
            samples_per_prompt=S,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            mesh=mesh,
        )
    benchmarks = {}
    if config.benchmarks is not None:
        with phase(Console(), f"{name}: answering benchmarks"):
            if tokenizer.get_vocab() != miniature.tokenizer().get_vocab():
                raise ValueError(f"--benchmarks: {name} does not have the miniature's tokenizer")
            benchmarks = tax.benchmarks(
                params, model, tokenizer, mesh, size=config.batch_size, items=config.benchmarks
            )
    del params
    texts = tokenizer.batch_decode(rollout.token_ids(responses), skip_special_tokens=True)
    if few_shot:
        texts, responses = first_lines(texts, responses, model.eos_ids, tokenizer)
    prompts = [records.prompt[i].tolist() for i in range(len(records)) for _ in range(S)]
    rows = rollout.left_padded(prompts, max(map(len, prompts))) | responses
    with phase(Console(), f"{name}: judging"):
        repeated = [record for record in records.records for _ in range(S)]
        measured, measures = judge(config, mesh, tokenizer, model.eos_ids, rows, repeated, texts)

    def by_prompt(x: np.ndarray | None) -> Any:
        return None if x is None else x.reshape(-1, S)

    return comparison.Answers(
        keys=comparison.keys(records.records),
        prompt_rows=[comparison.prompt_row(record) for record in records.records],
        texts=[texts[i : i + S] for i in range(0, len(texts), S)],
        tokens_PS=by_prompt(measured.length_B),
        ended_PS=by_prompt(measured.ended_B),
        utility_PS=by_prompt(measured.utility_B),
        score_PS=by_prompt(measured.score_B),
        kl_PS=by_prompt(measured.kl_B),
        measures={name: by_prompt(values_B) for name, values_B in measures.items()},
        benchmarks=benchmarks,
    )


def read_prompts(
    config: Config, model: ModelConfig, tokenizer: Any, few_shot: bool
) -> tuple[data.Dataset, list[list[int]]]:
    """The prompts that leave room for a response, and the token ids that the model continues."""
    context = model.max_length - config.max_new_tokens + 1
    read = pretrained.reader(model, tokenizer)
    records = read(config.data, "prompts", split=config.split, context=context)
    records = records.take(np.arange(len(records)) < config.prompts)
    if not few_shot:
        return records, [records.prompt[i].tolist() for i in range(len(records))]
    demonstrations = read(shown_demonstrations(config), "demonstrations", split="train")
    given = with_examples(records, demonstrations.records[: config.shots], tokenizer)
    fits = np.array([len(ids) < context for ids in given])
    if not fits.any():
        raise ValueError(f"--shots {config.shots}: these demonstrations leave no room for a prompt")
    return records.take(fits), [ids for ids, fit in zip(given, fits, strict=True) if fit]


def judge(
    config: Config,
    mesh: Mesh,
    tokenizer: Any,
    eos_ids: Sequence[int],
    rows: Batch,
    records: Sequence[Record],
    texts: Sequence[str],
) -> tuple[policies.Sampled, dict[str, np.ndarray]]:
    """(utility, score, KL and lengths; the figures of --measure by name) of a model's responses."""
    run_model = functools.partial(
        rollout.map_batches,
        rows=rows,
        size=config.batch_size,
        buckets=[rows["mask_BR"].shape[1]],
        mesh=mesh,
    )
    measured = policies.measure(
        rows,
        records,
        texts,
        eos_ids,
        run_model,
        reward=load_rewards(config, config.reward, "--reward", mesh, tokenizer),
        judge=gold.load_judge(config.gold, config.data.spec, mesh, tokenizer, config.model_dtype),
        kl_B=kl(config, mesh, tokenizer, rows, run_model),
    )
    return measured, measure(config, mesh, tokenizer, records, texts, run_model)


def shown_demonstrations(config: Config) -> DataConfig:
    """--demonstrations, or the miniature's."""
    spec = config.demonstrations.spec or config.data.spec
    return dataclasses.replace(config.demonstrations, spec=spec)


def with_examples(
    prompts: data.Dataset, demonstrations: Sequence[Record], tokenizer: Any
) -> list[list[int]]:
    """Token ids of each prompt after some demonstrations, each a line of its own."""
    pairs = [(record.said, record.replies[0].strip()) for record in demonstrations]
    examples = "".join(f"{prompt}\n{response}\n\n" for prompt, response in pairs)
    texts = [f"{examples}{record.said}\n" for record in prompts.records]
    return tokenizer(texts)["input_ids"]


def first_lines(
    texts: Sequence[str], responses: Batch, eos_ids: Sequence[int], tokenizer: Any
) -> tuple[list[str], Batch]:
    """(the first line of each text, its tokens_BR and mask_BR).

    A line ends in EOS if the model ended it, by a line break or by EOS, or if it is empty.
    """
    lines, tokens = [], []
    for text, ended in zip(texts, rollout.ended(responses, eos_ids), strict=True):
        line, line_break, _ = text.lstrip().partition("\n")
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        lines.append(line)
        tokens.append([*ids, *eos_ids[:1]] if ended or line_break or not ids else ids)
    return lines, rollout.right_padded(tokens)


def load(config: Config, name: str, flag: str, mesh: Mesh) -> tuple[ModelConfig, Params, Any]:
    """A model for sampling and scoring: (config, parameters in --model_dtype, tokenizer)."""
    model, params, tokenizer = pretrained.load(
        name, mesh, template=config.data.template, flag=flag, scalar_head=False
    )
    model = dataclasses.replace(model, dtype=config.model_dtype)
    return model, freeze(params, config.model_dtype), tokenizer


def load_rewards(
    config: Config, rewards: RewardConfig, flag: str, mesh: Mesh, tokenizer: Any
) -> scoring.Rewards | None:
    """What gives a response its score; None without any SPEC. It waits in host memory."""
    if not rewards.spec:
        return None
    return scoring.load(rewards, mesh, tokenizer, config.model_dtype, offload=True, flag=flag)


def measure_name(spec: str) -> str:
    """The name of a figure of --measure: the function's, or the reward model's path."""
    return spec.rpartition(":")[2] if scoring.is_function(spec) else spec


def measure(
    config: Config,
    mesh: Mesh,
    tokenizer: Any,
    records: Sequence[Record],
    texts: Sequence[str],
    run_model: gold.RunModel,
) -> dict[str, np.ndarray]:
    """The figures of --measure by name, float [B], and the miniature's own on its data."""
    figures_B = gold.measures(records, texts) if config.data.spec == "miniature" else {}
    prompts = [record.prompt for record in records]
    for spec in config.measure:
        rewards = load_rewards(config, RewardConfig((spec,)), "--measure", mesh, tokenizer)
        assert rewards is not None
        figures_B[measure_name(spec)] = rewards.score(run_model, prompts, texts, records)[0]
    return figures_B


def kl(
    config: Config, mesh: Mesh, tokenizer: Any, rows: Batch, run_model: gold.RunModel
) -> np.ndarray | None:
    """kl_B of responses from --reference, in nats: k1 at the sampling temperature, summed.

    Raises:
      ValueError: the reference has another vocabulary.
    """
    if config.reference is None:
        return None
    model, params, own = load(config, config.reference, "--reference", mesh)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--reference {config.reference}: another vocabulary than the model's")
    score = functools.partial(
        rollout.token_logp,
        config=model,
        temperature=config.temperature,
        shard=sharding.constrainer(mesh),
    )
    score = jax.jit(score, out_shardings=sharding.replicated(mesh))
    logp_BR = run_model(functools.partial(score, params))
    return (rows["logp_BR"] - logp_BR).sum(1, where=rows["mask_BR"])


def cli(argv: Sequence[str] | None = None) -> None:
    evaluate(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
