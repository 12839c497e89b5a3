"""lm-evaluation-harness: the same numbers as its own `hf` model on an exported checkpoint."""

import dataclasses
import functools
import json
import random
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_layouts
import jax
import numpy as np
import pytest

from instructjax import hf, models, sharding
from instructjax.evaluation import __main__ as command
from instructjax.models import PRESETS, ModelConfig

harness = pytest.importorskip(
    "instructjax.evaluation.harness", reason="needs pip install 'instructjax[eval]'"
)
torch = pytest.importorskip("torch")
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate")
harness_evaluator = pytest.importorskip("lm_eval.evaluator")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

CONTEXT = 32
TEXT = "Say hi to two rivers, please. Naïve Zoë paid 5 € for 猫 and 🦜!\n\nuser: name one\tmodel. "

# (tokenizer, mesh, devices, rows of a batch). One tokenizer adds BOS, one has none and a model with
# learned positions, one puts a space before a text.
CASES = {
    "bos, 8 devices": ("llama-3", {"data": 2, "fsdp": 4}, 8, 8),
    "bos, 1 row": ("llama-3", {"fsdp": 1}, 1, 1),
    "no bos, split model": ("qwen", {"fsdp": 4, "tensor": 2}, 8, 8),
    "prefix space, 1 device": ("mistral-v1", {"fsdp": 1}, 1, 8),
}


def small(layout: str) -> tuple[ModelConfig, models.Params, object]:
    """A small random model, whose log-probabilities are far from uniform, and its tokenizer."""
    tokenizer = chat_layouts.tokenizer(layout)
    sizes = {"vocab_size": len(tokenizer), "max_length": CONTEXT, "width": 32, "mlp_width": 48}
    ids = {"bos_id": tokenizer.bos_token_id, "eos_ids": (tokenizer.eos_token_id,)}
    if layout == "qwen":
        config = ModelConfig(**sizes, **ids, layers=2, heads=4)  # learned positions
    else:
        config = dataclasses.replace(PRESETS["miniature"], **sizes, **ids)
    leaves, tree = jax.tree.flatten(models.init(config, jax.random.key(0)))
    noise = np.random.default_rng(0)
    noisy = [x + noise.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    return config, jax.tree.unflatten(tree, noisy), tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], tuple[str, Any]]:
    """For a layout, a directory with a checkpoint, and the harness's own model of it."""

    @functools.cache
    def export(layout: str) -> tuple[str, Any]:
        directory = str(tmp_path_factory.mktemp(layout))
        hf.save(directory, *small(layout))
        # With its cache, `hf` scores a continuation of one token at the wrong position where
        # another request has the same tokens before its last one and a longer continuation.
        return directory, huggingface.HFLM(
            directory, device="cpu", batch_size=4, logits_cache=False
        )

    return export


@pytest.fixture(scope="module", params=CASES)
def both(request, exported) -> tuple[Any, Any]:
    """Our model of a checkpoint, and the harness's."""
    layout, axes, devices, rows = CASES[request.param]
    directory, reference = exported(layout)
    mesh = sharding.make_mesh(**axes, devices=jax.devices()[:devices])
    config, params = hf.load(directory, mesh)
    tokenizer = hf.load_tokenizer(directory)
    return harness.HarnessLM(config, params, tokenizer, mesh, batch_size=rows), reference


def requests(kind: str, arguments: list[tuple]) -> list[Any]:
    Instance = harness.Instance
    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def pairs(reference: Any) -> list[tuple[str, str]]:
    """Contexts of many lengths, none, longer than the model's; spaces and bytes at the seam."""
    tokenizer = reference.tokenizer
    seams = [(TEXT[:n], TEXT[n : n + 1 + n % 9]) for n in range(1, len(TEXT) - 9, 5)]
    odd = [("", "猫 sat"), ("", "a"), ("say ", "hi"), ("say  ", " hi"), ("hi \n", "one")]
    long = [(TEXT * 3, " one"), (TEXT * 3, "two, " * 4), ("a", TEXT[:20])]
    begins = (tokenizer.bos_token or tokenizer.eos_token) + "Hi one"
    likeliest = []
    for n in range(4, len(TEXT), 4):
        ids = torch.tensor([reference.tok_encode(TEXT[:n])[-CONTEXT:]])
        token = int(reference._model_call(ids)[0, -1].argmax())
        likeliest.append((TEXT[:n], tokenizer.decode([token])))
    calls = [*seams, *odd, *long, (begins, " two"), ("", begins), ("say ", "hi"), *likeliest]
    # `hf` fails where no token begins in the continuation.
    return [(a, b) for a, b in calls if not a or (b and reference._encode_pair(a, b)[1])]


