"""The model card of an export: base model, data, flags, figures, and how to load it."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jax
import pytest
import yaml
from rich.table import Table

from instructjax import hf, models
from instructjax.data import DataConfig
from instructjax.models import ModelConfig
from instructjax.run import Run
from instructjax.run.flags import RunConfig
from instructjax.scoring import RewardConfig

SMALL = ModelConfig(vocab_size=32, layers=1, width=16, heads=2, mlp_width=32, max_length=64)


@dataclass(frozen=True, kw_only=True)
class Adam:
    b1: float = 0.9
    b2: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    out: Path = Path("runs/mine")
    model: str = "miniature"
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: DataConfig = field(default_factory=lambda: DataConfig(""))
    reward: RewardConfig = field(default_factory=RewardConfig)
    adam: Adam = field(default_factory=Adam)
    fields: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run_mine.py", "--data", "jsonl:a b.jsonl"])


def finish(config: Config, exports=("export",), scalar_head=False, **figures) -> str:
    """A run that exports a model and ends. Returns the last export's card."""
    model = models.ModelConfig(**{**vars(SMALL), "scalar_head": scalar_head})
    with Run(config, stage="mine") as run:
        for name in exports:
            hf.save(config.out / name, model, models.init(model, jax.random.key(0)))
        wrote = [config.out / name for name in ("metrics.jsonl", *exports)]
        run.finish({"score": 0.123456, **figures}, wrote, tables=[table()])
    return (config.out / exports[-1] / "README.md").read_text()


def table() -> Table:
    shown = Table("", "score", title="on 512 held-out prompts")
    shown.add_row("SFT", "-0.10 (-0.22 to +0.02)")
    return shown


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def blocks(card: str) -> list[list[str]]:
    return [x.splitlines() for x in re.findall(r"```\w*\n(.*?)\n?```", card, re.DOTALL)]


@pytest.mark.parametrize(
    ("scalar_head", "task", "auto"),
    [
        (False, "text-generation", "AutoModelForCausalLM"),
        (True, "text-classification", "AutoModelForSequenceClassification"),
    ],
)
def test_front_matter_and_how_to_load(scalar_head, task, auto):
    card = finish(Config(), scalar_head=scalar_head)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["instructjax", "rlhf", "mine"],
    }
    assert f"`{auto}.from_pretrained(DIR)`" in card
    load, *_ = blocks(card)
    exec("\n".join(line for line in load if "tokenizer" not in line), {"DIR": "runs/mine/export"})


def test_flags():
    """All flags of data and rewards, and others that are not at their defaults."""
    config = Config(
        data=DataConfig("jsonl:a b.jsonl", max_prompt=9),
        reward=RewardConfig(("runs/rm", "f.py:g"), weights=(1.0, 0.5)),
        adam=Adam(b1=0.8),
        fields=("x", "y"),
        seed=3,
    )
    _, command, read, changed, _ = blocks(finish(config))
    assert command == ["python run_mine.py --data 'jsonl:a b.jsonl'"]
    names = {line.split()[0] for line in read}
    assert {"--data 'jsonl:a b.jsonl'", "--data.max_prompt 9", "--data.split_by prompt"} < set(read)
    assert {"--reward runs/rm f.py:g", "--reward.weights 1.0 0.5"} < set(read)
    assert {"--reward.combine", "--data.validation"} < names
    assert not {"--data.cache", "--pretrain"} & names
    assert changed == ["--seed 3", "--adam.b1 0.8", "--fields x y"]


def test_figures_are_those_of_the_terminal(capsys):
    card = finish(Config(), seconds=12.5, note="by loss")
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    figures = blocks(card)[-1]
    assert len(figures) == 11
    assert "on 512 held-out prompts" in figures[0]
    assert any("-0.10 (-0.22 to +0.02)" in line for line in figures)
    assert [line for line in figures[1:] if line not in printed] == []
    assert "│ score   │ 0.1235  │" in figures


def test_versions_and_stage():
    card = finish(Config())
    versions = yaml.safe_load(Path("runs/mine/config.json").read_text())["versions"]
    assert "Stage `mine`, from `miniature`, on " in card
    assert f"with instructjax {versions['instructjax']}, jax {versions['jax']}." in card


def test_every_export_of_an_ensemble_has_one():
    finish(Config(), exports=("export", "export-1"), scalar_head=True)
    cards = [Path(f"runs/mine/{name}/README.md").read_text() for name in ("export", "export-1")]
    assert cards[0] == cards[1]
    assert cards[0].count("## Figures") == 1
    finish(Config(resume=True))  # writes the export and its card anew
    assert Path("runs/mine/export/README.md").read_text().count("## Figures") == 1


@pytest.mark.parametrize("name", ["org/model", "hf:org/model"])
def test_the_hubs_model_is_the_base_of_all_runs_after_it(name):
    card = finish(Config(model=name))
    assert front_matter(card)["base_model"] == "org/model"
    assert f"from `{name}`" in card
    for model in ("runs/mine", "./runs/mine/export"):
        out = Path("runs/next") / model
        assert front_matter(finish(Config(model=model, out=out)))["base_model"] == "org/model"


def test_other_models_are_no_base():
    """A preset, a run from a preset, and a directory whose card another program wrote."""
    Path("gpt").mkdir()
    Path("gpt/README.md").write_text("---\nbase_model: org/other\n---\n")
    finish(Config(out=Path("runs/first")))
    for i, model in enumerate(["miniature", "runs/first", "gpt", "runs/nothing"]):
        card = finish(Config(model=model, out=Path(f"runs/{i}")))
        assert "base_model" not in front_matter(card)
