"""Many tasks are followed by pages of the task list, and by single looks wherever those do not show them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from random import Random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun import errors
from batchrun.dispatch.sweep import AGAIN_S, FROM, LEAST_FAILURES, MAX_PAGES, Sweeps
from batchrun.dispatch.track import BUDGET_PER_S, Left, Tracker, Watch
from batchrun.model import RemoteOutput, Task
from batchrun.rules.pace import ADVICE_S, BURST, STUCK_S
from batchrun.rules.pages import (
    HURRIED_ENDS,
    LEAST_TICK_S,
    MARGIN,
    PAGE,
    TICK_S,
    Page,
    best,
    hurried_requests_per_s,
    requests_per_s,
    tick_s,
)
from batchrun.rules.policy import ERROR_PATIENCE_S, Succeeded, TaskFailed
from tests.support.clock import virtual_time

IMAGE = RemoteOutput("0.png", "https://cdn/0.png")


@pytest.mark.parametrize(
    ("places", "waited_s", "expected"),
    [
        ([], [], None),
        # nobody has waited long enough yet
        ([0, 1, 2], [0.0, 0.001, 0.001], None),
        # together they have
        ([0, 1, 2], [0.05, 0.05, 0.05], Page(0, 3 + MARGIN, 0, 2)),
        # where most of the waiting is
        ([5, 400, 420, 440], [0.1, 0.3, 0.3, 0.3], Page(400 - MARGIN, 41 + 2 * MARGIN, 1, 3)),
        # one alone far down the list
        ([0, 1, 900], [0.01, 0.01, 0.9], 2),
    ],
)
def test_the_request_that_ends_most_waiting_goes_out(
    places: list[int], waited_s: list[float], expected: Page | int | None
) -> None:
    assert best(places, waited_s) == expected


def test_a_page_asks_for_no_more_than_the_service_gives() -> None:
    choice = best(list(range(500)), [0.1] * 500)
    assert isinstance(choice, Page)
    assert choice.limit <= PAGE
    assert choice.last - choice.first + 1 <= PAGE - 2 * MARGIN + 1


@pytest.mark.parametrize(
    ("ended", "is_due"),
    [
        ([HURRIED_ENDS / 8] * 8, True),
        ([HURRIED_ENDS / 9] * 8, False),
        # with few tasks each is worth more
        ([HURRIED_ENDS / 8] * 2, True),
        ([HURRIED_ENDS / 9], False),
    ],
)
def test_where_rows_wait_a_page_is_due_once_a_task_is_likely_to_have_ended(
    ended: list[float], is_due: bool
) -> None:
    places, waited_s = list(range(len(ended))), [0.001] * len(ended)
    assert best(places, waited_s) is None
    assert (best(places, waited_s, ended) is not None) == is_due


@given(active=st.integers(1, 5000), typical_s=st.floats(0, 1e5), budget_per_s=st.floats(0.1, 1000))
def test_where_rows_wait_pages_stay_within_the_budget_and_are_not_thought_of_all_the_time(
    active: int, typical_s: float, budget_per_s: float
) -> None:
    per_s = hurried_requests_per_s(active, typical_s=typical_s, budget_per_s=budget_per_s)
    assert min(budget_per_s, 1 / ADVICE_S) <= per_s <= budget_per_s
    wait_s = tick_s(active, typical_s=typical_s)
    assert LEAST_TICK_S <= wait_s <= TICK_S
    assert wait_s >= min(TICK_S, active * TICK_S / PAGE)  # each time takes as long as there are tasks


def test_pages_of_many_tasks_take_no_more_than_the_budget() -> None:
    assert requests_per_s(10_000, alive_s=8.0, budget_per_s=50.0) == 50.0
    assert requests_per_s(30, alive_s=60.0, budget_per_s=50.0) < 30 / 2
    assert requests_per_s(300, alive_s=60.0, budget_per_s=500.0) < 300 / 2


class Service:
    """Tasks that take between 5 and 9 seconds each, in the order of their ids, beside those of others."""

    def __init__(self, *, others: int = 0) -> None:
        self.made: list[tuple[int, float, float]] = []  # id, begun at, seconds
        self.details = self.lists = 0
        self.lag_s: dict[str, float] = {}
        self.rng = Random(1)
        self.others = others
        self.list_error: Exception | None = None
        #: Every so many-th list fails.
        self.fails_every = 10**9
        self.hides: set[str] = set()
        #: Tasks are listed so long after they were made.
        self.listed_after_s = 0.0
        self.fails = self.cancelled = False
        #: Ended tasks show their images so much later.
        self.late_s = 0.0
        #: The first so many tasks take so much longer.
        self.slow, self.slower_s = 0, 0.0
        #: Tasks that never leave this status.
        self.stays: dict[str, str] = {}
        self.takes_s = 0.02
        self.running = self.most_running = 0
        #: When lists and details were asked for.
        self.asked_at: list[float] = []

    def make(self) -> str:
        for _ in range(self.others):
            self.made.append((len(self.made) + 1, 0.0, 0.0))
        seconds = self.rng.uniform(5, 9) + (self.slower_s if len(self.made) < self.slow else 0.0)
        self.made.append((len(self.made) + 1, anyio.current_time(), seconds))
        return str(len(self.made))

    def shown(self, number: int) -> Task:
        _, begun_at, seconds = self.made[number - 1]
        late_s = anyio.current_time() - begun_at - seconds
        if late_s < 0:
            return Task(str(number), status="task_start")
        self.lag_s.setdefault(str(number), late_s)
        if str(number) in self.stays:
            return Task(str(number), status=self.stays[str(number)])
        if self.cancelled:
            return Task(str(number), status="task_cancel")
        if self.fails or late_s < self.late_s:
            return Task(str(number), status="task_postprocess_end", pexit="1" if self.fails else "0")
        return Task(str(number), status="task_postprocess_end", pexit="0", outputs=(IMAGE,))

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        self.details += 1
        self.asked_at.append(anyio.current_time())
        await anyio.sleep(0.02)
        return self.shown(int(task_id))

    async def list_tasks(self, start: int = 0, limit: int = 100) -> list[Task]:
        self.lists += 1
        number = self.lists
        self.asked_at.append(anyio.current_time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await anyio.sleep(self.takes_s)
        self.running -= 1
        if self.list_error is not None:
            raise self.list_error
        if number % self.fails_every == 0:
            raise errors.ServerFault("502")
        until = anyio.current_time() - self.listed_after_s
        numbers = [made for made, at, _ in reversed(self.made) if str(made) not in self.hides and at <= until]
        return [self.shown(made) for made in numbers[start : start + limit]]


class Told:
    """Covers every task; the test says which has ended."""

    def covers(self, watch: Watch) -> bool:
        return watch.told_at is None

    def begin(self, watch: Watch) -> None: ...
    def end(self, watch: Watch) -> None: ...
    async def run(self) -> None: ...


@asynccontextmanager
async def sweeping(
    service: Service,
    notes: list[str],
    *,
    budget_per_s: float = BUDGET_PER_S,
    is_hurried: bool = False,
    untold: float = 1.0,
) -> AsyncIterator[Tracker]:
    tracker = Tracker(service, rng=Random(0), budget_per_s=budget_per_s)
    tracker.add(
        Sweeps(tracker, service, hurried=lambda: is_hurried, untold=lambda watch: untold, note=notes.append)
    )
    if untold < 1:
        tracker.add(Told())
    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        yield tracker
        group.cancel_scope.cancel()


async def follow_all(
    service: Service,
    tasks: int,
    *,
    notes: list[str] | None = None,
    per_s: float = 20.0,
    budget_per_s: float = BUDGET_PER_S,
) -> list[object]:
    """Follow so many tasks, so many of them submitted a second; returns the verdicts."""
    verdicts: list[object] = []
    said = [] if notes is None else notes
    async with (
        sweeping(service, said, budget_per_s=budget_per_s) as tracker,
        anyio.create_task_group() as group,
    ):

        async def follow(number: int) -> None:
            await anyio.sleep(number / per_s)
            _, verdict = await tracker.follow(task_id=service.make(), token="", tool=1)
            verdicts.append(verdict)

        for number in range(tasks):
            group.start_soon(follow, number)
    assert len(verdicts) == tasks
    return verdicts


def mean_lag_s(service: Service) -> float:
    return sum(service.lag_s.values()) / len(service.lag_s)


@pytest.mark.parametrize("others", [0, 3], ids=["alone", "beside others"])
@virtual_time
async def test_pages_follow_many_tasks_with_less_than_a_request_each(others: int) -> None:
    service = Service(others=others)
    assert set(await follow_all(service, 600)) == {Succeeded()}
    ours = {task: lag for task, lag in service.lag_s.items() if service.made[int(task) - 1][2]}
    assert service.lists + service.details < 600
    assert sum(ours.values()) / len(ours) < 0.25


@virtual_time
async def test_few_tasks_are_looked_at_one_by_one() -> None:
    service = Service()
    async with sweeping(service, []) as tracker, anyio.create_task_group() as group:

        async def follow() -> None:
            await tracker.follow(task_id=service.make(), token="", tool=1)

        for _ in range(FROM - 1):
            group.start_soon(follow)
    assert service.lists == 0


async def follow_in_turn(
    service: Service,
    tasks: int,
    *,
    slots: int,
    is_hurried: bool,
    notes: list[str] | None = None,
    untold: float = 1.0,
) -> float:
    """Follow so many tasks, so many at a time; returns how long that took.

    `untold`: the part of the ends that nobody else tells of, and known to be.
    """
    began_at = anyio.current_time()
    said = [] if notes is None else notes
    async with (
        sweeping(service, said, is_hurried=is_hurried, untold=untold) as tracker,
        anyio.create_task_group() as group,
    ):

        async def tell(task: str, seconds: float) -> None:
            await anyio.sleep(seconds)
            tracker.told_ended(tracker.watches[task])

        async def follow(number: int) -> None:
            for _ in range(number, tasks, slots):
                task = service.make()
                if service.rng.random() >= untold:
                    group.start_soon(tell, task, service.made[-1][2])
                await tracker.follow(task_id=task, token="", tool=1)

        for number in range(slots):
            group.start_soon(follow, number)
    return anyio.current_time() - began_at


@pytest.mark.parametrize("slots", [1, 2, 5, 12])
@virtual_time
async def test_while_rows_wait_few_tasks_are_followed_closely_by_pages_and_few_looks(slots: int) -> None:
    patient, hurried = Service(), Service()
    patient_s = await follow_in_turn(patient, 40 * slots, slots=slots, is_hurried=False)
    hurried_s = await follow_in_turn(hurried, 40 * slots, slots=slots, is_hurried=True)
    assert hurried_s < patient_s
    assert mean_lag_s(hurried) < 0.8 * mean_lag_s(patient)
    assert hurried.lists + hurried.details < 40 * slots * 3 * max(1, 8 / slots)
    assert hurried.details <= 40 * slots * (BURST + 9 / ADVICE_S)  # the service's advice holds


@pytest.mark.parametrize(("slots", "requests", "lag_s"), [(5, 1.1, 0.05), (100, 0.6, 0.15)])
@pytest.mark.parametrize("untold", [0.0, 0.02])
@virtual_time
async def test_ends_that_are_told_are_confirmed_by_few_requests_and_others_are_found(
    slots: int, requests: float, lag_s: float, untold: float
) -> None:
    service = Service()
    await follow_in_turn(service, 20 * slots, slots=slots, is_hurried=True, untold=untold)
    assert service.lists + service.details < 20 * slots * (requests + 15 * untold)
    assert mean_lag_s(service) < lag_s + 10 * untold


@pytest.mark.parametrize("slots", [5, 24])
@virtual_time
async def test_while_rows_wait_slow_tasks_are_seen_to_end_no_later_than_else(slots: int) -> None:
    patient, hurried = Service(), Service()
    for service in (patient, hurried):
        service.slow, service.slower_s = 10_000, 30.0
    await follow_in_turn(patient, 12 * slots, slots=slots, is_hurried=False)
    await follow_in_turn(hurried, 12 * slots, slots=slots, is_hurried=True)
    assert mean_lag_s(hurried) <= 1.1 * mean_lag_s(patient)


@virtual_time
async def test_while_rows_wait_a_slow_tool_s_tasks_do_not_keep_pages_from_a_quick_one_s() -> None:
    service, quick = Service(), list[str]()
    async with sweeping(service, [], is_hurried=True) as tracker, anyio.create_task_group() as group:

        async def follow(tool: int, tasks: int, seconds: float) -> None:
            for _ in range(tasks):
                task = service.make()
                service.made[-1] = (int(task), anyio.current_time(), seconds)
                quick.extend([task] if tool == 1 else [])
                await tracker.follow(task_id=task, token="", tool=tool)

        for _ in range(2):
            group.start_soon(follow, 1, 100, 1.0)
        for _ in range(3):
            group.start_soon(follow, 2, 4, 60.0)
    assert sum(service.lag_s[task] for task in quick) / len(quick) < 0.25


@pytest.mark.parametrize("age_s", [1.0, 600.0])
@virtual_time
async def test_while_rows_wait_a_task_taken_up_again_is_looked_at_at_once(age_s: float) -> None:
    service = Service()
    async with sweeping(service, [], is_hurried=True) as tracker, anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(partial(tracker.follow, task_id=service.make(), token="", tool=1))
        await anyio.sleep(4)
        task = service.make()
        service.made[-1] = (int(task), anyio.current_time() - 1000, 1.0)
        begun_at = anyio.current_time()
        await tracker.follow(task_id=task, token="", tool=1, age_s=age_s)
        assert anyio.current_time() - begun_at < 1


@virtual_time
async def test_while_rows_wait_a_list_that_hangs_holds_up_nobody() -> None:
    service = Service()
    service.takes_s, service.list_error = 15.0, errors.ReplyLost("no answer in time")
    await follow_in_turn(service, 100, slots=5, is_hurried=True)
    assert max(service.lag_s.values()) < 3.0


@pytest.mark.parametrize("slots", [1, 2, 5])
@virtual_time
async def test_while_rows_wait_a_list_that_shows_new_tasks_late_is_of_use_all_the_same(slots: int) -> None:
    service, notes = Service(), list[str]()
    service.listed_after_s = 3.0
    await follow_in_turn(service, 30 * slots, slots=slots, is_hurried=True, notes=notes)
    assert notes == []
    assert mean_lag_s(service) < 0.5


@virtual_time
async def test_while_rows_wait_a_list_that_never_shows_few_tasks_is_given_up() -> None:
    service, notes = Service(), list[str]()
    service.hides = {str(number) for number in range(1, 10_000)}
    await follow_in_turn(service, 40, slots=2, is_hurried=True, notes=notes)
    assert len(notes) == 1
    assert service.lists < 200
    assert mean_lag_s(service) < 1.0


@virtual_time
async def test_while_rows_wait_an_end_is_seen_soon_though_little_is_known_of_the_tool() -> None:
    service = Service()
    async with sweeping(service, [], is_hurried=True) as tracker:
        tracker.durations[1].add(0.5, over_s=0.04)
        await tracker.follow(task_id=service.make(), token="", tool=1)
    assert mean_lag_s(service) < 3.0


@virtual_time
async def test_while_rows_wait_a_task_that_overruns_all_others_does_not_cause_a_storm() -> None:
    service = Service()
    service.stays = {"30": "task_start"}
    async with sweeping(service, [], is_hurried=True) as tracker:
        for _ in range(29):
            await tracker.follow(task_id=service.make(), token="", tool=1)
        asked = service.lists + service.details
        with anyio.move_on_after(100):
            await tracker.follow(task_id=service.make(), token="", tool=1)
    assert service.lists + service.details - asked < 250  # of 1600 that few tasks may take


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (errors.NotFound("no such endpoint"), 1),  # the word is final
        (errors.ServerFault("502"), LEAST_FAILURES),
        (errors.ProtocolError("nonsense"), LEAST_FAILURES),
    ],
    ids=lambda value: type(value).__name__,
)
@virtual_time
async def test_where_the_list_fails_single_looks_take_over_and_it_is_said_once(
    error: Exception, tries: int
) -> None:
    service, notes = Service(), list[str]()
    service.list_error = error
    assert set(await follow_all(service, 330, notes=notes, per_s=5)) == {Succeeded()}  # beyond AGAIN_S
    assert len(notes) == 1
    assert service.lists == 2 * tries  # at first, and after AGAIN_S
    assert mean_lag_s(service) < 2.0


@virtual_time
async def test_a_list_that_does_not_show_our_tasks_is_given_up() -> None:
    service, notes = Service(), list[str]()
    service.hides = {str(number) for number in range(1, 10_000)}
    assert set(await follow_all(service, 300, notes=notes)) == {Succeeded()}
    assert len(notes) == 1
    assert "does not show" in notes[0]
    assert mean_lag_s(service) < 2.0


@virtual_time
async def test_a_task_that_only_the_list_hides_is_looked_at_by_itself() -> None:
    service, notes = Service(), list[str]()
    service.hides = {"100", "101", "222"}
    assert set(await follow_all(service, 300, notes=notes)) == {Succeeded()}
    assert notes == []
    assert max(service.lag_s[task] for task in service.hides) < 5.0


@virtual_time
async def test_a_list_that_works_again_is_used_again() -> None:
    service, notes = Service(), list[str]()
    service.list_error = errors.NotFound("no such endpoint")
    async with anyio.create_task_group() as group:

        async def mend() -> None:
            await anyio.sleep(AGAIN_S / 2)
            service.list_error = None

        group.start_soon(mend)
        await follow_all(service, 400, notes=notes, per_s=5)
    assert service.lists > 30


@virtual_time
async def test_an_end_without_images_is_confirmed_by_a_look() -> None:
    service = Service()
    service.fails = True
    verdicts = await follow_all(service, 100)
    assert {type(verdict) for verdict in verdicts} == {TaskFailed}
    assert service.details >= 100


@pytest.mark.parametrize(
    ("status", "within_s"), [("task_error", ERROR_PATIENCE_S), ("task_start", STUCK_S[0])]
)
@virtual_time
async def test_tasks_that_never_end_are_given_up_though_pages_show_them_all_the_time(
    status: str, within_s: float
) -> None:
    service = Service()
    service.stays = {"7": status, "8": status, "9": status}  # side by side pages are cheaper to the end
    with anyio.fail_after(60 + within_s):
        verdicts = await follow_all(service, 100)
    kinds = [type(verdict) for verdict in verdicts if verdict != Succeeded()]
    assert kinds == [TaskFailed if status == "task_error" else Left] * 3


@virtual_time
async def test_one_task_far_down_the_list_is_looked_at_by_itself() -> None:
    service = Service()
    service.slow, service.slower_s = 1, 20.0
    assert set(await follow_all(service, 800)) == {Succeeded()}
    assert service.lag_s["1"] < 5.0


@virtual_time
async def test_tasks_that_were_cancelled_at_the_service_are_seen_so_soon() -> None:
    service = Service()
    service.cancelled = True
    verdicts = await follow_all(service, 100)
    assert {type(verdict) for verdict in verdicts} == {TaskFailed}
    assert anyio.current_time() - max(begun_at for _, begun_at, _ in service.made) < 9 + 2.0


@virtual_time
async def test_images_that_come_later_than_the_end_are_looked_for_soon() -> None:
    service = Service()
    service.late_s = 2.0
    begun_at = anyio.current_time()
    assert set(await follow_all(service, 100)) == {Succeeded()}
    assert anyio.current_time() - begun_at < 100 / 20 + 9 + 2.0 + 5


@virtual_time
async def test_pages_and_looks_stay_within_the_budget_together() -> None:
    service = Service()
    service.hides = {str(number) for number in range(1, 200, 3)}  # looked at one by one
    assert set(await follow_all(service, 150, budget_per_s=2.0)) == {Succeeded()}
    first = service.asked_at[0]
    for number, at in enumerate(service.asked_at):
        assert number <= 1 + 2.0 * (at - first)


@virtual_time
async def test_a_slow_list_is_asked_for_a_few_pages_at_once_and_no_task_twice_meanwhile() -> None:
    service = Service()
    service.takes_s = 3.0
    assert set(await follow_all(service, 200)) == {Succeeded()}
    assert 1 < service.most_running <= MAX_PAGES
    assert service.lists + service.details < 200


@virtual_time
async def test_while_a_list_asks_for_a_wait_nothing_is_asked() -> None:
    service = Service()
    service.list_error = errors.RateLimited("slow down", retry_after_s=30.0)

    async def mend() -> None:
        while not service.lists:
            await anyio.sleep(0.01)
        refused_at = service.asked_at[-1] + service.takes_s
        await anyio.sleep(service.takes_s + 0.001)
        service.list_error = None
        await anyio.sleep(29.0)
        under_way_s = 0.5  # what had been asked for before
        assert not [at for at in service.asked_at if refused_at + under_way_s < at < refused_at + 29]

    async with anyio.create_task_group() as group:
        group.start_soon(mend)
        assert set(await follow_all(service, 100)) == {Succeeded()}


@virtual_time
async def test_the_last_tasks_of_many_are_watched_closely() -> None:
    service = Service()
    assert set(await follow_all(service, 60)) == {Succeeded()}
    assert service.lists + service.details < 60
    last = sorted(service.lag_s, key=lambda task: sum(service.made[int(task) - 1][1:]))[-5:]
    assert max(service.lag_s[task] for task in last) < 0.3  # a schedule of single looks waits for seconds


@virtual_time
async def test_one_task_that_outlasts_all_others_gets_no_more_looks_than_are_advised() -> None:
    service = Service()
    service.slow, service.slower_s = 1, 200.0
    assert set(await follow_all(service, 60)) == {Succeeded()}
    assert service.lag_s["1"] < 5.0
    advised = BURST + (service.made[0][2] + service.lag_s["1"]) / ADVICE_S
    assert 10 < service.details <= advised + 1


@virtual_time
async def test_a_task_whose_id_is_no_number_is_looked_at_beside_the_pages() -> None:
    service = Service()

    class Named:
        """Shows task 1 under a name."""

        async def detail(self, task_id: str, token: str = "") -> Task | None:
            task = await service.detail("1" if task_id == "a-1" else task_id)
            return replace(task, id=task_id) if task is not None else None

        list_tasks = service.list_tasks

    tracker = Tracker(Named(), rng=Random(0))
    tracker.add(Sweeps(tracker, service, note=print))
    verdicts: list[object] = []

    async def follow(task_id: str) -> None:
        verdicts.append((await tracker.follow(task_id=task_id, token="", tool=1))[1])

    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        async with anyio.create_task_group() as follows:
            for _ in range(30):
                task_id = service.make()
                follows.start_soon(follow, "a-1" if task_id == "1" else task_id)
        group.cancel_scope.cancel()
    assert verdicts == [Succeeded()] * 30
    assert service.lag_s["1"] < 5.0


@virtual_time
async def test_a_list_that_fails_now_and_then_is_used_on_and_nothing_is_said() -> None:
    service, notes = Service(), list[str]()
    service.fails_every = 2
    assert set(await follow_all(service, 300, notes=notes)) == {Succeeded()}
    assert notes == []
    assert service.lists + service.details < 300
    assert mean_lag_s(service) < 0.25


@virtual_time
async def test_a_list_that_keeps_failing_is_tried_ever_more_rarely() -> None:
    service = Service()
    service.list_error = errors.NotFound("no such endpoint")
    service.slow, service.slower_s = FROM + 5, 6.5 * AGAIN_S
    await follow_all(service, FROM + 5)
    assert service.lists == 3  # at first, after AGAIN_S, and after twice that
