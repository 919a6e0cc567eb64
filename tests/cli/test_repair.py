"""`batchrun repair`: whatever is left of a run's folder, nothing is bought twice and every image is whole."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from batchrun.cli import main
from batchrun.dispatch import search
from batchrun.errors import BatchrunError, StoreDamaged, UsageError
from batchrun.manifest.job import Job
from batchrun.model import State
from batchrun.progress import Event, Fact, Progress
from batchrun.rules import policy
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from batchrun.store.folder import Folder
from tests.crash.hurry import hurry
from tests.crash.starts import killed_at
from tests.support.command import Here
from tests.support.images import draw
from tests.support.runs import (
    check_complete,
    credentials_of,
    images_of,
    job_of,
    lines_of,
    run_job,
    write_rows,
)

ROWS = 16
#: What a start that is to be stopped may ask for: on a slow machine more rows than meant may be done by then.
PART = 12
PAGE = 4096


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback, tasks of lost submits show at once."""
    hurry(monkeypatch.setattr)
    monkeypatch.setattr(policy, "OUTPUTS_PATIENCE_S", 0.2)
    for name, value in (("GRACE_S", 0.1), ("SECOND_LOOK_S", 0.1), ("BETWEEN_S", 0.1)):
        monkeypatch.setattr(search, name, value)


async def part(simulator: Simulator, job: Job, *, done: int, fact: Fact = Fact.DONE) -> None:
    """A start of the job that is stopped when so many rows are done; others are in flight."""
    seen = 0

    def count(event: Event) -> None:
        nonlocal seen
        seen += event.fact is fact
        if seen == done:
            runner.stop("enough")

    limited = job.with_overrides(limit=PART)
    runner = Runner(limited, credentials_of(simulator), progress=Progress(count))
    await runner.run()


def repaired(folder: Path, *options: str) -> None:
    """`batchrun repair`."""
    with pytest.raises(SystemExit) as end:
        main(["repair", str(folder), *options])
    assert end.value.code == 0


def of_run(tmp_path: Path, rows: int = ROWS, *, ids: bool = True, **settings: Any) -> tuple[Job, Path]:
    job = job_of(write_rows(tmp_path / "m.csv", rows, ids=ids), **{"concurrency": 5, **settings})
    return job, tmp_path / "run"


# --- what can happen to the files --------------------------------------------------------------------------


def zero(run: Path) -> None:
    (run / "state.sqlite3").write_bytes(b"")


def gone(run: Path) -> None:
    (run / "state.sqlite3").unlink()


def short(run: Path) -> None:
    content = (run / "state.sqlite3").read_bytes()
    (run / "state.sqlite3").write_bytes(content[: len(content) * 2 // 3])


def beginning(run: Path) -> None:
    with (run / "state.sqlite3").open("r+b") as file:
        file.write(Random(1).randbytes(PAGE))


def middle(run: Path) -> None:
    """Garbage in the pages of rows and attempts, and in their indexes."""
    with (run / "state.sqlite3").open("r+b") as file:
        for page in (8, 15, 16):
            file.seek((page - 1) * PAGE + 100)
            file.write(Random(page).randbytes(PAGE - 200))


def index(run: Path) -> None:
    """Garbage in an index alone: all rows can be read."""
    with closing(sqlite3.connect(run / "state.sqlite3")) as state:
        query = "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'rows'"
        (page,) = state.execute(query).fetchone()
    with (run / "state.sqlite3").open("r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(Random(1).randbytes(PAGE))


def behind(run: Path) -> None:
    """The last lines were not written yet, and the state is gone."""
    gone(run)
    for name in ("results.jsonl", "images/metadata.jsonl"):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:-3]) + lines[-3][:20])


def without_results(run: Path) -> None:
    gone(run)
    (run / "results.jsonl").unlink()


def only_images(run: Path) -> None:
    without_results(run)
    (run / "images" / "metadata.jsonl").unlink()


