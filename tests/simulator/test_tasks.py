"""A task's life is a pure function of clock and schedule; the ledger counts slots and money exactly."""

from __future__ import annotations

from decimal import Decimal
from random import Random
from statistics import median, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.simulator.envelope import Refusal
from batchrun.simulator.tasks import STAGES, Ledger, SimTask, durations
from tests.simulator.wire import CARTOON, LORA


class Account:
    """A ledger on a clock of its own, whose tasks take 100 seconds."""

    def __init__(self, *, slots: int | None = None, queue: bool = False, balance_usd: str = "1000") -> None:
        self.now = 0.0
        self.seconds = 100.0
        self.ledger = Ledger(
            clock=lambda: self.now,
            seconds=lambda: self.seconds,
            slots=slots,
            queue=queue,
            balance_usd=Decimal(balance_usd),
            first_id=1,
            salt="",
        )

    def make(self, *, fault: str | None = None, images: int = 1, seed: str = "1", tool=LORA) -> SimTask:
        self.ledger.admit()
        return self.ledger.make(tool, {"seed": seed}, images=images, size_px=(64, 64), fault=fault)

    def status(self, task: SimTask, at: float) -> str:
        self.now = at
        self.ledger.advance()
        return task.status(self.ledger.now)


def test_a_task_goes_through_every_documented_status_in_order() -> None:
    account = Account()
    task = account.make()
    assert [account.status(task, part * 100) for part, _ in STAGES] == [status for _, status in STAGES]
    assert task.ended_at == 100


@pytest.mark.parametrize(
    ("fault", "statuses", "succeeded"),
    [
        ("task-stuck", {50: "task_start", 10_000: "task_start"}, False),
        ("task-skips", {5: "task_queue", 50: "task_output", 100: "task_postprocess_end"}, True),
        ("task-unknown-status", {60: "task_rehearsal", 100: "task_postprocess_end"}, True),
        ("task-backwards", {30: "task_output", 45: "task_preprocess_start", 60: "task_output"}, True),
        ("task-error-passing", {50: "task_error", 65: "task_error_full", 80: "task_output"}, True),
        ("task-error-end", {99: "task_start", 100: "task_error", 200: "task_error"}, False),
        ("task-cancelled", {99: "task_preprocess_end", 100: "task_cancel"}, False),
        ("task-fails", {99: "task_postprocess_start", 100: "task_postprocess_end"}, False),
    ],
)
def test_a_fault_changes_a_tasks_course_and_end(fault, statuses, succeeded) -> None:
    account = Account()
    task = account.make(fault=fault)
    assert {at: account.status(task, at) for at in statuses} == statuses
    account.status(task, 10_000)
    assert task.succeeded is succeeded
    assert (task.cost_usd > 0) is succeeded
    assert account.ledger.active == (fault == "task-stuck")


def test_a_task_that_ends_without_outputs_is_charged_all_the_same() -> None:
    account = Account()
    task = account.make(fault="task-empty")
    account.status(task, 100)
    assert (task.outputs, task.cost_usd) == (0, Decimal("0.0035"))


def test_one_image_fewer_is_charged_for_what_there_is() -> None:
    account = Account()
    task = account.make(fault="task-fewer", images=4)
    account.status(task, 100)
    assert (task.outputs, task.cost_usd) == (3, Decimal("0.0105"))


def test_a_slot_is_free_from_the_instant_of_a_tasks_end() -> None:
    account = Account(slots=1)
    account.make()
    account.now = 99.9
    with pytest.raises(Refusal, match="up to 1 tasks"):
        account.make()
    account.now = 100.0
    account.make()


def test_waiting_tasks_start_when_slots_were_freed_though_nobody_looked() -> None:
    account = Account(slots=1, queue=True)
    tasks = [account.make(seed=str(number)) for number in range(3)]
    account.now = 1000.0
    account.ledger.advance()
    assert [(task.started_at, task.ended_at) for task in tasks] == [(0, 100), (100, 200), (200, 300)]
    assert account.ledger.max_active == 1


def test_the_limit_shrinks_while_a_run_spends() -> None:
    account = Account(balance_usd="20.0035")
    account.make()
    account.make()
    account.now = 100.0
    account.make()  # 19.9965 USD are left: one task
    with pytest.raises(Refusal, match="up to 1 tasks"):
        account.make()


def test_a_task_is_needless_while_one_of_the_same_request_lives_or_succeeded() -> None:
    account = Account()
    first = account.make(fault="task-fails")
    second = account.make()  # the first still lives
    account.now = 100.0
    third = account.make()  # the second has succeeded
    other = account.make(seed="2")
    assert [task.duplicates for task in (first, second, third, other)] == [None, 1, 2, None]


def test_a_task_is_not_needless_after_failures_and_empty_ends() -> None:
    account = Account()
    for fault in ("task-fails", "task-cancelled", "task-error-end", "task-empty", None):
        assert account.make(fault=fault).duplicates is None
        account.now += 100


def test_a_task_without_published_price_costs_its_seconds() -> None:
    account = Account()
    account.seconds = 6.0
    task = account.make(tool=CARTOON)
    account.status(task, 6)
    assert f"{task.cost_usd:.12f}" == "0.003510000000"  # the seeds' own example


@given(
    st.lists(st.sampled_from([None, "task-fails", "task-stuck", "task-empty"]), max_size=30),
    st.integers(1, 5),
)
def test_the_account_adds_up_and_slots_are_never_exceeded(faults, slots) -> None:
    account = Account(slots=slots, queue=True)
    for number, fault in enumerate(faults):
        account.now += 30
        account.make(fault=fault, seed=str(number))
        assert account.ledger.max_active <= slots
    account.now += 10_000
    account.ledger.advance()
    ledger = account.ledger
    assert ledger.billed_usd == sum((task.cost_usd for task in ledger.tasks), Decimal(0))
    assert ledger.balance_usd == 1000 - ledger.billed_usd
    assert ledger.active == sum(task.ended_at is None for task in ledger.tasks)


def test_durations_are_fixed_uniform_or_lognormal_and_come_from_the_seed() -> None:
    assert durations(1.5, Random(0))() == durations("1.5", Random(0))() == 1.5
    assert durations(0.00001, Random(0))() == 0.00001
    uniform = durations("2-3", Random(0))
    assert all(2 <= uniform() <= 3 for _ in range(100))
    draw = durations("lognormal:6:20", Random(0))
    drawn = [draw() for _ in range(5000)]
    assert 5.5 < median(drawn) < 6.5
    assert 18 < quantiles(drawn, n=20)[-1] < 22
    again = durations("lognormal:6:20", Random(0))
    assert drawn[:3] == [again() for _ in range(3)]


@pytest.mark.parametrize(
    "spec", ["", "x", "-1", "3-2", "lognormal:6", "lognormal:0:1", "lognormal:5:1", "inf", "nan"]
)
def test_durations_that_make_no_sense_are_refused(spec) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words are the simulator's to give
        durations(spec, Random(0))
