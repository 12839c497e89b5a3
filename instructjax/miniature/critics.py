"""Critics that judge, criticise and revise responses under a principle: by rule, or in text pages.

This is Constitutional AI (Bai et al. 2022, arXiv 2212.08073) in the miniature's words. A principle
is a feature of the gold judge (judging.py). The pages show how critics work. They are not part of
the pretraining corpus (text.py); a base model that is to be a critic is trained on both.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from instructjax.miniature import customers, language
from instructjax.miniature.judging import GOLD, judge
from instructjax.miniature.labelers import DRAFT
from instructjax.miniature.language import Sentence, say, state
from instructjax.miniature.world import KIND, Fact, World, generator, make
from instructjax.miniature.writers import Flaws, write

ANSWERS = ("one", "two")  # names of the two responses of a question
OVERALL = "utility"  # the name of the principle that is no feature but the whole utility


class Principle(NamedTuple):
    """A principle in the miniature's words.

    Attributes:
      name: the feature of `judging.Features` that it is about, or OVERALL.
      choose: asks which of two responses is better; the answer is one of ANSWERS.
      critique: asks whether a response keeps it; "": there is no such question.
      kept, broken: the two answers.
      revision: asks for a better response.
      flaws: the writer's flaws that break it.
    """

    name: str
    choose: str
    critique: str = ""
    kept: str = ""
    broken: str = ""
    revision: str = ""
    flaws: tuple[str, ...] = ()


def _about(name: str, row: str, *flaws: str) -> Principle:
    return Principle(name, *(cell.strip() for cell in row.split("|")), flaws=flaws)


PRINCIPLES = (
    _about(
        "followed",
        "which does what i want? | does it do what i want? | it does. | it does not."
        " | do what i want.",
        *("stray", "count", "skip"),
    ),
    _about(
        "false",
        "which is true? | is it true or false? | it is true. | it is false. | make it true.",
        *("myth", "slip"),
    ),
    _about(
        "rude",
        "which is kind? | is it kind or rude? | it is kind. | it is rude. | make it kind.",
        "rude",
    ),
    _about(
        "invented",
        "which is by the text? | is it by the text? | it is by the text. | it is not by the text."
        " | say what the text does say.",
        "invent",
    ),
    _about(
        "padding",
        "which has no more? | is there more? | there is no more. | there is more. | say no more.",
        "pad",
    ),
    _about(
        "garbled",
        "which could be read? | could it be read? | it could. | it could not. | write it well.",
        *("garble", "derail"),
    ),
    _about(OVERALL, "which is good?"),
)


def question(prompt: str, first: str, second: str, choose: str) -> str:
    """What a critic reads who is to choose one of two responses. The answer follows."""
    return f"{prompt}\n{ANSWERS[0]}: {first}\n{ANSWERS[1]}: {second}\n{choose}"


# ------------------------------------------------------------------------------- critics by rule


def can_judge(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the miniature, so that its judge and its critics can judge responses."""
    request = row.get("request")
    return isinstance(request, Mapping) and "seed" in request


def term(record: dict[str, Any], response: str, name: str) -> float:
    """What a principle's feature adds to the gold utility of a response."""
    judgement = judge(record, response)
    if name == OVERALL:
        return judgement.utility
    return getattr(GOLD, name) * getattr(judgement.features, name)


def keeps(record: dict[str, Any], response: str, name: str) -> bool:
    """Whether a response has the best value of a principle's feature."""
    return term(record, response, name) == (GOLD.followed if name == "followed" else 0)


def mend(record: dict[str, Any], response: str, name: str, rng: random.Random) -> str:
    """The response, changed so that it keeps a principle.

    What breaks the principle is left out, or corrected. Where that leaves nothing, or does not
    suffice, a new response without flaws takes its place.
    """
    request = record["request"]
    kept = list(_mended(request, language.read(response), name))
    mended = " ".join(say(" ".join(words)) for words in kept)
    if kept and keeps(record, mended, name):
        return mended
    return write(request, Flaws(), rng)


def _mended(
    request: dict[str, Any], sentences: list[Sentence], name: str
) -> Iterator[tuple[str, ...]]:
    """The words of each sentence that stays."""
    world, seen = make(request["seed"]), set[tuple[str, ...]]()
    courteous = request.get("tone") == "respectful"
    for sentence in sentences:
        words = sentence.words
        match name:
            case "rude" if sentence.is_rude:
                continue
            case "garbled" if sentence.act == "garbled":
                continue
            case "padding" if sentence.act == "filler" or words in seen:
                continue
            case "padding" if sentence.act == "courtesy" and not courteous:
                continue
            case "false" if sentence.fact is not None:
                words = tuple(state(_corrected(world, sentence.fact)).split())
            case "invented" if sentence.act == "list" or sentence.fact is not None:
                words = _by_the_text(sentence, request.get("passage", []))
        seen.add(words)
        if words:
            yield words


