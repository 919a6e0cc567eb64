"""Manifests → rows: streamed in constant memory, with true line numbers, from whatever real files hold.

Python's csv module (strict) parses CSV and its C scanner JSON; `text` cuts the lines, `tsv` and
`json_array` know their forms. What is wrong is a Problem among the rows, at its place. Where reading cannot
go on with certainty (encoding, NUL, header, a broken array, a row beyond the limit) the rows end and
`Manifest.complete` stays false. After a broken quote in CSV only further broken quotes are told and no more
rows: what follows may be the inside of a cell, and a row is bought.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from batchrun.errors import ManifestError, UsageError
from batchrun.manifest import json_text
from batchrun.manifest.json_array import JsonArray
from batchrun.manifest.text import Fault, Text, too_long
from batchrun.manifest.tsv import Lines, TsvRows, unquoted
from batchrun.model import Block, Problem, Severity, SourceRow

#: A row beyond this is a file gone wrong (a quote never closed): real prompts have 10,000 characters.
MAX_ROW_BYTES = 16 * 1024 * 1024
#: File name ending → format; each also with `.gz`.
ENDINGS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
FORMATS = ("csv", "tsv", "jsonl", "json")
#: Endings of files that are no text.
SPREADSHEETS = {".xlsx", ".xls", ".xlsm", ".ods", ".numbers"}

#: A column's name beyond this is no name: the first line is no header, or an object was put together wrong.
MAX_NAME_CHARS = 1000
#: The csv module counts a cell's characters in a C long, of 32 bits on some systems.
_MAX_CELL = 2**31 - 1
#: Where a file has more broken quotes than this, the rest says nothing new.
_MAX_BROKEN = 1000
#: Rows of a block at most, which also ends with the piece of text it came from; more were not quicker.
_BLOCK_ROWS = 500
#: Fewer objects of the same keys in a row are quicker one by one.
_FEWEST_ROWS = 8
_QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
_PADDED_QUOTE = re.compile(r'\s+"')


def open_manifest(
    source: Path | BinaryIO,
    *,
    name: str | None = None,
    format: str | None = None,
    delimiter: str | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Manifest:
    """The manifest at a path, or in a binary stream (standard input); a context manager, read with rows().

    `name` stands for the file in Problems (None: the path as given, or "-"). `format` (of FORMATS) goes
    before the name's ending; a stream has none and needs it. gzip is seen by its bytes. `delimiter` is one
    character (None: comma in csv, tab in tsv). Raises UsageError for these, ManifestError when the file
    cannot be opened.
    """
    shown = name or (str(source) if isinstance(source, Path) else "-")
    form = _format_of(source, shown, format)
    if delimiter is not None and form not in {"csv", "tsv"}:
        raise UsageError(f"{shown}: a delimiter is for csv and tsv, not for {form}; leave it out")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n\0'):
        raise UsageError(f'{shown}: the delimiter must be one character such as ";", not {delimiter!r}')
    if not isinstance(source, Path):
        return Manifest(source, shown, form, delimiter, max_row_bytes, owned=False)
    try:
        stream = cast(BinaryIO, source.open("rb", buffering=0))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ManifestError([Problem(f"cannot be read: {why}; check the path", shown)]) from None
    is_gzip = source.name.lower().endswith(".gz")
    return Manifest(stream, shown, form, delimiter, max_row_bytes, owned=True, must_be_gzip=is_gzip)


def _format_of(source: Path | BinaryIO, shown: str, format: str | None) -> str:
    forms = ", ".join(FORMATS)
    if format is not None:
        if format not in FORMATS:
            raise UsageError(f"{shown}: unknown format {format!r}; write one of {forms}")
        return format
    if not isinstance(source, Path):
        raise UsageError(f"{shown}: standard input needs its format; write --format with one of {forms}")
    ending = Path(source.name.lower().removesuffix(".gz")).suffix
    if ending not in ENDINGS:
        if source.is_dir():
            raise UsageError(f"{shown}: is a folder; write the path of a manifest in it")
        if ending in SPREADSHEETS:
            raise UsageError(
                f"{shown}: is a spreadsheet; export it as CSV UTF-8 (in Excel: Save As) and name that"
            )
        said = f'the ending "{ending}"' if ending else "a name without ending"
        raise UsageError(f"{shown}: {said} does not tell the format; write --format with one of {forms}")
    return ENDINGS[ending]


class _Gathering:
    """Rows of the same columns on their way to a block, which ends with the piece of text they came from."""

    def __init__(self, text: Text, columns: Sequence[str] = (), *, is_table: bool = True) -> None:
        self.columns = columns
        self._text = text
        self._is_table = is_table
        self._block = Block(columns, is_table=is_table)
        self._lines = self._block.lines
        self._pieces = text.pieces

    def add(self, line: int, cells: list[Any]) -> bool:
        """Take a row; whether the block is to be taken now."""
        self._lines.append(line)
        self._block.cells.append(cells)
        return len(self._lines) >= _BLOCK_ROWS or self._pieces != self._text.pieces

    def taken(self) -> Iterator[Block | SourceRow]:
        """The rows gathered so far: as a block, or one by one where they are few."""
        block, self._block = self._block, Block(self.columns, is_table=self._is_table)
        self._lines = self._block.lines
        self._pieces = self._text.pieces
        if (self._is_table and block.lines) or len(block.lines) >= _FEWEST_ROWS:
            yield block
        else:
            yield from block.rows()


class Manifest:
    """An open manifest; read it once, with rows()."""

    def __init__(
        self,
        stream: BinaryIO,
        name: str,
        format: str,
        delimiter: str | None,
        max_row_bytes: int,
        *,
        owned: bool,
        must_be_gzip: bool = False,
    ) -> None:
        self.name = name
        #: One of FORMATS.
        self.format = format
        #: One character; None for jsonl and json.
        self.delimiter = delimiter or {"csv": ",", "tsv": "\t"}.get(format)
        #: The header's names in order, "" for an unnamed one; None for jsonl and json, and until it is read.
        self.columns: list[str] | None = None
        #: Whether rows() came to the end: every row of the file was yielded, or has its Problem.
        self.complete = False
        self._delimiter_was_given = delimiter is not None
        self._max_row_bytes = max_row_bytes
        self._stream = stream
        self._owned = owned
        self._text = Text(stream, max_row_bytes, must_be_gzip=must_be_gzip)
        self._broken_quotes = 0

    @property
    def blank_is_default(self) -> bool:
        """Whether empty text means "not given": in csv and tsv. In JSON an empty text is meant as it is."""
        return self.format in {"csv", "tsv"}

    @property
    def has_bom(self) -> bool:
        """Whether the file began with a byte order mark; known once it has been read."""
        return self._text.has_bom

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a stream that was handed in stays open."""
        if self._owned:
            self._stream.close()

    def rows(self) -> Iterator[SourceRow | Problem]:
        """As `blocks`, row by row."""
        for item in self.blocks():
            if isinstance(item, Block):
                yield from item.rows()
            else:
                yield item

    def blocks(self) -> Iterator[Block | SourceRow | Problem]:
        """The rows in the file's order, and a Problem where one is wrong (a warning comes before its row).

        Rows of csv and tsv that have a cell for every column come in blocks: what is the same in all of them
        is then done once.

        CSV cells are text as it is, absent when empty or all white space; JSON cells are JSON values with
        floats as Decimal and null as None. Unnamed columns and lines of nothing but white space are left
        out.
        """
        read = {"csv": self._csv, "tsv": self._tsv, "jsonl": self._jsonl, "json": self._json}[self.format]
        seen = False
        try:
            for item in read():
                seen = True
                yield item
            if not seen:
                what = "a header but no rows" if self.columns else "no rows"
                raise Fault(f"the manifest has {what}; write at least one")
            self.complete = not self._broken_quotes
        except Fault as fault:
            yield self._problem(str(fault), fault.line)
        except zlib.error as error:
            yield self._problem(f"the gzip data is damaged ({error}); fetch or compress the file again")
        except OSError as error:
            yield self._problem(f"cannot be read: {error.strerror or error}; check the file")

    def _problem(self, message: str, line: int = 0, severity: Severity = Severity.ERROR) -> Problem:
        return Problem(message, self.name, line, "", severity)

    # --- csv and tsv -----------------------------------------------------------------------------

    def _csv(self) -> Iterator[Block | SourceRow | Problem]:
        assert self.delimiter is not None
        # The limit is the process's, not the reader's; our own (max_row_bytes) is met before it.
        csv.field_size_limit(_MAX_CELL)
        text = self._text
        reader = csv.reader(text.lines(), delimiter=self.delimiter, strict=True)
        columns: list[str] = []
        block = _Gathering(text)
        width = done = 0
        while True:
            try:
                for row in reader:
                    line, done = done + 1, reader.line_num
                    text.row_line = done + 1
                    if not columns:
                        columns = self._header(row, line)
                        width = len(columns)
                        block = _Gathering(text, columns)
                        continue
                    if self._broken_quotes:
                        continue
                    if done > line and sum(map(len, row)) > self._max_row_bytes:
                        raise too_long(self._max_row_bytes, line)
                    if len(row) == width > 1 and not block.add(line, row):
                        continue
                    yield from block.taken()
                    if len(row) != width or width == 1:
                        yield from self._by_itself(line, row, columns)
                yield from block.taken()
                return
            except csv.Error as error:
                yield from block.taken()
                begin, done = done + 1, reader.line_num
                if problem := self._quote_problem(str(error), begin, done):
                    yield problem
                text.row_line = done + 1
                if not columns:
                    return
            except Fault:
                yield from block.taken()
                raise

    def _tsv(self) -> Iterator[Block | SourceRow | Problem]:
        assert self.delimiter is not None
        text = self._text
        lines = Lines(text.lines())
        rows = TsvRows(lines, self.delimiter, self._max_row_bytes)
        columns: list[str] = []
        block = _Gathering(text)
        try:
            for line in lines:
                begin = text.row_line = lines.number
                body = line.rstrip("\r\n")
                if not columns:
                    if "\r" in body:
                        raise Fault(
                            "carriage returns without line feeds; save the file with line feeds", begin
                        )
                    columns = self._header([unquoted(cell) for cell in body.split(self.delimiter)], begin)
                    block = _Gathering(text, columns)
                elif body:
                    row = rows.split(line, len(columns))
                    if len(row) == len(columns) > 1 and not block.add(begin, row):
                        continue
                    yield from block.taken()
                    if len(row) != len(columns) or len(columns) == 1:
                        yield from self._by_itself(begin, row, columns)
        except Fault:
            yield from block.taken()
            raise
        yield from block.taken()

    def _by_itself(
        self, line: int, row: Sequence[str], columns: Sequence[str]
    ) -> Iterator[SourceRow | Problem]:
        cells = {n: cell for n, cell in zip(columns, row) if n and cell and not cell.isspace()}
        if cells and len(row) == len(columns):
            yield SourceRow(line, cells)
        else:
            yield from self._uneven(line, row, cells, columns)

    def _header(self, cells: Sequence[str], line: int) -> list[str]:
        """The columns that the header names; none for a blank line, which is no header. Raises Fault."""
        names = [cell.strip() for cell in cells]
        if not any(names):
            if len(names) > 1:
                raise Fault("the header names no column; write the parameters' names in the first line", line)
            return []
        first: dict[str, int] = {}
        for at, name in enumerate(names, 1):
            if len(name) > MAX_NAME_CHARS:
                raise Fault(
                    f"column {at} has a name of {len(name):,} characters; is this line a header?", line
                )
            if name and (before := first.setdefault(name, at)) != at:
                which = json_text.shown(name)
                raise Fault(f"{which} names both column {before} and column {at}; rename one of them", line)
        other = next((mark for mark in ";\t," if mark in names[0] and mark != self.delimiter), None)
        if len(names) == 1 and other and not self._delimiter_was_given:
            own, other = ("tab" if mark == "\t" else mark for mark in (self.delimiter, other))
            cure = f'if "{other}" parts its cells write --delimiter "{other}", else --delimiter "{own}"'
            raise Fault(f"the header is one single column, {json_text.shown(names[0])}; {cure}", line)
        self.columns = names
        return names

    def _uneven(
        self, line: int, row: Sequence[str], cells: dict[str, str], columns: Sequence[str]
    ) -> Iterator[SourceRow | Problem]:
        """A row that is empty, or has not the header's number of cells."""
        if not cells and (not row or (len(row) == 1 and row[0])):
            return  # a blank line; `""` by itself is a row with an empty cell
        if len(row) > len(columns):
            if any(map(_PADDED_QUOTE.match, row)):
                cure = "a quote counts only at the very start of a cell: take out the space before it"
            else:
                cure = "put a cell that holds the delimiter in quotes, or name the further columns"
            yield self._problem(f"{len(row)} cells for {len(columns)} columns; {cure}", line)
            return
        if len(row) < len(columns):
            missing = [name for name in columns[len(row) :] if name]
            some = ", ".join(json_text.shown(name)[1:-1] for name in missing[:3]) + (
                ", ..." if len(missing) > 3 else ""
            )
            cells_given = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            told = f"{cells_given} for {len(columns)} columns; empty: {some or 'unnamed columns'}"
            yield self._problem(told, line, Severity.WARNING)
        yield SourceRow(line, cells)

    def _quote_problem(self, said: str, begin: int, end: int) -> Problem | None:
        """What broke the row on lines `begin` to `end`; None when it only follows from an earlier break."""
        assert self.delimiter is not None
        self._broken_quotes += 1
        if self._broken_quotes > _MAX_BROKEN:
            raise Fault(f"more than {_MAX_BROKEN:,} rows have broken quotes; the rest was not read", begin)
        place = _broken_quote(self._text.since(begin), self.delimiter)
        if place is None:
            if "new-line" in said:
                said = "a carriage return without line feed; save the file with line feeds (LF or CRLF)"
            return self._problem(said, begin)
        lines_before, cell, is_closed = place
        line = begin + lines_before
        if not is_closed:
            told = f"the quote that opens cell {cell} is never closed; close it"
            return self._problem(told, line) if self._broken_quotes == 1 else None
        there = f" on line {end}" if end != line else ""
        told = f'text follows the quote that closes cell {cell}{there}; inside quotes write a quote twice: ""'
        return self._problem(told, line)

    # --- jsonl and json --------------------------------------------------------------------------

    def _jsonl(self) -> Iterator[Block | SourceRow | Problem]:
        return self._objects(self._values_by_line())

    def _json(self) -> Iterator[Block | SourceRow | Problem]:
        return self._objects(JsonArray(self._text.characters(), self._max_row_bytes).elements())

    def _values_by_line(self) -> Iterator[tuple[int, Any]]:
        """The value on each line, or the Problem with it."""
        decode = json_text.decode
        text = self._text
        for number, line in enumerate(text.lines(), 1):
            text.row_line = number + 1
            body = line.strip(" \t\r\n")
            if not body:
                continue
            try:
                value, end = decode(body)
                if end != len(body):
                    raise json.JSONDecodeError("text follows the value", body, end)
            except json.JSONDecodeError as error:
                column = error.pos + len(line) - len(line.lstrip(" \t\r\n")) + 1
                advice = ""
                if body in {"{", "["} or body.startswith("[{"):
                    advice = (
                        "; every object must have one line of its own, or write --format json for an array"
                    )
                yield number, self._problem(f"not JSON: {error.msg} (column {column}){advice}", number)
            except json_text.JsonFault as error:
                yield number, self._problem(str(error), number)
            else:
                yield number, value

    def _objects(self, values: Iterator[tuple[int, Any]]) -> Iterator[Block | SourceRow | Problem]:
        """Rows that are objects, together while they have the same keys in the same order."""
        block = _Gathering(self._text, is_table=False)
        columns: list[str] = []
        try:
            for line, value in values:
                if type(value) is dict:
                    names = [*value]
                    if names != columns or not names:
                        yield from block.taken()
                        if max(map(len, names), default=MAX_NAME_CHARS + 1) > MAX_NAME_CHARS:
                            yield self._object(line, value)
                            continue
                        columns = names
                        block = _Gathering(self._text, columns, is_table=False)
                    if block.add(line, [*value.values()]):
                        yield from block.taken()
                else:
                    yield from block.taken()
                    yield value if isinstance(value, Problem) else self._object(line, value)
        except Fault:
            yield from block.taken()
            raise
        yield from block.taken()

    def _object(self, line: int, value: Any) -> SourceRow | Problem:
        if isinstance(value, dict):
            longest = max(map(len, value), default=0)
            if longest <= MAX_NAME_CHARS:
                return SourceRow(line, value)
            return self._problem(f"a key has {longest:,} characters; write a parameter's name", line)
        cure = 'write an object, as in {"prompt": "a cat"}'
        if isinstance(value, list) and self.format == "jsonl":
            cure += ", or --format json if the file is one array"
        return self._problem(f"the row is {json_text.kind(value)}; {cure}", line)


def _broken_quote(text: str, delimiter: str) -> tuple[int, int, bool] | None:
    """The first cell, of the row that `text` begins with, that a quote opens and none closes; None: no cell.

    (lines before the cell, its number from 1, whether there is a closing quote, but with text behind it)
    """
    plain = re.compile(f"[^{re.escape(delimiter)}\n]*+")
    at, cell = 0, 1
    while True:
        opened = text.startswith('"', at)
        match = (_QUOTED if opened else plain).match(text, at)
        after = text[match.end() : match.end() + 1] if match else ""
        if match is None or (opened and after not in {"", "\r", "\n", delimiter}):
            return text.count("\n", 0, at), cell, match is not None
        if after != delimiter:
            return None
        at, cell = match.end() + 1, cell + 1
