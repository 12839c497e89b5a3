"""Simulated people label screens in real browsers, while browsers and the server are killed.

    python benchmarks/label_screens.py                         # 4 people, 200 screens, 20 kills
    python benchmarks/label_screens.py --screens 20 --kills 2  # a short form

Each person is a separate Chromium, driven by keys, which rates and ranks all responses with ties,
and submits. Two of the browsers are killed in the middle of a screen and started again. The server
is killed with SIGKILL, and started again on the same port, after equal shares of the work. A
quarter of the screens is for two people.

Needs `pip install 'instructjax[test]'` and an installed Chromium.
Result: a line with the seconds and the numbers of labels that were submitted, are in the database,
are lost, are double, or differ from what was entered. Exit code 1 if any is lost, double or
different, or after an error.
"""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from instructjax.ranges import Count, CountOrZero, Seed, check

PEOPLE = ("Ada", "Ben", "Chi", "Dov")
KILLED = PEOPLE[:2]  # whose browsers are killed in the middle of a screen
SHARED, RATERS = 0.25, 2
PATIENCE = 60.0  # seconds to wait for anything


@dataclass(frozen=True)
class Config:
    """Label screens, and count what is lost."""

    screens: Count = 200
    """Number of screens."""
    kills: CountOrZero = 20
    """How often the server is killed."""
    seed: Seed = 0
    """Seed of the data and of what people say."""

    def __post_init__(self) -> None:
        check(self)


