"""Judgements on disk: one SQLite file, in which each is committed before anybody is told.

A row of `asked` is one showing of an item to a rater: it begins as a lease, and the judgement is written into it. Its
token comes back with the form, so that a form that is sent twice is one judgement.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from trl_ext.rating.answers import (
    Answer,
    Item,
    fingerprint,
    items_of,
    name_of,
    read_answers,
    read_attention,
    written,
)
from trl_ext.rating.asking import REPEAT_AFTER, History, attention_every, due
from trl_ext.rating.modes import MODES, Mode, Verdict, as_shown, as_stored, shuffled
from trl_ext.rating.records import Annotation, Compared, Progress, Shown

T = TypeVar("T")
APPLICATION = 0x74726C72  # marks the file as ours
LEASE = 15 * 60.0  # seconds for which an item is kept for the rater who sees it
LONGEST_NAME = 60
MOST_RATERS = 1_000_000  # of an item
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE prompts (number INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE answers (number INTEGER PRIMARY KEY, id TEXT, prompt INTEGER NOT NULL REFERENCES prompts,
    completion TEXT NOT NULL, policy TEXT, tokens INTEGER);
CREATE TABLE items (number INTEGER PRIMARY KEY, answers TEXT NOT NULL, kind TEXT NOT NULL, known TEXT,
    done INTEGER NOT NULL DEFAULT 0);
CREATE INDEX items_of_kind ON items(kind, number, done);
CREATE TABLE raters (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, reached INTEGER NOT NULL DEFAULT -1);
CREATE TABLE asked (number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE,
    item INTEGER NOT NULL REFERENCES items, rater INTEGER NOT NULL REFERENCES raters,
    kind TEXT NOT NULL CHECK (kind IN ('ask', 'repeat', 'attention')),
    shown TEXT NOT NULL, since REAL NOT NULL, lease REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'judged', 'unsure', 'skipped')),
    verdict TEXT, comment TEXT NOT NULL DEFAULT '', seconds REAL, turn INTEGER,
    CHECK ((state = 'judged') = (verdict IS NOT NULL)), CHECK ((state = 'open') = (turn IS NULL)));
CREATE UNIQUE INDEX asked_once ON asked(item, rater, kind);
CREATE INDEX asked_open ON asked(item) WHERE state = 'open';
CREATE INDEX asked_of_rater ON asked(rater, turn, kind);
"""
# Places of an item that are taken: it was judged, or somebody has it before them. A skip gives the place back.
TAKEN = """(items.done + (SELECT count(*) FROM asked AS held WHERE held.item = items.number AND held.state = 'open'
    AND held.kind = 'ask' AND held.lease > :now AND held.rater != :rater))"""


class StoreError(ValueError):
    """A store that cannot be used as asked. The message is one sentence with file and remedy."""


