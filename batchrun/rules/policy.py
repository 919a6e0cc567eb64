"""After a failure: what happens next, as a value with its reason. Pure; waits are computed, never waited.

Submits and reads are apart, because only a submit costs money: a lost answer to a read is asked again,
a lost answer to a submit is a doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from random import Random

from batchrun import errors
from batchrun.model import Failure, State, Task

#: How long a refusal of one row's submit (code 0, not its parameters) is tried again before the row fails.
REFUSAL_PATIENCE_S = 600.0
#: However long a trouble lasts, fewer tries than this prove nothing: the machine may have slept in between.
LEAST_TRIES = 4
#: Outputs may appear this long after a task succeeded.
OUTPUTS_PATIENCE_S = 30.0
#: Further ones, this long after the first: fewer than asked for is rare, and then final.
FEWER_PATIENCE_S = 6.0
#: task_error that persists this long without a further stage is a failure.
ERROR_PATIENCE_S = 120.0
#: A task the service does not know for this long is held for the user.
UNKNOWN_PATIENCE_S = 120.0
#: A wait that the service asks for is believed up to this long.
MAX_ASKED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Try this row again; no attempt is used up."""

    after_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Every submit waits: it is not this row's fault. `after_s` None: our own backoff."""

    reason: str
    after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WaitForSlot:
    """The account's task slots are taken; adopt `limit` when it is told."""

    limit: int | None


@dataclass(frozen=True, slots=True)
class Doubt:
    """The submit may have made a task: find out, never send again to be safe."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The row fails; `whole_tool` when every row of its tool would."""

    failure: Failure
    whole_tool: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """The run stops at once; all rows stay as they are."""

    reason: str


SubmitDecision = Retry | Pause | WaitForSlot | Doubt | Fail | Stop

#: Cause of rows whose local image cannot be given to the service.
INPUT_IMAGE = "input image"
UNREACHABLE = "the service cannot be reached"
RATE_LIMITED = "the service asks us to slow down"
BALANCE = "the balance is exhausted"


def after_submit(
    error: errors.ServiceError, *, refused_for_s: float, tries: int, rng: Random
) -> SubmitDecision:
    """What follows a failed submit; the server had trouble `tries` times in a row over `refused_for_s`."""
    match error:
        case errors.CredentialsRefused():
            return Stop(str(error))
        case errors.LimitReached():
            return WaitForSlot(error.limit)
        case errors.BalanceExhausted():
            return Pause(BALANCE)
        case errors.RateLimited():
            return Pause(RATE_LIMITED, error.retry_after_s)
        case errors.NotSent():
            return Pause(UNREACHABLE)
        case errors.NotFound():
            return Fail(Failure("tool not found", str(error)), whole_tool=True)
        case errors.RequestRejected():
            return Fail(Failure("rejected", str(error)))
        case errors.ServerFault() if not error.acted:
            if refused_for_s >= REFUSAL_PATIENCE_S and tries >= LEAST_TRIES:
                return Fail(Failure("service fault", str(error)))
            return Retry(backoff_s(tries, base_s=1.0, cap_s=60.0, rng=rng), str(error))
        case _:
            return Doubt(str(error))


def after_upload(error: errors.ServiceError, *, troubles: int, elapsed_s: float, rng: Random) -> Retry | Fail:
    """What follows a failed upload; it failed in this way `troubles` times (from 1) over `elapsed_s`.

    An upload costs nothing: it is repeated, but not for ever where the service refuses this very image.
    """
    own_s = 0.2 + backoff_s(troubles, base_s=1.0, cap_s=60.0, rng=rng)
    match error:
        case errors.RequestRejected() | errors.NotFound():
            return Fail(Failure(INPUT_IMAGE, str(error)))
        case errors.RateLimited() | errors.ServerFault() if error.retry_after_s is not None:
            return Retry(min(error.retry_after_s, MAX_ASKED_S), str(error))
        case errors.ServerFault() if error.acted and (error.status or 500) >= 500:
            return Retry(own_s, str(error))
        case errors.ServerFault() | errors.ProtocolError() if (
            elapsed_s >= REFUSAL_PATIENCE_S and troubles >= LEAST_TRIES
        ):
            return Fail(Failure(INPUT_IMAGE, str(error)))
        case _:
            return Retry(own_s, str(error))


