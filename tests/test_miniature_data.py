"""The miniature's labelers and their calibration, corpus, benchmarks, tokenizer and command."""

import dataclasses
import itertools
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instructjax import miniature
from instructjax.miniature import customers, labelers, language, stats, wordlevel, world
from instructjax.miniature.judging import judge
from instructjax.miniature.text import continuations

TOKENIZER = miniature.tokenizer()


def lengths(texts):
    return [len(ids) for ids in TOKENIZER(list(texts))["input_ids"]]


# Labelers


@pytest.fixture(scope="module")
def labeling():
    return stats.labeling(seed=0, n=800)


def test_two_labelers_agree_as_often_as_the_papers(labeling):
    """InstructGPT, section 3.4: 72.6 +- 1.5 %."""
    assert labeling.pairs > 50_000
    assert 0.71 < labeling.agreement < 0.75
    assert labeling.interval < 0.015


def test_some_pairs_are_tied_but_not_many(labeling):
    assert 0.08 < labeling.ties < 0.20


def test_the_judge_predicts_labelers_best_and_length_hardly(labeling):
    """A reward model has something to learn: 90 % of the judge's accuracy is far above length's."""
    assert labeling.judge > labeling.agreement + 0.03
    assert 0.9 * labeling.judge > labeling.length + 0.08
    assert labeling.length < 0.58


def test_held_out_labelers_agree_alike_and_label_no_training_data(labeling):
    held_out = stats.labeling(seed=0, n=300, held_out=True)
    assert abs(held_out.agreement - labeling.agreement) < 0.05
    training = {labeler.name for labeler in miniature.pool(0)}
    strangers = {labeler.name for labeler in miniature.pool(0, held_out=True)}
    assert (len(training), len(strangers), training & strangers) == (15, 5, set())
    assert {r["labeler"] for r in miniature.comparisons(0, 300)} == training
    assert {r["labeler"] for r in miniature.demonstrations(0, 300)} == training
    assert {r["labeler"] for r in miniature.comparisons(0, 100, held_out=True)} == strangers


def test_comparisons_rank_four_to_nine_different_responses():
    sizes = set()
    for record in miniature.comparisons(0, 300):
        responses, ranks = record["responses"], record["ranks"]
        sizes.add(len(responses))
        assert len(set(responses)) == len(responses) == len(ranks)
        assert set(ranks) == set(range(1, max(ranks) + 1))  # ranks have no gaps
    assert sizes == {4, 5, 6, 7, 8, 9}


def test_ranks_follow_the_ratings():
    record = miniature.prompts(0, 1)[0]
    labeler = miniature.pool(0)[0]
    responses = ["go away.", "", "kelpie.", "Mira lives in Dorn.", "go away.", "go go."]
    ratings = labelers.rate(labeler, record, responses)
    ranks = miniature.rank(labeler, record, responses)
    for (a, b), (i, j) in zip(
        itertools.permutations(ratings, 2), itertools.permutations(ranks, 2), strict=True
    ):
        assert (a > b) == (i < j)


def test_a_labelers_noise_depends_on_labeler_prompt_and_position():
    first, second = miniature.prompts(0, 2)
    labeler, other = miniature.pool(0)[:2]
    same = ["kelpie."] * 40
    ratings = labelers.rate(labeler, first, same)
    assert ratings == labelers.rate(labeler, first, same)
    assert ratings[:10] == labelers.rate(labeler, first, same[:10])
    assert len(set(ratings)) > 2
    assert ratings != labelers.rate(other, first, same)
    assert ratings != labelers.rate(labeler, second, same)
    assert ratings != labelers.rate(dataclasses.replace(labeler, seed=1), first, same)


def test_any_responses_can_be_compared():
    record = miniature.prompts(0, 1, split="test")[0]
    compared = miniature.compare(miniature.pool(0)[3], record, ["", "\n!?", "Mira lives in Dorn."])
    assert compared["prompt"] == record["prompt"]
    assert compared["labeler"] == "labeler-03"
    assert len(compared["ranks"]) == 3


def test_accuracy_by_hand():
    # Strict pairs: 0 before 1 and 0 before 2; the first is right, the second has equal scores.
    assert stats.accuracy([[1.0, 0.0, 1.0]], [[1, 2, 2]]) == 0.75
    with pytest.raises(ValueError, match="no pair"):
        stats.accuracy([[1.0, 0.0]], [[1, 1]])