class Server:
    """`python -m instructjax.label` as a process that can be killed and started again.

    Attributes:
      url: the address that it printed, token included.
    """

    def __init__(self, *flags: str):
        self.flags = [*flags]
        self.url = ""
        self._process: subprocess.Popen[str] | None = None
        self._port = "0"

    def start(self) -> "Server":
        """Starts the process, on the port that it had before. Returns once it listens."""
        command = [sys.executable, "-m", "instructjax.label", *self.flags, "--port", self._port]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        printed = ""
        for line in self._process.stdout:
            printed += line
            if found := re.match(r"labeling: +(http://.*:([0-9]+)/.*)", line):
                self.url, self._port = re.sub("//.*:", "//127.0.0.1:", found[1]), found[2]
                return self
        raise RuntimeError(f"the server did not start:\n{printed}")

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A Chromium with a profile that outlives it, as a person's has."""

    def __init__(self, playwright: Any, profile: Path):
        self._playwright, self._profile = playwright, profile
        self._process: subprocess.Popen[bytes] | None = None

    def page(self) -> Any:
        """Starts the browser. Returns its page."""
        place = self._profile / "DevToolsActivePort"
        place.unlink(missing_ok=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={self._profile}", "about:blank"]
        executable = find_chromium()
        assert executable is not None, "no Chromium is installed"
        with (self._profile.parent / f"{self._profile.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [executable, *flags], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(lambda: place.exists() and place.read_text().count("\n"), "the browser")
        port = place.read_text().split("\n")[0]
        browser = self._playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
        return browser.contexts[0].pages[0]

    def kill(self) -> None:
        """SIGKILL, to all its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def wait_for(happened: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------- people


@dataclass
class Work:
    """What all people have done, of their own memory."""

    submitted: list[tuple[str, dict[str, int]]] = field(default_factory=list)  # (who, text -> rank)
    ended: int = 0
    errors: list[BaseException] = field(default_factory=list)


def make_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows as evaluate.py writes them: 4 to 9 models answer each prompt."""
    draw = random.Random(seed)
    for i in range(count):
        for model in range(draw.randint(4, 9)):
            words = " ".join(draw.choices(["this", "is", "so", "because", "of", "it"], k=12))
            response = f"quality {draw.random():.3f}: {words}."
            yield {"model": f"model-{model}", "prompt": f"prompt {i}", "response": response}


def open_page(page: Any, url: str, name: str) -> None:
    """Opens the page, and enters the name if it asks for one. Waits while the server is away."""

    def there() -> bool:
        with contextlib.suppress(Exception):
            page.goto(url)
            if page.locator("#enter").count():
                page.fill("#name", name)
                page.click("#enter button")
            page.wait_for_selector("#screen:not([hidden])", timeout=3000)
            return True
        return False

    wait_for(there, "the page")


def rank_by_keys(page: Any, draw: random.Random) -> dict[str, int]:
    """Rates and ranks all responses of the screen, by keys. Returns text -> place, as was meant."""
    texts = page.locator(".card .text").all_inner_texts()
    felt = [float(text.split()[1].rstrip(":")) + draw.gauss(0, 0.1) for text in texts]
    best_first = sorted(range(len(texts)), key=lambda i: -felt[i])
    press, places, at = page.keyboard.press, {}, 0
    for n, i in enumerate(best_first):
        for _ in range(abs(i - at)):
            press("j" if i > at else "k")
        at = i
        press(str(max(1, min(7, math.ceil(7 * felt[i])))))
        tied = n > 0 and felt[best_first[n - 1]] - felt[i] < 0.03
        press("=" if tied else "Alt+ArrowDown")
        places[texts[i]] = places[texts[best_first[n - 1]]] if tied else n + 1
    return places


def be(name: str, server: Server, folder: Path, work: Work, seed: int) -> None:
    """Labels until no screen is left."""
    from playwright.sync_api import sync_playwright

    draw = random.Random(f"{seed} {name}")
    with sync_playwright() as playwright:
        browser = Browser(playwright, folder / name)
        page = browser.page()
        try:
            open_page(page, server.url, name)
            for n in range(10**6):
                page.wait_for_selector("#screen:not([inert])", timeout=1000 * PATIENCE)
                if page.evaluate("document.body.dataset.kind") == "none":
                    break
                places = rank_by_keys(page, draw)
                if name in KILLED and n == 2:
                    browser.kill()
                    page = browser.page()
                    open_page(page, server.url, name)
                    # The draft may be there or not: say it anew.
                    page.evaluate("localStorage.clear()")
                    page.reload()
                    page.wait_for_selector("#screen:not([hidden])")
                    continue
                page.keyboard.press("Enter")
                work.submitted.append((name, places))
        finally:
            browser.kill()


def run(name: str, server: Server, folder: Path, work: Work, seed: int) -> None:
    try:
        be(name, server, folder, work, seed)
    except BaseException as error:
        work.errors.append(error)
    finally:
        work.ended += 1


# ---------------------------------------------------------------------------------- what came of it


def in_database(file: Path) -> list[tuple[str, dict[str, int]]]:
    """(who, text -> rank) of every row of the database, corrections included."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        rows = db.execute(
            "SELECT labeler, content, answer FROM labels JOIN screens ON screens.id = screen"
        ).fetchall()
    return [
        (
            name,
            dict(zip(json.loads(content)["responses"], json.loads(answer)["ranks"], strict=True)),
        )
        for name, content, answer in rows
    ]


def compare(submitted: list[Any], kept: list[Any]) -> dict[str, int]:
    """How many labels were lost, are double, or are not what the person meant."""

    def keyed(labels: list[Any]) -> dict[Any, list[dict[str, int]]]:
        found: dict[Any, list[dict[str, int]]] = {}
        for name, ranks in labels:
            found.setdefault((name, *sorted(ranks)), []).append(ranks)
        return found

    meant, there = keyed(submitted), keyed(kept)
    return {
        "lost": sum(max(0, len(x) - len(there.get(key, []))) for key, x in meant.items()),
        "double": sum(max(0, len(x) - len(meant.get(key, []))) for key, x in there.items()),
        "other": sum(there[key][-1] != x[-1] for key, x in meant.items() if key in there),
    }


def main(config: Config) -> int:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, work = Path(name), Work()
        data, database = folder / "samples.jsonl", folder / "labels.db"
        rows = make_rows(config.screens, config.seed)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--data", f"jsonl:{data}", "--out", str(database), "--raters", str(RATERS)]
        server = Server(*flags, "--shared", str(SHARED)).start()
        for person in PEOPLE:
            (folder / person).mkdir()
        people = [
            threading.Thread(target=run, args=(x, server, folder, work, config.seed))
            for x in PEOPLE
        ]
        for person in people:
            person.start()
        total = config.screens + math.ceil(SHARED * config.screens) * (RATERS - 1)
        for kill in range(1, config.kills + 1):
            share = total * kill // (config.kills + 1)
            while len(work.submitted) < share and work.ended < len(PEOPLE):
                time.sleep(0.02)
            server.kill()
            time.sleep(0.5)
            server.start()
        for person in people:
            person.join()
        server.kill()
        for error in work.errors:
            print(f"error: {error!r}")
        kept = in_database(database)
        result = compare(work.submitted, kept)
        counts = ", ".join(f"{count} {what}" for what, count in result.items())
        seconds = time.monotonic() - begin
        print(
            f"{config.screens} screens, {len(PEOPLE)} people, {config.kills} kills of the server,"
            f" {len(KILLED)} of browsers: {len(work.submitted)} labels submitted of {total} wanted,"
            f" {len(kept)} in the database: {counts}; {seconds:.0f} s"
        )
        export = [sys.executable, "-m", "instructjax.label", "--out", str(database)]
        subprocess.run([*export, "--export", str(folder / "export")], check=True)
    return int(any(result.values()) or bool(work.errors) or len(kept) != total)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
