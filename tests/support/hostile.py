"""Answers as the service gives them, and what a hostile one would make of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

#: From the tools' pages ("Run Command - Response", "Kill Task - Response").
RUN: dict[str, Any] = {
    "errors": [], "taskid": "2221", "socketaccesstoken": "eDcCm5yyUfIvMFspTwww49OUfgXkQt", "result": True,
}  # fmt: skip
TASK: dict[str, Any] = {
    "id": "534574", "uuid": "15bce51f-442f-4f44-a71d-13c6374a62bd", "name": "",
    "socketaccesstoken": "ZpYote30on42O4jjHXNiKmrWAZqbRE",
    "parameters": {"inputImage": "https://api.wiro.ai/v1/File/mCmUXgZLG1FNjjjwmbtPFr2LVJA112/inputImage.png"},
    "debugoutput": "", "debugerror": "a warning", "starttime": "1734513809", "endtime": "1734513813",
    "elapsedseconds": "6.0000", "status": "task_postprocess_end", "cps": "0.000585000000",
    "totalcost": "0.003510000000", "guestid": None, "projectid": "699", "modelid": "598",
    "createtime": "1734513807", "canceltime": "0", "assigntime": "1734513807", "pexit": "0",
    "categories": '["tool","image-to-image"]',
    "outputs": [
        {
            "id": "6bc392c93856dfce3a7d1b4261e15af3", "name": "0.png", "contenttype": "image/png",
            "size": "202472", "accesskey": "dFKlMApaSgMeHKsJyaDeKrefcHahUK", "expiretime": None,
            "url": "https://cdn1.wiro.ai/6a6af820-c5050aee-40bd7b83-a2e186c6/0.png",
        },
    ],
    "size": "202472",
}  # fmt: skip
DETAIL: dict[str, Any] = {"total": "1", "errors": [], "tasklist": [TASK], "result": True}
REFUSAL: dict[str, Any] = {"result": False, "errors": [{"code": 96, "message": "up to 5 tasks at once"}]}
UPLOAD: dict[str, Any] = {"result": True, "errors": [], "list": [{"url": "https://cdn.wiro.ai/f.png"}]}
TOOL: dict[str, Any] = {
    "result": True, "errors": [],
    "tool": [
        {
            "id": "598", "cps": "0.000585000000", "approximatelycost": "0.0035",
            "dynamicprice": '[{"inputs": {"samples": "1"}, "price": 0.01, "priceMethod": "cpr"}]',
        },
    ],
}  # fmt: skip
ANSWERS: dict[str, dict[str, Any]] = {
    "Run": RUN, "Detail": DETAIL, "refusal": REFUSAL, "upload": UPLOAD, "tool": TOOL,
}  # fmt: skip


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


#: Deeper than is read, and not too deep to be copied.
DEEP = nested(200)
#: What no field has a reason to hold.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, -0.5, 1.5, 10**18, 10**40, float("nan"), float("inf"), Decimal("1e999999999"),
    "", " ", "0", "-3", "NaN", "1e400", "../../x", "/etc/passwd", "a\0b", "\ud800", "\u202e\x1b[31m",
    "x" * 100_000, "[" * 5000, '{"a":', "null", "\uff15", [], {}, [[]], [None], [{}], {"id": "7"},
    {"": ""}, DEEP, ["x"] * 2000,
)  # fmt: skip

Place = tuple[str | int, ...]


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, but for the value itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield (*above, name)
        yield from places(item, (*above, name))


def changed(answer: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """A copy with another value at a place."""
    made = copy.deepcopy(answer)
    at: Any = made
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    return made


def encoded(answer: Any) -> bytes:
    """An answer's bytes, NaN and exponents beyond reason included."""
    text = json.dumps(answer, default=lambda number: f"DECIMAL{number}")
    return text.replace('"DECIMAL', "").replace('1E+999999999"', "1e999999999").encode()
