"""Tokens and their cache, limits, splits, TFDS and Hugging Face sets, and the commands."""

import datetime
import errno
import json
import subprocess
import sys
from pathlib import Path

import chat_layouts
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from instructjax import ranges
from instructjax.data import DataConfig, DataError, check, load, read, tokens
from instructjax.data.__main__ import cli
from instructjax.data.columns import spelled
from instructjax.data.tokens import tokenise

EOS = 256


def byte_tokenizer(**options):
    """A token for each byte, by its value, and <eos>."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    names = {bytes([b]).decode("latin-1"): b for b in range(256)}
    # ByteLevel writes unprintable bytes as the letters from 256 on, in order.
    odd = sorted(set(letters) - set(names))
    missing = sorted(b for name, b in names.items() if name not in letters)
    vocab = {n: b for n, b in names.items() if n in letters} | dict(zip(odd, missing, strict=True))
    core = Tokenizer(models.BPE({**vocab, "<eos>": EOS}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if options.pop("adds_bos", False):
        core.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", EOS)]
        )
        options["bos_token"] = "<eos>"
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<eos>"} | options)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def quiet(spec, kind, tokenizer, *, context=None, split="all", lines=None, **options):
    config = DataConfig(spec, **{"cache": None} | options)
    log = (lambda line: None) if lines is None else lines.append
    return load(config, kind, tokenizer, context=context, split=split, log=log)


def ids(text):
    return list(text.encode())


# --- tokens ---


def test_prompt_and_response_are_tokenised_apart(tmp_path, tokenizer):
    """Every complete response ends in one EOS, also where the row spells it out."""
    rows = [{"prompt": "pé\n", "completion": c} for c in ("é ", "x<eos>", "x<eos>\n")]
    data = quiet(write(tmp_path / "a", *rows), "demonstrations", tokenizer)
    assert data.prompt[0].tolist() == ids("pé\n")
    responses = [data.response[i, 0].tolist() for i in range(3)]
    assert responses == [[*ids("é "), EOS], [*ids("x"), EOS], [*ids("x"), EOS]]
    assert data.response.ids.dtype == data.prompt.ids.dtype == np.int32


def test_comparisons_keep_k_and_ranks(tmp_path, tokenizer):
    rows = [
        {"prompt": "p", "responses": ["a", "bb", "c"], "ranks": [2, 1, 2]},
        {"prompt": "q", "chosen": "d", "rejected": "ee"},
    ]
    data = quiet(write(tmp_path / "a", *rows), "comparisons", tokenizer)
    assert data.ranks.tolist() == [[2, 1, 2], [1, 2, 0]]
    assert data.response.lengths.tolist() == [[2, 3, 2], [2, 3, 0]]
    assert data.response[1, 1].tolist() == [*ids("ee"), EOS]


def test_bos_begins_prompts_and_texts_where_the_tokenizer_wants_it(tmp_path):
    tokenizer = byte_tokenizer(adds_bos=True)
    spec = write(tmp_path / "a", {"prompt": "p", "completion": "c", "text": "t"})
    data = quiet(spec, "demonstrations", tokenizer)
    assert (data.prompt[0].tolist(), data.response[0, 0].tolist()) == ([EOS, *ids("p")], [99, EOS])
    assert quiet(spec, "text", tokenizer).response[0, 0].tolist() == [EOS, *ids("t"), EOS]
    spec = write(tmp_path / "b", {"prompt": "<eos>p"})  # as chat templates spell it
    assert quiet(spec, "prompts", tokenizer).prompt[0].tolist() == [EOS, *ids("p")]
    like_gpt2 = byte_tokenizer(bos_token="<eos>")  # has a BOS, and does not add it
    assert quiet(spec, "prompts", like_gpt2).prompt[0].tolist() == [EOS, *ids("p")]
    spec = write(tmp_path / "c", {"prompt": "p"})
    assert quiet(spec, "prompts", like_gpt2).prompt[0].tolist() == ids("p")


def test_a_tokenizer_saved_with_truncation_does_not_truncate(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    data = quiet(write(tmp_path / "a", {"text": "long text"}, "b"), "text", tokenizer)
    assert data.response.lengths[:, 0].tolist() == [10, 2]


def test_no_eos_is_an_error(tmp_path):
    spec = write(tmp_path / "a", {"text": "t"})
    with pytest.raises(DataError, match="has no EOS token"):
        quiet(spec, "text", byte_tokenizer(eos_token=None))


def test_the_tokenizers_own_chat_template(tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = quiet(write(tmp_path / "a", {"messages": turns}), "demonstrations", tokenizer)
    assert data.prompt[0].tolist() == ids("<user>hi\n<assistant>")
    assert data.response[0, 0].tolist() == [*ids("yo"), EOS]  # one EOS, and no line break after


# --- the cache ---


def test_the_cache(tmp_path, tokenizer, monkeypatch):
    spec = write(tmp_path / "a", *({"prompt": f"p{i}", "completion": "c" * i} for i in range(1, 9)))
    options = {"cache": str(tmp_path / "cache")}
    first = quiet(spec, "demonstrations", tokenizer, **options)
    files = sorted((tmp_path / "cache" / "tokens").iterdir())
    assert [f.suffix for f in files] == [".tokens", ".tokens"]  # and no partly written file
    calls, encode = [], tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *a: calls.append(a[0]) or encode(*a))

    def again(lines=None, tokenizer=tokenizer, spec=spec):
        calls.clear()
        data = quiet(spec, "demonstrations", tokenizer, lines=lines, **options)
        for name in ("prompt", "response"):
            left, right = getattr(first, name), getattr(data, name)
            assert np.array_equal(left.ids, right.ids) == (spec.endswith("a"))
            assert np.array_equal(left.start, right.start)
            assert np.array_equal(left.stop, right.stop)
        return len(calls)

    assert again() == 0
    for torn in (lambda b: b[: len(b) // 2], lambda b: b[:-40], lambda b: b"", flip_a_bit):
        for file in files:
            file.write_bytes(torn(file.read_bytes()))
        lines = []
        assert again(lines) == 2
        assert sum("is damaged" in line for line in lines) == 2
        assert again() == 0
    # Other texts and another tokenizer have other keys.
    other = spec.replace("/a", "/b")
    rows = ({"prompt": f"P{i}", "completion": "d" * i} for i in range(1, 9))
    write(tmp_path / "b", *rows)
    assert again(spec=other) == 2
    changed = byte_tokenizer()
    changed.add_tokens(["zzz"])
    assert again(tokenizer=changed) == 2
    assert again() == 0


def flip_a_bit(data):
    """Damages the last token id and leaves the rest of the file intact."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def test_any_damage_to_the_cache_is_noticed(tmp_path, tokenizer):
    """Every byte that differs, every length, another text's file: the tokens are made again."""
    texts, cache, lines = ["ab", "", "c"], str(tmp_path), []
    first = tokenise(texts, tokenizer, cache=cache, log=lines.append)
    (file,) = (tmp_path / "tokens").iterdir()
    good = file.read_bytes()
    other = tokenise(["zz", "", "z"], tokenizer, cache=cache, log=lines.append)
    (others,) = (name for name in (tmp_path / "tokens").iterdir() if name != file)
    assert not np.array_equal(first.ids, other.ids)
    damaged = [others.read_bytes(), b"", b"PK\x03\x04", b"x" * 10_000, good + b"\0"]
    damaged += [good[:length] for length in range(0, len(good), 5)]
    damaged += [
        good[:at] + bytes([value]) + good[at + 1 :]
        for at in range(len(good))
        for value in {good[at] ^ 1, good[at] ^ 128, 0, 255} - {good[at]}
    ]
    assert lines == []
    for data in damaged:
        file.write_bytes(data)
        again = tokenise(texts, tokenizer, cache=cache, log=lines.append)
        assert again.ids.tolist() == first.ids.tolist()
        assert again.stop.tolist() == first.stop.tolist()
        assert file.read_bytes() == good
    assert len(lines) == len(damaged)
    assert set(lines) == {f"{file} is damaged: tokenising again"}


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, tokenizer, monkeypatch):
    """One line says why, and no part of a file stays."""
    spec = write(tmp_path / "a", {"prompt": "p", "completion": "c"})
    (tmp_path / "file").write_text("")

    def said(cache):
        lines = []
        data = quiet(spec, "demonstrations", tokenizer, cache=str(cache), lines=lines)
        assert data.response[0, 0].tolist() == [*ids("c"), EOS]
        return [line for line in lines if "tokens are not" in line or "tokenising" in line]

    assert said(tmp_path / "good") == []
    for file in (tmp_path / "good" / "tokens").iterdir():
        file.unlink()
        file.mkdir()  # a folder in its place
    for cache, reason in (
        (tmp_path / "good", "Is a directory"),
        (tmp_path / "file", "Not a directory"),
        ("~nouser/cache", "no such user"),
        (f"{tmp_path}/a\0b", "embedded null byte"),
        (f"{tmp_path}/file/\udcff", "Not a directory"),
    ):
        (line,) = said(cache)
        cache = str(cache).replace("\0", "\\x00").replace("\udcff", "\\udcff")
        assert line == f"--data.cache {cache}: tokens are not cached: {reason}"
    assert not any(file.is_file() for file in (tmp_path / "good" / "tokens").iterdir())

    def full(path, data):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (line,) = said(tmp_path / "full")
    assert line.endswith("tokens are not cached: No space left on device")
    assert list((tmp_path / "full" / "tokens").iterdir()) == []
    tokenise(["x"], tokenizer, cache=str(tmp_path / "good"), log=lambda line: None)
    monkeypatch.undo()
    tokenise(["x"], tokenizer, cache=str(tmp_path / "good"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: full(path, b""))
    lines = []
    tokenise(["x"], tokenizer, cache=str(tmp_path / "good"), log=lines.append)
    assert len(lines) == 1
    assert lines[0].endswith("cannot be read (No space left on device): tokenising again")


def test_long_inputs_are_tokenised_in_order(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 10)
    texts = ["a" * n for n in (3, 25, 1, 9, 9)]
    spans = tokenise(texts, tokenizer)
    assert [bytes(spans[i].tolist()).decode() for i in range(5)] == texts


# --- limits ---

DEMOS = [{"prompt": "p" * p, "completion": "c" * c} for p, c in ((2, 2), (9, 2), (2, 9), (9, 9))]


def test_limits_drop(tmp_path, tokenizer):
    spec, lines = write(tmp_path / "a", *DEMOS), []
    data = quiet(spec, "demonstrations", tokenizer, max_prompt=4, max_response=5, lines=lines)
    assert [r.where[-2:] for r in data.records] == [":1"]
    assert data.response[0, 0].tolist() == [99, 99, EOS]
    assert "  2 dropped: prompts over 4 tokens (--data.max_prompt) (first: " in lines[0]
    assert "  1 dropped: response too long (--data.max_response" in lines[0]
    assert "4 rows read" in lines[0]
    assert lines[0].endswith("  1 demonstrations")
    # EOS counts: two letters and EOS are 3 tokens
    assert len(quiet(spec, "demonstrations", tokenizer, max_response=3)) == 2
    with pytest.raises(DataError, match=r"no demonstrations are left\n(.|\n)*4 dropped: response"):
        quiet(spec, "demonstrations", tokenizer, max_response=2)


def test_limits_truncate(tmp_path, tokenizer):
    """A prompt keeps its end; a response that is cut keeps its start and has no EOS."""
    rows = [{"prompt": "012345", "completion": "abcdef"}, {"prompt": "01", "completion": "ab"}]
    lines = []
    data = quiet(write(tmp_path / "a", *rows), "demonstrations", tokenizer, max_prompt=4,
                 max_response=3, overlong="truncate", lines=lines)  # fmt: skip
    assert [data.prompt[i].tolist() for i in (0, 1)] == [ids("2345"), ids("01")]
    assert [data.response[i, 0].tolist() for i in (0, 1)] == [ids("abc"), [*ids("ab"), EOS]]
    assert "1 cut: prompts over 4 tokens" in lines[0]
    assert "1 cut: responses too long: they lose their end and EOS" in lines[0]


def test_a_truncated_prompt_keeps_its_bos(tmp_path):
    """Where the tokenizer adds one; the limit counts it. The other prompts stay as they are."""
    spec = write(tmp_path / "a", {"prompt": "012345"}, {"prompt": "01"}, {"prompt": "6789"})
    cut = {"max_prompt": 4, "overlong": "truncate"}
    data = quiet(spec, "prompts", byte_tokenizer(adds_bos=True), **cut)
    prompts = [data.prompt[i].tolist() for i in range(3)]
    assert prompts == [[EOS, *ids("345")], [EOS, *ids("01")], [EOS, *ids("789")]]
    data = quiet(spec, "prompts", byte_tokenizer(bos_token="<eos>"), **cut)  # adds none
    assert data.prompt[0].tolist() == ids("2345")


def test_the_context_holds_prompt_and_response(tmp_path, tokenizer):
    spec = write(tmp_path / "a", {"prompt": "p" * 6, "completion": "abc"})
    assert len(quiet(spec, "demonstrations", tokenizer, context=10)) == 1
    with pytest.raises(DataError, match="no demonstrations are left"):
        quiet(spec, "demonstrations", tokenizer, context=9)
    cut = quiet(spec, "demonstrations", tokenizer, context=9, overlong="truncate")
    assert cut.response[0, 0].tolist() == ids("abc")
    message = r"1 dropped: prompts that leave no room for a response in a context of 6 .*a:1"
    for kind in ("demonstrations", "prompts"):
        with pytest.raises(DataError, match=message):
            quiet(spec, kind, tokenizer, context=6)
    spec, lines = write(tmp_path / "b", {"prompt": "p" * 6}, {"prompt": "p"}), []
    data = quiet(spec, "prompts", tokenizer, context=6, on_error="skip", lines=lines)
    assert [r.where[-2:] for r in data.records] == [":2"]
    assert "1 dropped: prompts that leave no room for a response in a context of 6" in lines[0]
    # A prompt that is cut leaves room for the whole response, or keeps half of the context.
    options = {"context": 6, "overlong": "truncate"}
    rows = [{"prompt": "0123456", "completion": c} for c in ("ab", "abcdefgh")]
    data = quiet(write(tmp_path / "c", *rows), "demonstrations", tokenizer, **options)
    assert [data.prompt[i].tolist() for i in (0, 1)] == [ids("456"), ids("456")]
    assert [data.response[i, 0].tolist() for i in (0, 1)] == [[*ids("ab"), EOS], ids("abc")]


def test_one_long_response_drops_its_whole_comparison(tmp_path, tokenizer):
    rows = [{"prompt": "p", "responses": ["a", "b", "c" * n], "ranks": [1, 2, 2]} for n in (1, 9)]
    spec = write(tmp_path / "a", *rows)
    assert len(quiet(spec, "comparisons", tokenizer, max_response=5)) == 1
    cut = quiet(spec, "comparisons", tokenizer, max_response=5, overlong="truncate")
    assert cut.response.lengths.tolist() == [[2, 2, 2], [2, 2, 5]]


def test_a_response_of_eos_alone_is_empty(tmp_path, tokenizer):
    spec = write(tmp_path / "a", {"prompt": "p", "completion": "<eos>"})
    with pytest.raises(DataError, match=r"a:1: field 'response': has no tokens"):
        quiet(spec, "demonstrations", tokenizer)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_prompt": 0}, "--data.max_prompt 0"),
        ({"max_response": -1}, "--data.max_response -1"),
        ({"dedup": -1}, "--data.dedup"),
        ({"validation": 1.0}, "--data.validation"),
    ],
)
def test_flags_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        ranges.check(DataConfig(**option), "data.")


