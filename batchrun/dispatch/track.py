"""Following tasks: one loop decides when to look at which task, and tells each waiter how its task ended.

Looks that fail say nothing about the task: it is looked at again later, and never submitted anew.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Protocol

import anyio

from batchrun import errors
from batchrun.model import Task
from batchrun.rules.pace import Durations, next_look_s, stuck_after_s
from batchrun.rules.policy import (
    MAX_ASKED_S,
    UNKNOWN_PATIENCE_S,
    Running,
    Succeeded,
    Verdict,
    backoff_s,
    judge,
)

#: Looks under way at once.
MAX_LOOKS = 16


class Looks(Protocol):
    """What following needs of the service's client."""

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        """The task as it stands; None when the service lists nothing for it (which may pass)."""
        ...


@dataclass(frozen=True, slots=True)
class Left:
    """The task is neither finished nor given up: it stays in flight for the next run."""

    reason: str
    #: It does not move any more.
    is_stuck: bool = False


UNKNOWN_TASK = "the service does not know the task; to buy again: retry with --regenerate-lost"

#: A task as last seen, and what that means.
Ended = tuple[Task | None, Verdict | Left]


@dataclass(slots=True, eq=False)
class _Watch:
    task_id: str
    token: str
    tool: int
    images: int
    #: Monotonic seconds when the task was accepted.
    begun_at: float
    ended: anyio.Event = field(default_factory=anyio.Event)
    result: Ended | None = None
    #: Followed since it was accepted, so that its age when seen ended tells its duration.
    fresh: bool = True
    failure: Exception | None = None
    status: str = ""
    status_since: float = 0.0
    unknown_since: float | None = None
    troubles: int = 0


class Tracker:
    """Follows the active tasks of a run."""

    def __init__(self, looks: Looks, *, rng: Random | None = None) -> None:
        self.durations: defaultdict[int, Durations] = defaultdict(Durations)
        self.looks = 0
        self._client = looks
        self._heap: list[tuple[float, int, _Watch]] = []
        self._number = count()
        self._woken = anyio.Event()
        #: A wait that the service asked for holds for all looks.
        self._quiet_until = 0.0
        self._rng = rng or Random()

    async def follow(
        self, *, task_id: str, token: str, tool: int, images: int = 1, age_s: float = 0.0
    ) -> Ended:
        """Wait until the task has ended; returns it as last seen and what that means.

        `images` were asked for.

        Raises CredentialsRefused when looking is refused for good.
        """
        now = anyio.current_time()
        watch = _Watch(task_id, token, tool, images, begun_at=now - age_s, status_since=now, fresh=age_s == 0)
        typical_s = self.durations[tool].typical_s
        first_s = 0.0 if age_s > 0 else next_look_s(0.0, typical_s)
        self._schedule(watch, now + first_s)
        try:
            await watch.ended.wait()
        finally:
            watch.ended.set()  # a watch nobody waits for is dropped when its turn comes
        if watch.failure is not None:
            raise watch.failure
        assert watch.result is not None
        return watch.result

    async def run(self) -> None:
        """Look at tasks when they are due, until cancelled."""
        limiter = anyio.CapacityLimiter(MAX_LOOKS)
        async with anyio.create_task_group() as looks:
            while True:
                await self._until_due()
                _, _, watch = heapq.heappop(self._heap)
                if watch.ended.is_set():
                    continue
                await limiter.acquire_on_behalf_of(watch)
                looks.start_soon(self._look, watch, limiter)

    async def _until_due(self) -> None:
        while (due_at := self._due_at()) > anyio.current_time():
            self._woken = anyio.Event()
            with anyio.move_on_at(due_at):
                await self._woken.wait()

    def _due_at(self) -> float:
        return max(self._heap[0][0], self._quiet_until) if self._heap else float("inf")

    def _schedule(self, watch: _Watch, at: float) -> None:
        heapq.heappush(self._heap, (at, next(self._number), watch))
        self._woken.set()

    async def _look(self, watch: _Watch, limiter: anyio.CapacityLimiter) -> None:
        try:
            self.looks += 1
            asked_at = anyio.current_time()
            task = await self._client.detail(watch.task_id, watch.token)
            wait_s = self._seen(watch, task, asked_at=asked_at)
        except errors.CredentialsRefused as error:
            watch.failure = error
            watch.ended.set()
            return
        except errors.NotFound:
            wait_s = self._unknown(watch)
        except errors.RateLimited as error:
            wait_s = self._trouble(watch, error.retry_after_s)
            self._quiet_until = max(self._quiet_until, anyio.current_time() + wait_s)
        except errors.ServiceError as error:
            wait_s = self._trouble(watch, getattr(error, "retry_after_s", None))
        finally:
            limiter.release_on_behalf_of(watch)
        if not watch.ended.is_set():
            self._schedule(watch, anyio.current_time() + wait_s)

    def _seen(self, watch: _Watch, task: Task | None, *, asked_at: float) -> float:
        """Take in what a look showed; returns the seconds until the next one."""
        if task is None:
            return self._unknown(watch)
        now = anyio.current_time()
        watch.troubles, watch.unknown_since = 0, None
        if task.status != watch.status:
            watch.status, watch.status_since = task.status, now
        # up to the question, not the answer: the machine may have slept before it could read that
        in_status_for_s = max(0.0, asked_at - watch.status_since)
        verdict = judge(task, images=watch.images, in_status_for_s=in_status_for_s)
        age_s = now - watch.begun_at
        if not isinstance(verdict, Running):
            if isinstance(verdict, Succeeded) and watch.fresh:
                self.durations[watch.tool].add(age_s)
            self._end(watch, task, verdict)
        elif in_status_for_s > stuck_after_s(task.status, self.durations[watch.tool].longest_s):
            reason = f"the task is stuck: it does not move on from {task.status or 'having no status'}"
            self._end(watch, task, Left(reason, is_stuck=True))
        if task.status == "task_postprocess_end":
            return 1.0  # only its outputs are missing
        return next_look_s(age_s, self.durations[watch.tool].typical_s)

    def _unknown(self, watch: _Watch) -> float:
        now = anyio.current_time()
        watch.unknown_since = watch.unknown_since if watch.unknown_since is not None else now
        if now - watch.unknown_since > UNKNOWN_PATIENCE_S:
            self._end(
                watch,
                None,
                Left(UNKNOWN_TASK),
            )
        return min(5.0, 0.5 + (now - watch.unknown_since) / 2)

    def _trouble(self, watch: _Watch, asked_s: float | None) -> float:
        watch.troubles += 1
        own_s = 0.5 + backoff_s(watch.troubles, base_s=0.5, cap_s=30.0, rng=self._rng)
        return own_s if asked_s is None else min(max(0.5, asked_s), MAX_ASKED_S)

    @staticmethod
    def _end(watch: _Watch, task: Task | None, verdict: Verdict | Left) -> None:
        watch.result = (task, verdict)
        watch.ended.set()
