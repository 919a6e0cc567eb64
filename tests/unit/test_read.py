"""Reading manifests: what real files hold, where rows begin, and what is answered when they are wrong."""

from __future__ import annotations

import gzip
import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import ManifestError, UsageError
from batchrun.manifest.read import Manifest, open_manifest
from batchrun.manifest.write import RowWriter
from batchrun.model import Problem, Severity, SourceRow


def opened(data: str | bytes, form: str = "csv", **options: Any) -> Manifest:
    raw = data.encode() if isinstance(data, str) else data
    return open_manifest(io.BytesIO(raw), format=form, name="m", **options)


def rows(data: str | bytes, form: str = "csv", **options: Any) -> list[tuple[int, Any]]:
    """(line, cells) of a file in which nothing is wrong."""
    with opened(data, form, **options) as manifest:
        items = list(manifest.rows())
    assert manifest.complete
    assert all(isinstance(item, SourceRow) for item in items), items
    return [(item.line, dict(item.cells)) for item in items]


def told(data: str | bytes, form: str = "csv", **options: Any) -> list[str]:
    """The rows' lines as numbers and the problems as text, in order."""
    with opened(data, form, **options) as manifest:
        return [str(item.line) if isinstance(item, SourceRow) else str(item) for item in manifest.rows()]


def fatal(data: str | bytes, form: str = "csv", **options: Any) -> str:
    """The one problem of a file that cannot be read to its end."""
    with opened(data, form, **options) as manifest:
        problems = [item for item in manifest.rows() if isinstance(item, Problem)]
    assert not manifest.complete
    assert len(problems) == 1
    assert problems[0].severity is Severity.ERROR
    return str(problems[0])


# --- csv -------------------------------------------------------------------------------------------


def test_csv_cells_are_text_by_column_with_the_line_on_which_their_row_begins() -> None:
    assert rows('id,prompt\n007,a cat\n\n008,"two\n\nlines"\n009,x') == [
        (2, {"id": "007", "prompt": "a cat"}),
        (4, {"id": "008", "prompt": "two\n\nlines"}),
        (7, {"id": "009", "prompt": "x"}),
    ]


def test_empty_and_blank_cells_are_absent_and_others_keep_their_padding() -> None:
    assert rows('a,b,c\n, \t, x \n"",,\n') == [(2, {"c": " x "}), (3, {})]


def test_a_byte_order_mark_crlf_and_lone_line_feeds_in_cells_are_taken_as_meant() -> None:
    assert rows('\ufeff"a",b\r\n1,"x\ny\r\nz"\r\n2,w\r\r\n') == [
        (2, {"a": "1", "b": "x\ny\r\nz"}),
        (5, {"a": "2", "b": "w"}),  # CR CR LF: text mode was applied twice
    ]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_only_a_line_feed_ends_a_line(mark: str, form: str) -> None:
    if form == "jsonl":
        text = f'{{"a": "x{mark}y"}}\n{{"a": "2"}}\n' if mark > " " else '{"a": "x\\u0085y"}\n{"a": "2"}\n'
        assert [line for line, _ in rows(text, form)] == [1, 2]
    else:
        assert rows(f"a\nx{mark}y\n2\n", form) == [(2, {"a": f"x{mark}y"}), (3, {"a": "2"})]


def test_a_file_marked_twice_as_utf_8_is_read() -> None:
    assert rows('\ufeff\ufeff"a"\n1\n') == [(2, {"a": "1"})]


def test_a_lone_carriage_return_is_kept_in_quotes_and_refused_outside() -> None:
    assert rows('a,b\n"x\ry",z\n') == [(2, {"a": "x\ry", "b": "z"})]
    assert "m:2: a carriage return without line feed" in fatal("a,b\nx\ry,z\n")
    assert "carriage return" in fatal("a,b\r1,2\r")
    assert "carriage return" in fatal("a\tb\r1\t2\r", "tsv")


def test_quotes_are_doubled_inside_quotes_and_literal_inside_plain_cells() -> None:
    assert rows('a,b\n"say ""hi""",5" pipe\n') == [(2, {"a": 'say "hi"', "b": '5" pipe'})]


