"""What follows a failure: for submits, for tasks, for downloads, for a retry by the user's word."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from random import Random

import pytest

from batchrun import errors
from batchrun.model import Failure, RemoteOutput, State, Task
from batchrun.rules.policy import (
    BALANCE,
    DAMAGED_PATIENCE_S,
    DOWNLOAD_PATIENCE_S,
    ERROR_PATIENCE_S,
    GONE_PATIENCE_S,
    INPUT_IMAGE,
    LEAST_TRIES,
    MAX_ASKED_S,
    MAX_DAMAGED,
    OUTPUTS_PATIENCE_S,
    RATE_LIMITED,
    REFUSAL_PATIENCE_S,
    UNREACHABLE,
    Doubt,
    Fail,
    PaidButEmpty,
    Pause,
    Refetch,
    Retry,
    Running,
    Stop,
    SubmitDecision,
    Succeeded,
    TaskFailed,
    Troubles,
    WaitForSlot,
    after_download,
    after_submit,
    after_upload,
    are_gone,
    backoff_s,
    charged,
    judge,
    may_try_again,
    requeue_step,
    silence_s,
)

# --- a submit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        # a key that is refused is refused for every row
        (errors.CredentialsRefused("bad key"), Stop("bad key")),
        # code 96, with and without a number: wait
        (errors.LimitReached("full", limit=5), WaitForSlot(5)),
        (errors.LimitReached("full"), WaitForSlot(None)),
        # code 97: nobody submits
        (errors.BalanceExhausted("no money"), Pause(BALANCE)),
        # 429, with and without Retry-After
        (errors.RateLimited("slow down", retry_after_s=7.0), Pause(RATE_LIMITED, 7.0)),
        (errors.RateLimited("slow down"), Pause(RATE_LIMITED, None)),
        # certainly not sent: no doubt, but perhaps an outage
        (errors.NotSent("refused"), Pause(UNREACHABLE)),
        # code 1: every row of the tool
        (errors.NotFound("no tool"), Fail(Failure("tool not found", "no tool"), whole_tool=True)),
        # the service's words are the row's
        (errors.RequestRejected("[x] required"), Fail(Failure("rejected", "[x] required"))),
        # everything after which a task may exist
        (errors.ReplyLost("reset"), Doubt("reset")),
        (errors.ProtocolError("nonsense"), Doubt("nonsense")),
        (errors.ServerFault("502"), Doubt("502")),
        (errors.ServiceError("never heard of"), Doubt("never heard of")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_after_a_failed_submit(error: errors.ServiceError, decision: SubmitDecision) -> None:
    assert after_submit(error, refused_for_s=0.0, tries=1, rng=Random(0)) == decision


def test_a_server_that_says_it_did_nothing_is_asked_again_for_ten_minutes() -> None:
    error = errors.ServerFault("try later", acted=False)
    for tries, refused_for_s in ((1, 0.0), (5, 100.0), (10**9, REFUSAL_PATIENCE_S - 0.1)):
        decision = after_submit(error, refused_for_s=refused_for_s, tries=tries, rng=Random(tries))
        assert isinstance(decision, Retry)
        assert 0 <= decision.after_s <= 60
    decision = after_submit(error, refused_for_s=REFUSAL_PATIENCE_S, tries=20, rng=Random(0))
    assert decision == Fail(Failure("service fault", "try later"))


# --- an upload ----------------------------------------------------------------------------------------


def _refused(error: errors.ServiceError) -> Fail:
    return Fail(Failure(INPUT_IMAGE, str(error)))


@pytest.mark.parametrize(
    ("error", "at_first", "at_last"),
    [
        # the service does not take this image
        (errors.RequestRejected("too large"), _refused, _refused),
        (errors.NotFound("no such thing"), _refused, _refused),
        # it asks for a wait, within reason
        (errors.RateLimited("slow", retry_after_s=90.0), 90.0, 90.0),
        (errors.ServerFault("503", status=503, retry_after_s=10.0**9), MAX_ASKED_S, MAX_ASKED_S),
        # an outage has nothing to do with the image, however long it lasts
        (errors.NotSent("refused"), Retry, Retry),
        (errors.ReplyLost("reset"), Retry, Retry),
        (errors.RateLimited("slow"), Retry, Retry),
        (errors.ServerFault("502", status=502), Retry, Retry),
        (errors.ServerFault("a fault"), Retry, Retry),
        # said about this image again and again, it is the image's
        (errors.ServerFault("cannot", status=200, acted=False), Retry, _refused),
        (errors.ServerFault("413", status=413), Retry, _refused),
        (errors.ProtocolError("nonsense"), Retry, _refused),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_after_a_failed_upload(error: errors.ServiceError, at_first: object, at_last: object) -> None:
    soon = ((1, 0.0), (2, REFUSAL_PATIENCE_S), (50, REFUSAL_PATIENCE_S - 1))
    for expected, met in (at_first, soon), (at_last, [(LEAST_TRIES, REFUSAL_PATIENCE_S)]):
        for troubles, elapsed_s in met:
            decision = after_upload(error, troubles=troubles, elapsed_s=elapsed_s, rng=Random(0))
            if expected is _refused:
                assert decision == _refused(error)
            elif expected is Retry:
                assert isinstance(decision, Retry)
                assert 0.2 <= decision.after_s <= 60.2
            else:
                assert decision == Retry(expected, str(error))  # type: ignore[arg-type]


def test_failures_of_different_kinds_are_counted_apart_each_from_its_own_beginning() -> None:
    met = Troubles()
    assert met.add(errors.NotSent("down"), now=100.0) == (1, 0.0)
    assert met.add(errors.ProtocolError("odd"), now=130.0) == (1, 0.0)
    assert met.add(errors.NotSent("down"), now=150.0) == (2, 50.0)
    assert met.add(errors.ProtocolError("odd"), now=190.0) == (2, 60.0)


# --- a task -------------------------------------------------------------------------------------------

IMAGE = RemoteOutput("0.png", "https://cdn/0.png")
TEXT = RemoteOutput("log", None, content_type="raw")
ENDED = Task("1", status="task_postprocess_end")


@pytest.mark.parametrize(
    ("task", "in_status_for_s", "verdict"),
    [
        # on its way
        (Task("1", status="task_queue"), 0.0, Running),
        (Task("1", status="task_output_full", outputs=(IMAGE,), pexit="0"), 0.0, Running),
        # ended, but the outputs are not uploaded yet
        (Task("1", status="task_end", pexit="0"), 0.0, Running),
        # a name nobody knows
        (Task("1", status="task_teleported"), 10**6, Running),
        (Task("1"), 10**6, Running),
        # success
        (replace(ENDED, pexit="0", outputs=(IMAGE,)), 0.0, Succeeded),
        # the seeds leave pexit out now and then
        (replace(ENDED, outputs=(IMAGE,)), 0.0, Succeeded),
        (replace(ENDED, pexit="0", outputs=(TEXT, IMAGE)), 0.0, Succeeded),
        # failed, whatever it left behind
        (replace(ENDED, pexit="1", outputs=(IMAGE,)), 0.0, TaskFailed),
        (replace(ENDED, pexit="137"), 0.0, TaskFailed),
        # outputs may come a look later
        (replace(ENDED, pexit="0"), OUTPUTS_PATIENCE_S - 1, Running),
        (replace(ENDED, pexit="0", outputs=(TEXT,), cost_usd=Decimal(1)), 0.0, Running),
        # they never came, and it was paid for
        (replace(ENDED, pexit="0", cost_usd=Decimal("0.004")), OUTPUTS_PATIENCE_S, PaidButEmpty),
        (replace(ENDED, cost_usd=Decimal("0.004"), outputs=(TEXT,)), OUTPUTS_PATIENCE_S, PaidButEmpty),
        # or it was not
        (replace(ENDED, pexit="0", cost_usd=Decimal(0)), OUTPUTS_PATIENCE_S, TaskFailed),
        (ENDED, OUTPUTS_PATIENCE_S, PaidButEmpty),  # a bill that is not told is not none
        # cancelled at the service
        (Task("1", status="task_cancel"), 0.0, TaskFailed),
        # task_error is a log line until time or the task's own facts confirm it
        (Task("1", status="task_error"), 0.0, Running),
        (Task("1", status="task_error", debug_error="warning: slow"), ERROR_PATIENCE_S - 1, Running),
        (Task("1", status="task_error", pexit="0"), 0.0, Running),
        (Task("1", status="task_error"), ERROR_PATIENCE_S, TaskFailed),
        (Task("1", status="task_error_full", ended_at=1), 0.0, TaskFailed),
        (Task("1", status="task_error", pexit="1"), 0.0, TaskFailed),
    ],
)
def test_what_a_task_s_stage_means(task: Task, in_status_for_s: float, verdict: type) -> None:
    assert type(judge(task, in_status_for_s=in_status_for_s)) is verdict


def test_a_failed_task_s_own_words_are_told_in_short() -> None:
    task = replace(ENDED, pexit="1", debug_error="line\n" * 200 + "out of\tmemory")
    verdict = judge(task, in_status_for_s=0)
    assert isinstance(verdict, TaskFailed)
    assert verdict.failure.message.endswith("line out of memory")
    assert len(verdict.failure.message) < 400


@pytest.mark.parametrize(
    ("task", "cost_usd"),
    [
        # success, with and without pexit
        (replace(ENDED, pexit="0", cost_usd=Decimal("0.0035")), Decimal("0.0035")),
        (replace(ENDED, cost_usd=Decimal("0.0035")), Decimal("0.0035")),
        # not told
        (replace(ENDED, pexit="0"), None),
        # failed and cancelled ones show what they would have cost
        (replace(ENDED, pexit="1", cost_usd=Decimal("0.0035")), Decimal(0)),
        (Task("1", status="task_cancel", cost_usd=Decimal("0.0035")), Decimal(0)),
        # a task that died before it ran
        (Task("1", status="task_error", cost_usd=Decimal("0.0035")), Decimal(0)),
        (Task("1", status="task_error_full", pexit="0", cost_usd=Decimal("0.0035")), Decimal(0)),
    ],
)
def test_only_a_task_that_ended_well_is_charged(task: Task, cost_usd: Decimal | None) -> None:
    assert charged(task) == cost_usd


@pytest.mark.parametrize(
    ("attempts", "limit", "may"), [(1, 3, True), (2, 3, True), (3, 3, False), (1, 1, False)]
)
def test_attempts_are_limited(attempts: int, limit: int, may: bool) -> None:
    assert may_try_again(attempts, limit=limit) is may


# --- a retry by the user's word -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "cause", "step", "with_regenerate"),
    [
        # bought anew: nothing was paid for
        (State.FAILED, "rejected", "submit", "submit"),
        (State.FAILED, "task failed", "submit", "submit"),
        (State.FAILED, "a cause nobody knows", "submit", "submit"),
        (State.CANCELLED, "cancelled", "submit", "submit"),
        # the images are at the service: fetched
        (State.FAILED, "download failed", "save", "save"),
        (State.FAILED, "image damaged", "save", "save"),
        # what was paid for is gone: only by the user's word
        (State.FAILED, "paid but empty", "leave", "submit"),
        (State.FAILED, "images gone", "leave", "submit"),
        (State.FAILED, "task unknown", "leave", "submit"),
        # these do not ask for anything
        (State.DONE, None, "leave", "leave"),
        (State.IN_FLIGHT, None, "leave", "leave"),
        (State.INVALID, "invalid row", "leave", "leave"),
        # a doubt is looked up, not requeued
        (State.IN_DOUBT, "in doubt", "leave", "leave"),
    ],
)
def test_what_retry_does_with_a_row(state: State, cause: str | None, step: str, with_regenerate: str) -> None:
    failure = Failure(cause, "") if cause else None
    assert requeue_step(state, failure, regenerate_lost=False) == step
    assert requeue_step(state, failure, regenerate_lost=True) == with_regenerate


# --- a download ---------------------------------------------------------------------------------------


def _corrupt(reason: str) -> errors.OutputCorrupt:
    return errors.OutputCorrupt("wrong", reason=reason, sha256="ab")


@pytest.mark.parametrize(
    ("error", "troubles", "elapsed_s", "expected"),
    [
        # a dead address: ask for a fresh one, at once the first time
        (errors.OutputGone("404", status=404), 1, 0.0, Refetch(0.0, refresh=True)),
        # sound bytes that are not what was declared: fetched once more to see whether they come again
        (_corrupt("declared-size"), 1, 0.0, Refetch(0.0, accept_sha256="ab")),
        (_corrupt("declared-type"), 1, 0.0, Refetch(0.0, accept_sha256="ab")),
        (_corrupt("etag"), MAX_DAMAGED - 1, 0.0, Refetch(0.0, accept_sha256="ab")),
        # never the same twice
        (
            _corrupt("etag"),
            MAX_DAMAGED,
            DAMAGED_PATIENCE_S,
            Fail(Failure("image damaged", "damaged each time it was fetched; the last time: wrong")),
        ),
        (
            _corrupt("structure"),
            MAX_DAMAGED,
            DAMAGED_PATIENCE_S,
            Fail(Failure("image damaged", "damaged each time it was fetched; the last time: wrong")),
        ),
        # patience has an end, and what was paid for can still be fetched by retry
        (errors.OutputGone("403", status=403), 9, GONE_PATIENCE_S, Fail(Failure("download failed", "403"))),
        (errors.NotSent("down"), 9, DOWNLOAD_PATIENCE_S, Fail(Failure("download failed", "down"))),
        (errors.ReplyLost("reset"), 9, DOWNLOAD_PATIENCE_S, Fail(Failure("download failed", "reset"))),
        (errors.ServerFault("502"), 9, DOWNLOAD_PATIENCE_S, Fail(Failure("download failed", "502"))),
    ],
)
def test_after_a_failed_download(
    error: errors.BatchrunError, troubles: int, elapsed_s: float, expected: Refetch | Fail
) -> None:
    assert after_download(error, troubles=troubles, elapsed_s=elapsed_s, rng=Random(0)) == expected


@pytest.mark.parametrize(
    "error",
    [
        errors.NotSent("down"),
        errors.ReplyLost("reset"),
        errors.ServerFault("502"),
        errors.ProtocolError("nonsense"),
        _corrupt("structure"),
        errors.OutputGone("404", status=404),
    ],
    ids=lambda error: type(error).__name__,
)
def test_trouble_with_a_download_is_waited_out(error: errors.BatchrunError) -> None:
    decision = after_download(error, troubles=2, elapsed_s=10.0, rng=Random(0))
    assert isinstance(decision, Refetch)
    assert 0 <= decision.after_s <= 30


def test_a_cdn_that_serves_web_pages_for_a_while_makes_no_damaged_images() -> None:
    error = errors.OutputCorrupt("the file is not an image but a web page", reason="html")
    decision = after_download(error, troubles=50, elapsed_s=DAMAGED_PATIENCE_S - 1, rng=Random(0))
    assert isinstance(decision, Refetch)
    assert 0 <= decision.after_s <= 30


def test_a_server_that_falls_silent_is_given_more_time_after_each_lost_answer_up_to_a_minute() -> None:
    waits = [silence_s(lost) for lost in range(2000)]
    assert waits[0] == 5.0
    assert waits == sorted(waits)
    assert set(waits[6:]) == {60.0}
    assert all(later == min(60.0, 2 * sooner) for sooner, later in pairwise(waits))


def test_a_server_that_asks_to_wait_is_waited_for_however_long_it_has_been() -> None:
    error = errors.RateLimited("slow", retry_after_s=90.0)
    decision = after_download(error, troubles=50, elapsed_s=10**6, rng=Random(0))
    assert isinstance(decision, Refetch)
    assert decision.after_s >= 90.0


@pytest.mark.parametrize(
    ("missing_for_s", "looks", "gone"),
    [
        (OUTPUTS_PATIENCE_S, LEAST_TRIES, True),
        (OUTPUTS_PATIENCE_S - 1, 10**6, False),
        (10.0**6, LEAST_TRIES - 1, False),
    ],
)
def test_images_are_gone_once_enough_looks_over_some_time_do_not_show_them(
    missing_for_s: float, looks: int, gone: bool
) -> None:
    assert are_gone(missing_for_s=missing_for_s, looks=looks) is gone


def test_backoff_grows_to_its_cap_and_keeps_its_jitter() -> None:
    rng = Random(0)
    waits = [
        [backoff_s(attempt, base_s=1.0, cap_s=60.0, rng=rng) for _ in range(200)] for attempt in range(1, 12)
    ]
    assert max(waits[0]) <= 1.0 < max(waits[1]) <= 2.0 < max(waits[4])
    assert max(waits[-1]) <= 60.0
    assert len(set(waits[-1])) > 100
