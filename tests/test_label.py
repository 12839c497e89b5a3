"""The labeling page without a browser: screens, draws, labels, agreement, export, refusals."""

import contextlib
import http.client
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from urllib.parse import urlsplit

import pytest
from label_screens import Server, compare

from instructjax import data, usage
from instructjax.data import DataConfig, DataError
from instructjax.evaluation import comparison
from instructjax.label import __main__ as command
from instructjax.label import agreement, answers, deck, export, screens
from instructjax.label.desk import LEASE, Desk
from instructjax.label.screens import Screen
from instructjax.label.store import Label, Store

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


def jsonl(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{file}"


def samples(prompts=3, models=("a", "b", "c", "d")):
    return [
        {"model": model, "prompt": f"prompt {i}", "response": f"{model} says {i}"}
        for model in models
        for i in range(prompts)
    ]


def quiet(line):
    pass


def read(folder, rows, *flags, **keywords):
    return screens.read(jsonl(folder, rows), *flags, log=quiet, **keywords)


# ------------------------------------------------------------------------------------- screens


def test_responses_of_one_prompt_are_a_screen(tmp_path):
    first, second, third = read(tmp_path, samples())
    assert first == Screen(
        "rank", "prompt 0", None, [f"{m} says 0" for m in "abcd"], [["a"], ["b"], ["c"], ["d"]]
    )
    assert (second.prompt, third.prompt) == ("prompt 1", "prompt 2")


def test_a_text_that_two_models_wrote_is_shown_once(tmp_path):
    rows = [{"model": m, "prompt": "p", "response": r} for m, r in zip("abc", "xyx", strict=True)]
    (screen,) = read(tmp_path, rows)
    assert (screen.responses, screen.models) == (["x", "y"], [["a", "c"], ["b"]])


def test_what_training_would_read_otherwise_is_left_out(tmp_path):
    """A response that did not end, and one that differs in outer spaces alone."""
    texts = {"one": True, " one ": True, "cut": False, "two": True}
    rows = [
        {"model": "m", "prompt": "p", "response": text, "ended": ended}
        for text, ended in texts.items()
    ]
    (screen,) = read(tmp_path, rows)
    assert screen.responses == ["one", "two"]
    known = [{"prompt": "p", "responses": ["x", " x", "y"], "ranks": [2, 2, 1]}]
    (screen,) = screens.read_known(jsonl(tmp_path, known), log=quiet)
    assert (screen.responses, screen.known_ranks) == (["x", "y"], (2, 1))
    models = [row | {"model": model} for row, model in zip(rows, "abcd", strict=True)]
    assert len(read(tmp_path, models, "pairs")) == 6


def test_many_responses_are_several_screens_with_all_models(tmp_path):
    rows = [{"model": m, "prompt": "p", "response": f"{m}{i}"} for m in "ab" for i in range(5)]
    parts = read(tmp_path, rows)
    assert [screen.responses for screen in parts] == [
        ["a0", "a2", "a4", "b1", "b3"],
        ["a1", "a3", "b0", "b2", "b4"],
    ]


def test_comparisons_messages_and_tools(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        {"prompt": MESSAGES, "responses": ["x", [call]], "models": ["a", "b"], "tools": [{"f": 1}]},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "yes", "rejected": "no"},
    ]
    first, second = read(tmp_path, rows)
    assert first.turns == [
        ("tools", '[\n {\n  "f": 1\n }\n]'),
        ("system", "Be brief."),
        ("user", "Why?"),
    ]
    assert first.texts[0] == "x"
    assert '"name": "f"' in first.texts[1]
    assert second.turns == [("user", "hi")]
    assert not second.models  # not told
    assert screens.from_json(screens.to_json(first)).id == first.id


def test_pairs_are_of_two_models_and_may_be_equal(tmp_path):
    rows = [{"model": m, "prompt": "p", "response": r} for m, r in ("ax", "ay", "bx", "bz", "cx")]
    pairs = read(tmp_path, rows, "pairs")
    assert [(s.responses, s.models) for s in pairs] == [
        (["x", "x"], [["a"], ["b"]]),
        (["y", "z"], [["a"], ["b"]]),
        (["x", "x"], [["a"], ["c"]]),
        (["x", "x"], [["b"], ["c"]]),
    ]


