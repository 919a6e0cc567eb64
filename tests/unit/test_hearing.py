"""What the service tells over a socket ends waiting at once, and what it does not tell loses no task."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import anyio
import pytest

from batchrun import errors
from batchrun.dispatch.hearing import MAX_SOCKETS, Hearing
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
        self.refuses = False
        self.details = self.sockets = self.open = self.most_open = 0
        self.begun_at: dict[str, float] = {}
        self.lag_s: dict[str, float] = {}

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        self.details += 1
        late_s = anyio.current_time() - self.begun_at[task_id] - SECONDS
        if late_s < 0:
            return Task(task_id, status="task_start")
        self.lag_s.setdefault(task_id, late_s)
        return Task(task_id, status="task_postprocess_end", pexit="0", outputs=(IMAGE,))

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[Line]:
        self.sockets += 1
        if self.refuses:
            raise errors.ServerFault("503")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield Line(self)
        finally:
            self.open -= 1


class Line:
    """One socket of the service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.asked: list[str] = []

    async def ask(self, token: str) -> None:
        self.asked.append(token)

    async def events(self) -> AsyncIterator[TaskEvent]:
        service, opened_at = self.service, anyio.current_time()
        told: set[tuple[str, bool]] = set()
        while anyio.current_time() - opened_at < service.breaks_after_s:
            for token in self.asked[: service.tells]:
                over = anyio.current_time() - service.begun_at[token] >= SECONDS
                if (token, over) not in told and not (over and service.loses_ends):
                    told.add((token, over))
                    yield TaskEvent(token, token, "task_postprocess_end" if over else "task_start")
            await anyio.sleep(0.1)


async def follow_all(service: Service, tasks: int) -> list[str]:
    """Follow so many tasks to their good end; returns what was said."""
    notes: list[str] = []
    tracker = Tracker(service, rng=Random(0))
    tracker.add(lambda tracker: Hearing(tracker, service, rng=Random(0), note=notes.append))

    async def follow(name: str) -> None:
        service.begun_at[name] = anyio.current_time()
        _, verdict = await tracker.follow(task_id=name, token=name, tool=1)
        assert verdict == Succeeded()

    async with anyio.create_task_group() as group:
        group.start_soon(tracker.run)
        async with anyio.create_task_group() as follows:
            for number in range(1, tasks + 1):
                follows.start_soon(follow, str(number))
        group.cancel_scope.cancel()
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
async def test_ends_that_are_not_told_are_seen_all_the_same() -> None:
    service = Service()
    service.loses_ends = True
    await follow_all(service, 30)
    assert max(service.lag_s.values()) <= RELAXED_S + 1


@virtual_time
async def test_sockets_that_break_all_the_time_lose_no_task() -> None:
    service = Service(breaks_after_s=2.0)
    assert await follow_all(service, 30) == []
    assert service.sockets > 5
    assert mean_lag_s(service) < 5.0


@virtual_time
async def test_where_there_are_no_sockets_tasks_are_looked_at_and_it_is_said_once() -> None:
    service = Service()
    service.refuses = True
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
