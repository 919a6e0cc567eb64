"""The folder of a run between starts and under two of them: moved, copied, never worked on by two at once."""

from __future__ import annotations

import errno
import os
import shutil

import anyio
import pytest

from batchrun.outputs.disk import make_durable
from batchrun.progress import Fact
from batchrun.simulator.server import Simulator
from tests.crash.hurry import hurry
from tests.crash.starts import killed_at, result_of, undisturbed
from tests.support.command import TOOL, Here, simulator, until
from tests.support.runs import check_complete, job_of, run_job, write_rows

ROWS = 6


@pytest.mark.parametrize("place", ["elsewhere", "with its manifest", "copied"])
async def test_a_killed_run_goes_on_where_its_folder_was_moved_or_copied_to(monkeypatch, tmp_path, place):
    hurry(monkeypatch.setattr)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    job = job_of(write_rows(old / "m.csv", ROWS), concurrency=3)
    calm = await undisturbed(job.with_overrides(out=tmp_path / "calm"))
    async with Simulator(seconds="0.1-0.4") as sim:
        await killed_at(sim, job, Fact.SAVED, 2)
        match place:
            case "elsewhere":
                new.mkdir()
                job.folder.rename(new / "run")
                job = job.with_overrides(out=new / "run")
            case "with its manifest":
                old.rename(new)
                job = job_of(new / "m.csv", concurrency=3)
            case "copied":
                shutil.copytree(job.folder, new / "run")
                before = result_of(job.folder)
                job = job.with_overrides(out=new / "run")
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, new / "run", ROWS)
    assert result_of(new / "run") == calm
    if place == "copied":
        assert result_of(old / "run") == before, "the original is left as it was"


def test_a_second_process_on_the_folder_is_turned_away_and_disturbs_nothing(tmp_path):
    with simulator("--seconds", "2", "--slots", "2") as wiro:
        here = Here(tmp_path, wiro)
        here.rows(ROWS)
        command = ("run", "p.csv", "--tool", TOOL, "--set", "samples=1")
        with here.start(*command) as going:
            until(lambda: wiro.stats()["active"] == 2, "two tasks run")
            second = here.batchrun(*command)
            assert second.returncode == 3
            assert f"runs/p is in use by process {going.pid} on " in second.stderr
            wiro.weather(seconds=0.05, slots=None)
            said, _ = going.communicate(timeout=60)
        assert going.returncode == 0, said
        stats = wiro.stats()
        assert (stats["tasks"], stats["needless"]) == (ROWS, 0)
    assert result_of(tmp_path / "runs/p") == anyio.run(undisturbed, job_of(tmp_path / "p.csv"))


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(monkeypatch, tmp_path):
    answers = iter([errno.EINVAL, errno.ENOTSUP, errno.EIO])

    def fsync(handle: int) -> None:
        raise OSError(next(answers), "no")

    make_durable(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    make_durable(tmp_path / "images" / "000")
    assert (tmp_path / "images" / "000").is_dir()
    with pytest.raises(OSError, match="no"):
        make_durable(tmp_path / "images" / "001")
