"""One row → several requests: axes of values, and all their combinations in a fixed order. Pure.

The repeats come outermost, then the first axis, and the last axis changes fastest. So what is added at the
end (a further repeat, a further value of the first axis) gets new numbers and leaves the others' alone.
Nothing is ever enumerated to be counted: `seed = "1..999999999999"` has its exact size and costs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from batchrun.errors import UsageError
from batchrun.manifest import json_text
from batchrun.model import Cell

_WHOLE = r"\s*([+-]?[0-9]{1,18})\s*"
_RANGE = re.compile(rf"{_WHOLE}\.\.{_WHOLE}(?:\.\.{_WHOLE})?")
#: Meant as a range, though not one of whole numbers: `1.5..3`, `1..`, `..4`.
_LIKE_RANGE = re.compile(r"[\s0-9+.\-]*\.\.[\s0-9+.\-]*")
#: Meant as several values: `10,20`, `DDIM,PNDM`; a sentence has spaces elsewhere than after its commas.
_LIKE_LIST = re.compile(r"[^\s,\[][^\s,]*(?:,\s?[^\s,]+)+")
_RANGE_FORMS = 'write "1..4", "4..1" or "0..100..10" (first..last..step), or a list of values'


@dataclass(frozen=True, slots=True)
class Axis:
    """A parameter and the values it runs through, at least one."""

    name: str
    values: Sequence[Cell]

    @property
    def size(self) -> int:
        """The number of values; exact for ranges of any length, where len() gives up."""
        if isinstance(self.values, range) and self.values:
            return (self.values[-1] - self.values[0]) // self.values.step + 1
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Expansion:
    """The requests a row stands for: every combination of its axes' values, `repeat` times.

    Raises ValueError when two axes have the same name.
    """

    axes: tuple[Axis, ...] = ()
    repeat: int = 1

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"two axes have the same name: {names}")

    @property
    def size(self) -> int:
        """How many requests there are: exact, and known without making them."""
        return self.repeat * prod(axis.size for axis in self.axes)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Cell]]]:
        """The request's number from 1, and the values it lays over the row's cells, one at a time."""
        n = 0
        for _ in range(self.repeat):
            for overlay in _combinations(self.axes):
                n += 1
                yield n, overlay


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[str, Cell]]:
    # itertools.product would first make a tuple of every axis.
    if not axes:
        yield {}
        return
    first, *rest = axes
    for value in first.values:
        for overlay in _combinations(rest):
            yield {first.name: value, **overlay}


def parse_axis(name: str, spec: Any) -> Axis:
    """The axis that a job file or `--expand NAME=SPEC` asks for; see parse_values. Raises UsageError."""
    try:
        check_name(name)
        return Axis(name, parse_values(spec))
    except UsageError as error:
        raise UsageError(f"expand: {name}: {error}") from None


def check_name(name: str) -> None:
    """Raise UsageError when `name` cannot be an axis."""
    if name == "id":
        raise UsageError("cannot be expanded: a row's requests are named <id>.<n> by themselves; take it out")


def parse_values(spec: Any) -> Sequence[Cell]:
    """The values of `spec`: "1..4" (both ends included; "4..1", "0..100..10"), a list, a JSON list as text,
    "a|b|c", or a single value ("random" among them; what it means is the binder's). Raises UsageError."""
    if isinstance(spec, str):
        return _parse_text(spec)
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise UsageError('the list is empty; write at least one value, as in ["a", "b"]')
        return tuple(spec)
    if isinstance(spec, dict) or spec is None:
        raise UsageError(f"is {json_text.kind(spec)}; {_RANGE_FORMS}")
    return (spec,)


def _parse_text(text: str) -> Sequence[Cell]:
    spec = text.strip()
    if not spec:
        raise UsageError(f"has no values; {_RANGE_FORMS}")
    if match := _RANGE.fullmatch(spec):
        return _range(*match.groups())
    if _LIKE_RANGE.fullmatch(spec):
        raise UsageError(f'"{spec}" is not a range of whole numbers; {_RANGE_FORMS}')
    if spec.startswith("[") and spec.endswith("]"):
        return _json_list(spec)
    if "|" in spec:
        values = tuple(value.strip() for value in spec.split("|"))
        if not all(values):
            raise UsageError(f'"{spec}" has an empty value; for an empty text write a JSON list: ["a", ""]')
        return values
    if _LIKE_LIST.fullmatch(spec):
        parted = "|".join(value.strip() for value in spec.split(","))
        raise UsageError(
            f'"{spec}" is one single text; for several values write {parted}, '
            f"for this one {json.dumps([spec])}"
        )
    return (text,)


def _range(first_text: str, last_text: str, step_text: str | None) -> range:
    first, last = int(first_text), int(last_text)
    direction = 1 if last >= first else -1
    step = direction if step_text is None else int(step_text)
    if step == 0:
        raise UsageError("a step of 0 never ends; write a step of at least 1")
    if step < 0 < direction and first != last:
        raise UsageError(f"{first}..{last}..{step} never reaches {last}; write {first}..{last}..{-step}")
    return range(first, last + direction, abs(step) * direction)


def _json_list(spec: str) -> Sequence[Cell]:
    cure = 'write a JSON list such as ["a", "b"] or [1, 2], or a|b'
    try:
        values, end = json_text.decode(spec)
    except json.JSONDecodeError as error:
        raise UsageError(f"not a JSON list ({error.msg} at character {error.pos + 1}); {cure}") from None
    except json_text.JsonFault as error:
        raise UsageError(str(error)) from None
    if end != len(spec):
        raise UsageError(f"text follows the JSON list at character {end + 1}; {cure}")
    return parse_values(values)
