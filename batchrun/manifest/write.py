"""Rows → a file (failed.csv, failed.jsonl) that the reader reads back as the very same cells.

Rows of a TSV manifest are written as CSV, which can hold every cell; TSV cannot (see `tsv`). Cells that a
spreadsheet would take for a formula (`=cmd()`) stand as they are: they are the user's own, nothing the
service said is among them, and a prompt with a quote put before it would be another row, to be paid for anew.
The file appears whole or not at all: it is written beside its place, synced, and renamed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchrun.manifest import json_text
from batchrun.model import Cell


class RowWriter:
    """Writes rows to `path`; a context manager. Where no row was written, or on an error, there is no file.

    `format`, `columns` and `bom` (a byte order mark at the beginning, as Excel wants one) are the manifest's;
    `delimiter` matters to csv alone. Raises OSError.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: str,
        columns: Sequence[str] | None = None,
        delimiter: str | None = None,
        bom: bool = False,
    ) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._columns = columns
        self._delimiter = delimiter or "," if format == "csv" else ","
        self._is_csv = format in {"csv", "tsv"}
        if self._is_csv and not any(columns or ()):
            raise ValueError("rows of csv and tsv need the names of their columns")
        self._must_quote = re.compile(rf'["\r\n{re.escape(self._delimiter)}]|\A\s|\s\Z')
        self._bom = "\ufeff" if bom else ""
        self._hash = sha256()
        self._is_wanted = True
        #: How many rows were written.
        self.count = 0

    @property
    def sha256(self) -> str:
        """The hash (hex) of all that was written."""
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Leave what lies at the path alone after all."""
        self._is_wanted = False

    def __enter__(self) -> Self:
        # Line ends are written as given: text mode would make CRLF of them on some systems.
        self._file = self._partial.open("w", encoding="utf-8", newline="")
        header = self._line(self._columns) if self._is_csv and self._columns else ""
        self._put(self._bom + header)
        return self

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._hash.update(text.encode("utf-8", "surrogatepass"))

    def write(self, cells: Mapping[str, Cell]) -> None:
        """Add a row with the cells as read; absent ones stay absent. ValueError: a cell has no column."""
        if not self._is_csv:
            self._put(json_text.encode(dict(cells)) + "\n")
        else:
            assert self._columns is not None
            if unknown := [name for name in cells if not name or name not in self._columns]:
                raise ValueError(f"no column is named {unknown[0]!r}")
            self._put(self._line([cells.get(name) if name else None for name in self._columns]))
        self.count += 1

    def _line(self, cells: Sequence[Any]) -> str:
        texts = [
            "" if cell is None else cell if isinstance(cell, str) else json_text.encode(cell)
            for cell in cells
        ]
        if texts == [""]:
            return '""\n'  # an empty line would be no row
        return self._delimiter.join(map(self._quoted, texts)) + "\n"

    def _quoted(self, text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if self._must_quote.search(text) else text

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is not None or not self._is_wanted:
                return
            if self.count:
                os.replace(self._partial, self._path)
            else:
                self._path.unlink(missing_ok=True)  # failures of an earlier time are failures no more
        finally:
            self._partial.unlink(missing_ok=True)
