"""TSV: cells are literal unless wholly quoted.

`"Hello` may be all of a cell (a sentence whose other quote stands elsewhere) or the beginning of one that
goes on behind a tab or lines below. Real files hold both. The reading that gives the header's number of
cells wins, the literal one first, but for one case: a last cell that is open, before a line that is no row
by itself, goes on there. A quoted reading that fails is not tried again over the same lines, so no file is
read more than twice.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Self

_QUOTED = r'"([^"]*+(?:""[^"]*+)*+)"'
_WHOLLY_QUOTED = re.compile(_QUOTED)
#: From an opening quote to the end of the text, without a closing one.
_OPEN = re.compile(r'"[^"]*+(?:""[^"]*+)*+\Z')


def unquoted(cell: str) -> str:
    """The cell without its quotes if it is wholly quoted, else as it is."""
    match = _WHOLLY_QUOTED.fullmatch(cell)
    return match[1].replace('""', '"') if match else cell


class Lines:
    """Lines that can be given back; `number` is that of the last one taken, from 1."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.number = 0
        self._lines = lines
        self._given_back: deque[str] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self.number += 1
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Undo the taking of the last `lines`."""
        self._given_back.extendleft(reversed(lines))
        self.number -= len(lines)


class TsvRows:
    """Splits a line just taken from `lines` into cells, taking those after it that belong to it."""

    def __init__(self, lines: Lines, delimiter: str, max_row_bytes: int) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self._max_row_bytes = max_row_bytes
        self._quoted = re.compile(rf"{_QUOTED}(?={re.escape(delimiter)}|\r*\n?\Z)")
        self._plain = re.compile(rf"[^{re.escape(delimiter)}\n]*+")
        #: Lines up to this one were part of a quoted reading that failed.
        self._literal_to = 0

    def split(self, line: str, width: int) -> list[str]:
        """The cells, where the header has `width`."""
        literal = line.rstrip("\r\n").split(self._delimiter)
        if '"' not in line or (len(literal) == width and not self._goes_on(literal[-1], width)):
            return [unquoted(cell) for cell in literal]
        begin = self._lines.number
        taken: list[str] = []
        cells = self._quoted_reading(line, width, taken, may_span=begin > self._literal_to)
        if cells is not None and len(cells) == width:
            return cells
        self._lines.give_back(taken)
        self._literal_to = max(self._literal_to, begin + len(taken) - 1)
        return [unquoted(cell) for cell in literal]

    def _goes_on(self, last: str, width: int) -> bool:
        """Whether a line's last cell is open and the next line is no row by itself."""
        if width == 1 or not _OPEN.match(last):
            return False
        following = next(self._lines, None)
        if following is None:
            return False
        self._lines.give_back([following])
        return following.rstrip("\r\n").count(self._delimiter) != width - 1

    def _quoted_reading(self, text: str, width: int, taken: list[str], *, may_span: bool) -> list[str] | None:
        """The cells if every quote that can open a cell does, or None; `taken`: the further lines it used."""
        cells: list[str] = []
        at = 0
        while len(cells) < width:
            match = self._quoted.match(text, at)
            if match is None and may_span and _OPEN.match(text, at):
                more = self._until_closed(taken)
                text, at = text[at:] + more, 0
                match = self._quoted.match(text)
                if match is None:
                    return None
            if match is not None:
                cells.append(match[1].replace('""', '"'))
            else:
                match = self._plain.match(text, at)
                assert match is not None
                cells.append(match[0])
            at = match.end()
            if not text.startswith(self._delimiter, at):
                if match.re is self._plain:
                    cells[-1] = cells[-1].rstrip("\r")
                return cells
            at += len(self._delimiter)
        return None

    def _until_closed(self, taken: list[str]) -> str:
        """The lines up to the one with a quote that is not doubled; fewer when none comes in time."""
        more: list[str] = []
        size = 0
        for line in self._lines:
            taken.append(line)
            more.append(line)
            size += len(line)
            if size > self._max_row_bytes or ('"' in line and '"' in line.replace('""', "")):
                break
        return "".join(more)
