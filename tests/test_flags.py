"""Command lines: presets, help, wrong usage, data flags, and what --resume may change."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ppo_config
import preflight
import pytest
import run_ppo
import run_pretrain
import run_rm
import run_sft
import sample
import swap_loss
from jax.sharding import AbstractMesh

from instructjax import models, ranges, sharding
from instructjax.data import __main__ as data_commands
from instructjax.data.config import DataConfig
from instructjax.run import checks, flags
from instructjax.run.flags import RunConfig, parse


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


def test_the_home_directory_after_an_equals_sign(monkeypatch):
    """A shell expands `--out ~/x`, but not `--out=~/x`."""
    monkeypatch.setenv("HOME", "/home/me")
    config = read("--out=~/a b/run", "--checkpoints=~/c")
    assert (config.out, config.checkpoints) == (Path("/home/me/a b/run"), "/home/me/c")
    assert read().checkpoints is None


@pytest.mark.parametrize("script", [run_pretrain, run_sft, run_rm, ppo_config, swap_loss])
def test_a_run_directory_is_no_bucket(script):
    with pytest.raises(ValueError, match=r"--out gs://b/x: .*--checkpoints may be gs://BUCKET/N"):
        script.Config(out=Path("gs://b/x"))


def test_what_is_no_directory_and_no_bucket_is_refused():
    for wrong in ("gs://b", "gs://b/", "gs:/b/x", "s3://b/x"):
        with pytest.raises(
            ValueError, match=r"--checkpoints \w+://b.*: expected a directory or gs"
        ):
            Config(checkpoints=wrong)
    with pytest.raises(ValueError, match=r"--out gs://b/x.json: expected a file on a disk"):
        preflight.Config(topology="v5e:2x2", out=Path("gs://b/x.json"))
    for name in ("a:b/c", "a/b:/c", "/gs/b", "../x"):
        assert Config(checkpoints=name, out=Path(name)).checkpoints == name


def test_the_flags_decide_how_a_model_is_computed():
    model = read("--model_dtype", "bfloat16", "--remat", "full", "--unroll", "3").compute(
        dataclasses.replace(models.PRESETS["tiny"], dropout=0.5)
    )
    assert (model.dtype, model.remat, model.unroll, model.dropout) == ("bfloat16", "full", 3, 0.5)


def test_hosts_compare_their_flags_before_a_check(monkeypatch):
    """A check may ask host 0, for which all hosts must come to it: of one --model, not another."""
    made = []
    monkeypatch.setattr(flags.hosts, "require_equal", lambda name, values: made.append(values))
    argv = ["--model", "a", "--out", "o"]
    parse(run_sft.Config, {}, "", argv, check=lambda config: made.append(config))
    assert made[0]["model"] == made[1].model == "a"
    assert "out" not in made[0]


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
        (["--seed", "-1"], "--seed -1: must be from 0 to 2^32 - 1"),
        (["--out", ""], "--out: needs a directory of its own"),
    ],
)
def test_wrong_usage_is_2_and_no_traceback(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert message in " ".join(text.replace("│", " ").split())
    assert "Traceback" not in text


CONFIGS = [
    *(script.Config for script in (run_pretrain, run_sft, run_rm, ppo_config, sample, preflight)),
    *(swap_loss.DPO, swap_loss.GRPO, swap_loss.RLOO, swap_loss.RAFT),
    *(data_commands.Show, data_commands.Tokenizer),
]


def numbers(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(flag, type with its range) of each flag that takes a number."""
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) is not typing.ClassVar and leaves(hint) & {int, float}:
            yield f"{prefix}{name}", hint


def leaves(hint: Any) -> set[Any]:
    parts = [part for part in typing.get_args(hint) if not isinstance(part, ranges.Range)]
    return {leaf for part in parts for leaf in leaves(part)} or {hint}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_number_has_a_range_and_no_range_holds_nan(config):
    flags = dict(numbers(config))
    assert flags or config is data_commands.Show
    for flag, hint in flags.items():
        for value in (math.nan, -math.inf, -(10**20)):
            if hint not in (ranges.Finite, ranges.Finite | None, tuple[ranges.Finite, ...]):
                assert ranges.refusal(hint, value), flag
        assert ranges.refusal(hint, math.nan), flag


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (ranges.Count, [1, 10**9], [0, -1, 2**31]),
        (ranges.CountFrom2, [2], [1, 0]),
        (ranges.CountOrZero, [0, 1], [-1]),
        (ranges.Seed, [0, 2**32 - 1], [-1, 2**32]),
        (ranges.Finite, [-1e30, 0.0], [math.inf]),
        (ranges.NotNegative, [0.0, 1e-30], [-1e-30, math.inf]),
        (ranges.Positive, [1e-30], [0.0, -1.0, math.inf]),
        (ranges.PositiveOrInf, [1e-30, math.inf], [0.0, -1.0]),
        (ranges.Share, [0.0, 1.0], [-0.01, 1.01]),
        (ranges.ShareBelow1, [0.0, 0.999], [1.0, -0.01]),
        (ranges.ShareAbove0, [0.001, 1.0], [0.0, 1.01]),
    ],
)
def test_ranges_by_hand(kind, inside, outside):
    inner = dataclasses.make_dataclass("Inner", [("x", kind | None), ("many", tuple[kind, ...])])
    outer = dataclasses.make_dataclass("Outer", [("inner", inner)])
    for value in [*inside, None]:
        ranges.check(outer(inner(value, tuple(inside))))
    for value in [*outside, math.nan]:
        with pytest.raises(ValueError, match=re.escape(f"--inner.x {value}: must")):
            ranges.check(outer(inner(value, ())))
        with pytest.raises(ValueError, match=re.escape(f"--inner.many {value}: must")):
            ranges.check(outer(inner(inside[0], (inside[0], value))))


