"""What a response is worth: functions from files, reward models from disk, and their mixes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from instructjax import hf, models, rollout, scoring, sharding
from instructjax.data import Record
from instructjax.evaluation import gold
from instructjax.models import ModelConfig
from instructjax.scoring import RewardConfig

CONFIG = ModelConfig(
    vocab_size=20, layers=2, width=16, heads=2, mlp_width=32, max_length=32, eos_ids=(1,)
)
PROMPTS, RESPONSES = ["one two", "three", "two"], ["happy happy day", "", "a happy day"]
RECORDS = [Record(f"file:{i}", {"bonus": i / 4}, prompt) for i, prompt in enumerate(PROMPTS)]


def make_tokenizer(words=20, first="<unk>", swapped=(0, 0)):
    """A tokenizer of this many words."""
    names = [first, "<eos>", *(f"w{i}" for i in range(2, words))]
    i, j = swapped
    names[i], names[j] = names[j], names[i]
    core = Tokenizer(tokenizer_models.WordLevel({n: i for i, n in enumerate(names)}, first))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token=first)


@functools.cache
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def reward_model(seed):
    """(config, params), with a bias."""
    params = jax.tree.map(lambda x: x * 5, models.init(CONFIG, jax.random.key(seed)))
    config, params = models.with_scalar_head(params, CONFIG, jax.random.key(seed + 9))
    params["score"]["bias"] = jnp.float32(0.625)
    return config, params


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A reward model, an ensemble of two, one of other tokens, and a language model."""
    root = tmp_path_factory.mktemp("runs")
    hf.save(root / "rm" / "export", *reward_model(0), make_tokenizer())
    hf.save(root / "both" / "export", *reward_model(0), make_tokenizer())
    hf.save(root / "both" / "export-1", *reward_model(1), make_tokenizer())
    hf.save(root / "other" / "export", *reward_model(0), make_tokenizer(first="<other>"))
    lm = models.init(CONFIG, jax.random.key(0))
    hf.save(root / "lm" / "export", CONFIG, lm, make_tokenizer())
    return root


def sampled_rows():
    """Four responses, the last of them empty."""
    rng = np.random.default_rng(0)
    mask = np.arange(5) < np.array([[5], [1], [3], [0]])
    prompts = [[4, 5], [6], [7, 8, 9], [10]]
    tokens = rng.integers(0, 20, (4, 5)).astype(np.int32)
    return rollout.left_padded(prompts, 4) | {"tokens_BR": tokens, "mask_BR": mask}


def over(rows, fn):
    return rollout.map_batches(fn, rows, 3, [2, 5], mesh())


def load(*spec, tokenizer=None, dtype="float32", offload=False, **flags):
    config = RewardConfig(tuple(map(str, spec)), **flags)
    return scoring.load(config, mesh(), tokenizer or make_tokenizer(), dtype, offload)


def score(rewards, rows=None):
    rows = rows or sampled_rows()
    n = len(rows["mask_BR"])
    return rewards.score(functools.partial(over, rows), [""] * n, [""] * n, RECORDS[:1] * n)


def file_with(folder, body, name="mine.py"):
    (folder / name).write_text(body)
    return folder / name


# ---------------------------------------------------------------------------- functions


COUNT = """
def count(prompts, responses, records):
    return [response.split().count("happy") for response in responses]

def bonus(prompts, responses, records):
    return [len(prompt) / 8 + record.row["bonus"] for prompt, record in zip(prompts, records)]
"""


def test_functions_see_text_and_records(tmp_path):
    file = file_with(tmp_path, COUNT)
    rewards = load(f"{file}:count", f"{file}:bonus")
    total, terms = rewards.score(over, PROMPTS, RESPONSES, RECORDS)
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, [2 + 0.875, 0.625 + 0.25, 1 + 0.375 + 0.5])
    assert terms == {"count": 1.0, "bonus": (0.875 + 0.875 + 0.875) / 3}
    weighted = load(f"{file}:count", f"{file}:bonus", weights=(0.5, -2.0))
    total, terms = weighted.score(over, PROMPTS, RESPONSES, RECORDS)
    np.testing.assert_array_equal(total, [1 - 1.75, -1.75, 0.5 - 1.75])
    assert terms["count"] == 1.0  # the means are of the terms themselves


def test_a_file_may_import_what_is_beside_it(tmp_path):
    file_with(tmp_path, "HALF = 0.5\n", "constants_beside_it.py")
    file = file_with(
        tmp_path,
        "from constants_beside_it import HALF\ndef f(p, r, records): return [HALF] * len(r)\n",
    )
    total, _ = load(f"{file}:f").score(over, PROMPTS, RESPONSES, RECORDS)
    np.testing.assert_array_equal(total, [0.5] * 3)


def test_a_file_is_read_as_it_is_now(tmp_path):
    """In a notebook it was edited since."""
    for worth in (1.0, 0.5):
        file = file_with(tmp_path, f"def f(p, r, records): return [{worth}] * len(r)\n")
        total, _ = load(f"{file}:f").score(over, PROMPTS, RESPONSES, RECORDS)
        np.testing.assert_array_equal(total, [worth] * 3)


