"""The stop of a run: told once, seen by everyone, and an end to every wait that may end early."""

from __future__ import annotations

from types import TracebackType

import anyio


class StopSign:
    """Says whether the run is to stop, and cuts short the waits that a stop may cut short."""

    def __init__(self) -> None:
        #: Why the run stops; None while it does not.
        self.reason: str | None = None
        self._waits: set[anyio.CancelScope] = set()

    def stop(self, reason: str) -> bool:
        """Stop; True when this was the first word of it."""
        if self.reason is not None:
            return False
        self.reason = reason
        for scope in list(self._waits):
            scope.cancel()
        return True

    def wait(self) -> Wait:
        """A wait that a stop ends; `cancelled_caught` of the scope that it gives tells that it did."""
        return Wait(self._waits, is_over=self.reason is not None)


class Wait:
    """See `StopSign.wait`. A class, since a generator costs a row's way several times as much."""

    __slots__ = ("_is_over", "_scope", "_waits")

    def __init__(self, waits: set[anyio.CancelScope], *, is_over: bool) -> None:
        self._waits = waits
        self._is_over = is_over
        self._scope = anyio.CancelScope()

    def __enter__(self) -> anyio.CancelScope:
        self._waits.add(self._scope)
        if self._is_over:
            self._scope.cancel()
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._waits.discard(self._scope)
        return self._scope.__exit__(kind, error, trace)
