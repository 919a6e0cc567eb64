"""Whatever the service does, a row is bought once and its image is whole."""

from __future__ import annotations

from contextlib import closing
from decimal import Decimal

import anyio
import pytest

from batchrun.model import State
from batchrun.progress import Fact
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from batchrun.store.store import Store
from tests.support.runs import (
    Facts,
    abort_when,
    check_complete,
    credentials_of,
    job_of,
    run_job,
    stop_when,
    write_rows,
)

ROWS = 6


@pytest.mark.parametrize(
    "fault",
    ["run-reset", "run-500", "run-524", "run-broken-json", "run-half", "run-no-id", "run-stall"],
)
async def test_a_lost_answer_after_the_task_was_made_is_looked_up_and_adopted(tmp_path, fault):
    async with Simulator(seconds=0.3, faults=[f"{fault}@2,4"], stall_s=2.0) as sim:
        facts = Facts()
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)), facts=facts)
        assert outcome.exit_code == 0
        assert facts.count(Fact.ADOPTED) == 2
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)
        assert outcome.counts.cost_usd == sim.billed_usd


@pytest.mark.parametrize(
    "fault",
    [
        "run-refused", "run-429", "run-429-date", "run-code0", "run-limit", "run-limit-nonumber",
        "run-limit-odd",
    ],
)  # fmt: skip
async def test_a_refusal_that_made_no_task_uses_up_no_attempt(tmp_path, fault, hasty):
    async with Simulator(seconds=0.2, faults=[f"{fault}@2,3"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS), attempts=1))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_doubt_is_submitted_again_only_once_the_listing_proves_that_no_task_was_made(tmp_path):
    async with Simulator(seconds=0.2, faults=["run-500-before@2", "run-html@4"]) as sim:
        facts = Facts()
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)), facts=facts)
        assert outcome.exit_code == 0
        assert facts.count(Fact.ABSENT) == 2
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_doubt_nobody_can_settle_is_held_and_never_bought_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.dispatch.doubts.LISTING_PATIENCE_S", 2.0)
    job = job_of(write_rows(tmp_path / "m.csv", ROWS))
    async with Simulator(seconds=0.2, faults=["run-reset@3", "list-off"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.by_state[State.IN_DOUBT] == 1
        assert len(sim.tasks) == ROWS
        [held] = [failure for state, failure, *_ in outcome.failures if state is State.IN_DOUBT]
        assert held.cause == "in doubt"
        # a plain start only looks again
        assert (await run_job(sim, job)).counts.by_state[State.IN_DOUBT] == 1
        assert len(sim.tasks) == ROWS
        # with the listing back, looking is enough
        sim.faults = []
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_held_doubt_is_submitted_again_by_the_users_word_alone(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.2, faults=["run-reset@3", "list-off"]) as sim:
        await run_job(sim, job)
        outcome = await run_job(sim, job, again=Again(states=(State.IN_DOUBT,)))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == 4


async def test_without_the_look_up_rows_would_be_bought_twice(tmp_path, monkeypatch):
    """The negative control: it is the look-up that saves the money, and the simulator can tell."""
    from batchrun.dispatch.doubts import Doubts
    from batchrun.rules.recovery import Absent

    async def never_look(self, doubt, **facts):
        return Absent()

    monkeypatch.setattr(Doubts, "settle", never_look)
    async with Simulator(seconds=0.2, faults=["run-reset@2,4"]) as sim:
        await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert len(sim.needless) == 2


@pytest.mark.parametrize("listed", ["list-late", "list-500*2", "list-broken-json*2", "list-reset*1"])
async def test_a_slow_or_stumbling_listing_costs_time_and_nothing_else(tmp_path, listed):
    async with Simulator(seconds=0.2, faults=["run-reset@2,5", listed], late_s=2.0) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


async def test_nothing_is_submitted_before_the_service_has_told_an_id_or_its_time(tmp_path):
    """A submit lost before that could not be told from an older one of the same request."""
    async with Simulator(seconds=0.2, faults=["tool-reset", "list-reset@1,2", "run-reset@1,2"]) as sim:
        facts = Facts()
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)), facts=facts)
        assert outcome.exit_code == 0
        assert facts.count(Fact.ADOPTED) == 2
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_later_start_tells_a_lost_submit_by_the_tasks_it_knows(tmp_path, monkeypatch):
    """Even where the service has said nothing yet."""
    monkeypatch.setattr("batchrun.dispatch.dispatcher.NEWEST_S", 0.5)
    async with Simulator(seconds=0.2) as sim:
        await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 1)))
        sim.faults = ["tool-reset", "list-reset@1,2,3", "run-reset@1,2"]
        facts = Facts()
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)), facts=facts)
        assert outcome.exit_code == 0
        assert facts.count(Fact.ADOPTED) == 2
        check_complete(sim, tmp_path / "run", ROWS)


