"""Where images are made and kept: tiny ones on the spot, real ones in threads, begun with their task.

An image is a pure function of its Picture, so the cache may forget any of them and have it drawn again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from batchrun.simulator.drawing import draw
from batchrun.simulator.pictures import Picture, picture
from batchrun.simulator.tasks import SimTask

#: Real images kept; a 1024 x 1024 one takes some 60 to 200 KB.
_KEPT = 2_000
#: Painting shares the machine with the client under test.
_PAINTERS = 2


class Studio:
    """Draws the images of tasks; owns its threads until `close`."""

    def __init__(self, *, real: bool) -> None:
        self.real = real
        self._threads = ThreadPoolExecutor(_PAINTERS, thread_name_prefix="painter") if real else None
        self._painted: OrderedDict[Picture, Future[bytes]] = OrderedDict()

    def begin(self, task: SimTask) -> None:
        """Start on a new task's images, so that they are there when it ends."""
        if self.real:
            for index in range(task.images):
                self._paint(picture(task, index))

    async def measure(self, task: SimTask) -> None:
        """See to it that an ended task knows the sizes of its images."""
        if task.sizes_bytes is None and task.outputs:
            task.sizes_bytes = tuple([len(await self.file(task, index)) for index in range(task.outputs)])

    async def file(self, task: SimTask, index: int) -> bytes:
        """The bytes of one image."""
        wanted = picture(task, index)
        if self.real:
            return await asyncio.wrap_future(self._paint(wanted))
        return draw(wanted, real=False)

    def close(self) -> None:
        """End the threads; images not begun are dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _paint(self, wanted: Picture) -> Future[bytes]:
        assert self._threads is not None
        future = self._painted.get(wanted)
        if future is None or future.cancelled():
            future = self._threads.submit(draw, wanted, real=True)
            self._painted[wanted] = future
            if len(self._painted) > _KEPT:
                self._painted.popitem(last=False)
        self._painted.move_to_end(wanted)
        return future
