"""Whether a run's state can be trusted: looked at before it is opened for work, without changing anything.

SQLite itself notices a file that is no database, and pages that are no pages, when it comes upon them. What
it cannot notice is a state that is sound and *older than what happened*: its write-ahead log was deleted, or
garbled so that the rest of it does not count, or an old copy was put back. Rows bought since would be bought
again. So three things are held against the state: the log's own frames, the lease of a process that did not
end in good order (which always leaves its log behind), and the tasks told of in results.jsonl.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from batchrun.errors import DiskError
from batchrun.store.connection import connect, damaged, store_error
from batchrun.store.folder import Folder
from batchrun.store.reading import known_tasks

#: The pages of the state are looked at for so long before anything else, and for so long while a run goes on:
#: a million rows would take half a minute.
PATIENCE_S = 0.05
FURTHER_S = 1.0
#: A larger state is only looked at while the run goes on: before 3.42 SQLite reads all pages of it before it
#: asks whether to go on.
LARGE_BYTES = 64 * 2**20
#: The end of results.jsonl that is held against the state, in bytes.
TAIL_BYTES = 64 * 1024
#: Frames of the log whose checksums are followed (80 MB); beyond that SQLite's own word counts.
MAX_FRAMES = 20_000
_FRAME_HEADER = 24
_WAL_HEADER = 32
_MAGIC = 0x377F0682


def check_sound(folder: Folder, *, patience_s: float | None = PATIENCE_S) -> None:
    """Raises StoreDamaged, saying what to do, when the state must not be worked on. Changes nothing.

    The caller holds the folder's lock. `patience_s` None: every page and every index is looked at.
    Raises DiskError when the disk does not let us look.
    """
    state = folder.state
    try:
        size_bytes = state.stat().st_size if state.exists() else 0
        if not size_bytes:
            if folder.has_results:
                raise damaged(state, "it is empty" if state.exists() else "it is missing")
            return
        log = state.with_name(f"{state.name}-wal")
        has_log = log.exists() and log.stat().st_size > 0
        if has_log:
            _check_log(state, log)
    except OSError as error:
        raise DiskError(f"the state cannot be read: {state}: {error.strerror}") from error
    try:
        with closing(connect(state, read_only=True)) as connection:
            if patience_s is None or size_bytes <= LARGE_BYTES:
                _check_pages(connection, state, patience_s)
            _check_age(connection, folder, has_log=has_log)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise (
            store_error(error, state)
            if isinstance(error, sqlite3.Error)
            else damaged(state, "it holds texts that are none")
        ) from error


def check_further(folder: Folder) -> None:
    """Look at the pages of a state that is in use for FURTHER_S; raises StoreDamaged when some are none."""
    try:
        with closing(connect(folder.state, read_only=True)) as connection:
            _check_pages(connection, folder.state, FURTHER_S)
    except sqlite3.Error as error:
        raise store_error(error, folder.state) from error


def _check_pages(connection: sqlite3.Connection, state: Path, patience_s: float | None) -> None:
    question = "PRAGMA integrity_check(1)" if patience_s is None else "PRAGMA quick_check(1)"
    if patience_s is not None:
        until = time.monotonic() + patience_s
        connection.set_progress_handler(lambda: time.monotonic() > until, 20_000)
    try:
        answer = str(connection.execute(question).fetchone()[0])
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        answer = "ok"  # as far as it was looked at
    finally:
        connection.set_progress_handler(None, 0)
    if answer != "ok":
        raise damaged(state, " ".join(answer.split())[:200])


def _check_age(connection: sqlite3.Connection, folder: Folder, *, has_log: bool) -> None:
    """The state must know at least what the folder shows to have happened."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    is_run = "run" in tables and connection.execute("SELECT 1 FROM run").fetchone() is not None
    if not is_run and folder.has_results:
        raise damaged(folder.state, "it knows nothing of the run whose results are here")
    if not has_log and "leases" in tables:
        query = "SELECT 1 FROM leases WHERE ended_at IS NULL"
        if connection.execute(query).fetchone() is not None:
            raise damaged(folder.state, f"what was written last is missing: {folder.state.name}-wal is gone")
    told = list(_last_tasks(folder.results)) if is_run else []
    for start in range(0, len(told), 500):
        some = told[start : start + 500]
        if len(known_tasks(connection, some)) < len(set(some)):
            raise damaged(folder.state, f"it is older than {folder.results.name}")


