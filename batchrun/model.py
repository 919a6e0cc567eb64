"""The words of the project as frozen records and enums; they know nothing of files, SQL or HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

#: What a manifest cell can hold: CSV gives text; JSONL any JSON value (floats as Decimal, digits kept).
Cell = Any
#: A parameter's value as it is sent: text, an integer, or a list of texts (multiselect).
Value = str | int | list[str]


# --- tools: what can be asked for -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """An extra numeric parameter that comes with a chosen option (a LoRA's scale)."""

    id: str
    type: str
    minimum: Decimal | None
    maximum: Decimal | None
    default: str
    step: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of a select or multiselect parameter."""

    value: str
    label: str
    description: str = ""
    #: Words the prompt must contain for the option to take effect.
    trigger_words: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a tool, in the page's words."""

    name: str
    type: str
    default: str
    label: str = ""
    help: str = ""
    #: None: the page lists no options; empty: the list is there but empty (any id goes).
    options: tuple[Option, ...] | None = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool description: what a request to it may hold."""

    #: The tool's short name, the last part of its run path: `instant-id`.
    slug: str
    #: The path of its Run endpoint under the base address: `/Run/wiro/instant-id`.
    run_path: str
    title: str
    description: str
    categories: tuple[str, ...]
    #: In the page's order.
    parameters: tuple[Parameter, ...]

    @property
    def owner(self) -> str:
        """The owner's part of the run path: `wiro`."""
        return self.run_path.split("/")[-2]

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that exact name, or None."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


# --- manifest: what is asked for ---------------------------------------------------------------


class Severity(StrEnum):
    """How much a Problem matters: errors stop the run, warnings and hints are told."""

    ERROR = "error"
    WARNING = "warning"
    HINT = "hint"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a place of the user's input, and what to write instead."""

    message: str
    file: str = ""
    #: From 1; 0 when the whole file is meant.
    line: int = 0
    #: The column's (or key's) name as the user wrote it; empty when the whole row is meant.
    column: str = ""
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return ": ".join(part for part in (place, self.column, self.message) if part)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One manifest row as read: cells by column name, absent where CSV is empty."""

    #: The line on which the row begins, from 1.
    line: int
    cells: Mapping[str, Cell]


@dataclass(slots=True)
class Block:
    """Consecutive manifest rows of the same columns in the same order, each with a cell for every column."""

    #: The header's names, "" for an unnamed column; or the keys of JSON objects.
    columns: Sequence[str] = ()
    #: The line on which each row begins, from 1.
    lines: list[int] = field(default_factory=list)
    #: By row; in a table blank ones among them.
    cells: list[list[Cell]] = field(default_factory=list)
    #: Of a table: its cells are text, a blank one is none.
    is_table: bool = True

    def row(self, at: int) -> SourceRow:
        """One of them by itself; in a table without its blank cells."""
        cells = zip(self.columns, self.cells[at], strict=True)
        if not self.is_table:
            return SourceRow(self.lines[at], dict(cells))
        return SourceRow(
            self.lines[at], {name: cell for name, cell in cells if name and cell and not cell.isspace()}
        )

    def rows(self) -> Iterator[SourceRow]:
        """All of them."""
        return map(self.row, range(len(self.lines)))

    def parts(self, rows: int) -> Iterator[Block]:
        """The same rows, so many to a block at most."""
        if len(self.lines) <= rows:
            yield self
            return
        for at in range(0, len(self.lines), rows):
            to = at + rows
            yield Block(self.columns, self.lines[at:to], self.cells[at:to], self.is_table)


@dataclass(frozen=True, slots=True)
class LocalImage:
    """A parameter's value that is a local image still to be uploaded."""

    #: As written in the manifest.
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """A row bound to a tool's parameters: what the row gives, checked; defaults are added when it is sent."""

    #: Values by parameter name, only those the row (or `set`, or an expansion) gives.
    given: Mapping[str, Value | LocalImage]
    #: How many images the tool will make for it.
    images: int
    problems: tuple[Problem, ...] = ()


# --- the service: tasks --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The service's answer to a submit."""

    task_id: str
    token: str


@dataclass(frozen=True, slots=True)
class RemoteOutput:
    """One output of a task as the service lists it."""

    name: str
    #: None: the service gives no address (a raw text output).
    url: str | None
    content_type: str = ""
    #: As declared; None when missing or not a number.
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A task as Task/Detail or Task/List shows it, read liberally."""

    id: str
    token: str = ""
    status: str = ""
    #: "0" is success; None when absent, null or empty.
    pexit: str | None = None
    outputs: tuple[RemoteOutput, ...] = ()
    #: USD as charged; None when not told.
    cost_usd: Decimal | None = None
    #: Unix seconds by the service's clock; None when unset.
    created_at: int | None = None
    started_at: int | None = None
    ended_at: int | None = None
    elapsed_s: Decimal | None = None
    #: The parameters echoed; None when the service echoes none.
    parameters: Mapping[str, Any] | None = None
    #: What the tool wrote to its error stream; not by itself a failure.
    debug_error: str = ""
    #: The service's id of the tool, when told.
    model_id: str = ""


# --- the state of a run --------------------------------------------------------------------------


class State(StrEnum):
    """Where a row stands."""

    PLANNED = "planned"
    #: The intent is recorded; the submit may have been sent.
    SUBMITTING = "submitting"
    #: Accepted by the service, not yet terminal.
    IN_FLIGHT = "in_flight"
    #: A submit may have reached the service and its answer is unknown.
    IN_DOUBT = "in_doubt"
    #: Finished at the service: outputs and cost are recorded, images are still to be saved.
    FINISHED = "finished"
    #: Every image is on disk.
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    #: The row cannot become a request and was skipped by the user's word.
    INVALID = "invalid"


#: States in which a row rests until someone asks for it again.
TERMINAL = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.INVALID})
#: States in which a task may be active at the service.
ACTIVE = frozenset({State.SUBMITTING, State.IN_FLIGHT, State.IN_DOUBT})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row is not done: a short stable cause for grouping, and the words for people."""

    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try for a row: an intent, and what became of it."""

    #: From 1.
    number: int
    task_id: str | None = None
    token: str = ""
    #: UTC unix seconds by our clock.
    intent_at: float = 0.0
    #: The service's time at the intent, by its Date header; None when not known.
    intent_server_at: float | None = None
    #: The newest task id known before the intent; None when none was.
    after_task: int | None = None
    status: str = ""
    pexit: str | None = None
    cost_usd: Decimal | None = None
    error: str = ""
    #: How long the task ran, as the service tells it.
    seconds: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One output file of a row's task."""

    #: From 0, in the service's order.
    index: int
    url: str | None
    name: str = ""
    content_type: str = ""
    #: As the service declared; None when it did not.
    declared_bytes: int | None = None
    #: Relative to the run folder, with `/`; None until saved.
    path: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    media_type: str | None = None
    width_px: int | None = None
    height_px: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the run as stored: one request, and where it stands."""

    #: The row's number in the run, from 1, in first-seen order; never changes.
    seq: int
    #: The row's identity text: its id, or a content hash with a number.
    key: str
    #: The user's id (with `.n` when expanded), or None.
    id: str | None
    line: int
    #: The file name stem of its images.
    name: str
    #: The description the request was bound to, by number in the run's record; see Store.tool.
    tool: int
    given: Mapping[str, Value | LocalImage]
    extra: Mapping[str, Any]
    images: int
    state: State
    attempts: int = 0
    failure: Failure | None = None
    attempt: Attempt | None = None
    outputs: tuple[Output, ...] = ()
    #: How often a finished row was asked for anew; 0 at first.
    generation: int = 0
    #: The hash of what it asks for, in hex.
    content: str = ""
    #: Whether the manifest as last read has it; what was begun for others is finished, and not counted.
    present: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of the present manifest by state, and what they brought."""

    by_state: Mapping[State, int] = field(default_factory=dict)
    images: int = 0
    bytes: int = 0
    cost_usd: Decimal = Decimal(0)

    @property
    def total(self) -> int:
        """All rows of the present manifest."""
        return sum(self.by_state.values())
