"""Following many tasks by pages of the task list, each a request that shows up to a hundred of them.

Which page is worth asking for is `rules.pages`; here is where our tasks stand in the list, an estimate that
every page corrects, and what is done where the list is missing, failing or does not show our tasks: single
looks take over, which is said once, and the list is tried again later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import anyio
import anyio.abc

from batchrun import errors
from batchrun.dispatch.track import Tracker, Watch
from batchrun.model import Task
from batchrun.rules import pages
from batchrun.rules.pace import Spread, advised_s
from batchrun.rules.pages import FROM, Page

#: Pages under way at once.
MAX_PAGES = 8
#: A list that fails, or shows none of our tasks, so often in a row is of no use.
LEAST_FAILURES = 3
#: New tasks may be listed so much later: where there are few, all may be new.
LISTED_S = 10.0
#: It is then tried again after this long, and ever later up to a bound.
AGAIN_S, MOST_AGAIN_S = 60.0, 3600.0
#: A task that pages did not show so often is looked at by itself.
LEAST_MISSES = 2


class Lists(Protocol):
    """What sweeps need of the service's client."""

    async def list_tasks(self, start: int = 0, limit: int = 100) -> list[Task]:
        """The project's tasks, newest first, from the `start`-th."""
        ...


@dataclass(slots=True, eq=False)
class _Entry:
    """A followed task and where it stands in the list."""

    watch: Watch
    number: int
    #: Its place when it was last known, from 0, and how many tasks we had submitted then.
    place: int
    submitted: int
    #: How many we had submitted with this one.
    ordinal: int
    misses: int = 0
    #: A page has shown it.
    shown: bool = False


def nobody_tells(_: Watch) -> float:
    """How likely a task's end is not told where nothing is heard of any."""
    return 1.0


