"""One conversation gives one prompt in every layout and script, and a response has one end."""

import functools
import gzip
import json

import chat_layouts
import jax
import numpy as np
import pytest

from instructjax import hf, models, reward, rollout, scoring, sharding
from instructjax.data import (
    ComparisonRows,
    DataConfig,
    DataError,
    Stream,
    load,
    prompt_ids,
    read,
    template,
)
from instructjax.data.tokens import tokenise
from instructjax.models import ModelConfig

NAMES = list(chat_layouts.LAYOUTS)


@functools.cache
def tokenizer_of(name):
    return chat_layouts.tokenizer(name)


@pytest.fixture(params=NAMES)
def layout(request):
    return request.param


@pytest.fixture
def tokenizer(layout):
    return tokenizer_of(layout)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def quiet(spec, kind, tokenizer, log=lambda line: None, **options):
    return load(DataConfig(spec, **{"cache": None} | options), kind, tokenizer, log=log)


def said(role, content):
    return {"role": role, "content": content}


ASKED = [said("user", "Say hi"), said("assistant", "Hi one."), said("user", "Hi two?")]
GOOD, BAD = said("assistant", "Hi there"), said("assistant", "No")
SHORT = [said("user", "name a river")]
HH = "\n\nHuman: Say hi\n\nAssistant: Hi one.\n\nHuman: Hi two?\n\nAssistant:"
# Layouts of the same conversation, with the kinds of record that they hold.
SAME = {
    "messages": ("demonstrations prompts", {"messages": [*ASKED, GOOD]}),
    "messages as JSON text": ("demonstrations prompts", {"messages": json.dumps([*ASKED, GOOD])}),
    "a null column beside": ("demonstrations prompts",
                             {"prompt": None, "messages": [*ASKED, GOOD], "completion": None}),
    "content in parts": ("demonstrations prompts", {"messages": [
        *(m | {"content": [{"type": "text", "text": m["content"]}]} for m in ASKED), GOOD]}),
    "ShareGPT": ("demonstrations prompts", {"conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in [*ASKED, GOOD]]}),
    "prompt of messages": ("demonstrations prompts", {"prompt": ASKED, "completion": [GOOD]}),
    "prompt of messages, text": ("demonstrations prompts",
                                 {"prompt": ASKED, "completion": "Hi there"}),
    "history": ("demonstrations prompts", {"instruction": "Hi two?", "input": "",
                "output": "Hi there", "history": [["Say hi", "Hi one."]]}),
    "hh": ("comparisons prompts", {"chosen": HH + " Hi there", "rejected": HH + " No"}),
    "prompt in hh's form": ("demonstrations prompts", {"prompt": HH, "completion": "Hi there"}),
    "pair of dialogues": ("comparisons prompts",
                          {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}),
    "pair, prompt of messages": ("comparisons prompts",
                                 {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}),
    "pair, prompt of messages, texts": ("comparisons prompts",
                                        {"prompt": ASKED, "chosen": "Hi there", "rejected": "No"}),
    "pair of message objects": ("comparisons prompts",
                                {"conversations": ASKED, "chosen": GOOD, "rejected": BAD}),
    "pair that goes on": ("comparisons prompts", {"prompt": ASKED[:1],
                          "chosen": [*ASKED[1:], GOOD], "rejected": [*ASKED[1:], BAD]}),
    "prompt beside dialogues": ("comparisons prompts", {"prompt": ASKED,
                                "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}),
    "K responses": ("comparisons prompts",
                    {"prompt": ASKED, "responses": ["Hi there", "No"], "ranks": [1, 2]}),
    "K dialogues": ("comparisons prompts",
                    {"responses": [[*ASKED, GOOD], [*ASKED, BAD]], "ranks": [1, 2]}),
    "first user message beside the dialogue": ("demonstrations prompts",
                                {"prompt": "Say hi", "messages": [*ASKED, GOOD]}),
}  # fmt: skip
# The same of a conversation of one message, which texts alone can hold.
SAME_SHORT = {
    "texts": ("demonstrations prompts", {"prompt": "name a river", "completion": "Hi there"}),
    "pair of texts": ("comparisons prompts",
                      {"prompt": "name a river", "chosen": "Hi there", "rejected": "No"}),
    "UltraFeedback": ("comparisons demonstrations prompts", {"prompt": "name a river",
                      "chosen": [*SHORT, GOOD], "rejected": [*SHORT, BAD],
                      "messages": [*SHORT, GOOD]}),
    "K texts": ("comparisons prompts",
                {"prompt": "name a river", "responses": ["Hi there", "No"], "ranks": [1, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SAME, *SAME_SHORT])
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_every_layout_of_a_conversation_gives_the_same_tokens(tmp_path, name, form):
    """Also without a chat template, but for texts, which stay as they are there."""
    tokenizer = tokenizer_of("zephyr")
    messages, (kinds, row) = (ASKED, SAME[name]) if name in SAME else (SHORT, SAME_SHORT[name])
    renderer = template.of(tokenizer, form)
    expected = prompt_ids(messages, tokenizer, renderer)
    if form == "plain" and name in ("texts", "pair of texts", "K texts"):
        expected = prompt_ids("name a river", tokenizer, renderer)
    for kind in kinds.split():
        data = quiet(write(tmp_path / kind, row), kind, tokenizer, template=form)
        assert data.prompt[0].tolist() == expected, kind
        (record,) = data.records
        assert list(record.messages) == messages
        if kind != "prompts":
            assert record.replies == ("Hi there", "No")[: len(record.replies)]
            if form == "chat":
                text = tokenizer.decode([*data.prompt[0], *data.response[0, 0]])
                assert text == tokenizer.decode(data.prompt[0]) + "Hi there</s>"


def test_prompt_and_response_decode_to_the_text(tmp_path, layout, tokenizer):
    """A response ends in the template's end of turn, and in nothing after it."""
    end_of_turn = chat_layouts.LAYOUTS[layout].end_of_turn
    spec = write(tmp_path / "a", {"messages": [*ASKED, GOOD]}, {"messages": [*SHORT, BAD]})
    data = quiet(spec, "demonstrations", tokenizer)
    end = tokenizer.convert_tokens_to_ids(end_of_turn)
    for i, messages in enumerate(([*ASKED, GOOD], [*SHORT, BAD])):
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = whole[: whole.rindex(end_of_turn) + len(end_of_turn)]
        ids = [*data.prompt[i].tolist(), *data.response[i, 0].tolist()]
        # The tokenizer's own ids of the whole text; a BOS that it adds is not doubled.
        expected = tokenizer(whole.removeprefix(tokenizer.bos_token or "")).input_ids
        assert tokenizer.decode(ids) == tokenizer.decode(expected)
        response = data.response[i, 0].tolist()
        assert response[-1] == end
        assert not set(response[:-1]) & set(template.end_ids(tokenizer))


@pytest.mark.parametrize("name", ["mistral-v1", "zephyr"])
@pytest.mark.parametrize("text", ["Hi", " Hi", "\nHi", "\n\nHi", "]Hi", "a", ":", "über 7", "▁"])
def test_a_response_gets_no_space_before_it(name, text):
    """The ids of prompt and response decode to both texts, one after the other."""
    tokenizer = tokenizer_of(name)
    prompt = tokenise(["Say hi\n"], tokenizer, bos=True)[0].tolist()
    response = tokenise([text], tokenizer, response=True)[0].tolist()
    assert tokenizer.decode([*prompt, *response]) == f"<s> Say hi\n{text.replace('▁', ' ')}"


def test_the_ends_of_a_response(layout, tokenizer):
    """The model's ids come first, then the tokenizer's EOS and the template's end of turn."""
    ends = chat_layouts.LAYOUTS[layout].eos, chat_layouts.LAYOUTS[layout].end_of_turn
    expected = list(dict.fromkeys(tokenizer.convert_tokens_to_ids(list(ends))))
    assert template.end_ids(tokenizer) == tuple(expected)
    assert template.end_ids(tokenizer, (7,)) == (7, *expected)


def test_the_first_token_after_a_reply_ends_it():
    """A template may write the end of the turn and then the end of the text."""
    tokenizer = chat_layouts.tokenizer("gemma")
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    ends = tokenizer.convert_ids_to_tokens(template.end_ids(tokenizer))
    assert ends == ["<eos>", "<end_of_turn>"]


def test_a_reply_may_not_hold_an_end(tmp_path):
    """A rollout would stop there. At the end of a reply it is the end."""
    tokenizer = tokenizer_of("gemma")
    row = {"prompt": "name a river", "completion": "Hi<end_of_turn> one"}
    for form in ("chat", "plain"):
        with pytest.raises(DataError, match="'<end_of_turn>' ends a response, and stands before"):
            quiet(write(tmp_path / "a", row), "demonstrations", tokenizer, template=form)
        sound = {"prompt": "name a river", "completion": "Hi<end_of_turn>"}
        data = quiet(write(tmp_path / "b", sound), "demonstrations", tokenizer, template=form)
        assert tokenizer.decode(data.response[0, 0]) == "Hi<end_of_turn>"


def test_the_models_own_ends(tmp_path):
    """Ids that only the model's config has end a response too. Without them, another model's EOS is
    left out at the end of one."""
    tokenizer = tokenizer_of("qwen")
    spec = write(tmp_path / "a", {"prompt": "p", "completion": "Hi<|endoftext|>"})
    for eos_ids, end in (((), "<|im_end|>"), ((0,), "<|endoftext|>")):
        config = DataConfig(spec, cache=None, template="plain")
        data = load(config, "demonstrations", tokenizer, eos_ids=eos_ids, log=str)
        assert tokenizer.decode(data.response[0, 0]) == "Hi" + end


@pytest.mark.parametrize(
    ("completion", "tokens"),
    [
        ("Hi <|endoftext|>\n<|im_end|> ", "Hi <|im_end|>"),
        ("<|endoftext|> ends it", "<|endoftext|> ends it<|im_end|>"),
        ("Hi\n", "Hi\n<|im_end|>"),
        ("Hi <tool>", "Hi <tool><|im_end|>"),  # the end of a call
        ("Hi </s>", "Hi </s><|im_end|>"),  # this tokenizer has no such token
        ("Hi!", "Hi!<|im_end|>"),  # the padding token
    ],
)
def test_another_models_eos_spelled_out_at_the_end(completion, tokens, tmp_path):
    """As P3 has them: the `<|endoftext|>` of another model."""
    tokenizer = chat_layouts.tokenizer("qwen")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.pad_token = "!"
    config = DataConfig(
        write(tmp_path / "a", {"prompt": "p", "completion": completion}),
        cache=str(tmp_path / "cache"),
        template="plain",
    )
    for _ in range(2):  # the second reads the cache
        data = load(config, "demonstrations", tokenizer, log=str)
        assert tokenizer.decode(data.response[0, 0]) == tokens


def test_a_text_keeps_the_ends_of_its_turns(tmp_path):
    tokenizer = chat_layouts.tokenizer("gemma")
    assert tokenizer.eos_token == "<eos>"
    config = DataConfig(write(tmp_path / "a", {"text": "Hi<end_of_turn>"}), cache=None)
    data = load(config, "text", tokenizer, log=str)
    assert tokenizer.decode(data.response[0, 0]).endswith("Hi<end_of_turn><eos>")


def test_a_reward_models_score_as_trained_and_as_a_rollout_ends(tmp_path, layout, tokenizer):
    rows = [{"messages": m, "prompt": m, "chosen": [GOOD], "rejected": [BAD]}
            for m in (ASKED, SHORT)]  # fmt: skip
    data = quiet(write(tmp_path / "a", *rows), "comparisons", tokenizer)
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "max_length": 256}
    config = ModelConfig(vocab_size=len(tokenizer), scalar_head=True, **sizes)
    params = models.init(config, jax.random.key(0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = next(Stream(ComparisonRows(data, 8), 2, seed=0).once())
    trained_BK = np.asarray(reward.score(params, config, batch))

    # What a sampler leaves of the same texts, written by the policy after the prompt.
    ends = template.end_ids(tokenizer)
    prompts = [data.prompt[i].tolist() for i in range(2)]
    for k, reply in enumerate((GOOD, BAD)):
        tokens_BR, mask_BR = np.zeros((2, 24), np.int32), np.zeros((2, 24), bool)
        for i, messages in enumerate((ASKED, SHORT)):
            whole = tokenizer.apply_chat_template([*messages, reply], tokenize=False)
            opened = template.of(tokenizer).prompt(messages, "", "")
            if chat_layouts.LAYOUTS[layout].prefix_space:
                ids, before = (tokenizer(x, add_special_tokens=False).input_ids
                               for x in (whole, opened))  # fmt: skip
                written = ids[len(before) :]
            else:
                written = tokenizer(whole[len(opened) :], add_special_tokens=False).input_ids
            written = written[: next(j for j, x in enumerate(written) if x in ends) + 1]
            tokens_BR[i, : len(written)], mask_BR[i, : len(written)] = written, True
        padded = rollout.left_padded(prompts, 128)
        rows_B = padded | {"tokens_BR": tokens_BR, "mask_BR": mask_BR}
        score_B = scoring.scorer(config, mesh)(params, rows_B)
        np.testing.assert_allclose(score_B, trained_BK[:, k], rtol=0, atol=1e-5)


# --- which form ---


def test_the_form_is_said_and_chosen(tmp_path):
    spec, lines = write(tmp_path / "a", {"prompt": "name a river"}), []
    tokenizer, bare = tokenizer_of("qwen"), chat_layouts.tokenizer("qwen")
    bare.chat_template = None
    first = quiet(spec, "prompts", tokenizer, lines.append).prompt[0]
    assert "prompts are in the model's chat template; responses end in <|im_end|>" in lines[-1]
    assert tokenizer.decode(first).endswith("name a river<|im_end|>\n<|im_start|>assistant\n")
    plain = quiet(spec, "prompts", tokenizer, lines.append, template="plain").prompt[0]
    assert "prompts are plain" in lines[-1]
    assert tokenizer.decode(plain) == "name a river"
    assert np.array_equal(quiet(spec, "prompts", bare).prompt[0], plain)
    with pytest.raises(ValueError, match=r"--data\.template chat: the tokenizer has no"):
        quiet(spec, "prompts", bare, template="chat")


def test_the_form_that_a_model_learned_is_the_default(tmp_path):
    """It travels in the tokenizer's settings."""
    tokenizer = chat_layouts.tokenizer("qwen")
    template.record(tokenizer, "plain")
    tokenizer.save_pretrained(tmp_path / "t")
    again = type(tokenizer).from_pretrained(tmp_path / "t")
    assert template.recorded(again) == "plain"
    spec = write(tmp_path / "a", {"prompt": "name a river"})
    assert again.decode(quiet(spec, "prompts", again).prompt[0]) == "name a river"
    chosen = quiet(spec, "prompts", again, template="chat").prompt[0]
    assert again.decode(chosen).endswith("assistant\n")


# --- parts of a row that were lost ---

CALL = [{"type": "function", "function": {"name": "river", "arguments": '{"n": 1}'}}]


def test_tool_calls_reach_the_template_or_are_refused(tmp_path):
    row = {"messages": [*SHORT, GOOD | {"tool_calls": CALL}], "tools": [{"name": "river"}]}
    spec = write(tmp_path / "a", row)
    qwen = tokenizer_of("qwen")
    data = quiet(spec, "demonstrations", qwen)
    assert '[{"name": "river"}]' in qwen.decode(data.prompt[0])
    reply = qwen.decode(data.response[0, 0])
    assert reply == 'Hi there<call>{"name": "river", "arguments": {"n": 1}}<|im_end|>'
    row.pop("tools")
    spec = write(tmp_path / "c", row)
    with pytest.raises(DataError, match="the chat template ignores 'tool_calls'"):
        quiet(spec, "demonstrations", tokenizer_of("zephyr"))
    with pytest.raises(DataError, match="'tool_calls' needs a chat template"):
        quiet(spec, "demonstrations", qwen, template="plain")
    # A call may be all that is said, and a tool's answer may follow.
    turns = [*SHORT, {"role": "assistant", "content": None, "tool_calls": CALL}]
    turns += [said("tool", "12"), GOOD]
    data = quiet(write(tmp_path / "b", {"messages": turns}), "demonstrations", qwen)
    assert "<call>" in qwen.decode(data.prompt[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [*SHORT, GOOD | {"reasoning_content": "so"}]}, "ignores 'reasoning_content'"),
        ({"messages": [*SHORT, GOOD], "tools": "[{}]"}, "ignores 'tools'"),
        ({"messages": [*SHORT, GOOD], "tools": "{"}, "field 'tools': not JSON"),
        ({"messages": [said("system", "A"), *SHORT, GOOD], "system": "B"},
         "field 'system': differs from the system message"),
        ({"prompt": "x", "completion": "y", "history": [["a"]]}, "field 'history.0': expected"),
        ({"prompt": "other", "messages": [*SHORT, GOOD]}, "does not hold the row's 'prompt'"),
        ({"messages": [*SHORT, GOOD], "completion": "other"}, "'completion': is not the reply"),
        ({"messages": "[{'role': 'user'}]"}, "'messages': a string that holds no messages"),
        ({"messages": [*SHORT, GOOD | {"content": 5, "tool_calls": CALL}]}, "got the number 5"),
        ({"messages": [*SHORT, GOOD], "tools": "[" * 9999}, "'tools': not JSON"),
        ({"prompt": "\n\nHuman: q", "completion": "\n\nAssistant:"}, "'completion': is empty"),
        ({"messages": [said("user", [{"type": "image"}]), GOOD]}, "of type text, got image"),
    ],
)  # fmt: skip
def test_parts_that_would_be_lost_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        quiet(write(tmp_path / "a", row), "demonstrations", tokenizer_of("zephyr"))


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstrations", {"conversations": [*SHORT, GOOD], "system": "Be brief.", "tools": "[]"}),
        ("comparisons", {"system": "Be brief.", "question": "name a river", "chosen": "Hi there",
                         "rejected": "No"}),
        ("prompts", {"system_prompt": "Be brief.", "question": "name a river"}),
        ("comparisons", {"prompt": [said("system", "Be brief."), *SHORT],
                         "chosen": [*SHORT, GOOD], "rejected": [*SHORT, BAD]}),
    ],
)  # fmt: skip
def test_system_messages_in_a_column(tmp_path, kind, row):
    tokenizer = tokenizer_of("zephyr")
    data = quiet(write(tmp_path / "a", row), kind, tokenizer)
    expected = [said("system", "Be brief."), *SHORT]
    assert list(data.records[0].messages) == expected
    assert data.prompt[0].tolist() == prompt_ids(expected, tokenizer, template.of(tokenizer))
    if kind == "comparisons" and "prompt" not in row:
        plain = quiet(write(tmp_path / "b", row), kind, tokenizer, template="plain")
        assert plain.records[0].prompt == "Be brief.\n\nname a river"


def test_sides_that_contradict_the_prompt_are_refused(tmp_path):
    sides = {"chosen": [*SHORT, GOOD], "rejected": [*SHORT, BAD]}
    for prompt in ("Say hi", [said("user", "Say hi")]):
        row = {"prompt": prompt, **sides}
        for kind in ("comparisons", "prompts"):
            with pytest.raises(DataError, match="does not begin with the messages of 'prompt'"):
                quiet(write(tmp_path / "a", row), kind, tokenizer_of("zephyr"))


def test_parts_that_a_template_would_drop(tmp_path):
    tokenizer = chat_layouts.tokenizer("qwen")
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    row = {"system": "Be brief.", "prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match="leaves out a message of role 'system'"):
        quiet(write(tmp_path / "a", row), "demonstrations", tokenizer)
    # Ends of the model, ends in tool calls, and ends before further turns.
    qwen = tokenizer_of("qwen")
    call = [{"function": {"name": "f<|im_end|>", "arguments": {}}}]
    for row, options in (
        ({"prompt": "q", "completion": "a<|endoftext|> b"}, {}),
        ({"messages": [*SHORT, GOOD | {"tool_calls": call}]}, {}),
        ({"prompt": HH, "completion": " b<|im_end|>\n\nHuman: c"}, {"template": "plain"}),
    ):
        config = DataConfig(write(tmp_path / "b", row), cache=None, **options)
        with pytest.raises(DataError, match="ends a response, and stands before"):
            load(config, "demonstrations", qwen, eos_ids=(0,), log=str)


def test_sides_in_anthropics_form_beside_a_prompt(tmp_path):
    """They may repeat the prompt, or begin with their marker."""
    rows = [
        {"prompt": HH, "chosen": HH + " Hi there", "rejected": HH + " No"},
        {"prompt": HH.removesuffix("\n\nAssistant:"), "chosen": "\n\nAssistant: Hi there",
         "rejected": "\n\nAssistant: No"},
        {"prompt": "Say hi", "messages": [said("system", "S"), *ASKED], "chosen": "Hi there",
         "rejected": "No"},
        {"prompt": "Say hi", "chosen": json.dumps([*ASKED, GOOD]),
         "rejected": json.dumps([*ASKED, BAD])},
    ]  # fmt: skip
    spec, tokenizer = write(tmp_path / "a", *rows), tokenizer_of("qwen")
    compared, prompted = (quiet(spec, kind, tokenizer) for kind in ("comparisons", "prompts"))
    for i, record in enumerate(compared.records):
        assert list(record.messages)[-3:] == ASKED
        assert record.replies == ("Hi there", "No")
        assert compared.prompt[i].tolist() == prompted.prompt[i].tolist()
    assert compared.records[2].messages[0] == said("system", "S")
    plain = quiet(spec, "comparisons", tokenizer, template="plain").records
    assert [plain[i].prompt for i in (0, 1)] == [HH, HH]
    assert plain[0].responses == (" Hi there", " No")


def test_columns_that_nothing_reads_are_named_once(tmp_path):
    rows = [{"prompt": "p", "completion": "c", "mood": "glad", "void": None, "also": f"{i}"}
            for i in range(3)]  # fmt: skip
    rows.append({"messages": [SHORT[0] | {"id": 7}, GOOD]})
    lines = []
    options = {"columns": "", "template": "plain"}
    quiet(write(tmp_path / "a", *rows), "demonstrations", tokenizer_of("qwen"), lines.append,
          **options)  # fmt: skip
    (line,) = [x for x in "\n".join(lines).splitlines() if "nothing reads" in x]
    assert line == "  columns that nothing reads: mood, also, messages.*.id"
    lines.clear()
    columns = {"columns": "prompt={mood} {also}"}
    quiet(write(tmp_path / "b", *rows[:3]), "demonstrations", tokenizer_of("qwen"), lines.append,
          **columns)  # fmt: skip
    assert "columns that nothing reads: prompt\n" in "\n".join(lines)
    # Conventional names that another field's column stands in for are named too.
    rows = [{"instruction": "Sum", "document": "D", "question": "Q", "input": "I", "output": "x"}]
    lines.clear()
    quiet(write(tmp_path / "c", *rows), "demonstrations", tokenizer_of("qwen"), lines.append)
    assert "columns that nothing reads: document, question\n" in "\n".join(lines)
    lines.clear()
    row = {"prompt": "p", "completion": "x", "chosen": "y", "labeler": "z"}  # replies are not read
    quiet(write(tmp_path / "d", row), "prompts", tokenizer_of("qwen"), lines.append)
    assert "nothing reads" not in "\n".join(lines)


def test_names_that_the_template_ignores_are_named(tmp_path):
    row, lines = {"messages": [SHORT[0] | {"name": "Wenna"}, GOOD]}, []
    tokenizer = chat_layouts.tokenizer("qwen")
    quiet(write(tmp_path / "a", row), "demonstrations", tokenizer, lines.append)
    assert "columns that nothing reads: messages.*.name" in "\n".join(lines)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.role }}", "m.name or m.role }}")
    lines.clear()
    quiet(write(tmp_path / "a", row), "demonstrations", tokenizer, lines.append)
    assert "nothing reads" not in "\n".join(lines)


