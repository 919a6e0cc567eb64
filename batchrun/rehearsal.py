"""Which service answers: Wiro, or a simulator started for the occasion (`--simulate`).

A rehearsal's folder must never pass for a real run, nor the other way round: its pictures are made up,
and its tasks are known to no one else. So its folder holds the simulator's memory, which is also what
tells it apart (`Folder.expect_kind`; every start asks).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from batchrun.settings import Credentials
from batchrun.store.folder import Folder


@asynccontextmanager
async def service(folder: Folder, credentials: Credentials | None) -> AsyncIterator[Credentials]:
    """The credentials to use: those given, or those of a simulator that lives as long as the block.

    Raises UsageError where the folder holds a run of the other kind.
    """
    folder.expect_kind(rehearsal=credentials is None)
    if credentials is not None:
        yield credentials
        return
    from batchrun.simulator.server import Simulator

    is_new = not folder.is_run
    folder.create()
    with folder.locked():  # a live runner is named by its folder, not by the memory that it holds
        pass
    try:
        async with Simulator(images="real", memory=folder.rehearsal) as simulator:
            yield Credentials(simulator.key, simulator.secret, simulator.base_url, simulator.socket_url)
    finally:
        if is_new and not folder.is_run:  # nothing came of it
            folder.rehearsal.unlink(missing_ok=True)
            for path in (folder.images, folder.path):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
