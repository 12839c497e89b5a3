"""Two processes with four emulated devices each are one process with eight; they end together.

This file is also the program that the processes run: `python tests/test_hosts.py WHAT ARGUMENTS`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from instructjax import hf, hosts, miniature, models, run, sharding
from instructjax.data import Stream, sources
from instructjax.models import ModelConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

import run_ppo
import run_rm
import run_sft

SMALL = {"demonstrations": 80, "comparisons": 60, "prompts": 40, "text": 200}
FEW = ["--batch_size", "8", "--unroll", "1", "--data.cache", "None"]
SFT = [*FEW, "--mesh", "fsdp=8", "--max_new_tokens", "4", "--eval_prompts", "16"]
RM = [*FEW, "--mesh", "data=2,fsdp=2,tensor=2"]
PPO = [*FEW, "--mesh", "data=2,fsdp=4", "--pretrain.cache", "None", "--ppo.minibatch", "8"]
PPO += ["--ppo.buckets", "1", "--max_new_tokens", "6", "--eval_prompts", "8"]
PPO += ["--final_prompts", "8", "--ppo.value", "shared"]


# ------------------------------------------------------------------------------ the program


def scripts(*commands: list[str]) -> None:
    """`["sft", FLAG, ...]`, one after the other."""
    sources.MINIATURE, run_rm.TEST = SMALL, 24
    for name, *flags in commands:
        {"sft": run_sft, "rm": run_rm, "ppo": run_ppo}[name].cli(flags)


def shuffled_hosts() -> None:
    """Rows of a batch where the devices of a host are scattered, and where hosts share rows."""
    devices = np.array(jax.devices())
    for order, shape in (
        ([0, 4, 1, 5, 6, 2, 3, 7], {"data": 2, "fsdp": 4}),
        ([4, 5, 6, 7, 0, 1, 2, 3], {"fsdp": 8}),
        ([0, 1, 4, 5, 2, 3, 6, 7], {"fsdp": 2, "tensor": 4}),
    ):
        types = (jax.sharding.AxisType.Auto,) * 3
        sizes = [shape.get(axis, 1) for axis in sharding.AXES]
        mesh = jax.sharding.Mesh(devices[order].reshape(sizes), sharding.AXES, axis_types=types)
        own = sharding.own_rows(mesh, 16)
        (batch,) = Stream(Numbers(), 16, seed=0, own=own).once()
        batch = jax.make_array_from_process_local_data(sharding.batched(mesh), batch["n_B"])
        print(len(own), sharding.fetch(batch).tolist())


class Numbers:
    """Rows that are their own number."""

    def __init__(self):
        self.filler = self[0]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"n_B": np.asarray(index)}


def program() -> None:
    what, *arguments = json.loads(sys.argv[1])
    {"scripts": scripts, "shuffled_hosts": shuffled_hosts}[what](*arguments)


if __name__ == "__main__":
    run.main(program)


# ------------------------------------------------------------------------------ its processes


class Pair:
    """Two processes of the program; each may be told something else."""

    def __init__(self, cache: Path, *what: list):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        shared = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        self.logs = [cache / f"{port}-{host}.log" for host in range(2)]
        self.processes = []
        for host, log in enumerate(self.logs):
            command = [sys.executable, __file__, json.dumps(what[host % len(what)])]
            env = {**os.environ, **shared, "JAX_PROCESS_ID": str(host)}
            with log.open("w") as file:
                process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
            self.processes.append(process)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exc) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def reaches(self, metrics: Path, step: int) -> None:
        """Waits for a step's line."""
        deadline = time.monotonic() + 60
        while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
            assert [process.poll() for process in self.processes] == [None, None], self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def end(self, *codes: int, timeout: float = 60) -> list[str]:
        """Waits for both; returns what each printed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(1, deadline - time.monotonic()))
        assert [process.returncode for process in self.processes] == list(codes), self.said()
        return self.said()

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of compiled programs, and for the processes' logs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        patch.setattr(run_rm, "TEST", 24)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A policy and a reward model of random weights."""
    out, tokenizer = tmp_path_factory.mktemp("models"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=128, **ids)
    params = models.init(config, jax.random.key(0))
    hf.save(out / "sft", config, params, tokenizer)
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"]["kernel"] = 10 * params["score"]["kernel"]
    hf.save(out / "rm", config, params, tokenizer)
    return out


def commands(start: Path, out: Path) -> list[list[str]]:
    model = ["--model", f"{start}/sft", "--steps"]
    return [
        ["sft", *model, "3", *SFT, "--out", f"{out}/sft", "--eval_every", "2"],
        ["rm", *model, "3", *RM, "--out", f"{out}/rm", "--save_every", "1"],
        ["ppo", *model, "1", *PPO, "--out", f"{out}/ppo", "--reward", f"{start}/rm"],
    ]


@pytest.fixture(scope="module")
def runs(start, cache, tmp_path_factory) -> tuple[Path, Path]:
    """All three scripts in this process, on its eight devices, and at once in two processes."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    with Pair(cache, ["scripts", *commands(start, together)]) as pair:
        scripts(*commands(start, alone))
        pair.end(0, 0, timeout=100)
    return alone, together


def metrics_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_close(one: Path, two: Path) -> None:
    one, two = metrics_of(one), metrics_of(two)
    assert [list(row) for row in one] == [list(row) for row in two]
    for row, other in zip(one, two, strict=True):
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (row["step"], name)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_two_processes_give_the_metrics_of_one(runs, stage):
    alone, together = (out / stage for out in runs)
    assert_close(alone, together)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
