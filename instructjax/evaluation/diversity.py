"""Self-BLEU: how alike texts are (Zhu et al. 2018, arXiv 1802.01886). Lower is more diverse."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDER = 4  # longest n-grams
SMOOTHING = 0.1  # stands for a number of matches that is 0
_TOKEN = re.compile(r"\w+|[^\w\s]")


def bleu_of_each(texts: Sequence[str]) -> np.ndarray:
    """BLEU of each text, with all others as its references (Papineni et al. 2002).

    It is the geometric mean of the precisions of n-grams, n to 4, times the brevity penalty. A text
    of fewer tokens has n-grams up to its length only. Tokens are words and punctuation marks. A
    precision of 0 is smoothed; a text that shares no token with another has 0.

    The time is linear in the number of texts: an n-gram's largest count among the others is one of
    its two largest counts.

    Returns:
      float [n] from 0 to 1; 0 for a text without tokens, and for one that has no others.
    """
    tokens = [tuple(_TOKEN.findall(text)) for text in texts]
    log_sum, orders, shares = np.zeros(len(texts)), np.zeros(len(texts)), np.zeros(len(texts), bool)
    for n in range(1, ORDER + 1):
        counts = [Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in tokens]
        largest = _two_largest(counts)
        for number, count in enumerate(counts):
            if not count:
                continue
            matches = sum(
                min(own, largest[gram][1] if largest[gram][2] == number else largest[gram][0])
                for gram, own in count.items()
            )
            shares[number] |= n == 1 and matches > 0
            log_sum[number] += np.log((matches or SMOOTHING) / count.total())
            orders[number] += 1
    bleu = np.exp(log_sum / np.maximum(orders, 1)) * _brevity([len(x) for x in tokens])
    return np.where(shares, bleu, 0)


def _two_largest(
    counts: Sequence[Counter[tuple[str, ...]]],
) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """The largest count of each n-gram in a text, the next largest, and the first one's text."""
    largest: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for number, count in enumerate(counts):
        for gram, own in count.items():
            first, second, where = largest.get(gram, (0, 0, -1))
            if own > first:
                largest[gram] = own, first, number
            elif own > second:
                largest[gram] = first, own, where
    return largest


def _brevity(lengths: Sequence[int]) -> np.ndarray:
    """The brevity penalty of each text: against the other whose length is closest, the shorter of
    two."""
    of_length = Counter(lengths)
    penalties = []
    for own in lengths:
        others = [x for x, count in of_length.items() if count > (x == own)]
        closest = min(others, key=lambda x: (abs(x - own), x), default=own)
        penalties.append(np.exp(1 - closest / own) if 0 < own < closest else 1.0)
    return np.array(penalties)
