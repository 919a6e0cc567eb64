"""Rows bound by the column are, to the byte, what reading them one by one makes of them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrun.errors import ManifestError
from batchrun.manifest.job import Job, job_for
from batchrun.manifest.json_text import encode
from batchrun.manifest.read import Manifest, open_manifest
from batchrun.model import Problem, SourceRow
from batchrun.plan.names import form_columns
from batchrun.plan.plan import plan
from batchrun.plan.reading import Reading
from batchrun.store.migrations import migrate
from batchrun.store.planning import Planning, form_json
from batchrun.store.reading import read_cells, read_value
from batchrun.tools.catalog import load
from batchrun.tools.values import STORY
from tests.support.images import draw

COLUMNS = {
    "id": st.one_of(st.uuids().map(str), st.sampled_from(["", " padded ", "A", "a", "con", "ä/ö", "7"])),
    "prompt": st.one_of(
        st.sampled_from(
            ["", "  ", "a cat", "img of a cat", 'a "cat"', "a\\b\nc", "\x7f", "é", "😀", "tab\t"]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8),
    ),
    "steps": st.sampled_from(["", "20", "20.0", "+20", " 20", "007", "x", "60"]),
    "scale": st.sampled_from(["", "7.5", "7,5", ".5", " 6 "]),
    "samples": st.sampled_from(["", "1", "4", "0", "-1", "999999999", "2.0"]),
    "seed": st.sampled_from(["", "7", "random", "RANDOM", "0042", "seven"]),
    "scheduler": st.sampled_from(["", "DDIMScheduler", "DDIM", "ddimscheduler", "none such"]),
    "refiner": st.sampled_from(["", "NO", "--only_base_model", "yes"]),
    "selectedLoraModel": st.sampled_from(["", "61", "61|82", '["61"]', "none such"]),
    "inputImageUrl": st.sampled_from(["", "https://x.test/a.png", "a.png", "./a.png", "no.png", "http:/x"]),
    "stranger": st.sampled_from(["", "what"]),
}
SETS: list[dict[str, Any]] = [
    {}, {"samples": 1}, {"steps": 30, "samples": "2"}, {"prompt": "é"}, {"steps": "x"}, {"seed": [1, 2]},
    {"negativePrompt": " "}, {"inputImageUrl": "https://x.test/b.png"},
]  # fmt: skip
#: More than are inserted at once, a wrong one and a padded one among them; ids on most.
MANY = "id,prompt,steps\n" + "".join(
    f"{'' if n % 7 == 0 else n},picture {n // 3},{ {99: 'x', 130: '20.0'}.get(n, 20) }\n" for n in range(260)
)
IMAGE = draw("PNG")
TOOLS = [
    "Retro-Cartoons",
    "instant-id",
    "outpainting-sdxl-advanced",
    "text-to-image-sd-lora",
    "story-diffusion-advanced",
]


class OneByOne:
    """A manifest that gives every row by itself."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.blank_is_default = manifest.blank_is_default

    @property
    def columns(self) -> list[str] | None:
        return self._manifest.columns

    @property
    def complete(self) -> bool:
        return self._manifest.complete

    def blocks(self) -> Iterator[SourceRow | Problem]:
        return self._manifest.rows()


@st.composite
def tables(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(list(COLUMNS)), min_size=2, max_size=6, unique=True))
    rows = draw(st.lists(st.tuples(*(COLUMNS[name] for name in names)), min_size=1, max_size=6))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    return out.getvalue()


