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

from batchrun.rules.policy import BALANCE, MAX_ASKED_S, backoff_s

#: Without knowledge of the account, begin with this many tasks and add one for each accepted.
FIRST_LIMIT = 8
#: After a refusal a higher limit is tried again after this long; twice as long each time that is refused too.
#: Once it is accepted the limit grows as at the beginning: one refusal is often somebody else's short burst.
PROBE_S = (1.0, 60.0)
#: Waiters look at the clock this often: a probe or a reopening may be due.
LOOK_S = 0.5


class Slots:
    """At most `limit` tasks active at the service; the limit follows what the service allows."""

    def __init__(
        self, *, fixed: int | None, ceiling: int, known: int | None = None, rng: Random | None = None
    ) -> None:
        self.ceiling = fixed or ceiling
        self.limit = min(self.ceiling, fixed or known or FIRST_LIMIT)
        self.in_use = 0
        self._refusals = 0
        #: Until a refusal, and again once one more was accepted, the limit grows with every task accepted.
        self._growing = fixed is None
        self._probing = False
        self._probe_wait_s = PROBE_S[0]
        self._probe_at = float("inf")
        self._closed_until = 0.0
        self._waiting: deque[anyio.Event] = deque()
        self._rng = rng or Random()

    async def take(self) -> None:
        """Wait for a slot and hold it; first come, first served."""
        turn = anyio.Event()
        self._waiting.append(turn)
        self._hand_out()
        try:
            while not turn.is_set():
                with anyio.move_on_after(LOOK_S):
                    await turn.wait()
                self._hand_out()
        except BaseException:
            if turn.is_set():  # handed to us on the way out
                self.give()
            else:
                self._waiting.remove(turn)
            raise

    def take_anyway(self) -> None:
        """Hold a slot for a task that is active already, even beyond the limit."""
        self.in_use += 1

    def give(self) -> None:
        """Give a slot back."""
        self.in_use -= 1
        self._hand_out()

    def refused(self, told: int | None) -> None:
        """Code 96: the service has no slot for the caller, who still holds one of ours.

        Others may use the account too, so the limit becomes what we were able to hold; more is tried soon,
        and ever later while that is refused.
        """
        now = anyio.current_time()
        self._refusals += 1
        self._growing = False
        held = self.in_use - 1
        self.limit = max(1, min(self.limit, held, told if told is not None else held))
        self._probe_wait_s = min(PROBE_S[1], self._probe_wait_s * 2) if self._probing else PROBE_S[0]
        self._probing = False
        self._probe_at = now + self._probe_wait_s * self._rng.uniform(0.75, 1.25)
        if held <= 0:  # nothing of ours will end and wake us: try again after a while
            wait_s = backoff_s(min(self._refusals, 5), base_s=2.0, cap_s=30.0, rng=self._rng)
            self._closed_until = now + max(0.5, wait_s)

    def accepted(self) -> None:
        """A submit was accepted: the service is not full."""
        self._refusals = 0
        if self._growing and self.limit < self.ceiling:
            self.limit += 1
            self._hand_out()
        elif self._probing and self.in_use >= self.limit:
            self._probing, self._growing = False, True
            self._probe_wait_s = PROBE_S[0]
            self._probe_at = anyio.current_time() + PROBE_S[0]

    def _free(self) -> bool:
        now = anyio.current_time()
        if now < self._closed_until:
            return False
        # one more at a time, and the next only once that one was tried: slots may wait long at the gate
        may_probe = not self._probing and now >= self._probe_at
        if self.in_use >= self.limit and self.limit < self.ceiling and may_probe:
            self.limit += 1
            self._probing = True
        return self.in_use < self.limit

    def _hand_out(self) -> None:
        while self._waiting and self._free():
            self.in_use += 1
            self._waiting.popleft().set()


class Slot:
    """One row's hold on a task slot; taking and giving twice is harmless."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held = False

    async def take(self) -> None:
        """Wait for a slot unless one is held."""
        if not self._held:
            await self._slots.take()
            self._held = True

    def take_anyway(self) -> None:
        """Hold a slot for a task that may be active already, even beyond the limit."""
        if not self._held:
            self._slots.take_anyway()
            self._held = True

    def give(self) -> None:
        """Give the slot back if one is held."""
        if self._held:
            self._held = False
            self._slots.give()


class Room:
    """Bounds the rows on their way. Rows that are looked up count apart: they wait, and cost little."""

    def __init__(self, rows: int, *, doubts: int = 1000) -> None:
        self._free = rows
        self._free_for_doubts = doubts
        self._changed = anyio.Event()

    async def enter(self) -> None:
        """Wait for room, and take it."""
        while self._free <= 0 or self._free_for_doubts <= 0:
            await self._changed.wait()
        self._free -= 1

    def leave(self) -> None:
        """Give the room back."""
        self._free += 1
        self._announce()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Make room for another row while this one is looked up; afterwards it goes on at once."""
        self._free += 1
        self._free_for_doubts -= 1
        self._announce()
        try:
            yield
        finally:
            self._free -= 1
            self._free_for_doubts += 1
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


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
        self._changed = anyio.Event()
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
        self._announce()

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
        if self.reason is not None or is_outage:
            self.shut(reason, probe=probe)
        else:
            self.unsure(probe=probe)

    def unsure(self, *, probe: bool) -> None:
        """The caller's submit said nothing about the service's health; somebody else tries."""
        if probe:
            self._prober = None
        self._announce()

    def shut_for_s(self) -> float:
        """For how long submits have been waiting."""
        return anyio.current_time() - self.since if self.reason is not None else 0.0

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
