"""One pass over a manifest: every row becomes the requests it stands for, or problems at its place.

A row's way: columns are named as parameters, values of `set` fill what it does not give, its expansion makes
requests of it, each is bound to the tool. Nothing is kept of a row but what it stages, so memory does not
grow with the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from batchrun.errors import ManifestError, UsageError
from batchrun.manifest.expand import Axis, Expansion
from batchrun.manifest.job import Job
from batchrun.manifest.json_text import encode, shown
from batchrun.model import Block, Cell, Problem, Request, Severity, SourceRow
from batchrun.plan.columns import Columns
from batchrun.plan.findings import Findings
from batchrun.plan.hints import Hints
from batchrun.plan.identity import content_hash
from batchrun.plan.inputs import LocalImages
from batchrun.plan.kept import kept
from batchrun.plan.names import ID, TOOL, Names, ToolInUse, form_columns
from batchrun.plan.strangers import Strangers
from batchrun.store.planning import Planning
from batchrun.store.records import cells_given, given_to_json
from batchrun.store.staged import Staged
from batchrun.tools.bind import Refused
from batchrun.tools.catalog import Catalog

#: Far above what any tool makes for one request; what the state can hold and add up.
MAX_IMAGES = 100_000
#: Headers whose rows are bound together, and how many requests at once; JSON objects may each have their own.
_HEADERS = 4
_TOGETHER = 2000


class Rows(Protocol):
    """What is read: rows and problems, with the manifest's form."""

    @property
    def columns(self) -> list[str] | None:
        """The header's names; None when rows name their own cells (JSON)."""
        ...

    @property
    def blank_is_default(self) -> bool:
        """Whether a blank cell means the tool's default."""
        ...

    @property
    def complete(self) -> bool:
        """Whether reading came to the end."""
        ...

    def blocks(self) -> Iterator[Block | SourceRow | Problem]:
        """Every row in order, by itself or with others of its kind, and problems of form."""
        ...


@dataclass(frozen=True, slots=True)
class _Line:
    """A manifest row on its way to requests."""

    row: SourceRow
    id: str | None
    used: ToolInUse
    #: What it carries beside parameters.
    extra: Mapping[str, Cell]
    #: Columns that make it wrong.
    faults: tuple[str, ...]


