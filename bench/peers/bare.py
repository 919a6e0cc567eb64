"""The least that makes the same requests and files: no state, no retries, no checks, nothing durable.

`python -m bench.peers.bare MANIFEST FOLDER [IN_FLIGHT]` asks for a picture per row and writes it. What a user
writes in five minutes, and the ceiling of what batchrun can reach with the same libraries.
"""

import asyncio
import csv
import os
import sys
from pathlib import Path

import aiohttp
import uvloop

BASE_URL = os.environ["WIRO_API_BASE_URL"]
HEADERS = {"x-api-key": os.environ["WIRO_API_KEY"]}


async def main(manifest: str, folder: str, in_flight: str = "64") -> None:
    rows = iter(list(csv.DictReader(open(manifest))))  # noqa: SIM115  it is what people write
    Path(folder).mkdir()
    async with aiohttp.ClientSession(headers=HEADERS, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(path: str, **body: str) -> dict:
            async with session.post(f"{BASE_URL}/{path}", json=body) as answer:
                return await answer.json()

        async def worker() -> None:
            for row in rows:
                task = (await ask("Run/wiro/Retro-Cartoons", prompt=row["prompt"]))["taskid"]
                found = (await ask("Task/Detail", taskid=task))["tasklist"][0]
                async with session.get(found["outputs"][0]["url"]) as answer:
                    Path(folder, f"{row['id']}.png").write_bytes(await answer.read())

        await asyncio.gather(*(worker() for _ in range(int(in_flight))))


uvloop.run(main(*sys.argv[1:]))
