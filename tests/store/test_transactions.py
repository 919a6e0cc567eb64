"""Every verb is whole or absent, durable once acknowledged, and a lost lease changes nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from batchrun.errors import DiskError, LeaseLost, StoreDamaged, StoreError, StoreTooNew
from batchrun.model import Accepted, Failure, Row, State, Task
from batchrun.rules.states import Event, ImpossibleMove
from batchrun.store import migrations
from batchrun.store.connection import connect
from batchrun.store.row_verbs import Intent
from batchrun.store.store import Store
from tests.support.rows import (
    begin,
    claimed,
    planned,
    recount,
    saved,
    to_done,
    to_finished,
    to_in_flight,
    to_submitting,
)

ROOT = Path(__file__).parent.parent.parent
TROUBLE = Failure("task failed", "the task failed (pexit 1)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite3"


async def ask(store: Store, query: str) -> object:
    """One value straight from the database."""
    return await store.planning(lambda connection: connection.execute(query).fetchone()[0])


# --- the file -------------------------------------------------------------------------------------------


async def test_the_file_is_nobody_else_s_to_read(path: Path) -> None:
    store = await planned(path, 3)
    await to_in_flight(store, (await claimed(store))[0].seq)
    files = list(path.parent.iterdir())
    assert len(files) > 1  # with the write-ahead log
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    store.close()


async def test_a_commit_waits_for_the_disk(path: Path) -> None:
    store = Store.open(path)
    assert await ask(store, "PRAGMA journal_mode") == "wal"
    assert await ask(store, "PRAGMA synchronous") == 2  # FULL
    assert await ask(store, "PRAGMA foreign_keys") == 1
    store.close()


def test_a_state_of_a_newer_batchrun_is_refused_untouched(path: Path) -> None:
    Store.open(path).close()
    connection = connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match="update batchrun"):
        Store.open(path)
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused_and_the_user_told_what_to_do(path: Path) -> None:
    path.write_bytes(b"\x89PNG not a database" * 100)
    with pytest.raises(StoreDamaged, match=r"state\.sqlite3 is damaged .* batchrun repair"):
        Store.open(path)


def damage(path: Path) -> None:
    """Overwrite all but the first and last two pages."""
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 16384) + whole[-8192:])


async def test_a_page_damaged_in_the_middle_is_told_as_damage(path: Path) -> None:
    store = await planned(path, 2000)
    store.close()
    damage(path)
    with pytest.raises(StoreDamaged, match="images already saved are safe"):
        await claimed(await begin(Store.open(path)))


def test_a_folder_that_may_not_be_written_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot be written"):
        Store.open(tmp_path / "nowhere" / "state.sqlite3")
    (tmp_path / "folder").mkdir()
    with pytest.raises((DiskError, StoreError), match="folder"):
        Store.open(tmp_path / "folder")


async def test_a_full_disk_fails_every_verb_at_hand_whole_and_the_next_ones_work(path: Path) -> None:
    store = await planned(path, 200)
    rows = await claimed(store)
    pages = await ask(store, "PRAGMA page_count")
    await ask(store, f"PRAGMA max_page_count = {pages}")
    failed = 0

    async def intend(row: Row) -> None:
        nonlocal failed
        with pytest.raises(DiskError, match="full"):
            await store.record_rejected(row.seq, Failure("x", "y" * 100_000))
        failed += 1

    async with anyio.create_task_group() as group:
        for row in rows[:20]:
            group.start_soon(intend, row)
    assert failed == 20
    assert (await store.counts()).by_state == {State.PLANNED: 200}
    await ask(store, "PRAGMA max_page_count = 1000000")
    await to_done(store, rows[0].seq)
    assert await store.counts() == recount(path)
    store.close()


# --- migrations -----------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def tables_of(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    try:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    finally:
        connection.close()


def test_a_step_that_fails_leaves_the_old_form(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE second (a)")

    def failing(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE third (a)")
        connection.execute("INSERT INTO third VALUES (1)")
        raise sqlite3.OperationalError("power went out")

    def third(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE third (a)")

    first = migrations.STEPS
    Store.open(path).close()
    monkeypatch.setattr(migrations, "STEPS", (*first, second, failing))
    with pytest.raises(StoreError, match="power went out"):
        Store.open(path)
    assert version_of(path) == len(first)
    assert not {"second", "third"} & tables_of(path)
    monkeypatch.setattr(migrations, "STEPS", (*first, second, third))
    Store.open(path).close()
    assert version_of(path) == len(first) + 2
    assert {"second", "third"} <= tables_of(path)


async def test_opening_again_migrates_nothing_and_loses_nothing(path: Path) -> None:
    store = await planned(path, 5)
    await to_done(store, (await claimed(store))[2].seq)
    before = await store.counts()
    store.close()
    store = Store.open(path)
    assert await store.counts() == before
    store.close()


# --- transactions ---------------------------------------------------------------------------------------


async def test_verbs_at_one_time_share_commits(path: Path) -> None:
    store = await planned(path, 100)
    rows = await claimed(store)
    commits: list[str] = []

    def trace(statement: str) -> None:
        if statement.startswith("COMMIT"):
            commits.append(statement)

    await store.planning(lambda connection: connection.set_trace_callback(trace))
    async with anyio.create_task_group() as group:
        for row in rows:
            group.start_soon(to_submitting, store, row.seq)
    await store.planning(lambda connection: connection.set_trace_callback(None))
    assert 0 < len(commits) <= 10
    assert (await store.counts()).by_state == {State.SUBMITTING: 100}
    store.close()


async def test_a_verb_that_fails_takes_no_other_with_it(path: Path) -> None:
    store = await planned(path, 60)
    rows = await claimed(store)
    impossible, foreign = [], []
    await store.release([rows[1].seq])

    async def verb(row: Row) -> None:
        if row.seq % 3 == 0:
            with pytest.raises(ImpossibleMove):
                await store.record_saved(row.seq)
            impossible.append(row.seq)
        elif row is rows[1]:
            with pytest.raises(LeaseLost):
                await to_submitting(store, row.seq)
            foreign.append(row.seq)
        else:
            await to_submitting(store, row.seq)

    async with anyio.create_task_group() as group:
        for row in rows:
            group.start_soon(verb, row)
    assert (len(impossible), len(foreign)) == (20, 1)
    assert (await store.counts()).by_state == {State.PLANNED: 21, State.SUBMITTING: 39}
    assert await store.counts() == recount(path)
    store.close()


async def test_a_verb_that_fails_halfway_leaves_nothing_of_itself(path: Path) -> None:
    store = await planned(path, 2)
    first, second = await claimed(store)
    with pytest.raises(OverflowError):  # after the row was moved
        await store.record_intent(Intent(first.seq, 1.0, 1.0, 10**30))
    assert (await store.row(first.seq)).state is State.PLANNED
    assert (await store.row(first.seq)).attempt is None
    await to_done(store, second.seq)
    assert await store.counts() == recount(path)
    store.close()


class Busy:
    """Keeps the database's thread busy until told otherwise."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._begun = threading.Event()
        self._end = threading.Event()

    async def hold(self) -> None:
        await self._store.planning(lambda connection: self._wait())

    def _wait(self) -> None:
        self._begun.set()
        assert self._end.wait(20)

    async def begun(self) -> None:
        await anyio.to_thread.run_sync(self._begun.wait)

    def end(self) -> None:
        self._end.set()


