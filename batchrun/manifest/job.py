"""A job: everything a run can be told, from a `.toml` file, the command line or Python, checked once.

This is the only module of the manifest room that imports pydantic, since here settings enter as text. A Job
is frozen and its paths are absolute, so it means the same wherever it is read again; it holds no keys.

A job file holds the fields of Job by their names, with tables for `set`, `map` and `expand`:

    manifest = "prompts.csv"       # paths are relative to the job file
    tool = "instant-id"
    [set]
    samples = 1
    [map]
    prompt = "caption"             # the parameter's value is in the column "caption"
    [expand]
    seed = "1..4"
    repeat = 2
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from batchrun.errors import JobError, UsageError
from batchrun.manifest import json_text
from batchrun.manifest.expand import Axis, check_name, parse_axis, parse_values
from batchrun.model import Problem
from batchrun.rules.halt import parse_halt

MIB = 1024 * 1024
#: Standard input as a manifest.
STDIN: Literal["-"] = "-"


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """Paths are made absolute where they enter, from `context["base"]` or the current folder."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f'must be a path in quotes, as in "folder/name", not {_shown(value)}')
    base = (info.context or {}).get("base", "")
    return Path(os.path.abspath(os.path.join(base, text)))


def _manifest(value: Any, info: ValidationInfo) -> Any:
    return value if value == STDIN else _absolute(value, info)


def _value(value: Any) -> Any:
    """A JSON value with its floats as Decimal; ValueError for what a request cannot hold."""
    match value:
        case None | bool() | str() | int():
            return value
        case float() | Decimal():
            if not math.isfinite(value):
                raise ValueError("must be a finite number")
            return value if isinstance(value, Decimal) else Decimal(repr(value))
        case list() | tuple():
            return [_value(item) for item in value]
        case dict():
            return {str(name): _value(item) for name, item in value.items()}
        case _:
            raise ValueError(f"is {json_text.kind(value)}; write it as text in quotes")


def _json_value(value: Any) -> Any:
    try:
        json_text.check_depth(value)
        value = _value(value)
        json_text.check_text(value)
    except RecursionError:
        raise ValueError("is nested too deep; flatten it") from None
    return value


def _axis_name(name: str) -> str:
    try:
        check_name(name)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return name


def _set_name(name: str) -> str:
    if name == "id":
        raise ValueError("cannot be the same for all rows; take it out, or map it: id = the column's name")
    if name == "tool":
        raise ValueError("is no parameter; write the tool of all rows as tool (--tool)")
    return name


def _spec(value: Any) -> Any:
    value = _json_value(value)
    try:
        parse_values(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def _concurrency(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_COUNT):
        return value
    raise ValueError(f'must be a whole number from 1 or "auto", not {_shown(value)}; write 8 or "auto"')


def _delimiter(value: Any) -> Any:
    named = {"tab": "\t", "\\t": "\t"}.get(value, value) if isinstance(value, str) else value
    if not isinstance(named, str) or len(named) != 1 or named in '"\r\n\0':
        raise ValueError(f'must be one character such as ";" or "tab", not {_shown(value)}')
    return named


def _usd(value: Any) -> Any:
    try:
        amount = None if isinstance(value, bool) else Decimal(str(value))
    except InvalidOperation:
        amount = None
    if amount is None or not amount.is_finite() or not 0 < amount <= MAX_COUNT:
        raise ValueError(f"must be an amount in USD above 0, as in 12.50, not {_shown(value)}")
    return amount


def _seconds(value: Any) -> Any:
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT:
        return float(value)
    form = re.fullmatch(r"([0-9]{1,9})\s*([smh]?)", value, re.ASCII) if isinstance(value, str) else None
    if form is None:
        raise ValueError(f'must be a time such as "90s", "30m" or "2h", not {_shown(value)}')
    return float(form[1]) * {"s": 1, "m": 60, "h": 3600}[form[2] or "s"]


def _looks_per_s(value: Any) -> Any:
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and 0.1 <= value <= 1000:
        return float(value)
    raise ValueError(f"must be requests per second from 0.1 to 1000, not {_shown(value)}; write 50")


def _halt(value: Any) -> Any:
    if isinstance(value, str):
        parse_halt(value)
        return value
    raise ValueError(f'must be "never", "fail=10" or "fail=5%", not {_shown(value)}')


#: Of one fault; the longest of ours lists all keys of a job file.
MAX_MESSAGE_CHARS = 1500
#: Far above any use; keeps numbers within what databases and clocks hold.
MAX_COUNT = 1_000_000_000

Count = Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)]
Bytes = Annotated[StrictInt, Field(ge=1, le=2**40)]
Name = Annotated[StrictStr, Field(min_length=1)]
AxisName = Annotated[Name, AfterValidator(_axis_name)]
SetName = Annotated[Name, AfterValidator(_set_name)]
JsonValue = Annotated[Any, BeforeValidator(_json_value)]


