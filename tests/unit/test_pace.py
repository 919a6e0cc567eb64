"""When to look at a task again: by the tool's own durations, never too often and never too late."""

from __future__ import annotations

import pytest

from batchrun.rules.pace import CEILING_S, FIRST_LOOK_S, FLOOR_S, Durations, next_look_s


@pytest.mark.parametrize(
    ("age_s", "typical_s", "wait_s"),
    [
        # nothing is known of the tool: look soon
        (0.0, None, FIRST_LOOK_S),
        # still nothing: ever later, in proportion to its age
        (4.0, None, 1.0),
        (20.0, None, 5.0),
        # unknown and old: not less often than the ceiling
        (3600.0, None, CEILING_S),
        # a long wait before a task can be ready, up to the ceiling
        (0.0, 100.0, CEILING_S),
        # then right before its typical end
        (5.0, 10.0, 4.0),
        (0.0, 10.0, 9.0),
        # around the typical end: closely
        (9.0, 10.0, 1.25),
        (10.0, 10.0, 1.25),
        # overrun: apart again, a quarter of the overrun
        (30.0, 10.0, 5.0),
        (1000.0, 10.0, CEILING_S),
        # tasks of no time: not faster than the floor
        (0.0, 0.0, FLOOR_S),
        (0.05, 0.1, FLOOR_S),
    ],
)
def test_the_next_look(age_s: float, typical_s: float | None, wait_s: float) -> None:
    assert next_look_s(age_s, typical_s) == pytest.approx(wait_s)


def test_the_typical_duration_is_the_median_of_the_newest() -> None:
    assert Durations().typical_s is None
    durations = Durations()
    for seconds in (4.0, 1000.0, 6.0):
        durations.add(seconds)
    assert durations.typical_s == 6.0
    for _ in range(200):
        durations.add(2.0)
    assert durations.typical_s == 2.0


def test_a_clock_set_back_leaves_no_negative_duration() -> None:
    durations = Durations()
    durations.add(-5.0)
    assert durations.typical_s == 0.0
