"""A run says how much memory it took, and what helps when there is not enough."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo_config import PRESETS
from test_run import Toy, run_main

from instructjax import run
from instructjax.run import FAILED, memory
from instructjax.run.checkpoint import Checkpoints

GiB = 2**30


def test_the_peak_is_attributed_to_the_phases_that_raised_it(monkeypatch):
    peaks = [1, 1]  # of the devices

    def stats(device: int) -> dict[str, int]:
        return {"peak_bytes_in_use": peaks[device] * GiB, "bytes_limit": 16 * GiB}

    devices = [SimpleNamespace(memory_stats=partial(stats, number)) for number in (0, 1)]
    monkeypatch.setattr(memory.jax, "local_devices", lambda: devices)
    monkeypatch.setattr(memory, "largest_program", lambda: ("jit_step", 3 * GiB))
    monkeypatch.setattr(memory, "array_bytes", lambda: 300 * 2**20)
    record = memory.Memory()
    with record.phase("loading"):
        peaks[0] = 2
        with record.phase("sampling"):
            peaks[1] = 5
        with record.phase("scoring"):
            pass
    with record.phase("loading"):
        peaks[0] = 7
    peaks[0] = 8
    assert record.report() == {
        "of": "a device's memory",
        "peak": "8.00 GiB of 16.00 GiB",
        "phases": "sampling 5.00 GiB, loading 7.00 GiB, the rest 8.00 GiB",
        "counted": "3.29 GiB (arrays 300 MiB, temporaries 3.00 GiB of jit_step)",
    }
    # At the end of a run most arrays are gone: the count is of when there were most.
    monkeypatch.setattr(memory, "array_bytes", lambda: 0)
    assert record.report()["counted"].startswith("3.29 GiB (arrays 300 MiB")


def test_arrays_and_temporaries_are_counted_on_one_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    before = memory.array_bytes()
    split_array = jax.device_put(np.zeros((8, 2**18), np.float32), split)
    whole_array = jax.device_put(np.zeros(2**18, np.float32))
    elsewhere = jax.device_put(np.zeros(2**18, np.float32), jax.local_devices()[1])
    assert memory.array_bytes() - before == 2 * 2**20
    del split_array, whole_array, elsewhere

    def gram(x):
        return (x @ x.T) @ x

    # Programs of other tests may be alive too. This one is larger than theirs, and does not run.
    program = jax.jit(gram).lower(jax.ShapeDtypeStruct((60_000, 16), np.float32)).compile()
    name, size = memory.largest_program()
    assert name == "jit_gram"
    assert 60_000**2 * 4 <= size < 1.1 * 60_000**2 * 4
    del program


def test_resident_memory_stands_in_where_devices_report_none():
    report = memory.Memory().report()
    assert report["of"] == "this process's resident memory"
    assert "(arrays " in report["counted"]


@pytest.mark.parametrize("real", [True, False])
def test_a_run_without_memory_names_the_place_and_the_flags(tmp_path, capsys, monkeypatch, real):
    """A real allocation fails, or a step raises the error of a compilation for a TPU."""

    def fail(self, step, metrics, tokens=0, log=run.Run.log):
        log(self, step, metrics, tokens)
        if step == 8:
            with self.phase("sampling 16 responses"):
                if real:
                    jnp.zeros(2**50)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of hbm.\nUsed")

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", fail)
        patch.setattr(sys, "argv", [str(Path(__file__).parent / "test_run.py")])
        assert run_main(Toy(out=tmp_path, mesh="fsdp=8")) == FAILED
    output = capsys.readouterr()
    error = output.err
    assert error.startswith("error: out of memory after step 7, sampling 16 responses (")
    assert f"test_memory.py:{fail.__code__.co_firstlineno + (5 if real else 6)}): " in error
    reason = "Out of memory allocating" if real else "Ran out of hbm. Used"
    assert f"RESOURCE_EXHAUSTED: {reason}" in error
    assert "less memory: --remat full, --mesh with more devices" in error
    assert error.endswith("the checkpoint of step 5 is whole\n")
    assert error.count("\n") == 1
    run_main(Toy(out=tmp_path, mesh="fsdp=8", resume=True))
    assert "resumed after step 5" in capsys.readouterr().out


def test_a_checkpoint_that_fails_too_does_not_hide_what_memory_ran_out_for(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the checkpoint of step 2 could not be written")

    says = pytest.raises(MemoryError, match=r"out of memory .*the checkpoint of step 1 is whole")
    with says, run.Run(Toy(out=tmp_path), stage="toy") as running:
        for step in (1, 2):
            running.save(step, {"w": jnp.zeros(8)})
        monkeypatch.setattr(Checkpoints, "latest", fail)
        raise MemoryError


def test_the_flags_are_those_of_the_script_beyond_their_values():
    ppo = PRESETS["instructgpt-175b"]
    parts = (
        dataclasses.replace(ppo.ppo, microbatches=8),
        dataclasses.replace(ppo.ptx, microbatches=64),
    )
    config = dataclasses.replace(ppo, out="x", model="y", ppo=parts[0], ptx=parts[1])
    sampling = memory.flags_that_help(config, "sampling 512 responses")
    assert sampling[0] == "--sample_batch below 512"
    assert sampling[1:3] == ["--ppo.microbatches above 8", "--ptx.microbatches above 64"]
    assert memory.flags_that_help(config, "updating")[:3] == [*sampling[1:3], sampling[0]]
    config = dataclasses.replace(config, offload=True, remat="full", sample_batch=64)
    flags = memory.flags_that_help(config, "updating")
    assert "--sample_batch below 64" in flags
    assert not {"--offload", "--remat full"} & {*flags}
    assert {"--offload", "--remat full"} <= {*sampling}
