"""Questions to the state: queries on a connection, for the run and for those who only look (`status`)."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from batchrun.model import Attempt, Counts, Failure, Output, Row, State
from batchrun.rules.budget import Bills, Budget
from batchrun.rules.naming import ROWS_PER_FOLDER, image_folder
from batchrun.rules.policy import PAID_CAUSES
from batchrun.store.records import (
    OUTPUT_COLUMNS,
    ROW_COLUMNS,
    cells_given,
    complete_all,
    given_back,
    read_output,
)

#: The conditions of the partial indexes, word for word: SQLite takes one only where a query holds it.
#: Without IN: in an index its list would be made into a table anew for each row that changes.
UNFINISHED = (
    "(state = 'planned' OR state = 'submitting' OR state = 'in_flight' OR state = 'in_doubt' "
    "OR state = 'finished')"
)
TROUBLED = "(state = 'failed' OR state = 'cancelled' OR state = 'invalid' OR state = 'in_doubt')"
#: A row by its id or its file name.
_NAMED = "(key = 'id:' || ?1 OR (name = ?1 COLLATE NOCASE AND name = ?1))"


@dataclass(frozen=True, slots=True)
class Settled:
    """A settled row with what its record in the sidecar files needs."""

    #: Its place in the order of settling.
    number: int
    row: Row
    #: All its attempts that made a task, oldest first.
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that did not make it, as the manifest had it (with the values of its expansion)."""

    seq: int
    cells: Mapping[str, Any]