def test_loglikelihood(both):
    lm, reference = both
    calls = requests("loglikelihood", pairs(reference))
    want = reference.loglikelihood(calls, disable_tqdm=True)
    got = lm.loglikelihood(calls, disable_tqdm=True)
    np.testing.assert_allclose([x[0] for x in got], [x[0] for x in want], rtol=0, atol=1e-4)
    assert [x[1] for x in got] == [x[1] for x in want]
    assert 1 < sum(x[1] for x in want) < len(want) // 2
    assert np.std([x[0] for x in want]) > 2

    order = random.Random(0).sample(range(len(calls)), len(calls))
    again = lm.loglikelihood([calls[i] for i in order], disable_tqdm=True)
    assert again == [got[i] for i in order]
    assert lm._score._cache_size() <= 6  # two widths of rows, three of continuations


def test_rolling(both):
    lm, reference = both
    texts = [TEXT[:n] for n in (1, 20, 30, 31, 32, 33, 60)] + [TEXT * 2, "猫" * 12, ""]
    calls = requests("loglikelihood_rolling", [(text,) for text in texts])
    want = reference.loglikelihood_rolling(calls, disable_tqdm=True)
    got = lm.loglikelihood_rolling(calls, disable_tqdm=True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)


def test_generate_until(both):
    lm, reference = both
    contexts = [TEXT[:n] for n in (1, 8, 9, 12, 40)] + [TEXT * 3]
    kwargs = {"until": [], "max_gen_toks": 16, "do_sample": False}
    calls = requests("generate_until", [(x, kwargs) for x in contexts])
    whole = reference.generate_until(calls, disable_tqdm=True)
    # Stop strings of one character and of several, in the middle of what the model says.
    said = [re.findall(r"[^\ufffd]+", text[1:]) for text in whole]
    runs = sorted({max(parts, key=len) for parts in said if parts}, key=len)
    stops = [runs[0][0], runs[-1][:2]]
    stopped = {"until": stops, "max_gen_toks": 16, "temperature": 0.0}
    calls += requests("generate_until", [(x, stopped) for x in contexts])
    want = reference.generate_until(calls, disable_tqdm=True)
    assert want[:6] == whole
    assert sum(a != b for a, b in zip(want[:6], want[6:], strict=True)) >= 2
    assert lm.generate_until(calls, disable_tqdm=True) == want


@pytest.fixture(scope="module")
def single(exported) -> Any:
    """Our model of a checkpoint, on one device."""
    directory, _ = exported("llama-3")
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    tokenizer = hf.load_tokenizer(directory)
    return harness.HarnessLM(*hf.load(directory, mesh), tokenizer, mesh, batch_size=4, seed=3)


def test_an_empty_prompt_begins_with_the_prefix_token(single, exported):
    """EOS, where there is no BOS."""
    directory, _ = exported("qwen")
    tokenizer, loaded = hf.load_tokenizer(directory), hf.load(directory, single.mesh)
    lm = harness.HarnessLM(*loaded, tokenizer, single.mesh)
    kwargs = {"until": [], "max_gen_toks": 16}
    calls = requests("generate_until", [("", kwargs), (tokenizer.eos_token, kwargs)])
    empty, begun = lm.generate_until(calls, disable_tqdm=True)
    assert empty == begun != ""


