"""A row moves as the table says and in no other way."""

from __future__ import annotations

from itertools import product

import pytest

from batchrun.model import ACTIVE, TERMINAL, State
from batchrun.rules.states import TRANSITIONS, Event, ImpossibleMove, advance

S, E = State, Event

#: The whole table, said again in the order of a row's life.
MOVES = [
    # an intent is committed before anything is sent
    (S.PLANNED, E.INTENT_RECORDED, S.SUBMITTING),
    # its tool or its input image is gone: nothing is sent
    (S.PLANNED, E.REJECTED, S.FAILED),
    # the service took it
    (S.SUBMITTING, E.ACCEPTED, S.IN_FLIGHT),
    # it was certainly not taken: not sent, or "wait"
    (S.SUBMITTING, E.WITHDRAWN, S.PLANNED),
    # the service refuses the values
    (S.SUBMITTING, E.REJECTED, S.FAILED),
    # no answer: it may be paid for
    (S.SUBMITTING, E.REPLY_LOST, S.IN_DOUBT),
    # the lost submit's task was found
    (S.IN_DOUBT, E.ADOPTED, S.IN_FLIGHT),
    # it certainly made none
    (S.IN_DOUBT, E.ABSENT, S.PLANNED),
    # the user takes the risk
    (S.IN_DOUBT, E.REQUEUED, S.PLANNED),
    # paid for; the images are to be fetched
    (S.IN_FLIGHT, E.FINISHED, S.FINISHED),
    # unbilled, and attempts are left
    (S.IN_FLIGHT, E.ATTEMPT_FAILED, S.PLANNED),
    # no attempt is left
    (S.IN_FLIGHT, E.GAVE_UP, S.FAILED),
    # cancelled at the service by the user's order
    (S.IN_FLIGHT, E.CANCELLED, S.CANCELLED),
    # all images are on disk
    (S.FINISHED, E.SAVED, S.DONE),
    # the images cannot be had
    (S.FINISHED, E.GAVE_UP, S.FAILED),
    # retry: bought anew
    (S.FAILED, E.REQUEUED, S.PLANNED),
    # retry: what was paid for is fetched
    (S.FAILED, E.RESUMED, S.FINISHED),
    # retry of a cancelled row
    (S.CANCELLED, E.REQUEUED, S.PLANNED),
    # the manifest was corrected
    (S.INVALID, E.REQUEUED, S.PLANNED),
    # a changed request, with --rerun-changed
    (S.DONE, E.REQUEUED, S.PLANNED),
]


@pytest.mark.parametrize(("before", "event", "after"), MOVES, ids=lambda word: word.value)
def test_a_row_moves_as_the_table_says(before: State, event: Event, after: State) -> None:
    assert advance(before, event) is after


def test_the_table_holds_no_other_move() -> None:
    assert {(before, event): after for before, event, after in MOVES} == TRANSITIONS


@pytest.mark.parametrize(
    ("state", "event"), sorted(set(product(State, Event)) - set(TRANSITIONS)), ids=lambda word: word.value
)
def test_any_other_event_is_a_fault_and_says_so(state: State, event: Event) -> None:
    with pytest.raises(ImpossibleMove, match=f"'{event.value}' cannot happen to a row that is {state.value}"):
        advance(state, event)


def test_every_event_has_a_use() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_no_state_both_rests_and_may_be_active_at_the_service() -> None:
    assert not TERMINAL & ACTIVE


def test_only_a_recorded_intent_leads_to_where_money_may_be_spent() -> None:
    entries = {(before, event) for (before, event), after in TRANSITIONS.items() if after in ACTIVE}
    from_outside = {(before, event) for before, event in entries if before not in ACTIVE}
    assert from_outside == {(S.PLANNED, E.INTENT_RECORDED)}
