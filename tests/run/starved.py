"""A run in a process of its own that has no open file to spare for a while, from a given fact on."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys

import anyio

from batchrun.errors import BatchrunError
from batchrun.manifest.job import Job
from batchrun.progress import Event, Progress
from batchrun.runner import Runner
from batchrun.settings import credentials

#: Files that may be open at all.
FILES = 80
STARVED_S = 0.7


def main() -> None:
    """Run the job given as JSON on standard input; the argument is the fact. Prints how it ended."""
    fact = sys.argv[1]
    taken: list[int] = []
    starved = False

    def starve(event: Event) -> None:
        nonlocal starved
        if event.fact == fact and not starved:
            starved = True
            try:
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                asyncio.get_running_loop().call_later(STARVED_S, give_back)

    def give_back() -> None:
        while taken:
            os.close(taken.pop())

    job = Job.from_json(sys.stdin.read())
    runner = Runner(job, credentials(os.environ), progress=Progress(starve))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    try:
        outcome = anyio.run(runner.run)
        code, stopped = outcome.exit_code, outcome.stopped
    except (BatchrunError, OSError) as error:
        code, stopped = 3, str(error).lower()
    give_back()
    print(json.dumps({"code": code, "stopped": stopped, "starved": starved}))


if __name__ == "__main__":
    main()
