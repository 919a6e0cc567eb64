"""Fault rules say when a fault strikes: always, by chance, by number, by tool, and with mercy under `all`."""

from __future__ import annotations

import pytest

from batchrun.errors import UsageError
from batchrun.simulator.faults import FAULTS, MERCY, Plan, listing


def times(plan: Plan, count: int, point: str = "run", **about) -> list[int]:
    """The numbers (from 1) of the times at which a fault struck."""
    return [number for number in range(1, count + 1) if plan.strike(point, **about) is not None]


@pytest.mark.parametrize(
    ("rule", "struck"),
    [
        ("run-500", [1, 2, 3, 4, 5, 6]),
        ("run-500@3", [3]),
        ("run-500@2,5", [2, 5]),
        ("run-500*2", [1, 2]),
        ("run-500=0", []),
        ("run-500=100%", [1, 2, 3, 4, 5, 6]),
        ("detail-500", []),  # another point
    ],
)
def test_a_rule_strikes_when_it_says(rule, struck) -> None:
    assert times(Plan([rule]), 6) == struck


def test_chance_comes_from_the_seed_and_is_as_asked() -> None:
    first, again, other = (times(Plan(["run-500=20%"], seed=seed), 2000) for seed in (1, 1, 2))
    assert first == again != other
    assert 330 < len(first) < 470


def test_adding_a_rule_changes_no_others_chances() -> None:
    alone = Plan(["run-500=20%"])
    both = Plan(["run-500=20%", "run-html=20%"])
    times(alone, 500)
    times(both, 500)
    assert both.counts()["run-500"] == alone.counts()["run-500"]


def test_a_rule_may_hold_for_one_tool_only_whose_requests_alone_it_counts() -> None:
    plan = Plan(["run-500:wiro/instant-id@2"])
    assert times(plan, 3, tool="Retro-Cartoons") == []
    assert times(plan, 3, tool="instant-id") == [2]


def test_some_faults_strike_one_file_only_once() -> None:
    plan = Plan(["cdn-404-once"])
    assert times(plan, 3, "cdn", key="a") == [1]
    assert times(plan, 3, "cdn", key="b") == [1]


def test_all_strikes_nothing_more_than_twice_in_a_row() -> None:
    plan = Plan(["all=90%"])
    struck = times(plan, 3000, "task", key="a row")
    runs = [number for number in struck if {number + 1, number + 2} <= set(struck)]
    assert MERCY == 2
    assert struck
    assert not runs


def test_all_is_every_everyday_fault_and_no_other() -> None:
    counted = set(Plan(["all=1%"]).counts())
    assert counted == {name for name, fault in FAULTS.items() if fault.everyday}
    assert not counted & {"task-empty", "task-stuck", "run-validation", "run-notfound", "run-401", "list-off"}
    assert not counted & {"list-no-parameters", "run-balance"}


def test_counts_tell_how_often_each_fault_struck() -> None:
    plan = Plan(["run-500@1", "run-html@2,3"])
    times(plan, 5)
    assert plan.counts() == {"run-500": 1, "run-html": 2}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("run-5OO", "is not understood"),
        ("run-50", "did you mean run-500"),
        ("zzz", "--fault help"),
        ("all", "needs a probability"),
        ("all*3", "needs a probability"),
        ("run-500=3", "at most 1"),
        ("run-500=200%", "at most 1"),
        ("run-500=", "is not understood"),
        ("run-500@x", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_a_cure(rule, words) -> None:
    with pytest.raises(UsageError, match=words):
        Plan([rule])


def test_every_fault_is_listed_with_what_happens_and_marked_when_everyday() -> None:
    lines = dict(listing())
    assert list(lines) == list(FAULTS)
    assert all(lines.values())
    assert lines["run-500"].endswith("*")
    assert not lines["task-stuck"].endswith("*")
    assert all(name.startswith((fault.point.split("-")[0], "cdn-")) for name, fault in FAULTS.items())
