"""A state made anew from what a repair found, and what the next starts do about all it could not find.

A rebuilt state knows of itself (`run.rebuilt`) since when and until when tasks may have been made that it
does not know. Until its manifest has been read again (`merge`) it knows only what could be found; the reading
gives the rows what only the manifest holds, and every row that would be submitted becomes a *lost* row: in
doubt, without an attempt. Lost rows are not looked up one by one, but searched for in one reading of the
service's list (`search`; dispatch.search), which also settles what failed rows and known tasks became since.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from batchrun.model import Accepted, Failure, Row, State
from batchrun.rules.naming import stem_with_hash
from batchrun.rules.rebuild import Rebuilt
from batchrun.rules.states import Event
from batchrun.store import changes
from batchrun.store.connection import connect
from batchrun.store.migrations import migrate
from batchrun.store.reading import read_value
from batchrun.store.records import dumps, load_row

_STATES = {
    Rebuilt.DONE: State.DONE,
    Rebuilt.FAILED: State.FAILED,
    Rebuilt.CANCELLED: State.CANCELLED,
    Rebuilt.FOLLOW: State.IN_FLIGHT,
    Rebuilt.SEARCH: State.IN_DOUBT,
}


@dataclass(slots=True)
class Try:
    """A task of a row."""

    task_id: str
    token: str = ""
    status: str = ""
    pexit: str | None = None
    #: Exact decimal text.
    cost_usd: str | None = None
    seconds: str | None = None
    error: str = ""


@dataclass(slots=True)
class Image:
    """A saved image of a row."""

    index: int
    path: str
    sha256: str
    size_bytes: int
    media_type: str | None = None
    width_px: int | None = None
    height_px: int | None = None


@dataclass(slots=True)
class FoundRow:
    """A row as a repair found it; what it does not know of it is empty."""

    standing: Rebuilt
    seq: int
    key: str
    #: Hash of what it asks for; b"" when not known.
    content: bytes
    own: bytes
    id: str | None
    line: int
    name: str
    #: Description of its tool, JSON text.
    tool: str
    given: str = "{}"
    extra: str = "{}"
    images: int = 0
    present: bool = True
    generation: int = 0
    cause: str | None = None
    message: str | None = None
    cells: str | None = None
    #: Oldest first; of a row to be followed, the last one is open.
    tries: list[Try] = field(default_factory=list)
    outputs: list[Image] = field(default_factory=list)
    #: Images of earlier generations, each with its generation, that are still to be moved aside.
    older: list[tuple[int, Image]] = field(default_factory=list)
    #: Where it comes in the order of settling.
    settled: int = 0


@dataclass(frozen=True, slots=True)
class FoundRun:
    """What a repair found of the run itself."""

    #: "" when not known.
    manifest: str = ""
    job: str = ""
    created_at: float = 0.0
    account_limit: int | None = None
    #: Tasks that are not known may have been made from then until then, in UTC unix seconds.
    since: float = 0.0
    until: float = 0.0
    uploads: Sequence[tuple[str, str, float]] = ()


def write_state(path: Path, run: FoundRun, rows: Iterable[FoundRow]) -> dict[Rebuilt, int]:
    """Make a state file of what was found; returns its rows by standing.

    A row that another one contradicts is left out: the manifest brings it back, to be searched for.
    """
    path.touch(mode=0o600)
    written: dict[Rebuilt, int] = {}
    with closing(connect(path)) as connection:
        migrate(connection)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO run (id, manifest, created_at, job, account_limit, rebuilt) "
            "VALUES (1, ?, ?, ?, ?, ?)",
            (
                run.manifest,
                run.created_at or run.until,
                run.job,
                run.account_limit,
                dumps({"since": run.since, "until": run.until, "merge": True, "search": True}),
            ),
        )
        connection.executemany("INSERT OR IGNORE INTO uploads VALUES (?, ?, ?)", run.uploads)
        tools: dict[str, int] = {}
        for row in sorted(rows, key=lambda row: (row.settled, row.seq)):
            connection.execute("SAVEPOINT one")
            try:
                _insert(connection, row, tools)
            except (sqlite3.IntegrityError, OverflowError, UnicodeEncodeError):
                connection.execute("ROLLBACK TO one")
            else:
                written[row.standing] = written.get(row.standing, 0) + 1
            connection.execute("RELEASE one")
        recount(connection)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return written


def _insert(connection: sqlite3.Connection, row: FoundRow, tools: dict[str, int]) -> None:
    if row.tool not in tools:
        connection.execute("INSERT INTO tools (description) VALUES (?)", (row.tool,))
        tools[row.tool] = read_value(connection, "SELECT max(id) FROM tools")
    taken = "SELECT 1 FROM rows WHERE name = ? COLLATE NOCASE"
    name = row.name if not read_value(connection, taken, (row.name,)) else stem_with_hash(row.id or row.key)
    state = _STATES[row.standing]
    rests = state in (State.DONE, State.FAILED, State.CANCELLED)
    ended = len(row.tries) - (row.standing is Rebuilt.FOLLOW)
    connection.execute(
        "INSERT INTO rows (seq, key, content, own, id, line, name, present, tool, given, extra, images, "
        f"state, attempts, generation, settled, cause, message) VALUES ({', '.join('?' * 18)})",
        (
            row.seq, row.key, row.content, row.own, row.id, row.line, name, row.present, tools[row.tool],
            row.given, row.extra, row.images, state, ended, row.generation,
            changes.next_settled(connection) if rests else None,
            row.cause if rests else None, row.message if rests else None,
        ),
    )  # fmt: skip
    if row.cells is not None:
        connection.execute("INSERT INTO sources (row, cells) VALUES (?, ?)", (row.seq, row.cells))
    now = read_value(connection, "SELECT json_extract(rebuilt, '$.until') FROM run")
    for number, one in enumerate(row.tries, start=1):
        is_open = number > ended
        connection.execute(
            "INSERT INTO attempts (row, generation, number, open, intent_at, task_id, token, accepted_at, "
            f"ended_at, status, pexit, cost_usd, seconds, error) VALUES ({', '.join('?' * 14)})",
            (
                row.seq, row.generation, number, is_open, now, one.task_id, one.token, now,
                None if is_open else now, *(("", None, None, None, "") if is_open else
                (one.status, one.pexit, one.cost_usd, one.seconds, one.error)),
            ),
        )  # fmt: skip
        if one.cost_usd and not is_open:
            changes.spend(connection, Decimal(one.cost_usd))
    images = [(row.generation, image) for image in row.outputs] if row.standing is Rebuilt.DONE else []
    connection.executemany(
        "INSERT INTO outputs (row, generation, number, state, path, sha256, size_bytes, media_type, "
        "width_px, height_px) VALUES (?, ?, ?, 'saved', ?, ?, ?, ?, ?, ?)",
        [
            (row.seq, generation, image.index, image.path, image.sha256, image.size_bytes, image.media_type,
             image.width_px, image.height_px)
            for generation, image in [*images, *row.older]
        ],
    )  # fmt: skip


def recount(connection: sqlite3.Connection) -> None:
    """Count the rows and images of the present manifest."""
    connection.execute("DELETE FROM counts")
    connection.execute(
        "INSERT INTO counts (state, rows) "
        "SELECT state, count(*) FROM main.rows WHERE present = 1 GROUP BY state"
    )
    connection.execute(
        "UPDATE totals SET (images, bytes) = (SELECT count(*), coalesce(sum(outputs.size_bytes), 0) "
        "FROM outputs JOIN main.rows AS known "
        "ON known.seq = outputs.row AND known.generation = outputs.generation "
        "WHERE known.present = 1 AND known.state = 'done' AND outputs.state = 'saved')"
    )


# --- when its manifest is read again -----------------------------------------------------------------


def facts(connection: sqlite3.Connection) -> dict[str, Any]:
    """What a rebuilt state knows of itself: since, until (unix seconds), merge, search; {} for others."""
    return dict(json.loads(read_value(connection, "SELECT rebuilt FROM run") or "{}"))


def fill_in(connection: sqlite3.Connection) -> None:
    """Rows known from results alone take what only the manifest holds; `staged` has its keys."""
    same = (
        "FROM staged WHERE staged.key = known.key "
        "AND (known.content = staged.content OR known.content = x'') AND staged.message IS NULL"
    )
    connection.execute(
        "UPDATE main.rows AS known SET content = staged.content, own = staged.own, tool = staged.tool, "
        f"given = staged.given, images = staged.images {same}"
    )
    connection.execute(
        "INSERT OR IGNORE INTO main.sources (row, cells) SELECT known.seq, staged.cells "
        "FROM staged JOIN main.rows AS known ON known.key = staged.key"
    )


def free_numbers(connection: sqlite3.Connection) -> None:
    """Fill temp.free (n, seq) with the numbers that no row has, for new rows: images lie by them."""
    connection.execute("DROP TABLE IF EXISTS temp.free")
    connection.execute("CREATE TEMP TABLE free (n INTEGER PRIMARY KEY, seq INTEGER NOT NULL)")
    if facts(connection).get("merge"):
        connection.execute(
            "INSERT INTO temp.free WITH RECURSIVE every(seq) AS "
            "(SELECT 0 UNION ALL SELECT seq + 1 FROM every "
            "WHERE seq < (SELECT coalesce(max(seq), 0) FROM main.rows)) "
            "SELECT row_number() OVER (ORDER BY seq), seq FROM every WHERE seq > 0 "
            "AND NOT EXISTS (SELECT 1 FROM main.rows AS known WHERE known.seq = every.seq)"
        )


def doubt_the_rest(connection: sqlite3.Connection) -> None:
    """The first time: whatever would be submitted may have been submitted before the damage."""
    if not facts(connection).get("merge"):
        return
    connection.execute("UPDATE main.rows SET state = 'in_doubt' WHERE state = 'planned'")
    connection.execute("UPDATE run SET listed = '{}', rebuilt = json_set(rebuilt, '$.merge', json('false'))")


# --- the search ---------------------------------------------------------------------------------------

_LOST = "state = 'in_doubt' AND NOT EXISTS (SELECT 1 FROM attempts WHERE row = rows.seq AND open = 1)"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be searched for."""

    since: float
    until: float
    #: The first search of a rebuilt state: failed rows and known tasks are looked for, too.
    is_first: bool


