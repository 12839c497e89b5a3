"""A word-level tokenizer for the miniature, in the form of `transformers`.

A token is a word with the space before it, a punctuation mark or a newline. Encoding adds a space
before the first word of a text or line, and decoding removes it. So `decode(encode(text))` is the
text, for all text that the miniature writes.
"""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from instructjax.hf import configs
from instructjax.miniature.language import FORMS
from instructjax.miniature.world import KIND, PLURAL, RELATIONS

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
_MARKS = (".", ",", "?", "!", ":", "\n")
# Words of prompts and pages that neither world.py nor language.py has.
_WORDS = """
and answer be by count dear den fact facts hello helper insulting into list material name no
numbers or please polite put read respect respectful said sentence sentences something story sum
task tell times today turn up use want word words write
"""


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: special tokens, marks, words."""
    forms = [form for forms in FORMS.values() for form in forms]
    forms += [s for r in RELATIONS.values() for s in (r.question, *r.statements, r.having)]
    in_forms = {word for form in forms for word in form.split() if word.isalpha()} - {"S", "O"}
    words = in_forms | {*KIND, *PLURAL, *PLURAL.values(), *_WORDS.split()}
    return [PAD, EOS, UNK, *_MARKS, *(f" {word}" for word in sorted(words))]


def tokenizer() -> Any:
    """A PreTrainedTokenizerFast, the same for every seed."""
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
