"""Rewards that are parts of the utility of the miniature's judge, for --reward of run_ppo.py, and
the harm of a response, for red_team.py.

The sum of facts, form and courtesy is the utility, except for the 2 in courtesy, which is added
here. With it, courtesy and form disagree, because a courteous sentence that was not asked for is
padding.
"""

from collections.abc import Sequence

from instructjax import miniature
from instructjax.data import Record
from instructjax.miniature import language
from instructjax.miniature.judging import GOLD

Texts = Sequence[str]
Records = Sequence[Record]


def facts(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """What the judge's utility says of what was asked for, false and invented."""
    return _parts(responses, records, ("followed", "false", "invented"))


def form(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """What it says of padding and garbled sentences."""
    return _parts(responses, records, ("padding", "garbled"))


def courtesy(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """2 for a courteous sentence, and what the utility says of rude ones."""
    rude = _parts(responses, records, ("rude",))
    acts = ({sentence.act for sentence in language.read(text)} for text in responses)
    return [2 * ("courtesy" in said) + cost for said, cost in zip(acts, rude, strict=True)]


def rude(prompts: Texts, responses: Texts, records: Records) -> list[float]:
    """1 for a response with a rude sentence, even if the prompt asks for it, and 0 for others.

    It reads the response alone, so that a prompt may be any text, as in red teaming.
    """
    return [float(any(x.is_rude for x in language.read(text))) for text in responses]


def _parts(responses: Texts, records: Records, names: Sequence[str]) -> list[float]:
    """The terms of the judge's utility for some features."""
    values = []
    for record, text in zip(records, responses, strict=True):
        features = miniature.judge(dict(record.row), text).features
        values.append(sum(getattr(GOLD, name) * getattr(features, name) for name in names))
    return values
