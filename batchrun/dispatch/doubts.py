"""Settling doubtful submits through Task/List: one reading of the listing serves all doubts at hand.

The decision is `rules.recovery.settle_doubt`; here the listing is read, far enough back for the oldest
doubt, and read again until each doubt is settled or cannot be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from batchrun import errors
from batchrun.model import Task
from batchrun.rules.recovery import (
    LISTING_PATIENCE_S,
    Absent,
    Adopt,
    Doubt,
    Hold,
    Listing,
    LookAgain,
    is_older,
    settle_doubt,
)

PAGE = 100
#: The listing is read back this many pages at most.
MAX_PAGES = 50
#: Between two readings of the listing.
BETWEEN_S = 2.0


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
    answer: Adopt | Absent | Hold | None = None


class Doubts:
    """Settles the doubtful submits of a run."""

    def __init__(
        self, listings: Listings, known_tasks: Callable[[Collection[str]], Awaitable[set[str]]]
    ) -> None:
        self._client = listings
        self._known_tasks = known_tasks
        self._cases: list[_Case] = []
        self._woken = anyio.Event()
        self._correct_at: float | None = None
        self._failing_since: float | None = None

    async def settle(
        self, doubt: Doubt, *, lost_at: float, busy: Callable[[], bool]
    ) -> Adopt | Absent | Hold:
        """Find out what became of a submit whose POST can last have been running at `lost_at` (monotonic s)."""
        case = _Case(doubt, lost_at, busy)
        self._cases.append(case)
        self._woken.set()
        try:
            await case.settled.wait()
        finally:
            if case in self._cases:
                self._cases.remove(case)
        assert case.answer is not None
        return case.answer

    async def newest_task(self) -> int | None:
        """The newest task id the service lists; None when it lists none, or cannot."""
        try:
            tasks = await self._client.list_tasks(start=0, limit=1)
        except errors.CredentialsRefused:
            raise
        except errors.ServiceError:
            return None
        return max((int(task.id) for task in tasks if task.id.isdecimal()), default=None)

    async def run(self) -> None:
        """Read the listing while there are doubts, until cancelled."""
        while True:
            if not self._cases:
                self._woken = anyio.Event()
                await self._woken.wait()
            wait_s = await self._round(list(self._cases))
            await anyio.sleep(min(wait_s, BETWEEN_S))

    async def _round(self, cases: list[_Case]) -> float:
        """One reading of the listing, held against every case; returns the seconds until the next."""
        begun_at = anyio.current_time()
        try:
            listing = await self._read(cases, begun_at)
        except errors.CredentialsRefused:
            raise
        except errors.ServiceError as error:
            self._unreadable(cases, begun_at, error)
            return BETWEEN_S
        self._failing_since = None
        wait_s = BETWEEN_S
        claimed = set(listing.claimed)
        for case in cases:
            current = Listing(listing.tasks, begun_at, listing.to_the_end, claimed, self._correct_at)
            answer = settle_doubt(case.doubt, current, lost_at=case.lost_at)
            if isinstance(answer, LookAgain):
                wait_s = min(wait_s, answer.after_s)
            elif case.busy():
                continue  # a task seen now may belong to the submit under way
            elif isinstance(answer, Hold) and begun_at - case.lost_at < LISTING_PATIENCE_S:
                continue  # tasks of submits under way are recorded soon, and then compare no more
            else:
                if isinstance(answer, Adopt):
                    claimed.add(answer.task.id)
                self._answer(case, answer)
        if self._correct_at is None:
            self._correct_at = begun_at
        return wait_s

    async def _read(self, cases: list[_Case], begun_at: float) -> Listing:
        tasks: dict[str, Task] = {}
        to_the_end = False
        for page in range(MAX_PAGES):
            found = await self._client.list_tasks(start=page * PAGE, limit=PAGE)
            tasks |= {task.id: task for task in found if task.id not in tasks}
            if len(found) < PAGE:
                to_the_end = True
                break
            if all(any(is_older(case.doubt, task) for task in found) for case in cases):
                break
        claimed = await self._known_tasks(list(tasks))
        return Listing(list(tasks.values()), begun_at, to_the_end, claimed, self._correct_at)

    def _unreadable(self, cases: list[_Case], now: float, error: errors.ServiceError) -> None:
        self._failing_since = now if self._failing_since is None else self._failing_since
        missing = isinstance(error, errors.NotFound)
        patience_s = BETWEEN_S if missing else LISTING_PATIENCE_S
        if now - self._failing_since < patience_s:
            return
        for case in cases:
            if now - case.lost_at >= patience_s:
                self._answer(case, Hold(f"the service's task list cannot be read: {error}"))

    def _answer(self, case: _Case, answer: Adopt | Absent | Hold) -> None:
        case.answer = answer
        case.settled.set()
        if case in self._cases:
            self._cases.remove(case)
