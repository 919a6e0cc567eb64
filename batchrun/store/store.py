"""What is known of a run, in one SQLite file: one method per domain verb, each one transaction.

Concurrent verbs share a commit: whoever gets the turn commits everything that waits (group commit), so
that an acknowledged change has survived power loss (WAL, synchronous=FULL) at a fraction of the price of
a commit each. A verb is whole or absent, and every change to a row names the lease that claimed it: a
process that lost its lease changes nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

from batchrun.errors import DiskError, LeaseLost, StoreDamaged, StoreError
from batchrun.model import (
    TERMINAL,
    Accepted,
    Attempt,
    Counts,
    Failure,
    Output,
    RemoteOutput,
    Row,
    State,
    Task,
)
from batchrun.rules.policy import charged, requeue_step
from batchrun.rules.states import Event, advance
from batchrun.store.migrations import migrate
from batchrun.store.records import ATTEMPT_COLUMNS, OUTPUT_COLUMNS, dumps, load_row, read_attempt, read_output

T = TypeVar("T")

STATE_FILE = "state.sqlite3"


@dataclass(frozen=True, slots=True)
class Intent:
    """What is recorded before a submit is sent."""

    seq: int
    #: UTC unix seconds by our clock.
    at: float
    server_at: float | None
    after_task: int | None
    reserved_usd: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Requeued:
    """What `requeue` did, in rows."""

    submit: int = 0
    save: int = 0
    #: Paid for and gone: left failed, because buying again needs the user's word.
    lost: int = 0


@dataclass(slots=True, eq=False)
class _Pending(Generic[T]):
    verb: Callable[[sqlite3.Connection], T]
    settled: bool = False
    result: T | None = None
    error: Exception | None = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with our settings; raises StoreError when the file cannot be used."""
    try:
        if read_only:
            connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None
            )
        else:
            connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            # an acknowledged task id that a power cut takes back is lost money
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.DatabaseError as error:
        raise _store_error(error, path) from error
    return connection


def _store_error(error: sqlite3.Error, path: Path) -> StoreError | DiskError:
    text = str(error)
    if "full" in text or "readonly" in text or "unable to open" in text or "disk I/O" in text:
        return DiskError(f"the state cannot be written: {path}: {text}; free or mend the disk and run again")
    if "not a database" in text or "malformed" in text:
        return StoreDamaged(
            f"{path} is damaged ({text}); images already saved are safe. Put back a copy of it, or move the "
            "folder away and run again (which buys the missing rows anew)"
        )
    return StoreError(f"the state cannot be used: {path}: {text}")


