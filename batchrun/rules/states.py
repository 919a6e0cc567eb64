"""The state machine of a row: everything that decides where a row stands lives here, as a table.

The table is data, so that a script can draw it and a missing move is an error, not a surprise.
"""

from __future__ import annotations

from enum import StrEnum

from batchrun.model import State


class Event(StrEnum):
    """What can happen to a row."""

    INTENT_RECORDED = "intent recorded"
    ACCEPTED = "accepted"
    #: The submit certainly made no task: it was not sent, or refused with "wait".
    WITHDRAWN = "withdrawn"
    REPLY_LOST = "reply lost"
    #: The service refuses the request, or has no such tool.
    REJECTED = "rejected"
    #: The task of a doubtful submit was found.
    ADOPTED = "adopted"
    #: It is certain that a doubtful submit made no task.
    ABSENT = "absent"
    #: The task succeeded: its outputs and cost are known.
    FINISHED = "finished"
    #: The task failed and was not billed; another attempt is allowed.
    ATTEMPT_FAILED = "attempt failed"
    #: The task failed and no attempt is left, or what was paid for is gone.
    GAVE_UP = "gave up"
    SAVED = "saved"
    CANCELLED = "cancelled"
    #: The user asks for the row again; what was paid for and not yet saved is fetched, not bought.
    REQUEUED = "requeued"
    RESUMED = "resumed"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.PLANNED, Event.INTENT_RECORDED): State.SUBMITTING,
    (State.PLANNED, Event.REJECTED): State.FAILED,  # its tool is gone, or its input image
    (State.SUBMITTING, Event.ACCEPTED): State.IN_FLIGHT,
    (State.SUBMITTING, Event.WITHDRAWN): State.PLANNED,
    (State.SUBMITTING, Event.REJECTED): State.FAILED,
    (State.SUBMITTING, Event.REPLY_LOST): State.IN_DOUBT,  # never sent again silently: it may be paid for
    (State.IN_DOUBT, Event.ADOPTED): State.IN_FLIGHT,
    (State.IN_DOUBT, Event.ABSENT): State.PLANNED,
    (State.IN_DOUBT, Event.REQUEUED): State.PLANNED,  # by the user's word alone
    (State.IN_FLIGHT, Event.FINISHED): State.FINISHED,
    (State.IN_FLIGHT, Event.ATTEMPT_FAILED): State.PLANNED,
    (State.IN_FLIGHT, Event.GAVE_UP): State.FAILED,
    (State.IN_FLIGHT, Event.CANCELLED): State.CANCELLED,
    (State.FINISHED, Event.SAVED): State.DONE,
    (State.FINISHED, Event.GAVE_UP): State.FAILED,
    (State.FAILED, Event.REQUEUED): State.PLANNED,
    (State.FAILED, Event.RESUMED): State.FINISHED,
    (State.CANCELLED, Event.REQUEUED): State.PLANNED,
    (State.INVALID, Event.REQUEUED): State.PLANNED,
    (State.DONE, Event.REQUEUED): State.PLANNED,  # a changed request, with --rerun-changed
}


class ImpossibleMove(Exception):
    """An event happened in a state that does not know it: a fault of ours, never of the input."""


def advance(state: State, event: Event) -> State:
    """The state after `event`; raises ImpossibleMove when the table has no such move."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ImpossibleMove(f"{event.value!r} cannot happen to a row that is {state.value}") from None
