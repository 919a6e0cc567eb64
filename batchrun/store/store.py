"""What is known of a run, in one SQLite file: one method per domain verb, each one transaction.

A verb is whole or absent and durable once it returns (see connection.py). Every change to a row names the
lease that claimed it: a process that lost its lease changes nothing. Verbs take and return model records;
what they are made of is in changes.py, what is asked in reading.py. Those of a row's way are in row_verbs.py,
those of the run's record in run_verbs.py.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

from batchrun.errors import DiskError, StoreError
from batchrun.model import Row, State
from batchrun.rules.budget import Budget
from batchrun.store import changes, reading, rebuilding
from batchrun.store.connection import connect, store_error
from batchrun.store.migrations import migrate
from batchrun.store.reading import read_value
from batchrun.store.records import ROW_COLUMNS, complete_all
from batchrun.store.row_verbs import RowVerbs
from batchrun.store.run_verbs import RunVerbs


class Store(RowVerbs, RunVerbs):
    """The state of one run; see Verbs."""

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
