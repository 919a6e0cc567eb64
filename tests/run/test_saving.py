"""What was bought comes to disk whole and is bought once, whatever the CDN, the disk or a person does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from batchrun.errors import DiskError
from batchrun.manifest.job import Job
from batchrun.model import State
from batchrun.outputs.missing import Missing
from batchrun.progress import Event, Fact
from batchrun.runner import Again, Outcome, Runner
from batchrun.simulator.server import Simulator
from batchrun.wiro.client import Wiro
from batchrun.wiro.manners import Deadlines
from tests.support.runs import (
    TOOL,
    check_complete,
    credentials_of,
    images_of,
    job_of,
    lines_of,
    run_job,
    write_rows,
)

ROWS = 4
#: A tool whose pictures are JPEG files, and one whose are WebP files; both take a picture.
JPEG, WEBP = "outpainting-sdxl-advanced", "instant-id"
PICTURE = {"inputImageUrl": "https://pictures.example/a.png"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short: for a task, between two tries, and for a CDN that has gone silent."""
    monkeypatch.setattr("batchrun.rules.pace.PRICE_S", 0.0005)
    monkeypatch.setattr("batchrun.rules.policy.backoff_s", lambda attempt, **bounds: 0.02)
    monkeypatch.setattr("batchrun.runner.Wiro", partial(Wiro, deadlines=Deadlines(silence_s=0.2)))


async def check_true(sim: Simulator, folder: Path, rows: int = ROWS) -> None:
    """All that `check_complete` asks for, every image as it was made to the byte, and no other file."""
    check_complete(sim, folder, rows)
    assert len(sim.tasks) == rows
    for record in lines_of(folder / "images" / "metadata.jsonl"):
        [task] = [task for task in sim.tasks if str(task.id) == record["task_id"]]
        content = await sim._world.studio.file(task, record["index"])
        assert (folder / "images" / record["file_name"]).read_bytes() == content
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert {path.split("-")[0] for path in others_in(folder)} <= {
        "images/metadata.jsonl", "results.jsonl", "run.lock", "state.sqlite3",
    }  # fmt: skip


def others_in(folder: Path) -> list[str]:
    """All files of a run but its images, by their paths in its folder."""
    files = {path for path in folder.rglob("*") if path.is_file()} - set(images_of(folder))
    return [path.relative_to(folder).as_posix() for path in files]


async def whole_all_along(sim: Simulator, job: Job) -> Outcome:
    """One start of the job; at every fact that is announced, all that has a final name is whole."""
    runner = Runner(job, credentials_of(sim))

    def look(event: Event) -> None:
        images_of(job.folder)

    runner.progress.listen(look)
    return await runner.run()


# --- the CDN --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "options"),
    [
        (["cdn-truncated*3"], {}),
        (["cdn-truncated*3"], {"etag": "none"}),
        (["cdn-drip*2"], {}),
        (["cdn-stall*2"], {}),
        (["cdn-reset*3"], {}),
        (["cdn-truncated*2", "cdn-other-etag*2"], {"etag": "opaque"}),
        (["cdn-truncated*2", "cdn-ignore-range*2"], {"etag": "opaque"}),
        (["cdn-no-length*3"], {}),
        (["cdn-wrong-size*3"], {}),
        (["cdn-wrong-type*3"], {}),
        (["cdn-html*3"], {}),
        (["cdn-empty*3"], {}),
        (["cdn-500*3"], {}),
        (["cdn-404-once*3"], {}),
        (["cdn-403*3"], {}),
        (["cdn-redirect*3"], {}),
        (["cdn-redirect-loop*2"], {}),
        (["cdn-redirect-scheme*2"], {}),
        # without an MD5 in the ETag, only the file's own structure can tell
        (["cdn-wrong-bytes*3"], {"etag": "none"}),
        (["cdn-wrong-bytes*3"], {"etag": "md5"}),
        ([f"cdn-wrong-bytes:{JPEG}*3"], {"etag": "none"}),
        ([f"cdn-wrong-bytes:{WEBP}*3"], {"etag": "none"}),
        (["cdn-truncated*2", "cdn-wrong-bytes*2", "cdn-html*2", "cdn-403*2", "cdn-reset*2"], {}),
    ],
    ids=lambda part: "+".join(part) if isinstance(part, list) else "-".join(part.values()),
)
async def test_whatever_the_cdn_does_at_first_every_image_comes_as_it_was_made_and_is_bought_once(
    tmp_path: Path, faults: list[str], options: dict[str, Any]
) -> None:
    tool = next((tool for tool in (JPEG, WEBP) if tool in faults[0]), TOOL)
    manifest = write_rows(tmp_path / "m.csv", ROWS)
    given = PICTURE if tool != TOOL else {}
    job = job_of(manifest, tool=tool, set={"samples": 1, **given})
    async with Simulator(seconds=0.05, faults=faults, **options) as sim:
        outcome = await whole_all_along(sim, job)
        assert outcome.exit_code == 0
        assert all(sim.struck.values()), f"not every fault came to pass: {sim.struck}"
        await check_true(sim, job.folder)
        assert outcome.counts.cost_usd == sim.billed_usd


