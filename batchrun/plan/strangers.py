"""Columns that are no parameter of the tool of some rows: one mistake each, however many rows it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from batchrun.plan.findings import MAX_PROBLEMS
from batchrun.plan.names import ID, TOOL, Names, likely_meant

#: Columns told one by one; every row of JSON may have its own.
MAX_STRANGERS = 1000
#: What is told of one row's columns.
_MAX_FAULTS = 20


@dataclass(slots=True)
class _Stranger:
    """One of these columns."""

    #: (line, the tool's name) of its rows, as far as they are kept.
    places: list[tuple[int, str]] = field(default_factory=list)
    rows: int = 0


class Strangers:
    """Such columns of one manifest, whose rows they make wrong."""

    def __init__(self, names: Names) -> None:
        #: Errors that are counted and not told.
        self.untold = 0
        self._names = names
        self._columns: dict[str, _Stranger] = {}
        #: How many of their places are kept.
        self._places = 0

    def add(self, columns: list[str], line: int, slug: str) -> tuple[str, ...]:
        """Take in those of a row; returns what is wrong with it."""
        for name in columns:
            if name not in self._columns and len(self._columns) >= MAX_STRANGERS:
                self.untold += 1
                continue
            stranger = self._columns.setdefault(name, _Stranger())
            stranger.rows += 1
            if self._places < MAX_PROBLEMS or not stranger.places:
                self._places += 1
                stranger.places.append((line, slug))
        faults = [f"{name}: is no parameter of {slug}" for name in columns[:_MAX_FAULTS]]
        if len(columns) > _MAX_FAULTS:
            faults.append(f"and {len(columns) - _MAX_FAULTS:,} more columns that are none")
        return tuple(faults)

    def told(self) -> Iterator[tuple[int, str, str]]:
        """The errors: (line, column, what is wrong)."""
        names = self._names
        for name, stranger in self._columns.items():
            if not names.useful.isdisjoint(names.meant_by(name)):
                for line, slug in stranger.places:
                    yield line, name, f"is a parameter of another tool, not of {slug}; leave it empty"
                self.untold += stranger.rows - len(stranger.places)
                continue
            line, slug = stranger.places[0]
            advice = f"{meant} " if (meant := likely_meant(name, names.useful | {ID, TOOL})) else ""
            if (column := names.column(name)) != name:
                advice = f"{name} is taken from column {column}; "
            rows = f" ({stranger.rows:,} rows)" if stranger.rows > 1 else ""
            yield (
                line,
                name,
                f"is no parameter of {slug}{rows}; {advice}"
                "--extra keep carries such columns to the results, --extra drop leaves them out",
            )
