"""The README: its Python runs, on a tiny model; its commands and files are there. Help texts."""

import ast
import re
from pathlib import Path

import jax
import pytest

from instructjax import hf, miniature, models
from instructjax.models import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted([*(ROOT / "experiments").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ENVIRONMENT = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    tokenizer = miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=96, **ids)
    params = models.init(config, jax.random.key(0))
    hf.save(tmp_path / "runs/sft/export", config, params, tokenizer)
    monkeypatch.chdir(tmp_path)
    (code,) = CODE
    assert code.count("range(20)") == 1
    exec(compile(code.replace("range(20)", "range(3)"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [
        f"iteration {i}: mean score" for i in range(3)
    ]
    assert all(0 <= float(line.rpartition(" ")[2]) <= 1 for line in lines)


@pytest.mark.parametrize(
    "command",
    [
        ENVIRONMENT + ". && python experiments/run_ppo.py",
        ENVIRONMENT + "'.[test]' && pytest",
    ],
)
def test_each_command_is_one_line_to_copy(command):
    assert f"```sh\n{command}\n```" in TEXT


def test_what_it_links_to_is_there():
    links = re.findall(r"\]\(([^):#]+)", TEXT)
    assert "docs/ppo-iteration.svg" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_keeps_the_line_breaks_of_its_commands(script):
    """A backslash at the end of a line joins it to the next, unless the docstring is raw."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert not re.search(r"\S {6,}--", text)
