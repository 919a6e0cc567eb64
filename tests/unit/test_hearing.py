"""What the service tells over a socket ends waiting at once, and what it does not tell loses no task."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Container
from contextlib import asynccontextmanager
from random import Random

import anyio
import pytest

from batchrun import errors
from batchrun.dispatch.hearing import MAX_SOCKETS, SHARED, Hearing
from batchrun.dispatch.track import RELAXED_S, Tracker
from batchrun.model import RemoteOutput, Task
from batchrun.rules.policy import Succeeded
from batchrun.wiro.socket import TaskEvent, read_event
from tests.support.clock import virtual_time

IMAGE = RemoteOutput("0.png", "https://cdn/0.png")
SECONDS = 30.0


class Service:
    """Tasks of 30 s, their ids their tokens; sockets that tell of so many tasks each."""

    def __init__(self, *, tells: int = 10**9, breaks_after_s: float = math.inf) -> None:
        self.tells = tells
        self.breaks_after_s = breaks_after_s
        self.loses_ends = False
        #: A socket tells of the task asked for last, and of no other any more.
        self.tells_newest = False
        #: Ends are told so much later, and of some tasks right after they were asked for, too.
        self.told_late_s = 0.0
        self.lies: Callable[[str], bool] = lambda token: False
        #: Sockets tell nothing between these ages of the service, in seconds.
        self.silent_s = (0.0, 0.0)
        #: Progress is told once more after an end.
        self.chatters = False
        #: Details take so long.
        self.takes_s = 0.0
        #: Between two events a socket breaks.
        self.tells_one = False
        #: Numbers of the sockets, from 1, that are refused, that are never opened, that tell nothing, and
        #: that break when something is asked on them.
        self.refused: Container[int] = ()
        self.hanging: Container[int] = ()
        self.mute: Container[int] = ()
        self.breaking: Container[int] = ()
        #: What is told of a task, by its token and status.
        self.event: Callable[[str, str], TaskEvent] = lambda token, status: TaskEvent(token, token, status)
        #: Details show an end so long after it was told.
        self.late_s = 0.0
        #: A socket takes so long to open.
        self.opening_s = 0.0
        self.first_detail_at = math.inf
        self.asked: list[str] = []
        self.details = self.sockets = self.open = self.most_open = 0
        self.begun_at: dict[str, float] = {}
        self.lag_s: dict[str, float] = {}

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        self.details += 1
        self.first_detail_at = min(self.first_detail_at, anyio.current_time())
        await anyio.sleep(self.takes_s)
        late_s = anyio.current_time() - self.begun_at[task_id] - SECONDS
        if late_s < self.late_s:
            return Task(task_id, status="task_start")
        self.lag_s.setdefault(task_id, late_s)
        return Task(task_id, status="task_postprocess_end", pexit="0", outputs=(IMAGE,))

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[Line]:
        self.sockets += 1
        number = self.sockets
        if number in self.refused:
            raise errors.ServerFault("503")
        if number in self.hanging:
            await anyio.sleep_forever()
        await anyio.sleep(self.opening_s)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield Line(self, is_mute=number in self.mute, is_breaking=number in self.breaking)
        finally:
            self.open -= 1


class Line:
    """One socket of the service."""

    def __init__(self, service: Service, *, is_mute: bool, is_breaking: bool) -> None:
        self.service = service
        self.tells = 0 if is_mute else service.tells
        self.is_breaking = is_breaking
        self.is_broken = anyio.Event()
        self.asked: list[str] = []

    async def ask(self, token: str) -> None:
        if self.is_breaking:
            self.is_broken.set()
            raise errors.ReplyLost("the connection for events broke")
        self.asked.append(token)
        self.service.asked.append(token)

    async def events(self) -> AsyncIterator[TaskEvent]:
        if self.is_breaking:
            await self.is_broken.wait()
            return
        service, opened_at = self.service, anyio.current_time()
        told: set[tuple[str, bool]] = set()
        while anyio.current_time() - opened_at < service.breaks_after_s:
            for token in self.asked[-1:] if service.tells_newest else self.asked[: self.tells]:
                now = anyio.current_time()
                over = now - service.begun_at[token] >= SECONDS + service.told_late_s
                low_s, high_s = service.silent_s
                if low_s <= now - min(service.begun_at.values()) < high_s:
                    continue
                if (token, over) not in told and not (over and service.loses_ends):
                    told.add((token, over))
                    is_end = over or service.lies(token)
                    yield service.event(token, "task_postprocess_end" if is_end else "task_start")
                    if over and self.tells > SHARED:
                        self.asked.remove(token)
                    if over and service.chatters:
                        yield service.event(token, "task_output")
                    if service.tells_one:
                        return
            await anyio.sleep(0.1)


async def follow_all(
    service: Service,
    tasks: int,
    *,
    with_tokens: bool = True,
    apart_s: float = 0.0,
    wanted_after_s: float = 0.0,
    on_told: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Follow so many tasks, begun so far apart, to their good end; returns what was said."""
    notes: list[str] = []
    tracker = Tracker(service, rng=Random(0))
    wanted_from = anyio.current_time() + wanted_after_s
    hearing = Hearing(
        tracker,
        service,
        wanted=lambda: anyio.current_time() >= wanted_from,
        rng=Random(0),
        note=notes.append,
    )
    tracker.add(hearing)

    async def follow(name: str) -> None:
        await anyio.sleep(int(name) * apart_s)
        service.begun_at[name] = anyio.current_time()
        _, verdict = await tracker.follow(
            task_id=name, token=name if with_tokens else "", tool=1, on_told=lambda: on_told(name)
        )
        assert verdict == Succeeded()

    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        await anyio.sleep(0.1)
        async with anyio.create_task_group() as follows:
            for number in range(1, tasks + 1):
                follows.start_soon(follow, str(number))
        await anyio.sleep(1.0)
        assert service.open <= 1  # a connection is kept at most, for tasks to come
        assert not hearing._heard
        assert not hearing._asked_at
        assert not hearing._line_of
        assert not any(line.watches or line.fresh for line in hearing._lines)
        group.cancel_scope.cancel()
    assert service.open == 0
    assert len(service.lag_s) == tasks
    return notes


