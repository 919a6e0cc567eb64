"""Errors that end a command which reads a manifest: told in lines for people, or all of them as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from batchrun.errors import ManifestError, UsageError
from batchrun.model import Problem
from batchrun.report.opening import errors, to_json
from batchrun.report.talk import Talk

EXIT_USAGE = 2


@contextmanager
def telling_errors(*, as_json: bool) -> Iterator[None]:
    """Tell usage and manifest errors and end the command with its exit code."""
    try:
        yield
    except UsageError as error:
        if as_json:
            problems = error.problems if isinstance(error, ManifestError) else [Problem(str(error))]
            print(json.dumps({"errors": to_json(problems)}))
        elif not isinstance(error, ManifestError):
            raise
        else:
            talk = Talk(sys.stderr)
            for text, style in errors(error.problems, total=error.total):
                talk.say(text, style)
            talk.say(
                "nothing was sent: correct the manifest and run again (--skip-invalid runs the other rows)"
            )
        sys.exit(EXIT_USAGE)
