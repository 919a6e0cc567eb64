"""Starts of a job in processes of their own, and what they leave held against an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.streams.text import TextReceiveStream

from batchrun.manifest.job import Job
from batchrun.progress import Fact
from batchrun.simulator.server import Simulator
from tests.support.runs import lines_of, run_job

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "tests.crash.child")


def keys_of(simulator: Simulator) -> dict[str, str]:
    """What a process needs to find the simulator."""
    return {
        "WIRO_API_KEY": simulator.key,
        "WIRO_API_SECRET": simulator.secret or "",
        "WIRO_API_BASE_URL": simulator.base_url,
        "WIRO_SOCKET_URL": simulator.socket_url,
    }


def told_of(simulator: Simulator, job: Job, **more: Any) -> bytes:
    """What a child is told on its standard input; see `child.start`."""
    return json.dumps({"job": job.to_json(), "env": keys_of(simulator), **more}).encode()


async def start(
    simulator: Simulator, job: Job, *, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    """One start of the job in a child process, to its end."""
    return await anyio.run_process(
        CHILD,
        input=told_of(simulator, job, **more),
        env={"PATH": os.environ["PATH"], **(env or {})},
        cwd=ROOT,
        check=False,
    )


async def killed_at(simulator: Simulator, job: Job, fact: Fact, count: int) -> None:
    """Start the job in a child that dies at that point."""
    process = await start(simulator, job, die_at=[fact.value, count], hurry=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@asynccontextmanager
async def going(simulator: Simulator, job: Job, **more: Any) -> AsyncIterator[anyio.abc.Process]:
    """The job in a child process that goes on meanwhile; killed at the end of the block if it still does."""
    async with await anyio.open_process(
        CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, cwd=ROOT
    ) as process:
        try:
            assert process.stdin is not None
            await process.stdin.send(told_of(simulator, job, **more))
            await process.stdin.aclose()
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.kill()


class Nursery:
    """Where starts of one job are forked quickly, one at a time."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        assert process.stdout is not None
        self._lines = TextReceiveStream(process.stdout)
        self._rest = ""

    async def start(self, told: bytes, *, kill_after_s: float) -> int:
        """The exit code (or minus the signal) of a start, which is killed if it lives after that time."""
        assert self._process.stdin is not None
        await self._process.stdin.send(told + b"\n")
        pid = int(await self.line())
        code: int | None = None
        with anyio.move_on_after(kill_after_s):
            code = int(await self.line())
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = int(await self.line())
        await self._process.stdin.send(b"\n")  # only now may the process id be given to another
        return code

    async def line(self) -> str:
        """The next line it says."""
        while "\n" not in self._rest:
            self._rest += await self._lines.receive()
        line, _, self._rest = self._rest.partition("\n")
        return line


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """A nursery for the time of the block."""
    async with await anyio.open_process(
        [*CHILD, "nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, cwd=ROOT
    ) as process:
        found = Nursery(process)
        try:
            assert await found.line() == "ready"
            yield found
        finally:
            process.terminate()


#: What two runs of one manifest may tell differently: which task it was, and what that took.
_OWN = frozenset({"task_id", "task_ids", "cost_usd", "seconds"})


def result_of(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, as far as it is the same for every run of the manifest.

    Every file by its path, images by their bytes; the sidecar files as records in the order of their lines'
    rows; of the state and the lock only that they are there.
    """
    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if path.name in ("state.sqlite3", "run.lock"):
            result[name] = None
        elif path.suffix == ".jsonl":
            records = [{k: v for k, v in line.items() if k not in _OWN} for line in lines_of(path)]
            result[name] = sorted(records, key=lambda record: json.dumps(record, sort_keys=True))
        else:
            result[name] = path.read_bytes()
    return result


#: Results by what was asked for: they are the same every time.
_undisturbed: dict[tuple[str, bytes], dict[str, Any]] = {}


async def undisturbed(job: Job) -> dict[str, Any]:
    """The result of an undisturbed run of the job, in a folder beside it, at a simulator of its own."""
    assert isinstance(job.manifest, Path)
    asked = json.dumps(job.set, sort_keys=True), job.manifest.read_bytes()
    if asked not in _undisturbed:
        calm = job.with_overrides(out=job.folder.with_name(f"{job.folder.name}-undisturbed"))
        async with Simulator(seconds=0.05) as simulator:
            assert (await run_job(simulator, calm)).exit_code == 0
        _undisturbed[asked] = result_of(calm.folder)
    return _undisturbed[asked]
