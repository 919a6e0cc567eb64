"""When to look at a task again: by the tool's own durations, within a budget, never too often or too late."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from random import Random

import pytest

from batchrun.rules.pace import (
    _EDGES,
    ADVICE_S,
    BURST,
    CEILING_S,
    FLOOR_S,
    KEPT,
    PRICES_S,
    Budget,
    Durations,
    Spread,
    advised_s,
    looks_allowed,
    next_price_s,
    unknown,
)

#: Draws the seconds of one task.
Draw = Callable[[Random], float]

SIGMA = math.log(20 / 6) / 1.6449


def lognormal(rng: Random) -> float:
    return rng.lognormvariate(math.log(6), SIGMA)


def steady(rng: Random) -> float:
    return 6.0


def followed(draw: Draw, *, exact: bool, tasks: int = 600, slots: int = 16) -> tuple[float, float]:
    """Looks per task and mean lag in seconds of tasks followed by the policy, beginners' luck included."""
    rng, durations, numbers = Random(1), Durations(), count()
    # (due at, number, begun at, seconds it takes, last seen unfinished at the age)
    agenda: list[tuple[float, int, float, float, float]] = []
    looks, lag_s, made, adapted_at = 0, 0.0, 0, 0.0

    def begin(at: float) -> None:
        heapq.heappush(agenda, (at + durations.next_look_s(0.0), next(numbers), at, draw(rng), 0.0))

    for made in range(1, slots + 1):
        begin(made * 0.05)
    while agenda:
        at, _, begun_at, seconds, seen_s = heapq.heappop(agenda)
        if at > adapted_at + 0.5:
            durations.adapt(active=len(agenda) + 1, budget_per_s=50)
            adapted_at = at
        looks += 1
        age_s = at - begun_at
        if age_s < seconds:
            due_at = at + durations.next_look_s(age_s)
            heapq.heappush(agenda, (due_at, next(numbers), begun_at, seconds, age_s))
            continue
        lag_s += age_s - seconds
        durations.add(seconds if exact else age_s, over_s=None if exact else seen_s)
        if made < tasks:
            made += 1
            begin(at)
    return looks / tasks, lag_s / tasks


@pytest.mark.parametrize(
    ("draw", "exact", "looks", "lag_s"),
    [
        # the best that any schedule can do is 4.4 looks at 0.87 s
        (lognormal, True, 4.4, 1.0),
        # the service's own times are a help, not a need
        (lognormal, False, 4.6, 1.0),
        (steady, True, 1.25, 0.12),
        (steady, False, 1.5, 0.15),
    ],
)
def test_looks_are_few_and_soon_once_a_tool_is_known(
    draw: Draw, exact: bool, looks: float, lag_s: float
) -> None:
    took = followed(draw, exact=exact)
    assert took[0] <= looks
    assert took[1] <= lag_s


def test_a_tool_that_changes_is_learned_anew() -> None:
    durations = Durations()
    for _ in range(KEPT):
        durations.add(6.0)
    for _ in range(KEPT):
        durations.add(30.0)
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
    assert 0.5 < Durations().next_look_s(0.0) < 3.0


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
    for price_s in (0.02, 0.3, 300.0):
        schedule = unknown().schedule(price_s)
        for age_s in (0.0, 1e-9, 0.05, 1.0, 77.7, 7199.0, 7201.0, 1e9):
            assert FLOOR_S <= schedule.next_look_s(age_s) <= CEILING_S
