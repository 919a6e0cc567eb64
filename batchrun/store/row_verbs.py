"""The verbs of a row's way: it is submitted, its tasks end, its images are saved, it is asked for again."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from batchrun.model import Accepted, Failure, Output, RemoteOutput, Row, State, Task
from batchrun.rules.policy import requeue_step
from batchrun.rules.states import Event
from batchrun.store import changes, reading
from batchrun.store.records import (
    ATTEMPT_COLUMNS,
    OUTPUT_COLUMNS,
    complete,
    load_row,
    read_output,
)
from batchrun.store.verbs import Verbs


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


class RowVerbs(Verbs):
    """What becomes of rows; each verb takes and returns them as they then are."""

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
