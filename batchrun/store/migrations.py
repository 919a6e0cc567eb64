"""Steps that bring a state file to the present form; they and the note that they ran commit together."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

from batchrun.errors import StoreTooNew


def _first(connection: sqlite3.Connection) -> None:
    for statement in _schema():
        connection.execute(statement)


def _second(connection: sqlite3.Connection) -> None:
    # what a repair could not know, as JSON; {}: it never was repaired. See rebuilding.py
    connection.execute("ALTER TABLE run ADD COLUMN rebuilt TEXT NOT NULL DEFAULT '{}'")


def _third(connection: sqlite3.Connection) -> None:
    # SHA-256 (hex) of failed.csv as it was written last, after those of the time before, as a JSON list
    connection.execute("ALTER TABLE run ADD COLUMN failed_prints TEXT NOT NULL DEFAULT '[]'")


def _fourth(connection: sqlite3.Connection) -> None:
    # what a bought row asked for before it was asked for anew, while its old images are kept, as JSON
    connection.execute("ALTER TABLE rows ADD COLUMN kept TEXT")


def _fifth(connection: sqlite3.Connection) -> None:
    # folders of images that were found whole, and what told them then: see reading.read_places
    connection.execute("CREATE TABLE whole (place INTEGER PRIMARY KEY, mark TEXT NOT NULL) STRICT")


def _sixth(connection: sqlite3.Connection) -> None:
    # the conditions of these were lists, made into a table for each row that changed
    for statement in _schema():
        if statement.startswith(("CREATE INDEX rows_unfinished", "CREATE INDEX rows_troubled")):
            connection.execute(f"DROP INDEX {statement.split()[2]}")
            connection.execute(statement)


def _seventh(connection: sqlite3.Connection) -> None:
    """What is kept of a row may be a patch: earlier versions would give back something else."""


def _schema() -> list[str]:
    return _statements(Path(__file__).with_name("schema.sql").read_text(encoding="utf-8"))


def _statements(script: str) -> list[str]:
    """The statements of a script; executescript() would commit, and a step must be whole or absent."""
    lines = [line.split("--")[0] for line in script.splitlines()]
    return [statement for part in "\n".join(lines).split(";") if (statement := part.strip())]


#: In order; the file's user_version counts how many have run.
STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _first,
    _second,
    _third,
    _fourth,
    _fifth,
    _sixth,
    _seventh,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the present form; raises StoreTooNew for a file from a newer batchrun."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(STEPS):
        raise StoreTooNew(
            f"the state was written by a newer batchrun (its form {version}, this one knows {len(STEPS)}); "
            "update batchrun to go on with this run"
        )
    if version == len(STEPS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in STEPS[version:]:
            step(connection)
        connection.execute(f"PRAGMA user_version = {len(STEPS)}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
