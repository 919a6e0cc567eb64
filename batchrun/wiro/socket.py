"""The service's events over a WebSocket: tokens go in, what happens to their tasks comes out.

`{"type": "task_info", "tasktoken": ...}` asks for a task's events; each event is an object with `type` (the
task's status), `id` and `tasktoken` (wiro-api.md, Tracking). What is said is only ever taken as a hint.
Tokens are keys to tasks: no message or error quotes one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from batchrun.errors import ReplyLost

#: A connection that answers no ping for twice this long is dead.
HEARTBEAT_S = 20.0
#: An event is small; outputs of a task may be listed in it.
MAX_EVENT_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """Something happened to a task; what the event does not tell is empty."""

    token: str = field(repr=False)
    task_id: str
    status: str


class TaskSocket:
    """One connection; see `connected`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def ask(self, token: str) -> None:
        """Ask for the events of a task; raises ReplyLost on a connection that is gone."""
        try:
            await self._socket.send_str(json.dumps({"type": "task_info", "tasktoken": token}))
        except (ConnectionError, aiohttp.ClientError, RuntimeError) as error:
            raise ReplyLost("the connection for events broke") from error

    async def events(self) -> AsyncIterator[TaskEvent]:
        """What is said until the connection ends, however it ends; what is not understood is left out."""
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.TEXT and (event := read_event(message.data)) is not None:
                yield event


def read_event(text: str) -> TaskEvent | None:
    """The event that a message tells; None when it tells none."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    token, status, number = said.get("tasktoken"), said.get("type"), said.get("id")
    if not isinstance(status, str) or not status.startswith("task_"):
        return None
    return TaskEvent(
        token if isinstance(token, str) else "",
        str(number) if isinstance(number, str | int) and not isinstance(number, bool) else "",
        status,
    )


@asynccontextmanager
async def connected(session: aiohttp.ClientSession, url: str) -> AsyncIterator[TaskSocket]:
    """A connection for events; raises what `wiro.foreign.Translated` knows."""
    socket = await session.ws_connect(
        url,
        heartbeat=HEARTBEAT_S,
        max_msg_size=MAX_EVENT_BYTES,
        timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
    )
    try:
        yield TaskSocket(socket)
    finally:
        await socket.close()