@pytest.mark.parametrize(
    ("script", "argv", "flag"),
    [
        (run_ppo, ["--ppo.clip", "-0.2"], "--ppo.clip -0.2: must be positive"),
        (run_ppo, ["--ppo.learning_rate", "nan"], "--ppo.learning_rate nan: must not be negative"),
        (run_ppo, ["--ppo.minibatch", "0"], "--ppo.minibatch 0: must be at least 1"),
        (run_ppo, ["--ptx.length", "1"], "--ptx.length 1: must be at least 2"),
        (run_ppo, ["--adam.b2", "1"], "--adam.b2 1.0: must be at least 0 and below 1"),
        (run_ppo, ["--pretrain.max_response", "0"], "--pretrain.max_response 0: must be"),
        (run_ppo, ["--reward.weights", "1", "inf"], "--reward.weights inf: must be finite"),
        (run_rm, ["--microbatches", "4"], "--batch_size 6: not a multiple of --microbatches 4"),
        (run_rm, ["--folds", "1"], "--folds 1: must be at least 2"),
        (run_sft, ["--epochs", "0"], "--epochs 0.0: must be positive"),
        (run_sft, ["--demonstrations.dedup", "-1"], "--demonstrations.dedup"),
        (run_pretrain, ["--length", "1"], "--length 1: must be at least 2"),
        (swap_loss, ["grpo", "--samples", "1"], "--samples 1: must be at least 2"),
        (sample, ["--context", "0"], "--context 0: must be at least 1"),
        (preflight, ["--topology", "v5e:2x2", "--num_slices", "0"], "--num_slices 0: must be"),
    ],
    ids=lambda x: x[-2] if isinstance(x, list) else "",
)
def test_scripts_refuse_a_wrong_number_before_they_do_anything(script, argv, flag, capsys):
    with pytest.raises(SystemExit) as end:
        script.cli(argv)
    assert end.value.code == 2
    assert flag in " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_profile_window():
    assert list(Config(profile="10:3").profile_window) == [10, 11, 12]
    assert not Config().profile_window


def test_resume_compares_with_the_config_of_the_run(tmp_path):
    def compare(config, stage="sft"):
        return flags.compare(config, stage, config.checkpoint_directory)

    config = Config(out=tmp_path, data=DataConfig(dedup=1))
    flags.write(config, "sft")
    # Nothing has been trained: another config may take the place.
    config = dataclasses.replace(config, seed=2)
    assert compare(config) == []
    flags.write(config, "sft")
    record = json.loads((tmp_path / "config.json").read_text())
    assert (record["stage"], record["config"]["seed"]) == ("sft", 2)
    assert record["config"]["data"]["dedup"] == 1
    assert record["command"].startswith("python ")

    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds a run"):
        compare(config)
    config = dataclasses.replace(config, resume=True)
    # A version without a flag wrote the file: the flag had its default.
    del record["config"]["data"]["only"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert compare(config) == []
    only = dataclasses.replace(config.data, only="lang=en")
    with pytest.raises(ValueError, match=r"\(data.only: '' -> 'lang=en'\)"):
        compare(dataclasses.replace(config, data=only))
    with pytest.raises(ValueError, match=r"\(data.dedup: 1 -> 0\)"):
        compare(dataclasses.replace(config, data=DataConfig()))
    with pytest.raises(ValueError, match="stage: 'sft' -> 'rm'"):
        compare(config, "rm")
    elsewhere = dataclasses.replace(config.data, cache=None)
    free = dataclasses.replace(config, steps=9, mesh="data=8", keep_last=3, data=elsewhere)
    assert compare(free) == ["keep_last: 2 -> 3", "mesh: '' -> 'data=8'", "steps: None -> 9"]


@pytest.mark.parametrize(
    ("mesh", "given", "fitting"),
    [
        ({"data": 8}, 2, 2),
        ({"data": 8}, 4, 2),
        ({"fsdp": 4, "tensor": 2}, 3, 2),
        ({"data": 1}, 3, 2),
        ({"data": 2, "fsdp": 8}, 16, 1),
    ],
)
def test_each_device_has_a_row_of_each_microbatch(mesh, given, fitting, capsys):
    @dataclasses.dataclass
    class Rows:
        batch_size: int = 16
        microbatches: int = given

    sizes = tuple(mesh.get(axis, 1) for axis in sharding.AXES)
    fitted = checks.fit_microbatches(Rows(), AbstractMesh(sizes, sharding.AXES))
    assert fitted == Rows(microbatches=fitting)
    assert bool(capsys.readouterr().out) == (fitting != given)