@pytest.mark.parametrize(
    "fault",
    [
        "detail-reset", "detail-500", "detail-html", "detail-429", "detail-broken-json", "detail-empty",
        "task-error-passing", "task-late-outputs", "task-unknown-status", "task-backwards", "task-skips",
        "task-pexit-null", "task-pexit-empty", "task-pexit-number", "task-pexit-absent", "task-odd-types",
        "task-raw", "task-names",
    ],
)  # fmt: skip
async def test_whatever_is_said_of_a_task_it_is_followed_to_its_end(tmp_path, fault):
    async with Simulator(seconds=0.3, faults=[f"{fault}*3"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


@pytest.mark.parametrize(
    "fault",
    [
        "cdn-truncated", "cdn-reset", "cdn-drip", "cdn-500", "cdn-404-once", "cdn-403", "cdn-html",
        "cdn-wrong-bytes",
        "cdn-no-length", "cdn-empty", "cdn-redirect", "cdn-ignore-range", "cdn-other-etag", "cdn-wrong-size",
        "cdn-wrong-type",
    ],
)  # fmt: skip
async def test_whatever_the_cdn_sends_the_image_is_whole_and_not_bought_again(tmp_path, fault):
    async with Simulator(seconds=0.1, faults=[f"{fault}*3"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS
        check_complete(sim, tmp_path / "run", ROWS)


@pytest.mark.parametrize("fault", ["task-fails", "task-cancelled", "task-error-end"])
async def test_a_failed_task_is_not_billed_and_tried_again(tmp_path, fault):
    async with Simulator(seconds=0.2, faults=[f"{fault}@1,3"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert outcome.exit_code == 0
        assert len(sim.tasks) == ROWS + 2
        assert outcome.counts.cost_usd == sim.billed_usd
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_row_whose_task_keeps_failing_fails_after_its_attempts_and_can_be_retried(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 2))
    async with Simulator(seconds=0.1, faults=["task-fails"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.by_state == {State.FAILED: 2}
        assert len(sim.tasks) == 6
        assert (tmp_path / "run" / "failed.csv").read_text() == (tmp_path / "m.csv").read_text()
        # failed rows stay failed on a plain start
        assert (await run_job(sim, job)).counts.by_state == {State.FAILED: 2}
        assert len(sim.tasks) == 6
        sim.faults = []
        again = Again()
        assert (await run_job(sim, job, again=again)).exit_code == 0
        assert again.requeued.submit == 2
        check_complete(sim, tmp_path / "run", 2)
        assert not (tmp_path / "run" / "failed.csv").exists()


async def test_what_was_paid_and_is_empty_is_bought_again_only_when_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.policy.OUTPUTS_PATIENCE_S", 1.0)
    job = job_of(write_rows(tmp_path / "m.csv", 2))
    async with Simulator(seconds=0.1, faults=["task-empty@1"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.cost_usd == sim.billed_usd
        again = Again()
        assert (await run_job(sim, job, again=again)).exit_code == 1
        assert again.requeued.lost == 1
        assert len(sim.tasks) == 2
        assert (await run_job(sim, job.with_overrides(regenerate_lost=True), again=Again())).exit_code == 0
        assert len(sim.tasks) == 3


async def test_images_deleted_at_the_service_fail_the_row_and_are_not_bought_again(tmp_path, monkeypatch):
    monkeypatch.setattr("batchrun.rules.policy.OUTPUTS_PATIENCE_S", 1.0)
    async with Simulator(seconds=0.1, faults=["cdn-gone@1"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 3)))
        assert outcome.exit_code == 1
        assert [failure.cause for _, failure, *_ in outcome.failures] == ["images gone"]
        assert len(sim.tasks) == 3


async def test_a_validation_error_is_final_and_other_rows_go_on(tmp_path):
    async with Simulator(seconds=0.1, faults=["run-validation@2"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 4)))
        assert outcome.counts.by_state == {State.DONE: 3, State.FAILED: 1}
        assert outcome.failures[0][1].cause == "rejected"
        assert len(sim.tasks) == 3


async def test_a_missing_tool_fails_its_rows_once_confirmed_and_the_others_go_on(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "id,tool,prompt\n"
        + "".join(f"a{n},Retro-Cartoons,{n} cats\n" for n in range(4))
        + "".join(f"b{n},text-to-image-sd-lora,{n} dogs\n" for n in range(4))
    )
    async with Simulator(seconds=0.1, faults=["run-notfound:Retro-Cartoons"]) as sim:
        outcome = await run_job(sim, job_of(manifest, tool=None))
        assert outcome.counts.by_state == {State.DONE: 4, State.FAILED: 4}
        assert {failure.cause for _, failure, *_ in outcome.failures} == {"tool not found"}


async def test_a_tool_that_is_missing_in_one_answer_alone_is_not(tmp_path):
    async with Simulator(seconds=0.1, faults=["run-notfound@1"]) as sim:
        assert (await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 1)))).exit_code == 0
        check_complete(sim, tmp_path / "run", 1)


async def test_refused_credentials_stop_the_run_with_every_row_intact(tmp_path):
    async with Simulator(seconds=0.1, faults=["run-401"]) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 4)))
        assert outcome.exit_code == 3
        assert outcome.counts.by_state == {State.PLANNED: 4}
        assert "key" in (outcome.stopped or "")
        assert not sim.tasks


async def test_an_exhausted_balance_is_waited_for(tmp_path):
    async with Simulator(seconds=0.1, balance_usd=Decimal("0.10"), slots=4) as sim:
        job = job_of(write_rows(tmp_path / "m.csv", 4))
        async with anyio.create_task_group() as group:

            async def top_up():
                while not sim.refusals:
                    await anyio.sleep(0.05)
                sim.balance_usd = Decimal(100)

            group.start_soon(top_up)
            outcome = await run_job(sim, job)
        assert outcome.exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


async def test_the_service_queues_or_refuses_and_never_more_than_the_limit_is_active(tmp_path):
    async with Simulator(seconds=0.2, slots=3) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 20), concurrency=10))
        assert outcome.exit_code == 0
        assert 0 < sim.max_active <= 3
        check_complete(sim, tmp_path / "run", 20)
    with closing(Store.open(tmp_path / "run" / "state.sqlite3")) as store:
        assert await store.account_limit() == 3  # the next start begins with it


