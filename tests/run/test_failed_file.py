"""failed.csv: made to be edited, so what a user made of it is never lost; waits that a user can end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from batchrun.model import State
from batchrun.progress import Event, Fact, Progress
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from tests.support.runs import Facts, credentials_of, job_of, run_job, write_rows


async def test_an_edited_failed_csv_is_left_alone_while_its_rows_are_the_same_and_else_kept(
    tmp_path: Path,
) -> None:
    manifest = write_rows(tmp_path / "p.csv", 3)
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())  # as Excel writes it, and wants it back
    job = job_of(manifest, concurrency=1)
    failed = job.folder / "failed.csv"
    async with Simulator(seconds=0.02, faults=["run-validation*2"]) as simulator:
        outcome = await run_job(simulator, job)
        assert outcome.rejected == 2
        ours = b"\xef\xbb\xbfid,prompt\nr1,a picture of 1 birds\nr2,a picture of 2 birds\n"
        assert failed.read_bytes() == ours
        edited = ours.replace(b"birds", b"owls")
        failed.write_bytes(edited)
        before = failed.stat().st_mtime_ns
        assert (await run_job(simulator, job)).kept is None
        assert (failed.read_bytes(), failed.stat().st_mtime_ns) == (edited, before)
        outcome = await run_job(simulator, job, again=Again(ids=["r1"]))
        assert outcome.kept == "failed.edited.csv"
        assert (job.folder / "failed.edited.csv").read_bytes() == edited
        assert failed.read_bytes() == ours.replace(b"r1,a picture of 1 birds\n", b"")
        failed.write_bytes(b"mine")
        outcome = await run_job(simulator, job, again=Again())
        assert (outcome.exit_code, outcome.kept) == (0, "failed.edited-2.csv")
        assert (job.folder / "failed.edited-2.csv").read_bytes() == b"mine"
        assert not failed.exists()


async def test_a_failed_csv_that_was_deleted_comes_back_and_one_of_ours_is_never_kept(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "p.csv", 2), concurrency=1)
    failed = job.folder / "failed.csv"
    async with Simulator(seconds=0.02, faults=["run-validation*2"]) as simulator:
        await run_job(simulator, job)
        ours = failed.read_bytes()
        failed.unlink()
        await run_job(simulator, job)
        assert failed.read_bytes() == ours
        for ids in (["r1"], []):
            assert (await run_job(simulator, job, again=Again(ids=ids))).kept is None
    assert not list(job.folder.glob("failed*"))


async def test_only_the_doubtful_rows_that_were_named_are_counted(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "p.csv", 2))
    async with Simulator(seconds=0.02, faults=["run-reset-before*2", "list-off"]) as simulator:
        assert (await run_job(simulator, job)).counts.by_state == {State.IN_DOUBT: 2}
        again = Again(states=[State.IN_DOUBT], ids=["r2"])
        outcome = await run_job(simulator, job, again=again)
        assert (again.doubtful, again.standing) == (1, {"r2": State.IN_DOUBT})
        assert outcome.counts.by_state == {State.IN_DOUBT: 1, State.DONE: 1}


async def _first_wait(runner: Runner, facts: Facts) -> str:
    """Why the run had to wait; it is left then."""

    def leave(event: Event) -> None:
        if event.fact is Fact.PAUSED:
            runner.abort()

    runner.progress.listen(leave)
    await runner.run()
    (reason,) = [event.details["reason"] for event in facts if event.fact is Fact.PAUSED]
    assert runner.progress.paused == reason
    return str(reason)


async def test_a_wait_says_what_it_is_for_and_what_to_do_about_it(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "p.csv", 8), max_pause="2h")
    async with Simulator(seconds=0.02, balance_usd=0) as simulator:
        facts = Facts()
        runner = Runner(job, credentials_of(simulator), progress=Progress(facts))
        reason = await _first_wait(runner, facts)
        assert reason.startswith("the balance is exhausted: add money to the account, ")
        assert reason.endswith(" (--max-pause)")
        gone = dataclasses.replace(credentials_of(simulator), base_url="http://127.0.0.1:9/v1")
    facts = Facts()
    reason = await _first_wait(Runner(job, gone, progress=Progress(facts)), facts)
    assert reason.startswith(
        "the service cannot be reached: http://127.0.0.1:9/v1 (127.0.0.1: no connection ("
    )
