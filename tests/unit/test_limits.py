"""Slots bound what is active at the service, and the gate lets one try where all would storm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from random import Random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.dispatch.limits import FIRST_LIMIT, TRY_S, Gate, Room, Slot, Slots
from batchrun.rules.policy import BALANCE, MAX_ASKED_S, RATE_LIMITED, UNREACHABLE
from tests.support.clock import run_with_virtual_time, virtual_time


def slots_of(
    *, fixed: int | None = None, ceiling: int = 64, known: int | None = None, seed: int = 0
) -> Slots:
    return Slots(fixed=fixed, ceiling=ceiling, known=known, rng=Random(seed))


class Spy:
    """Counts who works at once, and in which order they began."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.order: list[int] = []
        self.running = 0
        self.most = 0

    async def work(self, number: int, seconds: float = 1.0) -> None:
        await self.slots.take()
        try:
            self.order.append(number)
            self.running += 1
            self.most = max(self.most, self.running)
            await anyio.sleep(seconds)
        finally:
            self.running -= 1
            self.slots.give()


# --- slots ----------------------------------------------------------------------------------------------


@virtual_time
async def test_never_more_than_the_limit_hold_a_slot_and_everybody_gets_one() -> None:
    spy = Spy(slots_of(fixed=5))
    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(spy.work, number, 0.1 + number % 7)
    assert spy.most == 5
    assert len(spy.order) == 100
    assert spy.slots.in_use == 0


@virtual_time
async def test_who_came_first_is_served_first_however_long_it_takes() -> None:
    spy = Spy(slots_of(fixed=2))
    async with anyio.create_task_group() as group:
        for number in range(30):
            group.start_soon(spy.work, number, 7.3)
            await anyio.sleep(0.45)  # newcomers while others wait
    assert spy.order == list(range(30))


@virtual_time
async def test_tasks_that_run_already_take_slots_beyond_the_limit_and_hold_up_the_others() -> None:
    slots = slots_of(fixed=2)
    for _ in range(5):
        slots.take_anyway()
    spy = Spy(slots)
    async with anyio.create_task_group() as group:
        group.start_soon(spy.work, 1)
        await anyio.sleep(10)
        assert not spy.order
        for _ in range(3):
            slots.give()
        await anyio.sleep(10)
        assert not spy.order
        slots.give()
    assert spy.order == [1]
    assert slots.in_use == 1


@virtual_time
async def test_a_waiter_that_is_cancelled_leaves_the_queue_to_the_next() -> None:
    spy = Spy(slots_of(fixed=1))
    async with anyio.create_task_group() as group:
        group.start_soon(spy.work, 0, 10.0)
        await anyio.sleep(0.1)
        with anyio.move_on_after(5):
            await spy.work(1)
        group.start_soon(spy.work, 2)
    assert spy.order == [0, 2]
    assert spy.slots.in_use == 0


@virtual_time
async def test_a_slot_handed_over_in_the_moment_of_cancelling_is_given_back() -> None:
    spy = Spy(slots_of(fixed=1))
    await spy.slots.take()
    async with anyio.create_task_group() as group:
        group.start_soon(spy.work, 1, 1000.0)
        await anyio.sleep(0.1)
        group.cancel_scope.cancel()
        spy.slots.give()  # handed to the waiter on its way out
    assert spy.slots.in_use == 0


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(1, 4),
    stays=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 3), st.none() | st.floats(0, 4)), max_size=25),
)
def test_slots_stay_counted_through_any_coming_and_going(
    limit: int, stays: list[tuple[float, float, float | None]]
) -> None:
    async def everybody() -> Spy:
        spy = Spy(slots_of(fixed=limit))

        async def one(number: int, arrive_s: float, stay_s: float, patience_s: float | None) -> None:
            await anyio.sleep(arrive_s)
            with anyio.move_on_after(patience_s):
                await spy.work(number, stay_s)

        async with anyio.create_task_group() as group:
            for number, stay in enumerate(stays):
                group.start_soon(one, number, *stay)
        return spy

    spy = run_with_virtual_time(everybody)
    assert spy.most <= limit
    assert spy.slots.in_use == 0


