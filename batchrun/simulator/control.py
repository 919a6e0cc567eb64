"""What a test harness may see and change while a simulator runs elsewhere: no key, never a fault.

- `GET  /simulator/stats`: counters: tasks made, needless, active, balance, requests and faults by name ...
- `GET  /simulator/tasks`: every task ever made, oldest first, as plain facts.
- `POST /simulator/weather`: a JSON object of any of `slots` (null: by balance), `balance_usd`,
  `seconds`, `faults` (a list of rules), `clock_offset_s`, and `outage_s`: from now on connections are refused
  for so many seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from aiohttp import web

from batchrun.errors import UsageError
from batchrun.simulator.faults import Plan
from batchrun.simulator.tasks import SimTask
from batchrun.simulator.world import World


class Control:
    """The endpoints under /simulator."""

    def __init__(self, world: World, outage: Callable[[float], None]) -> None:
        self._world = world
        self._outage = outage

    def routes(self) -> list[web.RouteDef]:
        """All routes."""
        return [
            web.get("/simulator/stats", self._stats),
            web.get("/simulator/tasks", self._tasks),
            web.post("/simulator/weather", self._weather),
        ]

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response(stats(self._world))

    async def _tasks(self, _: web.Request) -> web.Response:
        self._world.ledger.advance()
        now = self._world.ledger.now
        return web.json_response([facts(task, now) for task in self._world.ledger.tasks])

    async def _weather(self, request: web.Request) -> web.Response:
        try:
            self._change(await request.json())
        except (ValueError, TypeError, AttributeError, InvalidOperation, UsageError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(stats(self._world))

    def _change(self, order: dict[str, Any]) -> None:
        world = self._world
        for name, value in order.items():
            match name:
                case "slots":
                    world.ledger.slots = None if value is None else int(value)
                case "balance_usd":
                    world.ledger.balance_usd = Decimal(str(value))
                case "seconds":
                    world.ledger.seconds = world.durations(value)
                case "faults":
                    world.plan = Plan(value, seed=world.options.seed)
                case "clock_offset_s":
                    world.clock_offset_s = float(value)
                case "outage_s":
                    self._outage(float(value))
                case _:
                    raise UsageError(f"there is no weather {name!r}")
        world.ledger.advance()


def stats(world: World) -> dict[str, Any]:
    """The simulator's counters; sums as decimal text.

    Tasks, money and uploads include what is remembered; requests, refusals and faults are since the start.
    """
    ledger = world.ledger
    ledger.advance()
    return {
        "tasks": len(ledger.tasks),
        "needless": sum(task.duplicates is not None for task in ledger.tasks),
        "succeeded": sum(task.succeeded for task in ledger.tasks),
        "active": ledger.active,
        "max_active": ledger.max_active,
        "images": sum(task.outputs for task in ledger.tasks),
        "slots": ledger.slots,
        "balance_usd": str(ledger.balance_usd),
        "billed_usd": str(ledger.billed_usd),
        "uploads": len(world.uploads),
        "requests": dict(world.requests),
        "refusals": {str(code): count for code, count in world.refusals.items()},
        "faults": world.plan.counts(),
    }


def facts(task: SimTask, now: float) -> dict[str, Any]:
    """One task for an audit; instants are seconds on one clock that never goes back, sums decimal text."""
    return {
        "id": str(task.id),
        "tool": task.tool.slug,
        "parameters": task.parameters,
        "status": task.status(now),
        "succeeded": task.succeeded,
        "outputs": task.outputs,
        "cost_usd": f"{task.cost_usd:.12f}",
        "fault": task.fault,
        "duplicates": None if task.duplicates is None else str(task.duplicates),
        "made_at": task.made_at,
        "started_at": task.started_at,
        "ended_at": task.ended_at,
        "noticed_at": task.noticed_at,
        "looks": task.looks,
        "fetched": sum(task.fetched.values()),
    }
