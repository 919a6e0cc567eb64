"""Following tasks by the service's own events: almost no lag, and no promise.

Looks stay the truth. A task counts as covered only while a connection lives that has told something of it;
looks at it are then far apart. An end that is told frees the task's slot, and a look or a page confirms it.
Several tasks share a connection as long as the service tells of all of them; where it tells of one only, each
gets its own, within a bound, and tasks beyond that are looked at as if there were no events. Of how many ends
nothing was told is counted: that much a silence is doubted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Protocol

import anyio
import anyio.abc

from batchrun import errors
from batchrun.dispatch.track import Left, Tracker, Watch
from batchrun.rules.policy import backoff_s

#: A token of which nothing is told for so long is asked for elsewhere, or given up until it is.
UNHEARD_S = 3.0
#: How often that is looked at.
CHECK_S = 0.5
#: Tasks on one connection.
SHARED = 200
#: Connections at once.
MAX_SOCKETS = 64
#: Connections that are lost are made anew after a wait of up to this.
MOST_AGAIN_S = 60.0
#: Whether ends were told is kept of so many tasks; at first one in that many is doubted,
ENDS_KEPT, FIRST_DOUBT = 100, 20
#: and where it is this part, events are not relied on.
MOST_DOUBT = 0.25
#: So many in a row that could not be had are worth a word.
LEAST_REFUSALS = 3
CONNECT_S = 15.0
#: What is told when a task has ended.
ENDS = frozenset({"task_postprocess_end", "task_cancel"})


class Event(Protocol):
    """What is told of a task; empty where it is not told."""

    @property
    def token(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def status(self) -> str: ...


class Socket(Protocol):
    """One connection for events."""

    async def ask(self, token: str) -> None:
        """Ask for the events of a task; raises ServiceError when the connection is gone."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """What is told until the connection ends."""
        ...


class Tells(Protocol):
    """What hearing needs of the service's client."""

    def socket(self) -> AbstractAsyncContextManager[Socket]:
        """A new connection for events; raises ServiceError when there is none to be had."""
        ...


