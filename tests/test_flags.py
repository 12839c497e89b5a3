"""Command lines: presets, help, wrong usage, data flags, and what --resume may change."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from instructjax import models, sharding
from instructjax.data.config import DataConfig
from instructjax.run.flags import RunConfig, parse, write


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    out: Path = Path("runs/sft")
    model: str = "tiny"
    learning_rate: float = 1e-3
    """Peak of Adam's learning rate."""
    data: DataConfig = field(default_factory=DataConfig)


PRESETS = {
    "baseline": Config(learning_rate=9.65e-6),
    "ppo": Config(learning_rate=5.03e-6, steps=7, data=DataConfig(dedup=50)),
}


def read(*argv: str) -> Config:
    return parse(Config, PRESETS, "Fine-tunes.\n", argv)


def test_the_sequence_is_split_where_it_is_asked_for():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    assert read().constrainer(mesh).sequence == 1
    assert read("--shard_sequence").constrainer(mesh).sequence == 4
    with pytest.raises(ValueError, match="--shard_sequence: there is no tensor axis in --mesh"):
        read("--shard_sequence").constrainer(sharding.make_mesh(fsdp=8))


def test_the_flags_decide_how_a_model_is_computed():
    model = read("--model_dtype", "bfloat16", "--remat", "full", "--unroll", "3").compute(
        dataclasses.replace(models.PRESETS["tiny"], dropout=0.5)
    )
    assert (model.dtype, model.remat, model.unroll, model.dropout) == ("bfloat16", "full", 3, 0.5)


def test_first_preset_is_the_default():
    assert read() == dataclasses.replace(PRESETS["baseline"], preset="baseline")


def test_flags_override_the_preset_wherever_it_stands():
    for argv in (["--steps", "3", "--preset", "ppo"], ["--preset=ppo", "--steps", "3"]):
        config = read(*argv)
        assert config == dataclasses.replace(PRESETS["ppo"], preset="ppo", steps=3)


def test_the_small_preset_is_the_default_for_other_data(capsys):
    """The miniature's settings would ruin a real model, so they go with its data alone."""
    presets = {"miniature": Config(learning_rate=2e-3), "small": Config(), "big": Config(steps=7)}

    def preset_of(*argv: str) -> str:
        return parse(Config, presets, None, argv).preset

    assert preset_of() == preset_of("--data", "miniature") == "miniature"
    assert preset_of("--model", "gpt2", "--data.dedup", "5") == "miniature"
    for argv in (["--data", "jsonl:x"], ["--data=jsonl:x"], ["--seed", "1", "--data", "hf:x"]):
        assert preset_of(*argv) == "small"
        assert preset_of(*argv, "--preset", "big") == "big"
        assert preset_of("--preset=miniature", *argv) == "miniature"
    assert parse(Config, presets, None, ["--data=hf:x"]).learning_rate == 1e-3
    with pytest.raises(SystemExit):
        preset_of("--data", "hf:x", "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "below are those of small. Without --preset, data other than the miniature's get" in text


def test_the_headline_states_the_preset_and_what_the_script_names():
    class Shown(Config):
        SHOWN = ("learning_rate", "data.dedup")

    config = Shown(preset="small", learning_rate=2e-5)
    assert config.headline == "preset small: learning_rate 2e-05, data.dedup 0"


def test_no_presets():
    assert parse(Config, {}, None, ["--seed", "4"]) == Config(seed=4)


def test_data_is_a_flag_and_a_group():
    config = read("--preset", "ppo", "--data", "jsonl:x.jsonl", "--data.on_error", "skip")
    assert config.data == DataConfig(spec="jsonl:x.jsonl", on_error="skip", dedup=50)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        read("--preset", "ppo", "--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Fine-tunes. Presets: baseline, ppo; the values below are those of ppo." in text
    for config_field in dataclasses.fields(Config):
        assert f"--{config_field.name} " in text or f"--{config_field.name}, " in text
    for words in (
        # `Config` declares --out again without a help; the help of the base class is shown.
        "--out PATH The run directory, for config, metrics, samples, checkpoints, figures and the"
        " export. (default: runs/sft)",
        "--learning_rate FLOAT Peak of Adam's learning rate. (default: 5.03e-06)",
        "--data.dedup INT",
        "(default: 50)",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "big"], "--preset big: not one of baseline, ppo"),
        (["--preset"], "--preset"),
        (["--learning_rat", "1"], "--learning_rat"),
        (["--steps", "many"], "--steps"),
        (["--steps", "-1"], "--steps -1: must not be negative"),
        (["--save_every", "0"], "--save_every 0: must be at least 1"),
        (["--keep_last", "0"], "--keep_last 0: must be at least 1"),
        (["--log_every", "0"], "--log_every 0: must be at least 1"),
        (["--mesh", "data=2,model=4"], "'model' is not one of data, fsdp, tensor"),
        (["--profile", "3"], "--profile 3: expected STEP:COUNT"),
        (["--profile", "0:2"], "--profile 0:2: expected STEP:COUNT"),
        (["--profile", "5:0"], "--profile 5:0: expected STEP:COUNT"),
        (["--data.dedup", "-1"], "--data.dedup -1: must not be negative"),
    ],
)
def test_wrong_usage_is_2_and_no_traceback(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert message in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text


def test_profile_window():
    assert list(Config(profile="10:3").profile_window) == [10, 11, 12]
    assert not Config().profile_window


def test_resume_compares_with_the_config_of_the_run(tmp_path):
    config = Config(out=tmp_path, data=DataConfig(dedup=1))
    assert write(config, "sft") == []
    # Nothing has been trained: another config may take the place.
    config = dataclasses.replace(config, seed=2)
    assert write(config, "sft") == []
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["stage"], record["config"]["seed"]) == ("sft", 2)
    assert record["config"]["data"]["dedup"] == 1
    assert record["command"].startswith("python ")

    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds a run"):
        write(config, "sft")
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match=r"\(data.dedup: 1 -> 0\)"):
        write(dataclasses.replace(config, data=DataConfig()), "sft")
    with pytest.raises(ValueError, match="stage: 'sft' -> 'rm'"):
        write(config, "rm")
    elsewhere = dataclasses.replace(config.data, cache=None)
    free = dataclasses.replace(config, steps=9, mesh="data=8", keep_last=3, data=elsewhere)
    assert write(free, "sft") == ["keep_last: 2 -> 3", "mesh: '' -> 'data=8'", "steps: None -> 9"]
    assert json.loads((tmp_path / "config.json").read_text())["config"]["steps"] == 9