def test_header_names_are_stripped_and_unnamed_columns_left_out() -> None:
    with opened(", prompt ,,seed\n0,x,y,5\n") as manifest:
        assert [dict(item.cells) for item in manifest.rows()] == [{"prompt": "x", "seed": "5"}]
        assert manifest.columns == ["", "prompt", "", "seed"]


def test_columns_may_have_any_name() -> None:
    assert rows("a.b/c[0],{x}\n1,2\n") == [(2, {"a.b/c[0]": "1", "{x}": "2"})]


def test_very_long_cells_are_read() -> None:
    long = "x" * 3_000_000
    assert rows(f'a,b\n{long},"{long}\n{long}"\n') == [(2, {"a": long, "b": f"{long}\n{long}"})]


def test_a_row_longer_than_the_header_is_an_error_and_the_others_are_read() -> None:
    problems = told('a,b\n1,2,3\n1,2\n1, "x, y"\n')
    assert problems[0].startswith("m:2: 3 cells for 2 columns; put a cell that holds the delimiter in quotes")
    assert problems[1] == "3"
    assert problems[2].startswith(
        "m:4: 3 cells for 2 columns; a quote counts only at the very start of a cell"
    )


def test_a_row_shorter_than_the_header_is_read_with_a_warning() -> None:
    with opened("a,b,c\n1\n") as manifest:
        warning, row = manifest.rows()
    assert isinstance(warning, Problem)
    assert warning.severity is Severity.WARNING
    assert str(warning) == "m:2: 1 cell for 3 columns; empty: b, c"
    assert row == SourceRow(2, {"a": "1"})
    assert manifest.complete


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("text", ["", "\n\n  \n", "\ufeff"])
def test_a_file_without_rows_is_an_error(text: str, form: str) -> None:
    assert fatal(text, form) == "m: the manifest has no rows; write at least one"


def test_a_header_without_rows_is_an_error() -> None:
    assert fatal("a,b\n\n") == "m: the manifest has a header but no rows; write at least one"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("a,b,a", '1: "a" names both column 1 and column 3; rename one'),
        ("a, a", '1: "a" names both column 1 and column 2; rename one'),
        (",,", "1: the header names no column"),
        (
            "\n\nprompt;seed",
            """3: the header is one single column, "prompt;seed"; if ";" parts its cells write""",
        ),
        ("prompt\tseed", 'write --delimiter "tab", else --delimiter ","'),
    ],
)
def test_a_wrong_header_ends_the_reading(header: str, told: str) -> None:
    assert told in fatal(f"{header}\n1,2,3\n")


def test_the_delimiter_given_is_believed() -> None:
    assert rows("a;b\n1;x,y\n", delimiter=";") == [(2, {"a": "1", "b": "x,y"})]
    assert rows("a;b\n1\n", delimiter=",") == [(2, {"a;b": "1"})]


def test_a_quote_that_is_never_closed_is_told_with_its_own_line() -> None:
    text = 'a,b\n1,2\n"x\ny","z\n' + "3,4\n" * 1000
    assert fatal(text) == "m:4: the quote that opens cell 2 is never closed; close it"


def test_text_after_a_closing_quote_is_told_and_no_row_after_it_is_believed() -> None:
    problems = told('a,b\n1,2\n"He said "hi" to me",3\n4,5\n"x"y,6\n7,"8\n')
    assert problems[0] == "2"
    assert problems[1].startswith(
        'm:3: text follows the quote that closes cell 1; inside quotes write a quote twice: ""'
    )
    assert problems[2].startswith("m:5: text follows")
    assert len(problems) == 3
    assert "cell 1 on line 3" in fatal('a,b\n"x,\ny"z,3\n')


def test_endless_broken_quotes_are_given_up() -> None:
    problems = told("a,b\n" + '"x"y,1\n' * 5000)
    assert len(problems) == 1001
    assert "the rest was not read" in problems[-1]