DAMAGES = [zero, gone, short, beginning, middle, behind, without_results, only_images]


@pytest.mark.parametrize(
    ("damage", "ids"),
    [*((damage, True) for damage in DAMAGES), (gone, False), (middle, False), (only_images, False)],
)
async def test_a_damaged_run_is_refused_repaired_and_completed_without_a_needless_task(
    tmp_path: Path, damage: Callable[[Path], None], ids: bool
) -> None:
    job, run = of_run(tmp_path, ids=ids)
    async with Simulator(seconds=0.2) as sim:
        await part(sim, job, done=7)
        made = len(sim.tasks)
        assert 7 < made < ROWS
        damage(run)
        with pytest.raises(StoreDamaged, match="batchrun repair"):
            await run_job(sim, job)
        assert len(sim.tasks) == made
        repaired(run)
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, run, ROWS)
        assert outcome.counts.cost_usd == sim.billed_usd
        kept = {path.name for path in (run / "damaged-1").iterdir()}
        assert ("state.sqlite3" in kept) == (damage in (zero, short, beginning, middle))
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == ROWS


@pytest.mark.parametrize("at", [None, 8, 32 + 4120 * 2 + 300], ids=["gone", "header", "middle"])
async def test_a_killed_run_that_lost_its_log_is_completed_without_a_needless_task(
    tmp_path: Path, at: int | None
) -> None:
    job, run = of_run(tmp_path)
    async with Simulator(seconds=0.2) as sim:
        await killed_at(sim, job, Fact.IN_FLIGHT, 8)
        log, made = run / "state.sqlite3-wal", len(sim.tasks)
        if at is None:
            log.unlink()
        else:
            content = bytearray(log.read_bytes())
            content[at : at + 40] = Random(at).randbytes(40)
            log.write_bytes(content)
        with pytest.raises(StoreDamaged, match="batchrun repair"):
            await run_job(sim, job)
        repaired(run)
        assert (await run_job(sim, job)).exit_code == 0
        assert made <= len(sim.tasks) == ROWS
        check_complete(sim, run, ROWS)


# --- what is known of rows ---------------------------------------------------------------------------------


async def test_rows_that_ask_for_the_same_are_each_bought_once(tmp_path: Path) -> None:
    job, run = of_run(tmp_path, 2, ids=False, repeat=5, concurrency=3)
    async with Simulator(seconds=0.2) as sim:
        await part(sim, job, done=4)
        gone(run)
        repaired(run)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 10
        assert len(images_of(run)) == 10
        assert [line["status"] for line in lines_of(run / "results.jsonl")] == ["done"] * 10


async def test_failed_rows_stay_failed_with_their_cause_and_are_asked_for_again_only_by_the_users_word(
    tmp_path: Path,
) -> None:
    job, run = of_run(tmp_path, 6, attempts=1)
    async with Simulator(seconds=0.1, faults=["run-validation@2", "task-fails@2", "task-empty@4"]) as sim:
        before = await run_job(sim, job)
        assert before.counts.by_state[State.FAILED] == 3
        made, rejected = len(sim.tasks), (run / "failed.csv").read_text()
        gone(run)
        repaired(run)
        with pytest.raises(UsageError, match="run its manifest first"):
            await run_job(sim, job, again=Again())
        after = await run_job(sim, job)
        assert len(sim.tasks) == made
        assert after.counts == before.counts
        assert sorted(failure.cause for _, failure, *_ in after.failures) == sorted(
            failure.cause for _, failure, *_ in before.failures
        )
        assert len(lines_of(run / "results.jsonl")) == 6
        assert (run / "failed.csv").read_text() == rejected
        again = await run_job(sim, job, again=Again())
        # what was paid for and is lost is not bought by a plain retry
        assert (again.counts.by_state[State.DONE], len(sim.tasks)) == (5, made + 2)


