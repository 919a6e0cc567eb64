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
from collections import deque
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
    #: It is to commit for all who wait.
    leads: bool = False
    #: Its task sleeps on this while another one commits: until it is settled, or is to commit itself.
    woken: anyio.Event | None = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class Transactions:
    """One connection shared by many tasks; at any moment one thread uses it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self._path = path
        self._turn = anyio.Lock()
        self._thread = anyio.CapacityLimiter(1)  # of its own: no commit waits behind files
        #: Threads take from it while the event loop adds: a deque's ends may be used by both.
        self._waiting: deque[_Pending[Any]] = deque()
        #: Whether one of the tasks commits for all, and those that sleep meanwhile.
        self._is_led = False
        self._asleep: list[_Pending[Any]] = []
        # A task cancelled from outside anyio leaves its thread behind: the next one waits for it here.
        self._exclusive = threading.Lock()

    async def write(self, verb: Callable[[sqlite3.Connection], T]) -> T:
        """Run `verb` in a transaction, perhaps with others; durable once this returns.

        Raises what the verb raised (it then changed nothing), StoreError or DiskError. When cancelled, the
        verb is whole or absent.
        """
        item = _Pending(verb)
        self._waiting.append(item)
        try:
            if self._is_led:
                await self._sleep(item)
            if item.leads or not item.settled:
                await self._lead(item)
        except BaseException:
            with suppress(ValueError):  # a thread has taken it up already
                self._waiting.remove(item)
            raise
        return item.outcome()

    async def _sleep(self, item: _Pending[Any]) -> None:
        """Wait until `item` is settled, or is to lead."""
        item.woken = anyio.Event()
        self._asleep.append(item)
        try:
            await item.woken.wait()
        except BaseException:
            if item.leads:
                self._wake()
            elif item in self._asleep:
                self._asleep.remove(item)
            raise

    async def _lead(self, item: _Pending[Any]) -> None:
        """Commit for all who wait, until `item` is settled."""
        self._is_led = True
        try:
            while not item.settled:
                async with self._turn:
                    with anyio.CancelScope(shield=True):  # others' verbs are in it
                        await anyio.to_thread.run_sync(self._commit_waiting, limiter=self._thread)
        finally:
            self._wake()

    def _wake(self) -> None:
        """Wake those who are settled, and one of the others to lead on."""
        self._is_led = False
        asleep, self._asleep = self._asleep, []
        for item in asleep:
            if self._is_led and not item.settled:
                self._asleep.append(item)
                continue
            if not item.settled:
                self._is_led = item.leads = True
            if item.woken is not None:
                item.woken.set()

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

    def _commit_waiting(self) -> None:
        with self._exclusive:
            batch = []
            while self._waiting:
                batch.append(self._waiting.popleft())
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
