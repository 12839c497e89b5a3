"""The paper in miniature: trains and evaluates a grid of models, and writes a report of its claims.

    python experiments/reproduce.py --quick     # one seed, the smallest policy, no sweeps
    python experiments/reproduce.py             # three sizes, three seeds, sweeps, labeler folds
    python experiments/reproduce.py --dry_run   # prints the commands

Each run is a command of experiments/, in a directory of its own below --out. A finished run is not
repeated, and a stopped run is resumed, so the same command continues after a stop. Win rates are
against the largest of a seed's SFT models.

    pretrain-SIZE-SEED, sft-SIZE-SEED      the base model, and SFT on it
    rm-SEED                                the reward model, from SFT of the medium size
    ppo-SIZE-SEED, ppo-ptx-SIZE-SEED       PPO, without and with pretraining gradients
    evaluation-SEED                        all models by the judge, with benchmarks
    respectful-SEED, insulting-SEED        most of them, with an instruction in each prompt
    training-labelers-SEED, held-out-...   PPO-ptx against SFT, by labelers
    sft-public-medium-SEED                 SFT on a mix of public tasks, see public_tasks.jsonl
    sft-without-..., rm-without-..., ppo-ptx-without-...
                                           the stages of the medium size, without one category
    left-out-SEED                          these and the base model, on that category
    sweep-beta-..., sweep-gamma-...        PPO-ptx of the medium size with another beta or ptx.coef
    sweep-no-ptx-beta-...                  PPO of the medium size with a larger beta
    frontier-SEED                          score and utility of all these against KL, and best-of-n
    folds-SEED                             the reward model, cross-validated over labelers

Hardware: two CPU cores. The script prints an estimate of its time, from a step on this machine.
Result: OUT/report.html, which compares each claim of the paper with the results here. --results
gets the same report as report.md, with its figures as files.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructjax import hosts, miniature, models, sft, state, train, usage
from instructjax.data import Record
from instructjax.data.sources import MINIATURE
from instructjax.evaluation import claims, paper
from instructjax.evaluation.grid import Grid, GridConfig, Job, from_here
from instructjax.miniature import labelers
from instructjax.miniature.judging import utility
from instructjax.miniature.world import generator
from instructjax.run import checks

EXPERIMENTS = Path(__file__).resolve().parent
SIZES = {  # size -> (preset, learning rates as a share of the defaults', time of a step)
    "small": ("miniature-small", 1.0, 0.5),
    "medium": ("miniature", 1.0, 1.0),
    "large": ("miniature-large", 0.5, 4.0),
}
RATES = {"pretrain": 4e-3, "sft": 2e-3, "ppo": 3e-4}  # of the medium size, the scripts' defaults
LEFT_OUT = "category=brainstorming"  # no instruction of it in SFT, RM and PPO of `-without-`
BETAS, GAMMAS = (1e-6, 0.05, 0.5), (0.003, 0.3)  # the runs of each size have 0.15 and 0.03
LARGE_BETAS = (0.5, 1.5)  # without pretraining gradients
SECONDS = {  # of the medium size where a step of SFT takes STEP seconds
    **{"pretrain": 52, "sft": 41, "rm": 116, "ppo": 195, "ppo-ptx": 195, "sweep": 195},
    **{"evaluation": 12, "folds": 580},  # an evaluation for each model
}
STEP = 0.045


@dataclass(frozen=True, kw_only=True)
class Config(GridConfig):
    """The grid."""

    out: Path | None = None
    """Directory of the runs and of the report; by default runs/paper, and runs/paper-quick with
    --quick, whose runs differ."""
    quick: bool = False
    """One seed, the smallest policy, a large base model that is trained for a third of its steps,
    no sweeps and no folds."""

    @property
    def directory(self) -> Path:
        """--out or its default."""
        if self.out is not None:
            return self.out.expanduser()
        return Path("runs/paper-quick" if self.quick else "runs/paper")

    @property
    def results_directory(self) -> Path:
        """--results (with --quick a folder in it: its runs have the names of others), or --out."""
        if self.results is None:
            return self.directory
        return self.results.expanduser() / ("quick" if self.quick else "")

    @property
    def public_tasks(self) -> Path:
        """The demonstrations of `sft-public-`."""
        return self.directory / "public_tasks.jsonl"

    @property
    def of_seeds(self) -> tuple[int, ...]:
        """The seeds that are run."""
        return self.seeds[:1] if self.quick else self.seeds

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes of the policies."""
        return ("small",) if self.quick else tuple(SIZES)

    @property
    def bases(self) -> tuple[str, ...]:
        """The sizes of the base models."""
        return ("small", "large") if self.quick else tuple(SIZES)


