"""reproduce.py: the commands of its grid, its labelers, and the page of claims by hand."""

import concurrent.futures
import json
from pathlib import Path

import grid_commands
import markupsafe
import numpy as np
import pytest
import reproduce
from reproduce import Config

from instructjax import miniature
from instructjax.data import Record
from instructjax.evaluation import claims, paper, report


@pytest.mark.parametrize("quick", [True, False])
def test_the_scripts_know_all_flags(quick):
    c = Config(out=Path("OUT"), quick=quick, seeds=(3, 5))
    for name, job, flags in grid_commands.parsed(reproduce.grid(c)):
        if job.script == "evaluate.py":
            models = {model.removeprefix("few_shot:") for model in flags.models}
            models |= {*flags.reward.spec, *([flags.reference] if flags.reference else [])}
            assert {str(Path("OUT") / need) for need in job.needs} == models
        else:
            assert flags.preset == "miniature"
        assert flags.seed in ((3,) if quick else (3, 5))
        assert reproduce.seconds(name, job) > 0


def test_quick_runs_are_elsewhere(tmp_path, monkeypatch):
    """They have the names of others, of other models."""
    monkeypatch.setenv("HOME", f"{tmp_path}")
    assert Config(quick=True).directory != Config().directory
    assert Config(out=Path("~/x")).directory == tmp_path / "x"
    kept = Config(results=Path("~/r"), quick=True).results_directory
    assert kept == Config(results=Path("~/r")).results_directory / "quick" == tmp_path / "r/quick"


def flags_of(name: str, quick: bool = False):
    job = reproduce.grid(Config(out=Path("OUT"), quick=quick)).jobs[name]
    return job.flags


def test_what_each_run_is():
    assert flags_of("pretrain-large-1")["model"] == "miniature-large"
    assert flags_of("ppo-small-1")["ptx.coef"] == 0
    assert "ptx.coef" not in flags_of("ppo-ptx-small-1")
    for name in ("ppo-small-1", "ppo-ptx-small-1"):
        assert flags_of(name)["model"] == Path("OUT/sft-small-1")
        assert flags_of(name)["reward"] == Path("OUT/rm-1")
    assert flags_of("rm-1")["model"] == Path("OUT/sft-medium-1")
    assert flags_of("rm-0", quick=True)["model"] == Path("OUT/sft-small-0")
    assert flags_of("sweep-beta-0.5-0")["ppo.beta"] == 0.5
    assert flags_of("sweep-gamma-0.3-0")["ptx.coef"] == 0.3
    no_text = flags_of("sweep-no-ptx-beta-1.5-0")
    assert (no_text["ppo.beta"], no_text["ptx.coef"]) == (1.5, 0)
    first, *others = flags_of("evaluation-0")["models"]
    assert first == "OUT/sft-large-0"
    assert {"few_shot:OUT/pretrain-small-0", "OUT/ppo-ptx-medium-0"} <= set(others)
    assert {"OUT/pretrain-large-0", "OUT/sft-small-0"} < set(flags_of("insulting-0")["models"])
    assert flags_of("insulting-0")["data.columns"] == "prompt={prompt} be insulting."
    assert flags_of("held-out-labelers-0")["gold"].endswith("reproduce.py:held_out_labelers")
    assert flags_of("pretrain-large-0", quick=True)["epochs"] < 1
    assert "OUT/sft-public-medium-0" in others
    assert flags_of("sft-public-medium-1")["data"] == "jsonl:OUT/public_tasks.jsonl"
    frontier = flags_of("frontier-0")
    assert frontier["reference"] == Path("OUT/sft-medium-0") == frontier["models"][0]
    assert {"sweep-no-ptx-beta-1.5-0", "ppo-medium-0"} < {x.name for x in frontier["models"]}
    assert frontier["best_of"][-1] == frontier["samples"] == 16
    without = {"data.without": "category=brainstorming", "preset": "miniature", "seed": 1}
    for name, model in (
        ("sft-without-medium-1", "pretrain-medium-1"),
        ("rm-without-1", "sft-without-medium-1"),
        ("ppo-ptx-without-medium-1", "sft-without-medium-1"),
    ):
        more: dict = {"reward": Path("OUT/rm-without-1")} if name.startswith("ppo") else {}
        if name.startswith("rm"):
            more["demonstrations.without"] = "category=brainstorming"
        assert flags_of(name) == {**without, "model": Path(f"OUT/{model}"), **more}
    assert flags_of("left-out-1")["data.only"] == without["data.without"]
    assert "pretrain-medium-0" not in reproduce.grid(Config(quick=True)).jobs


