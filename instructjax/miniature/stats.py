"""Figures of the miniature, on which its calibration is based."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from instructjax.evaluation.statistics import agreement
from instructjax.miniature import language
from instructjax.miniature.customers import CATEGORIES, prompts
from instructjax.miniature.judging import GOLD, Judgement, judge, mean
from instructjax.miniature.labelers import demonstrations, screens
from instructjax.miniature.text import continuations, texts
from instructjax.miniature.wordlevel import tokenizer
from instructjax.miniature.world import make


@dataclass(frozen=True)
class Labeling:
    """How labelers rank drafts.

    Attributes:
      agreement: of the pairs that neither of two labelers ties, the share that both order alike.
      interval: half width of the 95 % interval of the agreement.
      pairs: number of pairs that the agreement is measured on.
      ties: share of all pairs that a labeler ties.
      judge: share of a labeler's strictly ranked pairs that the noise-free judge orders alike.
      length: the same share for the better of "longer is better" and "shorter is better".
    """

    agreement: float
    interval: float
    pairs: int
    ties: float
    judge: float
    length: float


def labeling(seed: int, n: int, held_out: bool = False) -> Labeling:
    """Measures labelers on n sets of drafts, each ranked by four labelers."""
    sets = screens(seed, n, held_out=held_out)
    share, interval, pairs = agreement([[c["ranks"] for c in screen] for screen in sets])
    every = [comparison for screen in sets for comparison in screen]
    ranks = [c["ranks"] for c in every]
    longer = accuracy([[len(r.split()) for r in c["responses"]] for c in every], ranks)
    gold = [[judge(s[0], r).utility for r in s[0]["responses"]] for s in sets for _ in s]
    tied = [a == b for r in ranks for a, b in itertools.combinations(r, 2)]
    return Labeling(
        share,
        interval,
        pairs,
        ties=sum(tied) / len(tied),
        judge=accuracy(gold, ranks),
        length=max(longer, 1 - longer),
    )


def accuracy(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> float:
    """The share of strictly ranked pairs whose better response scores higher; a tie counts half.

    Raises ValueError if no pair is ranked strictly.
    """
    right = pairs = 0.0
    for s, r in zip(scores, ranks, strict=True):
        for i, j in itertools.permutations(range(len(r)), 2):
            if r[i] < r[j]:
                right += (s[i] > s[j]) + 0.5 * (s[i] == s[j])
                pairs += 1
    if not pairs:
        raise ValueError("no pair of responses is ranked strictly")
    return right / pairs


def writing(seed: int, n: int) -> dict[str, list[Judgement]]:
    """Judgements of n demonstrations, and of raw text in place of the response."""
    shown = demonstrations(seed, n)
    raw = continuations(seed, n)
    return {
        "demonstrations": [judge(record, record["completion"]) for record in shown],
        "base-model text": [judge(r, text) for r, text in zip(shown, raw, strict=True)],
    }


def quantiles(judgements: Sequence[Judgement]) -> list[float]:
    """The 10, 25, 50, 75 and 90 % quantiles of the utilities."""
    ordered = sorted(j.utility for j in judgements)
    return [ordered[int(q * (len(ordered) - 1))] for q in (0.1, 0.25, 0.5, 0.75, 0.9)]


def summary(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Means of the judgements, and the share of responses without a flaw."""
    perfect = sum(j.utility == GOLD.followed for j in judgements) / len(judgements)
    return {**mean(judgements), "perfect": perfect}


def corpus(seed: int, n: int) -> dict[str, float]:
    """Size and speed of the pretraining text, and how often it states myths and rude words."""
    start = time.perf_counter()
    pages = [page["text"] for page in texts(seed, n)]
    seconds = time.perf_counter() - start
    tokens = sum(map(len, tokenizer()(pages)["input_ids"]))
    read = pages[:4000]  # reading is ten times slower than writing
    said = myths_and_truths(seed, read)
    return {
        "pages": n,
        "tokens": tokens,
        "tokens a page": tokens / n,
        "tokens a second, generated": tokens / seconds,
        "myth : truth, where there is a myth": said["myth"] / said["truth"],
        "pages with a rude word": sum(map(_rude, read)) / len(read),
    }


def myths_and_truths(seed: int, pages: Sequence[str]) -> Counter[str]:
    """How often pages state the myth, the truth or another value of facts that have a myth."""
    world = make(seed)
    said: Counter[str] = Counter()
    for page in pages:  # "Mira: ..." and "answer: ..." end at the colon as well
        for fact in (sentence.fact for sentence in language.read(page.replace(":", "."))):
            if fact and (fact.subject, fact.relation) in world.myth:
                myth = world.myth[fact.subject, fact.relation] == fact.value
                said["myth" if myth else "truth" if world.holds(fact) else "other"] += 1
    return said


def _rude(page: str) -> bool:
    return any(language.RUDE_WORDS & set(s.words) for s in language.read(page))


def categories(seed: int, n: int) -> dict[str, tuple[float, float]]:
    """Share of each category among n prompts, and the paper's, in per cent."""
    seen = Counter(record["category"] for record in prompts(seed, n))
    return {name: (100 * seen[name] / n, share) for name, share in CATEGORIES.items()}