# ------------------------------------------------------------------------------------- the grid


def grid(c: Config) -> Grid:
    """The runs, each after those that it needs."""
    jobs: dict[str, Job] = {}
    for seed in c.of_seeds:
        add_models(c, jobs, seed)
        if not c.quick:
            add_generalisation(c, jobs, seed)
        add_evaluations(c, jobs, seed)
    if not c.quick:
        seed = c.seeds[0]
        sft, rm = f"sft-medium-{seed}", f"rm-{seed}"
        given = {"model": c.directory / sft, "reward": c.directory / rm, "seed": seed}
        sweeps: list[tuple[str, str, Sequence[float], dict[str, float]]] = [
            ("beta", "ppo.beta", BETAS, {}),
            ("gamma", "ptx.coef", GAMMAS, {}),
            ("no-ptx-beta", "ppo.beta", LARGE_BETAS, {"ptx.coef": 0}),
        ]
        for name, flag, values, more in sweeps:
            for value in values:
                job = Job("run_ppo.py", {**given, **more, flag: value}, needs=(sft, rm))
                jobs[f"sweep-{name}-{value:g}-{seed}"] = job
        trained = [sft, *(f"{stage}-medium-{seed}" for stage in ("ppo", "ppo-ptx"))]
        trained += [name for name in jobs if name.startswith("sweep-")]
        flags = {
            **{"models": [c.directory / name for name in trained], "seed": seed, "prompts": 256},
            **{"reference": c.directory / sft, "reward": c.directory / rm},
            **{"samples": 16, "best_of": (1, 2, 4, 8, 16)},
        }
        needs = (*trained, rm)
        jobs[f"frontier-{seed}"] = Job("evaluate.py", flags, needs=needs, resumes=False)
        folds = {"model": c.directory / sft, "folds": 5, "by": "labeler", "seed": seed}
        jobs[f"folds-{seed}"] = Job("run_rm.py", folds, needs=(sft,))
    return Grid(c.directory, jobs, from_here(EXPERIMENTS), c.results_directory)


