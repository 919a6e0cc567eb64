"""The run itself: one loop that feeds rows, and the way of one row from where it stands to where it rests.

Crashing is an ordinary event: there is no resume mode. A row is looked at as it is stored and put where its
next step is (`rules.recovery.next_step`). The order around money is always: record the intent, send, record
the answer. What happens after a failure is decided in `rules.policy`; here it is done.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from batchrun import errors
from batchrun.dispatch.doubts import Doubts
from batchrun.dispatch.limits import Gate, Slots
from batchrun.dispatch.saving import Saver, Unsaved
from batchrun.dispatch.track import Ended, Left, Tracker
from batchrun.model import Accepted, Failure, LocalImage, Row, State, Task, Value
from batchrun.progress import Fact, Progress
from batchrun.rules.policy import (
    BALANCE,
    UNREACHABLE,
    Doubt,
    Fail,
    PaidButEmpty,
    Pause,
    Retry,
    Stop,
    Succeeded,
    TaskFailed,
    Verdict,
    WaitForSlot,
    after_submit,
    charged,
    may_try_again,
)
from batchrun.rules.recovery import Absent, Adopt, Hold, Step, next_step
from batchrun.rules.recovery import Doubt as LostSubmit
from batchrun.rules.states import Event
from batchrun.store.records import dumps
from batchrun.store.store import Intent, Store

if TYPE_CHECKING:
    from pathlib import Path

    from batchrun.tools.bind import Binder

#: Downloads under way get this long when the run is stopped.
DRAIN_S = 60.0
#: An exhausted balance is waited for this long.
MAX_PAUSE_S = 3600.0
#: A doubtful submit's task may be active this long while the tool's usual time is not known.
UNKNOWN_TIME_S = 60.0
#: Rows claimed at once.
CLAIM = 32
#: How often another process's orders are looked for.
ORDERS_S = 1.0


class Service(Protocol):
    """What the dispatcher needs of the service's client."""

    async def submit(self, run_path: str, body: Mapping[str, Value]) -> Accepted: ...
    async def detail(self, task_id: str, token: str = "") -> Task | None: ...
    async def list_tasks(self, *, start: int = 0, limit: int = 100) -> list[Task]: ...
    async def cancel(self, task_id: str) -> Task | None: ...
    async def kill(self, task_id: str, token: str = "") -> Task | None: ...
    async def upload(self, path: Path, name: str, size_bytes: int) -> str: ...
    def server_now(self) -> float | None: ...


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


