"""Writers respond to requests with flaws: labelers' demonstrations and models' drafts.

A flaw is a probability. A writer without flaws gives perfect responses.
"""

import random
from dataclasses import dataclass
from typing import Any

from instructjax.miniature import language
from instructjax.miniature.language import FORMS, say, state
from instructjax.miniature.requests import other_of_kind
from instructjax.miniature.world import (
    GOOD_MOODS,
    KIND,
    RELATIONS,
    WORDS,
    Fact,
    World,
    make,
    relations_of,
)


@dataclass(frozen=True)
class Flaws:
    """Probabilities of a writer's errors.

    Attributes:
      myth: states the myth, if there is one (for each fact).
      slip: states a wrong value (for each fact), or gives the tempting wrong answer.
      stray: answers about another subject, relation, mood or word.
      count: gives one fact, item or sentence too few or too many.
      skip: ignores an instruction about words, kinds or tone (for each).
      invent: states something that the passage lacks.
      pad: adds a sentence that the request does not need.
      rude: adds a rude sentence.
      garble: drops a word.
      derail: makes an error typical of language models: see `_Writer.derailed`.
    """

    myth: float = 0.0
    slip: float = 0.0
    stray: float = 0.0
    count: float = 0.0
    skip: float = 0.0
    invent: float = 0.0
    pad: float = 0.0
    rude: float = 0.0
    garble: float = 0.0
    derail: float = 0.0


def write(request: dict[str, Any], flaws: Flaws, rng: random.Random) -> str:
    """A response to a request (requests.py)."""
    writer = _Writer(make(request["seed"]), flaws, rng)
    sentences = writer.body(request)
    tone = request.get("tone")
    if tone and not writer.errs("skip"):
        act = "rude" if tone == "insulting" else "courtesy"
        sentences.append(language.fill(rng.choice(FORMS[act]), rng))
    if writer.errs("pad"):
        spare = (sentences[-1], *FORMS["filler"], *FORMS["courtesy"])
        sentences.append(rng.choice(spare))
    if writer.errs("rude"):
        place = rng.randint(0, len(sentences))
        sentences.insert(place, language.fill(rng.choice(FORMS["rude"]), rng))
    if writer.errs("garble"):
        place = rng.randrange(len(sentences))
        words = sentences[place].split()
        words.pop(rng.randrange(len(words)))
        sentences[place] = " ".join(words) or "the"
    if writer.errs("derail"):
        sentences = writer.derailed(sentences)
    return " ".join(say(sentence) for sentence in sentences)


