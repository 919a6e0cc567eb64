"""A JSON array read element by element: the C parser runs on a window of the text that grows as needed.

Where an element is cut short by the window's end the window doubles, so that no element is parsed more
often than its size has doublings; what is read is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from batchrun.manifest import json_text
from batchrun.manifest.text import BLOCK_BYTES, Fault, too_long

_SPACE = re.compile(r"[ \t\r\n]*")
#: Literals and escapes are told as wrong where they begin, though only their end may be missing.
_LONGEST_TOKEN = 16


class JsonArray:
    """The array in the text that `pieces` make up."""

    def __init__(self, pieces: Iterator[str], max_row_bytes: int) -> None:
        self._pieces = pieces
        self._max_row_bytes = max_row_bytes
        self._text = ""
        self._at = 0
        #: The line at `_mark` (an index up to which lines are counted).
        self._line = 1
        self._mark = 0
        #: How many characters the window's first line has before the window.
        self._column = 0

    def elements(self) -> Iterator[tuple[int, Any]]:
        """The line (from 1) on which each element begins, and its value; none for an empty file.

        Raises Fault where the text is no array, or goes on after it.
        """
        opening = self._peek()
        if opening == "":
            return
        if opening != "[":
            advice = "; for one object per line write --format jsonl" if opening == "{" else ""
            raise self._fault(f"the file is not one array of objects{advice}")
        self._at += 1
        mark = self._peek()
        while mark != "]":
            yield self._count_lines(), self._element()
            mark = self._peek()
            if mark == ",":
                self._at += 1
                if self._peek() == "]":
                    raise self._fault("not JSON: a comma after the last element; take it out")
            elif mark != "]":
                raise self._fault('not JSON: "," or "]" must follow an element')
        self._at += 1
        if self._peek():
            raise self._fault("text follows the end of the array; take it out")

    def _count_lines(self) -> int:
        """The line of the reading position."""
        self._line += self._text.count("\n", self._mark, self._at)
        self._mark = self._at
        return self._line

    def _fault(self, message: str, at: int | None = None) -> Fault:
        """The fault at the reading position, or further on in the window."""
        at = self._at if at is None else at
        line = self._count_lines() + self._text.count("\n", self._at, at)
        begin = self._text.rfind("\n", 0, at)
        column = at - begin if begin >= 0 else self._column + at + 1
        return Fault(f"{message} (column {column})", line)

    def _peek(self) -> str:
        """The next character that is no white space, now at the reading position; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow(1):
                return ""

    def _element(self) -> Any:
        """The value at the reading position, which moves behind it."""
        while True:
            try:
                value, end = json_text.decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_short = error.pos >= len(self._text) - _LONGEST_TOKEN or "Unterminated" in error.msg
                offset = error.pos - self._at  # growing moves the window
                if not cut_short or not self._grow(len(self._text) - self._at):
                    raise self._fault(f"not JSON: {error.msg}", self._at + offset) from None
            except json_text.JsonFault as error:
                raise self._fault(str(error)) from None
            else:
                # A number at the window's very end may go on behind it.
                if end < len(self._text) or self._text[end - 1] in '}]"' or not self._grow(1):
                    if self._is_too_long(end):
                        break
                    self._at = end
                    return value
            if len(self._text) - self._at > 2 * max(self._max_row_bytes, BLOCK_BYTES):
                break
        raise too_long(self._max_row_bytes, self._count_lines())

    def _is_too_long(self, end: int) -> bool:
        if 4 * (end - self._at) <= self._max_row_bytes:  # a character has at most four bytes
            return False
        return len(self._text[self._at : end].encode(errors="surrogatepass")) > self._max_row_bytes

    def _grow(self, least: int) -> bool:
        """Drop what is read and append at least `least` characters if there are so many; False at the end."""
        self._count_lines()
        begin = self._text.rfind("\n", 0, self._at)
        self._column = self._at - begin - 1 if begin >= 0 else self._column + self._at
        pieces = [self._text[self._at :]]
        size = 0
        while size < least and (piece := next(self._pieces, None)) is not None:
            pieces.append(piece)
            size += len(piece)
        self._text, self._at, self._mark = "".join(pieces), 0, 0
        return size > 0