@dataclass
class Store:
    """The file of judgements. One process at a time may `open` it to write; any may `read`.

    Its methods are for one thread at a time.
    """

    path: Path
    connection: sqlite3.Connection
    lock: FileLock | None = None
    clock: Callable[[], float] = time.time
    settings: dict[str, Any] = field(default_factory=dict)
    mode: Mode = MODES["stars"]
    items: int = 0  # to be asked about
    attention: int = 0  # whose verdict is known
    done: int = 0  # judgements of new items
    needed: int = 0  # how many these will be; where --per-item was greater before, some items have more than it says
    unread: list[str] = field(default_factory=list)  # columns of the answers, where nothing says who wrote these

    # Opening ---------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | Path,
        answers: str | Path | None = None,
        mode: str | None = None,
        per_item: int | None = None,
        repeats: float | None = None,
        attention: str | Path | None = None,
    ) -> Store:
        """The store at `path`, made anew where there is none. What is None is as it was; at first, mode "stars", one
        rater an item, and no repeats.

        Args:
            answers: the file of answers to be judged; needed where the store is new.
            mode: a name in `MODES`.
            per_item: how many people judge each item.
            repeats: the share of a rater's items that are asked a second time.
            attention: feedback whose judgement is known, which every rater is asked about among the rest.

        Raises:
            StoreError: the store is in use, of other answers or of another mode, or it is no store.
            FeedbackError, FileNotFoundError: the answers or attention items cannot be used.
            ValueError: a setting is out of range.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"The folder {str(path.parent)!r} does not exist: make it, or name another store.")
        if per_item is not None and not 1 <= per_item <= MOST_RATERS:
            raise ValueError(f"--per-item is {per_item}: each item needs one rater or more, {MOST_RATERS:,} at most.")
        if repeats is not None and not 0 <= repeats <= 0.5:
            raise ValueError(f"--repeats is {repeats:g}: give a share from 0 to 0.5.")
        lock = FileLock(f"{path}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StoreError(
                f"{path} is in use by another `trl-ext rate`: open the link that it printed, or stop it first."
            ) from None
        try:
            with _usable(path):
                return cls._opened(path, lock, answers, mode, per_item, repeats, attention)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(
        cls,
        path: Path,
        lock: FileLock,
        answers: str | Path | None,
        mode: str | None,
        per_item: int | None,
        repeats: float | None,
        attention: str | Path | None,
    ) -> Store:
        is_new = not path.exists() or path.stat().st_size == 0
        if is_new and answers is None:
            raise StoreError(f"The store {str(path)!r} does not exist: name the file of answers that it is for.")
        rows, unread = read_answers(answers) if answers is not None else ([], [])
        if is_new and attention is not None:  # no store is made where it cannot be used
            read_attention(attention, MODES[mode or "stars"])
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        store = cls(path, connection, lock)
        store.unread = unread if all(row.policy is None for row in rows) else []
        try:
            if not is_new:
                store._recognise()
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # on the disk before anybody is told
            connection.execute("PRAGMA foreign_keys = ON")
            if is_new or not store._has_tables():
                if not rows:
                    raise StoreError(f"{path} is empty: name the file of answers that it is for.")
                store._fill(rows, str(answers), MODES[mode or "stars"])
            store._load()
            store._check(rows, str(answers), mode)
            changed = {"per_item": per_item, "repeats": repeats}
            with store._transaction():
                for name, value in changed.items():
                    if value is not None:
                        store._set(name, value)
                if attention is not None:
                    store._add_attention(attention)
            store._load()
        except BaseException:
            connection.close()
            raise
        return store

    @classmethod
    def read(cls, path: str | Path) -> Store:
        """The store at `path`, to be read, also while raters write.

        Raises:
            FileNotFoundError, StoreError: there is none.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"The store {str(path)!r} does not exist.")
        with _usable(path):
            store = cls(path, sqlite3.connect(path, isolation_level=None, check_same_thread=False))
            try:
                store._recognise()
                if not store._has_tables():
                    raise StoreError(f"{path} is empty: nothing was asked yet.")
                store._load()
            except BaseException:
                store.close()
                raise
        return store

    def __str__(self) -> str:
        return f"{self.path}: {self.items:,} items to judge ({self.mode.name}), {self.done:,} judgements so far"

    def prompts_left_out(self) -> int:
        """How many prompts have no answers that could be judged in this mode."""
        rows = self.connection.execute("SELECT answers FROM items")
        asked = {number for (numbers,) in rows for number in json.loads(numbers)}
        prompts = self.connection.execute("SELECT number, prompt FROM answers").fetchall()
        return len({prompt for _, prompt in prompts} - {prompt for number, prompt in prompts if number in asked})

    def close(self) -> None:
        self.connection.close()
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recognise(self) -> None:
        (mark,) = self._one("PRAGMA application_id")
        if mark not in (0, APPLICATION) or (mark == 0 and self._one("SELECT 1 FROM sqlite_master") is not None):
            raise StoreError(f"{self.path} is a database of something else: name another store.")

    def _has_tables(self) -> bool:
        return self._one("PRAGMA application_id") == (APPLICATION,)

    def _fill(self, answers: Sequence[Answer], source: str, mode: Mode) -> None:
        """All of it or nothing: the mark comes with the commit."""
        seed = fingerprint(answers)
        items = items_of(answers, mode, seed)
        with self._transaction():
            for statement in SCHEMA.split(";"):
                self.connection.execute(statement)
            first = {"mode": mode.name, "answers": seed, "source": source, "per_item": 1, "repeats": 0.0}
            for name, value in {**first, "secret": secrets.token_urlsafe(16)}.items():
                self._set(name, value)
            self._add(answers, items)
            self.connection.execute(f"PRAGMA application_id = {APPLICATION}")

    def _add(self, answers: Sequence[Answer], items: Sequence[Item]) -> None:
        (start,) = self._one("SELECT count(*) FROM answers")
        (prompts,) = self._one("SELECT count(*) FROM prompts")
        numbers: dict[str, int] = {}
        for number, answer in enumerate(answers, start):
            text = written(answer.prompt)
            if text not in numbers:
                numbers[text] = prompts + len(numbers)
                self.connection.execute("INSERT INTO prompts VALUES (?, ?)", (numbers[text], text))
            row = number, answer.id, numbers[text], answer.key, answer.policy, answer.tokens
            self.connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
        for item in items:
            shown = json.dumps([start + answer for answer in item.answers])
            known = None if item.known is None else json.dumps(item.known)
            row_of_item = shown, item.kind, known
            self.connection.execute("INSERT INTO items(answers, kind, known) VALUES (?, ?, ?)", row_of_item)

    def _add_attention(self, file: str | Path) -> None:
        """Those that are not there yet. Of those that are, what is known may have been mended."""
        rows = self.connection.execute("SELECT number, answers, known FROM items WHERE kind = 'attention'").fetchall()
        there: dict[tuple[str, ...], tuple[int, list[str], str]] = {}
        for item, numbers, known in rows:
            _, prompt, answers = self._read(json.loads(numbers))
            name = name_of(prompt, [answer.completion for answer in answers])
            there[name] = item, [answer.key for answer in answers], known
        for prompt, completions, verdict in read_attention(file, self.mode):
            if (name := name_of(prompt, completions)) not in there:
                new = [Answer("attention", prompt, completion) for completion in completions]
                self._add(new, [Item(tuple(range(len(new))), "attention", verdict)])
                continue
            item, keys, known = there[name]
            said = dict(zip(map(written, completions), verdict, strict=True))
            if (mended := json.dumps([said[key] for key in keys])) != known:
                self.connection.execute("UPDATE items SET known = ? WHERE number = ?", (mended, item))

    def _load(self) -> None:
        rows = self.connection.execute("SELECT name, value FROM settings")
        self.settings = {name: json.loads(value) for name, value in rows}
        self.mode = MODES[self.settings["mode"]]
        counts = dict(self.connection.execute("SELECT kind, count(*) FROM items GROUP BY kind").fetchall())
        self.items, self.attention = counts.get("ask", 0), counts.get("attention", 0)
        self._sum()

    def _sum(self) -> None:
        self.done, self.needed = self._one(
            "SELECT sum(done), sum(max(done, ?)) FROM items WHERE kind = 'ask'", self.settings["per_item"]
        )

    def _check(self, answers: Sequence[Answer], source: str, mode: str | None) -> None:
        if answers and fingerprint(answers) != self.settings["answers"]:
            raise StoreError(
                f"{self.path} holds judgements of other answers ({self.settings['source']}), not of {source}: name "
                "another store."
            )
        if mode is not None and mode != self.mode.name:
            raise StoreError(f"{self.path} holds {self.mode.name}: leave out --mode {mode}, or name another store.")

    def _set(self, name: str, value: Any) -> None:
        self.connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    # Asking ----------------------------------------------------------------------------------------------------------

    def rater(self, name: str | None = None) -> str:
        """The rater of this name, or a new one with a name of our own: "rater 1", "rater 2", ..."""
        if name is not None and self._one("SELECT 1 FROM raters WHERE name = ?", name):
            return name
        with self._transaction():
            if name is None:
                (number,) = self._one("SELECT coalesce(max(number), 0) + 1 FROM raters")
                while self._one("SELECT 1 FROM raters WHERE name = ?", f"rater {number}"):
                    number += 1
                name = f"rater {number}"
            self.connection.execute("INSERT OR IGNORE INTO raters(name) VALUES (?)", (name,))
        return name

    def rename(self, name: str, new: str) -> None:
        """Give a rater another name. If there is a rater of that name, the two stay apart, and what the first has
        before them goes back."""
        with self._transaction():
            if not self._one("SELECT 1 FROM raters WHERE name = ?", new):
                self.connection.execute("UPDATE raters SET name = ? WHERE name = ?", (new, name))
            elif new != name:
                self.connection.execute(
                    "DELETE FROM asked WHERE state = 'open' AND rater = (SELECT number FROM raters WHERE name = ?)",
                    (name,),
                )

    def next(self, name: str) -> Shown | None:
        """What the rater is asked now: what is before them already, else something that is then kept for them for a
        while. None: there is nothing for them at the moment."""
        rater, now = self._number(name), self.clock()
        if (token := self._held(rater, now, renew=False)) is None:
            with self._transaction():
                token = self._held(rater, now, renew=True) or self._choose(rater, now)
        return None if token is None else self._shown(token)

    def _held(self, rater: int, now: float, renew: bool) -> str | None:
        """The token of what is before the rater. A lease of which less than half is left is only good when renewed; one
        that ran out while others took the item's last place is given up."""
        rows = self.connection.execute(
            "SELECT token, item, kind, lease FROM asked WHERE rater = ? AND turn IS NULL ORDER BY number", (rater,)
        )
        for token, item, kind, lease in rows.fetchall():
            if lease > now + LEASE / 2:
                return str(token)
            if not renew:
                return None
            if lease > now or kind != "ask" or self._has_place(item, rater, now):
                since = "since" if lease > now else str(now)
                self.connection.execute(
                    f"UPDATE asked SET lease = ?, since = {since} WHERE token = ?", (now + LEASE, token)
                )
                return str(token)
            self.connection.execute("DELETE FROM asked WHERE token = ?", (token,))
        return None

    def _has_place(self, item: int, rater: int, now: float) -> bool:
        values = {"now": now, "rater": rater, "item": item}
        (taken,) = self.connection.execute(f"SELECT {TAKEN} FROM items WHERE number = :item", values).fetchone()
        return bool(taken < self.settings["per_item"])

    def _choose(self, rater: int, now: float) -> str | None:
        counts = self.connection.execute("SELECT kind, count(*) FROM asked WHERE rater = ? GROUP BY kind", (rater,))
        history = History(**dict(counts.fetchall()))
        every = attention_every(self.items, self.attention)
        choose = {"ask": self._new_item, "repeat": self._old_item, "attention": self._attention_item}
        for kind in due(history, self.settings["repeats"], every):
            if (item := choose[kind](rater, now)) is not None:
                (answers,) = self._one("SELECT answers FROM items WHERE number = ?", item)
                token = secrets.token_urlsafe(16)
                order = shuffled(range(len(json.loads(answers))), self.settings["secret"], item, rater, kind)
                self.connection.execute(
                    "INSERT INTO asked(token, item, rater, kind, shown, since, lease) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (token, item, rater, kind, json.dumps(order), now, now + LEASE),
                )
                return token
        return None

    def _new_item(self, rater: int, now: float) -> int | None:
        """The next that has a place left and that the rater does not know. It is looked for from the rater's last one
        on, then from the start, where places may have been given back."""
        (reached,) = self._one("SELECT reached FROM raters WHERE number = ?", rater)
        for start in dict.fromkeys((reached, -1)):
            found = self.connection.execute(
                f"""SELECT number FROM items WHERE kind = 'ask' AND number > :start AND done < :places
                AND NOT EXISTS (SELECT 1 FROM asked WHERE item = items.number AND rater = :rater AND kind = 'ask')
                AND {TAKEN} < :places ORDER BY number LIMIT 1""",
                {"start": start, "places": self.settings["per_item"], "rater": rater, "now": now},
            ).fetchone()
            if found is not None:
                self.connection.execute("UPDATE raters SET reached = ? WHERE number = ?", (found[0], rater))
                return int(found[0])
        return None

    def _old_item(self, rater: int, _: float) -> int | None:
        """One of those that the rater judged a while ago, and once."""
        found = self.connection.execute(
            """SELECT item FROM asked WHERE rater = :rater AND kind = 'ask' AND state = 'judged'
            AND turn <= (SELECT max(turn) FROM asked WHERE rater = :rater) - :after
            AND item NOT IN (SELECT item FROM asked WHERE rater = :rater AND kind = 'repeat')
            ORDER BY random() LIMIT 1""",
            {"rater": rater, "after": REPEAT_AFTER},
        ).fetchone()
        return None if found is None else int(found[0])

    def _attention_item(self, rater: int, _: float) -> int | None:
        found = self.connection.execute(
            """SELECT number FROM items WHERE kind = 'attention' AND number NOT IN
            (SELECT item FROM asked WHERE rater = ? AND kind = 'attention') ORDER BY random() LIMIT 1""",
            (rater,),
        ).fetchone()
        return None if found is None else int(found[0])

    # Judging ---------------------------------------------------------------------------------------------------------

    def judge(self, name: str, token: str, state: str, verdict: Verdict | None = None, comment: str = "") -> bool:
        """Store what the rater said about what they were shown, and choose what comes next, in one transaction.

        A token that was judged already stays as it is: a form that is sent again is no second judgement.

        Args:
            state: "judged", "unsure" or "skipped".
            verdict: in the order in which the answers were shown; None unless it was judged.

        Returns:
            False where it was not taken: the rater took so long that others were given the item, or the token is none
            of theirs.
        """
        rater, now = self._number(name), self.clock()
        with self._transaction():
            row = self._one(
                "SELECT item, kind, shown, since, lease, state FROM asked WHERE token = ? AND rater = ?", token, rater
            )
            if row is None:
                return False
            item, kind, shown, since, lease, before = row
            if before != "open":
                return True
            if kind == "ask" and state != "skipped" and lease <= now and not self._has_place(item, rater, now):
                self.connection.execute("DELETE FROM asked WHERE token = ?", (token,))
                return False
            stored = None if verdict is None else json.dumps(as_stored(verdict, json.loads(shown)))
            self.connection.execute(
                """UPDATE asked SET state = ?, verdict = ?, comment = ?, seconds = ?,
                turn = 1 + (SELECT coalesce(max(turn), 0) FROM asked WHERE rater = ?) WHERE token = ?""",
                (state, stored, comment, round(max(0.0, now - since), 1), rater, token),
            )
            self._count(item, kind, state, +1)
            if self._held(rater, now, renew=True) is None:
                self._choose(rater, now)
        return True

    def undo(self, name: str, token: str) -> bool:
        """Take back the judgement of this showing, so that the rater is asked again. False where that cannot be: it is
        none of theirs, or was skipped and given to others since."""
        rater, now = self._number(name), self.clock()
        with self._transaction():
            row = self._one(
                "SELECT item, kind, state FROM asked WHERE token = ? AND rater = ? AND state != 'open'", token, rater
            )
            if row is None or (row[1:] == ("ask", "skipped") and not self._has_place(row[0], rater, now)):
                return False
            self._count(row[0], row[1], row[2], -1)
            self.connection.execute(
                """UPDATE asked SET state = 'open', verdict = NULL, turn = NULL, seconds = NULL, since = ?, lease = ?
                WHERE token = ?""",
                (now, now + LEASE, token),
            )
        return True

    def _count(self, item: int, kind: str, state: str, change: int) -> None:
        """`done` of an item counts the people who looked at it and said so."""
        if kind == "ask" and state in ("judged", "unsure"):
            self.connection.execute("UPDATE items SET done = done + ? WHERE number = ?", (change, item))
            self.done += change
            if self.needed > self.items * self.settings["per_item"]:
                self._sum()

    # Looking ---------------------------------------------------------------------------------------------------------

    def last(self, name: str) -> Shown | None:
        """What the rater dealt with last, which undo takes back."""
        row = self._one(
            """SELECT token FROM asked WHERE rater = ? AND turn = (SELECT max(turn) FROM asked WHERE rater = ?)""",
            *[self._number(name)] * 2,
        )
        return None if row is None else self._shown(row[0])

    def shown(self, token: str) -> Shown | None:
        """The item that was shown under this token; None where none was."""
        return None if self._one("SELECT 1 FROM asked WHERE token = ?", token) is None else self._shown(token)

    def progress(self, name: str) -> Progress:
        rater = self._number(name)
        (mine,) = self._one("SELECT count(*) FROM asked WHERE rater = ? AND turn IS NOT NULL", rater)
        (held,) = self._one(
            "SELECT count(*) FROM asked WHERE state = 'open' AND kind = 'ask' AND lease > ? AND rater != ?",
            *(self.clock(), rater),
        )
        return Progress(self.done, self.needed, mine, held)

    def untouched(self) -> int:
        """How many items to be asked about nobody has judged or skipped."""
        (count,) = self._one(
            """SELECT count(*) FROM items WHERE kind = 'ask' AND done = 0
            AND number NOT IN (SELECT item FROM asked WHERE state = 'skipped')"""
        )
        return int(count)

    def answers(self) -> list[Answer]:
        """All of them, those of attention items too, whose id is "attention"."""
        rows = self.connection.execute(
            """SELECT id, text, completion, policy, tokens FROM answers JOIN prompts ON prompts.number = prompt
            ORDER BY answers.number"""
        )
        return [Answer(id_, json.loads(text), json.loads(said), *who) for id_, text, said, *who in rows]

    def annotations(self, name: str | None = None) -> list[Annotation]:
        """All of them, in the order of the items; or those of every item that this rater was asked about."""
        only = "" if name is None else "AND item IN (SELECT item FROM asked WHERE rater = :rater)"
        rows = self.connection.execute(
            f"""SELECT item, raters.name, asked.kind, state, shown, verdict, known, comment, seconds, answers
            FROM asked JOIN items ON items.number = item JOIN raters ON raters.number = rater
            WHERE state != 'open' {only} ORDER BY item, asked.number""",
            {"rater": None if name is None else self._number(name)},
        ).fetchall()
        read = cache(lambda answers: self._read(json.loads(answers)))
        return [
            Annotation(
                *(item, rater, kind, state, tuple(json.loads(shown)), _verdict(verdict), _verdict(known)),
                *(comment, seconds, *read(answers)),
            )
            for item, rater, kind, state, shown, verdict, known, comment, seconds, answers in rows
        ]

    def comparisons(self) -> list[Compared]:
        """Answers of different policies to one prompt, as people judged them in pairs or rankings; none of other modes.
        Repeats and attention items are left out. What was said of an answer counts for all that read like it.

        Of the ties that nobody is asked about, since the answers read alike, there is as large a part as was judged of
        what people are asked about: all of them beside a few judgements would bring every win rate near one half."""
        compared: list[Compared] = []
        if not self.mode.ranks:
            return compared
        twins = self._twins()
        for judgement in self.annotations():
            if judgement.kind == "ask" and judgement.verdict is not None:
                prompt = judgement.prompt_number
                for (a, rank_a), (b, rank_b) in combinations(zip(judgement.answers, judgement.verdict, strict=True), 2):
                    outcome = 0.5 if rank_a == rank_b else float(rank_a < rank_b)
                    for one, other in product(twins[prompt, a.key], twins[prompt, b.key]):
                        compared += _compared(prompt, one, other, outcome, judgement.rater)
        query = "SELECT answers FROM items WHERE kind = 'alike' ORDER BY number"
        ties = shuffled(self.connection.execute(query).fetchall(), self.settings["answers"])
        for (numbers,) in ties[: round(self._share_judged() * len(ties))]:
            prompt, _, (a, b) = self._read(json.loads(numbers))
            compared += _compared(prompt, a, b, 0.5, None)
        return compared

    def _twins(self) -> dict[tuple[int, str], list[Answer]]:
        """By prompt and text, the answers that read so."""
        found: defaultdict[tuple[int, str], list[Answer]] = defaultdict(list)
        query = "SELECT prompt, id, completion, policy, tokens FROM answers ORDER BY number"
        for prompt, id_, said, *who in self.connection.execute(query).fetchall():
            found[prompt, said].append(Answer(id_, None, json.loads(said), *who))
        return found

    def _share_judged(self) -> float:
        """Of the items to be asked about the share that somebody has judged; those that were skipped do not count."""
        query = "SELECT count(DISTINCT item) FROM asked WHERE kind = 'ask' AND state = 'judged'"
        (judged,), untouched = self._one(query), self.untouched()
        return judged / (judged + untouched) if judged + untouched else 1.0

    def _shown(self, token: str) -> Shown:
        shown, state, verdict, comment, answers = self._one(
            """SELECT shown, state, verdict, comment, answers FROM asked JOIN items ON items.number = item
            WHERE token = ?""",
            token,
        )
        order, said = json.loads(shown), _verdict(verdict)
        _, prompt, rows = self._read(json.loads(answers))
        said = None if said is None else as_shown(said, order)
        return Shown(token, prompt, tuple(rows[place].completion for place in order), state, said, comment)

    def _read(self, numbers: Sequence[int]) -> tuple[int, Any, tuple[Answer, ...]]:
        """The prompt's number and the prompt of these answers, and the answers."""
        query = """SELECT prompts.number, text, id, completion, policy, tokens
            FROM answers JOIN prompts ON prompts.number = prompt WHERE answers.number = ?"""
        rows = [self._one(query, number) for number in numbers]
        prompt, asked = rows[0][0], json.loads(rows[0][1])
        return prompt, asked, tuple(Answer(id_, asked, json.loads(said), *who) for _, _, id_, said, *who in rows)

    def _number(self, name: str) -> int:
        return int(self._one("SELECT number FROM raters WHERE name = ?", name)[0])

    def _one(self, query: str, *values: Any) -> Any:
        """The first row; None where there is none."""
        return self.connection.execute(query, values).fetchone()

    def together(self, works: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Do several things and commit them at once: the disk is waited for once. What one of them raises stands in the
        place of its result, and undoes that one alone; if the commit fails, none is done."""
        results: list[T | Exception] = []
        try:
            with self._transaction():
                for work in works:
                    try:
                        with self._transaction():
                            results.append(work())
                    except Exception as error:
                        if not self.connection.in_transaction:  # a full disk undid everything
                            raise
                        results.append(error)
        except sqlite3.Error as error:
            return [error] * len(works)
        return results

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing; inside another one, a part of that."""
        inner, counts = self.connection.in_transaction, (self.done, self.needed)
        self.connection.execute("SAVEPOINT part" if inner else "BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("RELEASE part" if inner else "COMMIT")
        except BaseException:
            self.done, self.needed = counts
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK TO part" if inner else "ROLLBACK")
            raise


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """What SQLite says against a file, as one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path} is no store that `trl-ext rate` can use ({error}): name another file.") from error


def _verdict(text: str | None) -> Verdict | None:
    return None if text is None else tuple(json.loads(text))


def _compared(prompt: int, a: Answer, b: Answer, outcome: float, rater: str | None) -> list[Compared]:
    """None where they are by one policy, or by nobody known. Policies are in the order of their names."""
    if a.policy is None or b.policy is None or a.policy == b.policy:
        return []
    if a.policy > b.policy:
        return _compared(prompt, b, a, 1 - outcome, rater)
    return [Compared(prompt, a.policy, b.policy, outcome, a.tokens, b.tokens, a.id, b.id, rater)]