class Sweeps:
    """Covers tasks by pages of the list; see `track.Cover`."""

    def __init__(
        self,
        tracker: Tracker,
        lists: Lists,
        *,
        least: int = FROM,
        hurried: Callable[[], bool] = lambda: False,
        untold: Callable[[Watch], float] = nobody_tells,
        note: Callable[[str], None],
    ) -> None:
        """`least`: so many active tasks make pages worth while; one does where rows wait (`hurried`).

        `untold`: how likely a task's end is told by nobody else.
        """
        self.pages = 0
        self._tracker = tracker
        self._lists = lists
        self._least = least
        self._hurried = hurried
        self._untold = untold
        self._note = note
        self._entries: dict[Watch, _Entry] = {}
        self._submitted = 0
        #: Places in the list for each task of ours: more than one where others submit too.
        self._crowd = 1.0
        self._is_on = False
        self._under_way = 0
        self._failures = 0
        #: When pages were begun, or one last showed a task of ours.
        self._shown_at = 0.0
        self._off_until = 0.0
        self._off_s = AGAIN_S
        self._told = False

    # --- as a cover of the tracker -----------------------------------------------------------------------

    def covers(self, watch: Watch) -> bool:
        """Whether pages are read and show this task, or are sure to where tasks are many."""
        entry = self._entries.get(watch)
        if not self._is_on or entry is None or entry.misses >= LEAST_MISSES:
            return False
        return entry.shown or len(self._entries) >= self._least

    def begin(self, watch: Watch) -> None:
        """The task is followed from now on."""
        if watch.task_id.isdecimal():
            self._submitted += watch.fresh
            self._entries[watch] = _Entry(
                watch, int(watch.task_id), place=0, submitted=self._submitted, ordinal=self._submitted
            )

    def end(self, watch: Watch) -> None:
        """The task is not followed any more."""
        self._entries.pop(watch, None)

    async def run(self) -> None:
        """Read pages while they are worth it, until cancelled."""
        allowance, before, wait_s = 0.0, anyio.current_time(), pages.TICK_S
        async with anyio.create_task_group() as group:
            while True:
                await anyio.sleep(wait_s)
                now, is_hurried = anyio.current_time(), self._hurried()
                self._turn(now, 1 if is_hurried else self._least)
                if not self._is_on:
                    before, wait_s = now, pages.TICK_S
                    continue
                rate, wait_s = self._pace(is_hurried=is_hurried)
                allowance = min(max(1.0, rate * 2 * pages.TICK_S), allowance + rate * max(0.0, now - before))
                before = now
                allowance -= self._ask(group, int(allowance), now, is_hurried=is_hurried)

    def _turn(self, now: float, least: int) -> None:
        """Begin to read pages when tasks are many, and cease when none is left."""
        active = len(self._entries)
        if not self._is_on:
            self._is_on = active >= least and now >= self._off_until
            self._shown_at = now
        elif not active:
            self._is_on = False

    def _cease(self) -> None:
        self._is_on = False
        for entry in self._entries.values():
            self._tracker.look_as_planned(entry.watch)

    def _pace(self, *, is_hurried: bool) -> tuple[float, float]:
        """Requests per second that pages may take, and after how long to ask again what one is worth."""
        active, budget_per_s = len(self._entries), self._tracker.budget.per_s
        alive_s = self._mean(lambda spread: spread.mean_s)
        usual_per_s = pages.requests_per_s(active, alive_s=alive_s, budget_per_s=budget_per_s)
        if not is_hurried:
            return usual_per_s, pages.TICK_S
        # by the median: while little is known of a tool, what might take hours rules a mean
        typical_s = self._mean(lambda spread: spread.quantile_s(0.5))
        per_s = pages.hurried_requests_per_s(active, typical_s=typical_s, budget_per_s=budget_per_s)
        return max(usual_per_s, per_s), pages.tick_s(active, typical_s=typical_s)

    def _mean(self, seconds_of: Callable[[Spread], float]) -> float:
        """On average over the tasks that are active."""
        tools = [entry.watch.tool for entry in self._entries.values()]
        return sum(seconds_of(self._tracker.durations[tool].spread) for tool in tools) / len(tools)

    # --- asking --------------------------------------------------------------------------------------------

    def _ask(self, group: anyio.abc.TaskGroup, most: int, now: float, *, is_hurried: bool) -> int:
        """Send the requests that are worth most, up to `most`; returns how many went out."""
        if most < 1 or self._tracker.is_quiet:
            return 0
        entries = [entry for entry in self._entries.values() if not entry.watch.pressing]
        entries.sort(key=lambda entry: -entry.number)
        places = self._places(entries)
        waited = [self._waited_s(entry.watch, now) for entry in entries]
        ended = [self._ended(entry.watch, now) for entry in entries] if is_hurried else []
        for sent in range(most):
            if self._under_way >= MAX_PAGES or self._tracker.budget.ready_at(now) > now:
                return sent
            choice = pages.best(places, waited, ended)
            if choice is None:
                return sent
            page = pages.page_of(places, choice, choice) if isinstance(choice, int) else choice
            meant = slice(page.first, page.last + 1)
            for entry in entries[meant]:
                entry.watch.asked_at = now
            for worth in (waited, ended):
                worth[meant] = [0.0 for _ in worth[meant]]
            watch = entries[page.first].watch
            if isinstance(choice, int) and not advised_s(watch.looks, followed_s=now - watch.followed_at):
                self._tracker.look_at_once(watch)
                continue  # else it has had all the looks that are advised
            self._tracker.budget.take(now)
            self._under_way += 1
            group.start_soon(self._read, page, entries[meant], self._submitted)
        return most

    def _places(self, entries: list[_Entry]) -> list[int]:
        """Where tasks, the newest first, stand by now: what was submitted since has pushed them down."""
        places, least = [], 0
        for entry in entries:
            pushed = round(self._crowd * (self._submitted - entry.submitted))
            least = max(least, entry.place + pushed)
            places.append(least)
            least += 1
        return places

    def _waited_s(self, watch: Watch, now: float) -> float:
        """For how long the task is expected to be over without our knowing what it brought."""
        if watch.is_told:
            return now - max(watch.told_at or 0.0, watch.asked_at)
        spread = self._tracker.durations[watch.tool].spread
        waited_s = spread.waited_s(watch.last_at - watch.begun_at, now - watch.begun_at)
        return waited_s * self._untold(watch)

    def _ended(self, watch: Watch, now: float) -> float:
        """How likely it is over without our knowing, so that its slot is held in vain."""
        if watch.is_told:
            return 0.0
        spread = self._tracker.durations[watch.tool].spread
        ended = spread.ended_since(watch.last_at - watch.begun_at, now - watch.begun_at)
        return ended * self._untold(watch)

    async def _read(self, page: Page, meant: list[_Entry], submitted: int) -> None:
        asked_at = anyio.current_time()
        try:
            self.pages += 1
            tasks = await self._lists.list_tasks(page.start, page.limit)
        except errors.RateLimited as error:
            self._tracker.keep_quiet(error.retry_after_s or 1.0)
            self._failed(meant, "the service asks to slow down")
        except (errors.NotFound, errors.CredentialsRefused, errors.RequestRejected) as error:
            self._failed(meant, str(error), is_final=True)
        except errors.ServiceError as error:
            self._failed(meant, str(error))
        else:
            self._take(page, tasks, meant, asked_at=asked_at, submitted=submitted)
        finally:
            self._under_way -= 1

    # --- answers --------------------------------------------------------------------------------------------

    def _take(
        self, page: Page, tasks: list[Task], meant: list[_Entry], *, asked_at: float, submitted: int
    ) -> None:
        shown: list[_Entry] = []
        for at, task in enumerate(tasks):
            watch = self._tracker.watches.get(task.id)
            entry = self._entries.get(watch) if watch is not None else None
            if entry is None:
                continue
            shown.append(entry)
            entry.place, entry.submitted, entry.misses = page.start + at, submitted, 0
            entry.shown = True
            self._tracker.listed(entry.watch, task, asked_at=asked_at)
        fresh = [entry for entry in shown if entry.watch.fresh]
        if fresh and (between := fresh[0].ordinal - fresh[-1].ordinal) > 0:
            self._crowd = max(1.0, (fresh[-1].place - fresh[0].place) / between)
        absent = [entry for entry in meant if entry.watch.seen_at < asked_at and entry.watch in self._entries]
        missed = [entry for entry in absent if not self._moved(entry, page, tasks, submitted)]
        for entry in missed:
            entry.misses += 1
            if entry.misses == LEAST_MISSES:
                self._tracker.look_as_planned(entry.watch)
        if shown:
            self._failures, self._off_s, self._shown_at = 0, AGAIN_S, asked_at
        elif missed and (len(self._entries) >= self._least or asked_at - self._shown_at >= LISTED_S):
            self._failed(missed, "it does not show the run's tasks")

    def _moved(self, entry: _Entry, page: Page, tasks: list[Task], submitted: int) -> bool:
        """Whether the task may stand before or after the page; its estimated place then moves there."""
        numbers = [int(task.id) for task in (tasks[:1] + tasks[-1:])]
        if numbers and entry.number < numbers[1] and len(tasks) >= page.limit:
            entry.place = page.start + len(tasks)
        elif numbers and entry.number > numbers[0] and page.start > 0:
            entry.place = max(0, page.start - pages.PAGE // 2)
        elif not numbers and page.start > 0:
            entry.place = 0
        else:
            return False
        entry.submitted = submitted
        return True

    def _failed(self, meant: list[_Entry], reason: str, *, is_final: bool = False) -> None:
        for entry in meant:
            entry.watch.asked_at = entry.watch.seen_at  # as if nobody had asked
        self._failures += 1
        if not self._is_on or (self._failures < LEAST_FAILURES and not is_final):
            return
        self._off_until = anyio.current_time() + self._off_s
        self._off_s = min(MOST_AGAIN_S, 2 * self._off_s)
        self._failures = 0
        if not self._told:
            self._told = True
            self._note(f"tasks are looked at one by one, since the service's list is of no use: {reason}")
        self._cease()
