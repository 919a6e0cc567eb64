"""Tasks are looked at until they have ended, whatever the looks meet, and never more often than is of use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import pairwise
from random import Random

import anyio
import pytest

from batchrun import errors
from batchrun.dispatch.track import (
    AGAIN_S,
    BUDGET_PER_S,
    MAX_LOOKS,
    RELAXED_S,
    UNKNOWN_TASK,
    Cover,
    Ended,
    Left,
    Tracker,
    Watch,
)
from batchrun.model import RemoteOutput, Task
from batchrun.rules.pace import ADVICE_S, BURST, CEILING_S, FLOOR_S, STUCK_S, unknown
from batchrun.rules.pages import FROM
from batchrun.rules.policy import (
    ERROR_PATIENCE_S,
    MAX_ASKED_S,
    OUTPUTS_PATIENCE_S,
    UNKNOWN_PATIENCE_S,
    PaidButEmpty,
    Succeeded,
    TaskFailed,
)
from tests.support.clock import virtual_time

IMAGE = RemoteOutput("0.png", "https://cdn/0.png")
RUNNING = Task("1", status="task_start")
DONE = Task("1", status="task_postprocess_end", pexit="0", outputs=(IMAGE,))

#: What a look shows, by the task's age in seconds.
Story = Callable[[float], Task | None]


class Looks:
    """A service whose tasks go through a story, from when they are first named here."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.begun_at = anyio.current_time()
        #: (task id, age when looked at).
        self.seen: list[tuple[str, float]] = []
        self.running = 0
        self.most_running = 0
        self.takes_s = 0.05
        #: Answers, by their number from 1, that are read so much later.
        self.read_late_s: dict[int, float] = {}

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        self.seen.append((task_id, self.age))
        late_s = self.read_late_s.get(len(self.seen), 0.0)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await anyio.sleep(self.takes_s)
            task = self.story(self.age)
            await anyio.sleep(late_s)
            return replace(task, id=task_id) if task is not None else None
        finally:
            self.running -= 1

    @property
    def age(self) -> float:
        return anyio.current_time() - self.begun_at

    def gaps(self) -> list[float]:
        ages = [age for _, age in self.seen]
        return [after - before for before, after in pairwise(ages)]


class All:
    """Covers every task and tells nothing."""

    def covers(self, watch: Watch) -> bool:
        return True

    def begin(self, watch: Watch) -> None: ...
    def end(self, watch: Watch) -> None: ...
    async def run(self) -> None: ...


@asynccontextmanager
async def tracking(
    looks: Looks, *, budget_per_s: float = BUDGET_PER_S, cover: Cover | None = None
) -> AsyncIterator[Tracker]:
    tracker = Tracker(looks, rng=Random(0), budget_per_s=budget_per_s)
    if cover is not None:
        tracker.add(cover)
    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        yield tracker
        group.cancel_scope.cancel()


async def followed(looks: Looks, task_id: str = "1") -> Ended:
    async with tracking(looks) as tracker:
        return await tracker.follow(task_id=task_id, token="t", tool=1)


def after(seconds: float, then: Task | None, before: Task | None = RUNNING) -> Story:
    return lambda age: then if age >= seconds else before


def failing(error: Exception, until_s: float, then: Task = DONE) -> Story:
    def story(age: float) -> Task:
        if age < until_s:
            raise error
        return then

    return story


@virtual_time
async def test_a_task_is_followed_to_its_end() -> None:
    task, verdict = await followed(Looks(after(20, DONE)))
    assert verdict == Succeeded()
    assert task == DONE


@virtual_time
async def test_a_task_seen_ended_too_late_was_looked_at_within_a_quarter_of_its_age() -> None:
    for seconds in (0.5, 3.0, 30.0, 300.0):
        looks = Looks(after(seconds, DONE))
        await followed(looks)
        assert looks.age - seconds <= max(1.0, min(CEILING_S, seconds / 3)) + 0.2


@virtual_time
async def test_once_a_tool_s_duration_is_known_its_tasks_are_seen_ended_soon_with_few_looks() -> None:
    async with tracking(Looks(after(9, DONE))) as tracker:
        for _ in range(5):
            tracker._client = looks = Looks(after(9, DONE))
            await tracker.follow(task_id="1", token="t", tool=1)
        assert looks.age - 9 < 1.5
        assert len(looks.seen) <= 3


@virtual_time
async def test_looks_at_a_task_keep_their_distance() -> None:
    looks = Looks(after(400, DONE))
    await followed(looks)
    assert min(looks.gaps()) >= FLOOR_S
    assert max(looks.gaps()) <= CEILING_S + 1
    for number, (_, age) in enumerate(looks.seen):
        assert number <= BURST + age / ADVICE_S


