"""Reading what can still be read of a damaged state file, record by record.

It is read from a copy, so that the file stays as it was found. A table is read in ranges of its first key; a
range that cannot be read is halved until only single keys are lost. A file without a readable beginning gets
that of a new state, whose tables lie on the same pages. What is read may still be wrong (a flipped bit is no
error to SQLite), so a record must make sense, and a task id must stand in its index as well.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchrun.store.connection import connect
from batchrun.store.migrations import migrate

Record = dict[str, Any]

#: Keys asked for at once.
RANGE = 512
#: In the record of an attempt: whether its task is known for certain.
IS_SURE = "is sure"
#: So many keys in a row that cannot be read end a table.
MAX_LOST = 20_000
_ERRORS = (sqlite3.Error, UnicodeDecodeError, OverflowError)


@dataclass(slots=True)
class Remains:
    """A row with what belongs to it, as records by column."""

    row: Record
    attempts: list[Record] = field(default_factory=list)
    outputs: list[Record] = field(default_factory=list)
    cells: str | None = None


class Wreck:
    """A damaged state file, read from a copy of it in `scratch` (a folder that this makes and empties)."""

    def __init__(self, state: Path, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        copy = scratch / state.name
        for end in ("", "-wal"):
            source = state.with_name(state.name + end)
            if source.is_file():
                with suppress(OSError):  # a bad disk may refuse even that
                    _copy(source, copy.with_name(copy.name + end))
        self._scratch = scratch
        self._connection = _opened(copy)
        #: Keys that could not be read.
        self.lost = 0

    def close(self) -> None:
        """Remove the copy."""
        if self._connection is not None:
            self._connection.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def run(self) -> Record:
        """The run's record; {} when it is lost."""
        return next(iter(self._ask("SELECT * FROM run")), {})

    def times(self) -> list[float]:
        """When things were done at first, as far as it is told: in UTC unix seconds."""
        queries = (
            "SELECT min(started_at) AS at FROM leases",
            "SELECT min(intent_at) AS at FROM attempts",
            "SELECT created_at AS at FROM run",
        )
        found = [record["at"] for query in queries for record in self._ask(query)]
        return [at for at in found if isinstance(at, float) and at > 0]

    def tools(self) -> dict[int, str]:
        """Tool descriptions by number."""
        return {
            record["id"]: record["description"]
            for record in self._table("tools", "id", 10_000)
            if isinstance(record.get("description"), str)
        }

    def uploads(self) -> list[tuple[str, str, float]]:
        """Addresses of uploaded images: (sha256, url, uploaded_at)."""
        found = {}
        for order in ("ASC", "DESC"):  # from both ends, as far as it goes
            for record in self._ask(f"SELECT * FROM uploads ORDER BY sha256 {order}"):
                sha256, url, at = (record.get(name) for name in ("sha256", "url", "uploaded_at"))
                if isinstance(sha256, str) and isinstance(url, str) and isinstance(at, float):
                    found[sha256] = (sha256, url, at)
        return list(found.values())

    def rows(self) -> Iterator[Remains]:
        """Every row that can be read, by number."""
        last = self._last_row()
        for record in self._table("rows", "seq", last):
            seq = record["seq"]
            remains = Remains(record)
            remains.attempts = [{**one, IS_SURE: self._is_indexed(one)} for one in self._of(seq, "attempts")]
            remains.outputs = self._of(seq, "outputs")
            for source in self._ask("SELECT cells FROM sources WHERE row = ?", seq):
                remains.cells = source["cells"] if isinstance(source["cells"], str) else None
            yield remains

    def _of(self, seq: int, table: str) -> list[Record]:
        return list(self._ask(f"SELECT * FROM {table} WHERE row = ? ORDER BY generation, number", seq))

    def _is_indexed(self, attempt: Record) -> bool:
        """Whether the index of tasks, which has pages of its own, says the same of an attempt's task."""
        if attempt.get("task_id") is None:
            return True
        found = self._ask(
            "SELECT row, generation, number FROM attempts WHERE task_id = ?", attempt["task_id"]
        )
        return any(all(one[name] == attempt[name] for name in one) for one in found)

    def _last_row(self) -> int:
        """The highest row number that there may be."""
        found = [
            record["last"]
            for table, key in (("rows", "seq"), ("sources", "row"), ("attempts", "row"), ("outputs", "row"))
            for record in self._ask(f"SELECT max({key}) AS last FROM {table}")
            if isinstance(record["last"], int)
        ]
        pages = next(iter(self._ask("PRAGMA page_count")), {"page_count": 0})["page_count"]
        # no row takes fewer than some dozens of bytes
        return min(max(found, default=pages * 50), max(pages, 1) * 200)

    # --- reading -------------------------------------------------------------------------------------

    def _ask(self, query: str, *values: Any) -> list[Record]:
        """What a query gives until it meets damage."""
        found: list[Record] = []
        if self._connection is None:
            return found
        try:
            cursor = self._connection.execute(query, values)
            names = [column[0] for column in cursor.description or ()]
            found.extend(dict(zip(names, record, strict=True)) for record in cursor)
        except _ERRORS:
            pass
        return found

    def _table(self, table: str, key: str, last: int) -> Iterator[Record]:
        """The records of a table whose key is a number, by number."""
        if self._connection is None:
            return
        query = f"SELECT * FROM {table} WHERE {key} BETWEEN ? AND ? ORDER BY {key}"
        lost_in_a_row = 0
        todo = [(first, min(first + RANGE - 1, last)) for first in range(1, last + 1, RANGE)][::-1]
        while todo and lost_in_a_row < MAX_LOST:
            first, end = todo.pop()
            try:
                cursor = self._connection.execute(query, (first, end))
                names = [column[0] for column in cursor.description]
                records = [dict(zip(names, record, strict=True)) for record in cursor]
            except _ERRORS:
                if first == end:
                    self.lost += 1
                    lost_in_a_row += 1
                else:
                    middle = (first + end) // 2
                    todo += [(middle + 1, end), (first, middle)]
                continue
            if records:
                lost_in_a_row = 0
            # the torn end of a page reads as records without a number
            yield from (r for r in records if isinstance(r[key], int) and first <= r[key] <= end)