# --- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_what_is_no_utf_8_is_told_with_line_and_byte(form: str) -> None:
    good = {"csv": b"a\nx\n", "tsv": b"a\nx\n", "jsonl": b'{"a": 1}\n\n', "json": b'[\n{"a": "'}[form]
    message = fatal(good + b"\xe9\n", form)
    line = good.count(b"\n") + 1
    assert f"m:{line}: not UTF-8 (byte {len(good)} is 0xe9); save the file as UTF-8" == message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_utf_16_is_told_as_such(encoding: str, form: str) -> None:
    text = {"csv": "a\nx\n", "jsonl": '{"a": 1}\n', "json": '[{"a": 1}]'}[form]
    message = fatal(text.encode(encoding), form)
    assert message.startswith(
        "m:1: the file is UTF-16; " if encoding == "utf-16" else "m:1: a NUL byte (byte "
    )
    assert "save" in message


def test_a_nul_is_an_error_and_the_rows_before_it_are_read() -> None:
    assert told("a\n1\n2\nx\0y\n3\n") == ["2", "3", "m:4: a NUL byte (byte 7); save the file as UTF-8 text"]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_gzip_is_seen_by_its_bytes_and_may_have_several_members(form: str) -> None:
    text = {
        "csv": "a\n1\n2\n",
        "tsv": "a\n1\n2\n",
        "jsonl": '{"a": "1"}\n{"a": "2"}\n',
        "json": '[{"a": "1"}, {"a": "2"}]',
    }
    data = text[form].encode()
    packed = gzip.compress(data[:3]) + gzip.compress(b"") + gzip.compress(data[3:]) + b"\0" * 10
    assert [cells for _, cells in rows(packed, form)] == [{"a": "1"}, {"a": "2"}]


def test_damaged_gzip_is_an_error() -> None:
    packed = gzip.compress(b"a\n" + b"".join(b"%d\n" % (n * n) for n in range(10_000)))
    assert "cut short" in fatal(packed[:-5])
    assert "damaged" in fatal(packed + b"garbage")
    assert "damaged" in fatal(packed[:-6] + b"xxxxxx")
    assert "cut short" in fatal(packed[:5])


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_a_row_beyond_the_limit_is_told_and_not_held(form: str) -> None:
    """A gzip of a few kilobytes that unpacks to 100 MB is refused when the limit is met."""
    begin = {"csv": b"a\nx\n", "tsv": b"a\nx\n", "jsonl": b'{"a": 1}\n', "json": b'[\n{"a":"'}[form]
    packed = gzip.compress(begin + b"x" * 100_000_000, compresslevel=1)
    line = begin.count(b"\n") + 1
    assert fatal(packed, form, max_row_bytes=1_000_000) == (
        f"m:{line}: the row is longer than 1,000,000 bytes; shorten it, or allow it with --max-row-bytes N"
    )


def test_the_limit_is_exact() -> None:
    assert told("a\n123456\n1234567\n1\n", max_row_bytes=6)[0] == "2"
    assert "m:3: the row is longer than 6 bytes" in told("a\n123456\n1234567\n1\n", max_row_bytes=6)[1]
    assert "m:2: the row is longer" in fatal('a,b\n"1234\n1234\n1234",1\n', max_row_bytes=10)
    assert [line for line, _ in rows('[{"a":1},{"a":"\u00fc"}]', "json", max_row_bytes=10)] == [1, 1]
    assert "longer than 9" in fatal('[{"a":1},{"a":"\u00fc"}]', "json", max_row_bytes=9)


def test_a_quote_left_open_does_not_fill_the_memory() -> None:
    text = 'a,b\n1,"x\n' + "some more lines,2\n" * 100_000
    assert "m:2: the row is longer than" in fatal(text, max_row_bytes=500_000)


# --- tsv -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        ('"Hello', '"Hello'),
        ('Hello"', 'Hello"'),
        ('"', '"'),
        ('"a" and "b"', '"a" and "b"'),
        ('"a""', '"a""'),
        ('"whole"', "whole"),
        ('"say ""hi"""', 'say "hi"'),
        (' "padded"', ' "padded"'),
        ("5,6;7", "5,6;7"),
    ],
)
def test_tsv_cells_are_literal_unless_wholly_quoted(cell: str, read: str) -> None:
    assert rows(f"a\tb\n{cell}\tx\nx\t{cell}\nx\ty\n", "tsv") == [
        (2, {"a": read, "b": "x"}),
        (3, {"a": "x", "b": read}),
        (4, {"a": "x", "b": "y"}),
    ]
    assert rows(f"a\n{cell}\nx\n", "tsv") == [(2, {"a": read}), (3, {"a": "x"})]