class Dispatcher:
    """Brings every row of a run to rest, or stops and leaves the rest for the next start."""

    def __init__(
        self,
        *,
        store: Store,
        service: Service,
        saver: Saver,
        progress: Progress,
        limits: Limits,
        binders: Callable[[str], Binder],
        image_path: Callable[[str], Path],
        give_up_doubt: Callable[[Row], bool] = lambda row: False,
        known_limit: int | None = None,
        rng: Random | None = None,
    ) -> None:
        self.stopped: str | None = None
        #: Rows left in flight or in doubt, with the reason.
        self.left: dict[int, str] = {}
        self._store = store
        self._service = service
        self._saver = saver
        self._progress = progress
        self._limits = limits
        self._binders = binders
        self._image_path = image_path
        self._give_up_doubt = give_up_doubt
        self._rng = rng or Random()
        self._slots = Slots(
            fixed=limits.concurrency, ceiling=limits.max_concurrency, known=known_limit, rng=self._rng
        )
        self._gate = Gate(rng=self._rng)
        self._tracker = Tracker(service, rng=self._rng)
        self._doubts = Doubts(service, store.known_tasks)
        # rows on their way, most of them active at the service, the others being saved
        self._room = anyio.Semaphore(2 * limits.max_concurrency + 2 * saver.downloads)
        self._waits: set[anyio.CancelScope] = set()
        self._rows_scope: anyio.CancelScope | None = None
        self._cancelling = False
        self._tools: dict[int, Binder] = {}
        self._uploading = anyio.Lock()
        self._newest_task: int | None = None
        self._under_way: Counter[bytes] = Counter()
        self._lost_at: dict[int, float] = {}
        self._refusals: dict[int, tuple[int, float]] = {}
        self._missing_tools: dict[int, Failure | None] = {}
        self._steps = {
            Step.SUBMIT: self._submit,
            Step.LOOK_UP: self._look_up,
            Step.FOLLOW: self._follow,
            Step.SAVE: self._save,
        }

    # --- the run ------------------------------------------------------------------------------------

    async def run(self) -> str | None:
        """Work until every row rests; returns why it stopped early, None when it did not.

        Raises StoreError when the state cannot be written any more.
        """
        self._newest_task = await self._ask_newest()
        async with anyio.create_task_group() as services:
            services.start_soon(self._tracker.run)
            services.start_soon(self._doubts.run)
            services.start_soon(self._obey_orders)
            services.start_soon(self._watch_pause)
            with anyio.CancelScope() as self._rows_scope:
                async with anyio.create_task_group() as rows:
                    await self._feed(rows)
            services.cancel_scope.cancel()
        return self.stopped

    def stop(self, reason: str) -> None:
        """Submit nothing more; downloads under way get DRAIN_S, running tasks are left to the next start."""
        if self.stopped is not None:
            return
        self.stopped = reason
        self._progress.announce(Fact.STOPPING, reason=reason)
        for scope in list(self._waits):
            scope.cancel()
        if self._rows_scope is not None:
            self._rows_scope.deadline = anyio.current_time() + DRAIN_S

    def abort(self) -> None:
        """Leave at once; the state is intact."""
        self.stop("stopped at once")
        if self._rows_scope is not None:
            self._rows_scope.cancel()

    async def _ask_newest(self) -> int | None:
        try:
            with anyio.move_on_after(15.0):
                return await self._doubts.newest_task()
        except errors.CredentialsRefused as error:
            self.stop(str(error))
        return None

    async def _feed(self, rows: anyio.abc.TaskGroup) -> None:
        """Start rows in the order of what they are worth: paid ones first, new ones last."""
        for state in (State.IN_FLIGHT, State.FINISHED, State.SUBMITTING, State.IN_DOUBT, State.PLANNED):
            while claimed := await self._claim(state):
                for row in claimed:
                    with self._wait() as waiting:
                        await self._room.acquire()
                    if waiting.cancelled_caught:
                        return
                    rows.start_soon(self._carry, row)

    async def _claim(self, state: State) -> list[Row]:
        if self.stopped is not None:
            return []
        return await self._store.claim(state, limit=CLAIM, last_seq=self._limits.last_seq)

    async def _carry(self, row: Row) -> None:
        """Take a row from where it stands to where it rests, or leave it as it is."""
        slot = _Slot(self._slots, self._progress)
        self._hold(row, slot)
        try:
            while (step := next_step(row.state)) is not Step.REST:
                after = await self._steps[step](row, slot)
                if after is None:
                    break
                self._progress.moved(row.state, after.state)
                row = after
        except errors.LeaseLost as error:
            self._progress.announce(Fact.NOTE, row, message=str(error))
        except errors.DiskError as error:
            self.stop(str(error))
        except errors.CredentialsRefused as error:
            self.stop(str(error))
        finally:
            slot.give()
            self._room.release()

    @staticmethod
    def _hold(row: Row, slot: _Slot) -> None:
        """A task that may be active at the service has a slot from the start, even beyond the limit."""
        if next_step(row.state) in (Step.FOLLOW, Step.LOOK_UP):
            slot.take_anyway()

    @contextmanager
    def _wait(self) -> Iterator[anyio.CancelScope]:
        """A wait that a stop ends; `cancelled_caught` of the scope tells that it did."""
        with anyio.CancelScope() as scope:
            self._waits.add(scope)
            if self.stopped is not None:
                scope.cancel()
            try:
                yield scope
            finally:
                self._waits.discard(scope)

    # --- submitting -----------------------------------------------------------------------------------

    async def _submit(self, row: Row, slot: _Slot) -> Row | None:
        if self._cancelling:
            await self._store.record_cancelled(row.seq)
            self._progress.announce(Fact.CANCELLED, row)
            return replace(row, state=State.CANCELLED)
        slot.give()  # a row that tries again queues again
        gone = self._missing_tools.get(row.tool)
        if gone is not None:
            return await self._reject(row, gone)
        binder = await self._binder(row.tool)
        with self._wait() as waiting:
            await slot.take()
            body = await self._body(row, binder)
        if waiting.cancelled_caught:
            return None
        if isinstance(body, Failure):
            return await self._reject(row, body)
        with self._wait() as waiting:
            probe = await self._gate.pass_through()
        if waiting.cancelled_caught:
            return None
        return await self._send(row, slot, binder, body, probe=probe)

    async def _send(
        self, row: Row, slot: _Slot, binder: Binder, body: dict[str, Value], *, probe: bool
    ) -> Row | None:
        """Record the intent, send, record the answer."""
        try:
            row = await self._store.record_intent(
                Intent(row.seq, time.time(), self._service.server_now(), self._newest_task)
            )
        except BaseException:
            self._gate.unsure(probe=probe)
            raise
        self._progress.announce(Fact.INTENT, row)
        print_ = _body_print(body)
        self._under_way[print_] += 1
        try:
            accepted = await self._service.submit(binder.tool.run_path, body)
            self._progress.announce(Fact.ACCEPTED, row, task=accepted.task_id)
            with anyio.CancelScope(shield=True):  # what was answered is recorded, whatever else happens
                after = await self._store.record_accepted(row.seq, accepted, at=time.time())
        except errors.ServiceError as error:
            return await self._after_refusal(row, slot, error, probe=probe)
        except BaseException:
            self._gate.unsure(probe=probe)
            raise
        finally:
            self._under_way[print_] -= 1
        self._accepted(row, accepted)
        return after

    def _accepted(self, row: Row, accepted: Accepted) -> None:
        self._gate.open()
        self._slots.accepted()
        self._missing_tools.pop(row.tool, None)
        self._refusals.pop(row.seq, None)
        if accepted.task_id.isdecimal():
            self._newest_task = max(self._newest_task or 0, int(accepted.task_id))
        self._progress.announce(Fact.IN_FLIGHT, row, task=accepted.task_id)

    async def _after_refusal(
        self, row: Row, slot: _Slot, error: errors.ServiceError, *, probe: bool
    ) -> Row | None:
        now = anyio.current_time()
        tries, since = self._refusals.get(row.seq, (0, now))
        decision = after_submit(error, refused_for_s=now - since, tries=tries + 1, rng=self._rng)
        match decision:
            case Doubt():
                self._gate.trouble(UNREACHABLE, probe=probe)
                self._lost_at[row.seq] = now
                self._progress.announce(Fact.DOUBT, row, message=decision.reason)
                return await self._store.record_doubt(row.seq, decision.reason)
            case Fail(whole_tool=False):
                self._gate.open()
                return await self._reject(row, decision.failure)
            case Fail() if row.tool in self._missing_tools:  # the second such answer in a row confirms it
                self._gate.open()
                self._missing_tools[row.tool] = decision.failure
                return await self._reject(row, decision.failure)
        row = await self._store.withdraw(row.seq)
        self._progress.announce(Fact.WITHDRAWN, row, message=str(error))
        match decision:
            case WaitForSlot():
                self._gate.open()
                self._slots.refused(decision.limit)
                await self._store.adopt_limit(decision.limit)
                self._progress.announce(Fact.LIMIT, limit=self._slots.limit, told=decision.limit)
            case Pause(reason=reason) if reason == UNREACHABLE:
                self._gate.trouble(reason, probe=probe)
                slot.give()
                with self._wait():
                    await anyio.sleep(self._rng.uniform(0.1, 1.0))
            case Pause():
                self._gate.shut(decision.reason, probe=probe, after_s=decision.after_s)
            case Stop():
                self._gate.unsure(probe=probe)
                self.stop(decision.reason)
            case Retry() | Fail():
                self._gate.open()
                self._refusals[row.seq] = (tries + 1, since)
                if isinstance(decision, Fail):
                    self._missing_tools[row.tool] = None
                slot.give()
                with self._wait():
                    await anyio.sleep(decision.after_s if isinstance(decision, Retry) else 2.0)
        return row if self.stopped is None else None

    async def _reject(self, row: Row, failure: Failure) -> Row:
        after = await self._store.record_rejected(row.seq, failure)
        self._progress.announce(Fact.FAILED, row, cause=failure.cause, message=failure.message)
        return after

    async def _binder(self, tool: int) -> Binder:
        if tool not in self._tools:
            self._tools[tool] = self._binders(await self._store.tool(tool))
        return self._tools[tool]

    async def _body(self, row: Row, binder: Binder) -> dict[str, Value] | Failure:
        """What is sent for a row; local images are uploaded first, each content once."""
        uploads = {}
        for value in row.given.values():
            if isinstance(value, LocalImage):
                try:
                    uploads[value.sha256] = await self._upload(value)
                except (errors.RequestRejected, errors.UsageError) as error:
                    return Failure("input image", str(error))
        return binder.body(row.given, uploads=uploads, seed_key=row.key)

    async def _upload(self, image: LocalImage) -> str:
        async with self._uploading:  # rows that share an image wait for its one upload
            known = await self._store.upload_url(image.sha256)
            if known is not None:
                return known
            path = self._image_path(image.path)
            await anyio.to_thread.run_sync(_check_unchanged, path, image)
            url = await self._persist(lambda: self._service.upload(path, path.name, image.size_bytes))
            await self._store.record_upload(image.sha256, url, at=time.time())
            return url

    async def _persist(self, call: Callable[[], Awaitable[str]]) -> str:
        """Repeat a call that costs nothing until the service is well enough to answer it."""
        troubles = 0
        while True:
            try:
                return await call()
            except (errors.CredentialsRefused, errors.RequestRejected):
                raise
            except errors.ServiceError as error:
                troubles += 1
                asked_s = getattr(error, "retry_after_s", None)
                await anyio.sleep(asked_s if asked_s is not None else min(60.0, 2.0**troubles / 2))

    # --- doubts -----------------------------------------------------------------------------------------

    async def _look_up(self, row: Row, slot: _Slot) -> Row | None:
        """Find out what became of a submit whose answer is lost."""
        if (
            row.state is State.SUBMITTING
        ):  # the process that sent it is dead; its bytes may still be on their way
            self._progress.announce(Fact.DOUBT, row, message="the process ended while it was submitting")
            return await self._store.record_doubt(row.seq, "the process ended while it was submitting")
        lost_at = self._lost_at.setdefault(row.seq, anyio.current_time())
        binder = await self._binder(row.tool)
        with self._wait() as waiting:
            body = await self._body(row, binder)
            if isinstance(body, Failure):
                answer: object = body
            else:
                answer = await self._settle(row, slot, body, lost_at)
        if waiting.cancelled_caught:
            return None
        if isinstance(answer, Adopt):
            self._progress.announce(Fact.ADOPTED, row, task=answer.task.id)
            accepted = Accepted(answer.task.id, answer.task.token)
            return await self._store.record_accepted(row.seq, accepted, at=time.time(), adopted=True)
        if isinstance(answer, Absent):
            self._progress.announce(Fact.ABSENT, row)
            return await self._store.record_absent(row.seq)
        if self._give_up_doubt(row):
            return await self._store.give_up_doubt(row.seq)
        reason = answer.message if isinstance(answer, Failure) else getattr(answer, "reason", "")
        await self._store.hold(
            row.seq, Failure("in doubt", f"a submit may have reached the service: {reason}")
        )
        self._leave(row, Fact.HELD, reason)
        return None

    async def _settle(
        self, row: Row, slot: _Slot, body: Mapping[str, Value], lost_at: float
    ) -> Adopt | Absent | Hold:
        """Look the row's submit up; its slot is held only while its task, if there is one, may be active."""

        async def give_in_time() -> None:
            typical_s = self._tracker.durations[row.tool].typical_s
            await anyio.sleep(2 * typical_s if typical_s is not None else UNKNOWN_TIME_S)
            slot.give()

        async with anyio.create_task_group() as group:
            group.start_soon(give_in_time)
            answer = await self._doubts.settle(
                _lost_submit(row, body),
                lost_at=lost_at,
                busy=lambda: self._under_way[_body_print(body)] > 0,
            )
            group.cancel_scope.cancel()
        return answer

    def _leave(self, row: Row, fact: Fact, reason: str) -> None:
        self.left[row.seq] = reason
        self._progress.announce(fact, row, message=reason)

    # --- following --------------------------------------------------------------------------------------

    async def _follow(self, row: Row, slot: _Slot) -> Row | None:
        """Wait for the end of the row's task, and record what it brought."""
        attempt = row.attempt
        assert attempt is not None
        assert attempt.task_id is not None
        slot.take_anyway()
        age_s = max(0.0, time.time() - attempt.intent_at)
        with self._wait() as waiting:
            ended = await self._tracker.follow(
                task_id=attempt.task_id, token=attempt.token, tool=row.tool, age_s=age_s if age_s > 5 else 0.0
            )
        if waiting.cancelled_caught:
            if not self._cancelling:
                return None
            ended = await self._cancel_task(row)
        task, verdict = ended
        if isinstance(verdict, Left) or task is None:
            self._leave(
                row, Fact.NOTE, verdict.reason if isinstance(verdict, Left) else "no word of the task"
            )
            return None
        self._progress.announce(Fact.ENDED, row, status=task.status)
        slot.give()
        return await self._record_end(row, task, verdict)

    async def _record_end(self, row: Row, task: Task, verdict: Verdict) -> Row:
        at = time.time()
        if isinstance(verdict, Succeeded):
            after = await self._store.record_finished(row.seq, task, at=at)
            self._progress.cost_usd += charged(task) or 0
            self._progress.announce(Fact.FINISHED, row, cost=task.cost_usd)
            return after
        assert isinstance(verdict, (TaskFailed, PaidButEmpty))
        failure = verdict.failure
        if isinstance(verdict, PaidButEmpty):
            self._progress.cost_usd += charged(task) or 0
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

    async def _watch_pause(self) -> None:
        """Keep the display's picture, and end a run whose money does not come back."""
        while True:
            await anyio.sleep(0.5)
            self._progress.limit = self._slots.limit
            if self._progress.paused != self._gate.reason:
                self._progress.paused = self._gate.reason
                self._progress.announce(
                    Fact.PAUSED if self._gate.reason else Fact.RESUMED, reason=self._gate.reason
                )
            if self._gate.reason == BALANCE and self._gate.shut_for_s() > MAX_PAUSE_S:
                self.stop("the balance is exhausted: add money to the account and run again")

    async def _cancel_task(self, row: Row) -> Ended:
        """Cancel the row's task while it is queued, else kill it, and see it ended."""
        attempt = row.attempt
        assert attempt is not None
        assert attempt.task_id is not None
        for stop_task in (self._service.cancel, self._service.kill):
            try:
                await stop_task(attempt.task_id)
            except errors.ServiceError as error:
                self._progress.announce(Fact.NOTE, row, message=f"{stop_task.__name__}: {error}")
            with anyio.move_on_after(10.0):
                return await self._tracker.follow(
                    task_id=attempt.task_id, token=attempt.token, tool=row.tool, age_s=1.0
                )
        return None, Left("the task could not be cancelled")

    # --- saving ---------------------------------------------------------------------------------------------

    async def _save(self, row: Row, slot: _Slot) -> Row | None:
        """Bring the row's images to disk; a failed download never causes a new task."""
        slot.give()
        result = await self._saver.save(row)
        if isinstance(result, Row):
            self._progress.images += len(result.outputs)
            self._progress.bytes += sum(output.size_bytes or 0 for output in result.outputs)
            self._progress.announce(Fact.DONE, result, images=len(result.outputs))
            return result
        if isinstance(result, Unsaved) and self.stopped is None:
            after = await self._store.record_lost(row.seq, result.failure)
            self._progress.announce(
                Fact.FAILED, row, cause=result.failure.cause, message=result.failure.message
            )
            return after
        return None


