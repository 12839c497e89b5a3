"""tpu_setup/notebook.py and the notebook made of it: its cells, its commands, and whole runs.

The quick run has stand-ins for the training scripts, which write what the notebook reads. The slow
ones train.
"""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jupytext
import nbclient
import nbformat
import ppo_config
import pytest
import run_pretrain
import run_rm
import run_sft
import sample

from instructjax import hf, miniature, models, usage
from instructjax.models import ModelConfig
from instructjax.run import flags

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tpu_setup" / "notebook.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
SCRIPTS = {"pretrain": run_pretrain, "sft": run_sft, "rm": run_rm, "ppo": ppo_config}
REMAKE = "jupytext --update --to ipynb tpu_setup/notebook.py"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_parameters(notebook, **values):
    """The notebook with a cell after that of the parameters, as papermill has it."""
    tagged = [cell.metadata.get("tags") == ["parameters"] for cell in notebook.cells]
    assert tagged.count(True) == 1
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(tagged.index(True) + 1, nbformat.v4.new_code_cell(text))
    return notebook


def execute(notebook, folder, monkeypatch):
    """Runs all cells. Returns the text of all code cells' output."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else a debugger prints a warning
    at = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=3000, kernel_name="python3", resources=at).execute()
    return "".join(x.get("text", "") for cell in code(notebook) for x in cell.outputs)


# -------------------------------------------------------------------------------- the cells


def test_the_notebook_is_made_from_the_script(notebook):
    as_tuples = lambda cells: [(c.cell_type, c.source, c.metadata) for c in cells]  # noqa: E731
    made = jupytext.read(SOURCE)
    assert as_tuples(notebook.cells) == as_tuples(made.cells), REMAKE
    assert notebook.metadata.kernelspec == made.metadata.kernelspec, REMAKE
    assert all((c.outputs, c.execution_count) == ([], None) for c in code(notebook)), "has outputs"


def test_the_cells(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) < 20
    for cell in code(notebook):
        ast.parse(cell.source)
    assert REMAKE in notebook.cells[0].source


# ----------------------------------------------------------------------------- its commands


def parsed(words):
    """The config of a command line, by its script's own parser; a wrong flag ends in SystemExit."""
    name, argv = Path(words[0]).stem, words[1:]
    if name == "sample":
        return usage.parse(sample.Config, argv, "", lambda config: None)
    script = SCRIPTS[name.removeprefix("run_")]
    return flags.parse(script.Config, script.PRESETS, "", argv)


DEVICES = [  # what jax says, a device file, the hub; the extras, the model, its dtype
    ("cpu 1 cpu", "", False, "", "miniature", "float32"),
    ("cpu 1 cpu", "", True, "[hf]", "miniature", "float32"),
    ("gpu 2 Tesla T4", "", True, "[cuda,hf]", "HuggingFaceTB/SmolLM2-135M-Instruct", "float32"),
    ("tpu 1 TPU v5 lite", "/dev/vfio/0", True, "[tpu,hf]", "Qwen/Qwen3-0.6B", "bfloat16"),
    ("tpu 8 TPU v5 lite", "/dev/accel0", True, "[tpu,hf]", "Qwen/Qwen3-1.7B", "bfloat16"),
    ("tpu 8 TPU v5 lite", "/dev/accel0", False, "[tpu]", "miniature", "float32"),
]


def functions(notebook, monkeypatch, answer, **parameters):
    """What the first five code cells define: parameters, device, model, functions. And the commands
    that they ran, which stand-ins answer.
    """
    ran, names = [], {}

    def stand_in(words, **_):
        ran.append(words)
        return SimpleNamespace(returncode=0, stdout=answer + "\n")

    with_parameters(notebook, **parameters)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", stand_in)
        for cell in code(notebook)[:5]:
            exec(cell.source, names)
    return SimpleNamespace(**names), ran


@pytest.mark.parametrize(("answer", "file", "online", "extras", "model", "dtype"), DEVICES)
def test_each_device_gets_its_model_and_flags_that_the_scripts_have(
    notebook, tmp_path, monkeypatch, answer, file, online, extras, model, dtype
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name if "gpu" in answer else None)
    monkeypatch.setattr("glob.glob", lambda pattern: [file] if file[:9] == pattern[:9] else [])
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: object())
    monkeypatch.setenv("HF_HUB_OFFLINE", str(int(not online)))
    chosen, ran = functions(notebook, monkeypatch, answer, CODE=str(ROOT / "docs"))
    [pip] = [words for words in ran if "pip" in words]
    assert pip[-1] == f"{ROOT}{extras}"
    assert model == chosen.MODEL
    stages = ["sft", "rm", "ppo"] if model != "miniature" else ["pretrain", "sft", "rm", "ppo"]
    assert list(chosen.COMMANDS) == list(chosen.MOST) == stages
    assert set(stages) <= set(chosen.SHARE)
    for stage in stages:
        python, *words = map(str, chosen.script(stage, "--resume", "--steps", "3"))
        config = parsed(words)
        assert python == sys.executable
        assert config.steps == 3
        assert config.model_dtype == dtype
        assert config.preset == ("small" if model != "miniature" else "miniature")
        if model != "miniature":
            assert config.lora.rank == 16
            assert config.data.spec.startswith("hf:")
            assert config.model == (model if stage == "sft" else "runs/sft")


