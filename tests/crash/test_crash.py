"""A process killed between any two effects leaves what the next start needs: nothing twice, lost or torn."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from batchrun.manifest.job import Job
from batchrun.progress import Fact
from batchrun.simulator.server import Simulator
from tests.support.runs import check_complete, job_of, lines_of, run_job, write_rows

ROWS = 6
ROOT = Path(__file__).parents[2]

#: Every announcement made between two effects of a row's way.
POINTS = [
    Fact.ACCEPTED, Fact.IN_FLIGHT, Fact.ENDED, Fact.FINISHED, Fact.DOWNLOADED, Fact.PUBLISHED, Fact.SAVED,
    Fact.DONE, Fact.LISTED,
]  # fmt: skip


def environment(simulator: Simulator) -> dict[str, str]:
    """What the child needs to find the simulator."""
    return {
        "PATH": os.environ["PATH"],
        "WIRO_API_KEY": simulator.key,
        "WIRO_API_SECRET": simulator.secret or "",
        "WIRO_API_BASE_URL": simulator.base_url,
        "WIRO_SOCKET_URL": simulator.socket_url,
    }


async def start(simulator: Simulator, job: Job, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """One start of the job in a child process."""
    return await anyio.run_process(
        [sys.executable, "-m", "tests.crash.child", *arguments],
        input=job.to_json().encode(),
        env=environment(simulator),
        cwd=ROOT,
        check=False,
    )


async def killed_at(simulator: Simulator, job: Job, fact: Fact, count: int) -> None:
    """Start the job in a child that dies at that point."""
    process = await start(simulator, job, fact.value, str(count))
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("fact", POINTS)
async def test_a_run_killed_at_a_point_is_completed_by_the_next_start(tmp_path, fact, count):
    count = 1 if fact is Fact.LISTED else count
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.3) as sim:
        await killed_at(sim, job, fact, count)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


@pytest.mark.parametrize("fact", [Fact.DOUBT, Fact.ADOPTED])
async def test_a_run_killed_over_a_doubt_settles_it_at_the_next_start(tmp_path, fact):
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


async def test_a_run_killed_again_and_again_at_random_ends_as_an_undisturbed_one(tmp_path):
    rng = random.Random(11)
    rows = 40
    job = job_of(write_rows(tmp_path / "m.csv", rows), concurrency=8)
    async with Simulator(seconds="0.1-0.5", seed=3) as sim:
        for _ in range(8):
            with anyio.move_on_after(rng.uniform(0.4, 1.5)):
                await start(sim, job)  # leaving the scope kills the child
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == rows
        check_complete(sim, tmp_path / "run", rows)


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
