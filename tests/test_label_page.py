"""The labeling page in a real Chromium: keys, dragging, corrections, a dead server, nasty text."""

import contextlib
import json
import sqlite3

import pytest
from label_screens import Server, find_chromium, wait_for
from test_label import jsonl, samples

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

NASTY = {
    "script": "<script>document.title = 'x'</script><img src=x onerror=\"document.title = 'x'\">",
    "bidi": "abc \u202edesrever\u202c \u2067def\u2069",
    "hebrew": "שלום עולם, זה טקסט שנכתב מימין לשמאל.",
    "long": "word " * 20_000,
}


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labeled")


@pytest.fixture(scope="module")
def server(folder):
    """Many screens of four responses; each test is a person of its own."""
    flags = ["--data", jsonl(folder, samples(12)), "--out", str(folder / "labels.db")]
    started = Server(*flags, "--raters", "9").start()
    yield started
    started.kill()


@contextlib.contextmanager
def person(chromium, url, name, **options):
    """A person's page; fails if the page writes an error to the console or asks another host."""
    context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith(url) else problems.append(r.url))
    page.goto(url)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    ready(page)
    yield page
    context.close()
    assert [p for p in problems if "Failed to load resource: net::ERR" not in p] == []


def ready(page):
    page.wait_for_selector("#screen:not([hidden]):not([inert])")


def wait(page, expression):
    """Waits for an expression of the page; `wait_for_function` needs eval, which the page's policy
    refuses."""
    wait_for(lambda: page.evaluate(expression), expression)


def done(page, count):
    """Waits until the page shows that so many screens are done, and the next one."""
    wait(page, f"document.getElementById('progress').textContent.startsWith('{count} done')")
    ready(page)


def texts(page):
    return page.locator(".card .text").all_inner_texts()


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def kept(folder, name, file="labels.db"):
    """For each label of a person, in the order of their coming: text -> rank, and the answer."""
    with contextlib.closing(sqlite3.connect(folder / file)) as db:
        rows = db.execute(
            "SELECT content, answer FROM labels JOIN screens ON screens.id = screen"
            " WHERE labeler = ? ORDER BY number",
            (name,),
        ).fetchall()
    found = [(json.loads(content), json.loads(answer)) for content, answer in rows]
    return [
        (dict(zip(content["responses"], answer.get("ranks", []), strict=True)), answer)
        for content, answer in found
    ]


def rate_all(page):
    """Rates the four responses 5, 6, 7, 2."""
    press(page, "5", "j", "6", "j", "7", "j", "2", "k", "k", "k")


def test_a_screen_by_keys_alone(chromium, server, folder):
    with person(chromium, server.url, "keys") as page:
        a, b, c, d = texts(page)
        press(page, "Enter")  # not yet
        assert "No rating: A, B, C, D; no rank: A, B, C, D" in page.inner_text("#notice")
        rate_all(page)
        press(page, "w", "z", "w")
        press(page, "Alt+ArrowUp", "j", "Alt+ArrowDown", "j", "Alt+ArrowDown", "=")  # A, then B C
        press(page, "j", "Shift+Digit1")  # D before all
        places = [x.inner_text() for x in page.locator(".card .place").all()]
        assert places == ["rank 2", "rank 3, tied with C", "rank 3, tied with B", "rank 1"]
        press(page, "k", "=", "=", "Alt+ArrowUp", "Alt+ArrowUp", "Alt+ArrowUp", "Alt+ArrowUp")
        press(page, "=")  # C is alone and first: nothing is above it
        places = [x.inner_text() for x in page.locator(".card .place").all()]
        assert places == ["rank 3", "rank 4", "rank 1", "rank 2"]
        press(page, "Alt+ArrowDown", "=", "Alt+ArrowDown")
        places = [x.inner_text() for x in page.locator(".card .place").all()]
        assert places == ["rank 3", "rank 4", "rank 2", "rank 1"]
        press(page, "=", "Enter")
        done(page, 1)
    ((ranks, answer),) = kept(folder, "keys")
    assert ranks == {c: 1, d: 1, a: 3, b: 4}
    content = [*ranks]
    assert [answer["likert"][content.index(x)] for x in (a, b, c, d)] == [5, 6, 7, 2]
    assert answer["flags"][content.index(a)] == ["moral_judgment"]


