"""A server that speaks bytes: for answers that no HTTP library would send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from batchrun.settings import Credentials

KEY = "raw-server-key-1f4c"
SECRET = "raw-server-secret-9b2e"


@dataclass(frozen=True)
class Request:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


#: Answers one request; True keeps the connection for the next.
Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[bool | None]]


@dataclass
class Raw:
    """A running server and what it has seen."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    #: Set when a request has arrived.
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set when a connection has ended.
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> Credentials:
        return Credentials(KEY, SECRET, f"{self.origin}/v1")


@asynccontextmanager
async def serving(handle: Handler) -> AsyncIterator[Raw]:
    """A server on loopback that hands every request to `handle`."""
    raw = Raw()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        raw.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                raw.requests.append(request)
                raw.reached.set()
                if not await handle(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
            raw.closed.set()
            tasks.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    raw.port = server.sockets[0].getsockname()[1]
    try:
        yield raw
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sending(*pieces: bytes, keep: bool = False) -> Handler:
    """Send these bytes to every request, then close."""

    async def handle(_: Request, writer: asyncio.StreamWriter) -> bool:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return keep

    return handle


def answering(body: bytes | dict[str, object], status: int = 200, **headers: str) -> Handler:
    """Give this answer to every request, on connections that are kept."""
    return sending(answer(body, status, **headers), keep=True)


def answer(
    body: bytes | dict[str, object], status: int = 200, *, length: int | None = None, **headers: str
) -> bytes:
    """An HTTP answer as bytes; `_` in header names stands for `-`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


async def silence(_: Request, __: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def hang_up(_: Request, __: asyncio.StreamWriter) -> None:
    """Close the connection without an answer."""


async def reset(_: Request, writer: asyncio.StreamWriter) -> None:
    """Reset the connection without an answer."""
    abort(writer)


def abort(writer: asyncio.StreamWriter) -> None:
    """End a connection with a TCP reset."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))
