"""However tasks are followed, and whatever becomes of lists and sockets, every row comes to its image."""

from __future__ import annotations

import pytest

from batchrun import settings
from batchrun.progress import Fact, Progress
from batchrun.runner import Runner
from batchrun.simulator.server import Simulator
from tests.support.runs import Facts, check_complete, credentials_of, job_of, run_job, write_rows

ROWS = 24


async def all_done(sim, job, folder, facts):
    """One start that brings every row to its image, and tells no token; returns the requests by endpoint."""
    outcome = await run_job(sim, job, facts=facts)
    requests = dict(sim._world.requests)
    assert len(sim.tasks) == ROWS
    assert all(task.token not in repr(facts) for task in sim.tasks)
    assert outcome.exit_code == 0
    check_complete(sim, folder / "run", ROWS)
    return requests


@pytest.mark.parametrize(
    ("track", "faults"),
    [
        ("auto", []),
        ("list", ["list-off"]),
        ("auto", ["list-empty"]),
        ("list", ["list-late=30%", "list-500=30%", "detail-500=20%", "task-late-outputs=30%"]),
        ("websocket", []),
        ("websocket", ["socket-refused"]),
        ("websocket", ["socket-silent@1"]),
        ("websocket", ["socket-refused=30%", "socket-drop=50%", "detail-500=20%", "task-late-outputs=20%"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "calm",
)
async def test_every_row_is_done_however_its_task_is_followed(tmp_path, track, faults):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), track=track, concurrency=ROWS)
    facts = Facts()
    async with Simulator(seconds="0.2-0.6", faults=faults, slots=ROWS, late_s=0.5) as sim:
        requests = await all_done(sim, job, tmp_path, facts)
    notes = [event.details["message"] for event in facts if event.fact is Fact.NOTE]
    if faults in (["list-off"], ["list-empty"]):
        assert sum("one by one" in note for note in notes) == 1
        assert requests["detail"] >= ROWS
    elif track in ("auto", "list") and not faults:
        assert notes == []
        assert requests["list"] + requests.get("detail", 0) < 2 * ROWS
    elif track == "websocket" and not faults:
        assert notes == []
        assert requests["detail"] < 2 * ROWS
        assert requests["socket"] == 1


@pytest.mark.parametrize(
    "faults",
    [[], ["socket-refused"], ["socket-silent"], ["socket-drop=50%"]],
    ids=lambda value: "+".join(value) or "calm",
)
async def test_while_rows_wait_for_a_slot_ends_are_heard_of_where_they_are_told(tmp_path, faults):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds="0.4-0.8", faults=faults, slots=4) as sim:
        requests = await all_done(sim, job, tmp_path, Facts())
    assert requests["socket"] >= 1
    if not faults:
        assert requests["socket"] == 1
        assert requests["list"] + requests["detail"] < 2 * ROWS


@pytest.mark.parametrize("slots", [4, ROWS])
async def test_tokens_are_not_told_to_another_service_nor_where_no_row_waits(tmp_path, slots, monkeypatch):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds="0.2-0.4", slots=slots) as sim:
        credentials = credentials_of(sim)
        if slots < ROWS:  # an address was given for the service, and none for its events
            monkeypatch.setattr(settings, "DEFAULT_SOCKET_URL", credentials.socket_url)
            assert not credentials.has_own_socket
        facts = Facts()
        outcome = await Runner(job, credentials, progress=Progress(facts)).run()
        assert sim._world.requests["socket"] == 0
        assert not [event for event in facts if event.fact is Fact.NOTE]
    assert outcome.exit_code == 0
