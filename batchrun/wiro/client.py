"""The service over HTTP: a method per thing it can be asked for; one place where foreign errors become ours.

Nothing is repeated in here: whether a failed call may be made again is the caller's decision, for Run costs
money. aiohttp itself resends only methods it calls idempotent (GET among them), on a reused connection that
turned out dead; never a POST, and every call of the API is one.

Three sessions with three duties. Submits go out on connections that have been idle for 2 s at most, since a
connection that the other side has just given up is how an answer gets lost. All other calls share a second
pool. Files come through a third, which knows neither keys nor cookies and, unless the service itself is
local, connects to public addresses only: checked on the very address the socket is made for, so that no name
can lie about it.
"""

from __future__ import annotations

import json
import math
import mimetypes
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio.to_thread
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from batchrun import __version__
from batchrun.errors import (
    NotSent,
    OutputGone,
    ProtocolError,
    RateLimited,
    ReplyLost,
    RequestRejected,
    ServerFault,
    ServiceError,
)
from batchrun.model import Accepted, Task, Value
from batchrun.settings import Credentials
from batchrun.wiro import signing, wire
from batchrun.wiro.socket import TaskSocket, connected

#: Default User-Agents of libraries are refused by the firewall in front of the service.
USER_AGENT = f"batchrun/{__version__}"
#: Servers keep idle connections for 5 s (Node.js) and longer; a submit stays well below.
SUBMIT_KEEPALIVE_S = 2.0
#: 100 tasks of Task/List take about 200 KB; a JSON answer beyond this is damage.
MAX_ANSWER_BYTES = 32 * 2**20
#: A connection holds up to twice as much and one read (of 250 KB with uvloop) while nobody takes it.
FETCH_BUFFER_BYTES = 2**16
#: Slowest upload that is waited for; 100 MB then take half an hour at most.
SLOWEST_UPLOAD_BYTES_PER_S = 64 * 1024
#: Wall and monotonic time that drift apart by more than this were torn apart by a set clock or by sleep.
CLOCK_SLACK_S = 1.0
#: What Task/List gives at most.
MAX_LISTED = 100

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({403, 404, 410})
#: IPv4 addresses dressed as IPv6 ones by a gateway (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each step of a call may take, in seconds."""

    #: Name look-up, connection and TLS handshake.
    connect_s: float = 10.0
    #: A whole Run, answer included: the service answers once the task is queued.
    submit_s: float = 60.0
    #: Any other call.
    call_s: float = 15.0
    #: Between two pieces of a file, unless the caller waits for less.
    silence_s: float = 60.0
    #: A whole file; a slow one goes on with Range.
    fetch_s: float = 900.0


DEADLINES = Deadlines()


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


