"""The files beside the images: `images/metadata.jsonl`, a line per image; `results.jsonl`, a line per row.

They are views of the store, written for people and for dataset loaders; nothing is ever read back from them.
Records are plain dicts made by `metadata_record` and `results_record`; `JsonLines` appends them in whole
lines and cuts what a crash left over; `Kinds` sees to one JSON type per key.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_DOWN, Decimal, localcontext
from pathlib import Path
from typing import Any

from batchrun.model import Attempt, LocalImage, Output, Row, Value
from batchrun.outputs.disk import disk_errors, sync_folder

Record = dict[str, Any]

# --- records -------------------------------------------------------------------------------------------

#: Where `file_name` starts: the ImageFolder convention wants it relative to the file it stands in.
_IMAGES = "images/"
_COST_DIGITS = 12


def metadata_record(
    row: Row,
    output: Output,
    *,
    tool: str,
    parameters: Mapping[str, Value | LocalImage],
    seconds: Decimal | None,
) -> Record:
    """The metadata line of a saved output, keys in the order in which they are written.

    `tool` is the slug, `parameters` the whole set as sent (a LocalImage stands as its path in the manifest),
    `seconds` how long the tool worked on the task. `cost_usd` is this image's share of the task's cost: see
    `shares`. Keys of `extra` and `parameters` are as given; one type per key is the work of `Kinds`.
    """
    if output.path is None:
        raise ValueError("the output is not saved yet")
    attempt = row.attempt
    prompt = parameters.get("prompt")
    return {
        "file_name": output.path.removeprefix(_IMAGES),
        "id": row.id,
        "index": output.index,
        "tool": tool,
        "prompt": prompt if isinstance(prompt, str) else None,
        "parameters": {name: _plain(value) for name, value in parameters.items()},
        "extra": dict(row.extra),
        "task_id": attempt.task_id if attempt else None,
        "sha256": output.sha256,
        "bytes": output.size_bytes,
        "width": output.width_px,
        "height": output.height_px,
        "cost_usd": _share_of(row, output),
        "seconds": None if seconds is None else float(seconds),
    }


def results_record(row: Row, attempts: Sequence[Attempt]) -> Record:
    """The result line of a row with all its attempts, oldest first.

    `images` are the paths of its saved images relative to the run folder; `cost_usd` is what all its attempts
    cost together, null when none told its cost. `cause` (a short word for the error), `row` (its number in
    the run) and `key` (the hash of what it asks for; without an id with its number among rows that ask for
    the same) are what a repair of the state needs to know the row again.
    """
    costs = [attempt.cost_usd for attempt in attempts if attempt.cost_usd is not None]
    return {
        "id": row.id,
        "line": row.line,
        "status": row.state.value,
        "error": row.failure.message if row.failure else None,
        "attempts": row.attempts,
        "task_ids": [attempt.task_id for attempt in attempts if attempt.task_id is not None],
        "images": [output.path for output in row.outputs if output.path is not None],
        "cost_usd": format(_sum(costs), "f") if costs else None,
        "cause": row.failure.cause if row.failure else None,
        "row": row.seq,
        "key": row.content if row.id is not None else row.key,
    }


def shares(cost_usd: Decimal, images: int) -> list[Decimal]:
    """A task's cost divided among its images, to 12 digits after the point or as many as the cost has.

    The shares add up to the cost to the last digit: the first image carries what does not divide.
    """
    with localcontext(prec=100):
        exponent = cost_usd.as_tuple().exponent
        digits = max(_COST_DIGITS, -exponent if isinstance(exponent, int) else 0)
        share = (cost_usd / images).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_DOWN)
        return [cost_usd - share * (images - 1), *[share] * (images - 1)]


def _share_of(row: Row, output: Output) -> str | None:
    cost_usd = row.attempt.cost_usd if row.attempt else None
    if cost_usd is None:
        return None
    # An output without an address is text, no image.
    images = [other.index for other in row.outputs if other.url is not None or other.path is not None]
    return format(shares(cost_usd, len(images))[images.index(output.index)], "f")


def _sum(costs: Iterable[Decimal]) -> Decimal:
    with localcontext(prec=100):
        return sum(costs, Decimal(0))


def _plain(value: Value | LocalImage) -> Value:
    return value.path if isinstance(value, LocalImage) else value


# --- one JSON type per key -------------------------------------------------------------------------------

#: What a value is: one of the words below, [kind of its items], or {key: kind}.
Kind = Any
_NULL, _TEXT, _NUMBER, _FLAG = "null", "text", "number", "flag"
#: Signed 64 bits: what Arrow and most loaders can hold.
_MAX_INTEGER = 2**63 - 1


class Kinds:
    """What each key of `parameters` and `extra` holds over a whole file, learned from its records.

    Loaders (Arrow, pandas, Hugging Face datasets) want one JSON type per key. Tools disagree (a seed is a
    number for one and text for another), and so may a manifest's own columns. So a key keeps its natural type
    as long as all records agree, and is text everywhere once two do not. Where values disagree inside a list
    or an object, the whole of it is written as JSON text. Nulls are left out: a missing key means the same,
    and Arrow (seen in 26.0) cannot read a key that is null at first and an object a megabyte later.
    """

    def __init__(self, known: Mapping[str, Mapping[str, Kind]] | None = None) -> None:
        self._known: dict[str, dict[str, Kind]] = {
            part: dict((known or {}).get(part, {})) for part in ("parameters", "extra")
        }

    def to_json(self) -> dict[str, dict[str, Kind]]:
        """What is known, as `Kinds` takes it for the same file in the next process."""
        return self._known

    def learn(self, records: Iterable[Record]) -> bool:
        """Takes note of records to come; True when lines already written are now of the wrong type.

        The file then has to be rewritten with all its records, fitted anew.
        """
        turned_to_text = False
        had_lines, had_extra = bool(self._known["parameters"]), self._has_extra
        for record in records:
            for part, known in self._known.items():
                for name, value in record[part].items():
                    before = known.get(name, _NULL)
                    if before == _TEXT:
                        continue
                    try:
                        known[name] = _merge(before, _kind(value))
                    except _DisagreeError:
                        known[name] = _TEXT
                        turned_to_text = turned_to_text or before != _NULL
        return turned_to_text or (had_lines and self._has_extra and not had_extra)

    @property
    def _has_extra(self) -> bool:
        return any(kind != _NULL for kind in self._known["extra"].values())

    def fit(self, record: Record) -> Record:
        """The record with every value in the type of its key."""
        fitted = dict(record)
        for part, known in self._known.items():
            fitted[part] = {
                name: _text(value) if known.get(name) == _TEXT else value
                for name, value in record[part].items()
                if value is not None
            }
        if not self._has_extra:  # an object without any key, in all lines, is nothing that Parquet can hold
            fitted["extra"] = None
        return fitted


class _DisagreeError(Exception):
    """Two values have no type in common but text."""


def _kind(value: Any) -> Kind:
    if value is None:
        return _NULL
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, bool):
        return _FLAG
    if isinstance(value, int) and abs(value) <= _MAX_INTEGER:
        return _NUMBER
    if isinstance(value, float | Decimal) and math.isfinite(float(value)):
        return _NUMBER
    if isinstance(value, list):
        kind: Kind = _NULL
        for item in value:
            kind = _merge(kind, _kind(item))
        return [kind]
    if isinstance(value, dict):
        return {name: _kind(item) for name, item in value.items()}
    # A number that JSON or its readers cannot hold.
    raise _DisagreeError


def _merge(one: Kind, other: Kind) -> Kind:
    """The kind of a key that has held both."""
    if one == other or other == _NULL:
        return one
    if one == _NULL:
        return other
    if isinstance(one, list) and isinstance(other, list):
        return [_merge(one[0], other[0])]
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _merge(one.get(name, _NULL), other.get(name, _NULL)) for name in {**one, **other}}
    raise _DisagreeError


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=float)


# --- the files ---------------------------------------------------------------------------------------------


class JsonLines:
    """A file of JSON lines that only grows, in whole lines, written by one thread at a time.

    The caller records the length after each append; with that length the next process opens the file, and
    appends again what came after. When `open_at` returns less than it was given, someone else changed the
    file, and it has to be written anew with `rewrite`. All methods block; all raise DiskError.
    """

    def __init__(self, path: Path, *, scratch: Path | None = None) -> None:
        """`scratch` is a folder on the same disk for the new file of a rewrite; by default the file's own."""
        self.path = path
        self._scratch = scratch or path.parent
        self._file: int | None = None
        self._length_bytes = 0

    @property
    def length_bytes(self) -> int:
        """The length of the file as this object left it."""
        return self._length_bytes

    @property
    def is_intact(self) -> bool:
        """Whether the file is open and still lies at its path, as long as it was left; asks the disk."""
        if self._file is None:
            return False
        try:
            there, ours = os.stat(self.path), os.fstat(self._file)
        except OSError:
            return False
        return os.path.samestat(there, ours) and there.st_size == self._length_bytes

    def open_at(self, length_bytes: int) -> int:
        """Opens the file and cuts it to that length, at the end of a line; returns its length."""
        self.close()
        with disk_errors("write", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._file).st_size
            self._length_bytes = _end_of_line(self._file, min(size, length_bytes))
            if self._length_bytes < size:
                os.ftruncate(self._file, self._length_bytes)
        return self._length_bytes

    def append(self, records: Sequence[Record]) -> int:
        """Adds a line per record in one write; returns the new length. Not durable before `sync`."""
        file = self._opened()
        data = b"".join(map(_line, records))
        with disk_errors("write", self.path):
            try:
                if os.write(file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(file, self._length_bytes)
                raise
        self._length_bytes += len(data)
        return self._length_bytes

    def sync(self) -> None:
        """Makes what was appended survive a power cut."""
        with disk_errors("write", self.path):
            os.fsync(self._opened())

    def rewrite(self, records: Iterable[Record]) -> int:
        """Replaces all lines at once, durably, and opens the new file; returns its length."""
        new = self._scratch / f"{self.path.name}.new"
        with disk_errors("write", self.path):
            self._scratch.mkdir(parents=True, exist_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with new.open("wb", buffering=_WRITE_BYTES) as file:
                    file.writelines(map(_line, records))
                    file.flush()
                    os.fsync(file.fileno())
                    length_bytes = file.tell()
                self.close()
                new.replace(self.path)
            except BaseException:
                new.unlink(missing_ok=True)  # on a full disk its room is needed
                raise
            sync_folder(self.path.parent)
        return self.open_at(length_bytes)

    def close(self) -> None:
        """Closes the file; it can be opened again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _opened(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path} is not open")
        return self._file


_WRITE_BYTES = 2**18


def _line(record: Record) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=float, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate from a JSON manifest: no reader could take the line.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode() + b"\n"


def _end_of_line(file: int, at: int) -> int:
    """The end of the last whole line that ends at `at` or before."""
    while at:
        start = max(0, at - _WRITE_BYTES)
        newline = os.pread(file, at - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        at = start
    return 0
