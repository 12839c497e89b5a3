"""Our side of `benchmark.py ppo`: the programs of run_ppo.py, called as its loop calls them.

    python benchmarks/benchmark_ppo_ours.py '{"layers": 4, ...}'     fields: benchmark_ppo.Task

Runs an iteration for each line on stdin, and prints a line of JSON for each.
"""

import contextlib
import dataclasses
import functools
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_ppo import Task
from ppo_config import PPO, PTX, Config
from run_ppo import Programs, TrainingState

from instructjax import models, ppo, rollout, scoring, sharding, state
from instructjax.models import ModelConfig
from instructjax.run.process import keep_memory
from instructjax.sampler import draw


def iterations(task: Task) -> Iterator[dict[str, float]]:
    """Seconds of each phase of one iteration after another."""
    batch_size, R = len(task.lengths), task.response
    rng = np.random.default_rng(0)
    draw_tokens = functools.partial(rng.integers, 0, task.vocab - 2, dtype=np.int32)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    # The four models. On CPU few layers are fastest unrolled, and many scanned. With an EOS id the
    # sampler expects responses that end early.
    model = ModelConfig(
        task.vocab, task.layers, task.width, task.heads, 4 * task.width, max_length=1024,
        unroll=task.layers if task.layers <= 4 else 1,
        eos_ids=(task.vocab - 2,) if min(task.lengths) < R else (),
    )  # fmt: skip
    reward_model = dataclasses.replace(model, scalar_head=True)

    def random_params(config: ModelConfig, seed: int) -> models.Params:
        init = functools.partial(models.init, config)
        shapes = jax.eval_shape(init, jax.random.key(0))
        layout = sharding.shardings(models.logical_axes(config), shapes, mesh)
        return jax.jit(init, out_shardings=layout)(jax.random.key(seed))

    reference, reward = random_params(model, 0), random_params(reward_model, 1)
    config = Config(
        batch_size=batch_size,
        max_new_tokens=R,
        ppo=PPO(
            minibatch=task.minibatch,
            epochs=1,
            microbatches=task.microbatches,
            buckets=task.buckets,
            learning_rate=1e-5,
            value_learning_rate=1e-5,
            ema=0,  # TRL keeps no average of the weights
        ),
        ptx=PTX(coef=27.8 if task.ptx_ratio else 0.0),
    )
    programs = Programs(config, model, reward_model, reference, reward, mesh, (task.prompt,))
    training = TrainingState(
        ppo.PPOState(
            policy=state.create(reference, programs.policy_tx),
            value=state.create(reward, programs.value_tx),
            ema=None,
            beta=jax.device_put(jnp.float32(0.05), sharding.replicated(mesh)),
        ),
        offload=False,
        wait_for_save=lambda: None,
    )
    score = functools.partial(scoring.scorer(reward_model, mesh), reward)

    # The data.
    prompts = draw_tokens((batch_size, task.prompt)).tolist()
    T = task.prompt + R
    text = {
        "tokens_BT": draw_tokens((task.minibatch, T)),
        "segments_BT": np.ones((task.minibatch, T), np.int32),
        "positions_BT": np.tile(np.arange(T, dtype=np.int32), (task.minibatch, 1)),
        "mask_BT": np.tile(np.arange(T) > 0, (task.minibatch, 1)),
    }
    text_batches = [rollout.put(text, mesh)] * task.ptx_ratio
    gradients: dict[str, float] = defaultdict(float)
    for name in ("policy", "ptx", "value"):
        gradient = getattr(programs, f"{name}_gradient")
        gradient.add = clocked(gradient.add, gradients, f"  {name} gradients")

    for step in range(sys.maxsize):
        gradients.clear()
        clock = [time.perf_counter()]
        with training.sampling() as params:
            key = jax.random.key(step)
            rows, _ = programs.sample(params, prompts, range(batch_size), key)
        assert rows["mask_BR"].sum(1).tolist() == task.lengths
        clock.append(time.perf_counter())

        score_B = programs.run_model(rows, score)
        rows["value_BR"] = programs.values(training.state, rows)
        experience, _ = programs.make_experience(
            logp_BR=rows["logp_BR"],
            ref_logp_BR=programs.logp(reference, rows),
            value_BR=rows["value_BR"],
            mask_BR=rows["mask_BR"],
            score_B=score_B,
            ended_B=rollout.ended(rows, model.eos_ids),
            beta=training.state.beta,
        )
        rows |= jax.device_get(experience)
        clock.append(time.perf_counter())

        for index in rng.permutation(batch_size).reshape(-1, task.minibatch):
            minibatch, tokens = programs.minibatch(rows, index)
            training.state, _ = programs.update(training.state, minibatch, tokens, text_batches)
        jax.block_until_ready(training.state)
        clock.append(time.perf_counter())
        phases = ("sampling", "scoring", "updates")
        seconds: dict[str, float] = dict(zip(phases, np.diff(clock).tolist(), strict=True))
        seconds["seconds"] = sum(seconds.values())
        # One token more, beside the iteration, tells the share of the prefill.
        params, settings = training.state.policy.params, {"widths": (task.prompt,), "mesh": mesh}
        rollout.sample(params, model, prompts, key, max_new_tokens=1, **settings)
        yield seconds | gradients | {"  prefill": time.perf_counter() - clock[-1]}


@contextlib.contextmanager
def forced_lengths(task: Task) -> Iterator[None]:
    """Makes responses end where the task says, at the price of one comparison: by the noise."""
    eos, lengths_B, noise = task.vocab - 2, jnp.array(task.lengths), draw.noise

    def ending_noise(key, number_B, sample_B, position_B, vocab_size, width):
        noise_BV = noise(key, number_B, sample_B, position_B, vocab_size, width)
        ends_B1 = (position_B == lengths_B[number_B] - 1)[:, None]
        return jnp.where(jnp.arange(width) == eos, jnp.where(ends_B1, 1e9, -1e9), noise_BV)

    with mock.patch.object(draw, "noise", ending_noise):
        yield


def clocked(fn: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """fn, which waits for its result and adds its time to seconds[name]."""

    def timed(*args):
        begin = time.perf_counter()
        result = jax.block_until_ready(fn(*args))
        seconds[name] += time.perf_counter() - begin
        return result

    return timed


def main(task: Task) -> None:
    """Runs an iteration for each line on stdin, like benchmark_ppo_trl.py."""
    keep_memory()  # as in the scripts
    print(json.dumps({}), flush=True)
    with forced_lengths(task):
        timings = iterations(task)
        while sys.stdin.readline():
            seconds = next(timings)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps(seconds | {"peak_gb": peak}), flush=True)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
