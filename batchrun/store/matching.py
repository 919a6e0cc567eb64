"""A manifest read again: its rows are held against the known ones, and what has changed is merged.

They are staged in a temporary table on disk, and nothing of the run changes until all are there. A row is
known again by

1. its id, or the hash of what it asks for and its number among identical rows; else
2. without an id: the hash of what the row itself gives, without `--set` (so that a changed `--set` is seen
   as a change and not as a new row).

A known row that asks for something else is replaced while nothing was bought for it; bought images stay
unless the user asks for the rerun.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from batchrun.model import State
from batchrun.rules.policy import PAID_CAUSES
from batchrun.store import rebuilding
from batchrun.store.changes import NEXT_GENERATION, next_settled, settle_invalid
from batchrun.store.reading import read_value
from batchrun.store.staged import Staged, StagedBlock

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
class Changes:
    """What a reading changed of the known rows; see planning.Merged."""

    new: int = 0
    replaced: int = 0
    changed: int = 0
    rerun: int = 0
    gone: int = 0


class Matching:
    """Staged rows beside the known ones; `row_stem`, `hashed_stem` and `cells_given` are known to its
    connection."""

    #: Where they are staged, and the column of their numbers there.
    table = "temp.staged", "n"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._run = connection.execute

    def begin(self) -> None:
        """Rows can be staged."""
        self._run("DROP TABLE IF EXISTS temp.staged")
        self._run(_STAGED)

    def add(self, rows: Sequence[Staged]) -> None:
        """Stage rows, in manifest order."""
        self._run("BEGIN")
        try:
            self._connection.executemany(
                "INSERT INTO staged (line, id, content, own, tool, given, extra, images, cells, message) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def add_block(self, block: StagedBlock) -> None:
        """Stage rows, in manifest order."""
        self.add([block.row(at) for at in range(len(block.lines))])

    def make_keys_unique(self, *, may_repeat: bool) -> None:
        """Make the index of ids; raises sqlite3.IntegrityError when one is there twice."""
        self._run("CREATE UNIQUE INDEX IF NOT EXISTS temp.staged_id ON staged (id) WHERE id IS NOT NULL")

    def take(self, *, rerun_changed: bool) -> Changes:
        """Make the staged rows the run's rows, in the transaction that the caller has begun."""
        self._number()
        if rebuilding.facts(self._connection).get("merge"):
            rebuilding.fill_in(self._connection)
        self._match()
        return self._apply(rerun_changed=rerun_changed)

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

    def _apply(self, *, rerun_changed: bool) -> Changes:
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
        rebuilding.doubt_the_rest(self._connection)
        rebuilding.recount(self._connection)
        self._run("DELETE FROM whole")  # rows that are back bring images back
        if gone or restored or moved or replaced or rerun:
            # what the sidecar files say of lines, extras and rows is not true any more
            self._run("UPDATE run SET listed = '{}'")
        return Changes(
            new=new,
            replaced=len(replaced),
            changed=len(underway) + len(bought) - len(rerun),
            rerun=len(rerun),
            gone=gone,
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
                    next_settled(self._connection),
                    kept["generation"],
                    seq,
                ),
            )
        return len(records)

    def _replace(self, seq: int) -> None:
        """The row asks for something else from now on; its file name stays."""
        query = "SELECT message FROM staged WHERE seq = ?"
        invalid = read_value(self._connection, query, (seq,)) is not None
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
                next_settled(self._connection) if invalid else None,
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
        rebuilding.free_numbers(self._connection)
        first = read_value(
            self._connection,
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
        settle_invalid(self._connection)
        return new

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
