"""What travels between us and the service, read liberally: bytes become our records, refusals our errors.

The service's types wander (numbers are text, text is a number, a list is an object or JSON text, anything is
null), so every field has a reader that takes what can be understood and gives up on that field alone. Strict
is only what money hangs on: a task's id, and that a listing is whole, since a task overlooked in one would be
bought again. Plain functions instead of pydantic models: a model with a validator on every field reads worse
and costs more, and every poll comes through here.

Facts come from the tools' pages ("Get Task Detail - Response" and its neighbours) and Wiro's public
documentation. Whatever comes in, nothing is raised but the service errors of `batchrun.errors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from batchrun.errors import (
    BalanceExhausted,
    CredentialsRefused,
    LimitReached,
    NotFound,
    ProtocolError,
    RateLimited,
    RequestRejected,
    ServerFault,
    ServiceError,
)
from batchrun.model import Accepted, RemoteOutput, Task

#: What a message keeps of the service's words: enough for a person, too little to flood a terminal.
SNIPPET_CHARS = 300
#: Longest text taken from a field; what is longer is no address, token or name.
MAX_TEXT_CHARS = 8192
#: Only the end of a tool's error output is kept: tracebacks say what happened in their last lines.
MAX_DEBUG_CHARS = 2000
#: A task of an image tool has a handful of outputs; a list beyond this is damage.
MAX_OUTPUTS = 10_000
#: One call lists 100 tasks; a list beyond this is damage.
MAX_TASKS = 1000
#: More complaints than this in one answer tell nothing new.
MAX_COMPLAINTS = 20
#: 100 tasks have some 10,000 values; an answer beyond this would take a hundred times its size in memory.
MAX_VALUES = 500_000
#: Nothing the service says nests deeper than a few levels; more would break whoever walks the value later.
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Price:
    """One entry of a tool's price list (`dynamicprice`)."""

    #: Parameter values, as text, that a request must have for the entry to hold; empty: it holds for all.
    inputs: Mapping[str, str]
    price_usd: Decimal
    #: The service's word for what is counted: cpr, cpo, cps, cpt, cp-pixel...
    method: str
    #: For each further unit; None when not told.
    extra_usd: Decimal | None = None
    #: For each input image; None when not told.
    per_input_usd: Decimal | None = None


@dataclass(frozen=True, slots=True)
class ToolFacts:
    """What Tool/Detail tells about a tool's price."""

    #: Empty when there is no price list, or one that cannot be read as a whole: the price is then unknown.
    prices: tuple[Price, ...]
    #: USD, an average over past runs; None when not told.
    approximate_cost_usd: Decimal | None
    #: USD per second of processing; None when not told.
    cps_usd: Decimal | None
    #: The tool's object as the service sent it.
    raw: Mapping[str, Any]


# --- answers ----------------------------------------------------------------------------------------


def read_answer(status: int, body: bytes, *, retry_after_s: float | None = None) -> dict[str, Any]:
    """The object of an answer that says yes; raises the error that any other answer stands for."""
    data = _envelope(status, body, retry_after_s)
    if _says_yes(data) and 200 <= status < 300:
        return data
    raise _refusal(status, data, retry_after_s)


def read_accepted(status: int, body: bytes, *, retry_after_s: float | None = None) -> Accepted:
    """The task that a Run made, judged by `result` and the task id together.

    ProtocolError and ServerFault (unless `acted` is False) leave open whether there is a task; all other
    errors are certain refusals.
    """
    data = _envelope(status, body, retry_after_s)
    task_id = _task_id(data.get("taskid"))
    if task_id is None:
        if _says_yes(data) and 200 <= status < 300:
            raise ProtocolError("the service accepted the request without naming its task", status=status)
        raise _refusal(status, data, retry_after_s)
    if not _says_yes(data):
        raise ProtocolError("the service refused the request and named a task for it", status=status)
    return Accepted(task_id, _token(data))


_CHECK_KEYS = "check WIRO_API_KEY and WIRO_API_SECRET"


def _envelope(status: int, body: bytes, retry_after_s: float | None) -> dict[str, Any]:
    """The object an answer consists of, whatever it says; for any other answer its HTTP status decides."""
    if status == 401:
        words = f"the service refuses the API key or its signature; {_CHECK_KEYS}"
        raise CredentialsRefused(words, status=status, detail=snippet(body))
    try:
        data = _json(body)
    except ValueError:
        data = None
    if isinstance(data, dict):
        return data
    is_page = body.lstrip()[:1] == b"<"
    if is_page or not 200 <= status < 300:
        raise _by_status(status, snippet(body), retry_after_s, what="a web page" if is_page else "an error")
    words = "the service answered with something that is not its JSON"
    raise ProtocolError(words, status=status, detail=snippet(body))


