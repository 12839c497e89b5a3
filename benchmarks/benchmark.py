"""Measures the speed of training and sampling, as ratios of paired runs.

    python benchmarks/benchmark.py rm      an RM step: shared prompts against separate sequences
    python benchmarks/benchmark.py sft     an SFT step against transformers on torch
                                           (needs the `test` extra)
    python benchmarks/benchmark.py ppo     a PPO iteration, phase by phase; with `--versus trl`
                                           against TRL's trainer (needs the `bench` extra)
    python benchmarks/benchmark.py sample  the sampler against transformers.generate on torch
                                           (needs the `test` extra)

Two programs run in turn, A B A B ..., in one process and on the same data. The ratio is the median
of the pairs' ratios, so a machine whose speed drifts favours neither. Compilation is not counted.
Hardware: any; the figures in docs/performance.md are from two CPU cores.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.progress
import rich.table
import tyro
from benchmark_ppo import PPO, benchmark_ppo

from instructjax import losses, models, reward, sampler, sft, state, train
from instructjax.models import ModelConfig
from instructjax.run.process import keep_memory

GPT2_124M = ModelConfig(50257, 12, 768, heads=12, mlp_width=3072, max_length=1024)
MODELS = {"tiny": models.PRESETS["tiny"], "124m": GPT2_124M}


@dataclass(frozen=True)
class RM:
    """One reward-model step at `tiny`: responses that share their prompt against separate rows."""

    prompt: int = 512
    """Length of each prompt in tokens."""
    response: int = 64
    """Length of each response in tokens."""
    K: int = 9
    """Number of responses to each prompt."""
    prompts: int = 4
    """Number of prompts in the step. The optimizer's time does not depend on it."""
    pairs: int = 5
    """Number of timed runs of each program."""


@dataclass(frozen=True)
class SFT:
    """One SFT step against `transformers` on torch CPU, eager, float32."""

    pairs: int = 5
    """Number of timed runs of each program."""


@dataclass(frozen=True)
class Sample:
    """`sampler.generate` against `transformers.generate` on torch CPU, float32, sampling."""

    models: tuple[Literal["tiny", "124m"], ...] = ("tiny", "124m")
    """Sizes of the model that are measured, one after another."""
    pairs: int = 7
    """Number of timed runs of each program."""


# ---------------------------------------------------------------------------- timing


def timed(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> list[tuple[float, float]]:
    """(seconds of a, seconds of b) of each pair of runs."""
    for program in (a, b):  # compile, warm up
        program()
    rows = []
    for _ in rich.progress.track(range(pairs), "timing", transient=True):
        begin = time.perf_counter()
        a()
        middle = time.perf_counter()
        b()
        rows.append((middle - begin, time.perf_counter() - middle))
    return rows


def paired(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median over pairs of b / a."""
    rows = timed(a, b, pairs)
    ratio = statistics.median(y / x for x, y in rows)
    return statistics.median(x for x, _ in rows), statistics.median(y for _, y in rows), ratio


def stepper(loss_fn: Any, params: Any, batch: Any) -> Callable[[], None]:
    """A train step with its state: each call makes one update and waits for it."""
    tx = train.adam(1e-4)
    step = train.make_train_step(loss_fn, tx)
    current, key = state.create(params, tx), jax.random.key(0)

    def run() -> None:
        nonlocal current
        current, _ = jax.block_until_ready(step(current, batch, key))

    return run


def matmul_ceiling() -> float:
    """GFLOP/s of a large float32 matrix product, the best of ten."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = 0.0
    for _ in range(10):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin) / 1e9)
    return best


# ---------------------------------------------------------------------------- rm


def benchmark_rm(c: RM) -> None:
    keep_memory()  # as in the scripts; here for both programs
    lm = models.PRESETS["tiny"]
    params = models.init(lm, jax.random.key(0))
    config, params = models.with_scalar_head(params, lm, jax.random.key(1))
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, 0, config.vocab_size, dtype=np.int32)
    B, K = c.prompts, c.K
    batch = {
        "prompt_BP": draw((B, c.prompt)),
        "prompt_mask_BP": np.ones((B, c.prompt), bool),
        "responses_BKR": draw((B, K, c.response)),
        "response_mask_BKR": np.ones((B, K, c.response), bool),
        "ranks_BK": np.tile(np.arange(1, K + 1, dtype=np.int32), (B, 1)),
        "mask_BK": np.ones((B, K), bool),
        "margin_B": np.zeros(B, np.float32),
        "confidence_B": np.ones(B, np.float32),
    }

    def separate(params, batch, key):
        del key
        prompts = jnp.repeat(batch["prompt_BP"], K, axis=0)
        responses = batch["responses_BKR"].reshape(B * K, -1)
        hidden = models.apply(params, config, jnp.concatenate([prompts, responses], axis=1))
        score = models.scalars(params, config, hidden[:, -1:]).reshape(B, K)
        loss = jnp.mean(losses.pairwise_ranking(score, batch["ranks_BK"], batch["mask_BK"]))
        return loss, (jnp.float32(B), {})

    shared = functools.partial(reward.loss_fn, config=config)
    steps = stepper(shared, params, batch), stepper(separate, params, batch)
    fast, slow, ratio = paired(*steps, c.pairs)
    table = rich.table.Table("one RM step", "seconds", "ratio")
    table.add_row(f"{B} x a prompt of {c.prompt} shared by {K} responses", f"{fast:.3f}", "1")
    table.add_row(f"{B} x {K} sequences of {c.prompt + c.response}", f"{slow:.3f}", f"{ratio:.2f}")
    rich.print(table)


