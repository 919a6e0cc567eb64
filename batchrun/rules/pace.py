"""When to look at a task again: a pure policy learned from the tool's own durations.

A tool's tasks take similar times, so the first look waits for most of the typical duration and later
looks come close together around it, then apart again for tasks that overrun.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

#: Looks at one task are never closer than this.
FLOOR_S = 0.1
#: Looks at one task are never further apart than this.
CEILING_S = 10.0
#: The first look while a tool's durations are unknown.
FIRST_LOOK_S = 1.0
#: A task that has begun is taken for stuck no sooner than this, and after this at the latest.
STUCK_S = (300.0, 3600.0)
#: Statuses of tasks that have not begun, and how long they may take.
QUEUED = frozenset({"", "task_queue"})
QUEUED_S = 6 * 3600.0


@dataclass(slots=True)
class Durations:
    """The newest observed durations of one tool's tasks, in seconds."""

    seen: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    def add(self, seconds: float) -> None:
        """Remember a task that was `seconds` old when it was seen finished."""
        self.seen.append(max(0.0, seconds))

    @property
    def typical_s(self) -> float | None:
        """The median, None until something was seen."""
        return median(self.seen) if self.seen else None

    @property
    def longest_s(self) -> float | None:
        """The longest, None until something was seen."""
        return max(self.seen, default=None)


def stuck_after_s(status: str, longest_s: float | None) -> float:
    """How long a task may stay in one status before it is taken for stuck; `longest_s`: of its tool's tasks.

    Tasks that queue wait for other people's; a tool's slowest task so far says what is slow for it.
    """
    if status in QUEUED:
        return QUEUED_S
    if longest_s is None:
        return STUCK_S[1]
    return min(STUCK_S[1], max(STUCK_S[0], 20 * longest_s))


def next_look_s(age_s: float, typical_s: float | None) -> float:
    """Seconds until the next look at a task of `age_s`, in [FLOOR_S, CEILING_S]."""
    if typical_s is None:
        wait_s = FIRST_LOOK_S if age_s < FIRST_LOOK_S else age_s / 4
    elif age_s < typical_s * 0.8:
        wait_s = typical_s * 0.9 - age_s
    else:
        wait_s = max(typical_s / 8, (age_s - typical_s) / 4)
    return min(CEILING_S, max(FLOOR_S, wait_s))