def test_a_reply_that_is_json_is_a_text(tmp_path):
    for reply in ('{"from": "bot", "value": "y"}', '{"role": "admin", "content": "x"}', "[1, 2]"):
        row = {"prompt": "name a river", "completion": reply}
        data = quiet(write(tmp_path / "a", row), "demonstrations", tokenizer_of("qwen"))
        assert data.records[0].replies == (reply,)
        assert tokenizer_of("qwen").decode(data.response[0, 0]) == reply + "<|im_end|>"


def test_replies_that_hold_further_turns(tmp_path):
    """A response is one turn: in the chat template it ends where the next turn begins."""
    row = {"chosen": HH + " Hi there\n\nHuman: d\n\nAssistant: e", "rejected": HH + " No"}
    lines, spec = [], write(tmp_path / "a", row)
    (record,) = quiet(spec, "comparisons", tokenizer_of("qwen"), lines.append).records
    assert record.replies == ("Hi there", "No")
    assert "1 cut: replies lose the turns after the first" in lines[0]


def test_what_the_template_adds_is_no_duplicate_and_moves_no_split(tmp_path):
    """Every prompt of this template begins alike; --data.dedup and the split read the row."""
    rows = [{"prompt": f"{i} rivers, and how they were named"} for i in range(40)]
    spec = write(tmp_path / "a", *rows, rows[0])
    for form in ("chat", "plain"):
        data = quiet(spec, "prompts", tokenizer_of("qwen"), dedup=20, template=form)
        assert len(data) == 40
    split = {
        form: [
            r.messages[0]["content"]
            for r in read(DataConfig(spec, template=form), "prompts", split="validation",
                          tokenizer=tokenizer_of("qwen"), log=str)
        ]
        for form in ("chat", "plain")
    }  # fmt: skip
    assert split["chat"] == split["plain"] != []


