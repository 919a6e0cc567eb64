"""Draws the plots of docs/performance.md from what the measurements left: `python -m bench.plots`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "batchrun"  # the same points make the same file
from matplotlib import pyplot as plt  # noqa: E402  the backend comes first

from bench.__main__ import RESULTS  # noqa: E402


def main() -> None:
    """A file for each plot that some series name."""
    plots: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        for series in json.loads(path.read_text(encoding="utf-8")).get("series", ()):
            plots[series["plot"]].append(series)
    for title, lines in plots.items():
        _draw(title, lines, RESULTS / f"{title.replace(' ', '-')}.svg")


def _draw(title: str, lines: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for line in lines:
        x, y = zip(*sorted(map(tuple, line["points"])), strict=True)
        axes.plot(x, y, marker="o" if len(x) < 20 else "", markersize=4, label=line["name"])
    if all(value > 0 for line in lines for value, _ in line["points"]) and _span(lines) >= 100:
        axes.set_xscale("log")
    axes.set(title=title, xlabel=lines[0]["x"], ylabel=lines[0]["y"], ylim=(0, None))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _span(lines: list[dict[str, Any]]) -> float:
    values = [value for line in lines for value, _ in line["points"]]
    return max(values) / min(values)


if __name__ == "__main__":
    main()