class Troubles:
    """Failures of one endeavour by kind: an outage is no reason to give up a bad address sooner."""

    def __init__(self) -> None:
        self._met: dict[type[Exception], tuple[int, float]] = {}

    def add(self, error: Exception, *, now: float) -> tuple[int, float]:
        """How many failures of this kind there are with this one, and for how many seconds now."""
        count, since = self._met.get(type(error), (0, now))
        self._met[type(error)] = count + 1, since
        return count + 1, now - since


@dataclass(frozen=True, slots=True)
class Running:
    """Keep looking."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """Outputs are there to be saved."""


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The task failed or was cancelled at the service and was not billed."""

    failure: Failure
    #: The service has not closed it: it may go on, and is to be ended before another one is asked for.
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class PaidButEmpty:
    """The task succeeded and was billed but has nothing to show."""

    failure: Failure


Verdict = Running | Succeeded | TaskFailed | PaidButEmpty


def judge(task: Task, *, images: int = 1, in_status_for_s: float) -> Verdict:
    """What a task's stage means; `in_status_for_s` is how long we have seen it in this status.

    `images` were asked for: outputs may appear one by one.

    Sources: the tool documents ("Task Status Information": only task_postprocess_end and task_cancel are
    terminal) and the service's documentation of `pexit` (success is "0" and at least one output).
    """
    shown = sum(bool(output.url) for output in task.outputs)
    match task.status:
        case "task_postprocess_end":
            if task.pexit not in ("0", None):
                return TaskFailed(_task_failure(task))
            if shown >= images:
                return Succeeded()
            if in_status_for_s < (FEWER_PATIENCE_S if shown else OUTPUTS_PATIENCE_S):
                return Running()  # outputs may appear one look later
            if shown:
                return Succeeded()
            if task.cost_usd is None or task.cost_usd > 0:  # a bill that is not told is not none
                return PaidButEmpty(Failure("paid but empty", "the task was billed and has no images"))
            return TaskFailed(Failure("no images", "the task ended without images and was not billed"))
        case "task_cancel":
            return TaskFailed(Failure("cancelled at the service", "the task was cancelled at the service"))
        case "task_error" | "task_error_full":
            # a log line on its way, or the end of a task that never ran: time or its own facts tell
            confirmed = task.ended_at is not None or task.pexit not in ("0", None)
            if confirmed or in_status_for_s >= ERROR_PATIENCE_S:
                return TaskFailed(_task_failure(task), is_open=not confirmed)
            return Running()
        case _:
            return Running()


def _task_failure(task: Task) -> Failure:
    said = " ".join(task.debug_error.split())[-300:]
    return Failure(
        "task failed", f"the task failed (pexit {task.pexit or 'none'})" + (f": {said}" if said else "")
    )


def are_gone(*, missing_for_s: float, looks: int) -> bool:
    """Whether images that a task showed before are gone for good: not shown in so many looks in a row."""
    return missing_for_s >= OUTPUTS_PATIENCE_S and looks >= LEAST_TRIES


def charged(task: Task) -> Decimal | None:
    """What the task's end costs, in USD; None when not told.

    A failed or cancelled task is not charged, although it shows the cost it would have had.
    """
    if task.cost_usd is None:
        return None
    billed = task.status == "task_postprocess_end" and task.pexit in ("0", None)
    return task.cost_usd if billed else Decimal(0)


def may_try_again(attempts: int, *, limit: int) -> bool:
    """Whether another attempt is allowed after `attempts` (from 1) have failed."""
    return attempts < limit