def test_prompts_to_write_for(tmp_path):
    rows = ["one", {"prompt": MESSAGES}, {"prompt": "one", "response": "read for its prompt"}]
    lines = []
    written = screens.read(jsonl(tmp_path, rows), "write", log=lines.append)
    assert [s.prompt for s in written] == ["one", MESSAGES]
    assert "1 left out: screens that repeat an earlier one" in lines[0]
    assert len(read(tmp_path, rows, "write", most=1)) == 1


@pytest.mark.parametrize(
    ("rows", "kind", "says"),
    [
        ([{"prompt": "p"}], "rank", "field 'responses': is missing"),
        ([{"prompt": "p", "responses": ["x"]}], "rank", "field 'responses': expected 2 to 9"),
        ([{"prompt": "p", "responses": ["x", "y"]}], "pairs", "field 'model': is missing"),
        ([{"prompt": "p", "response": "x", "model": 3}], "rank", "field 'model': expected a name"),
        ([{"prompt": "p", "responses": ["x", "y"], "models": ["a"]}], "rank", "1 for 2 responses"),
        ([{"response": "x"}], "rank", "field 'prompt': is missing"),
        (["p"], "rank", "expected an object"),
    ],
)
def test_rows_that_cannot_be_shown(rows, kind, says, tmp_path):
    with pytest.raises(DataError) as error:
        read(
            tmp_path, [{"prompt": "p", "responses": ["x", "y"], "models": ["a", "b"]}, *rows], kind
        )
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert says in str(error.value)


def test_prompts_with_one_response_are_left_out_and_counted(tmp_path):
    lines = []
    spec = jsonl(tmp_path, [*samples(1), {"prompt": "alone", "response": "x"}])
    assert len(screens.read(spec, log=lines.append)) == 1
    assert "1 left out: prompts without two different responses" in lines[0]
    with pytest.raises(DataError, match="no screens are left"):
        read(tmp_path, [{"prompt": "alone", "response": "x"}])


# --------------------------------------------------------------------------------- draws, labels


def desk_of(folder, given, known=(), name="labels.db", admit=0.6, **keywords):
    clock = iter(range(10**6))
    desk = Desk(
        Store(folder / name), deck.deal(given, known, **keywords), admit, lambda: next(clock)
    )
    desk.open()
    for person in ("ann", "bob", "cy"):
        desk.store.enter(person, 0)
    return desk


@pytest.fixture
def desk(tmp_path):
    made = desk_of(tmp_path, read(tmp_path, samples(8)), raters=2, share=0.25)
    yield made
    made.store.close()


def said(page, ranks_by_text=None, **more):
    """A label for a page: by default a ranking of the responses by their texts."""
    texts = page["responses"]
    ranks = [1 + sorted(texts).index(text) for text in texts]
    if ranks_by_text:
        ranks = [ranks_by_text[text] for text in texts]
    label = {"id": f"{page['screen']:0>32}"[:32], "screen": page["screen"], "seconds": 2.0}
    return label | {"ranks": ranks, "likert": ranks, "flags": [[] for _ in ranks]} | more


def label_all(desk, who):
    seen = []
    while (page := desk.next(who))["state"] == "screen":
        seen.append(page["screen"])
        assert desk.submit(who, said(page, id=f"{who}{len(seen):030}"))
    return seen


def test_orders_are_drawn_for_each_labeler(desk):
    shared = [*desk.deck.screens]
    orders = {who: desk.deck.order(who) for who in ("ann", "bob")}
    assert orders["ann"] != orders["bob"]
    assert sorted(orders["ann"]) == sorted(shared)
    assert orders["ann"] == desk.deck.order("ann")
    places = Counter(tuple(desk.deck.responses(f"{i}", shared[0], 3)) for i in range(600))
    assert len(places) == 6
    assert min(places.values()) > 60  # 100 each


