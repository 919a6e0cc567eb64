"""A connection for events tells what is understood of it, ends with us, and breaks as one of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from aiohttp import WSCloseCode, WSMsgType, web

from batchrun.errors import ReplyLost, ServiceError
from batchrun.settings import Credentials
from batchrun.wiro.client import Wiro
from batchrun.wiro.socket import MAX_EVENT_BYTES, TaskEvent

#: What a server does with one connection.
Serve = Callable[[web.WebSocketResponse], Awaitable[None]]
END = {"type": "task_end", "id": "7", "tasktoken": "t"}
TOLD = TaskEvent("t", "7", "task_end")


@asynccontextmanager
async def connecting(serve: Serve) -> AsyncIterator[Wiro]:
    """A client whose connections for events are served so."""

    async def answer(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await serve(socket)
        return socket

    app = web.Application()
    app.router.add_get("/v1", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        address = f"127.0.0.1:{port}/v1"
        async with Wiro(
            Credentials("key-3a7d", "secret-9c1e", f"http://{address}", f"ws://{address}")
        ) as wiro:
            yield wiro
    finally:
        await runner.cleanup()


async def heard(wiro: Wiro) -> list[TaskEvent]:
    with anyio.fail_after(30):
        async with wiro.socket() as socket:
            return [event async for event in socket.events()]


async def test_a_task_is_asked_for_by_its_token_and_what_is_no_event_is_left_out() -> None:
    asked: list[object] = []

    async def serve(socket: web.WebSocketResponse) -> None:
        asked.append(await socket.receive_json())
        await socket.send_bytes(json.dumps(END).encode())
        await socket.send_bytes(b"\xff\x00")
        await socket.send_str("welcome")
        await socket.send_json(END)

    async with connecting(serve) as wiro:
        with anyio.fail_after(30):
            async with wiro.socket() as socket:
                await socket.ask("t")
                assert [event async for event in socket.events()] == [TOLD]
    assert asked == [{"type": "task_info", "tasktoken": "t"}]


async def test_a_message_beyond_reason_ends_the_events_and_raises_nothing() -> None:
    async def serve(socket: web.WebSocketResponse) -> None:
        await socket.send_json(END)
        await socket.send_json({**END, "message": "x" * MAX_EVENT_BYTES})
        await socket.send_json(END)
        await socket.receive()

    async with connecting(serve) as wiro:
        assert await heard(wiro) == [TOLD]


async def test_a_connection_that_breaks_off_ends_its_events() -> None:
    async def serve(socket: web.WebSocketResponse) -> None:
        await socket.send_json(END)
        assert socket._req is not None
        assert socket._req.transport is not None
        socket._req.transport.abort()

    async with connecting(serve) as wiro:
        assert len(await heard(wiro)) <= 1  # a reset may overtake what was sent before it


async def test_a_server_is_told_when_nobody_listens_any_more() -> None:
    ended: asyncio.Future[WSCloseCode | None] = asyncio.get_running_loop().create_future()

    async def serve(socket: web.WebSocketResponse) -> None:
        message = await socket.receive()
        assert message.type is WSMsgType.CLOSE
        ended.set_result(message.data)

    async with connecting(serve) as wiro:
        with pytest.raises(ZeroDivisionError):
            async with wiro.socket():
                raise ZeroDivisionError
        with anyio.fail_after(30):  # while the client goes on
            assert await ended == WSCloseCode.OK


async def test_asking_on_a_connection_that_is_gone_is_an_error_of_ours() -> None:
    async def serve(socket: web.WebSocketResponse) -> None:
        await socket.close()

    async with connecting(serve) as wiro:
        with anyio.fail_after(30):
            async with wiro.socket() as socket:
                assert [event async for event in socket.events()] == []
                with pytest.raises(ReplyLost) as caught:
                    await socket.ask("secret-token")
        assert "secret-token" not in f"{caught.value!r} {caught.value}"


async def test_a_connection_that_is_refused_is_an_error_of_ours() -> None:
    async def serve(socket: web.WebSocketResponse) -> None:
        pass

    async with connecting(serve) as wiro:
        wiro._credentials = Credentials("k", "s", "http://127.0.0.1:9/v1", "ws://127.0.0.1:9/v1")
        with pytest.raises(ServiceError):
            await heard(wiro)
