"""Two processes of four emulated devices act as one process of eight; if one ends, both end.

This file is also the program that the processes run: `python tests/test_hosts.py TASKS`.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_ppo
import run_rm
import run_sft
import stopped
import swap_loss
import test_run

from instructjax import hf, hosts, miniature, models, run, sharding
from instructjax.data import Stream, sources
from instructjax.models import ModelConfig
from instructjax.run.flags import of_all_hosts, parse
from instructjax.sampler import decode

SMALL = {"demonstrations": 80, "comparisons": 60, "prompts": 40, "text": 200}
FEW = ["--batch_size", "8", "--unroll", "1", "--data.cache", "None"]
SFT = [*FEW, "--mesh", "fsdp=8", "--max_new_tokens", "4", "--eval_prompts", "16"]
RM = [*FEW, "--mesh", "data=4,tensor=2"]
PPO = [*FEW, "--mesh", "data=2,fsdp=4", "--pretrain.cache", "None", "--ppo.minibatch", "8"]
PPO += ["--ppo.buckets", "1", "--max_new_tokens", "6", "--eval_prompts", "8"]
PPO += ["--final_prompts", "8", "--ppo.value", "shared"]


# ------------------------------------------------------------------------------ the program


def tasks(*commands: list[str]) -> None:
    """Runs commands `[NAME, FLAG, ...]` of the programs below in turn."""
    sources.MINIATURE, run_rm.TEST = SMALL, 24
    programs = {"sft": run_sft.cli, "rm": run_rm.cli, "ppo": run_ppo.cli}
    programs |= {"toy": toy, "rows": rows, "replayed": replayed, "swap_loss": swap_loss.cli}
    for name, *flags in commands:
        programs[name](flags)


def toy(flags: list[str]) -> None:
    test_run.fit(parse(test_run.Toy, {}, "", flags))


def replayed(flags: list[str]) -> None:
    """run_ppo.py with fixed responses. If it sampled them, the last bit of a logit could change a
    token, and with it every later metric."""

    def generate(params, config, prompts, key, *, max_new_tokens, indices, **_):
        rng, R = np.random.default_rng(list(indices)), max_new_tokens
        tokens = rng.integers(4, config.vocab_size, (len(prompts), R)).astype(np.int32)
        lengths = rng.integers(2, R + 1, (len(prompts), 1))
        tokens[np.arange(R) == lengths - 1] = config.eos_ids[0]
        mask = np.arange(R) < lengths
        drawn = tokens * mask, mask, np.zeros((len(prompts), R), np.float32)
        return decode.Rollout(*map(jnp.asarray, drawn), live_fraction=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_ppo.sampler, "generate", generate)
        run_ppo.cli([*flags, "--ppo.rescore", "True"])


def rows(flags: list[str]) -> None:
    """Reads a batch where the devices of a host are scattered, and where hosts share rows."""
    devices, batches = np.array(jax.devices()), []
    for order, shape in (
        ([0, 4, 1, 5, 6, 2, 3, 7], (2, 4, 1)),
        ([4, 5, 6, 7, 0, 1, 2, 3], (1, 8, 1)),
        ([0, 1, 4, 5, 2, 3, 6, 7], (1, 2, 4)),
    ):
        types = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.sharding.Mesh(devices[order].reshape(shape), sharding.AXES, axis_types=types)
        host_rows = sharding.own_rows(mesh, 16)
        (batch,) = Stream(Numbers(), 16, seed=0, host_rows=host_rows).once()
        batch = jax.make_array_from_process_local_data(sharding.batched(mesh), batch["n_B"])
        batches.append((len(host_rows), sharding.fetch(batch).tolist()))
    # Written to a file, because output of the collectives' library would mix with a printed line.
    (Path(flags[0]) / f"rows-{jax.process_index()}.json").write_text(json.dumps(batches))


class Numbers:
    """A row source in which row i holds the number i."""

    def __init__(self):
        self.filler = self[0]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"n_B": np.asarray(index)}


if __name__ == "__main__":
    run.main(lambda: tasks(*json.loads(sys.argv[1])))


# ------------------------------------------------------------------------------ its processes


class Pair:
    """Two processes of the program, with one list of tasks for both, or a list for each.

    `folders` are their working directories, if they are not this one's.
    """

    def __init__(
        self,
        cache: Path,
        *tasks: list[list[str]],
        folders: tuple[Path, ...] = (),
        devices: int = 4,  # of each process
    ):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        shared = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(
                str(path)
                for path in (Path(run_ppo.__file__).parent, Path(hosts.__file__).parents[1])
            ),
            "PYTHONUNBUFFERED": "1",
        }
        self.logs = [cache / f"{port}-{host}.log" for host in range(2)]
        self.processes = []
        for host, log in enumerate(self.logs):
            command = [sys.executable, __file__, json.dumps(tasks[host % len(tasks)])]
            env = {**os.environ, **shared, "JAX_PROCESS_ID": str(host)}
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=folders[host] if folders else None,
                )
            self.processes.append(process)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exc) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, text: str) -> None:
        """Waits until host 0 has printed the text."""
        deadline = time.monotonic() + 60
        while text not in self.output()[0]:
            assert [process.poll() for process in self.processes] == [None, None], self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def end(self, *codes: int, timeout: float = 60) -> list[str]:
        """Waits until both exit with these codes; returns the output of each."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.wait(max(1, deadline - time.monotonic()))
        assert [process.returncode for process in self.processes] == list(codes), self.output()
        return self.output()

    def output(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A directory for compiled programs and the processes' logs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        patch.setattr(run_rm, "TEST", 24)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A policy and a reward model with random weights."""
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
        ["rm", *model, "9", *RM, "--out", f"{out}/rm", "--save_every", "2"],
        ["ppo", *model, "1", *PPO, "--out", f"{out}/ppo", "--reward", f"{start}/rm"],
        ["replayed", *model, "5", *PPO, "--out", f"{out}/replayed", "--reward", f"{start}/rm"],
    ]


