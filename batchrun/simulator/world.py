"""The simulator's world apart from HTTP: its tools, tasks, files, faults, counters and clock."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from typing import Literal

from batchrun.errors import UsageError
from batchrun.model import Tool
from batchrun.simulator.cdn import ETagKind, File
from batchrun.simulator.faults import Plan
from batchrun.simulator.studio import Studio
from batchrun.simulator.tasks import Ledger, durations
from batchrun.simulator.views import Views
from batchrun.simulator.weather import Weather


@dataclass(frozen=True, slots=True)
class Options:
    """How a simulator is set up; every part of it can be left at its default."""

    #: Tasks that may be active at once; None: by the balance, as the service does.
    slots: int | None = None
    #: How long tasks take: a number, "MIN-MAX" or "lognormal:MEDIAN:P95", in seconds.
    seconds: float | str = 1.0
    images: Literal["tiny", "real"] = "tiny"
    #: Rules as `faults` reads them.
    faults: Sequence[str] = ()
    seed: int = 0
    balance_usd: Decimal = Decimal(1000)
    key: str = "simulator-key-5f2c9a7e1b"
    #: None: the project is one of key only, nothing is signed.
    secret: str | None = "simulator-secret-d04b8e63a1"  # noqa: S105 - opens nothing but this simulator
    #: On 127.0.0.1; 0: any free one.
    port: int = 0
    #: Beyond the slots tasks wait in task_queue instead of being refused with code 96.
    queue: bool = False
    #: How far the service's clock is ahead of ours.
    clock_offset_s: float = 0.0
    #: A pause before every answer of the API.
    latency_s: float = 0.0
    #: How long a stalled answer takes; longer than a client ought to wait for a submit (60 s).
    stall_s: float = 90.0
    retry_after_s: int = 1
    #: How old a task must be for Task/List to show it while list-late strikes.
    late_s: float = 5.0
    etag: ETagKind = "md5"
    #: The first task's id; None: from the clock, so that ids go on rising from one simulator to the next.
    first_id: int | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    """A file the simulator was given."""

    name: str
    media_type: str
    sha256: str
    size_bytes: int
    url: str


@dataclass(slots=True)
class World:
    """Everything the routes read and change; lives on one event loop."""

    options: Options
    tools: tuple[Tool, ...]
    ledger: Ledger = field(init=False)
    views: Views = field(init=False)
    studio: Studio = field(init=False)
    weather: Weather = field(init=False)
    plan: Plan = field(init=False)
    #: "http://127.0.0.1:PORT", known once the server listens.
    origin: str = ""
    clock_offset_s: float = 0.0
    #: Requests by endpoint: run, detail, list, cancel, kill, upload, tool, cdn, file, socket.
    requests: Counter[str] = field(default_factory=Counter)
    #: Refusals by code.
    refusals: Counter[int] = field(default_factory=Counter)
    uploads: list[Upload] = field(default_factory=list)
    #: Uploaded files by path below the base address.
    files: dict[str, File] = field(default_factory=dict)
    #: Set when the simulator ends: wakes all that stalls.
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    _epoch: float = field(init=False)
    _by_path: dict[str, Tool] = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self._epoch = time.time() - time.monotonic()
        self.clock_offset_s = options.clock_offset_s
        self._by_path = {tool.run_path.removeprefix("/Run/").lower(): tool for tool in self.tools}
        first_id = options.first_id if options.first_id is not None else int(time.time() * 1000)
        salt = hashlib.sha256(f"{options.seed}:{first_id}".encode()).hexdigest()
        self.plan = Plan(options.faults, seed=options.seed)
        self.ledger = Ledger(
            clock=time.monotonic,
            seconds=self.durations(options.seconds),
            slots=options.slots,
            queue=options.queue,
            balance_usd=options.balance_usd,
            first_id=first_id,
            salt=salt,
        )
        self.views = Views(origin=lambda: self.origin, wall=self.wall, salt=salt)
        self.studio = Studio(real=options.images == "real")
        self.weather = Weather(
            stall=self._stall, wall=lambda: self.wall(time.monotonic()), retry_after_s=options.retry_after_s
        )

    def durations(self, seconds: float | str) -> Callable[[], float]:
        """How long tasks take, drawn from this world's seed; raises UsageError."""
        try:
            return durations(seconds, Random(f"{self.options.seed}:durations"))
        except ValueError as error:
            raise UsageError(
                f"seconds {seconds!r} is not understood ({error}): write N, MIN-MAX or lognormal:MEDIAN:P95"
            ) from error

    def wall(self, at: float) -> float:
        """The service's wall time (unix seconds) at a monotonic instant."""
        return self._epoch + at + self.clock_offset_s

    def tool(self, path: str) -> Tool | None:
        """The tool of "owner/name", in any case of letters; None when there is none."""
        return self._by_path.get(path.lower())

    async def _stall(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), self.options.stall_s)