@virtual_time
async def test_the_limit_grows_with_accepted_tasks_up_to_its_ceiling_until_one_is_refused() -> None:
    slots = slots_of(ceiling=20)
    assert slots.limit == FIRST_LIMIT
    for _ in range(100):
        slots.accepted()
    assert slots.limit == 20
    slots = slots_of(fixed=3)
    for _ in range(100):
        slots.accepted()
    assert slots.limit == 3


@virtual_time
async def test_what_the_account_allowed_last_time_is_where_this_time_begins() -> None:
    assert slots_of(known=2).limit == 2
    assert slots_of(known=40).limit == 40
    assert slots_of(known=400).limit == 64
    assert slots_of(known=2, fixed=16).limit == 16


@pytest.mark.parametrize(
    ("held", "told", "limit"),
    [
        # what we could hold beside the refused one
        (6, None, 5),
        # the service's own number, when it is lower
        (6, 3, 3),
        # a higher one says only that others use the account
        (6, 30, 5),
        # one slot is always tried
        (1, None, 1),
        (1, 0, 1),
    ],
)
@virtual_time
async def test_a_refusal_teaches_the_limit(held: int, told: int | None, limit: int) -> None:
    slots = slots_of()
    for _ in range(held):
        await slots.take()
    slots.refused(told)
    assert slots.limit == limit


@virtual_time
async def test_after_a_refusal_more_is_tried_soon_and_ever_later_while_it_is_refused() -> None:
    slots = slots_of()
    for _ in range(6):
        await slots.take()
    slots.refused(5)
    slots.give()
    waits = []
    for _ in range(16):
        begun_at = anyio.current_time()
        await slots.take()  # the sixth: a try
        waits.append(anyio.current_time() - begun_at)
        slots.refused(5)
        slots.give()
    assert waits[0] <= 2 * TRY_S[0]
    assert waits[5] > waits[0]
    assert TRY_S[2] / 2 <= waits[-1] <= 2 * TRY_S[2]


@pytest.mark.parametrize("fixed", [None, FIRST_LIMIT])
@virtual_time
async def test_slots_are_short_while_somebody_waits_and_the_limit_is_known(fixed: int | None) -> None:
    slots = slots_of(fixed=fixed)
    for _ in range(FIRST_LIMIT):
        await slots.take()
    assert not slots.are_short
    async with anyio.create_task_group() as group:
        group.start_soon(slots.take)
        await anyio.sleep(0.1)
        assert slots.are_short == (fixed is not None)  # else the limit goes on growing
        slots.refused(FIRST_LIMIT)
        assert slots.are_short
        slots.give()  # the one that was refused
        slots.give()
        await anyio.sleep(0.1)
        assert not slots.are_short


@virtual_time
async def test_slots_are_given_early_for_as_many_tasks_at_once_as_may_be_active() -> None:
    slots = slots_of(fixed=3)
    held = [Slot(slots) for _ in range(3)]
    for slot in held:
        await slot.take()
        slot.give_early()
        slot.give_early()
    assert (slots.in_use, slots.early) == (0, 3)
    more = [Slot(slots) for _ in range(3)]
    for slot in more:
        await slot.take()
        slot.give_early()
        assert slot.is_held
    held[0].give()  # it is known what came of its task
    more[0].give_early()
    more[1].give_early()
    assert [slot.is_held for slot in more] == [False, True, True]
    for slot in [*held, *more]:
        slot.give()
        slot.give()
    assert (slots.in_use, slots.early) == (0, 0)


@virtual_time
async def test_slots_are_short_while_somebody_waits_at_our_own_ceiling() -> None:
    slots = slots_of(ceiling=FIRST_LIMIT)
    async with anyio.create_task_group() as group:
        for _ in range(FIRST_LIMIT + 1):
            assert not slots.are_short
            group.start_soon(slots.take)
            await anyio.sleep(0.1)
        assert slots.are_short
        slots.give()
        await anyio.sleep(0.1)
        assert not slots.are_short


