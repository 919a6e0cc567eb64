"""Figures: one measured number each, beside the target it is held against; and series of points to be drawn."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number measured in this round; ratios compare things measured in the same round."""

    name: str
    value: float
    #: "s", "ratio", "requests/s", "MB", "B/row" ...
    unit: str
    target: float | None = None
    #: How the value is to stand to the target: "<=" or ">=".
    sense: str = "<="
    #: What it was measured on, in a few words.
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else _HOLDS[self.sense](self.value, self.target)

    def to_json(self) -> dict[str, object]:
        """The figure, and whether its target is met."""
        return {**asdict(self), "met": self.is_met}


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one line in one plot."""

    plot: str
    name: str
    x: str
    y: str
    points: Sequence[tuple[float, float]]


def measured(name: str, place: Path) -> list[Figure | Series]:
    """What `bench.NAME` measures, with `place` as its folder; found by name, so that any process can do it."""
    found: list[Figure | Series] = importlib.import_module(f"bench.{name}").measure(place)
    return found


def table(figures: Iterable[Figure]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| figure | value | target | met | |", "|---|---:|---:|---|---|"]
    for figure in figures:
        target = "" if figure.target is None else f"{figure.sense} {figure.target:g}"
        met = {None: "", True: "yes", False: "**no**"}[figure.is_met]
        lines.append(
            f"| {figure.name} | {_short(figure.value)} {figure.unit} | {target} | {met} | {figure.note} |"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
