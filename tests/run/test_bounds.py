"""What bounds a run: its cost cap, failures that are too many, tasks that do not move, a row in trouble."""

from __future__ import annotations

from decimal import Decimal

import anyio
import pytest

from batchrun.model import State
from batchrun.progress import Fact, Progress
from batchrun.runner import Again, Runner
from batchrun.simulator.server import Simulator
from tests.support.runs import Facts, abort_when, check_complete, credentials_of, job_of, run_job, write_rows

#: Each image is published at, and billed, 0.0035 USD.
PRICED = "text-to-image-sd-lora"
PRICE = Decimal("0.0035")


def watched(sim, job, *, again=None):
    """A runner, and the most that was ever billed while it went on."""
    facts, billed = Facts(), [Decimal(0)]
    runner = Runner(job, credentials_of(sim), progress=Progress(facts), again=again)
    runner.progress.listen(lambda event: billed.append(max(billed[-1], sim.billed_usd)))
    return runner, facts, billed


# --- the cost cap ---------------------------------------------------------------------------------------


async def test_a_run_never_passes_its_cap_and_goes_on_when_it_is_raised(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 20), tool=PRICED, max_cost=PRICE * 7)
    async with Simulator(seconds=0.2, faults=["task-fails=20%"]) as sim:
        runner, _, billed = watched(sim, job)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert "the cap of 0.0245 USD is reached: 0.0245 USD spent; 13 rows left" in outcome.stopped
        assert "about 0.0455 USD more by the bills so far" in outcome.stopped
        assert outcome.counts.by_state == {State.DONE: 7, State.PLANNED: 13}
        assert max(billed) == outcome.counts.cost_usd == PRICE * 7
        # a second start knows what the first one spent
        tasks = len(sim.tasks)
        assert (await run_job(sim, job)).exit_code == 3
        assert len(sim.tasks) == tasks
        raised = job.with_overrides(max_cost=PRICE * 20)
        assert (await run_job(sim, raised)).exit_code == 0
        check_complete(sim, tmp_path / "run", 20)
        assert sim.billed_usd == PRICE * 20


async def test_a_task_whose_published_price_is_above_the_cap_is_not_bought(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 1), tool=PRICED, max_cost=PRICE / 2)
    async with Simulator(seconds=0.1) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 3
        assert outcome.counts.by_state == {State.PLANNED: 1}
        assert not sim.tasks


async def test_tasks_in_flight_from_an_earlier_start_are_reserved_for(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 12), tool=PRICED, max_cost=PRICE * 5, concurrency=4)
    async with Simulator(seconds=1.0) as sim:
        await run_job(sim, job.with_overrides(limit=1))  # a first bill, so that more than one is sent
        runner, facts, billed = watched(sim, job)

        abort_when(runner, lambda event: facts.count(Fact.IN_FLIGHT) == 3)
        await runner.run()
        runner, _, billed = watched(sim, job)
        outcome = await runner.run()
        assert outcome.exit_code == 3
        assert max(billed) <= PRICE * 5
        assert outcome.counts.by_state[State.DONE] == 5


async def test_until_a_tool_has_billed_it_is_sent_one_task_at_a_time(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 8), max_cost="5.00", concurrency=8)  # its price is unknown
    async with Simulator(seconds=0.3) as sim:
        facts = Facts()
        assert (await run_job(sim, job, facts=facts)).exit_code == 0
        order = [event.fact for event in facts if event.fact in (Fact.INTENT, Fact.FINISHED)]
        assert order[:3] == [Fact.INTENT, Fact.FINISHED, Fact.INTENT]
        assert sim.max_active > 1
        check_complete(sim, tmp_path / "run", 8)