def mean_lag_s(service: Service) -> float:
    return sum(service.lag_s.values()) / len(service.lag_s)


@virtual_time
async def test_an_end_that_is_told_is_seen_at_once_and_looks_are_few() -> None:
    service = Service()
    assert await follow_all(service, 30) == []
    assert max(service.lag_s.values()) < 0.2
    assert service.sockets == 1
    assert service.details <= 3 * 30


@virtual_time
async def test_more_tasks_than_a_connection_is_to_tell_of_share_another_and_leave_one_behind() -> None:
    service = Service()
    assert await follow_all(service, SHARED + 20, apart_s=0.05) == []
    assert max(service.lag_s.values()) < 0.2
    assert service.sockets == service.most_open == 2


@virtual_time
async def test_nothing_is_asked_for_until_events_are_worth_having_and_then_all_is() -> None:
    service = Service()
    assert await follow_all(service, 30, apart_s=1.0, wanted_after_s=1000.0) == []
    assert service.sockets == 0
    service = Service()
    assert await follow_all(service, 30, apart_s=1.0, wanted_after_s=15.0) == []
    assert len(service.asked) == 30
    assert max(service.lag_s.values()) < 0.2


@virtual_time
async def test_an_end_is_told_once_and_before_a_look_confirms_it() -> None:
    service, told = Service(), dict[str, bool]()

    def on_told(name: str) -> None:
        assert name not in told
        told[name] = name in service.lag_s

    await follow_all(service, 30, on_told=on_told)
    assert len(told) == 30
    assert not any(told.values())


@virtual_time
async def test_a_service_that_tells_only_of_the_task_asked_for_last_gets_a_socket_for_each() -> None:
    service = Service()
    service.tells_newest = True
    assert await follow_all(service, 200, apart_s=1.0) == []
    later = [service.lag_s[str(number)] for number in range(101, 201)]
    assert max(later) < 0.2


@pytest.mark.parametrize("late_s", [0.2, 2.0])
@virtual_time
async def test_ends_that_are_told_after_they_were_seen_are_no_reason_for_a_socket_each(late_s: float) -> None:
    service = Service()
    service.told_late_s = late_s
    await follow_all(service, 200, apart_s=0.5)
    assert service.sockets == 1


@virtual_time
async def test_what_is_told_after_an_end_is_nothing_to_doubt_it_for() -> None:
    service = Service()
    service.chatters, service.takes_s = True, 0.1
    await follow_all(service, 200, apart_s=0.5)
    assert service.sockets == 1
    assert max(service.lag_s.values()) < 0.3


@virtual_time
async def test_after_a_silence_tasks_come_to_share_a_socket_again() -> None:
    service = Service()
    service.silent_s = (100.0, 110.0)
    await follow_all(service, 600, apart_s=1.0)
    assert service.sockets < 400
    assert max(service.lag_s[str(number)] for number in range(500, 601)) < 0.2


@virtual_time
async def test_sockets_that_break_at_every_event_are_made_anew_ever_later() -> None:
    service = Service()
    service.tells_one = True
    await follow_all(service, 100, apart_s=0.5)
    assert service.sockets < 100
    assert mean_lag_s(service) < 5.0


@virtual_time
async def test_ends_that_are_told_and_are_none_are_believed_no_more() -> None:
    service, told = Service(), list[str]()
    service.lies = lambda token: int(token) % 2 == 0
    await follow_all(service, 400, apart_s=0.5, on_told=told.append)
    early = [name for name in told if int(name) % 2 == 0]
    assert 0 < len(early) < 100  # the first ends come after 60 tasks
    assert not [name for name in told if int(name) > 200]
    assert service.details < 400 * 10
    assert max(service.lag_s.values()) < 5.0