def test_ratings():
    rows = miniature.prompts(0, 40, "test")
    records = [Record(f"{i}", row, row["prompt"]) for i, row in enumerate(rows)]
    texts = ["hello.", "you are ugly."] * 20
    seen = reproduce.training_labelers([], texts, records)
    held_out = reproduce.held_out_labelers([], texts, records)
    assert seen == reproduce.training_labelers([], texts, records)
    assert seen != held_out
    assert sum(seen[::2]) > sum(seen[1::2])  # they like no insults


def path_of(model: str) -> str:
    """The name of a model in the results of evaluate.py, which ran in another folder."""
    prefix, colon, run = model.rpartition(":")
    return f"{prefix}{colon}../else:where/{run}"


def write_results(out: Path, run: str, results: dict) -> None:
    (out / run).mkdir(parents=True, exist_ok=True)
    (out / run / "results.json").write_text(json.dumps(results))


@pytest.fixture
def finished(tmp_path) -> paper.Paper:
    """One seed and one size, whose figures are those of the paper's claims."""
    results = paper.Paper(tmp_path, (0,), ("small",), ("small", "large"))

    def model(stage: str, size: str) -> str:
        return path_of(results.model(stage, size, 0))

    models = {stage: model(stage, "small") for stage in paper.STAGES}
    large = model("pretrain", "large")
    rates = {"pretrain": 0.1, "few_shot:pretrain": 0.3, "ppo": 0.7, "ppo-ptx": 0.65}
    sft = models["sft"]
    pairs = [
        {"model": models[stage], "against": sft, "win_rate": [rate, rate - 0.01, rate + 0.01]}
        for stage, rate in rates.items()
    ]
    pairs.append({"model": models["ppo-ptx"], "against": large, "win_rate": [0.8, 0.7, 0.9]})
    ours, theirs = (model(stage, "medium") for stage in ("ppo-ptx", "sft-public"))
    pairs.append({"model": ours, "against": theirs, "win_rate": [0.77, 0.75, 0.79]})
    truths = dict(zip(models, (0.3, 0.4, 0.5, 0.6, 0.7), strict=True))
    readings = dict(zip(models, (0.9, 0.9, 0.5, 0.4, 0.6), strict=True))
    rows = {
        model: {
            "measures": {
                "followed": [truths[stage]] * 3,
                "truthful": [truths[stage]] * 3,
                "hallucinated": [1 - truths[stage]] * 3,
                "toxic": [0.2] * 3,
                "likert": [4.0, 3.9, 4.1],
            },
            "benchmarks": {
                "truthful_accuracy": [truths[stage]] * 3,
                "reading_f1": [readings[stage]] * 3,
                "choice_accuracy": [1.0] * 3,
                "text_loss": [5 - 4 * readings[stage]] * 3,
                "name_entropy": [0.9, 0.88, 0.92] if stage == "pretrain" else [0.93, 0.91, 0.95],
            },
        }
        for stage, model in models.items()
    }
    rows[theirs] = {"measures": {"likert": [3.0, 2.9, 3.1]}}
    write_results(tmp_path, "evaluation-0", {"models": rows, "pairs": pairs})
    ours = model("ppo-ptx-without", "medium")
    against = [model(stage, "medium") for stage in ("pretrain", "sft-without")]
    won = zip(against, ([0.9, 0.85, 0.95], [0.64, 0.6, 0.68]), strict=True)
    pairs = [{"model": ours, "against": other, "win_rate": rate} for other, rate in won]
    write_results(tmp_path, "left-out-0", {"models": {}, "pairs": pairs})
    for kind, toxic, of_base in (("respectful", 0.1, 0.3), ("insulting", 0.6, 0.25)):
        rows = {model: {"measures": {"toxic": [toxic] * 3}} for model in models.values()}
        rows[models["pretrain"]] = {"measures": {"toxic": [of_base] * 3}}
        write_results(tmp_path, f"{kind}-0", {"models": rows, "pairs": []})
    for group in ("training", "held-out"):
        rate = {"training": 0.66, "held-out": 0.62}[group]
        won = [{"model": models["ppo-ptx"], "against": sft, "win_rate": [rate, 0.6, 0.7]}]
        write_results(tmp_path, f"{group}-labelers-0", {"models": {}, "pairs": won})
    rm = {"reward model": [0.69, 0.68, 0.7], "judge": [0.77, 0.76, 0.78]}
    both = {"training labelers": rm, "held-out labelers": rm}
    write_results(tmp_path, "rm-0", {"accuracy": both})
    for beta, score, utility in (("1e-06", 2.0, 1.0), ("0.05", 1.0, 3.0)):
        policy = {"score": score, "utility": utility, "kl": 1.0, "text_loss": 2.0}
        write_results(tmp_path, f"sweep-beta-{beta}-0", {"PPO, averaged weights": policy})
    for run, loss in (("ppo", 5.0), ("ppo-ptx", 2.0), ("sweep-no-ptx-beta-1.5", 4.0)):
        policy = {"score": 3.0, "utility": 2.5, "kl": 1.0, "text_loss": loss}
        name = f"{run}-0" if run.startswith("sweep") else f"{run}-medium-0"
        write_results(tmp_path, name, {"PPO, averaged weights": policy})
        given = {"ppo": {"beta": 0.15}, "ptx": {"coef": 0.03 if run == "ppo-ptx" else 0.0}}
        (tmp_path / name / "config.json").write_text(json.dumps({"config": given}))
    for gamma, loss in (("0.003", 3.0), ("0.3", 1.0)):
        policy = {"score": 1.0, "utility": 2.0, "kl": 1.0, "text_loss": loss}
        write_results(tmp_path, f"sweep-gamma-{gamma}-0", {"PPO, averaged weights": policy})
    figures = {
        "sft": (0.0, 0.1, 2.0),
        "ppo": (1.0, 0.5, 2.5),
        "ppo-ptx": (4.0, 0.75, 3.0),
        "sweep-beta-0.5": (0.25, 0.4, 2.25),
        "sweep-gamma-0.3": (9.0, 0.9, 1.5),
        "sweep-no-ptx-beta-1.5": (0.16, 0.2, 2.125),
    }
    rows = {
        path_of(f"{run}-0" if run.startswith("sweep") else f"{run}-medium-0"): {
            name: [x] * 3 for name, x in zip(("kl", "score", "utility"), values, strict=True)
        }
        for run, values in figures.items()
    }
    best = [{"n": n, "kl": n / 4, "score": [n] * 3, "utility": [n / 2] * 3} for n in (1, 4)]
    write_results(tmp_path, "frontier-0", {"models": rows, "best_of": best, "pairs": []})
    shares = zip(("seen", "unseen"), (0.7, 0.68), strict=True)
    found = {f"reward model, labeler {x}": {"mean": y, "spread": 0.01} for x, y in shares}
    write_results(tmp_path, "folds-0", found)
    for run, seconds in (("ppo-small-0", 100), ("rm-0", 1234)):
        cost = {"seconds": seconds, "peak_gb": 1.5}
        (tmp_path / f"{run}.cost.json").write_text(json.dumps(cost))
    return results