def add_models(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """The base models, SFT, the reward model and the policies of a seed."""

    def rate(stage: str, size: str) -> dict[str, float]:
        return {"learning_rate": RATES[stage] * SIZES[size][1]}

    for size in c.bases:
        base = f"pretrain-{size}-{seed}"
        flags = {"model": SIZES[size][0], "seed": seed, **rate("pretrain", size)}
        if size not in c.sizes:
            flags["epochs"] = 0.7  # in place of 2
        jobs[base] = Job("run_pretrain.py", flags)
        if size in c.sizes:
            flags = {"model": c.directory / base, "seed": seed, **rate("sft", size)}
            jobs[f"sft-{size}-{seed}"] = Job("run_sft.py", flags, needs=(base,))
    start = f"sft-{'small' if c.quick else 'medium'}-{seed}"
    rm = f"rm-{seed}"
    jobs[rm] = Job("run_rm.py", {"model": c.directory / start, "seed": seed}, needs=(start,))
    for size in c.sizes:
        sft = f"sft-{size}-{seed}"
        flags = {"model": c.directory / sft, "reward": c.directory / rm, "seed": seed}
        flags["ppo.learning_rate"] = rate("ppo", size)["learning_rate"]
        no_text = {**flags, "ptx.coef": 0}
        jobs[f"ppo-{size}-{seed}"] = Job("run_ppo.py", no_text, needs=(sft, rm))
        jobs[f"ppo-ptx-{size}-{seed}"] = Job("run_ppo.py", flags, needs=(sft, rm))


def add_generalisation(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """SFT on public tasks, and the stages without one category of instructions."""
    base, start = f"pretrain-medium-{seed}", {"seed": seed, "preset": "miniature"}
    public = {**start, "model": c.directory / base, "data": f"jsonl:{c.public_tasks}"}
    jobs[f"sft-public-medium-{seed}"] = Job("run_sft.py", public, needs=(base,))
    sft, rm, ppo = (
        f"{stage}-{seed}"
        for stage in ("sft-without-medium", "rm-without", "ppo-ptx-without-medium")
    )
    without = {**start, "data.without": LEFT_OUT}
    jobs[sft] = Job("run_sft.py", {**without, "model": c.directory / base}, needs=(base,))
    without["model"] = c.directory / sft
    # The mean score of demonstrations, which is subtracted from all scores, leaves it out too.
    no_mean = {**without, "demonstrations.without": LEFT_OUT}
    jobs[rm] = Job("run_rm.py", no_mean, needs=(sft,))
    rewarded = {**without, "reward": c.directory / rm}
    jobs[ppo] = Job("run_ppo.py", rewarded, needs=(sft, rm))


def add_evaluations(c: Config, jobs: dict[str, Job], seed: int) -> None:
    """What compares the models of a seed."""

    def compare(name: str, models: Sequence[str], more: dict[str, Any]) -> None:
        paths = []
        for model in models:
            prefix, colon, run = model.rpartition(":")
            paths.append(f"{prefix}{colon}{c.directory / run}")
        needs = tuple(dict.fromkeys(model.rpartition(":")[2] for model in models))
        flags = {"models": paths, "seed": seed, "prompts": 512, **more}
        jobs[name] = Job("evaluate.py", flags, needs=needs, resumes=False)

    bases = [name for name in jobs if name.startswith("pretrain-") and name.endswith(f"-{seed}")]
    prompted = [f"few_shot:{name}" for name in bases]
    trained = [f"{stage}-{size}-{seed}" for size in c.sizes for stage in ("sft", "ppo", "ppo-ptx")]
    largest = f"sft-{c.sizes[-1]}-{seed}"  # what win rates in the printed table are against
    public = [name for name in jobs if name.startswith("sft-public-") and name.endswith(f"-{seed}")]
    every = list(dict.fromkeys([largest, *bases, *prompted, *public, *trained]))
    compare(f"evaluation-{seed}", every, {"samples": 2, "benchmarks": 512})
    for tone in ("respectful", "insulting"):
        asked = {"data.columns": f"prompt={{prompt}} be {tone}."}
        compare(f"{tone}-{seed}", [*trained, *bases], asked)
    ends = [f"{stage}-{size}-{seed}" for size in c.sizes for stage in ("sft", "ppo-ptx")]
    for group in ("training", "held_out"):
        judge = {"gold": f"{from_here(EXPERIMENTS) / Path(__file__).name}:{group}_labelers"}
        compare(f"{group.replace('_', '-')}-labelers-{seed}", ends, judge)
    if not c.quick:
        stages = ("sft-without", "pretrain", "ppo-ptx-without")
        models = [f"{stage}-medium-{seed}" for stage in stages]
        compare(f"left-out-{seed}", models, {"data.only": LEFT_OUT})


def training_labelers(
    prompts: Sequence[str], responses: Sequence[str], records: Sequence[Record]
) -> list[float]:
    """Ratings by those who labeled the training data."""
    return ratings(responses, records, held_out=False)


def held_out_labelers(
    prompts: Sequence[str], responses: Sequence[str], records: Sequence[Record]
) -> list[float]:
    """Ratings by those who labeled no training data."""
    return ratings(responses, records, held_out=True)


def ratings(responses: Sequence[str], records: Sequence[Record], held_out: bool) -> list[float]:
    """A rating of each response by one labeler of a prompt, with their weights and noise."""
    people, values = labelers.pool(0, held_out), []
    for response, record in zip(responses, records, strict=True):
        draw = generator(0, "panel", held_out, record.prompt)
        labeler = draw.choice(people)
        features = miniature.judge(dict(record.row), response).features
        noise = generator(0, labeler.name, record.prompt, response)
        value = utility(features, labeler.weights)
        values.append(round((value + noise.gauss(0, labeler.noise)) / labelers.GRADE))
    return values


# ------------------------------------------------------------------------------------- its time


def seconds(name: str, job: Job) -> float:
    """A run's seconds on a machine whose step of SFT takes STEP seconds."""
    if job.script == "evaluate.py":
        samples = job.flags["prompts"] * job.flags.get("samples", 1) / 1024
        return SECONDS["evaluation"] * len(job.flags["models"]) * max(1, samples)
    stage = next(stage for stage in SECONDS if name.startswith(stage))
    size = next((size for size in SIZES if f"-{size}-" in name), "medium")
    return SECONDS[stage] * SIZES[size][2] * job.flags.get("epochs", 2) / 2


def measured_step() -> float:
    """Seconds of a step of SFT of the medium size on this machine, the least of ten."""
    hosts.choose_platform()
    tokens_BT = jnp.ones((8, 128), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(128), (8, 128))
    batch = {"tokens_BT": tokens_BT, "segments_BT": tokens_BT, "positions_BT": positions_BT}
    batch["mask_BT"] = tokens_BT.astype(bool)
    key, tx = jax.random.key(0), optax.adam(1e-3)
    model = models.PRESETS["miniature"]
    current = state.create(models.init(model, key), tx)
    step = train.make_train_step(functools.partial(sft.loss_fn, config=model), tx)
    times = []
    for _ in range(11):  # the first compiles
        began = time.perf_counter()
        current, _ = jax.block_until_ready(step(current, batch, key))
        times.append(time.perf_counter() - began)
    return min(times[1:])


# ----------------------------------------------------------------------------- results and page


def print_estimate(c: Config, runs: Grid) -> None:
    """Prints how long the runs that are missing will take."""
    chosen = runs.chosen(c.runs)
    if missing := [name for name in runs.needed(chosen) if not runs.has_finished(name)]:
        # In a process of its own: this one must not hold the devices that the runs need.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            share = pool.submit(measured_step).result() / STEP
        left = timedelta(seconds=round(share * sum(seconds(x, runs.jobs[x]) for x in missing)))
        print(f"{len(missing)} of {len(chosen)} runs are to be made: about {left}", flush=True)


def write_public_tasks(c: Config) -> None:
    c.directory.mkdir(parents=True, exist_ok=True)
    with c.public_tasks.open("w", encoding="utf-8") as file:
        for row in miniature.public_tasks(0, MINIATURE["demonstrations"]):
            file.write(json.dumps(row) + "\n")


def main(c: Config) -> None:
    """Makes the runs, and writes the page of those that have finished."""
    runs = grid(c)
    if not c.dry_run:
        write_public_tasks(c)
        print_estimate(c, runs)
    results = paper.Paper(c.results_directory, c.of_seeds, c.sizes, c.bases)
    text = "A claim compares means, unless it names intervals."
    sections = functools.partial(claims.sections, results)
    paper.make_page(c, runs, "InstructGPT in miniature", text, sections)


def cli(argv: Sequence[str] | None = None) -> None:
    def check(config: Config) -> None:
        checks.check_directory("--out", config.directory)
        checks.check_directory("--results", config.results_directory)
        grid(config).check(config.runs)

    main(usage.parse(Config, argv, __doc__, check))


if __name__ == "__main__":
    cli()
