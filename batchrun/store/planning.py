"""Bringing a read manifest into the state: rows are staged, numbered, matched with what is known, merged.

Staging lives in a temporary table on disk, so that memory does not grow with the manifest, and nothing of
the run changes until the whole manifest has been read and found right. A row is known again by

1. its id, or the hash of what it asks for and its number among identical rows; else
2. without an id: the hash of what the row itself gives, without `--set` (so that a changed `--set` is seen
   as a change and not as a new row).

A known row that asks for something else is replaced while nothing was bought for it; bought images stay
unless the user asks for the rerun.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchrun.model import State
from batchrun.rules.naming import stem, stem_with_hash
from batchrun.rules.policy import PAID_CAUSES
from batchrun.store.records import dumps

#: Staged rows are written in groups of this many.
GROUP = 2000

_STAGED = """
CREATE TEMP TABLE staged (
    n INTEGER PRIMARY KEY, line INTEGER NOT NULL, id TEXT, content BLOB NOT NULL, own BLOB NOT NULL,
    tool INTEGER, given TEXT NOT NULL, extra TEXT NOT NULL, images INTEGER NOT NULL, cells TEXT NOT NULL,
    message TEXT, key TEXT, own_number INTEGER, seq INTEGER, name TEXT
)
"""


@dataclass(frozen=True, slots=True)
class Staged:
    """One request of the manifest as read, to be merged."""

    line: int
    id: str | None
    #: Hash of what is asked for: tool, values, contents of local files.
    content: bytes
    #: The same without what `--set` adds.
    own: bytes
    #: The tool description's number; None for an invalid row.
    tool: int | None
    given: str
    extra: str
    images: int
    #: The row as the manifest had it, as JSON.
    cells: str
    #: What is wrong with an invalid row; None for a good one.
    message: str | None = None


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
    """One reading of the manifest on its way into the state. Not awaited: it runs in the database's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._group: list[Staged] = []
        self._tools: dict[str, int] = {}
        connection.execute("DROP TABLE IF EXISTS staged")
        connection.execute(_STAGED)
        connection.create_function("row_stem", 3, stem, deterministic=True)
        connection.create_function("hashed_stem", 1, stem_with_hash, deterministic=True)

    def tool(self, description: str) -> int:
        """The number of a tool description (JSON text) in this run's record."""
        if description not in self._tools:
            self.connection.execute("INSERT OR IGNORE INTO tools (description) VALUES (?)", (description,))
            record = self.connection.execute(
                "SELECT id FROM tools WHERE description = ?", (description,)
            ).fetchone()
            self._tools[description] = record[0]
        return self._tools[description]

    def stage(self, row: Staged) -> None:
        """Add one request, in manifest order."""
        self._group.append(row)
        if len(self._group) >= GROUP:
            self._flush()

    def _flush(self) -> None:
        self.connection.execute("BEGIN")
        self.connection.executemany(
            "INSERT INTO staged (line, id, content, own, tool, given, extra, images, cells, message) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (r.line, r.id, r.content, r.own, r.tool, r.given, r.extra, r.images, r.cells, r.message)
                for r in self._group
            ],
        )
        self.connection.execute("COMMIT")
        self._group.clear()

    def duplicates(self) -> list[DuplicateId]:
        """Ids that stand on more than one line, each later line once."""
        self._flush()
        records = self.connection.execute(
            "SELECT id, line, first FROM (SELECT id, line, row_number() OVER same AS number, "
            "first_value(line) OVER same AS first FROM staged WHERE id IS NOT NULL "
            "WINDOW same AS (PARTITION BY id ORDER BY n)) WHERE number > 1 ORDER BY line"
        )
        return [DuplicateId(*record) for record in records]

    def summary(self) -> tuple[int, int, dict[int, int], int]:
        """Requests, expected images, requests by tool number, and how many repeat an earlier one's content."""
        self._flush()
        rows, images = self.connection.execute(
            "SELECT count(*), coalesce(sum(images), 0) FROM staged"
        ).fetchone()
        by_tool = dict(
            self.connection.execute(
                "SELECT tool, count(*) FROM staged WHERE tool IS NOT NULL GROUP BY tool"
            ).fetchall()
        )
        distinct = self.connection.execute("SELECT count(DISTINCT content) FROM staged").fetchone()[0]
        return rows, images, by_tool, rows - distinct

    def merge(
        self, *, manifest: str, job: str, at: float, stamp: str, form: str, rerun_changed: bool
    ) -> Merged:
        """Make the staged rows the run's rows, and the job its job, in one transaction.

        The stamp is kept only when nothing is left to be told at the next start.
        """
        self._flush()
        connection = self.connection
        identical = self.summary()[3]
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(
                "INSERT OR IGNORE INTO run (id, manifest, created_at, job) VALUES (1, ?, ?, ?)",
                (manifest, at, job),
            )
            self._number()
            self._match()
            merged = self._apply(rerun_changed=rerun_changed, identical=identical)
            connection.execute(
                "UPDATE run SET manifest = ?, job = ?, stamp = ?, form = ?",
                (manifest, job, "" if merged.changed else stamp, form),
            )
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        connection.execute("DROP TABLE staged")
        return merged

    def abandon(self) -> None:
        """Forget what was staged."""
        self.connection.execute("DROP TABLE IF EXISTS staged")

    def _number(self) -> None:
        """Give every staged row its key; identical rows are distinct pictures and are numbered."""
        run = self.connection.execute
        run("UPDATE staged SET key = 'id:' || id WHERE id IS NOT NULL")
        run(
            "UPDATE staged SET key = lower(hex(staged.content)) || '.' || numbered.number, "
            "own_number = numbered.own_number FROM (SELECT n, row_number() OVER (PARTITION BY content ORDER BY n) AS number, "
            "row_number() OVER (PARTITION BY own ORDER BY n) AS own_number FROM staged WHERE id IS NULL) AS numbered "
            "WHERE numbered.n = staged.n"
        )
        run("CREATE UNIQUE INDEX temp.staged_key ON staged (key)")

    def _match(self) -> None:
        """Find the known row of every staged one."""
        run = self.connection.execute
        run("UPDATE staged SET seq = rows.seq FROM main.rows AS rows WHERE rows.key = staged.key")
        run(
            "CREATE TEMP TABLE orphans AS SELECT seq, own, row_number() OVER (PARTITION BY own ORDER BY seq) AS number "
            "FROM main.rows WHERE id IS NULL AND present = 1 AND NOT EXISTS "
            "(SELECT 1 FROM staged WHERE staged.seq = main.rows.seq)"
        )
        run(
            "CREATE TEMP TABLE strays AS SELECT n, own, row_number() OVER (PARTITION BY own ORDER BY n) AS number "
            "FROM staged WHERE id IS NULL AND seq IS NULL"
        )
        run("CREATE INDEX temp.orphans_own ON orphans (own, number)")
        run(
            "UPDATE staged SET seq = pairs.seq FROM (SELECT strays.n AS n, orphans.seq AS seq FROM strays "
            "JOIN orphans ON orphans.own = strays.own AND orphans.number = strays.number) AS pairs WHERE pairs.n = staged.n"
        )
        run("DROP TABLE orphans")
        run("DROP TABLE strays")
        run("CREATE UNIQUE INDEX temp.staged_seq ON staged (seq) WHERE seq IS NOT NULL")

    def _apply(self, *, rerun_changed: bool, identical: int) -> Merged:
        run = self.connection.execute
        before = run("SELECT count(*) FROM main.rows WHERE present = 1").fetchone()[0]
        gone = run(
            "UPDATE main.rows SET present = 0 WHERE present = 1 AND NOT EXISTS "
            "(SELECT 1 FROM staged WHERE staged.seq = main.rows.seq)"
        ).rowcount
        moved = run(
            "UPDATE main.rows SET line = staged.line, extra = staged.extra, present = 1 FROM staged "
            "WHERE staged.seq = main.rows.seq AND (main.rows.line <> staged.line OR main.rows.extra <> staged.extra "
            "OR main.rows.present = 0)"
        ).rowcount
        open_states = _texts((State.PLANNED, State.FAILED, State.CANCELLED, State.INVALID))
        differs = "staged.seq = main.rows.seq AND (main.rows.content <> staged.content OR (main.rows.state = 'invalid') <> (staged.message IS NOT NULL))"
        # a failed row whose images were paid for counts as bought
        paid = f"(main.rows.state = 'done' OR (main.rows.state = 'failed' AND main.rows.cause IN ({_texts(PAID_CAUSES)})))"
        replaced = run(
            f"SELECT main.rows.seq FROM main.rows JOIN staged ON {differs} "
            f"WHERE main.rows.state IN ({open_states}) AND NOT {paid}"
        ).fetchall()
        bought = run(f"SELECT main.rows.seq FROM main.rows JOIN staged ON {differs} WHERE {paid}").fetchall()
        underway = run(
            f"SELECT count(*) FROM main.rows JOIN staged ON {differs} WHERE main.rows.state NOT IN ({open_states}, 'done')"
        ).fetchone()[0]
        for (seq,) in replaced:
            self._replace(seq)
        if rerun_changed:
            for (seq,) in bought:
                self._replace(seq)
        new = self._insert()
        run(
            "UPDATE main.sources SET cells = staged.cells FROM staged WHERE staged.seq = main.sources.row "
            "AND main.sources.cells <> staged.cells"
        )
        self._recount()
        if gone or moved or replaced or (bought and rerun_changed):
            # what the sidecar files say of lines, extras and rows is not true any more
            run("UPDATE run SET listed = '{}'")
        rows, images = run(
            "SELECT count(*), coalesce(sum(images), 0) FROM main.rows WHERE present = 1"
        ).fetchone()
        return Merged(
            rows=rows,
            images=images,
            new=new if before else rows,
            replaced=len(replaced),
            changed=underway + (0 if rerun_changed else len(bought)),
            rerun=len(bought) if rerun_changed else 0,
            gone=gone,
            invalid=run("SELECT count(*) FROM main.rows WHERE present = 1 AND state = 'invalid'").fetchone()[
                0
            ],
            identical=identical,
            by_tool={
                run_path: (count, expected)
                for run_path, count, expected in run(
                    "SELECT json_extract(tools.description, '$.run_path'), count(*), sum(images) FROM main.rows "
                    "JOIN tools ON tools.id = main.rows.tool WHERE present = 1 AND state = 'planned' GROUP BY 1"
                )
            },
        )

    def _replace(self, seq: int) -> None:
        """The row asks for something else from now on; its file name stays."""
        invalid = self.connection.execute("SELECT message FROM staged WHERE seq = ?", (seq,)).fetchone()[0]
        state = State.INVALID if invalid is not None else State.PLANNED
        self.connection.execute(
            "UPDATE main.rows SET key = staged.key, content = staged.content, own = staged.own, tool = staged.tool, "
            "given = staged.given, images = staged.images, state = ?, attempts = 0, generation = generation + 1, "
            "settled = ?, cause = ?, message = staged.message FROM staged WHERE staged.seq = main.rows.seq AND main.rows.seq = ?",
            (
                state,
                self._settled() if invalid is not None else None,
                "invalid row" if invalid is not None else None,
                seq,
            ),
        )

    def _insert(self) -> int:
        """Add the rows not known yet, under file names that no other row has on any file system."""
        run = self.connection.execute
        run("UPDATE staged SET name = row_stem(id, line, key) WHERE seq IS NULL")
        run("CREATE INDEX temp.staged_name ON staged (name COLLATE NOCASE) WHERE name IS NOT NULL")
        run(
            "UPDATE staged SET name = hashed_stem(coalesce(id, key)) WHERE seq IS NULL AND ("
            "EXISTS (SELECT 1 FROM main.rows AS known WHERE known.name = staged.name COLLATE NOCASE) OR "
            "EXISTS (SELECT 1 FROM staged AS other WHERE other.name = staged.name COLLATE NOCASE AND other.n < staged.n))"
        )
        first = run("SELECT coalesce(max(seq), 0) FROM main.rows").fetchone()[0]
        new = run(
            "INSERT INTO main.rows (seq, key, content, own, id, line, name, tool, given, extra, images, state, cause, message) "
            "SELECT ? + row_number() OVER (ORDER BY n), key, content, own, id, line, name, tool, given, extra, images, "
            "iif(message IS NULL, 'planned', 'invalid'), iif(message IS NULL, NULL, 'invalid row'), message "
            "FROM staged WHERE seq IS NULL ORDER BY n",
            (first,),
        ).rowcount
        run(
            "INSERT INTO main.sources (row, cells) SELECT main.rows.seq, staged.cells FROM staged "
            "JOIN main.rows ON main.rows.key = staged.key WHERE staged.seq IS NULL ORDER BY main.rows.seq"
        )
        for (seq,) in run(
            "SELECT seq FROM main.rows WHERE state = 'invalid' AND settled IS NULL ORDER BY seq"
        ).fetchall():
            run("UPDATE main.rows SET settled = ? WHERE seq = ?", (self._settled(), seq))
        return new

    def _settled(self) -> int:
        return int(
            self.connection.execute("UPDATE run SET settled = settled + 1 RETURNING settled").fetchone()[0]
        )

    def _recount(self) -> None:
        run = self.connection.execute
        run("DELETE FROM counts")
        run(
            "INSERT INTO counts (state, rows) SELECT state, count(*) FROM main.rows WHERE present = 1 GROUP BY state"
        )
        run(
            "UPDATE totals SET (images, bytes) = (SELECT count(*), coalesce(sum(outputs.size_bytes), 0) FROM outputs "
            "JOIN main.rows ON main.rows.seq = outputs.row AND main.rows.generation = outputs.generation "
            "WHERE main.rows.present = 1 AND main.rows.state = 'done' AND outputs.state = 'saved')"
        )


def _texts(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def form_json(*, format: str, delimiter: str | None, columns: Sequence[str] | None) -> str:
    """The manifest's form as the run's record keeps it."""
    return dumps({"format": format, "delimiter": delimiter, "columns": columns})
