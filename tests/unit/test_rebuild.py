"""What becomes of a row when the state is rebuilt, and how values of requests are found again."""

from __future__ import annotations

import itertools
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.model import State
from batchrun.rules.policy import PAID_CAUSES
from batchrun.rules.rebuild import Rebuilt, rebuilt
from batchrun.rules.recovery import print_of_value, same_value

D, F, C, W, S, L = (
    Rebuilt.DONE, Rebuilt.FAILED, Rebuilt.CANCELLED, Rebuilt.FOLLOW, Rebuilt.SEARCH, Rebuilt.LEAVE
)  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "told", "facts", "standing"),
    [
        # one of the two is enough to be done
        (State.DONE, "done", {}, D),
        (State.DONE, None, {}, D),  # settled in the last second
        (None, "done", {}, D),
        (State.PLANNED, "done", {}, D),  # the state is older than the results
        (State.FAILED, "done", {}, D),
        (State.DONE, "done", {"refetch": True}, W),
        (State.DONE, "done", {"refetch": True, "has_task": False}, S),
        # asked for anew since the line was written
        (State.IN_FLIGHT, "done", {"has_newer_task": True}, W),
        (State.IN_FLIGHT, "failed", {"has_newer_task": True}, W),
        # failed rows stay failed: nothing is bought for them by itself
        (State.FAILED, None, {"cause": "rejected"}, F),
        (None, "failed", {"cause": "paid but empty"}, F),
        (State.PLANNED, "failed", {"cause": "images gone"}, F),
        (State.CANCELLED, None, {"cause": "cancelled"}, C),
        (State.CANCELLED, "failed", {"cause": "rejected"}, F),
        # paid for: only the images are fetched
        (None, "failed", {"cause": "download failed"}, W),
        (State.FAILED, "failed", {"cause": "image damaged", "has_task": False}, S),
        # on their way
        (State.IN_FLIGHT, None, {}, W),
        (State.FINISHED, None, {}, W),
        (State.IN_FLIGHT, None, {"has_task": False}, S),
        (State.PLANNED, None, {}, S),
        (State.SUBMITTING, None, {}, S),
        (State.IN_DOUBT, "in_doubt", {}, S),
        # the manifest tells of those
        (State.INVALID, None, {}, L),
        (None, "invalid", {}, L),
    ],
)
def test_a_row_stands_where_nothing_can_be_bought_twice(stored, told, facts, standing):
    known = {"cause": None, "has_task": True, **facts}
    assert rebuilt(stored=stored, told=told, **known) is standing


def test_no_row_is_left_to_be_submitted_and_none_is_followed_without_a_task():
    states = [None, *State]
    for stored, told, cause in itertools.product(states, [None, *State], [None, "rejected", *PAID_CAUSES]):
        for has_task, newer, refetch in itertools.product((False, True), repeat=3):
            standing = rebuilt(
                stored=stored, told=told, cause=cause, has_task=has_task,
                has_newer_task=newer and has_task, refetch=refetch,
            )  # fmt: skip
            assert standing is not Rebuilt.FOLLOW or has_task
            assert standing is not Rebuilt.DONE or not refetch


values = st.one_of(
    st.text(max_size=6), st.integers(-99, 99), st.lists(st.text(max_size=3), max_size=3),
    st.sampled_from(["7.5", "7.50", "1e2", "100", "-0", "0", " a", "[\"a\"]", "[1]", "a\r\nb", "a\nb", ""]),
    st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str),
)  # fmt: skip


@given(values, values)
@example("7.5", "7.50")
@example("-0", "0")
@example(["a"], '["a"]')
@example([], "")
def test_values_that_are_the_same_have_the_same_print(sent, echoed):
    if same_value(sent, echoed):
        assert print_of_value(sent) == print_of_value(echoed)
    assert same_value(sent, sent)


@given(st.decimals(-(10**9), 10**9, places=4))
def test_a_number_has_one_print_however_it_is_written(number):
    for text in (f"{number:f}", f"{number:E}", f"{number.normalize()}"):
        assert print_of_value(text) == print_of_value(Decimal(number))
