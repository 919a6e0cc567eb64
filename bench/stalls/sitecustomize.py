"""On the path of a measured child: how late its event loop wakes, written to BENCH_STALLS when it ends.

A timer of 2 ms on the loop itself notes how much later than asked it was called, from the loop's first turn
on; nothing of the product knows of it.
"""

import atexit
import json
import os

PERIOD_S = 0.002


def _watch(path):
    import asyncio

    late_s = []
    first_step = asyncio.Runner.run

    def run(self, main, **options):
        loop = self.get_loop()
        due_at = loop.time() + PERIOD_S

        def tick():
            nonlocal due_at
            now = loop.time()
            late_s.append(max(0.0, now - due_at))
            due_at = now + PERIOD_S
            loop.call_at(due_at, tick)

        loop.call_at(due_at, tick)
        return first_step(self, main, **options)

    asyncio.Runner.run = run

    @atexit.register
    def _tell():
        if late_s:
            with open(path, "w") as file:
                json.dump(late_s, file)


if os.environ.get("BENCH_STALLS"):
    _watch(os.environ["BENCH_STALLS"])
