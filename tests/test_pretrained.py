"""What a model's name stands for: a preset, a run, a directory, or a model of the hub."""

import shutil
from pathlib import Path

import jax
import preflight
import pytest
import sample
from huggingface_hub import errors as hub_errors

from instructjax import hf, miniature, models, scoring, sharding
from instructjax.models import PRESETS, ModelConfig
from instructjax.run import pretrained


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A small random reward model with the miniature's tokenizer."""
    tokenizer, out = miniature.tokenizer(), tmp_path_factory.mktemp("exported")
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    sizes = {"layers": 1, "width": 16, "heads": 2, "mlp_width": 32, "max_length": 64}
    config = ModelConfig(len(tokenizer), scalar_head=True, **sizes, **ids)
    hf.save(out, config, models.init(config, jax.random.key(0)), tokenizer)
    return out


@pytest.fixture
def requests(exported, tmp_path, monkeypatch) -> list[str]:
    """The names that the hub is asked for. It has a model of every name; the folder is empty."""
    names = []

    def fetch(name, **patterns):
        names.append(name)
        return str(exported)

    monkeypatch.setattr(hf.directory.huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return names


def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


LOADERS = {
    "hf.load": hf.load,
    "hf.load_config": hf.load_config,
    "hf.load_tokenizer": hf.load_tokenizer,
    "--model": lambda name: pretrained.load(name, mesh()),
    "--tokenizer": lambda name: pretrained.load("miniature", mesh(), tokenizer=name),
    "--reward": lambda name: scoring.load(
        scoring.RewardConfig((name,)), mesh(), miniature.tokenizer(), "float32"
    ),
    "--value_model": lambda name: scoring.load_model(
        name, mesh(), miniature.tokenizer(), "float32", "--value_model"
    ),
    "preflight.py": lambda name: preflight.describe(
        preflight.Config(topology="v5e:2x2", model=name)
    ),
}
LOCAL = [
    *("runs/rm", "runs/rm/export", "models/foo", "models/a/foo", "./org/name", "../org/name"),
    *("/org/name", "~/name", "~no-such-user/name", "dangling"),
]


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_the_hub_is_asked_only_where_nothing_local_has_a_claim(load, requests):
    Path("models").mkdir()
    Path("dangling").symlink_to("nowhere")
    for name in LOCAL:
        with pytest.raises(FileNotFoundError, match=f"{name}: no such directory"):
            load(name)
        assert requests == []
    for name in ("org/name", "name", "hf:org/name", "hf:runs/rm", "hf:models/foo"):
        load(name)
        assert set(requests) == {name.removeprefix("hf:")}
        requests.clear()


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_exists_is_loaded_and_home_is_expanded(load, requests, exported, tmp_path):
    for name in ("org/name", "runs/rm", "home/name"):
        Path(name).parent.mkdir()
        Path(name).symlink_to(exported)
    for name in ("org/name", "./org/name", "runs/rm", f"{tmp_path}/org/name", "~/name"):
        load(name)
    assert requests == []
    load("hf:org/name")
    assert set(requests) == {"org/name"}


@pytest.mark.parametrize("name", ["runs/rm", "~/rm"])
def test_every_flag_takes_a_run(name, requests, exported):
    run = Path(name.replace("~", "home"))
    run.mkdir(parents=True)
    (run / "export").symlink_to(exported)
    for flag in ("--model", "--tokenizer", "--reward", "--value_model", "preflight.py"):
        LOADERS[flag](name)
    (run / "export-1").symlink_to(exported)
    rewards = scoring.load(scoring.RewardConfig((name,)), mesh(), miniature.tokenizer(), "float32")
    assert len(rewards.models) == 2
    assert requests == []


def test_a_missing_run_says_which_script_makes_it(requests, capsys):
    for done in ("sft", "pretrain"):
        Path(f"runs/{done}/export").mkdir(parents=True)
        Path(f"runs/{done}/export/config.json").touch()
    Path("runs/begun").mkdir()
    scripts = {"rm": "run_rm.py", "ppo": "run_ppo.py"}
    scripts |= {name: f"swap_loss.py {name}" for name in ("grpo", "raft")}
    for name, script in scripts.items():
        with pytest.raises(FileNotFoundError) as caught:
            LOADERS["--model"](f"runs/{name}")
        assert str(caught.value) == (
            f"--model runs/{name}: no such directory; python experiments/{script} makes it;"
            " finished runs in runs/: pretrain, sft"
        )
    with pytest.raises(FileNotFoundError) as caught:
        LOADERS["--tokenizer"]("runs/mine")
    assert str(caught.value) == (
        "--tokenizer runs/mine: no such directory; finished runs in runs/: pretrain, sft"
    )
    with pytest.raises(SystemExit, match="2"):
        sample.cli(["--model", "runs/rm"])
    assert "--model runs/rm: no such directory; python experiments" in capsys.readouterr().err


def test_other_missing_models_say_where_was_looked(requests, monkeypatch):
    Path("models").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        LOADERS["--model"]("models/foo")
    assert str(caught.value) == (
        "--model models/foo: no such directory; models/ is a folder here, so the hub is not asked:"
        " hf:models/foo asks it"
    )
    for name in ("/org/name", "../name", "./name", "models/a/foo"):
        with pytest.raises(FileNotFoundError, match=rf"^--model {name}: no such directory$"):
            LOADERS["--model"](name)

    def fetch(name, **patterns):
        raise OSError("there is no network")

    monkeypatch.setattr(hf.directory.huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(FileNotFoundError, match=r"not a preset .*: there is no network"):
        LOADERS["--model"]("hf:org/name")
    Path("models/file").touch()
    with pytest.raises(ValueError, match="models/file is a file"):
        LOADERS["--model"]("models/file")


def test_a_run_without_an_export(requests):
    Path("runs/a/checkpoints").mkdir(parents=True)
    Path("runs/b").mkdir()  # with --checkpoints elsewhere
    Path("runs/b/metrics.jsonl").touch()
    for name in ("runs/a", "runs/b"):
        with pytest.raises(FileNotFoundError, match=f"--model {name}: this run has no export/ yet"):
            LOADERS["--model"](name)


def test_a_preset_is_described_without_its_weights():
    assert pretrained.describe("gpt3-175b") == PRESETS["gpt3-175b"]


def test_a_model_that_is_to_score_ends_no_response(exported, tmp_path):
    """One that may be trained on data is refused for an end that it lacks."""
    where = tmp_path / "rm"
    shutil.copytree(exported, where)
    (where / "generation_config.json").write_text('{"eos_token_id": 9000}')
    for flag in ("--reward", "--value_model"):
        LOADERS[flag](str(where))
    with pytest.raises(ValueError, match="eos_token_id 9000 of config"):
        LOADERS["--model"](str(where))


def test_a_check_finds_what_is_missing_without_reading_weights(requests, exported, monkeypatch):
    """And it says nothing of a hub that cannot be reached, for which no flag is to blame."""
    monkeypatch.setattr(hf, "load", None)
    whole = pretrained.check(str(exported), mesh())
    assert whole == pretrained.describe(str(exported))
    for missing, message in (
        ("model.safetensors", "--model here: no model.safetensors"),
        ("tokenizer*", "--model here has no tokenizer: give --tokenizer DIR"),
        ("config.json", "--model here: no config.json"),
    ):
        shutil.copytree(exported, "here")
        for file in Path("here").glob(missing):
            file.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pretrained.check("here", mesh())
        if missing == "tokenizer*":
            assert pretrained.check("here", mesh(), tokenizer=str(exported)) == whole
        shutil.rmtree("here")

    def fail_with(error):
        def fetch(name, **patterns):
            raise error

        monkeypatch.setattr(hf.directory.huggingface_hub, "snapshot_download", fetch)

    fail_with(hub_errors.LocalEntryNotFoundError("no connection"))
    assert pretrained.check("org/name", mesh()) is None
    for error in (hub_errors.OfflineModeIsEnabled("offline"), ValueError("no name of the hub")):
        fail_with(error)
        with pytest.raises(FileNotFoundError, match="--model org/name: not a preset"):
            pretrained.check("org/name", mesh())
