"""JSON as manifests need it: floats keep their digits, and what JSON allows but nobody means is refused.

Floats are read as Decimal and written back digit for digit, so a `7.50` stays a `7.50`. Refused are NaN and
Infinity, the same key twice in an object, half surrogate pairs and escaped NULs (neither can be stored or
sent), and nesting deeper than any manifest has reason to.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, NoReturn

#: No list of prompts nests deeper; more would break whoever walks the value later (Python's limit is ~1,000).
MAX_DEPTH = 64
_DOUBTFUL_ESCAPE = re.compile(r"\\u(?:[dD]|0000)")


class JsonFault(ValueError):
    """The text is JSON, of a kind that cannot be used; the message says what to write."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        left = set(value)
        for twice, _ in pairs:
            if twice not in left:
                break
            left.remove(twice)
        raise JsonFault(f"the key {shown(twice)} is given twice in one object; keep one of them")
    return value


def shown(name: str) -> str:
    """A name in quotes for a message: on one line, at most 60 characters."""
    text = json.dumps(name[:80], ensure_ascii=False)
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= 60 and len(name) <= 80 else f'{text[:56]}..."'


def _constant(name: str) -> NoReturn:
    raise JsonFault(f"{name} is not a number that JSON knows; write a number or null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal, parse_constant=_constant)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The value that begins exactly at `start`, and the index after its end; raises JsonFault, and
    json.JSONDecodeError when the text is no JSON (or ends too early)."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise JsonFault(f"nested more than {MAX_DEPTH} deep; flatten it") from None
    except JsonFault:
        raise
    except (ValueError, InvalidOperation):  # int() of over 4,300 digits; an exponent beyond Decimal's
        raise JsonFault("a number is too long to be meant; write it as text in quotes") from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH:
        check_depth(value)
    if text.find("\\", start, end) >= 0 and _DOUBTFUL_ESCAPE.search(text, start, end):
        check_text(value)
    return value, end


def check_depth(value: Any) -> None:
    """Raise JsonFault when lists and objects nest deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise JsonFault(f"nested more than {MAX_DEPTH} deep; flatten it")


def check_text(value: Any) -> None:
    """Raise JsonFault when a text in `value` holds what can be neither stored nor sent."""
    text = encode(value)
    if "\\u0000" in text.replace("\\\\", ""):
        raise JsonFault("a text holds a NUL character (\\u0000); take it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JsonFault("a text holds half of a surrogate pair (\\ud800 to \\udfff); take it out") from None


#: json.dumps makes an encoder anew for every call.
_ENCODERS = {
    ascii_only: json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False) for ascii_only in (True, False)
}


def encode(value: Any, *, ascii_only: bool = False) -> str:
    """`value` as JSON text on one line: Decimals as numbers with all their digits, the rest as json.dumps.

    Raises TypeError for what JSON has no word for, ValueError for a number that is not finite.
    """
    if type(value) is Decimal:
        return _encode(value, ascii_only=ascii_only)
    try:
        return _ENCODERS[ascii_only].encode(value)  # in C, but it does not know Decimals
    except TypeError:
        return _encode(value, ascii_only=ascii_only)


def _encode(value: Any, *, ascii_only: bool) -> str:
    quoted = encode_basestring_ascii if ascii_only else encode_basestring
    if type(value) is str:
        return quoted(value)
    if type(value) is int:
        return str(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise ValueError(f"{value} is not a number that JSON knows")
        text = str(value)
        return text if "." in text or "E" in text else text + "E0"  # or it would be read back as an integer
    if isinstance(value, dict):
        items = [f"{quoted(name)}: {_encode(item, ascii_only=ascii_only)}" for name, item in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join([_encode(item, ascii_only=ascii_only) for item in value])}]"
    return _ENCODERS[ascii_only].encode(value)


def kind(value: Any) -> str:
    """What a JSON or TOML value is, in a user's words: "a list", "text", "true or false"."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int():
            return "a whole number"
        case Decimal() | float():
            return "a number"
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"
