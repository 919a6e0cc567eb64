"""The stop of a run: told once, seen by everyone, and an end to every wait that may end early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

    @contextmanager
    def wait(self) -> Iterator[anyio.CancelScope]:
        """A wait that a stop ends; `cancelled_caught` of the scope tells that it did."""
        with anyio.CancelScope() as scope:
            self._waits.add(scope)
            if self.reason is not None:
                scope.cancel()
            try:
                yield scope
            finally:
                self._waits.discard(scope)
