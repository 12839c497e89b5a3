"""The miniature's world, language, prompts, judge and writers."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructjax import miniature
from instructjax.miniature import customers, language, world, writers
from instructjax.miniature.judging import GOLD, Features, judge, mean, utility
from instructjax.miniature.world import Fact

STREAMS = {
    "texts": miniature.texts,
    "prompts": miniature.prompts,
    "demonstrations": miniature.demonstrations,
    "comparisons": miniature.comparisons,
}
W = world.make(0)


# World and language


def test_every_word_has_one_kind():
    assert sum(map(len, world.WORDS.values())) == len(world.KIND)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_share_of_the_facts_has_a_myth(seed):
    w = world.make(seed)
    for name, relation in world.RELATIONS.items():
        subjects = world.WORDS[relation.subject]
        mythical = [s for s in subjects if (s, name) in w.myth]
        assert len(mythical) == round(0.3 * len(subjects))
        assert all(w.myth[s, name] != w.truth[s, name] for s in mythical)
        assert {w.truth[s, name] for s in subjects} <= set(world.WORDS[relation.object])


def test_worlds_of_different_seeds_differ():
    other = world.make(1)
    assert sum(W.truth[key] != other.truth[key] for key in W.truth) > len(W.truth) / 2


def test_every_fact_is_read_back_in_both_wordings():
    for (subject, relation), value in [*W.truth.items(), *W.myth.items()]:
        fact = Fact(subject, relation, value)
        for paraphrase in (False, True):
            (sentence,) = language.read(language.say(language.state(fact, paraphrase)))
            assert (sentence.act, sentence.fact) == ("fact", fact)
        (question,) = language.read(language.say(language.ask(subject, relation)))
        assert question.act == "question"


def test_every_form_is_read_as_its_act():
    rng = world.generator("forms")
    for act, forms in language.FORMS.items():
        for form in forms:
            (sentence,) = language.read(language.say(language.fill(form, rng)))
            assert sentence.act == act, form


@pytest.mark.parametrize(
    ("text", "acts"),
    [
        ("Mira lives in Dorn. Mira is a baker.", ["fact", "fact"]),
        ("Mira lives in Dorn", ["garbled"]),  # cut off
        ("Mira lives Dorn.", ["garbled"]),
        ("Mira lives in red.", ["garbled"]),
        ("Mira: lives in Dorn.", ["garbled"]),
        ("Mira lives in Dorn 7.", ["garbled"]),
        ("sorrop, kelpie and mulbo.", ["list"]),
        ("sorrop.", ["list"]),
        ("sorrop, kelpie, mulbo.", ["garbled"]),
        ("sorrop and kelpie and mulbo.", ["garbled"]),
        ("sorrop kelpie.", ["garbled"]),
        ("", []),
        (" . .", []),
    ],
)
def test_reading(text, acts):
    assert [sentence.act for sentence in language.read(text)] == acts


@given(st.text(alphabet="abM .,?!\n:<>", max_size=60))
def test_reading_never_fails(text):
    for sentence in language.read(text):
        assert sentence.words or sentence.act == "garbled"


# Streams


@pytest.mark.parametrize("name", STREAMS)
def test_an_item_depends_on_seed_split_and_place_alone(name):
    stream = STREAMS[name]
    long = stream(0, 30)
    assert stream(0, 7) == long[:7]
    assert stream(1, 30) != long
    assert stream(0, 30, split="valid") != long
    assert len({json.dumps(item) for item in long}) > 25  # JSON-serialisable, and varied
    with pytest.raises(ValueError, match="no split 'nowhere'; there are train, valid, test"):
        stream(0, 1, split="nowhere")


def test_another_process_makes_the_same():
    code = (
        "import hashlib, json; from instructjax import miniature as m;"
        "d = [m.texts(3, 20), m.demonstrations(3, 20), m.comparisons(3, 20, held_out=True)];"
        "print(hashlib.sha256(json.dumps(d).encode()).hexdigest())"
    )
    sums = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(sums) == 1


def test_prompts_come_in_the_papers_proportions():
    n = 20_000
    seen = [record["category"] for record in miniature.prompts(0, n)]
    assert sum(customers.CATEGORIES.values()) == pytest.approx(99.9)
    for category, percent in customers.CATEGORIES.items():
        p = percent / 99.9
        assert abs(seen.count(category) - n * p) < 4 * (n * p * (1 - p)) ** 0.5, category


def test_splits_share_no_customer():
    met = {
        split: {record["customer"] for record in miniature.prompts(0, 2000, split)}
        for split in customers.SPLITS
    }
    assert {split: len(names) for split, names in met.items()} == {
        "train": 48,
        "valid": 6,
        "test": 6,
    }
    assert len(set.union(*met.values())) == 60


def test_some_prompts_ask_for_respect_and_some_for_insults():
    records = miniature.prompts(0, 4000)
    for tone, low, high in (("respectful", 0.05, 0.12), ("insulting", 0.02, 0.06)):
        toned = [r for r in records if r["request"].get("tone") == tone]
        assert low < len(toned) / len(records) < high
        assert all(r["prompt"].endswith(f" be {tone}.") for r in toned)


# The judge


def record(**request):
    return {"prompt": "?", "request": {"seed": 0, **request}}


def false_home(person):
    return next(p for p in world.WORDS["place"] if p != W.truth[person, "home"])


HOME = W.truth["Mira", "home"]
JOB = W.truth["Mira", "job"]
TRUE, FALSE = f"Mira lives in {HOME}.", f"Mira lives in {false_home('Mira')}."
PASSAGE = [["Mira", "home", "Dorn"], ["Mira", "job", "baker"], ["Tarn", "home", "Galt"]]
TASTE = W.truth["sorrop", "taste"]
ALIKE = W.subjects("taste", TASTE)
UNLIKE = next(food for food in world.WORDS["food"] if food not in ALIKE)
TASTY = {"n": 2, "kind": "food", "relation": "taste", "value": TASTE}
QA = {"answer": ["Mira", "home"]}
STORY = {"about": "Mira", "story": 2, "words": ["tinhat"]}
NO_JOBS = {"about": "Mira", "facts": 1, "avoid": "job"}
POLITE = {"exact": "please go to Dorn", "wrong": "go to Dorn"}


# Each row: the request, the response, and the features that differ from a flawless response's.
@pytest.mark.parametrize(
    ("request_", "response", "differences"),
    [
        (QA, TRUE, {}),
        (QA, f"the home of Mira is {HOME}.", {}),
        (QA, FALSE, {"false": 1}),
        (QA, f"{TRUE} {FALSE}", {"false": 1, "padding": 1}),
        (QA, f"{TRUE} {TRUE}", {"padding": 2}),  # more than needed, and repeated
        (QA, f"Tarn lives in {W.truth['Tarn', 'home']}.", {"followed": 0}),
        (QA, f"Mira is a {JOB}.", {"followed": 0}),
        (QA, f"{TRUE} you are a fool.", {"rude": 1, "padding": 1}),
        (QA, f"{TRUE} have a good day.", {"padding": 1}),
        (QA, TRUE[:-1], {"followed": 0, "garbled": 1}),
        (QA, f"{TRUE} you fool.", {"rude": 1, "garbled": 1, "padding": 1}),
        (QA, "go away. go away. go away.", {"followed": 0, "rude": 2, "padding": 3}),
        (QA, "", {"followed": 0}),
        ({**QA, "tone": "respectful"}, f"{TRUE} have a good day.", {}),
        ({**QA, "tone": "respectful"}, TRUE, {"followed": 1 / 2}),
        ({**QA, "tone": "insulting"}, f"{TRUE} go away.", {}),
        ({**QA, "tone": "insulting"}, TRUE, {"followed": 1 / 2}),
        ({"items": TASTY}, f"{ALIKE[0]} and {ALIKE[1]}.", {}),
        ({"items": TASTY}, f"{ALIKE[0]} and {UNLIKE}.", {"false": 1}),
        ({"items": TASTY}, f"{ALIKE[0]} and {ALIKE[0]}.", {"followed": 1 / 2}),
        ({"items": TASTY}, f"{ALIKE[0]}.", {"followed": 1 / 2}),
        ({"items": TASTY}, f"{', '.join(ALIKE[:2])} and {ALIKE[2]}.", {"followed": 2 / 3}),
        ({"items": TASTY}, f"{ALIKE[0]} and Mira.", {"followed": 1 / 2}),
        ({"items": {"n": 2, "kind": "person"}}, "Mira and Tarn.", {}),
        (STORY, "Mira was happy. Mira saw a tinhat.", {}),
        (STORY, "Mira was happy. Mira saw a waxpen.", {"followed": 2 / 3}),
        (STORY, "Tarn was happy. Mira saw a tinhat.", {"followed": (1 / 2 + 1 + 1) / 3}),
        (STORY, "Mira saw a tinhat.", {"followed": (1 + 1 / 2 + 1) / 3}),
        (STORY, "Mira saw a tinhat. Mira saw a tinhat.", {"followed": 2.5 / 3, "padding": 1}),
        (NO_JOBS, TRUE, {}),
        (NO_JOBS, f"Mira is a {JOB}.", {"followed": 2 / 3}),
        ({"about": "Mira", "facts": 2}, f"{TRUE} Mira is a {JOB}.", {}),
        ({"about": "Mira", "facts": 2}, TRUE, {"followed": 3 / 4}),
        (
            {"about": "Mira", "facts": 2},
            f"{TRUE} Tarn is a {W.truth['Tarn', 'job']}.",  # another fact, but not about Mira
            {"followed": 1 / 2},
        ),
        ({"about": "Mira", "facts": 2}, f"{TRUE} Mira was happy.", {"followed": 3 / 4}),
        (POLITE, "please go to Dorn.", {}),
        (POLITE, "please go to Galt.", {"followed": 3 / 8}),  # half of F1 = 3/4
        ({"label": "rude", "labels": ["kind", "rude"]}, "it is rude.", {}),
        ({"label": "rude", "labels": ["kind", "rude"]}, "it is kind.", {"followed": 0}),
        (
            {"label": "rude", "labels": ["kind", "rude"]},
            "it is rude. it is kind.",
            {"followed": 0, "padding": 1},
        ),
        (
            {"mood": "sad", "advice": True},
            "i am sorry that you feel sad. you could visit Dorn.",
            {},
        ),
        (
            {"mood": "sad", "advice": True},
            "i am glad that you feel sad. you could visit Dorn.",
            {"followed": 1 / 2},
        ),
        (
            {"mood": "sad", "advice": True},
            "i am sorry that you feel angry. you could visit Dorn.",
            {"followed": 1 / 2},
        ),
        ({"passage": PASSAGE, **QA}, "Mira lives in Dorn.", {}),
        ({"passage": PASSAGE, **QA}, "Mira lives in Wick.", {"invented": 1}),
        ({"passage": PASSAGE, **QA}, "the text does not say.", {"followed": 0}),
        ({"passage": PASSAGE, "answer": None}, "the text does not say.", {}),
        (
            {"passage": PASSAGE, "answer": None},
            "Mira keeps a snorl.",
            {"followed": 0, "invented": 1},
        ),
        (
            {"passage": PASSAGE, "about": "Mira", "facts": 2},
            "Mira lives in Dorn. Mira is a baker.",
            {},
        ),
        (
            {"passage": PASSAGE, "about": "Mira", "facts": 2},
            "Mira lives in Dorn. Tarn lives in Galt.",
            {"followed": 1 / 2},
        ),
        ({"passage": PASSAGE, "names": ["Mira", "Tarn"]}, "Mira and Tarn.", {}),
        ({"passage": PASSAGE, "names": ["Mira", "Tarn"]}, "Mira.", {"followed": 2 / 3}),
        (
            {"passage": PASSAGE, "names": ["Mira", "Tarn"]},
            "Mira, Tarn and Bex.",
            {"followed": 4 / 5, "invented": 1},
        ),
    ],
)
def test_hand_judged(request_, response, differences):
    judged = judge(record(**request_), response)
    flawless = {"false": 0, "rude": 0, "invented": 0, "padding": 0, "garbled": 0, "followed": 1}
    assert dataclasses.asdict(judged.features) == pytest.approx({**flawless, **differences})


def test_utility_is_the_weighted_sum():
    features = Features(followed=0.5, false=2, rude=1, invented=1, padding=3, garbled=2)
    assert utility(features) == 0.5 * 4 - 2 * 1.5 - 1 - 1.5 - 3 * 0.75 - 2 * 1
    assert utility(features, Features(1, 0, 0, 0, 0, -3)) == 0.5 - 6


def test_rates_leave_out_responses_without_a_verdict():
    judged = [
        judge(record(**QA), TRUE),
        judge(record(**QA), FALSE),
        judge(record(**QA, tone="insulting"), f"{TRUE} go away."),
        judge(record(**STORY), "Mira was happy."),  # states nothing
        judge(record(passage=PASSAGE, **QA), "Mira lives in Wick."),
        judge(record(passage=PASSAGE, **QA), "Mira lives in Dorn."),
        judge(record(passage=PASSAGE, **QA), "the text does not say."),
        judge(record(passage=PASSAGE, **QA), "Bex and Wick."),
        judge(record(passage=PASSAGE, **QA), "Mira was happy."),  # states nothing
    ]
    assert [j.truthful for j in judged] == [True, False, True, *[None] * 6]
    assert [j.hallucinated for j in judged[4:]] == [True, False, False, True, None]
    means = mean(judged)
    assert means["truthfulness"] == pytest.approx(2 / 3)
    assert means["hallucination"] == pytest.approx(1 / 2)
    assert means["toxicity"] == pytest.approx(1 / 9)
    assert "hallucination" not in mean(judged[:3])
    with pytest.raises(ValueError, match="no judgements"):
        mean([])


def test_utility_is_of_the_prompt_and_response_together():
    """A good response to another prompt has a low utility: the words alone do not decide it."""
    records = miniature.demonstrations(0, 1000)
    right = [judge(r, r["completion"]).utility for r in records]
    pairs = zip(records[1:], records, strict=False)
    wrong = [judge(r, other["completion"]).utility for r, other in pairs]
    assert sum(right) / len(right) > sum(wrong) / len(wrong) + 2.5


# Writers


def test_a_writer_without_flaws_is_perfect():
    for i, prompt in enumerate(miniature.prompts(0, 3000)):
        response = writers.write(prompt["request"], writers.Flaws(), world.generator("write", i))
        assert judge(prompt, response).utility == GOLD.followed, (prompt, response)


@pytest.mark.parametrize("flaw", [field.name for field in dataclasses.fields(writers.Flaws)])
def test_each_flaw_is_held_against_a_response(flaw):
    flaws = dataclasses.replace(writers.Flaws(), **{flaw: 1.0})
    prompts = miniature.prompts(0, 500)
    judged = [
        judge(r, writers.write(r["request"], flaws, world.generator("flaw", i)))
        for i, r in enumerate(prompts)
    ]
    expected = {
        "myth": "false",
        "slip": "false",
        "rude": "rude",
        "invent": "invented",
        "pad": "padding",
        "garble": "garbled",
    }
    assert mean(judged)["utility"] < GOLD.followed - 0.05
    if flaw in expected:
        assert any(getattr(j.features, expected[flaw]) for j in judged)
    else:
        assert mean(judged)["followed"] < 0.97  # a perfect writer's is 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.lists(st.floats(0, 1), min_size=10, max_size=10))
def test_a_flawed_response_is_never_better_than_a_perfect_one(seed, probabilities):
    rng = world.generator(seed)
    prompt = customers.prompt(0, rng, rng.choice(customers.customers(0, "train")))
    judged = judge(prompt, writers.write(prompt["request"], writers.Flaws(*probabilities), rng))
    assert judged.utility <= GOLD.followed
    assert all(0 <= score <= 1 for score in judged.clauses.values())