def wanted(connection: sqlite3.Connection) -> Wanted | None:
    """What is to be searched for; None: nothing."""
    known = facts(connection)
    if not known:
        return None
    is_first = bool(known["search"])
    if not is_first and not read_value(connection, f"SELECT EXISTS (SELECT 1 FROM rows WHERE {_LOST})"):
        return None
    return Wanted(float(known["since"]), float(known["until"]), is_first)


def wanted_rows(connection: sqlite3.Connection, *, is_first: bool, after_seq: int, limit: int) -> list[Row]:
    """Lost rows by number; in the first search also failed, cancelled and running ones."""
    others = "OR state IN ('failed', 'cancelled', 'in_flight')" if is_first else ""
    records = connection.execute(
        # of a row without a request nothing is known that could be found
        f"SELECT seq FROM rows WHERE ({_LOST} {others}) AND given <> '{{}}' AND seq > ? ORDER BY seq LIMIT ?",
        (after_seq, limit),
    ).fetchall()
    return [load_row(connection, seq) for (seq,) in records]


def addresses_until(connection: sqlite3.Connection, until: float) -> dict[str, str]:
    """Addresses of uploaded images by SHA-256, as they were before the damage."""
    query = "SELECT sha256, url FROM uploads WHERE uploaded_at <= ?"
    return dict(connection.execute(query, (until,)).fetchall())


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the search says of one row; everything None: it has no task."""

    seq: int
    #: Its task.
    found: Accepted | None = None
    #: Why it cannot be known.
    held: Failure | None = None


def settle(
    connection: sqlite3.Connection, settlements: Sequence[Settlement], *, lease: int, at: float
) -> None:
    """Record what the search found; rows that do not stand as they did are left alone."""
    changes.check_alive(connection, lease)
    for one in settlements:
        row = load_row(connection, one.seq)
        connection.execute("UPDATE rows SET lease = ? WHERE seq = ?", (lease, one.seq))
        _settle_one(connection, row, one, lease=lease, at=at)
        connection.execute("UPDATE rows SET lease = NULL WHERE seq = ? AND lease = ?", (one.seq, lease))


def _settle_one(connection: sqlite3.Connection, row: Row, one: Settlement, *, lease: int, at: float) -> None:
    if one.found and read_value(connection, "SELECT 1 FROM attempts WHERE task_id = ?", (one.found.task_id,)):
        return
    if one.held:
        if row.state is State.IN_DOUBT:
            changes.unsettle(connection, [row.seq])
            connection.execute(
                "UPDATE rows SET cause = ?, message = ?, settled = ? WHERE seq = ?",
                (one.held.cause, one.held.message, changes.next_settled(connection), row.seq),
            )
        return
    if row.state is State.IN_FLIGHT:  # the task known of it is dead
        changes.move(connection, row.seq, Event.ATTEMPT_FAILED, lease=lease)
        connection.execute(
            "UPDATE attempts SET open = 0, ended_at = ?, error = 'failed' WHERE row = ? AND open = 1",
            (at, row.seq),
        )
        connection.execute("UPDATE rows SET attempts = attempts + 1 WHERE seq = ?", (row.seq,))
        events = [Event.INTENT_RECORDED, Event.ACCEPTED]
    elif row.state is State.IN_DOUBT:
        if one.found is None:
            changes.move(connection, row.seq, Event.ABSENT, lease=lease)
        events = [Event.ADOPTED]
    elif one.found is not None:  # failed or cancelled, and asked for again before the damage
        changes.unsettle(connection, [row.seq])
        events = [Event.REQUEUED, Event.INTENT_RECORDED, Event.ACCEPTED]
    if one.found is None:
        return
    connection.execute("UPDATE rows SET lease = ? WHERE seq = ?", (lease, row.seq))
    for event in events:
        changes.move(connection, row.seq, event, lease=lease)
    connection.execute(
        "INSERT INTO attempts (row, generation, number, intent_at, task_id, token, accepted_at) "
        "SELECT seq, generation, attempts + 1, ?, ?, ?, ? FROM rows WHERE seq = ?",
        (at, one.found.task_id, one.found.token, at, row.seq),
    )


def give_up(connection: sqlite3.Connection, seqs: Iterable[int], *, lease: int) -> None:
    """Submit lost rows anew, by the user's word."""
    for seq in seqs:
        connection.execute("UPDATE rows SET lease = ? WHERE seq = ?", (lease, seq))
        changes.move(connection, seq, Event.REQUEUED, lease=lease)
        changes.begin_anew(connection, seq)
        connection.execute("UPDATE rows SET lease = NULL WHERE seq = ?", (seq,))


def searched(connection: sqlite3.Connection) -> None:
    """The first search came to its end."""
    connection.execute("UPDATE run SET rebuilt = json_set(rebuilt, '$.search', json('false'))")
