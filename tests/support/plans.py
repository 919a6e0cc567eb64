"""Manifests read into a run as every start reads them, and rows bought in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from batchrun.manifest.job import job_for
from batchrun.model import Problem, Row, State
from batchrun.plan.plan import plan
from batchrun.plan.reading import Reading
from batchrun.store.planning import Merged, Planning
from batchrun.store.reading import read_cells, read_json
from batchrun.store.store import Store
from batchrun.tools.catalog import Catalog, load
from tests.support.rows import begin, to_done

T = TypeVar("T")

TOOL = "Retro-Cartoons"


class Plans:
    """A run folder whose manifest is written and read again and again."""

    def __init__(self, folder: Path, *, tool: str | None = TOOL) -> None:
        self.folder = folder
        self.tool = tool
        self.catalog: Catalog = load(folder / "no tools")
        self.reading: Reading
        self._runner = asyncio.Runner()
        self.store = self.do(begin(Store.open(folder / "state.sqlite3")))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.close()
        self._runner.close()

    def do(self, verb: Coroutine[Any, Any, T]) -> T:
        """What the verb returns."""
        return self._runner.run(verb)

    def read(self, text: str | None, *, name: str = "list.csv", **settings: Any) -> Merged | None:
        """Write the manifest (None: it is there) and read it into the run; None when it is not right."""
        path = self.folder / name
        if text is not None:
            path.write_text(text, encoding="utf-8")
        job = job_for(path, **{"tool": self.tool, "out": self.folder, **settings})

        def work(connection: Any) -> tuple[Reading, Merged | None]:
            return plan(job, self.catalog, Planning(connection), stamp="now", checkpoint=lambda: None)

        self.do(self.store.end_lease(1.0))  # every reading is at the beginning of a start
        self.do(begin(self.store))
        self.reading, merged = self.do(self.store.planning(work))
        return merged

    def take(self, text: str | None, **settings: Any) -> Merged:
        """As `read`, of a manifest that is right."""
        merged = self.read(text, **settings)
        assert merged is not None, self.reading.findings.errors
        return merged

    def refuse(self, text: str, **settings: Any) -> list[str]:
        """What is wrong with the manifest, as the user reads it without the file's name."""
        assert self.read(text, **settings) is None
        return [str(problem).partition("list.")[2] for problem in self.reading.findings.errors]

    @property
    def hints(self) -> list[Problem]:
        """What the last reading hinted at."""
        return self.reading.findings.hints

    def buy(self, *seqs: int) -> None:
        """Bring planned rows to done: these, or all."""
        for row in self.do(self.store.claim(State.PLANNED, limit=10_000)):
            if not seqs or row.seq in seqs:
                self.do(to_done(self.store, row.seq))
        self.do(self.store.end_lease(1.0))
        self.do(begin(self.store))

    def rows(self, *, present: bool = True) -> list[Row]:
        """The manifest's rows, by line; with `present` false those that it has no more."""
        query = f"SELECT seq FROM rows WHERE present = {int(present)} ORDER BY line, seq"
        seqs = self.do(self.store.planning(lambda connection: connection.execute(query).fetchall()))
        return [self.do(self.store.row(seq)) for (seq,) in seqs]

    def states(self) -> list[str]:
        """The states of the manifest's rows, by line."""
        return [str(row.state) for row in self.rows()]

    def sources(self) -> list[Mapping[str, Any]]:
        """The manifest's rows as it had them."""
        query = "SELECT seq FROM rows WHERE present = 1 ORDER BY line, seq"

        def work(connection: Any) -> list[Mapping[str, Any]]:
            columns = read_json(connection, "form").get("columns")
            return [read_cells(connection, seq, columns) for (seq,) in connection.execute(query).fetchall()]

        return self.do(self.store.planning(work))

    def stamp(self) -> str | None:
        """What tells an unchanged manifest at the next start; "" when it is to be read again."""
        return self.do(self.store.stamp())


def csv(header: str, *rows: str) -> str:
    """A CSV manifest."""
    return "\n".join((header, *rows)) + "\n"


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSONL manifest."""
    return "".join(json.dumps(row) + "\n" for row in rows)