# --- deduplication and splits ---


def test_prompts_with_a_long_common_prefix_are_dropped(tmp_path):
    prompts = ["translate: cat", "translate: car", "translate", "translate", "summarise: cat"]
    spec, lines = write(tmp_path / "a", *({"prompt": p} for p in prompts)), []
    kept = read(DataConfig(spec, dedup=12), "prompts", log=lines.append)
    assert [r.prompt for r in kept] == ["translate: cat", "translate", "summarise: cat"]
    assert "2 dropped: an earlier prompt begins with the same 12 characters" in lines[0]
    assert len(read(DataConfig(spec), "prompts", log=lines.append)) == 5


def test_rows_by_the_value_of_a_column(tmp_path):
    kinds = ("chat", "open qa", None, 3.0, True, "chat")
    rows = [{"prompt": f"p{i}", "of": {"kind": kind}} for i, kind in enumerate(kinds)]
    spec = write(tmp_path / "a", *rows)

    def kept(**options):
        lines: list[str] = []
        records = read(DataConfig(spec, **options), "prompts", log=lines.append)
        return [record.prompt for record in records], "\n".join(lines)

    prompts, said = kept(only="of.kind=chat")
    assert prompts == ["p0", "p5"]
    assert "6 rows read" in said
    assert "4 left out: by --data.only of.kind=chat" in said
    assert kept(without="of.kind=chat|3")[0] == ["p1", "p2", "p4"]
    assert kept(only="of.kind=open qa|null|true")[0] == ["p1", "p2", "p4"]
    assert kept(only="of.kind=chat|3", without="of.kind=chat")[0] == ["p3"]
    prompts, said = kept(without="of.kind=open qa")
    assert len(prompts) == 5
    assert "no row has" not in said
    assert "nothing reads" not in said
    prompts, said = kept(without="of.kind=chatt|chat")
    assert len(prompts) == 4
    assert "no row has 'chatt', which --data.without of.kind=chatt|chat names" in said
    assert "no row has 'chat'" not in said
    with pytest.raises(DataError, match="no prompts are left"):
        kept(only="of.kind=chatt")
    for flag in ("only", "without"):
        with pytest.raises(DataError, match=rf"a:1: field 'kind': is missing, and --data\.{flag}"):
            kept(**{flag: "kind=chat"})
    assert kept(on_error="skip", only="of.kind=chat")[0] == ["p0", "p5"]
    # A row that --data.only leaves out need not have the column of --data.without.
    spec = write(tmp_path / "a", {"prompt": "p", "a": 1, "b": 2}, {"prompt": "q", "a": 2})
    assert kept(only="a=1", without="b=3")[0] == ["p"]