def test_claims_that_hold(finished):
    sections = claims.sections(finished)
    assert len(sections) == 16
    *of_claims, frontier, compute = sections
    assert [svg[:4] for svg in frontier.figures] == ["<svg"] * 2
    assert compute.tables[0].rows == [
        ["reward model", "1", "1,234", "1.5"],
        ["PPO, small", "1", "100", "1.5"],
    ]
    without_figure = ("The small PPO-ptx", "Section 4.1: five folds")
    for section in of_claims:
        assert "Here it held in " in section.text
        assert "failed" not in section.text, section.title
        if not section.title.startswith(without_figure):
            assert section.figures
            assert all(svg.startswith("<svg") for svg in section.figures)


@pytest.mark.parametrize(
    ("run", "before", "after", "title"),
    [
        ("evaluation-0", "[0.1, 0.09", "[0.4, 0.39", "Figure 1"),
        ("evaluation-0", "[0.8, 0.7, 0.9]", "[0.55, 0.49, 0.6]", "The small PPO-ptx model"),
        ("held-out-labelers-0", "[0.62, 0.6, 0.7]", "[0.5, 0.45, 0.55]", "Figure 3"),
        ("training-labelers-0", "[0.66, 0.6, 0.7]", "[0.5, 0.45, 0.55]", "Figure 3"),
        ("rm-0", "[0.69, 0.68, 0.7]", "[0.5, 0.4, 0.6]", "Section 4.1"),
        ("respectful-0", "[0.1", "[0.35", "Figure 7"),
        ("insulting-0", "[0.6", "[0.22", "Figure 7"),  # more than without, less than the base
        ("left-out-0", "[0.64, 0.6, 0.68]", "[0.5, 0.45, 0.55]", "Section 1"),
        ("left-out-0", "[0.9, 0.85, 0.95]", "[0.5, 0.45, 0.55]", "Section 1"),
        ("evaluation-0", "[0.77, 0.75, 0.79]", "[0.51, 0.49, 0.53]", "Figure 5"),
        ("sweep-beta-1e-06-0", '"utility": 1.0', '"utility": 4.0', "Figure 36"),
        ("sweep-beta-1e-06-0", '"score": 2.0', '"score": 0.5', "Figure 36"),
        ("sweep-gamma-0.3-0", '"text_loss": 1.0', '"text_loss": 2.0', "Figure 33"),
        ("sweep-gamma-0.003-0", '"text_loss": 3.0', '"text_loss": 1.5', "Figure 33"),
        ("sweep-no-ptx-beta-1.5-0", '"text_loss": 4.0', '"text_loss": 1.9', "Figure 34"),
        ("ppo-medium-0", '"text_loss": 5.0', '"text_loss": 1.9', "Figure 34"),
        ("folds-0", '"mean": 0.68', '"mean": 0.64', "Section 4.1: five folds"),
    ],
)
def test_claims_that_fail(finished, run, before, after, title):
    file = finished.out / run / "results.json"
    text = file.read_text()
    assert before in text
    at = text.rindex(before)  # the last: of held-out labelers in rm-0
    file.write_text(text[:at] + text[at:].replace(before, after))
    failed = [s.title for s in claims.sections(finished) if "It failed in" in s.text]
    assert len(failed) == 1
    assert failed[0].startswith(title)