async def test_hostile_names_leave_no_trace_in_the_names_of_files(tmp_path: Path) -> None:
    """`../../../x`, absolute, NUL, 300 characters, reserved, the same twice and none at all."""
    job = job_of(write_rows(tmp_path / "m.csv", 8), set={"samples": 2})
    async with Simulator(seconds=0.05, faults=["task-names"]) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, job.folder, 8, images=16)
        names = sorted(path.name for path in images_of(job.folder))
        assert names == sorted(f"r{row}_{index}.png" for row in range(1, 9) for index in (0, 1))
        assert not any("escape" in path for path in others_in(tmp_path))
        assert "escape.png" not in os.listdir("/etc")


@pytest.mark.parametrize(
    ("fault", "cause", "word"),
    [
        ("cdn-html", "image damaged", "web page"),
        ("cdn-empty", "image damaged", "empty"),
        ("cdn-wrong-bytes", "image damaged", "damaged"),
        ("cdn-500", "download failed", "HTTP 500"),
        ("cdn-truncated", "download failed", "broke off"),
        ("cdn-stall", "download failed", "no answer in time"),
        ("cdn-redirect-loop", "download failed", "redirects without end"),
        ("cdn-redirect-scheme", "download failed", "not http"),
        ("cdn-huge", "download failed", "larger than the limit"),
    ],
)
async def test_an_image_that_cannot_be_had_fails_its_row_and_a_retry_fetches_it_without_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, cause: str, word: str
) -> None:
    monkeypatch.setattr("batchrun.rules.policy.DOWNLOAD_PATIENCE_S", 0.2)
    monkeypatch.setattr("batchrun.rules.policy.MAX_DAMAGED", 2)
    monkeypatch.setattr("batchrun.rules.policy.DAMAGED_PATIENCE_S", 0.2)
    job = job_of(write_rows(tmp_path / "m.csv", 2), regenerate_lost=True)
    async with Simulator(seconds=0.05, faults=[fault]) as sim:
        outcome = await whole_all_along(sim, job)
        assert outcome.counts.by_state == {State.FAILED: 2}
        [(_, failure, rows, _)] = outcome.failures
        assert (failure.cause, rows) == (cause, 2)
        assert word in failure.message
        assert images_of(job.folder) == []
        # failed rows stay failed on a plain start, and are fetched, not bought, by a retry
        assert (await run_job(sim, job)).counts.by_state == {State.FAILED: 2}
        sim.faults = []
        again = Again()
        assert (await run_job(sim, job, again=again)).exit_code == 0
        assert (again.requeued.save, again.requeued.submit) == (2, 0)
        await check_true(sim, job.folder, 2)