def _says_yes(data: Mapping[str, Any]) -> bool:
    said = _truth(data.get("result"))
    return not _complaints(data) if said is None else said


# --- refusals ---------------------------------------------------------------------------------------

#: What validation errors say; anything else under code 0 is the service's own trouble (public documentation,
#: error codes). A miss costs retries before the row fails; a false hit would fail a sound row at once.
_VALIDATION = re.compile(
    r"^\W*request (parameter|file)s?\b"
    r"|^\W*(parameter|file)s? \W*[\w.-]+\W* (is )?required\b"
    r"|\bmust be (an? )?(integer|float|number|numeric|string|boolean|array|list)\b"
    r"|\bmust be (between|one of|at least|at most)\b",
    re.IGNORECASE,
)
#: "... With your current balance of $50.00, you can run up to 5 tasks at the same time. ..."
_LIMIT = re.compile(
    r"\bup to (\d{1,6}) (?:\w+ ){0,2}tasks?\b"
    r"|(?<![\d.,$])(\d{1,6}) (?:\w+ ){0,2}tasks? at (?:the same time|once)\b",
    re.IGNORECASE,
)


def limit_of(message: str) -> int | None:
    """The number of tasks that a code-96 message allows; None when it names none above 0."""
    found = _LIMIT.search(message)
    return (int(found[1] or found[2]) or None) if found else None


def is_validation(message: str) -> bool:
    """Whether a code-0 message blames the request, so that asking again is of no use."""
    return _VALIDATION.search(message) is not None


def _refusal(status: int, data: Mapping[str, Any], retry_after_s: float | None) -> ServiceError:
    """The error that an object stands for when it says no, or came under an HTTP status of failure."""
    complaints = _complaints(data)
    by_code = {code: snippet(words) for code, words in reversed(complaints)}  # the first of each code
    said = snippet(complaints[0][1]) if complaints else ""
    for code in (98, 99):
        if code in by_code:
            words = f"the service refuses the credentials (code {code}): {by_code[code]}; {_CHECK_KEYS}"
            return CredentialsRefused(words, status=status, detail=said)
    if 97 in by_code:
        return BalanceExhausted(
            f"the balance is used up (code 97): {by_code[97]}", status=status, detail=said
        )
    limits = [limit_of(words) for code, words in complaints if code in (96, None)]
    limit = next((limit for limit in limits if limit), None)
    if 96 in by_code or limit:
        return LimitReached(f"all task slots are taken: {by_code.get(96, said)}", limit=limit)
    if 1 in by_code:
        return NotFound(f"the service does not know it: {by_code[1]}", status=status, detail=said)
    # An error status may come from something in between, after the service acted; its own words are final.
    final = 200 <= status < 500 and status not in (408, 429) and not 300 <= status < 400
    blame = next((words for code, words in complaints if code in (0, None) and is_validation(words)), None)
    if final and blame is not None:
        return RequestRejected(snippet(blame), status=status, detail=said)
    if final and _truth(data.get("result")) is False:
        words = f"the service could not do it: {said}" if said else "the service refused without a reason"
        return ServerFault(words, status=status, detail=said, retry_after_s=retry_after_s, acted=False)
    return _by_status(status, said, retry_after_s, what="an error")


def _by_status(status: int, detail: str, retry_after_s: float | None, *, what: str) -> ServiceError:
    """What an HTTP status stands for where the words beside it settle nothing."""
    if status == 429:
        return RateLimited("the service asks to slow down (HTTP 429)", retry_after_s=retry_after_s)
    if 300 <= status < 400:
        return ProtocolError(f"the service points elsewhere (HTTP {status})", status=status, detail=detail)
    words = f"the service answered with {what} (HTTP {status})"
    return ServerFault(words, status=status, detail=detail, retry_after_s=retry_after_s)


