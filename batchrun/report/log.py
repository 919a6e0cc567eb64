"""`--log FILE`: every event of a run as one line of JSON, for machines and for the morning after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchrun.errors import UsageError
from batchrun.progress import Event

#: Names of details that are never written, whoever announces them.
_SECRET = frozenset({"token", "key", "secret", "tasktoken", "socketaccesstoken"})


class Log:
    """A file that grows by a line per event, each whole and flushed. Several starts share one file."""

    def __init__(self, path: Path, *, secrets: Sequence[str] = ()) -> None:
        """Open the file to append; raises UsageError when that cannot be. `secrets` are blotted out."""
        try:
            self._file: TextIOWrapper | None = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log {path}: cannot be written: {error.strerror}") from error
        self._secrets = [secret for secret in secrets if secret]
        #: Why the log ended early (a full disk); the run goes on without it.
        self.fault: str | None = None

    def listen(self, event: Event) -> None:
        """Write an event."""
        if self._file is None:
            return
        try:
            self._file.write(self._line(event) + "\n")
            self._file.flush()
        except OSError as error:
            self.fault = error.strerror or str(error)
            with suppress(OSError):  # what it could not write it tries once more
                self._file.close()
            self._file = None

    def _line(self, event: Event) -> str:
        at = datetime.fromtimestamp(event.at, tz=UTC).isoformat(timespec="milliseconds")
        record: dict[str, Any] = {"at": at.replace("+00:00", "Z"), "fact": event.fact}
        record |= {"id": event.id, "line": event.line} if event.seq is not None else {}
        record |= {name: value for name, value in event.details.items() if name.lower() not in _SECRET}
        # ASCII: control and bidi characters of foreign texts are escaped, and no line ends early
        text = json.dumps(record, default=str)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
