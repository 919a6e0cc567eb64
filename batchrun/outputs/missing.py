"""Images that were saved and are not there any more: deleted or moved behind our back.

Nothing is done about them by itself. Whoever sorts out the bad pictures of a run does not want them back, and
buying anew costs money; but a count that includes them must not be told without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Missing:
    """Saved images that are not in their place."""

    #: At least 1.
    images: int
    #: Path of the first one, relative to the run's folder.
    first: str


def missing(folder: Path, paths: Iterable[str]) -> Missing | None:
    """Which of the images saved at these paths (relative to `folder`, with `/`) are not there; None: all are.

    Quick where paths of one subfolder follow each other: each is listed once, no file is opened. A subfolder
    that cannot be listed for another reason than its absence counts as whole: nothing is known against it.
    """
    listed: str | None = None
    names: set[str] | None = None
    images, first = 0, ""
    for path in paths:
        place, _, name = path.rpartition("/")
        if place != listed:
            listed, names = place, _names(folder / place)
        if names is not None and name not in names:
            images, first = images + 1, first or path
    return Missing(images, first) if images else None


def _names(place: Path) -> set[str] | None:
    """The names in a folder; None when it cannot be listed."""
    try:
        return set(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None
