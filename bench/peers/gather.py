"""What a user would write: gather, a semaphore, a look every three seconds; nothing is kept or checked.

python -m bench.peers.gather ROWS SLOTS POLL_S FOLDER
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import aiohttp


async def main(rows: int, slots: int, poll_s: float, folder: Path) -> None:
    base = os.environ["WIRO_API_BASE_URL"]
    headers = {"x-api-key": os.environ["WIRO_API_KEY"], "User-Agent": "gather/1"}
    folder.mkdir(parents=True, exist_ok=True)
    slot = asyncio.Semaphore(slots)
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(60)) as session:

        async def ask(path: str, body: dict[str, object]) -> dict[str, object]:
            async with session.post(base + path, json=body) as response:
                return await response.json()

        async def one(number: int) -> None:
            async with slot:
                body = {"prompt": f"a fox {number}", "samples": 1, "seed": str(number)}
                while not (accepted := await ask("/Run/retroAIx/Retro-Cartoons", body)).get("taskid"):
                    await asyncio.sleep(1)
                while True:
                    await asyncio.sleep(poll_s)
                    task = (await ask("/Task/Detail", {"taskid": accepted["taskid"]}))["tasklist"][0]
                    if task["status"] == "task_postprocess_end":
                        break
                for output in task["outputs"]:
                    async with session.get(output["url"]) as response:
                        (folder / f"{number}.png").write_bytes(await response.read())

        await asyncio.gather(*(one(number) for number in range(rows)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