@virtual_time
async def test_where_ends_are_never_told_tasks_come_to_be_looked_at_as_if_there_were_no_events() -> None:
    service = Service()
    service.loses_ends = True
    await follow_all(service, 300, apart_s=1.0)
    later = [service.lag_s[str(number)] for number in range(201, 301)]
    assert sum(later) / len(later) < 5.0


@virtual_time
async def test_ends_that_are_not_told_are_seen_all_the_same() -> None:
    service = Service()
    service.loses_ends = True
    await follow_all(service, 30)
    assert max(service.lag_s.values()) <= RELAXED_S + 1


@virtual_time
async def test_sockets_that_break_all_the_time_lose_no_task() -> None:
    service = Service(breaks_after_s=2.0)
    assert await follow_all(service, 30) == []
    assert service.sockets > 10  # each lives for 2 s, and the next one comes within another
    assert max(service.lag_s.values()) < 1.0


@virtual_time
async def test_once_there_are_no_more_sockets_tasks_are_looked_at_as_if_there_had_never_been_any() -> None:
    service = Service(breaks_after_s=22.0)  # each task was last looked at 2 s ago
    service.refused = range(2, 1000)
    await follow_all(service, 30)
    assert max(service.lag_s.values()) < 5.0


@pytest.mark.parametrize("first", ["refused", "hanging", "mute", "breaking"])
@virtual_time
async def test_a_first_socket_that_is_of_no_use_makes_room_for_another(first: str) -> None:
    service = Service()
    service.opening_s = 1.0
    setattr(service, first, {1})
    assert await follow_all(service, 30) == []
    assert max(service.lag_s.values()) < 0.2
    assert service.sockets == 2


@virtual_time
async def test_tasks_without_a_token_are_asked_for_nowhere() -> None:
    service = Service()
    assert await follow_all(service, 10, with_tokens=False) == []
    assert service.asked == []
    assert mean_lag_s(service) < 5.0


@pytest.mark.parametrize(
    "event",
    [lambda token, status: TaskEvent("", token, status), lambda token, status: TaskEvent(token, "", status)],
    ids=["id", "token"],
)
@virtual_time
async def test_an_event_that_names_its_task_in_one_way_is_understood(
    event: Callable[[str, str], TaskEvent],
) -> None:
    service = Service()
    service.event = event
    await follow_all(service, 30)
    assert max(service.lag_s.values()) < 0.2


@virtual_time
async def test_an_event_under_the_token_of_another_task_is_not_believed() -> None:
    service = Service()
    service.event = lambda token, status: TaskEvent("x", token, "task_postprocess_end")
    await follow_all(service, 5)
    assert service.first_detail_at > min(service.begun_at.values()) + 0.5  # it was told at once


@virtual_time
async def test_an_end_that_details_show_later_than_it_is_told_is_looked_for_as_if_nobody_had_told() -> None:
    service = Service()
    service.late_s = 2.0
    await follow_all(service, 30)
    assert max(service.lag_s.values()) < 2.0 + 5.0


@virtual_time
async def test_where_there_are_no_sockets_tasks_are_looked_at_and_it_is_said_once() -> None:
    service = Service()
    service.refused = range(1000)
    notes = await follow_all(service, 30)
    assert len(notes) == 1
    assert service.sockets < 20
    assert mean_lag_s(service) < 5.0


@pytest.mark.parametrize("tasks", [20, MAX_SOCKETS + 20])
@virtual_time
async def test_a_service_that_tells_of_one_task_per_socket_gets_a_socket_each_up_to_a_bound(
    tasks: int,
) -> None:
    service = Service(tells=1)
    assert await follow_all(service, tasks) == []
    assert min(tasks, MAX_SOCKETS) / 2 < service.most_open <= MAX_SOCKETS
    near = [lag for lag in service.lag_s.values() if lag < 0.2]
    assert len(near) >= min(tasks, MAX_SOCKETS) * 0.9


@virtual_time
async def test_a_socket_that_says_nothing_covers_no_task() -> None:
    service = Service(tells=0)
    await follow_all(service, 10)
    assert mean_lag_s(service) < 5.0


@pytest.mark.parametrize(
    ("said", "event"),
    [
        ({"type": "task_end", "id": "7", "tasktoken": "t", "message": ""}, TaskEvent("t", "7", "task_end")),
        ({"type": "task_end", "id": 7}, TaskEvent("", "7", "task_end")),
        ({"type": "task_end", "id": True, "tasktoken": ["t"]}, TaskEvent("", "", "task_end")),
        ({"type": "hello"}, None),
        ({"type": 3}, None),
        (["task_end"], None),
        (None, None),
    ],
)
def test_an_event_is_read_liberally(said: object, event: TaskEvent | None) -> None:
    assert read_event(json.dumps(said)) == event


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"type": "task_end"'])
def test_what_is_no_event_is_left_out(text: str) -> None:
    assert read_event(text) is None


def test_a_token_does_not_show() -> None:
    assert "secret" not in repr(TaskEvent("secret", "7", "task_end"))
