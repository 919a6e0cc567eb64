"""`batchrun check`: everything is found and counted, nothing is sent, nothing stays behind."""

from __future__ import annotations

import json

from tests.support.command import TOOL, Here


def test_a_right_manifest_is_counted_without_keys_and_leaves_nothing(alone: Here) -> None:
    alone.rows(3)
    ended = alone.batchrun("check", "p.csv", "--tool", TOOL, "--expand", "seed=1..2", "--set", "samples=2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"6 rows, 12 images to expect\n  {TOOL}: 6 rows\n")
    assert ended.stdout.endswith("ready to run\n")
    assert sorted(path.name for path in alone.folder.iterdir()) == ["p.csv"]


def test_hints_tell_what_is_probably_not_meant(alone: Here) -> None:
    alone.rows(3)
    ended = alone.batchrun("check", "p.csv", "--tool", TOOL)
    assert "hint: p.csv: samples: 3 rows" in ended.stdout
    assert "hint: p.csv: seed: " in ended.stdout


def test_a_wrong_manifest_is_2_and_tells_each_place(alone: Here) -> None:
    alone.write("m.csv", f"tool,id,prompt,steps\n{TOOL},a,x,20\n{TOOL},b,,20\nno-tool,c,x,1\n")
    ended = alone.batchrun("check", "m.csv")
    assert ended.returncode == 2
    places = [line.split(": ")[0] for line in ended.stderr.splitlines()]
    assert places == ["m.csv:3", "m.csv:4"]
    assert "2 errors: nothing would be sent" in ended.stdout


def test_invalid_rows_that_are_to_be_skipped_are_no_reason_to_fail(alone: Here) -> None:
    alone.write("m.csv", "id,prompt,steps\na,x,20\nb,x,ten\n")
    ended = alone.batchrun("check", "m.csv", "--tool", TOOL, "--skip-invalid")
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"2 rows, 4 images to expect\n  {TOOL}: 1 row\n"), "as run counts them"
    assert "1 error: the rows that have one are left out (--skip-invalid)" in ended.stdout
    assert "hint: m.csv: samples: 1 row of Retro-Cartoons leaves it at 4: " in ended.stdout


def test_as_json_it_tells_all_of_it(alone: Here) -> None:
    rows = "".join(f"b{n},x,ten\n" for n in range(70))
    alone.write("m.csv", f"id,prompt,steps\na,x,20\n{rows}")
    ended = alone.batchrun("check", "m.csv", "--tool", TOOL, "--json")
    assert ended.returncode == 2
    told = json.loads(ended.stdout)
    assert list(told) == ["rows", "images", "tools", "errors", "warnings", "hints"]
    assert (told["rows"], told["tools"]) == (71, {TOOL: 71})
    assert len(told["errors"]) == 70
    assert told["errors"][0]["line"] == 3
    assert told["hints"]


def test_it_takes_the_options_of_run_so_that_one_line_serves_for_both(alone: Here) -> None:
    alone.rows(1)
    ended = alone.batchrun(
        "check", "p.csv", "--tool", TOOL, "--out", "x", "--limit", "1", "--concurrency", "4", "--simulate",
        "--env-file", "nowhere", "--log", "x.log", "--no-display",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "a run would work on the first 1 row only (--limit)" in ended.stdout
    assert sorted(path.name for path in alone.folder.iterdir()) == ["p.csv"]


def test_every_option_of_run_is_one_of_check() -> None:
    from batchrun.cli.check import check
    from batchrun.cli.run import run

    assert {option.name for option in run.params} <= {option.name for option in check.params}


def test_a_mistake_of_every_row_is_said_once_and_hides_no_other(alone: Here) -> None:
    rows = "".join(f"a{n},x,20,y\n" for n in range(99))
    alone.write("m.csv", f"id,prompt,steps,note\n{rows}z,x,ten,y\n")
    ended = alone.batchrun("check", "m.csv", "--tool", TOOL, "--map", "negativePrompt=gone")
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("m.csv: ")
    assert any("--map negativePrompt=gone: the manifest has no column" in each for each in lines[:2])
    assert 'm.csv:101: steps: "ten" is not a whole number; write one like 60' in lines
    assert len(lines) < 10
