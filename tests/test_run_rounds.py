"""run_rounds.py: its commands, which policy and which labels a round has, and the page by hand."""

import json
from dataclasses import replace
from pathlib import Path

import grid_commands
import pytest
import run_rounds
import tyro
from run_rounds import Config

from instructjax.data import DataConfig
from instructjax.evaluation.grid import NotReadyError
from instructjax.label import __main__ as label

WAYS = Config(
    out=Path("OUT"), seeds=(3, 5), rounds=3, memory=("all", "newest"), start=("sft", "last")
)
REAL = Config(
    out=Path("OUT"),
    data=DataConfig("jsonl:prompts.jsonl", template="plain"),
    evaluate_flags="--prompts 9 --samples 1",
    gold=("judge.py:f",),
    labels=("runs/ai",),
    rm_flags="--epochs 2",
    max_new_tokens=48,
)


@pytest.mark.parametrize("c", [WAYS, REAL, replace(REAL, labels=("page",))])
def test_the_scripts_know_all_flags(c):
    for name, job, flags in grid_commands.parsed(run_rounds.grid(c)):
        if job.script == "evaluate.py":
            used = {*flags.models}
            sampled = name.startswith("samples")
            assert flags.split == ("train" if sampled else "validation")
            assert flags.comparisons == (sampled and c.labels != ("page",))
            few = 512 if c is WAYS else 9
            expected = (c.prompts, c.samples) if sampled else (few, 1)
            assert (flags.prompts, flags.samples) == expected
            labels = c.labelers if flags.comparisons else c.gold
            assert flags.gold == labels
        else:
            used = {flags.model} | ({*flags.reward.spec} if job.script == "run_ppo.py" else set())
        if job.script == "run_rm.py":
            assert flags.data.template == c.data.template
            assert flags.preset == ("miniature" if c is WAYS else "small")
        else:
            assert (flags.data, flags.max_new_tokens) == (c.data, c.max_new_tokens)
            assert {*job.needs} == {path[4:] for path in used if path.startswith("OUT/")}
        assert name.endswith(f"-{flags.seed % 1000}")


def test_the_policy_and_the_labels_of_a_round():
    jobs = run_rounds.grid(WAYS).jobs
    assert jobs["samples-1-3"].flags["models"] == "runs/sft"
    assert jobs["samples-2-3"].flags["models"] == Path("OUT/ppo-1-3")
    assert jobs["samples-3-newest-last-5"].flags["models"] == Path("OUT/ppo-2-newest-last-5")
    assert len({jobs[f"samples-{i}-{s}"].flags["seed"] for i in (1, 2) for s in (3, 5)}) == 4
    rounds = {"all": ["samples-1-3", "samples-2-3", "samples-3-all-sft-3"]}
    rounds["newest"] = ["samples-3-newest-sft-3"]
    for memory, expected in rounds.items():
        job = jobs[f"rm-3-{memory}-sft-3"]
        assert list(job.needs) == expected
        assert job.prepare.args[1:] == (Path(f"OUT/rm-3-{memory}-sft-3.jsonl"), expected)
        assert job.flags["model"] == "runs/sft"
    assert jobs["ppo-2-newest-last-3"].flags["reward"] == Path("OUT/rm-2-newest-3")
    assert jobs["ppo-3-all-sft-3"].flags["model"] == "runs/sft"
    assert jobs["ppo-3-all-last-3"].flags["model"] == Path("OUT/ppo-2-all-last-3")
    models = ["ppo-1-3", *(f"ppo-{i}-all-sft-3" for i in (2, 3))]
    assert {f"OUT/{name}" for name in models} <= {*map(str, jobs["evaluation-3"].flags["models"])}
    assert len(jobs["evaluation-3"].flags["models"]) == 1 + 1 + 4 * 2