@pytest.fixture(scope="module")
def runs(start, cache, tmp_path_factory) -> tuple[Path, Path]:
    """All three scripts in this process, on its eight devices, and meanwhile in two processes."""
    single, pair_out = (tmp_path_factory.mktemp(name) for name in ("single", "pair"))
    grpo = ["swap_loss", "grpo", "--model", f"{start}/sft", "--out", f"{pair_out}/grpo", *FEW]
    grpo += ["--mesh", "data=2,fsdp=4", "--steps", "1", "--samples", "2", "--max_new_tokens", "4"]
    grpo += ["--reward", f"{start}/rm"]
    sft, rm, ppo, replayed = commands(start, pair_out)
    ppo += ["--checkpoints", f"{pair_out}/ppo/checkpoints"]
    there = [*ppo, "--out", f"{pair_out}/ppo-of-host-1"]  # the hosts may name it differently
    both = [["rows", f"{pair_out}"], sft, rm, replayed, grpo]
    with Pair(cache, [*both, ppo], [*both, there]) as pair:
        tasks(*commands(start, single))
        pair.end(0, 0, timeout=240)
    return single, pair_out


def metrics_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def assert_close(want: Path, got: Path) -> None:
    want_rows, got_rows = metrics_of(want), metrics_of(got)
    assert [list(row) for row in want_rows] == [list(row) for row in got_rows]
    for row, got_row in zip(want_rows, got_rows, strict=True):
        for name, value in row.items():
            assert got_row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (row["step"], name)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "replayed"])
def test_two_processes_give_the_metrics_of_one(runs, stage):
    single, pair = (out / stage for out in runs)
    assert_close(single, pair)
    assert {path.name for path in pair.iterdir()} == {path.name for path in single.iterdir()}


@pytest.mark.slow
def test_hosts_of_one_device_each_give_the_metrics_of_one_process(start, runs, cache, tmp_path):
    """As on GPUs with a process for each."""
    _, rm, _, ppo = commands(start, tmp_path)
    with Pair(cache, [[*rm, "--mesh", ""], [*ppo, "--mesh", ""]], devices=1) as pair:
        pair.end(0, 0, timeout=240)
    for stage in ("rm", "replayed"):
        assert_close(runs[0] / stage, tmp_path / stage)


