"""Following tasks: one loop decides when to look at which task, and tells each waiter how its task ended.

Single looks (Detail) are the truth and are always planned for every task; where pages of the task list
(`sweep`) or the service's events (`hearing`) cover a task, they are merely far apart. Looks that fail say
nothing about the task: it is looked at again later, and never submitted anew.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Protocol

import anyio
import anyio.abc

from batchrun import errors
from batchrun.model import Task
from batchrun.rules import pages
from batchrun.rules.pace import ADVICE_S, QUEUED, Budget, Durations, advised_s, stuck_after_s
from batchrun.rules.pace import BUDGET_PER_S as BUDGET_PER_S
from batchrun.rules.policy import (
    LEAST_TRIES,
    MAX_ASKED_S,
    UNKNOWN_PATIENCE_S,
    Running,
    Succeeded,
    Verdict,
    backoff_s,
    judge,
)

#: Looks under way at once.
MAX_LOOKS = 32
#: A task that pages or events cover is looked at by itself all the same, this long after the last word of it.
RELAXED_S = 20.0
#: How often the prices of looks are adapted.
ADAPT_S = 0.5
#: A time the service tells may differ from ours by this much: the way to it and back.
CLOCK_SLACK_S = 0.25
#: Something else said that the task has ended, and its Detail does not show it yet: look again after this.
AGAIN_S = 0.3
#: Due at once, whatever the budget says.
_AT_ONCE = float("-inf")


class Looks(Protocol):
    """What following needs of the service's client."""

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        """The task as it stands; None when the service lists nothing for it (which may pass)."""
        ...


class Cover(Protocol):
    """Another way to hear of many tasks at once."""

    def covers(self, watch: Watch) -> bool:
        """Whether a change of this task is likely to be heard of without looking at it."""
        ...

    def begin(self, watch: Watch) -> None:
        """The task is followed from now on."""
        ...

    def end(self, watch: Watch) -> None:
        """The task is not followed any more."""
        ...

    async def run(self) -> None:
        """Work until cancelled."""
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
class Watch:
    """One task that is followed; instants are monotonic seconds."""

    task_id: str
    token: str = field(repr=False)
    tool: int
    images: int
    #: When the task was accepted, or was last seen waiting in the service's queue.
    begun_at: float
    followed_at: float
    #: When the newest answer that showed it was asked for; and the newest question under way.
    seen_at: float
    asked_at: float
    #: When it was first seen to run, where it was seen to queue before.
    ran_at: float | None = None
    #: When somebody first said that it has ended, and what is done then; and when the newest answer was asked
    #: for that shows otherwise.
    told_at: float | None = None
    on_told: Callable[[], None] = lambda: None
    refuted_at: float | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    result: Ended | None = None
    #: Followed since it was accepted, so that its age when seen ended tells its duration.
    fresh: bool = True
    failure: Exception | None = None
    status: str = ""
    status_since: float = 0.0
    #: Since when, and in how many looks in a row, the service did not know it.
    unknown_since: float | None = None
    unknown_looks: int = 0
    troubles: int = 0
    looks: int = 0
    #: The one entry of the agenda that counts.
    due_at: float = 0.0
    #: That entry stands whoever else covers the task.
    pressing: bool = False
    #: A look is under way; and another one fell due meanwhile.
    looking: bool = False
    again: bool = False

    @property
    def last_at(self) -> float:
        """When it was last asked for."""
        return max(self.asked_at, self.seen_at)

    @property
    def is_told(self) -> bool:
        """Whether it was said to have ended, and no answer shows otherwise."""
        return self.told_at is not None and self.refuted_at is None

    def over_s(self, seen_at: float) -> float:
        """How long the task has run at least, when it was seen unfinished then."""
        return max(0.0, seen_at - (self.ran_at or self.begun_at))


