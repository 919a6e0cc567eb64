"""Hostile answers and hostile manifests: every run ends, every row is accounted for, nothing is paid twice.

A proxy stands between the run and the simulator. It passes every request on, so that the service acts, and
puts something else in the place of the answers.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import os
import resource
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from batchrun.model import State
from batchrun.progress import Progress
from batchrun.runner import Outcome, Runner
from batchrun.settings import Credentials
from batchrun.simulator.server import Simulator
from tests.client.raw import Request, answer, serving
from tests.support.command import COMMAND, TOOL, Here
from tests.support.hostile import DEEP, VALUES, encoded, nested
from tests.support.runs import check_complete, images_of, job_of, lines_of, run_job, write_rows

#: What is sent in the place of an answer, made of the true one; None: an answer without an end.
Spoil = Callable[[dict[str, Any]], bytes | None]


def _with(**fields: Any) -> Spoil:
    return lambda true: encoded({**true, **fields})


def _all_fields(value: Any) -> Spoil:
    return lambda true: encoded(dict.fromkeys(true, value))


#: None of them tells a lie that a client must believe: that nothing was done, or that there is no task.
NONSENSE: dict[str, Spoil] = {
    "nothing": lambda _: b"",
    "a list": lambda _: b"[]",
    "a number": lambda _: b"1e999999999",
    "nul bytes": lambda _: b"\0" * 1000,
    "not utf-8": lambda _: b"\xff\xfe\x80" * 1000,
    "utf-16": lambda true: json.dumps(true).encode("utf-16"),
    "half of it": lambda true: encoded(true)[: len(encoded(true)) // 2],
    "deep": lambda _: b'{"result": true, "tasklist": ' + b"[" * 100_000,
    "deep and whole": lambda true: encoded({**true, "taskid": None, "tasklist": nested(900)}),
    "megabytes": lambda _: b'{"result": true, "x": "' + b"x" * 5_000_000 + b'"',
    "a million values": lambda true: encoded({**true, "x": [0] * 1_000_000}),
    "a million objects": lambda _: b'{"result": true, "tasklist": [' + b"{}," * 1_000_000 + b"{}]}",
    "two million tasks": lambda _: b'{"result": true, "tasklist": [' + b'{"id":1},' * 200_000 + b'{"id":1}]}',
    "a path for an id": _with(taskid="../../x", tasklist=[{"id": "../../x", "status": "task_end"}]),
    "a huge id": _with(taskid=10**40, tasklist=[{"id": "9" * 40}]),
    "a negative id": _with(taskid=-5, tasklist=[{"id": -5}]),
    "an id of NaN": _with(taskid=float("nan"), tasklist=[{"id": float("nan")}]),
    "an id in a list": _with(taskid=["7"], tasklist=[[{"id": "7"}]]),
    "numbers everywhere": _all_fields(-1.5e300),
    "texts everywhere": _all_fields("a\0b\ud800"),
    "lists everywhere": _all_fields([[], None]),
    "without an end": lambda _: None,
}  # fmt: skip


@dataclass
class Proxy:
    """What it does, and what it has done."""

    simulator: Simulator
    #: What to put in the place of an answer of this path, given how often that path was asked before.
    spoil: Callable[[str, int, dict[str, Any]], Spoil | None]
    asked: Counter[str] = field(default_factory=Counter)
    spoiled: list[str] = field(default_factory=list)
    #: How much of an endless answer was taken.
    taken_bytes: int = 0

    async def run(self, folder: Path, rows: int, **settings: Any) -> Outcome:
        """A run of so many rows whose service is this proxy."""
        job = job_of(write_rows(folder / "m.csv", rows), **settings)
        async with self._serving() as credentials:
            return await Runner(job, credentials, progress=Progress()).run()

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[Credentials]:
        async with aiohttp.ClientSession() as session, serving(self._answer(session)) as raw:
            origin = f"{raw.origin}/v1"
            yield Credentials(self.simulator.key, self.simulator.secret, origin, self.simulator.socket_url)

    def _answer(self, session: aiohttp.ClientSession) -> Any:
        async def handle(request: Request, writer: asyncio.StreamWriter) -> bool:
            path = request.path.removeprefix("/v1")
            kept = {
                name: value
                for name, value in request.headers.items()
                if name.startswith("x-") or name in {"content-type", "user-agent"}
            }
            url = self.simulator.base_url + path
            try:
                async with session.post(url, data=request.body, headers=kept) as response:
                    body, status, date = await response.read(), response.status, response.headers["Date"]
            except aiohttp.ClientError:
                return False  # a fault of the simulator's: passed on
            point = "/Run" if path.startswith("/Run") else path
            spoil = self.spoil(point, self.asked[point], json.loads(request.body))
            self.asked[point] += 1
            if spoil is None:
                writer.write(answer(body, status, Date=date))
            else:
                self.spoiled.append(point)
                made = spoil(json.loads(body))
                if made is None:
                    await self._without_end(writer)
                writer.write(answer(made or b"", Date=date))
            await writer.drain()
            return True

        return handle

    async def _without_end(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        while True:  # until the client has had enough
            writer.write(piece)
            await writer.drain()
            self.taken_bytes += 65536


async def test_nonsense_for_the_answer_of_a_submit_never_buys_a_row_twice(tmp_path: Path) -> None:
    kinds = list(NONSENSE.values())

    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        return kinds[asked // 2] if point == "/Run" and asked % 2 and asked // 2 < len(kinds) else None

    rows = 2 * len(kinds) + 2
    async with Simulator(seconds=0.1) as simulator:
        proxy = Proxy(simulator, spoil)
        outcome = await proxy.run(tmp_path, rows)
        assert proxy.spoiled == ["/Run"] * len(kinds)
        assert outcome.exit_code == 0, outcome
        assert len(simulator.tasks) == rows
        check_complete(simulator, tmp_path / "run", rows)
        assert outcome.counts.cost_usd == simulator.billed_usd
    assert 2**20 < proxy.taken_bytes < 2**27


async def test_nonsense_about_a_task_is_looked_at_again_and_loses_nothing(tmp_path: Path) -> None:
    kinds = iter(NONSENSE.values())
    met: Counter[str] = Counter()

    def spoil(point: str, asked: int, body: dict[str, Any]) -> Spoil | None:
        if point != "/Task/Detail" or met[body["taskid"]] == 2:
            return None
        met[body["taskid"]] += 1
        return next(kinds, None)

    rows = len(NONSENSE) // 2
    async with Simulator(seconds=0.1) as simulator:
        proxy = Proxy(simulator, spoil)
        outcome = await proxy.run(tmp_path, rows)
        assert proxy.spoiled == ["/Task/Detail"] * len(NONSENSE)
        assert outcome.exit_code == 0, outcome
        check_complete(simulator, tmp_path / "run", rows)
        assert outcome.counts.cost_usd == simulator.billed_usd


#: What the end of a task hangs on: lies about these are believed.
DECISIVE = {"id", "status", "pexit", "outputs", "totalcost"}


async def test_wrong_types_in_every_other_field_of_a_task_change_nothing(tmp_path: Path) -> None:
    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        def nonsense(true: dict[str, Any]) -> bytes:
            # what is nested too deep spoils the whole answer, not a field
            values = iter([value for value in (*VALUES, *VALUES) if value is not DEEP][asked % 30 :])
            for task in true["tasklist"]:
                for name in set(task) - DECISIVE:
                    task[name] = next(values, None)
            return encoded({**true, "total": next(values, None)}) if true["tasklist"] else encoded(true)

        return nonsense if point == "/Task/Detail" else None

    async with Simulator(seconds=0.1) as simulator:
        proxy = Proxy(simulator, spoil)
        outcome = await proxy.run(tmp_path, 8)
        assert len(proxy.spoiled) >= 8
        assert outcome.exit_code == 0, outcome
        check_complete(simulator, tmp_path / "run", 8)
        assert outcome.counts.cost_usd == simulator.billed_usd


async def test_nonsense_in_the_listing_settles_no_doubt(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("batchrun.dispatch.doubts.BETWEEN_S", 0.02)
    kinds = list(NONSENSE.values())

    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        return kinds[asked] if point == "/Task/List" and asked < len(kinds) else None

    async with Simulator(seconds=0.1, faults=["run-reset@2,3"]) as simulator:
        proxy = Proxy(simulator, spoil)
        outcome = await proxy.run(tmp_path, 4)
        assert proxy.spoiled == ["/Task/List"] * len(kinds)
        assert outcome.exit_code == 0, outcome
        assert len(simulator.tasks) == 4
        check_complete(simulator, tmp_path / "run", 4)


async def test_another_rows_task_for_an_answer_is_not_believed(tmp_path: Path) -> None:
    """A forged id that looks like one: the first row's."""

    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        return _with(taskid=str(simulator.tasks[0].id)) if point == "/Run" and asked else None

    async with Simulator(seconds=0.1) as simulator:
        outcome = await Proxy(simulator, spoil).run(tmp_path, 3)
        assert outcome.exit_code == 0, outcome
        check_complete(simulator, tmp_path / "run", 3)


