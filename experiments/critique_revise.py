r"""Critiques and revisions: a model revises its own responses, under written principles.

    python experiments/critique_revise.py --model MODEL --data jsonl:prompts.jsonl
    python experiments/critique_revise.py --model runs/sft --critic rules            # the miniature
    python experiments/run_sft.py --model MODEL --data jsonl:runs/critique_revise/revisions.jsonl \
        --data.only 'revision=1|2'                            # SL-CAI of two revisions

The supervised part of Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1):

    1. --model responds to a prompt.
    2. A principle is drawn, and the critic says in which way the response breaks it.
    3. The critic revises the response. Steps 2 and 3 are done --revisions times.
    4. run_sft.py trains on the revisions as demonstrations.

On the miniature, `--critic rules` is a critic that reads as the gold judge does, with errors. A
base model trained on the pages of miniature/critics.py can be a critic too.

Hardware: two CPU cores suffice for a model of 135M parameters and a hundred prompts.
Result: OUT/revisions.jsonl, demonstrations with the number of each revision; OUT/chains.jsonl, with
the critiques too, from which --resume continues; and OUT/results.json: the judge's figures by
revision.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import constitution
import jax
import numpy as np
import revision_chains
from ai_feedback import PRINCIPLES, RULES
from jax.sharding import Mesh
from line_files import check_resume, record
from revision_chains import Chain, Speaker, revise, revise_by_rule, write
from revision_results import finish, make_judge
from rich.console import Console

from instructjax import data, hosts, ranges, scoring, sharding, usage
from instructjax.data import DataConfig, Record, template
from instructjax.miniature import critics
from instructjax.offload import freeze
from instructjax.ranges import Count, Positive, Seed, Share
from instructjax.run import checks, flags, main, pretrained
from instructjax.run.metrics import phase
from instructjax.run.process import cache_compilations

STAGE, CHAINS = "critique_revise", "chains.jsonl"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model, its critic, and the principles."""

    model: str = "runs/sft"
    """Model that responds: a language model, preferably a chat model."""
    critic: str | None = None
    """Model that writes the critiques and the revisions, or `rules`, the miniature's rule-based
    critic. By default --model. [Bai et al.]"""
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
    """Number of prompts, from the start of the data."""
    max_new_tokens: Count = 64
    """Longest response, critique or revision in tokens, EOS included. A longer one is left out, and
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
    """Continue the run in --out after its last revision, or start it if there is none."""
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
    hosts.require_equal("flags", flags.of_all_hosts(c, STAGE))
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
    if jax.process_index() == 0:
        free = ("revisions", "gold")
        check_resume(c.out, STAGE, recorded(c), c.resume, flags.defaults(c), free)


def recorded(c: Config) -> dict[str, Any]:
    """The flags and the principles, as config.json has them."""
    principles = [dataclasses.asdict(principle) for principle in c.constitution.principles]
    return flags.of_all_hosts(c, STAGE) | {"principles": principles}


def critique_revise(c: Config) -> list[dict[str, Any]]:
    """Samples, criticises and revises. Returns the contents of results.json.

    Raises:
      ValueError: a prompt has tools, `--critic rules` gets other prompts than the miniature's, or
        --resume finds chains of other prompts; or no response ended.
    """
    cache_compilations()
    mesh = sharding.make_mesh(**sharding.parse_mesh(c.mesh), devices=jax.devices())
    policy = load(c, c.model, "--model", mesh)
    read = pretrained.reader(policy.model, policy.tokenizer)
    context = policy.model.max_length - c.max_new_tokens + 1
    prompts = read(c.data, "prompts", split=c.split, context=context)
    prompts = prompts.take(np.arange(len(prompts)) < c.prompts)
    records = prompts.records
    check_records(c, records)
    record(c.out, STAGE, recorded(c))
    file, key = c.out / CHAINS, jax.random.key(c.seed)
    chains = revision_chains.read(file, records)
    if not chains:
        with phase(Console(), f"sampling {len(records):,} responses"):
            texts = policy.respond([prompts.prompt[i].tolist() for i in range(len(records))], key)
        chains = [first_of(*pair) for pair in zip(records, texts, strict=True)]
        write(chains, file)
    critic = policy
    if c.critic not in (None, RULES):
        critic = load(c, c.critic, "--critic", mesh)
    rules = critics.RuleCritic(oversight=c.oversight, seed=c.seed)
    for number in range(1 + max(len(x.critiques) for x in chains), c.revisions + 1):
        with phase(Console(), f"revision {number} of {c.revisions}"):
            numbers = {"number": number, "seed": c.seed}
            if c.critic == RULES:
                revise_by_rule(chains, records, c.constitution, rules, **numbers)
            else:
                of_number = jax.random.fold_in(key, number)
                revise(chains, records, c.constitution, critic, of_number, **numbers)
        write(chains, file)
    begun = [pair for pair in zip(records, chains, strict=True) if pair[1].texts]
    if not begun:
        raise ValueError("no response ended; give more --max_new_tokens")
    with phase(Console(), "judging"):
        judge = make_judge(c.gold, c.data.spec, [x for x, _ in begun], policy, c.model_dtype)
        return finish(c.out, records, chains, judge)


def first_of(record: Record, text: str | None) -> Chain:
    """The chain of a response; it has ended if the response did not end."""
    if text is None:
        return Chain(record.prompt, [], ended="the response had no end or no words")
    return Chain(record.prompt, [text if record.verbatim else text.strip()])


def check_records(c: Config, records: Sequence[Record]) -> None:
    """Raises ValueError for prompts that cannot be criticised."""
    for row in records:
        if row.tools is not None:
            raise ValueError(f"{row.where}: the prompt has tools, which critics do not read")
        if c.critic == RULES and not critics.can_judge(row.row):
            raise ValueError(f"--critic rules: {row.where} has no request: it judges no such row")


def load(c: Config, name: str, flag: str, mesh: Mesh) -> Speaker:
    """A model in --model_dtype. --data.template is of --model alone."""
    choice = c.data.template if flag == "--model" else "auto"
    model, params, tokenizer = pretrained.load(
        name, mesh, flag=flag, template=choice, scalar_head=False
    )
    return Speaker(
        dataclasses.replace(model, dtype=c.model_dtype),
        freeze(params, c.model_dtype),
        tokenizer,
        template.of(tokenizer, choice, model.eos_ids),
        mesh,
        c.batch_size,
        c.max_new_tokens,
        c.temperature,
    )


def cli(argv: Sequence[str] | None = None) -> None:
    critique_revise(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    main(cli)
