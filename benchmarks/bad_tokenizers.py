"""Model directories with one fault each, beside `bad_models`: tokenizers and chat templates."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bad_models import SETTINGS, TEMPLATE, TOKENIZER, Damage, Fault, edit, faults, instead, marker


def template(text: Any) -> Damage:
    """A chat template; a string may hold {ran}, which stands for the marker."""

    def damage(directory: Path) -> None:
        ran = str(marker(directory))
        made = text.replace("{ran}", ran) if isinstance(text, str) else text
        edit(SETTINGS, chat_template=made)(directory)

    return damage


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes tokenizer.json."""

    def damage(directory: Path) -> None:
        content = json.loads((directory / TOKENIZER).read_text())
        change(content)
        (directory / TOKENIZER).write_text(json.dumps(content))

    return damage


# --- kinds ---


def kinds() -> Iterator[tuple[str, list[Fault]]]:
    """The faults of tokenizers and templates, by their kind."""
    yield from _tokenizers()
    yield from _templates()


def _tokenizers() -> Iterator[tuple[str, list[Fault]]]:
    models: list[dict[str, Any]] = [
        {},
        {"type": "x"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [3]},
        {"type": "BPE", "vocab": {}, "merges": [], "dropout": 5.0},
        {"type": "Unigram", "vocab": [], "unk_id": 0},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5},
        {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"},
        {"type": "WordLevel", "vocab": {"a": 2**33}, "unk_token": "a"},
        {"type": "WordLevel", "vocab": {"a": 1.5}, "unk_token": "a"},
    ]
    damages = {str(m): tokenizer(lambda t, m=m: t.update(model=m)) for m in models}
    yield "a tokenizer's model", faults((TOKENIZER,), damages)
    parts: list[dict[str, Any]] = [
        {"version": 9},
        {"truncation": {"max_length": -1}},
        {"added_tokens": [{"id": 5}]},
        {"added_tokens": 3},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!!"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "ab"}},
        {"decoder": {"type": "x"}},
        {"post_processor": {"type": "x"}},
    ]
    damages = {str(p)[:40]: tokenizer(lambda t, p=p: t.update(p)) for p in parts}
    yield "a tokenizer's other parts", faults((TOKENIZER,), damages)
    keys: list[dict[str, Any]] = [
        {"padding_side": "x"},
        {"truncation_side": 3},
        {"added_tokens_decoder": 3},
        {"added_tokens_decoder": {"x": {"content": "x"}}},
        {"tokenizer_class": 3},
        {"auto_map": 3},
        {"model_input_names": 3},
        {"fast_tokenizer_files": ["tokenizer.4.0.json"]},
        {"eos_token": 3},
    ]
    damages = {str(k): edit(SETTINGS, **k) for k in keys}
    yield "tokenizer_config.json: wrong values", faults((SETTINGS,), damages)
    beyond: dict[str, Callable[[dict[str, int]], Any]] = {
        "one token": lambda v: v.update({"x": len(v)}),
        "an id of 4 * 10^9": lambda v: v.update({"x": 4 * 10**9}),
    }
    damages = {n: tokenizer(lambda t, f=f: f(t["model"]["vocab"])) for n, f in beyond.items()}
    yield "a tokenizer larger than the model", faults(("tokens, the model",), damages)


def _templates() -> Iterator[tuple[str, list[Fault]]]:
    broken = ["{% for %}", "{% if x %}", "{{ x | none_such }}", "{{", "{% break %}", "\ud800"]
    broken += ["{{ " + "(" * 5000, "{% if 1 %}" * 200 + "{% endif %}" * 200]
    yield "templates: broken", faults((SETTINGS,), {ascii(x)[:40]: template(x) for x in broken})
    alone: dict[str, bytes] = {"broken": b"{% for %}", "no UTF-8": b"\xff\xfe"}
    damages = {n: instead(TEMPLATE, lambda f, x=x: f.write_bytes(x)) for n, x in alone.items()}
    yield "templates: a damaged file", faults((TEMPLATE,), damages)
    damages = {str(x): template(x) for x in (3, [3], {"default": 3}, [{"name": "default"}])}
    yield "templates: no text", faults((SETTINGS,), damages)
    reaching = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('touch {ran}') }}",
        "{{ lipsum.__globals__['os'].system('touch {ran}') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.clear() }}",
        *("{% include '/etc/passwd' %}", "{% import 'x' as x %}", "{% extends 'x' %}"),
    ]
    reached = faults((SETTINGS,), {x[:40]: template(x) for x in reaching})
    shut = "jinja's sandbox gives an empty text for the attribute"
    reached += [
        Fault(x, template(x), (SETTINGS,), harmless=shut)
        for x in ("{{ ''.__class__ }}", "{{ ''|attr('__class__') }}")
    ]
    yield "templates: reach for what is not theirs", reached
    endless = [
        "{{ 10 ** 10 ** 9 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        # Loops of jinja's own: in the rendering, and of a constant in the compiler.
        "{{ range(99999)|map('string')|map('center', 99999)|map('map', 'upper')|map('list')"
        "|map('length')|sum }}",
        "{{ 'x'|slice(1000000000)|sum(start=[]) }}",
        # More than any address space holds: a smaller number would take the memory of the machine.
        "{{ 'x'|center(1000000000000000000) }}",
        "{{ 'x' * 1000000000000000000 }}",
    ]
    yield "templates: do not end", faults((SETTINGS,), {x[:40]: template(x) for x in endless})
