"""When to look at a task again: a pure policy learned from the durations of the tool's own tasks.

A look costs a request and a late look costs waiting, so a look has a *price*: the seconds of waiting that are
worth one request. Durations are known through looks: a task seen unfinished at one age and ended at a later
one took something in between, and one under way takes longer than it has so far. From the newest of these, a
`Spread` says how likely a task is to have ended by which age, and the cheapest schedule of looks follows by
going backwards through the ages. The price adapts: few tasks are watched closely, many cheaply, and all share
one budget of requests per second.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

#: Looks at one task are never closer than this.
FLOOR_S = 0.1
#: Looks at one task are never further apart than this: durations may shift, and machines sleep.
CEILING_S = 30.0
#: The service's advice: Details of one task about this far apart, over time (wiro-api.md, Tracking) ...
ADVICE_S = 3.0
#: ... beyond so many that may come together around the task's expected end,
BURST = 4
#: and beyond so many that every task needs, on average over tasks.
NEEDED = 1.35
#: A task that has begun is taken for stuck no sooner than this, and after this at the latest.
STUCK_S = (300.0, 3600.0)
#: Statuses of tasks that have not begun, and how long they may take.
QUEUED = frozenset({"", "task_queue"})
QUEUED_S = 6 * 3600.0

#: Observations kept of a tool: enough for its 95th percentile, few enough to follow when it changes.
KEPT = 400
#: Requests per second that all looks together may make.
BUDGET_PER_S = 50.0
#: What a look is worth at first, in seconds of waiting, and the bounds between which that moves.
PRICE_S = 0.2
PRICES_S = (0.1, 300.0)
#: With fewer active tasks than this, each may have more looks: the last tasks of a run hold up its end.
FEW = 4
#: What is planned of the budget of requests per second; the rest is for troubles and coincidences.
PLANNED = 0.8

#: Ages between which chances are told apart: 0, then steps of 1.5% from 0.05 s to 2 h.
_STEP = 0.015
_EDGES = (0.0, *(0.05 * math.exp(_STEP * number) for number in range(793)))
#: A tool of which nothing is known: median and spread of its tasks, and the observations that this is worth.
_PRIOR_MEDIAN_S, _PRIOR_SIGMA, _PRIOR_WEIGHT = 4.0, 1.4, 0.5
#: Ages at which looks are considered lie apart by this chance that the task ends, or this part of the age.
_APART, _APART_S = 0.005, 0.2
#: Rounds of the estimate; it goes on from the last one, so few are enough.
_ROUNDS = 6
#: It is smoothed less where that makes each observation likelier by this factor, as a logarithm.
_LIKELIER = 0.15
#: It is made anew when what it rests on has grown by this part.
_RENEWED = 1 / 8


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


_PRIOR = tuple(
    _normal(math.log(high / _PRIOR_MEDIAN_S) / _PRIOR_SIGMA)
    - (_normal(math.log(low / _PRIOR_MEDIAN_S) / _PRIOR_SIGMA) if low else 0.0)
    for low, high in pairwise(_EDGES)
)


class Spread:
    """How long a tool's tasks take: a chance for each step of age. Immutable; ages in seconds."""

    def __init__(self, chances: Sequence[float]) -> None:
        """`chances`: of a task's end in each step, summing up to less than 1 by what outlasts them all."""
        self._chances = chances
        #: That a task has ended by each edge, and the integral of that over age.
        self._ended = [0.0, *accumulate(chances)]
        steps = zip(pairwise(self._ended), pairwise(_EDGES), strict=True)
        self._area = [0.0, *accumulate((a + b) / 2 * (high - low) for (a, b), (low, high) in steps)]
        self.mean_s = _EDGES[-1] * self._ended[-1] - self._area[-1] + _EDGES[-1] * (1 - self._ended[-1])
        self._schedules: dict[float, Schedule] = {}

    def _at(self, age_s: float) -> tuple[float, float]:
        """The chance of having ended by an age, and its integral up to there."""
        step = bisect_right(_EDGES, age_s) - 1
        if step >= len(_EDGES) - 1:
            return self._ended[-1], self._area[-1] + (age_s - _EDGES[-1]) * self._ended[-1]
        low, within = _EDGES[step], age_s - _EDGES[step]
        before = self._ended[step]
        now = before + self._chances[step] * within / (_EDGES[step + 1] - low)
        return now, self._area[step] + (before + now) / 2 * within

    def ended(self, age_s: float) -> float:
        """The chance of having ended by an age."""
        return self._at(age_s)[0]

    def waited_s(self, seen_s: float, age_s: float) -> float:
        """How long a task last seen unfinished at `seen_s` is expected to have been over at `age_s`."""
        if age_s <= seen_s:
            return 0.0
        ended, area = self._at(seen_s)
        _, area_now = self._at(age_s)
        left = 1 - ended
        if left < 1e-9:
            return age_s - seen_s
        return max(0.0, area_now - area - ended * (age_s - seen_s)) / left

    def ended_since(self, seen_s: float, age_s: float) -> float:
        """How likely a task last seen unfinished at `seen_s` has ended by `age_s`."""
        if age_s <= seen_s:
            return 0.0
        before = self.ended(seen_s)
        return (self.ended(age_s) - before) / (1 - before) if before < 1 - 1e-9 else 1.0

    def quantile_s(self, part: float) -> float:
        """The age by which this part of the tasks has ended."""
        return _EDGES[min(bisect_left(self._ended, part), len(_EDGES) - 1)]

    def schedule(self, price_s: float) -> Schedule:
        """The looks that cost least when one is worth `price_s` of waiting."""
        if price_s not in self._schedules:
            self._schedules[price_s] = self._scheduled(price_s)
        return self._schedules[price_s]

    def _scheduled(self, price_s: float) -> Schedule:
        steps = self._steps()
        ages = [_EDGES[step] for step in steps]
        ended = [self._ended[step] for step in steps]
        area = [self._area[step] for step in steps]
        last = len(steps) - 1
        # for a task unfinished at each age, times the chance of being so: cost to come, looks to come
        cost, looks, following = [0.0] * (last + 1), [0.0] * (last + 1), [last] * (last + 1)
        cost[last] = (1 - ended[last]) * (price_s + CEILING_S)
        looks[last] = 1 - ended[last]
        for here in range(last - 1, -1, -1):
            best, left, age, base, ended_here = math.inf, 1 - ended[here], ages[here], area[here], ended[here]
            look = price_s * left
            for there in range(here + 1, last + 1):
                waiting = area[there] - base - ended_here * (ages[there] - age)
                if look + waiting >= best:
                    break  # later looks only wait longer
                total = look + waiting + cost[there]
                if total < best:
                    best, following[here] = total, there
            cost[here], looks[here] = best, left + looks[following[here]]
        value = [there_area + there_cost for there_area, there_cost in zip(area, cost, strict=True)]
        return Schedule(self, ages, following, value, looks[0], cost[0] - price_s * looks[0])

    def _steps(self) -> list[int]:
        """The edges at which looks are considered: close together where tasks end, and where that is over."""
        kept = [0]
        count = len(_EDGES) - 1
        for step in range(1, count):
            mass = self._ended[step] - self._ended[kept[-1]]
            width = _EDGES[step] - _EDGES[step - 1]
            next_width = _EDGES[step + 1] - _EDGES[step]
            over = self._chances[step] / next_width < 0.2 * self._chances[step - 1] / width
            apart = _EDGES[step] >= (1 + _APART_S) * max(_EDGES[kept[-1]], FLOOR_S)
            if mass >= _APART or (over and mass >= _APART / 4) or (apart and mass > 1e-6):
                kept.append(step)
            elif apart and 1 - self._ended[step] > 1e-4 and mass <= 1e-6 and self._chances[step] > 1e-6:
                kept.append(step)  # tasks begin to end here
        kept.append(count)
        return kept


