"""What happens at an awkward moment (a doubt, a stop, a wrong key, a file in the way) costs nothing twice."""

from __future__ import annotations

import csv
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial

import anyio
import pytest

from batchrun.errors import LeaseLost
from batchrun.model import State
from batchrun.progress import Event, Fact, Progress
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from batchrun.wiro.client import Wiro
from batchrun.wiro.manners import Deadlines
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
    stop_when,
    write_rows,
)

# --- doubts ---------------------------------------------------------------------------------------------


async def test_the_user_s_word_for_a_doubt_counts_once_and_for_no_later_doubt(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 2), limit=1)
    async with Simulator(seconds=0.2, faults=["run-reset", "list-off"]) as sim:
        await run_job(sim, job)
        assert len(sim.tasks) == 1
        with anyio.fail_after(30):
            outcome = await run_job(
                sim, job.with_overrides(limit=None), again=Again(states=(State.IN_DOUBT,))
            )
        # the row that was in doubt was submitted again once; the new row's doubt is its own
        assert outcome.counts.by_state == {State.IN_DOUBT: 2}
        assert len(sim.tasks) == 3


async def test_a_listing_that_shows_none_of_our_tasks_proves_no_absence(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.recovery.GRACE_S", 1.0)
    monkeypatch.setattr("batchrun.rules.recovery.SECOND_LOOK_S", 1.0)
    monkeypatch.setattr("batchrun.dispatch.doubts.LISTING_PATIENCE_S", 6.0)
    async with Simulator(seconds=0.2, faults=["run-reset@3", "list-empty"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 4)))
        assert outcome.counts.by_state == {State.DONE: 3, State.IN_DOUBT: 1}
        assert not sim.needless


async def test_a_key_refused_while_a_doubt_is_looked_up_stops_the_run_in_good_order(tmp_path):
    async with Simulator(seconds=0.2, faults=["run-reset@1"]) as sim:
        runner = Runner(job_of(write_rows(tmp_path / "m.csv", 1)), credentials_of(sim))

        def revoke(event: Event) -> None:
            if event.fact is Fact.DOUBT:
                sim._world.options = replace(sim._world.options, key="another-key-0000")

        runner.progress.listen(revoke)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert outcome.counts.by_state == {State.IN_DOUBT: 1}
        assert "key" in (outcome.stopped or "")


async def test_more_doubts_than_a_run_has_room_for_are_each_looked_up_once(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 16))
    # three lost answers at most in a row are no outage
    async with Simulator(seconds=0.1, faults=["run-reset@1,2,3,5,6,7,9,10,11,13,14,15", "list-off"]) as sim:
        await run_job(sim, job)
        facts = Facts()
        with anyio.fail_after(30):
            outcome = await run_job(sim, job.with_overrides(max_concurrency=1, downloads=1), facts=facts)
        assert outcome.counts.by_state == {State.IN_DOUBT: 12, State.DONE: 4}
        assert facts.count(Fact.HELD) == 12


async def test_the_task_of_another_tool_is_no_doubtful_row_s_task(tmp_path, hasty):
    """Two tools compared on one prompt, both answers lost: each row gets the picture of its own tool."""
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "id,tool,prompt\n0,Retro-Cartoons,a first cat\n1,text-to-image-sd-lora,a first cat\n"
        "a,text-to-image-sd-lora,a cat\nb,Retro-Cartoons,a cat\n"
    )
    same = {"negativePrompt": "ugly", "steps": 20, "scale": "7", "width": 512, "height": 512, "seed": "1"}
    job = job_of(manifest, tool=None, set={**same, "samples": 1}, concurrency=2)
    async with Simulator(seconds=0.1, faults=["run-reset@4", "run-reset-before@3"]) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        for record in lines_of(tmp_path / "run" / "images" / "metadata.jsonl"):
            [task] = [task for task in sim.tasks if str(task.id) == record["task_id"]]
            assert task.tool.slug == record["tool"]
        check_complete(sim, tmp_path / "run", 4)


async def test_of_two_tools_with_one_prompt_nothing_is_known_yet_and_each_row_finds_its_own(tmp_path, hasty):
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,tool,prompt\na,text-to-image-sd-lora,a cat\nb,Retro-Cartoons,a cat\n")
    same = {"negativePrompt": "ugly", "steps": 20, "scale": "7", "width": 512, "height": 512, "seed": "1"}
    job = job_of(manifest, tool=None, set={**same, "samples": 1}, concurrency=2)
    async with Simulator(seconds=0.1, faults=["run-reset@2", "run-reset-before@1"]) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        tools = {str(task.id): task.tool.slug for task in sim.tasks}
        records = lines_of(tmp_path / "run" / "images" / "metadata.jsonl")
        assert all(tools[record["task_id"]] == record["tool"] for record in records)
        check_complete(sim, tmp_path / "run", 2)


