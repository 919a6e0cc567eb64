"""The service over HTTP: a method per thing it can be asked for.

Nothing is repeated in here: whether a failed call may be made again is the caller's decision, for Run costs
money. aiohttp itself resends only methods it calls idempotent, on a reused connection that turned out dead;
never a POST, and every call of the API is one.

Three sessions with three duties. Submits go out on connections that have been idle for 2 s at most, since a
connection that the other side has just given up is how an answer gets lost. All other calls share a second
pool. Files come through a third (`wiro.files`), which knows no keys.
"""

from __future__ import annotations

import json
import math
import mimetypes
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio.to_thread
from yarl import URL

from batchrun.errors import ProtocolError, RequestRejected
from batchrun.model import Accepted, Task, Value
from batchrun.settings import Credentials
from batchrun.wiro import signing, wire
from batchrun.wiro.files import Download, Files
from batchrun.wiro.foreign import Translated
from batchrun.wiro.manners import DEADLINES, USER_AGENT, Deadlines, timeout
from batchrun.wiro.socket import TaskSocket, connected

#: Servers keep idle connections for 5 s (Node.js) and longer; a submit stays well below.
SUBMIT_KEEPALIVE_S = 2.0
#: 100 tasks of Task/List take about 200 KB; a JSON answer beyond this is damage.
MAX_ANSWER_BYTES = 32 * 2**20
#: Slowest upload that is waited for; 100 MB then take half an hour at most.
SLOWEST_UPLOAD_BYTES_PER_S = 64 * 1024
#: Wall and monotonic time that drift apart by more than this were torn apart by a set clock or by sleep.
CLOCK_SLACK_S = 1.0
#: What Task/List gives at most.
MAX_LISTED = 100


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
            self._files = await stack.enter_async_context(
                Files(self._deadlines, is_local=self._credentials.is_local)
            )
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

    def fetch(
        self, url: str, *, start: int = 0, etag: str | None = None, silence_s: float = math.inf
    ) -> AbstractAsyncContextManager[Download]:
        """A file from its public address: see `wiro.files.Files.fetch`."""
        return self._files.fetch(url, start=start, etag=etag, silence_s=silence_s)

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
        waits = timeout(total_s, self._deadlines.connect_s, read_s)
        url = f"{self._credentials.base_url}/{path.lstrip('/')}"
        with self._translated:
            # Redirects are not followed: one that repeats a POST would repeat a purchase.
            async with session.post(
                url, data=data, headers=headers, timeout=waits, allow_redirects=False
            ) as response:
                wait_s = self._note(response.headers)
                answer = await _whole(response.content)
        # Should it quote our keys: its words end up in messages and logs.
        return _Answer(response.status, self._concealed(answer), wait_s)

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