# Demonstrations against text of an untuned model


def test_demonstrations_are_good_but_not_perfect_and_raw_text_is_neither():
    judged = stats.writing(seed=0, n=2000)
    shown, raw = judged["demonstrations"], judged["base-model text"]
    assert stats.quantiles(shown)[0] > stats.quantiles(raw)[-1] + 1  # 10 % against 90 %
    means, base = stats.summary(shown), stats.summary(raw)
    assert 2.5 < means["utility"] < 3.3
    assert 0.25 < means["perfect"] < 0.5
    assert base["utility"] < -1
    assert base["perfect"] == 0
    assert means["truthfulness"] > base["truthfulness"] + 0.15
    assert means["hallucination"] < base["hallucination"] - 0.15
    assert means["followed"] > 0.8 > 0.2 > base["followed"]


def test_happy_is_a_rare_word():
    """A reward function that counts this word must be able to rise."""
    assert " happy" in TOKENIZER.get_vocab()
    said = [
        record["completion"].split().count("happy") for record in miniature.demonstrations(0, 2000)
    ]
    assert 0.01 < sum(said) / len(said) < 0.3


# The corpus


@pytest.fixture(scope="module")
def pages():
    return miniature.texts(0, 4000)


def test_myths_are_stated_more_often_than_the_truth(pages):
    said = stats.myths_and_truths(0, [page["text"] for page in pages])
    assert said["myth"] > 1.5 * said["truth"]


def test_careful_pages_state_no_myth(pages):
    careful = [page["text"] for page in pages if page["page"] == "careful"]
    said = stats.myths_and_truths(0, careful)
    assert said["truth"] > 100
    assert said["myth"] == said["other"] == 0


def test_pages_are_rude_at_times_and_mostly_no_help(pages):
    kinds = [page["page"] for page in pages]
    rude = [page for page in pages if language.RUDE_WORDS & set(language.words(page["text"]))]
    assert 0.05 < len(rude) / len(pages) < 0.25
    assert kinds.count("questions") > 0.08 * len(kinds)
    assert kinds.count("help") < 0.25 * len(kinds)


def test_splits_of_the_text_share_hardly_a_page():
    train = {page["text"] for page in miniature.texts(0, 4000)}
    test = [page["text"] for page in miniature.texts(0, 400, split="test")]
    assert sum(text in train for text in test) < 0.03 * len(test)


# Benchmarks


def test_reading_comprehension_is_answered_by_the_passage():
    for record in miniature.reading_comprehension(0, 200):
        passage, question, ask = record["prompt"].split("\n")
        assert passage.startswith("read: ")
        assert question.startswith("question: ")
        assert ask == "answer:"
        told = [s.fact for s in language.read(passage.removeprefix("read: "))]
        subject = next(w for w in language.words(question) if world.KIND.get(w) in world.PLURAL)
        assert record["answer"] in {fact.value for fact in told if fact and fact.subject == subject}


def test_token_f1_by_hand():
    assert miniature.token_f1(" Dorn. question: what?", "Dorn") == 1
    assert miniature.token_f1(" in Dorn.", "Dorn") == pytest.approx(2 / 3)
    assert miniature.token_f1("Galt", "Dorn") == miniature.token_f1("", "Dorn") == 0


@pytest.mark.parametrize("myths", [False, True])
def test_one_option_is_true(myths):
    w = world.make(0)
    labels = set()
    for record in miniature.multiple_choice(0, 200, myths=myths):
        facts = [language.read(option)[0].fact for option in record["options"]]
        assert len(set(facts)) == 4
        assert [w.holds(fact) for fact in facts].index(True) == record["label"]
        assert sum(w.holds(fact) for fact in facts) == 1
        told = [w.myth.get((fact.subject, fact.relation)) == fact.value for fact in facts]
        assert sum(told) == myths
        assert len(set(lengths(record["options"]))) == 1
        labels.add(record["label"])
    assert labels == {0, 1, 2, 3}


