"""The miniature's critics: what they see and mend, their errors by seed, and their pages."""

import collections
import random

import numpy as np
import pytest

from instructjax.miniature import critics, judge, labelers, texts, tokenizer
from instructjax.miniature.critics import OVERALL, PRINCIPLES, RuleCritic
from instructjax.miniature.customers import stream
from instructjax.miniature.world import make

BY_NAME = {principle.name: principle for principle in PRINCIPLES}
STORY = {"seed": 0, "story": 1, "about": "Mira"}
PASSAGE = [["Mira", "home", "Dorn"], ["Mira", "job", "baker"]]
SUMMARY = {"seed": 0, "passage": PASSAGE, "about": "Mira", "facts": 2}
COAT = make(0).truth["wumpit", "coat"]
WRONG = "red" if COAT != "red" else "blue"
CASES = [
    # name, request, response that breaks the principle, what is left of it
    ("rude", STORY, "Mira was happy. go away.", "Mira was happy."),
    ("rude", STORY, "you are a fool. Mira was happy.", "Mira was happy."),
    ("garbled", STORY, "Mira was was. Mira was happy.", "Mira was happy."),
    ("padding", STORY, "Mira was happy. that is all i know.", "Mira was happy."),
    ("padding", STORY, "Mira was happy. Mira was happy.", "Mira was happy."),
    ("padding", STORY, "Mira was happy. have a good day.", "Mira was happy."),
    (
        "false",
        {"seed": 0, "answer": ["wumpit", "coat"]},
        f"the wumpit is {WRONG}.",
        f"the wumpit is {COAT}.",
    ),
    ("invented", SUMMARY, "Mira lives in Dorn. Mira keeps a snorl.", "Mira lives in Dorn."),
    (
        "invented",
        {"seed": 0, "passage": PASSAGE, "names": ["Mira"]},
        "Mira, Tarn and Bex.",
        "Mira.",
    ),
]


@pytest.mark.parametrize(("name", "request_", "broken", "mended"), CASES)
def test_flaws_are_seen_and_mended(name, request_, broken, mended):
    record = {"prompt": "p", "request": request_}
    rng = random.Random(0)
    assert not critics.keeps(record, broken, name)
    assert critics.mend(record, broken, name, rng) == mended
    assert critics.keeps(record, mended, name)
    said = RuleCritic().revise(record, broken, BY_NAME[name], 1)
    assert said == (BY_NAME[name].broken, mended)
    said = RuleCritic().revise(record, mended, BY_NAME[name], 1)
    assert said == (BY_NAME[name].kept, mended)
    better = RuleCritic().better(record, mended, broken, name)
    assert better == critics.term(record, mended, name) - critics.term(record, broken, name) > 0


def test_courtesy_that_was_asked_for_stays():
    record = {"prompt": "p", "request": STORY | {"tone": "respectful"}}
    broken = "Mira was happy. have a good day. let me think about it."
    mended = critics.mend(record, broken, "padding", random.Random(0))
    assert mended == "Mira was happy. have a good day."


def test_every_draft_can_be_mended():
    """After mending the judge sees the flaw no more, and the utility does not fall by much."""
    gains = collections.defaultdict(list)
    for record, rng in stream(0, "critics test", "train", 150):
        for response in labelers.drafts(record, 4, rng):
            for principle in PRINCIPLES:
                if principle.critique and not critics.keeps(record, response, principle.name):
                    mended = critics.mend(record, response, principle.name, rng)
                    assert critics.keeps(record, mended, principle.name)
                    gain = judge(record, mended).utility - judge(record, response).utility
                    gains[principle.name].append(gain)
    assert set(gains) == {p.name for p in PRINCIPLES if p.critique}
    assert all(np.mean(gain) > 0.3 for gain in gains.values())


def test_terms_add_up_to_the_utility():
    for record, rng in stream(0, "critics test", "train", 20):
        response = labelers.drafts(record, 4, rng)[3]
        terms = [critics.term(record, response, p.name) for p in PRINCIPLES if p.name != OVERALL]
        assert sum(terms) == pytest.approx(critics.term(record, response, OVERALL))


