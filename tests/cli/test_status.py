"""`batchrun status`: true at any moment, whether a runner lives, was killed, or never was."""

from __future__ import annotations

import json

from tests.support.command import TOOL, Here, simulator, until


def test_as_json_it_counts_every_state(here: Here) -> None:
    here.run(here.rows(2))
    told = here.status()
    assert told["rows"] == {
        "total": 2,
        "planned": 0,
        "in_flight": 0,
        "in_doubt": 0,
        "done": 2,
        "failed": 0,
        "cancelled": 0,
        "invalid": 0,
    }
    assert told["images"] == 2
    assert told["bytes"] > 0
    assert float(told["cost_usd"]) > 0
    assert told["folder"] == str(here.folder / "runs/p")
    assert told["manifest"] == str(here.folder / "p.csv")
    assert told["running"] is False
    assert told["failures"] == []


def test_in_words_it_groups_failures_and_names_the_command(here: Here) -> None:
    with simulator("--fault", "run-validation*2") as wiro:
        Here(here.folder, wiro).run(here.rows(3), "--concurrency", "1")  # refused in their order
    said = here.batchrun("status", "runs/p").stdout
    assert said.startswith("runs/p: no runner is at work\nfrom    p.csv\nrows    3: 1 done, 2 failed\n")
    assert "  2 rows failed: rejected (first in line 2): " in said
    assert said.endswith("batchrun retry runs/p\n")
    (failure,) = here.status()["failures"]
    assert (failure["state"], failure["cause"], failure["rows"], failure["line"]) == (
        "failed",
        "rejected",
        2,
        2,
    )


def test_a_live_runner_is_told_of_and_not_disturbed_and_a_killed_one_is_cleaned_up_after(here: Here) -> None:
    with simulator("--seconds", "0.2", "--slots", "2") as wiro:
        here = Here(here.folder, wiro)
        with here.start("run", here.rows(60), "--tool", TOOL, "--set", "samples=1") as going:
            until(lambda: wiro.stats()["succeeded"] >= 4, "some rows are made")
            told = here.status()
            assert told["running"] is True
            assert told["rows"]["total"] == 60
            assert going.poll() is None
            going.kill()
            going.communicate()
        assert here.status()["running"] is False
        told = here.status()
    lines = (here.folder / "runs/p/results.jsonl").read_text().splitlines()
    assert len([line for line in lines if json.loads(line)["status"] == "done"]) == told["rows"]["done"]
    listed = (here.folder / "runs/p/images/metadata.jsonl").read_text().splitlines()
    assert len(listed) == told["images"]


def test_a_folder_without_a_run_is_2(alone: Here) -> None:
    ended = alone.batchrun("status", "nowhere")
    assert ended.returncode == 2
    assert "holds no run" in ended.stderr
    assert not (alone.folder / "nowhere").exists()


def test_a_state_of_a_newer_version_is_refused_in_words(here: Here) -> None:
    import sqlite3

    here.run(here.rows(1))
    with sqlite3.connect(here.folder / "runs/p/state.sqlite3") as connection:
        connection.execute("PRAGMA user_version = 99")
    ended = here.run("p.csv")
    assert ended.returncode == 2
    assert "newer batchrun" in ended.stderr
