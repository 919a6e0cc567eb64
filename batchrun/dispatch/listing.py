"""Keeping the sidecar files true while the run goes on: metadata.jsonl, results.jsonl and failed.csv.

Rows are numbered as they settle, and the files grow in that order. The state remembers up to which number and
which length the files are known; the next start cuts them there and goes on, so a kill costs at most lines
that come back. If something written is no longer true (a row is asked for anew, its line moved), the mark is
taken back and the files are written anew, whole, beside the old ones.

failed.csv is made to be edited, so it is touched only when its rows are others than when it was written, and
a user's version of it is moved aside first.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from batchrun.manifest.write import RowWriter
from batchrun.model import LocalImage, State
from batchrun.outputs.disk import disk_errors
from batchrun.outputs.sidecars import JsonLines, Kinds, Record, metadata_record, results_record
from batchrun.progress import Fact, Progress
from batchrun.store.changes import mark_listed
from batchrun.store.folder import Folder
from batchrun.store.reading import Settled, read_settled
from batchrun.store.store import Store
from batchrun.tools.bind import Binder

#: How often lines are added.
EVERY_S = 1.0
#: Rows taken at once.
PAGE = 500


class Listing:
    """The sidecar files of one run."""

    def __init__(
        self, folder: Folder, store: Store, progress: Progress, binders: Callable[[str], Binder]
    ) -> None:
        self._folder = folder
        self._store = store
        self._progress = progress
        self._binders = binders
        self._tools: dict[int, Binder] = {}
        self._metadata = JsonLines(folder.metadata, scratch=folder.path / "partial")
        self._results = JsonLines(folder.results)
        self._kinds = Kinds()
        #: What a user's version of failed.csv was renamed to in this start; None: there was none.
        self.kept: str | None = None
        #: As the state has it.
        self._mark: dict[str, Any] = {}

    async def begin(self) -> None:
        """Open the files where they are known to be true, or write them anew."""
        await self._write_failed()  # rows asked for again are on their way
        mark = await self._store.listing_mark()
        known = bool(mark) and await anyio.to_thread.run_sync(self._open_at, mark)
        if known:
            self._mark = mark
            await self.catch_up()
        else:
            await self._rebuild()

    def _open_at(self, mark: dict[str, Any]) -> bool:
        self._kinds = Kinds(mark["kinds"])
        metadata, results = int(mark["metadata"]), int(mark["results"])
        whole = self._metadata.open_at(metadata) == metadata
        return self._results.open_at(results) == results and whole

    async def run(self) -> None:
        """Add lines as rows settle, until cancelled."""
        while True:
            await anyio.sleep(EVERY_S)
            await self.catch_up()

    async def catch_up(self) -> None:
        """Add the lines of every row settled since the last time."""
        told = await self._store.listing_mark() == self._mark
        if not (told and await anyio.to_thread.run_sync(self._are_intact)):
            await self._rebuild()
        while settled := await self._store.settled_after(self._mark["settled"], limit=PAGE):
            await self._know_tools(settled)
            is_true = await anyio.to_thread.run_sync(self._append, settled)
            if is_true:
                before, self._mark = self._mark, self._reached(settled[-1].number)
                is_true = await self._store.set_listing_mark(self._mark, instead_of=before)
            if not is_true:
                await self._rebuild()
            self._progress.announce(Fact.LISTED, rows=len(settled))

    def _are_intact(self) -> bool:
        return self._metadata.is_intact and self._results.is_intact

    def _append(self, settled: list[Settled]) -> bool:
        """Add the lines of these rows; False, and none is added, when they make lines above untrue."""
        metadata = [record for item in settled for record in self._images(item)]
        if self._kinds.learn(metadata):
            return False
        if metadata:
            self._metadata.append([self._kinds.fit(record) for record in metadata])
        self._results.append([self._result(item) for item in settled])
        self._sync()  # before the state knows of them: a power cut may tear what is not synced
        return True

    def _reached(self, settled: int) -> dict[str, Any]:
        mark = {
            "settled": settled,
            "metadata": self._metadata.length_bytes,
            "results": self._results.length_bytes,
            "kinds": self._kinds.to_json(),
        }
        copy: dict[str, Any] = json.loads(json.dumps(mark))  # what is known of kinds goes on changing
        return copy

    async def _rebuild(self) -> None:
        """Write both files anew from the state, in the thread that owns it."""
        for number in await self._store.tool_numbers():
            await self._know_tool(number)
        self._mark = await self._store.planning(self._rewrite)

    def _rewrite(self, connection: sqlite3.Connection) -> dict[str, Any]:
        last = 0
        self._kinds = Kinds()
        for item in _all_settled(connection):
            self._kinds.learn(self._images(item))
            last = item.number
        self._metadata.rewrite(
            self._kinds.fit(record) for item in _all_settled(connection) for record in self._images(item)
        )
        self._results.rewrite(self._result(item) for item in _all_settled(connection))
        mark = self._reached(last)
        mark_listed(connection, mark)
        return mark

    async def _know_tools(self, settled: list[Settled]) -> None:
        for item in settled:
            if item.row.tool:
                await self._know_tool(item.row.tool)

    async def _know_tool(self, number: int) -> None:
        if number not in self._tools:
            self._tools[number] = self._binders(await self._store.tool(number))

    def _images(self, item: Settled) -> list[Record]:
        row = item.row
        if row.state is not State.DONE:
            return []
        binder = self._tools[row.tool]
        files = {value.sha256: value.path for value in row.given.values() if isinstance(value, LocalImage)}
        parameters = binder.body(row.given, uploads=files, seed_key=row.key)
        seconds = row.attempt.seconds if row.attempt else None
        return [
            metadata_record(row, output, tool=binder.tool.slug, parameters=parameters, seconds=seconds)
            for output in row.outputs
        ]

    @staticmethod
    def _result(item: Settled) -> Record:
        return results_record(item.row, item.attempts)

    async def finish(self) -> int:
        """Bring the files up to date, durably, and write the rows that did not make it; returns how many."""
        await self.catch_up()
        await anyio.to_thread.run_sync(self._sync)
        return await self._write_failed()

    def close(self) -> None:
        """Close the files, as they are."""
        self._metadata.close()
        self._results.close()

    def _sync(self) -> None:
        self._metadata.sync()
        self._results.sync()

    async def _write_failed(self) -> int:
        form = await self._store.form()
        if not form:
            return 0
        tabular = form["format"] in ("csv", "tsv")
        path = self._folder.path / f"failed.{'csv' if tabular else 'jsonl'}"
        counts = (await self._store.counts()).by_state
        if not any(counts.get(state) for state in (State.FAILED, State.CANCELLED, State.INVALID)):
            await self._make_way(path, None)
            with disk_errors("remove", path):
                path.unlink(missing_ok=True)
            return 0
        writer = RowWriter(
            path,
            format=form["format"],
            columns=form["columns"],
            delimiter=form["delimiter"],
            bom=form.get("bom", False),
        )
        with disk_errors("write", path), writer as out:
            after_seq = 0
            while page := await self._store.rejected_rows(after_seq=after_seq, limit=PAGE):
                for rejected in page:
                    out.write(rejected.cells)
                after_seq = page[-1].seq
            if not await self._make_way(path, out.sha256 if out.count else None):
                out.discard()
        return out.count

    async def _make_way(self, path: Path, new: str | None) -> bool:
        """Whether `path` is to be written (None: removed); what the user made of it is moved aside then.

        `new` is the SHA-256 of what it is to hold; it is remembered first, so that a kill leaves no file of
        ours unknown.
        """
        prints = await self._store.failed_prints()
        with disk_errors("read", path):
            there = await anyio.to_thread.run_sync(_print_of, path)
        is_edited = there is not None and there not in prints
        if new is not None and (there == new or (is_edited and new in prints[-1:])):
            return False  # its rows are as they were
        if is_edited:
            with disk_errors("rename", path):
                self.kept = await anyio.to_thread.run_sync(_keep, path)
            self._progress.announce(
                Fact.NOTE, message=f"{path.name} was edited and its rows are others now: kept as {self.kept}"
            )
        if new is not None:
            await self._store.note_failed_prints([*prints[-1:], new])
        return True


def _print_of(path: Path) -> str | None:
    """The SHA-256 of a file; None when there is none."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _keep(path: Path) -> str:
    """Give a file the first free of its names for an edited version; returns it."""
    kept, number = path.with_name(f"{path.stem}.edited{path.suffix}"), 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.stem}.edited-{number}{path.suffix}")
    path.rename(kept)
    return kept.name


def _all_settled(connection: sqlite3.Connection) -> Iterator[Settled]:
    after = 0
    while page := read_settled(connection, after, limit=PAGE):
        yield from page
        after = page[-1].number
