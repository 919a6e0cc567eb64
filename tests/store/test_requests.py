"""What rows stand for: expansions, several tools, columns that are none of theirs, errors at their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchrun.tools.bind import Binder
from tests.support.plans import Plans, csv, jsonl


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[Plans]:
    with Plans(tmp_path) as plans:
        yield plans


# --- expansion ------------------------------------------------------------------------------------------


def test_a_row_stands_for_all_combinations_each_with_an_id_of_its_own(plans: Plans) -> None:
    merged = plans.take(
        csv("id,prompt", "a,x", "b,y"), expand={"seed": "1..2", "steps": [20, 30], "repeat": 2}
    )
    assert (merged.rows, merged.identical) == (16, 8)
    rows = plans.rows()
    assert [row.id for row in rows] == [f"{id_}.{n}" for id_ in "ab" for n in range(1, 9)]
    assert [(row.given["seed"], row.given["steps"]) for row in rows[:4]] == [
        ("1", 20),
        ("1", 30),
        ("2", 20),
        ("2", 30),
    ]
    assert {row.line for row in rows} == {2, 3}
    # as a manifest of its own it would have these columns
    assert plans.sources()[1] == {"id": "a.2", "prompt": "x", "seed": 1, "steps": 30}
    assert plans.do(plans.store.form())["columns"] == ["id", "prompt", "seed", "steps"]


def test_more_values_of_an_axis_add_rows_and_leave_the_others_alone(plans: Plans) -> None:
    plans.take(csv("prompt", "x", "y"), expand={"seed": "1..2"})
    plans.buy()
    merged = plans.take(csv("prompt", "x", "y"), expand={"seed": "1..3"})
    assert (merged.new, merged.gone, merged.changed) == (2, 0, 0)
    plans.take(csv("id,prompt", "a,x"), expand={"seed": "1..2"})
    plans.buy()
    merged = plans.take(csv("id,prompt", "a,x"), expand={"seed": "1..3"})
    assert (merged.new, merged.gone, merged.changed) == (1, 0, 0)


def test_lists_expand_in_json_and_are_text_in_csv(plans: Plans) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": ["x", "y"], "seed": [1, 2]},
        {"id": "b", "prompt": "z", "seed": None},
    ]
    plans.take(jsonl(rows), name="list.jsonl")
    assert [(row.id, row.given["prompt"], row.given.get("seed")) for row in plans.rows()] == [
        ("a.1", "x", "1"),
        ("a.2", "x", "2"),
        ("a.3", "y", "1"),
        ("a.4", "y", "2"),
        ("b", "z", None),
    ]
    plans.take(csv("id,prompt", 'c,"[""x"", ""y""]"'))
    assert plans.rows()[0].given["prompt"] == '["x", "y"]'


def test_an_empty_list_is_an_error_under_the_column_s_own_name(plans: Plans) -> None:
    rows: list[dict[str, Any]] = [{"caption": [], "id": "a"}, {"caption": "x", "id": "b"}]
    (told,) = plans.refuse(jsonl(rows), name="list.jsonl", map={"prompt": "caption"})
    assert told == "jsonl:1: caption: the list is empty; write at least one value, or null for the default"


def test_a_random_seed_is_drawn_from_the_row_and_stays(plans: Plans) -> None:
    binder = Binder(plans.catalog.find("Retro-Cartoons"))

    def seeds() -> dict[str, object]:
        return {
            f"{row.given['prompt']} {row.key[-2:]}": binder.body(row.given, uploads={}, seed_key=row.key)[
                "seed"
            ]
            for row in plans.rows()
        }

    plans.take(csv("prompt", "a cat", "a dog", "a fox", "a cat"), expand={"seed": "random"})
    first = seeds()
    assert len(set(first.values())) == 4  # identical rows too have each its own
    plans.take(csv("prompt", "a hen", "a cat", "a fox", "a dog", "a cat"), expand={"seed": "random"})
    again = seeds()
    assert {name: again[name] for name in first} == first


def test_an_expansion_beyond_all_measure_needs_a_word_and_costs_nothing(plans: Plans) -> None:
    (told,) = plans.refuse(csv("prompt", "x", "y"), expand={"seed": "1..999999999999"})
    assert told == (
        "csv:2: the expansion makes more than 100,000 requests; narrow it, or allow it with --max-requests N"
    )
    # however it is come by: many rows, or repeats
    (told,) = plans.refuse(csv("prompt", "x", "y", "z"), expand={"seed": "1..4"}, max_requests=11)
    assert told.startswith("csv:4: the expansion makes more than 11 requests")
    assert plans.refuse(csv("prompt", "x"), expand={"repeat": 12}, max_requests=11)
    assert plans.take(csv("prompt", "x", "y", "z"), expand={"seed": "1..4"}, max_requests=12).rows == 12
    # rows that stand for themselves are not bounded by it
    assert plans.take(csv("prompt", *map(str, range(30))), max_requests=12).rows == 30


def test_an_axis_that_a_tool_does_not_know_does_not_expand_its_rows(plans: Plans) -> None:
    text = csv("tool,prompt,inputImageUrl", "instant-id,x,https://x.y/z.png", "Retro-Cartoons,y,")
    merged = plans.take(text, expand={"stepsRefiner": [10, 20]})
    assert merged.by_tool == {"/Run/wiro/instant-id": (1, 1), "/Run/retroAIx/Retro-Cartoons": (2, 8)}


# --- columns that are no parameters ---------------------------------------------------------------------

WITH_NOTES = csv("prompt,promt2,note", "x,,first", "y,,second")


def test_a_column_that_is_no_parameter_is_one_error_naming_the_closest(plans: Plans) -> None:
    assert plans.refuse(csv("prompt,negativPrompt", "x,a", "y,b", "z,")) == [
        "csv:2: negativPrompt: is no parameter of Retro-Cartoons (2 rows); did you mean negativePrompt? "
        "--extra keep carries such columns to the results, --extra drop leaves them out"
    ]


def test_extra_columns_are_kept_untouched_or_dropped(plans: Plans) -> None:
    rows = [{"prompt": "x", "note": {"deep": [1, None, 2.50]}, "n": 7, "empty": ""}]
    plans.take(jsonl(rows), name="list.jsonl", extra="keep")
    assert plans.rows()[0].extra == {"note": {"deep": [1, None, 2.5]}, "n": 7, "empty": ""}
    plans.take(jsonl(rows), name="list.jsonl", extra="drop")
    assert plans.rows()[0].extra == {}
    plans.take(csv("prompt,note", "x,01", "y,"), extra="keep")
    assert [row.extra for row in plans.rows()] == [{"note": "01"}, {}]


def test_what_is_carried_along_follows_the_manifest_without_buying_anything(plans: Plans) -> None:
    plans.take(csv("prompt,note", "x,old"), extra="keep")
    plans.buy()
    plans.do(plans.store.set_listing_mark({"settled": 1}, instead_of={}))
    merged = plans.take(csv("prompt,note", "x,new"), extra="keep")
    assert (merged.new, merged.changed) == (0, 0)
    assert plans.rows()[0].extra == {"note": "new"}
    assert plans.do(plans.store.listing_mark()) == {}  # what the sidecar files say is not true any more


def test_text_that_nothing_uses_is_hinted_at(plans: Plans) -> None:
    plans.take(
        csv("prompt,caption", "x,a long text of many words", "y,another text of many words"), extra="keep"
    )
    assert any(hint.column == "caption" and "--map prompt=caption" in hint.message for hint in plans.hints)


# --- mixed tools ----------------------------------------------------------------------------------------


def test_rows_of_several_tools_each_take_their_own_columns(plans: Plans) -> None:
    text = csv(
        "tool,prompt,inputImageUrl,stepsRefiner",
        "instant-id,x,https://x.y/z.png,",
        "Retro-Cartoons,y,,15",
        "wiro/text-to-image-sd-lora,z,,",
        ",w,,",
    )
    merged = plans.take(text)
    assert merged.by_tool == {
        "/Run/wiro/instant-id": (1, 1),
        "/Run/retroAIx/Retro-Cartoons": (2, 8),
        "/Run/wiro/text-to-image-sd-lora": (1, 4),
    }
    rows: list[dict[str, Any]] = [
        {"tool": "instant-id", "prompt": "x", "inputImageUrl": "https://x.y/z.png", "stepsRefiner": None},
        {"tool": "Retro-Cartoons", "prompt": "y", "inputImageUrl": None, "stepsRefiner": 15},
    ]
    assert plans.take(jsonl(rows), name="list.jsonl").new == 0


def test_a_value_under_another_tool_s_column_is_an_error_at_its_row(plans: Plans) -> None:
    text = csv(
        "tool,prompt,inputImageUrl", "instant-id,x,https://x.y/z.png", "Retro-Cartoons,y,https://x.y/z.png"
    )
    assert plans.refuse(text) == [
        "csv:3: inputImageUrl: is a parameter of another tool, not of Retro-Cartoons; leave it empty"
    ]


def test_a_set_reaches_the_rows_whose_tool_knows_it(plans: Plans) -> None:
    text = csv("tool,prompt,inputImageUrl", "instant-id,x,https://x.y/z.png", "Retro-Cartoons,y,")
    plans.take(text, set={"stepsRefiner": 15, "samples": 1})
    assert [dict(row.given) for row in plans.rows()] == [
        {"prompt": "x", "inputImageUrl": "https://x.y/z.png", "samples": 1},
        {"prompt": "y", "stepsRefiner": 15, "samples": 1},
    ]


def test_one_column_can_serve_different_parameters_of_different_tools(plans: Plans) -> None:
    text = csv("tool,text", "Retro-Cartoons,a cat", "story-diffusion-advanced,wake up | go to bed")
    settings: dict[str, Any] = {
        "map": {"prompt": "text", "generalPrompt": "text"},
        "set": {"prompt": "a woman img"},
    }
    plans.take(text, **settings)
    assert [row.given.get("generalPrompt") for row in plans.rows()] == [None, "wake up | go to bed"]
    assert plans.rows()[0].given["prompt"] == "a cat"


def test_a_row_without_a_tool_or_of_none_that_is_known_says_so(plans: Plans) -> None:
    plans.tool = None
    wrong, missing = plans.refuse(csv("kind,prompt", "retro-cartons,x", ",y"), map={"tool": "kind"})
    assert wrong.startswith('csv:2: kind: no tool is called "retro-cartons"; did you mean')
    assert missing == "csv:3: the row names no tool; use --tool TOOL or give the manifest a column tool"
    (told,) = plans.refuse('{"tool": 7.5, "prompt": "x"}\n', name="list.jsonl")
    assert told == 'jsonl:1: tool: must be text, not "7.5"'


# --- a row's own value and an expansion ------------------------------------------------------------------


def test_a_row_s_own_value_wins_over_the_expansion_and_is_not_expanded_along_it(plans: Plans) -> None:
    settings = {"expand": {"seed": "1..3", "steps": [20, 30]}}
    plans.take(csv("id,prompt,seed", "a,x,7", "b,y,"), **settings)
    assert [row.id for row in plans.rows()] == ["a.1", "a.2", *(f"b.{n}" for n in range(1, 7))]
    given = [(str(row.given["seed"]), row.given["steps"]) for row in plans.rows()]
    assert given[:3] == [("7", 20), ("7", 30), ("1", 20)]
    (hint,) = [hint for hint in plans.hints if "--expand" in hint.message and "own" in hint.message]
    assert str(hint).endswith(
        "list.csv: seed: 1 row has a value of its own, which wins over --expand seed: not expanded along it"
    )
    # so rows written back with the values of their expansion are not expanded again
    again = [",".join(str(cell) for cell in source.values()) for source in plans.sources()[:2]]
    merged = plans.take(csv(",".join(plans.sources()[0]), *again), **settings)
    assert (merged.rows, merged.new) == (2, 0)


def test_a_wrong_value_of_the_row_s_own_is_shown_as_its_own(plans: Plans) -> None:
    (told,) = plans.refuse(csv("prompt,seed", "x,many"), expand={"seed": "1..3"})
    assert told.startswith("csv:2: seed: ")


# --- errors at their place ------------------------------------------------------------------------------


def test_an_error_is_shown_under_the_name_the_user_gave_the_column(plans: Plans) -> None:
    told = plans.refuse(
        csv("nr,caption,rounds", "1,x,many", "2,,20", "1,z,20"),
        map={"id": "nr", "prompt": "caption", "steps": "rounds"},
        set={"scale": "huge"},
    )
    assert [line.split(": ")[:2] for line in told] == [
        ["csv:2", "rounds"],
        ["csv:2", "--set scale"],
        ["csv:3", "--set scale"],
        ["csv:3", "caption"],
        ["csv:4", "--set scale"],
        ["csv:4", "nr"],
    ]


def test_an_error_of_an_axis_is_shown_as_the_axis_s(plans: Plans) -> None:
    told = plans.refuse(csv("prompt", "x"), expand={"steps": [20, "many"]})
    assert [line.split(": ")[1] for line in told] == ["--expand steps"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"set": {"step": 20}},
            "--set step: no tool of the manifest has this parameter; did you mean steps?",
        ),
        ({"expand": {"stps": "1..3"}}, "--expand stps: no tool of the manifest has this parameter"),
        ({"map": {"promt": "prompt"}}, "--map promt: no tool of the manifest has this parameter"),
        ({"map": {"prompt": "caption"}}, '--map prompt=caption: the manifest has no column "caption"'),
        (
            {"map": {"negativePrompt": "Prompt"}},
            '--map negativePrompt=Prompt: the manifest has no column "Prompt"; did you mean prompt? (upper',
        ),
        ({"expand": {"tool": ["instant-id"]}}, "--expand tool: no tool of the manifest has this parameter"),
    ],
)
def test_a_setting_that_means_nothing_is_an_error(plans: Plans, settings: dict[str, Any], told: str) -> None:
    lines = plans.refuse(csv("prompt", "x"), **settings)
    assert any(line.removeprefix("csv: ").startswith(told) for line in lines), lines
    # rows may be skipped, settings may not
    assert plans.read(csv("prompt", "x"), skip_invalid=True, **settings) is None


def test_a_column_that_differs_in_case_alone_is_told_so(plans: Plans) -> None:
    told = plans.refuse(csv("ID,Prompt", "a,x"))
    assert any(
        "ID: is no parameter of Retro-Cartoons; did you mean id? (upper and lower case" in line
        for line in told
    )
    assert any("; did you mean prompt? (upper and lower case matter)" in line for line in told)
    plans.take(csv("ID,prompt", "a,x"), extra="keep")
    assert any("ID: is not id, since upper and lower case matter" in str(hint) for hint in plans.hints)


def test_all_errors_of_the_whole_manifest_are_found_at_once_and_nothing_is_planned(plans: Plans) -> None:
    told = plans.refuse(csv("id,prompt,steps", "a,,x", "b,ok,20", "b,ok,y", "c,ok,20,too much"))
    assert [line.split(": ")[0] for line in told] == ["csv:2", "csv:2", "csv:4", "csv:5", "csv:4"]
    assert plans.rows() == []
    assert plans.stamp() is None


def test_what_no_service_could_mean_is_refused_before_it_breaks_the_sums(plans: Plans) -> None:
    (told,) = plans.refuse(csv("prompt,samples", "x,999999999"))
    assert told == "csv:2: samples: 999,999,999 images cannot be meant; write 100,000 at most"
