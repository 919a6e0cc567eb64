"""Errors told on the way out of a command that reads a manifest: in lines for people, or all of them as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from batchrun.errors import ManifestError, UsageError
from batchrun.report.opening import errors, to_json
from batchrun.report.talk import Talk

EXIT_USAGE = 2


@contextmanager
def telling_errors(*, as_json: bool) -> Iterator[None]:
    """Tell usage and manifest errors and end the command with its exit code."""
    try:
        yield
    except UsageError as error:
        problems = error.problems if isinstance(error, ManifestError) else ()
        if as_json:
            told = to_json(problems) or [{"file": "", "line": 0, "column": "", "message": str(error)}]
            print(json.dumps({"errors": told}))
        elif not problems:
            raise
        else:
            talk = Talk(sys.stderr)
            for text, style in errors(problems):
                talk.say(text, style)
            talk.say("nothing was sent: correct the manifest and run again (--skip-invalid runs the other rows)")
        sys.exit(EXIT_USAGE)
