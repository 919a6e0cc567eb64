"""`batchrun status`: where a run stands, whether or not a runner lives."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
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
    from batchrun.report.summary import to_json
    from batchrun.store.folder import Folder
    from batchrun.store.orders import read_standing

    place = Folder(folder.absolute())
    place.expect_run()
    standing = read_standing(place.state)
    is_running = _complete(place, standing)
    if as_json:
        told = to_json(place.path, standing.counts, standing.failures)
        print(json.dumps({**told, "manifest": standing.manifest, "running": is_running}))
    else:
        _tell(place, standing, is_running=is_running)
    return 0


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


def _tell(folder: Folder, standing: Standing, *, is_running: bool) -> None:
    from batchrun.model import State
    from batchrun.report.summary import groups, next_steps
    from batchrun.report.talk import Talk
    from batchrun.report.words import near, plain, size, spent

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
    told = ", ".join(f"{number:,} {word}" for word, number in rows.items() if number)
    talk.say(f"rows    {counts.total:,}{': ' if told else ''}{told}")
    for text, style in groups(standing.failures):
        talk.say(text, style)
    talk.say(f"images  {counts.images:,}, {size(counts.bytes)}, in {plain(near(folder.images))}")
    talk.say(f"cost    {spent(counts.cost_usd, rows_done=rows['done'])}")
    if is_running:
        return
    unfinished = rows["to do"] + rows["in flight"] > 0
    for text, style in next_steps(
        folder.path, counts, standing.failures, is_stopped=unfinished, command="its command"
    ):
        talk.say(text, style)
