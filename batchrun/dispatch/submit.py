"""Submitting a row, and finding out what became of a submit whose answer is lost.

The order around money is always: record the intent, send, record the answer. A submit that may have made a
task is never sent again to be safe: it is looked up.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from hashlib import sha256
from random import Random
from typing import Protocol

import anyio

from batchrun import errors
from batchrun.dispatch.cap import Cap
from batchrun.dispatch.doubts import Doubts
from batchrun.dispatch.limits import Gate, Slot, Slots
from batchrun.dispatch.stopping import StopSign
from batchrun.dispatch.uploads import Uploads
from batchrun.model import Accepted, Failure, Row, State, Task, Value
from batchrun.progress import Fact, Progress
from batchrun.rules.outage import Health
from batchrun.rules.policy import (
    INPUT_IMAGE,
    UNREACHABLE,
    Doubt,
    Fail,
    Pause,
    Retry,
    Stop,
    SubmitDecision,
    WaitForSlot,
    after_submit,
    backoff_s,
)
from batchrun.rules.recovery import Absent, Adopt, Hold, Match, compare, print_of_value
from batchrun.rules.recovery import Doubt as LostSubmit
from batchrun.store.records import dumps
from batchrun.store.row_verbs import Intent
from batchrun.store.store import Store
from batchrun.tools.bind import Binder

#: A doubtful submit's task may be active this long while the tool's usual time is not known.
UNKNOWN_TIME_S = 60.0
#: A row that found the account full waits so long for its next try before its intent is withdrawn.
KEEP_INTENT_S = 0.5
#: What is said of a row that is in trouble while all others are well.
UNANSWERED = "the service answers other rows, but to this one, asked again and again, never in good order"


class Submitting(Protocol):
    """What submitting needs of the service's client."""

    async def submit(self, run_path: str, body: Mapping[str, Value]) -> Accepted:
        """Ask for a task. Not idempotent: costs money."""
        ...

    def server_now(self) -> float | None:
        """The service's time in unix seconds, None when it is not known."""
        ...


