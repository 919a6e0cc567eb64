"""`batchrun cancel`: end what a run has running at the service, through its live runner if there is one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.cli.options import service_options

if TYPE_CHECKING:
    from batchrun.report.talk import Talk
    from batchrun.report.words import Line
    from batchrun.runner import Runner
    from batchrun.store.folder import Folder
    from batchrun.store.orders import Standing

#: A live runner gets this long to obey: it sees the tasks ended and finishes its downloads first.
OBEY_S = 180.0
#: How often it is looked at.
LOOK_S = 0.2
#: Something still runs, or may.
EXIT_LEFT = 1


@click.command(short_help="Cancel what a run has running at the service.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@service_options
def cancel(
    folder: Path, env_file: Path | None, simulate: bool, log_file: Path | None, no_display: bool
) -> int:
    """Stop the run in DIR and cancel (or kill) the tasks it has running at the service.

    A live runner is told to do it, and stops. Rows whose tasks are cancelled are not paid for; `batchrun
    retry` asks for them again. Rows that were not submitted yet stay as they are: running the manifest
    again goes on with them.

    Exit code: 0 nothing runs any more, 1 something does or may.
    """
    from batchrun.report.talk import Talk
    from batchrun.store.folder import Folder
    from batchrun.store.orders import read_standing

    place, talk = Folder(folder.absolute()), Talk(sys.stdout)
    place.expect_run()
    before = read_standing(place.state)
    if before.is_open and not _obeyed(place, talk):
        talk.say(f"the runner has not ended its tasks within {OBEY_S:.0f} s; ask again", "bold red")
        return EXIT_LEFT
    if read_standing(place.state).active:  # no runner, or it was killed before it could obey
        from batchrun.cli.session import Session, stored_job
        from batchrun.runner import Again

        session = Session(stored_job(folder), env_file, simulate, log_file, no_display)
        session.conduct(_opening, again=Again(states=(), cancel=True))
    return _tell(talk, before, read_standing(place.state))


def _obeyed(folder: Folder, talk: Talk) -> bool:
    """Order a live runner to cancel, and wait until it is gone; True at once when there is none."""
    from batchrun.errors import FolderBusy
    from batchrun.store.orders import order_cancel

    until = time.monotonic() + OBEY_S
    is_ordered = False
    while time.monotonic() < until:
        try:
            with folder.locked():
                return True
        except FolderBusy:
            if not is_ordered:
                order_cancel(folder.state)
                is_ordered = True
                talk.say("the runner is told to cancel its tasks and to stop; waiting for it")
        time.sleep(LOOK_S)
    return False


def _opening(runner: Runner) -> Iterator[Line]:
    from batchrun.model import State
    from batchrun.report.words import count

    counts = runner.progress.counts
    yield f"{count(counts[State.SUBMITTING] + counts[State.IN_FLIGHT], 'task')} to cancel", ""


def _tell(talk: Talk, before: Standing, after: Standing) -> int:
    from batchrun.model import State
    from batchrun.report.words import count

    was, now = before.counts.by_state, after.counts.by_state
    cancelled = now.get(State.CANCELLED, 0) - was.get(State.CANCELLED, 0)
    saved = now.get(State.DONE, 0) - was.get(State.DONE, 0)
    told = [f"{count(cancelled, 'row')} cancelled"] if cancelled > 0 else []
    told += [f"{count(saved, 'row')} done before that"] if saved > 0 else []
    if cancelled <= 0 and before.active and not after.active:
        told = ["nothing to cancel: the tasks had ended"]
        told += [f"{count(saved, 'row')} done"] if saved > 0 else []
    talk.say(", ".join(told) if before.active or cancelled else "nothing was running", "bold")
    if after.active:
        talk.say(f"{count(after.active, 'task')} may still run: ask again", "bold red")
    if doubtful := now.get(State.IN_DOUBT, 0):
        talk.say(f"{count(doubtful, 'row')} in doubt: a task of theirs may run", "bold yellow")
    return EXIT_LEFT if after.active or doubtful else 0
