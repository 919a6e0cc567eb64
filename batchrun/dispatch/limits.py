"""What bounds the submits: task slots at the service, and the gate that closes when the service is unwell.

Both are shared by all rows of the run, so that one refusal teaches everybody and an outage meets one
probe instead of a storm.
"""

from __future__ import annotations

from collections import deque
from random import Random

import anyio

from batchrun.rules.policy import BALANCE, backoff_s

#: Without knowledge of the account, begin with this many tasks and double while none is refused.
FIRST_LIMIT = 8
#: After a refusal a higher limit is tried again after this long, twice as long each time in vain.
PROBE_S = (5.0, 60.0)


class Slots:
    """At most `limit` tasks active at the service; the limit follows what the service allows."""

    def __init__(
        self, *, fixed: int | None, ceiling: int, known: int | None = None, rng: Random | None = None
    ) -> None:
        self.ceiling = fixed or ceiling
        self.limit = min(self.ceiling, fixed or max(known or 0, FIRST_LIMIT))
        self.in_use = 0
        self.refusals = 0
        self._growing = fixed is None
        self._probe_wait_s = PROBE_S[0]
        self._probe_at = float("inf")
        self._closed_until = 0.0
        self._waiting: deque[anyio.Event] = deque()
        self._rng = rng or Random()

    async def take(self) -> None:
        """Wait for a slot and hold it; first come, first served."""
        while True:
            if not self._waiting and self._free():
                self.in_use += 1
                return
            turn = anyio.Event()
            self._waiting.append(turn)
            try:
                with anyio.move_on_at(max(self._closed_until, anyio.current_time() + 1.0)):
                    await turn.wait()
            except BaseException:
                if turn.is_set():  # the slot was handed to us on the way out
                    self.give()
                raise
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
            if turn.is_set():
                return
            self._hand_out()  # a closed time or a probe time may have come
            if not self._waiting and self._free():
                continue

    def take_anyway(self) -> None:
        """Hold a slot for a task that is active already, even beyond the limit."""
        self.in_use += 1

    def give(self) -> None:
        """Give a slot back."""
        self.in_use -= 1
        self._hand_out()

    def refused(self, told: int | None) -> None:
        """Code 96: the service has no slot for the caller, who still holds one of ours.

        Others may use the account too, so the limit becomes what we were able to hold.
        """
        now = anyio.current_time()
        self.refusals += 1
        self._growing = False
        held = self.in_use - 1
        self.limit = max(1, min(self.limit, held, told if told is not None else held))
        self._probe_wait_s = min(PROBE_S[1], self._probe_wait_s * 2)
        self._probe_at = now + self._probe_wait_s * self._rng.uniform(0.75, 1.25)
        if held <= 0:  # nothing of ours will end and wake us: try again after a while
            self._closed_until = now + backoff_s(min(self.refusals, 5), base_s=2.0, cap_s=30.0, rng=self._rng)

    def accepted(self) -> None:
        """A submit was accepted: the service is not full."""
        self.refusals = 0
        if self._growing and self.limit < self.ceiling:
            self.limit += 1
            self._hand_out()
        elif self.in_use >= self.limit:
            self._probe_wait_s = PROBE_S[0]

    def _free(self) -> bool:
        now = anyio.current_time()
        if now < self._closed_until:
            return False
        if now >= self._probe_at and self.limit < self.ceiling and self.in_use >= self.limit:
            self.limit += 1
            self._probe_at = now + self._probe_wait_s
        return self.in_use < self.limit

    def _hand_out(self) -> None:
        while self._waiting and self._free():
            self.in_use += 1
            self._waiting.popleft().set()


class Gate:
    """Submits pass while the service is well; after trouble they wait, and one at a time tries."""

    def __init__(self, *, rng: Random | None = None) -> None:
        #: Why submits wait, None while they pass.
        self.reason: str | None = None
        #: Monotonic seconds since when they wait.
        self.since = 0.0
        self._until = 0.0
        self._troubles = 0
        self._probing = False
        self._changed = anyio.Event()
        self._rng = rng or Random()

    async def pass_through(self) -> bool:
        """Wait until a submit may be sent; True when the caller is the probe of a closed gate.

        The caller then says what came of it: `open`, `shut` or `unsure`, with that answer as `probe`.
        """
        while self.reason is not None:
            if self._probing:
                await self._changed.wait()
                continue
            self._probing = True
            try:
                while anyio.current_time() < self._until:
                    await anyio.sleep_until(self._until)
            except BaseException:
                self.unsure(probe=True)
                raise
            return True
        return False

    def open(self) -> None:
        """The service answered as it should."""
        self.reason = None
        self._troubles = 0
        self._probing = False
        self._announce()

    def shut(self, reason: str, *, probe: bool, after_s: float | None = None) -> None:
        """The service is in trouble; `after_s` is the wait it asked for."""
        now = anyio.current_time()
        if self.reason is None:
            self.since = now
        if self.reason is None or probe:
            self._troubles += 1
        self.reason = reason
        base_s, cap_s = (10.0, 300.0) if reason == BALANCE else (1.0, 60.0)
        wait_s = after_s if after_s is not None else min(cap_s, base_s * 2 ** min(self._troubles - 1, 16))
        self._until = max(self._until, now + wait_s * self._rng.uniform(1.0, 1.2))
        self.unsure(probe=probe)

    def unsure(self, *, probe: bool) -> None:
        """The caller's submit said nothing about the service's health; somebody else tries."""
        if probe:
            self._probing = False
        self._announce()

    def shut_for_s(self) -> float:
        """For how long submits have been waiting."""
        return anyio.current_time() - self.since if self.reason is not None else 0.0

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
