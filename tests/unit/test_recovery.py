"""A row's next step on resume, and what a listing says of a submit whose answer is lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from batchrun.model import State, Task, Value
from batchrun.rules.recovery import (
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
    is_older,
    next_step,
    same_value,
    settle_doubt,
    task_number,
)


@pytest.mark.parametrize(
    ("state", "step"),
    [
        (State.PLANNED, Step.SUBMIT),
        # the process died between intent and answer
        (State.SUBMITTING, Step.LOOK_UP),
        (State.IN_DOUBT, Step.LOOK_UP),
        (State.IN_FLIGHT, Step.FOLLOW),
        (State.FINISHED, Step.SAVE),
        # these rest until someone asks
        (State.DONE, Step.REST),
        (State.FAILED, Step.REST),
        (State.CANCELLED, Step.REST),
        (State.INVALID, Step.REST),
    ],
)
def test_the_next_step_depends_on_nothing_but_the_state(state: State, step: Step) -> None:
    assert next_step(state) is step


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("a cat", "a cat"),
        # numbers come back in any spelling
        (20, "20"),
        ("7.5", 7.5),
        ("7.5", Decimal("7.50")),
        (1024, "1024.000"),
        # empty is empty
        ("", None),
        ([], ""),
        ([], None),
        # lists as lists, as JSON text, and a single one bare
        (["a", "b"], ["a", "b"]),
        (["a", "b"], '["a", "b"]'),
        (["7"], [7]),
        (["a"], "a"),
        ("a", ["a"]),
        # line ends and outer white space are nobody's intention
        ("two\r\nlines", "two\nlines "),
        # options spelled as JSON booleans
        ("true", True),
        ("false", False),
    ],
)
def test_the_same_value_in_the_service_s_spelling(sent: Value, echoed: Any) -> None:
    assert same_value(sent, echoed)


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("a cat", "a dog"),
        ("a cat", None),
        ("1", "2"),
        (["a", "b"], ["b", "a"]),
        (["a"], []),
        ([], ["a"]),
        (["a"], "[a"),
        # nothing that a service can write brings the comparison down
        ("a", "[" * 100_000),
        (["a"], "[" * 100_000),
        ("sNaN", "1"),
        ("a", {"a": "a"}),
    ],
)
def test_another_value(sent: Value, echoed: Any) -> None:
    assert not same_value(sent, echoed)


@pytest.mark.parametrize(
    ("task_id", "number"),
    [
        ("2221", 2221),
        ("0", 0),
        ("9" * 18, 10**18 - 1),
        # more than the state can hold
        ("9" * 19, None),
        ("9" * 100_000, None),
        # digits of another script, other spellings, no digits
        ("٣", None),
        ("-1", None),
        ("1.0", None),
        ("abc", None),
        ("", None),
    ],
)
def test_task_ids_are_numbers_when_they_can_be(task_id: str, number: int | None) -> None:
    assert task_number(task_id) == number


# --- one task -------------------------------------------------------------------------------------------

BODY: dict[str, Value] = {"prompt": "a cat", "steps": 20, "seed": "5"}
DOUBT = Doubt(BODY, ["prompt"], after_task=100, intent_server_at=1000.0)
KNOWN = replace(DOUBT, model_id="7")
MINE = Task("101", parameters={"prompt": "a cat", "steps": "20", "seed": "5"}, created_at=1001)


@pytest.mark.parametrize(
    ("doubt", "task", "older"),
    [
        # by ids
        (DOUBT, replace(MINE, id="100"), True),
        (DOUBT, replace(MINE, id="99"), True),
        (DOUBT, replace(MINE, id="101"), False),
        # ids rule over times: clocks may differ
        (DOUBT, replace(MINE, id="101", created_at=1), False),
        # by the service's own times, with 2 s of tolerance
        (replace(DOUBT, after_task=None), replace(MINE, created_at=699), True),
        (replace(DOUBT, after_task=None), replace(MINE, created_at=998), False),
        (DOUBT, replace(MINE, id="abc", created_at=699), True),
        # clocks that are further apart than that tell nothing
        (replace(DOUBT, after_task=None), replace(MINE, created_at=997), False),
        # an empty listing knew no older task, unless it erred
        (replace(DOUBT, after_task=0), replace(MINE, created_at=997), False),
        (replace(DOUBT, after_task=0), replace(MINE, created_at=None), False),
        (replace(DOUBT, after_task=0), replace(MINE, created_at=699), True),
        # unknown is not older
        (replace(DOUBT, after_task=None), replace(MINE, created_at=None), False),
        (replace(DOUBT, after_task=None, intent_server_at=None), replace(MINE, created_at=1), False),
    ],
)
def test_what_existed_before_the_intent(doubt: Doubt, task: Task, older: bool) -> None:
    assert is_older(doubt, task) is older


@pytest.mark.parametrize(
    ("doubt", "task", "match"),
    [
        (DOUBT, MINE, Match.SAME),
        # other names may be another tool's, while it is not known which tool's task it is
        (DOUBT, replace(MINE, parameters={**MINE.parameters, "more": "9"}), Match.UNKNOWABLE),  # type: ignore[dict-item]
        (DOUBT, replace(MINE, parameters={"prompt": "a cat"}), Match.UNKNOWABLE),
        (DOUBT, replace(MINE, parameters={"prompt": "a dog", "more": "9"}), Match.OTHER),
        # extra echoed keys say nothing
        (KNOWN, replace(MINE, model_id="7", parameters={**MINE.parameters, "more": "9"}), Match.SAME),  # type: ignore[dict-item]
        # defaults may be left out of the echo, what the row gives may not
        (KNOWN, replace(MINE, model_id="7", parameters={"prompt": "a cat"}), Match.SAME),
        (KNOWN, replace(MINE, model_id="7", parameters={"steps": 20}), Match.UNKNOWABLE),
        (DOUBT, replace(MINE, parameters={"steps": 20}), Match.UNKNOWABLE),
        (DOUBT, replace(MINE, parameters={}), Match.UNKNOWABLE),
        (DOUBT, replace(MINE, parameters=None), Match.UNKNOWABLE),
        # what the row gives differs
        (DOUBT, replace(MINE, parameters={"prompt": "a dog"}), Match.OTHER),
        (
            replace(DOUBT, body={"prompt": "7"}, texts=["prompt"]),
            replace(MINE, parameters={"prompt": "7.0"}),
            Match.OTHER,
        ),
        # a default or an address may come back in the service's own words
        (DOUBT, replace(MINE, parameters={"prompt": "a cat", "steps": 20, "seed": "6"}), Match.UNKNOWABLE),
        (replace(DOUBT, images=["prompt"]), replace(MINE, parameters={"prompt": "a dog"}), Match.UNKNOWABLE),
        # before the intent, whatever it asks for
        (DOUBT, replace(MINE, id="100"), Match.OLDER),
        # another tool, when both are known
        (KNOWN, replace(MINE, model_id="8"), Match.OTHER),
        (KNOWN, replace(MINE, model_id="7"), Match.SAME),
        (KNOWN, MINE, Match.SAME),
        (DOUBT, replace(MINE, model_id="8"), Match.SAME),  # which may be its number
        # of unknown age: it may be last week's
        (replace(DOUBT, after_task=None, intent_server_at=None), MINE, Match.UNKNOWABLE),
        (replace(DOUBT, after_task=None), replace(MINE, created_at=None), Match.UNKNOWABLE),
        # of unknown age, but certainly not ours
        (
            replace(DOUBT, after_task=None, intent_server_at=None),
            replace(MINE, parameters={"prompt": "a dog"}),
            Match.OTHER,
        ),
    ],
)
def test_how_a_listed_task_relates_to_a_lost_submit(doubt: Doubt, task: Task, match: Match) -> None:
    assert compare(doubt, task) is match


# --- a listing ------------------------------------------------------------------------------------------

LOST_AT = 5000.0
AFTER_GRACE = LOST_AT + GRACE_S
OLD = replace(MINE, id="100", parameters={"prompt": "old"})
OURS = replace(MINE, id="105", parameters={"prompt": "ours"})
OTHER = replace(MINE, id="106", parameters={"prompt": "somebody's"})
SILENT = replace(MINE, id="107", parameters=None)


def listed(
    *tasks: Task,
    begun_at: float = AFTER_GRACE,
    to_the_end: bool = False,
    claimed: Collection[str] = ("105",),
) -> Listing:
    return Listing(tasks, begun_at, to_the_end, set(claimed))


@pytest.mark.parametrize(
    ("listing", "answer"),
    [
        # found: at once, even while the grace runs and however short the listing is
        (listed(MINE, begun_at=LOST_AT), Adopt(MINE)),
        (listed(OTHER, SILENT, MINE, claimed=()), Adopt(MINE)),
        # of two, the older: among identical rows the first lost submit takes the first task
        (listed(replace(MINE, id="103"), replace(MINE, id="102"), OLD), Adopt(replace(MINE, id="102"))),
        # claimed by another row: not this one's
        (listed(MINE, OLD, claimed=("101",)), Absent()),
        # the task may still appear
        (listed(OLD, OURS, begun_at=LOST_AT), LookAgain(GRACE_S)),
        (listed(OLD, OURS, begun_at=AFTER_GRACE - 0.5), LookAgain(0.5)),
        # all conditions met: read back, proved by a task of ours
        (listed(OURS, OLD), Absent()),
        (listed(OURS, to_the_end=True), Absent()),
        (listed(OTHER, OURS, OLD), Absent()),
        # an unclaimed task that cannot be compared may be it
        (listed(SILENT, OURS, OLD), Hold("the service does not echo the parameters of its newest tasks")),
        # a listing that ends among newer tasks may end before it
        (listed(OURS, OTHER), Hold("the listing does not reach back to before the submit")),
        # nothing of ours in it: two answers, ten seconds apart, both after the grace
        (listed(OLD, claimed=()), LookAgain(SECOND_LOOK_S)),
        (listed(to_the_end=True, claimed=()), LookAgain(SECOND_LOOK_S)),
    ],
)
def test_what_a_listing_says_of_a_lost_submit(listing: Listing, answer: object) -> None:
    assert settle_doubt(DOUBT, listing, lost_at=LOST_AT) == answer


@pytest.mark.parametrize(
    ("newest_known", "answer"),
    [
        (0, Absent()),
        (105, Absent()),
        # made before the doubt arose, and not listed yet: the lost one may not be either
        (106, Hold("the listing does not show this run's newest tasks")),
    ],
)
def test_a_listing_older_than_a_known_task_proves_no_absence(newest_known: int, answer: object) -> None:
    listing = listed(OURS, OLD)
    assert settle_doubt(DOUBT, listing, lost_at=LOST_AT, newest_known=newest_known) == answer


def test_a_task_without_a_number_tells_by_its_time_how_far_a_listing_reaches() -> None:
    dated = replace(DOUBT, after_task=100, intent_server_at=5000.0)
    newer = replace(MINE, id="205", created_at=100)  # by its number, which counts
    nameless = replace(MINE, id="t-9", created_at=200)
    assert not listed(newer).reaches(dated)
    assert listed(newer, nameless).reaches(dated)
    assert listed(replace(nameless, created_at=4900), nameless).reaches(dated)


@pytest.mark.parametrize(
    ("after_s", "earlier_at", "answer"),
    [
        (4, AFTER_GRACE, LookAgain(SECOND_LOOK_S - 4)),
        (SECOND_LOOK_S, AFTER_GRACE, Absent()),
        # an earlier answer from the grace, or from long before the submit, is none
        (60, AFTER_GRACE - 1, LookAgain(SECOND_LOOK_S)),
        (60, 0.0, LookAgain(SECOND_LOOK_S)),
    ],
)
def test_what_two_listings_without_a_task_of_ours_say(
    after_s: float, earlier_at: float, answer: object
) -> None:
    for listing in (
        listed(OLD, claimed=(), begun_at=AFTER_GRACE + after_s),
        listed(claimed=(), to_the_end=True, begun_at=AFTER_GRACE + after_s),
    ):
        assert settle_doubt(DOUBT, listing, lost_at=LOST_AT, earlier_at=earlier_at) == answer
