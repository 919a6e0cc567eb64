"""kill -9 again and again in one run, at random moments; `BATCHRUN_KILLS=200 make crash` for two hundred."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest

from batchrun.simulator.server import Simulator
from tests.crash.hurry import hurry
from tests.crash.starts import nursery, result_of, told_of, undisturbed
from tests.support.runs import check_complete, job_of, run_job, write_rows

#: How often one run is killed.
KILLS = int(os.environ.get("BATCHRUN_KILLS", "25"))
SEED = int(os.environ.get("BATCHRUN_SEED", "11"))
#: A start brings so many rows to rest before it is killed, more or less.
ROWS_A_START = 3
#: A start is killed by the clock after at most this long; half of all are killed at an announcement instead.
LONGEST_S = 0.6
MOST_FACTS = 60


@pytest.mark.timeout(60 + 3 * KILLS)
async def test_a_run_killed_again_and_again_at_random_ends_as_an_undisturbed_one(monkeypatch, tmp_path):
    hurry(monkeypatch.setattr)
    rng = random.Random(SEED)
    rows = ROWS_A_START * KILLS
    job = job_of(write_rows(tmp_path / "m.csv", rows), concurrency=8)
    ended = Counter[int]()
    async with Simulator(seconds="0.02-0.3", seed=SEED) as sim, nursery() as starts:
        while ended[-signal.SIGKILL] < KILLS and sum(ended.values()) < 2 * KILLS:
            by_fact = rng.random() < 0.5
            die_at = ["", rng.randint(1, MOST_FACTS)] if by_fact else None
            told = told_of(sim, job, hurry=True, die_at=die_at)
            kill_after_s = 60.0 if by_fact else rng.uniform(0.0, LONGEST_S)
            ended[await starts.start(told, kill_after_s=kill_after_s)] += 1
        assert set(ended) <= {0, -signal.SIGKILL}
        assert ended[-signal.SIGKILL] >= KILLS // 2, "most starts were to be killed before the end"
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == rows
        check_complete(sim, tmp_path / "run", rows)
    assert result_of(tmp_path / "run") == await undisturbed(job)
