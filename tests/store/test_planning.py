"""A manifest becomes the rows of a run: what was bought is known again however the manifest changes, and
nothing is bought twice without a word."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchrun.model import Failure, LocalImage, State
from batchrun.store.planning import Planning
from batchrun.tools.catalog import load, to_json
from tests.support.images import draw
from tests.support.plans import Plans, csv, jsonl
from tests.support.rows import merge, planned, recount, staged, to_cancelled, to_finished, to_in_flight

THREE = csv("prompt", "a cat", "a dog", "a fox")


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[Plans]:
    with Plans(tmp_path) as plans:
        yield plans


def prompts(plans: Plans) -> list[object]:
    return [row.given.get("prompt") for row in plans.rows()]


# --- what is known again --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        # the same file
        THREE,
        # sorted
        csv("prompt", "a fox", "a dog", "a cat"),
        # rows put before, between and behind
        csv("prompt", "a hen", "a cat", "a cow", "a dog", "a fox", "a pig"),
        # empty lines, line ends, quotes: the lines' numbers change, the rows do not
        'prompt\r\n\r\n\r\n"a cat"\r\n\r\n"a dog"\r\n\r\na fox\r\n',
        # further columns, empty or by default
        csv("prompt,negativePrompt,steps", "a cat,,", "a dog,,", "a fox,,"),
        # columns in another order
        csv("steps,prompt", ",a cat", ",a dog", ",a fox"),
    ],
    ids=["same", "sorted", "inserted", "renumbered", "empty columns", "reordered columns"],
)
@pytest.mark.parametrize("ids", [False, True], ids=["without ids", "with ids"])
def test_a_done_row_is_never_planned_again(plans: Plans, changed: str, ids: bool) -> None:
    def named(text: str) -> str:
        if not ids:
            return text
        lines = text.splitlines(keepends=True)
        named_lines = ["id," + lines[0]]
        for line in lines[1:]:
            prompt = next((word for word in ("cat", "dog", "fox", "hen", "cow", "pig") if word in line), "")
            named_lines.append(f"{prompt},{line}" if prompt else line)
        return "".join(named_lines)

    plans.take(named(THREE))
    plans.buy()
    bought = {row.key for row in plans.rows()}
    merged = plans.take(named(changed))
    states = {row.given["prompt"]: row.state for row in plans.rows()}
    for prompt in ("a cat", "a dog", "a fox"):
        assert states[prompt] is State.DONE
    assert merged.new == len(states) - 3
    assert merged.changed == merged.rerun == merged.replaced == merged.gone == 0
    assert bought <= {row.key for row in plans.rows()}
    assert plans.do(plans.store.counts()) == recount(plans.store.path)


def test_other_forms_of_the_same_list_are_the_same_rows(plans: Plans) -> None:
    plans.take(THREE)
    plans.buy()
    rows = [{"prompt": f"a {word}"} for word in ("cat", "dog", "fox")]
    assert plans.take(jsonl(rows), name="list.jsonl").new == 0
    assert plans.take(json.dumps(rows), name="list.json").new == 0
    assert plans.take(THREE, name="list.tsv").new == 0
    assert plans.states() == ["done"] * 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # --set and a column, both ways
        ((csv("prompt", "a cat"), {"set": {"steps": "20"}}), (csv("prompt,steps", "a cat,20"), {})),
        ((csv("prompt,steps", "a cat,20"), {}), (csv("prompt", "a cat"), {"set": {"steps": 20}})),
        # an axis of one value
        ((csv("prompt,steps", "a cat,20"), {}), (csv("prompt", "a cat"), {"expand": {"steps": "20"}})),
        # a column of another name
        ((csv("prompt", "a cat"), {}), (csv("caption", "a cat"), {"map": {"prompt": "caption"}})),
        # a tool's names
        ((csv("prompt", "a cat"), {}), (csv("tool,prompt", "retroAIx/Retro-Cartoons,a cat"), {})),
        # the spelling of numbers and of a select's value
        (
            (csv("prompt,steps,refiner", "a cat,20,NO"), {}),
            (csv("prompt,steps,refiner", "a cat,20.0,--only_base_model"), {}),
        ),
        # what is carried along
        ((csv("prompt", "a cat"), {}), (csv("prompt,note", "a cat,nice"), {"extra": "keep"})),
    ],
)
@pytest.mark.parametrize("ids", [False, True], ids=["without ids", "with ids"])
def test_the_same_request_given_otherwise_is_the_same_row(
    plans: Plans, before: tuple[str, dict[str, Any]], after: tuple[str, dict[str, Any]], ids: bool
) -> None:
    def named(text: str) -> str:
        header, row = text.splitlines()
        return csv(f"id,{header}", f"one,{row}") if ids else text

    plans.take(named(before[0]), **before[1])
    plans.buy()
    merged = plans.take(named(after[0]), **after[1])
    assert (merged.new, merged.changed, merged.replaced, merged.gone) == (0, 0, 0, 0)
    assert plans.states() == ["done"]
    # and back again
    merged = plans.take(named(before[0]), **before[1])
    assert (merged.new, merged.changed, merged.gone) == (0, 0, 0)


def test_a_value_moved_to_a_column_counts_as_the_row_s_own_from_then_on(plans: Plans) -> None:
    plans.take(csv("prompt", "a cat"), set={"steps": 20})
    plans.buy()
    plans.take(csv("prompt,steps", "a cat,20"))
    # a further --set is then a change of that row, and no new row beside it
    merged = plans.take(csv("prompt,steps", "a cat,20"), set={"width": 512})
    assert (merged.new, merged.changed) == (0, 1)


def test_a_changed_default_of_the_tool_changes_no_row(plans: Plans, tmp_path: Path) -> None:
    plans.take(THREE, set={"seed": 7})
    plans.buy(1)
    tool = plans.catalog.find("Retro-Cartoons")
    page = to_json(tool)
    for parameter in page["parameters"]:
        if parameter["name"] in ("steps", "negativePrompt", "samples"):
            parameter["default"] = "9"
    (tmp_path / "tools" / "retroAIx").mkdir(parents=True)
    (tmp_path / "tools" / "retroAIx" / "Retro-Cartoons.json").write_text(json.dumps(page))
    plans.catalog = load(tmp_path / "tools")
    merged = plans.take(THREE + "a hen\n", set={"seed": 7})
    assert (merged.new, merged.changed, merged.replaced) == (1, 0, 0)
    assert plans.states() == ["done", "planned", "planned", "planned"]
    # old rows keep the description they were bound to, new ones have the new one
    numbers = [row.tool for row in plans.rows()]
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]
    described = json.loads(plans.do(plans.store.tool(numbers[3])))
    assert next(p for p in described["parameters"] if p["name"] == "steps")["default"] == "9"


def test_local_images_are_known_by_their_content(plans: Plans, tmp_path: Path) -> None:
    plans.tool = "instant-id"
    (tmp_path / "face.png").write_bytes(draw("PNG"))
    plans.take(csv("prompt,inputImageUrl", "a cat,face.png"))
    plans.buy()
    (tmp_path / "renamed.png").write_bytes(draw("PNG"))
    merged = plans.take(csv("prompt,inputImageUrl", "a cat,renamed.png"))
    assert (merged.new, merged.changed) == (0, 0)
    (tmp_path / "renamed.png").write_bytes(draw("JPEG"))
    merged = plans.take(csv("id,prompt,inputImageUrl", "x,a cat,renamed.png"))
    assert merged.new == 1
    plans.buy()
    (tmp_path / "renamed.png").write_bytes(draw("WEBP"))
    merged = plans.take(csv("id,prompt,inputImageUrl", "x,a cat,renamed.png"))
    assert (merged.new, merged.changed) == (0, 1)
    image = plans.rows()[0].given["inputImageUrl"]
    assert isinstance(image, LocalImage)  # the one that was bought stays on record
    assert image.size_bytes == len(draw("JPEG"))


# --- identical rows, ids --------------------------------------------------------------------------------


def test_identical_rows_are_distinct_pictures_and_all_are_asked_for(plans: Plans) -> None:
    merged = plans.take(csv("prompt", "a cat", "a dog", "a cat", "a cat"))
    assert (merged.rows, merged.new, merged.identical) == (4, 4, 2)
    keys = [row.key for row in plans.rows()]
    assert len(set(keys)) == 4
    assert [key.rpartition(".")[2] for key in keys] == ["1", "1", "2", "3"]
    plans.buy(1, 2)
    # one more and one less leave the bought ones alone
    assert plans.take(csv("prompt", "a cat", "a cat", "a dog", "a cat", "a cat")).new == 1
    assert sorted(plans.states()) == ["done", "done", "planned", "planned", "planned"]
    merged = plans.take(csv("prompt", "a dog", "a cat"))
    assert (merged.new, merged.gone) == (0, 3)
    assert plans.states() == ["done", "done"]
    assert not any("ask for the very same" in hint.message for hint in plans.hints)


def test_identical_rows_are_hinted_at(plans: Plans) -> None:
    plans.take(csv("prompt", "a cat", "a cat", "a cat"))
    assert any(hint.message.startswith("2 rows ask for the very same") for hint in plans.hints)


def test_the_same_id_twice_is_an_error_that_names_both_lines(plans: Plans) -> None:
    told = plans.refuse(csv("id,prompt", "a,x", "b,y", "a,z", "c,w", "b,v", "a,u"))
    assert told == [
        f'csv:{line}: id: "{id_}" is already the id of line {first}; write an id of its own, or leave ids out'
        for line, id_, first in ((4, "a", 2), (6, "b", 3), (7, "a", 2))
    ]
    # whatever may be skipped, this may not: which of them would be the row?
    assert plans.read(csv("id,prompt", "a,x", "a,y"), skip_invalid=True) is None
    assert plans.rows() == []


def test_an_id_made_by_expansion_can_meet_one_that_was_written(plans: Plans) -> None:
    plans.take(csv("id,prompt", "a,x", "a.2,y"), expand={"repeat": 2})
    assert [row.id for row in plans.rows()] == ["a.1", "a.2", "a.2.1", "a.2.2"]
    told = plans.refuse(
        jsonl([{"id": "a", "prompt": ["x", "y"]}, {"id": "a.2", "prompt": "z"}]), name="list.jsonl"
    )
    assert told[0].startswith('jsonl:2: id: "a.2" is already the id of line 1')


def test_ids_are_text_with_all_their_zeros_and_no_outer_blanks(plans: Plans) -> None:
    plans.take(csv("id,prompt", "007,x", "7,y", "  b ,z", ",w"))
    assert [row.id for row in plans.rows()] == ["007", "7", "b", None]
    plans.take(jsonl([{"id": 7, "prompt": "y"}, {"id": "007", "prompt": "x"}]), name="list.jsonl")
    assert [row.id for row in plans.rows()] == ["7", "007"]
    assert [row.seq for row in plans.rows()] == [2, 1]


@pytest.mark.parametrize("id_", ["[1]", "1.5", "true", '{"a": 1}'])
def test_an_id_that_is_no_text_is_an_error_and_never_another_row(plans: Plans, id_: str) -> None:
    text = f'{{"id": {id_}, "prompt": "x"}}\n{{"id": "b", "prompt": "y"}}\n'
    (told,) = plans.refuse(text, name="list.jsonl")
    assert told.startswith("jsonl:1: id: must be text, not")
    merged = plans.take(text, name="list.jsonl", skip_invalid=True)
    assert (merged.rows, merged.invalid) == (2, 1)
    assert plans.states() == ["invalid", "planned"]


# --- changed requests -----------------------------------------------------------------------------------


def test_a_done_row_that_asks_for_something_else_is_told_of_and_left_alone(plans: Plans) -> None:
    plans.take(csv("id,prompt", "a,a cat", "b,a dog"))
    plans.buy()
    for _ in range(2):  # told again at every start
        merged = plans.take(csv("id,prompt", "a,a lion", "b,a dog"))
        assert (merged.changed, merged.new, merged.replaced, merged.rerun) == (1, 0, 0, 0)
        assert plans.states() == ["done", "done"]
        assert prompts(plans) == ["a cat", "a dog"]
        assert plans.stamp() == ""
    merged = plans.take(csv("id,prompt", "a,a cat", "b,a dog"))
    assert merged.changed == 0
    assert plans.stamp() == "now"


def test_rerun_changed_asks_for_the_changed_rows_anew_and_for_no_other(plans: Plans) -> None:
    plans.take(csv("id,prompt,samples", "a,a cat,1", "b,a dog,1"))
    plans.buy()
    name = plans.rows()[0].name
    merged = plans.take(csv("id,prompt,samples", "a,a lion,2", "b,a dog,1"), rerun_changed=True)
    assert (merged.rerun, merged.changed, merged.new) == (1, 0, 0)
    assert merged.by_tool == {"/Run/retroAIx/Retro-Cartoons": (1, 2)}
    lion, dog = plans.rows()
    assert (lion.state, lion.generation, lion.images, lion.given["prompt"]) == (State.PLANNED, 1, 2, "a lion")
    assert (lion.name, lion.attempts, lion.outputs) == (name, 0, ())
    assert (dog.state, dog.generation) == (State.DONE, 0)
    assert plans.do(plans.store.counts()) == recount(plans.store.path)
    # and once only
    plans.buy()
    merged = plans.take(csv("id,prompt,samples", "a,a lion,2", "b,a dog,1"), rerun_changed=True)
    assert (merged.rerun, merged.changed) == (0, 0)


@pytest.mark.parametrize("ids", [False, True], ids=["without ids", "with ids"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"steps": 20}, {"steps": 30}),
        ({}, {"steps": 30}),
        ({"steps": 20}, {}),
        ({"steps": 20}, {"width": 512}),
    ],
    ids=["other value", "added", "taken away", "other parameter"],
)
def test_a_changed_set_is_a_change_of_every_row_and_no_new_rows(
    plans: Plans, ids: bool, before: dict[str, int], after: dict[str, int]
) -> None:
    text = csv("id,prompt", "a,x", "b,y", "c,x") if ids else csv("prompt", "x", "y", "x")
    plans.take(text, set=before)
    plans.buy(1, 2)
    merged = plans.take(text, set=after)
    # the bought ones stay, the others ask for the new value at no cost
    assert (merged.new, merged.gone, merged.changed, merged.replaced) == (0, 0, 2, 1)
    assert plans.states() == ["done", "done", "planned"]
    assert plans.rows()[2].given.get("steps") == after.get("steps")
    merged = plans.take(text, set=after, rerun_changed=True)
    assert (merged.new, merged.gone, merged.rerun) == (0, 0, 2)
    assert plans.states() == ["planned"] * 3
    plans.buy()
    assert plans.take(text, set=after).changed == 0
    # back to the first value: changed again
    assert plans.take(text, set=before).changed == 3


def test_a_changed_set_is_seen_although_rows_were_out_of_the_manifest_meanwhile(plans: Plans) -> None:
    plans.take(THREE, set={"steps": 20})
    plans.buy()
    plans.take(csv("prompt", "a dog"), set={"steps": 20})
    merged = plans.take(THREE, set={"steps": 30})
    assert (merged.new, merged.changed) == (0, 3)


def test_rows_that_were_not_bought_ask_for_what_the_manifest_says_now(plans: Plans) -> None:
    plans.take(csv("id,prompt", *(f"{id_},old" for id_ in "abcdefgh")))
    rows = plans.do(plans.store.claim(State.PLANNED, limit=9))
    store, do = plans.store, plans.do
    do(store.record_rejected(rows[1].seq, Failure("rejected", "no")))
    do(to_cancelled(store, rows[2].seq))
    do(to_in_flight(store, rows[3].seq))
    do(to_finished(store, rows[4].seq))
    do(to_finished(store, rows[5].seq))
    do(store.record_lost(rows[5].seq, Failure("images gone", "deleted")))
    do(to_finished(store, rows[6].seq))
    do(store.record_lost(rows[6].seq, Failure("download failed", "404")))
    new = csv("id,prompt", *(f"{id_},new" for id_ in "abcdefgh"))
    merged = plans.take(new)
    assert plans.states() == [
        "planned",  # a: planned
        "planned",  # b: failed, unpaid
        "planned",  # c: cancelled
        "in_flight",  # d: on its way
        "finished",  # e: paid, still to be saved
        "failed",  # f: paid, and lost
        "failed",  # g: paid, and still at the service
        "planned",  # h: planned
    ]
    assert prompts(plans) == ["new", "new", "new", "old", "old", "old", "old", "new"]
    assert (merged.replaced, merged.changed) == (4, 4)
    merged = plans.take(new, rerun_changed=True)
    # what is under way is not taken back; its change is told again
    assert (merged.rerun, merged.changed) == (2, 2)
    assert plans.states()[3:7] == ["in_flight", "finished", "planned", "planned"]
    assert plans.stamp() == ""
    assert do(store.counts()) == recount(store.path)


# --- rows that leave and come back ----------------------------------------------------------------------


def test_rows_no_longer_in_the_manifest_are_left_alone_and_not_counted(plans: Plans) -> None:
    plans.take(csv("id,prompt", "a,x", "b,y", "c,z"))
    plans.buy(1, 2)
    before = {row.id: row for row in plans.rows()}
    merged = plans.take(csv("id,prompt", "b,y"))
    assert (merged.rows, merged.gone) == (1, 2)
    counts = plans.do(plans.store.counts())
    assert (counts.by_state, counts.images) == ({State.DONE: 1}, 1)
    assert counts == recount(plans.store.path)
    assert {row.id for row in plans.rows(present=False)} == {"a", "c"}
    merged = plans.take(csv("id,prompt", "a,x", "b,y", "c,z"))
    assert (merged.new, merged.gone, merged.changed) == (0, 0, 0)
    assert {row.id: row for row in plans.rows()} == before
    assert plans.do(plans.store.counts()) == recount(plans.store.path)


def test_a_row_that_comes_back_asking_for_something_else_is_a_changed_row(plans: Plans) -> None:
    plans.take(csv("id,prompt", "a,x", "b,y"))
    plans.buy(1)
    plans.take(csv("id,prompt", "c,z"))
    merged = plans.take(csv("id,prompt", "a,other", "b,other"))
    assert (merged.changed, merged.replaced, merged.new, merged.gone) == (1, 1, 0, 1)


# --- file names -----------------------------------------------------------------------------------------


def test_names_that_differ_only_by_case_do_not_meet_on_any_file_system(plans: Plans) -> None:
    plans.take(csv("id,prompt", "cat,x", "Cat,y", "CAT,z"))
    plans.take(csv("id,prompt", "cat,x", "Cat,y", "CAT,z", "cAt,w", "a/b,v", "a:b,u", "con,t"))
    names = [row.name for row in plans.rows()]
    assert names[0] == "cat"
    assert len({name.casefold() for name in names}) == 7
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in names)


def test_a_row_keeps_its_file_name_wherever_its_line_goes(plans: Plans) -> None:
    plans.take(csv("prompt", "a cat", "a dog"))
    names = {row.given["prompt"]: row.name for row in plans.rows()}
    assert names["a cat"].startswith("000002-")
    plans.take(csv("prompt", "a hen", "a dog", "a cat"))
    after = {row.given["prompt"]: (row.line, row.name) for row in plans.rows()}
    assert after["a cat"] == (4, names["a cat"])
    assert after["a dog"] == (3, names["a dog"])
    assert after["a hen"][1].startswith("000002-")


def test_a_row_that_takes_the_line_and_content_of_a_rerun_one_has_a_name_of_its_own(plans: Plans) -> None:
    plans.take(csv("prompt", "a cat"), set={"steps": 20})
    plans.buy()
    plans.take(csv("prompt", "a cat"), set={"steps": 30}, rerun_changed=True)
    plans.buy()
    # the first request once more, beside the one that replaced it
    merged = plans.take(csv("prompt,steps", "a cat,20", "a cat,30"))
    assert merged.new == 1
    assert len({row.name for row in plans.rows()}) == 2


# --- invalid rows ---------------------------------------------------------------------------------------

SOME_WRONG = csv("id,prompt,steps", "a,x,20", "b,,20", "c,y,many")


def test_with_skip_invalid_wrong_rows_are_recorded_and_the_rest_is_planned(plans: Plans) -> None:
    merged = plans.take(SOME_WRONG, skip_invalid=True)
    assert (merged.rows, merged.invalid, merged.images) == (3, 2, 4)
    assert plans.states() == ["planned", "invalid", "invalid"]
    assert plans.do(plans.store.counts()) == recount(plans.store.path)
    failures = [row.failure for row in plans.rows()]
    assert failures[0] is None
    assert failures[1] is not None
    assert "is required" in failures[1].message
    settled = plans.do(plans.store.settled_after(0, limit=9))
    assert [item.row.id for item in settled] == ["b", "c"]
    rejected = plans.do(plans.store.rejected_rows(after_seq=0, limit=9))
    assert [row.cells for row in rejected] == [
        {"id": "b", "steps": "20"},
        {"id": "c", "prompt": "y", "steps": "many"},
    ]
    # read again they are the same
    merged = plans.take(SOME_WRONG, skip_invalid=True)
    assert (merged.new, merged.replaced, merged.changed) == (0, 0, 0)


@pytest.mark.parametrize("ids", [False, True], ids=["without ids", "with ids"])
def test_a_corrected_row_is_planned_and_a_spoilt_one_is_not(plans: Plans, ids: bool) -> None:
    text = SOME_WRONG if ids else csv("prompt,steps", "x,20", ",20", "y,many")
    plans.take(text, skip_invalid=True)
    plans.take(text.replace("many", "30"), skip_invalid=True)
    assert plans.states() == ["planned", "invalid", "planned"]
    assert plans.rows()[2].failure is None
    plans.take(text, skip_invalid=True)
    assert plans.states() == ["planned", "invalid", "invalid"]
    assert plans.do(plans.store.counts()) == recount(plans.store.path)


def test_a_done_row_that_is_wrong_now_stays_done_whatever_is_asked(plans: Plans) -> None:
    plans.take(csv("id,prompt,steps", "a,x,20"))
    plans.buy()
    for rerun_changed in (False, True):
        merged = plans.take(
            csv("id,prompt,steps", "a,x,many"), skip_invalid=True, rerun_changed=rerun_changed
        )
        assert (merged.changed, merged.rerun, merged.replaced) == (1, 0, 0)
        assert plans.states() == ["done"]
        assert plans.rows()[0].given["steps"] == 20


def test_a_manifest_whose_form_is_broken_plans_nothing_even_with_skip_invalid(plans: Plans) -> None:
    assert plans.read('prompt\nx\n"never closed\n', skip_invalid=True) is None
    assert plans.read("", skip_invalid=True) is None
    assert plans.rows() == []
    # and the run can be read into again
    assert plans.take(THREE).rows == 3


# --- the state's own side -------------------------------------------------------------------------------


async def test_a_merge_that_fails_changes_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    store = await planned(tmp_path / "state.sqlite3", 3)
    before = await store.counts()

    def broken(connection: Any) -> None:
        planning = Planning(connection)
        planning.tool("{}")
        for line in range(2, 9):
            planning.stage(staged(line, f"new {line}", id="same"))
        planning.merge(manifest="/x", job="{}", at=1.0, stamp="", form="{}", rerun_changed=False)

    with pytest.raises(Exception, match="the id same is there twice"):
        await store.planning(broken)
    assert await store.counts() == before == recount(store.path)
    assert await store.manifest() == "/list.csv"
    merged = await store.planning(lambda connection: merge(connection, [staged(1), staged(9)]))
    assert (merged.new, merged.gone) == (1, 2)
    store.close()


def test_a_job_s_settings_and_the_manifest_s_form_are_kept(plans: Plans) -> None:
    plans.take(csv("id;prompt", "a;x"), delimiter=";", attempts=2)
    assert json.loads(plans.do(plans.store.job()) or "")["attempts"] == 2
    assert plans.do(plans.store.form()) == {"format": "csv", "delimiter": ";", "columns": ["id", "prompt"]}
    assert plans.do(plans.store.manifest()) == str(plans.folder / "list.csv")


def peak_bytes(folder: Path, rows: int, *, is_first: bool) -> int:
    folder.mkdir()
    with Plans(folder) as plans:
        if not is_first:
            plans.take(csv("id,prompt", "before,x"))
        lines = (f"r{n},a picture of {n} birds,20" for n in range(rows))
        (folder / "list.csv").write_text(csv("id,prompt,steps", *lines))
        tracemalloc.start()
        merged = plans.take(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert merged.new == rows
    return peak


@pytest.mark.parametrize("is_first", [True, False])
def test_memory_does_not_grow_with_the_manifest(tmp_path: Path, is_first: bool) -> None:
    few = peak_bytes(tmp_path / "few", 15_000, is_first=is_first)  # buffers and groups have their full size
    many = peak_bytes(tmp_path / "many", 30_000, is_first=is_first)
    assert many - few < 35 * 15_000  # less than a row's line for each further row


@pytest.mark.parametrize(("rows", "chars"), [(25, 1_000_000), (1250, 20_000)])
def test_memory_does_not_grow_with_the_size_of_rows(plans: Plans, rows: int, chars: int) -> None:
    text = jsonl({"prompt": "x" * chars + str(n)} for n in range(rows))
    (plans.folder / "list.jsonl").write_text(text)
    del text
    tracemalloc.start()
    plans.take(None, name="list.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