async def test_a_failed_task_is_not_taken_for_one_that_was_paid_or_runs(tmp_path: Path) -> None:
    # two pairs of rows that ask for the same; in each pair a task fails and is followed by a good one
    job, run = of_run(tmp_path, 2, ids=False, repeat=2, concurrency=1)
    async with Simulator(seconds=0.2, faults=["task-fails@2,5"]) as sim:
        await part(sim, job, done=6, fact=Fact.IN_FLIGHT)
        only_images(run)
        repaired(run)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 6
        assert len(images_of(run)) == 4


async def test_a_failed_task_that_an_old_state_follows_is_given_up_for_the_one_bought_after_it(
    tmp_path: Path,
) -> None:
    job, run = of_run(tmp_path, 1)
    state, old = run / "state.sqlite3", tmp_path / "old"
    async with Simulator(seconds=0.2, faults=["task-fails@1"]) as sim:
        await part(sim, job, done=1, fact=Fact.IN_FLIGHT)
        old.write_bytes(state.read_bytes())
        assert (await run_job(sim, job)).exit_code == 0
        only_images(run)
        shutil.rmtree(run / "images")
        state.write_bytes(old.read_bytes())
        index(run)
        repaired(run)
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 2
        check_complete(sim, run, 1)


async def test_a_row_that_asks_for_something_else_since_is_told_and_not_bought(tmp_path: Path) -> None:
    job, run = of_run(tmp_path, 4)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        gone(run)
        repaired(run)
        manifest = tmp_path / "m.csv"
        manifest.write_text(manifest.read_text().replace("of 2 birds", "of 2 cats"))
        runner = Runner(job, credentials_of(sim))
        assert (await runner.run()).exit_code == 0
        assert runner.merged is not None
        assert (runner.merged.changed, runner.merged.new) == (1, 0)
        assert len(sim.tasks) == 4
        check_complete(sim, run, 4)


async def test_rows_that_cannot_be_looked_up_are_held_and_submitted_only_by_the_users_word(
    tmp_path: Path,
) -> None:
    job, run = of_run(tmp_path, 6, concurrency=2)
    async with Simulator(seconds=0.2) as sim:
        await part(sim, job, done=2)
        made = len(sim.tasks)
        gone(run)
        repaired(run)
        sim.faults = ["list-off"]
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.by_state[State.IN_DOUBT] == 4
        assert (await run_job(sim, job)).counts.by_state[State.IN_DOUBT] == 4
        assert len(sim.tasks) == made
        assert [line["status"] for line in lines_of(run / "results.jsonl")].count("in_doubt") == 4
        outcome = await run_job(sim, job, again=Again(states=[State.IN_DOUBT]))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == made + 4


async def test_a_list_that_echoes_nothing_settles_nothing(tmp_path: Path) -> None:
    job, run = of_run(tmp_path, 6, concurrency=2)
    async with Simulator(seconds=0.2) as sim:
        await part(sim, job, done=2)
        made = len(sim.tasks)
        gone(run)
        repaired(run)
        sim.faults = ["list-no-parameters"]
        assert (await run_job(sim, job)).counts.by_state[State.IN_DOUBT] == 4
        assert len(sim.tasks) == made
        sim.faults = []
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 6
        check_complete(sim, run, 6)


async def test_a_list_that_shows_nothing_once_is_no_reason_to_buy_what_nothing_is_known_of(
    tmp_path: Path,
) -> None:
    job, run = of_run(tmp_path, 2)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        only_images(run)
        repaired(run)
        sim.faults = ["list-empty@1"]
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 2
        check_complete(sim, run, 2)


# --- images --------------------------------------------------------------------------------------------


