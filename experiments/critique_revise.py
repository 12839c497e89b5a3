r"""Critiques and revisions: a model mends its own responses, under written principles.

    python experiments/critique_revise.py --model MODEL --data jsonl:prompts.jsonl
    python experiments/critique_revise.py --model runs/sft --critic rules            # the miniature
    python experiments/run_sft.py --model MODEL --data jsonl:runs/critique_revise/revisions.jsonl \
        --data.only 'revision=1|2'                            # SL-CAI of two revisions

The supervised part of Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1):

    1. --model responds to a prompt.
    2. A principle is drawn, and the critic says in which way the response breaks it.
    3. The critic revises the response. Steps 2 and 3 are made again, --revisions times.
    4. run_sft.py learns the revisions as demonstrations.

On the miniature, `--critic rules` is a critic that reads as the gold judge does, with errors. A
base model that has learned from the pages of miniature/critics.py can be a critic too.

Hardware: two CPU cores suffice for a model of 135M parameters and a hundred prompts.
Result: OUT/revisions.jsonl, demonstrations with the number of each revision; OUT/chains.jsonl, the
critiques too, from which --resume goes on; and OUT/results.json: the judge's figures by revision.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import constitution
import jax
import revision_chains
import tyro
from ai_feedback import PRINCIPLES, RULES
from jax.sharding import Mesh
from revision_chains import Chain, revise, revise_by_rule, speaker, write
from revision_results import make_judge, print_results, results_of, rows_of
from rich.console import Console

from instructjax import data, ranges, scoring, sharding, usage
from instructjax.data import DataConfig
from instructjax.miniature import critics
from instructjax.models import ModelConfig, Params
from instructjax.offload import freeze
from instructjax.ranges import Count, Positive, Seed, Share
from instructjax.run import checks, flags, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model, its critic, and the principles."""

    model: str = "runs/sft"
    """Model that responds: a language model, best a chat model."""
    critic: str | None = None
    """Model that criticises and revises, or `rules`, the miniature's rule-based critic. By default
    --model. [Bai et al.]"""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    out: Path = Path("runs/critique_revise")
    """Directory of the revisions."""
    principles: str | None = None
    """TOML file of principles, or `miniature` for those in the miniature's words. By default
    `miniature` with `--critic rules`, and otherwise principles.toml beside this script."""
    only_principles: tuple[str, ...] = ()
    """Names of the principles to draw from. By default all that have a critique and a revision."""
    oversight: Share = 0.0
    """Probability that a critique of `--critic rules` says the opposite of what it should."""
    revisions: Count = 4
    """Number of revisions of each response. [Bai et al., section 3.2]"""
    gold: tuple[str, ...] = ()
    """Judge of the responses and revisions: reward models and functions, as for --reward of
    run_ppo.py. By default the miniature has its own judge; other data are not judged."""
    split: Literal["validation", "train", "all"] = "train"
    """Which prompts: those that training reads, those held out by --data.split_by and
    --data.validation, or all."""
    prompts: Count = 1000
    """Number of prompts, the first of the data."""
    max_new_tokens: Count = 64
    """Longest response, critique or revision in tokens. A revision that is longer is left out, and
    ends its chain."""
    temperature: Positive = 1.0
    """Number that logits are divided by in sampling."""
    batch_size: Count = 32
    """Texts that are sampled or scored at the same time."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the models' parameters and of their computation."""
    mesh: str = ""
    """Devices along each axis, as `data=2,fsdp=-1,tensor=2`. By default all are along `fsdp`."""
    resume: bool = False
    """Go on after the last revision that OUT/chains.jsonl has. Give the same flags."""
    seed: Seed = 0
    """Seed of sampling, of the principles and of the errors of `--critic rules`."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.critic == RULES and self.constitution_source != constitution.MINIATURE:
            raise ValueError("--principles: `--critic rules` knows those of the miniature alone")
        if self.critic != RULES and self.oversight:
            raise ValueError("--oversight is of `--critic rules` alone")
        sharding.parse_mesh(self.mesh)

    @property
    def constitution_source(self) -> str:
        """--principles or its default."""
        by_default = constitution.MINIATURE if self.critic == RULES else f"{PRINCIPLES}"
        return self.principles or by_default

    @property
    def constitution(self) -> constitution.Constitution:
        """The principles that have a critique and a revision."""
        needed = ("critique", "revision")
        return constitution.read(self.constitution_source, needed, self.only_principles)


# ------------------------------------------------------------------------------- from the command


def check(c: Config) -> None:
    """Raises ValueError or OSError for flags that cannot work, before anything is loaded."""
    checks.check_directory("--out", c.out)
    assert c.constitution
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    checks.check_rows("--batch_size", c.batch_size, 1, mesh)
    for flag, name in (("--model", c.model), ("--critic", c.critic)):
        if name is not None and name != RULES:
            pretrained.check(name, mesh, flag=flag, scalar_head=False)
    if c.gold:
        scoring.check(scoring.RewardConfig(c.gold), mesh, "--gold")
    data.check(c.data, "prompts")


def critique_revise(c: Config) -> list[dict[str, Any]]:
    """Samples, criticises and revises. Returns the contents of results.json.

    Raises:
      ValueError: `--critic rules` gets other prompts than the miniature's, or --resume other flags.
    """
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    model, params, tokenizer = load(c, c.model, "--model", mesh)
    eos_ids = model.eos_ids
    read = pretrained.reader(model, tokenizer)
    context = model.max_length - c.max_new_tokens + 1
    records = read(c.data, "prompts", split=c.split, context=context).records[: c.prompts]
    if c.critic == RULES and (wrong := [x.where for x in records if "request" not in x.row]):
        raise ValueError(f"--critic rules: {wrong[0]} has no request: it judges no such row")
    make_say = functools.partial(
        speaker,
        mesh=mesh,
        size=c.batch_size,
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
    )
    file, chains, key = c.out / "chains.jsonl", [], jax.random.key(c.seed)
    begin(c)
    if c.resume:
        chains = revision_chains.read(file)
    if not chains:
        with phase(Console(), f"sampling {len(records):,} responses"):
            say = make_say(model, params, tokenizer, lines=False)
            texts = say([list(x.messages) or x.prompt for x in records], key)
        chains = [Chain([text or ""], ended=text is None) for text in texts]
        write(chains, file)
    if c.critic not in (None, RULES):
        model, params, tokenizer = load(c, c.critic, "--critic", mesh)
    say = make_say(model, params, tokenizer, lines=c.constitution.in_miniature)
    critic = critics.RuleCritic(oversight=c.oversight, seed=c.seed)
    for number in range(1 + max(len(x.critiques) for x in chains), c.revisions + 1):
        with phase(Console(), f"revision {number} of {c.revisions}"):
            numbers = {"number": number, "seed": c.seed}
            if c.critic == RULES:
                revise_by_rule(chains, records, c.constitution, critic, **numbers)
            else:
                of_number = jax.random.fold_in(key, number)
                revise(chains, records, c.constitution, say, of_number, **numbers)
        write(chains, file)
    # A response that did not end is no beginning.
    begun = [i for i, chain in enumerate(chains) if chain.texts[0]]
    records, chains = [records[i] for i in begun], [chains[i] for i in begun]
    if not chains:
        raise ValueError("no response ended; give more --max_new_tokens")
    with phase(Console(), "judging"):
        judge = make_judge(
            c.gold,
            c.data.spec,
            records,
            tokenizer,
            mesh,
            eos_ids=eos_ids,
            size=c.batch_size,
            dtype=c.model_dtype,
        )
        results = results_of(records, chains, judge)
    if jax.process_index() == 0:
        rows = rows_of(records, chains)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        demonstrations = c.out / "revisions.jsonl"
        demonstrations.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (c.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print_results(results)
        print(f"wrote {len(rows):,} revisions of {len(chains):,} responses: {demonstrations}")
    return results


def load(c: Config, name: str, flag: str, mesh: Mesh) -> tuple[ModelConfig, Params, Any]:
    """A model for sampling: (config, parameters in --model_dtype, tokenizer)."""
    model, params, tokenizer = pretrained.load(name, mesh, flag=flag, scalar_head=False)
    model = dataclasses.replace(model, dtype=c.model_dtype)
    return model, freeze(params, c.model_dtype), tokenizer


def begin(c: Config) -> None:
    """Writes OUT/config.json.

    Raises:
      ValueError: the chains that --resume goes on with are of other flags.
    """
    now = flags.of_all_hosts(c, "critique_revise")
    file, free = c.out / "config.json", ("resume", "revisions", "out", "gold", "batch_size", "mesh")
    if c.resume and file.exists():
        before = json.loads(file.read_text())
        for name in sorted({*now, *before}):
            if name.rpartition(".")[2] not in free and now.get(name) != before.get(name):
                raise ValueError(
                    f"--resume: {file} has {name} {before.get(name)!r}, not {now.get(name)!r}"
                )
    if jax.process_index() == 0:
        c.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=2) + "\n")


def cli(argv: Sequence[str] | None = None) -> None:
    keywords: Any = {"args": argv, "description": __doc__, "use_underscores": True}

    def parse_flags() -> Config:
        config = tyro.cli(Config, **keywords)
        return dataclasses.replace(config, out=config.out.expanduser())

    critique_revise(usage.read(parse_flags, check))


if __name__ == "__main__":
    main(cli)
