"""Bringing a read manifest into the state: rows are staged while it is read, and merged once it is right.

Nothing of that is kept in memory, so that memory does not grow with the manifest. Where no row is known yet
(the first reading of most runs) rows go straight to their place (first_reading.py); else they are staged and
held against the known ones (matching.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass

from batchrun.rules.naming import stem, stem_with_hash
from batchrun.store.first_reading import FirstReading, is_first
from batchrun.store.matching import Changes, Matching
from batchrun.store.migrations import migrate
from batchrun.store.reading import read_value
from batchrun.store.records import cells_given, dumps
from batchrun.store.staged import Staged, StagedBlock

#: Staged rows are written in groups of this many, or of so many characters: a row may have megabytes.
GROUP = 2000
GROUP_CHARS = 4_000_000


@dataclass(frozen=True, slots=True)
class Merged:
    """What a reading of the manifest changed, in rows."""

    rows: int
    images: int
    new: int
    #: Not yet bought rows that now ask for something else, or failed ones that were corrected.
    replaced: int
    #: Bought rows that now ask for something else and were left alone.
    changed: int
    #: Bought rows that will be bought anew, by the user's word.
    rerun: int
    #: Rows no longer in the manifest.
    gone: int
    invalid: int
    #: Rows that ask for the same picture as another one.
    identical: int
    #: Rows and images still to be bought, by the tool's run path.
    by_tool: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class DuplicateId:
    """The same id on two lines."""

    id: str
    line: int
    first_line: int


class Planning:
    """One reading of the manifest on its way into the state.

    Not awaited: it runs in the database's thread.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._run = connection.execute
        self._group: list[Staged] = []
        self._group_chars = 0
        self._tools: dict[str, int] = {}
        #: Rows and images by tool's number; None: invalid rows.
        self._rows: Counter[int | None] = Counter()
        self._images: Counter[int | None] = Counter()
        self._identical: int | None = None
        self._is_begun = False
        #: The manifest's, as merged.
        self._columns: list[str] | None = None
        self._into = FirstReading(connection) if is_first(connection) else Matching(connection)
        connection.create_function("row_stem", 3, stem, deterministic=True)
        connection.create_function("hashed_stem", 1, stem_with_hash, deterministic=True)
        connection.create_function("cells_given", 2, self._cells_given)

    def _cells_given(self, id: str | None, given: str) -> str:
        return dumps(cells_given(id, json.loads(given), self._columns))

    @classmethod
    @contextmanager
    def scratch(cls) -> Iterator[Planning]:
        """A planning that nothing is kept of."""
        # a name of "" is a database of its own in a temporary file: a manifest need not fit into memory
        with closing(sqlite3.connect("", isolation_level=None)) as connection:
            migrate(connection)
            yield cls(connection)

    def tool(self, description: str) -> int:
        """The number of a tool description (JSON text) in this run's record."""
        if description not in self._tools:
            self._run("INSERT OR IGNORE INTO tools (description) VALUES (?)", (description,))
            query = "SELECT id FROM tools WHERE description = ?"
            self._tools[description] = read_value(self.connection, query, (description,))
        return self._tools[description]

    def stage(self, row: Staged) -> None:
        """Add a request, in manifest order."""
        self._group.append(row)
        self._group_chars += len(row.given) + len(row.extra) + len(row.cells or "")
        if len(self._group) >= GROUP or self._group_chars >= GROUP_CHARS:
            self._flush()

    def stage_block(self, block: StagedBlock) -> None:
        """Add requests, in manifest order."""
        if self._group:
            self._flush()
        self._begin()
        self._into.add_block(block)
        self._rows[block.tool] += len(block.lines)
        self._images[block.tool] += sum(block.images)

    def _flush(self) -> None:
        group, self._group, self._group_chars = self._group, [], 0
        self._begin()
        self._into.add(group)
        for row in group:
            self._rows[row.tool] += 1
            self._images[row.tool] += row.images

    def _begin(self) -> None:
        if not self._is_begun:
            self._is_begun = True
            self._into.begin()

    def _read_all(self) -> None:
        """Everything staged is in its table, and counted."""
        if self._group or not self._is_begun:
            self._flush()

    def duplicates(self) -> Iterator[DuplicateId]:
        """Ids that stand on more than one line, each later line once."""
        _, _, identical = self.summary()
        try:
            self._into.make_keys_unique(may_repeat=bool(identical or self._rows[None]))
        except sqlite3.IntegrityError:
            table, number = self._into.table
            records = self._run(
                "SELECT id, line, first FROM (SELECT id, line, row_number() OVER same AS number, "
                f"first_value(line) OVER same AS first FROM {table} WHERE id IS NOT NULL "
                f"WINDOW same AS (PARTITION BY id ORDER BY {number})) WHERE number > 1 ORDER BY line"
            )
            return (DuplicateId(*record) for record in records)
        return iter(())

    def summary(self) -> tuple[int, int, int]:
        """Requests, expected images, and how many requests that can be made repeat another."""
        self._read_all()
        if self._identical is None:
            valid = "WHERE message IS NULL" if self._rows[None] else ""
            query = f"SELECT count(*) FROM (SELECT 1 FROM {self._into.table[0]} {valid} GROUP BY content)"
            different = read_value(self.connection, query)
            self._identical = self._rows.total() - self._rows[None] - different
        return self._rows.total(), self._images.total(), self._identical

    def merge(
        self, *, manifest: str, job: str, at: float, stamp: str, form: str, rerun_changed: bool
    ) -> Merged:
        """Make the staged rows the run's rows, and the job its job, in one transaction.

        The stamp is kept only when nothing is left to be told at the next start.
        """
        rows, images, identical = self.summary()
        invalid = self._rows[None]
        self._columns = json.loads(form).get("columns")
        try:
            for twice in self.duplicates():
                raise sqlite3.IntegrityError(f"the id {twice.id} is there twice")
            if not self.connection.in_transaction:
                self._run("BEGIN IMMEDIATE")
            self._run(
                "INSERT OR IGNORE INTO run (id, manifest, created_at, job) VALUES (1, ?, ?, ?)",
                (manifest, at, job),
            )
            if isinstance(self._into, FirstReading):
                self._into.take(invalid=invalid)
                changes = Changes(new=rows)
                by_tool = self._staged_by_tool()
            else:
                changes = self._into.take(rerun_changed=rerun_changed)
                rows, images, invalid = self._run(
                    "SELECT count(*), coalesce(sum(images), 0), coalesce(sum(state = 'invalid'), 0) "
                    "FROM main.rows WHERE present = 1"
                ).fetchone()
                by_tool = self._planned_by_tool()
            self._run(
                "UPDATE run SET manifest = ?, job = ?, stamp = ?, form = ?",
                (manifest, job, "" if changes.changed else stamp, form),
            )
            self._run("COMMIT")
        finally:
            self.abandon()
        return Merged(
            rows=rows,
            images=images,
            **asdict(changes),
            invalid=invalid,
            identical=identical,
            by_tool=by_tool,
        )

    def abandon(self) -> None:
        """Forget what was staged and not merged."""
        if self.connection.in_transaction:
            self._run("ROLLBACK")
        self._run("DROP TABLE IF EXISTS temp.staged")
        self._run("PRAGMA foreign_keys = ON")
        self._run("PRAGMA ignore_check_constraints = OFF")
        self._is_begun = False

    def _staged_by_tool(self) -> dict[str, tuple[int, int]]:
        by_tool: dict[str, tuple[int, int]] = {}
        for number, rows in self._rows.items():
            if number is not None:
                query = "SELECT json_extract(description, '$.run_path') FROM tools WHERE id = ?"
                run_path = read_value(self.connection, query, (number,))
                before = by_tool.get(run_path, (0, 0))
                by_tool[run_path] = before[0] + rows, before[1] + self._images[number]
        return by_tool

    def _planned_by_tool(self) -> dict[str, tuple[int, int]]:
        records = self._run(
            "SELECT json_extract(description, '$.run_path'), sum(many), sum(images) FROM tools JOIN "
            "(SELECT tool, count(*) AS many, sum(images) AS images FROM main.rows "
            "WHERE present = 1 AND state = 'planned' GROUP BY tool) ON tool = id GROUP BY 1"
        )
        return {run_path: (rows, images) for run_path, rows, images in records}


def form_json(*, format: str, delimiter: str | None, columns: Sequence[str] | None, bom: bool = False) -> str:
    """The manifest's form as the run's record keeps it."""
    form = {"format": format, "delimiter": delimiter, "columns": columns}
    return dumps({**form, "bom": True} if bom else form)
