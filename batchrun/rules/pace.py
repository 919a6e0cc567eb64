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


def next_look_s(age_s: float, typical_s: float | None) -> float:
    """Seconds until the next look at a task of `age_s`, in [FLOOR_S, CEILING_S]."""
    if typical_s is None:
        wait_s = FIRST_LOOK_S if age_s < FIRST_LOOK_S else age_s / 4
    elif age_s < typical_s * 0.8:
        wait_s = typical_s * 0.9 - age_s
    else:
        wait_s = max(typical_s / 8, (age_s - typical_s) / 4)
    return min(CEILING_S, max(FLOOR_S, wait_s))
