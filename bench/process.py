"""Processes that are measured: the simulator on the side, and commands with their time, CPU and memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process took, its children included."""

    wall_s: float
    cpu_s: float
    #: Most memory resident at once; NaN where our own was as much, since Linux counts what was there before the
    #: command took the process over.
    peak_mb: float
    exit_code: int
    #: Unix seconds when it was started.
    begun_at: float


def run(command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path, log: Path | None = None) -> Cost:
    """Run a command to its end; its output goes to `log`, or nowhere."""
    with open(log or os.devnull, "wb") as out:
        begun_at, begun = time.time(), time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], env=dict(env), cwd=cwd, stdout=out, stderr=out
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    own_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = usage.ru_maxrss / 1024 if usage.ru_maxrss > own_kb else float("nan")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, peak_mb, process.returncode, begun_at)


def batchrun(*arguments: str | Path) -> list[str]:
    """The command line of batchrun in this environment."""
    return [sys.executable, "-m", "batchrun", *map(str, arguments)]


class Wiro:
    """A simulator in a process of its own."""

    def __init__(self, told: Mapping[str, str]) -> None:
        self.base_url = told["base_url"]
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("WIRO_")},
            "WIRO_API_KEY": told["key"],
            "WIRO_API_SECRET": told["secret"] or "",
            "WIRO_API_BASE_URL": told["base_url"],
            "WIRO_SOCKET_URL": told["socket_url"],
        }

    def ask(self, path: str) -> Any:
        """What `/simulator/PATH` tells: stats or tasks."""
        with urllib.request.urlopen(f"{self.base_url.removesuffix('/v1')}/simulator/{path}") as answer:
            return json.load(answer)


@contextmanager
def simulator(*arguments: str) -> Iterator[Wiro]:
    """`batchrun simulate` with these options until the end of the block."""
    command = batchrun("simulate", "--with-parent", *arguments)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Wiro(json.loads(process.stdout.readline()))
        finally:
            process.kill()
