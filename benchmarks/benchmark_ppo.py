"""Measures a PPO iteration by phase and against TRL's: the subcommand `ppo` of benchmark.py.

Each side is a separate process, so its peak memory is measured alone. Both stay alive and their
iterations alternate, A B A B ..., so a machine whose speed drifts favours neither. The models are
GPT-2s with random weights, in float32, without dropout, and responses have equal lengths.
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

# ------------------------------------------------------------------------------------- the task

MINIBATCHES = {"tiny": 16, "124m": 4}  # responses per minibatch; an iteration has four of them


@dataclass(frozen=True)
class PPO:
    """One PPO iteration by phase: seconds, tokens, memory, compilation."""

    size: Literal["tiny", "124m"] = "tiny"
    """Size of all four models. tiny: 64 prompts, minibatches of 16. 124m: 16 prompts, minibatches
    of 4."""
    lengths: Literal["fixed", "varied"] = "fixed"
    """Lengths of the responses: all 64 tokens, or varied up to 64 with a mean of about 16."""
    versus: Literal["trl"] | None = None
    """Trainer that runs in turn with ours: TRL 1.12.0's PPOTrainer (needs the `bench` extra)."""
    ptx: bool = False
    """Whether to add pretraining gradients, from 8 rows of text per episode; not with --versus."""
    iterations: int = 5
    """Number of timed iterations of each side. One more comes first, to compile."""
    buckets: int = 4
    """Number of lengths that batches of responses may be padded to, as in run_ppo.py."""
    microbatches: int = 1
    """Number of parts of a minibatch, sorted by length, as in run_ppo.py."""

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
    """The input of both sides, as JSON."""

    layers: int
    width: int
    heads: int
    vocab: int
    lengths: list[int]  # of each response; there are as many prompts
    minibatch: int
    prompt: int = 64  # tokens of each
    response: int = 64  # tokens at most
    # Used by our side alone, as in run_ppo.py.
    buckets: int = 1
    microbatches: int = 1
    ptx_ratio: int = 0  # rows of text per episode, each as long as prompt and response


def task_of(c: PPO) -> Task:
    minibatch, response = MINIBATCHES[c.size], Task.response
    rows = 4 * minibatch
    lengths = np.full(rows, response)
    if c.lengths == "varied":
        # Quantiles of a geometric distribution, cut at the maximum, in a random order.
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
    """Starts the process of a side; each call of the result runs one iteration."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), task]
    pipe = subprocess.PIPE
    # Our side imports run_ppo.py's config and programs.
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

        answer()  # the process is ready
        yield turn
        talk.close()


def gflops(task: Task) -> dict[str, float]:
    """GFLOP of each phase's matrix products over live tokens, attention included."""
    L, D, P = task.layers, task.width, task.prompt
    length_B = np.array(task.lengths, float)

    def trunk(length_B: np.ndarray) -> float:
        pairs = np.sum(length_B * (length_B + 1) / 2)
        return 24 * L * D**2 * float(np.sum(length_B)) + 4 * L * D * float(pairs)

    unembed = 2 * D * task.vocab * float(np.sum(length_B))
    whole = trunk(P + length_B)
    work = {
        "sampling": whole + unembed,
        "  prefill": trunk(P + 0 * length_B),
        "scoring": 3 * whole + unembed,  # reference, value, reward
        "  policy gradients": 3 * whole + 4 * unembed,  # logits are computed twice
        "  value gradients": 3 * whole,
    }
    if task.ptx_ratio:
        text = np.full(task.ptx_ratio * len(length_B), P + task.response, float)
        work["  ptx gradients"] = 3 * trunk(text) + 6 * D * task.vocab * float(np.sum(text))
    work["updates"] = sum(value for name, value in work.items() if "gradients" in name)
    work["seconds"] = sum(work[name] for name in ("sampling", "scoring", "updates"))
    return {name: value / 1e9 for name, value in work.items()}


def benchmark_ppo(c: PPO, ceiling: float) -> None:
    """Runs and prints; `ceiling` is the GFLOP/s of a large matrix product."""
    task = task_of(c)
    as_json = json.dumps(dataclasses.asdict(task))
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(side("benchmark_ppo_ours.py", as_json))]
        if c.versus:
            sides.append(stack.enter_context(side("benchmark_ppo_trl.py", as_json)))
        count = rich.progress.track(range(c.iterations + 1), "timing", transient=True)
        first, *pairs = [[turn() for turn in sides] for _ in count]

    def medians(i: int) -> dict[str, float]:
        return {name: statistics.median(pair[i][name] for pair in pairs) for name in pairs[0][i]}

    ours, trl = medians(0), medians(1) if c.versus else {}
    work = gflops(task)
    columns = "phase", "seconds", "GFLOP", "of the ceiling", *(["TRL, seconds"] if trl else [])
    table = rich.table.Table(*columns)
    for name in [*work, "peak_gb"]:
        cells = [f"{ours[name]:.3f}"]
        if name in work:
            share = work[name] / ours[name] / ceiling
            cells += [f"{work[name]:,.0f}", f"{share:.0%}"]
        if name in trl:
            cells += [""] * (3 - len(cells)) + [f"{trl[name]:.3f}"]
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
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
        print(
            f"{statistics.median(ratios):.2f} times as fast as TRL: median of {len(ratios)} pairs,"
            f" {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
