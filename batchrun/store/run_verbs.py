"""The verbs of a run as a whole: its record, what its rows have in common, and what is told of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from batchrun.model import Counts, Failure, Row, State
from batchrun.store import reading
from batchrun.store.reading import Rejected, Settled, read_counts, read_failures, read_settled, read_value
from batchrun.store.records import (
    dumps,
    load_row,
)
from batchrun.store.verbs import Verbs

T = TypeVar("T")


class RunVerbs(Verbs):
    """What is known of the run, and of no single row."""

    # --- the run's record -----------------------------------------------------------------------

    async def manifest(self) -> str | None:
        """The manifest the folder belongs to; None for a new one."""
        return cast("str | None", await self._of_run("manifest")) or None

    async def stamp(self) -> str | None:
        """What told the manifest as last read; None for a new run."""
        return cast("str | None", await self._of_run("stamp"))

    async def job(self) -> str | None:
        """The job's settings as last told, as JSON."""
        return cast("str | None", await self._of_run("job"))

    async def form(self) -> dict[str, Any]:
        """The manifest's form as last read: format, delimiter, columns."""
        return await self._read(lambda connection: reading.read_json(connection, "form"))

    async def account_limit(self) -> int | None:
        """How many active tasks the account allowed when last told."""
        return cast("int | None", await self._of_run("account_limit"))

    async def stop_order(self) -> str | None:
        """What another process asks of this runner: 'cancel', or None."""
        return cast("str | None", await self._of_run("stop_order"))

    async def _of_run(self, column: str) -> Any:
        return await self._read(lambda connection: read_value(connection, f"SELECT {column} FROM run"))

    async def remember_job(self, *, manifest: str, job: str, stamp: str) -> None:
        """The newest settings, where the manifest lies now, and what tells it there."""
        query = "UPDATE run SET manifest = ?, job = ?, stamp = ?"
        await self._write(lambda connection: connection.execute(query, (manifest, job, stamp)))

    async def forget_stamp(self) -> None:
        """Let the next start read the manifest again, though it has not changed."""
        await self._write(lambda connection: connection.execute("UPDATE run SET stamp = ''"))

    async def adopt_limit(self, limit: int) -> None:
        """Record how many active tasks the account allows."""
        await self._write(lambda connection: connection.execute("UPDATE run SET account_limit = ?", (limit,)))

    async def planning(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` (see store.planning) in the thread that owns the database."""
        return await self._read(work)

    # --- uploads, tools, tasks ------------------------------------------------------------------------

    async def upload_url(self, sha256: str) -> str | None:
        """The address of an uploaded image, by its content; None when it was not uploaded yet."""
        query = "SELECT url FROM uploads WHERE sha256 = ?"
        return await self._read(lambda connection: read_value(connection, query, (sha256,)))

    async def record_upload(self, sha256: str, url: str, *, at: float) -> None:
        """An image was uploaded."""
        await self._write(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO uploads (sha256, url, uploaded_at) VALUES (?, ?, ?)",
                (sha256, url, at),
            )
        )

    async def tool(self, number: int) -> str:
        """The tool description (JSON text) that requests were bound to; KeyError when unknown."""
        query = "SELECT description FROM tools WHERE id = ?"
        description = await self._read(lambda connection: read_value(connection, query, (number,)))
        if description is None:
            raise KeyError(number)
        return str(description)

    async def tool_numbers(self) -> list[int]:
        """The numbers of all tool descriptions of this run."""
        return await self._read(
            lambda connection: [
                record[0] for record in connection.execute("SELECT id FROM tools ORDER BY id")
            ]
        )

    async def known_task(self) -> str | None:
        """The id of a task of this run, the newest where ids are equally long; None when none is known."""
        query = "SELECT max(task_id) FROM attempts"
        found: str | None = await self._read(lambda connection: read_value(connection, query))
        return found

    async def row_of_task(self, task_id: str) -> Row | None:
        """The row that asked for a task, None when it has asked for something else since, or is not known."""
        query = (
            "SELECT rows.seq FROM attempts JOIN rows ON rows.seq = attempts.row "
            "WHERE task_id = ? AND attempts.generation = rows.generation"
        )

        def verb(connection: sqlite3.Connection) -> Row | None:
            seq = read_value(connection, query, (task_id,))
            return None if seq is None else load_row(connection, seq)

        return await self._read(verb)

    async def known_tasks(self, task_ids: Collection[str]) -> dict[str, int | None]:
        """Which of these task ids belong to rows of this run, and the number of each one's tool description.

        None for the tool of a task whose row was asked for anew since.
        """
        return await self._read(lambda connection: reading.known_tasks(connection, task_ids))

    # --- what is told ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """Rows of the present manifest by state, and what they brought."""
        return await self._read(read_counts)

    async def of_saved(self, question: Callable[[Iterator[reading.Place]], tuple[T, Mapping[int, str]]]) -> T:
        """What `question` makes of the folders with images of done rows; it also tells marks to be kept."""
        told, marks = await self._read(lambda connection: question(reading.read_places(connection)))
        if marks:
            await self._write(
                lambda connection: connection.executemany(
                    "INSERT OR REPLACE INTO whole (place, mark) VALUES (?, ?)", list(marks.items())
                )
            )
        return told

    async def failures(self, *, limit: int = 20) -> list[tuple[State, Failure, int, int]]:
        """Groups of rows that did not make it: state, a sample failure, how many, the first line."""
        return await self._read(lambda connection: read_failures(connection, limit))

    async def listing_mark(self) -> dict[str, Any]:
        """The watermark of the sidecar files: {} when they are to be built anew."""
        return await self._read(lambda connection: reading.read_json(connection, "listed"))

    async def set_listing_mark(self, mark: Mapping[str, Any], *, instead_of: Mapping[str, Any]) -> bool:
        """The sidecar files hold every row settled up to this mark.

        False, and no change, when the mark is not `instead_of` any more: something they tell is not true now,
        and they are to be built anew.
        """
        texts = dumps(dict(mark)), dumps(dict(instead_of))

        def verb(connection: sqlite3.Connection) -> bool:
            return bool(connection.execute("UPDATE run SET listed = ? WHERE listed = ?", texts).rowcount)

        return await self._write(verb)

    async def failed_prints(self) -> list[str]:
        """SHA-256 (hex) of failed.csv or failed.jsonl as written last; before it the one that it replaced."""
        return list(json.loads(await self._of_run("failed_prints") or "[]"))

    async def note_failed_prints(self, prints: Sequence[str]) -> None:
        """The file of the rows that did not make it is, or is about to become, one of these."""
        await self._write(
            lambda connection: connection.execute("UPDATE run SET failed_prints = ?", (dumps(list(prints)),))
        )

    async def settled_after(self, settled: int, *, limit: int) -> list[Settled]:
        """Rows settled after that number, in order of settling."""
        return await self._read(lambda connection: read_settled(connection, settled, limit=limit))

    async def rejected_rows(self, *, after_seq: int, limit: int) -> list[Rejected]:
        """Rows of the present manifest that did not make it, as it had them, by row number.

        Those that were paid for are left out: to run them from a file would buy them again.
        """
        return await self._read(
            lambda connection: reading.read_rejected(connection, after_seq=after_seq, limit=limit)
        )
