"""The bare loop made durable in the plainest way: what durability costs by itself, without anything that judges.

`python -m bench.peers.durable MANIFEST FOLDER [IN_FLIGHT]`: every step of a row is committed (intent, task, end,
image), by one thread that commits all that waits together; an image is hashed, written, synced and renamed in one
thread job. Nothing is retried, looked up, checked, counted, or gone on with.
"""

import asyncio
import csv
import hashlib
import os
import queue
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import uvloop

BASE_URL = os.environ["WIRO_API_BASE_URL"]
HEADERS = {"x-api-key": os.environ["WIRO_API_KEY"]}


def save(path: Path, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    return sha256


class State:
    """One thread that commits whatever waits, all at once."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._path, self._loop = path, loop
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def set(self, row: str, column: str, value: str) -> None:
        done = self._loop.create_future()
        self._waiting.put((row, column, value, done))
        await done

    def _work(self) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, intent, task, url, sha256)")
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            connection.execute("BEGIN")
            for row, column, value, _ in batch:
                connection.execute(
                    f"INSERT INTO rows (id, {column}) VALUES (?, ?) "
                    f"ON CONFLICT (id) DO UPDATE SET {column} = excluded.{column}",
                    (row, value),
                )
            connection.execute("COMMIT")
            self._loop.call_soon_threadsafe(_wake, [done for *_, done in batch])


def _wake(waiting: list) -> None:
    for done in waiting:
        if not done.done():
            done.set_result(None)


async def main(manifest: str, folder: str, in_flight: str = "64") -> None:
    rows = iter(list(csv.DictReader(open(manifest))))  # noqa: SIM115  it is what people write
    Path(folder).mkdir()
    loop = asyncio.get_running_loop()
    state, threads = State(Path(folder, "state.sqlite3"), loop), ThreadPoolExecutor(16)
    async with aiohttp.ClientSession(headers=HEADERS, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(path: str, **body: str) -> dict:
            async with session.post(f"{BASE_URL}/{path}", json=body) as answer:
                return await answer.json()

        async def worker() -> None:
            for row in rows:
                await state.set(row["id"], "intent", row["prompt"])
                task = (await ask("Run/wiro/Retro-Cartoons", prompt=row["prompt"]))["taskid"]
                await state.set(row["id"], "task", task)
                url = (await ask("Task/Detail", taskid=task))["tasklist"][0]["outputs"][0]["url"]
                await state.set(row["id"], "url", url)
                async with session.get(url) as answer:
                    data = await answer.read()
                sha256 = await loop.run_in_executor(threads, save, Path(folder, f"{row['id']}.png"), data)
                await state.set(row["id"], "sha256", sha256)

        await asyncio.gather(*(worker() for _ in range(int(in_flight))))


uvloop.run(main(*sys.argv[1:]))
