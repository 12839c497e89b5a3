"""Wrong command lines of all scripts: refused before a model is loaded, or anything is written."""

import importlib
import re
import shlex
import sys

import faults_flags
import pytest
import run_pretrain
import run_rm
import run_sft

from instructjax import data, hf, scoring
from instructjax.run import flags, pretrained, run

LOADERS = [
    (pretrained, "load"),
    (scoring, "load"),
    (scoring, "load_model"),
    (hf, "load"),
    (hf, "load_tokenizer"),
    (data, "load"),
    (flags, "write"),
    (run, "claim"),
    (run_pretrain, "run_pretrain"),
    (run_sft, "run_sft"),
    (run_rm, "run_rm"),
]


# What tyro refuses by itself gets its box: words that are no flag, and values of another type.
OF_TYRO = ("--batchsize", "--steps", "--remat", "ppo", "--topology")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    faults_flags.make_world(directory)
    return directory


@pytest.mark.parametrize("line", faults_flags.WRONG, ids=lambda x: f"{x.script} {x.words}")
def test_a_wrong_flag_is_refused_at_once(line, world, monkeypatch, capsys):
    def fail(*args, **keywords):
        raise AssertionError("something was loaded, written or run")

    for module, name in LOADERS:
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setitem(sys.modules, faults_flags.NOT_INSTALLED, None)
    monkeypatch.chdir(world)
    before = faults_flags.contents(world)
    name = line.script.removesuffix(".py")
    script = importlib.import_module(
        {"-m instructjax.data": "instructjax.data.__main__"}.get(name, name)
    )
    with pytest.raises(SystemExit) as end:
        script.cli(shlex.split(line.words))
    assert end.value.code == 2
    said = capsys.readouterr()
    assert line.named in said.err
    if line.named in OF_TYRO:
        assert "Traceback" not in said.err
    else:
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
    assert said.out == ""
    assert faults_flags.contents(world) == before


def test_the_table_covers_every_script():
    assert len(faults_flags.WRONG) >= 60
    scripts = {path.name for path in (faults_flags.ROOT / "experiments").glob("*.py")}
    with_main = {
        x for x in scripts if "cli(" in (faults_flags.ROOT / "experiments" / x).read_text()
    }
    assert with_main | {"-m instructjax.data"} == {line.script for line in faults_flags.WRONG}
    assert len(set(faults_flags.WRONG)) == len(faults_flags.WRONG)


def test_the_table_in_the_docs_is_of_these_lines():
    docs = faults_flags.ROOT / "docs"
    table = (docs / "reliability-flags.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| ", table, re.MULTILINE)
    assert rows == [(faults_flags.command(line), "2") for line in faults_flags.WRONG]
    count = len(rows)
    assert f"\n{count} of {count} were refused with exit code 2" in table
    assert f"| {count} wrong ones, over all scripts |" in (docs / "reliability.md").read_text()