@virtual_time
async def test_many_tasks_are_never_looked_at_all_at_once() -> None:
    looks = Looks(after(30, DONE))
    looks.takes_s = 0.5
    ended: list[Ended] = []
    async with tracking(looks) as tracker, anyio.create_task_group() as group:

        async def follow(number: int) -> None:
            ended.append(await tracker.follow(task_id=str(number), token="t", tool=1, age_s=10.0))

        for number in range(300):
            group.start_soon(follow, number)
    assert len(ended) == 300
    assert 0 < looks.most_running <= MAX_LOOKS


@virtual_time
async def test_looks_at_many_tasks_stay_within_the_budget() -> None:
    looks = Looks(after(100, DONE))
    async with tracking(looks, budget_per_s=10.0) as tracker, anyio.create_task_group() as group:

        async def follow(number: int) -> None:
            await tracker.follow(task_id=str(number), token="t", tool=1, age_s=10.0)

        for number in range(300):
            group.start_soon(follow, number)
    for number, (_, age) in enumerate(looks.seen):
        assert number <= 10 * (age + 1)


@pytest.mark.parametrize("cover", [None, All()], ids=["looked at", "covered"])
@virtual_time
async def test_a_task_said_to_have_ended_during_a_look_is_looked_at_again_at_once(
    cover: Cover | None,
) -> None:
    looks = Looks(after(10**6, DONE))
    looks.takes_s = 2.0
    async with tracking(looks, cover=cover) as tracker:

        async def told() -> None:
            while not (looks.running and looks.age > 30):
                await anyio.sleep(0.01)
            # the answer tells how the task stood before
            looks.story = after(looks.seen[-1][1] + looks.takes_s + 0.1, DONE)
            for _ in range(3):
                tracker.look_at_once(tracker.watches["1"])
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as group:
            group.start_soon(told)
            await tracker.follow(task_id="1", token="t", tool=1)
    assert looks.most_running == 1
    assert looks.seen[-1][1] - looks.seen[-2][1] <= looks.takes_s + AGAIN_S + 0.01


@pytest.mark.parametrize(("tasks", "looked_at"), [(FROM - 1, True), (FROM, False)])
@virtual_time
async def test_an_end_that_is_told_is_looked_at_at_once_where_no_page_is_going_to_show_it(
    tasks: int, looked_at: bool
) -> None:
    looks, told = Looks(after(10**6, DONE)), list[str]()
    async with tracking(looks, cover=All()) as tracker, anyio.create_task_group() as group:
        for number in range(tasks):
            follow = partial(tracker.follow, on_told=partial(told.append, str(number)))
            group.start_soon(partial(follow, task_id=str(number), token="", tool=1))
        await anyio.sleep(30.0)
        before = len(looks.seen)
        for _ in range(2):
            tracker.told_ended(tracker.watches["7"])
        await anyio.sleep(0.2)
        assert told == ["7"]
        assert ("7" in [task for task, _ in looks.seen[before:]]) == looked_at
        group.cancel_scope.cancel()


@pytest.mark.parametrize("asked_s", [-1.0, 1.0])
@virtual_time
async def test_an_end_that_is_told_and_that_a_page_does_not_show_is_looked_at(asked_s: float) -> None:
    looks = Looks(after(10**6, DONE))
    async with tracking(looks, cover=All()) as tracker, anyio.create_task_group() as group:
        for number in range(FROM):
            group.start_soon(partial(tracker.follow, task_id=str(number), token="", tool=1))
        await anyio.sleep(30.0)
        watch, before = tracker.watches["7"], len(looks.seen)
        tracker.told_ended(watch)
        await anyio.sleep(1.5)
        tracker.listed(watch, RUNNING, asked_at=anyio.current_time() - 1.5 + asked_s)
        await anyio.sleep(0.2)
        # what was asked before it was told says nothing against it
        assert [task for task, _ in looks.seen[before:]] == ([] if asked_s < 0 else ["7"])
        assert watch.is_told == (asked_s < 0)
        group.cancel_scope.cancel()


