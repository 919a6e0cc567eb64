"""The folder of a run: what lies where in it, and the lock that keeps a second runner out.

state.sqlite3     the state (mode 0600: task tokens are secrets)
images/           final images and metadata.jsonl
results.jsonl     a line per settled row
failed.csv        or .jsonl: rows that did not make it
partial/          images on their way
pending/          images of a rerun, until all of a row's are there
superseded/       images that a rerun replaced
simulator.jsonl   the tasks of the simulators that answered a rehearsal: what tells it from a real run
run.lock          held while a runner lives; the system releases it when the process dies
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from batchrun.errors import DiskError, FolderBusy, StoreError, UsageError
from batchrun.store.connection import STATE_FILE, connect, damaged


class Folder:
    """A run's folder by its path; nothing is made until `create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / STATE_FILE
        self.images = path / "images"
        self.metadata = self.images / "metadata.jsonl"
        self.results = path / "results.jsonl"
        self.rehearsal = path / "simulator.jsonl"

    @property
    def is_run(self) -> bool:
        """Whether there is a run's state in it."""
        return self.state.is_file()

    @property
    def has_results(self) -> bool:
        """Whether a run has left images or lines in it."""
        if any(path.is_file() and path.stat().st_size for path in (self.results, self.metadata)):
            return True
        places = self.images.glob("[0-9][0-9][0-9]*") if self.images.is_dir() else ()
        return any(path.is_file() for place in places if place.is_dir() for path in place.iterdir())

    @property
    def is_rehearsal(self) -> bool:
        """Whether its pictures and costs are made up: a simulator answered, started for the occasion."""
        return self.rehearsal.is_file()

    def expect_kind(self, *, rehearsal: bool) -> None:
        """Raises UsageError where a rehearsal's folder is to be used for a real run, or the other way round.

        Neither may pass for the other: a rehearsal's tasks are known to no one but its own simulator.
        """
        if rehearsal and self.is_run and not self.is_rehearsal:
            raise UsageError(
                f"{self.path} holds a run that is no rehearsal: leave out --simulate, or choose another "
                "folder with --out"
            )
        if not rehearsal and self.is_rehearsal:
            raise UsageError(
                f"{self.path} holds a rehearsal: go on with --simulate (from Python: simulate=True), or "
                "choose another folder with --out"
            )

    def create(self) -> None:
        """Make the folder, durably. Raises DiskError; UsageError when something else is in its place."""
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            if not self.is_run:
                _sync_names_of(self.images)
        except FileExistsError as error:
            raise UsageError(f"{self.path} is a file; choose another folder with --out") from error
        except OSError as error:
            raise DiskError(
                f"{self.path} cannot be made: {error.strerror}; choose another folder with --out"
            ) from error

    def expect_run(self) -> None:
        """Raises UsageError when the folder holds no run, StoreDamaged when it has lost its state."""
        if not self.is_run:
            if self.has_results:
                raise damaged(self.state, "it is missing")
            raise UsageError(
                f"{self.path} holds no run; name the folder that a run was told with --out (see runs/)"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises FolderBusy naming the runner that holds it."""
        lock = FileLock(self.path / "run.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise FolderBusy(f"{self.path} is in use{self._holder()}; wait for it or stop it first") from None
        except OSError as error:
            raise DiskError(f"{self.path} cannot be locked: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def _holder(self) -> str:
        try:
            connection = connect(self.state, read_only=True)
            try:
                record = connection.execute(
                    "SELECT host, pid, started_at FROM leases WHERE ended_at IS NULL ORDER BY id DESC LIMIT 1"
                ).fetchone()
            finally:
                connection.close()
        except (sqlite3.Error, StoreError, DiskError):
            record = None  # the message without it is better than none
        if record is None:
            return ""
        since = datetime.fromtimestamp(record[2], tz=UTC).astimezone().strftime("%H:%M on %d %b")
        return f" by process {record[1]} on {record[0]}, since {since}"


def _sync_names_of(folder: Path) -> None:
    """See to it that a power cut cannot take the folder away, with all that will be known in it.

    Every folder above is synced, not only new ones: one may have been made by a process that was killed then.
    """
    if os.name == "nt":  # gives no handle to sync a folder with
        return
    for place in folder.absolute().parents:
        with suppress(OSError):  # not ours to read, or its file system has no such sync: nothing can be done
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
