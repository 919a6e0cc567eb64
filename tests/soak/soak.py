"""A long run under every trouble at once: faults, kills, outages, other limits, no money, a full disk.

A manifest of mixed tools is run as its user runs it, by the command, against the simulator in this process.
The command is killed and started again until all rows are done; then what is on disk, what is in the state
and what the simulator made and billed are held against each other.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import anyio
import anyio.abc
from PIL import Image

from batchrun.simulator.server import Simulator

#: A start that does not end by itself in so many seconds hangs.
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rows: int = 20_000
    kills: int = 100
    #: Seconds between a start and its kill.
    kill_after_s: tuple[float, float] = (1.5, 7.0)
    #: Every so many starts live longer, so that doubts of killed ones come to their end.
    long_every: int = 8
    long_s: float = 30.0
    outages: int = 3
    outage_s: float = 10.0
    limits: tuple[int, ...] = (12, 64)
    slots: int = 48
    faults: tuple[str, ...] = ("all=3%",)
    seconds: str = "0.05-0.6"
    stall_s: float = 4.0
    #: The service's list may show a task so late; shorter than the grace of a doubt.
    late_s: float = 5.0
    #: Seconds that a 429 asks for: 6% of all submits meet one.
    retry_after_s: int = 0
    #: A file system of this size for the run's folder, filled up once; None: no such trouble.
    disk_bytes: int | None = 1024 * 1024 * 1024
    #: What is run: the command, or the same with shorter waits in doubts.
    module: str = "batchrun"
    seed: int = 1


@dataclass
class Result:
    """What came of it."""

    exit_code: int = -1
    wall_s: float = 0.0
    starts: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    table: dict[str, Any] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Nothing paid twice, nothing lost, nothing torn, nothing in doubt, every cent accounted for."""
        table = self.table
        zeros = ("tasks made needlessly", "rows in doubt", "rows not done", "images missing", "images torn")
        return (
            self.exit_code == 0
            and not any(table[name] for name in (*zeros, "images extra"))
            and table["cost recorded, USD"] == table["cost billed, USD"]
        )


def write_manifest(path: Path, rows: int) -> int:
    """Rows of all five tools, by ids; returns the images to expect."""
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (64 + number, 64), (60 * number, 90, 120)).save(images / f"{number}.png")
    expected = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "tool", "prompt", "generalPrompt", "inputImageUrl", "samples", "seed"])
        for number in range(rows):
            samples = 2 if number % 17 == 0 else 1
            match number % 10:
                case 0:
                    cells = ["instant-id", f"portrait {number}", "", f"images/{number % 4}.png", samples]
                case 1:
                    cells = ["outpainting-sdxl-advanced", "", "", f"images/{number % 4}.png", samples]
                case 2:
                    frames, samples = f"[NC] dawn {number} | noon # {number}", 2
                    cells = ["story-diffusion-advanced", "a man, img", frames, "", ""]
                case 3 | 4 | 5:
                    cells = ["text-to-image-sd-lora", f"harbour {number}", "", "", samples]
                case _:
                    cells = ["Retro-Cartoons", f"fox {number}", "", "", samples]
            expected += samples
            writer.writerow([f"r{number}", *cells, number + 1])
    return expected