def test_labels_of_people_are_waited_for(tmp_path):
    c = replace(REAL, out=tmp_path, labels=("page",))
    file = tmp_path / "rm.jsonl"
    for number in (1, 2):
        (tmp_path / f"samples-{number}-0-labels").mkdir()
    (tmp_path / "samples-1-0-labels" / "comparisons.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(NotReadyError) as waiting:
        run_rounds.write_labels(c, file, ["samples-1-0", "samples-2-0"])
    said = str(waiting.value)
    assert f"--data jsonl:{tmp_path}/samples-2-0/responses.jsonl" in said
    words = said.split("\n")[1].split()
    assert words[:3] == ["python", "-m", "instructjax.label"]
    labeling = tyro.cli(label.Config, args=words[3:])
    assert labeling.out == tmp_path / "samples-2-0-labels.db"
    export = tyro.cli(label.Config, args=said.split("\n")[2].split()[3:])
    assert (export.out, export.export) == (labeling.out, tmp_path / "samples-2-0-labels")
    (tmp_path / "samples-2-0-labels" / "comparisons.jsonl").write_text('{"b": 2}')
    run_rounds.write_labels(c, file, ["samples-1-0", "samples-2-0"])
    assert file.read_text() == '{"a": 1}\n{"b": 2}\n'
    (tmp_path / "samples-1-0").mkdir()
    (tmp_path / "samples-1-0" / "comparisons.jsonl").write_text('{"c": 3}\n')
    run_rounds.write_labels(REAL.__class__(out=tmp_path), file, ["samples-1-0"])
    assert file.read_text() == '{"c": 3}\n'


@pytest.mark.parametrize("start", ["runs/sft", "elsewhere/ppo-1-3"])  # a name of the grid's
def test_the_page(start, tmp_path):
    c = Config(out=tmp_path, model=start, seeds=(3, 5), memory=("all", "newest"))
    assert run_rounds.sections(c) == []
    for seed in c.seeds:
        names = [start, f"{tmp_path}/ppo-1-{seed}"]
        names += [f"{tmp_path}/ppo-2-{memory}-sft-{seed}" for memory in c.memory]
        utilities = [0, 1, seed, 2]
        models = {
            name: {"utility": [x] * 3, "kl": [x / 2] * 3}
            for name, x in zip(names, utilities, strict=True)
        }
        pairs = [
            {"model": name, "against": other, "win_rate": [x / 10 + (other != start)] * 3}
            for name, x in zip(names, utilities, strict=True)
            for other in names
            if name != other
        ]
        (tmp_path / f"evaluation-{seed}").mkdir()
        file = tmp_path / f"evaluation-{seed}" / "results.json"
        file.write_text(json.dumps({"models": models, "pairs": pairs}))
    rounds, difference = run_rounds.sections(c)
    rows = {tuple(row[:2]): row[2:] for row in rounds.tables[0].rows}
    assert list(rows) == [(f"{memory} sft", number) for memory in c.memory for number in "12"]
    assert rows["newest sft", "2"] == [
        "20.0 % (20.0 to 20.0)",
        "2.00 (2.00 to 2.00)",
        "1.00 (1.00 to 1.00)",
    ]
    assert rows["all sft", "2"][1].startswith("4.00 (")
    assert rows["all sft", "1"] == rows["newest sft", "1"]
    (row,) = difference.tables[0].rows
    assert row[0] == "newest sft"
    assert row[1].startswith("2.00 (")  # of 3 - 2 and 5 - 2
    assert "<svg" in rounds.figures[0]


def test_wrong_flags(tmp_path, capsys):
    for flags, named in (
        (["--samples", "10"], "--samples 10: must be from 2 to 9"),
        (["--labels", "page", "f.py:f"], "--labels: give either page"),
        (["--data", "jsonl:x", "--gold", "f.py:f"], "--labels: only the miniature has"),
        (["--model", "miniature", "--labels", "f.py:f"], "--labels f.py:f: there is no file"),
    ):
        with pytest.raises(SystemExit) as end:
            run_rounds.cli([*flags, "--out", f"{tmp_path}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
