"""The run itself: one loop that feeds rows, and the way of one row from where it stands to where it rests.

Crashing is an ordinary event: there is no resume mode. A row is looked at as it is stored and put where its
next step is (`rules.recovery.next_step`). Submitting and doubts are in `submit`, the looks at tasks in
`track`, images in `saving`; here is what ties them together, and how a run starts, stops and cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

import anyio
import anyio.abc

from batchrun import errors
from batchrun.dispatch.cap import Cap
from batchrun.dispatch.doubts import Doubts, Listings
from batchrun.dispatch.hearing import Hearing, Tells
from batchrun.dispatch.limits import Gate, Room, Slot, Slots
from batchrun.dispatch.saving import Saver, Unsaved
from batchrun.dispatch.stopping import StopSign
from batchrun.dispatch.submit import Submitter, Submitting
from batchrun.dispatch.sweep import Lists, Sweeps, nobody_tells
from batchrun.dispatch.track import BUDGET_PER_S, UNKNOWN_TASK, Ended, Left, Looks, Tracker, Watch
from batchrun.dispatch.uploads import Uploading, Uploads
from batchrun.model import Attempt, Failure, Row, State, Task
from batchrun.progress import Fact, Progress
from batchrun.rules.halt import Failures, Halt
from batchrun.rules.pages import FROM
from batchrun.rules.policy import (
    BALANCE,
    UNREACHABLE,
    PaidButEmpty,
    Succeeded,
    TaskFailed,
    Verdict,
    charged,
    may_try_again,
)
from batchrun.rules.recovery import Step, next_step, task_number
from batchrun.rules.states import Event
from batchrun.store.store import Store
from batchrun.tools.bind import Binder

#: Downloads under way get this long when the run is stopped.
DRAIN_S = 60.0
#: A service that cannot be reached is waited for this long: a night.
MAX_OUTAGE_S = 12 * 3600.0
#: Before the first submit the newest task is asked for, this long while the service answers nothing at all.
NEWEST_S = 45.0
#: And again after this long.
NEWEST_AGAIN_S = 0.5
#: A task is given this long to end after it was told to.
CANCEL_S = 10.0
#: Rows claimed at once.
CLAIM = 32
#: How often another process's orders are looked for.
ORDERS_S = 1.0
#: How often the display's picture of slots and pauses is renewed.
PICTURE_S = 0.25


_UNKNOWN = Failure("task unknown", "the service does not know the task any more, which may have been billed")


class Service(Submitting, Looks, Lists, Listings, Tells, Uploading, Protocol):
    """What the dispatcher needs of the service's client."""

    async def cancel(self, task_id: str) -> Task | None:
        """End a task that is queued."""
        ...

    async def kill(self, task_id: str, token: str = "") -> Task | None:
        """End a task that runs."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a run."""

    #: None: found by trying.
    concurrency: int | None = None
    max_concurrency: int = 64
    attempts: int = 3
    #: Only rows up to this number; None: all.
    last_seq: int | None = None
    regenerate_lost: bool = False
    #: An exhausted balance is waited for this long, in seconds.
    max_pause_s: float = 3600.0
    halt: Halt = Halt()  # noqa: RUF009  frozen
    #: Stuck tasks are killed and submitted again; else they are left to the next start.
    kill_stuck: bool = False
    #: False: only what was submitted before is brought to its end.
    submit: bool = True
    #: How tasks are followed: "auto", "detail", "list" or "websocket".
    track: str = "auto"
    #: Whether events come from the same service; else they are asked for by "websocket" only.
    has_events: bool = True
    #: Requests per second that following tasks may make.
    looks_per_s: float = BUDGET_PER_S
    #: Where the service is asked, for people.
    address: str = ""


