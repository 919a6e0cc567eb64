"""Tasks at the service: their lives, the slots they hold, and the account they are billed to.

A task's life is a schedule, worked out when it starts; what status it shows is a pure function of the clock
and that schedule, so nothing here sleeps or ticks. `Ledger.advance` catches up with what has happened since
it was last asked: it takes the ends of tasks in their order, bills each at its end, and gives a freed slot to
the task that waits longest. Instants are monotonic seconds; the server turns them into its wall time.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from typing import Any

from batchrun.model import Tool
from batchrun.simulator.envelope import BALANCE_EXHAUSTED, LIMIT_REACHED, NOT_FOUND, VALIDATION, Refusal
from batchrun.simulator.prices import bill

#: Where each status begins, as a part of the task's duration.
STAGES = (
    (0.00, "task_queue"),
    (0.02, "task_accept"),
    (0.04, "task_preprocess_start"),
    (0.06, "task_preprocess_end"),
    (0.08, "task_assign"),
    (0.10, "task_start"),
    (0.15, "task_output"),
    (0.90, "task_output_full"),
    (0.92, "task_end"),
    (0.94, "task_postprocess_start"),
    (1.00, "task_postprocess_end"),
)
#: A task is Cancel's until it is assigned, then Kill's.
ASSIGNED_AT = 0.08
#: Faults after which a task is not charged and has no outputs.
FAILING = frozenset({"task-fails", "task-cancelled", "task-error-end"})
#: The balance rule (wiro-api.md): above this many USD there is no limit ...
UNLIMITED_ABOVE_USD = Decimal(250)
#: ... a tenth of the balance otherwise; and a new task needs so much.
LEAST_BALANCE_USD = Decimal("0.50")

Stages = tuple[tuple[float, str], ...]


@dataclass(slots=True, eq=False)
class SimTask:
    """One task ever made; read by tests, changed by the ledger only."""

    id: int
    token: str
    tool: Tool
    #: As echoed: numbers as text.
    parameters: dict[str, Any]
    #: Equal for equal requests: tool and parameters.
    fingerprint: str
    #: Images it makes if all goes well, each of so many pixels.
    images: int
    width_px: int
    height_px: int
    duration_s: float
    fault: str | None
    made_at: float
    callback_url: str = ""
    #: The task of the same request that lived or had succeeded when this one was made, which was not needed.
    duplicates: int | None = None
    #: None while it waits for a slot.
    started_at: float | None = None
    #: None until terminal.
    ended_at: float | None = None
    #: When the client cancelled or killed it.
    stopped_at: float | None = None
    cost_usd: Decimal = Decimal(0)
    #: The files were deleted at the service.
    gone: bool = False
    #: How often an answer showed it terminal; and when one did so first.
    looks: int = 0
    noticed_at: float | None = None
    #: Counts of complete files sent by the CDN, by index.
    fetched: dict[int, int] = field(default_factory=dict)
    #: Grows with each expired address, by index.
    address_version: dict[int, int] = field(default_factory=dict)
    #: Sizes of its pictures, once drawn.
    sizes_bytes: tuple[int, ...] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the client cancelled or killed it."""
        return self.stopped_at is not None

    @property
    def changed_at(self) -> float:
        """When its schedule was last decided upon: by its making, its start or a stop order."""
        decided = (self.stopped_at, self.started_at, self.made_at)
        return next(at for at in decided if at is not None)

    @property
    def due_at(self) -> float:
        """When it ends, as far as is known now; infinity where it does not."""
        if self.stopped_at is not None:
            return self.stopped_at
        if self.started_at is None or self.fault == "task-stuck":
            return math.inf
        return self.started_at + self.duration_s

    @property
    def succeeded(self) -> bool:
        """Whether it ended well (which it may have done without outputs)."""
        return self.ended_at is not None and not self.stopped and self.fault not in FAILING

    @property
    def outputs(self) -> int:
        """How many images it shows once it has ended."""
        return 0 if self.gone else self.images_made

    @property
    def images_made(self) -> int:
        """How many images it had at its end, whatever became of them."""
        if not self.succeeded or self.fault == "task-empty":
            return 0
        return self.images - (self.fault == "task-fewer" and self.images > 1)

    @property
    def elapsed_s(self) -> Decimal:
        """Seconds it took, to four digits and never 0, as billed; 0 before its end."""
        if self.ended_at is None:
            return Decimal(0)
        return max(Decimal(f"{self.duration_s:.4f}"), Decimal("0.0001"))

    def stages(self) -> Stages:
        """(instant, status) of all it goes through, in order, as far as is known now."""
        begin: Stages = ((self.made_at, "task_queue"),)
        if self.started_at is not None:
            started_at = self.started_at
            parts = _stages(self.fault)
            begin += tuple(
                (started_at + part * self.duration_s, status) for part, status in parts if part > 0
            )
        if self.stopped_at is not None:
            stopped_at = self.stopped_at
            return (*((at, status) for at, status in begin if at < stopped_at), (stopped_at, "task_cancel"))
        return begin

    def status(self, now: float) -> str:
        """The status it shows at `now`."""
        current = "task_queue"
        for at, status in self.stages():
            if at > now:
                break
            current = status
        return current