class Schedule:
    """When to look, for tasks of one tool at one price."""

    def __init__(
        self,
        spread: Spread,
        ages: Sequence[float],
        following: Sequence[int],
        costs: Sequence[float],
        looks: float,
        waiting_s: float,
    ) -> None:
        """`following`: the best next look after one at each of the `ages`; `costs`: of a look there."""
        self._spread = spread
        self._ages = ages
        self._following = following
        self._costs = costs
        #: Looks at a task on average, the one that shows its end among them; and the wait for that one.
        self.looks = looks
        self.waiting_s = waiting_s

    def next_look_s(self, age_s: float) -> float:
        """Seconds until the next look at a task just seen unfinished at `age_s`, in [FLOOR_S, CEILING_S]."""
        last = len(self._ages) - 1
        step = bisect_right(self._ages, age_s) - 1
        if step >= last:
            return CEILING_S
        # the best next look is none before that of a younger task, and none after that of an older one
        ended = self._spread.ended(age_s)
        among = range(self._following[step], self._following[step + 1] + 1)
        then = min(among, key=lambda there: self._costs[there] - ended * self._ages[there])
        return min(CEILING_S, max(FLOOR_S, self._ages[then] - age_s))


@lru_cache(maxsize=1)
def unknown() -> Spread:
    """What is assumed of a tool of which nothing is known."""
    return Spread(_PRIOR)


