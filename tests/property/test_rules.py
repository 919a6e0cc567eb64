"""The rules hold for all inputs: no state is a trap, every error has an answer, and a lost submit is never
taken for absent or found while anything speaks against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchrun import errors
from batchrun.model import TERMINAL, RemoteOutput, State, Task, Value
from batchrun.rules.pace import CEILING_S, FLOOR_S, Durations
from batchrun.rules.policy import (
    Doubt as DoubtDecision,
)
from batchrun.rules.policy import (
    Fail,
    Pause,
    Refetch,
    Retry,
    Running,
    Stop,
    Succeeded,
    Verdict,
    WaitForSlot,
    after_download,
    after_submit,
    backoff_s,
    judge,
)
from batchrun.rules.recovery import (
    CLOCK_TOLERANCE_S,
    CLOCKS_APART_S,
    GRACE_S,
    SECOND_LOOK_S,
    Absent,
    Adopt,
    Doubt,
    Hold,
    Listing,
    LookAgain,
    Match,
    Step,
    compare,
    next_step,
    settle_doubt,
)
from batchrun.rules.states import TRANSITIONS, Event

# --- states ---------------------------------------------------------------------------------------------

#: Events that only a user's word brings about.
BY_WORD = {Event.REQUEUED, Event.RESUMED}
#: What planning makes of a new row.
BEGINNINGS = {State.PLANNED, State.INVALID}


def reachable(begin: set[State], *, without: set[Event] | None = None) -> set[State]:
    found, fresh = set(begin), set(begin)
    while fresh:
        fresh = {
            after
            for (before, event), after in TRANSITIONS.items()
            if before in fresh and event not in (without or set())
        } - found
        found |= fresh
    return found


def test_every_state_can_be_reached() -> None:
    assert reachable(BEGINNINGS) == set(State)


def test_a_row_at_rest_moves_only_by_the_user_s_word() -> None:
    assert {event for (before, event) in TRANSITIONS if before in TERMINAL} <= BY_WORD


def test_without_the_user_s_word_a_done_row_stays_done() -> None:
    for state in TERMINAL:
        assert reachable({state}, without=BY_WORD) == {state}


@pytest.mark.parametrize("state", list(State))
def test_from_every_state_a_row_can_still_come_to_be_done(state: State) -> None:
    assert State.DONE in reachable({state})


@pytest.mark.parametrize("state", list(State))
def test_a_row_rests_exactly_in_the_terminal_states(state: State) -> None:
    assert (next_step(state) is Step.REST) == (state in TERMINAL)


# --- errors ---------------------------------------------------------------------------------------------


def subclasses(base: type) -> Iterator[type]:
    yield base
    child: type
    for child in base.__subclasses__():
        yield from subclasses(child)


def made(kind: type) -> errors.BatchrunError:
    """One error of that class, whatever its arguments."""
    extra = {"status": 404} if kind is errors.OutputGone else {}
    error = kind("what happened", **extra)
    assert isinstance(error, errors.BatchrunError)
    return error


@pytest.mark.parametrize("kind", list(subclasses(errors.ServiceError)))
@given(
    tries=st.integers(1, 10**9),
    refused_for_s=st.floats(0, 1e9),
    seed=st.integers(),
)
def test_every_error_of_the_service_has_a_decision(
    kind: type, tries: int, refused_for_s: float, seed: int
) -> None:
    error = made(kind)
    assert isinstance(error, errors.ServiceError)
    decision = after_submit(error, refused_for_s=refused_for_s, tries=tries, rng=Random(seed))
    assert isinstance(decision, Retry | Pause | WaitForSlot | DoubtDecision | Fail | Stop)
    if isinstance(decision, Retry):
        assert 0 <= decision.after_s <= 60


def test_only_errors_that_prove_it_let_a_submit_be_sent_again() -> None:
    # whatever is not on this list leaves a doubt: a further error class is safe by default
    proven = {
        errors.NotSent,
        errors.RateLimited,
        errors.LimitReached,
        errors.BalanceExhausted,
        errors.CredentialsRefused,
        errors.NotFound,
        errors.RequestRejected,
    }
    for kind in subclasses(errors.ServiceError):
        error = made(kind)
        assert isinstance(error, errors.ServiceError)
        decision = after_submit(error, refused_for_s=0, tries=1, rng=Random(0))
        assert isinstance(decision, DoubtDecision) == (kind not in proven)


@pytest.mark.parametrize(
    "kind",
    # a full disk is nobody's download: it stops the run before a decision is asked for
    [
        *(kind for kind in subclasses(errors.OutputError) if kind is not errors.DiskError),
        *subclasses(errors.ServiceError),
    ],
)
@given(troubles=st.integers(1, 10**9), elapsed_s=st.floats(0, 1e9), seed=st.integers())
def test_every_error_of_a_download_has_a_decision(
    kind: type, troubles: int, elapsed_s: float, seed: int
) -> None:
    decision = after_download(made(kind), troubles=troubles, elapsed_s=elapsed_s, rng=Random(seed))
    assert isinstance(decision, Refetch | Fail)
    if isinstance(decision, Refetch):
        assert 0 <= decision.after_s <= 30


@given(
    attempt=st.integers(1, 10**9),
    base_s=st.floats(0, 1e6),
    cap_s=st.floats(0, 1e6),
    seed=st.integers(),
)
@example(attempt=10**9, base_s=1.0, cap_s=60.0, seed=0)
def test_backoff_lies_between_zero_and_its_cap(attempt: int, base_s: float, cap_s: float, seed: int) -> None:
    assert 0 <= backoff_s(attempt, base_s=base_s, cap_s=cap_s, rng=Random(seed)) <= cap_s


@settings(max_examples=30, deadline=None)
@given(
    seen=st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), max_size=20),
    ages_s=st.lists(st.floats(0, 1e9), min_size=1, max_size=5),
    active=st.integers(0, 10**5),
)
def test_looks_are_never_too_close_and_never_too_far_apart(
    seen: list[tuple[float, float]], ages_s: list[float], active: int
) -> None:
    durations = Durations()
    for one, other in seen:
        durations.add(max(one, other), over_s=min(one, other))
    durations.adapt(active=active, budget_per_s=10.0)
    for age_s in ages_s:
        assert FLOOR_S <= durations.next_look_s(age_s) <= CEILING_S


# --- tasks ----------------------------------------------------------------------------------------------

STATUSES = st.sampled_from(
    [
        "",
        "task_queue",
        "task_start",
        "task_end",
        "task_error",
        "task_error_full",
        "task_cancel",
        "task_postprocess_end",
        "task_from_the_future",
    ]
)


@given(
    status=STATUSES,
    pexit=st.sampled_from([None, "0", "1", "137", "nonsense"]),
    images=st.booleans(),
    in_status_for_s=st.floats(0, 1e9),
)
def test_a_task_ends_only_by_a_terminal_status_or_a_lasting_error(
    status: str, pexit: str | None, images: bool, in_status_for_s: float
) -> None:
    outputs = (RemoteOutput("0.png", "https://cdn/0.png"),) if images else ()
    verdict: Verdict = judge(
        Task("1", status=status, pexit=pexit, outputs=outputs), in_status_for_s=in_status_for_s
    )
    if status not in {"task_error", "task_error_full", "task_cancel", "task_postprocess_end"}:
        assert isinstance(verdict, Running)
    if isinstance(verdict, Succeeded):
        assert images
        assert pexit in ("0", None)


# --- doubts ---------------------------------------------------------------------------------------------
#
# A world in which it is known which task is whose, and a listing of it as a faulty service would show it.

LOST_AT = 1000.0
BODY: dict[str, Value] = {"prompt": "a cat", "steps": 20}
Echo = Mapping[str, Any]
#: Echoes: as sent, as sent in other types, of other requests, of too little.
SAME_ECHOES: list[Echo] = [
    {"prompt": "a cat", "steps": "20"},
    {"prompt": " a cat ", "steps": 20.0},
]
OTHER_ECHOES: list[Echo] = [
    {"prompt": "a dog", "steps": "20"},
    {"prompt": "a dog", "steps": "21"},
    {"prompt": "a dog"},
]
SHORT_ECHOES: list[Echo | None] = [
    None,
    {},
    {"steps": "20"},
    {"unrelated": "x"},
    {"prompt": "a cat"},
    {"prompt": "a cat", "steps": 20, "more": 1},
    {"prompt": "a cat", "steps": "21"},
]


@dataclass(frozen=True)
class Seen:
    """A listed task with what the test knows of it."""

    task: Task
    is_claimed: bool
    #: None: nobody could tell.
    is_older: bool | None
    echo: str


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Doubt, Listing, list[Seen]]:
    after_task = draw(st.none() | st.integers(3, 8))
    intent_at = draw(st.none() | st.just(500.0))
    seen = []
    for number in draw(
        st.lists(st.integers(0, 12), unique=True, max_size=8).map(lambda ids: sorted(ids, reverse=True))
    ):
        echo, parameters = draw(
            st.one_of(
                st.sampled_from(SAME_ECHOES).map(lambda value: ("same", value)),
                st.sampled_from(OTHER_ECHOES).map(lambda value: ("other", value)),
                st.sampled_from(SHORT_ECHOES).map(lambda value: ("short", value)),
            )
        )
        numbered = draw(st.integers(0, 9)) > 0
        created_at = draw(st.none() | st.integers(190, 210) | st.integers(490, 510))
        is_older: bool | None = None
        if after_task is not None and numbered:
            is_older = number <= after_task
        elif intent_at is not None and created_at is not None:
            if created_at + CLOCKS_APART_S < intent_at:
                is_older = True
            elif created_at + CLOCK_TOLERANCE_S >= intent_at:
                is_older = False
        task = Task(str(number) if numbered else f"t-{number}", parameters=parameters, created_at=created_at)
        seen.append(Seen(task, draw(st.integers(0, 2)) == 0, is_older, echo))
    listing = Listing(
        tasks=[item.task for item in seen],
        begun_at=LOST_AT + draw(st.floats(0, 60)),
        to_the_end=draw(st.booleans()),
        claimed={item.task.id for item in seen if item.is_claimed},
    )
    return Doubt(BODY, ["prompt"], after_task, intent_at), listing, seen


def mine(item: Seen) -> bool:
    """Whether the task is the row's for all that can be told."""
    return not item.is_claimed and item.echo == "same" and item.is_older is False


