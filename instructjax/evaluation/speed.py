"""Reports the speed and the memory of finished or running runs, as Markdown.

    python -m instructjax.evaluation.speed runs/sft runs/rm runs/ppo
    python -m instructjax.evaluation.speed runs/ppo --out speed.md

Seconds are medians over steps. The first step after a start is left out, because it compiles. Steps
after an evaluation are left out too, because their time includes the evaluation; if there are no
others, they are taken. Memory is the run's own count: the largest bytes of all arrays, and the
largest temporaries of any program. The two need not occur at the same time. Model FLOPs are those
of the matmuls with weights: 2 a weight and token in a forward pass, 6 in a step that trains all
weights, 4 in one that trains adapters. The products of attention and what --remat computes twice
are not counted. Padding counts as tokens in SFT and RM, not in PPO.
"""

import dataclasses
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from instructjax import models, scoring, usage
from instructjax.evaluation import report
from instructjax.models import ModelConfig
from instructjax.preflight.chips import CHIPS
from instructjax.run import pretrained

# Peak rates of bfloat16 without sparsity, from NVIDIA's data sheets, by jax's `device_kind`. The
# PCIe and NVL versions of H100 and H200 are slower, and not listed.
_GPUS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
}


@dataclass(frozen=True)
class Speed:
    """What a run measured. None: not known."""

    name: str  # of the run directory
    stage: str
    devices: str  # "8 x TPU v5 lite, 1 host"
    versions: str
    command: str
    steps: int
    seconds: float | None  # of a step, or of an iteration of PPO
    phases: Mapping[str, float]  # seconds of each phase of a step
    figures: Mapping[str, float]  # of the last validation
    tokens: float | None  # a second and device: of rows in SFT and RM, of responses in PPO
    flops: float | None  # a second and device
    utilisation: float | None  # share of the device's peak
    peak: str  # of memory
    counted: str  # the most arrays and the largest temporaries, on a device


def measure(directory: Path) -> Speed:
    """Reads a run directory.

    Raises:
      FileNotFoundError: it has no metrics.jsonl or no config.json.
      ValueError: a file is damaged; the message names it.
    """
    run = read(directory)
    file = directory / "hardware.json"
    hardware = json.loads(file.read_text()) if file.is_file() else {}
    rows = [row for row in run.metrics if "throughput/tokens_per_second" in row]
    evaluated = {row["step"] for row in run.metrics if any("validation" in key for key in row)}
    quiet = [row for row in rows if row["step"] - 1 not in evaluated] or rows
    times = {key for row in quiet for key in row if key.startswith("time/")}
    times = sorted(times - {"time/evaluation"})
    medians = {key: statistics.median(row[key] for row in quiet if key in row) for key in times}
    count = hardware.get("devices")
    seconds = medians.pop("time/step", None)
    tokens = flops = None
    if quiet and count:
        tokens = statistics.median(row["throughput/tokens_per_second"] for row in quiet) / count
        work = [step_flops(directory, run.config, row) for row in quiet]
        if None not in work:
            rates = [x / row["time/step"] for x, row in zip(work, quiet, strict=True)]
            flops = statistics.median(rates) / count
    peak = peak_flops(hardware.get("kind", ""), run.config["config"].get("model_dtype", ""))
    hosts = hardware.get("hosts", 1)
    devices = f"{count} x {hardware.get('kind', '?')}, {hosts} host{'s' if hosts > 1 else ''}"
    memory = hardware.get("memory", {})
    return Speed(
        name=directory.name,
        stage=run.config["stage"],
        devices=devices if hardware else "not recorded",
        versions=", ".join(f"{k} {v}" for k, v in run.config["versions"].items()),
        command=run.config["command"],
        steps=max((row["step"] for row in run.metrics), default=0),
        seconds=seconds,
        phases={key.removeprefix("time/"): value for key, value in medians.items()},
        figures=last_figures(run.metrics),
        tokens=tokens,
        flops=flops,
        utilisation=None if flops is None or peak is None else flops / peak,
        peak=memory.get("peak", ""),
        counted=memory.get("counted", ""),
    )


def read(directory: Path) -> report.RunData:
    """As `report.read`, of a run that has a config.json too."""
    run = report.read(directory)
    if not run.config:
        raise FileNotFoundError(f"{directory / 'config.json'}: no such file; the run lacks it")
    return run


def last_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each metric of validation, by its name without `validation/`."""
    values = {name: x for row in metrics for name, x in row.items() if "validation" in name}
    return {name.removeprefix("validation/"): x for name, x in values.items()}


def peak_flops(kind: str, dtype: str) -> float | None:
    """FLOPs a second of one device at its best; None if it is not known, as of a CPU.

    Args:
      kind: jax's `device_kind`.
      dtype: of --model_dtype. A GPU multiplies float32 at another rate; a TPU at the same.
    """
    for chip in CHIPS.values():
        if kind in chip.kinds:
            return chip.flops / chip.devices
    return _GPUS.get(kind) if dtype == "bfloat16" else None


# ------------------------------------------------------------------------------------- FLOPs


def step_flops(directory: Path, record: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Model FLOPs of a step of all devices; None if they cannot be known.

    Args:
      record: of config.json.
      row: of metrics.jsonl.
    """
    flags = record["config"]
    tokens = row["throughput/tokens_per_second"] * row["time/step"]
    policy = _sizes(str(directory / "export")) or _sizes(flags["model"])
    if policy is None:
        return None
    train = 4 if flags.get("lora", {}).get("rank") else 6
    if record["stage"] in ("sft", "rm", "pretrain"):
        unembedded = 0.0 if record["stage"] == "rm" else 1.0
        return train * _weights(policy, unembedded) * tokens
    if record["stage"] != "ppo" or "rollout/tokens" not in row:
        return None
    return _ppo_flops(flags, policy, tokens, row["rollout/tokens"], train)