def read_value(connection: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> Any:
    """The first column of the first record; None when there is none."""
    record = connection.execute(query, values).fetchone()
    return record[0] if record else None


def read_json(connection: sqlite3.Connection, column: str) -> dict[str, Any]:
    """A JSON column of the run's record; {} while there is no record."""
    return dict(json.loads(read_value(connection, f"SELECT {column} FROM run") or "{}"))


# --- what is told of the run ------------------------------------------------------------------------


def read_counts(connection: sqlite3.Connection) -> Counts:
    """The running counts of a run."""
    by_state = {
        State(state): rows for state, rows in connection.execute("SELECT state, rows FROM counts") if rows
    }
    images, size_bytes = connection.execute("SELECT images, bytes FROM totals").fetchone()
    spent = read_value(connection, "SELECT spent_usd FROM run")
    return Counts(by_state, images, size_bytes, Decimal(spent or 0))


#: A cause with so many different messages is told in a group for each; with more, in one with a sample.
MESSAGES_APART = 3
OTHER_ERRORS = "and other errors; see results.jsonl"


def read_failures(connection: sqlite3.Connection, limit: int) -> list[tuple[State, Failure, int, int]]:
    """Rows that did not make it, by state and cause, and by message while there are few; largest group first.

    Each group as state, the failure of its first row (which says so where others have another message), how
    many rows, and the first line.
    """
    # the message comes from the row that has the smallest line: SQLite's rule for such columns
    wanted = (
        "SELECT state, cause, coalesce(message, ''), count(*), min(line) FROM rows "
        f"WHERE {TROUBLED} AND present = 1 "
        "AND cause IS NOT NULL "
    )
    groups = []
    for state, cause, message, rows, line in connection.execute(
        wanted + "GROUP BY state, cause ORDER BY count(*) DESC, cause LIMIT ?", (limit,)
    ).fetchall():
        apart: list[tuple[Any, ...]] = connection.execute(
            wanted + "AND state = ? AND cause = ? GROUP BY message LIMIT ?",
            (state, cause, MESSAGES_APART + 1),
        ).fetchall()
        if len(apart) > MESSAGES_APART:
            apart = [(state, cause, f"{message}; {OTHER_ERRORS}", rows, line)]
        groups += apart
    groups.sort(key=lambda group: (-group[3], group[1], group[4]))
    return [
        (State(state), Failure(cause, message), rows, line)
        for state, cause, message, rows, line in groups[:limit]
    ]


def read_settled(connection: sqlite3.Connection, after: int, *, limit: int) -> list[Settled]:
    """Rows of the present manifest settled after that number, in order of settling."""
    numbers, records = [], []
    for number, *record in connection.execute(
        f"SELECT settled, {ROW_COLUMNS} FROM rows WHERE settled > ? AND present = 1 ORDER BY settled LIMIT ?",
        (after, limit),
    ):
        numbers.append(number)
        records.append(tuple(record))
    rows = complete_all(connection, records)
    return [Settled(number, row, attempts) for number, (row, attempts) in zip(numbers, rows, strict=True)]


def read_rejected(connection: sqlite3.Connection, *, after_seq: int, limit: int) -> list[Rejected]:
    """Rows of the present manifest that neither made it nor were paid for, as it had them, by row number."""
    paid = ", ".join(f"'{cause}'" for cause in sorted(PAID_CAUSES))
    by_state = " UNION ALL ".join(
        f"SELECT * FROM (SELECT seq FROM rows WHERE state = '{state}' AND {TROUBLED} AND seq > ?1 "
        f"AND present = 1 AND NOT (state = 'failed' AND coalesce(cause, '') IN ({paid})) "
        "ORDER BY seq LIMIT ?2)"
        for state in ("failed", "cancelled", "invalid")
    )
    records = connection.execute(f"{by_state} ORDER BY 1 LIMIT ?2", (after_seq, limit)).fetchall()
    columns = read_json(connection, "form").get("columns")
    return [Rejected(seq, read_cells(connection, seq, columns)) for (seq,) in records]


def read_cells(connection: sqlite3.Connection, seq: int, columns: Collection[str] | None) -> dict[str, Any]:
    """A row as the manifest had it, which has these columns (None: its rows name their own cells)."""
    query = "SELECT id, given, cells FROM rows LEFT JOIN sources ON row = seq WHERE seq = ?"
    id_, given, kept = connection.execute(query, (seq,)).fetchone()
    return given_back(cells_given(id_, json.loads(given), columns), kept)


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of images: those of ROWS_PER_FOLDER rows that follow each other."""

    #: From 0.
    number: int
    #: Relative to the run's folder, with `/`.
    path: str
    #: What told the folder when all its images were last seen there; None: that is not known.
    mark: str | None
    #: Where the images of its done rows of the present manifest were saved, by row number and index.
    saved: Callable[[], list[str]]


def read_places(connection: sqlite3.Connection) -> Iterator[Place]:
    """The folders in which images of done rows may lie; asks for their paths only when told to."""
    if not read_value(connection, "SELECT rows FROM counts WHERE state = 'done'"):
        return
    try:
        marks = dict(connection.execute("SELECT place, mark FROM whole").fetchall())
    except sqlite3.OperationalError:  # whoever only looks finds states of earlier forms, too
        marks = {}
    last = read_value(connection, "SELECT max(seq) FROM rows")
    for number in range((last - 1) // ROWS_PER_FOLDER + 1):
        yield Place(number, image_folder(number), marks.get(number), partial(_saved_in, connection, number))


def _saved_in(connection: sqlite3.Connection, place: int) -> list[str]:
    records = connection.execute(
        # most rows of a young run have no outputs: these lead
        "SELECT path FROM outputs CROSS JOIN rows ON seq = row AND outputs.generation = rows.generation "
        "WHERE row > ? AND row <= ? AND rows.state = 'done' AND present = 1 AND path IS NOT NULL "
        "ORDER BY row, number",
        (place * ROWS_PER_FOLDER, (place + 1) * ROWS_PER_FOLDER),
    )
    return [path for (path,) in records]


# --- what the run's next step needs -----------------------------------------------------------------


def has_work(connection: sqlite3.Connection) -> bool:
    """Whether any row is on its way; planned rows count only while they are in the manifest."""
    return bool(
        read_value(
            connection,
            f"SELECT EXISTS (SELECT 1 FROM rows WHERE {UNFINISHED} AND (present = 1 OR state <> 'planned'))",
        )
    )


def read_budget(connection: sqlite3.Connection, cap_usd: Decimal) -> Budget:
    """What was spent, billed and reserved so far, in all starts."""
    budget = Budget(cap_usd, Decimal(read_value(connection, "SELECT spent_usd FROM run")))
    billed = connection.execute(
        "SELECT rows.tool, rows.images, cost_usd, count(*) FROM attempts "
        "JOIN rows ON rows.seq = attempts.row "
        "WHERE cost_usd IS NOT NULL AND rows.tool IS NOT NULL GROUP BY 1, 2, 3"
    )
    for tool, images, cost, tasks in billed:
        if (cost_usd := Decimal(cost)) > 0:
            budget.bills.setdefault(tool, Bills()).add(cost_usd, images=images, tasks=tasks)
    opened = connection.execute(
        "SELECT rows.seq, rows.tool, rows.images, reserved_usd FROM attempts "
        "JOIN rows ON rows.seq = attempts.row WHERE open = 1"
    )
    for seq, tool, images, reserved in opened:
        budget.reserve(seq, tool, images=images, published_usd=Decimal(reserved))
    return budget


def read_unbought(connection: sqlite3.Connection, last_seq: int | None = None) -> list[tuple[int, int, int]]:
    """The planned rows of the manifest, up to row `last_seq`: (tool, rows, images) by tool."""
    return connection.execute(
        f"SELECT tool, count(*), sum(images) FROM rows WHERE state = 'planned' AND {UNFINISHED} "
        "AND present = 1 AND seq <= coalesce(?, seq) GROUP BY tool",
        (last_seq,),
    ).fetchall()


def states_of(connection: sqlite3.Connection, ids: Collection[str]) -> dict[str, State]:
    """The states of the manifest's rows of these ids (or file names); ids that no row has are left out."""
    found = {}
    for id_ in ids:
        query = f"SELECT state FROM rows WHERE {_NAMED} AND present = 1 ORDER BY id = ?1 DESC"
        state = read_value(connection, query, (id_,))
        if state is not None:
            found[id_] = State(state)
    return found


def recent_seconds(connection: sqlite3.Connection, limit: int = 200) -> list[tuple[int, float]]:
    """(tool, seconds) of the tasks of the rows that were settled last, oldest first."""
    records = connection.execute(
        "SELECT newest.tool, CAST(seconds AS REAL) FROM "
        "(SELECT seq, tool, settled FROM rows WHERE settled IS NOT NULL "
        "ORDER BY settled DESC LIMIT ?) AS newest "
        "JOIN attempts ON attempts.row = newest.seq "
        "WHERE seconds IS NOT NULL AND tool IS NOT NULL ORDER BY newest.settled",
        (limit,),
    )
    return [(tool, seconds) for tool, seconds in records if seconds > 0]


def known_tasks(connection: sqlite3.Connection, task_ids: Collection[str]) -> dict[str, int | None]:
    """Which of these task ids are of this run, with the tool's number where it still is the row's."""
    query = (
        "SELECT task_id, (SELECT tool FROM rows WHERE seq = row AND rows.generation = attempts.generation) "
        "FROM attempts WHERE task_id = ?"
    )
    return {known: tool for task_id in task_ids for known, tool in connection.execute(query, (task_id,))}


def older_outputs(connection: sqlite3.Connection, seq: int) -> list[tuple[int, Output]]:
    """The saved images of the row's earlier generations, each with its generation."""
    return [
        (record[0], read_output(record[1:]))
        for record in connection.execute(
            f"SELECT generation, {OUTPUT_COLUMNS} FROM outputs WHERE row = ? AND state = 'saved' "
            "AND generation < (SELECT generation FROM rows WHERE seq = ?) ORDER BY generation, number",
            (seq, seq),
        )
    ]


def requeue_candidates(
    connection: sqlite3.Connection, states: Collection[State], ids: Collection[str]
) -> list[tuple[int, State, Failure | None]]:
    """Rows of the present manifest in those states, by row number; with `ids` only those named by one."""
    wanted = ", ".join(f"'{state}'" for state in states)
    records = connection.execute(
        f"SELECT seq, state, cause, message FROM rows WHERE {TROUBLED} AND state IN ({wanted}) "
        "AND present = 1 ORDER BY +seq"
    ).fetchall()
    named = {
        record[0]
        for id_ in ids
        for record in connection.execute(f"SELECT seq FROM rows WHERE {_NAMED}", (id_,))
    }
    return [
        (seq, State(state), Failure(cause, message or "") if cause else None)
        for seq, state, cause, message in records
        if not ids or seq in named
    ]