def adapters(start: Path, out: Path) -> list[list[str]]:
    """SFT, a reward model and PPO with adapters on one base, each going on from the one before."""
    lora = ["--lora.rank", "4", "--steps"]
    model, reward = ["--model", f"{out}/sft", *lora], ["--reward", f"{out}/rm"]
    return [
        ["sft", "--model", f"{start}/sft", *lora, "2", *SFT, "--out", f"{out}/sft"],
        ["rm", *model, "2", *RM, "--out", f"{out}/rm"],
        ["replayed", *model, "3", *PPO, *reward, "--ppo.value", "separate", "--out", f"{out}/ppo"],
    ]


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(start, cache, tmp_path):
    single, pair_out = tmp_path / "single", tmp_path / "pair"
    with Pair(cache, adapters(start, pair_out)) as pair:
        tasks(*adapters(start, single))
        pair.end(0, 0, timeout=400)
    for stage in ("sft", "rm", "ppo"):
        assert_close(single / stage, pair_out / stage)
        names = [
            {x.name for x in (out / stage / "adapter").iterdir()} for out in (single, pair_out)
        ]
        assert "adapter_model.safetensors" in names[0]
        assert names[0] == names[1]


def test_each_row_is_read_where_its_device_is(runs):
    """Also if a host's rows are not contiguous, and if two hosts have the same rows."""
    for host in range(2):
        batches = json.loads((runs[1] / f"rows-{host}.json").read_text())
        assert batches == [[count, list(range(16))] for count in (8, 8, 16)]


def test_a_signal_to_one_stops_both_and_any_number_resumes(start, runs, cache, tmp_path):
    """One process starts, two resume at step 2, and one resumes after a SIGTERM to one of them."""
    (rm,) = [command for command in commands(start, tmp_path) if command[0] == "rm"]
    with stopped.before_step(3):
        tasks(rm)
    checkpoints = tmp_path / "rm" / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "3")
    damaged = next((checkpoints / "3/state/ocdbt.process_0/d").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with Pair(cache, [[*rm, "--resume", "--save_every", "100"]]) as pair:
        pair.wait_for("miniature (train)")  # before the first step
        pair.processes[1].send_signal(signal.SIGTERM)
        output = pair.end(75, 75)
    step = metrics_of(tmp_path / "rm")[-1]["step"]
    assert step in (3, 4)  # the notice takes a moment
    assert f"{checkpoints}/3 is damaged (state/ocdbt.process_0/d/" in output[0]
    assert {path.name for path in checkpoints.glob("[!.]*")} == {"2", f"{step}", "set_aside"}
    sums = {path.name for path in (checkpoints / f"{step}" / "state").glob("checksums.*")}
    assert sums == {"checksums.0.json", "checksums.1.json"}
    assert f"stopped after step {step}; continue with" in output[0]
    assert "continue with" not in output[1]
    tasks([*rm, "--resume"])
    assert_close(runs[0] / "rm", tmp_path / "rm")


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory) -> Iterator[Pair]:
    """A pair, one process of which has just been killed."""
    out = tmp_path_factory.mktemp("killed")
    with Pair(cache, [["toy", "--out", f"{out}/toy", "--pause", "0.2", "--steps", "900"]]) as pair:
        pair.wait_for("toy  step 1/900")
        pair.processes[1].kill()
        yield pair


@pytest.mark.usefixtures("killed")  # the 20 seconds without a heartbeat pass during this test
def test_an_error_on_one_ends_both_with_its_message(start, cache, tmp_path):
    """Host 1 reads a broken file; host 0 reads a good one and would wait in a collective."""
    row = {"prompt": "who is Olmo?", "completion": "Olmo is here."}
    lines = [json.dumps({**row, "prompt": row["prompt"] + i * " please"}) for i in range(40)]
    folders = tmp_path / "0", tmp_path / "1"
    for folder in folders:
        folder.mkdir()
    (folders[0] / "rows.jsonl").write_text("\n".join(lines))
    (folders[1] / "rows.jsonl").write_text("\n".join([*lines[:3], '{"prompt": 1}', *lines[3:]]))
    (sft,) = [command for command in commands(start, tmp_path) if command[0] == "sft"]
    sft += ["--data", "jsonl:rows.jsonl"]
    with Pair(cache, [sft], folders=folders) as pair:
        output = pair.end(1, 1)
    assert "\nerror on host 1: rows.jsonl:4" in "\n" + output[0]
    assert "\nerror: rows.jsonl:4" in "\n" + output[1]
    assert "Traceback" not in output[0] + output[1]