def test_what_a_filter_compares():
    assert spelled(datetime.date(2026, 11, 30)) == "2026-11-30"
    assert spelled([1, datetime.date(2026, 11, 30)]) == '[1, "2026-11-30"]'
    assert [spelled(x) for x in (3.0, 0.5, False, None, "true")] == [
        *("3", "0.5", "false", "null", "true")
    ]


@pytest.mark.parametrize("source", ["kind", "=chat", "kind=", "kind=a||b", "a=\udcff"])
@pytest.mark.parametrize("name", ["only", "without"])
def test_malformed_filters(tmp_path, name, source):
    spec = write(tmp_path / "a", {"prompt": "p", "kind": "chat"})
    with pytest.raises(ValueError, match=f"--data.{name} "):
        read(DataConfig(spec, **{name: source}), "prompts")
    with pytest.raises(ValueError, match=f"--prompts.{name} "):
        check(DataConfig(spec, **{name: source}), "prompts", "--prompts")


SPLITS = "train", "validation"


def test_splits_are_by_group_and_stable(tmp_path):
    rows = [{"prompt": f"p{i}", "org": {"name": f"org {i % 40}"}} for i in range(400)]

    def halves(rows, **options):
        spec = write(tmp_path / "a", *rows)
        config = DataConfig(spec, **{"split_by": "org.name", "validation": 0.25} | options)
        lines = []
        records = [read(config, "prompts", split=s, log=lines.append) for s in SPLITS]
        assert f"{len(records[1])} left out: for validation, split by 'org.name'" in lines[0]
        return [{r.row["org"]["name"] for r in half} for half in records], records

    (train, held_out), records = halves(rows)
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == 40
    assert sum(map(len, records)) == 400
    assert 4 <= len(held_out) <= 16  # a quarter of 40, give or take two standard deviations
    (again, _), _ = halves([*rows[::-1], *({"prompt": f"n{i}", "org": {"name": f"new {i}"}}
                                           for i in range(50))])  # fmt: skip
    assert {name for name in again if name.startswith("org")} == train
    (fewer, _), _ = halves(rows, validation=0.1)
    assert train < fewer  # a smaller share holds out some of the same
    spec = write(tmp_path / "a", {"prompt": "p"})
    with pytest.raises(DataError, match=r"a:1: field 'org': is missing, and --data\.split_by"):
        read(DataConfig(spec, split_by="org"), "prompts", split="train")
    assert len(read(DataConfig(spec, split_by="org"), "prompts", log=str)) == 1
    spec = write(tmp_path / "a", {"prompt": "p", "org": None})
    with pytest.raises(DataError, match=r"a:1: field 'org': is missing, and --data\.split_by"):
        read(DataConfig(spec, split_by="org"), "prompts", split="train")


