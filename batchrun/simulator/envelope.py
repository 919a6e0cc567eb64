"""How the service speaks: the JSON envelope around every answer, and its refusals.

An API failure is HTTP 200 with `result: false` and a list of `{code, message}` (wiro-api.md, "Response
envelope").
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

VALIDATION = 0
TROUBLE = 0
NOT_FOUND = 1
LIMIT_REACHED = 96
BALANCE_EXHAUSTED = 97
KEY_REFUSED = 98
SIGNATURE_REFUSED = 99


class Refusal(Exception):
    """The service says no: a code, its words, and the HTTP status (200 for all but credentials)."""

    def __init__(self, code: int, message: str, *, status: int = 200) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status


def answer(**fields: Any) -> web.Response:
    """An answer that went well, holding `fields`."""
    return _json({"errors": [], **fields, "result": True})


def refused(refusal: Refusal) -> web.Response:
    """The answer that a refusal becomes."""
    errors = [{"code": refusal.code, "message": refusal.message}]
    return _json({"errors": errors, "result": False}, status=refusal.status)


def page(status: int, title: str, words: str = "") -> web.Response:
    """An HTML page, as the CDN and firewall before the service answer."""
    head = f"<head><title>{status} {title}</title></head>"
    text = f"<!DOCTYPE html><html>{head}<body><h1>{title}</h1>{words}</body></html>"
    return web.Response(status=status, text=text, content_type="text/html")


def _json(fields: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=json.dumps(fields).encode(), content_type="application/json")
