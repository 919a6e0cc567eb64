"""How full the account's slots are kept, where the service queues tasks and where it answers code 96.

Utilisation is the time that the same tasks would take if every slot were given to the next one at once (list
scheduling in their order), over the time that passed from the start of the process to the last image on disk.
"""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Figure, Series
from bench.process import Cost, Wiro, batchrun, run, simulator

SLOTS = 32
ROWS = 500
MANY = 5000
#: What an account with 50 USD may have at once, and rows for about a minute of it.
FEW_SLOTS, FEW_ROWS = 5, 60
#: Of the shorter runs, since the start of a process takes now 0.4 s and now 0.7.
ROUNDS = 3
#: With BENCH_LONG=1 so many rows are run too, which takes six minutes more.
IS_LONG = os.environ.get("BENCH_LONG") == "1"
#: Median and 95th percentile of the tasks' durations, in seconds.
SECONDS = "lognormal:0.9:2.0"
#: With few slots, nearer to what tools take.
FEW_SECONDS = "lognormal:3:8"


@dataclass(frozen=True, slots=True)
class _Round:
    """A run to its end; looks and refusals per task, instants in unix seconds."""

    utilisation: float
    looks: float
    refusals: float
    begun_at: float
    saved_at: list[float]


def measure(folder: Path) -> list[Figure | Series]:
    """Both kinds of service, and beside them a script with a semaphore."""
    figures: list[Figure | Series] = []
    for title, kind, rows, least in (
        ("queueing", ("--queue",), ROWS, 0.97),
        ("code 96", (), ROWS, 0.96),
        *((("queueing", ("--queue",), MANY, 0.99), ("code 96", (), MANY, 0.99)) if IS_LONG else ()),
    ):
        rounds = []
        for number in range(ROUNDS if rows == ROWS else 1):
            place = folder / f"{title} {rows} {number}"
            place.mkdir()
            rounds.append(_own(place, _service(kind), rows, SLOTS))
        figures += _figures(f"{rows:,} rows, {title}", rounds, least)
    place = folder / "few"
    place.mkdir()
    service = _service((), slots=FEW_SLOTS, seconds=FEW_SECONDS)
    title = f"{FEW_ROWS} rows of 3 to 8 s, {FEW_SLOTS} slots, code 96"
    figures += _figures(title, [_own(place, service, FEW_ROWS, FEW_SLOTS)], None)
    for poll_s in (3.0, 0.5):
        title = f"{ROWS:,} rows, gather and semaphore, a look every {poll_s:g} s"
        figures += _figures(title, [_gather(folder / f"gather {poll_s}", poll_s)], None)
    return figures


def _own(place: Path, service: Iterable[str], rows: int, slots: int) -> _Round:
    with simulator(*service) as wiro:
        write_manifest(place / "m.csv", rows)
        # what the account allows is found out by trying: no --concurrency
        command = batchrun(
            *("run", "m.csv", "--tool", "Retro-Cartoons", "--set", "samples=1", "--out", "run"),
            *("--no-display", "--max-concurrency", str(2 * SLOTS)),
        )
        cost = run(command, env=wiro.env, cwd=place, log=place / "log")
        if cost.exit_code:
            raise RuntimeError((place / "log").read_text())
        return _round(wiro, place / "run/images", cost, rows, slots)


def _gather(images: Path, poll_s: float) -> _Round:
    with simulator(*_service(("--queue", "--key-only"))) as wiro:
        command = [sys.executable, "-m", "bench.peers.gather", ROWS, SLOTS, poll_s, images]
        cost = run([str(part) for part in command], env=wiro.env, cwd=Path.cwd())
        return _round(wiro, images, cost, ROWS, SLOTS)


def _service(kind: Iterable[str], *, slots: int = SLOTS, seconds: str = SECONDS) -> list[str]:
    return ["--slots", str(slots), "--seconds", seconds, "--seed", "1", *kind]


def write_manifest(path: Path, rows: int) -> None:
    """Rows that differ in prompt and seed."""
    lines = (f"r{number},a fox {number},{number + 1}\n" for number in range(rows))
    path.write_text("id,prompt,seed\n" + "".join(lines), encoding="utf-8")


def _round(wiro: Wiro, images: Path, cost: Cost, rows: int, slots: int) -> _Round:
    tasks, stats = wiro.ask("tasks"), wiro.ask("stats")
    if len(tasks) != rows or stats["needless"]:
        raise RuntimeError(f"{images}: {len(tasks)} tasks for {rows} rows")
    saved_at = sorted(path.stat().st_mtime for path in images.rglob("*.*") if path.suffix != ".jsonl")
    requests = stats["requests"]
    return _Round(
        utilisation=makespan_s(durations_s(tasks), slots) / (saved_at[-1] - cost.begun_at),
        looks=(requests.get("detail", 0) + requests.get("list", 0)) / rows,
        refusals=stats["refusals"].get("96", 0) / rows,
        begun_at=cost.begun_at,
        saved_at=saved_at,
    )


def _figures(title: str, rounds: Sequence[_Round], least: float | None) -> list[Figure | Series]:
    """The round of middle utilisation; `least`: the target, of our own runs."""
    ranked = sorted(rounds, key=lambda each: each.utilisation)
    middle = ranked[len(ranked) // 2]
    note = ""
    if len(ranked) > 1:
        note = f"median of {len(ranked)} ({ranked[0].utilisation:.3f} to {ranked[-1].utilisation:.3f})"
    is_ours = least is not None
    figures: list[Figure | Series] = [
        Figure(f"{title}: utilisation", middle.utilisation, "ratio", least, ">=", note),
        Figure(
            f"{title}: looks", middle.looks, "a task", 3 if is_ours else None, "<=", "Details and List pages"
        ),
        Figure(
            f"{title}: refusals",
            middle.refusals,
            "a task",
            1.5 if is_ours else None,
            "<=",
            "answers of code 96",
        ),
    ]
    if len(middle.saved_at) == ROWS:
        figures.append(_over_time(title, middle.saved_at, middle.begun_at))
    return figures


def _over_time(title: str, saved_at: Sequence[float], begun_at: float) -> Series:
    points = [(round(at - begun_at, 2), count) for count, at in enumerate(saved_at, 1)]
    return Series("images over time", title.partition(", ")[2], "s", "images on disk", points[::5])


def durations_s(tasks: Sequence[Mapping[str, Any]]) -> list[float]:
    """How long each task ran, in the order in which they were made."""
    return [task["ended_at"] - task["started_at"] for task in tasks]


def makespan_s(durations: Iterable[float], slots: int) -> float:
    """How long list scheduling takes: each task in its order goes to the slot that is free first."""
    free_at = [0.0] * slots
    for seconds in durations:
        heapq.heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
