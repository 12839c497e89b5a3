"""compare_labelers.py: its commands, whose labels a reward model has, and the page by hand."""

import json
from dataclasses import replace
from pathlib import Path

import compare_labelers
import grid_commands
import pytest
from compare_labelers import Config

from instructjax import miniature
from instructjax.data import DataConfig
from instructjax.miniature import critics

SMALL = Config(out=Path("OUT"), seeds=(3, 5), noise=(0.0, 2.0), place_bias=(0.5,), prompts=70)
REAL = Config(
    out=Path("OUT"),
    seeds=(3,),
    data=DataConfig("jsonl:prompts.jsonl", template="plain"),
    people=("people.py:f",),
    labelers=("models/ai", "other"),
    ai_flags="--thoughts 9",
    rm_flags="--epochs 2",
    evaluate_flags="--prompts 9",
    gold=("judge.py:f",),
    max_new_tokens=48,
)


@pytest.mark.parametrize("c", [SMALL, REAL])
def test_the_scripts_know_all_flags(c):
    labelers, seeds = set(), set()
    for name, job, flags in grid_commands.parsed(compare_labelers.grid(c)):
        if name == "pairs":
            assert (flags.models, flags.data, flags.split) == (("runs/sft",), c.data, "train")
            assert (flags.samples, flags.comparisons, flags.prompts) == (2, True, c.prompts)
            assert flags.gold == c.people_specs
        elif job.script == "ai_feedback.py":
            assert flags.data.spec == "jsonl:OUT/pairs/comparisons.jsonl"
            assert flags.pairs == c.prompts
            if flags.model == "rules":  # whose errors are each seed's own
                name, _, seed = name.rpartition("-")
                assert flags.seed == int(seed)
                seeds.add(flags.seed)
            labelers.add((name, flags.model, flags.noise, flags.place_bias, flags.thoughts))
            assert (flags.constitution_source == "miniature") == (c is SMALL)
            named = {"rules": (critics.OVERALL,), "critic": ("followed", "padding", "rude")}
            assert flags.only_principles == named.get(name.split("-")[1], ())
        elif job.script == "run_rm.py":
            assert flags.data.template == c.data.template
            assert flags.epochs == (2 if c is REAL else flags.epochs)
            assert flags.preset == ("miniature" if c is SMALL else "small")
        elif job.script == "run_ppo.py":
            assert flags.reward.spec == (f"OUT/{job.needs[0]}",)
            assert job.needs[0] == name.replace("ppo", "rm")
            assert (flags.data, flags.max_new_tokens) == (c.data, c.max_new_tokens)
        elif job.script == "evaluate.py":
            assert flags.models == ("runs/sft", *(f"OUT/{x}" for x in job.needs))
            assert (flags.reference, flags.gold) == ("runs/sft", c.gold)
            assert flags.prompts == (9 if c is REAL else 512)
        if name[-2] == "-" and job.script in ("run_rm.py", "run_ppo.py", "evaluate.py"):
            assert flags.seed == int(name[-1])
    assert seeds == (set() if c is REAL else {3, 5})
    if c is REAL:
        assert labelers == {
            ("labels-ai", "models/ai", 0, 0, 9),
            ("labels-other", "other", 0, 0, 9),
        }
    else:
        assert labelers == {
            ("labels-rules-0-0.5", "rules", 0, 0.5, 0),
            ("labels-rules-2-0.5", "rules", 2, 0.5, 0),
            ("labels-mixed", "rules", 0, 0.5, 0),
            ("labels-critic", "OUT/critic", 0, 0, 0),
        }


def test_whose_labels_a_reward_model_has():
    jobs = compare_labelers.grid(SMALL).jobs
    of_rm = {name: job for name, job in jobs.items() if name.startswith("rm-")}
    assert len(of_rm) == 2 * 5
    for name, job in of_rm.items():
        labeler, seed = name[3:-2], name[-1]
        labels = f"labels-{labeler}" if labeler == "critic" else f"labels-{labeler}-{seed}"
        needs = {"people": ("pairs",), "mixed": ("pairs", labels)}
        assert job.needs == needs.get(labeler, (labels,))
        files = {"people": "pairs/comparisons.jsonl", "mixed": f"mixed-{seed}.jsonl"}
        file = files.get(labeler, f"{labels}/comparisons.jsonl")
        if labeler == "mixed":
            assert [str(x) for x in job.prepare.args] == [
                f"OUT/{x}" for x in (f"mixed-{seed}.jsonl", "pairs", labels)
            ]
        assert job.flags["data"] == f"jsonl:OUT/{file}"
    assert jobs["labels-critic"].needs == ("pairs", "critic")
    assert jobs["critic"].flags["data"] == "jsonl:OUT/critic.jsonl"
    assert len(jobs["evaluation-3"].needs) == 5


