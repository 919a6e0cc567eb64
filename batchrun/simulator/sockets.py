"""Task events over a WebSocket: `{"type": "task_info", "tasktoken": ...}` in, one event at each status out.

A subscriber is sent the task's present status at once and each later one when it comes; several tokens share
a socket. Nobody ticks: the sender sleeps until the next instant at which a followed task's schedule (or the
end of a task it waits for) says something new, and is woken early when a schedule changes.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
from typing import Any

import anyio
from aiohttp import WSMsgType, web

from batchrun.simulator.envelope import Refusal, page
from batchrun.simulator.tasks import SimTask
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
        world.ledger.listeners.add(subscriber.look_again)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(subscriber.send_events, group.cancel_scope)
                group.start_soon(_until_closing, world, group.cancel_scope)
                await subscriber.read_orders()
                group.cancel_scope.cancel()
        finally:
            world.ledger.listeners.discard(subscriber.look_again)
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
        #: Followed tasks by token, each with the number of stages told; a schedule only grows beyond those.
        self._told: dict[str, int] = {}
        #: When to look at which task again: (instant, tie-breaker, task), the next one first.
        self._agenda: list[tuple[float, int, SimTask]] = []
        self._numbers = itertools.count()
        self._woken = anyio.Event()

    def look_again(self, task: SimTask) -> None:
        """The schedule of a task has changed, or it has just come to be followed."""
        if task.token in self._told:
            self._plan(self._world.ledger.now, task)
            self._woken.set()

    async def read_orders(self) -> None:
        """Take subscriptions until the client closes the socket."""
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                continue
            with contextlib.suppress(ValueError, Refusal, AttributeError):
                order = json.loads(message.data)
                if order.get("type") == "task_info":
                    task = self._world.ledger.find(token=str(order.get("tasktoken", "")))
                    now = self._world.ledger.now
                    # A new subscriber is told the present status, not those before it.
                    self._told[task.token] = sum(at <= now for at, _ in task.stages()) - 1
                    self.look_again(task)

    async def send_events(self, scope: anyio.CancelScope) -> None:
        """Send what has happened, sleep until something more does; end with the client's connection."""
        ledger = self._world.ledger
        with contextlib.suppress(ConnectionError):
            while True:
                self._woken = anyio.Event()
                ledger.advance()
                while self._agenda and self._agenda[0][0] <= ledger.now:
                    _, _, task = heapq.heappop(self._agenda)
                    if await self._tell(task, ledger.now) and self._kind == "drop":
                        scope.cancel()
                        return
                with anyio.move_on_after(self._pause_s()):
                    await self._woken.wait()
        scope.cancel()

    async def _tell(self, task: SimTask, now: float) -> bool:
        """Send the statuses that are due, plan the next look; whether any was."""
        stages = task.stages()
        told = self._told[task.token]
        due = [status for at, status in stages[told:] if at <= now]
        if self._kind == "drop":
            due = due[:1]  # it is closed after its first event, however many are due
        self._told[task.token] = told + len(due)
        if self._told[task.token] < len(stages):
            self._plan(stages[self._told[task.token]][0], task)
        for status in due:
            await self._send(task, status)
        return bool(due)

    def _plan(self, at: float, task: SimTask) -> None:
        heapq.heappush(self._agenda, (at, next(self._numbers), task))

    def _pause_s(self) -> float:
        """Seconds until there may be something to tell; infinity when only a wake-up can say."""
        instants = [self._agenda[0][0]] if self._agenda else []
        # The end of a task may start one that waits, which then wakes us.
        if (end := self._world.ledger.next_end()) is not None and self._world.ledger.has_waiting:
            instants.append(end)
        return max(0.0, min(instants, default=math.inf) - self._world.ledger.now) + _SLACK_S

    async def _send(self, task: SimTask, status: str) -> None:
        if self._kind == "silent":
            return
        message: Any = ""
        if status == "task_output":
            message = {"type": "progressGenerate", "percentage": "50", "stepCurrent": "15", "stepTotal": "30"}
        elif status == "task_postprocess_end":
            await self._world.measure(task)
            message = self._world.views.outputs(task)
        elif status.startswith("task_error"):
            message = "warning: retrying on another device"
        event = {"type": status, "id": str(task.id), "tasktoken": task.token, "message": message}
        await self._socket.send_json({**event, "result": True})
