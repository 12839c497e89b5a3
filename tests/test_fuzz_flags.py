"""Random flags with random values: a config whose numbers are in range, or exit code 2.

`INSTRUCTJAX_FUZZ=5000 pytest tests/test_fuzz_flags.py` makes that many command lines and configs.
"""

import dataclasses
import functools
import operator
import os
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import faults_flags
import ppo_config
import preflight
import pytest
import run_ppo
import run_pretrain
import run_rm
import run_sft
import sample
import swap_loss
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructjax import ranges, usage
from instructjax.data import __main__ as data_commands
from instructjax.run import flags

LINES, CONFIGS = (int(os.environ.get("INSTRUCTJAX_FUZZ", n)) for n in (60, 400))
fuzz = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Read = Callable[[list[str]], Any]  # the words of a command line -> config


def by_tyro(cls: Any, check: Callable[[Any], object]) -> Read:
    read = functools.partial(tyro.cli, cls, use_underscores=True)
    return lambda argv: usage.read(functools.partial(read, args=argv), check)


def training(script: Any, config: Any = None) -> Read:
    cls, presets = config or (script.Config, script.PRESETS)
    return lambda argv: flags.parse(cls, presets, None, argv, script.check)


SCRIPTS: dict[str, tuple[Any, Read]] = {
    "run_pretrain": (run_pretrain.Config, training(run_pretrain)),
    "run_sft": (run_sft.Config, training(run_sft)),
    "run_rm": (run_rm.Config, training(run_rm)),
    "run_ppo": (ppo_config.Config, training(run_ppo)),
    "dpo": (swap_loss.DPO, training(swap_loss, (swap_loss.DPO, {}))),
    "grpo": (swap_loss.GRPO, training(swap_loss, (swap_loss.GRPO, {}))),
    "raft": (swap_loss.RAFT, training(swap_loss, (swap_loss.RAFT, {}))),
    "sample": (sample.Config, by_tyro(sample.Config, sample.check)),
    "preflight": (preflight.Config, by_tyro(preflight.Config, preflight.check)),
    **{
        cls.__name__: (cls, by_tyro(cls, operator.methodcaller("check")))
        for cls in (data_commands.Show, data_commands.Prepare, data_commands.Tokenizer)
    },
}


# Words that a command line begins with, without which it would always be refused.
STARTS = {
    "run_rm": "--batch_size 8",
    "dpo": "--model lm",
    "grpo": "--model lm --reward rm",
    "preflight": "--topology v5e:2x2",
    "sample": "--model lm --max_new_tokens 32",
    "Show": "--kind text",
    "Prepare": "new --kind text --data_dir .",
    "Tokenizer": "new",
}