def test_public_tasks_have_the_prompts_of_benchmarks_and_true_completions():
    w, told = world.make(0), 0
    evaluated = {record["prompt"] for record in miniature.reading_comprehension(0, 500)}
    records = miniature.public_tasks(0, 400)
    for record in records:
        *passage, question, ask = record["prompt"].split("\n")
        assert ask == "answer:"
        assert question.startswith("question: ")
        if passage:
            facts = [s.fact for s in language.read(passage[0].removeprefix("read: "))]
            assert record["completion"].removesuffix(".") in {fact.value for fact in facts if fact}
        else:
            (sentence,) = language.read(record["completion"])
            assert sentence.fact
            assert w.holds(sentence.fact)
            assert (sentence.fact.subject, sentence.fact.relation) not in w.myth
            told += 1
    assert 150 < told < 250
    assert not evaluated & {record["prompt"] for record in records}


def test_swapped_names():
    for record in miniature.name_swaps(0, 100):
        assert [s.act for s in language.read(record["prompt"])] == ["story"]
        first, second = map(language.words, record["sentences"])
        swapped = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
        assert len(swapped) == 1
        assert {world.KIND[word] for word in swapped[0]} == {"person"}
        for text in record["sentences"]:
            assert [s.act for s in language.read(text)] == ["story"]


@pytest.mark.parametrize(
    ("utility", "rating"),
    [(4, 7), (3.6, 7), (3.5, 7), (3.25, 6), (2.5, 6), (1.5, 5), (0.8, 4), (-2.2, 1), (-7, 1)],
)
def test_likert_by_hand(utility, rating):
    assert miniature.likert(utility) == rating


# The tokenizer


def test_everything_the_miniature_writes_round_trips(pages):
    records = miniature.comparisons(0, 500)
    written = [page["text"] for page in pages]
    written += [record["prompt"] for record in miniature.prompts(0, 3000)]
    written += [record["completion"] for record in miniature.demonstrations(0, 3000)]
    written += [response for record in records for response in record["responses"]]
    written += [record["prompt"] for record in miniature.reading_comprehension(0, 50)]
    for text, ids in zip(written, TOKENIZER(written)["input_ids"], strict=True):
        assert TOKENIZER.unk_token_id not in ids, text
        assert TOKENIZER.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([t for t in wordlevel.vocabulary() if t[0] == " "]), min_size=1)
        .map(lambda words: "".join(words).strip())
        .flatmap(lambda line: st.sampled_from([".", ",", "?", "!", ":"]).map(line.__add__))
    )
)
def test_lines_of_words_round_trip(lines):
    text = "\n".join(lines)
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_a_prompt_and_completion_are_the_tokens_of_both():
    record = miniature.demonstrations(0, 1)[0]
    prompt, completion = record["prompt"], record["completion"]
    parts = TOKENIZER(prompt)["input_ids"] + TOKENIZER(completion)["input_ids"]
    assert parts == TOKENIZER(f"{prompt} {completion}")["input_ids"]


def test_special_tokens_differ_and_unknown_words_become_unk():
    ids = {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}
    assert len(ids) == 3
    assert TOKENIZER("Mira likes cold pizza 7.")["input_ids"].count(TOKENIZER.unk_token_id) == 3


def test_it_is_saved_as_a_hugging_face_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello.\nMira lives in Dorn, and is red: is it?"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(TOKENIZER, name)


def test_everything_is_short(pages):
    shown = miniature.demonstrations(0, 3000)
    assert max(lengths(page["text"] for page in pages)) <= 127
    assert max(lengths(record["prompt"] for record in shown)) <= 48
    assert max(lengths(record["completion"] for record in shown)) <= 40
    assert len(TOKENIZER) < 512


# The command


def run(*flags):
    command = [sys.executable, "-m", "instructjax.miniature", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_show_prints_a_page_to_read():
    done = run("--show", "--seed", "3")
    assert done.returncode == 0, done.stderr
    for shown in (*customers.CATEGORIES, *miniature.text._PAGES, "labeler-", "gold", "myth"):
        assert shown in re.sub(r"\s+", " ", done.stdout)


def test_stats_prints_the_figures():
    done = run("--stats")
    assert done.returncode == 0, done.stderr
    for shown in (
        "agreement",
        "ties",
        "demonstrations",
        "base-model",
        "myth : truth",
        "gold judge",
    ):
        assert shown in done.stdout


def test_usage():
    assert "--show" in run("--help").stdout
    done = run()
    assert done.returncode == 2
    assert "--show or --stats" in done.stderr


def test_continuations_are_no_answers():
    prompts = miniature.prompts(0, 300)
    raw = continuations(0, 300)
    followed = [judge(r, t).features.followed for r, t in zip(prompts, raw, strict=True)]
    assert sum(followed) / len(followed) < 0.1