# ---------------------------------------------------------------------------- sft


def benchmark_sft(c: SFT) -> None:
    import torch
    import transformers

    keep_memory()  # as in the scripts; here for torch too
    ceiling = matmul_ceiling()
    rich.print(f"matrix products of 2048: {ceiling:.0f} GFLOP/s")
    table = rich.table.Table("model", "B x T", "ours", "torch", "ratio", "of the ceiling")
    for name, (B, T) in {"tiny": (16, 256), "124m": (4, 256)}.items():
        config = MODELS[name]
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, T), dtype=np.int32)
        batch = {
            "tokens_BT": tokens,
            "segments_BT": np.ones((B, T), np.int32),
            "positions_BT": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "mask_BT": np.tile(np.arange(T) > 0, (B, 1)),
        }
        loss_fn = functools.partial(sft.loss_fn, config=config)
        params = models.init(config, jax.random.key(0))
        multiplied = sum(x.size for x in jax.tree.leaves(params)) - config.max_length * config.width
        flops = 6 * B * T * multiplied
        flops += 12 * B * T * T * config.layers * config.width // 2  # causal attention

        torch_model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size, n_embd=config.width, n_layer=config.layers,
                n_head=config.heads, n_positions=config.max_length,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            )
        )  # fmt: skip
        optimizer = torch.optim.Adam(torch_model.parameters(), lr=1e-4, betas=(0.9, 0.95))
        ids = torch.tensor(tokens, dtype=torch.long)

        def step(torch_model=torch_model, optimizer=optimizer, ids=ids) -> None:
            optimizer.zero_grad()
            torch_model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
            optimizer.step()

        a, b, ratio = paired(stepper(loss_fn, params, batch), step, c.pairs)
        table.add_row(
            name,
            f"{B} x {T}",
            f"{B * T / a:,.0f} tokens/s",
            f"{B * T / b:,.0f} tokens/s",
            f"{ratio:.2f}",
            f"{flops / a / 1e9 / ceiling:.0%}",
        )
    rich.print(table)


# ---------------------------------------------------------------------------- sample


def benchmark_sample(c: Sample) -> None:
    """Prompts of 64 tokens: 16 responses of 64 tokens; 64 of at most 64 and 16 on average."""
    import torch
    import transformers

    table = rich.table.Table("model", "responses", "tokens/s", "torch", "ratio", "of pairs", "live")
    for name in c.models:
        config = MODELS[name]
        params = models.init(config, jax.random.key(0))
        torch_model: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size, n_embd=config.width, n_layer=config.layers,
                n_head=config.heads, n_positions=config.max_length,
                bos_token_id=0, eos_token_id=0,
            )
        ).eval()  # fmt: skip
        for rows, ends in ((16, 0), (64, config.vocab_size // 16)):
            # With random weights all tokens are about equally likely. A response ends at each token
            # with probability 1/16, so after 16 tokens on average.
            eos = list(range(1, ends + 1))
            prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, 64))
            ids, listed, counts = torch.tensor(prompts), prompts.tolist(), {}

            def ours(config=config, params=params, prompts=listed, eos=tuple(eos), counts=counts):
                rollout = sampler.generate(
                    params, config, prompts, jax.random.key(0), max_new_tokens=64, eos_ids=eos
                )
                counts["ours"] = int(jax.block_until_ready(rollout).mask_BR.sum())
                counts["live"] = float(rollout.live_fraction)

            def generate(torch_model=torch_model, ids=ids, eos=eos, counts=counts):
                settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 64, "pad_token_id": 0}
                settings["eos_token_id"] = eos or None
                with torch.inference_mode():
                    mask = torch.ones_like(ids)
                    new = torch_model.generate(ids, attention_mask=mask, **settings)[:, 64:]
                ends_here = torch.isin(new, torch.tensor(eos)).int()
                counts["torch"] = int((ends_here.cumsum(1) - ends_here == 0).sum())  # EOS included

            seconds = timed(ours, generate, c.pairs)
            per_token = [(a / counts["ours"], b / counts["torch"]) for a, b in seconds]
            ratios = sorted(b / a for a, b in per_token)
            ours_s, torch_s = (statistics.median(x) for x in zip(*per_token, strict=True))
            table.add_row(
                name,
                f"{rows} of {counts['ours'] / rows:.0f}",
                f"{1 / ours_s:,.0f}",
                f"{1 / torch_s:,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                f"{counts['live']:.2f}",
            )
    rich.print(table)


if __name__ == "__main__":
    sub = tyro.conf.subcommand
    chosen = tyro.cli(
        Annotated[RM, sub("rm")]
        | Annotated[SFT, sub("sft")]
        | Annotated[PPO, sub("ppo")]
        | Annotated[Sample, sub("sample")],
        description=__doc__,  # type: ignore
    )
    if isinstance(chosen, PPO):
        benchmark_ppo(chosen, matmul_ceiling())
    else:
        {RM: benchmark_rm, SFT: benchmark_sft, Sample: benchmark_sample}[type(chosen)](chosen)
