"""`make soak`: the long run, and its table.

python -m tests.soak [--rows N] [--kills N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio

from tests.soak.soak import Plan, Soak, small_disk


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--rows", type=int, default=Plan.rows)
    parser.add_argument("--kills", type=int, default=Plan.kills)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    plan = Plan(rows=asked.rows, kills=asked.kills, seed=asked.seed)
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name), plan.disk_bytes) as disk:
        place = Path(name)
        if disk is None:
            print("no small file system can be made here: the disk is not filled up")
            plan = replace(plan, disk_bytes=None)
        result = anyio.run(Soak(place, plan, disk or place, partial(print, flush=True)).run)
    table = {
        **result.table,
        "starts": result.starts,
        **{f"stopped: {why}": times for why, times in sorted(result.stops.items())},
        "exit code": result.exit_code,
        "minutes": round(result.wall_s / 60, 1),
    }
    for name, value in table.items():
        print(f"{name:<40} {value:>16,}" if isinstance(value, int) else f"{name:<40} {value!s:>16}")
    if asked.json:
        asked.json.write_text(json.dumps(table, indent=1, default=str) + "\n")
    print("clean" if result.is_clean else "NOT CLEAN")
    return 0 if result.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
