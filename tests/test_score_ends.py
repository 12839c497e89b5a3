"""benchmarks/score_ends.py: each response scored alone, without padding, gives the same scores."""

import json

import jax
import numpy as np
import pytest
import score_ends

from instructjax import hf, miniature, models, reward, sharding
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
