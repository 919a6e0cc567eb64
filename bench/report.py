"""Puts what the measurements left into docs/performance.md, tables and plots: `python -m bench.report`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "batchrun"  # the same points make the same file
from matplotlib import pyplot as plt  # noqa: E402  the backend comes first

from bench.__main__ import RESULTS  # noqa: E402
from bench.figures import Figure, table  # noqa: E402

PAGE = RESULTS.parent / "performance.md"


def main() -> None:
    """Fill the page's tables, and draw a file for each plot that some series names."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(?s)(<!-- (\w+) -->\n).*?(<!-- end -->)", _filled, text), encoding="utf-8")
    plots: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = {figure["name"]: figure["value"] for figure in record["figures"]}
        for series in [*record.get("series", ()), *_sizes(figures), *_looks(figures)]:
            plots[series["plot"]].append(series)
    for title, lines in plots.items():
        _draw(title, lines, RESULTS / f"{title.replace(' ', '-')}.svg")


def _filled(match: re.Match[str]) -> str:
    """The table of one measurement, where it left one."""
    path = RESULTS / f"{match[2]}.json"
    if not path.is_file():
        return match[0]
    record = json.loads(path.read_text(encoding="utf-8"))
    names = [field.name for field in fields(Figure)]
    figures = [Figure(**{name: figure[name] for name in names}) for figure in record["figures"]]
    shown = [figure for figure in figures if not re.search(r" at price |every 3 s:|own client:", figure.name)]
    return f"{match[1]}{table(shown)}\n{match[3]}"


def _sizes(figures: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What grows with a manifest, and what does not."""
    for what, unit in (("CPU", "s"), ("peak memory", "MB"), ("state", "MB")):
        points = [
            (int(match[1].replace(",", "")), value)
            for name, value in figures.items()
            if (match := re.fullmatch(rf"planned, ([\d,]+) rows: {what}", name))
        ]
        if points:
            name = f"{what}, {unit}"
            yield {"plot": "size of the manifest", "name": name, "x": "rows", "y": "s, MB", "points": points}


def _looks(figures: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Mean lag against looks per task: by what was learned, and by schedules that know the durations before."""
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, looks in figures.items():
        lag_s = figures.get(name.removesuffix(": looks") + ": lag")
        if name.endswith(": looks") and lag_s is not None:
            lines[name.removesuffix(": looks").partition(" at price")[0]].append((looks, lag_s))
    for name, points in lines.items():
        axes = {"x": "looks per task", "y": "mean lag, s"}
        yield {"plot": "lag against looks", "name": name, "points": points, **axes}


def _draw(title: str, lines: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for line in lines:
        x, y = zip(*sorted(map(tuple, line["points"])), strict=True)
        axes.plot(x, y, marker="o" if len(x) < 20 else "", markersize=4, label=line["name"])
    if all(value > 0 for line in lines for value, _ in line["points"]) and _span(lines, 0) >= 100:
        axes.set_xscale("log")
    if all(value > 0 for line in lines for _, value in line["points"]) and _span(lines, 1) >= 100:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    axes.set(title=title, xlabel=lines[0]["x"], ylabel=lines[0]["y"])
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _span(lines: list[dict[str, Any]], axis: int) -> float:
    values = [point[axis] for line in lines for point in line["points"]]
    return max(values) / min(values)


if __name__ == "__main__":
    main()
