"""A run told in lines, for logs and pipes: one every half minute, and one when it has to wait or to stop."""

from __future__ import annotations

import time

import anyio

from batchrun.progress import Event, Fact
from batchrun.report.talk import Talk
from batchrun.report.watch import Sight, Watch, gain_of, pace_of, rows_of, tasks_of
from batchrun.report.words import plain

#: How often a line is said.
EVERY_S = 30.0


class Lines:
    """Says how a run goes, a line at a time."""

    def __init__(self, talk: Talk, watch: Watch) -> None:
        self._talk = talk
        self._watch = watch
        #: When a wait was told last, in monotonic seconds; None: not yet.
        self._told_at: float | None = None
        self._is_waiting = False

    def listen(self, event: Event) -> None:
        """Take in an event."""
        if event.fact is Fact.STOPPING:
            self._say(f"stopping: {_reason(event)}")
        elif event.fact is Fact.PAUSED:
            now = time.monotonic()
            # a service that comes and goes is told of now and then, by the lines
            if not self._is_waiting and self._told_at is not None and now - self._told_at < EVERY_S:
                return
            self._told_at, self._is_waiting = now, True
            self._say(f"waiting: {_reason(event)}")
        elif event.fact is Fact.RESUMED and self._is_waiting:
            self._is_waiting = False
            self._say("going on")

    async def run(self) -> None:
        """Say a line now and then, until cancelled."""
        while True:
            await anyio.sleep(EVERY_S)
            if self._watch.began_at is not None:
                self._say(line(self._watch.look()))

    def _say(self, text: str) -> None:
        self._talk.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")


def _reason(event: Event) -> str:
    return plain(str(event.details.get("reason", "")), limit=300)


def line(sight: Sight) -> str:
    """The run in one line."""
    parts = [rows_of(sight), tasks_of(sight), gain_of(sight), pace_of(sight)]
    parts += [f"waiting: {sight.waiting_for}"] if sight.waiting_for else []
    return "; ".join(part for part in parts if part)
