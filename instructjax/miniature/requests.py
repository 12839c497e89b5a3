"""Prompts of the paper's ten categories, each with a request that a program can check.

A request is a dict, which a writer (writers.py) tries to satisfy and the judge (judging.py) reads.
Its clauses are

    seed        seed of the world that decides which facts are true
    exact       the words of the only right response; `wrong` is a tempting wrong response
    answer      state the value of this [subject, relation]; null: say that the text does not say
    passage     state nothing beyond these facts, [[subject, relation, value], ...]
    items       list n words of a kind, with a value of a relation: {n, kind, relation?, value?}
    names       list exactly these words of the passage
    label       name this label, out of `labels`
    mood        sympathise with this mood
    advice      give advice
    about       name this subject in each sentence that answers
    facts       state this number of different facts about the subject
    story       tell a story about the subject in this number of sentences
    words       use these words
    avoid       name no word of this kind
    tone        be "respectful" or "insulting"
"""

import random
from typing import Any

from instructjax.miniature import language
from instructjax.miniature.world import (
    KIND,
    PLURAL,
    RELATIONS,
    WORDS,
    Fact,
    World,
    relations_of,
)

Request = dict[str, Any]
_Task = tuple[tuple[str, ...], Request]  # phrasings of the prompt, request


def _subject(rng: random.Random, topic: str, kinds: tuple[str, ...] = tuple(PLURAL)) -> str:
    """A subject; with probability 1/2 its kind is the customer's topic."""
    kind = topic if topic in kinds and rng.random() < 0.5 else rng.choice(kinds)
    return rng.choice(WORDS[kind])


def named(subject: str) -> str:
    """The subject as a noun phrase: "the" before animals and things, a bare name for others."""
    return f"the {subject}" if KIND[subject] in ("animal", "thing") else subject


def other_of_kind(rng: random.Random, subject: str) -> str:
    """Another word of the subject's kind."""
    return rng.choice([word for word in WORDS[KIND[subject]] if word != subject])


def _fact(world: World, rng: random.Random, subject: str, relation: str, p: float) -> Fact:
    """The true fact with probability p, else a false fact."""
    value = world.truth[subject, relation]
    if rng.random() > p:
        value = rng.choice([v for v in WORDS[RELATIONS[relation].object] if v != value])
    return Fact(subject, relation, value)


def _generation(world: World, rng: random.Random, topic: str) -> _Task:
    if rng.random() < 0.5:
        subject = _subject(rng, topic)
        available = relations_of(subject)
        n = rng.randint(1, min(3, len(available) - 1))
        count = f"{WORDS['number'][n - 1]} fact{'s' * (n > 1)}"
        phrasings = [f"write {count} about {named(subject)}.", f"{named(subject)}: {count}."]
        request: Request = {"about": subject, "facts": n}
        if rng.random() < 0.4:
            avoid = RELATIONS[rng.choice(available)].object
            request["avoid"] = avoid
            phrasings = [f"{form} name no {avoid}." for form in phrasings]
        return tuple(phrasings), request
    subject = _subject(rng, topic, ("person", "animal"))
    n = rng.randint(1, 3)
    count = f"{WORDS['number'][n - 1]} sentence{'s' * (n > 1)}"
    used = rng.sample(WORDS["thing"], rng.randint(1, min(n, 2)))
    request = {"about": subject, "story": n, "words": used}
    word = f"use the word{'s' * (len(used) > 1)} {' and '.join(used)}."
    return (
        f"write a story about {named(subject)} in {count}. {word}",
        f"tell {count} about {named(subject)} as a story. {word}",
    ), request


def _open_qa(world: World, rng: random.Random, topic: str) -> _Task:
    subject = _subject(rng, topic)
    relation = rng.choice(relations_of(subject))
    question = language.say(language.ask(subject, relation))
    return (question, f"i want to know: {question}"), {"answer": [subject, relation]}


def _brainstorming(world: World, rng: random.Random, topic: str) -> _Task:
    if rng.random() < 0.3:
        kind = KIND[_subject(rng, topic)]
        n = rng.randint(2, 4)
        ask = f"{WORDS['number'][n - 1]} {PLURAL[kind]}"
        return (f"list {ask}.", f"name {ask}."), {"items": {"n": n, "kind": kind}}
    while True:
        subject = _subject(rng, topic)
        relation = rng.choice(relations_of(subject))
        value = world.truth[subject, relation]
        having = len(world.subjects(relation, value))
        if having >= 2:
            break
    n, kind = rng.randint(2, min(3, having)), KIND[subject]
    ask = f"{WORDS['number'][n - 1]} {PLURAL[kind]} that {language.having(relation, value)}"
    items = {"n": n, "kind": kind, "relation": relation, "value": value}
    return (f"list {ask}.", f"name {ask}."), {"items": items}


def _chat(world: World, rng: random.Random, topic: str) -> _Task:
    mood = rng.choice(WORDS["mood"])
    feel = (f"i feel {mood} today.", f"today i am {mood}.")
    if rng.random() < 0.5:
        return tuple(f"{f} what could i do?" for f in feel), {"mood": mood, "advice": True}
    subject = _subject(rng, topic)
    ask = f"tell me something about {named(subject)}."
    return tuple(f"{f} {ask}" for f in feel), {"mood": mood, "about": subject, "facts": 1}


