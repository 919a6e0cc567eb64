"""Facts announced to listeners while a run goes on; nobody who listens can change the run.

Listeners are called at once, in order, on the event loop: between two effects of a row's way. They should be
quick. `Progress` also keeps the live picture that a display draws.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from batchrun.model import Counts, Row, State


class Fact(StrEnum):
    """What can be announced."""

    #: The manifest is in the state; `rows`, `images`.
    PLANNED = "planned"
    #: The intent of a submit is recorded; the request goes out next.
    INTENT = "intent"
    #: The service accepted a submit; its answer is recorded next.
    ACCEPTED = "accepted"
    #: The answer is recorded.
    IN_FLIGHT = "in flight"
    WITHDRAWN = "withdrawn"
    DOUBT = "doubt"
    ADOPTED = "adopted"
    ABSENT = "absent"
    HELD = "held"
    #: A task was seen to have ended well; recorded next.
    ENDED = "ended"
    FINISHED = "finished"
    ATTEMPT_FAILED = "attempt failed"
    #: All bytes of an image have come; verified and published next.
    DOWNLOADED = "downloaded"
    #: An image has its final name; recorded next.
    PUBLISHED = "published"
    #: An image is recorded.
    SAVED = "saved"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: Lines were added to the sidecar files.
    LISTED = "listed"
    #: Submits wait; `reason`.
    PAUSED = "paused"
    RESUMED = "resumed"
    LIMIT = "limit"
    NOTE = "note"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Event:
    """One fact about the run, or about one of its rows."""

    fact: Fact
    #: UTC unix seconds.
    at: float
    seq: int | None = None
    id: str | None = None
    line: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]


class Progress:
    """The live picture of a run, and the place where its facts are announced."""

    def __init__(self, *listeners: Listener) -> None:
        self.counts: Counter[State] = Counter()
        self.images = 0
        self.bytes = 0
        self.cost_usd = Decimal(0)
        #: Rows that were done before this start.
        self.done_before = 0
        #: Task slots in use, and how many there are.
        self.active = 0
        self.limit = 0
        #: Why submits wait; None while they do not.
        self.paused: str | None = None
        self.warnings = 0
        self.started_at = time.monotonic()
        self._listeners = list(listeners)

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every further event."""
        self._listeners.append(listener)

    def begin(self, counts: Counts) -> None:
        """Start from what the state holds."""
        self.counts = Counter(counts.by_state)
        self.images, self.bytes, self.cost_usd = counts.images, counts.bytes, counts.cost_usd
        self.done_before = self.counts[State.DONE]

    def announce(self, fact: Fact, row: Row | None = None, **details: Any) -> None:
        """Tell every listener."""
        if not self._listeners:
            return
        event = Event(
            fact,
            time.time(),
            row.seq if row else None,
            row.id if row else None,
            row.line if row else None,
            details,
        )
        for listener in self._listeners:
            listener(event)

    def moved(self, before: State, after: State) -> None:
        """A row went from one state to another."""
        if before is not after:
            self.counts[before] -= 1
            self.counts[after] += 1

    @property
    def total(self) -> int:
        """All rows of the manifest."""
        return sum(self.counts.values())

    @property
    def settled(self) -> int:
        """Rows that rest."""
        counts = self.counts
        return counts[State.DONE] + counts[State.FAILED] + counts[State.CANCELLED] + counts[State.INVALID]

    @property
    def rows_per_s(self) -> float:
        """Rows done per second since this start."""
        elapsed_s = time.monotonic() - self.started_at
        return (self.counts[State.DONE] - self.done_before) / elapsed_s if elapsed_s > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The time the rest will take at the pace so far; None while there is none."""
        left = self.total - self.settled
        pace = self.rows_per_s
        return left / pace if pace > 0 and left else None