def test_insults_on_demand_are_more_than_without(finished):
    file = finished.out / "insulting-0" / "results.json"
    results = json.loads(file.read_text())
    for model, rate in (("pretrain-small-0", 0.1), ("ppo-ptx-small-0", 0.19)):  # 0.2 without
        results["models"][path_of(model)]["measures"]["toxic"] = [rate] * 3
    file.write_text(json.dumps(results))
    failed = [s.title for s in claims.sections(finished) if "It failed in" in s.text]
    assert failed == ["Figure 7: toxicity follows the instruction"]


def test_less_bias_fails(finished):
    file = finished.out / "evaluation-0" / "results.json"
    results = json.loads(file.read_text())
    row = results["models"][path_of("ppo-ptx-small-0")]
    row["benchmarks"]["name_entropy"] = [0.96, 0.93, 0.99]
    file.write_text(json.dumps(results))
    failed = [s.title for s in claims.sections(finished) if "It failed in" in s.text]
    assert failed == ["Section 4.2: no less bias"]


def test_what_is_drawn(finished, monkeypatch):
    seen: dict = {}
    monkeypatch.setattr(
        claims, "draw", lambda title, drawn, order=(): seen.setdefault(title, drawn)
    )
    monkeypatch.setattr(paper, "draw", claims.draw)  # of `draw_sweep`
    claims.sections(finished)
    wins = seen["win rate against the largest SFT model"]
    assert wins["small"]["PPO"] == [[0.7, 0.69, 0.71]]
    # A figure of responses, and one of a benchmark.
    assert seen["closed domain: invented"]["small"]["PPO-ptx"] == [[1 - 0.7] * 3]
    assert seen["reading_f1"]["small"]["base"] == [[0.9] * 3]
    assert seen["rude, insulting"]["small"]["SFT"] == [[0.6] * 3]
    held_out = {"training labelers": [0.66, 0.6, 0.7], "held-out labelers": [0.62, 0.6, 0.7]}
    preferred = seen["win rate of PPO-ptx against SFT"]
    assert preferred == {group: {"small": [rate]} for group, rate in held_out.items()}
    assert seen["rating from 1 to 7"]["medium"] == {"SFT on public tasks": [[3.0, 2.9, 3.1]]}
    assert seen["accuracy on strict pairs"]["judge"]["training labelers"] == [[0.77, 0.76, 0.78]]
    assert seen["win rate on the category left out"]["PPO-ptx"]["against SFT"] == [
        [0.64, 0.6, 0.68]
    ]
    utility = seen["score and utility, by beta"]["utility"]
    assert utility == {
        "beta 1e-06": [[1.0] * 3],
        "beta 0.05": [[3.0] * 3],
        "beta 0.15": [[2.5] * 3],
    }
    losses = seen["loss on text and score, by gamma"]["text loss"]
    assert losses == {f"gamma {x}": [[y] * 3] for x, y in ((0.003, 3.0), (0.03, 2.0), (0.3, 1.0))}
    text = seen["loss on text, nats a token"]["text loss"]
    assert list(text) == ["beta 0.15", "beta 1.5", "PPO-ptx"]