def test_shared_screens_go_to_several_and_others_to_one(desk):
    first = desk.next("ann")["screen"]
    seen = {who: label_all(desk, who) for who in ("bob", "ann", "cy")}
    assert first not in seen["bob"] or first in desk.deck.shared  # ann has it open
    counts = Counter(screen for screens in seen.values() for screen in screens)
    assert len(desk.deck.shared) == 2
    assert {screen: desk.deck.wanted(screen) for screen in desk.deck.screens} == counts


def test_a_screen_that_was_left_open_goes_to_another_later(tmp_path):
    desk = desk_of(tmp_path, read(tmp_path, samples(1)))
    assert desk.next("ann")["state"] == "screen"
    assert desk.next("bob")["state"] == "done"
    later = Desk(desk.store, desk.deck, now=lambda: LEASE + 100)
    page = later.next("bob")
    assert page["state"] == "screen"
    assert later.submit("bob", said(page))
    assert desk.submit("ann", said(page, id="late" * 8))  # she comes back: hers is kept too
    assert len(desk.store.labels()) == 2
    assert Desk(desk.store, desk.deck, now=lambda: 9 * LEASE).next("cy")["state"] == "done"
    desk.store.close()


def test_the_page_is_blind_and_its_order_is_undone(desk):
    page = desk.next("ann")
    number = page["turns"][0][1].split()[1]
    texts = [f"{m} says {number}" for m in "abcd"]
    assert sorted(page["responses"]) == texts
    assert "models" not in json.dumps(page)
    flags = [["opinion", "sexual"] if text == texts[2] else [] for text in page["responses"]]
    ranks = dict(zip(texts, (3, 1, 2, 2), strict=True))
    likert = [5 if text == texts[0] else 1 for text in page["responses"]]
    desk.submit("ann", said(page, ranks, likert=likert, flags=flags))
    (label,) = desk.store.labels()
    assert label.screen.responses == texts
    assert label.answer == {
        "ranks": [4, 1, 2, 2],  # 1 and the number of better ones
        "likert": [5, 1, 1, 1],
        "flags": [[], [], ["sexual", "opinion"], []],
    }
    again = desk.earlier("ann", page["screen"])
    assert again["responses"] == page["responses"]
    assert again["answer"]["flags"] == [x and ["sexual", "opinion"] for x in flags]


def test_another_seed_moves_no_screen_that_was_shown(desk, tmp_path):
    page = desk.next("ann")
    for seed in range(1, 6):
        dealt = deck.deal([*desk.deck.screens.values()], seed=seed)
        again = Desk(desk.store, dealt)
        assert again.next("ann")["responses"] == page["responses"]


def test_one_id_is_kept_once_and_the_latest_label_counts(desk):
    page = desk.next("ann")
    texts = sorted(page["responses"])
    first, second = (dict(zip(texts, ranks, strict=True)) for ranks in ([1, 2, 3, 4], [2, 1, 3, 4]))
    assert desk.submit("ann", said(page, first, id="1" * 32))
    assert not desk.submit("ann", said(page, first, id="1" * 32))  # no answer came: sent again
    assert desk.submit("ann", said(page, second, id="2" * 32, seconds=3.5))
    assert not desk.submit("ann", said(page, first, id="1" * 32))
    (label,) = desk.store.labels()
    assert label.answer["ranks"] == [2, 1, 3, 4]
    assert label.seconds == 5.5
    rows = desk.store._db.execute("SELECT count(*) FROM labels").fetchone()
    assert rows == (2,)  # the history
    assert desk.next("ann")["previous"] == page["screen"]
    assert desk.next("ann")["done"] == 1
    with pytest.raises(KeyError):
        desk.submit("bob", said(page, id="3" * 32))  # bob was not shown it
    with pytest.raises(KeyError):
        desk.earlier("ann", desk.next("ann")["screen"])  # not labeled yet


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": [1, 2, 3]},
        {"ranks": [1, 2, 3, 5]},
        {"ranks": [1, 2, 3, True]},
        {"ranks": None},
        {"likert": [1, 2, 3, 8]},
        {"likert": [1, None, 3, 4]},
        {"flags": [[], [], []]},
        {"flags": [[], [], [], ["rude"]]},
        {"flags": [[], [], [], [["sexual"]]]},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"seconds": 10**400},
        {"id": "short"},
        {"screen": 3},
    ],
)
def test_wrong_labels_are_refused(wrong, desk):
    page = desk.next("ann")
    with pytest.raises(ValueError, match=r"expected|ranks|likert|flags|seconds|id"):
        desk.submit("ann", said(page, **wrong))
    assert desk.store.labels() == []


