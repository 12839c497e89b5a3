"""The database of a labeling: screens, labelers, and all that was ever submitted.

SQLite runs in WAL mode with `synchronous=FULL`: once `submit` has returned, the label is on the
disk, even if the process is killed. Labels are only added. If a labeler has several labels for one
screen, the latest counts. The page draws an id for each submission, and each id is stored once, so
a page that got no answer may send it again.
"""

import contextlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructjax.label import screens
from instructjax.label.screens import Screen

_MAGIC = 0x1ABE1DB  # of SQLite's application_id: the file holds labels
_TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE screens (id TEXT PRIMARY KEY, content TEXT NOT NULL) STRICT;
CREATE TABLE labelers (
    name TEXT PRIMARY KEY,
    entered REAL NOT NULL,
    admitted INTEGER,            -- null: not decided, or there was no screening set
    ranks_agreement REAL,        -- with the screening set's ranks
    flags_agreement REAL         -- with its flags, if it has any
) STRICT;
CREATE TABLE shown (
    screen TEXT NOT NULL REFERENCES screens (id),
    labeler TEXT NOT NULL REFERENCES labelers (name),
    places TEXT NOT NULL,        -- for each place, the number of its response in the data
    since REAL NOT NULL,
    done INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (screen, labeler)
) STRICT;
CREATE TABLE labels (
    number INTEGER PRIMARY KEY,  -- in the order in which they came
    id TEXT NOT NULL UNIQUE,
    screen TEXT NOT NULL REFERENCES screens (id),
    labeler TEXT NOT NULL REFERENCES labelers (name),
    received REAL NOT NULL,
    seconds REAL NOT NULL,
    answer TEXT NOT NULL
) STRICT;
CREATE INDEX of_labeler ON labels (labeler, screen);
"""


@dataclass(frozen=True)
class Label:
    """What counts of a labeler's submissions for a screen."""

    screen: Screen
    labeler: str
    answer: dict[str, Any]  # as `answers.parse` returns it
    seconds: float  # of all of the labeler's submissions for it


@dataclass(frozen=True)
class Labeler:
    """Who labels; `admitted` is None before a screening set decides, or without one."""

    name: str
    admitted: bool | None
    ranks_agreement: float | None
    flags_agreement: float | None