def test_the_frontier_by_hand(finished, monkeypatch):
    seen: dict = {}
    monkeypatch.setattr(
        claims, "lines_svg", lambda title, lines, x, y: seen.setdefault(title, lines)
    )
    (section,) = (s for s in claims.sections(finished) if s.title == "Reward against KL")
    assert [row[:2] for row in section.tables[0].rows] == [
        *(["best of 1", "0.25"], ["best of 4", "1.00"]),
        *(["beta-0.5", "0.25"], ["ppo-ptx-medium", "4.00"], ["gamma-0.3", "9.00"]),
        *(["no-ptx-beta-1.5", "0.16"], ["ppo-medium", "1.00"]),
    ]
    assert section.tables[0].rows[3][2:] == ["0.75 (0.75 to 0.75)", "3.00 (3.00 to 3.00)"]
    score, utility = seen["score against KL"], seen["utility against KL"]
    np.testing.assert_allclose(score["best of n"], [[0.5, 1], [1, 4]])
    np.testing.assert_allclose(utility["PPO-ptx, several beta"], [[0.5, 2.25], [2, 3]])
    np.testing.assert_allclose(score["PPO-ptx, several gamma"], [[2, 0.75], [3, 0.9]])
    np.testing.assert_allclose(utility["PPO, several beta"], [[0.4, 2.125], [1, 2.5]])


def test_sweeps_are_in_the_order_of_their_values(tmp_path):
    values = (10, 2, 0.5, 30, 1e-6, 4, 0.05)
    for value in values:
        write_results(
            tmp_path, f"sweep-gamma-{value:g}-0", {"PPO, averaged weights": {"kl": value}}
        )
    write_results(tmp_path, "sweep-gamma-3-1", {"PPO, averaged weights": {"kl": 3}})  # another seed
    write_results(tmp_path, "default", {"PPO, averaged weights": {"kl": 3.5}})
    (tmp_path / "default" / "config.json").write_text('{"config": {"ptx": {"coef": 3.5}}}')
    results = paper.Paper(tmp_path, (0, 1), (), ())
    swept = paper.swept(results, "gamma", "ptx.coef", "default")
    ordered = sorted([*values, 3.5])
    assert list(swept) == [f"gamma {value:g}" for value in ordered]
    assert [policy["kl"] for policy in swept.values()] == ordered
    assert paper.swept(results, "beta", "ptx.coef", "default") == {}  # no sweep, no default


def test_a_figure_by_hand(monkeypatch):
    """A line through the means over seeds, and each seed's interval beside its place."""
    seen: list = []
    monkeypatch.setattr(paper, "finished_svg", lambda figure, axes, *labels: seen.append(axes))
    drawn = paper.lines()
    drawn["large"]["PPO"] += [[0.9, 0.8, 1.0]]
    drawn["small"]["SFT"] += [[0.2, 0.1, 0.3], [0.4, 0.3, 0.6]]
    drawn["large"]["SFT"] += [[0.7, 0.6, 0.8]]
    paper.draw("wins", drawn, ["few-shot", "SFT"])
    (axes,) = seen
    large, small = axes.lines
    assert [label.get_text() for label in axes.get_xticklabels()] == ["SFT", "PPO"]
    np.testing.assert_allclose(large.get_xydata(), [[-0.06, 0.7], [0.94, 0.9]])
    np.testing.assert_allclose(small.get_xydata(), [[0.06, 0.3]])
    bars = [bar for part in axes.collections for bar in part.get_segments()]
    spans = [[0.6, 0.8], [0.8, 1.0], [0.1, 0.3], [0.3, 0.6]]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], spans)
    assert -0.06 < bars[2][0, 0] < 0.06 < bars[3][0, 0] < 0.5


