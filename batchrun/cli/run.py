"""`batchrun run`: the main job. Running the same command again is the resume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli.options import job_of, reading_options, service_options, working_options

if TYPE_CHECKING:
    from batchrun.manifest.job import Job
    from batchrun.report.words import Line
    from batchrun.runner import Runner


@click.command(short_help="Turn a manifest into images; run again to go on.")
@click.argument("job", metavar="JOB")
@reading_options
@working_options
@service_options
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="End with a JSON object: errors of the manifest, or the run's end.",
)
def run(
    job: str,
    env_file: Path | None,
    simulate: bool,
    log_file: Path | None,
    no_display: bool,
    as_json: bool,
    **values: Any,
) -> int:
    """Bring every image of JOB to disk: a manifest (.csv, .tsv, .jsonl, .json, each also .gz), "-" for
    standard input, or a job file (.toml).

    All errors of the manifest are told before anything is sent. The run can be stopped (Ctrl-C) or killed
    at any moment; the same command goes on where it was, and never buys a finished row again.

    Keys are read from WIRO_API_KEY and WIRO_API_SECRET. Exit code: 0 all rows done, 1 some failed or in
    doubt, 2 wrong arguments or manifest (nothing was sent), 3 stopped early.
    """
    from batchrun.cli.problems import telling_errors

    with telling_errors(as_json=as_json) as telling:
        made = telling.job = job_of(job, values)
        if not simulate:
            _expect_keys(made, env_file)
        from batchrun.cli.command import as_typed
        from batchrun.cli.session import Session

        commands = as_typed(click.get_current_context())
        session = Session(made, env_file, simulate, log_file, no_display, as_json, commands)
        return session.sum_up(session.conduct(_opening))


def _expect_keys(job: Job, env_file: Path | None) -> None:
    """Raises UsageError without keys; before that what is wrong with the manifest, which needs none."""
    from batchrun.cli.options import credentials_of
    from batchrun.errors import UsageError

    try:
        credentials_of(env_file)
    except UsageError:
        if env_file is not None and not env_file.is_file():
            raise
        if isinstance(job.manifest, Path):  # standard input is not waited for to say that
            from batchrun.api import check

            findings = check(job).findings
            if not findings.allows(skip_invalid=job.skip_invalid):
                raise findings.as_error() from None
        raise


def _opening(runner: Runner) -> Iterator[Line]:
    from batchrun.model import Counts
    from batchrun.report import opening

    counts = Counts(runner.progress.counts)
    if runner.merged is None:
        yield from opening.unchanged(counts, limit=runner.job.limit)
    else:
        yield from opening.planned(
            runner.merged, runner.estimates, counts, to_buy=runner.to_buy, limit=runner.job.limit
        )
    if runner.job.max_cost is not None:
        yield f"at most {runner.job.max_cost.normalize():f} USD in all starts (--max-cost)", ""
    if runner.findings is not None:
        yield from opening.remarks(runner.findings)
