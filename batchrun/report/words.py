"""How things are put into words for people: texts made safe to show, numbers, sizes, times and money.

Prompts and the service's texts are somebody else's: a terminal would obey the control sequences in them, so
nothing foreign is shown or logged for reading without `plain`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

#: A line of text, and rich's word for how it is shown on a terminal.
Line = tuple[str, str]

#: CSI and OSC sequences whole, so that no "[31m" is left of them.
_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    "|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)"  # OSC
)
#: C0, DEL, C1, line separators, what turns the writing direction, and halves of characters.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAKS = "\t\n\r\u2028\u2029"


def plain(text: str, *, limit: int | None = None) -> str:
    """The text on one line without control sequences, at most `limit` characters long."""
    text = _SEQUENCE.sub("", text)
    text = _CONTROL.sub(lambda match: " " if match[0] in _BREAKS else "", text)
    if limit is not None and len(text) > limit:
        text = text[: limit - 1].rstrip() + "…"
    return text


def count(number: int, noun: str) -> str:
    """`1 row`, `2,212 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(bytes_: int) -> str:
    """`812 bytes`, `4.1 kB`, `812 MB`: powers of 1000."""
    if bytes_ < 1000:
        return count(bytes_, "byte")
    amount, unit = bytes_ / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if amount >= 999.5:
            amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}" if amount < 99.95 else f"{amount:.0f} {unit}"


def duration(seconds: float) -> str:
    """`42 s`, `12 min 4 s`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def about(seconds: float) -> str:
    """A time that is an estimate, no finer than it can be known: `40 s`, `7 min`, `3 h 20 min`."""
    if seconds < 90:
        return duration(max(10, round(seconds, -1)))
    if seconds < 5400:
        return duration(round(seconds / 60) * 60)
    return duration(round(seconds / 600) * 600)


def exact_usd(amount: Decimal) -> str:
    """An amount with every digit it has: `3.871 USD`."""
    text = f"{amount:f}"
    if "." in text:
        whole, _, part = text.partition(".")
        text = f"{whole}.{part.rstrip('0'):0<2}"
    return f"{text} USD"


def rough_usd(amount: Decimal) -> str:
    """An amount for the eye: two digits after the point, more only below a dollar."""
    if amount >= 1:
        return f"{amount:,.2f} USD"
    rounded = amount.quantize(Decimal("0.0001"))
    if amount and not rounded:
        return "under 0.0001 USD"
    return exact_usd(rounded)


def spent(amount: Decimal, *, rows_done: int) -> str:
    """What a run has cost, exactly. A service that tells no cost is not taken for one that is free."""
    if not amount and rows_done:
        return "not told by the service"
    return exact_usd(amount)


def near(path: Path) -> str:
    """A path as a user here would type it: relative when it lies below the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
