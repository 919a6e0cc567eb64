"""Files from their public addresses, over a session that knows neither keys nor cookies.

Unless the service itself is local, it connects to public addresses only: checked on the very address the
socket is made for, so that no name can lie about it. A GET is repeated by aiohttp itself where a reused
connection turned out dead; beyond that, whether to fetch again is the caller's decision.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from batchrun.errors import OutputGone, ProtocolError, RateLimited, ServerFault
from batchrun.wiro import wire
from batchrun.wiro.foreign import NotPublic, Translated
from batchrun.wiro.manners import USER_AGENT, Deadlines, timeout

#: A connection holds up to twice as much and one read (of 250 KB with uvloop) while nobody takes it.
FETCH_BUFFER_BYTES = 2**16
#: Redirects that are followed for one file.
MAX_REDIRECTS = 5

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({403, 404, 410})
#: IPv4 addresses dressed as IPv6 ones by a gateway (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Download:
    """A file on its way."""

    #: 200, or 206 for a proven continuation.
    status: int
    #: Of the whole file; None when the server does not say.
    total_bytes: int | None
    #: Where `chunks` begin in the file: 0, unless the rest asked for is proven to be of the same file.
    start: int
    #: As the server wrote it, quotes included; None when it gave none.
    etag: str | None
    content_type: str
    #: Ends when all has come; raises ReplyLost when it breaks off. Pieces of up to half a megabyte.
    chunks: AsyncIterator[bytes]


class Files:
    """What the service's tasks made, by address; use it as an async context manager."""

    def __init__(self, deadlines: Deadlines, *, is_local: bool) -> None:
        """`is_local`: the service runs on this machine, and so may its files."""
        self._deadlines = deadlines
        self._is_local = is_local

    async def __aenter__(self) -> Self:
        self._session = _session(is_local=self._is_local)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @asynccontextmanager
    async def fetch(
        self,
        url: str,
        *,
        start: int = 0,
        etag: str | None = None,
        silence_s: float = math.inf,
    ) -> AsyncIterator[Download]:
        """A file from its public address, from byte `start` on where that is proven to be the same file.

        `start` counts only together with the strong `etag` of the first part; look at `Download.start` for
        what came of it. Bytes are as stored, never decoded. Raises OutputGone, RateLimited, ServerFault,
        NotSent, ReplyLost (also when the server falls silent for `silence_s` seconds), and ProtocolError for
        an address that must not be followed or an answer that makes no sense.
        """
        address = _address(url)
        asked = start if etag is not None and _is_strong(etag) else 0
        silence_s = min(silence_s, self._deadlines.silence_s)
        response, begin = await self._open(address, asked, etag or "", silence_s)
        try:
            yield _download(response, begin)
        finally:
            response.close()  # given back to the pool already if all of it was read

    async def _open(
        self, address: URL, asked: int, etag: str, silence_s: float
    ) -> tuple[aiohttp.ClientResponse, int]:
        """The first answer that brings bytes, and where in the file they begin."""
        redirects = 0
        while True:
            response = await self._get(address, asked, etag, silence_s)
            try:
                if response.status in _REDIRECTS:
                    redirects += 1
                    if redirects > MAX_REDIRECTS:
                        raise ProtocolError(f"{address.host} redirects without end")
                    address = _followed(address, response.headers.get("Location"))
                elif (
                    asked and response.status in (206, 416) and not _continues(response.headers, asked, etag)
                ):
                    asked = 0  # not proven to be the same file: begin again
                else:
                    _check_file(response, asked)
                    return response, asked if response.status == 206 else 0
            except BaseException:
                response.close()
                raise
            response.close()

    async def _get(self, address: URL, asked: int, etag: str, silence_s: float) -> aiohttp.ClientResponse:
        headers = {"Range": f"bytes={asked}-", "If-Range": etag} if asked else {}
        waits = timeout(self._deadlines.fetch_s, self._deadlines.connect_s, silence_s)
        with Translated(address.host or ""):
            return await self._session.get(address, headers=headers, timeout=waits, allow_redirects=False)


# --- where to ---------------------------------------------------------------------------------------


def _session(*, is_local: bool) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, socket_factory=None if is_local else _public_socket),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=FETCH_BUFFER_BYTES,
    )


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for an address about to be connected to, whichever name or redirect led there."""
    family, kind, protocol, _, peer = info
    if not is_public(str(peer[0])):
        raise NotPublic(None, "the address is not a public one")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large, not to this machine or a network around it."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        if ip.is_site_local:  # withdrawn (RFC 3879), but still inside somebody's network
            return False
        gateway = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or gateway or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _address(url: str) -> URL:
    try:
        address = URL(url)
    except ValueError as error:
        raise ProtocolError("the service gave an address that is none", detail=wire.snippet(url)) from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ProtocolError("the service gave an address that is not http", detail=wire.snippet(url))
    return address


def _followed(address: URL, location: str | None) -> URL:
    """Where a redirect leads."""
    if not location:
        raise ProtocolError(f"{address.host} redirects to nowhere")
    try:
        target = address.join(URL(location))
    except ValueError as error:
        raise ProtocolError(f"{address.host} redirects to nowhere", detail=wire.snippet(location)) from error
    target = _address(str(target))
    if address.scheme == "https" and target.scheme != "https":
        raise ProtocolError(f"{address.host} redirects to an unprotected address")
    return target


# --- what came --------------------------------------------------------------------------------------


def _is_strong(etag: str) -> bool:
    return etag.startswith('"') and etag.isascii() and etag.isprintable()


def _continues(headers: Mapping[str, str], asked: int, etag: str) -> bool:
    """Whether a partial answer is the rest of the very file that was begun."""
    part = wire.content_range(headers.get("Content-Range"))
    return part is not None and part[0] == asked and headers.get("ETag") == etag


def _check_file(response: aiohttp.ClientResponse, asked: int) -> None:
    """Raise what an answer stands for that brings no usable bytes."""
    status, host = response.status, response.url.host
    if status in _GONE:
        raise OutputGone(f"{host} no longer gives the file (HTTP {status})", status=status)
    wait_s = wire.retry_after_s(
        response.headers.get("Retry-After"),
        now=wire.http_date(response.headers.get("Date", "")) or time.time(),
    )
    if status == 429:
        raise RateLimited(f"{host} asks to slow down (HTTP 429)", retry_after_s=wait_s)
    if status >= 400:
        raise ServerFault(f"{host} answered with HTTP {status}", status=status, retry_after_s=wait_s)
    if status != 200 and not (asked and status == 206):
        raise ProtocolError(f"{host} answered with HTTP {status}, which was not asked for", status=status)
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise ProtocolError(f"{host} sent the file packed ({wire.snippet(coding)})", status=status)


def _download(response: aiohttp.ClientResponse, begin: int) -> Download:
    headers = response.headers
    total = response.content_length
    if begin:
        part = wire.content_range(headers.get("Content-Range"))
        total = part[2] if part is not None else None
    return Download(
        status=response.status,
        total_bytes=total,
        start=begin,
        etag=headers.get("ETag"),
        content_type=headers.get("Content-Type", ""),
        chunks=_Chunks(response),
    )


class _Chunks:
    """The bytes of an answer as they come; a class, since a generator left half-way would need closing."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._content = response.content
        self._translated = Translated(response.url.host or "")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        with self._translated:
            piece = await self._content.readany()
        if not piece:
            raise StopAsyncIteration
        return piece
