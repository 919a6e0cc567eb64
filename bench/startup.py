"""Whole-process times of commands that people wait for, against a bare `python -c pass` in the same rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

from bench.figures import Figure
from bench.process import batchrun, run, simulator

ROUNDS = 15


def measure(place: Path) -> list[Figure]:
    """The ratios of the medians."""
    with simulator("--seconds", "0.05") as wiro:
        rows = "".join(f"r{number},a fox {number}\n" for number in range(20))
        (place / "small.csv").write_text("id,prompt\n" + rows, encoding="utf-8")
        run(
            batchrun("run", "small.csv", "--tool", "Retro-Cartoons", "--set", "samples=1", "--out", "small"),
            env=wiro.env,
            cwd=place,
        )
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "batchrun --version": batchrun("--version"),
            "batchrun --help": batchrun("--help"),
            "batchrun status": batchrun("status", "small"),
        }
        times: dict[str, list[float]] = {title: [] for title in commands}
        for _ in range(ROUNDS):  # side by side, so that a busy moment of the machine strikes all of them
            for title, command in commands.items():
                times[title].append(run(command, env=wiro.env, cwd=place).wall_s)
    bare_s = median(times.pop("python -c pass"))
    targets = {"batchrun --version": 8, "batchrun --help": 12, "batchrun status": 20}
    return [
        Figure(title, median(took) / bare_s, "x", targets[title], note="of `python -c pass`")
        for title, took in times.items()
    ]
