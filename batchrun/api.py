"""batchrun from Python: `run`, `running` and `check`. The names of the package itself; see its docstring.

    outcome = await batchrun.run("prompts.csv")

    async with batchrun.running(batchrun.Job(manifest="prompts.csv", tool="instant-id")) as going:
        async for progress in going:
            print(progress.settled, "of", progress.total)
    print(going.outcome.counts)

A job is a Job, or the path of a job file or of a manifest. Everything runs on asyncio.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio
from anyio.abc import TaskGroup

from batchrun.manifest.job import Job, job_for
from batchrun.plan.reading import Findings
from batchrun.progress import Listener, Progress
from batchrun.runner import Outcome, Runner, plan
from batchrun.settings import Credentials
from batchrun.settings import credentials as credentials_from
from batchrun.store.planning import Planning
from batchrun.tools.catalog import load

AnyJob = Job | str | Path


async def run(
    job: AnyJob, credentials: Credentials | None = None, listener: Listener | None = None
) -> Outcome:
    """Run a job until every row rests or the run stops early; starting it again goes on where it was.

    `credentials` None: from the environment, as the command line does. `listener` is called with every
    Event, at once and on the event loop. Cancelling the call leaves at once, with the state intact.
    Raises UsageError (ManifestError for rows that are wrong: nothing was sent), StoreError or DiskError.
    """
    return await _runner(job, credentials, listener).run()


class running:  # noqa: N801  it is used as a verb: `async with running(job)`
    """A run beside other work: `async with` starts it, `async for` yields its live Progress to the end.

    Leaving the block early stops the run in good order: nothing more is submitted, downloads are finished.
    Leaving it by an exception, or being cancelled, leaves the run at once; the state is intact either way.
    What `run` raises is raised by the iteration, or else on leaving the block.
    """

    def __init__(
        self,
        job: AnyJob,
        credentials: Credentials | None = None,
        listener: Listener | None = None,
        *,
        every_s: float = 0.25,
    ) -> None:
        self._runner = _runner(job, credentials, listener)
        self._every_s = every_s
        self._ended = anyio.Event()
        self._fault: Exception | None = None
        self._group: TaskGroup | None = None
        self._outcome: Outcome | None = None

    @property
    def progress(self) -> Progress:
        """The live picture; always the same object."""
        return self._runner.progress

    @property
    def outcome(self) -> Outcome:
        """How it ended. Raises RuntimeError while it has not."""
        if self._outcome is None:
            raise RuntimeError("the run has not ended: leave its block, or iterate to the end, first")
        return self._outcome

    def stop(self, reason: str = "stopped by its caller") -> None:
        """Submit nothing more and finish downloads; the iteration goes on to the end of that."""
        self._runner.stop(reason)

    async def __aenter__(self) -> Self:
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._run)
        return self

    async def _run(self) -> None:
        try:
            self._outcome = await self._runner.run()
        except Exception as error:
            self._fault = error
        finally:
            self._ended.set()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        if isinstance(error, anyio.get_cancelled_exc_class()):
            return await self._group.__aexit__(kind, error, trace)
        if error is not None:
            self._group.cancel_scope.cancel()
        else:
            self.stop()
        # an error of the block's own is raised as itself, not as one of a group
        await self._group.__aexit__(None, None, None)
        if error is None:
            self._raise_fault()
        return None

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """The Progress about every `every_s` seconds, and once more at the end."""
        while not self._ended.is_set():
            with anyio.move_on_after(self._every_s):
                await self._ended.wait()
            yield self.progress
        self._raise_fault()

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault


def _runner(job: AnyJob, credentials: Credentials | None, listener: Listener | None) -> Runner:
    return Runner(
        job if isinstance(job, Job) else job_for(job),
        credentials or credentials_from(os.environ),
        progress=Progress(listener) if listener else Progress(),
    )


@dataclass(frozen=True, slots=True)
class Checked:
    """What a manifest comes to."""

    #: Requests, each a row of the run (an expanded row stands for several); invalid ones among them.
    rows: int
    images: int
    #: Rows by the tool's short name.
    tools: dict[str, int]
    findings: Findings


def check(job: AnyJob) -> Checked:
    """Read and bind a job's manifest to the end; nothing is sent, nothing stays behind.

    Wrong rows are in `findings.errors`. Raises UsageError where there is nothing to read.
    """
    made = job if isinstance(job, Job) else job_for(job)
    with Planning.scratch() as planning:
        reading, _ = plan(made, load(), planning, stamp="", checkpoint=lambda: None, keep=False)
    return Checked(reading.requests, reading.images, dict(reading.rows_by_tool), reading.findings)