class Durations:
    """The newest observed durations of one tool's tasks, and what follows from them."""

    def __init__(self) -> None:
        #: (over, up to) seconds each; equal where the duration is known.
        self.seen: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self.price_s = PRICE_S
        self._spread = unknown()
        self._chances: Sequence[float] = _PRIOR
        #: How long tasks under way have run; and whether there is much that the estimate does not know yet.
        self._unfinished_s: Sequence[float] = ()
        self._followed_s = 0.0
        self._since = 0
        self._is_stale = False

    def add(self, seconds: float, *, over_s: float | None = None) -> None:
        """Remember a task that took `seconds`, or something above `over_s` and up to that."""
        seconds = max(0.0, seconds)
        self.seen.append((seconds if over_s is None else min(max(0.0, over_s), seconds), seconds))
        self._since += 1
        if len(self.seen) < KEPT:  # once that many are known, none is urgent: see `running`
            self._renew_if_due()

    def running(self, unfinished_s: Sequence[float]) -> None:
        """Take in the ages at which the tasks under way were last seen unfinished, all of them.

        Those that end first are the quick ones: by these alone the tool would seem quicker than it is. Once
        as many have ended as are kept, they say it all. To be called now and then: what was added meanwhile
        counts from here on at the latest.
        """
        self._renew_if_due()
        if len(self.seen) == KEPT:
            unfinished_s = ()
        self._unfinished_s = unfinished_s
        followed_s = sum(unfinished_s) + sum(high for _, high in self.seen)
        if unfinished_s and followed_s > (1 + _RENEWED) * self._followed_s:
            self._followed_s, self._is_stale = followed_s, True

    @property
    def typical_s(self) -> float | None:
        """The median, None until something was seen."""
        return self.spread.quantile_s(0.5) if self.seen else None

    @property
    def longest_s(self) -> float | None:
        """The longest, None until something was seen."""
        return max((high for _, high in self.seen), default=None)

    @property
    def spread(self) -> Spread:
        """What the observations say; renewed when an eighth of them is new."""
        if self._is_stale:
            self._since, self._is_stale = 0, False
            self._chances = _estimated(self.seen, self._unfinished_s, self._chances)
            self._spread = Spread(_smoothed(self._chances, len(self.seen)))
        return self._spread

    def _renew_if_due(self) -> None:
        self._is_stale |= self._since >= _RENEWED * max(1, len(self.seen))

    def next_look_s(self, age_s: float) -> float:
        """Seconds until the next look at a task just seen unfinished at `age_s`, in [FLOOR_S, CEILING_S]."""
        return self.spread.schedule(self.price_s).next_look_s(age_s)

    def adapt(self, *, active: int, budget_per_s: float) -> None:
        """Move the price one step to where it should be with so many active tasks, of all tools."""
        schedule = self.spread.schedule(self.price_s)
        alive_s = self.spread.mean_s + schedule.waiting_s
        allowed = looks_allowed(alive_s, active=active, budget_per_s=budget_per_s)
        self.price_s = next_price_s(self.price_s, looks=schedule.looks, allowed=allowed)


def advised_s(looks: int, *, followed_s: float) -> float:
    """Seconds until the service's advice has room for another Detail of a task that had so many."""
    return max(0.0, (looks - BURST) * ADVICE_S - followed_s)


def looks_allowed(alive_s: float, *, active: int, budget_per_s: float) -> float:
    """Looks that a task may have on average while it is followed for `alive_s`."""
    advised = NEEDED + alive_s / ADVICE_S * max(1.0, FEW / max(1, active))
    return min(advised, PLANNED * budget_per_s * alive_s / max(1, active))


