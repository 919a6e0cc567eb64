"""One start of a run as a person sees it: said before, shown meanwhile, told to stop, summed up after.

`run_async` is the only place where a command enters the event loop.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
from anyio.abc import TaskStatus

from batchrun.cli.options import credentials_of
from batchrun.errors import UsageError
from batchrun.manifest.job import Job
from batchrun.progress import Event, Progress
from batchrun.rehearsal import service
from batchrun.report.lines import Lines
from batchrun.report.summary import Commands, summary, to_json
from batchrun.report.talk import Talk
from batchrun.report.watch import Watch
from batchrun.report.words import Line, near, plain
from batchrun.runner import Again, Outcome, Runner
from batchrun.settings import Credentials
from batchrun.store.folder import Folder
from batchrun.store.orders import read_standing

T = TypeVar("T")

#: After the second signal the process gets this long to leave in good order.
LEAVE_S = 10.0
#: From here on garbage is looked for when there are so many objects more: often enough for short looks, and
#: at Python's own 700 it was a twentieth of a row.
GARBAGE = 20_000
#: The code of a start that was stopped early.
EXIT_STOPPED = 3

Opening = Callable[[Runner], Iterator[Line]]


@dataclass
class Session:
    """How one start of a run is asked and shown."""

    job: Job
    env_file: Path | None
    #: A simulator answers, started for the occasion.
    simulate: bool
    log_file: Path | None
    #: Lines even on a terminal.
    no_display: bool
    #: The words go to standard error, and a JSON object ends the standard output.
    as_json: bool = False
    #: What goes on with the run, for people; None: not known.
    commands: Commands | None = None

    def __post_init__(self) -> None:
        self.talk = Talk(sys.stderr if self.as_json else sys.stdout)
        self.folder = Folder(self.job.folder)
        self.progress = Progress()
        self._watch = Watch(self.progress)
        source = self.job.manifest
        manifest = near(source) if isinstance(source, Path) else "standard input"
        self._title = f"{manifest} → {near(self.job.folder)}"

    def conduct(self, opening: Opening, *, again: Again | None = None) -> Outcome:
        """Bring the start to its end; `opening` gives what is said just before the work begins.

        Raises what Runner.run raises, and UsageError before anything is done.
        """
        if self.simulate and self.env_file is not None and not self.env_file.is_file():
            raise UsageError(f"--env-file {self.env_file}: there is no such file")
        credentials = None if self.simulate else credentials_of(self.env_file)
        self.folder.expect_kind(rehearsal=self.simulate)  # before a word is said
        with self._logged(credentials):
            self.talk.say(plain(self._title), "bold")
            if self.simulate:
                self.talk.say(
                    "a rehearsal: a simulator answers, its pictures are made up, nothing is paid", "cyan"
                )
            return run_async(lambda: self._start(credentials, opening, again))

    async def _start(self, credentials: Credentials | None, opening: Opening, again: Again | None) -> Outcome:
        def planned(runner: Runner) -> None:
            self._say(opening(runner))
            self._watch.begin(beyond_limit=runner.beyond_limit)

        async with service(self.folder, credentials) as asked:
            runner = Runner(
                self.job,
                asked,
                progress=self.progress,
                again=again,
                planned=planned,
                rehearsal=self.simulate,
            )
            return await _accompany(runner, self.talk, self._face())

    def _face(self) -> Face:
        if self.no_display or not self.talk.is_terminal:
            return Lines(self.talk, self._watch)
        from batchrun.report.display import Display  # here, since only a terminal needs it

        return Display(self.talk, self._watch)

    @contextmanager
    def _logged(self, credentials: Credentials | None) -> Iterator[None]:
        if self.log_file is None:
            yield
            return
        from batchrun.report.log import Log

        secrets = [credentials.key, credentials.secret or ""] if credentials else []
        with Log(self.log_file, secrets=secrets) as log:
            self.progress.listen(log.listen)
            yield
        if log.fault:
            self.talk.say(f"--log {plain(str(self.log_file))} ended early: {log.fault}", "yellow")

    def sum_up(self, outcome: Outcome) -> int:
        """Tell how it ended; returns the exit code."""
        elapsed_s = time.monotonic() - self.progress.started_at
        self._say(
            summary(
                outcome.folder,
                outcome.counts,
                outcome.failures,
                stopped=outcome.stopped,
                left=outcome.left,
                beyond_limit=outcome.beyond_limit,
                missing=outcome.missing,
                kept=outcome.kept,
                elapsed_s=elapsed_s,
                commands=self.commands,
            )
        )
        if self.as_json:
            told = to_json(outcome.folder, outcome.counts, outcome.failures, outcome.missing)
            with suppress(OSError):  # nobody reads it any more: the exit code is what it was
                print(
                    json.dumps({**told, "stopped": outcome.stopped, "exit_code": outcome.exit_code}),
                    flush=True,
                )
        return outcome.exit_code

    def _say(self, lines: Iterable[Line]) -> None:
        for text, style in lines:
            self.talk.say(text, style)


class Face(Protocol):
    """What shows a run while it goes on."""

    def listen(self, event: Event) -> None:
        """Take in an event."""
        ...

    async def run(self) -> None:
        """Show it until cancelled."""
        ...


def stored_job(folder: Path) -> Job:
    """The job of the run in a folder, as it was last told; raises UsageError when there is none."""
    place = Folder(folder.absolute())
    place.expect_run()
    text = read_standing(place.state).job
    if text is None:
        raise UsageError(f"{folder}: its manifest was never read to the end; run the manifest again")
    return Job.from_json(text).with_overrides(out=place.path)


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` to its end in an event loop of its own: uvloop's where there is one."""
    gc.freeze()  # modules stay: there is no need to look through them for garbage again and again
    gc.set_threshold(GARBAGE)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main())


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _accompany(runner: Runner, talk: Talk, face: Face) -> Outcome:
    """Run it, show it, and obey signals meanwhile."""
    runner.progress.listen(face.listen)
    fault: Exception | None = None
    outcome: Outcome | None = None
    async with anyio.create_task_group() as group:
        await group.start(_obey_signals, runner, talk)
        group.start_soon(face.run)
        try:
            outcome = await runner.run()
        except Exception as error:
            fault = error
        group.cancel_scope.cancel()
    if outcome is None:
        assert fault is not None
        raise fault
    return outcome


async def _obey_signals(runner: Runner, talk: Talk, *, task_status: TaskStatus[None]) -> None:
    """Once: stop in good order. Twice: leave at once. If even that does not end it: leave."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means to stay
        numbers.append(signal.SIGHUP)
    with anyio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        number = await anext(signals)
        runner.stop("by Ctrl-C" if number is signal.SIGINT else f"by {number.name}")
        talk.say("stopping: finishing downloads; again to leave at once", "bold yellow")
        await _insistence(signals)
        runner.abort()
        with anyio.move_on_after(LEAVE_S):
            await _insistence(signals)
    if talk.is_terminal:
        with suppress(OSError):
            talk.console.show_cursor()
    os._exit(EXIT_STOPPED)  # something blocks (a read from a terminal, a dead disk); the state is intact


async def _insistence(signals: AsyncIterator[signal.Signals]) -> None:
    """Wait for another signal that means to hurry.

    A terminal that closes hangs up twice, by the system and by the shell, and some service managers hang up
    right after SIGTERM: nobody is impatient then.
    """
    async for number in signals:
        if number is not signal.SIGHUP:
            return