def _stages(fault: str | None) -> Stages:
    match fault:
        case "task-stuck":
            return tuple(stage for stage in STAGES if stage[0] <= 0.10)
        case "task-skips":
            return tuple(
                stage for stage in STAGES if stage[1] in ("task_queue", "task_output", "task_postprocess_end")
            )
        case "task-unknown-status":
            return tuple(sorted((*STAGES, (0.50, "task_rehearsal"))))
        case "task-backwards":
            return tuple(sorted((*STAGES, (0.40, "task_preprocess_start"), (0.50, "task_output"))))
        case "task-error-passing":
            return tuple(
                sorted((*STAGES, (0.40, "task_error"), (0.60, "task_error_full"), (0.70, "task_output")))
            )
        case "task-error-end":
            return (*(stage for stage in STAGES if stage[0] < 0.15), (1.0, "task_error"))
        case "task-cancelled":
            return (*(stage for stage in STAGES if stage[0] < 0.08), (1.0, "task_cancel"))
    return STAGES


class Ledger:
    """All tasks, the slots and the balance."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        seconds: Callable[[], float],
        slots: int | None,
        queue: bool,
        balance_usd: Decimal,
        first_id: int,
        salt: str,
    ) -> None:
        self.slots = slots
        self.queue = queue
        self.balance_usd = balance_usd
        self.seconds = seconds
        self.billed_usd = Decimal(0)
        #: Every task made, oldest first.
        self.tasks: list[SimTask] = []
        #: Most tasks ever active at once.
        self.max_active = 0
        #: Told of every task of which something changes: made, started, stopped, its files deleted.
        self.listeners: set[Callable[[SimTask], None]] = set()
        #: The instant up to which all is accounted for.
        self.now = clock()
        self._clock = clock
        self._next_id = first_id
        self._by_id: dict[str, SimTask] = {}
        self._salt = salt
        self._by_token: dict[str, SimTask] = {}
        self._by_tool: dict[str, list[SimTask]] = {}
        #: Of each request the tasks that lived or had succeeded when last looked at.
        self._standing: dict[str, list[SimTask]] = {}
        self._running = 0
        #: Ends to come of tasks that hold a slot: (instant, id, task), the next one first.
        self._ends: list[tuple[float, int, SimTask]] = []
        self._waiting: deque[SimTask] = deque()

    @property
    def active(self) -> int:
        """Tasks that are not over: those holding a slot and those waiting for one."""
        return self._running + len(self._waiting)

    @property
    def limit(self) -> int | None:
        """How many tasks may be active; None: any number."""
        if self.slots is not None:
            return self.slots
        if self.balance_usd > UNLIMITED_ABOVE_USD:
            return None
        return max(1, math.floor(self.balance_usd * Decimal("0.10")))

    def admit(self) -> None:
        """Raise Refusal where the account may not start a task now."""
        self.advance()
        if self.balance_usd < LEAST_BALANCE_USD:
            raise self.balance_exhausted()
        limit = self.limit
        if limit is not None and not self.queue and self.active >= limit:
            raise self.limit_reached(limit)

    def limit_reached(self, limit: int) -> Refusal:
        """The refusal of code 96, naming the balance and `limit`."""
        message = (
            "You have reached the limit of concurrent tasks. "
            f"With your current balance of ${self.balance_usd:.2f}, "
            f"you can run up to {limit} tasks at the same time. "
            "Please wait for a running task to finish or add funds to your account."
        )
        return Refusal(LIMIT_REACHED, message)

    def balance_exhausted(self) -> Refusal:
        """The refusal of code 97."""
        return Refusal(
            BALANCE_EXHAUSTED, "Your balance is not sufficient to run this task. Please add funds."
        )

    def make(
        self,
        tool: Tool,
        parameters: Mapping[str, Any],
        *,
        images: int,
        size_px: tuple[int, int],
        fault: str | None,
        callback_url: str = "",
    ) -> SimTask:
        """A new task, started where a slot is free."""
        self.advance()
        number = self._next_id
        request = fingerprint(tool, parameters)
        standing = [other for other in self._standing.get(request, ()) if _stands(other)]
        task = SimTask(
            id=number,
            token=_token(f"{self._salt}:{number}", 30),
            tool=tool,
            parameters=dict(parameters),
            fingerprint=request,
            images=images,
            width_px=size_px[0],
            height_px=size_px[1],
            duration_s=self.seconds(),
            fault=fault,
            made_at=self.now,
            callback_url=callback_url,
            duplicates=standing[0].id if standing else None,
        )
        self._enter(task)
        self._standing[request] = [*standing, task]
        self._waiting.append(task)
        self._start_waiting(task.made_at)
        if task.started_at is None:
            self.tell(task)
        return task

    def restore(self, tasks: Sequence[SimTask]) -> None:
        """Take over the tasks of an earlier ledger on the same clock, oldest first.

        They are given as decided upon, without ends and bills: those follow from the schedules.
        """
        if not tasks:
            return
        for task in tasks:
            self._enter(task)
            self._standing.setdefault(task.fingerprint, []).append(task)
        started = [(task.started_at, task) for task in tasks if task.started_at is not None]
        for at, task in sorted(started, key=lambda pair: pair[0]):
            self._catch_up(at)
            self._occupy(task, at)
        # Only now, as whoever waited when the earlier ledger fell silent cannot have started before.
        silent_at = max(task.changed_at for task in tasks)
        self._catch_up(silent_at)
        for task in tasks:
            if task.started_at is None and task.stopped:
                task.ended_at = task.stopped_at
            elif task.started_at is None:
                self._waiting.append(task)
        self._start_waiting(silent_at)
        self.advance()

    def find(self, *, number: str = "", token: str = "") -> SimTask:
        """The task of that id (as text) or token; raises Refusal where there is none."""
        self.advance()
        task = self._by_token.get(token) or self._by_id.get(number)
        if task is None:
            raise Refusal(NOT_FOUND, "There is no task yet.")
        return task

    def made_by(self, tool: Tool) -> Sequence[SimTask]:
        """All tasks of a tool, oldest first."""
        return self._by_tool.get(tool.run_path, ())

    def stop(self, task: SimTask, *, assigned: bool) -> None:
        """Cancel a task that is not assigned yet, or kill one that is; raises Refusal otherwise."""
        self.advance()
        now = self.now
        if task.ended_at is not None:
            raise Refusal(VALIDATION, "Task is already finished.")
        is_assigned = task.started_at is not None and now >= task.started_at + ASSIGNED_AT * task.duration_s
        if assigned != is_assigned:
            wanted = "Task is not assigned yet." if assigned else "Task is not in the queue."
            raise Refusal(VALIDATION, wanted)
        task.stopped_at = now
        if task.started_at is None:
            self._waiting.remove(task)
            task.ended_at = now
        else:
            self._end(task, now)
        self.tell(task)
        self._start_waiting(now)

    def advance(self) -> None:
        """Catch up with the clock: end what has ended, bill it, start what waited."""
        now = self.now = self._clock()
        self._catch_up(now)
        self._start_waiting(now)  # the limit may have been raised

    def tell(self, task: SimTask) -> None:
        """Something of this task has changed that listeners are to know."""
        for listener in tuple(self.listeners):
            listener(task)

    @property
    def has_waiting(self) -> bool:
        """Whether a task waits for a slot."""
        return bool(self._waiting)

    def next_end(self) -> float | None:
        """When the next task ends that holds a slot; None if none will."""
        while self._ends and self._ends[0][2].ended_at is not None:  # it was stopped before
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _enter(self, task: SimTask) -> None:
        self.tasks.append(task)
        self._by_id[str(task.id)] = task
        self._by_token[task.token] = task
        self._by_tool.setdefault(task.tool.run_path, []).append(task)
        self._next_id = max(self._next_id, task.id + 1)

    def _catch_up(self, until: float) -> None:
        while self._ends and self._ends[0][0] <= until:
            at, _, task = heapq.heappop(self._ends)
            if task.ended_at is None:
                self._end(task, at)
                self._start_waiting(at)

    def _end(self, task: SimTask, at: float) -> None:
        self._running -= 1
        task.ended_at = at
        if not task.succeeded:
            return
        task.cost_usd = bill(
            task.tool.slug,
            task.parameters,
            images=task.images_made or task.images,
            pixels=task.width_px * task.height_px,
            elapsed_s=task.elapsed_s,
        )
        self.balance_usd -= task.cost_usd
        self.billed_usd += task.cost_usd

    def _start_waiting(self, at: float) -> None:
        while self._waiting and ((limit := self.limit) is None or self._running < limit):
            task = self._waiting.popleft()
            self._occupy(task, at)
            self.tell(task)

    def _occupy(self, task: SimTask, at: float) -> None:
        task.started_at = at
        self._running += 1
        self.max_active = max(self.max_active, self._running)
        if (due_at := task.due_at) < math.inf:
            heapq.heappush(self._ends, (due_at, task.id, task))


def fingerprint(tool: Tool, parameters: Mapping[str, Any]) -> str:
    """A text that is equal for equal requests."""
    text = json.dumps([tool.run_path, parameters], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def durations(spec: float | str, rng: Random) -> Callable[[], float]:
    """Draws a task's seconds: a number, "MIN-MAX" (uniform) or "lognormal:MEDIAN:P95"; raises ValueError."""
    text = spec if isinstance(spec, str) else f"{spec:.9f}"
    if text.startswith("lognormal:"):
        median, p95 = (float(part) for part in text.removeprefix("lognormal:").split(":"))
        if not 0 < median <= p95:
            raise ValueError("lognormal needs 0 < MEDIAN <= P95")
        # The 95th percentile of a normal distribution lies 1.6449 deviations above its middle.
        sigma = math.log(p95 / median) / 1.6449
        return lambda: rng.lognormvariate(math.log(median), sigma)
    low, dash, high = text.partition("-")
    if not dash:
        high = low
    if not 0 <= float(low) <= float(high) < math.inf:
        raise ValueError("seconds must not be negative, and MIN not above MAX")
    return lambda: rng.uniform(float(low), float(high))


def _stands(task: SimTask) -> bool:
    return task.ended_at is None or task.outputs > 0


def _token(text: str, length: int) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest())
    letters = []
    for _ in range(length):
        number, place = divmod(number, len(alphabet))
        letters.append(alphabet[place])
    return "".join(letters)
