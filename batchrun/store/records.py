"""Rows of the database as model records and back."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from batchrun.model import Attempt, Failure, LocalImage, Output, Row, State, Value

ROW_COLUMNS = (
    "seq, key, id, line, name, tool, given, extra, images, state, attempts, generation, "
    "cause, message, present, lower(hex(content))"
)
ATTEMPT_COLUMNS = (
    "number, task_id, token, intent_at, intent_server_at, after_task, status, pexit, cost_usd, error, seconds"
)
OUTPUT_COLUMNS = (
    "number, url, name, content_type, declared_bytes, "
    "path, sha256, size_bytes, media_type, width_px, height_px"
)


#: json.dumps and json.loads make theirs anew for every call.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)
_DECODER = json.JSONDecoder(parse_float=Decimal)


def dumps(value: Any) -> str:
    """Compact JSON text; Decimals keep their digits as text."""
    return _ENCODER.encode(value)


def image_to_json(image: LocalImage) -> dict[str, Any]:
    """A local image as it stands among the values that a row gives."""
    return {"file": image.path, "sha256": image.sha256, "bytes": image.size_bytes}


def given_to_json(given: Mapping[str, Value | LocalImage]) -> str:
    """What a row gives, as JSON text; a local image is an object with file, sha256 and bytes."""
    return dumps(
        {
            name: image_to_json(value) if isinstance(value, LocalImage) else value
            for name, value in given.items()
        }
    )


@lru_cache(maxsize=512)  # a row is read at every step of its way
def given_from_json(text: str) -> Mapping[str, Value | LocalImage]:
    """The inverse of given_to_json."""
    return {
        name: LocalImage(value["file"], value["sha256"], value["bytes"]) if isinstance(value, dict) else value
        for name, value in json.loads(text).items()
    }


def cells_given(id: str | None, given: Mapping[str, Any], columns: Collection[str] | None) -> dict[str, Any]:
    """A manifest row as it stands when it holds what it gives, letter by letter, under the same names.

    `columns` are those of a table, whose cells are text; None: a JSON manifest. A local image is its path, as
    an object with `file` or as a LocalImage.
    """
    cells: dict[str, Any] = {} if id is None else {"id": id}
    for name, value in given.items():
        if isinstance(value, LocalImage):
            value = value.path
        elif isinstance(value, dict):
            value = value["file"]
        if columns is None:
            cells[name] = value
        elif name in columns:  # others are from --set
            cells[name] = str(value) if type(value) in (str, int) else dumps(value)
    return cells


def given_back(told: Mapping[str, Any], kept: str | None) -> dict[str, Any]:
    """A row as the manifest had it: as what it gives tells it, but for what is kept of it (`sources`)."""
    if kept is None:
        return dict(told)
    cells = json.loads(kept, parse_float=Decimal)
    if isinstance(cells, list):  # a merge patch
        cells = {name: cell for name, cell in {**told, **cells[0]}.items() if cell is not None}
    return dict(cells)


def read_row(record: tuple[Any, ...], attempt: Attempt | None, outputs: Iterable[Output]) -> Row:
    """A Row from a record of ROW_COLUMNS."""
    seq, key, id_, line, name, tool, given, extra, images, state, attempts, generation, *rest = record
    cause, message, present, content = rest
    return Row(
        seq=seq,
        key=key,
        id=id_,
        line=line,
        name=name,
        tool=tool or 0,
        given=given_from_json(given),
        extra={} if extra == "{}" else _DECODER.decode(extra),
        images=images,
        state=State(state),
        attempts=attempts,
        failure=Failure(cause, message or "") if cause else None,
        attempt=attempt,
        outputs=tuple(outputs),
        generation=generation,
        present=bool(present),
        content=content,
    )


def read_attempt(record: tuple[Any, ...]) -> Attempt:
    """An Attempt from a record of ATTEMPT_COLUMNS."""
    number, task_id, token, intent_at, server_at, after_task, status, pexit, cost, error, seconds = record
    return Attempt(
        number=number,
        task_id=task_id,
        token=token,
        intent_at=intent_at,
        intent_server_at=server_at,
        after_task=after_task,
        status=status,
        pexit=pexit,
        cost_usd=None if cost is None else Decimal(cost),
        error=error,
        seconds=None if seconds is None else Decimal(seconds),
    )


def read_output(record: tuple[Any, ...]) -> Output:
    """An Output from a record of OUTPUT_COLUMNS."""
    return Output(*record)


def load_row(connection: sqlite3.Connection, seq: int) -> Row:
    """The row with its newest attempt and the outputs of its present generation; KeyError when unknown."""
    record = connection.execute(f"SELECT {ROW_COLUMNS} FROM rows WHERE seq = ?", (seq,)).fetchone()
    if record is None:
        raise KeyError(seq)
    return complete(connection, record)


def complete_all(
    connection: sqlite3.Connection, records: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[Row, tuple[Attempt, ...]]]:
    """The rows of a page of records of ROW_COLUMNS, each with its attempts that made a task, oldest first.

    As `complete`, but with two questions for the whole page.
    """
    page = f"WHERE row IN ({', '.join(str(int(record[0])) for record in records)})"
    attempts, outputs = defaultdict(list), defaultdict(list)
    for seq, generation, *attempt in connection.execute(
        f"SELECT row, generation, {ATTEMPT_COLUMNS} FROM attempts {page} ORDER BY row, generation, number"
    ):
        attempts[seq].append((generation, read_attempt(tuple(attempt))))
    for seq, generation, *output in connection.execute(
        f"SELECT row, generation, {OUTPUT_COLUMNS} FROM outputs {page} ORDER BY row, generation, number"
    ):
        outputs[seq, generation].append(read_output(tuple(output)))
    for record in records:
        seq, generation = record[0], record[11]
        present = [attempt for of, attempt in attempts[seq] if of == generation]
        row = read_row(record, present[-1] if present else None, outputs[seq, generation])
        yield row, tuple(attempt for _, attempt in attempts[seq] if attempt.task_id is not None)


def complete(
    connection: sqlite3.Connection,
    record: tuple[Any, ...],
    *,
    attempt: tuple[Any, ...] | None = None,
    outputs: tuple[Output, ...] | None = None,
) -> Row:
    """The row of a record of ROW_COLUMNS; its newest attempt and its outputs are asked for unless given."""
    seq, generation = record[0], record[11]
    if attempt is None:
        attempt = connection.execute(
            f"SELECT {ATTEMPT_COLUMNS} FROM attempts WHERE row = ? AND generation = ? "
            "ORDER BY number DESC LIMIT 1",
            (seq, generation),
        ).fetchone()
    if outputs is None:
        found = connection.execute(
            f"SELECT {OUTPUT_COLUMNS} FROM outputs WHERE row = ? AND generation = ? ORDER BY number",
            (seq, generation),
        ).fetchall()
        outputs = tuple(map(read_output, found))
    return read_row(record, read_attempt(attempt) if attempt else None, outputs)
