"""The state file opened with our settings, its transactions, and SQLite's errors as ours.

Concurrent verbs share a commit: whoever gets the turn commits everything that waits (group commit), so that
an acknowledged change has survived power loss (WAL, synchronous=FULL) at a fraction of the price of a commit
each. A verb is whole or absent, and a verb that fails takes no other with it.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

from batchrun.errors import DiskError, StoreDamaged, StoreError

T = TypeVar("T")

STATE_FILE = "state.sqlite3"
#: Another process (`status`, `cancel`) holds the file for milliseconds.
_BUSY_S = 10.0


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with our settings; raises StoreError or DiskError when the file cannot be used."""
    connection = None
    try:
        if read_only:
            address = f"{path.resolve().as_uri()}?mode=ro{_as_it_stands(path)}"
            connection = sqlite3.connect(address, uri=True, timeout=_BUSY_S, isolation_level=None)
        else:
            connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            # an acknowledged task id that a power cut takes back is lost money
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise store_error(error, path) from error
    return connection


def _as_it_stands(path: Path) -> str:
    """What makes a state readable that lies on a medium (or in a folder) where nothing can be written.

    SQLite would want to make the file that readers and writers share; without a log there is no writer.
    """
    may_write = os.access(path.parent, os.W_OK)
    return "" if may_write or path.with_name(f"{path.name}-wal").exists() else "&immutable=1"


def store_error(error: sqlite3.Error, path: Path) -> StoreError | DiskError:
    """Our error for one of SQLite's; the text says what to do."""
    text = str(error)
    if "full" in text or "readonly" in text or "unable to open" in text or "disk I/O" in text:
        return DiskError(f"the state cannot be written: {path}: {text}; free or mend the disk and run again")
    if "not a database" in text or "malformed" in text or "decode to UTF-8" in text:
        return damaged(path, text)
    return StoreError(f"the state cannot be used: {path}: {text}")


def damaged(path: Path, what: str) -> StoreDamaged:
    """The error for a state file that cannot be trusted; its text says what to do."""
    return StoreDamaged(
        f"{path} is damaged ({what}); images already saved are safe. To rebuild it from what is left, which "
        f"buys nothing: batchrun repair {shlex.quote(str(path.parent))}"
    )


@dataclass(slots=True, eq=False)
class _Pending(Generic[T]):
    """A verb that waits to be committed, and what came of it."""

    verb: Callable[[sqlite3.Connection], T]
    settled: bool = False
    result: T | None = None
    error: Exception | None = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class _Batch:
    """Verbs that are committed together: the task of the first one does it, the others wait."""

    def __init__(self) -> None:
        self.items: list[_Pending[Any]] = []
        #: Set when all are settled, or must see to it themselves.
        self.over = anyio.Event()


class Transactions:
    """One connection shared by many tasks; at any moment one thread uses it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self._path = path
        self._turn = anyio.Lock(fast_acquire=True)
        self._thread = anyio.CapacityLimiter(1)  # of its own: no commit waits behind files
        #: Where verbs gather while others are committed.
        self._next = _Batch()
        # A task cancelled from outside anyio leaves its thread behind: the next one waits for it here.
        self._exclusive = threading.Lock()

    async def write(self, verb: Callable[[sqlite3.Connection], T]) -> T:
        """Run `verb` in a transaction, perhaps with others; durable once this returns.

        Raises what the verb raised (it then changed nothing), StoreError or DiskError. When cancelled, the
        verb is whole or absent.
        """
        item, batch = _Pending(verb), self._next
        batch.items.append(item)
        try:
            if batch.items[0] is not item:
                await batch.over.wait()
            while not item.settled:
                await self._settle(batch, item)
        except BaseException:
            if batch is self._next:
                batch.items.remove(item)
            raise
        return item.outcome()

    async def _settle(self, batch: _Batch, item: _Pending[Any]) -> None:
        """Commit the batch of which `item` is, unless somebody else has."""
        try:
            async with self._turn:
                if batch is self._next:
                    self._next = _Batch()
                if not item.settled:
                    with anyio.CancelScope(shield=True):  # others' verbs are in it
                        await anyio.to_thread.run_sync(self._commit_all, batch.items, limiter=self._thread)
        finally:
            batch.over.set()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` alone and outside of any transaction of ours: a query, or a long change of its own."""
        async with self._turn:
            return await anyio.to_thread.run_sync(self._alone, work, limiter=self._thread)

    def close(self) -> None:
        """Close the file, once nobody uses it."""
        with self._exclusive:
            self.connection.close()

    def _alone(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._exclusive:
            try:
                return work(self.connection)
            except sqlite3.Error as error:
                raise store_error(error, self._path) from error

    def _commit_all(self, items: list[_Pending[Any]]) -> None:
        with self._exclusive:
            batch = [item for item in items if not item.settled]
            try:
                self._commit(batch)
            except Exception as error:
                for item in batch:
                    item.error = self._ours(error)
                self._roll_back()
            finally:
                for item in batch:
                    item.settled = True

    def _commit(self, batch: list[_Pending[Any]]) -> None:
        """Run and commit verbs together; where one fails, each by itself, so that it takes no other with it.

        A savepoint around every verb would cost as much as some verbs do, and failures are rare.
        """
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            for item in batch:
                item.result = item.verb(self.connection)
        except sqlite3.OperationalError:
            raise  # the database itself, not this verb
        except Exception:
            self._roll_back()
            self._commit_apart(batch)
        else:
            self.connection.execute("COMMIT")

    def _commit_apart(self, batch: list[_Pending[Any]]) -> None:
        connection = self.connection
        connection.execute("BEGIN IMMEDIATE")
        for item in batch:
            connection.execute("SAVEPOINT verb")
            try:
                item.result = item.verb(connection)
            except sqlite3.OperationalError:
                raise
            except Exception as error:
                connection.execute("ROLLBACK TO verb")
                item.error = self._ours(error)
            connection.execute("RELEASE verb")
        connection.execute("COMMIT")

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):  # the connection may be closed
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def _ours(self, error: Exception) -> Exception:
        return store_error(error, self._path) if isinstance(error, sqlite3.Error) else error
