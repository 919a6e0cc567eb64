"""The main job: from a manifest to images on disk, stoppable and resumable, for each of the tools."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import anyio
import pytest
from PIL import Image

from batchrun.errors import FolderBusy, FolderTaken, ManifestError
from batchrun.manifest.job import job_for, load_job
from batchrun.model import State
from batchrun.progress import Event, Fact, Progress
from batchrun.rules.policy import LEAST_TRIES
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from tests.support.images import draw
from tests.support.runs import (
    Facts,
    abort_when,
    check_complete,
    credentials_of,
    images_of,
    job_of,
    lines_of,
    run_job,
    write_rows,
)

JOBS = Path(__file__).parents[2] / "jobs"

#: Rows and images that each example stands for.
EXAMPLES = {
    "retro": (4, 4),
    "lora": (3, 3),
    "portraits": (4, 4),
    "views": (2, 2),
    "stories": (2, 7),
    "mixed": (5, 8),
    "grid": (12, 12),
}


@pytest.mark.parametrize("name", EXAMPLES)
async def test_every_example_job_runs_to_its_images(tmp_path, name):
    rows, images = EXAMPLES[name]
    job = load_job(JOBS / f"{name}.toml").with_overrides(out=tmp_path / "run")
    async with Simulator(seconds=0.1) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 0
        check_complete(sim, tmp_path / "run", rows, images=images)
        # a second start has nothing to do and asks the service nothing
        asked = sum(sim.requests.values())
        assert (await run_job(sim, job)).exit_code == 0
        assert sum(sim.requests.values()) == asked


async def test_a_shared_local_image_is_uploaded_once_and_not_again_after_a_restart(tmp_path):
    shutil.copytree(JOBS, tmp_path / "jobs")
    job = load_job(tmp_path / "jobs" / "portraits.toml").with_overrides(out=tmp_path / "run")
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        assert len(sim.uploads) == 1
        with (tmp_path / "jobs" / "portraits.jsonl").open("a") as manifest:
            manifest.write('{"id": "new", "inputImageUrl": "images/portrait.png", "prompt": "a gardener"}\n')
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.uploads) == 1
        addresses = {task.parameters["inputImageUrl"] for task in sim.tasks}
        assert len(addresses) == 1
        check_complete(sim, tmp_path / "run", 5)


async def test_an_upload_in_trouble_is_made_again_until_its_address_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.policy.backoff_s", lambda attempt, **bounds: 0.0)
    job = load_job(JOBS / "portraits.toml").with_overrides(out=tmp_path / "run")
    kinds = ("500", "html", "reset", "broken-json")
    async with Simulator(seconds=0.1, faults=[f"upload-{kind}*1" for kind in kinds]) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        assert sim.requests["upload"] == len(kinds) + 1
        check_complete(sim, tmp_path / "run", 4)


async def test_an_image_that_the_service_does_not_take_fails_its_rows_and_buys_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.policy.REFUSAL_PATIENCE_S", 0.0)
    monkeypatch.setattr("batchrun.rules.policy.backoff_s", lambda attempt, **bounds: 0.0)
    job = load_job(JOBS / "portraits.toml").with_overrides(out=tmp_path / "run")
    async with Simulator(seconds=0.1, faults=["upload-broken-json"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.FAILED: 4}
        assert {failure.cause for _, failure, *_ in outcome.failures} == {"input image"}
        assert sim.requests["upload"] == 4 * LEAST_TRIES
        assert not sim.tasks
        sim.faults = []
        assert (await run_job(sim, job, again=Again())).exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


async def test_an_image_changed_after_it_was_planned_is_not_sent_and_the_next_start_plans_the_new_one(
    tmp_path,
):
    shutil.copytree(JOBS, tmp_path / "jobs")
    job = load_job(tmp_path / "jobs" / "portraits.toml").with_overrides(out=tmp_path / "run")
    image = tmp_path / "jobs" / "images" / "portrait.png"
    async with Simulator(seconds=0.1) as sim:
        runner = Runner(job, credentials_of(sim), planned=lambda _: image.write_bytes(draw("PNG")))
        assert (await runner.run()).counts.by_state == {State.FAILED: 4}
        assert not sim.uploads
        assert not sim.tasks
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


async def test_the_images_show_what_was_asked_for(tmp_path):
    """The picture under a row's name is the one of that row's prompt, whatever order tasks ended in."""
    job = job_of(write_rows(tmp_path / "m.csv", 12), concurrency=12)
    async with Simulator(seconds="0.05-0.4", seed=5) as sim:
        await run_job(sim, job)
    for record in lines_of(tmp_path / "run" / "images" / "metadata.jsonl"):
        with Image.open(tmp_path / "run" / "images" / record["file_name"]) as image:
            assert record["prompt"] in image.info.values()
            assert (image.width, image.height) == (record["width"], record["height"])
        assert Path(record["file_name"]).name == f"{record['id']}_0.png"


async def test_names_without_ids_tell_the_line(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3, ids=False))
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
    names = [path.name[:7] for path in images_of(tmp_path / "run")]
    assert names == ["000002-", "000003-", "000004-"]


async def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 20), concurrency=4)
    async with Simulator(seconds=0.3) as sim:
        facts = Facts()
        runner = Runner(job, credentials_of(sim), progress=Progress(facts))
        facts_seen = 0

        def stop_after_some(event: Event) -> None:
            nonlocal facts_seen
            facts_seen += event.fact is Fact.DONE
            if facts_seen == 5:
                runner.stop("enough")

        runner.progress.listen(stop_after_some)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert outcome.stopped == "enough"
        left = outcome.counts.by_state
        assert left[State.DONE] >= 5
        assert State.SUBMITTING not in left
        assert State.FINISHED not in left  # downloads under way were finished
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 20
        check_complete(sim, tmp_path / "run", 20)


async def test_a_run_left_at_once_loses_nothing(tmp_path, hasty):
    job = job_of(write_rows(tmp_path / "m.csv", 20), concurrency=6)
    async with Simulator(seconds=0.3) as sim:
        runner = Runner(job, credentials_of(sim))

        abort_when(runner, lambda event: event.fact is Fact.PUBLISHED)
        assert (await runner.run()).exit_code == 3
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 20
        check_complete(sim, tmp_path / "run", 20)


async def test_added_and_sorted_rows_buy_only_what_is_new(tmp_path):
    manifest = write_rows(tmp_path / "m.csv", 5, ids=False)
    job = job_of(manifest)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        header, *rows = manifest.read_text().splitlines()
        manifest.write_text("\n".join([header, "a new picture", *reversed(rows)]) + "\n")
        assert (await run_job(sim, job)).exit_code == 0
        assert len(sim.tasks) == 6
        check_complete(sim, tmp_path / "run", 6)
        lines = {record["id"] or record["line"] for record in lines_of(tmp_path / "run" / "results.jsonl")}
        assert lines == {2, 3, 4, 5, 6, 7}


async def test_a_changed_row_is_bought_again_only_when_told_so_and_the_old_image_moves_aside(tmp_path):
    manifest = write_rows(tmp_path / "m.csv", 3)
    job = job_of(manifest)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        before = {path.name: path.read_bytes() for path in images_of(tmp_path / "run")}
        manifest.write_text(manifest.read_text().replace("of 2 birds", "of 22 birds"))
        runner = Runner(job, credentials_of(sim))
        assert (await runner.run()).exit_code == 0
        assert runner.merged is not None
        assert runner.merged.changed == 1
        assert len(sim.tasks) == 3
        # told again until the user decides
        again = Runner(job, credentials_of(sim))
        await again.run()
        assert again.merged is not None
        assert again.merged.changed == 1
        assert (await run_job(sim, job.with_overrides(rerun_changed=True))).exit_code == 0
        assert len(sim.tasks) == 4
        after = {path.name: path.read_bytes() for path in images_of(tmp_path / "run")}
        assert {name for name in after if after[name] != before[name]} == {"r2_0.png"}
        [old] = (tmp_path / "run" / "superseded").rglob("*.png")
        assert old.read_bytes() == before["r2_0.png"]
        assert not any((tmp_path / "run" / "pending").glob("*"))
        check_complete(sim, tmp_path / "run", 3)


async def test_a_changed_set_value_does_not_buy_everything_again(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3, ids=False))
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        runner = Runner(job.with_overrides(set={"steps": 10}), credentials_of(sim))
        await runner.run()
        assert runner.merged is not None
        assert (runner.merged.changed, runner.merged.new) == (3, 0)
        assert len(sim.tasks) == 3


async def test_an_unchanged_manifest_is_not_read_again(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        runner = Runner(job, credentials_of(sim))
        await runner.run()
        assert runner.findings is None


async def test_a_try_runs_the_first_rows_only_and_the_full_run_goes_on(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 8))
    async with Simulator(seconds=0.1) as sim:
        outcome = await run_job(sim, job.with_overrides(limit=3))
        assert outcome.exit_code == 0
        assert outcome.beyond_limit == 5
        names = [path.name for path in images_of(tmp_path / "run")]
        assert names == ["r1_0.png", "r2_0.png", "r3_0.png"]
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 8)


async def test_a_wrong_manifest_sends_nothing_and_leaves_no_folder(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt,steps,colour\na,a cat,many,red\na,,20,\n")
    async with Simulator() as sim:
        with pytest.raises(ManifestError) as caught:
            await run_job(sim, job_of(manifest))
        told = [(problem.line, problem.column) for problem in caught.value.problems]
        assert sorted(told) == [(2, "colour"), (2, "steps"), (3, "id"), (3, "prompt")]
        assert not sim.requests
    assert not (tmp_path / "run").exists()


async def test_invalid_rows_can_be_skipped_and_come_back_corrected(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt,steps\na,a cat,20\nb,a dog,many\n")
    job = job_of(manifest).with_overrides(skip_invalid=True)
    async with Simulator(seconds=0.1) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.by_state == {State.DONE: 1, State.INVALID: 1}
        with (tmp_path / "run" / "failed.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == [{"id": "b", "prompt": "a dog", "steps": "many"}]
        manifest.write_text("id,prompt,steps\na,a cat,20\nb,a dog,30\n")
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 2)


async def test_kept_columns_come_back_with_the_results(tmp_path):
    manifest = tmp_path / "m.jsonl"
    rows = [{"prompt": f"{n} cats", "tag": "counting", "boxes": [[n, 1.5]], "score": 0.25} for n in range(3)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job_of(manifest, extra="keep"))
    records = lines_of(tmp_path / "run" / "images" / "metadata.jsonl")
    assert {record["prompt"]: record["extra"] for record in records} == {
        row["prompt"]: {"tag": "counting", "boxes": row["boxes"], "score": 0.25} for row in rows
    }


async def test_files_beside_the_images_grow_and_are_written_anew_only_where_lines_are_no_longer_true(
    tmp_path,
):
    manifest = tmp_path / "m.jsonl"
    rows = [{"id": f"r{n}", "prompt": f"{n} cats", "mood": mood} for n, mood in enumerate((5, 6, "glad"))]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_of(manifest, extra="keep")
    path = tmp_path / "run" / "images" / "metadata.jsonl"
    files: list[int] = []
    async with Simulator(seconds=0.1) as sim:
        for limit in (1, 2, 3):
            await run_job(sim, job.with_overrides(limit=limit))
            files.append(path.stat().st_ino)
        check_complete(sim, tmp_path / "run", 3)
    assert files[0] == files[1] != files[2]
    assert [record["extra"]["mood"] for record in lines_of(path)] == ["5", "6", "glad"]


async def test_three_of_four_saved_images_are_kept_and_only_the_fourth_is_fetched(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 1), set={"samples": 4}, downloads=1)
    async with Simulator(seconds=0.1) as sim:
        runner = Runner(job, credentials_of(sim))
        seen = Counter[Fact]()

        def leave(event: Event) -> None:
            seen[event.fact] += 1
            if seen[Fact.SAVED] == 3:
                runner.abort()

        runner.progress.listen(leave)
        await runner.run()
        fetched = sim.requests["cdn"]
        assert (await run_job(sim, job)).exit_code == 0
        assert sim.requests["cdn"] - fetched <= 4 - 3
        check_complete(sim, tmp_path / "run", 1, images=4)


async def test_fewer_images_than_asked_for_are_taken_with_a_warning(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 1), set={"samples": 4})
    async with Simulator(seconds=0.1, faults=["task-fewer"]) as sim:
        facts = Facts()
        assert (await run_job(sim, job, facts=facts)).exit_code == 0
        assert len(images_of(tmp_path / "run")) == 3
        assert any("3 images came where 4" in str(event.details) for event in facts)


async def test_cancelling_ends_what_runs_and_charges_nothing(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 6), concurrency=3)
    async with Simulator(seconds=30) as sim:
        runner = Runner(job, credentials_of(sim))

        def cancel(event: Event) -> None:
            if event.fact is Fact.IN_FLIGHT and len(sim.tasks) == 3:
                runner.cancel_all()

        runner.progress.listen(cancel)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert outcome.counts.by_state[State.CANCELLED] == 3
        assert sim.active == 0
        assert sim.billed_usd == 0 == outcome.counts.cost_usd
        sim.set_seconds(0.1)
        assert (await run_job(sim, job, again=Again())).exit_code == 0
        assert len(images_of(tmp_path / "run")) == 6


async def test_a_folder_belongs_to_one_manifest_and_one_runner(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 2))
    other = job_for(write_rows(tmp_path / "other.csv", 2), tool="Retro-Cartoons", out=tmp_path / "run")
    async with Simulator(seconds=1.0) as sim:
        async with anyio.create_task_group() as group:
            facts = Facts()
            group.start_soon(lambda: run_job(sim, job, facts=facts))
            while not facts.count(Fact.IN_FLIGHT):
                await anyio.sleep(0.02)
            with pytest.raises(FolderBusy, match=r"by process \d+"):
                await run_job(sim, job)
        with pytest.raises(FolderTaken, match=r"m\.csv"):
            await run_job(sim, other)


async def test_a_moved_folder_goes_on(tmp_path):
    (tmp_path / "a").mkdir()
    job = job_of(write_rows(tmp_path / "a" / "m.csv", 4), limit=2)
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job)
        (tmp_path / "a").rename(tmp_path / "b")
        moved = job_of(tmp_path / "b" / "m.csv")
        assert (await run_job(sim, moved)).exit_code == 0
        assert len(sim.tasks) == 4
        check_complete(sim, tmp_path / "b" / "run", 4)


async def test_failed_rows_of_an_expansion_come_back_one_by_one(tmp_path):
    manifest = write_rows(tmp_path / "m.csv", 1)
    async with Simulator(seconds=0.1, faults=["run-validation@2"]) as sim:
        await run_job(sim, job_of(manifest, expand={"seed": "1..3"}, concurrency=1))
    text = (tmp_path / "run" / "failed.csv").read_text()
    [row] = csv.DictReader(io.StringIO(text))
    assert row == {"id": "r1.2", "prompt": "a picture of 1 birds", "seed": "2"}
