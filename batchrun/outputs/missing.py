"""Images that were saved and are not there any more: deleted or moved behind our back.

Nothing is done about them by itself. Whoever sorts out the bad pictures of a run does not want them back, and
buying anew costs money; but a count that includes them must not be told without a word.

A folder from which something was taken is not the same to the system any more (its times say so), so one that
was found whole is not looked through again until it has changed: a million images are a thousand questions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: A folder's times are trusted once they are that old: two changes at one tick of the clock look like one.
_SETTLED_NS = 2_000_000_000


class Place(Protocol):
    """A folder that images were saved in."""

    @property
    def number(self) -> int: ...
    @property
    def path(self) -> str:
        """Relative to the run's folder, with `/`."""
        ...

    @property
    def mark(self) -> str | None:
        """What told the folder when it was last found whole."""
        ...

    @property
    def saved(self) -> Callable[[], Iterable[str]]:
        """Asks where the images lie that were saved in it."""
        ...


@dataclass(frozen=True, slots=True)
class Missing:
    """Saved images that are not in their place."""

    #: At least 1.
    images: int
    #: Path of the first one, relative to the run's folder.
    first: str


def missing(folder: Path, places: Iterable[Place]) -> tuple[Missing | None, dict[int, str]]:
    """Which of the images saved in these places of `folder` are not there (None: all are).

    And the marks, by number, of places that were looked through and found whole. No file is opened: each
    folder is listed once. One that cannot be listed for another reason than its absence counts as whole:
    nothing is known against it.
    """
    images, first, whole = 0, "", {}
    for place in places:
        mark = _mark(folder / place.path)
        if mark is not None and mark == place.mark:
            continue
        saved = list(place.saved())
        gone = _missing_of(folder, saved)
        if gone:
            images, first = images + len(gone), first or gone[0]
        elif mark is not None and all(path.startswith(f"{place.path}/") for path in saved):
            whole[place.number] = mark
    return (Missing(images, first) if images else None), whole


def _missing_of(folder: Path, paths: Iterable[str]) -> list[str]:
    listed: str | None = None
    names: set[str] | None = None
    gone = []
    for path in paths:
        place, _, name = path.rpartition("/")
        if place != listed:
            listed, names = place, _names(folder / place)
        if names is not None and name not in names:
            gone.append(path)
    return gone


def _mark(place: Path) -> str | None:
    """What tells a folder as long as no name in it comes or goes; None while it is too young to be told."""
    try:
        facts = place.stat()
    except OSError:
        return None
    changed_ns = max(facts.st_mtime_ns, facts.st_ctime_ns)
    if time.time_ns() - changed_ns < _SETTLED_NS:
        return None
    return f"{facts.st_dev}.{facts.st_ino}.{facts.st_mtime_ns}.{facts.st_ctime_ns}"


def _names(place: Path) -> set[str] | None:
    """The names in a folder; None when it cannot be listed."""
    try:
        return set(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None
