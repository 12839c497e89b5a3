"""Figures of policies on held-out prompts, by hand and by simulation."""

import io
import json

import numpy as np
from rich.console import Console

from instructjax.evaluation import policies


def test_win_rate_by_hand():
    ours, theirs = np.array([1.0, 0.5, 2.0, 0.0]), np.array([0.0, 0.5, 3.0, -1.0])
    share, low, high = policies.win_rate(ours, theirs)
    assert share == (1 + 0.5 + 0 + 1) / 4
    assert 0 <= low < share < high <= 1
    back, _, _ = policies.win_rate(theirs, ours)
    assert back == 1 - share
    assert policies.win_rate(ours, ours) == (0.5, 0.5, 0.5)
    assert policies.win_rate(ours + 9, theirs) == (1, 1, 1)


def test_the_interval_covers():
    """Of 300 samples of 100 coins of 0.65, about 95 % of the intervals hold 0.65."""
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(300):
        low, high = policies.interval((rng.random(100) < 0.65).astype(float), draws=300)
        covered += low <= 0.65 <= high
        widths.append(high - low)
    assert 270 <= covered <= 297
    assert abs(np.mean(widths) - 2 * 1.96 * (0.65 * 0.35 / 100) ** 0.5) < 0.02


def sampled(scores, utilities=None, **changes):
    n = len(scores)
    found = {
        "prompts": [f"prompt {i}" for i in range(n)],
        "texts": [f"text [{i}]" for i in range(n)],
        "score_B": np.array(scores),
        "length_B": np.arange(3, 3 + n),
        "ended_B": np.arange(n) == 0,
        "utility_B": None if utilities is None else np.array(utilities),
    }
    return policies.Sampled(**found | changes)


def test_means():
    means = {"score": 0.5, "length": 3.5, "eos_fraction": 0.5}
    assert sampled([0.75, 0.25]).means() == means  # no reference, no KL
    with_kl = sampled([0.75, 0.25], kl_B=np.array([1.0, -0.5]))
    assert with_kl.means() == means | {"kl": 0.25}
    assert sampled([0.75, 0.25], [1.0, 2.0]).means() == means | {"utility": 1.5}


def test_results_are_against_the_first_policy():
    before, after = sampled([0.0, 0.5], [0.0, 1.0]), sampled([1.0, 1.5], [0.5, 1.0])
    found = policies.results({"SFT": before, "PPO": after}, {"SFT": np.nan, "PPO": 3.25})
    assert "win_rate" not in found["SFT"]
    assert found["PPO"]["win_rate"][0] == 0.75
    assert found["PPO"]["score"] == 1.25
    low, high = found["PPO"]["score_interval"]
    assert 1.0 <= low <= 1.25 <= high <= 1.5
    assert "text_loss" not in found["SFT"]
    assert found["PPO"]["text_loss"] == 3.25
    json.dumps(found, allow_nan=False)
    text = shown(policies.table({**found, "seconds": 3.0}, 2))
    assert "2 held-out prompts" in text
    for cell in ("+1.25", "75.0%", "3.250", "50.0%", "PPO"):
        assert cell in text
    assert "KL" not in text  # what no policy has is no column


def test_samples_are_shown_as_they_are():
    before, now = sampled([0.25, 1.0]), sampled([0.75, -1.0], texts=["[bold]x", "y"])
    text = shown(policies.samples_table("iteration 3", before, now, count=1))
    assert "iteration 3" in text
    assert "text [0]  [+0.25]" in text
    assert "[bold]x  [+0.75]" in text
    assert "prompt 1" not in text


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()