class _Line:
    """One connection, and the tasks it is to tell of."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.watches: set[Watch] = set()
        #: Those still to be asked for.
        self.fresh: list[Watch] = []
        self.is_open = False
        self.woken = anyio.Event()
        self.scope = anyio.CancelScope()

    def add(self, watch: Watch) -> None:
        self.watches.add(watch)
        self.fresh.append(watch)
        self.woken.set()


class Hearing:
    """Covers tasks by the service's events; see `track.Cover`."""

    def __init__(
        self,
        tracker: Tracker,
        service: Tells,
        *,
        wanted: Callable[[], bool] = lambda: True,
        rng: Random,
        note: Callable[[str], None],
    ) -> None:
        """`wanted`: whether events are worth having; once they are, all tasks are asked for from then on."""
        self._wanted = wanted
        self._is_on = False
        self._tracker = tracker
        self._service = service
        self._rng = rng
        self._note = note
        self._told = False
        self._lines: list[_Line] = []
        self._line_of: dict[Watch, _Line] = {}
        #: Of which tasks a living connection has told something; since when those asked for wait for that.
        self._heard: set[Watch] = set()
        self._asked_at: dict[Watch, float] = {}
        #: Of the newest tasks heard of and seen to have ended, whether their ends were told.
        self._ends: deque[bool] = deque(maxlen=ENDS_KEPT)
        #: False once a connection told of some tasks and not of others.
        self._shares = True
        self._group: anyio.abc.TaskGroup | None = None

    # --- as a cover of the tracker -----------------------------------------------------------------------

    def covers(self, watch: Watch) -> bool:
        """Whether a living connection has told something of this task, and ends are told."""
        return watch in self._heard and self._doubt < MOST_DOUBT

    def untold(self, watch: Watch) -> float:
        """How likely the end of this task is not told."""
        return self._doubt if watch in self._heard else 1.0

    @property
    def _doubt(self) -> float:
        return (1 + self._ends.count(False)) / (FIRST_DOUBT + len(self._ends))

    def begin(self, watch: Watch) -> None:
        """The task is followed from now on."""
        if self._is_on:
            self._place(watch)
        elif self._wanted():
            self._is_on = True
            self._place_all()

    def end(self, watch: Watch) -> None:
        """The task is not followed any more."""
        if watch in self._heard and watch.result is not None and not isinstance(watch.result[1], Left):
            self._ends.append(False)
        self._heard.discard(watch)
        self._asked_at.pop(watch, None)
        line = self._line_of.pop(watch, None)
        if line is None:
            return
        line.watches.discard(watch)
        if line.most == 1 or (not line.watches and len(self._lines) > 1):
            self._drop(line)

    async def run(self) -> None:
        """Hold connections, until cancelled."""
        async with anyio.create_task_group() as self._group:
            while True:
                self._check(anyio.current_time())
                await anyio.sleep(CHECK_S)

    # --- who is asked for where --------------------------------------------------------------------------

    def _place_all(self) -> None:
        for watch in list(self._tracker.watches.values()):
            if watch not in self._line_of:
                self._place(watch)

    def _place(self, watch: Watch) -> None:
        """Ask for a task on a connection with room, or on a new one; on none beyond the bound."""
        if self._group is None or not watch.token:
            return
        most = SHARED if self._shares else 1
        line = next((line for line in self._lines if len(line.watches) < line.most), None)
        if line is None and len(self._lines) < MAX_SOCKETS:
            line = _Line(most)
            self._lines.append(line)
            self._group.start_soon(self._hold, line)
        if line is not None:
            self._line_of[watch] = line
            line.add(watch)

    def _drop(self, line: _Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
        line.scope.cancel()

    def _check(self, now: float) -> None:
        """Find out whether connections tell of all their tasks, to the end; place those that have none."""
        if self._shares and self._doubt >= MOST_DOUBT:
            self._stop_sharing()
        for line in list(self._lines):
            unheard = [watch for watch in line.watches if now - self._asked_at.get(watch, now) > UNHEARD_S]
            if unheard and line.most > 1 and any(watch in self._heard for watch in line.watches):
                self._shares = False  # it told of some, and of others nothing
                line.most = 1
                for watch in unheard:
                    line.watches.discard(watch)
                    self._line_of.pop(watch, None)
                    self._asked_at.pop(watch, None)
            elif unheard and len(unheard) == len(line.watches):
                line.scope.cancel()  # it says nothing at all: another one may
        self._is_on = self._is_on or self._wanted()
        if self._is_on:
            self._place_all()

    def _stop_sharing(self) -> None:
        """A connection for each task from now on: of those that share one, ends were not told."""
        self._shares = False
        self._ends.clear()
        for line in list(self._lines):
            for watch in list(line.watches):
                self._line_of.pop(watch, None)
            self._silenced(line)
            self._drop(line)

    # --- connections ---------------------------------------------------------------------------------------

    async def _hold(self, line: _Line) -> None:
        """Keep a connection for these tasks, made anew when it is lost."""
        failures = 0
        while line in self._lines:
            with anyio.CancelScope() as line.scope:
                try:
                    failures += 1
                    if await self._listen(line):
                        failures = 0
                except errors.ServiceError as error:
                    self._tell(failures, error)
            self._silenced(line)
            if line in self._lines:
                await anyio.sleep(
                    0.1 + backoff_s(max(1, failures), base_s=0.5, cap_s=MOST_AGAIN_S, rng=self._rng)
                )

    def _tell(self, failures: int, error: errors.ServiceError) -> None:
        if failures >= LEAST_REFUSALS and not self._told:
            self._told = True
            self._note(f"the service's events cannot be had, so tasks are looked at: {error}")

    async def _listen(self, line: _Line) -> bool:
        """Ask for the tasks of a connection and hear them, until it ends; whether anything was heard."""
        heard = False
        with anyio.move_on_after(CONNECT_S) as patience:
            async with self._service.socket() as socket:
                patience.deadline = float("inf")
                line.fresh = list(line.watches)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._ask, line, socket)
                    async for event in socket.events():
                        heard = self._hear(line, event) or heard
                    group.cancel_scope.cancel()
        return heard

    async def _ask(self, line: _Line, socket: Socket) -> None:
        while True:
            line.woken = anyio.Event()
            while line.fresh:
                watch = line.fresh.pop(0)
                if watch in line.watches:
                    try:
                        await socket.ask(watch.token)
                    except errors.ServiceError:
                        return  # the end of its events says the same
                    self._asked_at[watch] = anyio.current_time()
            await line.woken.wait()

    def _hear(self, line: _Line, event: Event) -> bool:
        """Take in an event; whether it was of one of our tasks."""
        watch = self._tracker.watches.get(event.task_id)
        if watch is None and event.token:
            watch = next((watch for watch in line.watches if watch.token == event.token), None)
        if watch is None or event.token not in ("", watch.token):
            return False
        self._asked_at.pop(watch, None)
        if event.status in ENDS:
            if watch in self._heard:
                self._ends.append(True)
            self._heard.discard(watch)  # what is told after an end is nothing to wait for
            self._tracker.told_ended(watch)
        elif watch in self._line_of:
            self._heard.add(watch)
        return True

    def _silenced(self, line: _Line) -> None:
        """A connection is gone: its tasks are looked at again."""
        for watch in line.watches:
            self._asked_at.pop(watch, None)
            if watch in self._heard:
                self._heard.discard(watch)
                self._tracker.look_as_planned(watch)
