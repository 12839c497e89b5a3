"""LoRA in the scripts, from their command lines: what is trained, kept, exported, gone on from."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import run_pretrain
import run_rm
import run_sft
from test_scripts import FEW, SMALL

from instructjax import hf, models
from instructjax.data import sources

LORA = ["--lora.rank", "4", "--lora.alpha", "8"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        patch.setattr(run_rm, "TEST", 24)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """run_pretrain of all weights, then run_sft and run_rm with adapters on them."""
    out = tmp_path_factory.mktemp("runs")
    run_pretrain.cli([*FEW, "--out", f"{out}/pretrain", "--steps", "3", "--eval_every", "2"])
    run_sft.cli([*sft(out), "--out", f"{out}/sft", "--save_every", "1", "--keep_last", "9"])
    rm = [*FEW, *LORA, "--model", f"{out}/sft", "--steps", "3", "--learning_rate", "0.01"]
    run_rm.cli([*rm, "--out", f"{out}/rm"])
    return out


def sft(out):
    few = [*FEW, *LORA, "--model", f"{out}/pretrain", "--steps", "3", "--learning_rate", "0.01"]
    return [*few, "--eval_every", "2", "--max_new_tokens", "4", "--dropout", "0.1"]


def weights(directory):
    config, params = hf.load(directory)
    return config, jax.tree.map(np.asarray, params)


def adapter_of(directory, base):
    return hf.load_adapter(directory, hf.load_config(base))


def test_only_adapters_are_trained_and_kept(runs):
    """Checkpoints hold the adapter and its moments; the export is the base plus scale A B."""
    kept = (runs / "sft" / "checkpoints" / "3" / "state" / "_METADATA").read_text()
    assert "adapter" in kept
    assert not any(f"'{name}'" in kept for name in ("layers", "embed", "final_norm"))

    config, base = weights(runs / "pretrain" / "export")
    _, merged = weights(runs / "sft" / "export")
    config, trained = adapter_of(runs / "sft" / "adapter", runs / "pretrain" / "export")
    assert config.adapter_scale == 8 / 4
    assert hf.adapter_base(runs / "sft" / "adapter") == f"{runs}/pretrain/export"
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trained))  # B has moved from 0
    want = models.merge({**base, **trained}, config)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    assert np.array_equal(merged["embed"]["tokens"], base["embed"]["tokens"])
    losses = [json.loads(x) for x in (runs / "sft" / "metrics.jsonl").read_text().splitlines()]
    values = [row["validation/loss"] for row in losses if "validation/loss" in row]
    assert values[-1] < values[0]


def test_a_reward_model_goes_on_from_the_adapter(runs):
    """Its base is that of SFT, and its adapter began as SFT's."""
    assert hf.adapter_base(runs / "rm" / "adapter") == f"{runs}/pretrain/export"
    config, trained = adapter_of(runs / "rm" / "adapter", runs / "pretrain" / "export")
    assert config.scalar_head
    _, base = weights(runs / "pretrain" / "export")
    _, merged = weights(runs / "rm" / "export")
    want = models.merge({**base, **trained}, config)["layers"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged["layers"], want)
    np.testing.assert_allclose(merged["score"]["kernel"], trained["score"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(merged["score"]["bias"], trained["score"]["bias"], atol=1e-6)
    # Three steps move A by at most about 3 x 0.01 from SFT's; another draw would be far away.
    _, before = adapter_of(runs / "sft" / "adapter", runs / "pretrain" / "export")
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), trained["adapter"], before["adapter"])
    assert 0 < max(jax.tree.leaves(moved)) < 0.05


def test_an_interrupted_run_ends_as_the_uninterrupted_one(runs, tmp_path, capsys):
    shutil.copytree(runs / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "adapter")
    shutil.rmtree(tmp_path / "sft" / "export")
    record = tmp_path / "sft" / "checkpoint.json"
    record.write_text(record.read_text().replace(str(runs), str(tmp_path)))
    again = [*sft(runs), "--out", f"{tmp_path}/sft", "--save_every", "1", "--keep_last", "9"]
    run_sft.cli([*again, "--resume_step", "1"])
    assert "resumed after step 1" in capsys.readouterr().out
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (tmp_path / "sft" / file).read_bytes() == (runs / "sft" / file).read_bytes()


def test_flags_that_cannot_work(runs, tmp_path, capsys):
    few = [*FEW, "--out", f"{tmp_path}/x", "--model"]
    sft = f"{runs}/sft"
    other = f": the adapters of --model {sft} have rank 4 and alpha 8; give"
    for argv, said in (
        ([sft, "--lora.alpha", "4"], "--lora.alpha: has no effect without --lora.rank above 0"),
        ([sft, "--lora.rank", "-1"], "--lora.rank -1: must not be negative"),
        (["miniature", *LORA], "--lora.rank 4: --model miniature has random weights"),
        ([sft, "--lora.rank", "5"], f"--lora.rank 5{other}"),
        ([sft, "--lora.rank", "4"], f"--lora.rank 4{other}"),
    ):
        with pytest.raises(SystemExit) as end:
            run_sft.cli([*few, *argv])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="have another rank, alpha or targets; give the --lora"):
        run_sft.run_sft(
            dataclasses.replace(
                run_sft.PRESETS["miniature"],
                out=tmp_path / "y",
                model=sft,
                lora=run_sft.LoRA(rank=4, alpha=8.0, targets=("query",)),
            )
        )


def test_new_adapters_on_merged_weights(runs, tmp_path):
    few = [*FEW, "--model", f"{runs}/sft/export", "--steps", "1", "--max_new_tokens", "4"]
    adapters = ["--lora.rank", "2", "--lora.targets", "value", "up"]
    run_sft.cli([*few, *adapters, "--out", f"{tmp_path}/new"])
    assert hf.adapter_base(tmp_path / "new" / "adapter") == f"{runs}/sft/export"
    config, trained = adapter_of(tmp_path / "new" / "adapter", runs / "sft" / "export")
    assert config.adapter_scale == 1.0
    sizes = jax.tree.map(lambda x: x.shape[-1], trained["adapter"]["mlp"])
    assert sizes == {"up": {"a": 2, "b": 352}}
    assert set(trained["adapter"]["attention"]) == {"value"}


def test_an_adapter_directory_is_a_model(runs, tmp_path):
    """What peft would write, without an export beside it: merged for a run of all weights."""
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "mine")
    few = [*FEW, "--model", f"{tmp_path}/mine", "--steps", "0", "--max_new_tokens", "4"]
    run_sft.cli([*few, "--out", f"{tmp_path}/all"])
    _, merged = weights(tmp_path / "all" / "export")
    _, want = weights(runs / "sft" / "export")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    assert not (tmp_path / "all" / "adapter").exists()


def test_an_ensemble_shares_its_base(runs, tmp_path):
    rm = [*FEW, *LORA, "--model", f"{runs}/sft", "--steps", "2", "--out", f"{tmp_path}/rm"]
    run_rm.cli([*rm, "--ensemble", "2"])
    first, second = (
        adapter_of(tmp_path / "rm" / name, runs / "pretrain" / "export")[1]
        for name in ("adapter", "adapter-1")
    )
    assert not np.array_equal(first["score"]["kernel"], second["score"]["kernel"])
    down = "mlp", "down", "b"
    a, b = (x["adapter"][down[0]][down[1]][down[2]] for x in (first, second))
    assert not np.array_equal(a, b)
