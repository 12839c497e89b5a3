"""Figures of policies on held-out prompts, by hand and by simulation."""

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from instructjax.data import Record
from instructjax.evaluation import policies, statistics


def sampled(scores, utilities=None, **changes):
    n = len(scores)
    fields = {
        "prompts": [f"<user>prompt {i}" for i in range(n)],
        "turns": [f"prompt {i}" for i in range(n)],
        "texts": [f"text [{i}]" for i in range(n)],
        "score_B": np.array(scores),
        "length_B": np.arange(3, 3 + n),
        "ended_B": np.arange(n) == 0,
        "utility_B": None if utilities is None else np.array(utilities),
    }
    return policies.Sampled(**fields | changes)


def test_means():
    means = {"score": 0.5, "length": 3.5, "eos_fraction": 0.5}
    assert sampled([0.75, 0.25]).means() == means  # no reference, no KL
    with_kl = sampled([0.75, 0.25], kl_B=np.array([1.0, -0.5]))
    assert with_kl.means() == means | {"kl": 0.25}
    assert sampled([0.75, 0.25], [1.0, 2.0]).means() == means | {"utility": 1.5}


def test_what_training_does_not_score_has_no_score():
    before, after = (sampled([0.0], utilities, score_B=None) for utilities in ([0.5], [1.5]))
    rows = policies.results({"start": before, "DPO": after})
    assert "score" not in rows["DPO"]
    assert rows["DPO"]["win_rate"][0] == 1
    text = shown(policies.table(rows, 1))
    assert "score" not in text
    assert "+1.50" in text
    assert "[+" not in shown(policies.samples_table("held-out prompts", before, after))


def test_results_are_against_the_first_policy():
    before = sampled([0.0, 0.5], [0.0, 1.0])
    after = sampled([1.0, 1.5], [0.5, 1.0], text_loss=3.25, length_B=np.array([7, 4]))
    rows = policies.results({"SFT": before, "PPO": after})
    assert "win_rate" not in rows["SFT"]
    assert rows["PPO"]["win_rate"][0] == 0.75
    won_B, longer_B = np.array([1, 0.5]), np.array([4, 0])
    at_equal_length = statistics.length_controlled(won_B, longer_B)
    assert rows["PPO"]["win_rate_at_equal_length"] == at_equal_length
    assert rows["PPO"]["score"] == 1.25
    low, high = rows["PPO"]["score_interval"]
    assert 1.0 <= low <= 1.25 <= high <= 1.5
    assert "text_loss" not in rows["SFT"]
    assert rows["PPO"]["text_loss"] == 3.25
    json.dumps(rows, allow_nan=False)
    text = shown(policies.table(rows, 2))
    assert "2 held-out prompts" in text
    for cell in ("+1.25", "75.0%", "3.250", "50.0%", "PPO"):
        assert cell in text
    assert "KL" not in text  # what no policy has is no column


def test_an_evaluation_is_logged_against_the_policy_before():
    """The win rate is the present policy's, on the prompts that it answered."""
    metrics, samples = {}, []
    run = SimpleNamespace(
        log=lambda step, values: metrics.update({step: values}),
        metrics=SimpleNamespace(sample=lambda step, sample: samples.append((step, sample))),
        console=Console(file=io.StringIO()),
    )
    before = sampled([0.0, 0.5, 9.0], [0.0, 1.0, 9.0])
    now = sampled([1.0, 1.5], [0.5, 1.0], kl_B=np.array([1.0, -0.5]), text_loss=3.25)
    policies.log(run, 7, before, now)
    assert metrics == {
        7: {
            "validation/score": 1.25,
            "validation/kl": 0.25,
            "validation/length": 3.5,
            "validation/eos_fraction": 0.5,
            "validation/utility": 0.75,
            "validation/win_rate": 0.75,
            "ptx/validation_loss": 3.25,
        }
    }
    assert samples[0] == (7, {"prompt": "<user>prompt 0", "response": "text [0]", "score": 1.0})
    assert len(samples) == 2