def test_a_file_runs_once_in_a_process(tmp_path):
    """Though a start checks all functions before it loads them: a file may load models."""
    file = file_with(
        tmp_path,
        f"with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('ran ')\n"
        "def f(prompts, responses, records): return [1.0] * len(responses)\n",
    )
    scoring.check(RewardConfig((f"{file}:f",)), mesh())
    load(f"{file}:f")
    assert (tmp_path / "log").read_text() == "ran "


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        (None, "f", r"--reward .*mine.py:f: there is no file .*mine.py"),
        ("x = 1", "f", r"--reward .*mine.py:f: .*mine.py has no function 'f'"),
        ("f = 1", "f", r"has no function 'f'"),
        ("import nowhere_at_all", "f", r"--reward .*mine.py:f: ModuleNotFoundError: No module"),
        ("def f(:", "f", r"--reward .*mine.py:f: SyntaxError"),
        ("def f(): pass", "", r"--reward .*mine.py:: expected my_file.py:my_function"),
    ],
    ids=str,
)
def test_files_that_do_not_give_a_function(tmp_path, body, name, message):
    if body is not None:
        file_with(tmp_path, body)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(f"{tmp_path / 'mine.py'}:{name}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"mine.py:f: ZeroDivisionError: division by zero"),
        ("return [0.5] * 2", r"mine.py:f: gave shape \[2\] for 3 responses"),
        ("return 0.5", r"mine.py:f: gave shape \[\] for 3 responses"),
        ("return [[0.5]] * 3", r"mine.py:f: gave shape \[3, 1\] for 3 responses"),
        ("return [0.5, float('nan'), 1]", r"mine.py:f: nan for the response ''"),
        ("return [0.5, 0.5, float('inf')]", r"mine.py:f: inf for the response 'a happy day'"),
        ("return ['good'] * 3", r"mine.py:f: ValueError: could not convert"),
        ("return None", r"mine.py:f: (gave shape|TypeError)"),
    ],
)
def test_functions_that_do_not_give_a_score_each(tmp_path, body, message):
    file = file_with(tmp_path, f"def f(prompts, responses, records):\n    {body}\n")
    rewards = load(f"{file}:f")
    with pytest.raises(ValueError, match=f"--reward .*{message}"):
        rewards.score(over, PROMPTS, RESPONSES, RECORDS)


def test_the_flag_that_named_a_term_is_in_its_errors(tmp_path):
    file = file_with(tmp_path, "def f(prompts, responses, records):\n    return 1 / 0\n")
    judge: Any = gold.load_judge([f"{file}:f"], "jsonl:x", mesh(), make_tokenizer(), "float32")
    with pytest.raises(ValueError, match=r"^--gold .*mine.py:f: ZeroDivisionError"):
        judge(over, RECORDS, RESPONSES)
    with pytest.raises(ValueError, match=r"^--gold .*mine.py:g: .* has no function 'g'"):
        gold.load_judge([f"{file}:g"], "jsonl:x", mesh(), make_tokenizer(), "float32")


def test_flags_that_do_not_fit(tmp_path):
    file = file_with(tmp_path, COUNT)
    with pytest.raises(ValueError, match=r"--reward.weights 1.0 2.0: 1 are needed: .*:count"):
        load(f"{file}:count", weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="give at least one"):
        load()
    with pytest.raises(ValueError, match="two functions of one name"):
        load(f"{file}:count", f"{file}:count")
    file = file_with(tmp_path, f"{COUNT}\nmodel = disagreement = count\n")
    for name in ("model", "disagreement"):
        with pytest.raises(ValueError, match="or one named `model` or `disagreement`"):
            load(f"{file}:{name}")
    assert not scoring.is_function("runs/rm")
    assert scoring.is_function("~/some dir/mine.py:f")


# ---------------------------------------------------------------------------- reward models


def test_scores_of_a_run(runs):
    """Read at the last live token, bias and fractions included; whatever batches they come in."""
    config, params = reward_model(0)
    got, terms = score(load(runs / "rm"))
    rows = sampled_rows()
    apply = jax.jit(models.apply, static_argnums=1)
    for b in range(3):
        prompt = rows["prompt_BP"][b][rows["prompt_mask_BP"][b]]
        tokens = np.concatenate([prompt, rows["tokens_BR"][b][rows["mask_BR"][b]]])
        padded = np.pad(tokens, (0, 9 - len(tokens)))[None]
        want = models.scalars(params, config, apply(params, config, padded))[0, len(tokens) - 1]
        assert abs(got[b] - want) < 1e-5
    assert abs(terms["model"] - got.mean()) < 1e-6
    assert got.dtype == np.float32
    directory, _ = score(load(runs / "rm" / "export"))  # the Hugging Face directory itself
    np.testing.assert_array_equal(directory, got)