class Store:
    """The state of one run. Verbs are awaited and safe to call from many tasks; each is one transaction."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path
        #: This process's claim; 0 until begin_lease.
        self.lease = 0
        self._turn = anyio.Lock()
        self._waiting: list[_Pending[Any]] = []

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open or create the state file, mode 0600, and bring it to the present form.

        Raises StoreTooNew, StoreDamaged, DiskError or StoreError.
        """
        try:
            path.touch(mode=0o600, exist_ok=True)
        except OSError as error:
            raise DiskError(f"the state cannot be written: {path}: {error.strerror}") from error
        connection = connect(path)
        try:
            migrate(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise _store_error(error, path) from error
        except StoreError:
            connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Close the file; nothing is pending once every verb has returned."""
        self.connection.close()

    # --- transactions -------------------------------------------------------------------------

    async def _write(self, verb: Callable[[sqlite3.Connection], T]) -> T:
        item = _Pending(verb)
        self._waiting.append(item)
        try:
            async with self._turn:
                if not item.settled:
                    batch, self._waiting = self._waiting, []
                    await anyio.to_thread.run_sync(self._commit, batch)
        finally:
            if not item.settled and item in self._waiting:
                self._waiting.remove(item)
        return item.outcome()

    def _commit(self, batch: Sequence[_Pending[Any]]) -> None:
        connection = self.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for item in batch:
                connection.execute("SAVEPOINT verb")
                try:
                    item.result = item.verb(connection)
                except sqlite3.OperationalError:
                    raise  # the database itself, not this verb
                except Exception as error:
                    connection.execute("ROLLBACK TO verb")
                    item.error = error
                connection.execute("RELEASE verb")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for item in batch:
                item.error = _store_error(error, self.path)
        finally:
            for item in batch:
                item.settled = True

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        async with self._turn:
            return await anyio.to_thread.run_sync(query, self.connection)

    # --- the run's record -----------------------------------------------------------------------

    async def manifest(self) -> str | None:
        """The manifest the folder belongs to; None for a new one."""
        return await self._read(lambda connection: _one(connection, "SELECT manifest FROM run"))

    async def stamp(self) -> str | None:
        """What told the manifest as last read; None for a new run."""
        return await self._read(lambda connection: _one(connection, "SELECT stamp FROM run"))

    async def job(self) -> str | None:
        """The job's settings as last told, as JSON."""
        return await self._read(lambda connection: _one(connection, "SELECT job FROM run"))

    async def account_limit(self) -> int | None:
        """How many active tasks the account allowed when last told."""
        return await self._read(lambda connection: _one(connection, "SELECT account_limit FROM run"))

    async def remember_job(self, *, manifest: str, job: str) -> None:
        """The newest settings, and where the manifest lies now."""
        await self._write(
            lambda connection: connection.execute("UPDATE run SET manifest = ?, job = ?", (manifest, job))
        )

    async def has_work(self) -> bool:
        """Whether any row is on its way."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM rows WHERE state IN ('planned', 'submitting', 'in_flight', 'in_doubt', "
            "'finished') AND (present = 1 OR state <> 'planned'))"
        )
        return bool(await self._read(lambda connection: _one(connection, query)))

    async def planned_beyond(self, last_seq: int) -> int:
        """How many planned rows come after that one."""
        query = f"SELECT count(*) FROM rows WHERE state = 'planned' AND present = 1 AND seq > {int(last_seq)}"
        return int(await self._read(lambda connection: _one(connection, query)))

    async def begin_lease(self, *, token: str, host: str, pid: int, at: float) -> None:
        """Take the run for this process. The caller holds the folder's lock, so every other lease is dead."""

        def verb(connection: sqlite3.Connection) -> int:
            connection.execute("UPDATE leases SET ended_at = ? WHERE ended_at IS NULL", (at,))
            connection.execute("UPDATE rows SET lease = NULL WHERE lease IS NOT NULL")
            connection.execute("UPDATE run SET stop_order = NULL")
            cursor = connection.execute(
                "INSERT INTO leases (token, host, pid, started_at) VALUES (?, ?, ?, ?)",
                (token, host, pid, at),
            )
            return cursor.lastrowid or 0

        self.lease = await self._write(verb)

    async def end_lease(self, at: float) -> None:
        """Give the run back."""

        def verb(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE rows SET lease = NULL WHERE lease = ?", (self.lease,))
            connection.execute("UPDATE leases SET ended_at = ? WHERE id = ?", (at, self.lease))

        await self._write(verb)

    async def stop_order(self) -> str | None:
        """What another process asks of this runner: 'cancel', or None."""
        return await self._read(lambda connection: _one(connection, "SELECT stop_order FROM run"))

    async def adopt_limit(self, limit: int | None) -> None:
        """Record how many active tasks the account allows."""
        await self._write(lambda connection: connection.execute("UPDATE run SET account_limit = ?", (limit,)))

    # --- claiming --------------------------------------------------------------------------------

    async def claim(self, state: State, *, limit: int, last_seq: int | None = None) -> list[Row]:
        """Up to `limit` unclaimed rows in `state`, now claimed, in first-seen order.

        Planned rows must be in the present manifest; rows with a paid task are followed even when they are
        not. `last_seq` bounds planned rows (a try with the first rows only).
        """
        present = "AND present = 1" if state is State.PLANNED else ""
        bound = f"AND seq <= {int(last_seq)}" if last_seq is not None and state is State.PLANNED else ""

        def verb(connection: sqlite3.Connection) -> list[Row]:
            # the state stands in the text so that the partial index serves
            claimed = connection.execute(
                f"UPDATE rows SET lease = ? WHERE seq IN (SELECT seq FROM rows WHERE state = '{state}' "
                f"AND lease IS NULL {present} {bound} ORDER BY seq LIMIT ?) RETURNING seq",
                (self.lease, limit),
            ).fetchall()
            if state is State.IN_DOUBT:
                self._unsettle(connection, [seq for (seq,) in claimed])
            return [load_row(connection, seq) for (seq,) in sorted(claimed)]

        return await self._write(verb)

    async def release(self, seqs: Collection[int]) -> None:
        """Give rows back as they stand."""
        await self._write(
            lambda connection: connection.executemany(
                "UPDATE rows SET lease = NULL WHERE seq = ? AND lease = ?",
                [(seq, self.lease) for seq in seqs],
            )
        )

    async def last_seq_of(self, first_rows: int) -> int | None:
        """The number of the last of the first `first_rows` rows of the manifest; None when there are fewer."""

        def query(connection: sqlite3.Connection) -> int | None:
            record = connection.execute(
                "SELECT seq FROM rows WHERE present = 1 ORDER BY seq LIMIT 1 OFFSET ?", (first_rows - 1,)
            ).fetchone()
            return record[0] if record else None

        return await self._read(query)

    # --- a row's way ------------------------------------------------------------------------------

    def _move(
        self, connection: sqlite3.Connection, seq: int, event: Event, failure: Failure | None = None
    ) -> State:
        record = connection.execute("SELECT state, present, lease FROM rows WHERE seq = ?", (seq,)).fetchone()
        if record is None or record[2] != self.lease:
            raise LeaseLost(f"row {seq} is not claimed by this process any more")
        before = State(record[0])
        after = advance(before, event)
        terminal = after in TERMINAL
        connection.execute(
            "UPDATE rows SET state = ?, cause = ?, message = ?, settled = ?, lease = ? WHERE seq = ?",
            (
                after,
                failure.cause if failure else None,
                failure.message if failure else None,
                self._next_settled(connection) if terminal else None,
                None if terminal else self.lease,
                seq,
            ),
        )
        if record[1]:
            count_move(connection, before, after)
        return after

    @staticmethod
    def _next_settled(connection: sqlite3.Connection) -> int:
        return int(connection.execute("UPDATE run SET settled = settled + 1 RETURNING settled").fetchone()[0])

    @staticmethod
    def _unsettle(connection: sqlite3.Connection, seqs: Collection[int]) -> None:
        """Take rows out of the sidecar files: what was written of them is not true any more."""
        changed = 0
        for seq in seqs:
            changed += connection.execute(
                "UPDATE rows SET settled = NULL WHERE seq = ? AND settled IS NOT NULL", (seq,)
            ).rowcount
        if changed:
            connection.execute("UPDATE run SET listed = '{}'")

    async def record_intent(self, intent: Intent) -> Row:
        """Record that the row is about to be submitted; the submit may be sent once this returns."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, intent.seq, Event.INTENT_RECORDED)
            connection.execute(
                "INSERT INTO attempts (row, generation, number, intent_at, intent_server_at, after_task, reserved_usd) "
                "SELECT seq, generation, attempts + 1, ?, ?, ?, ? FROM rows WHERE seq = ?",
                (intent.at, intent.server_at, intent.after_task, str(intent.reserved_usd), intent.seq),
            )
            _reserve(connection, intent.reserved_usd)
            return load_row(connection, intent.seq)

        return await self._write(verb)

    async def record_accepted(self, seq: int, accepted: Accepted, *, at: float, adopted: bool = False) -> Row:
        """Record the task of a submit, or of a doubt that was looked up (`adopted`).

        When another row holds that task already, this row is in doubt (identical rows are interchangeable,
        so the other one's look-up was answered with our task).
        """

        def verb(connection: sqlite3.Connection) -> Row:
            holder = connection.execute(
                "SELECT row FROM attempts WHERE task_id = ?", (accepted.task_id,)
            ).fetchone()
            if holder is None:
                self._move(connection, seq, Event.ADOPTED if adopted else Event.ACCEPTED)
                connection.execute(
                    "UPDATE attempts SET task_id = ?, token = ?, accepted_at = ? WHERE row = ? AND open = 1",
                    (accepted.task_id, accepted.token, at, seq),
                )
            elif not adopted:
                self._move(connection, seq, Event.REPLY_LOST)
            return load_row(connection, seq)

        return await self._write(verb)

    async def withdraw(self, seq: int) -> Row:
        """The submit certainly made no task: the row is planned again and no attempt is used up."""
        return await self._write(lambda connection: self._drop_attempt(connection, seq, Event.WITHDRAWN))

    async def record_absent(self, seq: int) -> Row:
        """A doubtful submit certainly made no task."""
        return await self._write(lambda connection: self._drop_attempt(connection, seq, Event.ABSENT))

    def _drop_attempt(
        self, connection: sqlite3.Connection, seq: int, event: Event, failure: Failure | None = None
    ) -> Row:
        self._move(connection, seq, event, failure)
        self._free_reservation(connection, seq)
        connection.execute("DELETE FROM attempts WHERE row = ? AND open = 1", (seq,))
        return load_row(connection, seq)

    async def record_doubt(self, seq: int, reason: str) -> Row:
        """The submit's answer is lost."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, Event.REPLY_LOST)
            connection.execute("UPDATE attempts SET error = ? WHERE row = ? AND open = 1", (reason, seq))
            return load_row(connection, seq)

        return await self._write(verb)

    async def hold(self, seq: int, failure: Failure) -> None:
        """The doubt cannot be settled: the row stays in doubt and is told so to the user."""

        def verb(connection: sqlite3.Connection) -> None:
            changed = connection.execute(
                "UPDATE rows SET cause = ?, message = ?, settled = ?, lease = NULL "
                "WHERE seq = ? AND lease = ? AND state = 'in_doubt'",
                (failure.cause, failure.message, self._next_settled(connection), seq, self.lease),
            ).rowcount
            if not changed:
                raise LeaseLost(f"row {seq} is not claimed by this process any more")

        await self._write(verb)

    async def record_rejected(self, seq: int, failure: Failure) -> Row:
        """The row fails without a task: the service refuses it, or it cannot be sent at all."""
        return await self._write(
            lambda connection: self._drop_attempt(connection, seq, Event.REJECTED, failure)
        )

    async def record_attempt_failed(
        self, seq: int, task: Task, failure: Failure, *, at: float, event: Event
    ) -> Row:
        """The row's task failed, ended empty, or was cancelled by us; `event` says where the row goes."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, event, None if event is Event.ATTEMPT_FAILED else failure)
            self._close_attempt(connection, seq, task, at=at, error=failure.message)
            connection.execute("UPDATE rows SET attempts = attempts + 1 WHERE seq = ?", (seq,))
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_finished(self, seq: int, task: Task, *, at: float) -> Row:
        """The task succeeded: its cost is spent, its outputs are to be saved."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, Event.FINISHED)
            self._close_attempt(connection, seq, task, at=at)
            connection.execute("UPDATE rows SET attempts = attempts + 1 WHERE seq = ?", (seq,))
            connection.executemany(
                "INSERT INTO outputs (row, generation, number, state, url, name, content_type, declared_bytes) "
                "SELECT seq, generation, ?, 'pending', ?, ?, ?, ? FROM rows WHERE seq = ?",
                [
                    (number, output.url, output.name, output.content_type, output.size_bytes, seq)
                    for number, output in enumerate(output for output in task.outputs if output.url)
                ],
            )
            return load_row(connection, seq)

        return await self._write(verb)

    def _close_attempt(
        self, connection: sqlite3.Connection, seq: int, task: Task, *, at: float, error: str = ""
    ) -> None:
        self._free_reservation(connection, seq)
        cost = charged(task)
        connection.execute(
            "UPDATE attempts SET open = 0, ended_at = ?, status = ?, pexit = ?, cost_usd = ?, seconds = ?, error = ? "
            "WHERE row = ? AND open = 1",
            (
                at,
                task.status,
                task.pexit,
                _decimal_text(cost),
                _decimal_text(task.elapsed_s),
                error,
                seq,
            ),
        )
        if cost:
            _add_decimal(connection, "spent_usd", cost)

    def _free_reservation(self, connection: sqlite3.Connection, seq: int) -> None:
        reserved = connection.execute(
            "SELECT reserved_usd FROM attempts WHERE row = ? AND open = 1", (seq,)
        ).fetchone()
        if reserved is not None:
            _reserve(connection, -Decimal(reserved[0]))

    # --- saving --------------------------------------------------------------------------------------

    async def refresh_outputs(self, seq: int, outputs: Sequence[RemoteOutput]) -> Row:
        """New addresses for the outputs that are not saved yet, matched by their place."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._check_lease(connection, seq)
            row = load_row(connection, seq)
            fresh = [output for output in outputs if output.url]
            connection.executemany(
                "UPDATE outputs SET url = ? WHERE row = ? AND generation = ? AND number = ? AND state = 'pending'",
                [(output.url, seq, row.generation, number) for number, output in enumerate(fresh)],
            )
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_output(self, seq: int, output: Output, *, held: bool = False, warning: str = "") -> Row:
        """An image is whole on disk; `held`: under a partial name until all of the row's images are."""
        return await self._write(
            lambda connection: self._record_output(connection, seq, output, held, warning)
        )

    def _record_output(
        self, connection: sqlite3.Connection, seq: int, output: Output, held: bool, warning: str
    ) -> Row:
        self._check_lease(connection, seq)
        connection.execute(
            "UPDATE outputs SET state = ?, path = ?, sha256 = ?, size_bytes = ?, media_type = ?, width_px = ?, "
            "height_px = ?, warning = ? WHERE row = ? AND number = ? "
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
        return load_row(connection, seq)

    async def record_saved(self, seq: int, *, superseded: Mapping[str, str] | None = None) -> Row:
        """Every image of the row is under its final name: the row is done.

        `superseded` maps the old paths of images moved aside to their new ones.
        """

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, Event.SAVED)
            for old, new in (superseded or {}).items():
                connection.execute(
                    "UPDATE outputs SET state = 'superseded', path = ? WHERE row = ? AND path = ? "
                    "AND generation < (SELECT generation FROM rows WHERE seq = ?)",
                    (new, seq, old, seq),
                )
            # addresses expire; a million of them are not worth keeping
            connection.execute(
                "UPDATE outputs SET state = 'saved', url = NULL, name = '' WHERE row = ? "
                "AND generation = (SELECT generation FROM rows WHERE seq = ?)",
                (seq, seq),
            )
            row = load_row(connection, seq)
            present = connection.execute("SELECT present FROM rows WHERE seq = ?", (seq,)).fetchone()[0]
            if present:
                _count_images(
                    connection, len(row.outputs), sum(output.size_bytes or 0 for output in row.outputs)
                )
            return row

        return await self._write(verb)

    async def record_lost(self, seq: int, failure: Failure) -> Row:
        """The row's images cannot be had: it fails; what is saved stays, and nothing is bought again."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, Event.GAVE_UP, failure)
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_cancelled(self, seq: int) -> None:
        """A planned row will not be submitted, by the user's word."""

        def verb(connection: sqlite3.Connection) -> None:
            self._move(connection, seq, Event.CANCELLED, Failure("cancelled", "cancelled by the user"))

        await self._write(verb)

    async def older_outputs(self, seq: int) -> list[tuple[int, Output]]:
        """The saved images of the row's earlier generations, with the generation, to be moved aside."""

        def query(connection: sqlite3.Connection) -> list[tuple[int, Output]]:
            return [
                (record[0], read_output(record[1:]))
                for record in connection.execute(
                    f"SELECT generation, {OUTPUT_COLUMNS} FROM outputs WHERE row = ? AND state = 'saved' "
                    "AND generation < (SELECT generation FROM rows WHERE seq = ?) ORDER BY generation, number",
                    (seq, seq),
                )
            ]

        return await self._read(query)

    async def row(self, seq: int) -> Row:
        """The row as it stands."""
        return await self._read(lambda connection: load_row(connection, seq))

    def _check_lease(self, connection: sqlite3.Connection, seq: int) -> None:
        record = connection.execute("SELECT lease FROM rows WHERE seq = ?", (seq,)).fetchone()
        if record is None or record[0] != self.lease:
            raise LeaseLost(f"row {seq} is not claimed by this process any more")

    # --- asking again ------------------------------------------------------------------------------

    async def requeue(
        self, *, states: Collection[State], ids: Collection[str] = (), regenerate_lost: bool = False
    ) -> Requeued:
        """Put rows back on their way by the user's word: failed and cancelled ones, or doubtful ones.

        A doubtful row is submitted anew only after one more look (see recover); rows whose images were paid
        for are fetched again, not bought. `ids` narrows it to those ids.
        """

        def verb(connection: sqlite3.Connection) -> Requeued:
            done = {"submit": 0, "save": 0, "leave": 0}
            for seq, state, cause, message in self._candidates(connection, states, ids):
                failure = Failure(cause, message or "") if cause else None
                step = requeue_step(State(state), failure, regenerate_lost=regenerate_lost)
                done[step] += 1
                if step == "leave":
                    continue
                self._unsettle(connection, [seq])
                connection.execute("UPDATE rows SET lease = ? WHERE seq = ?", (self.lease, seq))
                self._move(connection, seq, Event.RESUMED if step == "save" else Event.REQUEUED)
                if step == "submit":
                    self._forget_outcome(connection, seq)
                connection.execute("UPDATE rows SET lease = NULL WHERE seq = ?", (seq,))
            return Requeued(done["submit"], done["save"], done["leave"])

        return await self._write(verb)

    @staticmethod
    def _candidates(
        connection: sqlite3.Connection, states: Collection[State], ids: Collection[str]
    ) -> list[tuple[int, str, str | None, str | None]]:
        wanted = ", ".join(f"'{state}'" for state in states)
        records = connection.execute(
            f"SELECT seq, state, cause, message FROM rows WHERE state IN ({wanted}) AND present = 1 ORDER BY seq"
        ).fetchall()
        if not ids:
            return records
        named = {
            record[0]
            for id_ in ids
            for record in connection.execute("SELECT seq FROM rows WHERE id = ? OR name = ?", (id_, id_))
        }
        return [record for record in records if record[0] in named]

    @staticmethod
    def _forget_outcome(connection: sqlite3.Connection, seq: int) -> None:
        """A row asked for anew starts with fresh attempts; its history stays under the old generation."""
        connection.execute("UPDATE rows SET attempts = 0, generation = generation + 1 WHERE seq = ?", (seq,))

    async def give_up_doubt(self, seq: int) -> Row:
        """Submit a doubtful row anew, by the user's word."""

        def verb(connection: sqlite3.Connection) -> Row:
            self._move(connection, seq, Event.REQUEUED)
            self._free_reservation(connection, seq)
            connection.execute(
                "UPDATE attempts SET open = 0, error = 'given up by the user' WHERE row = ? AND open = 1",
                (seq,),
            )
            self._forget_outcome(connection, seq)
            return load_row(connection, seq)

        return await self._write(verb)

    # --- uploads, tools, tasks ------------------------------------------------------------------------

    async def upload_url(self, sha256: str) -> str | None:
        """The address of an uploaded image, by its content; None when it was not uploaded yet."""

        def query(connection: sqlite3.Connection) -> str | None:
            record = connection.execute("SELECT url FROM uploads WHERE sha256 = ?", (sha256,)).fetchone()
            return record[0] if record else None

        return await self._read(query)

    async def record_upload(self, sha256: str, url: str, *, at: float) -> None:
        """An image was uploaded."""
        await self._write(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO uploads (sha256, url, uploaded_at) VALUES (?, ?, ?)",
                (sha256, url, at),
            )
        )

    async def tool(self, number: int) -> str:
        """The tool description (JSON text) that requests were bound to."""

        def query(connection: sqlite3.Connection) -> str:
            return str(
                connection.execute("SELECT description FROM tools WHERE id = ?", (number,)).fetchone()[0]
            )

        return await self._read(query)

    async def tool_numbers(self) -> list[int]:
        """The numbers of all tool descriptions of this run."""
        return await self._read(
            lambda connection: [
                record[0] for record in connection.execute("SELECT id FROM tools ORDER BY id")
            ]
        )

    async def known_tasks(self, task_ids: Collection[str]) -> set[str]:
        """Which of these task ids belong to rows of this run."""

        def query(connection: sqlite3.Connection) -> set[str]:
            marks = ", ".join("?" * len(task_ids))
            found = connection.execute(
                f"SELECT task_id FROM attempts WHERE task_id IN ({marks})", tuple(task_ids)
            )
            return {record[0] for record in found}

        return await self._read(query)

    # --- what is told ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """Rows of the present manifest by state, and what they brought."""
        return await self._read(read_counts)

    async def failures(self, *, limit: int = 20) -> list[tuple[State, Failure, int, int]]:
        """Groups of rows that did not make it: state, a sample failure, how many, the first line."""
        return await self._read(lambda connection: read_failures(connection, limit))

    async def listing_mark(self) -> dict[str, Any]:
        """The watermark of the sidecar files: {} when they are to be built anew."""

        def query(connection: sqlite3.Connection) -> dict[str, Any]:
            record = connection.execute("SELECT listed FROM run").fetchone()
            return dict(json.loads(record[0])) if record else {}

        return await self._read(query)

    async def set_listing_mark(self, mark: Mapping[str, Any]) -> None:
        """The sidecar files hold every row settled up to this mark."""
        text = dumps(dict(mark))
        await self._write(lambda connection: connection.execute("UPDATE run SET listed = ?", (text,)))

    async def settled_after(self, settled: int, *, limit: int) -> list[Settled]:
        """Rows settled after that number, in order of settling."""
        return await self._read(lambda connection: read_settled(connection, settled, limit=limit))

    async def rejected_rows(self, *, after_seq: int, limit: int) -> list[Rejected]:
        """Rows of the present manifest that did not make it and cost nothing to try again, by row number."""

        def query(connection: sqlite3.Connection) -> list[Rejected]:
            records = connection.execute(
                "SELECT rows.seq, sources.cells FROM rows JOIN sources ON sources.row = rows.seq "
                "WHERE state IN ('failed', 'cancelled', 'invalid') AND present = 1 AND rows.seq > ? "
                "ORDER BY rows.seq LIMIT ?",
                (after_seq, limit),
            ).fetchall()
            return [Rejected(seq, json.loads(cells, parse_float=Decimal)) for seq, cells in records]

        return await self._read(query)

    async def form(self) -> dict[str, Any]:
        """The manifest's form as last read: format, delimiter, columns."""

        def query(connection: sqlite3.Connection) -> dict[str, Any]:
            record = connection.execute("SELECT form FROM run").fetchone()
            return dict(json.loads(record[0])) if record else {}

        return await self._read(query)

    async def planning(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` (see store.planning) in the thread that owns the database."""
        async with self._turn:
            try:
                return await anyio.to_thread.run_sync(work, self.connection)
            except sqlite3.Error as error:
                raise _store_error(error, self.path) from error


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


def read_settled(connection: sqlite3.Connection, after: int, *, limit: int) -> list[Settled]:
    """Rows of the present manifest settled after that number, in order of settling."""
    records = connection.execute(
        "SELECT seq, settled FROM rows WHERE settled > ? AND present = 1 ORDER BY settled LIMIT ?",
        (after, limit),
    ).fetchall()
    return [Settled(number, load_row(connection, seq), _tasks_of(connection, seq)) for seq, number in records]


def _tasks_of(connection: sqlite3.Connection, seq: int) -> tuple[Attempt, ...]:
    records = connection.execute(
        f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE row = ? AND task_id IS NOT NULL ORDER BY generation, number",
        (seq,),
    )
    return tuple(read_attempt(record) for record in records)


def _one(connection: sqlite3.Connection, query: str) -> Any:
    record = connection.execute(query).fetchone()
    return record[0] if record else None


def count_move(
    connection: sqlite3.Connection, before: State | None, after: State | None, rows: int = 1
) -> None:
    """Keep the running counts; None stands for not being in the manifest."""
    for state, change in ((before, -rows), (after, rows)):
        if state is not None:
            connection.execute(
                "INSERT INTO counts (state, rows) VALUES (?, ?) "
                "ON CONFLICT (state) DO UPDATE SET rows = rows + excluded.rows",
                (state, change),
            )


def _count_images(connection: sqlite3.Connection, images: int, size_bytes: int) -> None:
    connection.execute("UPDATE totals SET images = images + ?, bytes = bytes + ?", (images, size_bytes))


def _decimal_text(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:f}"


def _add_decimal(connection: sqlite3.Connection, column: str, amount: Decimal) -> None:
    """Add exactly: SQLite's own sums are floating point."""
    before = Decimal(connection.execute(f"SELECT {column} FROM run").fetchone()[0])
    connection.execute(f"UPDATE run SET {column} = ?", (f"{before + amount:f}",))


def _reserve(connection: sqlite3.Connection, amount: Decimal) -> None:
    if amount:
        _add_decimal(connection, "reserved_usd", amount)


def read_counts(connection: sqlite3.Connection) -> Counts:
    """The running counts of a run."""
    by_state = {
        State(state): rows for state, rows in connection.execute("SELECT state, rows FROM counts") if rows
    }
    images, size_bytes = connection.execute("SELECT images, bytes FROM totals").fetchone()
    spent = connection.execute("SELECT spent_usd FROM run").fetchone()
    return Counts(by_state, images, size_bytes, Decimal(spent[0]) if spent else Decimal(0))


def read_failures(connection: sqlite3.Connection, limit: int) -> list[tuple[State, Failure, int, int]]:
    """Rows that did not make it, grouped by state and cause, largest group first."""
    records: Iterable[tuple[Any, ...]] = connection.execute(
        "SELECT state, cause, min(message), count(*), min(line) FROM rows "
        "WHERE state IN ('failed', 'cancelled', 'invalid', 'in_doubt') AND present = 1 AND cause IS NOT NULL "
        "GROUP BY state, cause ORDER BY count(*) DESC, cause LIMIT ?",
        (limit,),
    )
    return [
        (State(state), Failure(cause, message or ""), rows, line)
        for state, cause, message, rows, line in records
    ]