async def test_a_task_that_nobody_knows_is_left_in_flight_and_not_bought_again(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("batchrun.dispatch.track.UNKNOWN_PATIENCE_S", 1.0)

    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        return _with(taskid="999999999999999999") if point == "/Run" and asked == 1 else None

    async with Simulator(seconds=0.1) as simulator:
        outcome = await Proxy(simulator, spoil).run(tmp_path, 3)
        assert outcome.exit_code in {1, 3}
        assert outcome.counts.by_state == {State.DONE: 2, State.IN_FLIGHT: 1}
        assert len(simulator.tasks) == 3
        assert not simulator.needless


@pytest.mark.parametrize("cost", [-1, "-0.5", "NaN", 1e300, "1e400", [], "x" * 9000])
async def test_a_cost_that_is_none_is_not_added_up(tmp_path: Path, cost: Any) -> None:
    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        def nonsense(true: dict[str, Any]) -> bytes:
            return encoded({**true, "tasklist": [{**task, "totalcost": cost} for task in true["tasklist"]]})

        return nonsense if point in {"/Task/Detail", "/Task/List"} else None

    async with Simulator(seconds=0) as simulator:
        outcome = await Proxy(simulator, spoil).run(tmp_path, 1)
        assert outcome.exit_code == 0, outcome
        assert outcome.counts.cost_usd == 0
        assert lines_of(tmp_path / "run" / "results.jsonl")[0]["cost_usd"] is None


async def test_nonsense_about_prices_and_the_balance_holds_up_no_row(tmp_path: Path) -> None:
    kinds = iter(NONSENSE.values())

    def spoil(point: str, asked: int, _: dict[str, Any]) -> Spoil | None:
        return None if point.startswith(("/Run", "/Task")) else next(kinds, _all_fields([]))

    async with Simulator(seconds=0) as simulator:
        proxy = Proxy(simulator, spoil)
        assert (await proxy.run(tmp_path, 2)).exit_code == 0
        assert proxy.spoiled
        check_complete(simulator, tmp_path / "run", 2)


# --- manifests ---------------------------------------------------------------------------------------

EVIL_IDS = ("../../x", "/etc/passwd", "a/b", "..", ".", "con", "x" * 300, "C:\\x", "-rf", "a\u202eb", "$(id)")
FORMULA = '=cmd|" /C calc"!A0'


async def test_ids_with_path_separators_name_files_inside_the_folder_only(tmp_path: Path) -> None:
    with (tmp_path / "m.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "prompt"), *((id_, f"cat {n}") for n, id_ in enumerate(EVIL_IDS))])
    async with Simulator(seconds=0) as simulator:
        outcome = await run_job(simulator, job_of(tmp_path / "m.csv"))
        assert outcome.exit_code == 0
        check_complete(simulator, tmp_path / "run", len(EVIL_IDS))
    assert {path.parent for path in images_of(tmp_path / "run")} == {tmp_path / "run/images/000"}
    assert sorted(os.listdir(tmp_path)) == ["m.csv", "run"]
    ids = [record["id"] for record in lines_of(tmp_path / "run" / "results.jsonl")]
    assert sorted(ids) == sorted(EVIL_IDS)


async def test_formula_cells_stand_in_failed_csv_as_the_manifest_has_them(tmp_path: Path) -> None:
    """It is the user's own text, and another prompt would be another picture when the file is run."""
    with (tmp_path / "m.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("id", "prompt"), ("=1+1", FORMULA), ("@x", "+a")])
    async with Simulator(seconds=0, faults=["task-fails"]) as simulator:
        outcome = await run_job(simulator, job_of(tmp_path / "m.csv", attempts=1))
    assert outcome.counts.by_state == {State.FAILED: 2}
    assert (tmp_path / "run/failed.csv").read_bytes() == (tmp_path / "m.csv").read_bytes()


def _bounded() -> None:
    """Memory as on a small machine."""
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))


def _forever(head: bytes, piece: bytes) -> Iterator[bytes]:
    yield head
    for _ in range(2**30 // len(piece)):
        yield piece


MEGABYTE = 2**20
COLUMNS = ",".join(["prompt", *(f"c{n}" for n in range(100_000))])
BOMB = gzip.compress(b"prompt\n" + b"\n" * 8_000_000)
#: Format, options, the bytes, what is said.
MANIFESTS: dict[str, tuple[str, tuple[str, ...], Callable[[], Iterator[bytes]], str]] = {
    "a line of a gigabyte": (
        "csv", (), lambda: _forever(b"prompt\n", b"x" * MEGABYTE), "-:2: the row is longer than 16,777,216",
    ),
    "an object of a gigabyte": (
        "jsonl", (), lambda: _forever(b'{"prompt": "', b"x" * MEGABYTE),
        "-:1: the row is longer than 16,777,216",
    ),
    "an array of a gigabyte": (
        "json", ("--max-row-bytes", "1000000"), lambda: _forever(b'[{"prompt": "', b"x" * MEGABYTE),
        "-:1: the row is longer than 1,000,000 bytes; shorten it, or allow it with --max-row-bytes N",
    ),
    "a quote that is never closed": (
        "csv", (), lambda: _forever(b'prompt\n"', b"x\n" * 2**19), "-:2: the row is longer than 16,777,216",
    ),
    "a zip bomb": ("csv", (), lambda: iter([BOMB]), "unpacks to more than 200 times its size"),
    "100,000 columns": (
        "csv", (), lambda: iter([f"{COLUMNS}\n{',x' * 100_000}\n".encode()]), "-:2: c0: is no parameter of",
    ),
    "the same key late": (
        "jsonl", (), lambda: iter([json.dumps(dict.fromkeys(range(100_000)))[:-1].encode(), b',"99999":1}']),
        '-:1: the key "99999" is given twice',
    ),
    "a name of megabytes": (
        "csv", (), lambda: iter([b"y" * 5 * MEGABYTE, b",prompt\nq,a\n"]),
        "-:1: column 1 has a name of 5,242,880",
    ),
    "depth": ("jsonl", (), lambda: iter([b"[" * MEGABYTE]), "-:1: nested more than 64 deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused_in_bounded_memory_with_its_place(name: str, tmp_path: Path) -> None:
    form, options, pieces, said = MANIFESTS[name]
    with subprocess.Popen(
        [*COMMAND, "check", "-", "--format", form, "--tool", TOOL, *options],
        cwd=tmp_path,
        env=Here(tmp_path).env,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_bounded,  # noqa: PLW1509  no thread of ours runs
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has read enough
            for piece in pieces():
                process.stdin.write(piece)
        with suppress(BrokenPipeError):
            process.stdin.close()
        told = process.stdout.read().decode()
    assert process.returncode == 2, told
    assert said in told
    assert "Traceback" not in told
    assert len(told) < 20_000


def test_a_row_may_be_longer_when_the_option_says_so(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.write("m.csv", "prompt\n" + "x" * 2000 + "\n")
    for command in ("check", "run"):
        refused = here.batchrun(command, "m.csv", "--tool", TOOL, "--max-row-bytes", "1000", "--simulate")
        assert refused.returncode == 2
        assert "m.csv:2: the row is longer than 1,000 bytes" in refused.stderr
        assert "--max-row-bytes" in refused.stderr
    assert here.batchrun("check", "m.csv", "--tool", TOOL, "--max-row-bytes", "3000").returncode == 0
