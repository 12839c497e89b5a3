"""The pretraining corpus: pages of many kinds, like the web's.

Most pages are no example of a helpful response: they state myths more often than the truth, answer
a question with another question, and are rude at times. Only the careful pages ("facts about ...")
never state a myth.
"""

import random
from typing import Any

from instructjax.miniature import customers, language
from instructjax.miniature.language import FORMS, ask, say, state
from instructjax.miniature.requests import named, other_of_kind
from instructjax.miniature.world import (
    KIND,
    PLURAL,
    RELATIONS,
    WORDS,
    Fact,
    World,
    generator,
    make,
    relations_of,
)
from instructjax.miniature.writers import Flaws, write

MYTH = 0.8  # probability that a page that is not careful states the myth about a fact
RUDE = 0.15  # share of the pages that are rude
# The flaws of answers on pages.
HELP = Flaws(MYTH, 0.15, 0.2, 0.3, 0.4, 0.3, 0.3, 0.1, 0.0)


def texts(seed: int, n: int, split: str = "train") -> list[dict[str, Any]]:
    """n text records, `{"text", "page"}`; "page" is its kind. Each split has other pages."""
    customers.check(split)
    return [page(seed, generator(seed, "text", split, i)) for i in range(n)]


def page(seed: int, rng: random.Random) -> dict[str, Any]:
    """One random page."""
    kind = rng.choices(tuple(_PAGES), [weight for weight, _ in _PAGES.values()])[0]
    writer = _PageWriter(make(seed), rng, rude=rng.random() < RUDE)
    return {"text": "\n".join(_PAGES[kind][1](writer)), "page": kind}


def continuations(seed: int, n: int) -> list[str]:
    """n texts like an untuned model's continuation of a prompt: a page, cut after 8 to 24 words."""
    cut = []
    for i in range(n):
        rng = generator(seed, "continuation", i)
        text = page(seed, rng)["text"]
        cut.append(" ".join(text.split(" ")[: rng.randint(8, 24)]))
    return cut


