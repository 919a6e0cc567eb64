"""A small internet of our own, run in fresh network and mount namespaces: prints what fetching did there.

The loopback device is given public and private addresses, names come from a hosts file, one server listens
on all of them. So public and private hosts can both be reached, and only the client's own rules keep it out.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile

from batchrun.errors import ServiceError
from batchrun.settings import Credentials
from batchrun.wiro.client import Wiro
from batchrun.wiro.manners import Deadlines
from tests.client.raw import answer

PORT = 8080
CONTENT = b"a picture"
PUBLIC, PUBLIC6 = "93.184.216.34", "2606:2800:220:1::1"
INNER = ("10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "fd00::1", "fec0::1")
HOSTS = f"""\
127.0.0.1 localhost
{PUBLIC} cdn.example
{PUBLIC6} cdn6.example
127.0.0.1 loop.example
::1 loop6.example
10.0.0.1 inner.example
fd00::1 inner6.example
169.254.169.254 metadata.example
10.0.0.1 both.example
{PUBLIC} both.example
10.0.0.1 two.example
192.168.1.1 two.example
"""
#: Where `/redirect/NAME` leads.
TARGETS = {
    "public": f"http://cdn6.example:{PORT}/file",
    "inner": f"http://inner.example:{PORT}/file",
    "loop": f"http://127.0.0.1:{PORT}/file",
    "loop6": f"http://[::1]:{PORT}/file",
    "metadata": f"http://169.254.169.254:{PORT}/file",
    "chain": f"http://cdn6.example:{PORT}/redirect/inner",
    "long-chain": f"http://cdn6.example:{PORT}/redirect/chain",
    "rebound": "/redirect/inner",
}


async def main() -> None:
    """Fetch each address given as an argument; print {address: [what came of it, hosts reached]}."""
    _build()
    reached: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(writer.get_extra_info("sockname")[0].removeprefix("::ffff:"))
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
        target = TARGETS.get(path.removeprefix("/redirect/"))
        writer.write(answer(CONTENT) if target is None else answer(b"", 302, Location=target))
        await writer.drain()
        writer.close()

    told = {}
    server = await asyncio.start_server(serve, ["0.0.0.0", "::"], PORT)
    for address in sys.argv[1:]:
        reached.clear()
        told[address] = [await _fetched(address), list(reached)]
    server.close()
    print(json.dumps(told))


async def _fetched(address: str) -> str:
    """`whole`, or the error's class and words."""
    async with Wiro(Credentials("k", None), deadlines=Deadlines(connect_s=2.0, silence_s=2.0)) as wiro:
        try:
            async with wiro.fetch(address) as download:
                content = b"".join([chunk async for chunk in download.chunks])
        except ServiceError as error:
            return f"{type(error).__name__}: {error}"
        return "whole" if content == CONTENT else "torn"


def _build() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in (PUBLIC, PUBLIC6, *INNER):
        bits = 128 if ":" in address else 32
        quick = ["nodad"] if ":" in address else []
        subprocess.run(["ip", "address", "add", f"{address}/{bits}", "dev", "lo", *quick], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts:
        hosts.write(HOSTS)
        hosts.flush()
        subprocess.run(["mount", "--bind", hosts.name, "/etc/hosts"], check=True)


if __name__ == "__main__":
    asyncio.run(main())
