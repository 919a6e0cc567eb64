"""`make bench`: every measurement in turn; `python -m bench NAME...` for some of them.

Each prints its table, and leaves its figures in docs/performance/NAME.json. Ratios and counts compare what was
measured side by side in one round; seconds tell as much about the machine as about us.

No file is deleted before the end: for minutes after thousands were deleted, ext4 passes over each of their inodes
whenever it makes a file, which can take a millisecond and tells nothing about who made it. So there must be room for
some 15 GB, and a second measurement within five minutes of the first tells less.
"""

from __future__ import annotations

import compileall
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

from bench.figures import Figure, Series, measured, table

#: A module of this package each, with `measure(place: Path) -> list[Figure | Series]`; `place` is a folder of its own.
NAMES = ("startup", "following", "slots", "rows", "downloads", "manifest")
ROOT = Path(__file__).parents[1]
RESULTS = Path("docs/performance")


def main(names: Iterable[str]) -> int:
    """Measure these, or all; returns the exit code: 2 for an unknown name."""
    chosen = list(names) or list(NAMES)
    if unknown := [name for name in chosen if name not in NAMES]:
        print(f"no measurement is called {unknown[0]}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for part in ("batchrun", "bench"):  # as an installer does: not every start is to compile what was edited
        compileall.compile_dir(ROOT / part, quiet=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes,
    ):
        for name in chosen:
            print(f"## {name}\n", flush=True)
            place = Path(folder, name)
            place.mkdir()
            os.sync()  # what the last one left to be written would hold up who writes to the disk itself
            # in a process of its own: what one has grown by would hide what the next one's commands take
            found = processes.submit(measured, name, place).result()
            figures = [one for one in found if isinstance(one, Figure)]
            print(table(figures) + "\n", flush=True)
            _keep(name, figures, [one for one in found if isinstance(one, Series)])
    return 0


def _keep(name: str, figures: list[Figure], series: list[Series]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "measured": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "command": f"python -m bench {name}",
        "figures": [figure.to_json() for figure in figures],
        "series": [asdict(one) for one in series],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