def _copy(source: Path, target: Path) -> None:
    """Copy a file; pieces that the disk does not give are left as zeros."""
    piece = 64 * 1024
    with source.open("rb", buffering=0) as old, target.open("wb") as new:
        size = old.seek(0, 2)
        for start in range(0, size, piece):
            with suppress(OSError):
                old.seek(start)
                new.seek(start)
                new.write(old.read(min(piece, size - start)))
        new.truncate(size)


def _opened(copy: Path) -> sqlite3.Connection | None:
    """The copy as a database, if need be with the beginning of a new one; None when it cannot be read."""
    if not copy.is_file() or not copy.stat().st_size:
        return None
    connection = _tried(copy)
    if connection is None:
        with suppress(OSError, *_ERRORS):
            _give_beginning(copy)
        connection = _tried(copy)
    return connection


def _tried(copy: Path) -> sqlite3.Connection | None:
    connection = sqlite3.connect(copy, isolation_level=None)
    connection.text_factory = lambda text: text.decode()  # not lenient
    try:
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("SELECT seq, key, state FROM rows LIMIT 0").fetchall()
    except _ERRORS:
        connection.close()
        return None
    return connection


def _give_beginning(copy: Path) -> None:
    """Give the copy the first page of a new state, and far behind its end the pages that describe the tables.

    Not in the place that they have in the new state: in the copy, rows may lie there, or may have lain where
    it was cut off. A page that was cut in two is left out, since its rows would read as others.
    """
    fresh = copy.with_name("fresh.sqlite3")
    with closing(connect(fresh)) as connection:
        migrate(connection)
        roots = {root for (root,) in connection.execute("SELECT rootpage FROM sqlite_schema")}
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        page_bytes = int(connection.execute("PRAGMA page_size").fetchone()[0])
    pages = fresh.read_bytes()
    left = copy.stat().st_size // page_bytes
    with copy.open("rb") as file:
        head = file.read(100)
    told = int.from_bytes(head[28:32]) if head.startswith(b"SQLite format 3\0") else 0
    last = max(2 * left, min(told, 100 * left))
    described = [number for number in range(2, len(pages) // page_bytes + 1) if number not in roots]
    moved = {number: last + at for at, number in enumerate(described, start=1)}
    first = bytearray(pages[:page_bytes])
    first[28:32] = (last + len(moved)).to_bytes(4)  # how many pages there are
    first[32:40] = bytes(8)  # none is free
    for place in _children(first):
        number = int.from_bytes(first[place : place + 4])
        first[place : place + 4] = moved[number].to_bytes(4)
    with copy.open("r+b") as file:
        file.truncate(left * page_bytes)
        file.write(first)
        for number, place in moved.items():
            file.seek((place - 1) * page_bytes)
            file.write(pages[(number - 1) * page_bytes : number * page_bytes])


def _children(first: bytearray) -> Iterator[int]:
    """Where a database's first page names pages below it (format: sqlite.org/fileformat2.html, 1.6)."""
    begin = 100  # of the page's own header, behind the file's
    if first[begin] != 5:  # no inner page: there are none below
        return
    yield begin + 8
    for cell in range(int.from_bytes(first[begin + 3 : begin + 5])):
        at = begin + 12 + 2 * cell
        yield int.from_bytes(first[at : at + 2])
