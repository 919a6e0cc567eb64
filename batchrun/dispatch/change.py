"""A change that several may wait for, told again and again."""

from __future__ import annotations

import anyio


class Change:
    """Wakes all who wait; nothing is made where nobody does, for most changes come while nobody waits."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    async def wait(self) -> None:
        """Wait until the next change is told."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()

    def tell(self) -> None:
        """Wake all who wait now."""
        if self._event is not None:
            self._event.set()
            self._event = None
