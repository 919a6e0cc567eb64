"""Which service answers: Wiro, or a simulator started for the occasion (`--simulate`).

A rehearsal's folder must never pass for a real run, nor the other way round: its pictures are made up,
and its tasks are known to no one else. So its folder holds the simulator's memory, which is also what
tells it apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from batchrun.errors import UsageError
from batchrun.settings import Credentials
from batchrun.store.folder import Folder

#: The tasks that earlier simulators made for this run; in the run's folder.
MEMORY = "simulator.jsonl"


def check_service(folder: Folder, credentials: Credentials | None) -> None:
    """Raises UsageError where a rehearsal's folder is to be used for a real run, or a real one's to rehearse.

    `credentials` None: a rehearsal.
    """
    rehearsed = (folder.path / MEMORY).is_file()
    if credentials is None and folder.is_run and not rehearsed:
        raise UsageError(
            f"{folder.path} holds a run that is no rehearsal: leave out --simulate, or choose another folder "
            "with --out"
        )
    if credentials is not None and rehearsed:
        raise UsageError(
            f"{folder.path} holds a rehearsal: go on with --simulate, or choose another folder with --out"
        )


@asynccontextmanager
async def service(folder: Folder, credentials: Credentials | None) -> AsyncIterator[Credentials]:
    """The credentials to use: those given, or those of a simulator that lives as long as the block."""
    if credentials is not None:
        yield credentials
        return
    from batchrun.simulator.server import Simulator

    is_new = not folder.is_run
    folder.create()
    with folder.locked():  # a live runner is named by its folder, not by the memory that it holds
        pass
    memory = folder.path / MEMORY
    try:
        async with Simulator(images="real", memory=memory) as simulator:
            yield Credentials(simulator.key, simulator.secret, simulator.base_url, simulator.socket_url)
    finally:
        if is_new and not folder.is_run:  # nothing came of it
            memory.unlink(missing_ok=True)
            for path in (folder.images, folder.path):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
