"""Bringing a read manifest into the state: rows are staged, numbered, matched with what is known, merged.

Staging lives in a temporary table on disk, so that memory does not grow with the manifest, and nothing of
the run changes until the whole manifest has been read and found right. Where no row is known yet (the first
reading of most runs) there is nothing to match, and rows go straight to their place, in a transaction that
ends with the reading; indexes are made at its end. Else a row is known again by

1. its id, or the hash of what it asks for and its number among identical rows; else
2. without an id: the hash of what the row itself gives, without `--set` (so that a changed `--set` is seen
   as a change and not as a new row).

A known row that asks for something else is replaced while nothing was bought for it; bought images stay
unless the user asks for the rerun.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

from batchrun.model import State
from batchrun.rules.naming import stem, stem_with_hash
from batchrun.rules.policy import PAID_CAUSES
from batchrun.store import rebuilding
from batchrun.store.changes import NEXT_GENERATION, next_settled
from batchrun.store.migrations import migrate
from batchrun.store.reading import read_value
from batchrun.store.records import cells_given, dumps
from batchrun.store.staged import Staged, StagedBlock

#: Staged rows are written in groups of this many, or of so many characters: a row may have megabytes.
GROUP = 2000
GROUP_CHARS = 4_000_000
#: Rows of one INSERT: most of what a statement costs is not paid by the row. More were not quicker.
_AT_ONCE = 50
_INTO = "INSERT INTO main.rows (line, id, content, own, tool, given, extra, images, key, name, state) VALUES "
_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'planned')"
_INSERT_ONE = _INTO + _VALUES
_INSERT_MANY = _INTO + ", ".join([_VALUES] * _AT_ONCE)

_STAGED = """
CREATE TEMP TABLE staged (
    n INTEGER PRIMARY KEY, line INTEGER NOT NULL, id TEXT, content BLOB NOT NULL, own BLOB NOT NULL,
    tool INTEGER, given TEXT NOT NULL, extra TEXT NOT NULL, images INTEGER NOT NULL, cells TEXT,
    message TEXT, key TEXT, seq INTEGER, name TEXT
)
"""


def _texts(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


#: States in which a row that was not paid for may ask for something else.
_RESTING = _texts((State.PLANNED, State.FAILED, State.CANCELLED, State.INVALID))
#: Rows that were bought: done, or failed after the service was paid.
_PAID = (
    f"(known.state = 'done' OR (known.state = 'failed' AND known.cause IN ({_texts(sorted(PAID_CAUSES))})))"
)


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
        #: What makes the indexes that were dropped for the first reading, by name; None: no first reading.
        self._indexes: dict[str, str] | None = {} if self._is_first() else None
        connection.create_function("row_stem", 3, stem, deterministic=True)
        connection.create_function("hashed_stem", 1, stem_with_hash, deterministic=True)
        connection.create_function("cells_given", 2, self._cells_given)

    def _cells_given(self, id: str | None, given: str) -> str:
        return dumps(cells_given(id, json.loads(given), self._columns))

    def _is_first(self) -> bool:
        """Whether no row is known. A state made by an earlier version has the keys' index in its table."""
        if read_value(self.connection, "SELECT EXISTS (SELECT 1 FROM main.rows)"):
            return False
        query = "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE name = 'rows_key')"
        return bool(read_value(self.connection, query)) and not rebuilding.facts(self.connection).get("merge")

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
        if self._indexes is None:
            for at in range(len(block.lines)):
                self.stage(block.row(at))
            return
        if self._group:
            self._flush()
        self._begin()
        self._place(
            block.lines, block.ids, block.contents, block.own, repeat(block.tool), block.given, repeat("{}"),
            block.images,
        )  # fmt: skip
        self._keep(block.cells.items())
        self._rows[block.tool] += len(block.lines)
        self._images[block.tool] += sum(block.images)

    def _flush(self) -> None:
        group, self._group, self._group_chars = self._group, [], 0
        self._begin()
        if self._indexes is None:
            with self._transaction("BEGIN"):
                self.connection.executemany(
                    "INSERT INTO staged (line, id, content, own, tool, given, extra, images, cells, message) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    group,
                )
        elif group:
            *columns, cells, messages = zip(*group, strict=True)
            self._place(*columns)
            self._keep((at, text) for at, text in enumerate(cells) if text is not None)
            self._refuse((at, message) for at, message in enumerate(messages) if message is not None)
        for row in group:
            self._rows[row.tool] += 1
            self._images[row.tool] += row.images

    def _place(
        self,
        lines: Sequence[int],
        ids: Sequence[str | None],
        contents: Sequence[bytes],
        own: Sequence[bytes],
        *others: Iterable[Any],
    ) -> None:
        """Rows of the first reading, by the column, to their place."""
        keys = [
            f"{content.hex()}.1" if id_ is None else f"id:{id_}"
            for id_, content in zip(ids, contents, strict=True)
        ]
        names = list(map(stem, ids, lines, keys))
        # sqlite3 takes a bytearray as it is, but asks around for what adapts bytes, at six times the cost
        hashes = list(map(bytearray, contents))
        own_hashes = hashes if own is contents else list(map(bytearray, own))
        rows = zip(lines, ids, hashes, own_hashes, *others, keys, names)  # some of `others` have no end
        for _ in range(len(lines) // _AT_ONCE):
            self._run(_INSERT_MANY, list(chain.from_iterable(islice(rows, _AT_ONCE))))
        self.connection.executemany(_INSERT_ONE, rows)

    def _keep(self, cells: Iterable[tuple[int, str]]) -> None:
        """Rows as the manifest has them, by their place among those just inserted."""
        before = self._rows.total() + 1
        self.connection.executemany(
            "INSERT INTO main.sources (row, cells) VALUES (?, ?)", [(before + at, text) for at, text in cells]
        )

    def _refuse(self, messages: Iterable[tuple[int, str]]) -> None:
        """Rows that are wrong, by their place among those just inserted."""
        before = self._rows.total() + 1
        self.connection.executemany(
            "UPDATE main.rows SET state = 'invalid', cause = 'invalid row', message = ? WHERE seq = ?",
            [(message, before + at) for at, message in messages],
        )

    def _begin(self) -> None:
        if self._is_begun:
            return
        self._is_begun = True
        if self._indexes is None:
            self._run("DROP TABLE IF EXISTS temp.staged")
            self._run(_STAGED)
            return
        self._run("PRAGMA foreign_keys = OFF")  # the tools' numbers are our own,
        self._run("PRAGMA ignore_check_constraints = ON")  # and so are the states
        self._run("BEGIN IMMEDIATE")
        self._indexes.update(
            self._run(
                "SELECT name, sql FROM main.sqlite_schema WHERE type = 'index' AND tbl_name = 'rows' "
                "AND sql NOT LIKE '%WHERE % IS NOT NULL'"  # those stay empty, and making one reads every row
            ).fetchall()
        )
        for name in self._indexes:
            self._run(f"DROP INDEX main.{name}")

    def _read_all(self) -> None:
        """Everything staged is in its table, and counted."""
        if self._group or not self._is_begun:
            self._flush()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._run(begin)
        try:
            yield
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    @property
    def _table(self) -> tuple[str, str]:
        """Where rows are staged, and the column of their numbers there."""
        return ("temp.staged", "n") if self._indexes is None else ("main.rows", "seq")

    def duplicates(self) -> Iterator[DuplicateId]:
        """Ids that stand on more than one line, each later line once."""
        self._read_all()
        table, number = self._table
        try:
            if self._indexes:
                self._number_first()
                self._run(self._indexes["rows_key"])
                del self._indexes["rows_key"]
            else:
                self._run("CREATE UNIQUE INDEX temp.staged_id ON staged (id) WHERE id IS NOT NULL")
        except sqlite3.IntegrityError:
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
            query = f"SELECT count(*) FROM (SELECT 1 FROM {self._table[0]} {valid} GROUP BY content)"
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
        self._columns = json.loads(form).get("columns")
        try:
            if self._indexes is None:
                self._run("BEGIN IMMEDIATE")
            self._run(
                "INSERT OR IGNORE INTO run (id, manifest, created_at, job) VALUES (1, ?, ?, ?)",
                (manifest, at, job),
            )
            if self._indexes is not None:
                self._take_first()
                merged = Merged(
                    rows=rows, images=images, new=rows, replaced=0, changed=0, rerun=0, gone=0,
                    invalid=self._rows[None], identical=identical, by_tool=self._first_by_tool(),
                )  # fmt: skip
            else:
                self._number()
                if rebuilding.facts(self.connection).get("merge"):
                    rebuilding.fill_in(self.connection)
                self._match()
                merged = self._apply(rerun_changed=rerun_changed, identical=identical)
            self._run(
                "UPDATE run SET manifest = ?, job = ?, stamp = ?, form = ?",
                (manifest, job, "" if merged.changed else stamp, form),
            )
            self._run("COMMIT")
        finally:
            self.abandon()
        return merged

    def abandon(self) -> None:
        """Forget what was staged and not merged."""
        if self.connection.in_transaction:
            self._run("ROLLBACK")
        self._run("DROP TABLE IF EXISTS temp.staged")
        self._run("PRAGMA foreign_keys = ON")
        self._run("PRAGMA ignore_check_constraints = OFF")
        self._is_begun = False

    # --- the first reading ----------------------------------------------------------------------------

    def _number_first(self) -> None:
        """Identical rows without an id are distinct pictures and are numbered."""
        if self.summary()[2] or self._rows[None]:
            self._run(
                "UPDATE main.rows AS known SET key = lower(hex(content)) || '.' || number, "
                "name = row_stem(NULL, line, lower(hex(content)) || '.' || number) FROM "
                "(SELECT seq, row_number() OVER (PARTITION BY content ORDER BY seq) AS number "
                "FROM main.rows WHERE id IS NULL) AS same WHERE same.seq = known.seq AND number > 1"
            )

    def _take_first(self) -> None:
        """The rows are in their place: what a row needs beside is made."""
        if "rows_key" in (self._indexes or {}):
            for twice in self.duplicates():
                raise sqlite3.IntegrityError(f"the id {twice.id} is there twice")
        for name, statement in (self._indexes or {}).items():
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
        invalid = self._rows[None]
        if invalid:
            self._settle_invalid()
        self._run("DELETE FROM counts")
        self.connection.executemany(
            "INSERT INTO counts (state, rows) VALUES (?, ?)",
            [(State.PLANNED, self._rows.total() - invalid), (State.INVALID, invalid)],
        )

    def _first_by_tool(self) -> dict[str, tuple[int, int]]:
        by_tool: dict[str, tuple[int, int]] = {}
        for number, rows in self._rows.items():
            if number is not None:
                query = "SELECT json_extract(description, '$.run_path') FROM tools WHERE id = ?"
                run_path = read_value(self.connection, query, (number,))
                before = by_tool.get(run_path, (0, 0))
                by_tool[run_path] = before[0] + rows, before[1] + self._images[number]
        return by_tool

    # --- which row is which -------------------------------------------------------------------------

    def _number(self) -> None:
        """Give every staged row its key; identical rows are distinct pictures and are numbered."""
        self._run("UPDATE staged SET key = 'id:' || id WHERE id IS NOT NULL")
        self._run(
            "UPDATE staged SET key = lower(hex(staged.content)) || '.' || numbered.number FROM "
            "(SELECT n, row_number() OVER (PARTITION BY content ORDER BY n) AS number "
            "FROM staged WHERE id IS NULL) AS numbered WHERE numbered.n = staged.n"
        )
        self._run("CREATE UNIQUE INDEX temp.staged_key ON staged (key)")

    def _match(self) -> None:
        """Find the known row of every staged one."""
        run = self._run
        run("UPDATE staged SET seq = known.seq FROM main.rows AS known WHERE known.key = staged.key")
        # the others without an id: pair what the rows themselves give, in order
        run(
            "CREATE TEMP TABLE orphans AS SELECT seq, own, "
            "row_number() OVER (PARTITION BY own ORDER BY present DESC, seq) AS number "
            "FROM main.rows AS known WHERE id IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM staged WHERE staged.seq = known.seq)"
        )
        run("CREATE INDEX temp.orphans_own ON orphans (own, number)")
        run(
            "UPDATE staged SET seq = orphans.seq FROM orphans, "
            "(SELECT n, own, row_number() OVER (PARTITION BY own ORDER BY n) AS number "
            "FROM staged WHERE id IS NULL AND seq IS NULL) AS strays "
            "WHERE strays.n = staged.n AND orphans.own = strays.own AND orphans.number = strays.number"
        )
        run("DROP TABLE orphans")
        run("CREATE UNIQUE INDEX temp.staged_seq ON staged (seq) WHERE seq IS NOT NULL")

    # --- what becomes of it -------------------------------------------------------------------------

    def _apply(self, *, rerun_changed: bool, identical: int) -> Merged:
        gone = self._leave_out()
        restored = self._restore()
        moved = self._move()
        replaced = self._differing(f"NOT {_PAID} AND known.state IN ({_RESTING})")
        bought = self._differing(_PAID)
        # what is invalid now cannot be bought: the images stay
        rerun = self._differing(f"{_PAID} AND staged.message IS NULL") if rerun_changed else []
        underway = self._differing(f"NOT {_PAID} AND known.state NOT IN ({_RESTING})")
        for seq in (*replaced, *rerun):
            self._replace(seq)
        new = self._insert()
        self._keep_sources()
        rebuilding.doubt_the_rest(self.connection)
        rebuilding.recount(self.connection)
        self._run("DELETE FROM whole")  # rows that are back bring images back
        if gone or restored or moved or replaced or rerun:
            # what the sidecar files say of lines, extras and rows is not true any more
            self._run("UPDATE run SET listed = '{}'")
        rows, images, invalid = self._run(
            "SELECT count(*), coalesce(sum(images), 0), coalesce(sum(state = 'invalid'), 0) "
            "FROM main.rows WHERE present = 1"
        ).fetchone()
        return Merged(
            rows=rows,
            images=images,
            new=new,
            replaced=len(replaced),
            changed=len(underway) + len(bought) - len(rerun),
            rerun=len(rerun),
            gone=gone,
            invalid=invalid,
            identical=identical,
            by_tool=self._planned_by_tool(),
        )

    def _leave_out(self) -> int:
        """Rows that are not in the manifest any more stay as they are, uncounted."""
        return self._run(
            "UPDATE main.rows AS known SET present = 0 WHERE present = 1 "
            "AND NOT EXISTS (SELECT 1 FROM staged WHERE staged.seq = known.seq)"
        ).rowcount

    def _move(self) -> int:
        """Known rows take the place, and what they carry, from this reading; returns how many changed."""
        self._run(
            # a value may have moved between --set and a column: the same request, given otherwise
            "UPDATE main.rows AS known SET own = staged.own FROM staged WHERE staged.seq = known.seq "
            "AND known.content = staged.content AND known.own <> staged.own"
        )
        self._run(
            # what is not bought yet takes a changed way of sending LoRA scales, though no newer description
            "UPDATE main.rows AS known SET tool = staged.tool "
            "FROM staged, main.tools AS old, main.tools AS new WHERE staged.seq = known.seq "
            "AND known.content = staged.content AND old.id = known.tool AND new.id = staged.tool "
            "AND old.id <> new.id "
            "AND json_extract(old.description, '$.lora_scale') "
            "<> json_extract(new.description, '$.lora_scale') "
            f"AND NOT {_PAID} AND known.state IN ({_RESTING})"
        )
        return self._run(
            "UPDATE main.rows AS known SET line = staged.line, extra = staged.extra, present = 1 FROM staged "
            "WHERE staged.seq = known.seq "
            "AND (known.line <> staged.line OR known.extra <> staged.extra OR known.present = 0)"
        ).rowcount

    def _differing(self, condition: str) -> list[int]:
        """Known rows that now ask for something else, or became valid or invalid."""
        records = self._run(
            "SELECT known.seq FROM main.rows AS known JOIN staged ON staged.seq = known.seq "
            "WHERE (known.content <> staged.content "
            "OR (known.state = 'invalid') <> (staged.message IS NOT NULL)) "
            f"AND {condition} ORDER BY known.seq"
        )
        return [seq for (seq,) in records]

    def _restore(self) -> int:
        """Bought rows that were to ask for something else, and did not get it, take their word back.

        Their images are still there: they are done again. Returns how many.
        """
        records = self._run(
            "SELECT known.seq, known.kept FROM main.rows AS known JOIN staged ON staged.seq = known.seq "
            "WHERE known.kept IS NOT NULL AND known.content <> staged.content AND staged.message IS NULL "
            "AND json_extract(known.kept, '$.content') = hex(staged.content) "
            f"AND NOT {_PAID} AND known.state IN ({_RESTING}) ORDER BY known.seq"
        ).fetchall()
        for seq, text in records:
            kept = json.loads(text)
            self._run(
                "UPDATE main.rows AS known SET key = staged.key, content = staged.content, own = staged.own, "
                "tool = ?, given = ?, images = ?, generation = ?, state = 'done', settled = ?, cause = NULL, "
                "message = NULL, kept = NULL, attempts = (SELECT count(*) FROM attempts "
                "WHERE attempts.row = known.seq AND attempts.generation = ?) "
                "FROM staged WHERE staged.seq = known.seq AND known.seq = ?",
                (
                    kept["tool"],
                    kept["given"],
                    kept["images"],
                    kept["generation"],
                    next_settled(self.connection),
                    kept["generation"],
                    seq,
                ),
            )
        return len(records)

    def _replace(self, seq: int) -> None:
        """The row asks for something else from now on; its file name stays."""
        query = "SELECT message FROM staged WHERE seq = ?"
        invalid = read_value(self.connection, query, (seq,)) is not None
        self._run(
            "UPDATE main.rows SET kept = iif(rows.state = 'done', json_object("
            "'generation', rows.generation, 'content', hex(rows.content), 'tool', rows.tool, "
            "'given', rows.given, 'images', rows.images), rows.kept), "
            "key = staged.key, content = staged.content, own = staged.own, "
            "tool = staged.tool, given = staged.given, images = staged.images, attempts = 0, "
            f"generation = {NEXT_GENERATION}, state = ?, settled = ?, cause = ?, message = staged.message "
            "FROM staged WHERE staged.seq = rows.seq AND rows.seq = ?",
            (
                State.INVALID if invalid else State.PLANNED,
                next_settled(self.connection) if invalid else None,
                "invalid row" if invalid else None,
                seq,
            ),
        )

    def _insert(self) -> int:
        """Add the rows not known yet, under file names that no other row has on any file system."""
        run = self._run
        run("UPDATE staged SET name = row_stem(id, line, key) WHERE seq IS NULL")
        run("CREATE INDEX temp.staged_name ON staged (name COLLATE NOCASE) WHERE name IS NOT NULL")
        run(
            "UPDATE staged SET name = hashed_stem(coalesce(id, key)) WHERE seq IS NULL AND ("
            "EXISTS (SELECT 1 FROM main.rows AS known WHERE known.name = staged.name COLLATE NOCASE) "
            "OR EXISTS (SELECT 1 FROM staged AS other "
            "WHERE other.name = staged.name COLLATE NOCASE AND other.n < staged.n))"
        )
        rebuilding.free_numbers(self.connection)
        first = read_value(
            self.connection,
            "SELECT coalesce(max(seq), 0) - (SELECT count(*) FROM temp.free) FROM main.rows",
        )
        new = run(
            "INSERT INTO main.rows (seq, key, content, own, id, line, name, tool, given, extra, images, "
            "state, cause, message) "
            "SELECT coalesce(free.seq, ? + number), key, content, own, id, line, name, tool, given, "
            "extra, images, iif(message IS NULL, 'planned', 'invalid'), "
            "iif(message IS NULL, NULL, 'invalid row'), message "
            "FROM (SELECT *, row_number() OVER (ORDER BY n) AS number FROM staged WHERE seq IS NULL) AS new "
            "LEFT JOIN temp.free ON free.n = new.number ORDER BY number",
            (first,),
        ).rowcount
        self._settle_invalid()
        return new

    def _settle_invalid(self) -> None:
        """Rows that cannot be asked for rest as they are."""
        for (seq,) in self._run(
            "SELECT seq FROM main.rows WHERE state = 'invalid' AND settled IS NULL ORDER BY seq"
        ).fetchall():
            self._run("UPDATE main.rows SET settled = ? WHERE seq = ?", (next_settled(self.connection), seq))

    def _keep_sources(self) -> None:
        """Rows as the manifest has them now, as far as what they give does not tell it."""
        run = self._run
        run(
            "UPDATE staged SET seq = known.seq FROM main.rows AS known "
            "WHERE staged.seq IS NULL AND known.key = staged.key"
        )
        run(
            # bought, or on their way, and asked for otherwise since
            "UPDATE staged SET cells = "
            "json_patch(cells_given(staged.id, staged.given), coalesce(json_extract(cells, '$[0]'), '{}')) "
            "FROM main.rows AS known WHERE known.seq = staged.seq AND known.given <> staged.given "
            "AND (cells IS NULL OR json_type(cells) = 'array')"
        )
        run(
            "DELETE FROM main.sources AS old WHERE EXISTS "
            "(SELECT 1 FROM staged WHERE staged.seq = old.row AND cells IS NULL)"
        )
        run(
            "INSERT INTO main.sources (row, cells) SELECT seq, cells FROM staged WHERE cells IS NOT NULL "
            "ORDER BY seq ON CONFLICT (row) DO UPDATE SET cells = excluded.cells "
            "WHERE cells <> excluded.cells"
        )

    # --- what is counted ----------------------------------------------------------------------------

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