class Soak:
    """One soak; `run` does it."""

    def __init__(
        self, place: Path, plan: Plan, out: Path, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.place, self.plan, self.out, self.tell = place, plan, out, tell
        self.rng = Random(plan.seed)
        self.result = Result()
        self.expected = write_manifest(place / "soak.csv", plan.rows)
        self._ballast = out / "ballast"
        self._begun_at = time.monotonic()

    async def run(self) -> Result:
        """Until all rows are done; raises TimeoutError when a start hangs."""
        plan, result = self.plan, self.result
        options: dict[str, Any] = {"slots": plan.slots, "stall_s": plan.stall_s, "late_s": plan.late_s}
        options |= {"retry_after_s": plan.retry_after_s, "seed": plan.seed}
        async with Simulator(seconds=plan.seconds, faults=plan.faults, **options) as sim:
            for trouble in self._troubles():
                code = await self._start(sim, trouble)
                if code == 0:  # done before all troubles had their turn
                    break
            before, done = -1, self._done()
            while result.exit_code != 0 and before < done:  # a start that brings nothing is the last one
                with anyio.fail_after(PATIENCE_S):
                    result.exit_code = await self._start(sim, None)
                before, done = done, self._done()
            result.wall_s = time.monotonic() - self._begun_at
            result.struck = Counter(sim.struck)
            await anyio.to_thread.run_sync(self._weigh, sim)
        return result

    def _troubles(self) -> Iterator[str]:
        """One for each start, the kills spread among the others; the limits change around the middle."""
        plan = self.plan
        others = ["outage"] * plan.outages + ["balance"] + (["disk"] if plan.disk_bytes else [])
        troubles = ["kill"] * plan.kills + others
        self.rng.shuffle(troubles)
        for number, slots in enumerate(plan.limits):
            troubles.insert(len(troubles) // 2 + 10 * number, f"limit {slots}")
        yield from troubles

    async def _start(self, sim: Simulator, trouble: str | None) -> int | None:
        """Start the command; None when it was killed."""
        result = self.result
        result.starts += 1
        async with (
            await anyio.open_process(
                self._command(),
                cwd=self.place,
                env=self._environment(sim),
                stdout=subprocess.PIPE,
                stderr=None,
            ) as process,
            anyio.create_task_group() as group,
        ):
            lines: list[str] = []
            group.start_soon(_drain, process, lines)
            await self._be_troublesome(sim, process, trouble)
            await process.wait()
        done = self._done()
        self.tell(
            f"{time.monotonic() - self._begun_at:6.1f} s: start {result.starts}, {trouble or 'no trouble'}: "
            f"exit {process.returncode}, {done:,} rows done"
        )
        if process.returncode == 3:
            result.stops[_why(lines)] += 1
        return None if trouble == "kill" and process.returncode == -signal.SIGKILL else process.returncode

    async def _be_troublesome(self, sim: Simulator, process: anyio.abc.Process, trouble: str | None) -> None:
        plan = self.plan
        if trouble is None:
            return
        self.result.stops[trouble.split()[0]] += 0
        is_long = self.result.starts % plan.long_every == 0
        with anyio.move_on_after(plan.long_s if is_long else self.rng.uniform(*plan.kill_after_s)):
            await process.wait()
            return  # all done
        match trouble.split():
            case ["kill"]:
                _send(process, signal.SIGKILL)
            case ["outage"]:
                await sim.go_dark()
                await anyio.sleep(plan.outage_s)
                await sim.come_back()
                _send(process, signal.SIGTERM)
            case ["limit", slots]:
                sim.slots = int(slots)
                await anyio.sleep(2.0)
                _send(process, signal.SIGINT)
            case ["balance"]:
                sim.balance_usd, before = Decimal(0), sim.balance_usd
                with anyio.move_on_after(30.0):
                    await process.wait()
                sim.balance_usd = before
                _send(process, signal.SIGTERM)
            case ["disk"]:
                self._fill()
                with anyio.move_on_after(30.0):
                    await process.wait()
                self._ballast.unlink(missing_ok=True)
                _send(process, signal.SIGKILL)
        self.result.stops[trouble.split()[0]] += 1

    def _done(self) -> int:
        """The rows done so far, as the state tells."""
        state = self.out / "run" / "state.sqlite3"
        if not state.is_file():
            return 0
        with sqlite3.connect(f"file:{state}?mode=ro", uri=True) as connection:
            if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'counts'").fetchone():
                return 0  # killed before the state was made
            found = connection.execute("SELECT rows FROM counts WHERE state = 'done'").fetchone()
        return int(found[0]) if found else 0

    def _fill(self) -> None:
        """Leave no room on the run's file system."""
        with self._ballast.open("wb") as file:
            while self._ballast.stat().st_size == 0:
                free = shutil.disk_usage(self.out).free
                with suppress(OSError):  # the run has just taken some of it
                    os.posix_fallocate(file.fileno(), 0, max(1, free - 64 * 1024))

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", self.plan.module, "run", "soak.csv", "--out", str(self.out / "run")),
            *(
                "--max-concurrency",
                "64",
                "--max-pause",
                "5s",
                "--no-display",
                "--log",
                str(self.place / "log"),
            ),
        ]

    def _environment(self, sim: Simulator) -> dict[str, str]:
        return os.environ | {
            "WIRO_API_KEY": sim.key,
            "WIRO_API_SECRET": sim.secret or "",
            "WIRO_API_BASE_URL": sim.base_url,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    # --- what came of it ------------------------------------------------------------------------------

    def _weigh(self, sim: Simulator) -> None:
        folder = self.out / "run"
        told = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        records = [
            json.loads(line) for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()
        ]
        torn = missing = 0
        for record in records:
            path = folder / "images" / record["file_name"]
            if not path.is_file():
                missing += 1
            elif not _is_whole(path, record):
                torn += 1
        on_disk = sum(path.is_file() and path.suffix != ".jsonl" for path in (folder / "images").rglob("*"))
        with sqlite3.connect(f"file:{folder / 'state.sqlite3'}?mode=ro", uri=True) as state:
            (attempts,) = state.execute("SELECT count(*) FROM attempts").fetchone()
            (spent,) = state.execute("SELECT spent_usd FROM run").fetchone()
        states = Counter(record["status"] for record in told)
        self.result.table = {
            "rows": self.plan.rows,
            "rows not done": self.plan.rows - states["done"],
            "rows in doubt": states["in_doubt"],
            "tasks made": len(sim.tasks),
            "tasks made needlessly": len(sim.needless),
            "tasks that failed": sum(not task.succeeded for task in sim.tasks),
            "images expected": self.expected,
            "images whole": len(records) - torn - missing,
            "images missing": self.expected - len(records) + missing,
            "images torn": torn,
            "images extra": on_disk - len(records),
            "cost recorded, USD": Decimal(spent),
            "cost billed, USD": sim.billed_usd,
            "attempts": attempts,
            "requests": sum(sim.requests.values()),
            "faults that struck": sum(self.result.struck.values()),
        }


def _is_whole(path: Path, record: dict[str, Any]) -> bool:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (record["width"], record["height"])
    except (OSError, SyntaxError):
        return False


async def _drain(process: anyio.abc.Process, lines: list[str]) -> None:
    """Keep the last words of a start."""
    assert process.stdout is not None
    async for chunk in process.stdout:
        lines[:] = [*lines, *chunk.decode(errors="replace").splitlines()][-40:]


def _send(process: anyio.abc.Process, what: signal.Signals) -> None:
    """Send a signal, unless the process has just ended by itself."""
    with suppress(ProcessLookupError):
        process.send_signal(what)


def _why(lines: list[str]) -> str:
    """Why a start stopped, by its summary."""
    stopped = [line for line in lines if line.startswith("stopped (")]
    return stopped[-1].partition("(")[2].partition(")")[0][:60] if stopped else "stopped without a summary"


@contextmanager
def small_disk(place: Path, size_bytes: int | None) -> Iterator[Path | None]:
    """A file system of its own of that size, None where this machine does not allow it."""
    disk = place / "disk"
    disk.mkdir()
    mounted = (
        size_bytes is not None
        and hasattr(os, "geteuid")
        and os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
