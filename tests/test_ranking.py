"""Measures of a reward model: pairs, intervals, calibration, the judge, baselines, folds."""

import numpy as np
import pytest

from instructjax import data, miniature
from instructjax.evaluation import baselines, folds, gold, ranking


def test_pairs_and_accuracy_by_hand():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    ranks = np.array([[1, 2, 4], [1, 2, 0]])
    pairs = ranking.pairs_of(scores, ranks)
    assert sorted(zip(pairs.gap, pairs.distance, pairs.prompt, strict=True)) == [
        (-1.0, 2, 0),
        (0.0, 1, 1),
        (1.0, 3, 0),
        (2.0, 1, 0),
    ]
    mean, low, high = ranking.accuracy(pairs)
    assert mean == 2.5 / 4  # equal scores are half right
    assert low <= mean <= high
    assert np.isnan(ranking.accuracy(ranking.pairs_of(scores, np.zeros((2, 3))))[0])


def test_the_interval_covers():
    """About 95 % of 200 intervals cover the true share of 0.7. A prompt's 5 pairs are equal."""
    covered = 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        gap = np.repeat(np.where(rng.random(60) < 0.7, 1.0, -1.0), 5)
        pairs = ranking.Pairs(gap, np.ones(300, int), np.repeat(np.arange(60), 5))
        _, low, high = ranking.accuracy(pairs, draws=200)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


def test_the_gain_over_a_baseline():
    """Two methods that agree but for a tenth of the prompts: the interval of the difference is far
    shorter than theirs, and covers it."""
    gap = np.array([2.0, -1.0, 0.0, 3.0])
    baseline = np.array([-2.0, -1.0, 1.0, 0.0])
    rows = [ranking.Pairs(x, np.ones(4, int), np.arange(4)) for x in (gap, baseline)]
    assert ranking.gain(*rows)[0] == (1 + 0 - 0.5 + 0.5) / 4
    assert ranking.gain(*rows[::-1])[0] == -(1 + 0 - 0.5 + 0.5) / 4
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        right = rng.random(300) < 0.6
        better = np.where(rng.random(300) < 0.1, True, right)
        ours, theirs = (
            ranking.Pairs(np.where(x, 1.0, -1.0), np.ones(300, int), np.arange(300))
            for x in (better, right)
        )
        mean, low, high = ranking.gain(ours, theirs, draws=200)
        covered += low <= 0.1 * 0.4 <= high
        np.testing.assert_allclose(mean, ranking.share(ours) - ranking.share(theirs), atol=1e-12)
        assert (
            high - low
            < 0.06
            < ranking.accuracy(ours, draws=200)[2] - ranking.accuracy(ours, draws=200)[1]
        )
    assert 88 <= covered <= 99


def test_accuracies_have_the_gain_of_the_reward_model_over_the_bag_of_words():
    dataset = gold.comparisons(miniature.tokenizer(), 40)
    rng = np.random.default_rng(0)
    methods = {
        name: {"all": rng.normal(size=dataset.ranks.shape)}
        for name in ("reward model", "length", "bag of words")
    }
    rows = ranking.accuracies(methods, {"all": dataset}, ())
    assert set(rows) == {"all", *(f"ranks apart: {n}" for n in (1, 2, 3)), "ranks apart: 4 or more"}
    for row in rows.values():
        difference = row["reward model"][0] - row["bag of words"][0]
        np.testing.assert_allclose(row[ranking.GAIN][0], difference, atol=1e-12)
    shown = ranking.table_of(rows)
    assert [column.header for column in shown.columns][2:] == [
        *("reward model", "length", "bag of words"),
        ranking.GAIN,
    ]
    gained = next(iter(shown.columns[-1].cells))
    assert gained.startswith(f"{100 * rows['all'][ranking.GAIN][0]:+.1f} +- ")


def test_calibration_of_a_calibrated_model():
    """Winners drawn with probability sigmoid(gap): observed follows predicted."""
    rng = np.random.default_rng(0)
    gap = rng.normal(size=20000) * 2
    gap *= np.where(rng.random(20000) < 1 / (1 + np.exp(-gap)), 1, -1)
    pairs = ranking.Pairs(gap, np.ones(20000, int), np.arange(20000))
    predicted, observed, count = ranking.calibration(pairs)
    assert count.sum() == 40000
    np.testing.assert_allclose(observed, predicted, atol=0.03)
    np.testing.assert_allclose(observed + observed[::-1], 1, atol=1e-12)
    overconfident = ranking.Pairs(3 * gap, pairs.distance, pairs.prompt)
    predicted, observed, _ = ranking.calibration(overconfident)
    assert predicted[-2] - observed[-2] > 0.1


def test_the_parts_of_a_fold_share_no_labeler():
    tokenizer = miniature.tokenizer()
    records = [
        data.Record(str(i), {}, "say", ("red", "blue"), (1, 2), row["labeler"])
        for i, row in enumerate(miniature.comparisons(0, 60))
    ]
    dataset, left_out = data.encode(records, "comparisons", tokenizer), []
    for fold in range(3):
        seen, groups = folds.leave_out(dataset, dataset, "labeler", fold, 3)
        known = {record.labeler for record in seen.records}
        inside = {r.labeler for r in groups["labeler seen"].records}
        outside = {r.labeler for r in groups["labeler unseen"].records}
        assert inside <= known
        assert not outside & known
        assert sum(map(len, groups.values())) == len(dataset)
        left_out.append(outside)
    assert sum(map(len, left_out)) == len(set.union(*left_out)) == 15


def test_the_judge_scores_each_response_for_its_prompt():
    dataset = gold.comparisons(miniature.tokenizer(), 8)
    utilities = gold.judged(dataset)
    assert utilities.shape == dataset.ranks.shape
    assert (utilities[dataset.ranks == 0] == 0).all()
    for record, row in zip(dataset.records, utilities, strict=True):
        judged = [miniature.judge(dict(record.row), text).utility for text in record.responses]
        assert row[: len(judged)].tolist() == judged
    first = [record.responses[0] for record in dataset.records]
    assert gold.utilities(dataset.records, first).tolist() == utilities[:, 0].tolist()


def test_a_bag_of_words_learns_ranks_that_follow_one_word():
    """Ranks follow how often a word occurs, so a bag of words is right and length is not."""
    tokenizer = miniature.tokenizer()
    rng = np.random.default_rng(0)
    records = []
    for i in range(40):
        good = rng.permutation(4)
        responses = tuple(" red" * int(n) + " blue" * int(6 - n) for n in good)
        ranks = tuple(int(4 - n) for n in good)
        records.append(data.Record(str(i), {}, "say", responses, ranks))
    dataset = data.encode(records, "comparisons", tokenizer)
    scores = {
        features.__name__: baselines.linear(features, dataset, {"all": dataset})["all"]
        for features in (baselines.bags, baselines.lengths)
    }
    shares = {name: ranking.share(ranking.pairs_of(s, dataset.ranks)) for name, s in scores.items()}
    assert shares == {"bags": 1.0, "lengths": 0.5}


def test_values_to_group_by():
    record = data.Record("f:1", {"a": {"b": 1}, "text": '{"x": 1, "x": 2}'}, labeler="w")
    assert [ranking.value_of(record, name) for name in ("labeler", "a.b")] == ["w", "1"]
    with pytest.raises(ValueError, match=r"^f:1: no field 'gone' to group by"):
        ranking.value_of(record, "gone")
    with pytest.raises(ValueError, match=r"^f:1: 'text\.x': .* 'x' stands twice"):
        ranking.value_of(record, "text.x")
