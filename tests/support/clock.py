"""Virtual time: an event loop whose clock jumps to the next timer when nothing else is left to do.

Ten minutes of patience pass in a moment, in the order in which they would. The clock stands still while
code runs, while worker threads are busy and while sockets have something to say; only `loop.time()` (and so
`anyio.current_time`, sleeps and deadlines) is virtual: `time.time()` is not.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Bytes between two sockets of this process may take a moment of real time.
_SETTLE_S = 0.005
#: Not 0: a default of 0.0 taken for an instant would pass unseen.
_BEGIN = 10_000.0


class Standstill(Exception):
    """Every task waits for something that nothing can bring, or the virtual time allowed is over."""


class _Selector(selectors.DefaultSelector):
    """Selects as ever, but lets the loop's clock jump instead of waiting for a timer."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if self.loop.is_busy or (self.loop.is_ending and timeout is None):
            return super().select(None)  # a thread always wakes the loop when it has ended
        # the loop's own wake-up socket is always there
        events = super().select(_SETTLE_S if len(self.get_map()) > 1 else 0)
        if not events:
            self.loop.jump(timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own."""

    def __init__(self, limit_s: float) -> None:
        self._now = _BEGIN
        self._limit_s = limit_s
        self._executing = 0
        #: The test is over; the loop only waits for its threads to be put away.
        self.is_ending = False
        #: Set when the loop runs: counts anyio's worker threads.
        self.threads: anyio.CapacityLimiter | None = None
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-6  # timers are sums of floats

    def time(self) -> float:
        return self._now

    @property
    def is_busy(self) -> bool:
        """Whether a thread works for this loop: its end is what comes next."""
        return self._executing > 0 or (self.threads is not None and self.threads.borrowed_tokens > 0)

    def jump(self, seconds: float | None) -> None:
        """Nothing happens for so long; None: for ever."""
        if seconds is None:
            self.is_ending = True
            raise Standstill("every task waits and no timer is set")
        self._now += seconds
        if self._now > _BEGIN + self._limit_s and not self.is_ending:
            self.is_ending = True
            raise Standstill(f"not done after {self._limit_s:g} s of virtual time")

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._executing += 1
        future.add_done_callback(self._executed)
        return future

    def _executed(self, _: asyncio.Future[Any]) -> None:
        self._executing -= 1


def run_with_virtual_time(
    function: Callable[..., Awaitable[T]], *args: Any, limit_s: float = 7 * 24 * 3600.0
) -> T:
    """What `await function(*args)` returns, on a loop with virtual time.

    Raises Standstill when it cannot go on, or not within `limit_s` of virtual time.
    """

    async def main() -> T:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.threads = anyio.to_thread.current_default_thread_limiter()
        try:
            return await function(*args)
        finally:
            loop.is_ending = True

    options = {"loop_factory": functools.partial(VirtualLoop, limit_s)}
    return anyio.run(main, backend_options=options)


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes an async test a plain one that runs in virtual time."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_with_virtual_time(functools.partial(test, *args, **kwargs))

    return run
