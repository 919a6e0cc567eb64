"""Every exception batchrun raises, in one tree; the class answers "what happens next".

BatchrunError
├── UsageError              wrong arguments or settings               exit 2, nothing sent
│   ├── JobError            a job file is wrong
│   ├── PageError           a tool page cannot be read
│   └── ManifestError       rows cannot become requests (holds Problems)
├── ServiceError            talking to the service went wrong
│   ├── NotSent             the request certainly never arrived       retry
│   ├── ReplyLost           it may have arrived, the answer is lost    in doubt if it was a submit
│   ├── ServerFault         the service stumbled (5xx, HTML, code 0)   retry; in doubt if it was a submit,
│   │                                                                  unless it did not act
│   ├── ProtocolError       an answer we do not understand (kept raw)  retry; in doubt if it was a submit
│   ├── RateLimited         HTTP 429: wait                             wait, no attempt used
│   ├── LimitReached        code 96: all task slots are taken          wait, adopt the limit
│   ├── BalanceExhausted    code 97                                    stop submitting, keep saving
│   ├── CredentialsRefused  401, codes 98 and 99                       stop the run
│   ├── NotFound            code 1: no such tool or task               tool: its rows fail
│   └── RequestRejected     the parameters are refused                 the row fails
├── OutputError             an image could not be saved
│   ├── OutputCorrupt       truncated, wrong bytes, not an image       fetch again
│   ├── OutputGone          403, 404, 410 from the CDN                 refresh the address
│   └── DiskError           disk full, permission denied               stop the run
└── StoreError              the state cannot be used
    ├── StoreTooNew         written by a newer batchrun                refuse
    ├── StoreDamaged        the file is not a sound database           refuse, say what to do
    ├── FolderBusy          another runner holds the folder            refuse
    ├── FolderTaken         the folder belongs to another manifest     refuse
    └── LeaseLost           this process no longer owns the row        change nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.model import Problem


class BatchrunError(Exception):
    """The root of every error raised on purpose; its text is fit to be shown to a user."""


class UsageError(BatchrunError):
    """The arguments or settings are wrong; nothing was sent."""


class JobError(UsageError):
    """A job file is wrong; the text names file, place, fault and cure."""


class PageError(UsageError):
    """A tool page cannot be read; `position` is the character offset (from 0) where reading failed."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (at character {position})")
        self.position = position


class ManifestError(UsageError):
    """Rows cannot become requests; `problems` names each place, fault and cure."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        total: int | None = None,
        blocking: Sequence[Problem] = (),
        valid_rows: int = 0,
    ) -> None:
        super().__init__("\n".join(str(problem) for problem in problems[:50]))
        self.problems = tuple(problems)
        #: How many there are in all; more than `problems` where those are too many to keep.
        self.total = total or len(self.problems)
        #: Those of them that no skipping of rows can help.
        self.blocking = tuple(blocking)
        #: Rows that could be asked for if the others were skipped.
        self.valid_rows = valid_rows


class ServiceError(BatchrunError):
    """Talking to the service went wrong; `detail` keeps a short piece of what it said."""

    def __init__(self, message: str, *, status: int | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class NotSent(ServiceError):
    """The request certainly never reached the service."""


class ReplyLost(ServiceError):
    """The request may have reached the service; its answer is unknown."""


class ServerFault(ServiceError):
    """The service stumbled.

    `acted` is False when its answer proves that it did nothing (result false, code 0), True when it may have.
    `retry_after_s` is the wait it asked for, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        detail: str = "",
        acted: bool = True,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status=status, detail=detail)
        self.acted = acted
        self.retry_after_s = retry_after_s


class ProtocolError(ServiceError):
    """The service answered something we do not understand; `detail` keeps its beginning."""


class RateLimited(ServiceError):
    """HTTP 429: nobody's fault; `retry_after_s` is the wait asked for, None when none was named."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, status=429)
        self.retry_after_s = retry_after_s


class LimitReached(ServiceError):
    """Code 96: the account's task slots are taken; `limit` is the number in the message, if any."""

    def __init__(self, message: str, *, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class BalanceExhausted(ServiceError):
    """Code 97: the account has no money left."""


class CredentialsRefused(ServiceError):
    """The key or its signature is refused (HTTP 401, codes 98 and 99)."""


class NotFound(ServiceError):
    """Code 1: the tool or task is not known to the service."""


class RequestRejected(ServiceError):
    """The service refuses the parameters (code 0, validation); the text is its own."""


class OutputError(BatchrunError):
    """An image could not be saved."""


class OutputCorrupt(OutputError):
    """The bytes fetched are not the whole image; `reason` is one of the words of `outputs.verify` or `.save`.

    `sha256` (hex) is that of a complete fetch that is sound in itself but not what was declared, else None.
    """

    def __init__(self, message: str, *, reason: str = "structure", sha256: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.sha256 = sha256


class OutputGone(OutputError):
    """The CDN no longer gives the file; `status` is its HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class DiskError(OutputError):
    """The disk is full or may not be written."""


class StoreError(BatchrunError):
    """The state of the run cannot be used."""


class StoreTooNew(StoreError):
    """The state was written by a newer batchrun."""


class StoreDamaged(StoreError):
    """The state file is not a sound database."""


class FolderBusy(StoreError):
    """Another runner holds the folder."""


class FolderTaken(StoreError):
    """The folder belongs to another manifest."""


class LeaseLost(StoreError):
    """The row is no longer claimed by this process; nothing was changed."""
