"""Manifests hold any cells: what is written is read back, on its true line, and no bytes break the reader."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import UsageError
from batchrun.manifest import json_text
from batchrun.manifest.expand import Axis, Expansion, parse_values
from batchrun.manifest.job import Job
from batchrun.manifest.read import FORMATS, open_manifest
from batchrun.manifest.write import RowWriter
from batchrun.model import Problem, Severity, SourceRow

#: Any text that can be stored and sent, with what trips readers well represented.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ['"', '""', ",", ";", "\t", "\n", "\r", "\r\n", " ", "\u2028", "\u0085", "\ufeff", "{", "\\"]
        ),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3),
    ),
    max_size=6,
).map("".join)
names = texts.map(str.strip).filter(lambda name: name and not name.startswith("\ufeff"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.decimals(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    columns = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    row = st.lists(texts, min_size=len(columns), max_size=len(columns))
    return columns, draw(st.lists(row, min_size=1, max_size=8))


class Drip(io.RawIOBase):
    """A stream that gives a few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data = io.BytesIO(data)
        self._most = most

    def read(self, size: int = -1) -> bytes:
        return self._data.read(self._most)


def read(data: bytes, form: str, *, drip: int = 0, **options: Any) -> tuple[list[SourceRow | Problem], bool]:
    stream: Any = Drip(data, drip) if drip else io.BytesIO(data)
    with open_manifest(stream, format=form, **options) as manifest:
        return list(manifest.rows()), manifest.complete


def cells_of(columns: list[str], row: list[str]) -> dict[str, str]:
    return {name: cell for name, cell in zip(columns, row, strict=True) if cell and not cell.isspace()}


@given(tables(), st.sampled_from(",;\t|"), st.lists(st.integers(0, 2), min_size=9, max_size=9))
def test_csv_is_read_as_it_was_written_on_its_true_lines(
    table: Any, delimiter: str, blanks: list[int]
) -> None:
    columns, table_rows = table
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    expected = []
    writer.writerow(columns)
    for row, blank_lines in zip(table_rows, blanks, strict=False):
        text.write("\n" * blank_lines)
        expected.append(SourceRow(text.getvalue().count("\n") + 1, cells_of(columns, row)))
        writer.writerow(row)
    if len(columns) == 1:  # a line of white space alone is no row
        expected = [item for item, (cell,) in zip(expected, table_rows, strict=True) if not cell.isspace()]
    items, complete = read(text.getvalue().encode(), "csv", delimiter=delimiter)
    if expected:
        assert (items, complete) == (expected, True)
    else:
        assert "no rows" in str(items[0])


@given(tables())
def test_tsv_rows_of_plain_cells_are_literal_whatever_their_quotes(table: Any) -> None:
    def plain(cell: str) -> str:
        return re.sub(r"[\t\r\n]", "_", cell)

    columns, table_rows = table
    columns = [f"{plain(name)}{n}" for n, name in enumerate(columns)]
    columns = [name if not name.startswith('"') else "x" + name for name in columns] + ["last"]
    table_rows = [[*map(plain, row), "end"] for row in table_rows]
    text = "".join("\t".join(row) + "\n" for row in [columns, *table_rows])
    whole = re.compile(r'"((?:[^"]|"")*)"')

    def literal(cell: str) -> str:
        match = whole.fullmatch(cell)
        return match[1].replace('""', '"') if match else cell

    expected = [
        SourceRow(line, cells_of(columns, list(map(literal, row)))) for line, row in enumerate(table_rows, 2)
    ]
    assert read(text.encode(), "tsv") == (expected, True)


@given(st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=5), st.booleans())
def test_jsonl_is_read_as_it_was_written(objects: list[dict[str, Any]], ascii_only: bool) -> None:
    text = "\n\n".join(json_text.encode(value, ascii_only=ascii_only) for value in objects)
    items, complete = read(text.encode(), "jsonl")
    assert complete
    assert repr(items) == repr([SourceRow(line * 2 + 1, value) for line, value in enumerate(objects)])


