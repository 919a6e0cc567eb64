"""Where images that have come wait for their turn to be verified, hashed, written, synced and renamed.

A few threads do it, and each takes all that waits, up to a bound: to give several images to a thread and to
sync them costs little more than it does for one. When little comes, an image has a thread for itself at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread

from batchrun.model import Output
from batchrun.outputs.formats import ImageFacts
from batchrun.outputs.pieces import keep_freed_memory
from batchrun.outputs.save import Partial, Received, Saved, publish

#: More of them would get in each other's way: what they do beside waiting for the disk needs a core.
THREADS = 4
#: Images that one thread takes at once.
TOGETHER = 8


@dataclass(slots=True, eq=False)
class _Waiting(Received):
    done: anyio.Event = field(default_factory=anyio.Event)


class Publisher:
    """Puts received images under their final names, while `run` goes on."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._came = anyio.Semaphore(0, fast_acquire=True)
        self._limiter = anyio.CapacityLimiter(THREADS)

    async def run(self) -> None:
        """Publish what comes until cancelled; what a thread has begun is brought to its end."""
        keep_freed_memory()
        async with anyio.create_task_group() as threads:
            for _ in range(THREADS):
                threads.start_soon(self._work)

    async def publish(
        self, partial: Partial, output: Output, place: Callable[[ImageFacts], Path], accept_sha256: str | None
    ) -> Saved:
        """The image in its place, durably; raises what `outputs.save.publish` tells of it."""
        image = _Waiting(partial, output.declared_bytes, place, accept_sha256)
        self._waiting.append(image)
        self._came.release()
        await image.done.wait()
        return image.outcome()

    async def _work(self) -> None:
        while True:
            await self._came.acquire()
            images = [self._waiting.popleft()]
            while self._came.value and len(images) < TOGETHER:
                self._came.acquire_nowait()
                images.append(self._waiting.popleft())
            await anyio.to_thread.run_sync(publish, images, limiter=self._limiter)
            for image in images:
                image.done.set()