async def test_an_image_larger_than_the_limit_fails_its_row_until_the_limit_is_raised(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.csv", 2)
    async with Simulator(seconds=0.05, faults=["cdn-no-length@1"]) as sim:
        outcome = await run_job(sim, job_of(manifest, max_image_bytes=100))
        assert "larger than the limit of 100 bytes" in outcome.failures[0][1].message
        assert images_of(tmp_path / "run") == []
        assert (await run_job(sim, job_of(manifest), again=Again())).exit_code == 0
        await check_true(sim, tmp_path / "run", 2)


async def test_an_image_gone_for_good_is_bought_again_only_by_the_users_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchrun.rules.policy.OUTPUTS_PATIENCE_S", 0.3)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05, faults=["cdn-gone@1"]) as sim:
        assert (await run_job(sim, job)).counts.by_state == {State.DONE: ROWS - 1, State.FAILED: 1}
        assert (await run_job(sim, job)).counts.by_state[State.FAILED] == 1
        again = Again()
        outcome = await run_job(sim, job, again=again)
        assert [failure.cause for _, failure, *_ in outcome.failures] == ["images gone"]
        assert (again.requeued.lost, len(sim.tasks)) == (1, ROWS)
        wanted = job.with_overrides(regenerate_lost=True)
        assert (await run_job(sim, wanted, again=Again())).exit_code == 0
        assert len(sim.tasks) == ROWS + 1
        assert len(images_of(job.folder)) == ROWS


async def test_an_address_that_stays_dead_while_the_service_shows_the_image_is_never_bought_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchrun.rules.policy.GONE_PATIENCE_S", 0.3)
    job = job_of(write_rows(tmp_path / "m.csv", 2), regenerate_lost=True)
    async with Simulator(seconds=0.05, faults=["cdn-404"]) as sim:
        outcome = await run_job(sim, job)
        assert [failure.cause for _, failure, *_ in outcome.failures] == ["download failed"]
        sim.faults = []
        assert (await run_job(sim, job, again=Again())).exit_code == 0
        await check_true(sim, job.folder, 2)


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; the run's folder is `run` on it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


async def words_of(start: Coroutine[Any, Any, Outcome]) -> str:
    """Why a start of a run stopped, whichever way it was told; empty when it did not."""
    try:
        outcome = await start
    except DiskError as error:
        return str(error)
    assert outcome.exit_code == (3 if outcome.stopped else 0)
    return outcome.stopped or ""


def fill(place: Path) -> None:
    """Leave no room at all."""
    with (place / "ballast").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_run_that_is_stopped_does_not_wait_for_a_download_in_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchrun.rules.policy.backoff_s", lambda attempt, **bounds: 3600.0)
    job = job_of(write_rows(tmp_path / "m.csv", 1))
    async with Simulator(seconds=0.05, faults=["cdn-500@1"]) as sim:
        runner = Runner(job, credentials_of(sim))

        def stop_in_trouble(event: Event) -> None:
            if event.fact is Fact.NOTE:
                runner.stop("enough")

        runner.progress.listen(stop_in_trouble)
        with anyio.fail_after(30):  # downloads that go on get twice as long
            assert (await runner.run()).exit_code == 3
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, tmp_path / "run", 1)


@pytest.mark.parametrize(
    "fact",
    [Fact.INTENT, Fact.ACCEPTED, Fact.IN_FLIGHT, Fact.FINISHED, Fact.DOWNLOADED, Fact.PUBLISHED, Fact.DONE],
)
async def test_a_disk_that_fills_up_stops_the_run_in_words_and_the_next_start_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Path, fact: Fact
) -> None:
    monkeypatch.setattr("batchrun.dispatch.saving.SPARE_BYTES", 0)
    monkeypatch.setattr("batchrun.rules.recovery.GRACE_S", 0.5)  # nothing is delivered late here
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), out=disk / "run", concurrency=2)
    async with Simulator(seconds=0.05) as sim:
        runner = Runner(job, credentials_of(sim))
        runner.progress.listen(lambda event: fill(disk) if event.fact is fact else None)
        with anyio.fail_after(20):
            words = await words_of(runner.run())
        assert "full" in words or "mend the disk" in words
        images_of(job.folder)  # nothing torn has a final name
        assert not any(path.startswith("partial/") for path in others_in(job.folder))
        (disk / "ballast").unlink()
        with anyio.fail_after(20):
            assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


async def test_a_disk_that_is_nearly_full_stops_the_run_before_it_is_full(tmp_path: Path, disk: Path) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), out=disk / "run")
    async with Simulator(seconds=0.05) as sim:
        assert "nearly full" in await words_of(run_job(sim, job))
        assert images_of(job.folder) == []
        await anyio.run_process(["mount", "-o", "remount,size=64m", disk])
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


