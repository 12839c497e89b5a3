"""Tokenizers with the chat templates that people use, trained on a few words."""

from typing import NamedTuple

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = ["Hi one. Say hi to two", "name a river, please", "user assistant system\nmodel\n\n"] * 9

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper<|im_end|>\n"
    "{% endif %}"
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Layout(NamedTuple):
    """What a family's chat model has."""

    template: str
    special: list[str]  # tokens
    eos: str  # of the tokenizer
    end_of_turn: str
    bos: str | None = None
    prefix_space: bool = False  # whether the tokenizer puts a space before a text


LLAMA3_TOKENS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
LAYOUTS = {
    "llama-3": Layout(
        LLAMA3, LLAMA3_TOKENS.split(), "<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>"
    ),
    "qwen": Layout(
        QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|im_end|>"
    ),
    "gemma": Layout(
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "<end_of_turn>",
        "<bos>",
    ),
    "mistral-v1": Layout(MISTRAL, ["<s>", "</s>"], "</s>", "</s>", "<s>", prefix_space=True),
    "zephyr": Layout(ZEPHYR, ["<s>", "</s>"], "</s>", "</s>", "<s>", prefix_space=True),
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a layout; one with a prefix space is in the form of Llama-2's."""
    layout = LAYOUTS[name]
    special, size = layout.special, 340
    if layout.prefix_space:
        space = "\u2581"
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
        back = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        core.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
        special = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256))]
        size, alphabet = 420, ["\n", space]
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if layout.bos is not None:
        core.post_processor = processors.TemplateProcessing(
            f"{layout.bos} $A", special_tokens=[(layout.bos, core.token_to_id(layout.bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=layout.bos, eos_token=layout.eos
    )
    made.chat_template = layout.template
    return made
