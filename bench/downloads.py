"""Bytes from a CDN to disk: batchrun's way of saving, checks and syncs included, beside `curl --parallel`.

Both fetch the same addresses from the same server in the same rounds, 16 at once (batchrun's default). Curl
writes files and does no more, so beside it stands the time until what it wrote is on the disk as well; of
batchrun the time without the start of Python counts, which a run pays once.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import anyio

from bench.figures import Figure
from bench.process import Cost, Wiro, run
from bench.service import IMAGES, service

AT_ONCE = 16
ROUNDS = 3
ROOT = Path(__file__).parent.parent
#: What is fetched: which images, how many, and the share of curl's speed to be reached.
LOADS = (("small", 2000, 0.85), ("large", 20, 0.95))


def measure(place: Path) -> list[Figure]:
    """The medians of the ratios of each round; nothing without curl."""
    figures = []
    if shutil.which("curl") is None:
        return []
    with service() as wiro:
        for image, count, target in LOADS:
            megabytes = IMAGES[image] * count / 1e6
            ratios, synced, speeds, curls, cpu_ms, curl_cpu_ms = [], [], [], [], [], []
            for number in range(ROUNDS):
                folder = place / f"{image}-{number}"
                folder.mkdir()
                if number % 2:
                    ours_s, ours = own_s(folder, wiro, image, count)
                    curl, sync_s = curl_s(folder, wiro, image, count)
                else:
                    curl, sync_s = curl_s(folder, wiro, image, count)
                    ours_s, ours = own_s(folder, wiro, image, count)
                ratios.append(curl.wall_s / ours_s)
                synced.append((curl.wall_s + sync_s) / ours_s)
                speeds.append(megabytes / ours_s)
                curls.append(megabytes / curl.wall_s)
                cpu_ms.append(ours.cpu_s / count * 1000)
                curl_cpu_ms.append(curl.cpu_s / count * 1000)
            title = f"{count:,} x {IMAGES[image] / 1e6:g} MB"
            note = f"median of {ROUNDS} rounds, {AT_ONCE} at once; verified, hashed and synced"
            figures += [
                Figure(f"{title}: speed of curl --parallel", median(ratios), "x", target, ">=", note),
                Figure(f"{title}: of curl --parallel, then sync", median(synced), "x"),
                Figure(f"{title}: batchrun", median(speeds), "MB/s"),
                Figure(
                    f"{title}: curl --parallel",
                    median(curls),
                    "MB/s",
                    note="writes, checks and syncs nothing",
                ),
                Figure(f"{title}: CPU per image, batchrun", median(cpu_ms), "ms", note="start-up included"),
                Figure(f"{title}: CPU per image, curl", median(curl_cpu_ms), "ms"),
            ]
    return figures


def _addresses(wiro: Wiro, image: str, count: int) -> list[str]:
    root = wiro.base_url.removesuffix("/v1")
    return [f"{root}/cdn/{image}/{number}/0.png" for number in range(count)]


def curl_s(place: Path, wiro: Wiro, image: str, count: int) -> tuple[Cost, float]:
    """What curl takes, and the seconds more until what it wrote is on the disk."""
    folder = place / "curl"
    folder.mkdir()
    lines = [
        f'url = "{url}"\noutput = "{number}.png"\n'
        for number, url in enumerate(_addresses(wiro, image, count))
    ]
    (place / "curl.txt").write_text("".join(lines))
    command = [
        "curl",
        "--silent",
        "--parallel",
        "--parallel-max",
        str(AT_ONCE),
        "--config",
        place / "curl.txt",
    ]
    cost = run(command, env=os.environ, cwd=folder)
    sync = run(["sync", "--file-system", "."], env=os.environ, cwd=folder)
    _check(folder, count, cost.exit_code)
    return cost, sync.wall_s


def own_s(place: Path, wiro: Wiro, image: str, count: int) -> tuple[float, Cost]:
    """Seconds that batchrun's saving takes, and what the whole process takes."""
    env = {**wiro.env, "PYTHONPATH": str(ROOT)}
    told = place / "seconds.txt"
    command = [sys.executable, "-m", "bench.downloads", "own", image, str(count)]
    cost = run(command, env=env, cwd=place, log=told)
    _check(place / "own", count, cost.exit_code)
    return float(told.read_text()), cost


def _check(folder: Path, count: int, exit_code: int) -> None:
    images = list(folder.rglob("*.png"))
    if exit_code != 0 or len(images) != count:
        raise RuntimeError(f"{folder}: exit code {exit_code}, {len(images)} files of {count}")


async def _save_all(folder: Path, image: str, count: int) -> None:
    """Every image through the client and the saving of a run, without its rows."""
    from batchrun.dispatch.publishing import Publisher
    from batchrun.dispatch.saving import IN_HAND
    from batchrun.model import Output
    from batchrun.outputs.save import Partial, receive
    from batchrun.settings import credentials
    from batchrun.wiro.client import Wiro as Client

    asked = credentials(os.environ)
    root = asked.base_url.removesuffix("/v1")
    numbers = iter(range(count))
    downloading, publisher = anyio.Semaphore(AT_ONCE, fast_acquire=True), Publisher()

    async def worker() -> None:
        for number in numbers:
            output = Output(0, f"{root}/cdn/{image}/{number}/0.png", "0.png", "image/png", IMAGES[image])
            partial = Partial(folder / "partial" / f"{number}.part")
            final = folder / "images" / f"{number}.png"
            async with downloading:
                await receive(client.fetch, output, partial, max_bytes=2**30)
            await publisher.publish(partial, output, lambda facts, final=final: final, None)

    begun = time.perf_counter()
    async with Client(asked) as client, anyio.create_task_group() as publishing:
        publishing.start_soon(publisher.run)
        async with anyio.create_task_group() as workers:
            for _ in range(AT_ONCE + IN_HAND):
                workers.start_soon(worker)
        publishing.cancel_scope.cancel()
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    from batchrun.cli.session import run_async

    run_async(lambda: _save_all(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