class Store:
    """An open database. All methods but `transaction` are one statement or one transaction."""

    def __init__(self, path: Path):
        """Opens a file, or makes it, readable by its owner alone.

        Raises:
          ValueError: the file is another one than a database of labels.
          OSError: it cannot be opened.
        """
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        try:
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
            try:
                self._open(path)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path}: cannot be used as a database of labels: {error}") from error

    def _open(self, path: Path) -> None:
        with self.transaction():
            empty = not self._one("SELECT count(*) FROM sqlite_master")[0]
            if not empty and self._one("PRAGMA application_id")[0] != _MAGIC:
                raise ValueError(f"{path}: is a database of something else")
            if empty:
                for statement in _TABLES.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id={_MAGIC}")
                for key in ("id", "token"):
                    self._db.execute(
                        "INSERT INTO about VALUES (?, ?)", (key, secrets.token_hex(16))
                    )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is written within; within another one, a part of that one."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values).fetchone()

    def about(self, key: str) -> str:
        """The database's `id`, or the `token` of pages beyond this machine, drawn when made."""
        return self._one("SELECT value FROM about WHERE key = ?", key)[0]

    # ---- screens and labelers

    def add(self, given: Iterable[Screen]) -> None:
        """Adds the screens that the database does not have."""
        rows = [(screen.id, screens.to_json(screen)) for screen in given]
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO screens VALUES (?, ?)", rows)

    def enter(self, name: str, now: float) -> None:
        """Makes a labeler, if there is none of this name."""
        self._db.execute(
            "INSERT OR IGNORE INTO labelers (name, entered) VALUES (?, ?)", (name, now)
        )

    def labelers(self) -> dict[str, Labeler]:
        rows = self._db.execute(
            "SELECT name, admitted, ranks_agreement, flags_agreement FROM labelers ORDER BY name"
        )
        return {
            name: Labeler(name, None if admitted is None else bool(admitted), *shares)
            for name, admitted, *shares in rows
        }

    def admit(self, name: str, admitted: bool, ranks: float, flags: float | None) -> None:
        """Notes the decision about a labeler, and the agreement with a screening set."""
        self._db.execute(
            "UPDATE labelers SET admitted = ?, ranks_agreement = ?, flags_agreement = ?"
            " WHERE name = ?",
            (admitted, ranks, flags, name),
        )

    # ---- giving screens out

    def taken(self, besides: str, since: float) -> dict[str, int]:
        """How many labelers besides one have labeled a screen, or were shown it after `since`."""
        rows = self._db.execute(
            "SELECT screen, count(*) FROM shown WHERE labeler != ? AND (done OR since > ?)"
            " GROUP BY screen",
            (besides, since),
        )
        return dict(rows.fetchall())

    def opened(self, labeler: str) -> list[str]:
        """The screens that a labeler was shown and has not labeled, the latest first."""
        rows = self._db.execute(
            "SELECT screen FROM shown WHERE labeler = ? AND NOT done ORDER BY since DESC",
            (labeler,),
        )
        return [screen for (screen,) in rows]

    def done(self, labeler: str) -> list[str]:
        """The screens that a labeler has labeled, in the order of their first labels."""
        rows = self._db.execute(
            "SELECT screen FROM labels WHERE labeler = ? GROUP BY screen ORDER BY min(number)",
            (labeler,),
        )
        return [screen for (screen,) in rows]

    def show(self, labeler: str, screen: str, places: list[int], now: float) -> None:
        """Notes that a labeler is shown a screen. The order of its first time stays: what the
        labeler says of a place must be read as it was shown, whatever the seed is by then."""
        self._db.execute(
            "INSERT INTO shown (screen, labeler, places, since) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET since = excluded.since",
            (screen, labeler, json.dumps(places), now),
        )

    def seen(self, labeler: str, screen: str) -> tuple[Screen, list[int]] | None:
        """A screen that a labeler was shown, and the order of its responses; None of any other."""
        row = self._one(
            "SELECT content, places FROM shown JOIN screens ON screen = id"
            " WHERE labeler = ? AND screen = ?",
            *(labeler, screen),
        )
        return None if row is None else (screens.from_json(row[0]), json.loads(row[1]))

    # ---- labels

    def submit(
        self, id: str, screen: str, labeler: str, answer: Any, seconds: float, now: float
    ) -> bool:
        """Keeps a label. Returns whether it is new: one of the same id was kept before if not."""
        with self.transaction():
            added = self._db.execute(
                "INSERT INTO labels (id, screen, labeler, received, seconds, answer)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (id, screen, labeler, now, seconds, json.dumps(answer, ensure_ascii=False)),
            )
            if added.rowcount:
                self._db.execute(
                    "UPDATE shown SET done = 1 WHERE screen = ? AND labeler = ?", (screen, labeler)
                )
        return bool(added.rowcount)

    def answer(self, labeler: str, screen: str) -> dict[str, Any] | None:
        """The latest that a labeler has said of a screen."""
        row = self._one(
            "SELECT answer FROM labels WHERE labeler = ? AND screen = ?"
            " ORDER BY number DESC LIMIT 1",
            *(labeler, screen),
        )
        return None if row is None else json.loads(row[0])

    def labels(self) -> list[Label]:
        """What counts: the latest answer of each labeler to each screen, in the order of first
        labels. Answers to a screening set, and of labelers who were not admitted, are among them.
        """
        rows = self._db.execute(
            "SELECT content, labeler, answer, total FROM labels"
            " JOIN (SELECT min(number) AS first, max(number) AS last, sum(seconds) AS total"
            "       FROM labels GROUP BY screen, labeler) ON number = last"
            " JOIN screens ON screens.id = screen ORDER BY first"
        )
        return [
            Label(screens.from_json(content), labeler, json.loads(answer), seconds)
            for content, labeler, answer, seconds in rows
        ]