def test_splits_by_labeler_and_by_prompt(tmp_path):
    rows = [
        {"prompt": f"p{i % 30}", "chosen": "a", "rejected": "b", "worker": f"w{i % 7}"}
        for i in range(210)
    ]
    spec = write(tmp_path / "a", *rows)
    for field, values in (("labeler", 7), ("prompt", 30)):
        config = DataConfig(spec, split_by=field, validation=0.5)
        train, held_out = (
            {getattr(r, field) for r in read(config, "comparisons", split=s, log=str)}
            for s in SPLITS
        )
        assert len(train) + len(held_out) == values == len(train | held_out)


# --- libraries ---

COMPARISONS = [
    {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "labeler": "w"},
    {"prompt": "ü", "responses": ["a", "b"], "ranks": [1, 2], "margin": 0.5, "confidence": 0.75},
]


SAID = [{"role": "user", "content": "name a river"}, {"role": "assistant", "content": "Nile"}]
HH = "\n\nHuman: q\n\nAssistant:"
PAIRS = [{"chosen": HH + " x", "rejected": HH + " y"}] * 2
CALL = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
DIALOGUES = [
    {"messages": SAID},
    {"messages": [SAID[0], SAID[1] | CALL], "tools": [{"name": "f"}]},
    {"prompt": "q", "completion": "a", "system": "S"},
    {"prompt": HH, "completion": " a"},
]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("comparisons", COMPARISONS),
        ("comparisons", PAIRS),
        ("demonstrations", DIALOGUES),
        ("demonstrations", [{"prompt": f"p {i}", "completion": "ü"} for i in range(30)]),
        ("prompts", ["a", "b"]),
        ("text", ["a", "b\n\nc"]),
    ],
)
def test_prepare_writes_what_tfds_reads(tmp_path, monkeypatch, capsys, kind, rows):
    """Records come back as they were, in their order, without TensorFlow.

    Conversations are rendered when they are read, with the template of that model.
    """
    tokenizer = chat_layouts.tokenizer("qwen") if rows in (DIALOGUES, PAIRS) else None
    spec = write(tmp_path / "a", *rows)
    run(monkeypatch, "prepare", "my_set", "--kind", kind, "--data_dir", str(tmp_path / "sets"),
        "--data", spec)  # fmt: skip
    folder = tmp_path / "sets" / "my_set"
    assert f"--data tfds:{folder}" in capsys.readouterr().out
    assert "tensorflow" not in sys.modules

    def content(spec):
        config = DataConfig(spec)
        records = read(config, kind, log=str, tokenizer=tokenizer)
        fields = ("prompt", "responses", "ranks", "labeler", "margin", "confidence", "said")
        fields += ("tools",)
        return [[getattr(record, field) for field in fields] for record in records]

    assert content(f"tfds:{folder}") == content(spec)
    assert content(f"tfds:{folder}:train[1:2]") == content(spec)[1:2]
    config = DataConfig(f"tfds:{folder}")
    wheres = [r.where for r in read(config, kind, log=str, tokenizer=tokenizer)]
    assert wheres[1] == f"tfds:{folder} row 1"
    with pytest.raises(SystemExit, match=r"^error: --data_dir ~nouser/x: no such user"):
        run(monkeypatch, "prepare", "my_set", "--kind", kind, "--data_dir", "~nouser/x",
            "--data", spec)  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "prepare", "my_set", "--kind", kind, "--data_dir",
            str(tmp_path / "sets"), "--data", spec)  # fmt: skip
    assert "my_set already exists there" in capsys.readouterr().err