async def test_a_waiter_that_is_cancelled_is_absent_and_the_others_are_whole(path: Path) -> None:
    store = await planned(path, 9)
    rows = await claimed(store)
    busy = Busy(store)
    async with anyio.create_task_group() as group:
        group.start_soon(busy.hold)
        await busy.begun()
        async with anyio.create_task_group() as waiting:
            scopes = []

            async def verb(row: Row, scope: anyio.CancelScope) -> None:
                with scope:
                    await to_submitting(store, row.seq)

            for row in rows:
                scopes.append(anyio.CancelScope())
                waiting.start_soon(verb, row, scopes[-1])
            await anyio.wait_all_tasks_blocked()
            for scope in scopes[::2]:
                scope.cancel()
            await anyio.wait_all_tasks_blocked()
            busy.end()
    states = [(await store.row(row.seq)).state for row in rows]
    assert states == [State.PLANNED, State.SUBMITTING] * 4 + [State.PLANNED]
    assert await store.counts() == recount(path)
    store.close()


@pytest.mark.parametrize("moment", range(25))
async def test_a_verb_cancelled_at_any_moment_harms_no_other(path: Path, moment: int) -> None:
    # the first is cancelled at every moment in turn (it commits for the others), some others at random ones
    rng = Random(moment)
    store = await planned(path, 40)
    returned: dict[int, Row] = {}
    undisturbed: set[int] = set()

    async def verb(row: Row, scope: anyio.CancelScope) -> None:
        with scope:
            returned[row.seq] = await to_submitting(store, row.seq)

    async def cancel(scope: anyio.CancelScope, patience: int) -> None:
        for _ in range(patience):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    rows = await claimed(store)
    async with anyio.create_task_group() as group:
        for row in rows:
            scope = anyio.CancelScope()
            group.start_soon(verb, row, scope)
            if row is rows[0]:
                group.start_soon(cancel, scope, moment)
            elif rng.random() < 0.3:
                group.start_soon(cancel, scope, rng.randrange(25))
            else:
                undisturbed.add(row.seq)
    assert undisturbed <= returned.keys()
    for seq, row in returned.items():
        assert row.state is (await store.row(seq)).state is State.SUBMITTING
    assert await store.counts() == recount(path)
    store.close()


