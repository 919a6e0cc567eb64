"""Requests of a manifest as read, on their way into the state: one by one, or many by the column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Staged(NamedTuple):
    """One request of the manifest as read, to be merged."""

    line: int
    id: str | None
    #: Hash of what is asked for: tool, values, contents of local files.
    content: bytes
    #: The same without what `--set` adds.
    own: bytes
    #: The tool description's number; None for an invalid row.
    tool: int | None
    given: str
    extra: str
    images: int
    #: What is kept of the row as the manifest had it (records.given_back); None: what it gives tells it.
    cells: str | None
    #: What is wrong with an invalid row; None for a good one.
    message: str | None = None


@dataclass(frozen=True, slots=True)
class StagedBlock:
    """Requests of one tool that carry nothing beside parameters, none of them wrong, by the column."""

    lines: Sequence[int]
    ids: Sequence[str | None]
    contents: Sequence[bytes]
    own: Sequence[bytes]
    tool: int
    given: Sequence[str]
    images: Sequence[int]
    #: By place in the block; no others have any.
    cells: Mapping[int, str]

    def row(self, at: int) -> Staged:
        """One of them by itself."""
        return Staged(
            self.lines[at], self.ids[at], self.contents[at], self.own[at], self.tool, self.given[at], "{}",
            self.images[at], self.cells.get(at),
        )  # fmt: skip