def test_tfds_sets_of_others_are_mapped_by_columns(tmp_path):
    import tensorflow_datasets as tfds

    class Ratings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small", version=VERSION)]  # noqa: RUF012
        code_path = None

        def _info(self):
            text = tfds.features.Text()
            answers = tfds.features.Sequence({"text": text, "score": np.float32})
            features = tfds.features.FeaturesDict({"question": {"body": text}, "answers": answers})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            answers = [{"text": "a", "score": 0.5}, {"text": "ü", "score": 2.0}]
            return {"test": [(0, {"question": {"body": "why"}, "answers": answers})]}

        def _generate_examples(self):
            raise NotImplementedError

    Ratings.name = "ratings"
    Ratings(data_dir=tmp_path, config="small", file_format="array_record").download_and_prepare()
    columns = "prompt=question.body,responses=answers.text,scores=answers.score"
    spec = f"tfds:{tmp_path}/ratings/small:test"
    (record,) = read(DataConfig(spec, columns=columns), "comparisons", log=str)
    assert (record.prompt, record.responses, record.ranks) == ("why", ("a", "ü"), (2, 1))


def test_tfds_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="tfds:no_such_set: Dataset no_such_set not found"):
        read(DataConfig("tfds:no_such_set"), "text", log=str)


def test_hugging_face_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3
    train = datasets.Dataset.from_list(rows)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "two")
    train.to_parquet(tmp_path / "files" / "train.parquet")
    datasets.Dataset.from_list(rows, split="test").save_to_disk(tmp_path / "part")
    names = {
        "one": 3,
        "one:train": 3,
        "part": 3,
        "part:test": 3,
        "two": 3,
        "two:test": 1,
        "two:train[1:]+test": 3,
    }
    for name, count in (names | {"files": 3, "files:train[:50%]": 2}).items():
        records = read(DataConfig(f"hf:{tmp_path}/{name}"), "comparisons", log=str)
        assert [r.responses for r in records] == [("a", "b")] * count
    for name, message in (
        ("two:other", "two:other: ValueError: Unknown split .* one of ..train., .test"),
        ("one:other", "one:other: ValueError: Unknown split .* one of ..train"),
        ("files/train.parquet", "is a file: write jsonl:/.*/files/train.parquet"),
        ("nowhere/at/all", "all: no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            read(DataConfig(f"hf:{tmp_path}/{name}"), "comparisons", log=str)


def test_hugging_face_configurations(tmp_path):
    """A further part of the path is a configuration, or a folder of the set."""
    pytest.importorskip("datasets")
    for folder in ("main", "other", "extra"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl", {"prompt": folder})
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("main", "other")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("main", "other", "extra"):
        (record,) = read(DataConfig(f"hf:{tmp_path}/{name}:train"), "prompts", log=str)
        assert record.row == {"prompt": name}
    message = (
        r"^hf:\S+: has the configurations \['main', 'other'\]: choose one, as in hf:.*/CONFIG:train"
    )
    with pytest.raises(DataError, match=message):
        read(DataConfig(f"hf:{tmp_path}"), "prompts", log=str)
    with pytest.raises(
        DataError, match=r"^hf:\S+: 'none' is neither a folder nor .* \['main', 'other'\]"
    ):
        read(DataConfig(f"hf:{tmp_path}/none"), "prompts", log=str)


def test_names_at_the_hub(monkeypatch):
    """The first two parts of a path are the name. A set with a script is read from its copy."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if arguments[-1] == "preference":
            raise ValueError("BuilderConfig 'preference' not found. Available: ['default']")
        if arguments[0] == "openai/old" and "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found old.py")
        return [{"prompt": "p"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    copy = {"split": "train", "revision": "refs/convert/parquet"}
    for spec, expected in (
        ("hf:gsm8k", (("gsm8k", None), {"split": "train"})),
        ("hf:openai/gsm8k:test[:1%]", (("openai/gsm8k", None), {"split": "test[:1%]"})),
        ("hf:openai/gsm8k/main", (("openai/gsm8k", "main"), {"split": "train"})),
        ("hf:openai/a/b/c:test", (("openai/a", "b/c"), {"split": "test"})),
        ("hf:nvidia/a/preference", (("nvidia/a",), {"split": "train", "data_dir": "preference"})),
        ("hf:openai/old", (("openai/old",), {"data_dir": "default", **copy})),
        ("hf:openai/old/b", (("openai/old",), {"data_dir": "b", **copy})),
    ):
        read(DataConfig(spec), "prompts", log=str)
        assert calls[-1] == expected


# --- the commands ---


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    cli()


def test_show(tmp_path, monkeypatch, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    common = ["--tokenizer", str(tmp_path / "tok"), "--data.cache", "None", "--length", "32"]
    spec = write(tmp_path / "a", *COMPARISONS, {"prompt": "p", "responses": [], "ranks": []})
    run(monkeypatch, "show", "--kind", "comparisons", "--data", spec, "--data.on_error", "skip",
        *common)  # fmt: skip
    out = capsys.readouterr().out
    assert "3 rows read\n  1 skipped: field 'responses': expected 2 to 9 responses, got 0" in out
    assert "K: 1 of 2, 1 of 3; 4 pairs, 25.0% ties; 1 labelers" in out
    assert "ranks_BK [8, 3]" in out
    assert "rank 1: 'b<eos>'" in out
    spec = write(tmp_path / "b", {"text": "x" * 47}, {"text": "y" * 15})
    run(monkeypatch, "show", "--kind", "text", "--data", spec, *common)
    assert (
        "packed 3 sequences, 64 tokens, into 2 rows of 32: 100.0% full" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match=r"^error: .*b:1: field 'prompt': is missing"):
        run(monkeypatch, "show", "--kind", "prompts", "--data", spec, *common)


def test_importing_is_light():
    heavy = ["jax", "grain", "tensorflow_datasets", "datasets", "transformers", "torch"]
    code = f"import sys, instructjax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_trained_tokenizer(tmp_path):
    """It is saved and loaded; it decodes to the same text, and a common word is one token."""
    import transformers

    from instructjax.data.prepare import train_tokenizer

    texts = ["the cat sat on the mat"] * 50
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        train_tokenizer(texts, 280, str(tmp_path / "bpe"))
    )
    assert len(tokenizer) <= 280
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("the cat the né\n").input_ids
    assert tokenizer.decode(ids) == "the cat the né\n"
    assert tokenizer.eos_token_id not in ids
    assert len(tokenizer(" the").input_ids) == 1


def test_commands_write_to_the_home_directory(tmp_path, monkeypatch, capsys):
    """A shell leaves the `~` of `--data_dir=~/sets`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    spec = write(tmp_path / "home" / "a", *({"text": f"text {i}"} for i in range(9)))
    prepare = ["prepare", "my_set", "--kind", "text", "--data", spec, "--data_dir=~/sets"]
    run(monkeypatch, *prepare)
    assert (tmp_path / "home" / "sets" / "my_set").is_dir()
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *prepare)
    assert caught.value.code == 2
    run(monkeypatch, "tokenizer", "~/tok", "--data", spec, "--vocab_size", "300")
    tokenizer = json.loads((tmp_path / "home" / "tok" / "tokenizer.json").read_text())
    gpt2 = tmp_path / "home" / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (gpt2 / "merges.txt").write_text("#version: 0.2\n")
    run(monkeypatch, "tokenizer", "~/tok2", "--gpt2", "~/gpt2")
    assert (tmp_path / "home" / "tok2" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
