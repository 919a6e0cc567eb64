"""Wiro on loopback: `async with Simulator(...) as sim`.

One aiohttp server on 127.0.0.1 serves the API (`/v1`), the WebSocket (`/socket/v1`), the CDN (`/cdn`) and,
for test harnesses, `/simulator` (see `control`). Everything that takes time is a schedule read against the
clock, so there is nothing to tick and nothing to clean up but the listener, the painters' threads and, where
`Options.memory` names one, the file that outlives them all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from batchrun.model import Tool
from batchrun.simulator.api import MAX_UPLOAD_BYTES, Api
from batchrun.simulator.cdn import Upload
from batchrun.simulator.control import Control, stats
from batchrun.simulator.faults import Plan
from batchrun.simulator.sockets import Sockets
from batchrun.simulator.tasks import SimTask
from batchrun.simulator.world import Options, World

#: Time for an order's own answer to leave before an outage cuts the connection.
_BEFORE_OUTAGE_S = 0.05


class Simulator:
    """The service as an async context manager; arguments are those of `world.Options`, and `tools`."""

    def __init__(
        self, options: Options | None = None, *, tools: Sequence[Tool] | None = None, **kwargs: Any
    ) -> None:
        """Set up with `options`, or with its fields as keywords; `tools` default to the catalog's.

        Raises UsageError where faults or seconds are not understood or the memory cannot be used.
        """
        if options is None:
            options = Options(**kwargs)
        elif kwargs:
            raise TypeError("give options or keywords, not both")
        self._world = World(options, tuple(_catalog() if tools is None else tools))
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._outages: set[asyncio.Task[None]] = set()
        self._port = options.port

    # --- where and how to reach it ---------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """What WIRO_API_BASE_URL is to be: "http://127.0.0.1:PORT/v1"."""
        return f"{self._world.origin}/v1"

    @property
    def socket_url(self) -> str:
        """What WIRO_SOCKET_URL is to be: "ws://127.0.0.1:PORT/socket/v1"."""
        return f"ws{self._world.origin.removeprefix('http')}/socket/v1"

    @property
    def control_url(self) -> str:
        """Where `stats`, `tasks` and `weather` are served: "http://127.0.0.1:PORT/simulator"."""
        return f"{self._world.origin}/simulator"

    @property
    def key(self) -> str:
        """The project's API key."""
        return self._world.options.key

    @property
    def secret(self) -> str | None:
        """The project's secret; None when it is one of key only."""
        return self._world.options.secret

    # --- what has happened -----------------------------------------------------------------------

    @property
    def tasks(self) -> Sequence[SimTask]:
        """Every task made, oldest first, as it stands now; `duplicates` tells those that were not needed."""
        self._world.ledger.advance()
        return self._world.ledger.tasks

    @property
    def needless(self) -> Sequence[SimTask]:
        """Tasks made while another of the very same request lived or had succeeded."""
        return [task for task in self.tasks if task.duplicates is not None]

    @property
    def active(self) -> int:
        """Tasks that are not over."""
        self._world.ledger.advance()
        return self._world.ledger.active

    @property
    def max_active(self) -> int:
        """Most tasks that ever ran at once."""
        return self._world.ledger.max_active

    @property
    def billed_usd(self) -> Decimal:
        """The sum of all that was charged."""
        self._world.ledger.advance()
        return self._world.ledger.billed_usd

    @property
    def requests(self) -> Counter[str]:
        """Requests by endpoint: run, detail, list, cancel, kill, upload, tool, cdn, file, socket."""
        return self._world.requests

    @property
    def refusals(self) -> Counter[int]:
        """Refusals by code (96, 97, ...)."""
        return self._world.refusals

    @property
    def uploads(self) -> Sequence[Upload]:
        """Files uploaded, oldest first, those of forms included."""
        return self._world.uploads

    @property
    def struck(self) -> dict[str, int]:
        """How often each fault of the present plan has struck."""
        return self._world.plan.counts()

    def stats(self) -> dict[str, Any]:
        """The counters as `/simulator/stats` gives them."""
        return stats(self._world)

    # --- the weather: to be changed at any time --------------------------------------------------

    @property
    def slots(self) -> int | None:
        """Tasks that may be active at once; None: by the balance."""
        return self._world.ledger.slots

    @slots.setter
    def slots(self, slots: int | None) -> None:
        self._world.ledger.slots = slots

    @property
    def balance_usd(self) -> Decimal:
        """The account's balance."""
        self._world.ledger.advance()
        return self._world.ledger.balance_usd

    @balance_usd.setter
    def balance_usd(self, balance_usd: Decimal) -> None:
        self._world.ledger.advance()
        self._world.ledger.balance_usd = balance_usd

    @property
    def faults(self) -> Sequence[str]:
        """The rules in force; setting them starts all counts anew."""
        return self._world.plan.texts

    @faults.setter
    def faults(self, rules: Iterable[str]) -> None:
        self._world.plan = Plan(rules, seed=self._world.options.seed)

    def set_seconds(self, seconds: float | str) -> None:
        """How long tasks made from now on take; see `Options.seconds`."""
        self._world.ledger.seconds = self._world.durations(seconds)

    async def go_dark(self) -> None:
        """Refuse connections and cut those there are, until `come_back`; tasks go on."""
        assert self._runner is not None
        if self._site is not None:
            site, self._site = self._site, None
            await site.stop()
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            connection.force_close()

    async def come_back(self) -> None:
        """Listen again, at the same address."""
        assert self._runner is not None
        if self._site is None:
            self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
            await self._site.start()

    # --- life ------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=MAX_UPLOAD_BYTES + 1024 * 1024)
        app.add_routes(Api(self._world).routes())
        app.add_routes(Sockets(self._world).routes())
        app.add_routes(Control(self._world, self._begin_outage).routes())
        app.on_response_prepare.append(self._date)
        # A client that goes away ends its handler: a stalled answer must not outlive it.
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=0.5, handler_cancellation=True
        )
        try:
            await self._runner.setup()
            await self.come_back()
        except BaseException:
            await self.__aexit__(None, None, None)  # nobody else will
            raise
        self._port = self._runner.addresses[0][1]
        self._world.origin = f"http://127.0.0.1:{self._port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._world.closing.set()
        for outage in self._outages:
            outage.cancel()
        await asyncio.gather(*self._outages, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        self._world.close()

    async def _date(self, _: web.Request, response: web.StreamResponse) -> None:
        # aiohttp would send our machine's time; the service's clock may be off.
        response.headers["Date"] = formatdate(self._world.weather.wall(), usegmt=True)

    def _begin_outage(self, seconds: float) -> None:
        # A bare task, not a group: a group must be left by the task that entered it, and an async fixture is
        # left by another.
        outage = asyncio.create_task(self._be_dark(seconds))
        self._outages.add(outage)
        outage.add_done_callback(self._outages.discard)

    async def _be_dark(self, seconds: float) -> None:
        await asyncio.sleep(_BEFORE_OUTAGE_S)
        await self.go_dark()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._world.closing.wait(), seconds)
        if not self._world.closing.is_set():
            await self.come_back()


def _catalog() -> Sequence[Tool]:
    from batchrun.tools import catalog

    return catalog.load().tools
