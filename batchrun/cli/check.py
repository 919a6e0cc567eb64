"""`batchrun check`: what a manifest comes to, and everything that is wrong with it; nothing is sent."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli.options import SERVICE_NAMES, job_of, reading_options, service_options, working_options

if TYPE_CHECKING:
    from batchrun.api import Checked
    from batchrun.manifest.job import Job


@click.command(short_help="Validate and count a manifest; nothing is sent.")
@click.argument("job", metavar="JOB")
@reading_options
@working_options
@service_options
@click.option("--json", "as_json", is_flag=True, help="Tell it as JSON, with all errors.")
def check(job: str, as_json: bool, **values: Any) -> int:
    """Read JOB (a manifest, "-" or a job file) to the end: count its rows per tool and the images to
    expect, and tell every error, warning and hint.

    Nothing is sent, no keys are needed and nothing is left behind. It takes the options of `run`, so that one
    command line serves for both; those about the service and the display change nothing here. Exit code: 0
    ready to run, 2 wrong arguments or manifest.
    """
    from batchrun.cli.problems import EXIT_USAGE, telling_errors

    with telling_errors(as_json=as_json) as telling:
        about_reading = {name: value for name, value in values.items() if name not in SERVICE_NAMES}
        made = telling.job = job_of(job, about_reading)
        from batchrun.api import check as check_job

        checked = check_job(made)
    is_ready = checked.findings.allows(skip_invalid=made.skip_invalid)
    if as_json:
        print(json.dumps(_to_json(checked)))
    else:
        _tell(checked, made, is_ready=is_ready)
    return 0 if is_ready else EXIT_USAGE


def _to_json(checked: Checked) -> dict[str, Any]:
    from batchrun.report.opening import to_json

    found = checked.findings
    return {
        "rows": checked.rows,
        "images": checked.images,
        "tools": checked.tools,
        "errors": to_json(found.errors),
        "warnings": to_json(found.warnings),
        "hints": to_json(found.hints),
    }


def _tell(checked: Checked, job: Job, *, is_ready: bool) -> None:
    from batchrun.cli.problems import about_skipping
    from batchrun.report.opening import errors, remarks
    from batchrun.report.talk import Talk
    from batchrun.report.words import count, plain

    talk, faults = Talk(sys.stdout), Talk(sys.stderr)
    found = checked.findings
    for text, style in errors(found.errors, total=found.error_count):
        faults.say(text, style)
    talk.say(f"{count(checked.rows, 'row')}, {count(checked.images, 'image')} to expect", "bold")
    for slug, rows in checked.tools.items():
        talk.say(f"  {plain(slug)}: {count(rows, 'row')}")
    if job.limit is not None:
        talk.say(f"a run would work on the first {count(job.limit, 'row')} only (--limit)")
    for text, style in remarks(found):
        talk.say(text, style)
    if found.error_count and is_ready:
        talk.say(
            f"{count(found.error_count, 'error')}: the rows that have one are left out (--skip-invalid)",
            "bold yellow",
        )
    elif found.error_count:
        told = f"{count(found.error_count, 'error')}: nothing would be sent"
        talk.say(told + about_skipping(found.as_error(), job), "bold red")
    else:
        talk.say("ready to run", "bold green")