def _rewrite(world: World, rng: random.Random, topic: str) -> _Task:
    manner = rng.choice(("swap", "polite", "question"))
    if manner == "polite":
        order = language.fill(rng.choice(language.FORMS["order"]), rng)
        text, exact, wrong = f"{order}, you fool.", f"please {order}", f"{order} , you fool"
        ask = ("make the text polite.", "say it with respect.")
        return _about_text(text, ask), {"exact": exact, "wrong": wrong}
    subject = _subject(rng, topic)
    relation = rng.choice(relations_of(subject))
    fact = _fact(world, rng, subject, relation, p=0.5)
    wrong = language.state(fact)
    if manner == "question":
        exact = language.ask(subject, relation)
        ask = ("make the text a question.", "turn it into a question.")
    else:
        new = other_of_kind(rng, subject)
        exact = language.state(Fact(new, relation, fact.value))
        ask = (f"write the text with {new} in place of {subject}.", f"put {new} for {subject}.")
    return _about_text(f"{wrong}.", ask), {"exact": exact, "wrong": wrong}


def _passage(rng: random.Random, main: str, n: int) -> list[Fact]:
    """n facts about `main` and one about another word of its kind; their values are random."""
    other = other_of_kind(rng, main)
    relations = rng.sample(relations_of(main), n)
    about = [(main, name) for name in relations] + [(other, rng.choice(relations))]
    rng.shuffle(about)
    return [Fact(s, r, rng.choice(WORDS[RELATIONS[r].object])) for s, r in about]


def _as_text(passage: list[Fact]) -> str:
    return " ".join(language.say(language.state(fact)) for fact in passage)


def _as_lists(passage: list[Fact]) -> list[list[str]]:
    return [[fact.subject, fact.relation, fact.value] for fact in passage]


def _about_text(text: str, asks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"text: {text} {ask}" for ask in asks)


def _summarization(world: World, rng: random.Random, topic: str) -> _Task:
    main = _subject(rng, topic)
    passage = _passage(rng, main, 2)
    asks = (f"what does it say of {named(main)}?", f"sum up what is said of {named(main)}.")
    request = {"passage": _as_lists(passage), "about": main, "facts": 2}
    return _about_text(_as_text(passage), asks), request


def _classification(world: World, rng: random.Random, topic: str) -> _Task:
    manner = rng.choice(("tone", "truth", "kind"))
    if manner == "kind":
        word = _subject(rng, topic)
        kind, other = KIND[word], rng.choice([kind for kind in PLURAL if kind != KIND[word]])
        label, labels = (
            language.with_article(kind),
            [language.with_article(kind), language.with_article(other)],
        )
        ask = f"{word}: {' or '.join(sorted(labels))}?"
        return (f"which is {ask}", ask), {"label": label, "labels": labels}
    if manner == "tone":
        label, labels = rng.choice(("kind", "rude")), ["kind", "rude"]
        text = language.say(language.fill(rng.choice(language.FORMS[label]), rng))
        asks = ("is the text kind or rude?", "kind or rude?")
    else:
        subject = _subject(rng, topic)
        fact = _fact(world, rng, subject, rng.choice(relations_of(subject)), p=0.5)
        label, labels = ("true" if world.holds(fact) else "false"), ["true", "false"]
        text = language.say(language.state(fact))
        asks = ("is the text true or false?", "true or false?")
    return _about_text(text, asks), {"label": label, "labels": labels}


def _other(world: World, rng: random.Random, topic: str) -> _Task:
    numbers = WORDS["number"]
    off = rng.choice((-1, 1))
    if rng.random() < 0.5:
        word, n = _subject(rng, topic), rng.randint(2, 4)
        exact, wrong = [word] * n, [word] * (n + off)
        asks = (f"say {word} {numbers[n - 1]} times.", f"{numbers[n - 1]} times {word}.")
    else:
        start = rng.randint(0, 3)
        end = rng.randint(start + 1, 4)
        exact, wrong = list(numbers[start : end + 1]), list(numbers[start : end + 1 + off])
        span = f"from {numbers[start]} to {numbers[end]}."
        asks = (f"count {span}", f"say the numbers {span}")
    return asks, {"exact": language.enumerate_(exact), "wrong": language.enumerate_(wrong)}


def _closed_qa(world: World, rng: random.Random, topic: str) -> _Task:
    subject = _subject(rng, topic)
    passage = _passage(rng, subject, 2)
    said = [fact for fact in passage if fact.subject == subject]
    request: Request = {"passage": _as_lists(passage)}
    unsaid = [r for r in relations_of(subject) if r not in {fact.relation for fact in said}]
    if unsaid and rng.random() < 0.3:
        relation = rng.choice(unsaid)
        request["answer"] = None
    else:
        relation = rng.choice(said).relation
        request["answer"] = [subject, relation]
    question = language.say(language.ask(subject, relation))
    asks = (f"by the text, {question}", f"what does the text say: {question}")
    return _about_text(_as_text(passage), asks), request


def _extract(world: World, rng: random.Random, topic: str) -> _Task:
    main = _subject(rng, topic)
    passage = _passage(rng, main, rng.randint(1, 2))
    kind = KIND[main]
    words = language.words(_as_text(passage))
    names = list(dict.fromkeys(word for word in words if KIND.get(word) == kind))
    asks = (f"list the {PLURAL[kind]} in the text.", f"which {PLURAL[kind]} does it name?")
    request = {"passage": _as_lists(passage), "names": names}
    return _about_text(_as_text(passage), asks), request


# (world, generator, favourite kind of subject) -> (two phrasings of the prompt, request)
BUILDERS = {
    "generation": _generation,
    "open qa": _open_qa,
    "brainstorming": _brainstorming,
    "chat": _chat,
    "rewrite": _rewrite,
    "summarization": _summarization,
    "classification": _classification,
    "other": _other,
    "closed qa": _closed_qa,
    "extract": _extract,
}
