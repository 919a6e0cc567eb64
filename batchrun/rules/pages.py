"""Which page of the service's task list is worth asking for next. Pure.

A page shows up to a hundred tasks for the price of one request. Like a single look it pays when the tasks it
shows have been over for long, all of their expected waiting together; so pages go where tasks are many or
likely to have ended, and the few old ones far down the list are left to single looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchrun.rules.pace import ADVICE_S, FEW, NEEDED

#: From so many active tasks on pages are cheaper than single looks; once read, they go on to the last task.
FROM = 20
#: What one request lists at most (wiro-api.md, Tracking).
PAGE = 100
#: Places are estimates: tasks of others push ours down the list, answers cross on the way.
MARGIN = 6
#: What a page is worth, in seconds of waiting of all its tasks together: so much, and for each task shown.
PAGE_PRICE_S, SHOWN_PRICE_S = 0.02, 0.001
#: What up to twice FEW tasks may take, in requests per second; where tasks are more, it falls. It is seldom
#: used up, since a page must be worth its price as well; with half of it, a run whose tasks take a second
#: ended 0.05 s later.
FEW_PER_S = 16.0
#: Where rows wait for a slot, an end that nobody has seen holds one up: a page is due once so many tasks are
#: likely to have ended, and sooner with fewer active tasks than the second number. With 5 slots and tasks of
#: 6 to 20 s the slots are full for 96% of the time then, not 93% (in virtual time).
HURRIED_ENDS, HURRIED_TASKS = 0.5, 8
#: How often it is asked what a page is worth, and at most where rows wait for a slot, in seconds.
TICK_S, LEAST_TICK_S = 0.05, 0.01
#: A page is more work than a look at one task, for both sides: by this much it must be worth more.
PAGE_WORK = 1.5


@dataclass(frozen=True, slots=True)
class Page:
    """Tasks to be asked for: places in the list from 0, the newest, and which of our tasks these are."""

    start: int
    limit: int
    #: The first and last index of the tasks meant.
    first: int
    last: int


def best(places: Sequence[int], waited_s: Sequence[float], ended: Sequence[float] = ()) -> Page | int | None:
    """The request worth most: a page, or the index of one task to be looked at alone; None: none is yet.

    `places`: of our tasks in the list, ascending. `waited_s`: for how long each is expected to be over by now
    without our knowing. `ended`: where rows wait for one to end, how likely each is to be over.
    """
    if not places:
        return None
    single = max(range(len(places)), key=waited_s.__getitem__)
    total = most = 0.0
    first, chosen = 0, (0, 0)
    for last, place in enumerate(places):
        total += waited_s[last]
        while place - places[first] > PAGE - 1 - 2 * MARGIN:
            total -= waited_s[first]
            first += 1
        if total > most:
            most, chosen = total, (first, last)
    page = page_of(places, *chosen)
    price_s = PAGE_PRICE_S + SHOWN_PRICE_S * page.limit
    is_worth_it = most >= price_s * min(1.0, len(places) / FEW)  # the last tasks of a run hold up its end
    is_due = bool(ended) and sum(ended) >= HURRIED_ENDS * min(1.0, len(places) / HURRIED_TASKS)
    if not (is_worth_it or is_due):
        return None
    return single if waited_s[single] * PAGE_WORK > most else page


def page_of(places: Sequence[int], first: int, last: int) -> Page:
    """The page that shows these of our tasks, which lie close enough together; `places`: see `best`."""
    start = max(0, places[first] - MARGIN)
    return Page(start, min(PAGE, places[last] - start + 1 + MARGIN), first, last)


def due_s(active: int, *, typical_s: float) -> float:
    """Seconds from page to page where rows wait for one of so many tasks; `typical_s`: their median."""
    return min(ADVICE_S, HURRIED_ENDS * max(typical_s, 0.1) / max(active, HURRIED_TASKS))


def tick_s(active: int, *, typical_s: float) -> float:
    """How often it is asked what a page is worth, in seconds, where rows wait for a slot.

    Twice from page to page, but not often where tasks are many, since asking takes time.
    """
    due = due_s(active, typical_s=typical_s)
    return min(TICK_S, max(LEAST_TICK_S, due / 2, TICK_S * active / PAGE))


def hurried_requests_per_s(active: int, *, typical_s: float, budget_per_s: float) -> float:
    """Requests that following so many tasks by pages may take where rows wait for one of them to end.

    Twice the usual: a task that overruns all others seems to be over at any moment.
    """
    return min(budget_per_s, 2 / due_s(active, typical_s=typical_s))


def requests_per_s(active: int, *, alive_s: float, budget_per_s: float) -> float:
    """Requests that following so many tasks by pages may take, each active for `alive_s` on average."""
    few_per_s = FEW_PER_S * min(1.0, 2 * FEW / max(1, active))
    return min(budget_per_s, max(few_per_s, active / ADVICE_S + NEEDED * active / max(alive_s, 0.1)))