def test_tasks_that_sample(single):
    kwargs = {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    texts = ["Say hi", "name", "Say hi", "Say hi", "one"]
    calls = requests("generate_until", [(text, kwargs) for text in texts])
    got = single.generate_until(calls, disable_tqdm=True)
    assert len(set(got)) == 5
    order = [4, 1, 0, 2, 3]
    again = single.generate_until([calls[i] for i in order], disable_tqdm=True)
    assert again == [got[i] for i in order]

    for i in (0, 1, 4):  # alone
        assert single.generate_until([calls[i]], disable_tqdm=True) == [got[i]]
    greedy = requests("generate_until", [("name", {"max_gen_toks": 16})])
    one = requests("generate_until", [("name", kwargs | {"top_k": 1})])
    assert single.generate_until(greedy) == single.generate_until(one) != got[1:2]


def test_tokens_that_hold_a_stop_string_end_a_response(single):
    tokens = single.tokenizer.batch_decode([[i] for i in range(single.config.vocab_size)])
    with_e = {i for i, token in enumerate(tokens) if "e" in token}
    assert len(with_e) > 3
    assert set(single._ends(["e", ""])) == {*single.config.eos_ids, *with_e}
    # Alone, a byte of a longer character is a replacement character.
    assert single._ends(["\ufffd", "no token holds this"]) == single.config.eos_ids


def test_the_same_pairs_give_the_same_batches():
    pairs = [((i, *range(i % 5)), (7,) * (1 + i % 3)) for i in range(40)]
    twice = []
    for order in (pairs, random.Random(0).sample(pairs, len(pairs))):
        twice.append([(part, rows) for part, rows in harness.batches(set(order), 8, 32)])
    assert [part for part, _ in twice[0]] == [part for part, _ in twice[1]]
    assert sorted(pair for part, _ in twice[0] for pair in part) == sorted(pairs)
    part, rows = twice[0][-1]
    for b, (context, continuation) in enumerate(part):
        n = rows["mask_BR"][b].sum()
        before = rows["tokens_BT"][b][rows["at_BR"][b, :n]].tolist()
        assert before == [context[-1], *continuation[:-1]]
        assert rows["targets_BR"][b, :n].tolist() == [*continuation]
    assert {rows["tokens_BT"].shape for _, rows in twice[0]} == {(8, 16)}


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"max_gen_toks": CONTEXT}, "32 new tokens leave no room"),
        ({}, "256 new tokens leave no room"),
        ({"max_gen_toks": 4, "num_beams": 2}, "num_beams: the sampler has no such"),
    ],
)
def test_what_a_task_cannot_ask_for(single, kwargs, named):
    with pytest.raises(ValueError, match=named):
        single.generate_until(requests("generate_until", [("Say", kwargs)]), disable_tqdm=True)


@pytest.mark.parametrize("text", ["", "猫" * CONTEXT])
def test_what_cannot_be_scored(single, text):
    calls = requests("loglikelihood", [("Say", text)])
    with pytest.raises(ValueError, match="at most the model's context of 32"):
        single.loglikelihood(calls, disable_tqdm=True)