async def test_a_task_cancelled_from_outside_anyio_leaves_transactions_whole(path: Path) -> None:
    store = await planned(path, 60)
    rows = await claimed(store)
    for number, row in enumerate(rows[:-1]):
        task = asyncio.get_running_loop().create_task(to_submitting(store, row.seq))
        for _ in range(number % 12):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        await to_submitting(store, rows[-1].seq)
        await store.withdraw(rows[-1].seq)
        await asyncio.wait([task])
    assert await store.counts() == recount(path)
    store.close()


async def test_a_closed_store_says_so(path: Path) -> None:
    store = await planned(path, 1)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.counts()
    with pytest.raises(StoreError, match="closed"):
        await claimed(store)


# --- durability -----------------------------------------------------------------------------------------


def kill_while_it_tells(path: Path, lines: int) -> list[tuple[str, int]]:
    """What a child acknowledged of its work on that file before it was killed: (step, row)."""
    command = [sys.executable, "-m", "tests.support.acknowledging", str(path)]
    told = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        told += [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        # what stands in the pipe was acknowledged too; a torn last line was not
        told += [line for line in child.stdout if line.endswith("\n")]
    return [(line.split()[0], int(line.split()[1])) for line in told]


async def test_what_was_acknowledged_is_there_after_any_kill(path: Path) -> None:
    rng = Random(4)
    (await planned(path, 3000)).close()
    after = {
        "accepted": {State.IN_FLIGHT, State.FINISHED, State.DONE},
        "finished": {State.FINISHED, State.DONE},
        "done": {State.DONE},
    }
    told: set[tuple[str, int]] = set()
    for _ in range(5):
        told |= set(await anyio.to_thread.run_sync(kill_while_it_tells, path, rng.randrange(1, 150)))
        store = await begin(Store.open(path))
        assert await store.counts() == recount(path)
        for word, seq in told:
            row = await store.row(seq)
            assert row.state in after[word]
            assert row.attempt is not None
            assert row.attempt.task_id == f"{1000 + seq}"
        store.close()
    assert {word for word, _ in told} == set(after)


async def test_a_copy_taken_at_any_moment_is_a_sound_state(path: Path, tmp_path: Path) -> None:
    # what a power cut leaves is no more than this: the file and its log, as far as they were written
    store = await planned(path, 300)
    rows = await claimed(store)
    for number, row in enumerate(rows[:31]):
        await to_done(store, row.seq)
        if number % 10 == 0:
            folder = tmp_path / str(number)
            folder.mkdir()
            for file in path.parent.glob("state.sqlite3*"):
                if not file.name.endswith("-shm"):
                    shutil.copy(file, folder)
            copied = Store.open(folder / path.name)
            assert (await copied.counts()).by_state[State.DONE] == number + 1
            assert await copied.counts() == recount(folder / path.name)
            copied.close()
    store.close()


# --- leases ---------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, Callable[[Store, int], object]]] = [
    ("planned", to_submitting),
    ("planned", lambda store, seq: store.record_rejected(seq, TROUBLE)),
    ("submitting", lambda store, seq: store.record_accepted(seq, Accepted("7", ""), at=1.0)),
    ("submitting", lambda store, seq: store.withdraw(seq)),
    ("submitting", lambda store, seq: store.record_doubt(seq, "reset")),
    ("in_doubt", lambda store, seq: store.record_accepted(seq, Accepted("7", ""), at=1.0, adopted=True)),
    ("in_doubt", lambda store, seq: store.record_absent(seq)),
    ("in_doubt", lambda store, seq: store.hold(seq, TROUBLE)),
    ("in_doubt", lambda store, seq: store.give_up_doubt(seq)),
    ("in_flight", lambda store, seq: store.record_finished(seq, Task("7"), at=1.0)),
    (
        "in_flight",
        lambda store, seq: store.record_attempt_failed(seq, Task("7"), TROUBLE, at=1.0, event=Event.GAVE_UP),
    ),
    ("finished", lambda store, seq: store.refresh_outputs(seq, [])),
    ("finished", lambda store, seq: store.record_lost(seq, TROUBLE)),
    ("finished", lambda store, seq: store.record_saved(seq)),
]