def test_the_files_that_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_labelers, "PAGES", 30)
    compare_labelers.write_text(tmp_path / "critic.jsonl")
    lines = (tmp_path / "critic.jsonl").read_text().splitlines()
    written = [json.loads(line)["text"] for line in lines]
    pages = [page["text"] for page in miniature.texts(0, 30) + critics.pages(0, 30)]
    assert sorted(written) == sorted(pages)
    assert written[:30] != pages[:30]

    for name, labeled in {"people": "abcdef", "ai": "abdfg"}.items():
        (tmp_path / name).mkdir()
        rows = [{"prompt": prompt, "labeler": name} for prompt in labeled]
        file = tmp_path / name / "comparisons.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare_labelers.write_mixed(tmp_path / "mixed.jsonl", tmp_path / "people", tmp_path / "ai")
    rows = [json.loads(line) for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    by_labeler = {x: [r["prompt"] for r in rows if r["labeler"] == x] for x in ("people", "ai")}
    assert by_labeler == {"people": [*"ace"], "ai": [*"bdfg"]}
    for these in (("people", "lost"), ("lost", "ai")):
        with pytest.raises(FileNotFoundError, match=r"lost/comparisons\.jsonl"):
            compare_labelers.write_mixed(tmp_path / "x.jsonl", *(tmp_path / x for x in these))


@pytest.mark.parametrize("start", ["runs/sft", "elsewhere/ppo-people-3"])  # a name of the grid's
def test_the_page(start, tmp_path):
    c = replace(SMALL, out=tmp_path, model=start, noise=(0.0,))
    assert compare_labelers.sections(c) == []
    (tmp_path / "labels-critic").mkdir()
    results = {
        "pairs": 1234,
        "share_a": 0.61,
        "decided_by_place": 0.25,
        "agreement": [0.7, 0.6, 0.8],
    }
    results["agreement_with_judge"] = {"rude": [1, 1, 1], critics.OVERALL: [0.9, 0.8, 0.95]}
    (tmp_path / "labels-critic" / "results.json").write_text(json.dumps(results))
    for seed, better in ((3, 0.2), (5, 0.3)):
        names = [start, *(f"{tmp_path}/ppo-{name}-{seed}" for name in ["people", *c.asked])]
        models = {name: {"utility": [i] * 3, "kl": [i / 2] * 3} for i, name in enumerate(names)}
        pairs = [
            {"model": x, "against": y, "win_rate": [better + 0.01 * i + 0.1 * j] * 3}
            for i, x in enumerate(names)
            for j, y in enumerate(names)
            if i != j
        ]
        (tmp_path / f"evaluation-{seed}").mkdir()
        file = tmp_path / f"evaluation-{seed}" / "results.json"
        file.write_text(json.dumps({"models": models, "pairs": pairs}))
    for seed, share in ((3, 0.5), (5, 0.7)):
        (tmp_path / f"labels-rules-0-0.5-{seed}").mkdir()
        of_seed = {"pairs": 1000 + seed, "share_a": share, "decided_by_place": share / 2}
        of_seed |= {"agreement": [share, share - 0.1, share + 0.1]}
        file = tmp_path / f"labels-rules-0-0.5-{seed}" / "results.json"
        file.write_text(json.dumps(of_seed))
    labelers, policies = compare_labelers.sections(c)
    expected = ["critic", "1,234", "70.0 % (60.0 to 80.0)", "90.0 % (80.0 to 95.0)", "61%", "25%"]
    of_rules = ["rules-0-0.5", "1,004", "60.0 % (50.0 to 70.0)", "", "60%", "30%"]
    assert labelers.tables[0].rows == [of_rules, expected]
    rows = {row[0]: row[1:] for row in policies.tables[0].rows}
    assert list(rows) == ["people", "mixed", "rules-0-0.5", "critic"]
    assert rows["people"][3] == ""  # not against itself
    assert rows["mixed"][0].startswith("2.00 (")
    assert rows["mixed"][1].startswith("1.00 (")
    assert rows["mixed"][2].startswith("27.0 % (")  # the start is number 0
    assert rows["mixed"][3].startswith("37.0 % (")  # people's policy is number 1
    assert "held in 3 of 3" in policies.text  # two seeds: the intervals are wide
    alone = replace(c, seeds=(3,))
    assert "failed in: mixed (32%)" in compare_labelers.sections(alone)[1].text


def test_wrong_flags(tmp_path, capsys):
    real = ["--data", "jsonl:x.jsonl", "--gold", "x.py:f"]
    cases = [
        (real, "--people: only the miniature has some of its own"),
        ([*real, "--people", "x.py:f"], "--labelers: only the miniature has some of its own"),
        (["--labelers", "a/x", "b/x"], "--labelers: two of one name, or a name in use: x, x"),
        (["--labelers", "runs/critic"], "--labelers: two of one name, or a name in use: critic"),
        (["--labelers", "x/rules-0-2"], "or a name in use: rules-0-2"),
        (["--ai_flags=--pairs 9"], "--ai_flags: --pairs is set by this script's own flags"),
        (["--rm_flags=--data x"], "--rm_flags: --data is set by this script's own flags"),
        (["--rm_flags", "epochs"], "--rm_flags: epochs: expected a flag"),
    ]
    for flags, named in cases:
        with pytest.raises(SystemExit) as end:
            compare_labelers.cli([*flags, "--out", f"{tmp_path / 'out'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err
