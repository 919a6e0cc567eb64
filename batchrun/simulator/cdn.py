"""Files over HTTP as a CDN sends them: Range and If-Range, strong ETags, and all that can go wrong.

The default ETag is the quoted MD5 of the bytes, as object stores behind a CDN give it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from batchrun.simulator import weather
from batchrun.simulator.envelope import page

ETagKind = Literal["md5", "opaque", "none"]

#: A request with this query is redirected to itself.
LOOP = "round"
_PIECES = 8
_DRIP_PAUSE_S = 0.05
_TERABYTE = 10**12
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class File:
    """What the CDN holds under one address."""

    content: bytes
    media_type: str
    etag: str

    def headers(self) -> dict[str, str]:
        """The headers that every whole or partial answer carries."""
        headers = {"Accept-Ranges": "bytes", "Content-Type": self.media_type}
        return {**headers, "ETag": self.etag} if self.etag else headers


@dataclass(frozen=True, slots=True)
class Upload:
    """A file the simulator was given."""

    #: Its address below the simulator's own.
    path: str
    name: str
    media_type: str
    sha256: str
    size_bytes: int


def etag(content: bytes, kind: ETagKind) -> str:
    """The ETag of these bytes, quotes included; empty when the CDN gives none."""
    match kind:
        case "md5":
            return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
        case "opaque":
            return f'"v1-{len(content):x}-{hashlib.sha256(content).hexdigest()[:12]}"'
        case "none":
            return ""


def answer(request: web.Request, file: File) -> web.Response:
    """The file or the part of it that is asked for: 200, 206 or 416."""
    total = len(file.content)
    part = _part(request, file)
    if part is None:
        return web.Response(body=file.content, headers=file.headers())
    begin, end = part
    if begin >= end:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{total}"})
    headers = {**file.headers(), "Content-Range": f"bytes {begin}-{end - 1}/{total}"}
    return web.Response(status=206, body=file.content[begin:end], headers=headers)


async def spoiled(
    request: web.Request, file: File, kind: str, *, stall: Callable[[], Awaitable[None]]
) -> web.StreamResponse:
    """The answer when the fault of this kind strikes."""
    match kind:
        case "truncated":
            return await _broken_off(request, file, weather.close)
        case "reset":
            return await _broken_off(request, file, weather.reset)
        case "stall":
            response = await _begin(request, file)
            await stall()
            return response
        case "drip":
            return await _in_pieces(request, answer(request, file))
        case "huge":
            response = await _begin(request, file, claimed=_TERABYTE)
            weather.close(request)
            return response
        case "500":
            return page(500, "Internal Server Error")
        case "404-once" | "404":
            return page(404, "Not Found")
        case "403":
            return page(403, "Forbidden", "Request has expired")
        case "gone":
            return page(410, "Gone")
        case "html":
            return page(200, "Just a moment...")
        case "wrong-bytes":
            return answer(request, File(flipped(file.content), file.media_type, file.etag))
        case "empty":
            return web.Response(headers=file.headers())
        case "no-length":
            whole = web.StreamResponse(headers=file.headers())
            whole.enable_chunked_encoding()
            await whole.prepare(request)
            await whole.write(file.content)
            return whole
        case "redirect":
            return redirect(request, "moved")
        case "redirect-loop":
            return redirect(request, LOOP)
        case "redirect-scheme":
            return web.Response(status=302, headers={"Location": f"ftp://{request.host}/0.png"})
        case "ignore-range":
            return web.Response(body=file.content, headers=file.headers())
        case "other-etag":
            other = flipped(file.content)
            return answer(request, File(other, file.media_type, etag(other, "md5")))
    raise AssertionError(f"no such fault of the CDN: {kind}")


def flipped(content: bytes) -> bytes:
    """As many bytes, some of them wrong where a look at the file's structure can tell."""
    if content.startswith(b"\xff\xd8"):
        return content[:-2] + b"\0\0"  # the end marker of a JPEG
    if content.startswith(b"RIFF"):
        return content[:4] + b"\0\0\0\0" + content[8:]  # the length of a WebP
    middle = len(content) // 2  # somewhere under a CRC of a PNG
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def _part(request: web.Request, file: File) -> tuple[int, int] | None:
    """[begin, end) of the part asked for, begin >= end where it cannot be had; None for the whole file."""
    match = _RANGE.fullmatch(request.headers.get("Range", ""))
    condition = request.headers.get("If-Range")
    if match is None or match[0] == "bytes=-" or (condition is not None and condition != file.etag):
        return None
    total = len(file.content)
    if not match[1]:
        return max(0, total - int(match[2])), total
    return int(match[1]), min(total, int(match[2]) + 1) if match[2] else total


async def _begin(request: web.Request, file: File, *, claimed: int | None = None) -> web.StreamResponse:
    """Send the headers and half the body."""
    whole = answer(request, file)
    body = whole.body if isinstance(whole.body, bytes) else b""
    response = web.StreamResponse(status=whole.status, headers=whole.headers)
    response.content_length = claimed or len(body)
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    return response


async def _broken_off(
    request: web.Request, file: File, end: Callable[[web.Request], None]
) -> web.StreamResponse:
    response = await _begin(request, file)
    end(request)
    return response


async def _in_pieces(request: web.Request, whole: web.Response) -> web.StreamResponse:
    body = whole.body if isinstance(whole.body, bytes) else b""
    response = web.StreamResponse(status=whole.status, headers=whole.headers)
    response.content_length = len(body)
    await response.prepare(request)
    step = len(body) // _PIECES + 1
    for at in range(0, len(body), step):
        await response.write(body[at : at + step])
        await asyncio.sleep(_DRIP_PAUSE_S)
    return response


def redirect(request: web.Request, query: str) -> web.Response:
    """On to the same path with this query."""
    return web.Response(status=302, headers={"Location": f"{request.rel_url.raw_path}?{query}"})
