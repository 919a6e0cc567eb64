"""A power cut at any moment of a recorded run loses nothing that was paid for and tears nothing.

All that two starts do to a run's folder is recorded (recorder.c) and played back up to every sync and every
announcement: the first makes the images, the second makes those of two changed rows anew. There the power is
cut: what was not synced is lost, kept, or half of each (see powercut).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from batchrun.manifest.job import Job
from batchrun.progress import Fact
from batchrun.simulator.server import Simulator
from tests.crash.hurry import hurry
from tests.crash.powercut import Deed, Disk, Kept, lay_out, read_log
from tests.crash.starts import result_of, start
from tests.support.runs import images_of, job_of, run_job, write_rows

ROWS = 5
IMAGES = 2 * ROWS
CHANGED = 2
#: Tasks made by the end of each start.
TASKS = (ROWS, ROWS + CHANGED)
#: How many of the states are resumed to the end, and how many of these with a submit that was not answered.
RESUMED, UNANSWERED = int(os.environ.get("BATCHRUN_POWER_CUTS", "12")), 3
SEED = int(os.environ.get("BATCHRUN_SEED", "4"))

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="recording needs Linux and a C compiler"
)


@dataclass
class Told:
    """What had been announced when the power was cut; of rows by the number of the start and their own."""

    intents: set[tuple[int, int]] = field(default_factory=set)
    #: Task ids that the service had answered with.
    accepted: dict[tuple[int, int], str] = field(default_factory=dict)
    #: Task ids of which the run had said that they are recorded.
    in_flight: dict[tuple[int, int], str] = field(default_factory=dict)
    #: How many images of which it had said so.
    saved: int = 0

    def take(self, start: int, line: bytes) -> None:
        """Take in a line of the child's marks."""
        fact, seq, task = json.loads(line)
        if fact == Fact.INTENT:
            self.intents.add((start, seq))
        elif fact == Fact.ACCEPTED:
            self.accepted[start, seq] = task
        elif fact == Fact.IN_FLIGHT:
            self.in_flight[start, seq] = task
        elif fact == Fact.SAVED:
            self.saved += 1

    def copy(self) -> Told:
        """As it is now."""
        return Told(set(self.intents), dict(self.accepted), dict(self.in_flight), self.saved)


@dataclass
class Cut:
    """What one power cut left, and what had been told by then."""

    files: dict[str, bytes | None]
    told: Told
    kept: Kept
    start: int
    deed: int

    def __str__(self) -> str:
        return f"start {self.start}, before deed {self.deed}, {self.kept} kept of what was not synced"


