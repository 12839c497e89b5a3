"""swap_loss.py with LoRA: each algorithm trains adapters on the frozen start, its reference."""

import json

import jax
import numpy as np
import pytest
import swap_loss
from test_lora_ppo import LORA, small_world, world  # noqa: F401  # fixtures
from test_run_ppo import metrics_of

from instructjax import hf, models

FEW = ["--mesh", "data=4,fsdp=2", "--batch_size", "8", "--max_new_tokens", "6", "--steps", "3"]
FEW += ["--data.cache", "None", "--eval_prompts", "8", "--lora.rank", "3", "--lora.alpha", "6"]
ONLINE = ["--samples", "2"]


@pytest.mark.parametrize("name", ["dpo", "grpo", "rloo", "raft"])
def test_adapters_alone_are_trained(name, world, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    argv = [name, "--model", f"{world}/sft", *FEW, "--out", str(out), "--save_every", "1"]
    if name != "dpo":
        argv += [*ONLINE, "--reward", f"{world}/rm"]
    swap_loss.cli(argv)
    kept = (out / "checkpoints" / "3" / "state" / "_METADATA").read_text()
    assert "adapter" in kept
    assert not any(f"'{part}'" in kept for part in ("layers", "embed", "final_norm"))

    config, base = hf.load(world / "base")
    config, trained = hf.load_adapter(out / "adapter", config)
    assert (config.adapter_scale, hf.adapter_base(out / "adapter")) == (2.0, f"{world}/base")
    _, before = hf.load_adapter(world / "sft" / "adapter", hf.load_config(world / "base"))
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), trained, before)
    assert min(jax.tree.leaves(moved)) > 0
    _, merged = hf.load(out / "export")
    want = models.merge({**base, **trained}, config)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    first = metrics_of(out)[0]
    if name == "dpo":  # policy and reference are the same: every pair has loss log 2
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    else:
        assert abs(first["objective/kl"]) < 1e-3

    if name != "grpo":  # the way back is the same for all
        return
    # Stopped after step 1 and resumed, it ends the same, bit for bit.
    again = [*argv[: argv.index("--out")], *argv[argv.index("--out") + 2 :]]
    again += ["--out", str(tmp_path / "again")]
    steps = again.index("--steps")
    swap_loss.cli([*again[:steps], "--steps", "1", *again[steps + 2 :]])
    swap_loss.cli([*again, "--resume"])
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    config = json.loads((tmp_path / "again" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == LORA.rank