def drag(page, letter, to, where=0.5):
    """Drags a response's chip to a part of the height of an element."""
    chip = page.locator(f".chip:has(b:text-is('{letter}')) .excerpt").bounding_box()
    box = page.locator(to).bounding_box()
    page.mouse.move(chip["x"] + 5, chip["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + where * box["height"], steps=3)
    page.mouse.up()


def test_dragging_and_the_buttons(chromium, server, folder):
    with person(chromium, server.url, "mouse") as page:
        a, b, c, d = texts(page)
        for i, n in enumerate((1, 2, 3, 4)):
            page.locator(".card").nth(i).locator(f".likert label:has-text('{n}')").click()
        page.locator(".card").nth(2).get_by_label("Expresses opinion").check()
        page.locator(".chip:has(b:text-is('A')) [data-move=down]").click()
        drag(page, "B", "#rows li:nth-child(1)", 0.05)  # before A
        drag(page, "C", "#rows li:nth-child(2)")  # onto A
        drag(page, "D", "#rows li:nth-child(2)", 0.98)  # after both
        rows = [x.inner_text().split() for x in page.locator("#rows li").all()]
        assert [[w for w in row if w in "ABCD"] for row in rows] == [["B"], ["A", "C"], ["D"]]
        drag(page, "B", "#rows li:nth-child(3)")  # onto D
        page.click("#submit")
        done(page, 1)
    ((ranks, answer),) = kept(folder, "mouse")
    assert ranks == {a: 1, c: 1, b: 3, d: 3}
    assert answer["flags"][[*ranks].index(c)] == ["opinion"]


def test_a_reload_keeps_the_draft_and_u_corrects(chromium, server, folder):
    with person(chromium, server.url, "again") as page:
        first = texts(page)
        rate_all(page)
        press(page, "e", "Alt+ArrowDown", "j", "=")
        page.reload()
        ready(page)
        assert texts(page) == first
        assert page.locator(".likert input:checked").count() == 4
        assert page.locator("#rows .chip").count() == 2
        assert page.locator(".flags input:checked").count() == 1
        press(page, "j", "j", "Alt+ArrowDown", "j", "Alt+ArrowDown", "Enter")
        done(page, 1)
        second = texts(page)
        assert second != first
        press(page, "4", "u")
        page.wait_for_selector("#correcting:not([hidden])")
        ready(page)
        assert texts(page) == first
        press(page, "j", "j", "j", "Shift+Digit1", "Enter")
        page.wait_for_selector("#correcting", state="hidden")
        ready(page)
        assert texts(page) == second
        assert page.locator(".likert input:checked").count() == 1  # the draft of before
        press(page, "u")  # and once more, but it stays as it is
        page.wait_for_selector("#correcting:not([hidden])")
        ready(page)
        for _ in range(2):
            assert page.locator(".card .place").nth(3).inner_text() == "rank 1"
            press(page, "j", "j", "j", "Alt+ArrowDown")
            assert page.locator(".card .place").nth(3).inner_text() == "rank 2"
            page.click("#forward")
            page.wait_for_selector("#correcting", state="hidden")
            ready(page)
            press(page, "u")
            page.wait_for_selector("#correcting:not([hidden])")
            ready(page)
    (before, _), (after, answer) = kept(folder, "again")
    a, b, c, d = first
    assert before == {a: 1, b: 1, c: 3, d: 4}
    assert after == {d: 1, a: 2, b: 2, c: 4}
    assert answer["flags"][[*after].index(a)] == ["hallucination"]


def test_what_is_sent_to_a_dead_server_is_sent_when_it_is_back(chromium, server, folder):
    with person(chromium, server.url, "patient") as page:
        rate_all(page)
        server.kill()
        press(page, "Alt+ArrowDown", *["j", "Alt+ArrowDown"] * 3, "Enter")
        wait(page, "document.getElementById('notice').textContent.includes('kept')")
        assert page.inner_text("#notice") == (
            "The server does not answer. 1 screen is kept in this browser and will be sent when it"
            " answers."
        )
        server.start()
        done(page, 1)
        assert not page.is_visible("#notice")
        # And without a network, with a reload in between.
        rate_all(page)
        press(page, "Alt+ArrowDown", *["j", "Alt+ArrowDown"] * 3)
        answers = []
        page.route("**/labels", lambda route: (route.fetch(), answers.append(1), route.abort()))
        press(page, "Enter")  # arrives, but its answer does not
        page.wait_for_selector("#notice:not([hidden])")
        page.unroute_all(behavior="wait")
        page.reload()
        done(page, 2)
        assert answers
        assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('/label/'))") == []
    assert len(kept(folder, "patient")) == 2


@pytest.fixture(scope="module")
def others(folder):
    """Servers of pairs, of prompts to write for, and of nasty text, started together."""
    nasty = [{"prompt": "<b>Which?</b>", "model": m, "response": r} for m, r in NASTY.items()]
    given = {
        "pairs": ["--data", jsonl(folder, samples(1, ("a", "b")), "two.jsonl"), "--pairs"],
        "write": ["--data", jsonl(folder, [{"prompt": "Say it."}], "prompts.jsonl"), "--write"],
        "nasty": ["--data", jsonl(folder, nasty, "nasty.jsonl"), "--raters", "2"],
    }
    servers = {
        name: Server(*flags, "--out", str(folder / f"{name}.db")) for name, flags in given.items()
    }
    for server in servers.values():
        server.start()
    yield servers
    for server in servers.values():
        server.kill()


def test_pairs(chromium, others, folder):
    with person(chromium, others["pairs"].url, "chooser") as page:
        a, b = texts(page)
        press(page, "1", "=", "2", "Enter")
        wait(page, "document.body.dataset.kind === 'none'")
        assert page.inner_text("#task") == "No screen is left for you. Thank you!"
        press(page, "u")
        page.wait_for_selector("#choice [aria-pressed=true]:has-text('B is better')")
    ((ranks, answer),) = kept(folder, "chooser", "pairs.db")
    assert ranks == {b: 1, a: 2}
    assert "likert" not in answer


def test_writing(chromium, others, folder):
    with person(chromium, others["write"].url, "writer") as page:
        press(page, "Control+Enter")
        assert page.inner_text("#notice") == "Nothing is written yet."
        page.keyboard.type("It.\nu j = 1")
        page.reload()
        ready(page)
        assert page.input_value("#text") == "It.\nu j = 1"
        press(page, "Control+Enter")
        wait(page, "document.body.dataset.kind === 'none'")
    assert kept(folder, "writer", "write.db") == [({}, {"text": "It.\nu j = 1"})]


def test_nasty_text_is_text(chromium, others):
    with person(chromium, others["nasty"].url, "<i>careful</i>") as page:
        assert page.title() == "Labeling"
        assert page.inner_text("#who bdi") == "<i>careful</i>"
        assert page.inner_text("#prompt .turn div") == "<b>Which?</b>"
        shown = texts(page)
        assert NASTY["script"] in shown
        assert NASTY["hebrew"] in shown
        assert "abc U+202EdesreverU+202C U+2067defU+2069" in shown
        assert NASTY["long"].strip() in [text.strip() for text in shown]
        assert page.locator("main script, main img").count() == 0
        for text in page.locator(".card .text").all():
            box = text.bounding_box()
            assert box["height"] < 450
            assert box["width"] < 900
        hebrew = page.locator(".card .text", has_text="שלום")
        assert hebrew.evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_a_phone(chromium, others, folder):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with person(chromium, others["nasty"].url, "thumb", color_scheme="dark", **phone) as page:
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width == [360, 360]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 27)"
        for i in range(4):
            page.locator(".card").nth(i).locator(".likert label:has-text('4')").tap()
            page.locator("#tray .chip").first.locator("[data-move=down]").tap()
        page.locator("#submit").tap()
        wait(page, "document.body.dataset.kind === 'none'")
    assert [sorted(ranks.values()) for ranks, _ in kept(folder, "thumb", "nasty.db")] == [
        [1, 2, 3, 4]
    ]
