"""What is known of a run, in one SQLite file: one method per domain verb, each one transaction.

A verb is whole or absent and durable once it returns (see connection.py). Every change to a row names the
lease that claimed it: a process that lost its lease changes nothing. Verbs take and return model records;
what they are made of is in changes.py, what is asked in reading.py.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, cast

from batchrun.errors import DiskError, StoreError
from batchrun.model import Accepted, Counts, Failure, Output, RemoteOutput, Row, State, Task
from batchrun.rules.budget import Budget
from batchrun.rules.policy import requeue_step
from batchrun.rules.states import Event
from batchrun.store import changes, reading, rebuilding
from batchrun.store.connection import STATE_FILE, Transactions, connect, store_error
from batchrun.store.migrations import migrate
from batchrun.store.reading import (
    Rejected,
    Settled,
    read_counts,
    read_failures,
    read_settled,
    read_value,
)
from batchrun.store.records import (
    ATTEMPT_COLUMNS,
    OUTPUT_COLUMNS,
    ROW_COLUMNS,
    complete,
    complete_all,
    dumps,
    load_row,
    read_output,
)

__all__ = [
    "STATE_FILE",
    "Intent",
    "Rejected",
    "Requeued",
    "Settled",
    "Store",
    "connect",
    "read_counts",
    "read_failures",
    "read_settled",
]

T = TypeVar("T")


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


class Store:
    """The state of one run. Verbs are awaited and safe to call from many tasks; each is one transaction.

    Every verb raises StoreError or DiskError when the file cannot be used, and LeaseLost, changing nothing,
    when its row is not claimed by this process.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        #: This process's claim; 0 until begin_lease.
        self.lease = 0
        self._transactions = Transactions(connection, path)
        self._write = self._transactions.write
        self._read = self._transactions.run

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
        except sqlite3.Error as error:
            connection.close()
            raise store_error(error, path) from error
        except StoreError:
            connection.close()
            raise
        return cls(connection, path)

    def close(self) -> None:
        """Close the file; nothing is pending once every verb has returned.

        The folder's lock is held until then, so no process works on the run any more: an open lease is left
        only by one that was killed, together with its write-ahead log (see damage.py).
        """
        with suppress(sqlite3.Error):
            connection = self._transactions.connection
            connection.execute("UPDATE leases SET ended_at = ? WHERE ended_at IS NULL", (time.time(),))
        self._transactions.close()

    # --- the run's record -----------------------------------------------------------------------

    async def manifest(self) -> str | None:
        """The manifest the folder belongs to; None for a new one."""
        return cast("str | None", await self._of_run("manifest")) or None

    async def stamp(self) -> str | None:
        """What told the manifest as last read; None for a new run."""
        return cast("str | None", await self._of_run("stamp"))

    async def job(self) -> str | None:
        """The job's settings as last told, as JSON."""
        return cast("str | None", await self._of_run("job"))

    async def form(self) -> dict[str, Any]:
        """The manifest's form as last read: format, delimiter, columns."""
        return await self._read(lambda connection: reading.read_json(connection, "form"))

    async def account_limit(self) -> int | None:
        """How many active tasks the account allowed when last told."""
        return cast("int | None", await self._of_run("account_limit"))

    async def stop_order(self) -> str | None:
        """What another process asks of this runner: 'cancel', or None."""
        return cast("str | None", await self._of_run("stop_order"))

    async def _of_run(self, column: str) -> Any:
        return await self._read(lambda connection: read_value(connection, f"SELECT {column} FROM run"))

    async def remember_job(self, *, manifest: str, job: str, stamp: str) -> None:
        """The newest settings, where the manifest lies now, and what tells it there."""
        query = "UPDATE run SET manifest = ?, job = ?, stamp = ?"
        await self._write(lambda connection: connection.execute(query, (manifest, job, stamp)))

    async def forget_stamp(self) -> None:
        """Let the next start read the manifest again, though it has not changed."""
        await self._write(lambda connection: connection.execute("UPDATE run SET stamp = ''"))

    async def adopt_limit(self, limit: int) -> None:
        """Record how many active tasks the account allows."""
        await self._write(lambda connection: connection.execute("UPDATE run SET account_limit = ?", (limit,)))

    async def planning(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` (see store.planning) in the thread that owns the database."""
        return await self._read(work)

    # --- leases and claims -----------------------------------------------------------------------

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
        # into the database itself: without its log the file then shows that something is missing
        await self._read(lambda connection: connection.execute("PRAGMA wal_checkpoint").fetchone())

    async def end_lease(self, at: float) -> None:
        """Give the run back."""

        def verb(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE rows SET lease = NULL WHERE lease = ?", (self.lease,))
            connection.execute("UPDATE leases SET ended_at = ? WHERE id = ?", (at, self.lease))

        await self._write(verb)

    async def claim(
        self, state: State, *, limit: int, after_seq: int = 0, last_seq: int | None = None
    ) -> list[Row]:
        """Up to `limit` unclaimed rows in `state` that come after row `after_seq`, now claimed, in order.

        Planned rows must be in the present manifest; rows with a paid task are followed even when they are
        not. `last_seq` bounds planned rows (a try with the first rows only).
        """
        present = "AND present = 1" if state is State.PLANNED else ""
        if state is State.IN_DOUBT:  # the others are searched for: see rebuilding.py
            present = "AND EXISTS (SELECT 1 FROM attempts WHERE row = rows.seq AND open = 1)"
        bound = f"AND seq > {int(after_seq)}"
        if last_seq is not None and state is State.PLANNED:
            bound += f" AND seq <= {int(last_seq)}"

        def verb(connection: sqlite3.Connection) -> list[Row]:
            changes.check_alive(connection, self.lease)
            # the state, and the index's own condition, stand in the text: or all rows done are passed over
            claimed = connection.execute(
                "UPDATE rows SET lease = ? WHERE seq IN (SELECT seq FROM rows "
                f"WHERE state = '{state}' AND {reading.UNFINISHED} AND lease IS NULL {present} {bound} "
                f"ORDER BY seq LIMIT ?) RETURNING {ROW_COLUMNS}",
                (self.lease, limit),
            ).fetchall()
            return [row for row, _ in complete_all(connection, sorted(claimed))]

        return await self._write(verb)

    async def release(self, seqs: Collection[int]) -> None:
        """Give rows back as they stand."""
        await self._write(
            lambda connection: connection.executemany(
                "UPDATE rows SET lease = NULL WHERE seq = ? AND lease = ?",
                [(seq, self.lease) for seq in seqs],
            )
        )

    async def has_work(self) -> bool:
        """Whether any row is on its way."""
        return await self._read(reading.has_work)

    async def budget(self, cap_usd: Decimal) -> Budget:
        """What was spent, billed and reserved so far, under a cap."""
        return await self._read(lambda connection: reading.read_budget(connection, cap_usd))

    async def recent_seconds(self) -> list[tuple[int, float]]:
        """How long the newest tasks took that this run knows the end of: (tool, seconds), oldest first."""
        return await self._read(reading.recent_seconds)

    async def unbought(self, *, last_seq: int | None = None) -> list[tuple[int, int, int]]:
        """The planned rows of the manifest, up to row `last_seq`: (tool, rows, images) by tool."""
        return await self._read(lambda connection: reading.read_unbought(connection, last_seq))

    async def states_of(self, ids: Collection[str]) -> dict[str, State]:
        """The states of the manifest's rows of these ids; ids that no row has are left out."""
        return await self._read(lambda connection: reading.states_of(connection, ids))

    async def last_seq_of(self, first_rows: int) -> int | None:
        """The number of the last of the manifest's first `first_rows` rows; None when there are fewer."""
        query = "SELECT seq FROM rows WHERE present = 1 ORDER BY seq LIMIT 1 OFFSET ?"
        return await self._read(lambda connection: read_value(connection, query, (first_rows - 1,)))

    async def planned_beyond(self, last_seq: int) -> int:
        """How many planned rows come after that one."""
        query = (
            "SELECT count(*) FROM rows WHERE state = 'planned' "
            f"AND {reading.UNFINISHED} AND present = 1 AND seq > ?"
        )
        return int(await self._read(lambda connection: read_value(connection, query, (last_seq,))))

    # --- submitting -------------------------------------------------------------------------------

    async def record_intent(self, intent: Intent) -> Row:
        """Record that the row is about to be submitted; the submit may be sent once this returns."""

        def verb(connection: sqlite3.Connection) -> Row:
            record = changes.move(connection, intent.seq, Event.INTENT_RECORDED, lease=self.lease)
            [attempt] = connection.execute(
                "INSERT INTO attempts (row, generation, number, intent_at, intent_server_at, after_task, "
                "reserved_usd) SELECT seq, generation, attempts + 1, ?, ?, ?, ? FROM rows WHERE seq = ? "
                f"RETURNING {ATTEMPT_COLUMNS}",
                (intent.at, intent.server_at, intent.after_task, str(intent.reserved_usd), intent.seq),
            ).fetchall()
            changes.reserve(connection, intent.reserved_usd)
            return complete(connection, record, attempt=attempt, outputs=())

        return await self._write(verb)

    async def record_accepted(self, seq: int, accepted: Accepted, *, at: float, adopted: bool = False) -> Row:
        """Record the task of a submit, or of a doubt that was looked up (`adopted`).

        When another row holds that task already, this row is in doubt (identical rows are interchangeable,
        so the other one's look-up was answered with our task).
        """

        def verb(connection: sqlite3.Connection) -> Row:
            query = "SELECT row, open FROM attempts WHERE task_id = ?"
            holder = connection.execute(query, (accepted.task_id,)).fetchone()
            if holder is None:
                event = Event.ADOPTED if adopted else Event.ACCEPTED
                record = changes.move(connection, seq, event, lease=self.lease)
                attempts = connection.execute(
                    "UPDATE attempts SET task_id = ?, token = ?, accepted_at = ? WHERE row = ? AND open = 1 "
                    f"RETURNING {ATTEMPT_COLUMNS}",
                    (accepted.task_id, accepted.token, at, seq),
                ).fetchall()
                return complete(connection, record, attempt=attempts[0] if attempts else None, outputs=())
            if not adopted and holder != (seq, 1):  # that would be this very answer, recorded already
                changes.move(connection, seq, Event.REPLY_LOST, lease=self.lease)
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_doubt(self, seq: int, reason: str) -> Row:
        """The submit's answer is lost."""

        def verb(connection: sqlite3.Connection) -> Row:
            changes.move(connection, seq, Event.REPLY_LOST, lease=self.lease)
            connection.execute("UPDATE attempts SET error = ? WHERE row = ? AND open = 1", (reason, seq))
            return load_row(connection, seq)

        return await self._write(verb)

    async def withdraw(self, seq: int) -> Row:
        """The submit certainly made no task: the row is planned again and no attempt is used up."""
        return await self._drop_attempt(seq, Event.WITHDRAWN)

    async def record_absent(self, seq: int) -> Row:
        """A doubtful submit certainly made no task."""
        return await self._drop_attempt(seq, Event.ABSENT)

    async def record_rejected(self, seq: int, failure: Failure) -> Row:
        """The row fails without a task: the service refuses it, or it cannot be sent at all."""
        return await self._drop_attempt(seq, Event.REJECTED, failure)

    async def _drop_attempt(self, seq: int, event: Event, failure: Failure | None = None) -> Row:
        return await self._write(
            lambda connection: changes.drop_attempt(connection, seq, event, lease=self.lease, failure=failure)
        )

    async def hold(self, seq: int, failure: Failure) -> None:
        """The doubt cannot be settled: the row stays in doubt and is told so to the user."""

        def verb(connection: sqlite3.Connection) -> None:
            changes.check_lease(connection, seq, self.lease)
            changes.unsettle(connection, [seq])
            connection.execute(
                "UPDATE rows SET cause = ?, message = ?, settled = ?, lease = NULL "
                "WHERE seq = ? AND state = 'in_doubt'",
                (failure.cause, failure.message, changes.next_settled(connection), seq),
            )

        await self._write(verb)

    # --- how tasks end ----------------------------------------------------------------------------

    async def record_attempt_failed(
        self, seq: int, task: Task, failure: Failure, *, at: float, event: Event
    ) -> Row:
        """The row's task failed, ended empty, or was cancelled by us; `event` says where the row goes."""

        def verb(connection: sqlite3.Connection) -> Row:
            told = None if event is Event.ATTEMPT_FAILED else failure
            record = changes.move(connection, seq, event, lease=self.lease, failure=told, attempts=1)
            attempt = changes.close_attempt(connection, seq, task, at=at, error=failure.message)
            return complete(connection, record, attempt=attempt)

        return await self._write(verb)

    async def record_finished(self, seq: int, task: Task, *, at: float) -> Row:
        """The task succeeded: its cost is spent, its outputs are to be saved."""

        def verb(connection: sqlite3.Connection) -> Row:
            record = changes.move(connection, seq, Event.FINISHED, lease=self.lease, attempts=1)
            attempt = changes.close_attempt(connection, seq, task, at=at)
            outputs = tuple(
                Output(number, output.url, output.name, output.content_type, output.size_bytes)
                for number, output in enumerate(output for output in task.outputs if output.url)
            )
            connection.executemany(
                "INSERT INTO outputs (row, generation, number, state, url, name, content_type, "
                "declared_bytes) SELECT seq, generation, ?, 'pending', ?, ?, ?, ? FROM rows WHERE seq = ?",
                [
                    (output.index, output.url, output.name, output.content_type, output.declared_bytes, seq)
                    for output in outputs
                ],
            )
            return complete(connection, record, attempt=attempt, outputs=outputs)

        return await self._write(verb)

    # --- saving --------------------------------------------------------------------------------------

    async def refresh_outputs(self, seq: int, outputs: Sequence[RemoteOutput]) -> Row:
        """New addresses for the outputs that are not saved yet, matched by their place."""

        def verb(connection: sqlite3.Connection) -> Row:
            changes.check_lease(connection, seq, self.lease)
            generation = load_row(connection, seq).generation
            fresh = [output.url for output in outputs if output.url]
            connection.executemany(
                "UPDATE outputs SET url = ? WHERE row = ? AND generation = ? AND number = ? "
                "AND state = 'pending'",
                [(url, seq, generation, number) for number, url in enumerate(fresh)],
            )
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_output(self, seq: int, output: Output, *, held: bool = False, warning: str = "") -> Row:
        """An image is whole on disk; `held`: under a partial name until all of the row's images are."""

        def verb(connection: sqlite3.Connection) -> Row:
            changes.check_lease(connection, seq, self.lease)
            changes.save_output(connection, seq, output, held=held, warning=warning)
            return load_row(connection, seq)

        return await self._write(verb)

    async def record_saved(
        self,
        seq: int,
        *,
        last: Output | None = None,
        warning: str = "",
        superseded: Mapping[str, str] | None = None,
    ) -> Row:
        """Every image of the row is under its final name: the row is done.

        `last` is the image that was still to be recorded, with its warning. `superseded` maps the old paths
        of images moved aside to their new ones.
        """

        def verb(connection: sqlite3.Connection) -> Row:
            record = changes.move(connection, seq, Event.SAVED, lease=self.lease)
            if last is not None:
                changes.save_output(connection, seq, last, warning=warning)
            if superseded:
                connection.executemany(
                    "UPDATE outputs SET state = 'superseded', path = ? WHERE row = ? AND path = ? "
                    "AND generation < (SELECT generation FROM rows WHERE seq = ?)",
                    [(new, seq, old, seq) for old, new in superseded.items()],
                )
            # addresses expire; a million of them are not worth keeping
            saved = connection.execute(
                "UPDATE outputs SET state = 'saved', url = NULL, name = '' WHERE row = ? "
                f"AND generation = (SELECT generation FROM rows WHERE seq = ?) RETURNING {OUTPUT_COLUMNS}",
                (seq, seq),
            ).fetchall()
            outputs = tuple(sorted(map(read_output, saved), key=lambda output: output.index))
            row = complete(connection, record, outputs=outputs)
            if row.present:
                size_bytes = sum(output.size_bytes or 0 for output in row.outputs)
                changes.count_images(connection, len(row.outputs), size_bytes)
            return row

        return await self._write(verb)

    async def record_lost(self, seq: int, failure: Failure) -> Row:
        """The row's images cannot be had: it fails; what is saved stays, and nothing is bought again."""
        return await self._move(seq, Event.GAVE_UP, failure)

    async def _move(self, seq: int, event: Event, failure: Failure) -> Row:
        def verb(connection: sqlite3.Connection) -> Row:
            changes.move(connection, seq, event, lease=self.lease, failure=failure)
            return load_row(connection, seq)

        return await self._write(verb)

    async def older_outputs(self, seq: int) -> list[tuple[int, Output]]:
        """The saved images of the row's earlier generations, with the generation, to be moved aside."""
        return await self._read(lambda connection: reading.older_outputs(connection, seq))

    async def row(self, seq: int) -> Row:
        """The row as it stands."""
        return await self._read(lambda connection: load_row(connection, seq))

    # --- asking again ------------------------------------------------------------------------------

    async def requeue(
        self, *, states: Collection[State], ids: Collection[str] = (), regenerate_lost: bool = False
    ) -> Requeued:
        """Put failed and cancelled rows back on their way by the user's word; `ids` narrows it to those ids.

        Rows whose images were paid for are fetched again, not bought.
        """

        def verb(connection: sqlite3.Connection) -> Requeued:
            changes.check_alive(connection, self.lease)
            done = {"submit": 0, "save": 0, "leave": 0}
            for seq, state, failure in reading.requeue_candidates(connection, states, ids):
                step = requeue_step(state, failure, regenerate_lost=regenerate_lost)
                done[step] += 1
                if step == "leave":
                    continue
                changes.unsettle(connection, [seq])
                connection.execute("UPDATE rows SET lease = ? WHERE seq = ?", (self.lease, seq))
                event = Event.RESUMED if step == "save" else Event.REQUEUED
                changes.move(connection, seq, event, lease=self.lease)
                if step == "submit":
                    changes.begin_anew(connection, seq)
                connection.execute("UPDATE rows SET lease = NULL WHERE seq = ?", (seq,))
            return Requeued(done["submit"], done["save"], done["leave"])

        return await self._write(verb)

    async def give_up_doubt(self, seq: int) -> Row:
        """Submit a doubtful row anew, by the user's word."""

        def verb(connection: sqlite3.Connection) -> Row:
            changes.move(connection, seq, Event.REQUEUED, lease=self.lease)
            changes.free_reservation(connection, seq)
            connection.execute(
                "UPDATE attempts SET open = 0, error = 'given up by the user' WHERE row = ? AND open = 1",
                (seq,),
            )
            changes.begin_anew(connection, seq)
            return load_row(connection, seq)

        return await self._write(verb)

    # --- after a repair (see rebuilding.py) -----------------------------------------------------------

    async def is_unread(self) -> bool:
        """Whether the state was rebuilt and its manifest has not been read since."""
        return bool((await self._read(rebuilding.facts)).get("merge"))

    async def count_tasks(self) -> int:
        """How many tasks this run knows."""
        query = "SELECT count(*) FROM attempts WHERE task_id IS NOT NULL"
        return int(await self._read(lambda connection: read_value(connection, query)))

    async def wanted(self) -> rebuilding.Wanted | None:
        """What is to be searched for in the service's list; None: nothing."""
        return await self._read(rebuilding.wanted)

    async def wanted_rows(self, *, is_first: bool, after_seq: int, limit: int) -> list[Row]:
        """The rows to be searched for, by number."""
        return await self._read(
            lambda connection: rebuilding.wanted_rows(
                connection, is_first=is_first, after_seq=after_seq, limit=limit
            )
        )

    async def addresses_until(self, until: float) -> dict[str, str]:
        """Addresses of images uploaded until then (UTC unix seconds), by SHA-256."""
        return await self._read(lambda connection: rebuilding.addresses_until(connection, until))

    async def settle_search(self, settlements: Sequence[rebuilding.Settlement], *, at: float) -> None:
        """Record what the search found of some rows."""
        await self._write(
            lambda connection: rebuilding.settle(connection, settlements, lease=self.lease, at=at)
        )

    async def give_up_search(self, seqs: Collection[int]) -> None:
        """Submit rows anew that the search could not settle, by the user's word."""
        await self._write(lambda connection: rebuilding.give_up(connection, seqs, lease=self.lease))

    async def end_first_search(self) -> None:
        """The first search came to its end: failed rows and known tasks stand as they are."""
        await self._write(rebuilding.searched)

    # --- uploads, tools, tasks ------------------------------------------------------------------------

    async def upload_url(self, sha256: str) -> str | None:
        """The address of an uploaded image, by its content; None when it was not uploaded yet."""
        query = "SELECT url FROM uploads WHERE sha256 = ?"
        return await self._read(lambda connection: read_value(connection, query, (sha256,)))

    async def record_upload(self, sha256: str, url: str, *, at: float) -> None:
        """An image was uploaded."""
        await self._write(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO uploads (sha256, url, uploaded_at) VALUES (?, ?, ?)",
                (sha256, url, at),
            )
        )

    async def tool(self, number: int) -> str:
        """The tool description (JSON text) that requests were bound to; KeyError when unknown."""
        query = "SELECT description FROM tools WHERE id = ?"
        description = await self._read(lambda connection: read_value(connection, query, (number,)))
        if description is None:
            raise KeyError(number)
        return str(description)

    async def tool_numbers(self) -> list[int]:
        """The numbers of all tool descriptions of this run."""
        return await self._read(
            lambda connection: [
                record[0] for record in connection.execute("SELECT id FROM tools ORDER BY id")
            ]
        )

    async def known_task(self) -> str | None:
        """The id of a task of this run, the newest where ids are equally long; None when none is known."""
        query = "SELECT max(task_id) FROM attempts"
        found: str | None = await self._read(lambda connection: read_value(connection, query))
        return found

    async def row_of_task(self, task_id: str) -> Row | None:
        """The row that asked for a task, None when it has asked for something else since, or is not known."""
        query = (
            "SELECT rows.seq FROM attempts JOIN rows ON rows.seq = attempts.row "
            "WHERE task_id = ? AND attempts.generation = rows.generation"
        )

        def verb(connection: sqlite3.Connection) -> Row | None:
            seq = read_value(connection, query, (task_id,))
            return None if seq is None else load_row(connection, seq)

        return await self._read(verb)

    async def known_tasks(self, task_ids: Collection[str]) -> dict[str, int | None]:
        """Which of these task ids belong to rows of this run, and the number of each one's tool description.

        None for the tool of a task whose row was asked for anew since.
        """
        return await self._read(lambda connection: reading.known_tasks(connection, task_ids))

    # --- what is told ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """Rows of the present manifest by state, and what they brought."""
        return await self._read(read_counts)

    async def of_saved(self, question: Callable[[Iterator[reading.Place]], tuple[T, Mapping[int, str]]]) -> T:
        """What `question` makes of the folders with images of done rows; it also tells marks to be kept."""
        told, marks = await self._read(lambda connection: question(reading.read_places(connection)))
        if marks:
            await self._write(
                lambda connection: connection.executemany(
                    "INSERT OR REPLACE INTO whole (place, mark) VALUES (?, ?)", list(marks.items())
                )
            )
        return told

    async def failures(self, *, limit: int = 20) -> list[tuple[State, Failure, int, int]]:
        """Groups of rows that did not make it: state, a sample failure, how many, the first line."""
        return await self._read(lambda connection: read_failures(connection, limit))

    async def listing_mark(self) -> dict[str, Any]:
        """The watermark of the sidecar files: {} when they are to be built anew."""
        return await self._read(lambda connection: reading.read_json(connection, "listed"))

    async def set_listing_mark(self, mark: Mapping[str, Any], *, instead_of: Mapping[str, Any]) -> bool:
        """The sidecar files hold every row settled up to this mark.

        False, and no change, when the mark is not `instead_of` any more: something they tell is not true now,
        and they are to be built anew.
        """
        texts = dumps(dict(mark)), dumps(dict(instead_of))

        def verb(connection: sqlite3.Connection) -> bool:
            return bool(connection.execute("UPDATE run SET listed = ? WHERE listed = ?", texts).rowcount)

        return await self._write(verb)

    async def failed_prints(self) -> list[str]:
        """SHA-256 (hex) of failed.csv or failed.jsonl as written last; before it the one that it replaced."""
        return list(json.loads(await self._of_run("failed_prints") or "[]"))

    async def note_failed_prints(self, prints: Sequence[str]) -> None:
        """The file of the rows that did not make it is, or is about to become, one of these."""
        await self._write(
            lambda connection: connection.execute("UPDATE run SET failed_prints = ?", (dumps(list(prints)),))
        )

    async def settled_after(self, settled: int, *, limit: int) -> list[Settled]:
        """Rows settled after that number, in order of settling."""
        return await self._read(lambda connection: read_settled(connection, settled, limit=limit))

    async def rejected_rows(self, *, after_seq: int, limit: int) -> list[Rejected]:
        """Rows of the present manifest that did not make it, as it had them, by row number.

        Those that were paid for are left out: to run them from a file would buy them again.
        """
        return await self._read(
            lambda connection: reading.read_rejected(connection, after_seq=after_seq, limit=limit)
        )