def may_be_mine(item: Seen) -> bool:
    return not item.is_claimed and item.echo != "other" and item.is_older is not True


@given(worlds())
def test_a_lost_submit_adopts_the_oldest_task_that_is_its_own_and_no_other(
    world: tuple[Doubt, Listing, list[Seen]],
) -> None:
    doubt, listing, seen = world
    answer = settle_doubt(doubt, listing, lost_at=LOST_AT)
    own = [item for item in seen if mine(item)]
    if own:
        assert answer == Adopt(own[-1].task)
    else:
        assert not isinstance(answer, Adopt)


@given(worlds(), st.none() | st.floats(LOST_AT - 50, LOST_AT + 60))
def test_a_lost_submit_is_absent_only_when_every_other_explanation_is_ruled_out(
    world: tuple[Doubt, Listing, list[Seen]], earlier_at: float | None
) -> None:
    doubt, listing, seen = world
    assume(earlier_at is None or earlier_at <= listing.begun_at)
    grace_over_at = LOST_AT + GRACE_S
    certain = (
        listing.begun_at >= grace_over_at
        and not any(may_be_mine(item) for item in seen)
        and (listing.to_the_end or any(item.is_older for item in seen))
        and (
            any(item.is_claimed for item in seen)
            or (
                earlier_at is not None
                and earlier_at >= grace_over_at
                and listing.begun_at - earlier_at >= SECOND_LOOK_S
            )
        )
    )
    answer = settle_doubt(doubt, listing, lost_at=LOST_AT, earlier_at=earlier_at)
    assert isinstance(answer, Absent) == certain