def _complaints(data: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    """The errors of an answer as (code, message), in its order; the code is None where there is none."""
    errors = data.get("errors") or data.get("error")
    items = errors if isinstance(errors, list) else [errors]
    found = [complaint for item in items[:MAX_COMPLAINTS] if (complaint := _complaint(item)) is not None]
    if not found and (words := _words(data)):
        return [(_digits(data.get("code")), words)]
    return found


def _complaint(item: object) -> tuple[int | None, str] | None:
    if isinstance(item, dict):
        return (_digits(item.get("code")), _words(item)) if item else None
    words = _text(item)
    return (None, words) if words.strip() else None


def _words(item: Mapping[str, Any]) -> str:
    texts = (item.get(name) for name in ("message", "msg", "error", "description"))
    return next((text for text in map(_text, texts) if text.strip()), "")


# --- tasks -----------------------------------------------------------------------------------------


def read_tasks(data: Mapping[str, Any], *, whole: bool) -> list[Task]:
    """The tasks of a Detail, List, Cancel or Kill answer, in its order.

    ProtocolError for an entry that cannot be read as a task and, with `whole`, for a missing list: it must
    not pass for an account without tasks.
    """
    entries = _list(data.get("tasklist"))
    if entries is None and (whole or data.get("tasklist")):
        raise ProtocolError("the service answered without a list of tasks")
    if entries is not None and len(entries) > MAX_TASKS:
        raise ProtocolError(f"the service listed {len(entries):,} tasks in one answer")
    return [read_task(entry) for entry in entries or []]


def read_task(entry: object) -> Task:
    """One task object; only an id is asked of it (ProtocolError without one)."""
    fields = entry if isinstance(entry, dict) else {}
    task_id = _task_id(fields.get("id")) or _task_id(fields.get("taskid"))
    if task_id is None:
        raise ProtocolError("the service listed a task without a usable id")
    token = _token(fields)
    return Task(
        id=task_id,
        token=token,
        status=_text(fields.get("status")).strip(),
        pexit=_text(fields.get("pexit")).strip() or None,
        outputs=read_outputs(fields.get("outputs")),
        cost_usd=_decimal(fields.get("totalcost")),
        created_at=_instant(fields.get("createtime")),
        started_at=_instant(fields.get("starttime")),
        ended_at=_instant(fields.get("endtime")),
        elapsed_s=_decimal(fields.get("elapsedseconds")),
        parameters=_parameters(fields.get("parameters")),
        debug_error=_without_token(_text(fields.get("debugerror")), token)[-MAX_DEBUG_CHARS:],
        model_id=_text(fields.get("modelid")),
    )


def read_outputs(value: object) -> tuple[RemoteOutput, ...]:
    """The outputs of a task in the service's order; what is neither object nor address is left out."""
    outputs = (_output(item) for item in (_list(value) or [])[:MAX_OUTPUTS])
    return tuple(output for output in outputs if output is not None)


def _output(item: object) -> RemoteOutput | None:
    if isinstance(item, str):
        return RemoteOutput(name="", url=url) if (url := _text(item).strip()) else None
    if not isinstance(item, dict) or not item:
        return None
    content_type = _text(item.get("contenttype")).strip()
    url = _text(item.get("url")).strip()
    return RemoteOutput(
        name=_text(item.get("name")),
        # "raw" is text in place of a file: there is nothing to fetch (public documentation of the outputs).
        url=url if url and content_type != "raw" else None,
        content_type=content_type,
        size_bytes=_digits(item.get("size")),
    )


def _parameters(value: object) -> Mapping[str, Any] | None:
    """The parameters echoed, an object or its JSON text; None when there are none."""
    if isinstance(value, str):
        try:
            value = _json(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) and value else None


# --- uploads and tools ------------------------------------------------------------------------------


def read_upload(data: Mapping[str, Any]) -> str:
    """The address of an uploaded file, wherever the answer keeps it."""
    for place in ("list", "files", "filelist", "file", "data", "url"):
        for item in _list(data.get(place)) or []:
            url = _text(item.get("url") if isinstance(item, dict) else item).strip()
            if url.startswith(("https://", "http://")):
                return url
    raise ProtocolError("the service took a file and gave no address for it")


def read_tool(data: Mapping[str, Any]) -> ToolFacts:
    """The price facts of a Tool/Detail answer."""
    tool = next(iter(_list(data.get("tool")) or []), None)
    if not isinstance(tool, dict):
        raise ProtocolError("the service answered without the tool")
    return ToolFacts(
        prices=_prices(tool.get("dynamicprice")),
        approximate_cost_usd=_decimal(tool.get("approximatelycost")),
        cps_usd=_decimal(tool.get("cps")),
        raw=tool,
    )


def _prices(value: object) -> tuple[Price, ...]:
    # One entry that cannot be read makes the list useless: it could be the one that counts.
    prices = [_price(entry) for entry in _list(value) or []]
    return tuple(price for price in prices if price is not None) if None not in prices else ()


def _price(entry: object) -> Price | None:
    if not isinstance(entry, dict):
        return None
    inputs, price = entry.get("inputs") or {}, _decimal(entry.get("price"))
    if not isinstance(inputs, dict) or price is None:
        return None
    return Price(
        inputs={_text(name): _text(wanted) for name, wanted in inputs.items()},
        price_usd=price,
        method=_text(entry.get("priceMethod")).strip(),
        extra_usd=_decimal(entry.get("priceExtra")),
        per_input_usd=_decimal(entry.get("priceInput")),
    )


# --- headers ----------------------------------------------------------------------------------------


def retry_after_s(value: str | None, *, now: float) -> float | None:
    """The wait in seconds that a Retry-After header asks for; `now` is unix time by the service's clock."""
    text = (value or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text, re.ASCII):
        return float(text)
    until = http_date(text)
    return None if until is None else max(0.0, until - now)


@lru_cache(maxsize=8)  # answers of the same second carry the same text
def http_date(text: str) -> float | None:
    """Unix seconds of an HTTP date; None for anything else."""
    try:
        moment = parsedate_to_datetime(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII | re.IGNORECASE)


def content_range(value: str | None) -> tuple[int, int, int | None] | None:
    """First byte, last byte and whole size (None for `*`) of a Content-Range header; None if it is none."""
    found = _CONTENT_RANGE.fullmatch((value or "").strip())
    if found is None:
        return None
    first, last, total = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    return (first, last, total) if first <= last and (total is None or last < total) else None


#: A task's token is a key to the task: whoever has it can watch and stop it.
_TOKEN = re.compile(r"(token\W{1,8})[\w.~+/=-]{6,}", re.IGNORECASE)


def snippet(said: str | bytes) -> str:
    """The beginning of what somebody said, on one line, without control characters and without tokens."""
    text = said[: 4 * SNIPPET_CHARS]
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    text = _TOKEN.sub(r"\1***", text)
    clean = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return clean if len(clean) <= SNIPPET_CHARS else clean[: SNIPPET_CHARS - 1] + "…"


# --- fields of wandering type -----------------------------------------------------------------------


def _json(text: str | bytes) -> Any:
    """JSON with exact decimals; ValueError for what is none, too deep, or has numbers beyond reason."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig", "replace")
    nested = text.count("[") + text.count("{")
    if len(text) > MAX_VALUES and nested + text.count(",") > MAX_VALUES:
        raise ValueError("too many values")
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if nested > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """ValueError when lists and objects nest deeper than MAX_DEPTH."""
    level: list[Any] = [value] if type(value) in _NESTING else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if type(inner) in _NESTING
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


#: What JSON makes of lists and objects.
_NESTING = frozenset({dict, list})


def _exact(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return None


_DECODER = json.JSONDecoder(parse_float=_exact, parse_constant=lambda _: None)


def _truth(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, int) else None


def _text(value: object) -> str:
    """Text (its end, if too long) or a number as text, fit to be stored as UTF-8; else empty."""
    if isinstance(value, str):
        text = value[-MAX_TEXT_CHARS:]
        # JSON escapes can spell half a surrogate pair, which no database or file takes.
        return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return ""
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite() or abs(number.adjusted()) > 30:
        return ""
    return f"{int(number)}" if number == number.to_integral_value() else f"{number:f}"


def _token(fields: Mapping[str, Any]) -> str:
    return _text(fields.get("socketaccesstoken")) or _text(fields.get("tasktoken"))


def _without_token(text: str, token: str) -> str:
    """A tool's words without its task's token, should they quote it."""
    return text.replace(token, "***") if len(token) >= 8 else text


def _digits(value: object) -> int | None:
    """A whole number from 0 that fits in 64 bits; None for everything else."""
    text = _text(value).strip()
    return int(text) if len(text) <= 18 and text.isascii() and text.isdigit() else None


def _task_id(value: object) -> str | None:
    """Digits without leading zeros; None for 0 and everything else, since ids are compared by size."""
    number = _digits(value)
    return str(number) if number else None


_DECIMAL = re.compile(r"\d{1,11}(\.\d{0,30})?", re.ASCII)


def _decimal(value: object) -> Decimal | None:
    """A sum, a duration or an instant, exact: digits, perhaps a fraction; None for everything else."""
    text = _text(value).strip()
    return Decimal(text) if _DECIMAL.fullmatch(text) else None


def _instant(value: object) -> int | None:
    """Unix seconds; None for 0, which means unset, and everything else."""
    if isinstance(value, str) and len(value) <= 11 and value.isascii() and value.isdigit():
        return int(value) or None  # as nearly always, and quicker
    number = _decimal(value)
    return int(number) or None if number is not None else None


def _list(value: object) -> list[Any] | None:
    """A list where one is meant: itself, its only element without the list, or either as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = _json(value)
        except ValueError:
            return None
    if isinstance(value, list):
        return value
    if isinstance(value, dict) or (isinstance(value, str) and value.strip()):
        return [value]
    return None