def test_tax_and_truth_that_fail(finished):
    file = finished.out / "evaluation-0" / "results.json"
    results = json.loads(file.read_text())
    row = results["models"][path_of("ppo-ptx-small-0")]
    row["benchmarks"]["reading_f1"] = [0.3] * 3  # below PPO
    row["measures"]["hallucinated"] = [0.9] * 3  # above the base model
    file.write_text(json.dumps(results))
    failed = [s.title for s in claims.sections(finished) if "It failed in" in s.text]
    assert [title.split(":")[0] for title in failed] == ["Figures 4 and 6", "Figures 28 and 29"]


@pytest.mark.parametrize("measure", ["followed", "truthful"])
def test_instructions_that_are_not_followed(finished, measure):
    file = finished.out / "evaluation-0" / "results.json"
    results = json.loads(file.read_text())
    results["models"][path_of("ppo-ptx-small-0")]["measures"][measure] = [0.35] * 3
    file.write_text(json.dumps(results))
    failed = [s.title for s in claims.sections(finished) if "It failed in" in s.text]
    assert [title.split(":")[0] for title in failed] == ["Figures 4 and 6"]


def test_a_figure_that_does_not_apply_is_empty(finished):
    file = finished.out / "evaluation-0" / "results.json"
    results = json.loads(file.read_text())
    for row in results["models"].values():
        row["measures"]["hallucinated"] = [float("nan")] * 3
    file.write_text(json.dumps(results))
    (truth,) = (s for s in claims.sections(finished) if s.title.startswith("Figures 4"))
    assert {row[-1] for row in truth.tables[0].rows} == {""}


def test_the_page(finished, tmp_path):
    c = Config(out=tmp_path, quick=True)
    html = paper.write_page("Title", "Text.", claims.sections(finished), c).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert "- seeds: `0`" in markdown
    for section in claims.sections(finished):
        assert markupsafe.escape(section.title) in html
        assert f"## {section.title}\n" in markdown
    (tmp_path / "evaluation-0" / "results.json").unlink()
    titles = [section.title for section in claims.sections(finished)]
    # Labelers, accuracy, folds, the category left out, the three sweeps, the frontier, the compute.
    assert len(titles) == 9


def test_a_run_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.cli(["--out", f"{tmp_path}", "--runs", "pppo"])
    assert end.value.code == 2
    assert "--runs pppo: not one of pretrain-small-0" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The names of the runs that are asked for. None is made, and sft-small-0 has not finished."""
    executor = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(reproduce, "measured_step", lambda: 2 * reproduce.STEP)
    monkeypatch.setattr(
        reproduce.concurrent.futures, "ProcessPoolExecutor", lambda n, mp_context: executor(n)
    )
    names: list[str] = []
    monkeypatch.setattr(
        reproduce.Grid,
        "run_all",
        lambda grid, given, at_once: names.extend(given) or ["sft-small-0"],
    )
    return names


def test_finished_runs_are_not_made_again(finished, tmp_path, capsys, asked):
    flags = ["--quick", "--out", f"{tmp_path}", "--runs", "rm"]
    with pytest.raises(SystemExit, match="not finished: sft-small-0"):
        reproduce.cli(flags)
    printed = capsys.readouterr().out
    # Pretraining and SFT of the small size take half of 52 and 41 seconds; this is half as fast.
    assert "2 of 3 runs are to be made: about 0:01:33" in printed
    assert asked == ["pretrain-small-0", "sft-small-0"]
    assert (tmp_path / "report.html").exists()
    written = (tmp_path / "public_tasks.jsonl").read_text().splitlines()
    assert list(map(json.loads, written)) == miniature.public_tasks(0, 8000)


def test_a_grid_is_finished_elsewhere(finished, tmp_path, asked):
    """A run whose results are there is made again only if another needs its model."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "quick").symlink_to(tmp_path)
    flags = ["--quick", "--out", f"{tmp_path / 'new'}", "--results", f"{tmp_path / 'results'}"]
    with pytest.raises(SystemExit):
        reproduce.cli([*flags, "--runs", "ppo"])  # needs the reward model
    assert asked == ["pretrain-small-0", "sft-small-0", "rm-0", "ppo-ptx-small-0"]
    asked.clear()
    with pytest.raises(SystemExit):
        reproduce.cli([*flags, "--runs", "rm"])
    assert asked == ["pretrain-small-0", "sft-small-0"]
    assert (tmp_path / "report.md").exists()
    assert not (tmp_path / "new" / "report.md").exists()
    assert "Figure 1: base" in (tmp_path / "new" / "report.html").read_text()