def flags_of(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(flag, type) of a config and of those in it."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, f"{prefix}{field.name}.")
        else:
            # The SPEC of a data set has the name of its group: --data, not --data.spec.
            yield f"{prefix}{field.name}".removesuffix(".spec"), hint


WORDS = [
    *("0", "1", "-1", "2", "3", "8", "64", "4294967296", "9" * 30, "0.5", "1.0", "1e-5", "-0.0"),
    *("1e400", "nan", "inf", "-inf", "None", "True", "False", "", " ", "x", "é", "0x10", "1_000"),
    *("1,2", "data=2,fsdp=-1", "data=0", "fsdp=99", "5:2", "0:0", "a:b", "prompt=q", "ranks=a:"),
    *("miniature", "lm", "rm", "done", "file", "nothing", "~no-such-user/x", ".", "/", "runs/sft"),
    *(
        "jsonl:",
        "jsonl:text.txt",
        "jsonl:~no-such-user/x",
        "jsonl:nothing",
        "jsonl:*",
        "hf:",
        "tfds::",
    ),
    *("hf:x/y:z", "judge.py:NUMBER", "broken.py:f", "nothing.py:f", "float32", "bfloat16"),
    *(
        "dots",
        "chat",
        "text",
        "comparisons",
        "small",
        "v5e",
        "v5e:2x2",
        "v5e:0x0",
        "gs://b/x",
        "reward",
    ),
]


def choices(hint: Any) -> list[str]:
    """The words that a flag with choices takes."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [str(part) for part in parts]
    return [word for part in parts for word in choices(part)]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(sorted(SCRIPTS)))
    argv = STARTS.get(name, "").split()
    if name not in ("sample", "preflight", "Tokenizer"):
        argv += ["--data.cache", "None"]
    pool = sorted(dict(flags_of(SCRIPTS[name][0])).items())
    for flag, hint in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2)):
        word = st.sampled_from(WORDS)
        if draw(st.integers(0, 3)):  # mostly of the flag's type, so that the checks see it
            fitting = choices(hint)
            if is_number(hint):
                word = st.integers(-1, 300).map(str)
            word = st.sampled_from(fitting) if fitting else word
        least = draw(st.sampled_from([0, 1, 1, 1, 1, 1, 1, 1]))
        most = draw(st.sampled_from([1, 1, 1, 2]))
        argv += [f"--{flag}", *draw(st.lists(word, min_size=least, max_size=most))]
    return name, argv


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    faults_flags.make_world(directory)
    return directory


@fuzz(max_examples=LINES)
@given(line=command_lines())
def test_a_command_line_gives_a_config_or_exit_code_2(line, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")
    name, argv = line
    cls, read = SCRIPTS[name]
    config, code = None, 0
    try:
        config = read(argv)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().err
    if code == 0:
        assert isinstance(config, cls)
        assert_in_range(config)
    else:
        assert code == 2, argv
        assert re.search(r"--\w|NAME|OUT", said), (argv, said)
        assert "Traceback" not in said


def assert_in_range(config: Any) -> None:
    for flag, hint in flags_of(type(config)):
        *groups, name = flag.split(".")
        value = functools.reduce(getattr, groups, config)
        value = getattr(value, name)
        value = getattr(value, "spec", value)  # of a data set or of rewards
        for item in value if isinstance(value, tuple) else (value,):
            assert ranges.refusal(hint, item) is None, (flag, item)


def is_number(hint: Any) -> bool:
    parts = [hint, *typing.get_args(hint)]
    return any(part in (int, float) or (part is not hint and is_number(part)) for part in parts)


NUMBERS = st.integers(-2, 300) | st.sampled_from(
    [
        *(-(10**20), 10**20, 2**31, 2**32, 0.0, 0.5, 1.0, -1e-9, 1e-9, 1e300),
        *(float("nan"), float("inf"), float("-inf")),
    ]
)


def replaced(config: Any, flag: str, value: Any) -> Any:
    group, _, name = flag.partition(".")
    if name:
        value = replaced(getattr(config, group), name, value)
    return dataclasses.replace(config, **{group: value})


@fuzz(max_examples=CONFIGS)
@given(data=st.data())
def test_a_number_is_in_the_range_of_its_flag_or_refused_by_its_name(data):
    """Also of a config in a config, and in every preset."""
    scripts = [run_pretrain, run_sft, run_rm, run_ppo]
    starts = [preset for script in scripts for preset in script.PRESETS.values()]
    starts += [swap_loss.DPO(), swap_loss.GRPO(), sample.Config()]
    config = data.draw(st.sampled_from(starts))
    pool = [flag for flag, hint in flags_of(type(config)) if is_number(hint)]
    flag, number = data.draw(st.sampled_from(pool)), data.draw(NUMBERS)
    *_, name = flag.split(".")
    hint = dict(flags_of(type(config)))[flag]
    value = (number,) if typing.get_origin(hint) is tuple else number
    made, said = None, ""
    try:
        made = replaced(config, flag, value)
    except ValueError as error:
        said = str(error)
    if made is not None:
        assert_in_range(made)
    else:
        assert said.startswith("--")
        assert name in said