def test_quotations_over_several_tsv_rows_stay_in_their_rows() -> None:
    text = 'id\ttext\tn\n1\t"I like it,\t5\n2\tshe said."\t6\n3\t"So\t7\n4\tdo I."\t8\n'
    assert [cells["text"] for _, cells in rows(text, "tsv")] == ['"I like it,', 'she said."', '"So', 'do I."']
    text = 'id\ttext\n1\t"I like it,\n2\tshe said."\n3\t"So\n4\tdo I."\n'
    assert [cells["text"] for _, cells in rows(text, "tsv")] == ['"I like it,', 'she said."', '"So', 'do I."']


def test_a_quoted_tsv_cell_may_hold_tabs_and_lines_where_the_header_says_so() -> None:
    text = 'id\tprompt\tseed\r\n1\t"a\tb"\t5\r\n2\t"first ""line""\n\nthird"\t6\r\n3\tx\t7\r\n'
    assert rows(text, "tsv") == [
        (2, {"id": "1", "prompt": "a\tb", "seed": "5"}),
        (3, {"id": "2", "prompt": 'first "line"\n\nthird', "seed": "6"}),
        (6, {"id": "3", "prompt": "x", "seed": "7"}),
    ]
    text = 'id\tprompt\n1\t"first\nsecond"\n2\t"third\r\n\r\nfourth"\n3\tx'
    assert rows(text, "tsv") == [
        (2, {"id": "1", "prompt": "first\nsecond"}),
        (4, {"id": "2", "prompt": "third\r\n\r\nfourth"}),
        (7, {"id": "3", "prompt": "x"}),
    ]


def test_a_file_of_quotes_that_never_close_is_read_in_one_go() -> None:
    """Every line tries to go on below; none is tried twice over the same lines."""
    text = "a\tb\tc\n" + 'x\t"y\nz\n' * 20_000
    assert len(told(text, "tsv")) == 80_000  # a warning and a row per line


# --- jsonl and json --------------------------------------------------------------------------------


def test_jsonl_values_keep_their_types_and_digits() -> None:
    (row,) = rows(
        '\n {"a": "007", "b": 7, "c": 7.50, "d": null, "e": true, "f": [1, {"g": 2e3}], "h": ""}\r\n\n',
        "jsonl",
    )
    assert row == (
        2,
        {
            "a": "007",
            "b": 7,
            "c": Decimal("7.50"),
            "d": None,
            "e": True,
            "f": [1, {"g": Decimal("2E+3")}],
            "h": "",
        },
    )
    assert str(row[1]["c"]) == "7.50"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "the row is a list; write an object"),
        ('"x"', "the row is text"),
        ("5", "the row is a whole number"),
        ("null", "the row is null"),
        ('{"a": 1', "not JSON: Expecting ',' delimiter (column 8)"),
        ('  {"a": x}', "not JSON: Expecting value (column 9)"),
        ('{"a": 1} {"a": 2}', "not JSON: text follows the value (column 9)"),
        ('{"a": NaN}', "NaN is not a number that JSON knows"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1, "a": 2}', 'the key "a" is given twice'),
        ('{"x": {"a": 1, "a": 2}}', 'the key "a" is given twice'),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": "\\u0000"}', "NUL"),
        (f'{{"a": {"9" * 5000}}}', "a number is too long"),
        (f'{{"a": 1e{"9" * 30}}}', "a number is too long"),
        (f'{{"a": {"[" * 70}{"]" * 70}}}', "more than 64 deep"),
        (f'{{"a": {"[" * 100_000}', "more than 64 deep"),
        ("{'a': 1}", "not JSON"),
        ("{", "every object must have one line"),
    ],
)
def test_a_wrong_jsonl_line_is_told_and_the_others_are_read(line: str, told: str) -> None:
    with opened(f'{{"a": 0}}\n{line}\n{{"a": 3}}\n', "jsonl") as manifest:
        first, problem, last = manifest.rows()
    assert manifest.complete
    assert (first, last) == (SourceRow(1, {"a": 0}), SourceRow(3, {"a": 3}))
    assert str(problem).startswith("m:2: ")
    assert told in str(problem)


