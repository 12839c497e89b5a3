"""benchmarks/score_ends.py: each response scored alone, without padding, gives the same scores."""

import json

import chat_layouts
import jax
import numpy as np
import pytest
import score_ends

from instructjax import hf, miniature, models, reward, sharding
from instructjax.data import template
from instructjax.models import ModelConfig

PROMPTS = ["list two animals that are white.", "write one fact about lentle."]
RESPONSES = {"SFT": ["swans and sheep.", "it is blue."], "PPO": ["swans.", "lentle is very blue."]}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    out, tokenizer = tmp_path_factory.mktemp("judge"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=64, **ids)
    base = models.init(config, jax.random.key(0))
    config, params = models.with_scalar_head(base, config, jax.random.key(1))
    hf.save(out, config, params, tokenizer)
    return out


@pytest.mark.parametrize(("layout", "end"), [("gemma", "<end_of_turn>"), ("zephyr", "</s>")])
def test_a_response_is_scored_as_in_training(layout, end, monkeypatch):
    """After BOS, and with the template's end of turn, which need not be the tokenizer's EOS."""
    tokenizer, rows = chat_layouts.tokenizer(layout), []

    def score(params, batch):
        rows.append([batch[name][0] for name in ("prompt_BP", "tokens_BR")])
        return np.zeros(score_ends.BATCH)

    loaded = None, None, tokenizer
    monkeypatch.setattr(score_ends.pretrained, "load", lambda *args, **how: loaded)
    monkeypatch.setattr(score_ends.scoring, "scorer", lambda *args: score)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    score_ends.scores("judge", mesh, ["<s>name a river" if layout == "zephyr" else "Hi"], ["one"])
    (prompt, cut), (_, ended) = rows
    assert list(prompt).count(tokenizer.bos_token_id) == 1
    assert prompt[0] == tokenizer.bos_token_id
    assert list(ended[:-1]) == list(cut[:-1])
    assert tokenizer.convert_ids_to_tokens(int(ended[-1])) == end
    template.record(tokenizer, "plain")
    assert score_ends.end_of(tokenizer) == tokenizer.eos_token_id


def alone(judge, prompt: str, response: str, ends: int) -> float:
    config, params = hf.load(judge)
    tokenizer = hf.load_tokenizer(judge)
    tokens, answer = (
        tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, response)
    )
    answer = answer + [tokenizer.eos_token_id] * ends
    batch = {
        "prompt_BP": np.array([tokens]),
        "prompt_mask_BP": np.ones((1, len(tokens)), bool),
        "responses_BKR": np.array([[answer]]),
        "response_mask_BKR": np.ones((1, 1, len(answer)), bool),
    }
    return float(reward.score(params, config, batch)[0, 0])


def test_scores_with_and_without_an_end(judge, monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for batch in (1, 3):  # the last one is not full
        monkeypatch.setattr(score_ends, "BATCH", batch)
        found = score_ends.scores(str(judge), mesh, PROMPTS, RESPONSES["PPO"])
        for i, ends in np.ndindex(2, 2):
            want = alone(judge, PROMPTS[i], RESPONSES["PPO"][i], ends)
            assert found[ends, i] == pytest.approx(want, abs=1e-5)


def test_the_table(judge, tmp_path, capsys):
    columns = {"prompt": PROMPTS, **RESPONSES}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "samples_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_ends.main(score_ends.Config(tmp_path, (str(judge),)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == [*RESPONSES]
    for line, responses in zip(lines[2:], RESPONSES.values(), strict=True):
        cut, ended = (
            np.mean([alone(judge, *pair, ends) for pair in zip(PROMPTS, responses, strict=True)])
            for ends in (0, 1)
        )
        cells = [float(cell.split()[0]) for cell in line.split(" | ")[2:]]
        np.testing.assert_allclose(cells, [cut, ended, ended - cut], atol=0.006)