async def test_a_read_only_folder_is_told_and_can_still_be_looked_at(tmp_path: Path, disk: Path) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), out=disk / "run")
    await anyio.run_process(["mount", "-o", "remount,size=64m", disk])
    async with Simulator(seconds=0.05) as sim:
        await run_job(sim, job.with_overrides(limit=2))
        await anyio.run_process(["mount", "-o", "remount,ro", disk])
        assert "Read-only file system" in await words_of(run_job(sim, job))
        told = await command(sim, "status", str(job.folder))
        assert (told.returncode, told.stderr) == (0, b"")
        assert b"4: 2 done, 2 to do" in told.stdout
        assert len(sim.tasks) == 2
        await anyio.run_process(["mount", "-o", "remount,rw", disk])
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


async def test_a_folder_without_permission_stops_the_run_in_words_and_costs_nothing_twice(
    tmp_path: Path,
) -> None:
    # root may write everywhere, unless it leaves that power behind
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if powerless and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to test as root")
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    closed = job.folder / "images" / "000"
    closed.mkdir(parents=True)
    closed.chmod(0o500)
    async with Simulator(seconds=0.05) as sim:
        told = await command(sim, *run_arguments(job), before=powerless)
        assert told.returncode == 3
        assert b"permission denied: make the folder writable" in told.stdout + told.stderr
        assert b"Traceback" not in told.stdout + told.stderr
        closed.chmod(0o700)
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit")
@pytest.mark.parametrize("limit", [12, 16, 20])
async def test_too_few_open_files_to_begin_with_are_told_and_nothing_is_bought(
    tmp_path: Path, limit: int
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05) as sim:
        told = await command(sim, *run_arguments(job), files=limit)
        assert told.returncode == 3
        assert b"too many open files" in told.stderr or b"unable to open" in told.stderr
        assert b"Traceback" not in told.stderr
        assert not sim.tasks
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


@pytest.mark.parametrize("fact", [Fact.INTENT, Fact.ACCEPTED, Fact.FINISHED, Fact.DOWNLOADED])
async def test_open_files_that_run_out_for_a_while_stop_the_run_in_words_or_are_waited_for(
    tmp_path: Path, fact: Fact
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05) as sim:
        told = await command(sim, fact.value, text=job.to_json(), module="tests.run.starved")
        outcome = json.loads(told.stdout)
        assert outcome["starved"]
        assert outcome["code"] == 0 or "too many open files" in outcome["stopped"]
        images_of(job.folder)
        assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


def run_arguments(job: Job) -> list[str]:
    """The command line for that job."""
    return ["run", str(job.manifest), "--tool", TOOL, "--set", "samples=1", "--out", str(job.folder)]


