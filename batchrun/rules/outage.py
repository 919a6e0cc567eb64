"""Telling an outage from a bad row, by looking at the submits of all rows together.

A submit without a sound answer (refused, reset, timed out, a server's error page) may be the service's
trouble or the row's own. It is the row's own only when other rows were answered in the meantime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: So many submits in a row without a sound answer, over all rows, are an outage.
OUTAGE = 6
#: A row that alone met trouble so often, others being answered each time, and for so long, is given up.
BAD_ROW = 6
BAD_ROW_S = 600.0


@dataclass(slots=True)
class _Trouble:
    """What one row met."""

    #: Seconds of some clock when it began.
    since: float
    #: How often it met trouble while others were well.
    times: int
    #: How many answers had been sound when it met the last one.
    sound: int


@dataclass(slots=True)
class Health:
    """How the submits of a run fare."""

    #: Submits without a sound answer since the last one that had one.
    in_a_row: int = 0
    _sound: int = 0
    _rows: dict[int, _Trouble] = field(default_factory=dict)

    def sound(self, row: int) -> None:
        """The row's submit was answered as it should be, be it with a refusal."""
        self.in_a_row = 0
        self._sound += 1
        self._rows.pop(row, None)

    @property
    def answered(self) -> int:
        """How many submits were answered as they should be."""
        return self._sound

    def trouble(self, row: int, *, at: float, sent_after: int | None = None) -> int:
        """The row's submit was not, `at` seconds of some clock; how often that was the row's own trouble.

        `sent_after` is what `answered` was when it was sent: an answer since then shows that the service was
        well again. None: it has just been sent.
        """
        if sent_after is None or sent_after == self._sound:
            self.in_a_row += 1
        known = self._rows.get(row)
        if known is None:
            known = self._rows[row] = _Trouble(at, 1, self._sound)
        elif self._sound > known.sound:
            known.times += 1
            known.sound = self._sound
        return known.times

    @property
    def is_outage(self) -> bool:
        """Whether the service is in trouble, whoever asks."""
        return self.in_a_row >= OUTAGE

    @property
    def troubled(self) -> int:
        """Rows whose last submit met trouble."""
        return len(self._rows)

    def forget(self, row: int) -> None:
        """The row is not submitted any more."""
        self._rows.pop(row, None)

    def is_bad(self, row: int, *, at: float) -> bool:
        """Whether it is the row that is in trouble: again and again, while others were answered."""
        known = self._rows.get(row)
        return known is not None and known.times >= BAD_ROW and at - known.since >= BAD_ROW_S
