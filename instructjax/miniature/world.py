"""A world of made-up people, places, animals, foods and things, and the facts about them.

The words are fixed; the facts are drawn from a seed. A fixed share of the facts also has a myth, a
false value that the pretraining text states more often than the truth: the analogue of TruthfulQA
(InstructGPT, section 3.6).
"""

import functools
import random
from dataclasses import dataclass


def _rows(table: str) -> list[tuple[str, str]]:
    """The `(name, rest)` of each `name: rest` line; an indented line continues the one before."""
    lines = table.strip().replace("\n    ", " ").splitlines()
    return [(name, rest.strip()) for name, rest in (line.split(":") for line in lines)]


# Each word is in one list only, so that the word determines its kind (language.py).
WORDS = {
    kind: tuple(words.split())
    for kind, words in _rows("""
person: Mira Tarn Odell Bex Yoli Karim Suna Pell Davi Wenna Hulo Rasmin Tibor Leda Jorro Ansel
    Noor Vika Olmo Cressa
place: Dorn Velmo Quist Harrowby Lunde Portmoor Tamsin Galt Nesk Wick
animal: wumpit snorl brackle fenfox tuffin moxen glider grubbin larkel quillow hornel velk
food: oatling mulbo pinkle sorrop kelpie bannet tammy crumbel fizzel dumpkin lentle noodin
    parsip gorgle bramble syrel
thing: glowpot windbox drumjar sunreel rainhook foldbed snapbag tinhat hushbell spinwheel
    mudboot starmap waxpen longspoon fishlamp cloudkite
colour: red blue green yellow black white
job: baker farmer teacher doctor singer tailor painter sailor
weather: cold hot wet windy foggy
den: barn cave nest river bush tower
taste: sweet sour salty bitter spicy
material: wood glass stone wool clay copper
use: dig cook paint dance swim hunt
mood: sad tired lonely angry happy proud
number: one two three four five six
""")
}
KIND = {word: kind for kind, words in WORDS.items() for word in words}
PLURAL = {
    "person": "people",
    "place": "places",
    "animal": "animals",
    "food": "foods",
    "thing": "things",
}
GOOD_MOODS = ("happy", "proud")
MYTH_SHARE = 0.3


@dataclass(frozen=True)
class Relation:
    """A relation between a subject S of one kind and an object O of another.

    The first statement is plain, the second a paraphrase; `having` completes "name two foods
    that ...".
    """

    name: str
    subject: str
    object: str
    question: str
    statements: tuple[str, str]
    having: str


def _relation(name: str, row: str) -> Relation:
    kinds, question, plain, paraphrase, having = (cell.strip() for cell in row.split("|"))
    subject, object = kinds.split()
    return Relation(name, subject, object, question, (plain, paraphrase), having)


# name: kinds of S and O | question | plain statement | paraphrase | "foods that ..."
RELATIONS = {
    name: _relation(name, row)
    for name, row in _rows("""
home: person place | where does S live | S lives in O | the home of S is O | live in O
job: person job | what is the job of S | S is a O | S works as a O | work as a O
meal: person food | what does S like to eat | S likes to eat O | S eats O a lot | like to eat O
pet: person animal | which animal does S keep | S keeps a O | the pet of S is a O | keep a O
weather: place weather | how is the weather in S | S has O weather | it is O in S | have O weather
craft: place thing | what does S make | S makes the O | the O comes from S | make the O
diet: animal food | what does the S eat | the S eats O | O is the food of the S | eat O
den: animal den | where does the S sleep | the S sleeps in a O | the bed of the S is a O
    | sleep in a O
coat: animal colour | what colour is the S | the S is O | the S has O fur | are O
taste: food taste | how does S taste | S tastes O | the taste of S is O | taste O
hue: food colour | what colour is S | S is O | the colour of S is O | are O
matter: thing material | what is the S made of | the S is made of O | the S is a O thing
    | are made of O
use: thing use | what is the S for | the S is used to O | people O with the S | are used to O
""")
}


@dataclass(frozen=True)
class Fact:
    """The claim that the `relation` of `subject` is `value`; the world decides if it is true."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True)
class World:
    """The true value of each (subject, relation), and a myth for some."""

    seed: int
    truth: dict[tuple[str, str], str]
    myth: dict[tuple[str, str], str]

    def holds(self, fact: Fact) -> bool:
        """Whether the fact is true."""
        return self.truth[fact.subject, fact.relation] == fact.value

    def subjects(self, relation: str, value: str) -> list[str]:
        """All subjects whose `relation` has this value, in the order of WORDS."""
        words = WORDS[RELATIONS[relation].subject]
        return [word for word in words if self.truth[word, relation] == value]


def relations_of(subject: str) -> list[str]:
    """The names of the relations that this subject has."""
    return [name for name, relation in RELATIONS.items() if relation.subject == KIND[subject]]


def generator(*key: object) -> random.Random:
    """A random generator seeded by its key alone, the same on every machine and Python."""
    return random.Random("/".join(map(str, key)))


@functools.cache
def make(seed: int) -> World:
    """The world of a seed. Values are spread evenly, so that lists have enough words to name."""
    rng = generator(seed, "world")
    truth, myth = {}, {}
    for name, relation in RELATIONS.items():
        subjects, values = list(WORDS[relation.subject]), list(WORDS[relation.object])
        rng.shuffle(subjects)
        rng.shuffle(values)
        for i, subject in enumerate(subjects):
            truth[subject, name] = values[i % len(values)]
        for subject in rng.sample(subjects, round(MYTH_SHARE * len(subjects))):
            others = [value for value in values if value != truth[subject, name]]
            myth[subject, name] = rng.choice(others)
    return World(seed, truth, myth)