def test_an_ensemble(runs):
    first, _ = score(load(runs / "rm"))
    second, _ = score(load(runs / "both" / "export-1"))
    assert np.abs(first - second).max() > 0.1
    mean, deviation = (first + second) / 2, np.abs(first - second) / 2
    for flags, want in [
        ({}, mean),
        ({"combine": "min"}, np.minimum(first, second)),
        ({"combine": "mean-std"}, mean - deviation),
        ({"combine": "mean-std", "spread": 0.5}, mean - deviation / 2),
        ({"combine": "min", "weights": (2.0,)}, 2 * np.minimum(first, second)),
    ]:
        for spec in ([runs / "both"], [runs / "rm", runs / "both" / "export-1"]):
            got, terms = score(load(*spec, **flags))
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert list(terms) == ["model", "disagreement"]
            np.testing.assert_allclose(terms["disagreement"], deviation.mean(), rtol=1e-4)


def test_combinations_by_hand():
    scores_nb = np.array([[1.0, 0.25], [3.0, 0.25], [5.0, 0.25]], np.float32)

    def of(combine, spread):
        return scoring.Rewards([], [], (), combine, spread).combined(scores_nb)

    np.testing.assert_array_equal(of("mean", 1.0), [3, 0.25])
    np.testing.assert_array_equal(of("min", 1.0), [1, 0.25])
    np.testing.assert_allclose(of("mean-std", 0.5), [3 - 0.5 * (8 / 3) ** 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(of("mean-variance", 0.5), [3 - 0.5 * 8 / 3, 0.25], rtol=1e-6)


def test_a_model_and_a_function(runs, tmp_path):
    file = file_with(tmp_path, "def f(p, r, records): return [0.25, 0.5, 0.75, 1]\n")
    model, _ = score(load(runs / "rm"))
    # The models are the first term, wherever they are named.
    got, terms = score(load(f"{file}:f", runs / "rm", weights=(2.0, 3.0)))
    np.testing.assert_allclose(got, 2 * model + 3 * np.array([0.25, 0.5, 0.75, 1]), rtol=1e-6)
    assert list(terms) == ["model", "f"]
    with pytest.raises(ValueError, match=r"2 are needed: the reward models, .*:f"):
        load(f"{file}:f", runs / "rm", weights=(1.0,))


def test_what_is_no_reward_model_of_these_tokens(runs):
    with pytest.raises(ValueError, match=r"--reward \S*lm: a language model, not a reward"):
        load(runs / "lm")
    message = r"--reward .*other: the vocabulary is .* 1 of its 20 tokens .* such as '<unk>'"
    with pytest.raises(ValueError, match=message):
        load(runs / "other")
    with pytest.raises(ValueError, match=r"1 of its 21 tokens are missing .* such as 'w20'"):
        load(runs / "rm", tokenizer=make_tokenizer(21))
    permuted = make_tokenizer(swapped=(4, 9))  # the same tokens, two with other ids
    with pytest.raises(ValueError, match=r"2 of its 20 tokens .* another id, such as 'w[49]'"):
        load(runs / "rm", tokenizer=permuted)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(runs / "nowhere")


def test_a_row_for_padding_is_no_other_vocabulary(runs):
    """An exported reward model has one, so that transformers can score batches."""
    exported = hf.load_tokenizer(runs / "rm" / "export")
    assert len(exported) == 21
    assert exported.pad_token_id == 20
    score(load(runs / "rm", tokenizer=make_tokenizer()))


def test_offloaded_models_score_alike(runs):
    stay, leave = load(runs / "both"), load(runs / "both", offload=True)
    for (_, here), (_, away) in zip(stay.models, leave.models, strict=True):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.tree)}
        assert kinds == {"pinned_host"}
        awake = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.on_device())}
        assert awake == {leaf.sharding.memory_kind for leaf in jax.tree.leaves(here.tree)}
        assert "pinned_host" not in awake
    np.testing.assert_array_equal(score(leave)[0], score(stay)[0])


def test_frozen_models_have_the_compute_dtype(runs):
    rewards = load(runs / "rm", dtype="bfloat16")
    params = rewards.models[0][1].tree
    kernels = [
        leaf.dtype.name
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert {params["embed"]["tokens"].dtype.name, *kernels} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["score"])} == {"float32"}
    got, want = score(rewards)[0], score(load(runs / "rm"))[0]
    assert 0 < np.abs(got - want)[:3].max() < 0.2


def test_scores_on_a_mesh(runs):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    config = RewardConfig((str(runs / "rm"),))
    rewards = scoring.load(config, mesh, make_tokenizer(), "float32", offload=True)
    rows = sampled_rows()
    spread = lambda fn: rollout.map_batches(fn, rows, 4, [5], mesh)  # noqa: E731
    got, _ = rewards.score(spread, [""] * 4, [""] * 4, RECORDS[:1] * 4)
    np.testing.assert_allclose(got[:3], score(load(runs / "rm"))[0][:3], atol=1e-5)