def test_a_killed_process_ends_the_other(killed):
    assert killed.processes[0].wait(60) != 0
    named, _, end = killed.output()[0].partition("has been silent for 10 s")
    assert named.endswith(f"\nhost 0: host 1 ({socket.gethostname()}) ")
    assert "stopped sending heartbeats" in end


def test_an_interrupt_is_passed_on_and_a_second_one_ends_the_process():
    received = []
    terminate = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores SIGINT
    try:
        with hosts.AgreedSignals(print, start=3):
            os.kill(os.getpid(), signal.SIGINT)
            assert received == ["SIGTERM"]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {"num_processes": None, "process_id": None}),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            {"num_processes": 2, "process_id": 0},
        ),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}, {}),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2"}, None),  # inside sbatch, without srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # no TPU
    ],
)
def test_whether_there_are_others(environment, expected):
    assert hosts.arguments(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),  # jax asks the metadata server
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, {}),
    ],
)
def test_whether_there_are_others_on_a_tpu(monkeypatch, environment, expected):
    monkeypatch.setattr(hosts, "running_in_cloud_tpu_vm", True)
    assert hosts.arguments(environment) == expected


def test_a_process_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=one: expected a number"):
        hosts.arguments({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "one"})


@pytest.mark.parametrize("host", [0, 1])
def test_flags_that_differ_are_named_with_their_hosts(monkeypatch, host):
    """On the host that differs, before it and host 0 go on. No device is asked."""
    passed, left = [], {}
    client = SimpleNamespace(
        key_value_set=lambda key, text, allow_overwrite: left.update({key: text}),
        key_value_try_get=left.get,
        wait_at_barrier=lambda name, _: passed.append(name),
    )
    config = test_run.Toy(out=Path("a"), mesh="data=2", save_every=7)
    other = dataclasses.replace(config, out=Path("b"), mesh="", save_every=8)

    def compare(config: test_run.Toy, number: int, stage: str = "toy") -> None:
        state = SimpleNamespace(num_processes=2, process_id=number, client=client)
        monkeypatch.setattr(hosts, "global_state", state)
        hosts.require_equal("flags", of_all_hosts(config, stage))

    compare(config, 0)
    if host == 0:  # as host 1 with another --out does
        compare(dataclasses.replace(config, out=Path("b")), 1)
        assert len(passed) == 4
        return
    del passed[:]
    both = (
        "host 1: --mesh is '' here and 'data=2' on host 0; --save_every is 8 here and 7 on host 0"
    )
    with pytest.raises(ValueError, match=both):
        compare(other, 1)
    for change in ({"resume": True}, {"checkpoints": "c"}, {"learning_rate": 0.1}):
        with pytest.raises(ValueError, match=f"host 1: --{next(iter(change))} is "):
            compare(dataclasses.replace(config, **change), 1)
    with pytest.raises(ValueError, match="--stage is 'other' here and 'toy' on host 0"):
        compare(config, 1, stage="other")
    assert passed == ["instructjax/flags are known"] * 5


def test_without_a_tpu_libtpu_says_nothing():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    if hosts.running_in_cloud_tpu_vm:
        pytest.skip("this machine has a TPU")
    code = "import jax; from instructjax.run import main; main(lambda: print(jax.devices()))"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "hostname" not in done.stderr
    assert done.stdout.startswith("[")


def test_two_processes_train_by_another_algorithm(runs):
    """GRPO, whose rollout lies on both hosts. The KL is 0 before the first update."""
    (row,) = metrics_of(runs[1] / "grpo")
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert 0 < row["rollout/length"] <= 4
