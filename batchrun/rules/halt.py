"""When failures are so many, or so much alike, that going on would waste the night: the run halts. Pure.

A broken manifest or tool fails every row for the same reason; a row's own bad luck does not. `--halt fail=N`
and `fail=N%` are the user's own bounds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

#: So many rows in a row that fail for one cause, none done in between, halt a run by default.
STREAK = 50
#: A share of failed rows means nothing while fewer than this have settled.
SHARE_FROM = 20

#: Causes that are no sign that other rows would fail: a tool that is not there fails its own rows at once.
APART = frozenset({"tool not found"})

_FORM = re.compile(r"fail=([0-9]{1,9}(?:\.[0-9]{1,6})?)(%?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Halt:
    """The bounds of a run's failures; None: not bounded so."""

    streak: int | None = STREAK
    rows: int | None = None
    percent: Decimal | None = None


def parse_halt(text: str) -> Halt:
    """The bounds that `text` names; raises ValueError saying what to write."""
    if text == "never":
        return Halt(streak=None)
    form = _FORM.fullmatch(text.replace(" ", ""))
    if form is None:
        raise ValueError(f'"{text}" is none of "never", "fail=10" (rows) and "fail=5%" (of the settled rows)')
    number, percent = Decimal(form[1]), bool(form[2])
    if percent and 0 < number <= 100:
        return Halt(percent=number)
    if not percent and number >= 1 and number == int(number):
        return Halt(rows=int(number))
    raise ValueError(f'"{text}" is out of range; write whole rows from 1, or a share above 0 up to 100%')


@dataclass(slots=True)
class Failures:
    """The rows that settled in this start, and whether they are reason to halt."""

    bounds: Halt
    settled: int = 0
    failed: int = 0
    streak: int = 0
    cause: str = ""

    def done(self) -> None:
        """A row has all its images."""
        self.settled += 1
        self.streak = 0

    def failure(self, cause: str) -> str | None:
        """A row failed for this cause; why the run is to halt now, None while it is not."""
        self.settled += 1
        self.failed += 1
        if cause not in APART:
            self.streak = self.streak + 1 if cause == self.cause else 1
            self.cause = cause
        bounds = self.bounds
        if bounds.rows is not None and self.failed >= bounds.rows:
            return f"{self.failed:,} rows failed (--halt fail={bounds.rows})"
        if bounds.percent is not None and self.settled >= SHARE_FROM:
            share = Decimal(100 * self.failed) / self.settled
            if share >= bounds.percent:
                return f"{self.failed:,} of {self.settled:,} rows failed (--halt fail={bounds.percent}%)"
        if bounds.streak is not None and self.streak >= bounds.streak:
            return (
                f"{self.streak:,} rows failed one after the other for the same cause: {cause} "
                "(--halt never goes on all the same)"
            )
        return None
