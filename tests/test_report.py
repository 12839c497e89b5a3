"""The page of a run: its figures, its samples as text, and nothing that reaches a network."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from instructjax.evaluation import report

NASTY = (
    "a\u2028b <script>alert(1)</script>"
    '<img src="https://example.com/x.png" onerror="alert(2)">&amp;'
)


class Page(HTMLParser):
    """The tags, attributes and texts of a page; the cells of each table."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.inside: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        tag = self.inside[-1] if self.inside else ""
        self.texts.setdefault(tag, []).append(data)
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += data


def make_run(directory: Path, **flags) -> Path:
    directory.mkdir()
    config = {"stage": "ppo", "command": f"python run.py {NASTY}", "config": {"seed": 3, **flags}}
    config["versions"] = {"jax": "0.10"}
    rows = [{"step": 0, "validation/kl": 0.0, "validation/score": -1.0}]
    rows += [{"step": n, "objective/score": n / 7, "objective/kl": float("nan")} for n in (1, 2)]
    rows += [{"step": 3, "validation/kl": 4.0, "validation/score": 2.5}]
    samples = [
        {"step": 0, "prompt": NASTY, "response": "before", "score": -1.0},
        {"step": 1, "prompt": NASTY, "response": "between", "score": 0.0},
        {"step": 3, "prompt": NASTY, "response": NASTY, "score": 2.5},
    ]
    results = {
        "SFT": {"kl": 0.0, "score_interval": [-1.5, -0.5]},
        "policy": {"kl": 4.0, "win_rate": [0.6612, 0.631, 0.684]},
        "seconds": 12,
    }
    for name, lines in (("metrics", rows), ("samples", samples)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / f"{name}.jsonl").write_text(text)
    for name, content in (("config", config), ("results", results)):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a&b")


@pytest.fixture(scope="module")
def html(run) -> str:
    report.cli([str(run)])
    return (run / "report.html").read_text()


def test_what_a_model_wrote_is_text(html):
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "alert" not in "".join(page.texts["script"])
    assert "img" not in {tag for tag, _ in page.tags}
    named = [name for _, attributes in page.tags for name in attributes]
    assert not [name for name in named if name.startswith("on")]
    cells = [cell for table in page.tables for row in table for cell in row]
    assert cells.count(NASTY) == 1  # the prompt
    assert cells.count(f"{NASTY}\n[score +2.50]") == 1


def test_nothing_reaches_a_network(html):
    for _, attributes in Page(html).tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "default-src 'none'" in html
    assert "@import" not in html


def test_the_tables(html):
    results, seconds, samples = Page(html).tables
    assert results == [
        ["", "kl", "score_interval", "win_rate"],
        ["SFT", "0", "(-1.5 to -0.5)", ""],
        ["policy", "4", "", "0.6612 (0.631 to 0.684)"],
    ]
    assert seconds[1] == ["seconds", "12"]
    assert samples[0] == ["prompt", "step 0", "step 3"]  # neither more nor fewer
    assert samples[1] == [NASTY, "before\n[score -1.00]", f"{NASTY}\n[score +2.50]"]


def test_the_curves(run, html):
    """Two panels have two points or more, and one frontier does; KL is logged as NaN."""
    page = Page(html)
    texts = [text for text in page.texts["text"] if text.strip()]
    assert [tag for tag, _ in page.tags].count("svg") == 3
    for title in ("score", "KL, nats a response", "score against KL"):
        assert title in texts
    data = report.read(run)
    assert report._points(data, "validation/kl", "validation/score").tolist() == [[0, -1], [4, 2.5]]
    assert report._points(data, "step", "objective/kl").tolist() == []
    assert report.draw_panel("x", [data], ["objective/kl"]) == ""
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "clippath"]
    assert len(set(ids)) == 3  # those of one figure hide nothing of another


def test_several_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", seed=4, beta=0.1)  # a flag that the first one lacks
    report.cli([str(run), str(other)])
    assert "wrote report.html" in capsys.readouterr().out
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables[0] == [["", str(run), str(other)], ["seed", "3", "4"]]
    assert f"{other}: objective/score" in page.texts["text"]


def test_names_that_matplotlib_would_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["_hidden", "lr$x^$"]
    for name in names:
        make_run(tmp_path / name)
    report.cli(names)
    texts = Page((tmp_path / "report.html").read_text()).texts["text"]
    for name in names:
        assert any(text.strip() == f"{name}: objective/score" for text in texts)


def test_a_page_that_fails_does_not_fail_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    report.write_for(run)
    assert (run / "report.html").exists()
    (run / "samples.jsonl").write_text("{")
    report.write_for(run)
    assert "report.html was not made: " in capsys.readouterr().out


def test_ranked_responses_and_nested_results():
    row = {"prompt": "p", "responses": ["x", "y"], "ranks": [2, 1], "scores": [-0.5, 1.25]}
    data = report.RunData("r", {}, [], [row], [], {})
    (table,) = report.sample_tables(data)
    assert table.rows == [["p", "rank 2, score -0.50: x\nrank 1, score +1.25: y"]]
    results = {"accuracy": {"all": {"pairs": 1200, "model": [0.5, 0.25, 0.75]}}, "n": [{"k": 2}]}
    first, second = report.result_tables(results)
    assert (first.title, first.rows) == ("accuracy", [("all", "1,200", "0.5 (0.25 to 0.75)")])
    assert (second.title, second.rows) == ("n", [("1", "2")])
    after = [{"prompt": "p", "SFT": f"{i}"} for i in range(400)]
    (table,) = report.sample_tables(report.RunData("r", {}, [], [row], after, {}))
    assert (len(table.rows), table.left_out) == (300, 100)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "it has no metrics.jsonl"),
        (lambda run: (run / "samples.jsonl").write_text("{"), "samples.jsonl: damaged"),
    ],
)
def test_runs_that_cannot_be_read(damage, named, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    damage(run)
    with pytest.raises(SystemExit) as end:
        report.cli([str(run)])
    assert end.value.code == 2
    assert named in capsys.readouterr().err
    assert not (run / "report.html").exists()
