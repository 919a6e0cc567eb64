"""A Run reaches the service once at most, and its outcome is never taken for more certain than it is."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import anyio
import pytest

from batchrun import __version__
from batchrun.errors import (
    CredentialsRefused,
    NotSent,
    ProtocolError,
    RateLimited,
    ReplyLost,
    RequestRejected,
    ServerFault,
    ServiceError,
)
from batchrun.model import Accepted
from batchrun.settings import Credentials
from batchrun.wiro import client, signing
from batchrun.wiro.client import Wiro
from batchrun.wiro.manners import Deadlines
from tests.client import raw
from tests.client.raw import KEY, SECRET, Handler, Raw, Request, answer, answering, sending, serving

RUN = "/Run/wiro/instant-id"
ACCEPTED: dict[str, object] = {"result": True, "errors": [], "taskid": "7", "socketaccesstoken": "tok"}
HASTY = Deadlines(connect_s=0.2, submit_s=0.4)
PAGE = b"<!DOCTYPE html><html><body>Just a moment...</body></html>"
PACKED = gzip.compress(b'{"x": "' + b"a" * (40 * 2**20), compresslevel=1)


@asynccontextmanager
async def asking(handle: Handler, deadlines: Deadlines = HASTY) -> AsyncIterator[tuple[Wiro, Raw]]:
    async with serving(handle) as server, Wiro(server.credentials, deadlines=deadlines) as wiro:
        yield wiro, server


async def endless(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 X\r\n\r\n")
    while True:
        writer.write(b" " * 2**20)
        await writer.drain()


@pytest.mark.parametrize(
    ("handle", "expected"),
    [
        pytest.param(raw.hang_up, ReplyLost, id="closed"),
        pytest.param(raw.reset, ReplyLost, id="reset"),
        pytest.param(raw.silence, ReplyLost, id="silence"),
        pytest.param(sending(answer(ACCEPTED)[:-5]), ReplyLost, id="half-an-answer"),
        pytest.param(sending(answer(ACCEPTED)[:20]), (ReplyLost, ProtocolError), id="half-a-header"),
        pytest.param(sending(b"garbage\r\n\r\n"), ProtocolError, id="garbage"),
        pytest.param(sending(b"\0" * 100_000), ProtocolError, id="zeros"),
        pytest.param(
            sending(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx"),
            (ReplyLost, ProtocolError),
            id="broken-chunks",
        ),
        pytest.param(
            sending(b"HTTP/1.1 200 X\r\n" + b"X-A: b\r\n" * 5000), ProtocolError, id="endless-headers"
        ),
        pytest.param(sending(answer(b"no gzip", Content_Encoding="gzip")), ReplyLost, id="not-gzip"),
        pytest.param(sending(answer(PACKED, Content_Encoding="gzip")), ProtocolError, id="zip-bomb"),
        pytest.param(answering(ACCEPTED, 307, Location="/v1/again"), Accepted, id="redirect-with-an-id"),
        pytest.param(answering(b"", 307, Location="/v1/again"), ProtocolError, id="redirect"),
        pytest.param(answering(b'{"result": true, "taskid"'), ProtocolError, id="broken-json"),
        pytest.param(answering({"result": True}), ProtocolError, id="no-id"),
        pytest.param(answering(b"oops", 500), ServerFault, id="500"),
        pytest.param(answering(PAGE, 524), ServerFault, id="524"),
        pytest.param(answering(PAGE), ServerFault, id="page-with-200"),
        pytest.param(answering(PAGE, 403), ServerFault, id="firewall"),
    ],
)
async def test_what_leaves_open_whether_there_is_a_task_is_never_called_certain(
    handle: Handler, expected: type[ServiceError]
) -> None:
    async with asking(handle) as (wiro, server):
        if expected is Accepted:
            assert await wiro.submit(RUN, {}) == Accepted("7", "tok")
        else:
            with pytest.raises(expected) as caught:
                await wiro.submit(RUN, {})
            assert not isinstance(caught.value, NotSent)
            assert getattr(caught.value, "acted", True)
        assert len(server.requests) == 1


async def test_an_endless_answer_is_given_up() -> None:
    async with asking(endless, Deadlines()) as (wiro, server):
        with pytest.raises(ProtocolError, match="more than 32 MiB"):
            await wiro.submit(RUN, {})
        assert len(server.requests) == 1


async def test_a_dripping_answer_is_cut_by_the_total_deadline() -> None:
    async def drip(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with asking(drip) as (wiro, _):
        with pytest.raises(ReplyLost, match="in time"):
            await wiro.submit(RUN, {})


@pytest.mark.parametrize(
    ("handle", "expected"),
    [
        (
            answering(
                {"result": False, "errors": [{"code": 0, "message": "Request parameter [x] required"}]}
            ),
            RequestRejected,
        ),
        (answering(b"slow down", 429, Retry_After="3"), RateLimited),
        (answering(PAGE, 401), CredentialsRefused),
    ],
)
async def test_certain_refusals(handle: Handler, expected: type[ServiceError]) -> None:
    async with asking(handle) as (wiro, _):
        with pytest.raises(expected):
            await wiro.submit(RUN, {})


async def test_retry_after_as_a_date_counts_by_the_services_own_clock() -> None:
    """Ours may be hours off; the Date beside it is not."""
    handle = answering(
        b"", 429, Retry_After="Wed, 21 Oct 2015 07:28:30 GMT", Date="Wed, 21 Oct 2015 07:28:00 GMT"
    )
    async with asking(handle) as (wiro, _):
        with pytest.raises(RateLimited) as caught:
            await wiro.submit(RUN, {})
    assert caught.value.retry_after_s == 30.0


# --- not sent ---


async def failing(credentials: Credentials) -> ServiceError:
    async with Wiro(credentials, deadlines=HASTY) as wiro:
        with pytest.raises(ServiceError) as caught:
            await wiro.submit(RUN, {})
    return caught.value


async def test_a_refused_connection_is_not_sent() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    error = await failing(Credentials(KEY, SECRET, f"http://127.0.0.1:{port}/v1"))
    assert type(error) is NotSent
    assert isinstance(error.__cause__, OSError)
    assert "127.0.0.1" in str(error)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid", "127.1"])
async def test_a_name_that_cannot_be_resolved_is_not_sent(host: str) -> None:
    assert type(await failing(Credentials(KEY, SECRET, f"https://{host}/v1"))) is NotSent


async def test_a_failed_tls_handshake_is_not_sent() -> None:
    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 this is plain http\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(no_tls, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await failing(Credentials(KEY, None, f"https://127.0.0.1:{port}/v1"))
    assert type(error) is NotSent
    assert "secure" in str(error)


async def test_a_handshake_that_never_ends_is_not_sent() -> None:
    async with serving(raw.silence) as server:
        error = await failing(Credentials(KEY, None, f"https://127.0.0.1:{server.port}/v1"))
        assert type(error) is NotSent
        assert server.requests == []


# --- once at most ---


async def test_a_submit_on_a_connection_that_dies_is_never_sent_again() -> None:
    """The first answer keeps the connection, the second request on it is read and then the line goes dead."""
    seen = 0

    async def second_dies(_: Request, writer: asyncio.StreamWriter) -> bool:
        nonlocal seen
        seen += 1
        if seen % 2:
            writer.write(answer(ACCEPTED))
        return seen % 2 == 1

    async with asking(second_dies) as (wiro, server):
        for _ in range(5):
            await wiro.submit(RUN, {})
            with pytest.raises(ReplyLost):
                await wiro.submit(RUN, {})
        assert len(server.requests) == 10


async def test_a_server_that_closes_idle_connections_gets_each_submit_once() -> None:
    """It closes right after each answer, without a word: a submit either finds that out or is lost, once."""
    async with asking(sending(answer(ACCEPTED))) as (wiro, server):
        accepted = 0
        for _ in range(20):
            with suppress(ReplyLost):
                await wiro.submit(RUN, {})
                accepted += 1
        assert len(server.requests) == accepted > 0


async def test_a_burst_of_submits_shares_a_connection_and_an_idle_one_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "SUBMIT_KEEPALIVE_S", 0.2)
    async with asking(answering(ACCEPTED)) as (wiro, server):
        for _ in range(3):
            await wiro.submit(RUN, {})
        assert server.connections == 1
        await server.closed.wait()  # we hang up first
        await wiro.submit(RUN, {})
        assert server.connections == 2


async def test_cancelling_a_submit_passes_through_and_closes_its_connection() -> None:
    async with asking(raw.silence, Deadlines()) as (wiro, server):
        async with anyio.create_task_group() as group:
            group.start_soon(wiro.submit, RUN, {})
            await server.reached.wait()
            group.cancel_scope.cancel()
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await wiro.submit(RUN, {})
        assert len(server.requests) == 2


# --- what is sent ---


async def test_a_request_says_who_we_are_and_is_signed_afresh() -> None:
    async with asking(answering(ACCEPTED)) as (wiro, server):
        for _ in range(3):
            await wiro.submit(RUN, {})
    nonces = [int(request.headers["x-nonce"]) for request in server.requests]
    assert nonces == sorted(set(nonces))
    for request, nonce in zip(server.requests, nonces):
        assert request.headers["user-agent"] == f"batchrun/{__version__}"
        assert request.headers["content-type"] == "application/json"
        assert signing.headers(KEY, SECRET, nonce).items() <= request.headers.items()
        assert SECRET not in str(request)


async def test_a_key_only_project_is_not_signed() -> None:
    async with (
        serving(answering(ACCEPTED)) as server,
        Wiro(replace(server.credentials, secret=None)) as wiro,
    ):
        await wiro.submit(RUN, {})
    [request] = server.requests
    assert request.headers["x-api-key"] == KEY
    assert "x-nonce" not in request.headers
    assert "x-signature" not in request.headers


async def test_a_body_travels_compact_and_in_utf_8() -> None:
    body = {"prompt": "Zürich, 東京 \u2028", "steps": 20, "lora": ["a", "b"]}
    async with asking(answering(ACCEPTED)) as (wiro, server):
        await wiro.submit(RUN, body)
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/v1/Run/wiro/instant-id")
    assert json.loads(request.body) == body
    assert "東京".encode() in request.body
    assert b'"steps":20,' in request.body


async def test_cookies_are_neither_kept_nor_sent() -> None:
    async with asking(answering(ACCEPTED, Set_Cookie="a=b; Path=/")) as (wiro, server):
        await wiro.submit(RUN, {})
        await wiro.submit(RUN, {})
    assert all("cookie" not in request.headers for request in server.requests)


# --- secrets ---


def whole_story(error: BaseException) -> str:
    """Everything an error could show: its text, detail, repr, traceback and those of its causes."""
    told = traceback.format_exception(error)
    cause: BaseException | None = error
    while cause is not None:
        told += [repr(cause), str(cause), str(vars(cause))]
        cause = cause.__cause__ or cause.__context__
    return "\n".join(told)


@pytest.mark.parametrize(
    "handle",
    [
        answering({"result": False, "errors": [{"code": 98, "message": f"key {KEY} with {SECRET} is bad"}]}),
        answering(f"{KEY} {SECRET}".encode(), 401),
        answering(f"<html>{KEY} {SECRET}".encode(), 502),
        answering(f'{{"broken": "{KEY} {SECRET}'.encode()),
        sending(f"garbage {KEY}\r\n\r\n".encode()[:7] + b"\r\n\r\n"),
        raw.hang_up,
        raw.silence,
    ],
)
async def test_keys_show_in_no_error_and_in_none_of_its_causes(handle: Handler) -> None:
    async with asking(handle) as (wiro, _):
        assert KEY not in repr(wiro)
        with pytest.raises(ServiceError) as caught:
            await wiro.submit(RUN, {})
    assert KEY not in whole_story(caught.value)
    assert SECRET not in whole_story(caught.value)