def test_signs_of_drift_by_hand():
    """Against the mean over the same prompts: 4 tokens, and not the third response's 99."""
    before = sampled([0.0] * 3, length_B=np.array([3, 5, 99]), disagreement=0.5)

    def signs(length, kl=9.9, disagreement: float | None = 1.0):
        now = sampled(
            [0.0] * 2,
            length_B=np.array([length - 1, length + 1]),
            kl_B=np.array([kl, kl]),
            disagreement=disagreement,
        )
        return " | ".join(policies.drift(before, now))

    assert signs(6) == signs(3) == signs(4, disagreement=None) == ""
    assert signs(6.1).startswith("responses have 6.1 tokens, and had 4.0. The reward may")
    assert "2.6 tokens" in signs(2.6)
    assert signs(4, kl=10.5).startswith("the KL from the reference is 10.5 nats a response. The")
    assert signs(4, disagreement=1.1).startswith("the reward models disagree 2.2 times as much")
    assert signs(9, kl=11, disagreement=2).count("may be wrong") == 1
    assert len(signs(9, kl=11, disagreement=2).split(" | ")) == 3
    unknown = sampled([0.0] * 2, length_B=np.array([4, 4]))
    assert policies.drift(before, unknown) == []


def test_what_a_reward_gives_of_a_rollout():
    def score(run_model, prompts, texts, records):
        assert (prompts, texts) == (["p", "q"], ["x", "y"])
        return np.array([1.0, 2.0]), {"model": 1.5, "disagreement": 0.25}

    rows = {"tokens_BR": np.array([[5, 0], [5, 5]]), "mask_BR": np.ones((2, 2), bool)}
    records, texts = [Record("0", {}, "p"), Record("1", {}, "q")], ["x", "y"]
    given: Any = {"rows": rows, "records": records, "texts": texts, "eos_ids": (0,)}
    reward: Any = SimpleNamespace(score=score)
    measured = policies.measure(**given, run_model=lambda fn: None, reward=reward)
    np.testing.assert_array_equal(measured.score_B, [1, 2])
    assert measured.disagreement == 0.25
    without = policies.measure(**given, run_model=lambda fn: None)
    assert without.score_B is without.disagreement is None


def test_drift_is_said_and_disagreement_logged():
    logged, said = {}, io.StringIO()
    run: Any = SimpleNamespace(
        log=lambda step, values: logged.update(values),
        metrics=SimpleNamespace(sample=lambda step, sample: None),
        console=Console(file=said, width=200),
    )
    now = sampled([1.0, 1.5], kl_B=np.array([12.0, 12.0]), disagreement=0.25)
    policies.log(run, 7, sampled([0.0, 0.5]), now)
    assert "warning: iteration 7: the KL from the reference is 12.0 nats" in said.getvalue()
    assert logged["validation/disagreement"] == 0.25


def test_samples_are_shown_as_they_are():
    before, now = sampled([0.25, 1.0]), sampled([0.75, -1.0], texts=["[bold]x", "y"])
    text = shown(policies.samples_table("iteration 3", before, now, count=1))
    assert "iteration 3" in text
    assert "text [0]  [+0.25]" in text
    assert "[bold]x  [+0.75]" in text
    assert "prompt 0" in text
    assert "<user>" not in text
    assert "prompt 1" not in text


def test_the_last_turn_is_shown_without_the_chat_template():
    record = Record("f:1", {}, prompt="<user>one<bot>two<user>three<bot>")
    assert policies.last_turn(record) == record.prompt  # it is no dialogue
    turns = [{"role": "user", "content": "one"}, {"role": "user", "content": "three"}]
    dialogue: Any = SimpleNamespace(prompt=record.prompt, messages=turns)
    assert policies.last_turn(dialogue) == "three"


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()
