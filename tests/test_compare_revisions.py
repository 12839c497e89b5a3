"""compare_revisions.py: its commands, and the page by hand."""

import json
from dataclasses import replace
from pathlib import Path

import compare_revisions
import grid_commands
import pytest
from compare_revisions import Config

from instructjax.data import DataConfig

SMALL = Config(out=Path("OUT"), seeds=(3, 5), revisions=2, prompts=70, oversight=0.3)
REAL = Config(
    out=Path("OUT"),
    seeds=(3,),
    data=DataConfig("jsonl:prompts.jsonl", template="plain"),
    measure=("harm.py:harm",),
    revise_flags="--temperature 0.5",
    sft_flags="--learning_rate 3e-4",
    evaluate_flags="--prompts 9",
    gold=("judge.py:f",),
    max_new_tokens=48,
)


@pytest.mark.parametrize("c", [SMALL, REAL, replace(REAL, critic="models/ai")])
def test_the_scripts_know_all_flags(c):
    jobs = dict(compare_revisions.grid(c).jobs)
    assert len(jobs) == len(c.seeds) * (c.revisions + 2)
    for name, job, flags in grid_commands.parsed(compare_revisions.grid(c)):
        seed = int(name[-1])
        assert flags.seed == seed
        if job.script == "critique_revise.py":
            assert (flags.model, flags.data, flags.gold) == ("runs/sft", c.data, c.gold)
            assert (flags.revisions, flags.prompts) == (c.revisions, c.prompts)
            assert flags.max_new_tokens == c.max_new_tokens
            assert flags.critic == ("rules" if c is SMALL else c.critic)
            assert flags.oversight == (0.3 if c is SMALL else 0)
            assert flags.temperature == (1 if c is SMALL else 0.5)
        elif job.script == "run_sft.py":
            number = int(name.split("-")[2])
            assert flags.model == "runs/sft"
            assert flags.data.spec == f"jsonl:OUT/revisions-{seed}/revisions.jsonl"
            assert flags.data.only == "revision=" + "|".join("1234"[:number])
            assert flags.data.template == c.data.template
            assert flags.epochs == 1
            assert flags.preset == ("miniature" if c is SMALL else "small")
            assert (flags.learning_rate == 3e-4) == (c is not SMALL)
            assert job.needs == (f"revisions-{seed}",)
        else:
            policies = [f"sl-cai-{number}-{seed}" for number in range(1, c.revisions + 1)]
            assert list(job.needs) == policies
            assert flags.models == ("runs/sft", *(f"OUT/{policy}" for policy in policies))
            assert (flags.measure, flags.gold) == (c.measure, c.gold)
            assert flags.prompts == (512 if c is SMALL else 9)


@pytest.mark.parametrize("start", ["runs/sft", "elsewhere/sl-cai-1-5"])  # a name of the grid's
def test_the_page(start, tmp_path):
    c = replace(SMALL, out=tmp_path, model=start)
    assert compare_revisions.sections(c) == []
    for seed, toxic in ((3, (0.4, 0.3, 0.1)), (5, (0.4, 0.2, 0.26))):
        rows = [{"revision": i, "revised": 9, "toxic": [x] * 3} for i, x in enumerate(toxic)]
        for i, row in enumerate(rows):
            row["followed"] = [0.5 - 0.1 * i * (seed == 5)] * 3
        names = [start, *(f"{tmp_path}/sl-cai-{i}-{seed}" for i in (1, 2))]
        models = {
            name: {"utility": [i] * 3, "kl": [0] * 3, "measures": {"toxic": [x] * 3}}
            for i, (name, x) in enumerate(zip(names, toxic, strict=True))
        }
        pairs = [
            {"model": name, "against": other, "win_rate": [0.6 + 0.1 * i] * 3}
            for i, name in enumerate(names)
            for other in names
            if name != other
        ]
        written = {f"revisions-{seed}": rows}
        written[f"evaluation-{seed}"] = {"models": models, "pairs": pairs}
        for run, results in written.items():
            (tmp_path / run).mkdir()
            (tmp_path / run / "results.json").write_text(json.dumps(results))
    revisions, policies = compare_revisions.sections(c)
    toxic, followed = revisions.tables[0].rows
    assert [cell.split()[0] for cell in toxic] == ["toxic", "0.40", "0.25", "0.18"]
    assert [cell.split()[0] for cell in followed] == ["followed", "0.50", "0.45", "0.40"]
    # From the first revision to the last: toxic falls with seed 3, followed with seed 5.
    assert "held in 2 of 4. It failed in: followed, seed 3; toxic, seed 5." in revisions.text
    rows = {row[0]: [cell.split()[0] for cell in row[1:]] for row in policies.tables[0].rows}
    assert rows["toxic"] == ["0.40", "0.25", "0.18"]
    assert rows["utility"] == ["0.00", "1.00", "2.00"]
    assert rows["wins against the start"] == ["0.50", "0.70", "0.80"]
    assert "toxic</" in policies.figures[0] or "toxic" in policies.figures[0]
    one = compare_revisions.sections(replace(c, revisions=1))[1]
    assert len(one.tables[0].columns) == 3


def test_wrong_flags(tmp_path, capsys):
    real = ["--data", "jsonl:x.jsonl", "--gold", "x.py:f"]
    cases = [
        (["--oversight", "1.5"], "--oversight 1.5"),
        ([*real, "--critic", "rules"], "--critic rules: it judges no prompts but"),
        ([*real, "--oversight", "0.1"], "--oversight is of `--critic rules` alone"),
        (["--sft_flags=--data.only x=1"], "--sft_flags: --data.only is set by this script"),
        (["--revise_flags=--prompts 5"], "--revise_flags: --prompts is set by this script"),
        (["--evaluate_flags=--measure x"], "--evaluate_flags: --measure is set by this script"),
        (["--revise_flags", "x"], "--revise_flags: x: expected a flag"),
        (["--data", "jsonl:x.jsonl"], "--gold: these data have no judge of their own"),
    ]
    for flags, named in cases:
        with pytest.raises(SystemExit) as end:
            compare_revisions.cli([*flags, "--out", f"{tmp_path / 'out'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