async def test_prompts_that_differ_only_as_texts_are_two_prompts(tmp_path, hasty):
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt\na,7\nb,7.0\n")
    async with Simulator(
        seconds=0.2, latency_s=0.2, stall_s=2, faults=["run-reset-before@1", "run-stall@2"]
    ) as sim:
        assert (await run_job(sim, job_of(manifest, concurrency=2))).exit_code == 0
        assert sorted(task.parameters["prompt"] for task in sim.tasks) == ["7", "7.0"]


async def test_a_doubt_is_looked_up_by_what_was_sent_though_settings_have_changed(tmp_path, hasty):
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "id,prompt,selectedLoraModel,Emotion-Happy-Slider-v1.0\nr1,a cat,,\nr2,a dog,62,5\nr3,a fox,62,5\n"
    )
    job = job_of(manifest, tool="text-to-image-sd-lora", concurrency=1)
    async with Simulator(seconds=0.2, faults=["run-reset@2"]) as sim:
        runner = Runner(job, credentials_of(sim))

        abort_when(runner, lambda event: event.fact is Fact.DOUBT)
        await runner.run()
        assert (await run_job(sim, job.with_overrides(lora_scale="parameter"))).exit_code == 0
        told = {
            record["id"]: record["prompt"]
            for record in lines_of(tmp_path / "run" / "images" / "metadata.jsonl")
        }
        assert told["r2"] == "a dog <lora:Emotion-Happy-Slider-v1.0:5>"  # as it was sent
        assert told["r3"] == "a fox"  # planned before, sent after the change
        check_complete(sim, tmp_path / "run", 3)


# --- stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", [Fact.IN_FLIGHT, Fact.ATTEMPT_FAILED])
async def test_nothing_is_submitted_once_the_run_is_told_to_stop(tmp_path, fact):
    async with Simulator(seconds=0.2, faults=["task-fails"]) as sim:
        facts = Facts()
        # followed by looks, which free a slot no sooner than the end of its task is known here
        job = job_of(write_rows(tmp_path / "m.csv", 30), concurrency=8, track="detail")
        runner = Runner(job, credentials_of(sim), progress=Progress(facts))

        stop_when(runner, lambda event: facts.count(Fact.INTENT) >= 8 and event.fact is fact)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert len(sim.tasks) == facts.count(Fact.INTENT) == 8
        # what was about to be sent was certainly not: the next start need not find out about it
        assert State.SUBMITTING not in outcome.counts.by_state


async def test_a_run_that_another_process_has_taken_buys_nothing_more_and_ends(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 4))
    async with Simulator(seconds=0.1, faults=["run-429*4"]) as sim:
        runner = Runner(job, credentials_of(sim))

        def lose(event: Event) -> None:
            if event.fact is Fact.PAUSED:  # one row will try, the others wait for what comes of it
                with closing(sqlite3.connect(tmp_path / "run" / "state.sqlite3")) as state, state:
                    state.execute("UPDATE leases SET ended_at = 1")
                    state.execute("UPDATE rows SET lease = NULL")

        runner.progress.listen(lose)
        with anyio.fail_after(60), suppress(LeaseLost):
            await runner.run()
        assert not sim.tasks
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


async def test_a_cancelled_task_whose_answer_was_lost_is_seen_cancelled(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=30, faults=["stop-reset"]) as sim:
        runner = Runner(job, credentials_of(sim))

        def cancel(event: Event) -> None:
            if event.fact is Fact.IN_FLIGHT and len(sim.tasks) == 3:
                runner.cancel_all()

        runner.progress.listen(cancel)
        outcome = await runner.run()
        assert sim.active == 0
        assert outcome.counts.by_state == {State.CANCELLED: 3}


async def test_what_was_bought_is_fetched_while_the_newest_task_is_still_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.dispatch.dispatcher.NEWEST_S", 1000.0)
    patient = partial(Wiro, deadlines=Deadlines(call_s=1000.0))
    monkeypatch.setattr("batchrun.runner.Wiro", patient)
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.5, stall_s=1000.0, faults=["list-stall@2"]) as sim:
        runner = Runner(job, credentials_of(sim))

        abort_when(runner, lambda event: event.fact is Fact.IN_FLIGHT and len(sim.tasks) == 3)
        await runner.run()
        with anyio.fail_after(30):
            assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 3)


