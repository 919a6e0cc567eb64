"""What outlives a simulator: its tasks and uploads, as JSON lines in a file that the next one goes on with.

The first line tells when the clock of all instants read 0. Every further line is a fact, written in one
piece when it comes about and before anybody is told of it, so that a kill loses nothing that was answered: a
task, what has changed of one, or an upload, whose content lies beside in the folder FILE.uploads, named by
its hash. Ends and bills are not written: a task's schedule goes on while no simulator runs, and they follow
from it. What a kill has torn off at the end is cut away by the next start. Nothing is synced to disk: a
power cut may take the last lines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchrun.errors import UsageError
from batchrun.model import Tool
from batchrun.simulator.cdn import Upload
from batchrun.simulator.tasks import SimTask, fingerprint

#: How every memory begins; the number is that of the format.
_MARK = b'{"simulator": 1, '
#: What is fixed when a task is made, beside its tool ...
# fmt: off
_MADE = (
    "token", "parameters", "images", "width_px", "height_px", "duration_s", "fault", "made_at",
    "callback_url", "duplicates",
)
# fmt: on
#: ... and what may change of it.
_CHANGING = ("started_at", "stopped_at", "gone")


class Memory:
    """The file, held by one simulator at a time."""

    #: The wall time (unix seconds) at which the clock of all instants read 0.
    epoch: float
    #: What tokens and addresses are derived from.
    salt: str
    #: Tasks of earlier simulators, oldest first, as `Ledger.restore` takes them.
    tasks: list[SimTask]

    def __init__(self, path: Path, *, epoch: float, salt: str, tool: Callable[[str], Tool | None]) -> None:
        """Read the file, or begin it with `epoch` and `salt`; `tool` finds a tool by "owner/name".

        Raises UsageError where it cannot be had, is in use by another simulator, or is no memory.
        """
        self._path = path
        self._folder = path.with_name(f"{path.name}.uploads")
        self._uploads: list[Upload] = []
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise UsageError(f"memory {path} cannot be opened: {error.strerror}") from error
        try:
            # Released by the system when the process ends, however it does.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts = self._read()
            if not facts:
                facts = [{"simulator": 1, "epoch": epoch, "salt": salt}]
                self._write(facts[0])
            self._understand(facts, tool)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"memory {path} is in use by another simulator") from None
        except OSError as error:
            self._file.close()
            raise UsageError(f"memory {path} cannot be used: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise
        self._known = {task.id for task in self.tasks}

    def note(self, task: SimTask) -> None:
        """Write down a task that is new, or what may have changed of it."""
        facts = {"id": task.id, **{name: getattr(task, name) for name in _CHANGING}}
        if task.id not in self._known:
            made = {name: getattr(task, name) for name in _MADE}
            facts = {"tool": task.tool.run_path, **made, **facts}
        self._write({"task": facts})
        self._known.add(task.id)

    def note_sizes(self, task: SimTask) -> None:
        """Write down the sizes of a task's images, which would otherwise be drawn again to be listed."""
        self._write({"task": {"id": task.id, "sizes_bytes": task.sizes_bytes}})

    def keep(self, upload: Upload, content: bytes) -> None:
        """Write down an uploaded file and its content."""
        self._folder.mkdir(exist_ok=True)
        kept = self._folder / upload.sha256
        if not kept.exists():
            partial = kept.with_suffix(".part")
            partial.write_bytes(content)
            partial.replace(kept)
        self._write({"upload": asdict(upload)})

    def uploads(self) -> Iterator[tuple[Upload, bytes]]:
        """Files that earlier simulators were given, oldest first, with content; those deleted are not."""
        for upload in self._uploads:
            kept = self._folder / upload.sha256
            if kept.is_file():
                yield upload, kept.read_bytes()

    def close(self) -> None:
        """Let another simulator have the file."""
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        text = self._file.readall()
        if not text.startswith(_MARK[: len(text)]):
            raise UsageError(f"{self._path} is no memory of a simulator: choose another file")
        whole, newline, torn = text.rpartition(b"\n")
        if torn:
            self._file.truncate(len(text) - len(torn))
        try:
            return [json.loads(line) for line in whole.split(b"\n")] if newline else []
        except ValueError as error:
            raise self._damaged() from error

    def _understand(self, facts: list[dict[str, Any]], tool: Callable[[str], Tool | None]) -> None:
        tasks: dict[int, dict[str, Any]] = {}
        try:
            self.epoch, self.salt = float(facts[0]["epoch"]), str(facts[0]["salt"])
            for fact in facts[1:]:
                if "task" in fact:
                    tasks.setdefault(fact["task"]["id"], {}).update(fact["task"])
                else:
                    self._uploads.append(Upload(**fact["upload"]))
            self.tasks = [_task(known, tool) for known in tasks.values()]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error

    def _damaged(self) -> UsageError:
        return UsageError(f"memory {self._path} is damaged: delete it, and its tasks are forgotten")

    def _write(self, fact: dict[str, Any]) -> None:
        line = json.dumps(fact).encode() + b"\n"
        written = self._file.write(line)
        if written < len(line):
            # The disk is full; the next line must not be joined to half of this one.
            self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _task(known: dict[str, Any], tool: Callable[[str], Tool | None]) -> SimTask:
    path = known["tool"]
    # A tool that the catalog has lost goes on by its name alone.
    made_with = tool(path.removeprefix("/Run/")) or Tool(path.rpartition("/")[2], path, path, "", (), ())
    sizes_bytes = known.get("sizes_bytes")
    return SimTask(
        **{
            **known,
            "tool": made_with,
            "fingerprint": fingerprint(made_with, known["parameters"]),
            "sizes_bytes": None if sizes_bytes is None else tuple(sizes_bytes),
        }
    )