@pytest.mark.parametrize("text", ["", " \n", None, "\ud800", "x" * (answers.LONGEST + 1)])
def test_wrong_demonstrations_are_refused(text):
    with pytest.raises(ValueError, match=r"text|empty|surrogate|string"):
        answers.parse("write", [], {"text": text})


def test_a_transaction_is_all_or_nothing(desk):
    def fail():
        with desk.store.transaction():
            desk.store.enter("dee", 0)
            desk.store.add([Screen("write", "more")])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "dee" not in desk.store.labelers()


def test_files_that_are_no_database_of_labels(tmp_path):
    (tmp_path / "text.db").write_text("no database, but a text that is long enough to be one" * 20)
    with pytest.raises(ValueError, match=r"text\.db: cannot be used"):
        Store(tmp_path / "text.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match=r"other\.db: is a database of something else"):
        Store(tmp_path / "other.db")


# ------------------------------------------------------------------------- agreement, screening


def label(screen, who, ranks, likert=None, flags=None):
    answer = {"ranks": ranks}
    if likert is not None:
        answer |= {"likert": likert, "flags": flags or [[] for _ in ranks]}
    return Label(screen, who, answer, 1.0)


def test_agreement_and_alpha_by_hand():
    one, two = Screen("rank", "p", None, ["x", "y"]), Screen("rank", "q", None, ["x", "y"])
    labels = [
        label(one, "ann", [1, 2], [7, 1], [["opinion"], []]),
        label(one, "bob", [1, 2], [7, 1], [["opinion"], []]),
        label(two, "ann", [1, 2], [7, 1], [["opinion"], []]),
        label(two, "bob", [2, 1], [7, 1], [[], []]),
        label(two, "cy", [1, 1], [7, 1]),
        label(Screen("rank", "alone", None, ["x", "y"]), "ann", [1, 2], [1, 1]),
    ]
    report = agreement.report(labels)
    assert (report.shared, report.pairs[0], report.pairs[2]) == (2, 0.5, 2)
    assert report.by_labeler["ann"][::2] == (0.5, 2)
    assert report.by_labeler["cy"] is None
    order, rating, *flags = report.alphas
    assert (order.units, rating.units) == (4, 4)
    assert rating.value == 1
    # Values of "opinion": (1, 1), (0, 0); with three raters (1, 0, 0), (0, 0, 0). Disagreeing
    # pairs within units: 4 of 3 raters, each worth 1/2: Do = 2 of n = 10. By chance 2 * 3 * 7 / 9.
    of_flag = {alpha.question: alpha.value for alpha in flags}
    assert of_flag["Expresses opinion"] == pytest.approx(1 - 2 / (2 * 3 * 7 / 9))
    assert of_flag["Hallucination"] is None  # nobody raised it
    assert agreement.report(labels[-1:]).pairs is None


def test_alpha_of_orders_is_1_though_the_first_is_always_better_and_below_0_when_reversed():
    screen = [Screen("rank", f"{i}", None, ["x", "y"]) for i in range(3)]
    same = [label(s, who, [1, 2]) for s in screen for who in ("ann", "bob")]
    assert agreement.report(same).alphas[0].value == 1
    three = [label(Screen("rank", "p", None, [*"xyz"]), who, [1, 2, 2]) for who in ("ann", "bob")]
    assert agreement.report(three).alphas[0].units == 6  # ordered pairs of three
    reverse = [label(screen[0], "ann", [1, 2]), label(screen[0], "bob", [2, 1])]
    # Of four values, two of each kind, a pair by chance differs in 8 of 12 cases: 1 - 1 / (2 / 3).
    assert agreement.report(reverse).alphas[0].value == pytest.approx(-0.5)


def known(folder, **more):
    rows = [
        {"prompt": "k", "responses": ["x", "y", "z"], "ranks": [1, 2, 2]},
        {"prompt": "l", "responses": ["x", "y", "x"], "ranks": [2, 1, 2]},  # "x" stands twice
    ]
    return screens.read_known(jsonl(folder, [row | more for row in rows], "known.jsonl"), quiet)


def test_agreement_with_known_answers_by_hand(tmp_path):
    first, second = known(tmp_path)
    assert (second.responses, second.known_ranks) == (["x", "y"], (2, 1))
    # Strict pairs: x before y (alike), x before z (tied), and y before x (reversed).
    given = [{"ranks": [1, 2, 1]}, {"ranks": [1, 2]}]
    flags = {"flags": [[]]}
    assert agreement.with_known([first, second], [x | flags for x in given]) == (1.5 / 3, None)
    first, second = known(tmp_path, flags=[["sexual", "violent"], [], []])
    raised = [{"flags": [["sexual"], ["opinion"], []]}, {"flags": [["sexual", "violent"], []]}]
    _, share = agreement.with_known(
        [first, second], [a | b for a, b in zip(given, raised, strict=True)]
    )
    assert share == (1 + 2) / (3 + 2)


@pytest.mark.parametrize("flags", [[[], []], [["rude"], [], []], "sexual", [1, [], []]])
def test_wrong_known_flags_are_refused(flags, tmp_path):
    with pytest.raises(DataError, match=r"known\.jsonl:1: field 'flags"):
        known(tmp_path, flags=flags)


def test_the_screening_set_decides_who_is_admitted(tmp_path):
    desk = desk_of(tmp_path, read(tmp_path, samples(2)), known(tmp_path), raters=3)
    right = {"k": {"x": 1, "y": 2, "z": 3}, "l": {"x": 2, "y": 1}}
    wrong = {"k": {"x": 3, "y": 2, "z": 1}, "l": {"x": 1, "y": 2}}
    for who, says in (("ann", right), ("bob", wrong)):
        for n in range(2):
            page = desk.next(who)
            assert page["screening"]
            assert desk.store.labelers()[who].admitted is None
            desk.submit(who, said(page, says[page["turns"][0][1]], id=f"{who}{n:030}"))
    assert desk.next("bob") == {"state": "refused", "done": 2, "left": 0, "previous": None}
    page = desk.next("ann")
    assert not page["screening"]
    assert page["previous"] is None  # the known answers are no longer open to correction
    desk.submit("ann", said(page))
    assert [(x.labeler, x.screen.id) for x in export.counted(desk.store)] == [
        ("ann", page["screen"])
    ]
    people = desk.store.labelers()
    assert (people["ann"].admitted, people["ann"].ranks_agreement) == (True, 1)
    assert (people["bob"].admitted, people["bob"].ranks_agreement) == (False, 0)
    assert people["cy"].admitted is None
    desk.store.admit("ann", False, 0, None)  # one who has labeled already
    assert export.counted(desk.store) == []
    desk.store.close()


def test_flags_decide_too(tmp_path):
    desk = desk_of(tmp_path, [], known(tmp_path, flags=[["sexual"], [], []]), admit=0.6)
    for n in range(2):
        page = desk.next("ann")
        ranks = {"k": {"x": 1, "y": 2, "z": 3}, "l": {"x": 2, "y": 1}}[page["turns"][0][1]]
        desk.submit("ann", said(page, ranks, id=f"{n:032}"))  # raises no flag
    assert desk.next("ann")["state"] == "refused"
    assert desk.store.labelers()["ann"].flags_agreement == 0
    desk.store.close()


# ---------------------------------------------------------------------------------------- export


def test_exports_are_what_the_scripts_read(tmp_path):
    rows = [*samples(4), {"prompt": "prompt 0", "response": "", "model": "e"}]
    rows += [
        {"prompt": MESSAGES, "responses": ["x", "y"], "models": ["a", "b"], "tools": [{"f": 1}]}
    ]
    desk = desk_of(tmp_path, read(tmp_path, rows), raters=2)
    for who in ("ann", "bob"):
        label_all(desk, who)
    writing = desk_of(tmp_path, read(tmp_path, ["Say it."], "write"), name="written.db")
    writing.submit("ann", {"id": "w" * 32, "screen": writing.next("ann")["screen"],
                           "seconds": 1, "text": "It."})  # fmt: skip
    assert export.write(desk.store, tmp_path / "out", quiet) == {
        "comparisons.jsonl": 10, "demonstrations.jsonl": 0, "rankings.jsonl": 10
    }  # fmt: skip
    records = data.read(
        DataConfig(f"jsonl:{tmp_path}/out/comparisons.jsonl"),
        "comparisons",
        render=False,
        log=quiet,
    )
    assert {r.labeler for r in records} == {"ann", "bob"}
    first = next(r for r in records if r.row["prompt"] == "prompt 0")
    assert (first.replies, first.ranks) == (tuple(f"{m} says 0" for m in "abcd"), (1, 2, 3, 4))
    assert first.row["likert"] == [2, 3, 4, 5]  # the empty response was the first of five
    last = next(r for r in records if r.row["prompt"] == MESSAGES)
    assert last.tools == [{"f": 1}]
    wins = comparison.of_labels(tmp_path / "out" / "rankings.jsonl")
    assert wins["models"]["e"]["responses"] == 2
    won = {(p["model"], p["against"]): p["win_rate"][0] for p in wins["pairs"]}
    assert (won["a", "b"], won["e", "a"], won["d", "a"]) == (1, 1, 0)
    export.write(writing.store, tmp_path / "out", quiet)
    assert not (tmp_path / "out" / "comparisons.jsonl").exists()  # of the earlier export
    (shown,) = data.read(
        DataConfig(f"jsonl:{tmp_path}/out/demonstrations.jsonl"), "demonstrations", log=quiet
    )
    assert (shown.prompt, shown.responses, shown.row["labeler"]) == ("Say it.", ("It.",), "ann")
    for each in (desk, writing):
        each.store.close()


def test_ties_and_merged_models_in_an_export():
    screen = Screen("rank", "p", None, ["x", "y", ""], [["a", "c"], ["b"], ["d"]])
    given = label(screen, "ann", [1, 3, 1], [5, 6, 7])
    assert export.ranking(given) | {"seconds": 0} == {
        "prompt": "p", "models": ["a", "c", "b", "d"], "ranks": [1, 1, 4, 1],
        "labeler": "ann", "seconds": 0,
    }  # fmt: skip
    row = export.comparison(given)
    assert (row["responses"], row["ranks"], row["likert"]) == (["x", "y"], [1, 2], [5, 6])
    assert export.comparison(label(screen, "ann", [1, 1, 3])) is None
    equal = Screen("pairs", "p", None, ["x", "x"], [["a"], ["b"]])
    assert export.comparison(label(equal, "ann", [1, 2])) is None
    assert export.ranking(label(Screen("rank", "p", None, ["x", "y"]), "ann", [1, 2])) is None


# ------------------------------------------------------------------------------ over the network


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A server on loopback, and one on all addresses with a token."""
    folder = tmp_path_factory.mktemp("served")
    spec = jsonl(folder, samples(2, ("a", "b", "<script>alert(1)</script>")))
    local = Server("--data", spec, "--out", str(folder / "local.db"))
    beyond = Server("--data", spec, "--out", str(folder / "beyond.db"), "--host", "0.0.0.0")
    started = [local.start(), beyond.start()]
    yield started
    for server in started:
        server.kill()


def ask(url, method, path, body=None, **headers):
    """(status, headers, text) of a request, as a page of the server would make it."""
    place = urlsplit(url)
    client = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    headers = {key.replace("_", "-"): value for key, value in headers.items() if value is not None}
    if method == "POST":
        headers = {"Origin": f"http://{place.netloc}", **headers}
    data = json.dumps(body) if isinstance(body, dict) else body
    try:
        client.request(method, path, data, headers)
        answer = client.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        client.close()


def entered(url, name, **headers):
    status, got, _ = ask(url, "POST", "/enter", {"name": name}, **headers)
    assert status == 200
    return got["set-cookie"].split(";")[0]


def database_of(url, **headers) -> str:
    """What the page sends along, so that a label never goes to another labeling."""
    return ask(url, "GET", "/", **headers)[2].partition('data-database="')[2].partition('"')[0]


def test_requests_of_other_pages_are_refused(servers):
    url = servers[0].url
    cookie = entered(url, "ann")
    body = {"labeler": "ann", "database": database_of(url)}
    port = urlsplit(url).port
    assert ask(url, "POST", "/next", body, Cookie=cookie)[0] == 200
    assert ask(url, "POST", "/next", body, Cookie=cookie, Origin="http://evil.example")[0] == 403
    assert (
        ask(url, "POST", "/next", body, Cookie=cookie, Origin=f"http://localhost:{port}")[0] == 403
    )
    assert ask(url, "POST", "/next", body, Cookie=cookie, Origin="null")[0] == 403
    assert ask(url, "POST", "/next", body, Cookie=cookie, Origin="")[0] == 403
    for method, path in (("GET", "/"), ("GET", "/agreement"), ("POST", "/next")):
        evil = {"Host": "evil.example", "Origin": "http://evil.example", "Cookie": cookie}
        assert ask(url, method, path, body, **evil)[0] == 421  # a name that points here
    assert ask(url, "GET", "/", Host=f"localhost:{port + 1}")[0] == 200  # a tunnel


def test_a_token_is_asked_for_beyond_loopback(servers):
    url = servers[1].url
    path = f"/?{urlsplit(url).query}"
    assert re.search(r"token=[0-9a-f]{32}$", path)
    for where in ("/", "/agreement", "/?token=", "/?token=" + "0" * 32, "/static/page.js"):
        assert ask(url, "GET", where)[0] == 401
    assert ask(url, "POST", "/enter", {"name": "ann"})[0] == 401
    status, headers, page = ask(url, "GET", path)
    assert (status, "url=/" in page) == (200, True)
    assert "httponly" in headers["set-cookie"].lower()
    assert "samesite=strict" in headers["set-cookie"].lower()
    cookie = headers["set-cookie"].split(";")[0]
    assert ask(url, "GET", "/", Cookie=cookie)[0] == 200
    assert ask(url, "GET", "/", Cookie=cookie[:-1] + "é")[0] == 401
    assert ask(url, "POST", "/enter", {"name": "x"}, Cookie=cookie, Origin="http://evil")[0] == 403
    assert entered(url, "ann", Cookie=cookie)


def test_headers_bodies_and_names(servers):
    url = servers[0].url
    _, headers, page = ask(url, "GET", "/")
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<script(?![^>]*src=)|<[^>]* (on\w+|style)=", page)
    assert not re.search(r"https?://", page)
    assert ask(url, "POST", "/enter", "x" * (1 << 20) + "y")[0] == 413
    chunks = {"Transfer_Encoding": "chunked"}
    parts = (b"%x\r\n%b\r\n" % (len(x), x) for x in [b"y" * (1 << 19)] * 3)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        assert ask(url, "POST", "/enter", b"".join(parts) + b"0\r\n\r\n", **chunks)[0] == 413
    for wrong in ("{", "[]", "\xff", '{"name": 3}', '{"name": "a\\nb"}', '{"name": "\\ud800"}'):
        assert ask(url, "POST", "/enter", wrong.encode("latin-1"))[0] in (400, 422)
    assert ask(url, "GET", "/static/../store.py")[0] == 404
    assert ask(url, "GET", "/next")[0] == 405


def test_what_the_page_asks_for(servers):
    url = servers[0].url
    cookie = entered(url, "Žofie <b>")
    mine = {"labeler": "Žofie <b>", "database": database_of(url)}
    assert "<bdi>Žofie &lt;b&gt;</bdi>" in ask(url, "GET", "/", Cookie=cookie)[2]
    page = json.loads(ask(url, "POST", "/next", mine, Cookie=cookie)[2])
    for other in ({"labeler": "ann"}, {"database": "0" * 32}):  # of a tab that is not up to date
        assert ask(url, "POST", "/next", mine | other, Cookie=cookie)[0] == 409
        assert ask(url, "POST", "/labels", mine | said(page) | other, Cookie=cookie)[0] == 409
    assert ask(url, "POST", "/next", mine)[0] == 409
    assert ask(url, "POST", "/labels", mine | said(page, seconds=-1), Cookie=cookie)[0] == 422
    assert ask(url, "POST", "/labels", mine | said(page, screen="no"), Cookie=cookie)[0] == 404
    for new in (True, False):
        answer = ask(url, "POST", "/labels", mine | said(page), Cookie=cookie)
        assert (answer[0], json.loads(answer[2])) == (200, {"new": new})
    earlier = ask(url, "POST", "/earlier", mine | {"screen": page["screen"]}, Cookie=cookie)
    assert json.loads(earlier[2])["answer"]["ranks"] == said(page)["ranks"]
    report = ask(url, "GET", "/agreement")[2]
    assert "<td><bdi>Žofie &lt;b&gt;</bdi></td><td>1</td>" in report
    assert ask(url, "POST", "/leave", {}, Cookie=cookie)[0] == 200


# ------------------------------------------------------------------------------------ the command


def test_the_script_of_200_screens_sees_what_is_lost():
    a, b = ("ann", {"x": 1, "y": 2}), ("ann", {"z": 1, "y": 2})
    other = ("ann", {"x": 2, "y": 1})
    assert compare([a, b], [b, a]) == {"lost": 0, "double": 0, "other": 0}
    assert compare([a, b], [b]) == {"lost": 1, "double": 0, "other": 0}
    assert compare([a, b], [a, b, b]) == {"lost": 0, "double": 1, "other": 0}
    assert compare([a, b], [other, b]) == {"lost": 0, "double": 0, "other": 1}
    assert compare([a], [("bob", a[1])]) == {"lost": 1, "double": 1, "other": 0}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "jsonl:nowhere.jsonl"], "--data jsonl:nowhere.jsonl: no such file"),
        (["--pairs", "--write"], "--write: choose it or --pairs"),
        (["--raters", "0"], "--raters 0: must be at least 1"),
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--host", "192.0.2.1", "--data", "jsonl:rows.jsonl"], "--host 192.0.2.1 --port 8000: "),
        (["--screening", "known.jsonl"], "--screening known.jsonl: is not miniature, jsonl:PATH"),
        (["--out", "no/labels.db"], "--out no/labels.db: is a directory, or is in none"),
        (["--out", "rows.jsonl", "--port", "0"], "--out rows.jsonl: cannot be used as a database"),
        (["--export", "out"], "--out labels.db: no such database to export"),
    ],
)
def test_wrong_flags(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path, samples())
    with pytest.raises(SystemExit) as end:
        command.cli(flags)
    assert end.value.code == usage.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(SystemExit) as end:
        command.cli(["--out", str(tmp_path / "labels.db")])
    assert end.value.code == usage.USAGE
    assert capsys.readouterr().err == (
        "error: the page needs starlette: pip install 'instructjax[label]'\n"
    )


def test_bad_rows_end_the_program_and_the_export_is_a_command(tmp_path):
    def run(*flags):
        program = [sys.executable, "-m", "instructjax.label", "--out", str(tmp_path / "l.db")]
        return subprocess.run([*program, *flags], capture_output=True, text=True)

    spec = jsonl(tmp_path, [{"prompt": "p"}])
    ended = run("--data", spec, "--port", "0")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {tmp_path}/rows.jsonl:1: field 'responses'")
    desk = desk_of(tmp_path, read(tmp_path, samples(1)), name="l.db")
    label_all(desk, "ann")
    desk.store.close()
    assert run("--export", str(tmp_path / "out")).returncode == 0
    (row,) = map(json.loads, (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines())
    assert row == {
        "prompt": "prompt 0", "responses": [f"{m} says 0" for m in "abcd"], "ranks": [1, 2, 3, 4],
        "labeler": "ann", "seconds": 2.0, "likert": [1, 2, 3, 4], "flags": [[], [], [], []],
    }  # fmt: skip