class Recording:
    """Two starts of a run, recorded; `disk` is the folder that stands for the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = folder / "disk"
        self.memory = folder / "memory"
        self.port = 0
        self.deeds: list[Deed] = []
        #: The first deed of the second start.
        self.second = 0
        #: What the run's folder holds after each start.
        self.results: list[dict[str, Any]] = []
        self._marks = str(self.disk / "marks")

    def job(self, start: int) -> Job:
        """What a start is told, its manifest written."""
        manifest = write_rows(self.folder / "m.csv", ROWS)
        if start:
            lines = manifest.read_text().splitlines()
            lines[1 : 1 + CHANGED] = [f"{line} again" for line in lines[1 : 1 + CHANGED]]
            manifest.write_text("\n".join(lines) + "\n")
        out = self.disk / "runs" / "one"
        return job_of(manifest, set={"samples": 2}, out=out, rerun_changed=bool(start))

    async def make(self) -> None:
        """Do both starts in children under the recorder."""
        assert COMPILER is not None
        self.disk.mkdir()
        library, log = self.folder / "recorder.so", self.folder / "deeds"
        source = Path(__file__).with_name("recorder.c")
        command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"]
        await anyio.run_process(command)
        env = {"LD_PRELOAD": str(library), "RECORD_ROOT": str(self.disk), "RECORD_LOG": str(log)}
        async with Simulator(seconds="0.05-0.4", memory=self.memory) as sim:
            self.port = sim._port
            for number in range(2):
                self.second = len(list(read_log(log))) if number else 0
                ended = await start(sim, self.job(number), env=env, marks=self._marks, hurry=True)
                assert ended.returncode == 0, ended.stderr.decode()
                assert len(sim.tasks) == TASKS[number]
                self.results.append(result_of(self.job(number).folder))
        self.deeds = list(read_log(log))

    def played(self) -> Iterator[tuple[int, bool, Disk, Told]]:
        """Before each deed and after the last: its number, whether to cut here, the disk, what was told."""
        disk, told = Disk(str(self.disk)), Told()
        for number, deed in enumerate(self.deeds):
            is_mark = deed.op == "W" and disk.path_of(deed.fd) == self._marks
            yield number, is_mark or deed.op == "S", disk, told
            disk.do(deed)
            if is_mark:
                told.take(int(number >= self.second), deed.first)
        yield len(self.deeds), True, disk, told

    def cuts(self) -> Iterator[Cut]:
        """What power cuts leave, each different state once."""
        met: set[int] = set()
        rng = Random(SEED)
        for number, is_cut, disk, told in self.played():
            for kept in (*Kept, Kept.SOME) if is_cut else ():
                files = disk.after_cut(kept, rng)
                files.pop("marks", None)
                this = hash((len(told.in_flight), told.saved, *sorted(files.items())))
                if this not in met:
                    met.add(this)
                    yield Cut(files, told.copy(), kept, int(number >= self.second), number)

    def remember(self, cut: Cut, rng: Random, memory: Path) -> int:
        """Write down what the service knows at the cut; returns how many tasks that is.

        A task that was answered is known; one that was asked for, and answered only later, perhaps.
        """
        *_, (_, _, _, end) = self.played()
        known = set(cut.told.accepted.values())
        for row in sorted(cut.told.intents - set(cut.told.accepted)):
            if rng.random() < 0.5:
                known.add(end.accepted[row])
        head, *facts = self.memory.read_text().splitlines()
        kept = [fact for fact in facts if str(json.loads(fact)["task"]["id"]) in known]
        memory.write_text("\n".join([head, *kept]) + "\n")
        return len(known)


def check_state(folder: Path, told: Told) -> None:
    """Nothing told is lost, nothing under its final name is torn."""
    images_of(folder)
    state = folder / "state.sqlite3"
    if not state.exists() or not state.stat().st_size:
        assert not told.intents
        return
    connection = sqlite3.connect(state)
    try:
        connection.execute("PRAGMA synchronous = OFF")  # this look need not be durable
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            assert not told.intents
            return
        states = dict(connection.execute("SELECT seq, state FROM rows"))
        tasks = dict(connection.execute("SELECT task_id, row FROM attempts WHERE task_id IS NOT NULL"))
        saved = [sha256 for (sha256,) in connection.execute("SELECT sha256 FROM outputs WHERE path NOTNULL")]
        listed = connection.execute("SELECT listed FROM run").fetchone()
    finally:
        connection.close()
    for (_, seq), task in told.in_flight.items():
        assert tasks.get(task) == seq, f"task {task} of row {seq} is forgotten"
    made = Counter(tasks.values())
    for seq, sent in Counter(seq for _, seq in told.intents).items():
        assert made[seq] == sent or states[seq] in ("submitting", "in_doubt"), f"row {seq} was sent"
    assert len(saved) >= told.saved
    # an image that is moved may lie under its old name or its new one
    there = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.*") if path.is_file()}
    assert set(saved) <= there, "an image is lost"
    _check_listed(folder, json.loads(listed[0]) if listed else {})


def _check_listed(folder: Path, mark: dict[str, Any]) -> None:
    """The sidecar files hold whole lines up to where the state knows them."""
    for name, path in (("metadata", folder / "images/metadata.jsonl"), ("results", folder / "results.jsonl")):
        if mark.get(name):
            known = path.read_bytes()[: mark[name]]
            assert len(known) == mark[name], f"{path.name} is shorter than the state says"
            assert known.endswith(b"\n")
            for line in known.splitlines():
                json.loads(line)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    """Two starts, recorded."""
    made = Recording(tmp_path_factory.mktemp("recorded"))
    anyio.run(made.make)
    return made


def test_the_recording_tells_all_that_the_run_did_to_its_folder(recording):
    *_, (_, _, disk, told) = recording.played()
    files = {name: data for name, data in disk.after_cut(Kept.ALL, Random()).items() if data is not None}
    assert files == {
        path.relative_to(recording.disk).as_posix(): path.read_bytes()
        for path in recording.disk.rglob("*")
        if path.is_file()
    }
    assert len(told.in_flight) == TASKS[1]
    assert told.saved == IMAGES + 2 * CHANGED


def test_a_power_cut_at_any_moment_forgets_no_task_and_tears_no_file(recording, tmp_path):
    seen = Counter[tuple[Kept, int]]()
    for number, cut in enumerate(recording.cuts()):
        folder = tmp_path / str(number)
        lay_out(cut.files, folder)
        try:
            check_state(folder / "runs/one", cut.told)
        except (AssertionError, ValueError, OSError, sqlite3.Error) as error:
            raise AssertionError(f"{cut}: {error!r}") from error
        shutil.rmtree(folder)
        seen[cut.kept, cut.start] += 1
    assert len(seen) == 2 * len(Kept)
    assert min(seen.values()) > ROWS, seen


async def test_a_run_resumed_after_a_power_cut_ends_as_an_undisturbed_one(monkeypatch, recording, tmp_path):
    hurry(monkeypatch.setattr)
    rng = Random(SEED)
    cuts = [cut for cut in recording.cuts() if cut.told.intents]
    unanswered = [cut for cut in cuts if len(cut.told.accepted) < len(cut.told.intents)]
    sample = rng.sample(unanswered, UNANSWERED) + rng.sample(cuts, RESUMED - UNANSWERED)
    for number, cut in enumerate(sample):
        if recording.disk.exists():  # the very same place, and port: the state holds addresses of images
            shutil.rmtree(recording.disk)
        lay_out(cut.files, recording.disk)
        memory = tmp_path / f"memory-{number}"
        known = recording.remember(cut, rng, memory)
        job = recording.job(cut.start)
        async with Simulator(seconds=0.05, memory=memory, port=recording.port) as sim:
            assert len(sim.tasks) == known
            assert (await run_job(sim, job)).exit_code == 0, cut
            assert len(sim.tasks) == TASKS[cut.start], cut
            assert not sim.needless, cut
        assert result_of(job.folder) == recording.results[cut.start], cut
