"""The report of speed and memory, against counts by hand."""

import json
from pathlib import Path

import pytest

from instructjax.evaluation import speed
from instructjax.models import PRESETS, ModelConfig

# 2 layers of 4 x 8 x 8 + 3 x 8 x 16 weights, and a table of 128 rows of 8.
SMALL = ModelConfig(100, 2, 8, heads=2, mlp_width=16, max_length=32, gated=True, positions="rotary")
LAYERS, TABLE = 2 * (4 * 64 + 3 * 128), 128 * 8
LARGE = PRESETS["miniature"]
LARGE_LAYERS = 2 * (4 * 128 * 128 + 3 * 128 * LARGE.mlp_width)

FLAGS = {
    "model": "policy",
    "model_dtype": "bfloat16",
    "lora": {"rank": 0},
    "batch_size": 6,
    "value_model": None,
    "reward": {"spec": ["large", "my_file.py:short"]},
    "ppo": {"beta": 0.1, "rescore": False, "value": "separate", "epochs": 3},
    "ptx": {"coef": 0.0, "ratio": 2, "length": 5},
}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """The models that are there."""
    monkeypatch.setattr(speed, "_sizes", {"policy": SMALL, "large": LARGE}.get)


def flops(stage: str, changes: dict | None = None) -> float | None:
    """`step_flops` of 20 response tokens and 50 in all, or of a row of 20 tokens."""
    row = {"throughput/tokens_per_second": 10.0, "time/step": 2.0, "rollout/tokens": 50}
    return speed.step_flops(
        Path("nowhere"), {"stage": stage, "config": {**FLAGS, **(changes or {})}}, row
    )


def test_flops_of_sft():
    assert flops("sft") == 6 * (LAYERS + TABLE) * 20
    assert flops("sft", {"lora": {"rank": 8}}) == 4 * (LAYERS + TABLE) * 20
    assert flops("sft", {"model": "elsewhere"}) is None
    assert flops("dpo") is None


def test_flops_of_a_reward_model():
    """It has no logits."""
    assert flops("rm") == 6 * LAYERS * 20


