"""`batchrun run`: a first version."""

from __future__ import annotations

import os
import sys

import click


@click.command()
@click.argument("job")
@click.option("--tool")
@click.option("--out")
@click.option("--set", "set_", multiple=True)
@click.option("--map", "map_", multiple=True)
@click.option("--expand", multiple=True)
@click.option("--extra")
@click.option("--concurrency")
def run(job: str, tool: str | None, out: str | None, set_: tuple[str, ...], map_: tuple[str, ...], expand: tuple[str, ...], extra: str | None, concurrency: str | None) -> None:
    """Run a job."""
    import anyio

    from batchrun.manifest.job import job_for, parse_assignments
    from batchrun.progress import Event, Progress
    from batchrun.runner import Runner
    from batchrun.settings import credentials

    made = job_for(job, tool=tool, out=out, set=parse_assignments(set_, "--set"), map=parse_assignments(map_, "--map"),
                   expand=parse_assignments(expand, "--expand"), extra=extra, concurrency=int(concurrency) if concurrency else None)

    def listen(event: Event) -> None:
        print(event.fact, event.seq, dict(event.details), file=sys.stderr)

    progress = Progress(listen)
    runner = Runner(made, credentials(os.environ), progress=progress)
    outcome = anyio.run(runner.run)
    print(outcome)
    sys.exit(outcome.exit_code)
