"""An outage is told from a bad row by looking at all rows together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchrun.rules.outage import BAD_ROW, BAD_ROW_S, OUTAGE, Health

LATE = BAD_ROW_S + 1


def test_a_lost_answer_now_and_then_is_no_outage_and_several_in_a_row_are() -> None:
    health = Health()
    for row in range(20):
        for _ in range(OUTAGE - 1):
            health.trouble(row, at=0)
        assert not health.is_outage
        health.sound(row)
    for row in range(OUTAGE):
        health.trouble(row, at=0)
    assert health.is_outage


def test_a_row_in_trouble_while_others_are_well_each_time_is_bad() -> None:
    health = Health()
    for time in range(BAD_ROW):
        assert not health.is_bad(7, at=LATE)
        health.trouble(7, at=time)
        health.sound(time)
    assert health.is_bad(7, at=LATE)
    assert not health.is_bad(8, at=LATE)
    assert not health.is_outage


def test_patience_with_a_bad_row_lasts_its_time() -> None:
    health = Health()
    for other in range(100):
        health.trouble(999, at=5)
        health.sound(other)
    assert not health.is_bad(999, at=4 + BAD_ROW_S)
    assert health.is_bad(999, at=5 + BAD_ROW_S)


def test_a_row_that_is_answered_at_last_was_not_bad() -> None:
    health = Health()
    for other in range(BAD_ROW):
        health.trouble(999, at=0)
        health.sound(other)
    health.sound(999)
    assert not health.is_bad(999, at=LATE)


def test_a_row_that_is_not_submitted_any_more_is_in_trouble_no_longer() -> None:
    health = Health()
    for row in (1, 2, 3):
        health.trouble(row, at=0)
    health.forget(1)
    health.sound(2)
    assert health.troubled == 1


@given(st.lists(st.integers(0, 5), max_size=300))
def test_in_an_outage_however_long_no_row_is_bad(rows: list[int]) -> None:
    health = Health()
    health.sound(99)
    for at, row in enumerate(rows):
        assert health.trouble(row, at=at) == 1
        assert not any(health.is_bad(each, at=LATE + at) for each in range(6))


def test_submits_sent_before_the_last_sound_answer_make_no_outage() -> None:
    health = Health()
    sent_after = health.answered
    health.sound(0)
    for row in range(1, 3 * OUTAGE):
        health.trouble(row, at=1.0, sent_after=sent_after)
    assert not health.is_outage
    for row in range(OUTAGE):
        health.trouble(100 + row, at=2.0, sent_after=health.answered)
    assert health.is_outage
