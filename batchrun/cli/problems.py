"""Errors that end a command which reads a manifest: told in lines for people, or all of them as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchrun.errors import BatchrunError, ManifestError, UsageError
from batchrun.model import Problem
from batchrun.report.opening import errors, to_json
from batchrun.report.talk import Talk
from batchrun.report.words import plain

if TYPE_CHECKING:
    from batchrun.manifest.job import Job

EXIT_USAGE = 2


def about_skipping(error: ManifestError, job: Job | None) -> str:
    """What `--skip-invalid` would do here, or why it did nothing; "" where it is of no use."""
    skips = job is not None and job.skip_invalid
    if skips and error.blocking:
        first = plain(str(error.blocking[0]))
        more = f" (and {len(error.blocking) - 1:,} more)" if len(error.blocking) > 1 else ""
        return f"; --skip-invalid cannot help with {first}{more}"
    return " (--skip-invalid runs the other rows)" if error.valid_rows and not error.blocking else ""


class Telling:
    """What is known of the command whose errors are told."""

    #: None until the arguments are read.
    job: Job | None = None


@contextmanager
def telling_errors(*, as_json: bool) -> Iterator[Telling]:
    """Tell usage and manifest errors and end the command with its exit code; other errors go on."""
    telling = Telling()
    try:
        yield telling
    except UsageError as error:
        if as_json:
            problems = error.problems if isinstance(error, ManifestError) else [Problem(str(error))]
            print(json.dumps({"errors": to_json(problems)}))
        elif not isinstance(error, ManifestError) or not (error.blocking or error.problems[0].line):
            raise  # nothing was read at all
        else:
            talk = Talk(sys.stderr)
            for text, style in errors(error.problems, total=error.total):
                talk.say(text, style)
            told = "nothing was sent: correct the manifest and run again"
            talk.say(told + about_skipping(error, telling.job))
        sys.exit(EXIT_USAGE)
    except BatchrunError as error:
        if as_json:
            print(json.dumps({"errors": to_json([Problem(str(error))])}))
        raise
