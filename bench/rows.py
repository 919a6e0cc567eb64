"""What a row costs: batchrun beside loops of the same requests, and its memory and stalls.

All meet the same prepared answers (`bench.service`): a Run, a Detail, and an image of 200 KB to disk. One loop
is bare, one durable in the plainest way. Batchrun has as many tasks at once that waiting for the first look at a
task, which the loops do not do, is not what is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from bench.figures import Figure
from bench.process import Cost, Wiro, batchrun, run
from bench.service import IMAGES, service

ROWS = 3000
ROUNDS = 3
IN_FLIGHT = 64
#: Tasks of batchrun at once in the rounds beside the bare loop: see above.
AHEAD = 256
#: In the run for memory every so many rows one has a large image, 20 of them.
LARGE_EVERY = 20
#: Of which the most counts: memory depends on what happens to come together.
MIXED_RUNS = 3
ROOT = Path(__file__).parent.parent


def measure(place: Path) -> list[Figure]:
    """Rows/s and CPU as the medians of the ratios of each round; memory and stalls of a run of mixed sizes."""
    manifest(place / "rows.csv", ROWS)
    rounds: list[dict[str, Cost]] = []
    with service() as wiro:
        sides = {
            "bare": lambda out: loop(place, "bare", out, wiro),
            "durable": lambda out: loop(place, "durable", out, wiro),
            "own": lambda out: own_run(place, out, wiro, tasks=AHEAD),
        }
        for number in range(ROUNDS):  # side by side: a busy moment of the machine strikes all
            names = [*sides] if number % 2 else [*reversed(sides)]
            rounds.append({name: sides[name](f"{name}-{number}") for name in names})
    manifest(place / "mixed.csv", 20 * LARGE_EVERY)
    peaks_mb = []
    for number in range(MIXED_RUNS):
        with service(large_every=LARGE_EVERY) as wiro:
            mixed = own_run(place, f"mixed-{number}", wiro, manifest="mixed.csv", tasks=IN_FLIGHT)
        peaks_mb.append(mixed.peak_mb)
    with service() as wiro:
        late = place / "late.json"
        own_run(place, "stalls", wiro, tasks=IN_FLIGHT, late=late)
        stalls = sorted(json.loads(late.read_text()))
    kilobytes = IMAGES["small"] // 1000
    beside = f"{ROWS:,} rows of {kilobytes} KB, start-up included, median of {ROUNDS} rounds"
    plainest = "4 commits a row, hashed, synced and renamed; nothing checked or retried"

    def pace(side: str) -> float:
        return median(each["bare"].wall_s / each[side].wall_s for each in rounds)

    def cpu(side: str) -> float:
        return median(each[side].cpu_s / each["bare"].cpu_s for each in rounds)

    def cpu_ms(side: str) -> float:
        return median(each[side].cpu_s for each in rounds) / ROWS * 1000

    return [
        Figure("rows/s of a bare aiohttp + uvloop loop", pace("own"), "x", 0.75, ">=", beside),
        Figure("CPU of the bare loop", cpu("own"), "x", 1.35, "<=", beside),
        Figure("CPU per row", cpu_ms("own"), "ms"),
        Figure("CPU per row, bare loop", cpu_ms("bare"), "ms"),
        Figure("the plainest durable loop: rows/s of the bare one", pace("durable"), "x", note=plainest),
        Figure("the plainest durable loop: CPU of the bare one", cpu("durable"), "x", note=plainest),
        Figure(
            "peak memory",
            max(peaks_mb),
            "MB",
            100,
            "<=",
            f"{IN_FLIGHT} in flight, 20 of 50 MB among {20 * LARGE_EVERY} rows, most of {MIXED_RUNS} runs",
        ),
        Figure(
            "event loop late, p99",
            stalls[int(len(stalls) * 0.99)] * 1000,
            "ms",
            10,
            "<=",
            f"{IN_FLIGHT} in flight, {ROWS:,} rows",
        ),
    ]


def manifest(path: Path, rows: int) -> None:
    """Write a manifest of so many rows."""
    path.write_text("id,prompt\n" + "".join(f"r{number},a fox {number}\n" for number in range(rows)))


def loop(place: Path, peer: str, out: str, wiro: Wiro) -> Cost:
    """A loop of bench/peers over rows.csv."""
    env = {**wiro.env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"bench.peers.{peer}", "rows.csv", out, str(IN_FLIGHT)]
    return _counted(run(command, env=env, cwd=place), place / out, ROWS)


def own_run(
    place: Path, out: str, wiro: Wiro, *, manifest: str = "rows.csv", tasks: int, late: Path | None = None
) -> Cost:
    """A run of batchrun; `late`: where the lateness of its loop goes."""
    env = dict(wiro.env)
    if late is not None:
        env |= {"PYTHONPATH": str(ROOT / "bench" / "stalls"), "BENCH_STALLS": str(late)}
    bounds = ["--concurrency", str(tasks), "--max-concurrency", str(tasks)]
    bounds += ["--looks-per-s", "1000"]  # tasks take no time here: each is looked at once, at once
    tool = ["--tool", "Retro-Cartoons", "--set", "samples=1"]
    command = batchrun("run", manifest, *tool, "--out", out, *bounds)
    rows = len((place / manifest).read_text().splitlines()) - 1
    return _counted(run(command, env=env, cwd=place), place / out / "images", rows)


def _counted(cost: Cost, folder: Path, rows: int) -> Cost:
    """The cost of a run that left an image per row."""
    images = list(folder.rglob("*.png"))
    if cost.exit_code != 0 or len(images) != rows:
        raise RuntimeError(f"{folder}: exit code {cost.exit_code}, {len(images)} images of {rows} rows")
    return cost
