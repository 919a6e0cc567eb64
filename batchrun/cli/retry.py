"""`batchrun retry`: ask again for the rows of a run that did not make it, by the user's word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli.options import bounds_options, service_options

if TYPE_CHECKING:
    from batchrun.report.words import Line
    from batchrun.runner import Runner


@click.command(short_help="Ask again for rows that failed or are in doubt.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--failed", is_flag=True, help="Failed and cancelled rows: this is the default.")
@click.option(
    "--in-doubt", is_flag=True, help="Doubtful rows: looked up once more, else submitted, perhaps twice."
)
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only the row of this id. Repeatable.")
@bounds_options
@service_options
def retry(
    folder: Path,
    failed: bool,
    in_doubt: bool,
    ids: tuple[str, ...],
    env_file: Path | None,
    simulate: bool,
    log_file: Path | None,
    no_display: bool,
    **bounds: Any,
) -> int:
    """Put rows of the run in DIR back on their way and run at once, with the settings that the run was told.

    Images that were paid for are fetched again, not bought again. Rows that were paid for and whose
    images are lost stay as they are without --regenerate-lost. The manifest is not read again: correct
    failed.csv and run it, or run the manifest again, to change what a row asks for.

    Exit code: as for run.
    """
    from batchrun.cli.command import as_told
    from batchrun.cli.session import Session, stored_job
    from batchrun.model import State
    from batchrun.runner import Again

    job = stored_job(folder).with_overrides(**bounds)
    states = [State.FAILED, State.CANCELLED] if failed or not in_doubt else []
    states += [State.IN_DOUBT] if in_doubt else []
    commands = as_told(job, rehearsal=simulate)
    session = Session(job, env_file, simulate, log_file, no_display, commands=commands)
    return session.sum_up(session.conduct(_opening, again=Again(states=states, ids=ids)))


def _opening(runner: Runner) -> Iterator[Line]:
    from batchrun.model import Counts, State
    from batchrun.report.opening import so_far
    from batchrun.report.words import count, plain

    again = runner.again
    assert again is not None
    done = again.requeued
    if State.FAILED in again.states:
        of = " of those ids" if again.ids else ""
        if not (done.submit or done.save or done.lost):
            yield f"no failed rows{of} to ask for again", "bold"
        else:
            yield f"{count(done.submit, 'row')}{of} asked for again", "bold"
    if done.save:
        yield f"{count(done.save, 'row')} paid for: only the images are fetched again", ""
    if done.lost:
        are, them = ("is", "it") if done.lost == 1 else ("are", "them")
        yield (
            f"{count(done.lost, 'row')} paid for whose images are lost {are} left; "
            f"--regenerate-lost buys {them}",
            "yellow",
        )
    if State.IN_DOUBT in again.states:
        doubtful = again.doubtful
        yield f"{count(doubtful, 'row')} in doubt: looked up once more, submitted where nothing is found", ""
    else:
        for id_ in [id_ for id_, state in again.standing.items() if state is State.IN_DOUBT]:
            yield f"row {plain(id_, limit=60)} is in doubt: --in-doubt looks it up once more", "yellow"
    yield from so_far(Counts(runner.progress.counts))