POLICY = LAYERS * 50 + TABLE * 20  # responses alone are unembedded


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        # Sampling, the reference, three epochs; the value net and its epochs; the reward model.
        ({}, (4 + 18) * POLICY + (2 + 18 + 2) * LARGE_LAYERS * 50),
        ({"ppo": {"beta": 0}}, (2 + 18) * POLICY + (2 + 18 + 2) * LARGE_LAYERS * 50),
        ({"ppo": {"rescore": None}}, (6 + 18) * POLICY + (2 + 18 + 2) * LARGE_LAYERS * 50),
        (
            {"ppo": {"value": "shared"}},  # values are a pass without logits
            (4 + 18) * POLICY + 2 * LAYERS * 50 + 2 * LARGE_LAYERS * 50,
        ),
        ({"lora": {"rank": 4}}, (4 + 12) * POLICY + (2 + 12 + 2) * LARGE_LAYERS * 50),
        (
            {"ptx": {"coef": 1.0}},
            (4 + 18) * POLICY
            + (2 + 18 + 2) * LARGE_LAYERS * 50
            + 6 * (LAYERS + TABLE) * 3 * 6 * 2 * 5,
        ),
        # A function scores: the value net is as large as the policy.
        ({"reward": {"spec": ["f.py:f"]}}, (4 + 18) * POLICY + (2 + 18) * LAYERS * 50),
        ({"value_model": "policy"}, (4 + 18) * POLICY + 20 * LAYERS * 50 + 2 * LARGE_LAYERS * 50),
        ({"reward": {"spec": ["elsewhere"]}}, None),
    ],
)
def test_flops_of_an_iteration_of_ppo(changes, want):
    whole = {
        name: {**FLAGS[name], **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    assert flops("ppo", whole) == want


@pytest.mark.parametrize(
    ("kind", "dtype", "want"),
    [
        ("TPU v5 lite", "float32", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU7x", "bfloat16", 2307e12 / 2),  # two devices a chip
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 PCIe", "bfloat16", None),  # slower, and not known
        ("cpu", "float32", None),
    ],
)
def test_peaks(kind, dtype, want):
    assert speed.peak_flops(kind, dtype) == want


def make_run(directory: Path, devices: int = 4) -> Path:
    """Six steps of 2 s, but for the first, which compiled, and those after evaluations."""
    directory.mkdir()
    rows = [{"step": 1, "time/step": 99.0}]
    rate = {"throughput/tokens_per_second": 4e12, "time/update": 1.5}
    slow = {"throughput/tokens_per_second": 4e10, "time/update": 1.5}
    rows += [{"step": 2, "time/step": 2.0, **rate, "time/evaluation": 48.0, "validation/score": 7}]
    rows += [{"step": 3, "time/step": 200.0, **slow, "validation/score": 9.0}]
    rows += [{"step": 4, "time/step": 200.0, **slow}]
    rows += [{"step": 5, "time/step": 2.0, **rate}]
    rows += [{"step": 6, "time/step": 2.0, **rate, "sft/loss": 1.0}]
    rows[-1] |= {"validation/score": 8.0, "ptx/validation_loss": 2.5}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"stage": "sft", "command": "python experiments/run_sft.py", "config": FLAGS}
    config["versions"] = {"jax": "0.10.2"}
    (directory / "config.json").write_text(json.dumps(config))
    memory = {"peak": "9.50 GiB of 15.75 GiB", "counted": "arrays 6.00 GiB"}
    hardware = {"kind": "TPU v5 lite", "devices": devices, "hosts": 1, "memory": memory}
    (directory / "hardware.json").write_text(json.dumps(hardware))
    return directory


def test_a_run_is_measured(tmp_path):
    """Medians, without the step that compiled and those after evaluations; each device's share."""
    measured = speed.measure(make_run(tmp_path / "sft"))
    assert (measured.seconds, measured.tokens, measured.steps) == (2.0, 1e12, 6)
    assert measured.phases == {"update": 1.5}
    assert measured.figures == {"score": 8.0, "ptx/validation_loss": 2.5}
    assert measured.flops == 6 * (LAYERS + TABLE) * 1e12
    assert measured.utilisation == pytest.approx(measured.flops / 197e12)


def test_the_markdown(tmp_path, capsys):
    """A head for each kind of device; a run of an older version lacks hardware.json."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    runs.append(make_run(tmp_path / "old"))
    (runs[-1] / "hardware.json").unlink()
    out = tmp_path / "speed.md"
    speed.cli([*map(str, runs), "--out", str(out)])
    text = out.read_text()
    assert text.rstrip() in capsys.readouterr().out
    assert text.count("**4 x TPU v5 lite, 1 host**; jax 0.10.2") == 1
    assert "**not recorded**; jax 0.10.2" in text
    of_run = f"2 | 1,000,000,000,000 | {6 * (LAYERS + TABLE):,} |"
    share = f"{100 * 6 * (LAYERS + TABLE) * 1e12 / 197e12:.1f} %"
    assert f"| a | sft | 6 | {of_run} {share} | 9.50 GiB of 15.75 GiB | arrays 6.00 GiB |" in text
    assert "| old | sft | 6 | 2 | ? | ? | ? | ? | ? |" in text
    assert "| run | update |\n| --- | --- |\n| a | 1.5 |\n| b | 1.5 |" in text
    assert "| run | score | ptx/validation_loss |\n| --- | --- | --- |\n| a | 8 | 2.5 |" in text
    assert text.count("    python experiments/run_sft.py") == 3


def test_each_model_of_an_ensemble_scores(tmp_path, monkeypatch):
    for name in ("export", "export-1", "export-2"):
        (tmp_path / name).mkdir()
    run = str(tmp_path)
    found = {"policy": SMALL, run: LARGE, **{f"{run}/export-{n}": LARGE for n in (1, 2)}}
    monkeypatch.setattr(speed, "_sizes", found.get)
    one = flops("ppo", {"reward": {"spec": ["policy"]}, "value_model": "policy"})
    three = flops("ppo", {"reward": {"spec": [run]}, "value_model": "policy"})
    assert three - one == 2 * (3 * LARGE_LAYERS - LAYERS) * 50


def test_what_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.cli([str(make_run(tmp_path / "b")), "--out", f"{tmp_path}/nowhere/x.md"])
    assert f"--out {tmp_path}/nowhere/x.md: there is no folder" in capsys.readouterr().err
    (make_run(tmp_path / "a") / "config.json").unlink()
    refused = ([], "RUNS: give at least one"), ([tmp_path], "no run directory")
    for runs, says in (*refused, ([tmp_path / "a"], "config.json: no such file")):
        with pytest.raises(SystemExit, match="2"):
            speed.cli(list(map(str, runs)))
        assert says in capsys.readouterr().err