class Dispatcher:
    """Brings every row of a run to rest, or stops and leaves the rest for the next start."""

    def __init__(
        self,
        *,
        store: Store,
        service: Service,
        saver: Saver,
        sign: StopSign,
        progress: Progress,
        limits: Limits,
        cap: Cap,
        binders: Callable[[str], Binder],
        image_path: Callable[[str], Path],
        give_up_doubt: Callable[[Row], bool] = lambda row: False,
        known_limit: int | None = None,
        rng: Random | None = None,
    ) -> None:
        #: Rows left in flight, with the reason, by row number.
        self.left: dict[int, str] = {}
        rng = rng or Random()
        self._store = store
        self._service = service
        self._saver = saver
        self._progress = progress
        self._limits = limits
        self._cap = cap
        self._failures = Failures(limits.halt)
        self._binders = binders
        self._tools: dict[int, Binder] = {}
        self._sign = sign
        self._cancelling = False
        self._on_their_way = 0
        self._rows_scope: anyio.CancelScope | None = None
        # rows on their way, most of them active at the service, the others being saved
        self._room = Room(2 * limits.max_concurrency + 2 * saver.downloads)
        self._slots = Slots(
            fixed=limits.concurrency, ceiling=limits.max_concurrency, known=known_limit, rng=rng
        )
        self._gate = Gate(rng=rng)
        self._tracker = self._made_tracker(rng)
        self._doubts = Doubts(
            service,
            store.known_tasks,
            store.known_task,
            self._is_true_echo,
            newest_known=lambda: self._submitter.newest_task,
        )
        self._submitter = Submitter(
            store=store,
            service=service,
            doubts=self._doubts,
            uploads=Uploads(store, service, image_path, rng),
            slots=self._slots,
            gate=self._gate,
            cap=cap,
            sign=self._sign,
            progress=progress,
            binder_of=self._binder,
            usual_time_s=lambda tool: self._tracker.durations[tool].typical_s,
            give_up_doubt=give_up_doubt,
            rng=rng,
        )
        self._steps = {
            Step.SUBMIT: self._submitter.submit,
            Step.LOOK_UP: self._look_up,
            Step.FOLLOW: self._follow,
            Step.SAVE: self._save,
        }

    def _made_tracker(self, rng: Random) -> Tracker:
        """What follows tasks; where rows wait for one to end, events tell of that soonest."""
        track = self._limits.track
        tracker = Tracker(self._service, budget_per_s=self._limits.looks_per_s, rng=rng)
        untold: Callable[[Watch], float] = nobody_tells
        if track == "websocket" or (track == "auto" and self._limits.has_events):
            wanted = self._is_slot_wanted if track == "auto" else lambda: True
            hearing = Hearing(tracker, self._service, wanted=wanted, rng=rng, note=self._say)
            tracker.add(hearing)
            untold = hearing.untold
        if track in ("auto", "list"):
            least = FROM if track == "auto" else 1
            tracker.add(
                Sweeps(
                    tracker,
                    self._service,
                    least=least,
                    hurried=self._is_slot_wanted,
                    untold=untold,
                    note=self._say,
                )
            )
        return tracker

    @property
    def stopped(self) -> str | None:
        """Why the run stopped early; None when it did not."""
        return self._sign.reason

    # --- the run ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until every row rests or the run is stopped.

        Raises StoreError when the state cannot be written any more.
        """
        async with anyio.create_task_group() as services:
            for service in (
                self._tracker.run,
                self._doubts.run,
                self._saver.run,
                self._obey_orders,
                self._watch,
                self._ask_newest,
            ):
                services.start_soon(service)
            for tool, seconds in await self._store.recent_seconds():  # an earlier start's experience
                self._tracker.durations[tool].add(seconds)
            with anyio.CancelScope() as self._rows_scope:
                async with anyio.create_task_group() as rows:
                    await self._feed(rows)
            services.cancel_scope.cancel()

    def stop(self, reason: str) -> None:
        """Submit nothing more; downloads under way get DRAIN_S, running tasks are left to the next start."""
        self._sign.stop(reason)

    def abort(self) -> None:
        """Leave at once; the state is intact."""
        self._sign.stop("stopped at once")
        if self._rows_scope is not None:
            self._rows_scope.cancel()

    async def _ask_newest(self) -> None:
        """Learn the newest task id: what is newer later may be a lost submit's. Submits wait for it.

        A submit lost before the service ever told an id or the time could not be told from older ones.
        """
        try:
            known = await self._store.known_task()
            self._submitter.learn_newest(None if known is None else task_number(known))
            with anyio.move_on_after(NEWEST_S):
                newest = await self._doubts.newest_task()
                while newest is None and known is None and self._service.server_now() is None:
                    await anyio.sleep(NEWEST_AGAIN_S)
                    newest = await self._doubts.newest_task()
                self._submitter.learn_newest(newest)
        except errors.CredentialsRefused as error:
            self.stop(str(error))
        except errors.NotSent:
            pass  # nor is a submit, and the gate then waits for the service and says so
        finally:
            self._submitter.may_begin.set()

    async def _feed(self, rows: anyio.abc.TaskGroup) -> None:
        """Start rows in the order of what they are worth: paid ones first, new ones last."""
        for state in (State.IN_FLIGHT, State.FINISHED, State.SUBMITTING, State.IN_DOUBT, State.PLANNED):
            last = 0
            while claimed := await self._claim(state, after_seq=last):
                last = claimed[-1].seq  # doubts that are held are given back: each is looked up once
                for row in claimed:
                    if not await self._have_room():
                        return
                    rows.start_soon(self._carry, row)

    async def _have_room(self) -> bool:
        """Wait until another row may be on its way; False when the run stops before."""
        if self._cancelling or (self._room.has_some and self._sign.reason is None):
            await self._room.enter()
            return True
        with self._sign.wait() as waiting:
            await self._room.enter()
        return not waiting.cancelled_caught

    async def _claim(self, state: State, *, after_seq: int) -> list[Row]:
        # on the way out, what runs at the service is still wanted when it is to be cancelled
        if self._sign.reason is not None and not (self._cancelling and state is State.IN_FLIGHT):
            return []
        return await self._store.claim(
            state, limit=CLAIM, after_seq=after_seq, last_seq=self._limits.last_seq
        )

    async def _carry(self, row: Row) -> None:
        """Take a row from where it stands to where it rests, or leave it as it is."""
        slot = Slot(self._slots)
        self._on_their_way += 1
        try:
            while (step := next_step(row.state)) is not Step.REST:
                if step is Step.SUBMIT and not self._limits.submit:
                    break
                after = await self._steps[step](row, slot)
                if after is None:
                    break
                self._cap.moved(after)
                if row.present:
                    self._progress.moved(row.state, after.state)
                elif after.state is State.PLANNED:
                    break  # nothing more is bought for it
                row = after
            self._weigh(row)
        except errors.LeaseLost as error:
            self._progress.announce(Fact.NOTE, row, message=str(error))
        except (errors.DiskError, errors.CredentialsRefused) as error:
            self.stop(str(error))
        finally:
            slot.give()
            self._cap.left(row)
            self._submitter.health.forget(row.seq)
            self._on_their_way -= 1
            self._room.leave()

    def _weigh(self, row: Row) -> None:
        """Halt the run when failures are too many or too much alike."""
        if row.state is State.DONE:
            self._failures.done()
        elif row.state is State.FAILED and row.failure is not None:
            reason = self._failures.failure(row.failure.cause)
            if reason is not None:
                self.stop(reason)

    def _is_slot_wanted(self) -> bool:
        """Whether the end of a task would let a row be submitted."""
        return self._slots.are_short and self._gate.reason is None

    def _say(self, message: str) -> None:
        self._progress.announce(Fact.NOTE, message=message)

    async def _binder(self, tool: int) -> Binder:
        if tool not in self._tools:
            self._tools[tool] = self._binders(await self._store.tool(tool))
        return self._tools[tool]

    async def _watch(self) -> None:
        """Keep the display's picture, bound the way out, and end a run whose money does not come back."""
        stopping = False
        told: str | None = None
        while True:
            self._progress.active = self._slots.in_use
            self._progress.limit = max(self._slots.limit, self._slots.in_use)
            if told != self._gate.reason:
                told = self._gate.reason
                self._progress.paused = self._why_waiting(told)
                fact = Fact.PAUSED if told else Fact.RESUMED
                self._progress.announce(fact, reason=self._progress.paused)
            if self._gate.reason == BALANCE and self._gate.shut_for_s() > self._limits.max_pause_s:
                self.stop("the balance is exhausted: add money to the account and run again")
            if self._gate.reason == UNREACHABLE and self._gate.shut_for_s() > self._outage_patience_s():
                self.stop(
                    "the service cannot be reached, or answers no submit of the rows left: run again later"
                )
            if self._sign.reason is not None and not stopping and self._rows_scope is not None:
                stopping = True
                self._progress.announce(Fact.STOPPING, reason=self._sign.reason)
                self._rows_scope.deadline = anyio.current_time() + DRAIN_S
            await anyio.sleep(PICTURE_S)

    def _why_waiting(self, reason: str | None) -> str | None:
        """Why submits wait, and what can be done about it."""
        if reason == BALANCE:
            until = time.localtime(time.time() + self._limits.max_pause_s - self._gate.shut_for_s())
            return (
                f"{reason}: add money to the account, and the run goes on by itself; it waits until "
                f"{time.strftime('%H:%M on %d %b', until)} (--max-pause)"
            )
        if reason == UNREACHABLE and self._limits.address:
            return f"{reason}: {self._limits.address} ({self._submitter.trouble})"
        return reason

    def _outage_patience_s(self) -> float:
        """How long to wait for the service; less where only rows in trouble are left."""
        are_all_troubled = self._on_their_way <= self._submitter.health.troubled
        return self._limits.max_pause_s if are_all_troubled else MAX_OUTAGE_S

    async def _look_up(self, row: Row, slot: Slot) -> Row | None:
        with self._room.aside():
            return await self._submitter.look_up(row, slot)

    # --- following --------------------------------------------------------------------------------------

    async def _follow(self, row: Row, slot: Slot) -> Row | None:
        """Wait for the end of the row's task, and record what it brought."""
        slot.take_anyway()
        age_s = max(0.0, time.time() - _open_attempt(row).intent_at)
        with self._sign.wait() as waiting:
            ended = await self._follow_task(row, age_s=age_s if age_s > 5.0 else 0.0, on_told=slot.give_early)
        if waiting.cancelled_caught:
            if not self._cancelling:
                return None
            ended = await self._cancel_task(row)
        if self._is_to_be_killed(ended[1]):
            self._progress.announce(Fact.NOTE, row, message="the task does not come to an end: it is killed")
            ended = await self._cancel_task(row)  # submitted again only once it is seen ended
        task, verdict = ended
        if verdict == Left(UNKNOWN_TASK) and self._limits.regenerate_lost:  # by the user's word
            task, verdict = Task(_open_attempt(row).task_id or ""), PaidButEmpty(_UNKNOWN)
        if isinstance(verdict, Left) or task is None:
            self._leave(row, verdict.reason if isinstance(verdict, Left) else "no word of the task")
            return None
        self._progress.announce(Fact.ENDED, row, status=task.status)
        slot.give()
        return await self._record_end(row, task, verdict)

    def _is_to_be_killed(self, verdict: Verdict | Left) -> bool:
        if isinstance(verdict, TaskFailed):
            return verdict.is_open  # it may go on and be billed beside the next one
        return isinstance(verdict, Left) and verdict.is_stuck and self._limits.kill_stuck

    async def _follow_task(
        self, row: Row, *, age_s: float, at_once: bool = False, on_told: Callable[[], None] = lambda: None
    ) -> Ended:
        attempt = _open_attempt(row)
        return await self._tracker.follow(
            task_id=attempt.task_id or "",
            token=attempt.token,
            tool=row.tool,
            images=row.images,
            age_s=age_s,
            at_once=at_once,
            on_told=on_told,
        )

    async def _is_true_echo(self, task: Task) -> bool:
        row = await self._store.row_of_task(task.id)
        return row is None or await self._submitter.is_true_echo(row, task)

    def _leave(self, row: Row, reason: str) -> None:
        """The row stays in flight for the next start."""
        self.left[row.seq] = reason
        self._progress.announce(Fact.NOTE, row, message=reason)

    async def _record_end(self, row: Row, task: Task, verdict: Verdict) -> Row:
        at = time.time()
        if isinstance(verdict, Succeeded):
            after = await self._store.record_finished(row.seq, task, at=at)
            self._progress.cost_usd += charged(task) or 0
            self._cap.bill(row, charged(task))
            self._progress.announce(Fact.FINISHED, row, cost=task.cost_usd)
            return after
        assert isinstance(verdict, (TaskFailed, PaidButEmpty))
        failure = verdict.failure
        if isinstance(verdict, PaidButEmpty):
            self._progress.cost_usd += charged(task) or 0
            self._cap.bill(row, charged(task))
            again = self._limits.regenerate_lost
        else:
            again = True
        if self._cancelling and task.status == "task_cancel":
            event, fact = Event.CANCELLED, Fact.CANCELLED
            failure = Failure("cancelled", "cancelled by the user")
        elif again and may_try_again(row.attempts + 1, limit=self._limits.attempts):
            event, fact = Event.ATTEMPT_FAILED, Fact.ATTEMPT_FAILED
        else:
            event, fact = Event.GAVE_UP, Fact.FAILED
        after = await self._store.record_attempt_failed(row.seq, task, failure, at=at, event=event)
        self._progress.announce(fact, row, cause=failure.cause, message=failure.message)
        return after

    # --- cancelling ---------------------------------------------------------------------------------------

    def cancel_all(self) -> None:
        """Stop, and cancel what runs at the service."""
        self._cancelling = True
        self.stop("cancelled by order")

    async def _obey_orders(self) -> None:
        while True:
            await anyio.sleep(ORDERS_S)
            if not self._cancelling and await self._store.stop_order() == "cancel":
                self.cancel_all()

    async def _cancel_task(self, row: Row) -> Ended:
        """Cancel the row's task while it is queued, else kill it, and see it ended."""
        task_id = _open_attempt(row).task_id or ""
        for order, is_last in ((self._service.cancel, False), (self._service.kill, True)):
            try:
                await order(task_id)
            except errors.ServiceError as error:
                self._progress.announce(Fact.NOTE, row, message=str(error))
                if not is_last:
                    continue  # after the last one it is looked at all the same: its answer may be lost
            with anyio.move_on_after(CANCEL_S):
                return await self._follow_task(row, age_s=1.0, at_once=True)
        return None, Left("the task could not be cancelled; it goes on at the service")

    # --- saving ---------------------------------------------------------------------------------------------

    async def _save(self, row: Row, slot: Slot) -> Row | None:
        """Bring the row's images to disk; a failed download never causes a new task."""
        slot.give()
        result = await self._saver.save(row)
        if isinstance(result, Row):
            if row.present:
                self._progress.images += len(result.outputs)
                self._progress.bytes += sum(output.size_bytes or 0 for output in result.outputs)
            self._progress.announce(Fact.DONE, result, images=len(result.outputs))
            return result
        if isinstance(result, Unsaved) and self._sign.reason is None:
            after = await self._store.record_lost(row.seq, result.failure)
            self._progress.announce(
                Fact.FAILED, row, cause=result.failure.cause, message=result.failure.message
            )
            return after
        return None


def _open_attempt(row: Row) -> Attempt:
    assert row.attempt is not None
    assert row.attempt.task_id is not None
    return row.attempt
