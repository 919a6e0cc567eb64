"""How fast a run goes of late: an average since the start would still count the dark hours of an outage."""

from __future__ import annotations

from collections import deque

#: What "of late" means; long enough for tools that take minutes.
WINDOW_S = 300.0
#: How often the number of rows is noted: bounds what is remembered.
NOTE_S = 2.0


class Pace:
    """Rows per minute over the last minutes. Times are of one monotonic clock."""

    def __init__(self) -> None:
        self._notes: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, rows: int) -> None:
        """So many rows had been done at that time."""
        if not self._notes or now_s - self._notes[-1][0] >= NOTE_S:
            self._notes.append((now_s, rows))
        while len(self._notes) > 1 and now_s - self._notes[1][0] >= WINDOW_S:
            self._notes.popleft()

    def rows_per_s(self, now_s: float, rows: int) -> float:
        """The pace up to now; 0.0 while nothing is known."""
        if not self._notes:
            return 0.0
        then_s, before = self._notes[0]
        return max(0, rows - before) / (now_s - then_s) if now_s > then_s else 0.0

    def left_s(self, now_s: float, rows: int, rows_left: int) -> float | None:
        """How long the rest will take at this pace; None when that cannot be said."""
        pace = self.rows_per_s(now_s, rows)
        return rows_left / pace if pace > 0 else None
