"""One start of a run as a person sees it: said before, shown meanwhile, told to stop, summed up after.

`conduct` is the only place where a command enters the event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskStatus

from batchrun.cli.options import credentials_of
from batchrun.cli.rehearsal import check_service, service
from batchrun.manifest.job import Job
from batchrun.progress import Progress
from batchrun.report.lines import Lines
from batchrun.report.summary import summary, to_json
from batchrun.report.talk import Talk
from batchrun.report.watch import Watch
from batchrun.report.words import Line, near, plain
from batchrun.runner import Again, Outcome, Runner

T = TypeVar("T")

#: After the second signal the process gets this long to leave in good order.
LEAVE_S = 10.0
#: The code of a start that was stopped early.
EXIT_STOPPED = 3

Opening = Callable[[Runner], Iterator[Line]]


def conduct(
    job: Job,
    *,
    opening: Opening,
    env_file: Path | None,
    simulate: bool,
    log_file: Path | None,
    no_display: bool,
    as_json: bool = False,
    again: Again | None = None,
) -> Outcome:
    """Start the run of a job and bring it to its end. `opening` gives what is said just before the work begins.

    With `as_json` the words go to standard error and a JSON object ends the standard output. Raises what
    Runner.run does, and UsageError.
    """
    talk = Talk(sys.stderr if as_json else sys.stdout)
    progress = Progress()
    watch = Watch(progress)
    title = f"{near(Path(job.manifest))} → {near(job.folder)}"

    def planned(runner: Runner) -> None:
        for text, style in opening(runner):
            talk.say(text, style)
        watch.begin(beyond_limit=runner.beyond_limit)

    async def start() -> Outcome:
        async with service(runner_folder, credentials) as asked:
            runner = Runner(job, asked, progress=progress, again=again, planned=planned)
            return await _accompany(runner, talk, _face(talk, watch, title, no_display=no_display))

    credentials = None if simulate else credentials_of(env_file)
    from batchrun.store.folder import Folder

    runner_folder = Folder(job.folder)
    check_service(runner_folder, credentials)
    with ExitStack() as stack:
        log = None
        if log_file is not None:
            from batchrun.report.log import Log

            secrets = [credentials.key, credentials.secret or ""] if credentials else []
            log = stack.enter_context(Log(log_file, secrets=secrets))
            progress.listen(log.listen)
        talk.say(plain(title), "bold")
        if simulate:
            talk.say("a rehearsal: a simulator answers, its pictures are made up, nothing is paid", "cyan")
        outcome = run_async(start)
    if log is not None and log.fault:
        talk.say(f"--log {log_file}: ended early: {log.fault}", "yellow")
    for text, style in summary(
        outcome.folder,
        outcome.counts,
        outcome.failures,
        stopped=outcome.stopped,
        left=outcome.left,
        beyond_limit=outcome.beyond_limit,
        elapsed_s=time.monotonic() - progress.started_at,
    ):
        talk.say(text, style)
    if as_json:
        told = to_json(outcome.folder, outcome.counts, outcome.failures)
        print(json.dumps({**told, "stopped": outcome.stopped, "exit_code": outcome.exit_code}))
    return outcome


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` to its end in an event loop of its own: uvloop's where there is one."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main())


def _face(talk: Talk, watch: Watch, title: str, *, no_display: bool) -> Any:
    if no_display or not talk.is_terminal:
        return Lines(talk, watch)
    from batchrun.report.display import Display  # here, since only a terminal needs it

    return Display(talk, watch, title=title)


async def _accompany(runner: Runner, talk: Talk, face: Any) -> Outcome:
    """Run it, show it, and obey signals meanwhile."""
    runner.progress.listen(face.listen)
    fault: Exception | None = None
    outcome: Outcome | None = None
    async with anyio.create_task_group() as group:
        await group.start(_obey_signals, runner, talk)
        group.start_soon(face.run)
        try:
            outcome = await runner.run()
        except Exception as error:  # noqa: BLE001  raised below, outside of the group, as itself
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
        await anext(signals)
        runner.abort()
        with anyio.move_on_after(LEAVE_S):
            await anext(signals)
    if talk.is_terminal:
        talk.console.show_cursor()
    os._exit(EXIT_STOPPED)  # something blocks (a read from a terminal, a dead disk); the state is intact