async def test_a_cancel_submits_nothing_though_tasks_have_failed_meanwhile(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 4))
    async with Simulator(seconds=0.3, faults=["task-fails"]) as sim:
        runner = Runner(job, credentials_of(sim))

        abort_when(runner, lambda event: event.fact is Fact.IN_FLIGHT and len(sim.tasks) == 4)
        await runner.run()
        while sim.active:
            await anyio.sleep(0.05)
        sim.faults = []
        outcome = await run_job(sim, job, again=Again(states=(), cancel=True))
        assert len(sim.tasks) == 4
        assert outcome.counts.by_state == {State.PLANNED: 4}


async def test_a_task_that_may_recover_is_ended_before_another_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.policy.ERROR_PATIENCE_S", 1.0)
    async with Simulator(seconds=12, faults=["task-error-passing@1"]) as sim:
        runner = Runner(job_of(write_rows(tmp_path / "m.csv", 1)), credentials_of(sim))

        def hurry(event: Event) -> None:
            if event.fact is Fact.ATTEMPT_FAILED:
                sim.set_seconds(0.1)

        runner.progress.listen(hurry)
        assert (await runner.run()).exit_code == 0
        assert [task.stopped for task in sim.tasks] == [True, False]


@pytest.mark.parametrize("faults", [["run-validation"], []], ids=["refused", "not sent"])
async def test_a_rerun_that_is_taken_back_buys_nothing(tmp_path, faults):
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,prompt\na,a cat\nb,a fox\n")
    job = job_of(manifest)
    async with Simulator(seconds=0.1) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        manifest.write_text("id,prompt\na,a dog\nb,a fox\n")
        sim.faults = faults
        anew = job.with_overrides(rerun_changed=True)
        runner = Runner(anew, credentials_of(sim), planned=lambda self: None if faults else self.stop("no"))
        await runner.run()
        sim.faults = []
        manifest.write_text("id,prompt\na,a cat\nb,a fox\n")
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.DONE: 2}
        check_complete(sim, tmp_path / "run", 2)
        # and asked for anew once more, it is bought once
        manifest.write_text("id,prompt\na,a dog\nb,a fox\n")
        assert (await run_job(sim, anew)).exit_code == 0
        assert sorted(task.parameters["prompt"] for task in sim.tasks) == ["a cat", "a dog", "a fox"]
        records = lines_of(tmp_path / "run" / "images" / "metadata.jsonl")
        assert sorted(record["prompt"] for record in records) == ["a dog", "a fox"]


# --- saving -------------------------------------------------------------------------------------------------


async def test_a_file_in_the_way_of_one_image_fails_that_row_alone(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 4))
    async with Simulator(seconds=0.1) as sim:
        await run_job(sim, job.with_overrides(limit=1))
        (tmp_path / "run" / "images" / "000" / "r2_0.png").write_bytes(draw("PNG", size=(3, 3)))
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.DONE: 3, State.FAILED: 1}
        [(_, failure, *_)] = outcome.failures
        assert failure.cause == "download failed"
        assert (tmp_path / "run" / "images" / "000" / "r2_0.png").read_bytes() == draw("PNG", size=(3, 3))
        (tmp_path / "run" / "images" / "000" / "r2_0.png").unlink()
        assert (await run_job(sim, job, again=Again())).exit_code == 0
        assert len(sim.tasks) == 4
        check_complete(sim, tmp_path / "run", 4)


# --- what is told ---------------------------------------------------------------------------------------


async def test_failed_csv_tells_no_row_that_is_on_its_way_again(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.1, faults=["run-validation@1,2"]) as sim:
        await run_job(sim, job)
        runner = Runner(job, credentials_of(sim), again=Again(ids=["r1"]))

        abort_when(runner, lambda event: event.fact is Fact.DONE)
        await runner.run()
        with (tmp_path / "run" / "failed.csv").open(newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == ["r2"]


async def test_rows_taken_out_of_the_manifest_are_finished_and_not_counted(tmp_path):
    manifest = write_rows(tmp_path / "m.csv", 3)
    job = job_of(manifest)
    async with Simulator(seconds=0.5) as sim:
        runner = Runner(job, credentials_of(sim))

        stop_when(runner, lambda event: event.fact is Fact.IN_FLIGHT and len(sim.tasks) == 3)
        await runner.run()
        manifest.write_text("id,prompt\nr1,a picture of 1 birds\n")
        again = Runner(job, credentials_of(sim))
        outcome = await again.run()
        assert outcome.exit_code == 0
        assert len(images_of(tmp_path / "run")) == 3
        told = {state: rows for state, rows in again.progress.counts.items() if rows}
        assert told == outcome.counts.by_state == {State.DONE: 1}
        assert again.progress.images == outcome.counts.images == 1