@virtual_time
async def test_when_the_account_allows_more_again_the_limit_climbs_back() -> None:
    slots = slots_of(ceiling=32)
    for _ in range(9):
        slots.take_anyway()
    slots.refused(2)
    while slots.in_use:
        slots.give()
    begun_at = anyio.current_time()
    for _ in range(20):
        await slots.take()
        slots.accepted()
    assert anyio.current_time() - begun_at < 60


@virtual_time
async def test_while_submits_wait_elsewhere_one_more_slot_is_tried_and_not_ever_more() -> None:
    slots = slots_of()
    async with anyio.create_task_group() as group:
        for _ in range(4):
            await slots.take()
        slots.refused(3)
        slots.give()
        for _ in range(50):
            group.start_soon(slots.take)
        await anyio.sleep(300)  # an outage: nobody submits, so nothing is learned
        assert slots.in_use == slots.limit + 1 == 4
        group.cancel_scope.cancel()


@virtual_time
async def test_with_nothing_of_ours_running_a_refused_submit_is_tried_again_after_a_pause() -> None:
    slots = slots_of()
    for _ in range(20):
        begun_at = anyio.current_time()
        await slots.take()
        slots.refused(None)  # others use the whole account
        slots.give()
        assert anyio.current_time() - begun_at <= 61
    begun_at = anyio.current_time()
    await slots.take()
    assert anyio.current_time() - begun_at >= 0.4


class Account:
    """A service with so many slots for all who use it."""

    def __init__(self, limit: int, *, tells: bool) -> None:
        self.limit = limit
        self.tells = tells
        self.active = 0
        self.asked = 0
        self.refused = 0

    async def run_rows(self, slots: Slots, rows: int, seconds: float, *, unseen_s: float = 0.0) -> None:
        """What the dispatcher does, in short; ends are seen so much later."""

        async def row() -> None:
            slot = Slot(slots)
            while True:
                await slot.take()
                await anyio.sleep(0.05)  # the request
                self.asked += 1
                if self.active < self.limit:
                    break
                self.refused += 1
                slot.refused(self.limit if self.tells else None)
                slot.give()
            self.active += 1
            slots.accepted()
            await anyio.sleep(seconds)
            self.active -= 1
            await anyio.sleep(unseen_s)
            slot.give()

        async with anyio.create_task_group() as group:
            for _ in range(rows):
                group.start_soon(row)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("runs", [1, 2, 3])
@virtual_time
async def test_runs_that_share_an_account_fill_it_without_a_storm(runs: int, tells: bool) -> None:
    account = Account(10, tells=tells)
    rows, seconds = 60, 10.0
    begun_at = anyio.current_time()
    async with anyio.create_task_group() as group:
        for seed in range(runs):
            group.start_soon(account.run_rows, slots_of(seed=seed), rows, seconds)
    took_s = anyio.current_time() - begun_at
    at_best_s = runs * rows * seconds / account.limit
    assert took_s < 1.5 * at_best_s + 60
    assert account.refused < 0.75 * runs * rows


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("limit", [5, 32])
@virtual_time
async def test_a_free_slot_is_found_by_trying_long_before_the_end_of_its_task_is_seen(
    limit: int, tells: bool
) -> None:
    account = Account(limit, tells=tells)
    rows, seconds = 40 * limit, 10.0
    begun_at = anyio.current_time()
    await account.run_rows(slots_of(), rows, seconds, unseen_s=5.0)
    took_s = anyio.current_time() - begun_at - 5.0
    at_best_s = rows * seconds / limit
    assert took_s < 1.25 * at_best_s  # 1.5 without tries
    assert account.refused < 1.5 * rows


@virtual_time
async def test_a_try_that_is_neither_accepted_nor_refused_is_not_the_last() -> None:
    slots = slots_of()
    for _ in range(3):
        slots.take_anyway()
    slots.refused(2)
    slots.give()
    for _ in range(5):
        with anyio.fail_after(60):
            await slots.take()
        slots.give()  # its answer was lost, say


