"""A run in a process of its own, with instructions: where to die, what to write down, what time it is.

As `python -m tests.crash.child` it does one start, told as JSON on standard input. As
`python -m tests.crash.child nursery` it does many: for each line of JSON it forks a start, and answers with
its process id and, once it has ended, its exit code; so that a start costs no second of imports.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from batchrun.manifest.job import Job
from batchrun.progress import Event, Progress
from batchrun.runner import Runner
from batchrun.settings import credentials
from tests.crash.hurry import hurry

#: What a file of clocks holds: how far the wall clock and the monotonic one are ahead, in seconds.
CLOCKS = struct.Struct("<dd")


def start(told: dict[str, Any]) -> int:
    """One start. Told are:

    - job: the job as JSON; env: how to reach the service
    - die_at: [fact, or "" for any, count]: kill -9 at that announcement
    - marks: a file that gets a line per announcement: [fact, row, task]
    - clocks: a file that says how far its clocks are ahead
    - hurry: wait shorter
    """
    listeners: list[Callable[[Event], None]] = []
    if told.get("hurry"):
        hurry(setattr)
    if told.get("clocks"):
        _bend_clocks(Path(told["clocks"]))
    if told.get("marks"):
        listeners.append(_marker(Path(told["marks"])))
    if told.get("die_at"):
        listeners.append(_death(*told["die_at"]))
    runner = Runner(Job.from_json(told["job"]), credentials(told["env"]), progress=Progress(*listeners))
    outcome = anyio.run(runner.run)
    print(json.dumps({"code": outcome.exit_code, "stopped": outcome.stopped}), flush=True)
    return outcome.exit_code


def _death(fact: str, count: int) -> Callable[[Event], None]:
    seen = 0

    def die(event: Event) -> None:
        nonlocal seen
        if fact in ("", event.fact):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return die


def _marker(path: Path) -> Callable[[Event], None]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(event: Event) -> None:
        line = json.dumps([event.fact, event.seq, event.details.get("task")])
        os.write(file, line.encode() + b"\n")

    return mark


def _bend_clocks(path: Path) -> None:
    """Let the process's clocks go as far ahead as the file says, from one reading to the next."""
    file = os.open(path, os.O_RDONLY)

    def ahead(which: int) -> float:
        return float(CLOCKS.unpack(os.pread(file, CLOCKS.size, 0))[which])

    wall, wall_ns, monotonic = time.time, time.time_ns, time.monotonic
    time.time = lambda: wall() + ahead(0)
    time.time_ns = lambda: wall_ns() + int(ahead(0) * 1e9)
    time.monotonic = lambda: monotonic() + ahead(1)


def nursery() -> int:
    """Fork a start per line of standard input."""
    print("ready", flush=True)
    while line := sys.stdin.readline():
        told = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(start(told))
        print(pid, flush=True)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        print(code, flush=True)
        sys.stdin.readline()  # until then nobody else can have this process id
        os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(nursery() if sys.argv[1:] == ["nursery"] else start(json.load(sys.stdin)))