def requeue_step(state: State, failure: Failure | None, *, regenerate_lost: bool) -> str:
    """What `retry` does with a row: `submit` it anew, `save` what was paid for, or `leave` it.

    A row whose images were paid for is bought again only when the user says so.
    """
    if state is State.CANCELLED:
        return "submit"
    if state is not State.FAILED or failure is None:
        return "leave"
    if failure.cause in LOST_CAUSES:
        return "submit" if regenerate_lost else "leave"
    return "save" if failure.cause in SAVING_CAUSES else "submit"


#: What was paid for is gone; only the user's word buys it again.
LOST_CAUSES = frozenset({"paid but empty", "images gone", "task unknown"})
#: The images exist at the service: a retry fetches them.
SAVING_CAUSES = frozenset({"download failed", "image damaged"})
#: Failures after the service was paid.
PAID_CAUSES = LOST_CAUSES | SAVING_CAUSES


def backoff_s(attempt: int, *, base_s: float, cap_s: float, rng: Random) -> float:
    """Full-jitter wait before retry number `attempt` (from 1), in [0, cap_s] seconds."""
    ceiling_s = min(cap_s, base_s * 2 ** min(attempt - 1, 32))
    return rng.uniform(0.0, ceiling_s)


# --- saving ------------------------------------------------------------------------------------------

#: A download is tried again for this long.
DOWNLOAD_PATIENCE_S = 600.0
#: An address that stays dead through fresh look-ups for this long is given up.
GONE_PATIENCE_S = 120.0
#: An image is given up as damaged after so many whole fetches of damaged bytes (or web pages) over so long: a
#: file that is damaged stays so, a CDN in trouble recovers.
MAX_DAMAGED, DAMAGED_PATIENCE_S = 5, 60.0


#: At first, and at most.
SILENCE_S = (5.0, 60.0)


@dataclass(frozen=True, slots=True)
class Refetch:
    """Fetch again; `refresh` asks the service for a new address first."""

    after_s: float
    refresh: bool = False
    #: These bytes came twice: they are what the service has.
    accept_sha256: str | None = None


def silence_s(lost: int) -> float:
    """How long a server that falls silent in the middle of an image is waited for, in seconds.

    Meanwhile it holds up others, and the rest can be asked for anew; a slow one gets more time after each of
    the `lost` answers.
    """
    return min(SILENCE_S[0] * 2.0 ** min(lost, 16), SILENCE_S[1])


def after_download(
    error: errors.BatchrunError, *, troubles: int, elapsed_s: float, rng: Random
) -> Refetch | Fail:
    """What follows a failed download; it failed in this way `troubles` times (from 1) over `elapsed_s`.

    Never a new task: what was paid for is fetched, or the row fails and says so.
    """
    wait_s = backoff_s(troubles, base_s=0.5, cap_s=30.0, rng=rng)
    match error:
        case errors.OutputGone():
            if elapsed_s >= GONE_PATIENCE_S and troubles >= LEAST_TRIES:
                return Fail(Failure("download failed", str(error)))
            return Refetch(wait_s if troubles > 1 else 0.0, refresh=True)
        case errors.OutputCorrupt(reason="declared-size" | "declared-type" | "etag") if (
            troubles < MAX_DAMAGED
        ):
            return Refetch(0.0, accept_sha256=error.sha256)
        case errors.OutputCorrupt():
            if troubles >= MAX_DAMAGED and elapsed_s >= DAMAGED_PATIENCE_S:
                return Fail(
                    Failure("image damaged", f"damaged each time it was fetched; the last time: {error}")
                )
            return Refetch(wait_s)
        case errors.NotSent() | errors.ReplyLost() | errors.ServerFault() | errors.ProtocolError():
            if elapsed_s >= DOWNLOAD_PATIENCE_S and troubles >= LEAST_TRIES:
                return Fail(Failure("download failed", str(error)))
            return Refetch(wait_s)
        case errors.RateLimited():
            return Refetch(max(wait_s, min(error.retry_after_s or 1.0, MAX_ASKED_S)))
        case _:
            return Fail(Failure("download failed", str(error)))
