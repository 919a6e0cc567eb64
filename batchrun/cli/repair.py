"""`batchrun repair`: rebuild a run's damaged state from what is left; nothing is sent and nothing deleted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from batchrun.repair.repair import Repaired
    from batchrun.report.words import Line


@click.command(short_help="Rebuild a run's damaged state; nothing is sent.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--fetch-missing",
    is_flag=True,
    help="Fetch images again that are not in their place any more; by default they count as sorted out.",
)
def repair(folder: Path, fetch_missing: bool) -> int:
    """Rebuild the state of the run in DIR, when its file is damaged, lost or older than its results.

    What can be read of it, results.jsonl, images/metadata.jsonl and the images themselves, each proved by its
    SHA-256, make a new state. Damaged files are moved to DIR/damaged-1 (-2, ...), nothing is deleted, nothing
    is sent. Rows of which nothing is left are in doubt: the next `batchrun run` looks through the service's
    task list for their tasks before it submits anything.

    Exit code: 0 repaired, or nothing was wrong.
    """
    from batchrun.repair.repair import repair as mend
    from batchrun.report.talk import Talk
    from batchrun.report.words import near, plain
    from batchrun.store.folder import Folder

    place, talk = Folder(folder.absolute()), Talk(sys.stdout)
    done = mend(place, fetch_missing=fetch_missing, note=lambda text: talk.say(plain(text, limit=500)))
    if done is None:
        talk.say(f"{plain(near(place.path))}: the state is sound, there is nothing to repair", "bold green")
        return 0
    for text, style in _told(done):
        talk.say(text, style)
    return 0


def _told(done: Repaired) -> Iterator[Line]:
    import shlex

    from batchrun.report.words import count, near, plain

    kept = [f"{number:,} {word}" for word, number in done.rows.items() if number]
    yield f"rebuilt: {count(sum(done.rows.values()), 'row')}{': ' if kept else ''}{', '.join(kept)}", "bold"
    sources = [f"{number:,} from {name}" for name, number in done.sources.items() if number]
    if sources:
        yield f"  known {', '.join(sources)}", ""
    yield f"  images  {done.whole:,} whole", ""
    if done.damaged:
        yield (
            f"          {done.damaged:,} damaged: moved aside, to be fetched again without being bought",
            "yellow",
        )
    if done.missing:
        told = (
            "to be fetched again" if done.fetch_missing else "left out (--fetch-missing fetches them again)"
        )
        yield f"          {done.missing:,} not in their place: {told}", "yellow"
    yield f"  what was damaged is in {plain(near(done.aside))}", ""
    yield (
        "  not known: rows that were on their way. The next start looks for their tasks in the service's "
        "list; what is not found there is submitted, what cannot be known is held and told",
        "yellow",
    )
    if done.command is None:
        yield "to go on: run the same command as before", "bold"
    else:
        yield f"to go on: run the same command as before, for {shlex.quote(plain(done.command))}", "bold"