def next_price_s(price_s: float, *, looks: float, allowed: float) -> float:
    """The price after one step; steps are large, so that few schedules need to be made."""
    low, high = PRICES_S
    if looks > allowed:
        return min(high, round(price_s * 1.25, 4))
    if looks < 0.88 * allowed:
        return max(low, round(price_s / 1.25, 4))
    return price_s


class Budget:
    """Requests that may go out by now: so many per second, a few of them at once."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._most = max(1.0, per_s / 4)
        self._left = self._most
        self._at = -math.inf

    def take(self, now: float) -> None:
        """One request goes out; it may run the budget into debt, up to a second's worth."""
        self._refill(now)
        self._left = max(-self.per_s, self._left - 1)

    def ready_at(self, now: float) -> float:
        """When the next request may go out: now, or later."""
        self._refill(now)
        return now if self._left >= 1 else now + (1 - self._left) / self.per_s

    def _refill(self, now: float) -> None:
        self._left = min(self._most, self._left + max(0.0, now - self._at) * self.per_s)
        self._at = now


def _estimated(
    seen: Collection[tuple[float, float]], unfinished_s: Collection[float], chances: Sequence[float]
) -> Sequence[float]:
    """The chances of each step that explain the observations best, with a little doubt (Turnbull 1976).

    Each round shares every observation out among the steps it may have been, by what the last one found.
    Tasks under way count ever less, as those that ended become the newest of many instead of all there were.
    """
    count = len(_PRIOR)
    spans = [(over, upto, 1.0) for over, upto in seen]
    spans += [(over, math.inf, 1 - len(seen) / KEPT) for over in unfinished_s]
    weights: defaultdict[tuple[int, int], float] = defaultdict(float)
    for over, upto, weight in spans:
        high = min(max(bisect_left(_EDGES, upto), 1), count)
        weights[min(bisect_right(_EDGES, over) - 1, high - 1), high] += weight
    whole = _PRIOR_WEIGHT + sum(weights.values())
    prior = [chance * _PRIOR_WEIGHT / whole for chance in _PRIOR]
    # nothing may have become impossible
    chances = [0.9 * chance + 0.1 * first for chance, first in zip(chances, _PRIOR, strict=True)]
    for _ in range(_ROUNDS):
        below = [0.0, *accumulate(chances)]
        changes = [0.0] * (count + 1)
        for (low, high), weight in weights.items():
            share = weight / (max(below[high] - below[low], 1e-12) * whole)
            changes[low] += share
            changes[high] -= share
        shares = accumulate(changes)
        chances = [p + chance * share for p, chance, share in zip(prior, chances, shares, strict=False)]
    return chances


def _smoothed(chances: Sequence[float], count: int) -> Sequence[float]:
    """The chances without the accidents of few observations, smoothed on the logarithm of age.

    As far as is right for durations of one kind (Silverman 1986), or less where each observation is then
    clearly likelier by the others: durations may be of two kinds, with nothing in between.
    """
    below = list(accumulate(chances))
    quarters = bisect_left(below, 0.75 * below[-1]) - bisect_left(below, 0.25 * below[-1])
    reach = round(1.2 * (quarters / 1.34) * count**-0.2) if count else 0
    best, most = chances, -math.inf
    while reach:
        smooth = _spread_out(chances, reach)
        own = 1 / ((2 * reach + 1) * count)
        likely = sum(
            chance * math.log(max(all_of_them - own, 1e-9))
            for chance, all_of_them in zip(chances, smooth, strict=True)
            if chance > 1e-6
        )
        if likely < most + _LIKELIER:
            break
        best, most = smooth, likely
        reach //= 2
    return best


def _spread_out(chances: Sequence[float], reach: int) -> Sequence[float]:
    """Each chance shared with its neighbours, twice: two boxes make a hat."""
    last, width = len(chances), 2 * reach + 1
    for _ in range(2):
        sums = [0.0, *accumulate(chances)]
        chances = [(sums[min(last, at + reach + 1)] - sums[max(0, at - reach)]) / width for at in range(last)]
    return chances


def stuck_after_s(status: str, longest_s: float | None) -> float:
    """How long a task may stay in one status before it is taken for stuck; `longest_s`: of its tool's tasks.

    Tasks that queue wait for other people's; a tool's slowest task so far says what is slow for it.
    """
    if status in QUEUED:
        return QUEUED_S
    if longest_s is None:
        return STUCK_S[1]
    return min(STUCK_S[1], max(STUCK_S[0], 20 * longest_s))
