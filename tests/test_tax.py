"""The benchmarks of the alignment tax against loops over questions with whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import miniature, models, sharding
from instructjax.evaluation import statistics, tax
from instructjax.models import ModelConfig

ITEMS = 8


@pytest.fixture(scope="module")
def model():
    tokenizer = miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=256, **ids)
    params = models.init(config, jax.random.key(1))
    # Large weights, so that no two options are nearly as likely.
    return jax.tree.map(lambda x: 4 * x, params), config, tokenizer


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices())


@pytest.fixture(scope="module")
def figures(model, mesh):
    params, config, tokenizer = model
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(miniature, "token_f1", likeness)
        return tax.benchmarks(params, config, tokenizer, mesh, size=16, items=ITEMS)


def likeness(said: str, answer: str) -> float:
    """In place of F1, which is 0 for all that a random model says."""
    return len(said) / len(answer)


@pytest.fixture(scope="module")
def logp_TV(model):
    """ids -> log-probabilities of the next token after each, one text at a time."""
    params, config, _ = model
    whole = jax.jit(functools.partial(models.logits, params, config))

    def logp(ids):
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(jax.nn.log_softmax(whole(jnp.array(padded))[0, : len(ids)]))

    return logp


def test_continuations(model, mesh, logp_TV):
    params, config, _ = model
    pairs = [([5, 6, 7], [8, 9]), ([4], [5, 6, 7, 8]), ([9] * 20, [3])] * 3
    got = tax.continuation_logp(params, config, pairs, mesh=mesh, size=8)
    for value, (context, continuation) in zip(got, pairs, strict=True):
        rows = logp_TV([*context, *continuation])[len(context) - 1 : -1]
        expected = sum(row[token] for row, token in zip(rows, continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("myths", [False, True])
def test_multiple_choice(model, figures, logp_TV, myths):
    _, _, tokenizer = model
    right = []
    for question in miniature.multiple_choice(0, ITEMS, myths=myths):
        start = tokenizer(question["prompt"])["input_ids"]
        scores = []
        for option in question["options"]:
            ids = start + tokenizer(option)["input_ids"]
            rows = logp_TV(ids)[len(start) - 1 : -1]
            scores.append(sum(row[i] for row, i in zip(rows, ids[len(start) :], strict=True)))
        right.append(scores.index(max(scores)) == question["label"])
    assert 0 < np.mean(right) < 1  # not all the same, so that the order of questions matters
    name = "truthful_accuracy" if myths else "choice_accuracy"
    assert figures[name].value == np.mean(right)


def test_reading(model, figures, logp_TV):
    _, config, tokenizer = model
    scores = []
    for record in miniature.reading_comprehension(0, ITEMS):
        ids = tokenizer(record["prompt"])["input_ids"]
        said = []
        while len(said) < 12 and (not said or said[-1] not in config.eos_ids):
            said.append(int(logp_TV(ids + said)[-1][: config.vocab_size].argmax()))
        text = tokenizer.decode(said, skip_special_tokens=True)
        scores.append(likeness(text, record["answer"]))
    assert figures["reading_f1"].value == pytest.approx(np.mean(scores))


def test_entropy_of_names(model, figures, logp_TV):
    _, _, tokenizer = model
    bits = []
    for record in miniature.name_swaps(0, ITEMS):
        start = tokenizer(record["prompt"])["input_ids"]
        scores = []
        for sentence in record["sentences"]:
            ids = start + tokenizer(sentence)["input_ids"]
            rows = logp_TV(ids)[len(start) - 1 : -1]
            scores.append(sum(row[i] for row, i in zip(rows, ids[len(start) :], strict=True)))
        shares = np.exp(scores) / np.exp(scores).sum()
        bits.append(-sum(p * np.log2(p) for p in shares if p))
    assert 0.01 < np.mean(bits) < 0.99
    assert figures["name_entropy"].value == pytest.approx(np.mean(bits), abs=1e-3)


def test_entropy_by_hand():
    certain, even, three_to_one = tax.choice_entropy(np.array([-800, 0, np.log(3)]))
    assert certain == 0
    assert even == 1
    assert three_to_one == pytest.approx(0.811278)


def test_text_loss(model, figures, logp_TV):
    _, _, tokenizer = model
    loss = tokens = 0
    for page in miniature.texts(0, ITEMS, "test"):
        ids = tokenizer(page["text"])["input_ids"][:128]
        rows = logp_TV(ids)
        loss -= sum(rows[t][ids[t + 1]] for t in range(len(ids) - 1))
        tokens += len(ids) - 1
    assert figures["text_loss"].value == pytest.approx(loss / tokens, rel=1e-4)


def test_a_ratio_holds_the_truth():
    rng, estimates = np.random.default_rng(7), []
    for _ in range(400):
        tokens = rng.integers(1, 40, 200)
        loss = tokens * rng.gamma(4, 0.5, 200)  # 2 a token
        estimates.append(statistics.ratio(loss, tokens, draws=300))
    assert np.mean([e.low <= 2 <= e.high for e in estimates]) == pytest.approx(0.95, abs=0.03)
    assert statistics.ratio(np.array([1.0, 3.0]), np.array([1, 1])).value == 2