async def test_a_row_that_finds_the_account_full_tries_again_with_the_intent_that_is_recorded(tmp_path):
    async with Simulator(seconds=0.2, slots=3) as sim:
        facts = Facts()
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 30), concurrency=5), facts=facts)
        assert outcome.exit_code == 0
        check_complete(sim, tmp_path / "run", 30)
        refused = sim.refusals[96]
        assert facts.count(Fact.INTENT) == 30 + facts.count(Fact.WITHDRAWN)
        assert facts.count(Fact.WITHDRAWN) < refused / 2


@pytest.mark.parametrize("leave", [stop_when, abort_when])
async def test_a_row_that_waits_for_its_next_try_is_no_doubt_when_the_run_ends(tmp_path, leave):
    job = job_of(write_rows(tmp_path / "m.csv", 4), concurrency=4)
    async with Simulator(seconds=1.0, slots=1) as sim:
        runner = Runner(job, credentials_of(sim))
        leave(runner, lambda event: event.fact is Fact.LIMIT)
        await runner.run()
        with closing(Store.open(tmp_path / "run" / "state.sqlite3")) as store:
            counts = (await store.counts()).by_state
        assert counts.get(State.PLANNED, 0) == 4 - len(sim.tasks)
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


@pytest.mark.parametrize("hours", [-9, 9])
async def test_a_service_whose_clock_is_wrong_by_hours_settles_doubts_all_the_same(tmp_path, hours, hasty):
    faults = ["run-reset@1,4", "run-500-before@2"]
    async with Simulator(seconds=0.2, clock_offset_s=3600.0 * hours, faults=faults) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", ROWS)))
        assert outcome.exit_code == 0
        check_complete(sim, tmp_path / "run", ROWS)


async def test_a_limit_that_shrinks_while_the_run_goes_on_harms_no_row(tmp_path):
    async with Simulator(seconds=0.3, slots=12) as sim:
        facts = Facts()

        async def shrink():
            while facts.count(Fact.DONE) < 10:
                await anyio.sleep(0.05)
            sim.slots = 2

        async with anyio.create_task_group() as group:
            group.start_soon(shrink)
            outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 40)), facts=facts)
        assert outcome.exit_code == 0
        limits = [event.details["limit"] for event in facts if event.fact is Fact.LIMIT]
        assert limits
        assert limits[-1] <= 3
        # a refusal or two for each row, no storm
        assert sim.refusals[96] < 2 * 40
        check_complete(sim, tmp_path / "run", 40)


async def test_no_more_tasks_are_active_than_asked_for(tmp_path):
    async with Simulator(seconds=0.2) as sim:
        await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 20), concurrency=4))
        assert 0 < sim.max_active <= 4
        check_complete(sim, tmp_path / "run", 20)


async def test_an_outage_harms_no_row_and_ends_by_itself(tmp_path, hasty):
    async with Simulator(seconds=0.3) as sim:
        facts = Facts()
        async with anyio.create_task_group() as group:

            async def outage():
                while facts.count(Fact.IN_FLIGHT) < 6:
                    await anyio.sleep(0.05)
                await sim.go_dark()
                await anyio.sleep(3.0)
                await sim.come_back()

            group.start_soon(outage)
            outcome = await run_job(
                sim, job_of(write_rows(tmp_path / "m.csv", 30), concurrency=5, attempts=1), facts=facts
            )
        assert outcome.exit_code == 0
        check_complete(sim, tmp_path / "run", 30)


async def test_every_everyday_fault_at_once(tmp_path, monkeypatch):
    # this simulator delivers and lists nothing later than that, so a short grace is as safe and much quicker
    monkeypatch.setattr("batchrun.rules.recovery.GRACE_S", 2.0)
    async with Simulator(seconds=0.2, slots=8, faults=["all=3%"], stall_s=1.0, late_s=1.5, seed=7) as sim:
        outcome = await run_job(sim, job_of(write_rows(tmp_path / "m.csv", 60)))
        assert outcome.exit_code == 0
        assert outcome.counts.cost_usd == sim.billed_usd
        check_complete(sim, tmp_path / "run", 60)
