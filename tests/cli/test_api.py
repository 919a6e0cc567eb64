"""batchrun from Python: the same run, awaited or beside other work."""

from __future__ import annotations

from pathlib import Path

import pytest

import batchrun
from batchrun.simulator.server import Simulator
from tests.support.runs import credentials_of, job_of, write_rows


async def test_run_returns_the_outcome_and_tells_a_listener(tmp_path: Path) -> None:
    facts = []
    async with Simulator(seconds=0.02) as simulator:
        job = job_of(write_rows(tmp_path / "p.csv", 2))
        outcome = await batchrun.run(job, credentials_of(simulator), lambda event: facts.append(event.fact))
    assert (outcome.exit_code, outcome.counts.images) == (0, 2)
    assert facts.count(batchrun.Fact.DONE) == 2


async def test_a_path_is_a_job_and_keys_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "p.csv", 1)
    (tmp_path / "job.toml").write_text('manifest = "p.csv"\ntool = "Retro-Cartoons"\nout = "run"\n')
    async with Simulator(seconds=0.02) as simulator:
        monkeypatch.setenv("WIRO_API_KEY", simulator.key)
        monkeypatch.setenv("WIRO_API_SECRET", simulator.secret or "")
        monkeypatch.setenv("WIRO_API_BASE_URL", simulator.base_url)
        monkeypatch.setenv("WIRO_SOCKET_URL", simulator.socket_url)
        assert (await batchrun.run(tmp_path / "job.toml")).exit_code == 0


async def test_running_yields_the_live_progress_to_the_end(tmp_path: Path) -> None:
    async with Simulator(seconds=0.05) as simulator:
        job = job_of(write_rows(tmp_path / "p.csv", 3))
        async with batchrun.running(job, credentials_of(simulator), every_s=0.01) as going:
            with pytest.raises(RuntimeError):
                _ = going.outcome
            seen = [progress.counts[batchrun.State.DONE] async for progress in going]
    assert seen[-1] == 3
    assert going.outcome.exit_code == 0


async def test_leaving_the_block_early_stops_the_run_in_good_order(tmp_path: Path) -> None:
    async with Simulator(seconds=600.0) as simulator:
        job = job_of(write_rows(tmp_path / "p.csv", 2))
        async with batchrun.running(job, credentials_of(simulator), every_s=0.01) as going:
            async for progress in going:
                if progress.active == 2:
                    break
    assert going.outcome.exit_code == 3
    assert going.outcome.stopped == "stopped by its caller"


async def test_an_exception_in_the_block_passes_through_and_ends_the_run(tmp_path: Path) -> None:
    async with Simulator(seconds=600.0) as simulator:
        job = job_of(write_rows(tmp_path / "p.csv", 2))
        with pytest.raises(ZeroDivisionError):
            await _fail_meanwhile(batchrun.running(job, credentials_of(simulator), every_s=0.01))


async def _fail_meanwhile(run: batchrun.running) -> None:
    async with run as going:
        async for progress in going:
            if progress.active:
                raise ZeroDivisionError


async def test_what_is_wrong_with_the_manifest_is_raised_as_itself(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps\nx,ten\n")
    async with Simulator() as simulator:
        with pytest.raises(batchrun.ManifestError) as caught:
            await batchrun.run(job_of(tmp_path / "p.csv"), credentials_of(simulator))
        with pytest.raises(batchrun.ManifestError):
            await _fail_meanwhile(batchrun.running(job_of(tmp_path / "p.csv"), credentials_of(simulator)))
    assert caught.value.problems[0].column == "steps"


def test_check_counts_and_finds_without_a_loop_or_keys(tmp_path: Path) -> None:
    checked = batchrun.check(job_of(write_rows(tmp_path / "p.csv", 4), expand={"seed": "1..2"}))
    assert (checked.rows, checked.images, checked.tools) == (8, 8, {"Retro-Cartoons": 8})
    assert not checked.findings.errors
    assert not (tmp_path / "run").exists()


async def test_a_rehearsal_is_never_taken_for_a_real_run_nor_the_other_way_round(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "p.csv", 1))
    async with batchrun.running(job, simulate=True, every_s=0.01) as going:
        async for _ in going:
            pass
    assert going.outcome.exit_code == 0
    real = job.with_overrides(out=tmp_path / "real")
    async with Simulator(seconds=0.02) as simulator:
        credentials = credentials_of(simulator)
        with pytest.raises(batchrun.UsageError, match="holds a rehearsal"):
            await batchrun.run(job, credentials)
        with pytest.raises(batchrun.UsageError, match="holds a rehearsal"):
            await batchrun.Runner(job, credentials).run()
        assert (await batchrun.run(real, credentials)).exit_code == 0
        with pytest.raises(batchrun.UsageError, match="is no rehearsal"):
            await batchrun.run(real, simulate=True)
    assert not (tmp_path / "real/simulator.jsonl").exists()
    assert (await batchrun.run(job, simulate=True)).counts.images == 1


async def test_a_run_that_was_not_started_is_not_iterated_over_for_ever(tmp_path: Path) -> None:
    going = batchrun.running(job_of(write_rows(tmp_path / "p.csv", 1)), simulate=True)
    with pytest.raises(RuntimeError, match="async with"):
        async for _ in going:
            pass


async def test_arguments_of_the_wrong_type_are_told_at_once(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "p.csv", 1))
    with pytest.raises(TypeError, match="listener="):
        await batchrun.run(job, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="listener must be callable"):
        batchrun.running(job, listener="x", simulate=True)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