def test_escapes_that_only_look_doubtful_are_read() -> None:
    assert rows('{"a": "\\ud83d\\ude00 \\\\u0000"}', "jsonl") == [(1, {"a": "😀 \\u0000"})]


def test_a_json_array_is_read_with_the_lines_on_which_its_elements_begin() -> None:
    text = '\ufeff\n [ {"a": 1},\n\n  {"a":\n [1, 2]},{"a": "x]}"}\n]\n\n'
    assert rows(text, "json") == [(2, {"a": 1}), (4, {"a": [1, 2]}), (5, {"a": "x]}"})]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "m: the manifest has no rows"),
        (
            '{"a": 1}\n{"a": 2}',
            "m:1: the file is not one array of objects; for one object per line write --format jsonl",
        ),
        ("5", "m:1: the file is not one array"),
        ('[{"a": 1},\n]', "m:2: not JSON: a comma after the last element; take it out (column 1)"),
        ('[{"a": 1}\n  {"a": 2}]', 'm:2: not JSON: "," or "]" must follow an element (column 3)'),
        ('[{"a": 1}', 'm:1: not JSON: "," or "]" must follow an element (column 10)'),
        ('[{"a": 1}]\n x', "m:2: text follows the end of the array; take it out (column 2)"),
        ('[{"a": 1},\n {"b": }]', "m:2: not JSON: Expecting value (column 8)"),
        ('[{"a": 1},\n {"b": "x}]', "m:2: not JSON: Unterminated string starting at (column 8)"),
        ('[{"a": tru', "m:1: not JSON: Expecting value (column 8)"),
        ('[\n{"a": 1, "a": 2}]', 'm:2: the key "a" is given twice'),
        ("[", "m:1: not JSON"),
        ("[" * 100_000, "m:1: nested more than 64 deep"),
    ],
)
def test_a_broken_array_ends_the_reading(text: str, told: str) -> None:
    assert told in fatal(text, "json")


def test_an_element_that_is_no_object_is_told_and_the_others_are_read() -> None:
    assert told('[{"a": 1}, 12,\n "x", {"a": 2}]', "json") == [
        "1",
        'm:1: the row is a whole number; write an object, as in {"prompt": "a cat"}',
        'm:2: the row is text; write an object, as in {"prompt": "a cat"}',
        "2",
    ]


def test_a_large_array_keeps_true_lines_and_large_elements() -> None:
    elements = [{"n": n, "x": "y" * (n % 7 * 100)} for n in range(5000)]
    elements[2500]["x"] = "long" * 500_000
    text = json.dumps(elements, indent=1)
    expected = [number for number, line in enumerate(text.split("\n"), 1) if line == " {"]
    read = rows(text, "json")
    assert [line for line, _ in read] == expected
    assert [cells for _, cells in read] == elements


