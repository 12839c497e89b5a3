"""Breaks the wiring of run_ppo.py in one place at a time, and names the test that notices.

    python tests/mutations.py                    # all of them, about 20 minutes on two cores
    python tests/mutations.py --only temperature

A mutation is a replacement of one text in one file of a copy of the tree. Prints a table, and ends
with 1 if a mutation survives. `test_ppo_wiring.py` checks that each text is still there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_ppo_wiring.py", "test_policies.py", "test_run_ppo.py")
LOOP = "experiments/run_ppo.py"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "logp and reference logp swapped: KL is rewarded",
        LOOP,
        'logp_BR=rows["logp_BR"],\n                    ref_logp_BR=ref_logp_BR,',
        'logp_BR=ref_logp_BR,\n                    ref_logp_BR=rows["logp_BR"],',
    ),
    Mutation(
        "one sampling key for every iteration",
        LOOP,
        "key = jax.random.fold_in(seed_key, step)",
        "key = jax.random.fold_in(seed_key, 1)",
    ),
    Mutation(
        "temperature not passed to the sampler",
        LOOP,
        "temperature=config.temperature,",
        "",
    ),
    Mutation(
        "temperature not passed to log-probabilities",
        LOOP,
        '"temperature": config.temperature, ',
        "",
    ),
    Mutation("gamma ignored", LOOP, "gamma=flags.gamma,", ""),
    Mutation("lambda ignored", LOOP, "lam=flags.lam,", ""),
    Mutation(
        "clip ignored",
        LOOP,
        'behaviour |= {"loss": loss, "clip": flags.clip}',
        'behaviour |= {"loss": loss}',
    ),
    Mutation(
        "value clip ignored",
        LOOP,
        "config=value_model, clip=flags.value_clip, shard=shard",
        "config=value_model, shard=shard",
    ),
    Mutation("value clip ignored on a shared trunk", LOOP, '"value_clip": flags.value_clip, ', ""),
    Mutation(
        "value coefficient ignored on a shared trunk", LOOP, ', "value_coef": flags.value_coef', ""
    ),
    Mutation(
        "ptx.coef ignored",
        LOOP,
        "policy.params, text, text_tokens, self.config.ptx.coef, grads",
        "policy.params, text, text_tokens, 27.8, grads",
    ),
    Mutation(
        "value net at the policy's learning rate",
        LOOP,
        "adam(self._warmup(flags.value_learning_rate))",
        "adam(self._warmup(flags.learning_rate))",
    ),
    Mutation("advantages always whitened", LOOP, "whiten_advantages=flags.whiten_advantages,", ""),
    Mutation("rewards never whitened", LOOP, "whiten_rewards=flags.whiten_rewards,", ""),
    Mutation("missing_eos ignored", LOOP, "missing_eos=flags.missing_eos,", ""),
    Mutation("missing_eos_value ignored", LOOP, "missing_eos_value=flags.missing_eos_score,", ""),
    Mutation("clip_score ignored", LOOP, "clip_score=flags.clip_score,", ""),
    Mutation(
        "adaptive beta never used",
        LOOP,
        "training.state = programs.adapt_beta(training.state, metrics)",
        "programs.adapt_beta(training.state, metrics)",
    ),
    Mutation(
        "the initial beta at every iteration",
        LOOP,
        "beta=training.state.beta,",
        "beta=jnp.float32(flags.beta),",
    ),
    Mutation(
        "value net from the policy in place of the reward model",
        LOOP,
        "path = config.value_model or next(iter(reward_models), None)",
        "path = None",
    ),
    Mutation(
        "value_model ignored",
        LOOP,
        "path = config.value_model or next(iter(reward_models), None)",
        "path = next(iter(reward_models), None)",
    ),
    Mutation(
        "one order for all epochs",
        LOOP,
        "orders = [random.permutation(config.batch_size) for _ in range(config.ppo.epochs)]",
        "orders = [random.permutation(config.batch_size)] * config.ppo.epochs",
    ),
    Mutation(
        "one order for all iterations",
        LOOP,
        "np.random.default_rng([config.seed, step])",
        "np.random.default_rng([config.seed, 1])",
    ),
    Mutation(
        "warm-up counted in updates",
        LOOP,
        "self.config.ppo.warmup * self.config.updates",
        "self.config.ppo.warmup",
    ),
    Mutation(
        "win-rate arguments swapped in evaluations",
        "instructjax/evaluation/policies.py",
        "win_rate(now.utility_B, same_prompts)",
        "win_rate(same_prompts, now.utility_B)",
    ),
    Mutation(
        "win-rate arguments swapped in the results",
        "instructjax/evaluation/policies.py",
        "win_rate(policy.utility_B, base.utility_B)",
        "win_rate(base.utility_B, policy.utility_B)",
    ),
    Mutation(
        "Adam's flags ignored",
        LOOP,
        "functools.partial(train.adam, **dataclasses.asdict(config.adam))",
        "train.adam",
    ),
    Mutation(
        "decay of the average ignored",
        LOOP,
        "ppo.make_step(self.policy_tx, policy_layout, flags.ema)",
        "ppo.make_step(self.policy_tx, policy_layout, 0.992)",
    ),
    Mutation(
        "advantage and return swapped",
        "instructjax/ppo/experience.py",
        '"advantage_BR": advantage_BR, "return_BR": return_BR',
        '"advantage_BR": return_BR, "return_BR": advantage_BR',
    ),
    Mutation(
        "no response counts as ended, or every one",
        LOOP,
        "ended_B=rollout.ended(rows, model.eos_ids),\n                    beta",
        "ended_B=rows['mask_BR'].any(1),\n                    beta",
    ),
    Mutation(
        "the policy as its own reference",
        LOOP,
        "ref_logp_BR = evaluation.reference_logp(rows)",
        "ref_logp_BR = programs.logp(training.state.policy.params, rows)",
    ),
    Mutation(
        "the prompt's place in the batch as its number",
        LOOP,
        "range((step - 1) * config.batch_size, step * config.batch_size)",
        "range(config.batch_size)",
    ),
    Mutation(
        "--loss ignored",
        LOOP,
        "losses.ppo_clip if config.loss is None else load_loss(config.loss)",
        "losses.ppo_clip",
    ),
    Mutation(
        "--ppo.rescore ignored",
        LOOP,
        'config.model_dtype != "float32" if flags.rescore is None else flags.rescore',
        'config.model_dtype != "float32"',
    ),
    Mutation(
        "the records of other prompts are scored",
        LOOP,
        'evaluation.score(rows, batch["records"])',
        'evaluation.score(rows, batch["records"][::-1])',
    ),
    Mutation(
        "the last weights are exported",
        LOOP,
        "programs.whole(next(iter(trained.values())))",
        "programs.whole([*trained.values()][-1])",
    ),
    Mutation(
        "the policy is not computed as the flags say",
        LOOP,
        "return config.compute(model), params, tokenizer",
        "return model, params, tokenizer",
    ),
    Mutation(
        "the sign of the KL on held-out prompts",
        LOOP,
        "(logp_BR - ref_logp_BR).sum(1",
        "(ref_logp_BR - logp_BR).sum(1",
    ),
    Mutation(
        "training goes on after --ppo.max_kl",
        LOOP,
        "            total = start\n",
        "            pass\n",
    ),
    Mutation("--seed ignored", LOOP, "jax.random.key(config.seed)", "jax.random.key(0)"),
    Mutation(
        "values of the rollout are 0",
        LOOP,
        'rows["value_BR"] = programs.values(training.state, rows)',
        'rows["value_BR"] = 0 * rows["logp_BR"]',
    ),
]


def killer(mutation: Mutation, cache: str) -> str | None:
    """The first test that fails on a mutated copy of the tree, if any does.

    Args:
      cache: a directory for compiled programs, which all copies share.
    """
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("instructjax", "experiments", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        file = tree / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        env = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'experiments'}"}
        for name in TESTS:
            command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", f"tests/{name}"]
            command += ["-o", f"cache_dir={cache}", "-k", "not every_mutation"]
            run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
            if failed := re.search(r"^(?:FAILED|ERROR) tests/(\S+)", run.stdout, re.MULTILINE):
                return failed[1]
            assert run.returncode == 0, run.stdout + run.stderr
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", default="", help="run the mutations whose name contains this text"
    )
    parser.add_argument("--jobs", type=int, default=2, help="mutations to run at a time")
    flags = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if flags.only in mutation.name]
    survivors = 0
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(flags.jobs) as pool:
        tests = pool.map(lambda mutation: killer(mutation, cache), chosen)
        for mutation, test in zip(chosen, tests, strict=True):
            survivors += test is None
            print(f"| {mutation.name} | {test or '**survives**'} |", flush=True)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
