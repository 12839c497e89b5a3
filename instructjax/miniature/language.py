"""The grammar of the miniature, which writes sentences and reads them back.

A sentence is recognised by its skeleton, in which each word of the world is replaced by the word's
kind: "Mira lives in Dorn" is ("<person>", "lives", "in", "<place>"). Reading is one look-up.
"""

import random
import re
from dataclasses import dataclass

from instructjax.miniature.world import KIND, PLURAL, RELATIONS, WORDS, Fact


def with_article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# Sentences that are neither true nor false, by their act. <kind> stands for any word of a kind.
FORMS: dict[str, tuple[str, ...]] = {
    "story": (
        "<person> saw a <thing>",
        "<person> went to <place>",
        "<person> lost the <thing>",
        "<person> was happy",
        "<person> met <person> in <place>",
        "<person> found a <thing> in <place>",
        "<person> gave the <thing> to <person>",
        "<person> sang to the <animal>",
        "<person> ate some <food>",
        "the <animal> saw a <thing>",
        "the <animal> ran to <place>",
        "the <animal> hid the <thing>",
        "the <animal> was angry",
        "the <animal> found some <food>",
        "the <animal> took the <thing> from <person>",
    ),
    "sympathy": ("i am sorry that you feel <mood>", "i am glad that you feel <mood>"),
    "advice": ("you could visit <place>", "you could eat some <food>", "you could call <person>"),
    "label": (
        *("it is kind", "it is rude", "it is true", "it is false"),
        *(f"it is {with_article(kind)}" for kind in PLURAL),
    ),
    "unsaid": ("the text does not say",),
    "courtesy": ("thank you for asking", "i am happy to help", "have a good day"),
    "filler": (
        "that is all i know",
        "many people ask me this",
        "let me think about it",
        "there is much more to say",
    ),
    "rude": (
        "you are a fool",
        "that is a stupid question",
        "go away",
        "do it yourself , fool",
        "your <thing> is ugly",
        "nobody likes you",
    ),
    "kind": ("you are a good friend", "your <thing> is lovely", "i like you", "you did well"),
    "order": ("bring me the <thing>", "go to <place>", "feed the <animal>", "call <person>"),
}
RUDE_WORDS = frozenset({"fool", "stupid", "ugly", "nobody", "away", "yourself"})
_WORD = re.compile(r"[A-Za-z]+|[^A-Za-z\s]")
_STOP = re.compile(r"[.?!\n]")


@dataclass(frozen=True)
class Sentence:
    """One sentence read back.

    Attributes:
      act: "fact", "list", "question", "garbled" or a key of FORMS.
      words: its words and punctuation marks, without the final stop.
      fact: the fact that it states, if its act is "fact".
    """

    act: str
    words: tuple[str, ...]
    fact: Fact | None = None

    @property
    def is_rude(self) -> bool:
        return self.act == "rude" or not RUDE_WORDS.isdisjoint(self.words)

    def words_of(self, kind: str) -> list[str]:
        """The words of a kind, in order."""
        return [word for word in self.words if KIND.get(word) == kind]


def _skeleton(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"<{KIND[word]}>" if word in KIND else word for word in words)


def _table() -> dict[tuple[str, ...], tuple[str, str]]:
    """Skeleton -> (act, name of the relation, or "")."""
    table = {}
    for act, forms in FORMS.items():
        for form in forms:
            table[_skeleton(tuple(form.split()))] = act, ""
    for order in FORMS["order"]:
        table["please", *order.split()] = "order", ""
    for name, relation in RELATIONS.items():
        kinds = {"S": f"<{relation.subject}>", "O": f"<{relation.object}>"}
        for act, forms in (("fact", relation.statements), ("question", (relation.question,))):
            for form in forms:
                words = tuple(kinds.get(word, word) for word in form.split())
                table[_skeleton(words)] = act, name
    return table


_TABLE = _table()


def words(text: str) -> tuple[str, ...]:
    """The words and punctuation marks of a text."""
    return tuple(_WORD.findall(text))


def say(sentence: str) -> str:
    """The sentence as printed: a stop at its end, no space before its commas."""
    asks = sentence.split()[0] in ("what", "where", "how", "which")
    return sentence.replace(" ,", ",") + ("?" if asks else ".")


def state(fact: Fact, paraphrase: bool = False) -> str:
    """The fact as a sentence without a stop."""
    return _fill(RELATIONS[fact.relation].statements[paraphrase], fact.subject, fact.value)


def ask(subject: str, relation: str) -> str:
    """The question whose answer is the value, without a stop."""
    return _fill(RELATIONS[relation].question, subject, "")


def having(relation: str, value: str) -> str:
    """The phrase after "that" in "foods that taste sweet"."""
    return _fill(RELATIONS[relation].having, "", value)


def _fill(form: str, subject: str, value: str) -> str:
    slots = {"S": subject, "O": value}
    return " ".join(slots.get(word, word) for word in form.split())


def fill(form: str, rng: random.Random, **given: str) -> str:
    """The form with its <kind> slots filled: by the given words first, else by unused words."""
    filled: list[str] = []
    for word in form.split():
        if word.startswith("<"):
            kind = word.strip("<>")
            free = [w for w in WORDS[kind] if w not in filled]
            word = given.pop(kind, None) or rng.choice(free)
        filled.append(word)
    return " ".join(filled)


def enumerate_(items: list[str]) -> str:
    """ "a", "a and b", "a , b and c"."""
    return " and ".join(filter(None, (" , ".join(items[:-1]), items[-1])))


def read(text: str) -> list[Sentence]:
    """The sentences of a text. Those that the grammar lacks, or that lack a stop, are "garbled"."""
    *ended, unended = _STOP.split(text)
    sentences = [_read(words(part)) for part in ended if part.strip()]
    if unended.strip():
        sentences.append(Sentence("garbled", words(unended)))
    return sentences


def _read(words: tuple[str, ...]) -> Sentence:
    skeleton = _skeleton(words)
    if skeleton in _TABLE:
        act, name = _TABLE[skeleton]
        if act != "fact":
            return Sentence(act, words)
        relation = RELATIONS[name]
        subject = words[skeleton.index(f"<{relation.subject}>")]
        value = words[skeleton.index(f"<{relation.object}>")]
        return Sentence(act, words, Fact(subject, name, value))
    items = words[::2]
    joints = words[1::2]
    listed = all(item in KIND for item in items) and len(words) == 2 * len(items) - 1
    if listed and joints == (",",) * (len(joints) - 1) + ("and",) * bool(joints):
        return Sentence("list", words)
    return Sentence("garbled", words)
