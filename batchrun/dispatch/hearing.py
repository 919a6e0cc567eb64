"""Following tasks by the service's own events: almost no lag, and no promise.

Looks stay the truth. A task counts as covered only while a connection lives that has told something of it;
looks at it are then far apart. An end that is told frees the task's slot, and a look or a page confirms it.
Several tasks share a connection as long as the service tells of all of them; where it tells of one only, each
gets its own, within a bound, and tasks beyond that are looked at as if there were no events. Of how many ends
nothing was told is counted: that much a silence is doubted.
"""

from __future__ import annotations

import math
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
#: Connections that are lost are made anew after a wait of up to this, soon if they have lasted so long.
MOST_AGAIN_S, LEAST_LIFE_S = 60.0, 1.0
#: What became of events is kept of so many tasks; at first one in that many is taken to have gone wrong,
ENDS_KEPT, FIRST_DOUBT = 100, 20
#: and where it is this part, they are not relied on.
MOST_DOUBT = 0.25
#: Where tasks cannot share a connection, that is tried again after so long, and ever later up to a bound.
ALONE_S, MOST_ALONE_S = 300.0, 3600.0
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


class _Chance:
    """How often something was so of late, and to begin with a little."""

    def __init__(self) -> None:
        self._newest: deque[bool] = deque(maxlen=ENDS_KEPT)
        self.value = 1 / FIRST_DOUBT

    def add(self, was_so: bool) -> None:
        self._newest.append(was_so)
        self.value = (1 + self._newest.count(True)) / (FIRST_DOUBT + len(self._newest))

    @property
    def is_high(self) -> bool:
        return self.value >= MOST_DOUBT


class _Line:
    """One connection, and the tasks it is to tell of."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.watches: set[Watch] = set()
        #: Those still to be asked for, in their order.
        self.fresh: dict[Watch, None] = {}
        self.woken = anyio.Event()
        self.scope = anyio.CancelScope()

    def add(self, watch: Watch) -> None:
        self.watches.add(watch)
        self.fresh[watch] = None
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
        #: How often an end was not told before it was seen, of a task that was heard of; not even soon after;
        #: and how often one was told that was none.
        self._untold, self._lost, self._false = _Chance(), _Chance(), _Chance()
        #: Tasks seen to have ended whose ends are not told yet, by id: on which connection, and since when.
        self._overdue: dict[str, tuple[_Line, str, float]] = {}
        #: Tasks have a connection each until then, since one told of some and not of others.
        self._alone_until, self._alone_s = 0.0, ALONE_S
        self._group: anyio.abc.TaskGroup | None = None

    # --- as a cover of the tracker -----------------------------------------------------------------------

    def covers(self, watch: Watch) -> bool:
        """Whether a living connection has told something of this task, and ends are told."""
        return watch in self._heard and not self._untold.is_high

    def untold(self, watch: Watch) -> float:
        """How likely the end of this task is not told."""
        return self._untold.value if watch in self._heard else 1.0

    def begin(self, watch: Watch) -> None:
        """The task is followed from now on."""
        if self._is_on:
            self._place(watch)
        elif self._wanted():
            self._is_on = True
            self._place_all()

    def end(self, watch: Watch) -> None:
        """The task is not followed any more."""
        line = self._line_of.pop(watch, None)
        if watch.result is not None and not isinstance(watch.result[1], Left):
            self._judge(watch, line)
        self._heard.discard(watch)
        self._asked_at.pop(watch, None)
        if line is None:
            return
        line.watches.discard(watch)
        line.fresh.pop(watch, None)
        if not line.watches and (line.most == 1 or len(self._lines) > 1):
            self._drop(line)

    def _judge(self, watch: Watch, line: _Line | None) -> None:
        """Learn from what was told of a task that is now seen to have ended."""
        if watch.told_at is not None:
            seen_after_s = -math.inf if watch.refuted_at is None else watch.refuted_at - watch.told_at
            self._false.add(seen_after_s >= UNHEARD_S)  # sooner it may be the answer that lags
            self._untold.add(False)
            self._lost.add(False)
        elif watch in self._heard:
            self._untold.add(True)
            if line is not None:
                self._overdue[watch.task_id] = (line, watch.token, anyio.current_time())

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
        most = SHARED if anyio.current_time() >= self._alone_until else 1
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
        for task_id, (_, _, since) in list(self._overdue.items()):
            if now - since > UNHEARD_S:
                del self._overdue[task_id]
                self._lost.add(True)
        if self._lost.is_high and now >= self._alone_until:
            self._part(now)
        for line in list(self._lines):
            unheard = [watch for watch in line.watches if now - self._asked_at.get(watch, now) > UNHEARD_S]
            if unheard and line.most > 1 and any(watch in self._heard for watch in line.watches):
                self._leave_alone(now)  # it told of some, and of others nothing
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

    def _leave_alone(self, now: float) -> None:
        """Give each task a connection of its own for a while."""
        if now >= self._alone_until:
            self._alone_until = now + self._alone_s
            self._alone_s = min(MOST_ALONE_S, 2 * self._alone_s)

    def _part(self, now: float) -> None:
        """Part the tasks that share a connection: ends of some were not told."""
        self._leave_alone(now)
        self._lost, self._untold = _Chance(), _Chance()
        for line in list(self._lines):
            for watch in line.watches:
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
                    begun_at = anyio.current_time()
                    if await self._listen(line) and anyio.current_time() - begun_at >= LEAST_LIFE_S:
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
                line.fresh = dict.fromkeys(line.watches)
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
                watch = next(iter(line.fresh))
                del line.fresh[watch]
                self._asked_at[watch] = anyio.current_time()
                try:
                    await socket.ask(watch.token)
                except errors.ServiceError:
                    return  # the end of its events says the same
            await line.woken.wait()

    def _hear(self, line: _Line, event: Event) -> bool:
        """Take in an event; whether it was of one of our tasks."""
        watch = self._tracker.watches.get(event.task_id)
        if watch is None and event.token:
            watch = next((watch for watch in line.watches if watch.token == event.token), None)
        if watch is None:
            return self._hear_late(event)
        if event.token not in ("", watch.token):
            return False
        self._asked_at.pop(watch, None)
        if event.status in ENDS:
            self._heard.discard(watch)  # what is told after an end is nothing to wait for
            self._tracker.told_ended(watch, is_believed=not self._false.is_high)
        elif watch in self._line_of:
            self._heard.add(watch)
        return True

    def _hear_late(self, event: Event) -> bool:
        """Take in an event of a task that is not followed any more; whether its end was waited for."""
        for task_id, (_, token, _) in list(self._overdue.items()):
            if event.status in ENDS and (event.task_id == task_id or event.token == token):
                del self._overdue[task_id]
                self._lost.add(False)
                return True
        return False

    def _silenced(self, line: _Line) -> None:
        """A connection is gone: its tasks are looked at again."""
        for task_id, (told_on, _, _) in list(self._overdue.items()):
            if told_on is line:
                del self._overdue[task_id]
        for watch in line.watches:
            self._asked_at.pop(watch, None)
            if watch in self._heard:
                self._heard.discard(watch)
                self._tracker.look_as_planned(watch)