#: Cells of JSON as they are written: good ones, and what is not that simple.
TOKENS = {
    "id": (['"a"', '"b"', "1", "2"], ['" a "', "null", '""', "1.0", "true"]),
    "prompt": (['"a cat"', '"img é"', '"\\u00e9"', '"a \\"b\\""'], ['""', '" "', "5", "7.50", "null", "{}"]),
    "negativePrompt": (['"no"', "null"], ['""', "true", '["a", "b"]']),
    "generalPrompt": (['"a | b"'], ['["a", "b"]', "[]", '"|"']),
    "steps": (["20", "30", "20.0"], ['"20"', "1", "true", "1.0", "2e1", "-1", "null", "[20, 30]", "[]"]),
    "scale": (["7.5", "7.50", "7", '"7.5"'], ["7e0", "1E-2", "null", '"7,5"', "[7.5, 8.0]"]),
    "samples": (["1", "4"], ['"2"', "0", "1.0", "true", "null", "999999999"]),
    "seed": (["7", "8", '"random"', "123456789"], ['"0042"', "7.0", "-7", "null", '"seven"', "9" * 30]),
    "refiner": (['"NO"'], ["false", '"yes"', "null"]),
    "selectedLoraModel": (['"61"', '["61"]'], ['["61", "82"]', "61", "[]", "null"]),
    "inputImageUrl": (['"https://x.test/a.png"', '"a.png"'], ['" a.png"', '["a.png"]', '"no.png"', "null"]),
    "stranger": (["null", "1"], ["null"]),
    "": (["1"], ["null"]),
}  # fmt: skip
EXPANSIONS: list[dict[str, Any]] = [
    {}, {}, {"seed": "random"}, {"steps": "20..22"}, {"steps": [20, "21", Decimal("22.0")]}, {"repeat": 3},
    {"scale": [7.5, "6"], "repeat": 2}, {"samples": [1, 2]}, {"seed": [""]}, {"steps": ["x", 20]},
    {"selectedLoraModel": ["61", ["82"]]}, {"seed": "1..700"},
]  # fmt: skip