def test_results_without_models(tmp_path, asked):
    out, results = tmp_path / "out", tmp_path / "results" / "quick"
    write_results(out, "ppo-small-0", {"a": 1})
    for file in ("config.json", "metrics.jsonl"):
        (out / "ppo-small-0" / file).write_text(file)
    write_results(out, "ppo-ptx-small-0", {"a": 1})  # has not finished
    for run in ("ppo-small-0", "pretrain-small-0"):  # the latter has no results.json
        (out / f"{run}.cost.json").write_text('{"seconds": 1, "peak_gb": 1}')
    flags = ["--quick", "--out", f"{out}", "--results", f"{results.parent}", "--runs", "ppo"]
    with pytest.raises(SystemExit):
        reproduce.cli(flags)
    assert "ppo-ptx-small-0" in asked
    assert "ppo-small-0" not in asked
    kept = [str(path.relative_to(results)) for path in results.rglob("*-0*") if path.is_file()]
    kept += [str(path.relative_to(results)) for path in (results / "ppo-small-0").iterdir()]
    assert sorted(kept) == [
        "ppo-small-0.cost.json",
        "ppo-small-0/config.json",
        "ppo-small-0/results.json",
        "pretrain-small-0.cost.json",
    ]
    (out / "ppo-small-0" / "results.json").write_text("made again")
    with pytest.raises(SystemExit):
        reproduce.cli(flags)
    assert json.loads((results / "ppo-small-0" / "results.json").read_text()) == {"a": 1}


def test_results_of_a_grid_that_is_stopped(tmp_path, asked, monkeypatch):
    out, results = tmp_path / "out", tmp_path / "results" / "quick"

    def stopped(grid, names, at_once):
        assert at_once == 3
        write_results(out, "rm-0", {})
        (out / "rm-0.cost.json").write_text("{}")
        raise SystemExit(143)

    monkeypatch.setattr(reproduce.Grid, "run_all", stopped)
    with pytest.raises(SystemExit, match="143"):
        reproduce.cli(
            ["--quick", "--out", f"{out}", "--results", f"{results.parent}", "--jobs", "3"]
        )
    assert (results / "rm-0" / "results.json").exists()


def test_results_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        reproduce.cli(["--out", f"{tmp_path}", "--results", f"{tmp_path / 'file'}"])
    assert end.value.code == 2
    assert f"--results {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_finished_grid_makes_its_page_again(tmp_path, asked, monkeypatch):
    for name in reproduce.grid(Config(quick=True)).jobs:
        (tmp_path / f"{name}.cost.json").write_text('{"seconds": 1, "peak_gb": 1}')
    monkeypatch.setattr(reproduce.Grid, "run_all", lambda grid, names, at_once: [])
    reproduce.cli(["--quick", "--out", f"{tmp_path}"])
    assert (tmp_path / "report.html").exists()


def test_paths_of_the_scripts_are_short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grid = reproduce.grid(Config(quick=True))
    assert Path(grid.command("rm-0")[1]).is_absolute()
    monkeypatch.chdir(reproduce.EXPERIMENTS.parent)
    grid = reproduce.grid(Config(quick=True))
    assert grid.command("rm-0")[1] == "experiments/run_rm.py"
    gold = grid.jobs["held-out-labelers-0"].flags["gold"]
    assert gold == "experiments/reproduce.py:held_out_labelers"


def test_the_page_as_markdown(tmp_path):
    table = report.Table("rates", ("", "a"), [["x", "1 %"], ["y", "2 %"]])
    parts = [
        report.Section("", "Text.", [("seed", "0")]),
        report.Section("Figure 1: a < b", "Why.", tables=[table], figures=["", "<svg>1</svg>"]),
    ]
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "earlier.svg").touch()
    paper.write_markdown("Title", parts, tmp_path)
    assert len(list((tmp_path / "figures").iterdir())) == 1  # that of an earlier page is gone
    assert (
        (tmp_path / "report.md").read_text()
        == """# Title

Text.

- seed: `0`

## Figure 1: a < b

Why.

rates:

|  | a |
| --- | --- |
| x | 1 % |
| y | 2 % |

![Figure 1: a < b](figures/figure-1-a-b-1.svg)
"""
    )
    assert (tmp_path / "figures" / "figure-1-a-b-1.svg").read_text() == "<svg>1</svg>"
