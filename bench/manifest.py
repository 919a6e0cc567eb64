"""Large manifests: what planning one takes, how big its state is, and how soon a start goes on with it.

A manifest of n rows and 10 columns is run against a server that answers every request with 401, so a run plans
everything, asks once, and ends. Then all rows but the last 1000 are made done in the state, with their images
(empty files) and result files, and the run is started again: nothing of that may be looked through before the
first request. JSONL, and rows that `--expand` makes, are planned beside the same rows in CSV.
`BENCH_ROWS=10000000` adds the largest point of the curve (minutes, 15 GB of disk).
"""

from __future__ import annotations

import csv
import json
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from bench.figures import Figure
from bench.process import batchrun, run

#: Rows of the curve's points; the last one is started again.
POINTS = (10_000, 100_000, 1_000_000)
UNFINISHED = 1000
#: Rows of the kinds beside CSV.
KIND_ROWS = 200_000
ROUNDS = 7
WORDS = ("owl", "fox", "castle", "river", "morning", "light", "oil painting", "old library", "candle", "rain")


class _Refusing(BaseHTTPRequestHandler):
    """Answers 401, and remembers when it was first asked."""

    asked_at: float | None = None

    def do_POST(self) -> None:
        kind = type(self)
        kind.asked_at = kind.asked_at or time.time()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is told."""


@contextmanager
def _refusing() -> Iterator[Mapping[str, str]]:
    """The environment of a run that asks the server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keys = {"WIRO_API_KEY": "key", "WIRO_API_SECRET": "secret"}
        address = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield {**os.environ, **keys, "WIRO_API_BASE_URL": address}
        finally:
            server.shutdown()


def measure(place: Path) -> list[Figure]:
    """The targets, and the points of the curve."""
    points = [*POINTS, *(rows for rows in (int(os.environ.get("BENCH_ROWS") or 0),) if rows)]
    figures = []
    with _refusing() as env:
        for rows in points:
            figures += _planned(place, rows, env)
            if rows == POINTS[-1]:
                figures += _resumed(place, rows, env)
            (place / f"{rows}.csv").unlink()
        figures += _kinds(place, env)
    return figures


def _command(rows: int) -> list[str]:
    return batchrun("run", f"{rows}.csv", "--tool", "Retro-Cartoons", "--out", str(rows))


def _kinds(place: Path, env: Mapping[str, str]) -> list[Figure]:
    """What rows of other kinds cost, beside CSV; the start of the process included."""
    _write(place / "rows.csv", KIND_ROWS)
    numbers = ("steps", "scale", "width", "height", "seed", "samples")
    with (
        (place / "rows.csv").open(encoding="utf-8", newline="") as table,
        (place / "rows.jsonl").open("w", encoding="utf-8") as file,
    ):
        for row in csv.DictReader(table):
            file.write(json.dumps(row | {name: json.loads(row[name]) for name in numbers}) + "\n")
    figures = []
    for kind, name, options in (
        ("CSV", "rows.csv", []),
        ("JSONL", "rows.jsonl", []),
        ("CSV, --expand repeat=2", "rows.csv", ["--expand", "repeat=2", "--max-requests", "1000000"]),
    ):
        command = batchrun("run", name, "--tool", "Retro-Cartoons", "--out", kind, *options)
        cost = run(command, env=env, cwd=place)
        with closing(sqlite3.connect(place / kind / "state.sqlite3")) as connection:
            query = "SELECT count(*), sum(length(CAST(given AS BLOB))) FROM rows"
            rows, given = connection.execute(query).fetchone()
        beyond = ((place / kind / "state.sqlite3").stat().st_size - given) / rows
        of = f"{kind}, {rows:,} rows"
        figures += [
            Figure(f"{of}: CPU per million", cost.cpu_s * 1e6 / rows, "s"),
            Figure(f"{of}: state beyond parameters", beyond, "B/row", 400),
        ]
    return figures


def _planned(place: Path, rows: int, env: Mapping[str, str]) -> list[Figure]:
    """A run's first start, up to its first request."""
    _write(place / f"{rows}.csv", rows)
    _Refusing.asked_at = None
    cost = run(_command(rows), env=env, cwd=place)
    asked_s = (_Refusing.asked_at or float("nan")) - cost.begun_at
    state = place / str(rows) / "state.sqlite3"
    with closing(sqlite3.connect(state)) as connection:
        given = connection.execute("SELECT sum(length(CAST(given AS BLOB))) FROM rows").fetchone()[0]
    size = state.stat().st_size
    is_target = rows == POINTS[-1]
    of = f"{rows:,} rows"
    return [
        Figure(f"planned, {of}: CPU", cost.cpu_s, "s", 15 if is_target else None),
        Figure(f"planned, {of}: CPU per million", cost.cpu_s * 1e6 / rows, "s"),
        Figure(f"planned, {of}: peak memory", cost.peak_mb, "MB", 100),
        Figure(f"planned, {of}: first request after", asked_s, "s", note="of the command's start"),
        Figure(f"planned, {of}: state", size / 1e6, "MB"),
        Figure(
            f"planned, {of}: state beyond parameters", (size - given) / rows, "B/row", 400,
            note=f"parameters: {given / rows:.0f} B/row",
        ),
    ]  # fmt: skip