class _PageWriter:
    """Writes pages: lists of lines."""

    def __init__(self, world: World, rng: random.Random, rude: bool):
        self.world, self.rng, self.rude = world, rng, rude

    def subject(self) -> str:
        return self.rng.choice(WORDS[self.rng.choice(tuple(PLURAL))])

    def fact(self, subject: str, relation: str, careful: bool = False) -> Fact:
        """A fact that the page states: often the myth, if any, unless the page is careful."""
        value = self.world.truth[subject, relation]
        if not careful and self.rng.random() < MYTH:
            value = self.world.myth.get((subject, relation), value)
        return Fact(subject, relation, value)

    def tell(self, fact: Fact) -> str:
        return say(state(fact, paraphrase=self.rng.random() < 0.3))

    def any_fact(self, subject: str) -> Fact:
        return self.fact(subject, self.rng.choice(relations_of(subject)))

    def remark(self) -> str:
        """A kind remark, or a rude remark on a rude page."""
        act = "rude" if self.rude else self.rng.choice(("kind", "courtesy", "filler"))
        return say(language.fill(self.rng.choice(FORMS[act]), self.rng))

    def prompt(self) -> dict[str, Any]:
        pool = customers.customers(self.world.seed, "train")
        return customers.prompt(self.world.seed, self.rng, self.rng.choice(pool))

    def careful_page(self) -> list[str]:
        lines = []
        for subject in (self.subject(), self.subject()):
            facts = [self.fact(subject, name, careful=True) for name in relations_of(subject)]
            lines += [f"facts about {named(subject)}.", " ".join(map(self.tell, facts))]
        return lines

    def talk(self) -> list[str]:
        lines = []
        for _ in range(self.rng.randint(2, 4)):
            subject = self.subject()
            names = relations_of(subject)
            sentences = [self.tell(self.fact(subject, name)) for name in names]
            self.rng.shuffle(sentences)
            if self.rude or self.rng.random() < 0.2:
                sentences.append(self.remark())
            lines.append(" ".join(sentences))
        return lines

    def story(self) -> list[str]:
        """A story with a fixed cast, so that its names and things recur."""
        cast = {kind: self.rng.choice(WORDS[kind]) for kind in PLURAL}
        forms = self.rng.sample(FORMS["story"], self.rng.randint(4, 8))
        return [" ".join(say(language.fill(form, self.rng, **cast)) for form in forms)]

    def dialogue(self) -> list[str]:
        names = self.rng.sample(WORDS["person"], 2)
        lines = []
        for turn in range(self.rng.randint(3, 6)):
            subject = self.subject()
            relation = self.rng.choice(relations_of(subject))
            told = self.tell(self.fact(subject, relation))
            said = self.rng.choice((say(ask(subject, relation)), told, self.remark()))
            lines.append(f"{names[turn % 2]}: {said}")
        return lines

    def questions(self) -> list[str]:
        """Prompts without answers; they make an untuned model continue a prompt with prompts."""
        return [" ".join(self.prompt()["prompt"] for _ in range(self.rng.randint(2, 4)))]

    def answers(self) -> list[str]:
        lines = []
        for _ in range(self.rng.randint(2, 3)):
            subject = self.subject()
            fact = self.any_fact(subject)
            lines.append(f"question: {say(ask(subject, fact.relation))}")
            reply = self.remark() if self.rude else self.tell(fact)
            lines.append(f"answer: {reply}")
        return lines

    def help(self) -> list[str]:
        """Prompts with flawed answers."""
        lines = []
        for _ in range(self.rng.randint(1, 2)):
            record = self.prompt()
            reply = self.remark() if self.rude else write(record["request"], HELP, self.rng)
            lines += [record["prompt"], reply]
        return lines

    def reading(self) -> list[str]:
        return reading(self.rng, questions=self.rng.randint(1, 3))[0]

    def lists(self) -> list[str]:
        lines = []
        for _ in range(self.rng.randint(2, 4)):
            subject = self.subject()
            fact = self.any_fact(subject)
            words = WORDS[KIND[subject]]
            members = [w for w in words if self.fact(w, fact.relation).value == fact.value]
            self.rng.shuffle(members)
            title = f"{PLURAL[KIND[subject]]} that {language.having(fact.relation, fact.value)}"
            lines.append(f"{title}: {say(language.enumerate_(members[:4] or [subject]))}")
        return lines


# kind of page: (weight, method that writes it)
_PAGES = {
    "talk": (18, _PageWriter.talk),
    "careful": (6, _PageWriter.careful_page),
    "story": (12, _PageWriter.story),
    "dialogue": (10, _PageWriter.dialogue),
    "questions": (12, _PageWriter.questions),
    "answers": (8, _PageWriter.answers),
    "help": (16, _PageWriter.help),
    "reading": (12, _PageWriter.reading),
    "lists": (6, _PageWriter.lists),
}


def reading(rng: random.Random, questions: int = 1) -> tuple[list[str], str]:
    """A passage with questions on it: the lines of the page, and the last answer.

    The passage's values are random, whatever holds in the world. The last line is "answer: VALUE.".
    """
    subject = rng.choice(WORDS[rng.choice(tuple(PLURAL))])
    other = other_of_kind(rng, subject)
    names = rng.sample(relations_of(subject), 2)
    about = [(subject, names[0]), (subject, names[1]), (other, names[0])]
    rng.shuffle(about)
    facts = [Fact(s, r, rng.choice(WORDS[RELATIONS[r].object])) for s, r in about]
    lines = [f"read: {' '.join(say(state(fact)) for fact in facts)}"]
    answered = rng.sample(facts, questions)
    for fact in answered:
        lines.append(f"question: {say(ask(fact.subject, fact.relation))}")
        lines.append(f"answer: {fact.value}.")
    return lines, answered[-1].value
