"""A process killed between any two effects leaves what the next start needs: nothing twice, lost or torn."""

from __future__ import annotations

import pytest

from batchrun.progress import Fact
from batchrun.simulator.server import Simulator
from tests.crash.hurry import hurry
from tests.crash.starts import killed_at, result_of, undisturbed
from tests.support.runs import check_complete, job_of, lines_of, run_job, write_rows

ROWS = 6

#: Every announcement made between two effects of a row's way.
POINTS = [
    Fact.ACCEPTED, Fact.IN_FLIGHT, Fact.ENDED, Fact.FINISHED, Fact.DOWNLOADED, Fact.PUBLISHED, Fact.SAVED,
    Fact.DONE, Fact.LISTED,
]  # fmt: skip


# all rows are listed at once
@pytest.mark.parametrize(
    ("fact", "count"),
    [(fact, count) for fact in POINTS for count in (1, 4) if (fact, count) != (Fact.LISTED, 4)],
)
async def test_a_run_killed_at_a_point_is_completed_by_the_next_start(monkeypatch, tmp_path, fact, count):
    hurry(monkeypatch.setattr)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.3) as sim:
        await killed_at(sim, job, fact, count)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)
        assert result_of(tmp_path / "run") == await undisturbed(job)


@pytest.mark.parametrize("fact", [Fact.DOUBT, Fact.ADOPTED])
async def test_a_run_killed_over_a_doubt_settles_it_at_the_next_start(monkeypatch, tmp_path, fact):
    hurry(monkeypatch.setattr)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.3, faults=["run-reset@3"]) as sim:
        await killed_at(sim, job, fact, 1)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_run_killed_before_its_submit_went_out_waits_out_the_grace_and_submits_once(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.3) as sim:
        await killed_at(sim, job, Fact.INTENT, 3)
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", ROWS)
        assert len(sim.tasks) == ROWS


async def test_a_run_killed_while_rows_wait_for_their_next_try_buys_each_once(monkeypatch, tmp_path):
    hurry(monkeypatch.setattr)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), concurrency=4)
    async with Simulator(seconds=0.3, slots=2) as sim:
        await killed_at(sim, job, Fact.LIMIT, 2)
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", ROWS)
        assert len(sim.tasks) == ROWS


async def test_the_sidecar_files_are_whole_after_every_kill(tmp_path):
    rows = 20
    job = job_of(write_rows(tmp_path / "m.csv", rows), concurrency=4)
    async with Simulator(seconds=0.2) as sim:
        for count in (2, 3, 4):
            await killed_at(sim, job, Fact.DONE, count)
            lines_of(tmp_path / "run" / "images" / "metadata.jsonl")
            lines_of(tmp_path / "run" / "results.jsonl")
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", rows)


async def test_the_state_is_private_and_keys_are_never_in_it(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.2) as sim:
        await killed_at(sim, job, Fact.DONE, 1)
        state = tmp_path / "run" / "state.sqlite3"
        assert state.stat().st_mode & 0o777 == 0o600
        await run_job(sim, job)
        for path in (tmp_path / "run").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert sim.key.encode() not in content
                assert (sim.secret or "?").encode() not in content
