"""What becomes of a row when the state is rebuilt: from the remains of the state and the row's result line.

The remains may be old: a row that they call planned may have been bought since. So nothing is believed that
could lead to a second purchase: rows are done when something says so, failed when something says so, and
otherwise searched for at the service. Pure.
"""

from __future__ import annotations

from enum import StrEnum

from batchrun.model import State
from batchrun.rules.policy import SAVING_CAUSES


class Rebuilt(StrEnum):
    """Where a row stands in a rebuilt state."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: Its task is known: followed, and its images are fetched; nothing is bought.
    FOLLOW = "with a task"
    #: In doubt, with nothing known of a submit: looked for in the service's list of tasks.
    SEARCH = "in doubt"
    #: The manifest tells all there is to know of it.
    LEAVE = "left out"


def rebuilt(
    *,
    stored: State | None,
    told: str | None,
    cause: str | None,
    has_task: bool,
    has_newer_task: bool = False,
    refetch: bool = False,
) -> Rebuilt:
    """Where a row stands.

    `stored`: its state in what could be read of the old file; `told`: its status in results.jsonl; `cause`:
    of its failure. `has_task`: a task of it is known; `has_newer_task`: one that its result line does not
    know of yet. `refetch`: an image of it is to be fetched again.
    """
    if stored is State.INVALID or told == State.INVALID:
        return Rebuilt.LEAVE
    follow = Rebuilt.FOLLOW if has_task else Rebuilt.SEARCH
    if has_newer_task and stored in (State.IN_FLIGHT, State.FINISHED):
        return Rebuilt.FOLLOW  # asked for anew since
    if State.DONE in (stored, told):
        return follow if refetch else Rebuilt.DONE
    failed = (State.FAILED, State.CANCELLED)
    if told in failed or stored in failed:
        if cause in SAVING_CAUSES:
            return follow  # paid for: the images are fetched once more
        return (
            Rebuilt.CANCELLED
            if State.CANCELLED in (told, stored) and told != State.FAILED
            else Rebuilt.FAILED
        )
    if stored in (State.IN_FLIGHT, State.FINISHED):
        return follow
    return Rebuilt.SEARCH
