"""The parts that verbs are made of: changes within a transaction, each keeping the running sums true."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from decimal import Context, Decimal
from typing import Any

from batchrun.errors import LeaseLost
from batchrun.model import TERMINAL, Failure, Output, Row, State, Task
from batchrun.rules.policy import charged
from batchrun.rules.states import TRANSITIONS, Event, ImpossibleMove, advance
from batchrun.store.records import ATTEMPT_COLUMNS, ROW_COLUMNS, complete, dumps

#: Above all that a row ever had: it may have gone back to an earlier one.
NEXT_GENERATION = (
    "1 + max(rows.generation, coalesce((SELECT max(generation) FROM attempts WHERE row = rows.seq), 0))"
)
#: Sums of money are exact; the usual 28 digits would round what a service may write.
_EXACT = Context(prec=120)


def check_alive(connection: sqlite3.Connection, lease: int) -> None:
    """Raises LeaseLost when the lease has ended: another process has taken the run."""
    record = connection.execute("SELECT 1 FROM leases WHERE id = ? AND ended_at IS NULL", (lease,)).fetchone()
    if record is None:
        raise LeaseLost("another process has taken this run")


def check_lease(connection: sqlite3.Connection, seq: int, lease: int) -> None:
    """Raises LeaseLost unless the row is claimed by that lease."""
    record = connection.execute("SELECT lease FROM rows WHERE seq = ?", (seq,)).fetchone()
    if record is None or record[0] != lease:
        raise LeaseLost(f"row {seq} is not claimed by this process any more")


#: The states in which an event can happen.
_BEFORE = {event: [state for state, known in TRANSITIONS if known is event] for event in Event}


def move(
    connection: sqlite3.Connection,
    seq: int,
    event: Event,
    *,
    lease: int,
    failure: Failure | None = None,
    attempts: int = 0,
) -> tuple[Any, ...]:
    """Bring a row to its next state, `attempts` more used up; returns its record as it then is (ROW_COLUMNS).

    Raises LeaseLost, or ImpossibleMove where the table has no such move. A row that comes to rest is given
    back and takes the next number in the order of settling. One that would be submitted again but has left
    the manifest is given back too: nothing more is bought for it.
    """
    before = _BEFORE[event][0]
    if len(_BEFORE[event]) > 1:  # the row tells; most events happen in one state, and need not ask
        check_lease(connection, seq, lease)
        (text,) = connection.execute("SELECT state FROM rows WHERE seq = ?", (seq,)).fetchone()
        before = State(text)
    after = advance(before, event)
    if before is State.IN_DOUBT:
        unsettle(connection, [seq])  # it may have been told as such
    rests = after in TERMINAL
    records = connection.execute(
        "UPDATE rows SET state = ?, cause = ?, message = ?, settled = ?, attempts = attempts + ?, "
        "lease = CASE WHEN ? OR (? AND NOT present) THEN NULL ELSE lease END, "
        "kept = CASE WHEN ? THEN NULL ELSE kept END "
        f"WHERE seq = ? AND lease = ? AND state = ? RETURNING {ROW_COLUMNS}, present",
        (
            after,
            failure.cause if failure else None,
            failure.message if failure else None,
            next_settled(connection) if rests else None,
            attempts,
            rests,
            after is State.PLANNED,
            after is State.DONE,
            seq,
            lease,
            before,
        ),
    ).fetchall()
    if not records:
        check_lease(connection, seq, lease)
        (text,) = connection.execute("SELECT state FROM rows WHERE seq = ?", (seq,)).fetchone()
        raise ImpossibleMove(f"{event.value!r} cannot happen to a row that is {text}")
    *record, present = records[0]
    if present:
        _count_move(connection, before, after)
    return tuple(record)


def next_settled(connection: sqlite3.Connection) -> int:
    """A number above all given before, for a row that has come to rest."""
    query = "UPDATE run SET settled = settled + 1 RETURNING settled"
    return int(connection.execute(query).fetchone()[0])


def unsettle(connection: sqlite3.Connection, seqs: Iterable[int]) -> None:
    """Take rows out of the sidecar files: what was written of them is not true any more."""
    changed = 0
    for seq in seqs:
        changed += connection.execute(
            "UPDATE rows SET settled = NULL WHERE seq = ? AND settled IS NOT NULL", (seq,)
        ).rowcount
    if changed:
        connection.execute("UPDATE run SET listed = '{}'")


def _count_move(connection: sqlite3.Connection, before: State, after: State) -> None:
    connection.execute(
        "INSERT INTO counts (state, rows) VALUES (?, -1), (?, 1) "
        "ON CONFLICT (state) DO UPDATE SET rows = rows + excluded.rows",
        (before, after),
    )


# --- attempts ---------------------------------------------------------------------------------------


def drop_attempt(
    connection: sqlite3.Connection, seq: int, event: Event, *, lease: int, failure: Failure | None = None
) -> Row:
    """Move a row whose open attempt, if any, certainly made no task: nothing is left of it."""
    record = move(connection, seq, event, lease=lease, failure=failure)
    free_reservation(connection, seq)
    connection.execute("DELETE FROM attempts WHERE row = ? AND open = 1", (seq,))
    return complete(connection, record)


def close_attempt(
    connection: sqlite3.Connection, seq: int, task: Task, *, at: float, error: str = ""
) -> tuple[Any, ...] | None:
    """End the row's open attempt as its task has ended; what that cost is spent.

    Returns the attempt's record (ATTEMPT_COLUMNS), None when none was open.
    """
    cost = charged(task)
    closed = connection.execute(
        "UPDATE attempts SET open = 0, ended_at = ?, status = ?, pexit = ?, cost_usd = ?, seconds = ?, "
        f"error = ? WHERE row = ? AND open = 1 RETURNING {ATTEMPT_COLUMNS}, reserved_usd",
        (at, task.status, task.pexit, _decimal_text(cost), _decimal_text(task.elapsed_s), error, seq),
    ).fetchall()
    if cost:
        _add(connection, "spent_usd", cost)
    if not closed:
        return None
    *record, reserved = closed[0]
    reserve(connection, -Decimal(reserved))
    return tuple(record)


def save_output(
    connection: sqlite3.Connection, seq: int, output: Output, *, held: bool = False, warning: str = ""
) -> None:
    """Note what an image on disk is, and where it lies."""
    connection.execute(
        "UPDATE outputs SET state = ?, path = ?, sha256 = ?, size_bytes = ?, media_type = ?, "
        "width_px = ?, height_px = ?, warning = ? WHERE row = ? AND number = ? "
        "AND generation = (SELECT generation FROM rows WHERE seq = ?)",
        (
            "held" if held else "saved",
            output.path,
            output.sha256,
            output.size_bytes,
            output.media_type,
            output.width_px,
            output.height_px,
            warning,
            seq,
            output.index,
            seq,
        ),
    )


def begin_anew(connection: sqlite3.Connection, seq: int) -> None:
    """A row asked for anew starts with fresh attempts; its history stays under the old generation."""
    connection.execute(
        f"UPDATE rows SET attempts = 0, generation = {NEXT_GENERATION} WHERE seq = ?",
        (seq,),
    )


# --- sums -------------------------------------------------------------------------------------------


def reserve(connection: sqlite3.Connection, amount: Decimal) -> None:
    """Set money aside for a task that may be made."""
    if amount:
        _add(connection, "reserved_usd", amount)


def spend(connection: sqlite3.Connection, amount: Decimal) -> None:
    """Add to what was spent."""
    _add(connection, "spent_usd", amount)


def free_reservation(connection: sqlite3.Connection, seq: int) -> None:
    """Give back what the row's open attempt, if any, had set aside."""
    reserved = connection.execute(
        "SELECT reserved_usd FROM attempts WHERE row = ? AND open = 1", (seq,)
    ).fetchone()
    if reserved is not None:
        reserve(connection, -Decimal(reserved[0]))


def count_images(connection: sqlite3.Connection, images: int, size_bytes: int) -> None:
    """Images came to rest under their final names."""
    connection.execute("UPDATE totals SET images = images + ?, bytes = bytes + ?", (images, size_bytes))


def _add(connection: sqlite3.Connection, column: str, amount: Decimal) -> None:
    """Add exactly: SQLite's own sums are floating point."""
    before = Decimal(connection.execute(f"SELECT {column} FROM run").fetchone()[0])
    connection.execute(f"UPDATE run SET {column} = ?", (_decimal_text(_EXACT.add(before, amount)),))


def _decimal_text(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:f}"


def mark_listed(connection: sqlite3.Connection, mark: Mapping[str, Any]) -> None:
    """The sidecar files were written anew and hold every row settled up to this mark."""
    connection.execute("UPDATE run SET listed = ?", (dumps(dict(mark)),))


def settle_invalid(connection: sqlite3.Connection) -> None:
    """Rows that cannot be asked for rest as they are."""
    for (seq,) in connection.execute(
        "SELECT seq FROM rows WHERE state = 'invalid' AND settled IS NULL ORDER BY seq"
    ).fetchall():
        connection.execute("UPDATE rows SET settled = ? WHERE seq = ?", (next_settled(connection), seq))