class Wiro:
    """The service, for one pair of credentials; use it as an async context manager.

    Every method raises the service errors of `batchrun.errors`. Cancelling a call closes its connection and
    says nothing about whether the service acted.
    """

    def __init__(self, credentials: Credentials, *, deadlines: Deadlines | None = None) -> None:
        self._credentials = credentials
        self._deadlines = deadlines or DEADLINES
        self._translated = Translated(URL(credentials.base_url).host or "")
        self._concealed = signing.concealer(credentials.key, credentials.secret)
        self._nonce = 0
        #: The last Date header as unix time, and our monotonic and wall time at its arrival.
        self._seen: tuple[float, float, float] | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._submits = await stack.enter_async_context(_session(keepalive_s=SUBMIT_KEEPALIVE_S))
            self._calls = await stack.enter_async_context(_session())
            self._files = await stack.enter_async_context(_file_session(is_local=self._credentials.is_local))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def __repr__(self) -> str:
        return f"Wiro({self._credentials.base_url!r})"

    # --- tasks ---

    async def submit(self, run_path: str, body: Mapping[str, Value]) -> Accepted:
        """Ask for a task (Run, `/Run/owner/tool`): costs money, and asking twice makes two.

        ReplyLost, ProtocolError and ServerFault (unless `acted` is False) leave open whether there is a task
        now. All others are certain that there is none: NotSent, RateLimited, LimitReached, BalanceExhausted,
        CredentialsRefused, NotFound (no such tool) and RequestRejected.
        """
        answer = await self._post(self._submits, run_path, body, total_s=self._deadlines.submit_s)
        with _Telling(answer):
            return wire.read_accepted(answer.status, answer.body, retry_after_s=answer.retry_after_s)

    async def detail(self, task_id: str, token: str = "") -> Task | None:
        """The task as it stands, by its id (by its token, where the id is empty); None for an empty answer.

        NotFound when the service says that it knows no such task.
        """
        return await self._one("/Task/Detail", task_id, {} if task_id else {"tasktoken": token})

    async def list_tasks(self, start: int = 0, limit: int = MAX_LISTED) -> list[Task]:
        """The project's tasks, newest first, from the `start`-th (0 is the newest); at most 100 at a time."""
        window = {"start": str(start), "limit": str(min(limit, MAX_LISTED))}
        answer = await self._call("/Task/List", {"type": "model", "sort": "id", "order": "DESC", **window})
        with _Telling(answer):
            return wire.read_tasks(_yes(answer), whole=True)

    async def cancel(self, task_id: str) -> Task | None:
        """Stop a queued task; the task as it then stands, None when the answer does not show it."""
        return await self._one("/Task/Cancel", task_id)

    async def kill(self, task_id: str, token: str = "") -> Task | None:
        """Stop a task at work, by its id (or by its token, where the id is empty)."""
        return await self._one("/Task/Kill", task_id, {} if task_id else {"socketaccesstoken": token})

    async def _one(self, path: str, task_id: str, body: Mapping[str, Value] | None = None) -> Task | None:
        answer = await self._call(path, body or {"taskid": task_id})
        with _Telling(answer):
            tasks = wire.read_tasks(_yes(answer), whole=False)
            found = next((task for task in tasks if not task_id or task.id == task_id), None)
            if tasks and found is None:
                raise ProtocolError(f"the service was asked for task {task_id} and answered with another")
            return found

    # --- tools and files ---

    async def tool_price(self, slugowner: str, slugproject: str) -> wire.ToolFacts:
        """What the service publishes about a tool's price (Tool/Detail)."""
        answer = await self._call("/Tool/Detail", {"slugowner": slugowner, "slugproject": slugproject})
        with _Telling(answer):
            return wire.read_tool(_yes(answer))

    async def upload(self, path: Path, name: str, size_bytes: int) -> str:
        """Put a local file of `size_bytes` at the service (File/Upload, field `file`); its address there.

        RequestRejected when the file cannot be read or is no longer of that size.
        """
        try:
            file = await anyio.to_thread.run_sync(path.open, "rb")
        except OSError as error:
            raise RequestRejected(f"{path} cannot be read: {error.strerror}") from error
        with file:
            if os.fstat(file.fileno()).st_size != size_bytes:
                raise RequestRejected(f"{path} has changed since it was checked")
            form = aiohttp.FormData()
            media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
            form.add_field("file", file, filename=wire.snippet(name), content_type=media_type)
            total_s = self._deadlines.call_s + size_bytes / SLOWEST_UPLOAD_BYTES_PER_S
            read_s = self._deadlines.call_s  # counts from the last byte sent
            answer = await self._post(self._calls, "/File/Upload", form, total_s=total_s, read_s=read_s)
        with _Telling(answer):
            return wire.read_upload(_yes(answer))

    @asynccontextmanager
    async def fetch(
        self,
        url: str,
        *,
        start: int = 0,
        etag: str | None = None,
        silence_s: float = math.inf,
        max_redirects: int = 5,
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
        response, begin = await self._open(address, asked, etag or "", silence_s, max_redirects)
        try:
            yield _download(response, begin)
        finally:
            response.close()  # given back to the pool already if all of it was read

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[TaskSocket]:
        """A new connection for the events of tasks."""
        async with AsyncExitStack() as stack:
            with Translated(URL(self._credentials.socket_url).host or ""):
                socket = await stack.enter_async_context(connected(self._calls, self._credentials.socket_url))
            yield socket

    def server_now(self) -> float | None:
        """The service's present time in unix seconds, by its last Date header; None when it is not known.

        That is before the first answer, and until the next one after our clock was set or the machine slept.
        """
        if self._seen is None:
            return None
        at, monotonic_at, wall_at = self._seen
        passed_s = time.monotonic() - monotonic_at
        return at + passed_s if abs(time.time() - wall_at - passed_s) < CLOCK_SLACK_S else None

    # --- one request ---

    async def _call(self, path: str, body: Mapping[str, Value]) -> _Answer:
        return await self._post(self._calls, path, body, total_s=self._deadlines.call_s)

    async def _post(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: Mapping[str, Value] | aiohttp.FormData,
        *,
        total_s: float,
        read_s: float | None = None,
    ) -> _Answer:
        headers = signing.headers(self._credentials.key, self._credentials.secret, self._fresh_nonce())
        data: bytes | aiohttp.FormData
        if isinstance(body, aiohttp.FormData):
            data = body
        else:
            headers["Content-Type"] = "application/json"
            data = _TO_JSON(body).encode("utf-8", "replace")
        timeout = _timeout(total_s, self._deadlines.connect_s, read_s)
        url = f"{self._credentials.base_url}/{path.lstrip('/')}"
        with self._translated:
            # Redirects are not followed: one that repeats a POST would repeat a purchase.
            async with session.post(
                url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                wait_s = self._note(response.headers)
                answer = await _whole(response.content)
        # Should it quote our keys: its words end up in messages and logs.
        return _Answer(response.status, self._concealed(answer), wait_s)

    async def _open(
        self, address: URL, asked: int, etag: str, silence_s: float, max_redirects: int
    ) -> tuple[aiohttp.ClientResponse, int]:
        """The first answer that brings bytes, and where in the file they begin."""
        redirects = 0
        while True:
            response = await self._get(address, asked, etag, silence_s)
            try:
                if response.status in _REDIRECTS:
                    redirects += 1
                    if redirects > max_redirects:
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
        timeout = _timeout(self._deadlines.fetch_s, self._deadlines.connect_s, silence_s)
        with Translated(address.host or ""):
            return await self._files.get(address, headers=headers, timeout=timeout, allow_redirects=False)

    def _fresh_nonce(self) -> int:
        """Unix time in microseconds, made to grow with every request."""
        self._nonce = max(self._nonce + 1, time.time_ns() // 1000)
        return self._nonce

    def _note(self, headers: Mapping[str, str]) -> float | None:
        """Remember the service's time; the wait it asks for."""
        at = wire.http_date(headers.get("Date", ""))
        if at is not None:
            self._seen = (at, time.monotonic(), time.time())
        asked = headers.get("Retry-After")
        return None if asked is None else wire.retry_after_s(asked, now=time.time() if at is None else at)


_TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@lru_cache(maxsize=64)
def _timeout(total_s: float, connect_s: float, read_s: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total_s, connect=connect_s, sock_read=read_s)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back for a POST."""

    status: int
    body: bytes
    retry_after_s: float | None


def _yes(answer: _Answer) -> dict[str, Any]:
    return wire.read_answer(answer.status, answer.body, retry_after_s=answer.retry_after_s)


class _Telling:
    """Lets an answer that is not understood show its beginning."""

    __slots__ = ("_answer",)

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ProtocolError):
            error.status = error.status or self._answer.status
            error.detail = error.detail or wire.snippet(self._answer.body)


async def _whole(content: aiohttp.StreamReader) -> bytes:
    """The whole body, up to a bound."""
    pieces: list[bytes] = []
    size = 0
    while piece := await content.readany():
        size += len(piece)
        if size > MAX_ANSWER_BYTES:
            raise ProtocolError(f"the service answered with more than {MAX_ANSWER_BYTES // 2**20} MiB")
        pieces.append(piece)
    return b"".join(pieces)


# --- sessions ---------------------------------------------------------------------------------------


def _session(keepalive_s: float = 15.0) -> aiohttp.ClientSession:
    # No limit: how much is under way at once is decided above, and a queue in here would only hide it.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=keepalive_s)
    return aiohttp.ClientSession(
        connector=connector, headers={"User-Agent": USER_AGENT}, cookie_jar=aiohttp.DummyCookieJar()
    )


def _file_session(*, is_local: bool) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, socket_factory=None if is_local else _public_socket),
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=FETCH_BUFFER_BYTES,
    )


class _NotPublic(OSError):
    """An address inside somebody's network, which no output of the service has a reason to name."""


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for an address about to be connected to, whichever name or redirect led there."""
    family, kind, protocol, _, peer = info
    if not is_public(str(peer[0])):
        raise _NotPublic(None, "the address is not a public one")
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


# --- files ------------------------------------------------------------------------------------------


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


# --- foreign errors ---------------------------------------------------------------------------------

#: What aiohttp and the system raise, most specific first: ours, and the words for it. NotSent stands only
#: where aiohttp raises the class before the first byte of a request can go out (read in its client.py and
#: connector.py).
FOREIGN: tuple[tuple[type[Exception], type[ServiceError], str], ...] = (
    (aiohttp.ClientConnectorDNSError, NotSent, "the name cannot be resolved"),
    (aiohttp.ClientConnectorCertificateError, NotSent, "its certificate is not valid"),
    (aiohttp.ClientSSLError, NotSent, "no secure connection"),
    (aiohttp.ClientConnectorError, NotSent, "no connection"),
    (aiohttp.ServerFingerprintMismatch, NotSent, "its certificate is not the expected one"),
    (aiohttp.ConnectionTimeoutError, NotSent, "no connection in time"),
    (aiohttp.RedirectClientError, ReplyLost, "it points to no usable address"),
    (aiohttp.InvalidURL, NotSent, "the address is not valid"),
    (aiohttp.NonHttpUrlClientError, NotSent, "the address is not http"),
    (aiohttp.ServerDisconnectedError, ReplyLost, "it closed the connection without an answer"),
    (aiohttp.ClientPayloadError, ReplyLost, "the answer broke off"),
    (aiohttp.ClientResponseError, ProtocolError, "the answer is not HTTP"),
    (HttpProcessingError, ProtocolError, "the answer is not HTTP"),
    (TimeoutError, ReplyLost, "no answer in time"),  # aiohttp's own time-outs are of this class too
    (aiohttp.ClientError, ReplyLost, "the connection broke"),
    (OSError, ReplyLost, "the connection broke"),
    (UnicodeDecodeError, ReplyLost, "the answer cannot be read"),
    (UnicodeError, NotSent, "the name cannot be resolved"),  # a label that IDNA does not take, met at look-up
    (RuntimeError, ReplyLost, "the connection broke"),  # uvloop reports some dead sockets with this class
)


class Translated:
    """Turns what aiohttp, TLS and sockets raise into our errors, the cause kept; cancellation just passes."""

    __slots__ = ("_host",)

    def __init__(self, host: str) -> None:
        self._host = host

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _FOREIGN_CLASSES):
            raise _ours(error, self._host) from error


_FOREIGN_CLASSES = tuple(foreign for foreign, _, _ in FOREIGN)


def _ours(error: Exception, host: str) -> ServiceError:
    if isinstance(error, aiohttp.ClientResponseError):
        _forget_headers(error)
    if isinstance(getattr(error, "os_error", None), _NotPublic):
        return ProtocolError(f"{host} is no public address: nothing is fetched from it")
    ours, words = next((ours, words) for foreign, ours, words in FOREIGN if isinstance(error, foreign))
    reason = wire.snippet(str(getattr(error, "strerror", None) or type(error).__name__))
    return ours(f"{host}: {words} ({reason})", detail=reason)


def _forget_headers(error: aiohttp.ClientResponseError) -> None:
    """Take the request's headers, keys among them, out of an error whose `repr` may come to be logged."""
    bare = error.request_info._replace(headers=CIMultiDictProxy(CIMultiDict()))
    error.request_info, error.args = bare, (bare, error.history)