@virtual_time
async def test_an_end_that_a_page_shows_during_a_look_counts_once() -> None:
    looks = Looks(after(0, DONE))
    looks.takes_s = 5.0
    async with tracking(looks) as tracker, anyio.create_task_group() as group:
        group.start_soon(lambda: tracker.follow(task_id="1", token="t", tool=1))
        while not looks.running:
            await anyio.sleep(0.01)
        watch = tracker.watches["1"]
        seen_at = watch.seen_at
        tracker.listed(watch, RUNNING, asked_at=seen_at - 1.0)  # a page that came late
        assert watch.seen_at == seen_at
        tracker.listed(watch, DONE, asked_at=anyio.current_time())
        await anyio.sleep(10.0)
        assert watch.result == (DONE, Succeeded())
        assert len(looks.seen) == len(tracker.durations[1].seen) == 1


@virtual_time
async def test_looks_that_others_ask_for_take_the_place_of_planned_ones() -> None:
    looks = Looks(after(400, DONE))
    async with tracking(looks) as tracker, anyio.create_task_group() as group:
        group.start_soon(lambda: tracker.follow(task_id="1", token="t", tool=1))
        for _ in range(20):
            await anyio.sleep(1.0)
            tracker.look_at_once(tracker.watches["1"])
        await anyio.sleep(1.0)
        count = len(looks.seen)
        await anyio.sleep(150.0)
        assert count <= 20 + BURST + 20 / ADVICE_S
        assert len(looks.seen) - count <= 150.0 / ADVICE_S


@virtual_time
async def test_a_look_that_is_asked_for_is_not_put_off_by_a_planned_one() -> None:
    looks = Looks(after(400, DONE))
    async with tracking(looks) as tracker, anyio.create_task_group() as group:
        group.start_soon(lambda: tracker.follow(task_id="1", token="t", tool=1))
        await anyio.sleep(200.0)
        count = len(looks.seen)
        while len(looks.seen) == count or looks.running:
            await anyio.sleep(0.01)  # the next planned one is far off now
        watch, count = tracker.watches["1"], len(looks.seen)
        tracker.look_as_planned(watch)
        await anyio.sleep(0.01)
        assert len(looks.seen) == count
        tracker.look_at_once(watch)
        tracker.look_as_planned(watch)  # whoever covered it is gone
        await anyio.sleep(0.01)
        assert len(looks.seen) == count + 1


@virtual_time
async def test_a_task_that_is_covered_is_looked_at_seldom_unless_that_is_asked_for() -> None:
    looks = Looks(after(10**6, DONE))
    async with tracking(looks, cover=All()) as tracker, anyio.create_task_group() as group:
        group.start_soon(lambda: tracker.follow(task_id="1", token="t", tool=1))
        await anyio.sleep(300.0)
        assert min(looks.gaps()) >= RELAXED_S
        assert max(looks.gaps()) <= RELAXED_S + CEILING_S
        count = len(looks.seen)
        while len(looks.seen) == count or looks.running:
            await anyio.sleep(0.01)
        count = len(looks.seen)
        tracker.look_at_once(tracker.watches["1"])
        await anyio.sleep(0.01)
        assert len(looks.seen) == count + 1
        group.cancel_scope.cancel()


