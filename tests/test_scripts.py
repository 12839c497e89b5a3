"""Each script from its command line to its run directory: toy sizes, eight emulated devices."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import ppo_config
import pytest
import run_ppo
import run_pretrain
import run_rm
import run_sft
import stopped
import swap_loss

from instructjax import data, hf, reward, sharding
from instructjax.data import DataConfig, sources
from instructjax.evaluation.ranking import GAIN
from instructjax.models import PRESETS
from instructjax.run import flags, pretrained
from instructjax.run.checkpoint import Checkpoints
from instructjax.run.lora import LoRA
from instructjax.scoring import RewardConfig

SMALL = {"demonstrations": 80, "comparisons": 60, "prompts": 40, "text": 200}
FEW = ["--batch_size", "8", "--unroll", "1", "--mesh", "data=8", "--data.cache", "None"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """A miniature of few records, for all scripts of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        patch.setattr(run_rm, "TEST", 24)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """run_pretrain, run_sft and run_rm, one after the other."""
    out = tmp_path_factory.mktemp("runs")
    pretrain = [*FEW, "--out", f"{out}/pretrain", "--steps", "3", "--eval_every", "2"]
    run_pretrain.cli([*pretrain, "--profile", "2:1"])
    sft = [*FEW, "--model", f"{out}/pretrain", "--out", f"{out}/sft", "--steps", "3"]
    run_sft.cli([*sft, "--eval_every", "2", "--max_new_tokens", "4", "--dropout", "0.1"])
    rm = [*FEW, "--model", f"{out}/sft", "--out", f"{out}/rm", "--steps", "3"]
    run_rm.cli([*rm, "--ensemble", "2"])
    return out


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_run_directory_is_complete(runs):
    figures = {"pretrain": [], "sft": [], "rm": ["accuracy.png", "calibration.png", "results.json"]}
    for stage, more in figures.items():
        names = ["config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "report.html"]
        names += ["export", *more]
        assert [name for name in names if not (runs / stage / name).exists()] == []
        metrics = lines(runs / stage / "metrics.jsonl")
        assert [row["step"] for row in metrics if row["step"]] == [1, 2, 3]
        assert "optim/learning_rate" in metrics[-1]
        assert "optim/grad_norm" in metrics[-1]
    assert any((runs / "pretrain" / "profile").rglob("*.xplane.pb"))


def test_the_learning_rate_ends_near_a_tenth_of_its_peak(runs):
    """A cosine to 10 %: 0.1 + 0.45 (1 + cos(pi (n - 1) / 3)) at step n of 3."""
    for stage, peak in (("sft", run_sft), ("rm", run_rm)):
        rates = [row.get("optim/learning_rate") for row in lines(runs / stage / "metrics.jsonl")]
        peak = peak.PRESETS["miniature"].learning_rate
        expected = peak * np.array([1.0, 0.775, 0.325])
        np.testing.assert_allclose([r for r in rates if r is not None], expected, rtol=1e-5)


def test_samples_are_shown_at_each_validation(runs):
    shown = lines(runs / "sft" / "samples.jsonl")
    assert {sample["step"] for sample in shown} == {0, 2, 3}
    assert all(sample["prompt"] and "response" in sample for sample in shown)


def test_the_exported_reward_model_gives_demonstrations_0_on_average(runs):
    """The export scores validation demonstrations 0 on average, so it contains the shifted bias."""
    config, params = hf.load(runs / "rm" / "export")
    assert config.scalar_head
    tokenizer = hf.load_tokenizer(runs / "rm" / "export")
    source = data.DataConfig(cache=None)
    demos = data.load(source, "demonstrations", tokenizer, split="validation", log=lambda _: None)
    batch = next(data.Stream(data.ComparisonRows(demos), len(demos), seed=0).once())
    scores = np.asarray(reward.score(params, config, batch))
    assert abs(scores.mean()) < 1e-4
    shift = json.loads((runs / "rm" / "results.json").read_text())["demonstrations"][0]
    assert abs(shift) > 0.01
    assert scores.std() > 1e-3


def test_the_reward_model_is_measured_beside_judge_and_baselines(runs):
    accuracy = json.loads((runs / "rm" / "results.json").read_text())["accuracy"]
    for group in ("training labelers", "held-out labelers", "ranks apart: 1"):
        row = accuracy[group]
        assert set(row) == {"reward model", "judge", "bag of words", "length", "pairs", GAIN}
        for name in set(row) - {"pairs", GAIN}:
            share, low, high = row[name]
            assert low <= share <= high
    rows = list(accuracy.items())
    pairs = lambda start: sum(row["pairs"] for name, row in rows if name.startswith(start))  # noqa: E731
    total = accuracy["training labelers"]["pairs"] + accuracy["held-out labelers"]["pairs"]
    assert pairs("category: ") == pairs("ranks apart: ") == total
    assert accuracy["training labelers"]["judge"][0] > 0.6


def test_an_interrupted_sft_run_ends_as_the_uninterrupted_one(runs, tmp_path, capsys):
    """The run is stopped after step 2 of 3. The export is the best checkpoint's in both runs."""
    few = [*FEW, "--model", f"{runs}/pretrain", "--max_new_tokens", "4", "--eval_every", "2"]
    few += ["--dropout", "0.1", "--out", f"{tmp_path}/sft", "--save_every", "2"]
    with stopped.before_step(3):
        run_sft.cli([*few, "--steps", "3"])
    run_sft.cli([*few, "--steps", "3", "--resume"])
    assert "resumed after step 2" in capsys.readouterr().out
    once, twice = (lines(at / "sft" / "metrics.jsonl") for at in (runs, tmp_path))
    timed = ("time/", "throughput/")
    strip = lambda row: {k: v for k, v in row.items() if not k.startswith(timed)}  # noqa: E731
    assert list(map(strip, once)) == list(map(strip, twice))
    first, second = (hf.load(at / "sft" / "export")[1] for at in (runs, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_another_mesh_goes_on_with_the_same_losses(runs, tmp_path):
    """The reward model's run resumes after step 2 on data x fsdp x tensor instead of data."""
    few = [*FEW[:4], "--data.cache", "None", "--model", f"{runs}/sft", "--save_every", "2"]
    few += ["--steps", "7", "--keep_last", "9", "--dropout", "0.1"]
    run_rm.cli([*few, "--out", f"{tmp_path}/whole", "--mesh", "data=8"])
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    mesh = ["--mesh", "data=2,fsdp=2,tensor=2"]
    run_rm.cli([*few, "--out", f"{tmp_path}/resumed", *mesh, "--resume_step", "2"])
    whole, resumed = (
        [row["rm/loss"] for row in lines(tmp_path / name / "metrics.jsonl") if row["step"] > 2]
        for name in ("whole", "resumed")
    )
    assert len(whole) == 5
    np.testing.assert_allclose(resumed, whole, atol=1e-4)


def test_transformers_gives_the_exported_reward_models_scores(runs):
    """Up to the constant that the export states, where the family has no place for a bias."""
    import torch
    import transformers

    path = runs / "rm" / "export"
    torch_model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config, params = hf.load(path)
    source = data.DataConfig(cache=None)
    few = data.load(source, "demonstrations", tokenizer, split="validation", log=lambda _: None)
    ours = reward.score(
        params, config, next(data.Stream(data.ComparisonRows(few), 8, seed=0).once())
    )
    for i, row in enumerate(np.asarray(ours)[: len(few), 0]):
        ids = [*few.prompt[i], *few.response[i, 0]]
        with torch.no_grad():
            score = torch_model(torch.tensor([ids])).logits[0, 0].item()
        bias = getattr(torch_model.config, "reward_bias", 0.0)
        assert score + bias == pytest.approx(row, abs=1e-4)


def test_the_reward_model_picks_the_checkpoint(runs, tmp_path, capsys):
    few = [*FEW, "--model", f"{runs}/pretrain", "--steps", "3", "--max_new_tokens", "4"]
    few += ["--keep", "reward", "--reward_model", f"{runs}/rm", "--eval_every", "1"]
    few += ["--pretrain_share", "0.25", "--pretrain.cache", "None"]
    run_sft.cli([*few, "--out", str(tmp_path / "sft")])
    rewards = {
        row["step"]: row["validation/reward"]
        for row in lines(tmp_path / "sft" / "metrics.jsonl")
        if row["step"]
    }
    best = max(rewards, key=lambda step: rewards[step])
    kept = [line for line in capsys.readouterr().out.splitlines() if "kept checkpoint" in line]
    assert len(rewards) == 3
    assert f" {best} " in kept[0]


def test_an_ensemble_is_its_members_trained_at_once(runs, tmp_path):
    """Member 1 of two is the reward model that seed 1 gives alone."""
    few = [*FEW, "--model", f"{runs}/sft", "--steps", "3"]
    run_rm.cli([*few, "--seed", "1", "--out", f"{tmp_path}/rm"])
    ensemble, alone = (
        json.loads((at / "rm" / "results.json").read_text()) for at in (runs, tmp_path)
    )
    assert [len(shares) for shares in ensemble["members"].values()] == [2, 2]
    shifts = ensemble["demonstrations"]
    assert shifts[0] != pytest.approx(shifts[1], abs=1e-3)
    assert shifts[1] == pytest.approx(alone["demonstrations"][0], abs=1e-3)
    member, alone = (
        hf.load(path)[1]["score"]["kernel"]
        for path in (runs / "rm" / "export-1", tmp_path / "rm" / "export")
    )
    np.testing.assert_allclose(member, alone, atol=1e-4)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """The miniature's demonstrations and comparisons as a user's files, and 20 demonstrations whose
    prompts exceed any row."""
    out = tmp_path_factory.mktemp("data")
    demos = data.read(DataConfig(cache=None), "demonstrations", split="train")
    ranked = data.read(DataConfig(cache=None), "comparisons", split="train")
    rows = [{"prompt": r.prompt, "completion": r.responses[0]} for r in demos]
    long = [
        {"prompt": f"{i} " + 500 * r["prompt"], "completion": "no."} for i, r in enumerate(rows)
    ]
    (out / "demos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + long[:20]))
    rows = [{"prompt": r.prompt, "responses": r.responses, "ranks": r.ranks} for r in ranked]
    (out / "ranked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


def test_a_row_is_as_long_as_the_data_and_overlong_demonstrations_are_counted(own_data, capsys):
    from instructjax import miniature

    source = DataConfig(f"jsonl:{own_data}/demos.jsonl", cache=None)
    model = PRESETS["miniature"]

    def read(config, max_length):
        context = dataclasses.replace(model, max_length=max_length)
        return run_sft.load_demonstrations(config, miniature.tokenizer(), context)

    for length, of_row in ((None, 128), (96, 96)):
        config = run_sft.Config(data=source, length=length)
        seen, unseen, row = read(config, 288)
        assert row == of_row
        assert len(seen) + len(unseen) == 80  # all but the 20 long ones
        assert (
            "dropped: prompts that leave no room for a response in a context of"
            in capsys.readouterr().out
        )
    cut = dataclasses.replace(config, data=dataclasses.replace(source, overlong="truncate"))
    seen, unseen, row = read(cut, 288)
    assert len(seen) + len(unseen) == 100
    assert "cut: prompts that leave no room" in capsys.readouterr().out
    *_, row = read(dataclasses.replace(cut, length=None), 2**20)
    assert row == run_sft.LONGEST


def test_own_data_get_the_small_preset(runs, own_data, tmp_path, capsys):
    """Only the samples that are shown are drawn; the export is the best checkpoint's."""
    drawn = []
    sample = run_sft.rollout.sample

    def counted(params, model, prompts, *args, **keywords):
        drawn.append(len(prompts))
        return sample(params, model, prompts, *args, **keywords)

    few = [*FEW, "--model", f"{runs}/pretrain", "--data", f"jsonl:{own_data}/demos.jsonl"]
    few += ["--steps", "3", "--eval_every", "1", "--max_new_tokens", "4"]
    few += ["--learning_rate", "0.1", "--adam.weight_decay", "0.1", "--keep_last", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sft.rollout, "sample", counted)
        run_sft.cli([*few, "--out", f"{tmp_path}/sft"])
    assert drawn == [4, 4, 4, 4]
    said = capsys.readouterr().out
    assert said.startswith("preset small: learning_rate 0.1, warmup 0.1, batch_size 8, epochs 2")
    assert "rows of 128" in said
    losses = {row["step"]: row["validation/loss"] for row in lines(tmp_path / "sft/metrics.jsonl")}
    del losses[0]
    best = min(losses, key=lambda step: losses[step])
    assert best < 3  # that of an earlier step, so that its parameters are read
    kept = [line for line in said.splitlines() if line.startswith("│ validation/loss")]
    assert f"{losses[best]:.4g}" in kept[0]
    params = hf.load(tmp_path / "sft" / "export")[1]
    checkpoints = Checkpoints(tmp_path / "sft" / "checkpoints", 1)
    saved = checkpoints.restore_params(best, params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)
    record = json.loads((tmp_path / "sft" / "config.json").read_text())["config"]
    assert (record["preset"], record["remat"]) == ("small", "full")


def test_own_comparisons_are_packed_and_long_ones_are_dropped(runs, own_data, tmp_path, capsys):
    few = [*FEW, "--model", f"{runs}/sft", "--data", f"jsonl:{own_data}/ranked.jsonl"]
    few += ["--steps", "1", "--length", "128"]
    run_rm.cli([*few, "--out", f"{tmp_path}/rm"])
    said = capsys.readouterr().out
    assert "dropped: over 128 tokens, the row's (--length)" in said
    assert "prompts on average" in said
    assert "preset small: learning_rate 1e-05" in said


def test_folds_leave_labelers_out(runs, tmp_path):
    few = [*FEW, "--model", f"{runs}/sft", "--steps", "1", "--folds", "2", "--by", "labeler"]
    run_rm.cli([*few, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["reward model, labeler unseen"]) == {"mean", "spread"}
    assert "judge, labeler seen" in results


def test_the_papers_presets_ask_for_model_and_data(capsys):
    for script, preset in ((run_sft, "instructgpt-1.3b-ppo-init"), (run_rm, "instructgpt-6b")):
        with pytest.raises(SystemExit) as stop:
            script.cli(["--preset", preset])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "--model" in said
        assert "--data" in said


def test_the_papers_values():
    """The values of InstructGPT's SFT baselines, PPO initialisation models and reward model."""
    sft = run_sft.PRESETS
    papers = [preset for name, preset in sft.items() if name.startswith("instructgpt")]
    rows = [(c.learning_rate, c.batch_size, c.epochs, c.dropout) for c in papers]
    assert rows[:3] == [(9.65e-6, 32, 16, 0.2), (9.65e-6, 32, 16, 0.2), (5.03e-6, 8, 16, 0.2)]
    assert rows[3:] == [(5e-6, 32, 2, 0.0), (1.04e-5, 32, 2, 0.0), (2.45e-6, 8, 2, 0.0)]
    assert [c.pretrain_share for c in papers] == [0, 0, 0, 0.1, 0.1, 0.1]
    assert {(c.warmup, c.length) for c in papers} == {(0, 2048)}
    rm = run_rm.PRESETS["instructgpt-6b"]
    assert (rm.learning_rate, rm.batch_size, rm.epochs) == (9e-6, 64, 1)


def test_wrong_flags_are_named(capsys):
    for script, words, named in (
        (run_sft, ["--pretrain_share", "1"], "--pretrain_share 1"),
        (run_sft, ["--dropout", "-1"], "--dropout -1"),
        (run_sft, ["--keep", "reward"], "--reward_model"),
        (run_rm, ["--ensemble", "0"], "--ensemble 0"),
        (run_rm, ["--folds", "1"], "--folds 1"),
    ):
        with pytest.raises((SystemExit, ValueError)) as stop:
            script.cli(words)
        assert named in f"{stop.value}{capsys.readouterr().err}"


SFT_BY_REWARD = {"keep": "reward", "reward_model": "runs/rm"}
MORE_DATA = DataConfig(dedup=50)
SCHEDULE = {"warmup": 7, "adam": flags.Adam(weight_decay=0.1)}
LORA = {"lora": LoRA(rank=3)}
# What makes another run, and what changes how it is computed and reported. Flags of all scripts,
# then those of each.
REFUSED = {"seed": 1, "model": "runs/x", "tokenizer": "x", "model_dtype": "bfloat16"}
REFUSED |= {"batch_size": 64, "data": MORE_DATA, "learning_rate": 0.5}
PRINTED = {"steps": 7, "mesh": "data=8", "shard_sequence": True, "remat": "full", "unroll": 4}
PRINTED |= {"save_every": 7, "keep_last": 7, "log_every": 7, "profile": "7:1", "wandb": "x"}
PRINTED |= {"tensorboard": True, "stall": 7.0}
SWAPPED = {"sample_batch": 1, "microbatches": 2, "gold": ("runs/x",)}
SWAPPED |= {"eval_prompts": 7, "eval_every": 7}
CHANGES = [
    (
        run_pretrain.Config(),
        {"length": 64, "epochs": 7, **SCHEDULE},
        {"eval_every": 7, "eval_batches": 7, "microbatches": 2},
    ),
    (
        run_sft.Config(**SFT_BY_REWARD),
        {"length": 64, "epochs": 7, "dropout": 0.5, "pretrain": MORE_DATA, "pretrain_share": 0.5}
        | {"keep": "loss", "reward_model": "runs/x", **SCHEDULE, **LORA}
        | {"eval_every": 7, "eval_prompts": 7, "max_new_tokens": 7},  # decide what is exported
        {"sample_batch": 7, "microbatches": 2},
    ),
    (
        run_rm.Config(),
        {"length": 64, "epochs": 7, "dropout": 0.5, "demonstrations": MORE_DATA, **SCHEDULE, **LORA}
        | {"ensemble": 2, "folds": 2, "by": "category"},
        {"group_by": ("category",), "eval_every": 7, "microbatches": 2},
    ),
    (swap_loss.DPO(), {"beta": 0.5, "max_new_tokens": 7, **LORA}, SWAPPED),
    (
        swap_loss.GRPO(),
        {"beta": 0.5, "max_new_tokens": 7, "samples": 7, "reward": RewardConfig(spread=2), **LORA},
        SWAPPED,
    ),
    (
        swap_loss.RLOO(),
        {"beta": 0.5, "max_new_tokens": 7, "samples": 7, "reward": RewardConfig(spread=2), **LORA},
        SWAPPED,
    ),
    (
        swap_loss.RAFT(),
        {"beta": 0.5, "max_new_tokens": 7, "samples": 7, "reward": RewardConfig(spread=2), **LORA}
        | {"keep": "random"},
        SWAPPED,
    ),
]


def compare(config, stage="stage"):
    return flags.compare(config, stage, config.checkpoint_directory)


@pytest.mark.parametrize(("config", "refused", "printed"), CHANGES)
def test_what_a_resumed_run_may_change(config, refused, printed, tmp_path):
    config = dataclasses.replace(config, out=tmp_path, resume=True)
    refused, printed = REFUSED | refused, PRINTED | printed
    fields = {field.name for field in dataclasses.fields(config)}
    free = {"out", "preset", "resume", "resume_step", "checkpoints"}
    assert fields - free == {*refused, *printed}
    flags.write(config, "stage")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    for name, value in refused.items():
        with pytest.raises(ValueError, match=rf"--resume would make another run .*\({name}"):
            compare(dataclasses.replace(config, **{name: value}))
    changed = dataclasses.replace(config, **printed)
    assert sorted(line.split(":")[0] for line in compare(changed)) == sorted(printed)


def test_a_resumed_run_may_keep_tokenised_text_elsewhere(tmp_path):
    here = DataConfig(cache=f"{tmp_path}/here")
    config = run_sft.Config(out=tmp_path, resume=True, data=here, pretrain=here)
    flags.write(config, "sft")
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    elsewhere = dataclasses.replace(config, data=DataConfig(), pretrain=DataConfig())
    assert compare(elsewhere, "sft") == []


def test_a_model_is_a_preset_a_run_or_a_directory(runs, tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config, params, tokenizer = pretrained.load("miniature", mesh)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_ids == (tokenizer.eos_token_id,)
    assert config.layers == PRESETS["miniature"].layers
    again = pretrained.load("miniature", mesh, seed=1)[1]
    assert not np.array_equal(params["embed"]["tokens"], again["embed"]["tokens"])
    of_run, of_directory = (
        pretrained.load(str(path), mesh)[1] for path in (runs / "sft", runs / "sft" / "export")
    )
    jax.tree.map(np.testing.assert_array_equal, of_run, of_directory)


@pytest.mark.parametrize(
    ("run", "config", "says"),
    [
        (run_pretrain.run_pretrain, run_pretrain.Config, "--length 257"),
        (run_sft.run_sft, run_sft.Config, "--length 257"),
        (run_ppo.run_ppo, ppo_config.Config, "--ptx.length 257"),
        (swap_loss.swap_loss, swap_loss.DPO, "--max_new_tokens 256"),
    ],
)
def test_lengths_beyond_the_context_without_a_check(run, config, says, tmp_path):
    """`check` is no part of a call from Python, and does not know the context of a hub's model."""
    name = says.split()[0]
    given = {"length": 257} if name == "--length" else {"max_new_tokens": 256}
    if name == "--ptx.length":
        (tmp_path / "r.py").write_text("f = len\n")
        given = {"ptx": dataclasses.replace(config().ptx, length=257)}
        given["reward"] = RewardConfig((f"{tmp_path}/r.py:f",))
    with pytest.raises(ValueError, match=f"^{says}: the model's context is 256 tokens"):
        run(config(out=tmp_path / "out", model="miniature", **given))


def test_a_model_that_is_not_there_says_what_was_tried(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(FileNotFoundError, match=r"not a preset .*miniature.*not a run directory"):
        pretrained.load("nobody/nothing", mesh)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no export/ yet; finish it with --resume"):
        pretrained.load(str(tmp_path), mesh)
    with pytest.raises(ValueError, match="--tokenizer DIR"):
        pretrained.load("gpt3-1.3b", mesh)


def test_earlier_steps_run_where_they_are_missing_and_are_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(config):
        ran.append((str(config.out), config.preset, config.resume))
        (config.out / "export").mkdir(parents=True)
        (config.out / "export" / "config.json").touch()

    monkeypatch.setattr(run_pretrain, "run_pretrain", run)
    monkeypatch.setattr(run_sft, "run_sft", run)
    run_sft.ensure_base("elsewhere")
    assert not ran
    for _ in range(2):
        run_sft.ensure_base("runs/pretrain")
        run_rm.ensure_sft("runs/sft")
        run_sft.ensure_base("runs/quick/pretrain")
        run_rm.ensure_sft("runs/quick/sft")
    first = [("pretrain", "miniature"), ("sft", "miniature")]
    quick = [("quick/pretrain", "quick"), ("quick/sft", "quick")]
    assert ran == [(f"runs/{out}", preset, True) for out, preset in first + quick]


@pytest.mark.parametrize(("preset", "folder"), [("miniature", "runs"), ("quick", "runs/quick")])
def test_each_preset_of_the_miniature_has_its_own_steps(preset, folder):
    """So that a first look and the whole run leave each other's models alone."""
    config = dataclasses.replace(run_ppo.PRESETS[preset], preset=preset)
    assert config.out == Path(folder, "ppo")
    steps = [(out, step.out, step.preset) for out, step, _ in run_ppo.earlier_steps(config)]
    made = Path(folder, "sft"), Path(folder, "rm")
    assert steps == [(str(out), out, preset) for out in made]
    assert run_sft.PRESETS[preset].model == f"{folder}/pretrain"
    assert run_rm.PRESETS[preset].model == f"{folder}/sft"
    assert run_pretrain.PRESETS[preset].out == Path(folder, "pretrain")
    words = "--preset quick --model x" if preset == "quick" else "--model x"
    assert config.command_of("run_rm.py", "--model x") == f"python experiments/run_rm.py {words}"
    own = dataclasses.replace(config, data=DataConfig("jsonl:mine.jsonl"), pretrain=DataConfig("x"))
    assert run_ppo.earlier_steps(own) == []


def test_models_that_earlier_steps_make_may_be_spelled_otherwise(tmp_path, monkeypatch):
    """They are not there yet, and no flag that names them is at fault."""
    monkeypatch.chdir(tmp_path)
    quick = dataclasses.replace(run_ppo.PRESETS["quick"], preset="quick")
    rm = {"reward": RewardConfig(("runs/quick/rm/",)), "value_model": "./runs/quick/rm"}
    run_ppo.check(dataclasses.replace(quick, **rm, gold=("runs/quick/rm",)))
    with pytest.raises(FileNotFoundError, match="--value_model runs/other"):
        run_ppo.check(dataclasses.replace(quick, value_model="runs/other"))
