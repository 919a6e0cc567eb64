"""A run as a person wants to know it at one moment: what the display and the lines draw from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from decimal import Decimal

from batchrun.model import State
from batchrun.progress import Event, Fact, Progress
from batchrun.report.pace import Pace
from batchrun.report.words import about, count, plain, rough_usd, size


@dataclass(frozen=True, slots=True)
class Sight:
    """The state of a run at one moment. Rows are those of the manifest that this start is to work on."""

    total: int
    done: int
    failed: int
    cancelled: int
    invalid: int
    in_doubt: int
    #: Submits sent whose answers are not here yet.
    awaited: int
    #: Made and paid for; images are still to be saved.
    saving: int
    #: Tasks that run at the service or are being submitted.
    active: int
    #: How many there may be, doubtful ones included; 0 until known.
    limit: int
    images: int
    bytes: int
    cost_usd: Decimal
    #: Of the last minutes; 0.0 while nothing is known.
    rows_per_min: float
    #: None: cannot be said.
    left_s: float | None
    elapsed_s: float
    #: Why nothing is submitted just now; None while it is.
    waiting_for: str | None

    @property
    def settled(self) -> int:
        """Rows that rest."""
        return self.done + self.failed + self.cancelled + self.invalid

    @property
    def unmade(self) -> list[str]:
        """The rows that rest without images, in words: `3 failed`, `1 cancelled`."""
        numbers = ((self.failed, "failed"), (self.cancelled, "cancelled"), (self.invalid, "invalid"))
        return [f"{number:,} {word}" for number, word in numbers if number]


#: What ends the wait for the answer to a submit.
_ANSWERS = frozenset({Fact.ACCEPTED, Fact.WITHDRAWN, Fact.DOUBT, Fact.FAILED})


class Watch:
    """Looks at a run's progress, and remembers enough to tell its pace."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        #: Rows that are not to be worked on in this start.
        self.beyond_limit = 0
        #: None until the work begins.
        self.began_at: float | None = None
        self._pace = Pace()
        self._awaited: set[int | None] = set()
        progress.listen(self._hear)

    def _hear(self, event: Event) -> None:
        if event.fact is Fact.INTENT:
            self._awaited.add(event.seq)
        elif event.fact in _ANSWERS:
            self._awaited.discard(event.seq)

    def begin(self, *, beyond_limit: int) -> None:
        """The manifest is planned and the work begins: from here the pace is told."""
        self.began_at = time.monotonic()
        self.beyond_limit = beyond_limit
        self._pace = Pace()  # what was done by earlier starts is no pace
        self.look()

    def look(self) -> Sight:
        """The run as it stands."""
        now, progress = time.monotonic(), self.progress
        counts = {state: max(0, rows) for state, rows in progress.counts.items()}
        done = counts.get(State.DONE, 0)
        unmade = [counts.get(state, 0) for state in (State.FAILED, State.CANCELLED, State.INVALID)]
        # doubts and downloads come to rest in their own time, so the pace is of what came to rest at all
        settled = done + sum(unmade)
        total = max(sum(counts.values()) - self.beyond_limit, settled)
        self._pace.note(now, settled)
        return Sight(
            total=total,
            done=done,
            failed=unmade[0],
            cancelled=unmade[1],
            invalid=unmade[2],
            in_doubt=counts.get(State.IN_DOUBT, 0),
            awaited=len(self._awaited),
            saving=counts.get(State.FINISHED, 0),
            active=counts.get(State.IN_FLIGHT, 0) + len(self._awaited),
            limit=progress.limit,
            images=progress.images,
            bytes=progress.bytes,
            cost_usd=progress.cost_usd,
            rows_per_min=60 * self._pace.rows_per_s(now, settled),
            left_s=self._pace.left_s(now, settled, total - settled),
            elapsed_s=now - progress.started_at,
            waiting_for=plain(progress.paused, limit=200) if progress.paused else None,
        )


def rows_of(sight: Sight) -> str:
    """`309 of 553 rows done, 3 failed, 1 in doubt`."""
    parts = [f"{sight.done:,} of {count(sight.total, 'row')} done"]
    parts += sight.unmade
    parts += [f"{sight.in_doubt:,} in doubt"] if sight.in_doubt else []
    return ", ".join(parts)


def active_of(sight: Sight) -> str:
    """`14 of 16 tasks active`; more than the limit where earlier starts or doubts left them."""
    if not sight.limit:
        return f"{count(sight.active, 'task')} active"
    if sight.active > sight.limit:
        return f"{count(sight.active, 'task')} active, limit {sight.limit:,}"
    return f"{sight.active:,} of {count(sight.limit, 'task')} active"


def tasks_of(sight: Sight) -> str:
    """`14 of 16 tasks active, 2 rows being saved`."""
    text = active_of(sight)
    return f"{text}, {count(sight.saving, 'row')} being saved" if sight.saving else text


def gain_of(sight: Sight) -> str:
    """`1,236 images, 812 MB, 2.43 USD`; a cost that is not told is left out."""
    parts = [count(sight.images, "image"), size(sight.bytes)]
    parts += [rough_usd(sight.cost_usd)] if sight.cost_usd else []
    return ", ".join(parts)


def rate_of(sight: Sight) -> str:
    """`25.8 rows/min`, `408 rows/min`."""
    return f"{sight.rows_per_min:,.{1 if sight.rows_per_min < 100 else 0}f} rows/min"


def pace_of(sight: Sight) -> str:
    """`25.8 rows/min, about 9 min left`; empty while nothing is known."""
    if not sight.rows_per_min:
        return ""
    text = rate_of(sight)
    if sight.left_s is not None and sight.settled < sight.total and sight.waiting_for is None:
        text += f", about {about(sight.left_s)} left"
    return text


class Notes:
    """What is worth a word of all that is announced, as `(text, style)`."""

    def __init__(self) -> None:
        self._told_limit: int | None = None

    def note(self, event: Event) -> tuple[str, str] | None:
        """The words for an event; None when it is everyday work."""
        details = event.details
        reason = plain(str(details.get("message") or details.get("reason") or ""), limit=300)
        match event.fact:
            case Fact.FAILED:
                return f"{_row(event)} failed: {reason}", "red"
            case Fact.ATTEMPT_FAILED:
                return f"{_row(event)} goes again, its task failed: {reason}", "yellow"
            case Fact.DOUBT:
                return f"{_row(event)} is looked up, its answer is lost: {reason}", "yellow"
            case Fact.ADOPTED:
                return f"{_row(event)} was found: its task had been made", ""
            case Fact.ABSENT:
                return f"{_row(event)} had not arrived and is submitted again", ""
            case Fact.HELD:
                return f"{_row(event)} is held in doubt: {reason}", "yellow"
            case Fact.PAUSED:
                return f"waiting: {reason}", "yellow"
            case Fact.RESUMED:
                return "going on", "green"
            case Fact.NOTE:
                return f"{_row(event)}: {reason}" if event.seq else reason, "yellow"
            case Fact.LIMIT if details.get("told") and details["told"] != self._told_limit:
                self._told_limit = details["told"]
                return f"the account allows {count(details['told'], 'task')} at once", ""
        return None


def _row(event: Event) -> str:
    if event.id is not None:
        return f"row {plain(event.id, limit=60)} (line {event.line})"
    return f"line {event.line}"