@pytest.mark.parametrize(
    "error",
    [
        errors.NotSent("refused"),
        errors.ReplyLost("reset"),
        errors.ServerFault("502"),
        errors.ServerFault("503", retry_after_s=0.0),
        errors.ProtocolError("nonsense"),
        errors.RateLimited("slow down"),
        errors.RateLimited("slow down", retry_after_s=0.0),
        errors.LimitReached("full"),
        errors.BalanceExhausted("no money"),
        errors.RequestRejected("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
@virtual_time
async def test_looks_that_fail_for_ten_minutes_lose_no_task_and_make_no_storm(error: Exception) -> None:
    looks = Looks(failing(error, 600))
    _, verdict = await followed(looks)
    assert verdict == Succeeded()
    assert len(looks.seen) < 600 / 0.5


@virtual_time
async def test_a_wait_that_the_service_asks_for_is_kept_by_all_looks() -> None:
    looks = Looks(failing(errors.RateLimited("slow down", retry_after_s=120.0), 60))
    async with tracking(looks) as tracker, anyio.create_task_group() as group:

        async def follow(number: int) -> None:
            await anyio.sleep(number * 5)  # each comes upon its own moment
            await tracker.follow(task_id=str(number), token="t", tool=1)

        for number in range(1, 9):
            group.start_soon(follow, number)
    asked_at = looks.seen[0][1]
    assert all(age == asked_at or age >= asked_at + 120 for _, age in looks.seen)


@virtual_time
async def test_while_the_service_asks_for_a_wait_not_even_a_task_said_to_have_ended_is_looked_at() -> None:
    looks = Looks(after(5, DONE))
    async with tracking(looks) as tracker, anyio.create_task_group() as group:
        group.start_soon(lambda: tracker.follow(task_id="1", token="t", tool=1))
        await anyio.sleep(1.0)
        tracker.keep_quiet(120.0)
        tracker.keep_quiet(1.0)  # a shorter one does not end a longer one
        await anyio.sleep(9.0)
        assert tracker.is_quiet
        tracker.look_at_once(tracker.watches["1"])
    assert [age for _, age in looks.seen] == [pytest.approx(121.0)]


@virtual_time
async def test_a_wait_beyond_reason_is_not_kept() -> None:
    looks = Looks(failing(errors.RateLimited("slow down", retry_after_s=10.0**9), 1.6))
    async with tracking(looks) as tracker:
        await tracker.follow(task_id="1", token="t", tool=1)
        assert looks.age <= MAX_ASKED_S + 5
        tracker.keep_quiet(10.0**9)
        await anyio.sleep(MAX_ASKED_S + 1)
        assert not tracker.is_quiet


@virtual_time
async def test_troubles_that_are_over_make_the_next_one_no_longer() -> None:
    error = errors.ServerFault("502")
    looks = Looks(after(600, DONE))
    story = looks.story

    def faltering(age: float) -> Task | None:
        if len(looks.seen) % 3 == 0 and age < 600:
            raise error
        return story(age)

    looks.story = faltering
    await followed(looks)
    assert max(looks.gaps()) < 15  # troubles that add up wait for up to 30 s


@virtual_time
async def test_a_refused_key_reaches_whoever_follows() -> None:
    looks = Looks(failing(errors.CredentialsRefused("bad key"), 600))
    async with tracking(looks) as tracker:
        with pytest.raises(errors.CredentialsRefused):
            await tracker.follow(task_id="1", token="t", tool=1)


@pytest.mark.parametrize("unknown", [None, errors.NotFound("no task yet")], ids=["empty", "code 1"])
@virtual_time
async def test_a_task_unknown_to_the_service_is_looked_for_and_then_left(
    unknown: errors.NotFound | None,
) -> None:
    looks = Looks(after(10**6, DONE, None) if unknown is None else failing(unknown, 10**6))
    task, verdict = await followed(looks)
    assert task is None
    assert verdict == Left(UNKNOWN_TASK)
    assert looks.age >= UNKNOWN_PATIENCE_S


@virtual_time
async def test_a_task_that_the_service_knows_again_in_time_is_followed_on() -> None:
    def story(age: float) -> Task | None:
        return DONE if age > 500 else None if age % 100 > 20 else RUNNING

    _, verdict = await followed(Looks(story))
    assert verdict == Succeeded()


@virtual_time
async def test_two_looks_with_a_long_sleep_in_between_are_no_proof_that_a_task_is_unknown() -> None:
    looks = Looks(lambda age: None if len(looks.seen) <= 2 else DONE)
    looks.read_late_s = {2: 10 * UNKNOWN_PATIENCE_S}  # the machine slept
    _, verdict = await followed(looks)
    assert verdict == Succeeded()


@virtual_time
async def test_a_task_that_never_moves_is_left_to_the_next_start() -> None:
    looks = Looks(after(10**6, DONE))
    task, verdict = await followed(looks)
    assert isinstance(verdict, Left)
    assert "task_start" in verdict.reason
    assert task is not None
    assert verdict.is_stuck
    assert STUCK_S[1] <= looks.age <= STUCK_S[1] + 2 * CEILING_S


@virtual_time
async def test_a_task_that_moves_now_and_then_is_followed_for_hours() -> None:
    stages = ["task_queue", "task_assign", "task_start", "task_output", "task_end"]

    def story(age: float) -> Task:
        return DONE if age > 5 * 3000 else Task("1", status=stages[int(age // 3000) % 5])

    _, verdict = await followed(Looks(story))
    assert verdict == Succeeded()


@virtual_time
async def test_statuses_going_backwards_or_unknown_mean_only_that_it_runs() -> None:
    stages = ["task_start", "task_queue", "task_teleport", "", "task_end", "task_start"]

    def story(age: float) -> Task:
        return DONE if age > 60 else Task("1", status=stages[int(age // 10) % 6])

    _, verdict = await followed(Looks(story))
    assert verdict == Succeeded()


@pytest.mark.parametrize("cover", [None, All()], ids=["looked at", "covered"])
@virtual_time
async def test_outputs_that_come_a_look_later_are_waited_for_briefly(cover: Cover | None) -> None:
    looks = Looks(after(12, DONE, replace(DONE, outputs=())))
    async with tracking(looks, cover=cover) as tracker, anyio.create_task_group() as group:

        async def follow() -> None:
            _, verdict = await tracker.follow(task_id="1", token="t", tool=1)
            assert verdict == Succeeded()

        group.start_soon(follow)
        await anyio.sleep(10)
        tracker.look_at_once(tracker.watches["1"])  # somebody says that it has ended
    assert looks.age < 14


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(Decimal("0.004"), PaidButEmpty), (Decimal(0), TaskFailed), (None, PaidButEmpty)],
    ids=["billed", "not billed", "not told"],
)
@virtual_time
async def test_outputs_that_never_come_are_waited_for_half_a_minute(
    cost: Decimal | None, expected: type
) -> None:
    looks = Looks(lambda age: replace(DONE, outputs=(), cost_usd=cost))
    _, verdict = await followed(looks)
    assert type(verdict) is expected
    assert OUTPUTS_PATIENCE_S <= looks.age <= OUTPUTS_PATIENCE_S + 5


@virtual_time
async def test_an_answer_that_is_read_late_is_no_sign_that_the_task_stood_still() -> None:
    outputs = [False, False, True]
    looks = Looks(lambda age: DONE if outputs[len(looks.seen) - 1] else replace(DONE, outputs=()))
    looks.read_late_s = {2: 10 * OUTPUTS_PATIENCE_S}  # the machine slept
    _, verdict = await followed(looks)
    assert verdict == Succeeded()


@virtual_time
async def test_an_error_that_passes_is_no_end_and_one_that_lasts_is() -> None:
    _, verdict = await followed(Looks(after(60, DONE, Task("1", status="task_error"))))
    assert verdict == Succeeded()
    looks = Looks(lambda age: Task("1", status="task_error", debug_error="boom"))
    _, verdict = await followed(looks)
    assert isinstance(verdict, TaskFailed)
    assert "boom" in verdict.failure.message
    assert looks.age >= ERROR_PATIENCE_S


@virtual_time
async def test_a_task_from_an_earlier_start_is_looked_at_at_once_and_teaches_no_duration() -> None:
    looks = Looks(lambda age: DONE)
    async with tracking(looks) as tracker:
        await tracker.follow(task_id="1", token="t", tool=1, age_s=3000.0)
        assert looks.seen[0][1] < 0.01
        assert tracker.durations[1].typical_s is None
        assert tracker.watches == {}
        looks.story = after(30, DONE)
        await tracker.follow(task_id="2", token="t", tool=1, age_s=3000.0)
        assert tracker.durations[1].spread is unknown()


@virtual_time
async def test_a_task_under_way_teaches_how_long_its_tool_takes() -> None:
    async with tracking(Looks(after(10**6, DONE))) as tracker:
        with anyio.move_on_after(100):
            await tracker.follow(task_id="1", token="t", tool=1)
        assert tracker.durations[1].spread.quantile_s(0.5) > 80


@virtual_time
async def test_time_in_the_service_s_queue_is_no_part_of_a_duration() -> None:
    queued = Task("1", status="task_queue")
    looks = Looks(lambda age: queued if age < 100 else after(106, DONE)(age))
    async with tracking(looks) as tracker:
        await tracker.follow(task_id="1", token="t", tool=1)
        [(over_s, by_s)] = tracker.durations[1].seen
    assert over_s <= 6.0 <= by_s <= 6.0 + 2 * CEILING_S
    assert looks.age - 106 < 6.0


@pytest.mark.parametrize(
    ("told", "believed"),
    [(Decimal(6), True), (Decimal(60), False), (Decimal("0.01"), False), (None, False)],
    ids=["likely", "too long", "too short", "not told"],
)
@virtual_time
async def test_a_duration_that_the_service_tells_is_believed_where_looks_do_not_say_otherwise(
    told: Decimal | None, believed: bool
) -> None:
    looks = Looks(after(6, replace(DONE, elapsed_s=told)))
    async with tracking(looks) as tracker:
        await tracker.follow(task_id="1", token="t", tool=1)
        [(over_s, by_s)] = tracker.durations[1].seen
    assert over_s <= 6.0 <= by_s < 10.0
    assert (over_s == by_s) == believed


@virtual_time
async def test_a_task_nobody_follows_any_more_is_not_looked_at() -> None:
    looks = Looks(after(10**6, DONE))
    async with tracking(looks) as tracker:
        with anyio.move_on_after(30):
            await tracker.follow(task_id="1", token="t", tool=1)
        count = len(looks.seen)
        await anyio.sleep(1000)
        assert len(looks.seen) == count
