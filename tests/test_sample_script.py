"""experiments/sample.py: one prompt, a conversation, and wrong usage."""

import dataclasses
import io
import sys
from pathlib import Path

import jax
import pytest

from instructjax import hf, miniature, models, sampler
from instructjax.models import ModelConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

import sample

FEW = ["--max_new_tokens", "6", "--mesh", "data=8"]


def small(tokenizer) -> ModelConfig:
    sizes = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 32, "max_length": 64}
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    return ModelConfig(vocab_size=len(tokenizer), **sizes, **ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small random model with the miniature's tokenizer, as a Hugging Face directory."""
    out, tokenizer = tmp_path_factory.mktemp("model"), miniature.tokenizer()
    config = small(tokenizer)
    hf.save(out, config, models.init(config, jax.random.key(0)), tokenizer)
    return out


def test_one_prompt(model, capsys):
    """The answer is the one that `generate` samples, and a second call gives it again."""
    prompt = "list two animals that are white."
    call = ["--model", f"{model}", "--prompt", prompt, "--seed", "3", "--top_p", "0.9", *FEW]
    sample.cli(call)
    printed = capsys.readouterr().out
    config, params = hf.load(model)
    tokenizer = hf.load_tokenizer(str(model))
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    key = jax.random.fold_in(jax.random.key(3), 0)
    want = sampler.generate(params, config, [ids], key, max_new_tokens=6, top_p=0.9).responses()
    assert printed == tokenizer.decode(want[0], skip_special_tokens=True) + "\n"
    sample.cli(call)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("dialogue", [False, True])
def test_a_conversation(model, dialogue, capsys, monkeypatch):
    """A dialogue remembers its turns until the context is full, and then forgets the first."""
    seen = []
    stream = sampler.stream

    def spy(params, config, ids, *args, **options):
        seen.append(list(ids))
        return stream(params, config, ids, *args, **options)

    monkeypatch.setattr(sampler, "stream", spy)
    lines = ["hello.", "", *["list two foods."] * 9]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    sample.cli(["--model", f"{model}", "--dialogue", f"{dialogue}", *FEW])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12  # the header, ten answers, the end
    assert len(seen) == 10
    lengths = [len(ids) for ids in seen]
    if dialogue:
        assert lengths[0] < lengths[1] < lengths[2]
        assert max(lengths) <= 64 - 6
        assert "no longer fits" in err
    else:
        assert seen[1:] == [seen[1]] * 9
        assert err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "--temperature must be positive"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--prompt", ""], "--prompt is empty"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.cli(flags)
    assert message in "".join(capsys.readouterr())


def test_a_reward_model_writes_nothing(tmp_path):
    tokenizer = miniature.tokenizer()
    config = dataclasses.replace(small(tokenizer), scalar_head=True)
    hf.save(tmp_path, config, models.init(config, jax.random.key(0)), tokenizer)
    with pytest.raises(ValueError, match=r"--model .*: a reward or value model"):
        sample.cli(["--model", f"{tmp_path}", "--prompt", "hello.", *FEW])