# ------------------------------------------------------------------------------- whole runs

STAND_IN = """
import argparse, json, pathlib, signal, sys, time

stage, stopped = pathlib.Path(sys.argv[0]).stem.removeprefix("run_"), []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--out", type=pathlib.Path, default=f"runs/{stage}")
parser.add_argument("--steps", type=int)
parser.add_argument("--resume", action="store_true")
flags = parser.parse_known_args()[0]
with open("commands.jsonl", "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
if stage == "sample":
    sys.exit(print("an answer"))
print(f"run_{stage} is a stand-in")
metrics = pathlib.Path(flags.out, "metrics.jsonl")
metrics.parent.mkdir(parents=True, exist_ok=True)
begin = len(metrics.read_text().splitlines()) if metrics.exists() else 0
assert flags.resume or begin == 0
assert begin <= flags.steps + 1, "more steps are made"
for step in range(begin, flags.steps + 1):
    row = {"step": step}
    if step:
        time.sleep(SECONDS)
        row |= {"time/step": SECONDS}
    if step > max(begin, 1):
        row |= {"throughput/tokens_per_second": 1000.0}
    with metrics.open("a") as file:
        file.write(json.dumps(row) + "\\n")
    if stopped and step:
        sys.exit(75)
config = {"stage": stage, "command": "python x.py", "versions": {"jax": "0"}}
config["config"] = {"model": "/nowhere", "model_dtype": "float32"}
pathlib.Path(flags.out, "config.json").write_text(json.dumps(config))
pathlib.Path(flags.out, "curves.png").write_bytes(bytes.fromhex(PNG))
pathlib.Path(flags.out, "export").mkdir()
pathlib.Path(flags.out, "export", "config.json").write_text("{}")
"""
PNG = (
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ff"
    "ff3f0005fe02fea735812e0000000049454e44ae426082"
)


@pytest.fixture
def stand_ins(tmp_path):
    """A folder like the repository's, whose scripts take 0.02 s a step."""
    scripts = tmp_path / "clone" / "experiments"
    scripts.mkdir(parents=True)
    text = STAND_IN.replace("SECONDS", "0.02").replace("PNG", repr(PNG))
    for name in ("run_sft", "run_rm", "run_ppo", "sample"):
        (scripts / f"{name}.py").write_text(text)
    return scripts.parent


@pytest.mark.parametrize("budget", [10, 0], ids=["in_time", "out_of_time"])
def test_what_the_notebook_runs(notebook, stand_ins, tmp_path, monkeypatch, budget):
    """Each stage is stopped once, and goes on. Without time it makes one step more."""
    parameters = {
        **{"BUDGET": budget, "CODE": str(stand_ins), "INSTALL": False, "OUT": f"{tmp_path}/out"},
        **{"MODEL": "/a/model", "FLAGS": {"ppo": "--seed 7"}, "PROMPTS": ["hello you."]},
        **{"STEPS": {"sft": 3, "rm": 150}, "MEASURED": 4},
    }
    text = execute(with_parameters(notebook, **parameters), tmp_path, monkeypatch)
    *trained, (last, asked) = commands(tmp_path / "out")
    sizes, stopped = {"sft": 3, "rm": 150, "ppo": 200}, {}
    for name in ("rm", "ppo"):
        stopped[name] = int(text.partition(f"{name}: stopped after step ")[2].split()[0])
        assert 4 <= stopped[name] < sizes[name]
    if not budget:
        sizes |= {name: step + 1 for name, step in stopped.items()}
    expected = [  # a stage of few steps is finished before it is stopped
        *(("run_sft", 3), ("run_rm", 150), ("run_rm", sizes["rm"])),
        *(("run_ppo", 200), ("run_ppo", sizes["ppo"])),
    ]
    assert [(name, config.steps) for name, config in trained] == expected
    assert all(config.resume for _, config in trained)
    assert [config.seed for name, config in trained if name == "run_ppo"] == [7, 7]
    assert ("give a larger BUDGET" in text) == (budget == 0)
    for name, size in sizes.items():
        assert steps_of(tmp_path / "out", name) == list(range(size + 1))
        assert f"{name}: {size} steps, each once" in text
    assert (last, asked.prompt, asked.model) == ("sample", "hello you.", "runs/ppo")
    assert "an answer" in text
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.rstrip() in text
    for name, size in sizes.items():
        assert f"| {name} | {name} | {size:,} |" in report


def commands(out):
    """(script, config) of what was run."""
    lines = (out / "commands.jsonl").read_text().splitlines()
    return [(Path(words[0]).stem, parsed(words)) for words in map(json.loads, lines)]


