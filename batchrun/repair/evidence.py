"""What the records of a damaged run say, as far as they make sense: pure, and believing nothing by itself.

A record may be wrong in any place: a flipped bit, half a line, a page of another file. Each function takes
what was found and returns what it can only mean, or None.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from batchrun.model import State, Tool
from batchrun.plan.identity import HASH_BYTES
from batchrun.rules.rebuild import Rebuilt
from batchrun.store.rebuilding import FoundRow, Image, Try
from batchrun.store.records import dumps
from batchrun.store.salvage import IS_SURE, Remains
from batchrun.tools.catalog import from_json, to_json

#: The key of a row without an id: its content and, of rows that ask for the same, its number.
KEY = re.compile(rf"([0-9a-f]{{{2 * HASH_BYTES}}})(\.[1-9][0-9]*)?")
#: The stem of a row's file names, and where an image lies.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
PATH = re.compile(r"images/[0-9]{3,}/[A-Za-z0-9_][A-Za-z0-9._-]*_([0-9]+)\.([a-z0-9]{1,8})")
#: Above all numbers of rows, lines, images and the like that make sense.
MAX_ROW = 10**12


def key_of_line(record: Mapping[str, Any]) -> str | None:
    """The key of the row that a result line is about; None when it does not tell."""
    id_ = record.get("id")
    if isinstance(id_, str) and id_:
        return f"id:{id_}"
    key = record.get("key")
    return key if isinstance(key, str) and "." in key and KEY.fullmatch(key) else None


def row_of(remains: Remains, tools: Mapping[int, str]) -> FoundRow | None:
    """A row of the damaged state, if its record makes sense."""
    record = remains.row
    if not _is_consistent(record) or state_of(remains) is None:
        return None
    content, id_, own = record["content"], record.get("id"), record.get("own")
    given, extra = record.get("given"), record.get("extra")
    tool = tools.get(record["tool"]) if isinstance(record.get("tool"), int) else None
    is_request = tool is not None and _is_object(given)
    is_told = _is_object(remains.cells) or (is_request and _is_patch(remains.cells))
    generation = number_or_none(record.get("generation")) or 0
    return FoundRow(
        Rebuilt.LEAVE,
        record["seq"],
        record["key"],
        content,
        own if isinstance(own, bytes) and len(own) == HASH_BYTES else content,
        id_,
        record["line"],
        record["name"],
        tool if is_request and tool is not None else tool_named("unknown"),
        given=str(given) if is_request else "{}",
        extra=str(extra) if _is_object(extra) else "{}",
        images=number_or_none(record.get("images")) or 0,
        present=record.get("present") != 0,
        generation=generation,
        cause=text_or_none(record.get("cause")),
        message=text_or_none(record.get("message")),
        cells=remains.cells if is_told else None,
        settled=number_or_none(record.get("settled")) or 0,
        older=list(_older_images(remains, generation)),
        tries=list(_tries(remains)),
    )


def _is_consistent(record: Mapping[str, Any]) -> bool:
    """Whether what makes a row the one that it is agrees."""
    seq, key, content, id_ = (record.get(name) for name in ("seq", "key", "content", "id"))
    line, name = record.get("line"), record.get("name")
    if not (
        isinstance(seq, int)
        and 0 < seq < MAX_ROW
        and isinstance(key, str)
        and isinstance(content, bytes)
        and len(content) == HASH_BYTES
        and isinstance(line, int)
        and isinstance(name, str)
        and NAME.fullmatch(name)
    ):
        return False
    if isinstance(id_, str):
        return key == f"id:{id_}"
    match = KEY.fullmatch(key)
    return id_ is None and match is not None and match[1] == content.hex() and bool(match[2])


def _older_images(remains: Remains, generation: int) -> Iterator[tuple[int, Image]]:
    """The saved images of earlier generations."""
    for output in remains.outputs:
        older, path, index = output.get("generation"), output.get("path"), output.get("number")
        if not (isinstance(older, int) and isinstance(index, int) and isinstance(path, str)):
            continue
        if older < generation and output.get("state") == "saved" and PATH.fullmatch(path):
            yield older, Image(index, path, str(output.get("sha256") or ""), 0)


def _tries(remains: Remains) -> Iterator[Try]:
    """The attempts whose task is known for certain."""
    for attempt in remains.attempts:
        task_id, token = attempt.get("task_id"), attempt.get("token")
        if isinstance(task_id, str) and task_id and attempt[IS_SURE]:
            cost, seconds = decimal_or_none(attempt.get("cost_usd")), decimal_or_none(attempt.get("seconds"))
            yield Try(
                task_id,
                token if isinstance(token, str) else "",
                str(attempt.get("status") or ""),
                text_or_none(attempt.get("pexit")),
                None if cost is None else f"{cost:f}",
                None if seconds is None else f"{seconds:f}",
                str(attempt.get("error") or ""),
            )


def is_sure(remains: Remains) -> bool:
    """Whether the newest task of a row is known for certain."""
    return not remains.attempts or remains.attempts[-1][IS_SURE]


def state_of(remains: Remains) -> State | None:
    """The state that a row's record tells."""
    try:
        return State(str(remains.row.get("state")))
    except ValueError:
        return None


def _is_object(text: Any) -> bool:
    return isinstance(_json_of(text), dict)


def _is_patch(text: Any) -> bool:
    """Whether it is what a row changes of what it gives (records.given_back)."""
    match _json_of(text):
        case [dict()]:
            return True
    return False


def _json_of(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def is_tool(text: str) -> bool:
    """Whether it is the description of a tool."""
    try:
        from_json(json.loads(text))
    except Exception:  # a description with a flipped bit may be wrong in any way
        return False
    return True


def tool_named(slug: str) -> str:
    """A description that stands for a tool of which only the name is known: it sends what a row gives."""
    return dumps(to_json(Tool(slug, f"/Run/unknown/{slug}", slug, "", (), ())))


def texts(value: Any) -> list[str]:
    """The texts in a list; none in anything else."""
    return [item for item in value if isinstance(item, str) and item] if isinstance(value, list) else []


def text_or_none(value: Any) -> str | None:
    """A text that says something."""
    return value if isinstance(value, str) and value else None


def number_or_none(*values: Any) -> int | None:
    """The first whole number from 1 that makes sense."""
    return next((value for value in values if type(value) is int and 0 < value < MAX_ROW), None)


def decimal_or_none(value: Any) -> Decimal | None:
    """A sum of money or a time as told; None when it is none."""
    if not isinstance(value, str):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 and math.isfinite(float(number)) else None