class _EmptyList(Exception):
    """A list of alternatives has none."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Reading:
    """Reads one manifest for one job into a Planning."""

    def __init__(
        self, job: Job, catalog: Catalog, planning: Planning, *, name: str, checkpoint: Callable[[], None]
    ) -> None:
        self.findings = Findings()
        self.rows_by_tool: Counter[str] = Counter()
        #: Of these, the ones that can be asked for.
        self.valid_by_tool: Counter[str] = Counter()
        #: Rows of the run that is planned: requests, and what could not become one.
        self.requests = 0
        #: Of the rows that can be asked for.
        self.images = 0
        self._job = job
        self._planning = planning
        self._name = name
        self._checkpoint = checkpoint
        self._hints = Hints()
        folder = Path(job.manifest).parent if isinstance(job.manifest, Path) else Path.cwd()
        self._images = LocalImages(folder, allow_outside=job.allow_outside)
        self._axes = job.axes
        self._laid = {axis.name for axis in job.axes}
        self._names = Names(job, catalog, planning.tool)
        self._strangers = Strangers(self._names)
        #: The columns of a table and of its expansion; None: rows name their own cells.
        self._header: frozenset[str] | None = None
        #: How rows of a header are bound together; None: each by itself.
        self._together: dict[tuple[str, ...], tuple[ToolInUse | None, Columns | None]] = {}
        self._expanded = 0
        self._is_too_many = False

    def read(self, manifest: Rows) -> None:
        """Read to the end; `findings` then says what is wrong, and the planning holds the rows."""
        blank = manifest.blank_is_default
        misread: Problem | None = None
        for number, item in enumerate(manifest.blocks()):
            if number % 500 == 0 or isinstance(item, Block):
                self._checkpoint()
            if self._header is None and manifest.columns is not None:
                self._header = frozenset(form_columns(self._job, manifest.columns))
            if isinstance(item, Block):
                self._names.see(item.columns)
                self._block(item)
                continue
            if isinstance(item, Problem):
                self.findings.add(item)
                if item.severity is Severity.ERROR:
                    misread = item
                    self._stage_invalid(item.line, None, {}, str(item.message))
                continue
            self._names.see(item.cells)
            self._row(item, blank)
        self._names.see(manifest.columns or ())
        if not manifest.complete:  # the last word of a reading that had to end says why
            self.findings.blocking.append(misread or Problem("was not read to its end", self._name))
        for line, column, message in self._strangers.told():
            self._problem(line, column, message)
        self.findings.error_count += self._strangers.untold
        for setting, message in self._names.mistaken():
            self.findings.block(Problem(message, self._name, 0, setting))
        _, self.images, identical = self._planning.summary()
        self._check_ids()
        self.findings.hints.extend(self._hints.told(file=self._name, identical=identical))

    # --- many rows ----------------------------------------------------------------------------------

    def _block(self, block: Block) -> None:
        """Rows of one header: together where they are simple, one by one where not."""
        used, columns = self._bound_together(block)
        if used is None or columns is None:
            for row in block.rows():
                self._row(row, block.is_table)
            return
        size = len(columns.laid)
        for part in block.parts(max(1, _TOGETHER // size)):
            if size > 1 and self._expanded + size * len(part.lines) > self._job.max_requests:
                for row in part.rows():
                    self._row(row, block.is_table)
            else:
                self._part(part, used, columns)

    def _part(self, block: Block, used: ToolInUse, columns: Columns) -> None:
        """Rows that are bound together, but for some."""
        staged, hard = columns.bind(block)
        size = len(columns.laid)
        simple: Sequence[int] = range(len(staged.lines))
        if not hard:
            self._planning.stage_block(staged)
        else:
            for row in range(len(block.lines)):
                if row in hard:
                    self._row(block.row(row), block.is_table)
                else:
                    for at in range(row * size, (row + 1) * size):
                        self._planning.stage(staged.row(at))
            simple = [at for at in simple if at // size not in hard]
        left = 0
        if used.tool.parameter("samples") is not None and max(staged.images) > 1:
            several = [at for at in simple if staged.images[at] > 1]
            left = sum(value is None for value in columns.given(block, "samples", several))
        seeds = columns.given(block, "seed", simple)
        self._hints.requests(used.tool, len(simple), samples_left=left, seeds=seeds)
        self.rows_by_tool[used.tool.slug] += len(simple)
        self.valid_by_tool[used.tool.slug] += len(simple)
        self.findings.valid_rows += len(simple)
        self.requests += len(simple)
        self._expanded += len(simple) if size > 1 else 0

    def _bound_together(self, block: Block) -> tuple[ToolInUse | None, Columns | None]:
        """How rows of this header are bound; None when each must be read by itself."""
        header = tuple(block.columns)
        if header not in self._together:
            if len(self._together) >= _HEADERS:
                return None, None
            self._together[header] = self._binding(block)
        return self._together[header]

    def _binding(self, block: Block) -> tuple[ToolInUse | None, Columns | None]:
        job, header = self._job, block.columns
        if job.tool is None or self._names.column(TOOL) in header:
            return None, None
        try:
            used = self._names.tool(job.tool)
        except UsageError:
            return None, None
        id_column = self._names.column(ID)
        meant = [
            [name for name in self._names.meant_by(column) if used.binder.knows(name)] for column in header
        ]
        is_unnamed = [block.is_table and not column for column in header]
        parameters = [
            "" if unnamed else "".join(names) for unnamed, names in zip(is_unnamed, meant, strict=True)
        ]
        strange = [
            column
            for column, unnamed, names in zip(header, is_unnamed, meant, strict=True)
            if not unnamed and (len(names) > 1 or (column == id_column) == bool(names))
        ]
        given = list(filter(None, parameters))
        axes = tuple(axis for axis in self._axes if used.binder.knows(axis.name))
        expansion = Expansion(axes, job.repeat)
        if strange or len(set(given)) < len(given) or expansion.size > _TOGETHER:
            return None, None
        try:
            columns = Columns(
                header,
                parameters,
                header=self._header,
                id_at=list(header).index(id_column) if id_column in header else None,
                run_path=used.tool.run_path,
                tool=used.number,
                binder=used.binder,
                set_values={name: value for name, value in job.set.items() if used.binder.knows(name)},
                laid=[overlay for _, overlay in expansion],
                laid_in={axis.name: self._names.column(axis.name) for axis in axes},
                read_image=self._images.read,
                max_images=MAX_IMAGES,
            )
        except (Refused, ManifestError):
            return None, None
        return used, columns

    # --- one row ------------------------------------------------------------------------------------

    def _row(self, row: SourceRow, blank_is_default: bool) -> None:
        id_, id_fault = self._names.text(row, ID)
        tool_name, tool_fault = self._names.text(row, TOOL)
        try:
            if tool_fault:
                raise UsageError(tool_fault)
            used = self._names.tool(tool_name)
        except UsageError as error:
            self._refuse(row, id_, self._names.column(TOOL) if tool_name or tool_fault else "", str(error))
            return
        if id_fault:
            self._refuse(row, None, self._names.column(ID), id_fault)
            return
        cells, unknown = self._names.sorted(row, used)
        extra, faults = self._extra(row, unknown, used)
        for name, value in self._job.set.items():
            if used.binder.knows(name) and cells.get(name) is None:
                cells[name] = value
        try:
            expansion = self._expansion(row, cells, used)
        except _EmptyList as empty:
            message = "the list is empty; write at least one value, or null for the default"
            self._refuse(row, id_, self._names.column(empty.name), message)
            return
        if expansion.size > 1:
            self._expanded += expansion.size
            if self._expanded > self._job.max_requests:
                self._too_many(row.line)
                return
        line = _Line(row, id_, used, extra, faults)
        for n, overlay in expansion:
            self._request(
                line, {**cells, **overlay}, overlay, n if expansion.size > 1 else 0, blank_is_default
            )

    def _request(
        self,
        line: _Line,
        cells: Mapping[str, Cell],
        overlay: Mapping[str, Cell],
        n: int,
        blank_is_default: bool,
    ) -> None:
        """One request of a row; `n` is its number when the row stands for several, else 0."""
        row, used = line.row, line.used
        self.rows_by_tool[used.tool.slug] += 1
        id_ = f"{line.id}.{n}" if line.id is not None and n else line.id
        source = self._source(row, id_, overlay) if n else row.cells
        try:
            request = used.binder.bind(cells, blank_is_default=blank_is_default, read_image=self._images.read)
            if request.images > MAX_IMAGES:
                told = f"{request.images:,} images cannot be meant; write {MAX_IMAGES:,} at most"
                raise ManifestError([Problem(told, column="samples")])
        except ManifestError as error:
            for problem in error.problems:
                self.findings.add(self._placed(problem, row))
            wrong = (*line.faults, *(str(problem) for problem in error.problems))
            self._stage_invalid(row.line, id_, source, "; ".join(wrong))
            return
        for problem in request.problems:
            self.findings.add(self._placed(problem, row))
        if line.faults:
            self._stage_invalid(row.line, id_, source, "; ".join(line.faults))
            return
        self.findings.valid_rows += 1
        self.valid_by_tool[used.tool.slug] += 1
        self._hints.request(used.tool, request)
        content = content_hash(used.tool.run_path, request.given)
        by_set = {
            name for name in self._job.set if name not in overlay and self._names.given(row, name) is None
        }
        own = content_hash(used.tool.run_path, request.given, without=by_set) if by_set else content
        self.requests += 1
        self._planning.stage(
            Staged(
                line=row.line,
                id=id_,
                content=content,
                own=own,
                tool=used.number,
                given=given_to_json(request.given),
                extra=encode(dict(line.extra)) if line.extra else "{}",
                images=request.images,
                cells=self._cells(source, id_, request),
            )
        )

    def _cells(self, source: Mapping[str, Cell], id_: str | None, request: Request) -> str | None:
        """What is kept of the row as the manifest had it."""
        told = cells_given(id_, request.given, self._header)
        return kept(told, source, in_order=self._header is None)

    def _refuse(self, row: SourceRow, id_: str | None, column: str, message: str) -> None:
        """The whole row is wrong."""
        self._problem(row.line, column, message)
        self._stage_invalid(row.line, id_, row.cells, message)

    def _stage_invalid(self, line: int, id_: str | None, cells: Mapping[str, Cell], message: str) -> None:
        text = encode(dict(cells))
        content = content_hash("invalid", {"cells": text})
        self.requests += 1
        self._planning.stage(Staged(line, id_, content, content, None, "{}", "{}", 0, text, message=message))

    def _source(self, row: SourceRow, id_: str | None, overlay: Mapping[str, Cell]) -> dict[str, Cell]:
        """The row as it would stand in a manifest of its own, with the values of its expansion."""
        source = dict(row.cells)
        for name, value in overlay.items():
            source[self._names.column(name)] = value
        if id_ is not None:
            source[self._names.column(ID)] = id_
        return source

    # --- its parts ---------------------------------------------------------------------------------------

    def _extra(
        self, row: SourceRow, unknown: Mapping[str, Cell], used: ToolInUse
    ) -> tuple[dict[str, Cell], tuple[str, ...]]:
        """What the row carries beside parameters, and what is wrong with that."""
        if not unknown:
            return {}, ()
        if self._job.extra == "error":
            columns = [name for name, cell in unknown.items() if cell is not None]
            return {}, self._strangers.add(columns, row.line, used.tool.slug)
        self._hints.unused(unknown)
        self._hints.misspelt(unknown, used.spellings)
        return (dict(unknown) if self._job.extra == "keep" else {}), ()

    def _expansion(self, row: SourceRow, cells: Mapping[str, Cell], used: ToolInUse) -> Expansion:
        """What the row stands for. Its own value wins over an axis of the job's, as it does over `set`."""
        axes = []
        for axis in self._axes:
            if not used.binder.knows(axis.name):
                continue
            if self._names.given(row, axis.name) is None:
                axes.append(axis)
            else:
                self._hints.unexpanded(axis.name)
        laid = {axis.name for axis in axes}
        for name, cell in cells.items():
            if type(cell) is list and name not in laid and used.binder.expandable(name, cell):
                if not cell:
                    raise _EmptyList(name)
                axes.append(Axis(name, tuple(cell)))
        return Expansion(tuple(axes), self._job.repeat)

    # --- problems ---------------------------------------------------------------------------------------

    def _placed(self, problem: Problem, row: SourceRow) -> Problem:
        """A binder's problem at its place in the manifest, under the column's own name."""
        column = self._names.column(problem.column)
        if problem.column in self._laid and self._names.given(row, problem.column) is None:
            column = f"--expand {problem.column}"
        elif column not in row.cells and problem.column in self._job.set:
            column = f"--set {problem.column}"
        return replace(problem, file=self._name, line=row.line, column=column)

    def _problem(self, line: int, column: str, message: str) -> None:
        self.findings.add(Problem(message, self._name, line, column))

    def _too_many(self, line: int) -> None:
        if self._is_too_many:
            return
        self._is_too_many = True
        told = (
            f"the expansion makes more than {self._job.max_requests:,} requests; "
            "narrow it, or allow it with --max-requests N"
        )
        self.findings.block(Problem(told, self._name, line))

    def _check_ids(self) -> None:
        for twice in self._planning.duplicates():
            told = (
                f"{shown(twice.id)} is already the id of line {twice.first_line}; write an id of its own, "
                "or leave ids out"
            )
            self.findings.block(Problem(told, self._name, twice.line, self._names.column(ID)))
