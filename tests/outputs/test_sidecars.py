"""The sidecar files: records, one type per key, and files that stay whole."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import DiskError
from batchrun.model import Attempt, Failure, LocalImage, Output, Row, State
from batchrun.outputs.sidecars import JsonLines, Kinds, metadata_record, results_record, shares

OUTPUTS = tuple(
    Output(
        index,
        f"https://cdn.example/{index}.png",
        path=f"images/000/cat_{index}.png",
        sha256="ab" * 32,
        size_bytes=1234,
        width_px=512,
        height_px=768,
    )
    for index in range(3)
)
ROW = Row(
    seq=1,
    key="id:cat",
    id="cat",
    line=2,
    name="cat",
    tool=1,
    given={"prompt": "a cat"},
    extra={"tag": "animals", "include": [{"class": "cat", "count": 1}]},
    images=3,
    state=State.DONE,
    attempts=2,
    attempt=Attempt(2, task_id="2222", cost_usd=Decimal("0.0100")),
    outputs=OUTPUTS,
)


def metadata(row: Row = ROW, index: int = 0, **parameters) -> dict:
    return metadata_record(
        row,
        row.outputs[index],
        tool="instant-id",
        parameters={"prompt": "a cat", **parameters},
        seconds=Decimal("6.5000"),
    )


# --- records -------------------------------------------------------------------------------------------


def test_a_metadata_line_tells_the_whole_story_of_an_image():
    record = metadata(index=1, seed=7, loras=["61"], inputImage=LocalImage("faces/a.jpg", "cd" * 32, 99))
    assert list(record.items()) == [
        ("file_name", "000/cat_1.png"),
        ("id", "cat"),
        ("index", 1),
        ("tool", "instant-id"),
        ("prompt", "a cat"),
        ("parameters", {"prompt": "a cat", "seed": 7, "loras": ["61"], "inputImage": "faces/a.jpg"}),
        ("extra", {"tag": "animals", "include": [{"class": "cat", "count": 1}]}),
        ("task_id", "2222"),
        ("sha256", "ab" * 32),
        ("bytes", 1234),
        ("width", 512),
        ("height", 768),
        ("cost_usd", "0.003333333333"),
        ("seconds", 6.5),
    ]


def test_what_is_not_known_is_null():
    record = metadata(replace(ROW, id=None, attempt=None))
    assert (record["id"], record["task_id"], record["cost_usd"]) == (None, None, None)
    assert metadata_record(ROW, OUTPUTS[0], tool="x", parameters={}, seconds=None)["prompt"] is None


def test_the_costs_of_a_tasks_images_add_up_to_its_cost():
    costs = [metadata(index=index)["cost_usd"] for index in range(3)]
    assert costs == ["0.003333333334", "0.003333333333", "0.003333333333"]
    text = Output(3, None, content_type="raw")  # no image: takes no part
    assert [
        metadata(replace(ROW, outputs=(*OUTPUTS, text)), index)["cost_usd"] for index in range(3)
    ] == costs


@given(st.decimals(0, 10**6, places=18), st.integers(1, 100))
def test_shares_add_up_to_the_last_digit(cost, images):
    parts = shares(cost, images)
    assert sum(parts) == cost
    assert len(parts) == images
    assert max(parts) - min(parts) < Decimal("1e-10")


def test_a_result_line_tells_what_became_of_a_row():
    attempts = [Attempt(1, task_id="1111", error="killed"), ROW.attempt, Attempt(3)]
    assert list(results_record(ROW, attempts).items()) == [
        ("id", "cat"),
        ("line", 2),
        ("status", "done"),
        ("error", None),
        ("attempts", 2),
        ("task_ids", ["1111", "2222"]),
        ("images", ["images/000/cat_0.png", "images/000/cat_1.png", "images/000/cat_2.png"]),
        ("cost_usd", "0.0100"),
        ("cause", None),
        ("row", ROW.seq),
        ("key", ROW.content),
    ]
    failed = replace(ROW, state=State.FAILED, failure=Failure("refused", "no such scheduler"), outputs=())
    record = results_record(failed, [])
    assert (record["status"], record["error"], record["cost_usd"]) == ("failed", "no such scheduler", None)


# --- one type per key ----------------------------------------------------------------------------------


def lines(*parameters: dict) -> list[dict]:
    return [{**metadata(), "parameters": given, "extra": {}} for given in parameters]


def test_a_key_keeps_its_type_while_all_tools_agree():
    kinds = Kinds()
    records = lines({"steps": 30, "scale": "7.5", "loras": []}, {"loras": ["61"]}, {"new": 1})
    assert not kinds.learn(records)
    assert [kinds.fit(record) for record in records] == [{**record, "extra": None} for record in records]


def test_extra_is_an_object_only_in_files_where_some_row_carries_something():
    # Parquet has no object without keys, and Arrow reads no key that is null at first and an object later
    kinds = Kinds()
    plain, empty = lines({"steps": 30}, {"steps": 31})
    empty["extra"] = {"note": None}
    assert not kinds.learn([plain, empty])
    assert [kinds.fit(record)["extra"] for record in (plain, empty)] == [None, None]
    carrying = {**plain, "extra": {"note": "a"}}
    assert kinds.learn([carrying]), "lines written before are to be written anew"
    assert [kinds.fit(record)["extra"] for record in (plain, carrying)] == [{}, {"note": "a"}]
    assert not kinds.learn([carrying])
    assert not Kinds().learn([carrying]), "nothing was written before"


def test_a_key_is_text_everywhere_once_tools_disagree():
    kinds = Kinds()
    assert not kinds.learn(lines({"seed": 7, "loras": ["61", "62"]}))
    assert kinds.learn(lines({"seed": "0007", "loras": "61"}))  # the first line is now untrue
    assert not kinds.learn(lines({"seed": 8}))
    fitted = [
        kinds.fit(record)["parameters"] for record in lines({"seed": 7, "loras": ["61"]}, {"seed": None})
    ]
    assert fitted == [{"seed": "7", "loras": '["61"]'}, {}]


def test_lines_of_text_stay_true_when_a_number_joins_them():
    kinds = Kinds()
    kinds.learn(lines({"seed": "7"}))
    assert not kinds.learn(lines({"seed": 8}))
    assert kinds.fit(lines({"seed": 8})[0])["parameters"] == {"seed": "8"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, "a"], '[1, "a"]'),  # disagrees with itself
        (2**63, "9223372036854775808"),  # larger than loaders can hold
        (Decimal("1e999"), "1E+999"),
        (float("nan"), "NaN"),
        ([{"a": 1}, {"a": "b"}], '[{"a": 1}, {"a": "b"}]'),
    ],
)
def test_what_loaders_cannot_hold_is_text(value, text):
    kinds = Kinds()
    record = {**metadata(), "extra": {"column": value}}
    assert not kinds.learn([record])
    assert kinds.fit(record)["extra"] == {"column": text}


def test_nested_columns_are_carried_as_they_are():
    kinds = Kinds()
    extras = [{"include": [{"class": "cat", "count": n}]} for n in (1, 2)]
    records = [
        {**metadata(), "extra": extra} for extra in [*extras, {"include": [], "exclude": [{"class": "dog"}]}]
    ]
    assert not kinds.learn(records)
    assert [kinds.fit(record) for record in records] == records


def test_null_is_left_out_and_agrees_with_everything():
    kinds = Kinds()
    assert not kinds.learn(lines({"seed": None}, {"seed": 7}, {"seed": None}))
    assert [kinds.fit(line)["parameters"] for line in lines({"seed": None}, {"seed": 7})] == [{}, {"seed": 7}]


def test_what_was_learned_survives_the_process():
    kinds = Kinds()
    kinds.learn(lines({"seed": 7, "loras": ["61"], "both": 1}, {"both": "x"}))
    again = Kinds(json.loads(json.dumps(kinds.to_json())))
    assert again.learn(lines({"seed": "7"}))
    assert again.fit(lines({"both": 1})[0])["parameters"] == {"both": "1"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.decimals(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


def shape(value: object) -> set[str]:
    """Every place of a value with the JSON type found there, nulls left out."""
    if isinstance(value, dict):
        found = {f".{name}{inner}" for name, item in value.items() for inner in shape(item)}
        return found | {" object"}
    if isinstance(value, list):
        return {f"[]{inner}" for item in value for inner in shape(item)} | {" array"}
    kinds = {bool: " flag", int: " number", float: " number", str: " text"}
    return set() if value is None else {kinds[type(value)]}


@given(st.lists(st.dictionaries(st.sampled_from("xyz"), JSON, max_size=3), max_size=6))
def test_whatever_the_values_a_file_holds_one_type_per_place(extras):
    kinds = Kinds()
    records = [{**metadata(), "extra": extra} for extra in extras]
    kinds.learn(records)
    with_types: dict[str, str] = {}
    for record in records:
        read = json.loads(json.dumps(kinds.fit(record)["extra"], default=float, allow_nan=False))
        for place in shape(read):
            path, _, kind = place.rpartition(" ")
            assert with_types.setdefault(path, kind) == kind


# --- the files -----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images" / "metadata.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_lines_are_appended_and_the_length_told(path):
    file = JsonLines(path)
    assert file.open_at(0) == 0
    first = file.append([{"a": 1}])
    assert (first, path.read_bytes()) == (8, b'{"a":1}\n')
    assert file.append([]) == first
    second = file.append([{"a": "ö\u2028"}, {"a": Decimal("1.5")}])
    file.sync()
    file.close()
    assert path.stat().st_size == second
    assert read(path) == [{"a": 1}, {"a": "ö\u2028"}, {"a": 1.5}]
    assert "ö" in path.read_text(encoding="utf-8")


def test_what_came_after_the_recorded_length_is_cut_at_the_next_start(path):
    file = JsonLines(path)
    file.open_at(0)
    known = file.append([{"a": 1}])
    file.append([{"a": 2}])
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"a": 3')
    again = JsonLines(path)
    assert again.open_at(known) == known
    again.append([{"a": 4}])
    again.close()
    assert read(path) == [{"a": 1}, {"a": 4}]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 200_000, 600_007])
def test_a_file_is_only_ever_cut_at_the_end_of_a_line(path, length):
    path.parent.mkdir()
    path.write_bytes(b'{"a":1}\n' + b'{"a":"' + b"x" * 600_000 + b'"}\n')
    file = JsonLines(path)
    found = file.open_at(length)
    file.close()
    assert found == (8 if length >= 8 else 0) == path.stat().st_size


def test_a_file_deleted_or_shortened_by_others_is_told_by_its_length(path):
    file = JsonLines(path)
    file.open_at(0)
    length = file.append([{"a": 1}, {"a": 2}])
    os.truncate(path, length - 3)
    assert file.open_at(length) == 8
    path.unlink()
    assert file.open_at(length) == 0
    file.close()


@pytest.mark.parametrize("change", ["deleted", "replaced", "shortened", "extended", "folder deleted"])
def test_what_others_do_to_an_open_file_is_noticed(path, change):
    file = JsonLines(path)
    assert not file.is_intact
    file.open_at(0)
    file.append([{"a": 1}])
    assert file.is_intact
    content = path.read_bytes()
    if change == "shortened":
        os.truncate(path, len(content) - 1)
    elif change == "extended":
        with path.open("ab") as other:
            other.write(b"x")
    else:
        path.unlink()
        path.write_bytes(content) if change == "replaced" else None
        path.parent.rmdir() if change == "folder deleted" else None
    assert not file.is_intact
    file.rewrite([{"a": 1}])
    assert file.is_intact
    assert path.read_bytes() == content
    file.close()


def test_a_rewrite_that_fails_leaves_the_old_file_and_no_other(path):
    file = JsonLines(path)
    file.open_at(0)
    file.append([{"a": 1}])

    def records():
        yield {"a": 2}
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskError, match="the disk is full"):
        file.rewrite(records())
    assert list(path.parent.iterdir()) == [path]
    assert read(path) == [{"a": 1}]
    assert file.is_intact
    file.close()


def test_a_rewrite_replaces_all_lines_at_once_and_goes_on(path, tmp_path):
    file = JsonLines(path, scratch=tmp_path / "partial")
    file.open_at(0)
    file.append([{"a": 1}])

    def records():
        assert read(path) == [{"a": 1}]  # whole until the new one is
        assert list(path.parent.iterdir()) == [path]
        yield from ({"a": str(number)} for number in range(3))

    length = file.rewrite(records())
    assert length == path.stat().st_size == 30
    file.append([{"a": "3"}])
    file.close()
    assert [record["a"] for record in read(path)] == ["0", "1", "2", "3"]
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_text_no_reader_could_take_is_made_readable(path):
    file = JsonLines(path)
    file.open_at(0)
    file.append([{"prompt": "half a smile: \ud83d"}])
    file.close()
    assert read(path) == [{"prompt": "half a smile: \ufffd"}]


def test_a_file_that_cannot_be_written_is_a_disk_error(path):
    path.mkdir(parents=True)
    with pytest.raises(DiskError, match="cannot write"):
        JsonLines(path).open_at(0)