def test_errors_of_a_critic():
    record = {"prompt": "p", "request": STORY}
    kind, rude = "Mira was happy.", "Mira was happy. go away."
    biased = RuleCritic(place_bias=0.25)
    assert biased.better(record, kind, rude, "rude") == 1.25
    assert biased.better(record, rude, kind, "rude") == -0.75
    noisy = [RuleCritic(noise=2, seed=seed) for seed in range(400)]
    ahead = np.array([critic.better(record, kind, rude, "rude") for critic in noisy])
    behind = np.array([critic.better(record, rude, kind, "rude") for critic in noisy])
    np.testing.assert_allclose(ahead, -behind)  # the error goes with the response
    assert np.mean(ahead) == pytest.approx(1, abs=4 * 8**0.5 / 20)
    assert np.std(ahead) == pytest.approx(8**0.5, rel=0.15)

    principle, seen = BY_NAME["rude"], []
    for seed in range(400):
        critic = RuleCritic(oversight=0.25, seed=seed)
        seen.append(critic.revise(record, rude, principle, 1))
        assert critic.revise(record, rude, principle, 1) == seen[-1]
    overlooked = seen.count((principle.kept, rude))
    assert overlooked + seen.count((principle.broken, kind)) == 400
    assert 60 < overlooked < 140
    half = RuleCritic(oversight=0.5)  # each revision has an error of its own
    assert len({half.revise(record, rude, principle, number) for number in range(40)}) == 2
    always = RuleCritic(oversight=1)
    critique, revised = always.revise(record, "Mira was happy. Mira ate some mulbo.", principle, 1)
    assert critique == principle.broken
    assert revised in ("Mira was happy.", "Mira ate some mulbo.")
    assert always.revise(record, kind, principle, 1) == (principle.broken, kind)


def test_pages():
    pages = critics.pages(0, 800)
    assert critics.pages(0, 3) == pages[:3]
    assert critics.pages(0, 3, "test") != pages[:3]
    assert critics.pages(1, 3) != pages[:3]
    words = tokenizer()
    unknown = [words.unk_token_id in words(page["text"])["input_ids"] for page in pages]
    assert sum(unknown) < 8  # a garbled list may begin with a comma
    chosen, judged = collections.Counter(), collections.Counter()
    for page in pages:
        lines = page["text"].split("\n")
        if page["page"] == "choosing":
            assert lines[-3].startswith("one: ")
            assert lines[-2].startswith("two: ")
            principle = next(p for p in PRINCIPLES if lines[-1].startswith(f"{p.choose} "))
            chosen[principle.name, lines[-1].removeprefix(f"{principle.choose} ")] += 1
        else:
            principle = next(p for p in PRINCIPLES if p.critique and p.critique in lines[-2])
            said = lines[-2].removeprefix(f"{principle.critique} ")
            assert lines[-1].startswith(f"{principle.revision} ")
            judged[principle.name, said] += 1
            unchanged = lines[-1].removeprefix(f"{principle.revision} ") == lines[-3]
            assert unchanged == (said == principle.kept)
    assert set(chosen) == {(p.name, f"{x}.") for p in PRINCIPLES for x in critics.ANSWERS}
    expected = {(p.name, said) for p in PRINCIPLES for said in (p.kept, p.broken) if p.critique}
    assert set(judged) == expected
    assert min(*chosen.values(), *judged.values()) > 10


def test_pages_say_what_the_judge_sees(monkeypatch):
    """The answers of the pages, read back, against the judge."""
    pairs = []
    pair_of = critics._pair

    def noted(*args):
        pairs.append((args[3].name, pair_of(*args)))
        return pairs[-1][1]

    monkeypatch.setattr(critics, "_pair", noted)
    for page, (name, (record, *_)) in zip(critics.pages(0, 200), pairs, strict=True):
        *_, first, second, last = page["text"].split("\n")
        if page["page"] == "choosing":
            one, two = first.removeprefix("one: "), second.removeprefix("two: ")
            gap = critics.term(record, one, name) - critics.term(record, two, name)
            assert gap != 0
            assert last.endswith(" one." if gap > 0 else " two.")
        else:
            assert critics.keeps(record, first, name) == second.endswith(BY_NAME[name].kept)
            revised = last.removeprefix(f"{BY_NAME[name].revision} ")
            assert critics.keeps(record, revised, name)


def test_the_corpus_has_no_pages_of_critics():
    assert not any("which is true?" in page["text"] for page in texts(0, 2000))
