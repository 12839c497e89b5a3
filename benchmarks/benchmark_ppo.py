"""One PPO iteration, phase by phase, and against TRL's: the subcommand `ppo` of benchmark.py.

Each side is a program of its own, so that its peak memory is its own, and stays alive: iterations
alternate, A B A B ..., so that a machine whose speed drifts favours neither. Weights are random,
GPT-2's architecture, float32, no dropout; responses have the same lengths on both sides.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import rich
import rich.progress
import rich.table

# ------------------------------------------------------------------------------------- what is run

MINIBATCHES = {"tiny": 16, "124m": 4}  # responses of one; four make an iteration


@dataclass(frozen=True)
class PPO:
    """One PPO iteration by phase: seconds, tokens, memory, compilation."""

    size: Literal["tiny", "124m"] = "tiny"
    """tiny: 64 prompts, minibatches of 16. 124m: 16 prompts, minibatches of 4. All four models are
    of that size."""
    lengths: Literal["fixed", "varied"] = "fixed"
    """Of responses: all at the maximum, or a quarter of it on average."""
    versus: Literal["trl"] | None = None
    """In turn with TRL 1.12.0's PPOTrainer (needs the `bench` extra)."""
    ptx: bool = False
    """Pretraining gradients too, from 8 rows of text to an episode; not with --versus."""
    iterations: int = 5
    """Timed ones of each side; the first one, which compiles, is not among them."""
    buckets: int = 4
    """Lengths that batches of responses are padded to, as in run_ppo.py."""
    microbatches: int = 1
    """Shares of a minibatch, sorted by length, as in run_ppo.py."""

    def __post_init__(self) -> None:
        if self.ptx and self.versus:
            raise ValueError("--ptx: TRL's trainer has no pretraining gradients to compare with")
        if MINIBATCHES[self.size] % self.microbatches:
            raise ValueError(
                f"--microbatches {self.microbatches}: does not divide minibatches of"
                f" {MINIBATCHES[self.size]}"
            )


@dataclass(frozen=True)
class Task:
    """What both sides are given, as JSON."""

    layers: int
    width: int
    heads: int
    vocab: int
    lengths: list[int]  # of each response; there are as many prompts
    minibatch: int
    prompt: int = 64  # tokens of each
    response: int = 64  # tokens at most
    # Ours alone, as in run_ppo.py.
    buckets: int = 1
    microbatches: int = 1
    ptx_ratio: int = 0  # rows of text to an episode, each as long as prompt and response


def task_of(c: PPO) -> Task:
    minibatch, response = MINIBATCHES[c.size], Task.response
    rows = 4 * minibatch
    lengths = np.full(rows, response)
    if c.lengths == "varied":
        # Geometric, cut at the maximum. Its quantiles, in a random order, have the mean of many.
        rng = np.random.default_rng(0)
        quantiles = (np.arange(rows) + 0.5) / rows
        lengths = np.ceil(np.log1p(-quantiles) / np.log1p(-1 / 16)).clip(1, response)
        lengths = rng.permutation(lengths)
    sizes = (4, 256, 4, 4096) if c.size == "tiny" else (12, 768, 12, 50257)
    settings = {"buckets": c.buckets, "microbatches": c.microbatches}
    settings["ptx_ratio"] = 8 if c.ptx else 0  # App. C.4
    return Task(*sizes, lengths.astype(int).tolist(), minibatch, **settings)


# ------------------------------------------------------------------------------------- both sides


@contextlib.contextmanager
def side(script: str, task: str) -> Iterator[Callable[[], dict[str, float]]]:
    """Starts a side; each call is one iteration of it."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), task]
    pipe = subprocess.PIPE
    # Ours imports run_ppo.py's config and programs.
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "experiments")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        talk, answers = program.stdin, program.stdout

        def answer() -> dict[str, float]:
            if line := answers.readline():
                return json.loads(line)
            raise SystemExit(f"{script} stopped, for the reason above")

        def turn() -> dict[str, float]:
            print(file=talk, flush=True)
            return answer()

        answer()  # it is ready
        yield turn
        talk.close()


def gflops(task: Task) -> dict[str, float]:
    """1e9 operations of each phase's matrix products over live tokens, attention included."""
    L, D, P = task.layers, task.width, task.prompt
    length_B = np.array(task.lengths, float)

    def trunk(length_B: np.ndarray) -> float:
        pairs = np.sum(length_B * (length_B + 1) / 2)
        return 24 * L * D**2 * float(np.sum(length_B)) + 4 * L * D * float(pairs)

    unembed = 2 * D * task.vocab * float(np.sum(length_B))
    whole = trunk(P + length_B)
    found = {
        "sampling": whole + unembed,
        "  prefill": trunk(P + 0 * length_B),
        "scoring": 3 * whole + unembed,  # reference, value, reward
        "  policy gradients": 3 * whole + 4 * unembed,  # logits are computed twice
        "  value gradients": 3 * whole,
    }
    if task.ptx_ratio:
        text = np.full(task.ptx_ratio * len(length_B), P + task.response, float)
        found["  ptx gradients"] = 3 * trunk(text) + 6 * D * task.vocab * float(np.sum(text))
    found["updates"] = sum(value for name, value in found.items() if "gradients" in name)
    found["seconds"] = sum(found[name] for name in ("sampling", "scoring", "updates"))
    return {name: value / 1e9 for name, value in found.items()}


def benchmark_ppo(c: PPO, ceiling: float) -> None:
    """Runs and prints; `ceiling` is the GFLOP/s of a large matrix product."""
    task = task_of(c)
    as_json = json.dumps(dataclasses.asdict(task))
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(side("benchmark_ppo_ours.py", as_json))]
        if c.versus:
            sides.append(stack.enter_context(side("benchmark_ppo_trl.py", as_json)))
        count = rich.progress.track(range(c.iterations + 1), "timing", transient=True)
        first, *rest = [[turn() for turn in sides] for _ in count]

    def medians(i: int) -> dict[str, float]:
        return {name: statistics.median(pair[i][name] for pair in rest) for name in rest[0][i]}

    ours, theirs = medians(0), medians(1) if c.versus else {}
    work = gflops(task)
    columns = "phase", "seconds", "GFLOP", "of the ceiling", *(["TRL, seconds"] if theirs else [])
    table = rich.table.Table(*columns)
    for name in [*work, "peak_gb"]:
        cells = [f"{ours[name]:.3f}"]
        if name in work:
            share = work[name] / ours[name] / ceiling
            cells += [f"{work[name]:,.0f}", f"{share:.0%}"]
        if name in theirs:
            cells += [""] * (3 - len(cells)) + [f"{theirs[name]:.3f}"]
        table.add_row(
            {"seconds": "an iteration", "peak_gb": "peak memory, GB"}.get(name, name), *cells
        )
    rich.print(table)
    tokens, rows = sum(task.lengths), len(task.lengths)
    whole, sampling = (tokens / ours[name] for name in ("seconds", "sampling"))
    print(f"{rows} responses, {tokens / rows:.1f} tokens each on average")
    print(f"{whole:,.0f} tokens a second of an iteration, {sampling:,.0f} a second of sampling")
    print(f"compilation {first[0]['seconds'] - ours['seconds']:.1f} s, in the first iteration")
    if c.versus:
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in rest)
        print(
            f"{statistics.median(ratios):.2f} times as fast as TRL: median of {len(ratios)} pairs,"
            f" {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
