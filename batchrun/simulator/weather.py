"""Bad weather on the wire: connections that break, answers that come torn, late or as something else.

`spoil` takes the answer that the service would have given (None where the fault strikes before it acts) and
sends what arrives instead.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from aiohttp import web

from batchrun.simulator.envelope import page


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad weather behaves here."""

    #: Waits for as long as a stalled answer takes (or until the simulator ends).
    stall: Callable[[], Awaitable[None]]
    #: The service's wall time, unix seconds.
    wall: Callable[[], float]
    retry_after_s: int


async def spoil(
    kind: str, request: web.Request, answer: web.Response | None, sky: Weather
) -> web.StreamResponse:
    """What the client gets when a transport fault of this kind strikes."""
    body = answer.body if answer is not None and isinstance(answer.body, bytes) else b""
    match kind.removesuffix("-before"):
        case "refused":
            close(request)
        case "reset":
            reset(request)
        case "stall":
            await sky.stall()
            reset(request)
        case "500":
            return page(500, "Internal Server Error")
        case "524":
            return page(524, "A timeout occurred")
        case "html":
            return page(502, "Bad gateway")
        case "429":
            return _too_many(str(sky.retry_after_s))
        case "429-date":
            at = datetime.fromtimestamp(sky.wall(), UTC) + timedelta(seconds=sky.retry_after_s)
            return _too_many(format_datetime(at, usegmt=True))
        case "broken-json":
            return web.Response(body=body[: len(body) // 2], content_type="application/json")
        case "half":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            close(request)
            return response
        case _:
            raise AssertionError(f"no such weather: {kind}")
    return web.Response(status=500)  # never arrives: the connection is gone


def close(request: web.Request) -> None:
    """End the connection after what was written, as a server that goes away."""
    if request.transport is not None:
        request.transport.close()


def reset(request: web.Request) -> None:
    """End the connection with a TCP reset."""
    transport = request.transport
    if transport is None:
        return
    if (sock := transport.get_extra_info("socket")) is not None:
        # Through a descriptor of our own, since the loops' stand-ins for sockets differ in what they allow.
        with socket.socket(fileno=os.dup(sock.fileno())) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _too_many(retry_after: str) -> web.Response:
    return web.Response(status=429, text="Too Many Requests", headers={"Retry-After": retry_after})