class Job(BaseModel):
    """A manifest plus settings. Job(...) raises pydantic.ValidationError; job_for and load_job raise ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Annotated[Literal["-"] | Path, BeforeValidator(_manifest)] = Field(
        description='The file of rows (csv, tsv, jsonl, json, each also .gz), or "-" for standard input.'
    )
    tool: Name | None = Field(None, description="The tool of every row that names none itself.")
    set: dict[SetName, JsonValue] = Field(
        default_factory=dict, description="Parameter → value for every row that does not give it itself."
    )
    map: dict[Name, Name] = Field(
        default_factory=dict, description="Parameter → column that holds it, for columns of other names."
    )
    expand: dict[AxisName, Annotated[Any, BeforeValidator(_spec)]] = Field(
        default_factory=dict,
        description='Parameter → values ("1..4", a list, "random"): a row stands for all combinations.',
    )
    repeat: Count = Field(
        1, description="How often every combination is asked for; in a file: [expand] repeat."
    )
    extra: Literal["error", "keep", "drop"] = Field(
        "error", description="Columns that are no parameters: an error, kept for the results, or dropped."
    )
    format: Literal["csv", "tsv", "jsonl", "json"] | None = Field(
        None, description="The manifest's form; None: by its name's ending. Standard input has no name."
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] | None = Field(
        None, description='What separates cells, one character or "tab"; None: comma in csv, tab in tsv.'
    )
    concurrency: Annotated[int | Literal["auto"], BeforeValidator(_concurrency)] = Field(
        "auto",
        description="Tasks active at the service at once; auto: found by trying, up to max_concurrency.",
    )
    max_concurrency: Count = Field(
        64,
        validate_default=True,
        description="Tasks at once at most: 64 keeps a mistake from flooding an account.",
    )
    downloads: Count = Field(
        16, description="Images fetched at once; apart from tasks, so that a slow CDN holds up no task."
    )
    attempts: Count = Field(
        3,
        description="Submissions per row at most while its tasks fail at the service (unbilled).",
    )
    max_cost: Annotated[Decimal, BeforeValidator(_usd)] | None = Field(
        None, description="What the run may cost in all its starts, in USD; None: no cap."
    )
    max_pause: Annotated[float, BeforeValidator(_seconds)] = Field(
        3600.0, description='How long an exhausted balance is waited for, in seconds, or as in "30m" or "2h".'
    )
    halt: Annotated[str, BeforeValidator(_halt)] | None = Field(
        None,
        description='When failures stop the run: "fail=N" rows, "fail=N%" of the settled ones, or "never"; '
        "None: after 50 in a row for one cause.",
    )
    on_stuck: Literal["leave", "kill"] = Field(
        "leave", description="Tasks that do not move on: left to the next start, or killed and asked anew."
    )
    track: Literal["auto", "detail", "list", "websocket"] = Field(
        "auto",
        description="How tasks are followed: one by one, by pages of the task list, or as the service tells "
        "over a WebSocket; auto: by pages from about 20 on, and over a WebSocket while rows wait for a slot.",
    )
    looks_per_s: Annotated[float, BeforeValidator(_looks_per_s)] = Field(
        50.0, description="Requests per second that following all tasks may make; few tasks need fewer."
    )
    lora_scale: Literal["prompt", "parameter"] = Field(
        "prompt",
        description="How a LoRA's scale is sent: as <lora:ID:VALUE> in the prompt, or by its own name.",
    )
    out: Annotated[Path, BeforeValidator(_absolute)] | None = Field(
        None, description="The run folder; None: runs/<manifest name> under the current folder."
    )
    skip_invalid: StrictBool = Field(False, description="Run the valid rows although others are invalid.")
    rerun_changed: StrictBool = Field(False, description="Buy finished rows again whose request has changed.")
    regenerate_lost: StrictBool = Field(False, description="Buy rows again whose paid task left no images.")
    allow_outside: StrictBool = Field(
        False, description="Let rows name local images outside the manifest's folder."
    )
    max_requests: Count = Field(
        100_000,
        description="Requests that expansion may make of the manifest: more is rarely meant and costs money.",
    )
    limit: Count | None = Field(None, description="Only the first so many requests, for a try; None: all.")
    max_row_bytes: Bytes = Field(
        16 * MIB,
        description="A manifest row's size in bytes at most: real prompts have 10 kB; bounds memory.",
    )
    max_image_bytes: Bytes = Field(
        256 * MIB,
        description="An output's size in bytes at most: many times what tools make; bounds the disk.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hoist_repeat(cls, data: Any) -> Any:
        """`repeat` is written among the axes of [expand], where users look for it, but is not one of them."""
        expand = data.get("expand") if isinstance(data, dict) else None
        if not isinstance(expand, dict) or "repeat" not in expand:
            return data
        if "repeat" in data:
            raise ValueError("repeat is given twice; keep the one under [expand]")
        repeat = expand["repeat"]
        if isinstance(repeat, str) and re.fullmatch("[0-9]{1,18}", repeat.strip()):
            repeat = int(repeat)
        axes = {name: spec for name, spec in expand.items() if name != "repeat"}
        return {**data, "expand": axes, "repeat": repeat}

    @field_validator("max_concurrency")
    @classmethod
    def _holds_concurrency(cls, most: int, info: ValidationInfo) -> int:
        asked = info.data.get("concurrency")
        if isinstance(asked, int) and asked > most:
            raise ValueError(f"is {most} while concurrency is {asked}; write {asked} here too if it is meant")
        return most

    @property
    def name(self) -> str:
        """The manifest's name without its endings (`list` of `list.csv.gz`); "stdin" for standard input."""
        if self.manifest == STDIN:
            return "stdin"
        name = Path(self.manifest).name
        for ending in (".gz", ".csv", ".tsv", ".jsonl", ".ndjson", ".json"):
            if name.lower().endswith(ending):
                name = name[: -len(ending)]
        return name if name.strip(". ") else "manifest"

    @property
    def folder(self) -> Path:
        """The run folder, absolute: `out`, or runs/<manifest name> under the current folder."""
        return self.out or Path.cwd() / "runs" / self.name

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of `expand`, in the order written."""
        return tuple(parse_axis(name, spec) for name, spec in self.expand.items())

    def with_overrides(self, **values: Any) -> Self:
        """This job with `values` over its own; None means not given. `set`, `map` and `expand` merge by key.

        Relative paths are meant from the current folder. Raises UsageError naming options as the command line
        does. A flag that was not given must be None: False is a value, and wins over the file's true.
        """
        return self._checked(_merged(dict(self), values))

    @classmethod
    def _checked(cls, data: Mapping[str, Any]) -> Self:
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            told = (_one_line(f"{_option(key)}: {fault}") for key, fault in _faults(error))
            raise UsageError("\n".join(told)) from None

    def to_json(self) -> str:
        """The job as one line of ASCII JSON, for the run's record; from_json gives the same job back."""
        data = {name: str(value) if isinstance(value, Path) else value for name, value in self}
        return json_text.encode(data, ascii_only=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The job that to_json wrote; raises UsageError when a newer batchrun (or nobody) wrote it."""
        try:
            return cls.model_validate(json.loads(text, parse_float=Decimal))
        except (ValueError, InvalidOperation) as error:
            raise UsageError(
                f"the stored job cannot be read; a newer batchrun may have written it: {error}"
            ) from None


def job_for(path: str | Path, **overrides: Any) -> Job:
    """The job a user names on the command line: a `.toml` job file, or a bare manifest (or "-").

    `overrides` are fields as in with_overrides. Raises JobError for the file, UsageError for the overrides.
    """
    if Path(path).suffix.lower() == ".toml":
        return load_job(Path(path)).with_overrides(**overrides)
    return Job._checked(_merged({"manifest": path}, overrides))


def load_job(path: Path) -> Job:
    """The job of a TOML file, paths relative to it.

    Raises JobError with every fault at once, one per line: `file:line: key: what is wrong, what to write`.
    """
    text = _read(path)
    try:
        data = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        line = int(match[1]) if match else text.count("\n") + 1
        what = re.sub(r" \(at .*\)", "", str(error))
        at = f" at column {match[2]}" if match else " at the end of the file"
        bare = _BARE.fullmatch(text.split("\n")[line - 1]) if match else None
        cure = f'; put text in quotes: {bare[1]} = "{bare[2]}"' if bare else ""
        raise JobError(_one_line(str(Problem(f"not TOML{at}: {what}{cure}", str(path), line)))) from None
    except (ValueError, InvalidOperation, RecursionError):
        raise JobError(f"{path}: a number is too long or the nesting too deep to be meant") from None
    try:
        return Job.model_validate(data, context={"base": path.parent})
    except ValidationError as error:
        expand = data.get("expand")
        among_axes = isinstance(expand, dict) and "repeat" in expand
        problems = []
        for key, fault in _faults(error):
            place = ("expand", "repeat") if key == ("repeat",) and among_axes else key
            problems.append(Problem(fault, str(path), _line_of(text, place), ".".join(place)))
        problems.sort(key=lambda problem: problem.line)
        raise JobError("\n".join(_one_line(str(problem)) for problem in problems)) from None


def parse_assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """The values of a repeated `--set`, `--map` or `--expand` (as `option` says), each `name=value`, by name.

    A value is kept as it is (a column's name loses its outer white space). Raises UsageError.
    """
    given: dict[str, str] = {}
    form = "parameter=column" if option == "--map" else "parameter=value"
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UsageError(f'{option}: "{text}" is not {form}; write {option} "{form}"')
        if name in given:
            raise UsageError(f"{option}: {name} is given twice; keep one of them")
        given[name] = value.strip() if option == "--map" else value
    return given


def _merged(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for name, value in values.items():
        if value is None:
            continue
        if name in {"set", "map", "expand"} and isinstance(value, Mapping):
            value = {**merged.get(name, {}), **value}
            if name == "expand" and "repeat" in value and "repeat" not in values:
                merged.pop("repeat", None)
        merged[name] = value
    return merged


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JobError(str(Problem("not UTF-8; save the file as UTF-8", str(path), line))) from None


def _one_line(message: str) -> str:
    """A message that quotes what was written, line breaks and all, as one line of bearable length."""
    text = "".join(char if char.isprintable() else " " for char in message)
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 3]}..."


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _faults(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """(key, what is wrong and what to write) per fault."""
    found = []
    for fault in error.errors(include_url=False):
        # Union branches and "[key]" markers follow the key; only set, map and expand have a second part.
        key = tuple(str(part) for part in fault["loc"])
        key = key[:2] if key and key[0] in {"set", "map", "expand"} else key[:1]
        found.append((key, _fault(key, fault["type"], fault["input"], fault.get("ctx", {}), fault["msg"])))
    return found


def _fault(key: tuple[str, ...], kind: str, value: Any, facts: Mapping[str, Any], message: str) -> str:
    not_it = (
        f"not {_shown(value)}" if isinstance(value, (str, int, Decimal)) else f"not {json_text.kind(value)}"
    )
    match kind:
        case "value_error":
            return str(facts["error"])
        case "extra_forbidden":
            close = difflib.get_close_matches(key[0], Job.model_fields, n=1)
            advice = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(Job.model_fields)}"
            return f"unknown key; {advice} (a tool's parameters stand under [set])"
        case "missing":
            return f'is missing; write {key[0]} = "prompts.csv"'
        case "int_type" | "int_from_float":
            return f"must be a whole number, {not_it}; write it without quotes, as in 8"
        case "greater_than_equal":
            return f"must be at least {facts['ge']}, {not_it}"
        case "less_than_equal":
            return f"must be at most {facts['le']}, {not_it}"
        case "bool_type":
            return f"must be true or false, {not_it}; write it without quotes"
        case "string_type":
            return f"must be text, {not_it}; put it in quotes"
        case "string_too_short":
            return "is empty; write a name"
        case "literal_error":
            return f"must be {facts['expected']}, {not_it}"
        case "dict_type":
            return f"must be a table, {not_it}; write [{key[0]}] and below it lines of name = value"
        case _:
            return message


def _option(key: tuple[str, ...]) -> str:
    """A key as the command line knows it: `--max-concurrency`, `--set seed`."""
    if not key:
        return "job"
    if key == ("repeat",):
        return "--expand repeat"
    return " ".join((f"--{key[0].replace('_', '-')}", *key[1:]))


#: A value that was meant as text and has no quotes.
_BARE = re.compile(r"\s*([A-Za-z0-9_-]+)\s*=\s*([^\s\"'\[{][^\"'#]*?)\s*(?:#.*)?")
_TABLE = re.compile(r"\s*\[([^\[\]]+)\]")
_KEY = re.compile(r"\s*([^=#\[\]{}]+?)\s*=")


def _line_of(text: str, key: tuple[str, ...]) -> int:
    """The line (from 1) that sets `key`, or the nearest table or key around it; 0 when none is found.

    A simple scan: text in multi-line strings may mislead it, which costs a wrong line number only.
    """
    best, best_line = 0, 0
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        if header := _TABLE.match(line):
            table = here = _parts(header[1])
        elif entry := _KEY.match(line):
            here = (*table, *_parts(entry[1]))
        else:
            continue
        shared = min(len(here), len(key))
        if shared > best and here[:shared] == key[:shared]:
            best, best_line = shared, number
    return best_line


def _parts(dotted: str) -> tuple[str, ...]:
    if dotted[0] == dotted[-1] and dotted[0] in "\"'":
        return (dotted[1:-1],)
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