@st.composite
def objects(draw: st.DrawFn) -> str:
    """JSONL of rows that mostly have the same keys, so many that some are taken together."""
    names = draw(st.lists(st.sampled_from(list(TOKENS)), min_size=1, max_size=6, unique=True))
    odd = draw(st.sets(st.sampled_from(names), max_size=2))
    tokens = {
        name: st.sampled_from(TOKENS[name][0] + (TOKENS[name][1] if name in odd else [])) for name in names
    }
    rows = draw(st.lists(st.fixed_dictionaries(tokens), min_size=1, max_size=11))
    rows = rows if draw(st.booleans()) else [{**row} for row in rows * 8][:12]
    if draw(st.booleans()):  # a row of others among them
        rows.insert(len(rows) // 2, dict(reversed(rows[0].items())))
    return "".join(
        "{" + ", ".join(f'"{name}": {token}' for name, token in row.items()) + "}\n" for row in rows
    )


def read(job: Job, path: Path, *, one_by_one: bool) -> tuple[Any, ...]:
    """Everything that comes of a reading."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    planning = Planning(connection)
    with open_manifest(path, name="list") as manifest:
        reading = Reading(job, load(), planning, name="list", checkpoint=lambda: None)
        reading.read(OneByOne(manifest) if one_by_one else manifest)
        found = reading.findings
        told = found.errors, found.warnings, found.hints, found.error_count, found.valid_rows, found.blocking
        rows: list[Any] = []
        if found.allows(skip_invalid=True):
            columns = manifest.columns and form_columns(job, manifest.columns)
            form = form_json(format=manifest.format, delimiter=manifest.delimiter, columns=columns)
            merged = planning.merge(manifest="m", job="{}", at=1.0, stamp="", form=form, rerun_changed=False)
            rows = [merged, connection.execute("SELECT * FROM rows ORDER BY seq").fetchall()]
            rows += connection.execute("SELECT * FROM sources ORDER BY row").fetchall()
            rows += connection.execute("SELECT * FROM counts").fetchall()
    planning.abandon()
    connection.close()
    return told, rows, reading.requests, reading.images, reading.rows_by_tool, reading.valid_by_tool


@settings(deadline=None, max_examples=150)
@given(
    text=tables(),
    tool=st.sampled_from(TOOLS),
    set_values=st.sampled_from(SETS),
    names=st.sampled_from([{}, {"prompt": "refiner"}, {"negativePrompt": "prompt"}]),
    extra=st.sampled_from(["error", "keep", "drop"]),
)
@example(
    text='id,prompt\n"a","é \x7f"\n"b","é"\n',
    tool=TOOLS[0],
    set_values={"samples": 1},
    names={},
    extra="error",
)
@example(text='prompt,steps\n"x","20"\n"x","20"\n', tool=TOOLS[0], set_values={}, names={}, extra="error")
@example(
    text='prompt,steps\n"a cat",""\n',
    tool=TOOLS[0],
    set_values={"prompt": "é"},
    names={"negativePrompt": "prompt"},
    extra="error",
)
@example(text='id,""\n"a","x"\n"b",""\n', tool=TOOLS[0], set_values={"prompt": "é"}, names={}, extra="error")
@example(text=MANY, tool=TOOLS[0], set_values={}, names={}, extra="error")
@example(text=MANY.replace(",x\n", ",20\n"), tool=TOOLS[0], set_values={}, names={}, extra="error")
def test_rows_bound_together_are_what_each_is_by_itself(text, tool, set_values, names, extra):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.csv"
        path.write_text(text, encoding="utf-8", newline="")
        path.with_name("a.png").write_bytes(IMAGE)
        job = job_for(path, tool=tool, set=set_values, map=names, extra=extra)
        assert read(job, path, one_by_one=False) == read(job, path, one_by_one=True)


@settings(deadline=None, max_examples=200)
@given(
    text=tables() | objects(),
    tool=st.sampled_from(TOOLS),
    set_values=st.sampled_from(SETS),
    names=st.sampled_from([{}, {}, {"prompt": "refiner"}, {"seed": "steps"}]),
    expand=st.sampled_from(EXPANSIONS),
    max_requests=st.sampled_from([20, 100_000]),
)
@example(
    text='{"prompt": "x", "steps": 1}\n{"prompt": "x", "steps": true}\n{"prompt": "x", "steps": 1.0}\n' * 4,
    tool=TOOLS[0],
    set_values={},
    names={},
    expand={},
    max_requests=20,
)
@example(
    text='{"id": "a", "prompt": "x", "scale": 7.50}\n' * 9,
    tool=TOOLS[0],
    set_values={"samples": 1},
    names={},
    expand={"seed": "random"},
    max_requests=20,
)
@example(
    text='{"id": "a", "prompt": "x", "inputImageUrl": "a.png"}\n'
    '{"id": "b", "prompt": "x", "inputImageUrl": ["a.png"]}\n' * 4,
    tool="instant-id",
    set_values={"steps": 30},
    names={},
    expand={"seed": "1..2"},
    max_requests=100,
)
@example(
    text="inputImageUrl,prompt\na.png,x\n./a.png,x\n a.png,x\nhttps://x.test/a.png,x\n",
    tool="instant-id",
    set_values={},
    names={},
    expand={},
    max_requests=20,
)
@example(  # a blank is a value in JSON, and nothing in a table
    text='{"inputImageUrl": "https://x.test/a.png"}\n' * 8,
    tool="outpainting-sdxl-advanced",
    set_values={"negativePrompt": " "},
    names={},
    expand={},
    max_requests=20,
)
@example(
    text="prompt,scale\n" + "a cat,7.5\n" * 9,
    tool=TOOLS[0],
    set_values={"samples": 1},
    names={},
    expand={"steps": "20..22"},
    max_requests=20,
)
def test_objects_and_expansions_bound_together_are_what_each_row_is_by_itself(
    text, tool, set_values, names, expand, max_requests
):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("list.jsonl" if text.startswith("{") else "list.csv")
        path.write_text(text, encoding="utf-8", newline="")
        path.with_name("a.png").write_bytes(IMAGE)
        job = job_for(
            path, tool=tool, set=set_values, map=names, expand=expand, max_requests=max_requests, extra="keep"
        )
        assert read(job, path, one_by_one=False) == read(job, path, one_by_one=True)


@settings(deadline=None, max_examples=100)
@given(text=objects(), set_values=st.sampled_from(SETS), expand=st.sampled_from(EXPANSIONS[:3]))
@example(text='{"prompt": null}\n', set_values={"prompt": "é"}, expand={})
def test_rows_of_json_are_given_back_to_the_letter(text, set_values, expand):
    with tempfile.TemporaryDirectory() as folder, Planning.scratch() as planning:
        path = Path(folder) / "list.jsonl"
        path.write_text(text, encoding="utf-8", newline="")
        path.with_name("a.png").write_bytes(IMAGE)
        job = job_for(path, tool=TOOLS[0], set=set_values, expand=expand, extra="keep", skip_invalid=True)
        with suppress(ManifestError):
            plan(job, load(), planning, stamp="", checkpoint=lambda: None)
        lines = [json.loads(line, parse_float=Decimal) for line in text.splitlines()]
        for seq, line in planning.connection.execute("SELECT seq, line FROM rows ORDER BY seq").fetchall():
            back = read_cells(planning.connection, seq, None)
            if read_value(planning.connection, "SELECT count(*) FROM rows WHERE line = ?", (line,)) == 1:
                assert encode(back) == encode(lines[line - 1])


#: Blocks of rows after so many different cells that a column does not look for the same ones any more: each
#: with one cell that does not stand as it is in JSON, or is not sent as it is.
ODD = [
    {}, {"prompt": 'a "cat"'}, {"prompt": "a\\b"}, {"prompt": "tab\t"}, {"prompt": "\x7f"}, {"prompt": " "},
    {"prompt": ""}, {"prompt": "é 😀"}, {"prompt": "\u2028"}, {"seed": ""}, {"seed": " 7"}, {"seed": "007"},
    {"seed": "+7"}, {"seed": "0"}, {"seed": "7.0"}, {"seed": "٣"}, {"seed": "random"}, {"seed": "seven"},
    {"seed": "9" * 18}, {"seed": "9" * 19}, {"seed": "9" * 30}, {"negativePrompt": " "},
]  # fmt: skip
#: Some of the same, and others, for JSON.
ODD_JSON = [
    *ODD[5:9], {"prompt": 5}, {"prompt": True}, {"prompt": None}, {"prompt": Decimal("1.50")}, {"seed": "7"},
    {"seed": True}, {"seed": -7}, {"seed": None}, {"seed": Decimal("7.0")}, {"seed": [7, 8]},
    {"seed": 10**18}, {"seed": 10**30}, {"negativePrompt": {}}, {"negativePrompt": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "text"), [("Retro-Cartoons", "prompt"), ("story-diffusion-advanced", STORY)]
)
def test_columns_of_different_cells_are_what_each_row_is_by_itself(
    tmp_path: Path, tool: str, text: str
) -> None:
    path = tmp_path / "list.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", text, "negativePrompt", "seed"])
        numbers = count(1)
        for odd in [{}] * 4 + ODD:
            for n in islice(numbers, 500):
                row = {"prompt": f"picture {n}", "negativePrompt": f"no {n}", "seed": n}
                rows.writerow([n, *(row | odd if n % 500 == 250 else row).values()])
    job = job_for(path, tool=tool)
    assert read(job, path, one_by_one=False) == read(job, path, one_by_one=True)


def test_columns_of_different_values_are_what_each_object_is_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    with path.open("w", encoding="utf-8", newline="") as file:
        numbers = count(1)
        for odd in [{}] * 4 + ODD_JSON:
            for n in islice(numbers, 500):
                row = {"prompt": f"picture {n}", "negativePrompt": f"no {n}", "seed": n}
                cells = (row | odd if n % 500 == 250 else row).values()
                file.write(encode(dict(zip(("id", "prompt", "negativePrompt", "seed"), (n, *cells)))) + "\n")
    job = job_for(path, tool=TOOLS[0])
    assert read(job, path, one_by_one=False) == read(job, path, one_by_one=True)