async def test_a_damaged_image_is_moved_aside_and_fetched_again_and_a_missing_one_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, run = of_run(tmp_path, 4)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        first, second, *_ = images_of(run)
        content = bytearray(first.read_bytes())
        content[len(content) // 2] ^= 0xFF
        first.write_bytes(content)
        second.unlink()
        zero(run)
        repaired(run)
        said = capsys.readouterr().out
        assert "1 damaged: moved aside" in said
        assert "1 not in their place" in said
        assert (run / "damaged-1" / "images" / "000" / first.name).read_bytes() == content
        outcome = await run_job(sim, job)
        assert (outcome.exit_code, len(images_of(run))) == (0, 3)
        gone(run)
        repaired(run, "--fetch-missing")
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, run, 4)
        assert len(sim.tasks) == 4
        assert (run / "damaged-2").is_dir()


async def test_a_row_whose_input_images_address_is_lost_is_held_while_a_task_may_be_its_own(
    tmp_path: Path,
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(draw("PNG", size=(8 + number, 8)))
    manifest = tmp_path / "m.jsonl"
    rows = [{"id": f"r{n}", "prompt": "a face", "inputImageUrl": f"{n}.png"} for n in range(4)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_of(manifest, tool="instant-id", set={"samples": 1}, concurrency=2)
    run = tmp_path / "run"
    async with Simulator(seconds=0.2) as sim:
        await part(sim, job, done=1)
        made = len(sim.tasks)
        gone(run)
        repaired(run)
        done = len(lines_of(run / "results.jsonl"))
        assert made > done
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.DONE: done, State.IN_DOUBT: 4 - done}
        assert len(sim.tasks) == made


# --- the command -------------------------------------------------------------------------------------------


def test_every_command_on_a_damaged_state_says_what_is_wrong_and_what_mends_it(here: Here) -> None:
    here.run(here.rows(2))
    state = here.folder / "runs/p/state.sqlite3"
    sound = here.batchrun("repair", "runs/p")
    assert (sound.returncode, "the state is sound" in sound.stdout) == (0, True)
    state.write_bytes(b"\0garbage" * 5000)
    for arguments in (
        ("run", "p.csv", "--tool", "Retro-Cartoons", "--set", "samples=1"),
        ("status", "runs/p"), ("retry", "runs/p"), ("cancel", "runs/p"),
    ):  # fmt: skip
        ended = here.batchrun(*arguments)
        assert ended.returncode == 2, (arguments, ended.stdout, ended.stderr)
        assert re.search(r"state\.sqlite3 is damaged \(.*batchrun repair \S*runs/p$", ended.stderr.strip())
        assert "Traceback" not in ended.stderr
    mended = here.batchrun("repair", "runs/p")
    assert mended.returncode == 0, mended.stderr
    assert "rebuilt: 2 rows: 2 done" in mended.stdout
    assert "to go on: run the same command as before" in mended.stdout
    assert "run its command again" in here.batchrun("status", "runs/p").stdout
    assert here.run("p.csv").returncode == 0
    assert here.status()["rows"]["done"] == 2


def test_what_is_no_run_is_not_repaired(alone: Here) -> None:
    (alone.folder / "empty").mkdir()
    for name in ("nowhere", "empty"):
        ended = alone.batchrun("repair", name)
        assert ended.returncode == 2
        assert "holds no run" in ended.stderr
    assert list((alone.folder / "empty").iterdir()) == []


async def test_a_live_run_is_not_repaired(tmp_path: Path) -> None:
    job, run = of_run(tmp_path, 2)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
    gone(run)
    with Folder(run).locked(), pytest.raises(SystemExit) as end:
        main(["repair", str(run)])
    assert end.value.code == 3
    assert not (run / "state.sqlite3").exists()


async def test_a_repair_that_was_killed_before_its_last_step_is_brought_to_its_end(tmp_path: Path) -> None:
    job, run = of_run(tmp_path, 4)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        zero(run)
        repaired(run)
        (run / "state.sqlite3").rename(run / "damaged-1" / "rebuilt.sqlite3")
        with pytest.raises(BatchrunError, match="batchrun repair"):
            await run_job(sim, job)
        repaired(run)
        assert not (run / "damaged-2").exists()
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 4
        check_complete(sim, run, 4)