class Tracker:
    """Follows the active tasks of a run."""

    def __init__(
        self,
        looks: Looks,
        *,
        budget_per_s: float = BUDGET_PER_S,
        rng: Random | None = None,
    ) -> None:
        self.durations: defaultdict[int, Durations] = defaultdict(Durations)
        self.looks = 0
        #: The tasks followed now, by id.
        self.watches: dict[str, Watch] = {}
        self.budget = Budget(budget_per_s)
        self._client = looks
        self._covers: list[Cover] = []
        self._heap: list[tuple[float, int, Watch]] = []
        self._number = count()
        self._woken = anyio.Event()
        #: A wait that the service asked for holds for all looks.
        self._quiet_until = 0.0
        self._rng = rng or Random()

    def add(self, cover: Cover) -> None:
        """Hear of tasks in another way too. Before `run`."""
        self._covers.append(cover)

    async def follow(
        self,
        *,
        task_id: str,
        token: str,
        tool: int,
        images: int = 1,
        age_s: float = 0.0,
        at_once: bool = False,
        on_told: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Wait until the task has ended; returns it as last seen and what that means.

        `images` were asked for. `at_once`: the first look is not left to whoever covers the task. `on_told`:
        called where its end is told before a look confirms it.

        Raises CredentialsRefused when looking is refused for good.
        """
        now = anyio.current_time()
        watch = Watch(
            task_id,
            token,
            tool,
            images,
            begun_at=now - age_s,
            followed_at=now,
            seen_at=now,
            asked_at=now,
            status_since=now,
            on_told=on_told,
            fresh=age_s == 0,
        )
        self.watches[task_id] = watch
        for cover in self._covers:
            cover.begin(watch)
        wait_s = 0.0 if age_s > 0 else self.durations[tool].next_look_s(0.0)
        self.schedule(watch, now + wait_s, pressing=at_once)
        try:
            await watch.ended.wait()
        finally:
            watch.ended.set()  # a watch nobody waits for is dropped when its turn comes
            if self.watches.get(task_id) is watch:
                del self.watches[task_id]
            for cover in self._covers:
                cover.end(watch)
        if watch.failure is not None:
            raise watch.failure
        assert watch.result is not None
        return watch.result

    async def run(self) -> None:
        """Look at tasks when they are due, until cancelled."""
        turn = anyio.Lock(fast_acquire=True)
        async with anyio.create_task_group() as group:
            group.start_soon(self._adapt)
            for cover in self._covers:
                group.start_soon(cover.run)
            for _ in range(MAX_LOOKS):
                group.start_soon(self._look_on, turn)

    async def _look_on(self, turn: anyio.Lock) -> None:
        """Look at one task after the other; one waits for what is due while others look."""
        while True:
            async with turn:
                watch = await self._next_due()
            await self._look(watch)

    async def _next_due(self) -> Watch:
        """Wait until a task is due to be looked at."""
        while True:
            await self._until_due()
            due_at, _, watch = heapq.heappop(self._heap)
            if watch.ended.is_set() or due_at != watch.due_at:
                continue
            covered_until = watch.seen_at + RELAXED_S
            if not watch.pressing and self._is_covered(watch) and due_at < covered_until:
                self.schedule(watch, covered_until)
                continue
            watch.pressing = False
            if watch.looking:
                watch.again = True
                continue
            watch.looking = True
            self.budget.take(anyio.current_time())
            return watch

    def _is_covered(self, watch: Watch) -> bool:
        return any(cover.covers(watch) for cover in self._covers)

    async def _adapt(self) -> None:
        """Learn from tasks under way; keep looks as dear as the number of tasks that need them asks for."""
        while True:
            await anyio.sleep(ADAPT_S)
            unfinished_s: defaultdict[int, list[float]] = defaultdict(list)
            for watch in self.watches.values():
                if watch.fresh:
                    unfinished_s[watch.tool].append(watch.over_s(watch.seen_at))
            for tool, ages_s in unfinished_s.items():
                self.durations[tool].running(ages_s)
            active = Counter(watch.tool for watch in self.watches.values() if not self._is_covered(watch))
            for tool in active:
                self.durations[tool].adapt(active=active.total(), budget_per_s=self.budget.per_s)

    async def _until_due(self) -> None:
        while (due_at := self._due_at()) > anyio.current_time():
            self._woken = anyio.Event()
            with anyio.move_on_at(due_at):
                await self._woken.wait()

    def _due_at(self) -> float:
        if not self._heap:
            return float("inf")
        at = self._heap[0][0]
        if at == _AT_ONCE:
            return self._quiet_until
        now = anyio.current_time()
        return max(at, self._quiet_until, self.budget.ready_at(now) if at <= now else at)

    def schedule(self, watch: Watch, at: float, *, pressing: bool = False) -> None:
        """Look at the task then, and not when it was planned before."""
        watch.due_at, watch.pressing = at, pressing
        heapq.heappush(self._heap, (at, next(self._number), watch))
        if self._heap[0][2] is watch:
            self._woken.set()

    def look_at_once(self, watch: Watch) -> None:
        """Look at the task now: somebody says that it has ended, or that it is worth it."""
        if not watch.ended.is_set() and watch.due_at != _AT_ONCE:
            self.schedule(watch, _AT_ONCE, pressing=True)

    def told_ended(self, watch: Watch, *, is_believed: bool = True) -> None:
        """Somebody says that the task has ended; a look confirms it, a page where tasks are many.

        It counts once for each task; who says so again and again causes a look now and then.
        """
        now = anyio.current_time()
        if watch.ended.is_set():
            return
        if watch.told_at is not None:
            if now - max(watch.told_at, watch.last_at) >= ADVICE_S:
                self.look_at_once(watch)
            return
        watch.told_at = now
        if is_believed:
            watch.on_told()
        if len(self.watches) < pages.FROM or not self._is_covered(watch):
            self.look_at_once(watch)

    def look_as_planned(self, watch: Watch) -> None:
        """Nobody covers the task any more: look at it as if nobody ever had."""
        if not watch.ended.is_set() and not watch.pressing:
            due_at = watch.seen_at + self._wait_s(watch, watch.seen_at)
            self.schedule(watch, max(due_at, anyio.current_time()))

    def keep_quiet(self, seconds: float) -> None:
        """The service asked for a wait, which holds for all questions."""
        self._quiet_until = max(self._quiet_until, anyio.current_time() + min(seconds, MAX_ASKED_S))

    @property
    def is_quiet(self) -> bool:
        """Whether the service asked for a wait that is not over."""
        return anyio.current_time() < self._quiet_until

    async def _look(self, watch: Watch) -> None:
        try:
            self.looks += 1
            watch.looks += 1
            asked_at = watch.asked_at = anyio.current_time()
            task = await self._client.detail(watch.task_id, watch.token)
            if watch.ended.is_set():
                return
            wait_s = self._unknown(watch) if task is None else self._seen(watch, task, asked_at=asked_at)
        except errors.CredentialsRefused as error:
            watch.failure = error
            watch.ended.set()
            return
        except errors.NotFound:
            wait_s = self._unknown(watch)
        except errors.RateLimited as error:
            wait_s = self._trouble(watch, error.retry_after_s)
            self.keep_quiet(wait_s)
        except errors.ServiceError as error:
            wait_s = self._trouble(watch, getattr(error, "retry_after_s", None))
        finally:
            watch.looking = False
        if not watch.ended.is_set():
            pressing = watch.again or watch.status in _ENDING
            if watch.again:
                watch.again, wait_s = False, min(wait_s, AGAIN_S)
            self.schedule(watch, anyio.current_time() + wait_s, pressing=pressing)

    def listed(self, watch: Watch, task: Task, *, asked_at: float) -> None:
        """Take in what a page of the list showed; any end but one with all images is confirmed by a look."""
        if watch.ended.is_set() or asked_at < watch.seen_at:
            return
        was_told = watch.is_told
        verdict = self._take_in(watch, task, asked_at=asked_at)
        if isinstance(verdict, Succeeded):
            self._end(watch, task, verdict)
        elif was_told and not watch.is_told:
            self.look_at_once(watch)  # the list may lag
        elif not watch.pressing and (task.status in _ENDING or not isinstance(verdict, Running)):
            wait_s = self._until_next_s(watch)
            if task.status in _ENDING:
                wait_s = min(wait_s, AGAIN_S)
            self.schedule(watch, anyio.current_time() + wait_s, pressing=True)

    def _seen(self, watch: Watch, task: Task, *, asked_at: float) -> float:
        """Take in what a look showed; returns the seconds until the next one."""
        verdict = self._take_in(watch, task, asked_at=asked_at)
        if not isinstance(verdict, Running):
            self._end(watch, task, verdict)
        return self._until_next_s(watch)

    def _take_in(self, watch: Watch, task: Task, *, asked_at: float) -> Verdict | Left:
        """Note what an answer shows of a task; returns what that means."""
        now = anyio.current_time()
        watch.troubles, watch.unknown_since, watch.unknown_looks = 0, None, 0
        last_seen_at, watch.seen_at = watch.seen_at, asked_at
        if task.status != watch.status:
            watch.status, watch.status_since = task.status, now
        # up to the question, not the answer: the machine may have slept before it could read that
        in_status_for_s = max(0.0, asked_at - watch.status_since)
        verdict: Verdict | Left = judge(task, images=watch.images, in_status_for_s=in_status_for_s)
        if isinstance(verdict, Succeeded) and watch.fresh:
            self._learn(watch, task, over_at=last_seen_at, by_at=now)
        if isinstance(verdict, Running) and in_status_for_s > stuck_after_s(
            task.status, self.durations[watch.tool].longest_s
        ):
            reason = f"the task is stuck: it does not move on from {task.status or 'having no status'}"
            verdict = Left(reason, is_stuck=True)
        is_over = task.status in _ENDING or not isinstance(verdict, Running)
        if watch.told_at is not None and asked_at >= watch.told_at and not is_over:
            watch.refuted_at = asked_at
        if task.status in QUEUED:
            watch.begun_at = max(watch.begun_at, asked_at)  # its time has not begun to run
        elif watch.ran_at is None and watch.begun_at > watch.followed_at:
            watch.ran_at = now
        return verdict

    def _until_next_s(self, watch: Watch) -> float:
        """Seconds until the next look at a task that was just seen."""
        if watch.status in _ENDING:
            return 1.0  # only its outputs are missing
        return self._wait_s(watch, anyio.current_time())

    def _wait_s(self, watch: Watch, now: float) -> float:
        """Seconds until the task's next look, if nobody covers it."""
        planned_s = self.durations[watch.tool].next_look_s(now - watch.begun_at)
        return max(planned_s, advised_s(watch.looks, followed_s=now - watch.followed_at))

    def _learn(self, watch: Watch, task: Task, *, over_at: float, by_at: float) -> None:
        """Remember how long the task took: as the service tells, where our looks do not say otherwise."""
        over_s = watch.over_s(over_at)
        by_s = max(over_s, by_at - watch.begun_at)
        told_s = float(task.elapsed_s) if task.elapsed_s else -1.0
        if over_s - CLOCK_SLACK_S <= told_s <= by_s + CLOCK_SLACK_S:
            over_s = by_s = min(max(told_s, over_s), by_s)
        self.durations[watch.tool].add(by_s, over_s=over_s)

    def _unknown(self, watch: Watch) -> float:
        now = anyio.current_time()
        watch.unknown_since = watch.unknown_since if watch.unknown_since is not None else now
        watch.unknown_looks += 1
        if now - watch.unknown_since > UNKNOWN_PATIENCE_S and watch.unknown_looks >= LEAST_TRIES:
            self._end(watch, None, Left(UNKNOWN_TASK))
        return min(5.0, 0.5 + (now - watch.unknown_since) / 2)

    def _trouble(self, watch: Watch, asked_s: float | None) -> float:
        watch.troubles += 1
        own_s = 0.5 + backoff_s(watch.troubles, base_s=0.5, cap_s=30.0, rng=self._rng)
        return own_s if asked_s is None else min(max(0.5, asked_s), MAX_ASKED_S)

    @staticmethod
    def _end(watch: Watch, task: Task | None, verdict: Verdict | Left) -> None:
        watch.result = (task, verdict)
        watch.ended.set()


#: After these only outputs or a confirmation are missing.
_ENDING = frozenset({"task_postprocess_end", "task_cancel"})
