"""Keeping the sidecar files true while the run goes on: metadata.jsonl, results.jsonl and failed.csv.

Rows are numbered as they settle, and the files grow in that order. The state remembers up to which number and
which length the files are known; the next start cuts them there and goes on, so a kill costs at most lines
that come back. If something written is no longer true (a row is asked for anew, its line moved), the mark is
taken back and the files are written anew, whole, beside the old ones.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread

from batchrun.manifest.write import RowWriter
from batchrun.model import LocalImage, State
from batchrun.outputs.sidecars import JsonLines, Kinds, Record, metadata_record, results_record
from batchrun.progress import Fact, Progress
from batchrun.store.changes import mark_listed
from batchrun.store.folder import Folder
from batchrun.store.store import Settled, Store, read_settled
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
        if await self._store.listing_mark() != self._mark:
            await self._rebuild()
        while settled := await self._store.settled_after(self._mark["settled"], limit=PAGE):
            await self._know_tools(settled)
            metadata = [record for item in settled for record in self._images(item)]
            is_true = not self._kinds.learn(metadata)
            if is_true:
                await anyio.to_thread.run_sync(
                    self._append, metadata, [self._result(item) for item in settled]
                )
                before, self._mark = self._mark, self._reached(settled[-1].number)
                is_true = await self._store.set_listing_mark(self._mark, instead_of=before)
            if not is_true:
                await self._rebuild()
            self._progress.announce(Fact.LISTED, rows=len(settled))

    def _append(self, metadata: list[Record], results: list[Record]) -> None:
        if metadata:
            self._metadata.append([self._kinds.fit(record) for record in metadata])
        self._results.append(results)

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
        await anyio.to_thread.run_sync(self._close)
        return await self._write_failed()

    def _close(self) -> None:
        for file in (self._metadata, self._results):
            file.sync()
            file.close()

    async def _write_failed(self) -> int:
        form = await self._store.form()
        if not form:
            return 0
        tabular = form["format"] in ("csv", "tsv")
        path = self._folder.path / f"failed.{'csv' if tabular else 'jsonl'}"
        counts = (await self._store.counts()).by_state
        if not any(counts.get(state) for state in (State.FAILED, State.CANCELLED, State.INVALID)):
            await anyio.Path(path).unlink(missing_ok=True)
            return 0
        with RowWriter(
            path, format=form["format"], columns=form["columns"], delimiter=form["delimiter"]
        ) as out:
            after_seq = 0
            while page := await self._store.rejected_rows(after_seq=after_seq, limit=PAGE):
                for rejected in page:
                    out.write(rejected.cells)
                after_seq = page[-1].seq
        return out.count


def _all_settled(connection: sqlite3.Connection) -> Iterator[Settled]:
    after = 0
    while page := read_settled(connection, after, limit=PAGE):
        yield from page
        after = page[-1].number
