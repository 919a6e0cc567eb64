"""When to look at a task again: by the tool's own durations, within a budget, never too often or too late."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.rules.pace import (
    _EDGES,
    ADVICE_S,
    BURST,
    CEILING_S,
    FLOOR_S,
    KEPT,
    PRICE_S,
    PRICES_S,
    QUEUED_S,
    STUCK_S,
    Budget,
    Durations,
    Spread,
    advised_s,
    looks_allowed,
    next_price_s,
    stuck_after_s,
    unknown,
)

#: Draws the seconds of one task.
Draw = Callable[[Random], float]

SIGMA = math.log(20 / 6) / 1.6449


def varied(rng: Random) -> float:
    return rng.lognormvariate(math.log(6), SIGMA)


def steady(rng: Random) -> float:
    return 6.0


def slow(rng: Random) -> float:
    return rng.lognormvariate(math.log(60), SIGMA / 2)


def of_two_kinds(rng: Random) -> float:
    return rng.uniform(1.9, 2.1) if rng.random() < 0.6 else rng.uniform(19, 21)


class Ignorant(Durations):
    """Learns nothing."""

    def add(self, seconds: float, *, over_s: float | None = None) -> None:
        pass

    def running(self, unfinished_s: Sequence[float]) -> None:
        pass


TASKS, SLOTS = 600, 16


def followed(
    draw: Draw, durations: Durations, *, exact: bool = True, tasks: int = TASKS
) -> tuple[float, float]:
    """Looks per task and mean lag in seconds of tasks followed by the policy, the first ones included."""
    rng, numbers = Random(1), count()
    # (due at, task, begun at, seconds it takes); the age of each task when it was last seen unfinished
    agenda: list[tuple[float, int, float, float]] = []
    seen_s: dict[int, float] = {}
    looks, lag_s, made, ticked_at = 0, 0.0, 0, 0.0

    def begin(at: float) -> None:
        task = next(numbers)
        seen_s[task] = 0.0
        heapq.heappush(agenda, (at + durations.next_look_s(0.0), task, at, draw(rng)))

    for made in range(1, SLOTS + 1):
        begin(made * 0.05)
    while agenda:
        at, task, begun_at, seconds = heapq.heappop(agenda)
        if at > ticked_at + 0.5:
            ticked_at = at
            durations.running(list(seen_s.values()))
        looks += 1
        age_s = at - begun_at
        if age_s < seconds:
            seen_s[task] = age_s
            heapq.heappush(agenda, (at + durations.next_look_s(age_s), task, begun_at, seconds))
            continue
        over_s = seen_s.pop(task)
        lag_s += age_s - seconds
        durations.add(seconds if exact else age_s, over_s=None if exact else over_s)
        if made < tasks:
            made += 1
            begin(at)
    return looks / tasks, lag_s / tasks


def known(draw: Draw) -> Spread:
    """The durations as they are."""
    rng = Random(2)
    drawn = sorted(draw(rng) for _ in range(20_000))
    below = [bisect_right(drawn, edge) / len(drawn) for edge in _EDGES]
    return Spread([high - low for low, high in pairwise(below)])


@pytest.mark.parametrize(("exact", "firsts"), [(True, 2), (False, 4)], ids=["told", "seen"])
@pytest.mark.parametrize("draw", [varied, steady, slow, of_two_kinds], ids=lambda draw: draw.__name__)
def test_tasks_cost_what_they_must_and_learning_costs_a_few_first_ones(
    draw: Draw, exact: bool, firsts: int
) -> None:
    """A tenth more than the best schedule there is, and what the first tasks cost of which nothing is known.

    As many as there are slots begin before any has ended, and as many again before these say enough; where
    durations are not told, each observation is only an interval, and twice as many are needed.
    """

    def cost_s(looks: float, lag_s: float) -> float:
        return looks * PRICE_S + lag_s

    best = known(draw).schedule(PRICE_S)
    unlearned_s = cost_s(*followed(draw, Ignorant(), tasks=100))
    learned_s = cost_s(*followed(draw, Durations(), exact=exact))
    assert learned_s <= 1.1 * cost_s(best.looks, best.waiting_s) + firsts * SLOTS / TASKS * unlearned_s


@pytest.mark.parametrize("active", [1, 16, 300])
def test_the_price_comes_to_where_looks_are_as_many_as_allowed(active: int) -> None:
    durations, rng = Durations(), Random(3)
    for _ in range(KEPT):
        durations.add(varied(rng))
    for _ in range(40):
        durations.adapt(active=active, budget_per_s=50)
    schedule = durations.spread.schedule(durations.price_s)
    alive_s = durations.spread.mean_s + schedule.waiting_s
    allowed = looks_allowed(alive_s, active=active, budget_per_s=50)
    assert schedule.looks <= 1.1 * allowed
    assert schedule.looks >= 0.8 * allowed or durations.price_s == PRICES_S[0]


def test_tasks_under_way_teach_before_any_has_ended() -> None:
    durations = Durations()
    durations.running([8.0] * 30)
    assert durations.typical_s is None
    assert durations.spread.quantile_s(0.05) >= 8.0
    assert durations.next_look_s(0.0) >= 8.0
    durations.running([16.0] * 30)
    assert durations.next_look_s(0.0) >= 16.0


def test_the_quick_ones_that_end_first_do_not_make_a_tool_seem_quick() -> None:
    durations = Durations()
    for _ in range(10):
        durations.add(2.0)
    durations.running([8.0] * 30)
    assert durations.spread.ended(4.0) == pytest.approx(0.25, abs=0.05)
    assert durations.spread.quantile_s(0.5) >= 8.0


def test_once_many_have_ended_tasks_under_way_teach_no_more() -> None:
    durations = Durations()
    for _ in range(KEPT):
        durations.add(2.0)
    durations.running([8.0] * 10_000)
    durations.add(2.0)
    assert durations.spread.ended(2.1) > 0.95


def test_a_task_last_seen_shortly_before_a_sure_end_is_looked_at_right_after_it() -> None:
    durations = Durations()
    for _ in range(50):
        durations.add(60.0)
    for age_s in (40.0, 50.0, 59.0, 59.5, 59.9):
        assert 60.0 <= age_s + durations.next_look_s(age_s) <= 62.0


def test_a_tool_that_changes_is_learned_anew() -> None:
    durations = Durations()
    for _ in range(KEPT):
        durations.add(6.0)
    assert durations.typical_s == pytest.approx(6.0, rel=0.02)
    for _ in range(KEPT):
        durations.add(30.0)
    durations.running([])
    assert durations.typical_s == pytest.approx(30.0, rel=0.02)
    assert durations.next_look_s(0.0) == pytest.approx(30.0, rel=0.02)


def test_a_task_that_overruns_all_others_is_looked_at_soon_at_first_and_then_ever_less() -> None:
    durations = Durations()
    for _ in range(100):
        durations.add(6.0)
    durations.adapt(active=16, budget_per_s=50)
    assert durations.next_look_s(6.3) < 3.0
    assert durations.next_look_s(6.3) < durations.next_look_s(60.0) <= durations.next_look_s(600.0)
    assert durations.next_look_s(10**6) == CEILING_S


def test_of_an_unknown_tool_the_first_look_comes_within_seconds() -> None:
    assert 0.5 < Durations().next_look_s(0.0) < ADVICE_S


def test_the_median_is_that_of_the_newest_observations() -> None:
    durations = Durations()
    assert durations.typical_s is None
    assert durations.longest_s is None
    for seconds in (4.0, 1000.0, 6.0, 6.1, 6.2):
        durations.add(seconds)
    assert durations.typical_s == pytest.approx(6.1, rel=0.1)
    assert durations.longest_s == 1000.0
    for _ in range(KEPT):
        durations.add(2.0)
    assert durations.typical_s == pytest.approx(2.0, rel=0.02)


def test_looks_at_either_side_of_an_end_pin_it_down_together() -> None:
    durations = Durations()
    for over_s, by_s in [(0, 8), (4, 6.5), (5.5, 12), (0, 6.2), (5.8, 7)] * 8:
        durations.add(by_s, over_s=over_s)
    assert durations.spread.quantile_s(0.15) >= 5.4
    assert durations.spread.quantile_s(0.85) <= 6.5


def test_a_clock_set_back_leaves_no_negative_duration() -> None:
    durations = Durations()
    durations.add(-5.0)
    durations.add(3.0, over_s=7.0)
    assert all(0 <= over_s <= by_s for over_s, by_s in durations.seen)


def test_the_expected_wait_of_a_task_grows_with_the_chance_that_it_is_over() -> None:
    spread = unknown()
    assert spread.waited_s(5.0, 5.0) == 0.0
    assert spread.waited_s(5.0, 4.0) == 0.0
    assert 0 < spread.waited_s(0.0, 1.0) < spread.waited_s(0.0, 3.0) < 3.0
    assert Spread([0.0] * (len(_EDGES) - 1)).waited_s(0.0, 100.0) == 0.0
    assert Spread([1.0] + [0.0] * (len(_EDGES) - 2)).waited_s(5.0, 8.0) == 3.0  # it should be over long since


@given(st.floats(0, 8000), st.floats(0, 8000), st.floats(0, 8000))
def test_a_task_seen_unfinished_is_ever_likelier_to_have_ended_since(
    seen_s: float, a_s: float, b_s: float
) -> None:
    spread = unknown()
    sooner, later = sorted((a_s, b_s))
    assert 0 <= spread.ended_since(seen_s, sooner) <= spread.ended_since(seen_s, later) <= 1
    assert spread.ended_since(seen_s, seen_s) == 0.0
    assert spread.ended_since(0.0, later) == pytest.approx(spread.ended(later))


def test_a_task_that_outlasted_all_others_has_ended_for_all_we_know() -> None:
    assert Spread([1.0] + [0.0] * (len(_EDGES) - 2)).ended_since(5.0, 8.0) == 1.0


@pytest.mark.parametrize(
    ("looks", "followed_s", "wait_s"),
    [
        (0, 0.0, 0.0),  # the first looks may come whenever they are worth most
        (BURST, 0.0, 0.0),
        (BURST + 1, 0.0, ADVICE_S),
        (BURST + 2, 5.0, 2 * ADVICE_S - 5.0),
        (BURST + 2, 60.0, 0.0),
    ],
)
def test_over_time_a_task_is_looked_at_as_seldom_as_the_service_advises(
    looks: int, followed_s: float, wait_s: float
) -> None:
    assert advised_s(looks, followed_s=followed_s) == pytest.approx(wait_s)


def test_what_many_tasks_are_allowed_stays_within_the_budget() -> None:
    assert looks_allowed(9.0, active=16, budget_per_s=50) > 4
    assert looks_allowed(9.0, active=1, budget_per_s=50) > looks_allowed(9.0, active=16, budget_per_s=50)
    assert looks_allowed(9.0, active=1000, budget_per_s=50) * 1000 / 9.0 < 50


@pytest.mark.parametrize(
    ("status", "longest_s", "after_s"),
    [
        ("task_queue", None, QUEUED_S),  # it waits for other people's tasks
        ("", 1.0, QUEUED_S),
        ("task_start", None, STUCK_S[1]),
        ("task_start", 1.0, STUCK_S[0]),
        ("task_start", 60.0, 20 * 60.0),
        ("task_start", 1e6, STUCK_S[1]),
    ],
)
def test_a_task_is_taken_for_stuck_by_what_is_slow_for_its_tool(
    status: str, longest_s: float | None, after_s: float
) -> None:
    assert stuck_after_s(status, longest_s) == after_s


def test_a_price_moves_to_where_looks_are_as_many_as_allowed_and_stays_within_bounds() -> None:
    assert next_price_s(1.0, looks=5.0, allowed=4.0) > 1.0
    assert next_price_s(1.0, looks=3.0, allowed=4.0) < 1.0
    assert next_price_s(1.0, looks=3.9, allowed=4.0) == 1.0
    assert next_price_s(PRICES_S[0], looks=1.0, allowed=4.0) == PRICES_S[0]
    assert next_price_s(PRICES_S[1], looks=9.0, allowed=4.0) == PRICES_S[1]


def test_a_budget_lets_a_few_requests_go_at_once_and_then_so_many_per_second() -> None:
    budget, now, sent = Budget(10.0), 1000.0, 0
    while now < 1010.0:
        budget.take(now)
        sent += 1
        now = max(now, budget.ready_at(now))
    assert 100 <= sent <= 104


def test_requests_beyond_the_budget_are_made_up_for_in_a_second_at_most() -> None:
    budget = Budget(10.0)
    for _ in range(1000):
        budget.take(5.0)
    assert 5.5 < budget.ready_at(5.0) <= 6.2
    assert budget.ready_at(5.0 - 3600.0) < 5.0  # a clock that went back holds up nothing


def test_looks_keep_their_bounds_at_any_age_and_price() -> None:
    for price_s in (0.0001, 0.02, 0.3, 300.0):
        schedule = unknown().schedule(price_s)
        for age_s in (0.0, 1e-9, 0.05, 0.3, 1.0, 77.7, 7199.0, 7201.0, 1e9):
            assert FLOOR_S <= schedule.next_look_s(age_s) <= CEILING_S