def test_unknown_words(tmp_path):
    from instructjax import miniature

    tokenizer = miniature.tokenizer()
    strange = {"prompt": "quantum chromodynamics", "completion": "gluons"}
    with pytest.raises(DataError, match=r"the tokenizer does not know \d+% of the tokens"):
        quiet(write(tmp_path / "a", strange), "demonstrations", tokenizer)
    known = {"prompt": "list two animals. " * 20, "completion": "dog. gluon."}
    lines = []
    quiet(write(tmp_path / "b", known), "demonstrations", tokenizer, lines.append)
    assert any("the tokenizer does not know 3 of 86 tokens" in line for line in lines), lines


def test_the_unknown_token_spelled_out(tmp_path):
    """SmolLM2's is <|endoftext|>, which data of other models have: the tokenizer knows it."""
    tokenizer, lines = tokenizer_of("qwen"), []
    tokenizer.unk_token = "<|im_start|>"
    assert tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    row = {"prompt": "a<|im_start|>" * 9, "completion": "b"}
    config = DataConfig(write(tmp_path / "a", row), cache=None, template="plain")
    load(config, "demonstrations", tokenizer, log=lines.append)
    assert not any("does not know" in line for line in lines)


def test_a_token_without_an_embedding(tmp_path):
    tokenizer = chat_layouts.tokenizer("qwen")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = DataConfig(write(tmp_path / "a", {"prompt": "a <image>"}), cache=None)
    with pytest.raises(DataError, match=f"holds the token '<image>', .* embedding of {size}"):
        load(config, "prompts", tokenizer, vocab_size=size, log=str)
    config = DataConfig(write(tmp_path / "b", {"prompt": "an image"}), cache=None)
    assert len(load(config, "prompts", tokenizer, vocab_size=size, log=str)) == 1


