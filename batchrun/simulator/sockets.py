"""Task events over a WebSocket: `{"type": "task_info", "tasktoken": ...}` in, one event at each status out.

A subscriber is sent the task's present status at once and each later one when it comes; several tokens share
a socket. Nobody ticks: the sender sleeps until the next instant at which a followed task's schedule (or the
end of a task it waits for) says something new, and is woken early when a schedule changes.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import anyio
from aiohttp import WSMsgType, web

from batchrun.simulator.envelope import Refusal, page
from batchrun.simulator.tasks import TERMINAL, SimTask
from batchrun.simulator.world import World

#: Slack after an instant, so that a wake-up is never a hair too early.
_SLACK_S = 0.001


class Sockets:
    """The WebSocket endpoint."""

    def __init__(self, world: World) -> None:
        self._world = world

    def routes(self) -> list[web.RouteDef]:
        """The endpoint's route."""
        return [web.get("/socket/v1", self._serve)]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        world.requests["socket"] += 1
        fault = world.plan.strike("socket")
        kind = fault.kind if fault is not None else ""
        if kind == "refused":
            return page(503, "Service Unavailable")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        subscriber = _Subscriber(world, socket, kind)
        world.ledger.listeners.add(subscriber.wake)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(subscriber.send_events, group.cancel_scope)
                group.start_soon(_until_closing, world, group.cancel_scope)
                await subscriber.read_orders()
                group.cancel_scope.cancel()
        finally:
            world.ledger.listeners.discard(subscriber.wake)
        await socket.close()
        return socket


async def _until_closing(world: World, scope: anyio.CancelScope) -> None:
    await world.closing.wait()
    scope.cancel()


class _Subscriber:
    def __init__(self, world: World, socket: web.WebSocketResponse, kind: str) -> None:
        self._world = world
        self._socket = socket
        self._kind = kind
        #: Followed tasks by token, each with the instant up to which its events were sent.
        self._followed: dict[str, tuple[SimTask, float]] = {}
        self._woken = anyio.Event()

    def wake(self) -> None:
        """A schedule has changed: look again."""
        self._woken.set()

    async def read_orders(self) -> None:
        """Take subscriptions until the client closes the socket."""
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            with contextlib.suppress(ValueError, Refusal, AttributeError):
                order = json.loads(message.data)
                token = str(order.get("tasktoken", ""))
                if order.get("type") == "task_info":
                    self._followed[token] = (self._world.ledger.find(token=token), -math.inf)
                    self.wake()

    async def send_events(self, scope: anyio.CancelScope) -> None:
        """Send what has happened, sleep until something more does."""
        ledger = self._world.ledger
        while True:
            self._woken = anyio.Event()
            ledger.advance()
            now = ledger.now
            for token, (task, sent) in list(self._followed.items()):
                for status in _due(task, sent, now):
                    await self._send(task, status)
                    if self._kind == "drop":
                        scope.cancel()
                        return
                if task.ended_at is not None and task.ended_at <= now:
                    del self._followed[token]
                else:
                    self._followed[token] = (task, now)
            with anyio.move_on_after(max(0.0, self._next_at(now) - now) + _SLACK_S):
                await self._woken.wait()

    async def _send(self, task: SimTask, status: str) -> None:
        if self._kind == "silent":
            return
        message: Any = ""
        if status == "task_output":
            message = {"type": "progressGenerate", "percentage": "50", "stepCurrent": "15", "stepTotal": "30"}
        elif status == "task_postprocess_end":
            await self._world.studio.measure(task)
            message = self._world.views.outputs(task)
        elif status.startswith("task_error"):
            message = "warning: retrying on another device"
        event = {"type": status, "id": str(task.id), "tasktoken": task.token, "message": message}
        await self._socket.send_json({**event, "result": True})

    def _next_at(self, now: float) -> float:
        """The next instant at which something may have to be sent; infinity when only a wake-up can tell."""
        instants = [at for task, _ in self._followed.values() for at, _ in task.stages() if at > now]
        if any(task.started_at is None for task, _ in self._followed.values()):
            instants.append(self._world.ledger.next_end() or math.inf)
        return min(instants, default=math.inf)


def _due(task: SimTask, sent: float, now: float) -> list[str]:
    """Statuses to tell of: those since `sent`; to a new subscriber the present one only."""
    due = [status for at, status in task.stages() if sent < at <= now]
    if sent == -math.inf:
        return due[-1:]
    terminal = [status for status in due if status in TERMINAL]
    return [*(status for status in due if status not in TERMINAL), *terminal]
