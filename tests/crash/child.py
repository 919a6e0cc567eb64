"""A run in a process of its own that kills itself at the n-th announcement of a fact."""

from __future__ import annotations

import json
import os
import signal
import sys

import anyio

from batchrun.manifest.job import Job
from batchrun.progress import Event, Progress
from batchrun.runner import Runner
from batchrun.settings import credentials


def main() -> int:
    """Run the job given as JSON on standard input; the arguments are the fact and the count to die at."""
    fact, count = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else ("", 0)
    seen = 0

    def die(event: Event) -> None:
        nonlocal seen
        seen += event.fact == fact
        if seen == count and event.fact == fact:
            os.kill(os.getpid(), signal.SIGKILL)

    job = Job.from_json(sys.stdin.read())
    outcome = anyio.run(Runner(job, credentials(os.environ), progress=Progress(die)).run)
    print(json.dumps({"code": outcome.exit_code, "stopped": outcome.stopped}))
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