async def bring_to(store: Store, seq: int, state: str) -> None:
    if state in ("submitting", "in_doubt"):
        await to_submitting(store, seq)
    if state == "in_doubt":
        await store.record_doubt(seq, "reset")
    if state == "in_flight":
        await to_in_flight(store, seq)
    if state == "finished":
        await to_finished(store, seq)


@pytest.mark.parametrize(("state", "change"), CHANGES)
async def test_a_process_that_lost_its_lease_changes_nothing(
    path: Path, state: str, change: Callable[[Store, int], object]
) -> None:
    first = await planned(path, 1)
    (row,) = await claimed(first)
    await bring_to(first, row.seq, state)
    second = await begin(Store.open(path))
    before = await second.row(row.seq)
    for _ in range(2):  # before and after the second has claimed the row
        with pytest.raises(LeaseLost):
            await change(first, row.seq)  # type: ignore[misc]
        assert await second.row(row.seq) == before
        assert await second.counts() == recount(path)
        await claimed(second, State(state))
    await change(second, row.seq)  # type: ignore[misc]
    with pytest.raises(LeaseLost):
        await claimed(first)
    with pytest.raises(LeaseLost):
        await first.requeue(states=[State.FAILED, State.CANCELLED])
    first.close()
    second.close()


async def test_images_of_a_row_claimed_by_another_are_not_recorded(path: Path) -> None:
    first = await planned(path, 1)
    (row,) = await claimed(first)
    row = await to_finished(first, row.seq)
    second = await begin(Store.open(path))
    with pytest.raises(LeaseLost):
        await first.record_output(row.seq, saved(row.outputs[0], "images/0.png"))
    assert (await second.row(row.seq)).outputs[0].path is None
    first.close()
    second.close()


async def test_a_row_is_claimed_by_one_and_unclaimed_rows_by_the_next_start(path: Path) -> None:
    store = await planned(path, 10)
    first = await store.claim(State.PLANNED, limit=4)
    second = await store.claim(State.PLANNED, limit=4)
    assert [row.seq for row in first + second] == list(range(1, 9))
    await store.release([2, 3])
    assert [row.seq for row in await claimed(store)] == [2, 3, 9, 10]
    assert await claimed(store) == []
    await store.end_lease(2.0)
    await begin(store)
    assert [row.seq for row in await claimed(store)] == list(range(1, 11))
    store.close()


async def test_nothing_is_changed_before_the_run_is_taken(path: Path) -> None:
    store = await planned(path, 1)
    store.close()
    store = Store.open(path)
    with pytest.raises(LeaseLost):
        await claimed(store)
    with pytest.raises(LeaseLost):
        await to_submitting(store, 1)
    store.close()


async def test_rows_are_claimed_by_state_and_only_planned_ones_within_the_limit_asked_for(path: Path) -> None:
    store = await planned(path, 6)
    for row in (await claimed(store))[3:]:
        await to_in_flight(store, row.seq)
    await begin(store)
    assert [row.seq for row in await store.claim(State.PLANNED, limit=9, last_seq=2)] == [1, 2]
    assert [row.seq for row in await store.claim(State.IN_FLIGHT, limit=9, last_seq=2)] == [4, 5, 6]
    assert await store.last_seq_of(3) == 3
    assert await store.last_seq_of(7) is None
    assert await store.planned_beyond(2) == 1
    store.close()


async def test_a_cancel_order_is_forgotten_by_the_next_start(path: Path) -> None:
    store = await planned(path, 1)
    connection = connect(path)
    connection.execute("UPDATE run SET stop_order = 'cancel'")
    connection.close()
    assert await store.stop_order() == "cancel"
    await begin(store)
    assert await store.stop_order() is None
    store.close()


async def test_a_writer_cancelled_just_as_its_commit_ends_hands_the_turn_on(path: Path) -> None:
    store = Store.open(path)
    may_end = threading.Event()

    def slow(connection: sqlite3.Connection) -> str:
        may_end.wait(10)
        return "done"

    first = asyncio.ensure_future(store._transactions.write(slow))
    others = [asyncio.ensure_future(store._transactions.write(lambda connection: "done")) for _ in range(3)]
    await asyncio.sleep(0)
    while not store._transactions._exclusive.locked():
        await asyncio.sleep(0.001)
    may_end.set()
    with store._transactions._exclusive:  # the loop stands still until the thread has committed
        first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with anyio.fail_after(5):
        assert [await other for other in others] == ["done"] * 3
        assert await store._transactions.write(lambda connection: "still") == "still"
    store.close()
