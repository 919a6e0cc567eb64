"""Orders to a live runner from another process, and what may be asked of a run without its lock."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from batchrun.errors import StoreError
from batchrun.model import Counts, Failure, State
from batchrun.store.connection import connect, store_error
from batchrun.store.reading import UNFINISHED, Place, read_counts, read_failures, read_places
from batchrun.store.rebuilding import facts

T = TypeVar("T")


def order_cancel(state: Path) -> None:
    """Ask the runner that holds the run to stop and to cancel what runs at the service."""
    connection = connect(state)
    try:
        connection.execute("UPDATE run SET stop_order = 'cancel'")
    except sqlite3.Error as error:
        raise StoreError(f"the order cannot be left in {state}: {error}") from error
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands, read at one moment."""

    #: The manifest's path, or "-"; None while the first start is still reading it.
    manifest: str | None
    #: The settings as last told, as JSON.
    job: str | None
    counts: Counts
    failures: tuple[tuple[State, Failure, int, int], ...]
    #: Tasks that run at the service, as far as is known; of rows no longer in the manifest, too.
    active: int
    #: A process began to work on the run and has not said that it ended: it lives or was killed.
    is_open: bool
    #: The length that each sidecar file ought to have, in bytes; None: they are to be written anew.
    listed_bytes: tuple[int, int] | None
    #: Whether rows have settled that the sidecar files do not tell yet.
    is_behind: bool
    #: Rebuilt by a repair, and its manifest was not read since: there may be more rows than are known.
    is_unread: bool = False


def of_saved(state: Path, question: Callable[[Iterator[Place]], T]) -> T:
    """What `question` makes of the folders with images of done rows. Raises StoreError."""
    connection = connect(state, read_only=True)
    try:
        return question(read_places(connection))
    except sqlite3.Error as error:
        raise store_error(error, state) from error
    finally:
        connection.close()


def read_standing(state: Path) -> Standing:
    """Where a run stands, without its lock. Raises StoreError when the state cannot be read."""
    connection = connect(state, read_only=True)
    try:
        connection.execute("BEGIN")  # all of it at one moment
        run = connection.execute("SELECT manifest, job, listed FROM run").fetchone()
        mark: dict[str, Any] = json.loads(run[2]) if run else {}
        behind = connection.execute(
            "SELECT EXISTS (SELECT 1 FROM rows WHERE settled > ? AND present = 1)", (mark.get("settled", 0),)
        ).fetchone()[0]
        active = connection.execute(
            f"SELECT count(*) FROM rows WHERE state IN ('submitting', 'in_flight') AND {UNFINISHED}"
        ).fetchone()[0]
        is_open = connection.execute("SELECT EXISTS (SELECT 1 FROM leases WHERE ended_at IS NULL)").fetchone()
        return Standing(
            manifest=(run[0] or None) if run else None,
            job=(run[1] or None) if run else None,
            counts=read_counts(connection),
            failures=tuple(read_failures(connection, 20)),
            active=active,
            is_open=bool(is_open[0]),
            listed_bytes=(int(mark["metadata"]), int(mark["results"])) if mark else None,
            is_behind=bool(behind),
            is_unread=_is_unread(connection),
        )
    except sqlite3.Error as error:
        raise store_error(error, state) from error
    finally:
        connection.close()


def _is_unread(connection: sqlite3.Connection) -> bool:
    columns = {record[1] for record in connection.execute("PRAGMA table_info(run)")}
    # whoever only looks finds states of earlier forms, too
    return "rebuilt" in columns and bool(facts(connection).get("merge"))
