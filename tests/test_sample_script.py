"""experiments/sample.py: one prompt, a conversation, and wrong usage."""

import dataclasses
import io
import signal
from pathlib import Path

import jax
import pytest
import sample

from instructjax import hf, miniature, models, sampler
from instructjax.models import ModelConfig

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


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The token ids of each prompt that the script answers."""
    seen = []
    stream = sampler.Session.stream

    def spy(session, ids, *args, **options):
        seen.append(list(ids))
        return stream(session, ids, *args, **options)

    monkeypatch.setattr(sampler.Session, "stream", spy)
    return seen


def talk(model, monkeypatch, lines, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    sample.cli(["--model", f"{model}", *FEW, *flags])


@pytest.mark.parametrize("dialogue", [False, True])
def test_a_conversation(model, dialogue, capsys, monkeypatch, prompts):
    """A dialogue remembers its turns until the context is full, and then forgets the first."""
    lines = ["hello.", "", *["list two foods."] * 9]
    talk(model, monkeypatch, lines, "--dialogue", f"{dialogue}")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12  # the header, ten answers, the end
    assert len(prompts) == 10
    lengths = [len(ids) for ids in prompts]
    if dialogue:
        assert lengths[0] < lengths[1] < lengths[2]
        assert 64 - 6 - 20 < max(lengths) <= 64 - 6
        assert "no longer fits" in err
    else:
        assert prompts[1:] == [prompts[1]] * 9
        assert "no longer fits" not in err


def test_the_system_message_stays(model, capsys, monkeypatch, prompts):
    flags = [
        "--dialogue",
        "True",
        "--context",
        "48",
        "--system",
        "list two animals that are white.",
    ]
    talk(model, monkeypatch, ["list two foods."] * 9, *flags)
    assert "no longer fits" in capsys.readouterr().err
    tokenizer = hf.load_tokenizer(str(model))
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert all(text.startswith("list two animals that are white.") for text in texts)
    assert max(map(len, prompts)) <= 48 - 6
    assert texts[0].count("foods") == 1
    assert max(text.count("foods") for text in texts) > 1
    with pytest.raises(ValueError, match="--system: each line is a prompt of its own"):
        talk(model, monkeypatch, ["hello."], "--system", "x")


def test_a_message_that_is_too_long_does_not_end_the_conversation(model, capsys, monkeypatch):
    words = " ".join(["animals"] * 60)
    talk(model, monkeypatch, ["hello.", words, "hello."], "--dialogue", "True")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "leaves no room for --max_new_tokens 6 in a --context of 64" in err
    with pytest.raises(ValueError, match="leaves no room for --max_new_tokens 6"):
        sample.cli(["--model", f"{model}", "--prompt", words, *FEW])


def script_answers(monkeypatch, ids, interrupt_at=None):
    """Answers have these tokens, and Ctrl-C comes before one of them."""

    def stream(session, prompt, key, **options):
        for number, token in enumerate(ids):
            if number == interrupt_at:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(sampler.Session, "stream", stream)


def test_an_answer_says_how_it_ended(model, capsys, monkeypatch):
    """No special token is printed. An empty answer is not remembered."""
    tokenizer = hf.load_tokenizer(str(model))
    eos, ids = tokenizer.eos_token_id, [20, 21, 22, 23]
    for answer, interrupt_at, printed, noted in [
        ([*ids, eos], None, ids, ""),
        (ids, None, ids, " ... (cut at --max_new_tokens 6)"),
        ([eos], None, [], "(an empty answer)"),
        ([*ids, eos], 3, ids[:3], " ... (stopped)"),
    ]:
        script_answers(monkeypatch, answer, interrupt_at)
        sample.cli(["--model", f"{model}", "--prompt", "hello.", *FEW])
        out, err = capsys.readouterr()
        assert (out, err) == (tokenizer.decode(printed) + "\n", noted)


def test_temperature_0_is_the_same_for_every_seed(model, capsys):
    answers = set()
    for seed in "012":
        call = ["--model", f"{model}", "--prompt", "hello.", "--temperature", "0", "--seed", seed]
        sample.cli([*call, *FEW])
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0: must not be negative"),
        (["--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["--max_new_tokens", "64", "--context", "64"], "64: must be less than --context 64"),
        (["--prompt", ""], "--prompt is empty"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample.cli(flags)
    assert message in " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_a_reward_model_writes_nothing(tmp_path, capsys):
    tokenizer = miniature.tokenizer()
    config = dataclasses.replace(small(tokenizer), scalar_head=True)
    hf.save(tmp_path, config, models.init(config, jax.random.key(0)), tokenizer)
    with pytest.raises(SystemExit, match="2"):
        sample.cli(["--model", f"{tmp_path}", "--prompt", "hello.", *FEW])
    assert f"--model {tmp_path}: a reward model, not a language model" in capsys.readouterr().err