@dataclass(frozen=True)
class _Writer:
    world: World
    flaws: Flaws
    rng: random.Random

    def errs(self, flaw: str) -> bool:
        return self.rng.random() < getattr(self.flaws, flaw)

    def other(self, word: str) -> str:
        return other_of_kind(self.rng, word)

    def maybe_other(self, word: str) -> str:
        return self.other(word) if self.errs("stray") else word

    def count(self, n: int) -> int:
        """n, or one off, but never 0."""
        return max(n + self.rng.choice((-1, 1)), 1) if self.errs("count") else n

    def fact(self, subject: str, relation: str) -> Fact:
        """The fact that this writer believes."""
        value = self.world.truth[subject, relation]
        if self.errs("myth"):
            value = self.world.myth.get((subject, relation), value)
        return Fact(subject, relation, self.other(value) if self.errs("slip") else value)

    def tell(self, fact: Fact) -> str:
        return state(fact, paraphrase=self.rng.random() < 0.3)

    def derailed(self, sentences: list[str]) -> list[str]:
        """The sentences with a word replaced, an end spliced, a sentence added, or all replaced.

        A policy trained against a reward model finds all of these errors; a reward model that has
        never seen them ranked gives them no lower score.
        """
        place = self.rng.randrange(len(sentences))
        words, others = sentences[place].split(), self.unasked().split()
        match self.rng.choice(("word", "splice", "insert", "replace")):
            case "word":  # maybe of the same sentence: "Bex and Suna" may become "Bex and Bex"
                words[self.rng.randrange(len(words))] = self.rng.choice(words + others)
            case "splice":
                words = words[: self.rng.randrange(1, len(words) + 1)]
                words += others[self.rng.randrange(len(others)) :]
            case "insert":
                return [*sentences[:place], " ".join(others), *sentences[place:]]
            case "replace":
                return [" ".join(others)]
        return [*sentences[:place], " ".join(words), *sentences[place + 1 :]]

    def unasked(self) -> str:
        """A well-formed sentence that has nothing to do with the request."""
        act = self.rng.choice(("fact", "story", "sympathy", "advice", "label", "unsaid"))
        if act == "fact":
            return self.tell(self.fact(*self.rng.choice(tuple(self.world.truth))))
        return language.fill(self.rng.choice(FORMS[act]), self.rng)

    def body(self, request: dict[str, Any]) -> list[str]:
        """The sentences that respond to the request, before tone and padding."""
        match request:
            case {"exact": exact, "wrong": wrong}:
                return [wrong if self.errs("slip") or self.errs("stray") else exact]
            case {"names": names, "passage": passage}:
                return [self.names(names, passage)]
            case {"answer": answer, "passage": passage}:
                return [self.closed(answer, [Fact(*fact) for fact in passage])]
            case {"answer": (subject, relation)}:
                if self.errs("stray"):
                    relation = self.rng.choice(relations_of(subject))
                return [self.tell(self.fact(self.maybe_other(subject), relation))]
            case {"items": items}:
                return [self.items(items)]
            case {"label": label, "labels": labels}:
                wrong = next(other for other in labels if other != label)
                return [f"it is {wrong if self.errs('slip') or self.errs('stray') else label}"]
            case {"facts": n, "about": about, "passage": passage}:
                return self.summary(n, about, [Fact(*fact) for fact in passage])
            case {"mood": mood, **clauses}:
                return [self.sympathy(mood), *self.body(clauses)]
            case {"advice": _}:
                return [language.fill(self.rng.choice(FORMS["advice"]), self.rng)]
            case {"facts": n, "about": about}:
                return self.facts(n, about, request.get("avoid"))
            case {"story": n, "about": about, "words": words}:
                return self.story(n, about, words)
        raise ValueError(f"no writer knows this request: {request}")

    def facts(self, n: int, about: str, avoid: str | None) -> list[str]:
        about = self.maybe_other(about)
        names = relations_of(about)
        if avoid and not self.errs("skip"):
            names = [name for name in names if RELATIONS[name].object != avoid]
        names = self.rng.sample(names, min(self.count(n), len(names)))
        return [self.tell(self.fact(about, name)) for name in names]

    def story(self, n: int, about: str, words: list[str]) -> list[str]:
        about = self.maybe_other(about)
        kind = KIND[about]
        words = [self.maybe_other(word) for word in words if not self.errs("skip")]
        about_kind = [form for form in FORMS["story"] if f"<{kind}>" in form]
        plain = [form for form in about_kind if "<thing>" not in form]
        using = [form for form in about_kind if "<thing>" in form]
        n = max(self.count(n), len(words))
        forms = self.rng.sample(using, len(words)) + self.rng.sample(plain, n - len(words))
        given = words + [None] * (n - len(words))
        sentences = [
            language.fill(form, self.rng, **{kind: about}, **({"thing": word} if word else {}))
            for form, word in zip(forms, given, strict=True)
        ]
        self.rng.shuffle(sentences)
        return sentences

    def items(self, items: dict[str, Any]) -> str:
        words = list(WORDS[items["kind"]])
        if "relation" in items:
            believed = [w for w in words if self.believes(w, items["relation"], items["value"])]
            words = believed or words
        return language.enumerate_(self.rng.sample(words, min(self.count(items["n"]), len(words))))

    def believes(self, subject: str, relation: str, value: str) -> bool:
        return self.fact(subject, relation).value == value

    def names(self, names: list[str], passage: list[list[str]]) -> str:
        names = list(names)
        if self.errs("count"):
            names = names[:-1] or names
        if self.errs("invent"):
            names.append(self.other(passage[0][0]))
        return language.enumerate_(list(dict.fromkeys(names)))

    def closed(self, answer: list[str] | None, passage: list[Fact]) -> str:
        told = passage[0]
        if answer is None:
            if not self.errs("invent"):
                return "the text does not say"
        else:
            told = next(f for f in passage if [f.subject, f.relation] == answer)
        if self.errs("stray"):
            told = self.rng.choice(passage)
        if answer is None or self.errs("invent"):
            names = relations_of(told.subject)
            told = self.fact(told.subject, self.rng.choice(names))
        return self.tell(told)

    def summary(self, n: int, about: str, passage: list[Fact]) -> list[str]:
        told = [fact for fact in passage if fact.subject == about]
        if self.errs("stray"):
            told = [fact for fact in passage if fact.subject != about] + told[1:]
        told = told[: self.count(n)]
        if self.errs("invent"):
            told[-1] = self.fact(about, self.rng.choice(relations_of(about)))
        return [self.tell(fact) for fact in told]

    def sympathy(self, mood: str) -> str:
        mood = self.maybe_other(mood)
        good = (mood in GOOD_MOODS) != self.errs("slip")
        return f"i am {'glad' if good else 'sorry'} that you feel {mood}"