@pytest.mark.parametrize("layout", chat_layouts.LAYOUTS)
@pytest.mark.parametrize("opens", [True, False])
def test_chat_templates(single, exported, layout, opens):
    """As `hf` renders them; Gemma's refuses the system message, which is left out."""
    tokenizer = chat_layouts.tokenizer(layout)
    lm = harness.HarnessLM(single.config, {}, tokenizer, single.mesh)
    _, reference = exported("llama-3")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi."}]
    if not opens:
        messages.append({"role": "assistant", "content": "Hi"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "tokenizer", tokenizer)
        want = reference.apply_chat_template(messages, add_generation_prompt=opens)
    assert lm.apply_chat_template(messages, add_generation_prompt=opens) == want
    assert ("Be kind." in want) == (layout != "gemma")
    assert lm.chat_template(True) == tokenizer.chat_template


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with two tasks of one's own: multiple choice, and short answers."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = ["Say hi to", "name a river", "two, please", "one or two", "user name", "one"]
    rows = [
        {
            "question": text,
            "choices": [" one", " two rivers", " hi"],
            "gold": i % 3,
            "answer": "tea in a rose",
        }
        for i, text in enumerate(questions * 2)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": f"{folder}/rows.jsonl"}, "cache_dir": f"{folder}/cache"}
    shared = {"dataset_path": "json", "dataset_kwargs": source, "doc_to_text": "{{question}}"}
    shared |= {"test_split": "test", "fewshot_split": "test", "target_delimiter": ""}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    short = {"output_type": "generate_until", "doc_to_target": string.printable}
    short["generation_kwargs"] = {"until": ["."], "max_gen_toks": 8}
    short["metric_list"] = [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}]
    for name, task in {"choose": choice, "answer": short}.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    return folder


def run(directory: str, tasks: Path, out: Path, *flags: str) -> dict:
    words = ["--model", directory, "--include_path", f"{tasks}", "--out", f"{out}"]
    command.cli([*words, "--batch_size", "8", *flags])
    return json.loads((out / "results.json").read_text())


def only_given(monkeypatch) -> None:
    """Leaves out the harness's own tasks, whose YAML files take seconds to read."""
    manager = lm_eval_tasks.TaskManager

    def bare(include_path=None, include_defaults=True):
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", bare)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (
            "--tasks choose answer --limit 9 --num_fewshot 1 --seed 7",
            {"tasks": ["choose", "answer"], "limit": 9, "num_fewshot": 1, "fewshot_random_seed": 7},
        ),
        ("--tasks choo* --apply_chat_template", {"tasks": ["choose"], "apply_chat_template": True}),
    ],
)
def test_the_command(exported, tasks, tmp_path, monkeypatch, capsys, flags, settings):
    monkeypatch.setattr(harness_evaluator, "add_env_info", lambda results: None)  # runs pip
    only_given(monkeypatch)
    directory, reference = exported("llama-3")
    results = run(directory, tasks, tmp_path / "out", *flags.split())
    manager = lm_eval_tasks.TaskManager(include_path=f"{tasks}")
    settings |= {"task_manager": manager, "bootstrap_iters": command.BOOTSTRAP}
    want = harness_evaluator.simple_evaluate(reference, **settings)
    assert results["results"] == want["results"]
    assert results["n-samples"] == want["n-samples"]
    assert results["config"]["flags"]["batch_size"] == 8
    value, error = (want["results"]["choose"][f"acc{x},none"] for x in ("", "_stderr"))
    assert 0 < value < 1
    if "answer" in settings["tasks"]:
        assert 0 < want["results"]["answer"]["chrf,none"] < 100
    printed = capsys.readouterr().out
    assert f"{value:.4f}" in printed
    assert f"{error:.4f}" in printed
    assert f"wrote {tmp_path}/out/results.json" in printed


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tasks chose", "--tasks chose: the harness has no such task; near it are choose"),
        ("--tasks choose --batch_size 3", "--batch_size 3: does not divide over 8 shards"),
        ("--tasks choose --include_path nowhere", "--include_path nowhere: no such directory"),
        ("--tasks choose --model nowhere", "--model nowhere: not a preset"),
        ("--tasks choose --num_fewshot -1", "--num_fewshot -1: must not be negative"),
        ("--tasks", "--tasks: give at least one"),
    ],
)
def test_wrong_flags(exported, tasks, monkeypatch, capsys, flags, named):
    only_given(monkeypatch)
    words = ["--model", exported("llama-3")[0], "--include_path", f"{tasks}", *flags.split()]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.cli(words)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named}")
    assert said.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as end:
        command.cli(["--tasks", "hellaswag"])
    assert end.value.code == 2
    assert "pip install 'instructjax[eval]'" in capsys.readouterr().err


def test_only_one_module_imports_the_package():
    files = Path(models.__file__).parents[1].rglob("*.py")
    at_the_top = re.compile(r"^(from|import) (lm_eval|instructjax\.evaluation\.harness)", re.M)
    assert [x.name for x in files if at_the_top.search(x.read_text())] == ["harness.py"]


def test_the_code_of_the_page_on_evaluation(exported, tmp_path, monkeypatch):
    """Responses for AlpacaEval, from the code of docs/evaluate.md."""
    text = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count("runs/ppo") == code.count("=512") == 1
    rows = [{"instruction": "Say hi", "dataset": "x"}, {"instruction": "name one", "dataset": "x"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    code = code.replace("runs/ppo", exported("llama-3")[0]).replace("=512", "=2")
    exec(compile(code, "evaluate.md", "exec"), {})
    said = json.loads((tmp_path / "outputs.json").read_text())
    assert [row["instruction"] for row in said] == ["Say hi", "name one"]
    assert all(set(row) == {"instruction", "output", "generator"} for row in said)
    assert said[0]["generator"] == exported("llama-3")[0]
