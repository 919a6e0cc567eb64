"""What bounds a run: task slots at the service, rows on their way, the gate that shuts when it is unwell.

All are shared by all rows of the run, so that one refusal teaches everybody and an outage meets one
probe instead of a storm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import anyio

from batchrun.dispatch.change import Change
from batchrun.rules.policy import BALANCE, MAX_ASKED_S, backoff_s

#: Without knowledge of the account, begin with this many tasks and add one for each accepted.
FIRST_LIMIT = 8
#: Waiters look at the clock this often: a try or a reopening may be due.
LOOK_S = 0.5
#: Where the account is full a submit is tried so often for each that is accepted: Run itself tells of a free
#: slot sooner than looks at tasks do. Tries that find none grow rarer, down to the second number. With 32
#: slots one submit is refused for each that is accepted; with fewer it is less, since pages find more ends.
TRIES = (3.2, 0.25)
#: From try to try: the first wait while nothing was accepted, the shortest and the longest one, in seconds.
TRY_S = (1.0, 0.01, 60.0)
#: The pace of accepted submits is that of the newest so many.
PACE_OF = 16
#: How long the limit that the service names is taken at its word.
TOLD_S = 60.0


class Slots:
    """At most `limit` tasks active at the service; the limit follows what the service allows.

    Where it refuses more (code 96), one submit at a time is tried beyond the limit: tasks may have ended that
    nobody has looked at yet, or more may be allowed by now. Tries come at the pace of what is accepted, so a
    limit that fell too low climbs back within a few tasks' time.
    """

    def __init__(
        self, *, fixed: int | None, ceiling: int, known: int | None = None, rng: Random | None = None
    ) -> None:
        self.ceiling = fixed or ceiling
        self.limit = min(self.ceiling, fixed or known or FIRST_LIMIT)
        self.in_use = 0
        #: Slots free since their tasks were said to have ended, which nothing has confirmed yet.
        self.early = 0
        self._refusals = 0
        #: Until the first refusal the limit grows with every task accepted.
        self._growing = fixed is None
        self._tries = _Tries(rng or Random())
        #: The limit that the service named, and until when that is believed.
        self._told, self._told_until = self.ceiling, 0.0
        self._closed_until = 0.0
        self._waiting: deque[_Waiter] = deque()
        self._rng = rng or Random()

    async def take(self, *, first: bool = False) -> None:
        """Wait for a slot and hold it; first come, first served, but `first` is served before all others."""
        if not self._waiting and self._free():
            self.in_use += 1
            return
        waiter = _Waiter()
        if first:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        self._hand_out()
        try:
            while not waiter.is_served:
                waiter.woken = anyio.Event()
                is_first = self._waiting[0] is waiter
                with anyio.move_on_after(
                    self._look_s() if is_first else None
                ):  # the first one watches the clock
                    await waiter.woken.wait()
                self._hand_out()
        except BaseException:
            if waiter.is_served:  # on the way out
                self.give()
            else:
                self._waiting.remove(waiter)
                self._wake_first()
            raise

    @property
    def are_short(self) -> bool:
        """Whether a row waits for a task to end: the limit is known, or our own ceiling is reached."""
        return bool(self._waiting) and (not self._growing or self.in_use >= self.ceiling)

    def take_anyway(self) -> None:
        """Hold a slot for a task that is active already, even beyond the limit."""
        self.in_use += 1

    def give(self) -> None:
        """Give a slot back."""
        self.in_use -= 1
        if self.in_use <= self.limit:
            self._tries.over(anyio.current_time())
        self._hand_out()

    def refused(self, told: int | None) -> bool:
        """Code 96: the service has no slot for the caller, who still holds one of ours; whether it was a try.

        Others may use the account too, so the limit becomes what we were able to hold, the service's own
        number at most.
        """
        now = anyio.current_time()
        was_trying = self._tries.is_trying
        self._refusals += 1
        self._growing = False
        held = self.in_use - 1
        if told is not None:
            self._told, self._told_until = max(1, told), now + TOLD_S
        self.limit = max(1, min(self.limit, held, self._most(now)))
        self._tries.refused(now)
        if held <= 0:  # nothing of ours will end and wake us: try again after a while
            wait_s = backoff_s(min(self._refusals, 5), base_s=2.0, cap_s=30.0, rng=self._rng)
            self._closed_until = now + max(0.5, wait_s)
        self._wake_first()
        return was_trying

    def accepted(self) -> None:
        """A submit was accepted: the service is not full."""
        now = anyio.current_time()
        self._refusals = 0
        found = self._tries.accepted(now)
        # a try may have found the slot of a task whose end was not seen: a refusal takes the limit back then
        if (self._growing or found) and self.limit < self._most(now):
            self.limit += 1
        self._hand_out()
        self._wake_first()

    def _most(self, now: float) -> int:
        return min(self.ceiling, self._told) if now < self._told_until else self.ceiling

    def _free(self) -> bool:
        now = anyio.current_time()
        if now < self._closed_until:
            return False
        if self.in_use < self.limit:
            return True
        return not self._growing and self.in_use < self.ceiling and self._tries.begin(now)

    def _hand_out(self) -> None:
        while self._waiting and self._free():
            self.in_use += 1
            self._waiting.popleft().serve()
            self._wake_first()

    def _wake_first(self) -> None:
        if self._waiting:
            self._waiting[0].woken.set()

    def _look_s(self) -> float:
        """Seconds until something may be due."""
        if self._growing or self.in_use >= self.ceiling or self._tries.is_trying:
            return LOOK_S
        due_at = max(self._tries.due_at, self._closed_until)
        return min(LOOK_S, max(0.0, due_at - anyio.current_time()))


class _Waiter:
    """Somebody in the queue for a slot."""

    def __init__(self) -> None:
        self.is_served = False
        self.woken = anyio.Event()

    def serve(self) -> None:
        """Hand a slot over."""
        self.is_served = True
        self.woken.set()


class _Tries:
    """When one submit more is tried than the account is known to allow."""

    def __init__(self, rng: Random) -> None:
        self.due_at = float("inf")
        #: One is under way, since then.
        self.is_trying = False
        self._began_at = 0.0
        self._per_accepted = TRIES[0]
        self._accepted_at: deque[float] = deque(maxlen=PACE_OF)
        self._rng = rng

    def begin(self, now: float) -> bool:
        """Whether one is due; one at a time, for it may wait long before it is sent."""
        if self.is_trying or now < self.due_at:
            return False
        self.is_trying, self._began_at = True, now
        return True

    def refused(self, now: float) -> None:
        """A submit was refused, a try or any other."""
        if not self._accepted_at:
            self._accepted_at.append(now)  # nothing was: waits grow from here
        if self.is_trying:
            self._per_accepted = max(TRIES[1], self._per_accepted * 0.9)
        self._plan(now)

    def accepted(self, now: float) -> bool:
        """A submit was accepted; whether a try was under way."""
        self._accepted_at.append(now)
        was_trying = self.is_trying
        if was_trying:
            self._per_accepted = min(TRIES[0], self._per_accepted * 1.5)
        if self.due_at < float("inf"):
            self._plan(now)
        return was_trying

    def over(self, now: float) -> None:
        """No try is under way any more, whatever came of it."""
        if self.is_trying:
            self._plan(now)

    def _plan(self, now: float) -> None:
        newest, oldest = self._accepted_at[-1], self._accepted_at[0]
        count = len(self._accepted_at) - 1
        pace_s = (newest - oldest) / count if count else TRY_S[0]
        wait_s = max(pace_s, now - newest) / self._per_accepted
        since = self._began_at if self.is_trying else now
        self.is_trying = False
        self.due_at = since + min(TRY_S[2], max(TRY_S[1], wait_s)) * self._rng.uniform(0.75, 1.25)


class Slot:
    """One row's hold on a task slot; taking and giving twice is harmless."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        #: Whether the row holds a slot now.
        self.is_held = False
        #: The service had no slot for it though we had: its turn comes first.
        self._was_refused = False
        self._is_early = False

    async def take(self) -> None:
        """Wait for a slot unless one is held."""
        if not self.is_held:
            await self._slots.take(first=self._was_refused)
            self.is_held, self._was_refused = True, False

    def refused(self, told: int | None) -> bool:
        """The service refused the submit (code 96); `told` is the limit it named. Whether it was a try."""
        self._was_refused = True
        return self._slots.refused(told)

    def take_anyway(self) -> None:
        """Hold a slot for a task that may be active already, even beyond the limit."""
        if not self.is_held:
            self._slots.take_anyway()
            self.is_held = True

    def give(self) -> None:
        """Give the slot back if one is held."""
        if self._is_early:
            self._is_early = False
            self._slots.early -= 1
        if self.is_held:
            self.is_held = False
            self._slots.give()

    def give_early(self) -> None:
        """Give the slot back before it is known what came of its task, unless that is so of too many."""
        if self.is_held and self._slots.early < self._slots.limit:
            self.give()
            self._is_early = True
            self._slots.early += 1


