"""LoRA in the scripts, from their command lines: what is trained, kept, exported, gone on from."""

import dataclasses
import functools
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

from instructjax import hf, models, scoring
from instructjax.data import __main__ as data_tool
from instructjax.data import sources
from instructjax.run import lora

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
    base = runs / "pretrain" / "export"
    said = f"step 1 was trained on {base} with the fingerprint {hf.fingerprint(base)}, and --model"
    with pytest.MonkeyPatch.context() as patch:  # as of a base that was exported again
        patch.setattr(hf, "fingerprint", lambda path: "0123")
        with pytest.raises(ValueError, match=f"{said} now gives {base} with 0123"):
            run_sft.cli([*again, "--resume_step", "1"])
    run_sft.cli([*again, "--resume_step", "1"])
    assert "resumed after step 1" in capsys.readouterr().out
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        assert (tmp_path / "sft" / file).read_bytes() == (runs / "sft" / file).read_bytes()


def test_flags_that_cannot_work(runs, tmp_path, capsys):
    few = [*FEW, "--out", f"{tmp_path}/x", "--model"]
    sft = f"{runs}/sft"
    other = f": the adapters of --model {sft} have rank 4 and alpha 8; give"
    targets = other.replace("rank 4 and alpha 8", "--lora.targets query key value out up gate down")
    tokenizer = hf.load_tokenizer(runs / "sft" / "export")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "tokens")
    for part in ("adapter", "export"):
        shutil.copytree(runs / "sft" / part, tmp_path / "torn" / part)
    (tmp_path / "torn" / "adapter" / "adapter_model.safetensors").unlink()
    grows = ": the tokenizer has <new>, which the model has not, and with --lora.rank 4 it gets"
    for name in ("pretrain", "sft"):  # a model whose own template uses a token that it lacks
        shutil.copytree(runs / name / "export", tmp_path / f"grows-{name}" / "export")
        tokenizer.chat_template = "{{ messages[0]['content'] }}<new>"
        tokenizer.save_pretrained(tmp_path / f"grows-{name}" / "export")
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "grows-sft" / "adapter")
    tokenizer.save_pretrained(tmp_path / "grows-sft" / "adapter")
    for part in ("adapter", "export"):
        shutil.copytree(runs / "sft" / part, tmp_path / "moved" / part)
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "alone")
    for file in ("moved/adapter", "alone"):
        settings = tmp_path / file / "adapter_config.json"
        settings.write_text(settings.read_text().replace(f"{runs}/pretrain", "/former/pretrain"))
    moved = "/adapter_config.json: base_model_name_or_path /former/pretrain/export: no such direct"
    torn = f"--model {tmp_path}/torn/adapter: no adapter_model.safetensors"
    for argv, said in (
        ([sft, "--lora.alpha", "4"], "--lora.alpha: has no effect without --lora.rank above 0"),
        ([sft, "--lora.rank", "-1"], "--lora.rank -1: must not be negative"),
        (["miniature", *LORA], "--lora.rank 4: --model miniature has random weights"),
        ([sft, "--lora.rank", "5"], f"--lora.rank 5{other}"),
        ([sft, "--lora.rank", "4"], f"--lora.rank 4{other}"),
        ([sft, *LORA, "--lora.targets", "query"], f"--lora.rank 4{targets}"),
        (
            [sft, *LORA, "--tokenizer", f"{tmp_path}/tokens"],
            f"--tokenizer {tmp_path}/tokens{grows}",
        ),
        ([f"{tmp_path}/grows-pretrain", *LORA], f"--model {tmp_path}/grows-pretrain{grows}"),
        ([f"{tmp_path}/grows-sft", *LORA], f"--model {tmp_path}/grows-sft{grows}"),
        ([f"{tmp_path}/moved", *LORA], f"--model {tmp_path}/moved/adapter{moved}"),
        ([f"{tmp_path}/alone"], f"--model {tmp_path}/alone{moved}"),
        ([f"{tmp_path}/torn", *LORA], torn),
        ([f"{tmp_path}/torn/adapter"], torn),
    ):
        with pytest.raises(SystemExit) as end:
            run_sft.cli([*few, *argv])
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    started = dataclasses.replace(
        run_sft.PRESETS["miniature"],
        out=tmp_path / "y",
        model=sft,
        lora=run_sft.LoRA(rank=4, alpha=8.0, targets=("query",)),
    )
    with pytest.raises(ValueError, match=f"--lora.rank 4{targets}"):  # by no command line
        run_sft.run_sft(started)


