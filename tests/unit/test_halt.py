"""When failures stop a run: the user's own bounds, and a row of failures for one cause."""

from __future__ import annotations

from decimal import Decimal

import pytest

from batchrun.rules.halt import SHARE_FROM, STREAK, Failures, Halt, parse_halt


@pytest.mark.parametrize(
    ("text", "halt"),
    [
        ("never", Halt(streak=None)),
        ("fail=10", Halt(rows=10)),
        (" fail = 10 ", Halt(rows=10)),
        ("fail=5%", Halt(percent=Decimal(5))),
        ("fail=0.5%", Halt(percent=Decimal("0.5"))),
        ("fail=100%", Halt(percent=Decimal(100))),
    ],
)
def test_bounds_are_read(text: str, halt: Halt) -> None:
    assert parse_halt(text) == halt


@pytest.mark.parametrize(
    "text", ["", "10", "fail", "fail=", "fail=0", "fail=1.5", "fail=0%", "fail=101%", "fail=-1", "done=3"]
)
def test_anything_else_is_told_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"fail=10|write whole rows"):
        parse_halt(text)


def fail(failures: Failures, times: int, cause: str = "rejected") -> list[str | None]:
    return [failures.failure(cause) for _ in range(times)]


def test_so_many_failed_rows_halt_a_run() -> None:
    failures = Failures(parse_halt("fail=3"))
    assert fail(failures, 2) == [None, None]
    failures.done()
    assert fail(failures, 1) == ["3 rows failed (--halt fail=3)"]


def test_a_share_counts_once_enough_rows_have_settled() -> None:
    failures = Failures(parse_halt("fail=25%"))
    assert fail(failures, 5) == [None] * 5
    for _ in range(SHARE_FROM - 6):
        failures.done()
    assert fail(failures, 1) == [f"6 of {SHARE_FROM} rows failed (--halt fail=25%)"]


def test_a_share_is_reached_when_it_is_met_exactly_and_not_before() -> None:
    failures = Failures(parse_halt("fail=25%"))
    for _ in range(75):
        failures.done()
    assert [reason is not None for reason in fail(failures, 25)] == [False] * 24 + [True]


def test_failures_for_one_cause_one_after_the_other_halt_a_run_by_default() -> None:
    failures = Failures(Halt())
    assert fail(failures, STREAK - 1) == [None] * (STREAK - 1)
    failures.done()
    assert fail(failures, STREAK - 1) == [None] * (STREAK - 1)
    assert fail(failures, 1, "task failed") == [None]
    assert fail(failures, STREAK - 1) == [None] * (STREAK - 1)
    [reason] = fail(failures, 1)
    assert reason is not None
    assert reason.startswith("50 rows failed one after the other for the same cause: rejected")


def test_never_is_never() -> None:
    assert not any(fail(Failures(parse_halt("never")), 10 * STREAK))


def test_a_tool_that_the_service_does_not_have_stops_no_other_tool() -> None:
    failures = Failures(Halt())
    assert not any(fail(failures, 10 * STREAK, "tool not found"))
