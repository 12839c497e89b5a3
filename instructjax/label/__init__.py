"""A local page on which people rank and rate responses, and the export of their labels.

`python -m instructjax.label --data jsonl:samples.jsonl --out labels.db` serves it; `--export DIR`
writes the records. Needs `pip install 'instructjax[label]'`. In reading order:

    answers.py     checks what a labeler submits for a screen
    screens.py     rows of data -> screens: a prompt and the responses to judge
    deck.py        which screens a labeler sees, and in which order: draws from a seed
    store.py       SQLite: screens, labelers, labels; one transaction a screen
    agreement.py   agreement with one another and with known answers; Krippendorff's alpha
    desk.py        serves the page's requests: the next screen, an earlier one, storing a label
    export.py      labels -> comparisons, demonstrations and rankings of models
    guard.py       requests that are refused: other origins, other hosts, no token
    server.py      the pages and their addresses
    static/        the page's scripts and its style; they need no network and no build step
"""