def test_a_scale_of_rank_stabilised_adapters_is_given_as_alpha(runs, tmp_path):
    """peft's scale is then alpha over the root of the rank, which no alpha / rank may equal."""
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "mine")
    file = tmp_path / "mine" / "adapter_config.json"
    scale = 7 / 4**0.5 * (1 + 2**-52)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 4 * scale}))
    base = hf.load_config(runs / "pretrain" / "export")
    assert hf.describe_adapter(tmp_path / "mine", base).config.adapter_scale != 14 / 4
    check = functools.partial(lora.check, model=str(tmp_path / "mine"), config=base)
    check(run_sft.LoRA(rank=4, alpha=14.0))
    with pytest.raises(ValueError, match=r"the --lora flags they were trained with$"):
        check(run_sft.LoRA(rank=4, alpha=14.1))  # there is no export to begin anew on


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


def test_an_adapter_directory_is_a_model(runs, tmp_path, capsys):
    """What peft would write, without an export beside it: merged for a run of all weights."""
    shutil.copytree(runs / "sft" / "adapter", tmp_path / "mine")
    (tmp_path / "mine" / "tokenizer.json").unlink()  # so it is the base's
    (tmp_path / "mine" / "tokenizer_config.json").unlink()
    data_tool.cli(["show", "--kind", "demonstrations", "--tokenizer", f"{tmp_path}/mine"])
    assert "response tokens: median" in capsys.readouterr().out
    few = [*FEW, "--model", f"{tmp_path}/mine", "--steps", "0", "--max_new_tokens", "4"]
    run_sft.cli([*few, "--out", f"{tmp_path}/all"])
    _, merged = weights(tmp_path / "all" / "export")
    _, want = weights(runs / "sft" / "export")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)
    assert not (tmp_path / "all" / "adapter").exists()


def test_the_reward_model_that_picks_a_checkpoint_shares_the_base(runs, tmp_path, monkeypatch):
    loaded = []

    def load_model(*args, load=scoring.load_model):
        loaded.append((args[-1], load(*args)[1]))
        raise ValueError("loaded")  # what comes after it is tested without LoRA

    monkeypatch.setattr(scoring, "load_model", load_model)
    argv = [*FEW, *LORA, "--model", f"{runs}/sft", "--steps", "0", "--max_new_tokens", "4"]
    keep = ["--keep", "reward", "--reward_model", f"{runs}/rm", "--out", f"{tmp_path}/kept"]
    with pytest.raises(ValueError, match="loaded"):
        run_sft.cli([*argv, *keep])
    ((base, params),) = loaded
    of_both = params["layers"]["mlp"]["up"]["kernel"], base.params["layers"]["mlp"]["up"]["kernel"]
    assert of_both[0] is of_both[1]


def test_an_ensemble_shares_its_base(runs, tmp_path, capsys):
    rm = [*FEW, *LORA, "--model", f"{runs}/sft", "--steps", "2", "--out", f"{tmp_path}/rm"]
    order, save = [], hf.save
    with pytest.MonkeyPatch.context() as patch:  # a run with export/ counts as finished
        patch.setattr(hf, "save", lambda path, *rest: (order.append(path.name), save(path, *rest)))
        run_rm.cli([*rm, "--ensemble", "2"])
    assert order == ["export-1", "export"]
    wrote = capsys.readouterr().out
    for name in ("adapter", "export", "adapter-1", "export-1"):
        assert f"wrote {tmp_path}/rm/{name}\n" in wrote
    first, second = (
        adapter_of(tmp_path / "rm" / name, runs / "pretrain" / "export")[1]
        for name in ("adapter", "adapter-1")
    )
    assert not np.array_equal(first["score"]["kernel"], second["score"]["kernel"])
    down = "mlp", "down", "b"
    a, b = (x["adapter"][down[0]][down[1]][down[2]] for x in (first, second))
    assert not np.array_equal(a, b)
