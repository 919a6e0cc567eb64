"""batchrun from Python: `run`, `running` and `check`. The names of the package itself; see its docstring.

    outcome = await batchrun.run("prompts.csv")

    async with batchrun.running(batchrun.Job(manifest="prompts.csv", tool="instant-id")) as going:
        async for progress in going:
            print(progress.settled, "of", progress.total)
    print(going.outcome.counts)

A job is a Job, or the path of a job file or of a manifest. Everything runs on asyncio. With `simulate` a run
is a rehearsal, as with `--simulate`: a simulator started for the occasion answers, and no keys are needed.
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
from batchrun.plan.findings import Findings
from batchrun.plan.plan import plan
from batchrun.progress import Listener, Progress
from batchrun.rehearsal import service
from batchrun.runner import Outcome, Runner
from batchrun.settings import Credentials
from batchrun.settings import credentials as credentials_from
from batchrun.store.folder import Folder
from batchrun.store.planning import Planning
from batchrun.tools.catalog import load

AnyJob = Job | str | Path


async def run(
    job: AnyJob,
    credentials: Credentials | None = None,
    listener: Listener | None = None,
    *,
    simulate: bool = False,
) -> Outcome:
    """Run a job until every row rests or the run stops early; starting it again goes on where it was.

    `credentials` None: from the environment, as the command line does. `listener` is called with every
    Event, at once and on the event loop. `simulate`: a rehearsal, which needs no credentials. Cancelling the
    call leaves at once, with the state intact.
    Raises UsageError (ManifestError for rows that are wrong: nothing was sent), also where a rehearsal's
    folder is to be used for a real run, or the other way round; StoreError or DiskError.
    """
    start = _Start(job, credentials, simulate=simulate)
    return await start.run(_progress(listener))


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
        simulate: bool = False,
        every_s: float = 0.25,
    ) -> None:
        self._start = _Start(job, credentials, simulate=simulate)
        self._progress = _progress(listener)
        self._every_s = every_s
        self._ended = anyio.Event()
        self._fault: Exception | None = None
        self._group: TaskGroup | None = None
        self._outcome: Outcome | None = None

    @property
    def progress(self) -> Progress:
        """The live picture; always the same object."""
        return self._progress

    @property
    def outcome(self) -> Outcome:
        """How it ended. Raises RuntimeError while it has not."""
        if self._outcome is None:
            raise RuntimeError("the run has not ended: leave its block, or iterate to the end, first")
        return self._outcome

    def stop(self, reason: str = "stopped by its caller") -> None:
        """Submit nothing more and finish downloads; the iteration goes on to the end of that."""
        self._start.stop(reason)

    async def __aenter__(self) -> Self:
        if self._group is not None:
            raise RuntimeError("a run is started once: call batchrun.running again for another start")
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._run)
        return self

    async def _run(self) -> None:
        try:
            self._outcome = await self._start.run(self._progress)
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

    def __aiter__(self) -> AsyncIterator[Progress]:
        """The Progress about every `every_s` seconds, and once more at the end.

        Raises RuntimeError outside of the `async with` block, which is what starts the run.
        """
        if self._group is None:
            raise RuntimeError(
                "the run is not started: write `async with batchrun.running(job) as going:` and iterate over "
                "`going` inside the block"
            )
        return self._look()

    async def _look(self) -> AsyncIterator[Progress]:
        while not self._ended.is_set():
            with anyio.move_on_after(self._every_s):
                await self._ended.wait()
            yield self.progress
        self._raise_fault()

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault


class _Start:
    """One start of a job, answered by Wiro or by a simulator; it can be told to stop before it has begun."""

    def __init__(self, job: AnyJob, credentials: Credentials | None, *, simulate: bool) -> None:
        if credentials is not None and not isinstance(credentials, Credentials):
            raise TypeError(
                f"credentials must be a batchrun.Credentials, not {type(credentials).__name__} "
                "(a listener is given by name: listener=...)"
            )
        if simulate and credentials is not None:
            raise TypeError("a rehearsal (simulate=True) has credentials of its own: leave them out")
        self._job = job if isinstance(job, Job) else job_for(job)
        self._credentials = None if simulate else credentials or credentials_from(os.environ)
        self._runner: Runner | None = None
        self._stopped: str | None = None

    def stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason
        if self._runner is not None:
            self._runner.stop(reason)

    async def run(self, progress: Progress) -> Outcome:
        async with service(Folder(self._job.folder), self._credentials) as asked:
            runner = Runner(self._job, asked, progress=progress, rehearsal=self._credentials is None)
            self._runner = runner
            if self._stopped is not None:
                runner.stop(self._stopped)
            return await runner.run()


def _progress(listener: Listener | None) -> Progress:
    if listener is not None and not callable(listener):
        raise TypeError(f"listener must be callable with an Event, not {type(listener).__name__}")
    return Progress(listener) if listener else Progress()


@dataclass(frozen=True, slots=True)
class Checked:
    """What a manifest comes to."""

    #: Requests, each a row of the run (an expanded row stands for several); invalid ones among them.
    rows: int
    images: int
    #: Rows by the tool's short name; with `skip_invalid` only those that would be asked for.
    tools: dict[str, int]
    findings: Findings


def check(job: AnyJob) -> Checked:
    """Read and bind a job's manifest to the end; nothing is sent, nothing stays behind.

    An ordinary function, not a coroutine. Wrong rows raise nothing: they are in `findings.errors`, each a
    Problem with its place. Raises UsageError where there is nothing to read.
    """
    made = job if isinstance(job, Job) else job_for(job)
    with Planning.scratch() as planning:
        reading, _ = plan(made, load(), planning, stamp="", checkpoint=lambda: None, keep=False)
    by_tool = reading.valid_by_tool if made.skip_invalid else reading.rows_by_tool
    return Checked(reading.requests, reading.images, dict(by_tool), reading.findings)
