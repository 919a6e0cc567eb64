"""`batchrun cancel`: what runs at the service ends, through the live runner or without one."""

from __future__ import annotations

import io
from dataclasses import replace

from batchrun.cli.cancel import _tell
from batchrun.model import Counts, State
from batchrun.report.talk import Talk
from batchrun.store.orders import Standing
from tests.support.command import TOOL, Here, simulator, until


def test_a_live_runner_cancels_its_tasks_and_stops(here: Here) -> None:
    with simulator("--seconds", "600", "--slots", "2", "--queue") as wiro:
        here = Here(here.folder, wiro)
        with here.start("run", here.rows(3), "--tool", TOOL, "--concurrency", "2") as going:
            until(lambda: wiro.stats()["active"] == 2, "two tasks run")
            ended = here.batchrun("cancel", "runs/p", env={"WIRO_API_KEY": ""})
            said, _ = going.communicate(timeout=60)
        assert ended.returncode == 0, ended.stdout
        assert "the runner is told to cancel" in ended.stdout
        assert "2 rows cancelled" in ended.stdout
        assert going.returncode == 3, said
        assert wiro.stats()["active"] == 0
        assert here.status()["rows"]["planned"] == 1


def test_without_a_runner_it_does_it_itself_and_retry_asks_again(here: Here) -> None:
    with simulator("--seconds", "600") as wiro:
        here = Here(here.folder, wiro)
        with here.start("run", here.rows(2), "--tool", TOOL, "--set", "samples=1") as going:
            until(lambda: here_in_flight(here) == 2, "two rows are in flight")
            going.kill()
            going.communicate()
        ended = here.batchrun("cancel", "runs/p")
        assert ended.returncode == 0, ended.stdout
        assert "2 tasks to cancel" in ended.stdout
        assert ended.stdout.endswith("2 rows cancelled\n")
        assert wiro.stats()["active"] == 0
        wiro.weather(seconds=0.05)
        again = here.batchrun("retry", "runs/p")
        assert again.returncode == 0, again.stdout


def here_in_flight(here: Here) -> int:
    """Rows in flight; 0 while there is no run yet."""
    if not (here.folder / "runs/p/state.sqlite3").exists():
        return 0
    return int(here.status()["rows"]["in_flight"])


def test_where_nothing_runs_it_says_so_and_needs_no_keys(here: Here) -> None:
    here.run(here.rows(1))
    ended = here.batchrun("cancel", "runs/p", env={"WIRO_API_KEY": ""})
    assert ended.returncode == 0
    assert ended.stdout == "nothing was running\n"


def test_tasks_that_had_ended_by_then_are_said_to_have() -> None:
    counts = Counts({State.IN_FLIGHT: 2, State.DONE: 1})
    before = Standing("/m.csv", "{}", counts, (), 2, is_open=False, listed_bytes=None, is_behind=False)
    after = replace(before, counts=Counts({State.DONE: 3}), active=0)
    stream = io.StringIO()
    assert _tell(Talk(stream), before, after) == 0
    assert stream.getvalue() == "nothing to cancel: the tasks had ended, 2 rows done\n"
