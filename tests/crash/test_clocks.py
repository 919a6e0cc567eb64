"""Clocks that are set, machines that sleep: nothing is paid twice and no row fails, whatever a clock says."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import anyio
import anyio.abc
import pytest

from batchrun import errors
from batchrun.dispatch.track import Tracker
from batchrun.model import RemoteOutput, Task
from batchrun.progress import Fact
from batchrun.rules.policy import Fail, Succeeded, after_download, after_submit, after_upload, are_gone
from batchrun.simulator.server import Simulator
from tests.crash.child import CLOCKS
from tests.crash.starts import going, result_of, start, undisturbed
from tests.support.clock import virtual_time
from tests.support.runs import check_complete, job_of, write_rows

ROWS = 4
HOUR_S = 3600.0


class Clocks:
    """How far the clocks of a child are ahead of ours, in seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set()

    def set(self, *, wall_s: float = 0.0, monotonic_s: float = 0.0) -> None:
        """Set them while it runs, or before."""
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(CLOCKS.pack(wall_s, monotonic_s))


async def announced(marks: Path, fact: Fact, times: int = 1) -> None:
    """Wait until the child has announced a fact so often."""

    def seen() -> int:
        return marks.read_text().count(f'["{fact.value}"') if marks.exists() else 0

    with anyio.fail_after(60):
        while seen() < times:
            await anyio.sleep(0.01)


async def check_end(process: anyio.abc.Process) -> None:
    """See the child end, all rows done."""
    with anyio.fail_after(60):
        assert process.stdout is not None
        said = b"".join([piece async for piece in process.stdout])
        assert json.loads(said) == {"code": 0, "stopped": None}
        assert await process.wait() == 0


async def test_a_wall_clock_set_back_and_forward_while_running_changes_nothing(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    clocks, marks = Clocks(tmp_path / "clocks"), tmp_path / "marks"
    # one task is made and its answer lost, of another submit nothing arrives
    async with Simulator(seconds=0.5, faults=["run-reset@2", "run-reset-before@3"]) as sim:
        told = {"clocks": str(clocks.path), "marks": str(marks), "hurry": True}
        async with going(sim, job, **told) as process:
            await announced(marks, Fact.DOUBT)
            clocks.set(wall_s=-7 * HOUR_S)
            await announced(marks, Fact.ABSENT)
            clocks.set(wall_s=7 * HOUR_S)
            await check_end(process)
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)
    assert result_of(tmp_path / "run") == await undisturbed(job)


async def test_a_wall_clock_set_forward_and_back_between_starts_changes_nothing(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), concurrency=2)
    clocks = Clocks(tmp_path / "clocks")
    async with Simulator(seconds=0.2) as sim:
        told = {"clocks": str(clocks.path), "hurry": True}
        for wall_s, die_at in (
            (5 * HOUR_S, [Fact.ACCEPTED, 1]),
            (-5 * HOUR_S, [Fact.INTENT, 1]),
            (5 * HOUR_S, [Fact.FINISHED, 1]),
        ):
            clocks.set(wall_s=wall_s)
            assert (await start(sim, job, die_at=die_at, **told)).returncode == -signal.SIGKILL
        clocks.set(wall_s=-5 * HOUR_S)
        ended = await start(sim, job, **told)
        assert ended.returncode == 0, ended.stderr
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)
    assert result_of(tmp_path / "run") == await undisturbed(job)


@pytest.mark.parametrize(
    ("moment", "times", "faults", "monotonic_s"),
    [
        # Linux does not count sleep in its monotonic clock ...
        (Fact.DOUBT, 1, ["run-reset@2", "run-reset-before@3"], 0.0),
        # ... other systems do, and a stopped process sees it pass; some row is refused a last time after that
        (Fact.WITHDRAWN, ROWS, [f"run-code0*{ROWS + 2}"], HOUR_S),
        (Fact.NOTE, 2 * ROWS, [f"cdn-404*{2 * ROWS + 1}"], HOUR_S),
    ],
    ids=["over a doubt", "over refused submits", "over missing images"],
)
async def test_a_machine_asleep_for_an_hour_fails_no_row_and_buys_none_twice(
    tmp_path, moment, times, faults, monotonic_s
):
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    clocks, marks = Clocks(tmp_path / "clocks"), tmp_path / "marks"
    async with Simulator(seconds=0.2, faults=faults) as sim:
        told = {"clocks": str(clocks.path), "marks": str(marks), "hurry": True}
        async with going(sim, job, **told) as process:
            await announced(marks, moment, times)
            process.send_signal(signal.SIGSTOP)
            await sim.go_dark()  # no connection lives so long
            sim._world._ahead_s += HOUR_S  # at the service the hour passes
            clocks.set(wall_s=HOUR_S, monotonic_s=monotonic_s)
            await sim.come_back()
            process.send_signal(signal.SIGCONT)
            await check_end(process)
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)
    assert result_of(tmp_path / "run") == await undisturbed(job)


@pytest.mark.parametrize(
    "gives_up",
    [
        lambda tries: isinstance(_after_submit(tries), Fail),
        lambda tries: isinstance(_after_upload(tries), Fail),
        lambda tries: isinstance(_after_download(errors.OutputGone("gone", status=404), tries), Fail),
        lambda tries: isinstance(_after_download(errors.NotSent("refused"), tries), Fail),
        lambda tries: are_gone(missing_for_s=24 * HOUR_S, looks=tries),
    ],
    ids=["submit", "upload", "address gone", "download", "images gone"],
)
def test_two_failures_with_a_night_between_them_give_nothing_up(gives_up: Callable[[int], bool]):
    assert not gives_up(2)
    assert gives_up(20)


def _after_submit(tries: int) -> object:
    fault = errors.ServerFault("busy", acted=False)
    return after_submit(fault, refused_for_s=24 * HOUR_S, tries=tries, rng=Random(0))


def _after_upload(tries: int) -> object:
    fault = errors.ServerFault("busy", acted=False)
    return after_upload(fault, troubles=tries, elapsed_s=24 * HOUR_S, rng=Random(0))


def _after_download(error: errors.BatchrunError, tries: int) -> object:
    return after_download(error, troubles=tries, elapsed_s=24 * HOUR_S, rng=Random(0))


class SleepyLooks:
    """A finished task whose outputs are not shown at first; the second answer is read an hour late."""

    def __init__(self) -> None:
        self.looks = 0

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        self.looks += 1
        image = RemoteOutput("0.png", "https://cdn/0.png") if self.looks > 2 else None
        if self.looks == 2:
            await anyio.sleep(HOUR_S)
        outputs = (image,) if image else ()
        return Task(task_id, status="task_postprocess_end", pexit="0", outputs=outputs)


@virtual_time
async def test_an_answer_read_after_a_sleep_does_not_pass_for_a_fresh_one() -> None:
    tracker = Tracker(SleepyLooks(), rng=Random(0))
    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        _, verdict = await tracker.follow(task_id="1", token="", tool=1)
        group.cancel_scope.cancel()
    assert verdict == Succeeded()