class Room:
    """Bounds the rows on their way. Rows that are looked up count apart: they wait, and cost little."""

    def __init__(self, rows: int, *, doubts: int = 3000) -> None:
        self._free = rows
        self._free_for_doubts = doubts
        self._changed = Change()

    @property
    def has_some(self) -> bool:
        """Whether a row may enter at once."""
        return self._free > 0 and self._free_for_doubts > 0

    async def enter(self) -> None:
        """Wait for room, and take it."""
        while not self.has_some:
            await self._changed.wait()
        self._free -= 1

    def leave(self) -> None:
        """Give the room back."""
        self._free += 1
        self._changed.tell()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Make room for another row while this one is looked up; afterwards it goes on at once."""
        self._free += 1
        self._free_for_doubts -= 1
        self._changed.tell()
        try:
            yield
        finally:
            self._free -= 1
            self._free_for_doubts += 1
            self._changed.tell()


class Gate:
    """Submits pass while the service is well; after trouble they wait, and one at a time tries.

    Whether trouble is the service's or a row's own is told by `rules.outage`.
    """

    def __init__(self, *, rng: Random | None = None) -> None:
        #: Why submits wait, None while they pass.
        self.reason: str | None = None
        #: Monotonic seconds since when they wait.
        self.since = 0.0
        self._until = 0.0
        #: Until when the service itself asked us to wait.
        self._asked_until = 0.0
        self._troubles = 0
        #: Whose turn it is to try; None: nobody's yet.
        self._prober: object | None = None
        self._changed = Change()
        self._rng = rng or Random()

    async def pass_through(self) -> bool:
        """Wait until a submit may be sent; True when the caller is the probe of a closed gate.

        The caller then says what came of it: `open`, `shut` or `unsure`, with that answer as `probe`.
        """
        me = object()
        while self.reason is not None:
            if self._prober is None:
                self._prober = me
            due_at = self._until if self._prober is me else float("inf")
            if due_at <= anyio.current_time():
                return True
            try:
                with anyio.move_on_at(due_at):
                    await self._changed.wait()
            except BaseException:
                self.unsure(probe=self._prober is me)
                raise
        return False

    def open(self) -> None:
        """The service answered as it should; a wait that it asked for is kept all the same."""
        self._troubles = 0
        self._prober = None  # whoever tried has its answer
        if anyio.current_time() >= self._asked_until:
            self.reason = None
            self._until = 0.0
        self._changed.tell()

    def shut(self, reason: str, *, probe: bool, after_s: float | None = None) -> None:
        """The service is in trouble; `after_s` is the wait it asked for."""
        now = anyio.current_time()
        if self.reason is None:
            self.since = now
        if self.reason is None or probe:
            self._troubles += 1
        self.reason = reason
        if after_s is not None:
            wait_s = min(after_s, MAX_ASKED_S)
            self._asked_until = max(self._asked_until, now + wait_s)
        else:
            base_s, cap_s = (10.0, 300.0) if reason == BALANCE else (1.0, 60.0)
            wait_s = min(cap_s, base_s * 2 ** min(self._troubles - 1, 16))
        self._until = max(self._until, now + wait_s * self._rng.uniform(1.0, 1.2))
        self.unsure(probe=probe)

    def trouble(self, reason: str, *, probe: bool, is_outage: bool) -> None:
        """A submit met a broken connection or a faulty answer; it may be the row's own (rules.outage)."""
        is_news = probe or self.reason is None  # what was sent before it shut tells nothing new
        if is_news and (is_outage or self.reason == reason):
            self.shut(reason, probe=probe)
        elif probe:  # the wait was for something else: this may be the row's own trouble
            self.unsure(probe=True)

    def unsure(self, *, probe: bool) -> None:
        """The caller's submit said nothing about the service's health; somebody else tries."""
        if probe:
            self._prober = None
        self._changed.tell()

    def shut_for_s(self) -> float:
        """For how long submits have been waiting."""
        return anyio.current_time() - self.since if self.reason is not None else 0.0