async def command(
    sim: Simulator,
    *arguments: str,
    before: Sequence[str] = (),
    files: int | None = None,
    text: str = "",
    module: str = "batchrun",
) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end, with so many open files at most."""
    env = {
        **os.environ,
        "WIRO_API_KEY": sim.key,
        "WIRO_API_SECRET": sim.secret or "",
        "WIRO_API_BASE_URL": sim.base_url,
        "WIRO_SOCKET_URL": sim.socket_url,
    }
    limited = ["prlimit", f"--nofile={files}"] if files else []
    with anyio.fail_after(40):
        return await anyio.run_process(
            [*limited, *before, sys.executable, "-m", module, *arguments],
            input=text.encode(),
            env=env,
            check=False,
        )


# --- deleted behind our back --------------------------------------------------------------------------------


async def deleting(sim: Simulator, job: Job, delete: Callable[[], None], *, at: Fact, count: int) -> Outcome:
    """One start of the job; `delete` is called when `at` is announced for the `count`-th time."""
    runner = Runner(job, credentials_of(sim))
    left = count

    def listen(event: Event) -> None:
        nonlocal left
        left -= event.fact is at
        if left == 0 and event.fact is at:
            delete()

    runner.progress.listen(listen)
    return await runner.run()


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


SIDECARS = ["results.jsonl", "images/metadata.jsonl"]


@pytest.mark.parametrize("name", SIDECARS)
async def test_a_sidecar_file_deleted_while_the_run_goes_on_is_whole_at_its_end(
    tmp_path: Path, name: str
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), concurrency=1)
    async with Simulator(seconds=0.4) as sim:
        outcome = await deleting(sim, job, lambda: remove(job.folder / name), at=Fact.LISTED, count=1)
        assert (outcome.exit_code, outcome.missing) == (0, None)
        await check_true(sim, job.folder)


@pytest.mark.parametrize("name", SIDECARS)
@pytest.mark.parametrize("who", ["status", "the next start"])
async def test_a_sidecar_file_deleted_between_runs_is_written_anew(
    tmp_path: Path, name: str, who: str
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05) as sim:
        await run_job(sim, job)
        remove(job.folder / name)
        if who == "status":
            assert (await command(sim, "status", str(job.folder))).returncode == 0
        else:
            assert (await run_job(sim, job)).exit_code == 0
        await check_true(sim, job.folder)


@pytest.mark.parametrize(
    ("name", "count"), [("images/000/r2_0.png", 1), ("images/000", ROWS), ("images", ROWS)]
)
async def test_images_deleted_between_runs_are_told_by_status_and_the_next_start_and_not_bought_again(
    tmp_path: Path, name: str, count: int
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05) as sim:
        assert (await run_job(sim, job)).missing is None
        shutil.move(job.folder / name, tmp_path / "elsewhere")
        words = f"{count} image{'s' if count > 1 else ''} of these".encode()
        for arguments in (["status", str(job.folder)], run_arguments(job)):
            told = await command(sim, *arguments)
            assert told.returncode == 0
            assert words in told.stdout
        assert (
            json.loads((await command(sim, "status", str(job.folder), "--json")).stdout)["missing"] == count
        )
        first = "images/000/r2_0.png" if count == 1 else "images/000/r1_0.png"
        assert (await run_job(sim, job)).missing == Missing(count, first)
        assert len(sim.tasks) == ROWS
        shutil.rmtree(job.folder / name, ignore_errors=True)
        shutil.move(tmp_path / "elsewhere", job.folder / name)
        assert (await run_job(sim, job)).missing is None
        await check_true(sim, job.folder)


@pytest.mark.parametrize("name", ["images/000/r1_0.png", "images"])
async def test_images_deleted_while_the_run_goes_on_are_told_at_its_end_and_stop_nothing(
    tmp_path: Path, name: str
) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", ROWS), concurrency=1)
    async with Simulator(seconds=0.05) as sim:
        outcome = await deleting(sim, job, lambda: remove(job.folder / name), at=Fact.DONE, count=1)
        assert outcome.exit_code == 0
        assert outcome.missing == Missing(1, "images/000/r1_0.png")
        assert [path.name for path in images_of(job.folder)] == ["r2_0.png", "r3_0.png", "r4_0.png"]
        assert len(lines_of(job.folder / "images" / "metadata.jsonl")) == ROWS
        assert len(sim.tasks) == ROWS


async def test_a_saved_image_deleted_before_its_row_is_done_is_fetched_again(tmp_path: Path) -> None:
    job = job_of(write_rows(tmp_path / "m.csv", 1), set={"samples": 2})
    async with Simulator(seconds=0.05) as sim:
        runner = Runner(job, credentials_of(sim))
        saved: list[str] = []

        def leave(event: Event) -> None:
            if event.fact is Fact.SAVED:
                saved.append(event.details["path"])
                runner.abort()

        runner.progress.listen(leave)
        assert (await runner.run()).exit_code == 3
        remove(job.folder / saved[0])
        outcome = await run_job(sim, job)
        assert (outcome.exit_code, outcome.missing) == (0, None)
        check_complete(sim, job.folder, 1, images=2)


@pytest.mark.parametrize("gathered", [64, 2**20])
async def test_partial_files_deleted_while_they_grow_are_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: int
) -> None:
    monkeypatch.setattr("batchrun.outputs.save.GATHER_BYTES", gathered)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.05) as sim:
        partial_folder = job.folder / "partial"
        outcome = await deleting(
            sim, job, lambda: shutil.rmtree(partial_folder, ignore_errors=True), at=Fact.DOWNLOADED, count=1
        )
        assert outcome.exit_code == 0
        await check_true(sim, job.folder)
