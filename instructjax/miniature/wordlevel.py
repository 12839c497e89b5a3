"""A word-level tokenizer for the miniature, as `transformers` knows tokenizers.

A token is a word with the space before it, a mark of punctuation, or a newline. The first word of
a text or a line has no space before it and gets one, which decoding takes away again; so whatever
the miniature writes comes back from `decode(encode(text))` letter by letter.
"""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from instructjax.hf import configs
from instructjax.miniature.language import FORMS
from instructjax.miniature.world import KIND, PLURAL, RELATIONS

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
_MARKS = (".", ",", "?", "!", ":", "\n")
# The words of prompts and pages that are no words of the world or of language.py.
_WORDS = """
and answer be by count dear den fact facts hello helper insulting into list material name no
numbers or please polite put read respect respectful said sentence sentences something story sum
task tell times today turn up use want word words write
"""


def vocabulary() -> list[str]:
    """Every token, in the order of the ids: the special ones, marks, then words."""
    forms = [form for forms in FORMS.values() for form in forms]
    forms += [s for r in RELATIONS.values() for s in (r.question, *r.statements, r.having)]
    spoken = {word for form in forms for word in form.split() if word.isalpha()} - {"S", "O"}
    words = spoken | {*KIND, *PLURAL, *PLURAL.values(), *_WORDS.split()}
    return [PAD, EOS, UNK, *_MARKS, *(f" {word}" for word in sorted(words))]


def tokenizer() -> Any:
    """A PreTrainedTokenizerFast, the same for every seed; its `save_pretrained` writes it."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Replace(Regex(r"(?<![^\n])(?=[A-Za-z])"), " ")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\s|[^A-Za-z\s]"), "isolated")
    core.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    return configs.transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
