"""A process that records and says so, line by line, until it is killed.

`python -m tests.support.acknowledging FILE`
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from batchrun.model import State
from batchrun.store.store import Store
from tests.support.rows import begin, claimed, ended, save_all, to_in_flight

WORKERS = 8


def say(*words: object) -> None:
    print(*words, flush=True)


async def work(store: Store) -> None:
    """Rows from planned to done; each step is told once it is acknowledged."""
    while rows := await claimed(store, State.PLANNED, limit=1):
        seq = rows[0].seq
        row = await to_in_flight(store, seq)
        say("accepted", seq, row.attempt.task_id if row.attempt else "")
        row = await store.record_finished(seq, ended(row), at=2.0)
        say("finished", seq)
        await save_all(store, row)
        say("done", seq)


async def main(path: Path) -> None:
    store = await begin(Store.open(path))
    say("begun")
    async with anyio.create_task_group() as group:
        for _ in range(WORKERS):
            group.start_soon(work, store)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]))