@virtual_time
async def test_tries_that_find_nothing_grow_rare() -> None:
    """Where ends are seen at once there is nothing to find."""
    account = Account(8, tells=True)
    await account.run_rows(slots_of(), 400, 10.0)
    assert account.refused < 0.5 * 400


@virtual_time
async def test_a_refused_row_keeps_its_place_in_the_queue() -> None:
    slots = slots_of()
    for _ in range(2):
        slots.take_anyway()
    slots.refused(2)
    order: list[str] = []
    refused = Slot(slots)

    async def wait(name: str, slot: Slot) -> None:
        await slot.take()
        order.append(name)
        slots.accepted()

    async with anyio.create_task_group() as group:
        await refused.take()
        group.start_soon(wait, "behind", Slot(slots))
        await anyio.sleep(0.01)
        refused.refused(2)
        refused.give()
        group.start_soon(wait, "refused", refused)
    assert order == ["refused", "behind"]


@pytest.mark.parametrize("seconds", [0.3, 10.0])
@virtual_time
async def test_a_limit_that_fell_by_mistake_climbs_back_within_a_few_tasks_time(seconds: float) -> None:
    account = Account(64, tells=True)
    slots = slots_of(known=64)
    slots.take_anyway()
    slots.take_anyway()
    slots.refused(None)  # though all slots but one are free
    slots.give()
    slots.give()
    assert slots.limit == 1
    begun_at = anyio.current_time()
    await account.run_rows(slots, 640, seconds)
    assert slots.limit > 24
    assert anyio.current_time() - begun_at < 4 * 640 / 64 * seconds


@virtual_time
async def test_tries_raise_the_limit_to_what_the_service_said_at_most() -> None:
    account = Account(8, tells=True)
    slots = slots_of(ceiling=64)
    await account.run_rows(slots, 200, 2.0, unseen_s=1.0)
    assert slots.limit <= 8


@virtual_time
async def test_one_row_s_hold_is_taken_and_given_once() -> None:
    slots = slots_of(fixed=3)
    slot = Slot(slots)
    slot.give()
    await slot.take()
    await slot.take()
    slot.take_anyway()
    assert slots.in_use == 1
    slot.give()
    slot.give()
    assert slots.in_use == 0


@virtual_time
async def test_not_even_a_try_goes_beyond_what_was_asked_for() -> None:
    slots = slots_of(fixed=2)
    await slots.take()
    await slots.take()
    slots.refused(None)
    slots.give()
    await slots.take()  # a try
    slots.accepted()
    assert slots.limit == slots.in_use == 2
    with anyio.move_on_after(1000):
        await slots.take()
    assert slots.in_use == 2


# --- room -----------------------------------------------------------------------------------------------


async def entered(room: Room) -> bool:
    with anyio.move_on_after(1):
        await room.enter()
        return True
    return False


@virtual_time
async def test_rows_on_their_way_are_bounded_and_those_that_are_looked_up_count_apart() -> None:
    room = Room(2, doubts=2)
    assert [await entered(room) for _ in range(3)] == [True, True, False]
    room.leave()
    assert [await entered(room) for _ in range(2)] == [True, False]
    with room.aside():
        assert [await entered(room) for _ in range(2)] == [True, False]
        with room.aside():
            assert not await entered(room)  # so many doubts are bound, too
        assert not await entered(room)  # the row goes on at once, in the place that was given back
    room.leave()
    assert not await entered(room)
    room.leave()
    assert await entered(room)


@virtual_time
async def test_who_waits_for_room_enters_when_a_row_leaves_or_is_looked_up() -> None:
    room = Room(1)
    await room.enter()
    with ExitStack() as aside:
        for make in (room.leave, lambda: aside.enter_context(room.aside())):
            async with anyio.create_task_group() as group:
                group.start_soon(room.enter)
                await anyio.sleep(1)
                make()