def _corrected(world: World, fact: Fact) -> Fact:
    return replace(fact, value=world.truth[fact.subject, fact.relation])


def _by_the_text(sentence: Sentence, passage: list[list[str]]) -> tuple[str, ...]:
    """The sentence if the passage has its fact, and of a list the words that it has."""
    facts = [Fact(*fact) for fact in passage]
    if sentence.fact is not None:
        return sentence.words if sentence.fact in facts else ()
    named = {word for fact in facts for word in (fact.subject, fact.value)}
    items = [word for word in sentence.words if word in KIND and word in named]
    return language.words(language.enumerate_(items)) if items else ()


@dataclass(frozen=True)
class RuleCritic:
    """A critic that reads as the gold judge does, but for its errors, and names responses.

    Attributes:
      noise: standard deviation of the error of a response's rating, in units of utility.
      place_bias: what the first response's rating gains, likewise.
      oversight: probability that a critique says the opposite of what it should.
      seed: seed of the errors.
    """

    noise: float = 0.0
    place_bias: float = 0.0
    oversight: float = 0.0
    seed: int = 0

    def better(self, record: dict[str, Any], first: str, second: str, name: str) -> float:
        """How much better the first response is, in units of utility, as this critic sees it.

        The error of a response is the same wherever it stands.
        """
        seen = [self._rating(record, response, name) for response in (first, second)]
        return seen[0] - seen[1] + self.place_bias

    def _rating(self, record: dict[str, Any], response: str, name: str) -> float:
        rng = generator(self.seed, "critic", name, record["prompt"], response)
        return term(record, response, name) + rng.gauss(0, self.noise)

    def revise(
        self, record: dict[str, Any], response: str, principle: Principle, number: int
    ) -> tuple[str, str]:
        """(a critique, the revised response).

        Where the critic finds a flaw that is not there, the revision leaves out a sentence.

        Args:
          number: of the revision, which the errors depend on.
        """
        rng = generator(self.seed, "revision", number, record["prompt"], response)
        kept = keeps(record, response, principle.name)
        if rng.random() < self.oversight:
            if not kept:
                return principle.kept, response
            sentences = [" ".join(sentence.words) for sentence in language.read(response)]
            if len(sentences) > 1:
                sentences.pop(rng.randrange(len(sentences)))
            return principle.broken, " ".join(map(say, sentences))
        if kept:
            return principle.kept, response
        return principle.broken, mend(record, response, principle.name, rng)


# ------------------------------------------------------------------------------- pages of critics


def pages(seed: int, n: int, split: str = "train") -> list[dict[str, Any]]:
    """n text records, `{"text", "page"}`; half choose between responses, half criticise and mend.

    All principles have about as many pages, and about half of the responses keep theirs.
    """
    customers.check(split)
    written = []
    for i in range(n):
        rng = generator(seed, "critics", split, i)
        write_page = _choosing if rng.random() < 0.5 else _mending
        written.append({"text": write_page(seed, rng, split), "page": write_page.__name__[1:]})
    return written


def _choosing(seed: int, rng: random.Random, split: str) -> str:
    principle = rng.choice(PRINCIPLES)
    record, better, worse = _pair(seed, rng, split, principle)
    answer = rng.randrange(2)
    first, second = (better, worse) if answer == 0 else (worse, better)
    asked = question(record["prompt"], first, second, principle.choose)
    return f"{asked} {ANSWERS[answer]}."


def _mending(seed: int, rng: random.Random, split: str) -> str:
    principle = rng.choice([p for p in PRINCIPLES if p.critique])
    record, better, worse = _pair(seed, rng, split, principle)
    response = better if rng.random() < 0.5 else worse
    critique, revised = RuleCritic(seed=seed).revise(record, response, principle, 0)
    lines = [record["prompt"], response, f"{principle.critique} {critique}"]
    return "\n".join([*lines, f"{principle.revision} {revised}"])


def _pair(
    seed: int, rng: random.Random, split: str, principle: Principle
) -> tuple[dict[str, Any], str, str]:
    """(a prompt record, a response that is better by a principle, one that is worse)."""
    pool = customers.customers(seed, split)
    hardness = rng.uniform(0.1, 0.6)
    light = Flaws(*(min(hardness * p, 1.0) for p in vars(DRAFT).values()))
    while True:
        record = customers.prompt(seed, rng, rng.choice(pool))
        broken = light
        if principle.flaws:
            broken = replace(light, **{rng.choice(principle.flaws): 1.0})
        first, second = (write(record["request"], flaws, rng) for flaws in (light, broken))
        gap = term(record, first, principle.name) - term(record, second, principle.name)
        if principle.name == OVERALL and gap < 0:
            return record, second, first
        kept = principle.name == OVERALL or keeps(record, first, principle.name)
        if kept and gap > 0:
            return record, first, second
