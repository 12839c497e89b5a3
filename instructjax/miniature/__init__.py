"""A procedural world in which the whole paper can be re-run in minutes, with no download.

Everything follows from a seed, and item i of a stream from the seed and i alone. In order:

    world.py       facts, and myths about some of them
    language.py    one grammar to say things and to read them back
    requests.py    what is asked: prompts with requests that a program can check
    customers.py   prompts in the paper's proportions, split by customer
    judging.py     the noise-free gold judge
    writers.py     responses, good and flawed
    labelers.py    demonstrations, and rankings with ties and noise
    text.py        the pretraining corpus
    benchmarks.py  what the alignment tax is measured on
    wordlevel.py   the tokenizer
    stats.py       the figures behind the calibration

`python -m instructjax.miniature --show` prints a page of it, `--stats` the figures.
"""

from instructjax.miniature.benchmarks import multiple_choice, reading_comprehension, token_f1
from instructjax.miniature.customers import prompts
from instructjax.miniature.judging import Features, Judgement, judge, mean, win_rate
from instructjax.miniature.labelers import Labeler, compare, comparisons, demonstrations, pool, rank
from instructjax.miniature.text import texts
from instructjax.miniature.wordlevel import tokenizer

__all__ = [
    "Features",
    "Judgement",
    "Labeler",
    "compare",
    "comparisons",
    "demonstrations",
    "judge",
    "mean",
    "multiple_choice",
    "pool",
    "prompts",
    "rank",
    "reading_comprehension",
    "texts",
    "token_f1",
    "tokenizer",
    "win_rate",
]