@given(
    st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["", " ", "\n", "\r\n\t"]),
    st.integers(0, 5),
)
def test_a_json_array_is_read_as_it_was_written(objects: list[dict[str, Any]], space: str, drip: int) -> None:
    text, expected = f"{space}[", []
    for n, value in enumerate(objects):
        text += f"{space},{space}" if n else space
        expected.append(SourceRow(text.count("\n") + 1, value))
        text += json_text.encode(value)
    items, complete = read(f"{text}{space}]{space}".encode(), "json", drip=drip)
    assert complete
    assert repr(items) == repr(expected)


@given(tables(), st.sampled_from(["csv", "tsv"]), st.sampled_from(",;|"))
def test_failed_rows_of_csv_come_back_as_they_were(table: Any, form: str, delimiter: str) -> None:
    columns, table_rows = table
    rows = [cells_of(columns, row) for row in table_rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "failed.csv")
        with RowWriter(path, format=form, columns=columns, delimiter=delimiter) as writer:
            for row in rows:
                writer.write(row)
        with open_manifest(path, delimiter=delimiter if form == "csv" else ",") as manifest:
            items = list(manifest.rows())
    assert manifest.columns == columns
    assert [item.cells for item in items if isinstance(item, SourceRow)] == rows
    assert len(items) == len(rows)


@given(st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=5))
def test_failed_rows_of_jsonl_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "failed.jsonl")
        with RowWriter(path, format="json") as writer:
            for row in rows:
                writer.write(row)
        with open_manifest(path) as manifest:
            items = list(manifest.rows())
    assert repr([item.cells for item in items if isinstance(item, SourceRow)]) == repr(rows)


#: Pieces of all four formats, sound and broken.
pieces = st.sampled_from(
    [
        *(
            b"a",
            b"b,",
            b"a\tb\t",
            b'"',
            b'""',
            b",",
            b";",
            b"\t",
            b"\n",
            b"\r\n",
            b"\r",
            b"\0",
            b" ",
            b"x" * 30,
        ),
        *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xe2\x80", b"\xc3", b"\xf0\x9f\x98\x80"),
        *(
            b"{",
            b"}",
            b"[",
            b"]",
            b'{"a": 1}',
            b'{"a": "',
            b'"b": [1.50, null]',
            b":",
            b"tru",
            b"1e9",
            b"NaN",
        ),
        *(b"\\", b"\\ud83d", b"\\u0000"),
    ]
)
blobs = st.one_of(
    st.binary(max_size=60),
    st.lists(pieces, max_size=30).map(b"".join),
    st.lists(
        st.sampled_from([b"a\tb\n", b'x\t"y\n', b'y"\tz\n', b'"z\n', b'"\t"\n', b"\n", b'w""\t"v"\n']),
        max_size=12,
    ).map(b"".join),
    st.lists(st.sampled_from([b'{"a": 1}', b",", b"[", b"]", b"\n", b" ", b"5", b"{"]), max_size=12).map(
        b"".join
    ),
)


@settings(max_examples=400)
@given(blobs, st.sampled_from(FORMATS), st.sampled_from([1, 2, 3, 7]))
def test_no_bytes_break_the_reader(data: bytes, form: str, drip: int) -> None:
    """Rows come in order; what is not read to its end has an error; how the bytes arrive changes nothing."""
    items, complete = read(data, form)
    lines = [item.line for item in items if isinstance(item, SourceRow)]
    assert lines == sorted(set(lines)) or form == "json"
    assert all(1 <= line <= data.count(b"\n") + 1 for line in lines)
    problems = [item for item in items if isinstance(item, Problem)]
    assert all(0 <= problem.line <= data.count(b"\n") + 1 and problem.file == "-" for problem in problems)
    assert complete or any(problem.severity is Severity.ERROR for problem in problems)
    dripped, was_complete = read(data, form, drip=drip)
    assert was_complete == complete
    if form == "json" and not complete:  # a broken array may be told for another of its faults
        items, dripped = (
            [item for item in these if isinstance(item, SourceRow)] for these in (items, dripped)
        )
        dripped = dripped[: len(items)]
    assert dripped == items