def _ppo_flops(
    flags: Mapping[str, Any], policy: ModelConfig, responses: float, tokens: float, train: int
) -> float | None:
    """Model FLOPs of an iteration of PPO; None if the sizes of a model are not known.

    Args:
      responses: tokens of responses, which alone are unembedded.
      tokens: tokens of prompts and responses.
      train: FLOPs a weight and token of an update.
    """
    ppo, ptx = flags["ppo"], flags["ptx"]
    rescore = ppo["rescore"]
    if rescore is None:
        rescore = flags["model_dtype"] != "float32"
    forward = 2 * (1 + (ppo["beta"] > 0) + rescore)  # sampling, the reference, re-scoring
    total = (forward + train * ppo["epochs"]) * _weights(policy, responses / tokens) * tokens
    if ppo["value"] == "shared":
        total += 2 * _weights(policy, 0) * tokens
    named = [spec for spec in flags["reward"]["spec"] if not scoring.is_function(spec)]
    reward_models = [_sizes(model) for spec in named for model in scoring.members(spec)]
    if ppo["value"] == "separate":
        value = flags["value_model"] or next(iter(named), None)
        sizes = policy if value is None else _sizes(value)
        if sizes is None:
            return None
        total += (2 + train * ppo["epochs"]) * _weights(sizes, 0) * tokens
    for sizes in reward_models:
        if sizes is None:
            return None
        total += 2 * _weights(sizes, 0) * tokens
    if ptx["coef"]:
        text = ppo["epochs"] * flags["batch_size"] * ptx["ratio"] * ptx["length"]
        total += train * _weights(policy, 1.0) * text
    return total


def _weights(model: ModelConfig, unembedded: float) -> float:
    """Weights that multiply a token: the layers' matrices, and the unembedding.

    Args:
      unembedded: share of the tokens that have logits.
    """
    layers, unembedding = _counts(dataclasses.replace(model, scalar_head=False))
    return layers + unembedded * unembedding


@functools.cache
def _counts(model: ModelConfig) -> tuple[int, int]:
    """(weights of the layers' matrices, weights of the unembedding)."""
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    matrices = [path.split("/") for path in models.matrices(model)]
    layers = sum(shapes["layers"][group][name]["kernel"].size for group, name in matrices)
    return layers, model.padded_vocab_size * model.width


def _sizes(model: str) -> ModelConfig | None:
    """The config of a model, here or on the hub; None if it cannot be read."""
    try:
        return pretrained.describe(model)
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------- Markdown


def markdown(speeds: Sequence[Speed]) -> str:
    """The report. Runs of the same devices and versions share their head."""
    lines = []
    for devices, versions in dict.fromkeys((s.devices, s.versions) for s in speeds):
        own = [s for s in speeds if (s.devices, s.versions) == (devices, versions)]
        lines += [f"**{devices}**; {versions}", ""]
        lines += _table(
            *("run", "stage", "steps", "seconds a step", "tokens a second a device"),
            *("TFLOP/s a device", "share of peak", "peak memory", "counted, at most"),
            rows=[
                (
                    *(s.name, s.stage, f"{s.steps:,}", _figure(s.seconds), _figure(s.tokens)),
                    _figure(None if s.flops is None else s.flops / 1e12),
                    "?" if s.utilisation is None else f"{100 * s.utilisation:.1f} %",
                    *(s.peak or "?", s.counted or "?"),
                )
                for s in own
            ],
        )
        lines += _by_name("Seconds of a step by phase:", {s.name: s.phases for s in own})
        lines += _by_name("Figures of the last validation:", {s.name: s.figures for s in own})
        lines += [*(f"    {s.command}" for s in own), ""]
    return "\n".join(lines)


def _by_name(title: str, runs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of figures with a row for each run that has any; nothing if none has."""
    names = list(dict.fromkeys(name for figures in runs.values() for name in figures))
    rows = [
        (run, *(_figure(figures.get(name), "") for name in names))
        for run, figures in runs.items()
        if figures
    ]
    return [title, "", *_table("run", *names, rows=rows)] if rows else []


def _table(*columns: str, rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _figure(number: float | None, missing: str = "?") -> str:
    if number is None:
        return missing
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Config:
    """The runs to measure."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    out: Path | None = None
    """File to write the Markdown to as well."""


def check(config: Config) -> None:
    """Raises ValueError or OSError for runs that cannot be read."""
    if not config.runs:
        raise ValueError("RUNS: give at least one run directory")
    for directory in config.runs:
        read(directory)
    if config.out is not None and not config.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {config.out}: there is no folder {config.out.parent}")


def cli(argv: Sequence[str] | None = None) -> None:
    config = usage.parse(Config, argv, __doc__, check)
    jax.config.update("jax_platforms", "cpu")  # a run that goes on may hold the TPU
    text = markdown([measure(directory) for directory in config.runs])
    print(text)
    if config.out is not None:
        config.out.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {config.out}")


if __name__ == "__main__":
    cli()
