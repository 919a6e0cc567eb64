"""`batchrun status`: where a run stands, whether or not a runner lives."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from batchrun.outputs.missing import Missing
    from batchrun.report.summary import Commands
    from batchrun.store.folder import Folder
    from batchrun.store.orders import Standing


@click.command(short_help="Tell where a run stands.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON.")
def status(folder: Path, as_json: bool) -> int:
    """Tell where the run in DIR stands: its rows, images and cost, and why some rows are not done.

    It can be asked at any time; a live runner is not disturbed. When a runner was killed, the result
    files that it left unfinished are completed.
    """
    from batchrun.outputs.missing import missing
    from batchrun.report.summary import to_json
    from batchrun.store.folder import Folder
    from batchrun.store.orders import of_saved, read_standing

    place = Folder(folder.absolute())
    place.expect_run()
    _expect_sound(place)
    standing = read_standing(place.state)
    is_running = _complete(place, standing)
    absent, _ = of_saved(place.state, partial(missing, place.path))
    if as_json:
        told = to_json(place.path, standing.counts, standing.failures, absent)
        print(json.dumps({**told, "manifest": standing.manifest, "running": is_running}))
    else:
        _tell(place, standing, absent, is_running=is_running)
    return 0


def _expect_sound(folder: Folder) -> None:
    """Raises StoreDamaged; a live runner has seen to it itself."""
    from batchrun.errors import DiskError, FolderBusy
    from batchrun.store.damage import check_sound

    # a run on a medium that cannot be written to can still be looked at
    with suppress(FolderBusy, DiskError), folder.locked():
        check_sound(folder)


def _complete(folder: Folder, standing: Standing) -> bool:
    """Bring the result files up to date where nobody else is at it; whether a runner lives."""
    if not (standing.is_open or standing.is_behind or _lengths(folder) != standing.listed_bytes):
        return False
    from batchrun.errors import DiskError, FolderBusy

    try:
        with folder.locked():
            if standing.manifest is not None:
                from batchrun.cli.session import run_async
                from batchrun.runner import bring_up_to_date

                run_async(lambda: bring_up_to_date(folder))
    except FolderBusy:
        return True
    except DiskError:  # a run on a medium that cannot be written to can still be looked at
        return False
    return False


def _lengths(folder: Folder) -> tuple[int, int] | None:
    with suppress(OSError):
        return folder.metadata.stat().st_size, folder.results.stat().st_size
    return None


def _tell(folder: Folder, standing: Standing, absent: Missing | None, *, is_running: bool) -> None:
    from batchrun.model import State
    from batchrun.report.summary import absences, cost, groups, next_steps
    from batchrun.report.talk import Talk
    from batchrun.report.words import near, plain, size

    talk, counts = Talk(sys.stdout), standing.counts
    rows: dict[str, Any] = {
        "done": counts.by_state.get(State.DONE, 0),
        "in flight": sum(
            counts.by_state.get(state, 0) for state in (State.SUBMITTING, State.IN_FLIGHT, State.FINISHED)
        ),
        "in doubt": counts.by_state.get(State.IN_DOUBT, 0),
        "failed": counts.by_state.get(State.FAILED, 0),
        "cancelled": counts.by_state.get(State.CANCELLED, 0),
        "invalid": counts.by_state.get(State.INVALID, 0),
        "to do": counts.by_state.get(State.PLANNED, 0),
    }
    life = "a runner is at work" if is_running else "no runner is at work"
    talk.say(f"{plain(near(folder.path))}: {life}", "bold")
    source = standing.manifest or "being read for the first time"
    talk.say(f"from    {'standard input' if source == '-' else plain(near(Path(source)))}")
    if folder.is_rehearsal:
        talk.say("a rehearsal: its pictures and its cost are made up", "cyan")
    told = ", ".join(f"{number:,} {word}" for word, number in rows.items() if number)
    talk.say(f"rows    {counts.total:,}{': ' if told else ''}{told}")
    for text, style in groups(standing.failures):
        talk.say(text, style)
    talk.say(f"images  {counts.images:,}, {size(counts.bytes)}, in {plain(near(folder.images))}")
    for text, style in absences(absent):
        talk.say(text, style)
    talk.say(*cost(folder.path, counts))
    if is_running:
        return
    if standing.is_unread:
        talk.say("repaired: run its command again, which finds the rows that were lost", "bold")
        return
    unfinished = rows["to do"] + rows["in flight"] > 0
    for text, style in next_steps(
        folder.path,
        counts,
        standing.failures,
        is_stopped=unfinished,
        commands=_commands(folder, standing),
        whose="its command",
    ):
        talk.say(text, style)


def _commands(folder: Folder, standing: Standing) -> Commands | None:
    """The command that goes on; without --limit once its rows have come to rest."""
    from batchrun.cli.command import as_told
    from batchrun.errors import UsageError
    from batchrun.manifest.job import Job
    from batchrun.model import TERMINAL
    from batchrun.report.summary import Commands

    try:
        job = Job.from_json(standing.job or "")
    except UsageError:  # told by a newer version, or not at all
        return None
    told = as_told(job.with_overrides(out=folder.path), rehearsal=folder.is_rehearsal)
    rested = sum(rows for state, rows in standing.counts.by_state.items() if state in TERMINAL)
    if told is not None and job.limit is not None and rested >= job.limit:
        return Commands(again=told.rest, rest=told.rest)
    return told