# --- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", "csv"),
        ("a.CSV.GZ", "csv"),
        ("a.tsv", "tsv"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson.gz", "jsonl"),
        ("a.b.json", "json"),
    ],
)
def test_the_name_tells_the_format(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / name).touch()
    with open_manifest(tmp_path / name) as manifest:
        assert manifest.format == form
        assert manifest.blank_is_default == (form in {"csv", "tsv"})
        assert manifest.delimiter == {"csv": ",", "tsv": "\t"}.get(form)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        (
            "a.docx",
            {},
            'the ending ".docx" does not tell the format; write --format with one of csv, tsv, jsonl, json',
        ),
        ("a", {}, "a name without ending"),
        ("a.gz", {}, "a name without ending"),
        ("a.csv", {"format": "xls"}, "unknown format 'xls'"),
        ("a.csv", {"delimiter": "::"}, "must be one character"),
        ("a.jsonl", {"delimiter": ";"}, "leave it out"),
    ],
)
def test_a_wrong_wish_says_what_to_write(name: str, options: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        open_manifest(Path(name), **options)


def test_standard_input_needs_its_format() -> None:
    with pytest.raises(UsageError, match="standard input needs its format; write --format"):
        open_manifest(io.BytesIO(b""))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file or directory; check the path"):
        open_manifest(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ManifestError, match="Is a directory"):
        open_manifest(tmp_path / "b.csv")
    with pytest.raises(UsageError, match="is a folder; write the path of a manifest in it"):
        open_manifest(tmp_path)


def test_a_gz_name_promises_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(b"a\n1\n")
    with open_manifest(path) as manifest:
        (problem,) = manifest.rows()
    assert "is not gzip" in str(problem)
    path.write_bytes(gzip.compress(b"a\n1\n"))
    with open_manifest(path) as manifest:
        assert list(manifest.rows()) == [SourceRow(2, {"a": "1"})]


def test_a_stream_handed_in_stays_open() -> None:
    stream = io.BytesIO(b"a\n1\n")
    with open_manifest(stream, format="csv") as manifest:
        list(manifest.rows())
    assert not stream.closed


# --- writing rows back -----------------------------------------------------------------------------


def written(tmp_path: Path, cells: list[dict[str, Any]], **options: Any) -> str:
    path = tmp_path / "failed"
    with RowWriter(path, **options) as writer:
        for row in cells:
            writer.write(row)
    assert writer.count == len(cells)
    assert [entry.name for entry in tmp_path.iterdir()] == ["failed"]
    return path.read_bytes().decode()


def test_failed_rows_are_written_as_their_manifest_was(tmp_path: Path) -> None:
    cells = [{"id": "007", "prompt": 'a "cat"; x'}, {"prompt": "two\nlines"}]
    columns = ["", "id", "prompt"]
    assert written(tmp_path, cells, format="csv", columns=columns, delimiter=";") == (
        ';id;prompt\n;007;"a ""cat""; x"\n;;"two\nlines"\n'
    )
    assert written(tmp_path, cells, format="tsv", columns=columns, delimiter="\t") == (
        ',id,prompt\n,007,"a ""cat""; x"\n,,"two\nlines"\n'
    )
    assert written(tmp_path, [{"a": Decimal("7.50"), "b": None, "c": "ü"}], format="json") == (
        '{"a": 7.50, "b": null, "c": "ü"}\n'
    )


def test_without_rows_or_on_an_error_there_is_no_new_file(tmp_path: Path) -> None:
    path = tmp_path / "failed.csv"

    def write_a_cell_without_column() -> None:
        with RowWriter(path, format="csv", columns=["a"]) as writer:
            writer.write({"a": "1"})
            writer.write({"b": "1"})

    with pytest.raises(ValueError, match="no column is named 'b'"):
        write_a_cell_without_column()
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with RowWriter(path, format="csv", columns=["a"]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_nothing_but_one_line_packs_well_and_is_read() -> None:
    """What is small is never suspected, and what is large only when it unpacks to what no manifest does."""
    small = gzip.compress(b"a\n" + b"x\n" * 1_500_000)
    assert len(small) * 200 < 3_000_000
    with open_manifest(io.BytesIO(small), format="csv") as manifest:
        assert sum(1 for _ in manifest.rows()) == 1_500_000
        assert manifest.complete


def test_names_of_columns_are_shown_on_one_line_and_cut() -> None:
    assert fatal(f'"{"n" * 500}\nn","{"n" * 500}\nn"\nx,y\n') == (
        f'm:1: "{"n" * 55}..." names both column 1 and column 2; rename one of them'
    )
    assert "column 2 has a name of 1,001 characters" in fatal(f"a,{'n' * 1001}\nx,y\n")
    assert told(f'{{"{"k" * 1001}": 1}}\n{{"a": 1}}\n', "jsonl")[0].startswith(
        "m:1: a key has 1,001 characters"
    )


def test_a_spreadsheet_is_told_how_it_becomes_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="export it as CSV UTF-8"):
        open_manifest(path)


def test_a_byte_order_mark_is_seen_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with RowWriter(path, format="csv", columns=["a"], bom=True) as writer:
        writer.write({"a": "1"})
    assert path.read_bytes() == b"\xef\xbb\xbfa\n1\n"
    with open_manifest(path) as manifest:
        assert [row.cells for row in manifest.rows() if isinstance(row, SourceRow)] == [{"a": "1"}]
        assert manifest.has_bom