@given(
    worlds(),
    st.sampled_from([["prompt"], ["steps"], ["prompt", "steps"], []]),
    st.sampled_from([(), ("prompt",), ("steps",)]),
)
def test_what_a_listing_leaves_out_for_a_doubt_is_certainly_not_its_task(
    world: tuple[Doubt, Listing, list[Seen]], given_names: list[str], images: tuple[str, ...]
) -> None:
    doubt, listing, _ = world
    doubt = replace(doubt, given=given_names, images=images)
    like = listing.like(doubt)
    unclaimed = [task for task in listing.tasks if task.id not in listing.claimed]
    assert like == [task for task in unclaimed if task in like]
    assert all(compare(doubt, task) in (Match.OTHER, Match.OLDER) for task in unclaimed if task not in like)


@given(worlds())
def test_a_lost_submit_is_held_only_when_looking_again_shows_no_more(
    world: tuple[Doubt, Listing, list[Seen]],
) -> None:
    doubt, listing, seen = world
    answer = settle_doubt(doubt, listing, lost_at=LOST_AT)
    if isinstance(answer, Hold):
        assert listing.begun_at >= LOST_AT + GRACE_S
        assert any(may_be_mine(item) for item in seen) or not listing.to_the_end
    if isinstance(answer, LookAgain):
        assert 0 < answer.after_s <= GRACE_S
        assert math.isfinite(answer.after_s)
