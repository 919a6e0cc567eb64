"""A WebSocket tells of each status of the tasks it was asked to follow."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from batchrun.simulator.tasks import STAGES
from tests.simulator.wire import FOREVER_S, LORA, Caller, simulated


async def a_token(wire: Caller, **body: Any) -> str:
    return (await wire.call(LORA.run_path, **{"prompt": "a cat", **body}))["socketaccesstoken"]


async def events(
    socket: aiohttp.ClientWebSocketResponse, *, until: str, tokens: int = 1
) -> list[dict[str, Any]]:
    """All events up to the one of that type of the last token."""
    got = []
    while sum(event["type"] == until for event in got) < tokens:
        got.append(await socket.receive_json())
    return got


async def test_every_status_is_told_and_the_last_carries_the_outputs() -> None:
    async with simulated(seconds=1) as wire, wire.session.ws_connect(wire.sim.socket_url) as socket:
        token = await a_token(wire, samples=2)
        await socket.send_json({"type": "task_info", "tasktoken": token})
        got = await events(socket, until="task_postprocess_end")
        told = [event["type"] for event in got]
        order = [status for _, status in STAGES]
        assert told == order[order.index(told[0]) :]
        assert {event["tasktoken"] for event in got} == {token}
        assert len(got[-1]["message"]) == 2
        (output,) = [event for event in got if event["type"] == "task_output"]
        assert output["message"]["percentage"] == "50"


async def test_a_finished_task_is_told_of_at_once() -> None:
    async with simulated() as wire, wire.session.ws_connect(wire.sim.socket_url) as socket:
        await socket.send_json({"type": "task_info", "tasktoken": await a_token(wire)})
        assert (await socket.receive_json())["type"] == "task_postprocess_end"


async def test_several_tokens_share_a_socket_and_nonsense_is_ignored() -> None:
    async with simulated(seconds=0.05) as wire, wire.session.ws_connect(wire.sim.socket_url) as socket:
        await socket.send_str("{")
        await socket.send_str("[]")
        await socket.send_json({"type": "task_info", "tasktoken": "nobody's"})
        tokens = {await a_token(wire, seed="1"), await a_token(wire, seed="2")}
        for token in tokens:
            await socket.send_json({"type": "task_info", "tasktoken": token})
        got = await events(socket, until="task_postprocess_end", tokens=2)
        assert {event["tasktoken"] for event in got} == tokens


async def test_a_cancel_and_a_start_out_of_the_queue_are_told_at_once() -> None:
    async with simulated(seconds=FOREVER_S, slots=1, queue=True) as wire:
        running, waiting = await a_token(wire, seed="1"), await a_token(wire, seed="2")
        async with wire.session.ws_connect(wire.sim.socket_url) as socket:
            for token in (running, waiting):
                await socket.send_json({"type": "task_info", "tasktoken": token})
                assert (await socket.receive_json())["type"] == "task_queue"
            wire.sim.set_seconds(0)
            await wire.call("/Task/Cancel", tasktoken=running)
            event = await socket.receive_json()
            assert (event["type"], event["tasktoken"]) == ("task_cancel", running)
            assert wire.sim.tasks[1].started_at is not None


async def test_a_socket_may_be_refused_dropped_or_silent() -> None:
    async with simulated("socket-refused@1", "socket-drop@2", "socket-silent@3", seconds=0.05) as wire:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await wire.session.ws_connect(wire.sim.socket_url)
        async with wire.session.ws_connect(wire.sim.socket_url) as socket:
            await socket.send_json({"type": "task_info", "tasktoken": await a_token(wire)})
            assert (await socket.receive()).type is aiohttp.WSMsgType.TEXT
            assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        async with wire.session.ws_connect(wire.sim.socket_url) as socket:
            await socket.send_json({"type": "task_info", "tasktoken": await a_token(wire)})
            with pytest.raises(TimeoutError):
                await socket.receive(timeout=0.2)


async def test_a_simulator_ends_though_sockets_are_open() -> None:
    async with aiohttp.ClientSession() as session:
        async with simulated(seconds=FOREVER_S) as wire:
            socket = await session.ws_connect(wire.sim.socket_url)
            await socket.send_json({"type": "task_info", "tasktoken": await a_token(wire)})
            await socket.receive_json()
        assert (await socket.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        await socket.close()
