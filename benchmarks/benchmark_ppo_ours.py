"""Our side of `benchmark.py ppo`: the library's functions, called as run_ppo.py calls them.

    python benchmarks/benchmark_ppo_ours.py '{"layers": 4, ...}'     fields: benchmark_ppo.Task

Each line on stdin runs one iteration, which prints one line of JSON.
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
from ppo_programs import make_programs

from instructjax import models, ppo, rollout, sampler, scoring, sharding, state
from instructjax.models import ModelConfig
from instructjax.ppo import update
from instructjax.run.process import keep_memory, return_memory
from instructjax.sampler import draw


def iterations(task: Task) -> Iterator[dict[str, float]]:
    """Yields the seconds of each phase of an iteration, run as in run_ppo.py."""
    rows_count, R = len(task.lengths), task.response
    rng = np.random.default_rng(0)
    draw_tokens = functools.partial(rng.integers, 0, task.vocab - 2, dtype=np.int32)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    # The four models. On CPU few layers are fastest unrolled, and many layers scanned.
    config = ModelConfig(
        task.vocab, task.layers, task.width, task.heads, 4 * task.width, max_length=1024,
        unroll=task.layers if task.layers <= 4 else 1,
    )  # fmt: skip
    head = dataclasses.replace(config, scalar_head=True)

    def random_params(config: ModelConfig, seed: int) -> models.Params:
        axes = models.logical_axes(config)
        make = functools.partial(models.init, config)
        layout = sharding.shardings(axes, jax.eval_shape(make, jax.random.key(0)), mesh)
        return jax.jit(make, out_shardings=layout)(jax.random.key(seed))

    reference, reward = random_params(config, 0), random_params(head, 1)
    flags = Config(
        batch_size=rows_count,
        # No average of the weights, as TRL has none.
        ppo=PPO(minibatch=task.minibatch, learning_rate=1e-5, value_learning_rate=1e-5, ema=0),
        ptx=PTX(coef=27.8 if task.ptx_ratio else 0.0),
    )
    programs = make_programs(flags, config, head, reference, reward, mesh)
    current = ppo.PPOState(
        policy=state.create(reference, programs.policy_tx),
        value=state.create(reward, programs.value_tx),
        ema=None,
        beta=jax.device_put(jnp.float32(0.05), sharding.replicated(mesh)),
    )
    score_of = scoring.scorer(head, mesh)

    # The data. With an EOS id the sampler expects responses to end early.
    prompts = draw_tokens((rows_count, task.prompt)).tolist()
    eos_ids = (task.vocab - 2,) if min(task.lengths) < R else ()
    buckets = sampler.buckets(range(1, R + 1), task.buckets, 8, longest=R)
    T = task.prompt + R
    text = {
        "tokens_BT": draw_tokens((task.minibatch, T)),
        "segments_BT": np.ones((task.minibatch, T), np.int32),
        "positions_BT": np.tile(np.arange(T, dtype=np.int32), (task.minibatch, 1)),
        "mask_BT": np.tile(np.arange(T) > 0, (task.minibatch, 1)),
    }
    texts = [rollout.put(text, mesh)] * task.ptx_ratio

    def run_model(fn: Callable[..., jax.Array], params: models.Params, rows: rollout.Rows) -> Any:
        of_rows = functools.partial(fn, params)
        return rollout.map_batches(of_rows, rows, task.minibatch, buckets, mesh)

    def sample(max_new_tokens: int, step: int) -> sampler.Rollout:
        params, key = current.policy.params, jax.random.key(step)
        new = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
        return sampler.generate(params, config, prompts, key, **new, mesh=mesh)

    for step in range(sys.maxsize):
        clock = [time.perf_counter()]
        return_memory()
        sampled = sample(R, step)
        names = ("tokens_BR", "mask_BR", "logp_BR")
        rows = dict(zip(names, jax.device_get([getattr(sampled, x) for x in names]), strict=True))
        rows |= rollout.left_padded(prompts, task.prompt)
        assert rows["mask_BR"].sum(1).tolist() == task.lengths
        return_memory()
        clock.append(time.perf_counter())

        score_B = run_model(score_of, reward, rows)
        assert current.value is not None
        rows["value_BR"] = run_model(programs.value_of, current.value.params, rows)
        ref_BR = run_model(programs.logp_of, reference, rows)
        arrays = rows["logp_BR"], ref_BR, rows["value_BR"], rows["mask_BR"], score_B
        experience, _ = programs.experience(*arrays, rollout.ended(rows, eos_ids), current.beta)
        rows |= jax.device_get(experience)
        clock.append(time.perf_counter())

        for index in rng.permutation(rows_count).reshape(-1, task.minibatch):
            size = task.minibatch // task.microbatches
            shares = rollout.batches(rows, index, size, buckets)
            parts = [rollout.put(part, mesh) for _, part in shares]
            current, _ = programs.update(current, parts, int(rows["mask_BR"][index].sum()), texts)
        jax.block_until_ready(current)
        clock.append(time.perf_counter())
        phases = ("sampling", "scoring", "updates")
        seconds: dict[str, float] = dict(zip(phases, np.diff(clock).tolist(), strict=True))
        seconds["seconds"] = sum(seconds.values())
        jax.block_until_ready(sample(1, step).tokens_BR)  # after the iteration, to time the prefill
        yield seconds | {"  prefill": time.perf_counter() - clock[-1]}


@contextlib.contextmanager
def forced_lengths(task: Task) -> Iterator[None]:
    """Makes responses end where the task says, by adding to the noise of EOS."""
    eos, lengths_B, real = task.vocab - 2, jnp.array(task.lengths), draw.noise

    def noise(key, number_B, sample_B, position_B, vocab_size, width):
        noise_BV = real(key, number_B, sample_B, position_B, vocab_size, width)
        ends_B1 = (position_B == lengths_B[number_B] - 1)[:, None]
        return jnp.where(jnp.arange(width) == eos, jnp.where(ends_B1, 1e9, -1e9), noise_BV)

    with mock.patch.object(draw, "noise", noise):
        yield


@contextlib.contextmanager
def clocked_gradients(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the time of each gradient of an update, by the name of its loss."""
    real = update.make_adder

    def make_adder(loss_fn: Any, layout: Any = None) -> Any:
        add, name = real(loss_fn, layout), loss_fn.func.__name__.removesuffix("_loss")

        def clocked(*args):
            begin = time.perf_counter()
            result = jax.block_until_ready(add(*args))
            seconds[name] += time.perf_counter() - begin
            return result

        return clocked

    with mock.patch.object(update, "make_adder", make_adder):
        yield


def main(task: Task) -> None:
    """Answers each line on stdin with an iteration, as benchmark_ppo_trl.py does."""
    keep_memory()  # as in the scripts
    print(json.dumps({}), flush=True)
    gradients: dict[str, float] = defaultdict(float)
    with forced_lengths(task), clocked_gradients(gradients):
        turns = iterations(task)
        while sys.stdin.readline():
            gradients.clear()
            seconds = next(turns)
            seconds |= {f"  {name} gradients": value for name, value in gradients.items()}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps(seconds | {"peak_gb": peak}), flush=True)


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
