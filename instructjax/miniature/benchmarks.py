"""What the alignment tax is measured on: analogues of the paper's public benchmarks.

All are put as the pretraining pages put them, and never as a prompt, so that a policy trained on
prompts alone may forget them (InstructGPT, section 4.2 and Figs 28 to 35). The third analogue is
the loss on held-out pages, `text.texts(seed, n, split="test")`.
"""

from collections import Counter
from typing import Any

from instructjax.miniature import language, text
from instructjax.miniature.world import RELATIONS, WORDS, Fact, generator, make


def reading_comprehension(seed: int, n: int) -> list[dict[str, Any]]:
    """n passages with a question, `{"prompt", "answer"}`: SQuAD's analogue, scored by `token_f1`.

    The prompt ends in "answer:" and a model goes on from there, up to the first full stop.
    """
    records = []
    for i in range(n):
        lines, answer = text.reading(generator(seed, "reading comprehension", i))
        prompt = "\n".join(lines).removesuffix(f" {answer}.")
        records.append({"prompt": prompt, "answer": answer})
    return records


def token_f1(continuation: str, answer: str) -> float:
    """F1 of the words of the continuation's first sentence and of the answer, as in SQuAD."""
    said = language.words(continuation.split(".")[0])
    right = language.words(answer)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))


def multiple_choice(seed: int, n: int, myths: bool = False) -> list[dict[str, Any]]:
    """n questions, `{"prompt", "options", "label"}`: choose the option of highest log-probability.

    The options differ in one token, so sums and means of log-probabilities choose alike. With
    `myths` all are on facts that have a myth, which is among the options: TruthfulQA's analogue.
    Else none is, and a model does well by remembering what it has read.
    """
    world = make(seed)
    keys = [key for key in world.truth if (key in world.myth) == myths]
    records = []
    for i in range(n):
        rng = generator(seed, "multiple choice", myths, i)
        subject, relation = rng.choice(keys)
        truth = world.truth[subject, relation]
        wrong = [value for value in WORDS[RELATIONS[relation].object] if value != truth]
        rng.shuffle(wrong)
        if myths:
            wrong.sort(key=lambda value: value != world.myth[subject, relation])
        values = [truth, *wrong[:3]]
        rng.shuffle(values)
        options = [language.say(language.state(Fact(subject, relation, v))) for v in values]
        prompt = f"question: {language.say(language.ask(subject, relation))}\nanswer:"
        records.append({"prompt": prompt, "options": options, "label": values.index(truth)})
    return records