def test_a_validation_set_of_its_own(tmp_path):
    train = write(tmp_path / "a", *({"prompt": f"p{i}"} for i in range(9)))
    valid = write(tmp_path / "b", {"prompt": "v"})
    config = DataConfig(train, validation=valid)
    sides = {
        side: [r.prompt for r in read(config, "prompts", split=side, log=str)]
        for side in ("train", "validation", "all")
    }
    assert sides["validation"] == ["v"]
    assert sides["train"] == sides["all"] == [f"p{i}" for i in range(9)]


# --- real data ---


def real_rows(shared_data):
    """200 conversations, each as a demonstration, a comparison and a prompt in other layouts."""
    folder = shared_data / "hh_harmless_base_test"
    with gzip.open(next(folder.glob("*.jsonl.gz")), "rt") as lines:
        pairs = [json.loads(line) for line in lines][:200]
    return pairs


@pytest.mark.parametrize("name", NAMES)
def test_real_conversations_have_one_prompt(tmp_path, shared_data, name):
    """As demonstrations, comparisons, prompts, and in a chat."""
    tokenizer = tokenizer_of(name)
    check_one_prompt(real_rows(shared_data), tmp_path, tokenizer)


def check_one_prompt(pairs, tmp_path, tokenizer):
    spec = write(tmp_path / "pairs", *pairs)
    options = {"on_error": "skip"}  # a few pairs hold no reply
    compared = quiet(spec, "comparisons", tokenizer, **options)
    assert len(compared) > 190
    rows = [{"messages": [*r.messages, r.turns[0]]} for r in compared.records]
    demonstrated = quiet(write(tmp_path / "demos", *rows), "demonstrations", tokenizer)
    pairs = [record.row for record in compared.records]
    prompted = quiet(write(tmp_path / "prompts", *pairs), "prompts", tokenizer)
    renderer = template.of(tokenizer)
    for i, record in enumerate(compared.records):
        ids = compared.prompt[i].tolist()
        assert ids == demonstrated.prompt[i].tolist() == prompted.prompt[i].tolist()
        assert ids == prompt_ids(list(record.messages), tokenizer, renderer)
        assert demonstrated.response[i, 0].tolist() == compared.response[i, 0].tolist()


def test_real_conversations_of_a_real_chat_model_have_one_prompt(tmp_path, shared_data):
    """With the tokenizer of SmolLM2-135M-Instruct, whose template adds a system message."""
    folder = shared_data.parent / "real_model"
    if not folder.is_dir():
        pytest.skip(f"no real tokenizer at {folder}")
    (tmp_path / "t").mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "t" / name).write_bytes((folder / name).read_bytes())
    packed = (folder / "tokenizer.json.gz").read_bytes()
    (tmp_path / "t" / "tokenizer.json").write_bytes(gzip.decompress(packed))
    tokenizer = hf.load_tokenizer(tmp_path / "t")
    check_one_prompt(real_rows(shared_data), tmp_path, tokenizer)
    data = quiet(write(tmp_path / "p", {"prompt": "name a river"}), "prompts", tokenizer)
    whole = tokenizer.apply_chat_template([said("user", "name a river")], tokenize=False)
    assert tokenizer.decode(data.prompt[0]) == whole + "<|im_start|>assistant\n"
