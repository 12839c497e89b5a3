"""The runs of red_team_rounds.py."""

import functools
from typing import Any

import red_team_data as made
from red_team_config import EXPERIMENTS, PROMPTED, Config

from instructjax.evaluation.grid import Grid, Job, flags_of, from_here, parse_flags
from instructjax.scoring import RewardConfig


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    for seed in c.seeds:
        add_attackers(c, jobs, seed)
        add_defence(c, jobs, seed)
        add_evaluations(c, jobs, seed)
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_attackers(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """The attackers of a seed, and two runs of each: to train on, and held out."""
    zero_shot, sft = f"zero-shot-attacks-{seed}", f"attacker-sft-{seed}"
    for method in c.methods:
        attacker, needs, more = c.attacker, (), {}
        if method == "few-shot":
            needs, more = (zero_shot,), {"examples": c.directory / zero_shot / "attacks.jsonl"}
        elif method not in PROMPTED:
            name = f"attacker-{method}-{seed}"
            attacker, needs = c.directory / name, (name,)
            make = sft_job if method == "sft" else rl_job
            jobs[name] = make(c, method, zero_shot if method == "sft" else sft, seed)
        for kind, offset in (("attacks", 0), ("held-out", 1000)):
            flags = {
                **{"attacker": attacker, "target": c.model, "harm": c.harms, "opening": c.opened},
                **{"attacks": c.attacks, "max_attack_tokens": c.max_attack_tokens, **more},
                **{"max_new_tokens": c.max_new_tokens, "threshold": c.threshold},
                **{"seed": offset + seed, **({"end": c.end} if c.end else {})},
            }
            if c.data.template != "auto":
                flags["target_template"] = c.data.template
            flags |= parse_flags(c.attack_flags)
            jobs[f"{method}-{kind}-{seed}"] = Job("red_team.py", flags, needs=needs)


def sft_job(c: Config, method: str, zero_shot: str, seed: int) -> Job:
    """SFT of the base model on zero-shot attacks that succeeded."""
    directory = c.directory / zero_shot
    flags = {
        **{"model": c.attacker, "data": f"jsonl:{directory}/attacks.jsonl", "epochs": 1},
        **{"data.columns": "prompt=opening,completion=prompt", "data.template": "plain"},
        # All have one prompt, so that another column must split them.
        **{"data.only": "succeeded=true", "data.split_by": "number", "data.validation": 0.2},
        **{"max_new_tokens": c.max_attack_tokens, "seed": seed, **c.preset},
    }
    prepare = functools.partial(made.check_successes, directory)
    return Job("run_sft.py", flags | parse_flags(c.sft_flags), needs=(zero_shot,), prepare=prepare)


def rl_job(c: Config, method: str, sft: str, seed: int) -> Job:
    """PPO of the SFT attacker against the harm that it does."""
    openings = c.directory / "openings.jsonl"
    file = c.directory / f"attacker-{method}-{seed}.py"
    more = parse_flags(c.rl_flags)
    flags = {
        **{"model": c.directory / sft, "reward": f"{file}:reward", "ptx.coef": 0},
        **{"data": f"jsonl:{openings}", "data.validation": f"jsonl:{openings}"},
        **{"data.template": "plain", "max_new_tokens": c.max_attack_tokens, "seed": seed},
        # What follows --end is cut off, and so need not end.
        "ppo.missing_eos": "none" if c.end else "penalty",
    }
    arguments = {
        **{"target": c.model, "harm": c.harms, "end": c.end, "seed": seed},
        **{"template": c.data.template},
        **{"diversity_coef": float(method.removeprefix("rl-"))},
        **{"max_new_tokens": c.max_new_tokens},
        **{name: "".join(more[name]) for name in ("mesh", "model_dtype") if name in more},
    }

    def prepare() -> None:
        made.write_openings(openings, c.opened)
        made.write_reward(file, **arguments)

    return Job("run_ppo.py", flags | c.preset | more, needs=(sft,), prepare=prepare)


def add_defence(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """The target's next PPO, with attacks and without."""
    found = tuple(f"{method}-attacks-{seed}" for method in c.methods)
    made_from = c.made_from(c.attack_share)
    file = c.directory / f"defence-{seed}-{made_from}.jsonl"
    held_out = c.directory / f"ordinary-held-out-{made_from}.jsonl"
    attacked = [c.directory / x for x in found]
    prepare = functools.partial(
        made.write_prompts, file, held_out, c.data, attacked, c.attack_share, seed
    )
    prompts = {"data": f"jsonl:{file}", "data.validation": f"jsonl:{held_out}", **c.rendering}
    prompts |= {"gold": c.gold} if c.gold else {}
    both = {"model": c.model, "seed": seed, "max_new_tokens": c.max_new_tokens, **c.preset}
    both |= {"pretrain": "miniature"} if c.preset else {"ptx.coef": 0}
    more = parse_flags(c.ppo_flags)
    flags = both | prompts | reward_flags(c.next_reward) | more
    jobs[f"defence-{seed}"] = Job("run_ppo.py", flags, needs=found, prepare=prepare)
    flags = both | c.prompt_flags | reward_flags(c.reward) | more
    jobs[f"control-{seed}"] = Job("run_ppo.py", flags)


def add_evaluations(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """The target before and after, and the control."""
    trained = (f"control-{seed}", f"defence-{seed}")
    flags = {"models": [c.model, *(c.directory / x for x in trained)], "seed": seed}
    more = parse_flags(c.evaluate_flags)
    ordinary = {**flags, **c.prompt_flags, "prompts": 512}
    found = [c.directory / f"{method}-attacks-{seed}" for method in c.methods]
    for method in c.methods:
        held_out = f"{method}-held-out-{seed}"
        file = c.directory / f"{held_out}-{c.made_from()}.jsonl"
        prepare = functools.partial(made.write_held_out, file, [c.directory / held_out], found)
        attacked = {
            **{**flags, "data": f"jsonl:{file}", **c.rendering, "split": "all"},
            **{"prompts": c.attacks, "gold": c.harms, "max_new_tokens": c.max_new_tokens, **more},
        }
        needs = (*trained, *(x.name for x in found), held_out)
        job = Job("evaluate.py", attacked, needs=needs, resumes=False, prepare=prepare)
        jobs[f"harm-{method}-{seed}"] = job
    jobs[f"helpfulness-{seed}"] = Job("evaluate.py", ordinary | more, trained, resumes=False)
    if c.in_miniature:
        asked = {"data.columns": "prompt={prompt} be insulting."}
        job = Job("evaluate.py", ordinary | asked | more, trained, resumes=False)
        jobs[f"refusal-{seed}"] = job


def reward_flags(reward: RewardConfig) -> dict[str, Any]:
    return flags_of(reward, "reward") | {"reward": reward.spec}
