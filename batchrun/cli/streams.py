"""The standard streams, which may be missing or go away: neither may break a run or change its exit code."""

from __future__ import annotations

import os
import sys


def mend() -> None:
    """Give streams that were closed before the start to the null device.

    Else the next files opened would take their numbers, and what is meant for a stream would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        # open to the end, so that the number stays taken
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def flush() -> None:
    """Write what is still held; what can no longer be written is dropped, and so is all that comes after."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # gone (a closed terminal, a pipe that nobody reads), or closed
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue
