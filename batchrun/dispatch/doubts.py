"""Settling doubtful submits through Task/List: one reading of the listing serves all doubts at hand.

The decision is `rules.recovery.settle_doubt`; here the listing is read, far enough back for the oldest
doubt, and read again until each doubt is settled or cannot be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

import anyio
import anyio.lowlevel

from batchrun import errors
from batchrun.dispatch.backwards import Backwards
from batchrun.model import Task
from batchrun.rules.pages import PAGE
from batchrun.rules.recovery import (
    GRACE_S,
    LISTING_PATIENCE_S,
    Absent,
    Adopt,
    Doubt,
    Hold,
    Listing,
    LookAgain,
    settle_doubt,
    task_number,
)

#: The listing is read back this many pages at most: a night's tasks.
MAX_PAGES = 500
#: Doubts held against a listing before others on the event loop get their turn.
AT_ONCE = 50
#: Between two readings of the listing.
BETWEEN_S = 2.0
#: Before a page that failed is asked for again.
AGAIN_S = (0.2, 0.5, 1.0)


class Listings(Protocol):
    """What settling needs of the service's client."""

    async def list_tasks(self, *, start: int = 0, limit: int = PAGE) -> list[Task]:
        """The project's tasks, newest first."""
        ...


@dataclass(slots=True, eq=False)
class _Case:
    doubt: Doubt
    lost_at: float
    #: Told whether a submit of the same request is under way: its task may not be recorded yet.
    busy: Callable[[], bool]
    settled: anyio.Event = field(default_factory=anyio.Event)
    answer: Adopt | Absent | Hold | errors.CredentialsRefused | None = None
    #: The newest task that was known while the lost one may have been on its way; 0: none was.
    newest_known: int = 0
    #: When the first correct reading was begun that could already show the task; None: none yet.
    correct_at: float | None = None


