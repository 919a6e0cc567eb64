"""What the names in a job, in its manifest and in its tools have to do with each other.

Columns stand for parameters, under their own names or as `--map` says; a row names its tool, or the job does.
Names that mean nothing are mistakes: those of settings are told at the end, once all tools are known, those
of columns as strangers.py has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchrun.errors import UsageError
from batchrun.manifest.job import Job
from batchrun.manifest.json_text import shown
from batchrun.model import Cell, SourceRow, Tool
from batchrun.store.records import dumps
from batchrun.tools.bind import Binder, closest
from batchrun.tools.catalog import Catalog, to_json

ID, TOOL = "id", "tool"
#: Names of tools that are remembered, wrong ones among them; longer ones are not.
_REMEMBERED = 1000
_LONGEST_NAME = 200
#: Names of columns that are remembered; every row of JSON may have its own.
_MAX_COLUMNS = 1000


@dataclass(slots=True)
class ToolInUse:
    """A tool that some rows ask for."""

    tool: Tool
    binder: Binder
    #: Its description's in the run's record.
    number: int
    #: What columns stand for, as far as that is a parameter of the tool.
    meant: dict[str, list[str]] = field(default_factory=dict)
    #: The names that columns may have, by the same in lower case.
    spellings: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.spellings = {name.casefold(): name for name in (*self.binder.names, ID, TOOL)}


class Names:
    """The names of one job; `number_of` gives a tool description (JSON text) its number."""

    def __init__(self, job: Job, catalog: Catalog, number_of: Callable[[str], int]) -> None:
        #: Names of parameters that some tool of the manifest knows.
        self.useful: set[str] = set()
        self._job = job
        self._catalog = catalog
        self._number_of = number_of
        self._tools: dict[str, ToolInUse | UsageError] = {}
        self._parameters: dict[str, list[str]] = {}
        for parameter, column in job.map.items():
            self._parameters.setdefault(column, []).append(parameter)
        self._unseen_columns = set(job.map.values())
        #: Names of columns, as far as they are remembered.
        self._columns: set[str] = set()

    def tool(self, name: str | None) -> ToolInUse:
        """The tool of that name, or of the job; raises UsageError when there is none."""
        name = name or self._job.tool
        if name is None:
            raise UsageError("the row names no tool; use --tool TOOL or give the manifest a column tool")
        used = self._tools.get(name)
        if used is None:
            try:
                tool = self._catalog.find(name)
                same = next(
                    (u for u in self._tools.values() if isinstance(u, ToolInUse) and u.tool == tool), None
                )
                used = same or self._begin(tool)
            except UsageError as error:
                if len(self._tools) >= _REMEMBERED or len(name) > _LONGEST_NAME:
                    raise
                used = error
            self._tools[name] = used
        if isinstance(used, UsageError):
            raise used
        return used

    def _begin(self, tool: Tool) -> ToolInUse:
        binder = Binder(tool, lora_scale=self._job.lora_scale)
        self.useful.update(binder.names)
        described = {**to_json(tool), "lora_scale": self._job.lora_scale}  # all that a request is made by
        return ToolInUse(tool, binder, self._number_of(dumps(described)))

    def column(self, name: str) -> str:
        """The manifest's column that holds a parameter, the id or the tool."""
        return self._job.map.get(name, name)

    def meant_by(self, column: str) -> Sequence[str]:
        """The parameters a column stands for; none when its own is taken from another column."""
        own = () if column in self._job.map else (column,)
        return self._parameters.get(column, own)

    def given(self, row: SourceRow, parameter: str) -> Cell:
        """What a row itself gives for a parameter; None: nothing."""
        column = self.column(parameter)
        return row.cells.get(column) if parameter in self.meant_by(column) else None

    def text(self, row: SourceRow, name: str) -> tuple[str | None, str]:
        """A row's id or tool, and what is wrong with it; whole numbers are taken by their digits."""
        cell = row.cells.get(self.column(name))
        if cell is None:
            return None, ""
        if isinstance(cell, bool) or not isinstance(cell, (str, int)):
            return None, f"must be text, not {json.dumps(cell, default=str)[:40]}"
        return str(cell).strip() or None, ""

    def sorted(self, row: SourceRow, used: ToolInUse) -> tuple[dict[str, Cell], dict[str, Cell]]:
        """The row's cells by parameter, and those by column that are no parameter of its tool."""
        cells: dict[str, Cell] = {}
        unknown: dict[str, Cell] = {}
        named = (self.column(ID), self.column(TOOL))
        meant = used.meant
        for column, cell in row.cells.items():
            known = meant.get(column)
            if known is None:
                known = [name for name in self.meant_by(column) if used.binder.knows(name)]
                if known:  # what a tool knows is bounded
                    meant[column] = known
            for name in known:
                cells[name] = cell
            if not known and column not in named:
                unknown[column] = cell
        return cells, unknown

    def see(self, columns: Iterable[str]) -> None:
        """Note the columns of some rows."""
        self._unseen_columns.difference_update(columns)
        if len(self._columns) < _MAX_COLUMNS:
            self._columns.update(columns)

    def mistaken(self) -> Iterator[tuple[str, str]]:
        """Settings with names that no tool of the manifest knows: (the setting, what is wrong)."""
        if not any(isinstance(used, ToolInUse) for used in self._tools.values()):
            return
        for option, names, useful in (
            ("--set", list(self._job.set), self.useful),
            ("--map", list(self._job.map), self.useful | {ID, TOOL}),
            ("--expand", [axis.name for axis in self._job.axes], self.useful),
        ):
            for name in names:
                if name not in useful:
                    told = ("no tool of the manifest has this parameter", likely_meant(name, useful))
                    yield f"{option} {name}", "; ".join(filter(None, told))
        for parameter, column in self._job.map.items():
            if column in self._unseen_columns:
                meant = likely_meant(column, sorted(self._columns - {""}))
                told = (f'the manifest has no column "{column}"', meant)
                yield f"--map {parameter}={column}", "; ".join(filter(None, told))


def form_columns(job: Job, columns: Sequence[str]) -> list[str]:
    """A table's columns and those that its expansion adds."""
    added = [job.map.get(axis.name, axis.name) for axis in job.axes]
    return [*columns, *(name for name in added if name not in columns)]


def likely_meant(name: str, names: Iterable[str]) -> str:
    """What a name that means nothing was probably meant to be, as a question; "" when nothing is like it."""
    near = closest(name, names)
    if near is None:
        return ""
    case = " (upper and lower case matter)" if near.casefold() == name.casefold() else ""
    return f"did you mean {shown(near)[1:-1]}?{case}"