# --- the gate -------------------------------------------------------------------------------------------


def gate_of() -> Gate:
    return Gate(rng=Random(0))


class Passing:
    """Callers at a gate: when each passed, and whether as the probe."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.passed: list[tuple[float, bool]] = []

    async def caller(self) -> None:
        probe = await self.gate.pass_through()
        self.passed.append((anyio.current_time(), probe))

    @property
    def probes(self) -> int:
        return sum(probe for _, probe in self.passed)


@asynccontextmanager
async def callers(gate: Gate, number: int) -> AsyncIterator[Passing]:
    passing = Passing(gate)
    async with anyio.create_task_group() as group:
        for _ in range(number):
            group.start_soon(passing.caller)
        await anyio.sleep(0.001)
        yield passing
        group.cancel_scope.cancel()


@virtual_time
async def test_while_the_service_is_well_everybody_passes_at_once() -> None:
    begun_at = anyio.current_time()
    async with callers(gate_of(), 50) as passing:
        pass
    assert passing.probes == 0
    assert len(passing.passed) == 50
    assert anyio.current_time() - begun_at < 0.01


@virtual_time
async def test_trouble_that_may_be_a_row_s_own_shuts_nothing_and_an_outage_does() -> None:
    gate = gate_of()
    gate.trouble(UNREACHABLE, probe=False, is_outage=False)
    assert gate.reason is None
    gate.trouble(UNREACHABLE, probe=False, is_outage=True)
    assert gate.reason == UNREACHABLE


@virtual_time
async def test_trouble_of_a_probe_after_a_wait_for_something_else_is_no_outage_yet() -> None:
    for other in (RATE_LIMITED, BALANCE):
        gate = gate_of()
        gate.shut(other, probe=False, after_s=1.0)
        assert await gate.pass_through()
        async with callers(gate, 3) as passing:
            gate.trouble(UNREACHABLE, probe=True, is_outage=False)
            await anyio.sleep(0.001)
            assert gate.reason == other
            assert passing.probes == len(passing.passed) == 1  # the next one tries at once
            gate.trouble(UNREACHABLE, probe=True, is_outage=True)
            assert gate.reason == UNREACHABLE
            await anyio.sleep(0.5)
            assert len(passing.passed) == 1


@virtual_time
async def test_one_at_a_time_tries_while_the_others_wait_and_all_follow_when_it_succeeds() -> None:
    gate = gate_of()
    gate.shut(UNREACHABLE, probe=False)
    async with callers(gate, 50) as passing:
        for tries in range(1, 6):
            await anyio.sleep(100)
            assert passing.probes == len(passing.passed) == tries
            gate.shut(UNREACHABLE, probe=True)
        await anyio.sleep(100)
        gate.open()
        await anyio.sleep(0.001)
        assert len(passing.passed) == 50
        assert passing.probes == 6


@virtual_time
async def test_pauses_grow_to_a_minute_and_for_money_to_five() -> None:
    for reason, first_s, cap_s in ((UNREACHABLE, 1.0, 60.0), (BALANCE, 10.0, 300.0)):
        gate = gate_of()
        shut_at = anyio.current_time()
        gate.shut(reason, probe=False)
        waits = []
        for _ in range(12):
            begun_at = anyio.current_time()
            assert await gate.pass_through()
            waits.append(anyio.current_time() - begun_at)
            gate.shut(reason, probe=True)
        assert first_s <= waits[0] <= 1.2 * first_s
        assert cap_s <= waits[-1] <= 1.2 * cap_s
        assert gate.shut_for_s() == anyio.current_time() - shut_at
        gate.open()
        assert gate.shut_for_s() == 0.0


@virtual_time
async def test_a_wait_that_the_service_asks_for_holds_for_everybody() -> None:
    gate = gate_of()
    gate.shut(RATE_LIMITED, probe=False, after_s=90.0)
    begun_at = anyio.current_time()
    async with callers(gate, 20) as passing:
        await anyio.sleep(1)
        gate.open()  # a submit sent before that was accepted
        await anyio.sleep(200)
    assert all(at - begun_at >= 90 for at, _ in passing.passed)
    assert passing.passed


@virtual_time
async def test_a_probe_that_succeeds_while_a_wait_was_asked_for_anew_leaves_its_place_to_another() -> None:
    gate = gate_of()
    gate.shut(UNREACHABLE, probe=False)
    assert await gate.pass_through()
    async with callers(gate, 3) as passing:
        gate.shut(RATE_LIMITED, probe=False, after_s=30.0)  # the answer to a submit sent before
        gate.open()
        await anyio.sleep(100)
        assert passing.probes == 1


@virtual_time
async def test_a_wait_beyond_reason_is_cut_short() -> None:
    gate = gate_of()
    gate.shut(RATE_LIMITED, probe=False, after_s=1e12)
    begun_at = anyio.current_time()
    assert await gate.pass_through()
    assert anyio.current_time() - begun_at <= 1.2 * MAX_ASKED_S


@virtual_time
async def test_a_probe_that_is_cancelled_while_it_waits_leaves_its_place_to_another() -> None:
    gate = gate_of()
    gate.shut(BALANCE, probe=False)
    with anyio.move_on_after(5) as scope:
        await gate.pass_through()
    assert scope.cancelled_caught
    begun_at = anyio.current_time()
    assert await gate.pass_through()
    assert anyio.current_time() - begun_at < 10


@virtual_time
async def test_a_probe_that_learned_nothing_leaves_its_place_to_another_at_once() -> None:
    gate = gate_of()
    gate.shut(UNREACHABLE, probe=False)
    assert await gate.pass_through()
    async with callers(gate, 3) as passing:
        await anyio.sleep(10)
        assert not passing.passed
        gate.unsure(probe=True)
        await anyio.sleep(0.001)
        assert passing.probes == len(passing.passed) == 1


@virtual_time
async def test_trouble_of_submits_sent_earlier_makes_no_second_probe() -> None:
    gate = gate_of()
    gate.shut(UNREACHABLE, probe=False)
    assert await gate.pass_through()
    async with callers(gate, 20) as passing:
        for _ in range(10):
            gate.shut(UNREACHABLE, probe=False)
            gate.unsure(probe=False)
            await anyio.sleep(100)
        assert not passing.passed


@virtual_time
async def test_a_probe_that_waits_goes_on_at_once_when_the_service_is_well_again() -> None:
    gate = gate_of()
    gate.shut(BALANCE, probe=False)
    begun_at = anyio.current_time()
    async with callers(gate, 3) as passing:
        await anyio.sleep(1)
        gate.open()
        await anyio.sleep(0.001)
        assert [probe for _, probe in passing.passed] == [False] * 3
    assert anyio.current_time() - begun_at < 2


@virtual_time
async def test_a_gate_opened_and_shut_again_has_one_waiting_probe_and_a_short_pause() -> None:
    gate = gate_of()
    for _ in range(6):
        gate.shut(BALANCE, probe=True)
    async with callers(gate, 5) as passing:
        gate.open()
        gate.shut(UNREACHABLE, probe=False)
        begun_at = anyio.current_time()
        await anyio.sleep(1000)
        assert passing.probes == len(passing.passed) == 1
        assert passing.passed[0][0] - begun_at <= 1.3


@virtual_time
async def test_late_troubles_of_submits_sent_before_do_not_keep_the_gate_shut() -> None:
    gate = gate_of()
    gate.trouble(UNREACHABLE, probe=False, is_outage=True)
    for _ in range(20):
        await anyio.sleep(0.9)
        gate.trouble(UNREACHABLE, probe=False, is_outage=True)
        if await asked(gate):
            return
    raise AssertionError("nobody may ever try")


async def asked(gate: Gate) -> bool:
    """Whether the gate lets somebody try now."""
    with anyio.move_on_after(0.01):
        return await gate.pass_through()
    return False
