"""python -m instructjax.run.average: the mean by hand, and models that cannot be averaged."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import hf, miniature, models
from instructjax.run import average

TOKENIZER = miniature.tokenizer()
CONFIG = dataclasses.replace(models.PRESETS["miniature"], width=16, mlp_width=32)


def test_the_mean_of_equal_models_is_that_model():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for count in (2, 3, 7):
        (mean,) = average.average([[values]] * count, [1.0] * count)
        assert mean.dtype == np.float32
        np.testing.assert_array_equal(mean, values)


def test_weights_by_hand():
    one = {"a": jnp.array([1.0, 3.0]), "b": jnp.float32(0)}
    other = {"a": jnp.array([5.0, 7.0]), "b": jnp.float32(8)}
    mean = average.average(iter([one, other]), [1, 3])
    np.testing.assert_array_equal(mean["a"], [4, 6])
    np.testing.assert_array_equal(mean["b"], 6)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        average.average([one], [1, 3])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models that differ in the final norm alone: of a run, and in a directory. Others beside."""
    out = tmp_path_factory.mktemp("runs")
    params = jax.jit(functools.partial(models.init, CONFIG))(jax.random.key(0))
    for place, factor in (("run/export", 1), ("other", 5)):
        norm = jax.tree.map(lambda x, factor=factor: factor * x, params["final_norm"])
        hf.save(out / place, CONFIG, {**params, "final_norm": norm}, TOKENIZER)
    shallow = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    hf.save(out / "shallow", dataclasses.replace(CONFIG, layers=1), shallow, TOKENIZER)
    for name, seed, factor in (("rm", 1, 1), ("trained-rm", 1, 3), ("other-rm", 2, 1)):
        config, scoring = models.with_scalar_head(params, CONFIG, jax.random.key(seed))
        scoring["score"]["kernel"] = factor * scoring["score"]["kernel"]
        hf.save(out / name, config, scoring, TOKENIZER)
    return out


def test_a_run_and_a_directory(runs, tmp_path, capsys):
    out = tmp_path / "average"
    words = [f"{runs}/run", f"{runs}/other", "--out", f"{out}"]
    average.cli([*words, "--weights", "3", "1"])
    assert "average of 2 models" in capsys.readouterr().out
    params, first = (hf.load(path)[1] for path in (out, runs / "run" / "export"))
    doubled = jax.tree.map(lambda x: 2 * x, first["final_norm"])  # (3 x 1 + 5) / 4
    jax.tree.map(np.testing.assert_array_equal, params, {**first, "final_norm": doubled})
    assert hf.load_tokenizer(out).get_vocab() == hf.load_tokenizer(runs / "other").get_vocab()
    average.cli(words)
    tripled = jax.tree.map(lambda x: 3 * x, first["final_norm"])
    jax.tree.map(np.testing.assert_array_equal, hf.load(out)[1]["final_norm"], tripled)


def test_reward_models_that_began_with_one_head(runs, tmp_path):
    out, members = tmp_path / "average", [f"{runs}/rm", f"{runs}/trained-rm"]
    average.cli([*members, "--out", f"{out}"])
    config, params = hf.load(out)
    assert config.scalar_head
    head = hf.load(runs / "rm")[1]["score"]["kernel"]
    np.testing.assert_allclose(params["score"]["kernel"], 2 * head, rtol=1e-6)  # (1 + 3) / 2
    with pytest.raises(ValueError, match=r"other-rm: its head is not that of .*rm \(cosine"):
        average.cli([*members, f"{runs}/other-rm", "--out", f"{tmp_path / 'x'}"])


def test_what_cannot_be_averaged(runs, tmp_path, capsys):
    other = f"{runs}/other"
    for words, named in (
        ([], "models: give at least two"),
        ([other], f"models {other}: give at least two"),
        ([other, f"{runs}/shallow"], f"{runs}/shallow: has layers 1, and {other} has 2"),
        ([other, f"{runs}/rm"], f"{runs}/rm: has scalar_head True, and {other} has False"),
        ([other, other, "--weights", "1"], "--weights: 1 for 2 models"),
        ([other, other, "--weights", "1", "-1"], "--weights (1.0, -1.0): their sum is 0"),
        ([other, f"{runs}/none"], f"models {runs}/none: no such directory"),
    ):
        with pytest.raises(SystemExit) as end:
            average.cli([*words, "--out", f"{tmp_path / 'x'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_tokenizers_that_differ(runs, tmp_path):
    file = tmp_path / "copy" / "tokenizer.json"
    model = hf.load(runs / "other")
    hf.save(tmp_path / "copy", *model, hf.load_tokenizer(runs / "other"))
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = " nest", " Davi"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="copy: its tokenizer differs from that of"):
        average.cli([f"{runs}/other", f"{tmp_path}/copy", "--out", f"{tmp_path / 'x'}"])