class Submitter:
    """Takes a row from planned or doubtful to in flight, failed, or held."""

    def __init__(
        self,
        *,
        store: Store,
        service: Submitting,
        doubts: Doubts,
        uploads: Uploads,
        slots: Slots,
        gate: Gate,
        cap: Cap,
        sign: StopSign,
        progress: Progress,
        binder_of: Callable[[int], Awaitable[Binder]],
        usual_time_s: Callable[[int], float | None],
        give_up_doubt: Callable[[Row], bool],
        rng: Random,
    ) -> None:
        #: Set once the newest task before the first submit has been asked for.
        self.may_begin = anyio.Event()
        #: The newest task of the account that is known, by its number.
        self.newest_task: int | None = None
        self._store = store
        self._service = service
        self._doubts = doubts
        self._uploads = uploads
        self._slots = slots
        self._gate = gate
        self._cap = cap
        self._sign = sign
        self._progress = progress
        self._binder_of = binder_of
        self._usual_time_s = usual_time_s
        self._give_up_doubt = give_up_doubt
        self._rng = rng
        #: What submits under way ask for, by row.
        self._under_way: dict[int, _Asked] = {}
        #: When a doubtful submit of this process can last have been running, in monotonic seconds.
        self._lost_at: dict[int, float] = {}
        self.health = Health()
        #: What the newest submit in trouble met, for people.
        self.trouble = ""
        #: How often in a row a row's submit met trouble at the server, and since when.
        self._refusals: dict[int, tuple[int, float]] = {}
        #: Tools the service says it does not have; None until a second answer confirms it.
        self._missing_tools: dict[int, Failure | None] = {}
        #: The account's limit as it was told last.
        self._told_limit: int | None = None

    def learn_newest(self, task: int | None) -> None:
        """Remember the newest task id that is known; None: none is."""
        if task is not None:
            self.newest_task = max(self.newest_task or 0, task)

    # --- a planned row --------------------------------------------------------------------------------

    async def submit(self, row: Row, slot: Slot) -> Row | None:
        """Submit the row once there is a slot and the service is well; None when the run stops before."""
        slot.give()  # a row that tries again queues again
        binder = await self._binder_of(row.tool)
        with self._sign.wait():
            body = await self._body(row, binder)
            if not isinstance(body, Failure):
                await self.may_begin.wait()
                reserved_usd = await self._cap.take_slot(row, slot, body, self._sign)
                probe = await self._gate.pass_through()
        if self._sign.reason is not None:
            return None
        if isinstance(body, Failure):
            return await self._reject(row, body)
        gone = self._missing_tools.get(row.tool)
        if gone is not None:
            self._gate.unsure(probe=probe)
            return await self._reject(row, gone)
        if self.health.is_bad(row.seq, at=anyio.current_time()):
            self._gate.unsure(probe=probe)
            return await self._reject(row, Failure("service fault", UNANSWERED))
        return await self._send(row, slot, binder.tool.run_path, body, reserved_usd, probe=probe)

    async def _send(
        self,
        row: Row,
        slot: Slot,
        run_path: str,
        body: dict[str, Value],
        reserved_usd: Decimal,
        *,
        probe: bool,
    ) -> Row | None:
        """Record the intent, send, record the answer."""
        self._under_way[row.seq] = _Asked(body)
        try:
            row = await self._store.record_intent(
                Intent(row.seq, time.time(), self._service.server_now(), self.newest_task, reserved_usd)
            )
            if self._sign.reason is not None:
                await self._store.withdraw(row.seq)
                return None
            self._progress.announce(Fact.INTENT, row)
            while True:
                answered = self.health.answered
                try:
                    accepted = await self._service.submit(run_path, body)
                    break
                except errors.ServiceError as error:
                    refused = await self._refused(row, slot, error, sent_after=answered, probe=probe)
                    if refused is None or refused.state is not State.SUBMITTING:
                        return refused
                    probe = False  # it has told of the gate what there was to tell
            self._progress.announce(Fact.ACCEPTED, row, task=accepted.task_id)
            with anyio.CancelScope(shield=True):  # what was answered is recorded, whatever else happens
                after = await self._store.record_accepted(row.seq, accepted, at=time.time())
        except BaseException:
            self._gate.unsure(probe=probe)
            raise
        finally:
            del self._under_way[row.seq]
        if after.state is State.IN_DOUBT:  # another row's look-up was answered with our task
            self._lost_at[row.seq] = anyio.current_time()
        self._accepted(row, accepted)
        return after

    def _accepted(self, row: Row, accepted: Accepted) -> None:
        self.health.sound(row.seq)
        self._gate.open()
        self._slots.accepted()
        self._missing_tools.pop(row.tool, None)
        self._refusals.pop(row.seq, None)
        if accepted.task_id.isdecimal():
            self.learn_newest(int(accepted.task_id))
        self._progress.announce(Fact.IN_FLIGHT, row, task=accepted.task_id)

    async def _refused(
        self, row: Row, slot: Slot, error: errors.ServiceError, *, sent_after: int, probe: bool
    ) -> Row | None:
        """Do what the policy says after a submit that was not accepted.

        A row that still stands as submitting is to be sent again at once, with the intent that is recorded.
        """
        now = anyio.current_time()
        tries, since = self._refusals.get(row.seq, (0, now))
        decision = after_submit(error, refused_for_s=now - since, tries=tries + 1, rng=self._rng)
        if isinstance(decision, Retry):
            self._refusals[row.seq] = (tries + 1, since)
        else:  # waiting for a slot, for money or for a service that is back is no trouble of the row's
            self._refusals.pop(row.seq, None)
        is_unsound = isinstance(decision, Doubt) or decision == Pause(UNREACHABLE)
        own_times = 0
        if is_unsound:
            self.trouble = str(error)
            own_times = self.health.trouble(row.seq, at=now, sent_after=sent_after)
            self._gate.trouble(UNREACHABLE, probe=probe, is_outage=self.health.is_outage)
        else:
            self.health.sound(row.seq)
        if isinstance(decision, Doubt):
            self._lost_at[row.seq] = now
            self._progress.announce(Fact.DOUBT, row, message=decision.reason)
            return await self._store.record_doubt(row.seq, decision.reason)
        if isinstance(decision, Fail) and self._is_confirmed(row, decision):
            self._gate.open()
            return await self._reject(row, decision.failure)
        has_slot = False
        try:
            if isinstance(decision, WaitForSlot):
                was_try = await self._adopt(decision, slot)
                has_slot = was_try and await self._regains(slot)
        finally:
            if not has_slot:
                with anyio.CancelScope(shield=True):  # it certainly made no task, and is to be no doubt
                    row = await self._store.withdraw(row.seq)
        if has_slot:
            return row
        self._progress.announce(Fact.WITHDRAWN, row, message=str(error))
        if is_unsound:
            wait_s = self._rng.uniform(0.1, 1.0) + backoff_s(own_times, base_s=0.5, cap_s=60.0, rng=self._rng)
        else:
            wait_s = self._learn(decision, probe=probe)
        if wait_s:
            slot.give()
            with self._sign.wait():
                await anyio.sleep(wait_s)
        return row if self._sign.reason is None else None

    def _is_confirmed(self, row: Row, decision: Fail) -> bool:
        """A tool that is missing is missing only once a second answer says so."""
        if not decision.whole_tool:
            return True
        confirmed = row.tool in self._missing_tools
        self._missing_tools[row.tool] = decision.failure if confirmed else None
        return confirmed

    async def _adopt(self, full: WaitForSlot, slot: Slot) -> bool:
        """Let every row know that the account is full, and remember the limit told; whether it was a try."""
        self._gate.open()
        was_try = slot.refused(full.limit)
        if full.limit is not None and full.limit != self._told_limit:
            await self._store.adopt_limit(full.limit)
            self._told_limit = full.limit
        self._progress.announce(Fact.LIMIT, limit=self._slots.limit, told=full.limit)
        return was_try

    async def _regains(self, slot: Slot) -> bool:
        """Whether the row has a slot again soon: then a try costs no new record of its intent.

        Only for tries, which are one at a time, and not for longer: what is found as submitting after a crash
        has to be looked up.
        """
        slot.give()
        with self._sign.wait(), anyio.move_on_after(KEEP_INTENT_S):
            await slot.take()
        return slot.is_held and self._sign.reason is None and self._gate.reason is None

    def _learn(self, decision: SubmitDecision, *, probe: bool) -> float:
        """Let every row know what a refusal says of the service; returns this row's own wait in seconds."""
        match decision:
            case WaitForSlot():
                pass  # they know (_adopt)
            case Pause():
                self._gate.shut(decision.reason, probe=probe, after_s=decision.after_s)
            case Stop():
                self._gate.unsure(probe=probe)
                self._sign.stop(decision.reason)
            case Retry():
                self._gate.open()
                return decision.after_s
            case _:
                self._gate.open()
                return 2.0
        return 0.0

    async def _reject(self, row: Row, failure: Failure) -> Row:
        after = await self._store.record_rejected(row.seq, failure)
        if failure.cause == INPUT_IMAGE:  # it may be mended without a change to the manifest
            await self._store.forget_stamp()
        self._progress.announce(Fact.FAILED, row, cause=failure.cause, message=failure.message)
        return after

    async def _body(self, row: Row, binder: Binder) -> dict[str, Value] | Failure:
        """What is sent for a row; its local images are uploaded first."""
        try:
            uploads = await self._uploads.addresses(row.given)
        except errors.UsageError as error:
            return Failure(INPUT_IMAGE, str(error))
        return binder.body(row.given, uploads=uploads, seed_key=row.key)

    async def is_true_echo(self, row: Row, task: Task) -> bool:
        """Whether the row's own task shows what the row asked for, as far as it shows anything."""
        binder = await self._binder_of(row.tool)
        body = await self._body(row, binder)
        if isinstance(body, Failure):
            return True
        asked = replace(_lost_submit(row, body, binder), after_task=0, model_id=task.model_id)
        return compare(asked, task) is not Match.OTHER

    # --- a doubtful row ---------------------------------------------------------------------------------

    async def look_up(self, row: Row, slot: Slot) -> Row | None:
        """Find out what became of the row's submit; None when that cannot be known, or the run stops."""
        if row.state is State.SUBMITTING:  # its process is dead; its bytes may still be on their way
            reason = "the process ended while it was submitting"
            self._progress.announce(Fact.DOUBT, row, message=reason)
            return await self._store.record_doubt(row.seq, reason)
        slot.take_anyway()
        answer: Adopt | Absent | Hold | Failure
        with self._sign.wait() as waiting:
            binder = await self._binder_of(row.tool)
            body = await self._body(row, binder)
            answer = body if isinstance(body, Failure) else await self._settle(row, slot, body, binder)
        if waiting.cancelled_caught:
            return None
        match answer:
            case Adopt(task=task):
                self._progress.announce(Fact.ADOPTED, row, task=task.id)
                accepted = Accepted(task.id, task.token)
                return await self._store.record_accepted(row.seq, accepted, at=time.time(), adopted=True)
            case Absent():
                self._progress.announce(Fact.ABSENT, row)
                return await self._store.record_absent(row.seq)
        # the user's word is about doubts that were there when it was given
        if row.seq not in self._lost_at and self._give_up_doubt(row):
            return await self._store.give_up_doubt(row.seq)
        reason = answer.reason if isinstance(answer, Hold) else answer.message
        message = f"a submit may have reached the service: {reason}"
        await self._store.hold(row.seq, Failure("in doubt", message))
        self._progress.announce(Fact.HELD, row, message=reason)
        return None

    async def _settle(
        self, row: Row, slot: Slot, body: Mapping[str, Value], binder: Binder
    ) -> Adopt | Absent | Hold:
        """Look the submit up; its slot is held only while its task, if there is one, may be active."""

        async def give_in_time() -> None:
            usual_s = self._usual_time_s(row.tool)
            since = row.attempt.intent_at if row.attempt else time.time()
            age_s = max(0.0, time.time() - since)  # an earlier start may have sent it
            await anyio.sleep(max(0.0, (2 * usual_s if usual_s is not None else UNKNOWN_TIME_S) - age_s))
            slot.give()

        asked = _Asked(body)
        answer: Adopt | Absent | Hold | errors.CredentialsRefused
        async with anyio.create_task_group() as group:
            group.start_soon(give_in_time)
            try:
                answer = await self._doubts.settle(
                    _lost_submit(row, body, binder),
                    lost_at=self._lost_at.get(row.seq, anyio.current_time()),
                    busy=lambda: self._is_under_way(asked),
                )
            except errors.CredentialsRefused as error:
                answer = error  # raised below: here it would come out as a group
            group.cancel_scope.cancel()
        if isinstance(answer, errors.CredentialsRefused):
            raise answer
        return answer

    def _is_under_way(self, asked: _Asked) -> bool:
        """Whether a submit is under way that a listing might not tell from this one."""
        return any(other.print == asked.print for other in self._under_way.values())


def _lost_submit(row: Row, body: Mapping[str, Value], binder: Binder) -> LostSubmit:
    attempt = row.attempt
    return LostSubmit(
        body,
        [name for name in row.given if name in body],
        attempt.after_task if attempt else None,
        attempt.intent_server_at if attempt else None,
        row.tool,
        texts=binder.texts,
        images=binder.images,
    )


@dataclass(eq=False)
class _Asked:
    """What a submit asks for."""

    body: Mapping[str, Value]

    @cached_property  # only doubts ask for it
    def print(self) -> bytes:
        """The same for bodies that a listing might not tell apart."""
        values = {name: print_of_value(value) for name, value in self.body.items()}
        return sha256(dumps(values).encode("utf-8", "surrogatepass")).digest()
