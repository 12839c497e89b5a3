"""tpu_setup/notebook.py and the notebook made of it: its cells, its commands, and a whole run."""

import json
import os
import shlex
from pathlib import Path

import jax
import nbclient
import nbformat
import ppo_config
import pytest
import run_pretrain
import run_rm
import run_sft

jupytext = pytest.importorskip("jupytext")

from instructjax import hf, miniature, models  # noqa: E402
from instructjax.models import ModelConfig  # noqa: E402
from instructjax.run import flags  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tpu_setup" / "notebook.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
SCRIPTS = {"pretrain": run_pretrain, "sft": run_sft, "rm": run_rm, "ppo": ppo_config}
CHAT = (
    "{% for message in messages %}{{ {'user': 'hello', 'assistant': 'answer'}[message.role] }}:\n"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}answer:\n{% endif %}"
)


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def with_parameters(notebook, **values):
    """The notebook with a cell after that of the parameters, as papermill has it."""
    tagged = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells]
    assert tagged.count(True) == 1
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(tagged.index(True) + 1, nbformat.v4.new_code_cell(text))
    return notebook


def execute(notebook, folder):
    """Runs all cells. Returns the text of each code cell's output."""
    at = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=at).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(x.get("text", "") for x in cell.outputs) for cell in code]


def test_the_notebook_is_made_from_the_script(notebook):
    """Otherwise: jupytext --update --to ipynb tpu_setup/notebook.py"""
    cells = [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
    made = jupytext.read(SOURCE).cells
    assert cells == [(cell.cell_type, cell.source, cell.metadata) for cell in made]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    assert notebook.metadata.kernelspec.name == "python3"


def test_a_whole_run_on_local_files(notebook, tmp_path, monkeypatch):
    """A tiny model with LoRA in the place of the hub's, and files in the place of its data sets."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tokenizer = miniature.tokenizer()
    tokenizer.chat_template = CHAT
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=1024, **ids)
    hf.save(tmp_path / "model", config, models.init(config, jax.random.key(0)), tokenizer)
    local = files(tmp_path)
    few = "--batch_size 8 --data.cache None"
    toy = f"{few} --max_new_tokens 8"
    ppo = f"{toy} --ppo.minibatch 8 --eval_prompts 4 --final_prompts 4 --ptx.length 32"
    parameters = {
        **{"BUDGET": 20, "CODE": str(ROOT), "INSTALL": False, "OUT": str(tmp_path / "out")},
        **{"MODEL": str(tmp_path / "model"), "DATA": local, "PROMPTS": ["hello."], "TRIAL": 3},
        **{"STEPS": {"sft": 4, "rm": 4, "ppo": 60}, "FLAGS": {"sft": toy, "rm": few, "ppo": ppo}},
    }
    texts = execute(with_parameters(notebook, **parameters), tmp_path)
    print("\n=====\n".join(texts))


def files(folder):
    """What stands for the hub's four data sets, in their layouts. A few rows are bad."""
    says = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = {"demonstrations": [], "comparisons": [], "prompts": []}
    for row in miniature.demonstrations(0, 60):
        user, reply = says("user", row["prompt"]), says("assistant", row["completion"])
        rows["demonstrations"].append({"prompt": row["prompt"], "messages": [user, reply]})
        pair = {"chosen": [user, reply], "rejected": [user, says("assistant", "no answer.")]}
        rows["comparisons"].append({"prompt": row["prompt"], **pair})
        prompt = {"instruction": row["prompt"], "context": "", "response": row["completion"]}
        rows["prompts"].append(prompt)
    rows["comparisons"][0]["rejected"] = rows["comparisons"][0]["chosen"]
    rows["text"] = [{"text": ""}, *miniature.texts(0, 60)]
    for name, kind in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    return {name: f"jsonl:{folder / name}.jsonl" for name in rows}
