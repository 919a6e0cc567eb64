"""A service that costs next to nothing: prepared answers for Run, Task/Detail, Task/List and the CDN.

The simulator judges every request and keeps every task, which takes more CPU than a client does, so beside it
all clients look alike. This one knows only what both sides of a comparison ask for: a task has ended when it
is first looked at, and its image is one of two PNGs made at the start, of 200 KB and of 50 MB, each under
any number of addresses. `python -m bench.service` prints its address and serves until its input ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from zlib import crc32

from bench.process import Wiro

#: Sizes of the images, in bytes, by the word in their addresses.
IMAGES = {"small": 200_000, "large": 50_000_000}
#: Tasks whose number is a multiple of this (and not above 20 times it) bring a large image; 0: none does.
LARGE_EVERY = 0

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
_TASK = re.compile(rb'"task(?:id|token)":\s*"(\d+)"')


def png(size_bytes: int) -> bytes:
    """A PNG of exactly that size whose checksums are right; its pixels are noise."""
    head = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 1024, 1024, 8, 2, 0, 0, 0))
    end = _chunk(b"IEND", b"")
    return head + _chunk(b"IDAT", os.urandom(size_bytes - len(head) - len(end) - 12)) + end


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))


class Service:
    """What all connections answer from."""

    def __init__(self, large_every: int) -> None:
        self._large_every = large_every
        self._tasks = 0
        self.base_url = ""
        self._images: dict[str, tuple[bytes, bytes]] = {}
        for name, size_bytes in IMAGES.items():
            content = png(size_bytes)
            etag = hashlib.md5(content, usedforsecurity=False).hexdigest()  # as object stores give it
            self._images[name] = _head(size_bytes, "image/png", f'ETag: "{etag}"\r\n'), content

    def answer(self, path: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer to a request."""
        if path.startswith(b"/cdn/"):
            return self._images[path[5:].partition(b"/")[0].decode()]
        if path.startswith(b"/v1/Run/"):
            self._tasks += 1
            task = str(self._tasks)
            return _json(
                {"result": True, "errors": [], "taskid": task, "socketaccesstoken": f"token-of-{task}"}
            )
        if path == b"/v1/Task/Detail" and (asked := _TASK.search(body)):
            return _json(
                {"result": True, "errors": [], "total": "1", "tasklist": [self._task(asked[1].decode())]}
            )
        if path == b"/v1/Task/List":
            newest = [self._task(str(self._tasks))] if self._tasks else []
            return _json({"result": True, "errors": [], "total": "1", "tasklist": newest})
        return _json({"result": False, "errors": [{"code": 1, "message": "not here"}]})

    def _task(self, task: str) -> dict[str, object]:
        number, every = int(task), self._large_every
        name = "large" if every and number % every == 0 and number <= 20 * every else "small"
        now = str(int(time.time()))
        output = {
            "name": "0.png",
            "contenttype": "image/png",
            "size": str(IMAGES[name]),
            "url": f"{self.base_url}/cdn/{name}/{task}/0.png",
        }
        return {
            "id": task,
            "socketaccesstoken": f"token-of-{task}",
            "status": "task_postprocess_end",
            "pexit": "0",
            "parameters": {"prompt": f"a fox {task}"},
            "debugerror": "",
            "createtime": now,
            "starttime": now,
            "endtime": now,
            "elapsedseconds": "0.010000",
            "totalcost": "0.001000000000",
            "outputs": [output],
        }


def _json(value: object) -> tuple[bytes, bytes]:
    body = json.dumps(value).encode()
    return _head(len(body), "application/json", f"Date: {formatdate(usegmt=True)}\r\n"), body


def _head(size_bytes: int, media_type: str, more: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {size_bytes}\r\n{more}\r\n".encode()


class Connection(asyncio.Protocol):
    """One connection: whole requests in, answers out, one after the other."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to answer."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Answer every request that is here whole."""
        data = self._rest + data
        while (end := data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(data, 0, end)
            after = end + 4 + (int(found[1]) if found else 0)
            if len(data) < after:
                break
            path = data[: data.index(b"\r\n")].split(b" ")[1]
            self._transport.writelines(self._service.answer(path, data[end + 4 : after]))
            data = data[after:]
        self._rest = data


@contextmanager
def service(*, large_every: int = LARGE_EVERY) -> Iterator[Wiro]:
    """The service in a process of its own, until the end of the block."""
    command = [sys.executable, "-m", "bench.service", str(large_every)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            base_url = process.stdout.readline().strip()
            socket_url = base_url.replace("http", "ws", 1)
            yield Wiro({"base_url": base_url, "socket_url": socket_url, "key": "key", "secret": "secret"})
        finally:
            process.kill()


async def _serve(large_every: int) -> None:
    prepared = Service(large_every)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(prepared), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    prepared.base_url = address
    print(f"{address}/v1", flush=True)
    await server.serve_forever()


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    import uvloop

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    uvloop.run(_serve(int(sys.argv[1])))
