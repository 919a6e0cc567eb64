"""The simulator's world apart from HTTP: its tools, tasks, files, faults, counters and clock."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Literal

from batchrun.errors import UsageError
from batchrun.model import Tool
from batchrun.simulator.cdn import ETagKind, File, Upload, etag
from batchrun.simulator.faults import Plan
from batchrun.simulator.memory import Memory
from batchrun.simulator.studio import Studio
from batchrun.simulator.tasks import Ledger, SimTask, durations
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
    #: A file that carries tasks and uploads from one simulator to the next; None: all ends with this one.
    memory: Path | None = None


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
    memory: Memory | None = field(init=False, default=None)
    #: The wall time (unix seconds) at which the ledger's clock read 0.
    _epoch: float = field(init=False)
    #: How far the ledger's clock is ahead of the monotonic one.
    _ahead_s: float = field(init=False, default=0.0)
    _by_path: dict[str, Tool] = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self._epoch = time.time() - time.monotonic()
        self.clock_offset_s = options.clock_offset_s
        self._by_path = {tool.run_path.removeprefix("/Run/").lower(): tool for tool in self.tools}
        first_id = options.first_id if options.first_id is not None else int(time.time() * 1000)
        salt = hashlib.sha256(f"{options.seed}:{first_id}".encode()).hexdigest()
        self.plan = Plan(options.faults, seed=options.seed)
        seconds = self.durations(options.seconds)
        if options.memory is not None:
            # After all that may be refused, since it holds the file from now on.
            self.memory = Memory(options.memory, epoch=self._epoch, salt=salt, tool=self.tool)
            salt = self.memory.salt
            self._go_on(self.memory)
        self.ledger = Ledger(
            clock=self.clock,
            seconds=seconds,
            slots=options.slots,
            queue=options.queue,
            balance_usd=options.balance_usd,
            first_id=first_id,
            salt=salt,
        )
        self.views = Views(origin=lambda: self.origin, wall=self.wall, salt=salt)
        self.studio = Studio(real=options.images == "real")
        self.weather = Weather(
            stall=self._stall, wall=lambda: self.wall(self.clock()), retry_after_s=options.retry_after_s
        )
        if self.memory is not None:
            self._recall(self.memory)

    def close(self) -> None:
        """End the painters' threads and let go of the memory."""
        self.studio.close()
        if self.memory is not None:
            self.ledger.listeners.discard(self.memory.note)
            self.memory.close()
            self.memory = None

    # --- time ------------------------------------------------------------------------------------

    def clock(self) -> float:
        """The ledger's clock: the monotonic one, set so that it goes on from one simulator to the next."""
        return time.monotonic() + self._ahead_s

    def durations(self, seconds: float | str) -> Callable[[], float]:
        """How long tasks take, drawn from this world's seed; raises UsageError."""
        try:
            return durations(seconds, Random(f"{self.options.seed}:durations"))
        except ValueError as error:
            raise UsageError(
                f"seconds {seconds!r} is not understood ({error}): write N, MIN-MAX or lognormal:MEDIAN:P95"
            ) from error

    def wall(self, at: float) -> float:
        """The service's wall time (unix seconds) at an instant of the ledger's clock."""
        return self._epoch + at + self.clock_offset_s

    def tool(self, path: str) -> Tool | None:
        """The tool of "owner/name", in any case of letters; None when there is none."""
        return self._by_path.get(path.lower())

    # --- files -----------------------------------------------------------------------------------

    def keep(self, upload: Upload, content: bytes) -> None:
        """Hold an uploaded file under its address."""
        if self.memory is not None:
            self.memory.keep(upload, content)
        self._serve(upload, content)

    def url(self, upload: Upload) -> str:
        """The present address of an uploaded file."""
        return f"{self.origin}{upload.path}"

    async def measure(self, task: SimTask) -> None:
        """See to it that an ended task knows the sizes of its images."""
        if task.sizes_bytes is None and task.outputs:
            await self.studio.measure(task)
            if self.memory is not None and self.studio.real:
                self.memory.note_sizes(task)

    def _serve(self, upload: Upload, content: bytes) -> None:
        self.files[upload.path] = File(content, upload.media_type, etag(content, self.options.etag))
        self.uploads.append(upload)

    # --- what an earlier simulator left ----------------------------------------------------------

    def _go_on(self, memory: Memory) -> None:
        """Set the clock to where it would be, had it gone on all the while; never back."""
        now = time.time() - memory.epoch
        latest = max((task.changed_at for task in memory.tasks), default=-math.inf)
        self._epoch = memory.epoch
        self._ahead_s = max(now, latest) - time.monotonic()

    def _recall(self, memory: Memory) -> None:
        for upload, content in memory.uploads():
            self._serve(upload, content)
        for task in memory.tasks:
            if not self.studio.real:
                task.sizes_bytes = None  # of real images
            self.plan.note("task", task.fingerprint, struck=task.fault is not None)
        self.ledger.listeners.add(memory.note)
        self.ledger.restore(memory.tasks)
        for task in memory.tasks:
            if task.sizes_bytes is None and (task.outputs or task.ended_at is None):
                self.studio.begin(task)

    async def _stall(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), self.options.stall_s)
