"""The first reading of a manifest: rows go straight to their place, and the indexes are made at its end.

Nothing is known that they could be matched with. All is one transaction, which ends with the reading.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain, islice, repeat
from typing import Any

from batchrun.model import State
from batchrun.rules.naming import stem
from batchrun.store import rebuilding
from batchrun.store.changes import settle_invalid
from batchrun.store.reading import read_value
from batchrun.store.staged import Staged, StagedBlock

#: Rows of one INSERT: most of what a statement costs is not paid by the row. More were not quicker.
_AT_ONCE = 50
_INTO = "INSERT INTO main.rows (line, id, content, own, tool, given, extra, images, key, name, state) VALUES "
_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'planned')"
_INSERT_ONE = _INTO + _VALUES
_INSERT_MANY = _INTO + ", ".join([_VALUES] * _AT_ONCE)


def is_first(connection: sqlite3.Connection) -> bool:
    """Whether no row is known. A state made by an earlier version has the keys' index in its table."""
    if read_value(connection, "SELECT EXISTS (SELECT 1 FROM main.rows)"):
        return False
    query = "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE name = 'rows_key')"
    return bool(read_value(connection, query)) and not rebuilding.facts(connection).get("merge")


class FirstReading:
    """The rows of a state that had none; `row_stem` and `hashed_stem` are known to its connection."""

    #: Where they are, and the column of their numbers there.
    table = "main.rows", "seq"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._run = connection.execute
        #: Rows placed so far.
        self._placed = 0
        #: What makes the indexes that were dropped, by name.
        self._indexes: dict[str, str] = {}

    def begin(self) -> None:
        """Begin the transaction; rows can be placed."""
        self._placed = 0
        self._run("PRAGMA foreign_keys = OFF")  # the tools' numbers are our own,
        self._run("PRAGMA ignore_check_constraints = ON")  # and so are the states
        self._run("BEGIN IMMEDIATE")
        self._indexes = dict(
            self._run(
                "SELECT name, sql FROM main.sqlite_schema WHERE type = 'index' AND tbl_name = 'rows' "
                "AND sql NOT LIKE '%WHERE % IS NOT NULL'"  # those stay empty, and making one reads every row
            ).fetchall()
        )
        for name in self._indexes:
            self._run(f"DROP INDEX main.{name}")

    def add(self, rows: Sequence[Staged]) -> None:
        """Place rows, in manifest order."""
        if not rows:
            return
        *columns, cells, messages = zip(*rows, strict=True)
        self._place(*columns)
        self._keep((at, text) for at, text in enumerate(cells) if text is not None)
        self._refuse((at, message) for at, message in enumerate(messages) if message is not None)
        self._placed += len(rows)

    def add_block(self, block: StagedBlock) -> None:
        """Place rows, in manifest order."""
        self._place(
            block.lines, block.ids, block.contents, block.own, repeat(block.tool), block.given, repeat("{}"),
            block.images,
        )  # fmt: skip
        self._keep(block.cells.items())
        self._placed += len(block.lines)

    def _place(
        self,
        lines: Sequence[int],
        ids: Sequence[str | None],
        contents: Sequence[bytes],
        own: Sequence[bytes],
        *others: Iterable[Any],
    ) -> None:
        """Rows, by the column, to their place."""
        keys = [
            f"{content.hex()}.1" if id_ is None else f"id:{id_}"
            for id_, content in zip(ids, contents, strict=True)
        ]
        names = list(map(stem, ids, lines, keys))
        # sqlite3 takes a bytearray as it is, but asks around for what adapts bytes, at six times the cost
        hashes = list(map(bytearray, contents))
        own_hashes = hashes if own is contents else list(map(bytearray, own))
        assert len(lines) == len(keys) == len(own)  # the shortest would end them all
        rows = zip(lines, ids, hashes, own_hashes, *others, keys, names)  # some of `others` have no end
        for _ in range(len(lines) // _AT_ONCE):
            self._run(_INSERT_MANY, list(chain.from_iterable(islice(rows, _AT_ONCE))))
        self._connection.executemany(_INSERT_ONE, rows)

    def _keep(self, cells: Iterable[tuple[int, str]]) -> None:
        """Rows as the manifest has them, by their place among those just inserted."""
        before = self._placed + 1
        self._connection.executemany(
            "INSERT INTO main.sources (row, cells) VALUES (?, ?)", [(before + at, text) for at, text in cells]
        )

    def _refuse(self, messages: Iterable[tuple[int, str]]) -> None:
        """Rows that are wrong, by their place among those just inserted."""
        before = self._placed + 1
        self._connection.executemany(
            "UPDATE main.rows SET state = 'invalid', cause = 'invalid row', message = ? WHERE seq = ?",
            [(message, before + at) for at, message in messages],
        )

    def make_keys_unique(self, *, may_repeat: bool) -> None:
        """Number identical rows without an id: they are distinct pictures. Make the index of keys.

        `may_repeat`: some may be identical. Raises sqlite3.IntegrityError when an id is there twice.
        """
        if "rows_key" not in self._indexes:
            return
        if may_repeat:
            self._run(
                "UPDATE main.rows AS known SET key = lower(hex(content)) || '.' || number, "
                "name = row_stem(NULL, line, lower(hex(content)) || '.' || number) FROM "
                "(SELECT seq, row_number() OVER (PARTITION BY content ORDER BY seq) AS number "
                "FROM main.rows WHERE id IS NULL) AS same WHERE same.seq = known.seq AND number > 1"
            )
        self._run(self._indexes["rows_key"])
        del self._indexes["rows_key"]

    def take(self, *, invalid: int) -> None:
        """The rows are in their place, `invalid` of them wrong: make what rows need beside."""
        for name, statement in self._indexes.items():
            try:
                self._run(statement)
            except sqlite3.IntegrityError:
                if name != "rows_name":
                    raise
                self._run(
                    "UPDATE main.rows AS known SET name = hashed_stem(coalesce(id, key)) FROM "
                    "(SELECT seq, row_number() OVER (PARTITION BY name COLLATE NOCASE ORDER BY seq) "
                    "AS number FROM main.rows) AS same WHERE same.seq = known.seq AND number > 1"
                )
                self._run(statement)
        if invalid:
            settle_invalid(self._connection)
        self._run("DELETE FROM counts")
        self._connection.executemany(
            "INSERT INTO counts (state, rows) VALUES (?, ?)",
            [(State.PLANNED, self._placed - invalid), (State.INVALID, invalid)],
        )