async def test_a_doubt_nobody_can_settle_keeps_its_money_reserved(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 4), tool=PRICED, max_cost=PRICE * 3, concurrency=1)
    async with Simulator(seconds=0.1, faults=["run-reset@2", "list-off"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 3
        assert "0.0035 USD reserved for tasks that may be billed" in outcome.stopped
        assert outcome.counts.by_state == {State.DONE: 2, State.IN_DOUBT: 1, State.PLANNED: 1}
        assert sim.billed_usd <= PRICE * 3
        assert (await run_job(sim, job)).exit_code == 3  # and in the next start too
        assert sim.billed_usd <= PRICE * 3


# --- too many failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("halt", ["fail=5", None])
async def test_failures_without_end_stop_the_run_and_leave_the_other_rows(tmp_path, halt):
    job = job_of(write_rows(tmp_path / "m.csv", 70), concurrency=20, halt=halt)
    async with Simulator(seconds=0.05, faults=["run-validation"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 3
        assert ("--halt fail=5" if halt else "for the same cause: rejected") in outcome.stopped
        failed = outcome.counts.by_state[State.FAILED]
        assert (5 if halt else 50) <= failed < (5 if halt else 50) + 20
        sim.faults = []
        assert (await run_job(sim, job)).exit_code == 1  # the others are done, the failed ones stay failed
        assert (await run_job(sim, job, again=Again())).exit_code == 0
        check_complete(sim, tmp_path / "run", 70)


# --- tasks that do not move -----------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("batchrun.rules.pace.STUCK_S", (1.0, 1.0))


async def test_a_stuck_task_is_left_in_flight_and_told(tmp_path, impatient):
    job = job_of(write_rows(tmp_path / "m.csv", 3))
    async with Simulator(seconds=0.1, faults=["task-stuck@1"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 1
        assert outcome.counts.by_state == {State.DONE: 2, State.IN_FLIGHT: 1}
        assert list(outcome.left.values()) == ["the task is stuck: it does not move on from task_start"]
        assert len(sim.tasks) == 3


async def test_a_stuck_task_is_killed_and_asked_for_anew_when_told_so(tmp_path, impatient):
    job = job_of(write_rows(tmp_path / "m.csv", 3), on_stuck="kill")
    async with Simulator(seconds=0.1, faults=["task-stuck@1"]) as sim:
        assert (await run_job(sim, job)).exit_code == 0
        assert [task.stopped for task in sim.tasks].count(True) == 1
        check_complete(sim, tmp_path / "run", 3)


@pytest.mark.parametrize("regenerate_lost", [False, True])
async def test_a_stuck_task_whose_kill_is_not_confirmed_is_not_asked_for_anew(
    tmp_path, impatient, monkeypatch, regenerate_lost
):
    monkeypatch.setattr("batchrun.dispatch.dispatcher.CANCEL_S", 0.5)
    # the user's word is about tasks that the service does not know any more: this one goes on there
    job = job_of(write_rows(tmp_path / "m.csv", 3), on_stuck="kill", regenerate_lost=regenerate_lost)
    async with Simulator(seconds=0.1, faults=["task-stuck@1", "stop-ignored"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.DONE: 2, State.IN_FLIGHT: 1}
        assert len(sim.tasks) == 3


# --- the service in trouble, or one row -----------------------------------------------------------------


async def test_a_row_in_trouble_while_all_others_are_well_fails_at_last(tmp_path, monkeypatch, hasty):
    monkeypatch.setattr("batchrun.rules.outage.BAD_ROW_S", 0.0)
    monkeypatch.setattr("batchrun.rules.outage.BAD_ROW", 3)
    lines = [f"r{n},Retro-Cartoons,{n} birds\n" for n in range(20)]
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,tool,prompt\nbad,text-to-image-sd-lora,a bird\n" + "".join(lines))
    job = job_of(manifest, tool=None, max_concurrency=1, downloads=1)
    async with Simulator(seconds=0.1, faults=["run-refused:text-to-image-sd-lora"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.counts.by_state == {State.DONE: 20, State.FAILED: 1}
        [(_, failure, *_)] = outcome.failures
        assert failure.cause == "service fault"


async def test_where_only_rows_in_trouble_are_left_the_service_is_not_waited_for_all_night(tmp_path, hasty):
    job = job_of(write_rows(tmp_path / "m.csv", 2), max_pause=1)
    async with Simulator(seconds=0.1, faults=["run-refused"]) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 3
        assert "the service cannot be reached" in outcome.stopped
        assert not sim.tasks


async def test_a_balance_that_stays_exhausted_ends_the_run_when_the_pause_is_over(tmp_path):
    job = job_of(write_rows(tmp_path / "m.csv", 4), max_pause=1)
    async with Simulator(seconds=0.1, balance_usd=Decimal(0)) as sim:
        outcome = await run_job(sim, job)
        assert outcome.exit_code == 3
        assert "the balance is exhausted" in outcome.stopped
        assert outcome.counts.by_state == {State.PLANNED: 4}
        sim.balance_usd = Decimal(10)
        assert (await run_job(sim, job)).exit_code == 0
        check_complete(sim, tmp_path / "run", 4)


async def test_slots_of_tasks_whose_outcome_is_open_are_used_again_but_once(tmp_path):
    # their ends are told, and their images are waited for half a minute
    job = job_of(write_rows(tmp_path / "m.csv", 40), max_concurrency=3)
    async with Simulator(seconds=0.2, faults=["task-empty"]) as sim:
        runner = Runner(job, credentials_of(sim))
        async with anyio.create_task_group() as group:
            group.start_soon(runner.run)
            with anyio.move_on_after(4):
                while len(sim.tasks) <= 6:
                    await anyio.sleep(0.1)
            tasks = len(sim.tasks)
            runner.abort()
    assert tasks == 6