class _Slot:
    """One row's hold on a task slot; taking and giving twice is harmless."""

    def __init__(self, slots: Slots, progress: Progress) -> None:
        self._slots = slots
        self._progress = progress
        self._held = False

    async def take(self) -> None:
        if not self._held:
            await self._slots.take()
            self._note(held=True)

    def take_anyway(self) -> None:
        if not self._held:
            self._slots.take_anyway()
            self._note(held=True)

    def give(self) -> None:
        if self._held:
            self._slots.give()
            self._note(held=False)

    def _note(self, *, held: bool) -> None:
        self._held = held
        self._progress.active = self._slots.in_use


def _lost_submit(row: Row, body: Mapping[str, Value]) -> LostSubmit:
    attempt = row.attempt
    assert attempt is not None
    given = [name for name in row.given if name in body]
    return LostSubmit(body, given, attempt.after_task, attempt.intent_server_at)


def _body_print(body: Mapping[str, Value]) -> bytes:
    return sha256(dumps(dict(body)).encode()).digest()


def _check_unchanged(path: Path, image: LocalImage) -> None:
    """Raises UsageError when the file is not the one that was planned."""
    try:
        digest = sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise errors.UsageError(
            f'"{image.path}" cannot be read: {error.strerror}; put it back and retry'
        ) from error
    if digest != image.sha256:
        raise errors.UsageError(
            f'"{image.path}" has changed since it was planned; run the manifest again to use it'
        )