def _last_tasks(results: Path) -> Iterator[str]:
    """Tasks that the last whole lines of results.jsonl tell of."""
    if not results.is_file():
        return
    with results.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    for line in lines[1 if size > TAIL_BYTES else 0 : -1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        ids = record.get("task_ids") if isinstance(record, dict) else None
        yield from (id_ for id_ in ids if isinstance(id_, str)) if isinstance(ids, list) else ()


# --- the write-ahead log (format: sqlite.org/fileformat2.html, section 4) --------------------------------


def _check_log(state: Path, log: Path) -> None:
    """Raises StoreDamaged when the log holds commits that SQLite would not take.

    A power cut tears the last commit, which nobody was told of; it never leaves two commits behind a bad
    frame, since each is synced before the next is written.
    """
    with log.open("rb") as file:
        header = file.read(_WAL_HEADER)
        magic, _, page_bytes, _, salt1, salt2, sum1, sum2 = struct.unpack(">8I", header.ljust(32, b"\0"))
        order = ">" if magic & 1 else "<"
        sums = _checksum(order, header[:24], (0, 0)) if len(header) == _WAL_HEADER else (0, 0)
        is_sound = magic & ~1 == _MAGIC and sums == (sum1, sum2)
        if not is_sound:
            if _holds_news(state, log):
                raise damaged(state, f"{log.name} is garbled at its beginning")
            return
        salts = (salt1, salt2)
        taken, broken, lost = 0, False, 0
        while len(frame := file.read(_FRAME_HEADER + page_bytes)) == _FRAME_HEADER + page_bytes:
            _, commit, one, two, *told = struct.unpack(">6I", frame[:_FRAME_HEADER])
            if not broken:
                sums = _checksum(order, frame[:8] + frame[_FRAME_HEADER:], sums)
                broken = (one, two) != salts or sums != tuple(told)
                taken += not broken
                if taken >= MAX_FRAMES:
                    return
            if broken and (one, two) == salts and commit:
                lost += 1
    if lost >= 2:
        raise damaged(state, f"{log.name} is garbled: commits behind the place cannot be read")


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for first, second in zip(words[::2], words[1::2], strict=True):
        one = (one + first + two) & 0xFFFFFFFF
        two = (two + second + one) & 0xFFFFFFFF
    return one, two


def _holds_news(state: Path, log: Path) -> bool:
    """Whether a log without a sound header holds pages that are not in the database as they are.

    A log that was taken over entirely is begun anew from its header: that one may be torn.
    """
    with state.open("rb") as database, log.open("rb") as file:
        head = database.read(18)
        page_bytes = int.from_bytes(head[16:18]) if len(head) == 18 else 0
        page_bytes = 65536 if page_bytes == 1 else page_bytes
        if page_bytes < 512:
            return False  # SQLite will say so
        frames: list[tuple[bytes, int, int]] = []
        at = _WAL_HEADER
        while len(header := file.read(_FRAME_HEADER)) == _FRAME_HEADER:
            frames.append((header[8:16], int.from_bytes(header[:4]), at + _FRAME_HEADER))
            at += _FRAME_HEADER + page_bytes
            file.seek(at)
        # frames of one log share their salts; one that was garbled has its own
        [(salts, _)] = Counter(salts for salts, _, _ in frames).most_common(1) or [(b"", 0)]
        newest = {page: place for each, page, place in frames if each == salts and page}
        for page, place in newest.items():
            file.seek(place)
            database.seek((page - 1) * page_bytes)
            if database.read(page_bytes) != file.read(page_bytes):
                return True
    return False