class Doubts:
    """Settles the doubtful submits of a run."""

    def __init__(
        self,
        listings: Listings,
        known_tasks: Callable[[Collection[str]], Awaitable[Mapping[str, int | None]]],
        known_task: Callable[[], Awaitable[str | None]],
        is_true_echo: Callable[[Task], Awaitable[bool]],
        newest_known: Callable[[], int | None],
    ) -> None:
        """`known_tasks` tells which of some ids this run knows, each with its tool's number in the run.

        `known_task` tells one of all it knows, `is_true_echo` whether a known task shows what its
        row asked for, `newest_known` the number of the newest task of the account that is known.
        """
        self._client = listings
        self._known_tasks = known_tasks
        self._known_task = known_task
        self._is_true_echo = is_true_echo
        self._newest_known = newest_known
        self._cases: list[_Case] = []
        self._woken = anyio.Event()
        self._failing_since: float | None = None
        #: The service's ids of the run's tools, as tasks of ours show them.
        self._models: defaultdict[int, set[str]] = defaultdict(set)

    async def settle(
        self, doubt: Doubt, *, lost_at: float, busy: Callable[[], bool]
    ) -> Adopt | Absent | Hold:
        """Find out about a submit whose POST can last have been running at `lost_at` (monotonic s).

        `busy` tells whether a submit of the same request is under way: its task may not be recorded yet.
        Raises CredentialsRefused when the service refuses to list.
        """
        case = _Case(doubt, lost_at, busy)
        self._cases.append(case)
        self._woken.set()
        try:
            await case.settled.wait()
        finally:
            if case in self._cases:
                self._cases.remove(case)
        assert case.answer is not None
        if isinstance(case.answer, errors.CredentialsRefused):
            raise case.answer
        return case.answer

    async def newest_task(self) -> int | None:
        """The newest task id the service lists, 0 when it lists none; None when it cannot be told.

        Raises CredentialsRefused, and NotSent when nobody was there to be asked.
        """
        try:
            tasks = await self._client.list_tasks(start=0, limit=1)
        except (errors.CredentialsRefused, errors.NotSent):
            raise
        except errors.ServiceError:
            return None
        numbers = [task_number(task.id) for task in tasks]
        if not tasks:
            return 0
        return max((number for number in numbers if number is not None), default=None)

    async def run(self) -> None:
        """Read the listing while there are doubts, until cancelled."""
        while True:
            if not self._cases:
                self._failing_since = None
                self._woken = anyio.Event()
                await self._woken.wait()
            await anyio.sleep(await self._round(list(self._cases)))

    async def _round(self, cases: list[_Case]) -> float:
        """One reading of the listing, held against every case; returns the seconds until the next."""
        begun_at = anyio.current_time()
        wait_s = BETWEEN_S
        try:
            async with aclosing(self._read(cases, begun_at)) as readings:
                async for listing, told in readings:
                    wait_s = min(wait_s, await self._weigh(listing, told))
        except errors.CredentialsRefused as error:
            for case in cases:
                self._answer(case, error)
            return BETWEEN_S
        except errors.ServiceError as error:
            self._unreadable(cases, begun_at, error)
            asked_s = getattr(error, "retry_after_s", None) or 0.0
            return min(max(BETWEEN_S, asked_s), LISTING_PATIENCE_S)
        self._failing_since = None
        return wait_s

    async def _weigh(self, listing: Listing, cases: list[_Case]) -> float:
        """Hold a listing against cases; returns the seconds until another one is worth it."""
        wait_s = BETWEEN_S
        is_true: bool | None = None  # asked for only where a task would be concluded to be absent
        for number, case in enumerate(cases):
            if number % AT_ONCE == AT_ONCE - 1:
                await anyio.lowlevel.checkpoint()
            answer = settle_doubt(
                self._with_model(case.doubt),
                listing,
                lost_at=case.lost_at,
                newest_known=case.newest_known,
                earlier_at=case.correct_at,
            )
            if isinstance(answer, Absent):
                is_true = await self._echoes(listing) if is_true is None else is_true
                if not is_true:
                    answer = Hold("the service does not echo the parameters of tasks as they were sent")
            if case.correct_at is None and listing.begun_at >= case.lost_at + GRACE_S:
                case.correct_at = listing.begun_at
            if isinstance(answer, LookAgain):
                wait_s = min(wait_s, answer.after_s)
            elif case.busy():
                continue  # a task seen now may belong to the submit under way
            elif isinstance(answer, Hold) and listing.begun_at - case.lost_at < LISTING_PATIENCE_S:
                continue  # tasks of submits under way are recorded soon, and then compare no more
            else:
                if isinstance(answer, Adopt):
                    listing.claimed.add(answer.task.id)
                self._answer(case, answer)
        return wait_s

    async def _read(
        self, cases: list[_Case], begun_at: float
    ) -> AsyncGenerator[tuple[Listing, list[_Case]], None]:
        """The listing as it grows, each time with the cases that it reaches back far enough for.

        It is read back to before the oldest doubt, and on to a task of ours where absence may be concluded.
        New doubts need not wait for that: they are told of on the way, and all that are left at the end.
        """
        listed = Backwards(self._page)
        reached: list[_Case] = []
        ahead, next_at = list(cases), 1
        ours_expected = await self._known_task() is not None
        for case in cases:
            if begun_at < case.lost_at + GRACE_S or not case.newest_known:
                case.newest_known = self._newest_known() or 0
        to_ours = ours_expected and any(begun_at >= case.lost_at + GRACE_S for case in cases)
        for number in range(1, MAX_PAGES + 1):
            found = await listed.more()
            if found is None:
                break
            page = Listing(found, begun_at, False, set())
            ahead, before = [], ahead
            for case in before:
                (reached if page.reaches(case.doubt) else ahead).append(case)
            if not ahead and not (to_ours and not await self._known_tasks(list(listed.tasks))):
                break
            if reached and number >= next_at:
                yield await self._listing(listed.tasks, begun_at, False, ours_expected), reached
                reached, next_at = [], 2 * number
        left = [case for case in cases if not case.settled.is_set()]
        yield await self._listing(listed.tasks, begun_at, listed.is_at_end, ours_expected), left

    async def _listing(
        self, tasks: Mapping[str, Task], begun_at: float, to_the_end: bool, ours_expected: bool
    ) -> Listing:
        claimed = await self._known_tasks(list(tasks))
        for task_id, tool in claimed.items():
            if tool is not None and tasks[task_id].model_id:
                self._models[tool].add(tasks[task_id].model_id)
        return Listing(list(tasks.values()), begun_at, to_the_end, set(claimed), ours_expected)

    async def _page(self, start: int) -> list[Task]:
        """A page of the listing; of a deep reading's many pages no single one should break it off."""
        for again_s in AGAIN_S if start else ():
            try:
                return await self._client.list_tasks(start=start, limit=PAGE)
            except (errors.CredentialsRefused, errors.NotFound):
                raise
            except errors.ServiceError as error:
                asked_s = getattr(error, "retry_after_s", None) or 0.0
                if asked_s > BETWEEN_S:
                    raise
                await anyio.sleep(max(again_s, asked_s))
        return await self._client.list_tasks(start=start, limit=PAGE)

    async def _echoes(self, listing: Listing) -> bool:
        """Whether the newest task of ours shows what was sent: else no task's parameters prove anything."""
        ours = next((task for task in listing.tasks if task.id in listing.claimed), None)
        return ours is None or await self._is_true_echo(ours)

    def _with_model(self, doubt: Doubt) -> Doubt:
        """The doubt with the service's id of its tool, where that is known for certain."""
        models = self._models[doubt.tool]
        return replace(doubt, model_id=next(iter(models))) if len(models) == 1 else doubt

    def _unreadable(self, cases: list[_Case], now: float, error: errors.ServiceError) -> None:
        self._failing_since = now if self._failing_since is None else self._failing_since
        missing = isinstance(error, errors.NotFound)
        patience_s = BETWEEN_S if missing else LISTING_PATIENCE_S
        if now - self._failing_since < patience_s:
            return
        for case in cases:
            if now - case.lost_at >= patience_s:
                self._answer(case, Hold(f"the service's task list cannot be read: {error}"))

    def _answer(self, case: _Case, answer: Adopt | Absent | Hold | errors.CredentialsRefused) -> None:
        if case.settled.is_set():  # by an earlier part of the reading
            return
        case.answer = answer
        case.settled.set()
        if case in self._cases:
            self._cases.remove(case)