def steps_of(out, name):
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def slow_sft(notebook, stand_ins, tmp_path, monkeypatch):
    """The notebook's functions, with 8 s for SFT, whose steps take 0.3 s from step 20 on."""
    script = stand_ins / "experiments" / "run_sft.py"
    seconds = "sleep(0.02 if step < 20 else 0.3)"
    script.write_text(script.read_text().replace("sleep(0.02)", seconds))
    parameters = {"CODE": str(stand_ins), "INSTALL": False, "OUT": f"{tmp_path}/out"}
    parameters["MODEL"] = "/a/model"
    at = functions(notebook, monkeypatch, "cpu 1 cpu", **parameters)[0]
    at.SHARE.update(rm=0, ppo=0)
    at.train.__globals__["END"] = time.time() + 8
    return at


def test_a_stage_that_takes_longer_than_measured_is_stopped(slow_sft, tmp_path, capsys):
    """It makes one step more, and is then finished. Finished stages are not repeated."""
    slow_sft.train("sft")
    (_, first), (_, second), (_, third) = commands(tmp_path / "out")
    made = steps_of(tmp_path / "out", "sft")
    assert made == list(range(len(made)))
    assert first.steps == 400
    assert 30 < second.steps < 390
    assert third.steps == made[-1]
    assert 20 < made[-1] < 50
    slow_sft.train("sft")
    assert len(commands(tmp_path / "out")) == 3
    assert "sft is finished" in capsys.readouterr().out


def test_a_step_that_was_made_twice_is_an_error(slow_sft, tmp_path):
    with (tmp_path / "clone" / "experiments" / "run_sft.py").open("a") as script:
        script.write("metrics.write_text(metrics.read_text() + '{\"step\": 7}\\n')")
    slow_sft.MOST["sft"] = 10
    with pytest.raises(AssertionError, match="a step is missing, or was made twice"):
        slow_sft.train("sft")


CHAT = (
    "{% for message in messages %}{{ {'user': 'hello', 'assistant': 'answer'}[message.role] }}:\n"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}answer:\n{% endif %}"
)


@pytest.mark.slow
def test_a_whole_run_on_local_files(notebook, tmp_path, monkeypatch):
    """A tiny model with LoRA in the place of the hub's, and files in the place of its data sets."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    tokenizer = miniature.tokenizer()
    tokenizer.chat_template = CHAT
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=1024, **ids)
    hf.save(tmp_path / "model", config, models.init(config, jax.random.key(0)), tokenizer)
    few = "--batch_size 8 --data.cache None"
    toy = f"{few} --max_new_tokens 8"
    ppo = f"{toy} --ppo.minibatch 8 --eval_prompts 4 --final_prompts 4 --ptx.length 32"
    sizes = {"sft": 30, "rm": 30, "ppo": 60}
    parameters = {
        **{"BUDGET": 30, "CODE": str(ROOT), "INSTALL": False, "OUT": str(tmp_path / "out")},
        **{"MODEL": str(tmp_path / "model"), "DATA": files(tmp_path), "PROMPTS": ["hello."]},
        **{"STEPS": sizes, "FLAGS": {"sft": toy, "rm": few, "ppo": ppo}},
        "MEASURED": 2,
    }
    text = execute(with_parameters(notebook, **parameters), tmp_path, monkeypatch)
    check(text, tmp_path / "out", sizes)
    assert "1 skipped: field 'text': is empty" in text
    assert (tmp_path / "out" / "runs" / "ppo" / "adapter").is_dir()


@pytest.mark.slow
def test_a_whole_run_on_the_miniature(notebook, tmp_path, monkeypatch):
    """All four scripts on the built-in world, a few steps of each."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    sizes = {"pretrain": 20, "sft": 20, "rm": 20, "ppo": 15}
    few = "--batch_size 64 --eval_prompts 32 --final_prompts 32"
    parameters = {
        **{"BUDGET": 60, "CODE": str(ROOT), "INSTALL": False, "OUT": str(tmp_path / "out")},
        **{"STEPS": sizes, "MEASURED": 3, "FLAGS": {"ppo": few}},
    }
    text = execute(with_parameters(notebook, **parameters), tmp_path, monkeypatch)
    check(text, tmp_path / "out", sizes)
    assert "$ " in text
    assert text.count("--prompt") == 2


def check(text, out, sizes):
    """What every whole run leaves."""
    assert "resumed after step" in text
    assert "\x1b" not in text
    report = (out / "report.md").read_text()
    assert report.rstrip() in text
    assert "Seconds of a step by phase:" in report
    for name, size in sizes.items():
        assert steps_of(out, name)[-1] == size
        row = next(line.split(" | ") for line in report.splitlines() if f"| {name} | " in line)
        assert row[2] == str(size)
        assert all(float(x.replace(",", "")) > 0 for x in row[3:6])  # seconds, tokens, TFLOP/s
        assert "arrays " in row[-1]


def files(folder):
    """What stands for the hub's four data sets, in their layouts. One row of two is bad."""
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