def _write(path: Path, rows: int) -> None:
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        file.write("id,prompt,negativePrompt,scheduler,steps,scale,width,height,seed,samples\n")
        for number in range(rows):
            prompt = " ".join(rng.choices(WORDS, k=14))
            file.write(
                f'row-{number:07d},"{prompt}, number {number}","blurry, low quality",'
                f"{rng.choice(('DDIMScheduler', 'PNDMScheduler', 'EulerDiscreteScheduler'))},"
                f"{rng.choice((20, 25, 30))},{rng.choice(('7.5', '6.0'))},1024,{rng.choice((768, 1024))},"
                f"{rng.randrange(2**31)},1\n"
            )


def _resumed(place: Path, rows: int, env: Mapping[str, str]) -> list[Figure]:
    """Starts with all rows done but a few, beside `import aiohttp` in the same rounds."""
    folder = place / str(rows)
    # in a process of its own: what it takes would be counted with every command that is started after it
    finishing = get_context("spawn").Process(target=_finish, args=(folder, rows - UNFINISHED))
    finishing.start()
    finishing.join()
    if finishing.exitcode != 0:
        raise RuntimeError(f"{folder}: the rows were not made done")
    bare = [sys.executable, "-c", "import aiohttp"]
    asked: list[float] = []
    told: list[float] = []
    imports: list[float] = []
    told_first = run(batchrun("status", folder), env=env, cwd=place).wall_s
    before = _inodes(folder)
    for _ in range(ROUNDS):
        imports.append(run(bare, env=env, cwd=place).wall_s)
        _Refusing.asked_at = None
        cost = run(_command(rows), env=env, cwd=place)
        asked.append((_Refusing.asked_at or float("nan")) - cost.begun_at)
        told.append(run(batchrun("status", folder), env=env, cwd=place).wall_s)
    done = f"{rows - UNFINISHED:,} rows done"
    import_s = median(imports)
    size = (folder / "state.sqlite3").stat().st_size
    return [
        Figure("import aiohttp", import_s, "s"),
        Figure(
            f"{done}: first request, beyond importing aiohttp", median(asked) - import_s, "s", 0.5,
            note=f"after {median(asked):.2f} s",
        ),
        Figure(
            f"{done}: status, beyond importing aiohttp", median(told) - import_s, "s", 0.5,
            note=f"{median(told):.2f} s; {told_first:.2f} s before the first stop",
        ),
        Figure(f"{done}: result files rewritten by {ROUNDS} starts", float(_inodes(folder) != before), "", 0),
        Figure(f"{done}: state", size / rows, "B/row", note="attempts and outputs included"),
    ]  # fmt: skip


def _inodes(folder: Path) -> list[int]:
    """What tells files that only grew from files written anew."""
    return [(folder / name).stat().st_ino for name in ("results.jsonl", "images/metadata.jsonl")]


def _finish(folder: Path, done: int) -> None:
    """Make the first rows done, as a run would have left them."""
    files = {"metadata": folder / "images" / "metadata.jsonl", "results": folder / "results.jsonl"}
    for path in files.values():
        path.write_bytes(b"{}\n" * done)
    sizes = ", ".join(f"'{name}', {path.stat().st_size}" for name, path in files.items())
    with closing(sqlite3.connect(folder / "state.sqlite3")) as connection:
        connection.executescript(f"""
            PRAGMA cache_size = -200000;
            BEGIN;
            UPDATE rows SET state = 'done', settled = seq, attempts = 1 WHERE seq <= {done};
            INSERT INTO attempts (row, generation, number, open, intent_at, intent_server_at, after_task,
                task_id, token, accepted_at, ended_at, status, pexit, cost_usd, seconds)
                SELECT seq, 0, 1, 0, 1.7e9 + seq, 1.7e9 + seq, 2000000 + seq, CAST(2000001 + seq AS TEXT),
                lower(hex(randomblob(16))), 1.7e9 + seq, 1.7e9 + seq, 'task_postprocess_end', '0', '0.003510',
                '6.0000' FROM rows WHERE seq <= {done};
            INSERT INTO outputs (row, generation, number, state, content_type, path, sha256, size_bytes,
                media_type, width_px, height_px)
                SELECT seq, 0, 0, 'saved', 'image/png',
                printf('images/%03d/%s_0.png', (seq - 1) / 1000, name), lower(hex(randomblob(32))), 202472,
                'image/png', 1024, 1024 FROM rows WHERE seq <= {done};
            UPDATE counts SET rows = rows - {done} WHERE state = 'planned';
            INSERT INTO counts VALUES ('done', {done});
            UPDATE totals SET images = {done}, bytes = {done} * 202472;
            UPDATE run SET settled = {done}, listed = json_object('settled', {done}, {sizes},
                'kinds', json_object('parameters', json_object(), 'extra', json_object()));
            COMMIT;
        """)
        paths = connection.execute("SELECT path FROM outputs ORDER BY row")
        known = None
        for (path,) in paths:
            if (parent := path.rpartition("/")[0]) != known:
                (folder / parent).mkdir(exist_ok=True)
                known = parent
            os.close(os.open(folder / path, os.O_CREAT | os.O_WRONLY))
    time.sleep(2.5)  # times of folders are trusted once they are older