@settings(max_examples=200)
@given(blobs, st.sampled_from(FORMATS), st.integers(1, 20), st.integers(0, 5))
def test_no_limit_breaks_the_reader(data: bytes, form: str, limit: int, drip: int) -> None:
    items, complete = read(data, form, drip=drip, max_row_bytes=limit)
    assert complete or any(isinstance(item, Problem) for item in items)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=3),
    st.integers(0, 80),
    st.sampled_from(FORMATS),
)
def test_no_damage_to_gzip_breaks_the_reader(damage: list[tuple[int, int]], cut: int, form: str) -> None:
    packed = bytearray(gzip.compress(b'[{"a": 1},\n{"a": "2"}]\n' * 3, mtime=0))
    for place, byte in damage:
        packed[place % len(packed)] = byte
    read(bytes(packed[: len(packed) - cut]), form)


@given(values)
def test_json_text_comes_back_exactly(value: Any) -> None:
    text = json_text.encode(value)
    assert repr(json_text.decode(text)) == repr((value, len(text)))
    json.loads(text)  # and it is JSON to others


#: What `--set` can name.
settable = names.filter(lambda name: name not in {"id", "tool"})


@given(st.dictionaries(settable, values, max_size=3), st.sampled_from([1, 7, "auto"]), texts.filter(bool))
def test_a_job_comes_back_from_its_record(given_set: dict[str, Any], concurrency: Any, tool: str) -> None:
    job = Job(manifest="m.csv", set=given_set, concurrency=concurrency, tool=tool)
    assert repr(Job.from_json(job.to_json())) == repr(job)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.integers(1, 10**9))
def test_a_range_runs_from_its_first_value_towards_its_last(first: int, last: int, step: int) -> None:
    axis = Axis("x", parse_values(f"{first}..{last}..{step}"))
    assert axis.size == len(axis.values) == abs(last - first) // step + 1
    assert axis.values[0] == first
    assert abs(last - axis.values[-1]) < step


@given(texts)
def test_any_text_is_an_axis_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert Axis("x", parse_values(text)).size >= 1


@given(st.lists(st.integers(1, 4), max_size=4), st.integers(1, 3))
def test_an_expansion_has_as_many_requests_as_it_says_each_under_its_number(
    sizes: list[int], repeat: int
) -> None:
    expansion = Expansion(tuple(Axis(f"a{n}", range(size)) for n, size in enumerate(sizes)), repeat)
    made = list(expansion)
    assert [n for n, _ in made] == list(range(1, expansion.size + 1))
    once = [tuple(overlay.values()) for _, overlay in islice(made, expansion.size // repeat)]
    assert once == sorted(set(once))
    assert [tuple(overlay.values()) for _, overlay in made] == once * repeat


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_lines_of_a_large_file_are_true(form: str) -> None:
    """Across many blocks, with cells that span lines."""
    if form == "csv":
        data = "n,text\n" + "".join(f'{n},"{"x" * (n % 90)}\n\u2028{n}"\n' for n in range(30_000))
        lines = [2 + 2 * n for n in range(30_000)]
    else:
        data = "".join(f'{{"n": "{n}", "text": "{"x" * (n % 90)}"}}\n\n' for n in range(30_000))
        lines = [1 + 2 * n for n in range(30_000)]
    items, complete = read(data.encode(), form)
    assert complete
    assert [item.line for item in items] == lines
    assert [item.cells["n"] for item in items if isinstance(item, SourceRow)] == [
        str(n) for n in range(30_000)
    ]
