"""Where a command's words go: a terminal, in colour where wanted, or any other stream, as plain lines.

A stream that can no longer be written to (the terminal is gone, the pipe is closed) ends the talking and
never the run: images that are paid for matter more than words about them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


class Talk:
    """Says lines on one stream. Lines may hold foreign text only as `words.plain` gives it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console: Console | None = None
        #: Whether somebody watches: then there are colours, tables and a live display.
        self.is_terminal = _is_terminal(stream)
        self.is_over = False

    @property
    def console(self) -> Console:
        """The terminal as rich knows it; NO_COLOR and the like are obeyed there."""
        if self._console is None:
            from rich.console import Console  # here, since only a terminal needs it

            self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        return self._console

    def say(self, text: str = "", style: str = "") -> None:
        """Say a line (or several); `style` is rich's word for how, for terminals."""
        if self.is_over:
            return
        try:
            if self.is_terminal:
                self.console.print(text, style=style or None, soft_wrap=True)
            else:
                self._stream.write(f"{_writable(text, self._stream)}\n")
                self._stream.flush()
        except (OSError, ValueError):  # gone, or closed
            self.is_over = True


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    except ValueError:  # closed
        return False


def _writable(text: str, stream: TextIO) -> str:
    """The text as far as the stream's encoding has its characters (a bare `LANG=C` has few)."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
