"""A procedural world in which the whole paper can be reproduced in minutes, with no download.

Everything is a function of a seed; item i of a stream depends on the seed, the split and i alone.
In reading order:

    world.py       facts, and myths about some of them
    language.py    one grammar that writes sentences and reads them back
    requests.py    prompts, each with a request that a program can check
    customers.py   prompts in the paper's proportions, split by customer
    judging.py     the noise-free gold judge
    writers.py     responses, good and flawed
    labelers.py    demonstrations, and rankings with ties and noise
    text.py        the pretraining corpus
    critics.py     critics by rule, and pages on which critics write
    benchmarks.py  the benchmarks of the alignment tax and of bias, and a mix of public tasks
    wordlevel.py   the tokenizer
    stats.py       the figures that the calibration is based on

`python -m instructjax.miniature --show` prints samples, `--stats` the figures.
"""

from instructjax.miniature.benchmarks import (
    multiple_choice,
    name_swaps,
    public_tasks,
    reading_comprehension,
    token_f1,
)
from instructjax.miniature.customers import prompts
from instructjax.miniature.judging import Features, Judgement, judge, mean
from instructjax.miniature.labelers import (
    Labeler,
    compare,
    comparisons,
    demonstrations,
    likert,
    pool,
    rank,
)
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
    "likert",
    "mean",
    "multiple_choice",
    "name_swaps",
    "pool",
    "prompts",
    "public_tasks",
    "rank",
    "reading_comprehension",
    "texts",
    "token_f1",
    "tokenizer",
]
