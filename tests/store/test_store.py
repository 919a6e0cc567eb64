"""The state of a run: every verb whole or absent, durable once acknowledged, and true in its sums."""

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
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import DiskError, LeaseLost, StoreDamaged, StoreError, StoreTooNew
from batchrun.model import Accepted, Failure, RemoteOutput, Row, State, Task
from batchrun.rules.states import Event, ImpossibleMove
from batchrun.store import migrations
from batchrun.store.store import Intent, Requeued, Store, connect, read_counts, read_failures
from tests.support.rows import (
    IMAGE_BYTES,
    begin,
    claimed,
    ended,
    merge,
    planned,
    recount,
    reserved_usd,
    save_all,
    saved,
    staged,
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
    with pytest.raises(StoreDamaged, match=r"state\.sqlite3 is damaged .* Put back a copy of it"):
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


def test_a_step_that_fails_leaves_nothing_of_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE second (a)")

    def failing(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE third (a)")
        connection.execute("INSERT INTO third VALUES (1)")
        raise sqlite3.OperationalError("power went out")

    def third(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE third (a)")

    first = migrations.STEPS
    monkeypatch.setattr(migrations, "STEPS", (*first, second, failing))
    with pytest.raises(StoreError, match="power went out"):
        Store.open(path)
    assert version_of(path) == len(first) + 1
    assert "second" in tables_of(path)
    assert "third" not in tables_of(path)
    monkeypatch.setattr(migrations, "STEPS", (*first, second, third))
    Store.open(path).close()
    assert version_of(path) == len(first) + 2
    assert "third" in tables_of(path)


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


@pytest.mark.parametrize("seed", range(25))
async def test_cancelled_at_any_moment_a_verb_harms_no_other(path: Path, seed: int) -> None:
    rng = Random(seed)
    store = await planned(path, 40)
    returned: dict[int, Row] = {}

    async def verb(row: Row, scope: anyio.CancelScope, patience: int) -> None:
        with scope:
            returned[row.seq] = await to_submitting(store, row.seq)

    async def cancel(scope: anyio.CancelScope, patience: int) -> None:
        for _ in range(patience):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    rows = await claimed(store)
    async with anyio.create_task_group() as group:
        for row in rows:
            scope, patience = anyio.CancelScope(), rng.randrange(60)
            group.start_soon(verb, row, scope, patience)
            if rng.random() < 0.5:
                group.start_soon(cancel, scope, patience)
            else:
                returned.setdefault(-row.seq, row)
    kept = {-seq for seq in returned if seq < 0}
    assert kept <= returned.keys()
    for row in rows:
        stored = await store.row(row.seq)
        if row.seq in returned:
            assert returned[row.seq].state is stored.state is State.SUBMITTING
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
    ("planned", lambda store, seq: store.record_cancelled(seq)),
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


# --- a row's way ----------------------------------------------------------------------------------------


async def test_a_row_s_way_from_planned_to_done(path: Path) -> None:
    store = await planned(path, [staged(7, "a cat", id="cat", images=2)])
    (row,) = await claimed(store)
    assert (row.seq, row.key, row.id, row.line, row.name) == (1, "id:cat", "cat", 7, "cat")
    assert (row.state, row.attempts, row.attempt, row.outputs) == (State.PLANNED, 0, None, ())
    row = await to_submitting(store, 1)
    assert row.state is State.SUBMITTING
    assert row.attempt is not None
    assert (row.attempt.number, row.attempt.task_id) == (1, None)
    assert (row.attempt.intent_at, row.attempt.intent_server_at, row.attempt.after_task) == (10.0, 9.0, 5)
    row = await store.record_accepted(1, Accepted("2221", "secret"), at=11.0)
    assert row.attempt is not None
    assert (row.state, row.attempt.task_id, row.attempt.token) == (State.IN_FLIGHT, "2221", "secret")
    row = await store.record_finished(1, ended(row, cost="0.0070", images=2), at=12.0)
    assert row.attempt is not None
    assert (row.state, row.attempts) == (State.FINISHED, 1)
    assert (row.attempt.cost_usd, row.attempt.seconds) == (Decimal("0.0070"), Decimal("1.5"))
    assert [(output.index, output.path, output.declared_bytes) for output in row.outputs] == [
        (0, None, IMAGE_BYTES),
        (1, None, IMAGE_BYTES),
    ]
    row = await store.record_output(1, saved(row.outputs[1], "images/000/cat_1.png"))
    assert [output.path for output in row.outputs] == [None, "images/000/cat_1.png"]
    row = await save_all(store, row)
    assert (row.state, row.failure) == (State.DONE, None)
    assert all(output.url is None and output.sha256 == "ab" * 32 for output in row.outputs)
    counts = await store.counts()
    assert (counts.by_state, counts.images, counts.bytes) == ({State.DONE: 1}, 2, 2 * IMAGE_BYTES)
    assert counts.cost_usd == Decimal("0.0070")
    assert not await store.has_work()
    store.close()


async def test_a_submit_that_made_no_task_leaves_no_trace(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    for _ in range(3):
        await to_submitting(store, 1, reserved="0.5")
        row = await store.withdraw(1)
        assert (row.state, row.attempts, row.attempt) == (State.PLANNED, 0, None)
    await to_submitting(store, 1, reserved="0.5")
    await store.record_doubt(1, "reset")
    row = await store.record_absent(1)
    assert (row.state, row.attempts, row.attempt) == (State.PLANNED, 0, None)
    assert reserved_usd(path) == (Decimal(0), Decimal(0))
    store.close()


async def test_failed_tasks_are_numbered_attempts_of_the_row(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    for number in (1, 2, 3):
        row = await to_in_flight(store, 1, f"t{number}")
        assert row.attempt is not None
        assert row.attempt.number == number
        event = Event.ATTEMPT_FAILED if number < 3 else Event.GAVE_UP
        task = Task(f"t{number}", status="task_postprocess_end", pexit="1", cost_usd=Decimal(9))
        row = await store.record_attempt_failed(1, task, TROUBLE, at=12.0, event=event)
        assert row.attempts == number
    assert (row.state, row.failure) == (State.FAILED, TROUBLE)
    (record,) = await store.settled_after(0, limit=9)
    assert [(a.number, a.task_id, a.cost_usd, a.error) for a in record.attempts] == [
        (number, f"t{number}", Decimal(0), TROUBLE.message) for number in (1, 2, 3)
    ]
    assert (await store.counts()).cost_usd == 0
    store.close()


async def test_a_task_belongs_to_one_row_and_the_second_is_in_doubt(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_in_flight(store, 1, "77")
    row = await to_in_flight(store, 2, "77")
    assert row.state is State.IN_DOUBT
    assert row.attempt is not None
    assert row.attempt.task_id is None
    row = await store.record_accepted(2, Accepted("77", ""), at=1.0, adopted=True)
    assert row.state is State.IN_DOUBT
    row = await store.record_accepted(2, Accepted("78", ""), at=1.0, adopted=True)
    assert (row.state, row.attempt and row.attempt.task_id) == (State.IN_FLIGHT, "78")
    assert await store.known_tasks(["76", "77", "78", "79"]) == {"77", "78"}
    assert await store.known_tasks([]) == set()
    store.close()


async def test_recording_a_row_s_own_task_twice_changes_nothing(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    once = await to_in_flight(store, 1, "77")
    assert await store.record_accepted(1, Accepted("77", "secret"), at=99.0) == once
    store.close()


async def test_outputs_without_an_address_are_no_images(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1)
    outputs = (RemoteOutput("log", None), RemoteOutput("0.png", "https://cdn/0.png"))
    row = await store.record_finished(1, replace(ended(row), outputs=outputs), at=1.0)
    assert [(output.index, output.url) for output in row.outputs] == [(0, "https://cdn/0.png")]
    store.close()


async def test_fresh_addresses_are_for_images_still_to_be_fetched(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_finished(store, 1, images=3)
    await store.record_output(1, saved(row.outputs[0], "images/0.png"))
    await store.record_output(1, saved(row.outputs[1], "pending/1.png"), held=True)
    fresh = [RemoteOutput("x", None), *(RemoteOutput("", f"https://new/{n}") for n in range(3))]
    row = await store.refresh_outputs(1, fresh)
    assert [output.url for output in row.outputs] == [
        "https://cdn/1/0.png",
        "https://cdn/1/1.png",
        "https://new/2",
    ]
    store.close()


async def test_a_doubt_held_for_the_user_is_told_and_looked_up_again_by_the_next_start(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    await to_submitting(store, 1)
    await store.record_doubt(1, "reset")
    await store.hold(1, Failure("in doubt", "the list is off"))
    assert await store.failures() == [(State.IN_DOUBT, Failure("in doubt", "the list is off"), 1, 1)]
    assert [item.row.state for item in await store.settled_after(0, limit=9)] == [State.IN_DOUBT]
    (row,) = await claimed(store, State.IN_DOUBT)
    assert row.attempt is not None
    assert await store.settled_after(0, limit=9) == []
    store.close()


async def test_a_doubt_given_up_by_the_user_is_submitted_with_its_history_kept(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    await to_submitting(store, 1, reserved="0.25")
    await store.record_doubt(1, "reset")
    row = await store.give_up_doubt(1)
    assert (row.state, row.generation, row.attempts, row.attempt) == (State.PLANNED, 1, 0, None)
    assert reserved_usd(path) == (Decimal(0), Decimal(0))
    row = await to_in_flight(store, 1)
    assert row.attempt is not None
    assert row.attempt.number == 1
    assert await ask(store, "SELECT count(*) FROM attempts") == 2
    store.close()


async def test_a_row_that_has_left_the_manifest_is_followed_but_not_bought_again(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_in_flight(store, 1)
    await to_submitting(store, 2)
    await store.planning(lambda connection: merge(connection, [staged(9, "other")]))
    await begin(store)
    assert [row.seq for row in await claimed(store, State.IN_FLIGHT)] == [1]
    assert [row.seq for row in await claimed(store, State.SUBMITTING)] == [2]
    assert [row.seq for row in await claimed(store, State.PLANNED)] == [4]
    failed = Task("1001", status="task_cancel")
    await store.record_attempt_failed(1, failed, TROUBLE, at=1.0, event=Event.ATTEMPT_FAILED)
    await store.record_doubt(2, "killed")
    await store.record_absent(2)
    for seq in (1, 2):
        with pytest.raises(LeaseLost):
            await to_submitting(store, seq)
    await to_done(store, 4)
    assert not await store.has_work()
    assert await store.counts() == recount(path)
    assert (await store.counts()).total == 1
    store.close()


# --- money ----------------------------------------------------------------------------------------------

AMOUNTS = st.decimals(0, 100, allow_nan=False, allow_infinity=False, places=12)


@settings(max_examples=15, deadline=None)
@given(amounts=st.lists(st.tuples(AMOUNTS, AMOUNTS, st.booleans()), min_size=1, max_size=12))
def test_money_is_exact(
    tmp_path_factory: pytest.TempPathFactory, amounts: list[tuple[Decimal, Decimal, bool]]
) -> None:
    path = tmp_path_factory.mktemp("money") / "state.sqlite3"

    async def spend() -> None:
        store = await planned(path, len(amounts))
        await claimed(store)
        for seq, (reserved, cost, finishes) in enumerate(amounts, 1):
            row = await to_in_flight(store, seq, reserved=str(reserved))
            if finishes:
                await store.record_finished(seq, ended(row, cost=str(cost)), at=1.0)
        assert (await store.counts()).cost_usd == sum(cost for _, cost, finishes in amounts if finishes)
        open_ones = sum(reserved for reserved, _, finishes in amounts if not finishes)
        assert reserved_usd(path) == (open_ones, open_ones)
        store.close()

    anyio.run(spend)


async def test_amounts_of_any_length_are_kept_to_the_last_digit(path: Path) -> None:
    store = await planned(path, 2)
    await claimed(store)
    await to_done(store, 1, cost="0." + "0" * 40 + "1")
    await to_done(store, 2, cost="123456789012345678901234567890")
    assert f"{(await store.counts()).cost_usd:f}" == "123456789012345678901234567890." + "0" * 40 + "1"
    store.close()


async def test_a_paid_task_without_images_is_money_spent(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1)
    await store.record_attempt_failed(1, ended(row, images=0), TROUBLE, at=1.0, event=Event.GAVE_UP)
    assert (await store.counts()).cost_usd == Decimal("0.01")
    store.close()


# --- settling and asking again --------------------------------------------------------------------------


async def test_settled_numbers_strictly_increase_in_the_order_of_settling(path: Path) -> None:
    store = await planned(path, [*(staged(n) for n in range(1, 6)), staged(6, "?", message="wrong")])
    await claimed(store)
    await to_done(store, 4)
    await store.record_rejected(2, TROUBLE)
    await store.record_cancelled(1)
    await to_done(store, 3)
    settled = await store.settled_after(0, limit=100)
    assert [item.row.seq for item in settled] == [6, 4, 2, 1, 3]
    numbers = [item.number for item in settled]
    assert numbers == sorted(set(numbers))
    store.close()


async def test_settled_rows_are_read_in_pages(path: Path) -> None:
    store = await planned(path, 25)
    await claimed(store)
    for seq in range(25, 0, -1):
        await to_done(store, seq)
    seen: list[int] = []
    after = 0
    while page := await store.settled_after(after, limit=4):
        assert len(page) <= 4
        seen += [item.row.seq for item in page]
        after = page[-1].number
    assert seen == list(range(25, 0, -1))
    store.close()


async def test_asking_again_takes_a_row_out_of_what_was_listed(path: Path) -> None:
    store = await planned(path, 3)
    await claimed(store)
    await to_done(store, 1)
    await store.record_rejected(2, TROUBLE)
    before = await store.settled_after(0, limit=9)
    assert await store.set_listing_mark({"settled": before[-1].number}, instead_of={})
    assert await store.requeue(states=[State.FAILED]) == Requeued(submit=1)
    assert await store.listing_mark() == {}
    assert [item.row.seq for item in await store.settled_after(0, limit=9)] == [1]
    await claimed(store)
    await store.record_rejected(2, TROUBLE)
    settled = await store.settled_after(0, limit=9)
    assert [item.row.seq for item in settled] == [1, 2]
    assert settled[1].number > before[-1].number
    store.close()


async def test_a_listing_mark_is_set_only_instead_of_the_one_it_builds_on(path: Path) -> None:
    store = await planned(path, 1)
    assert await store.listing_mark() == {}
    assert await store.set_listing_mark({"settled": 1}, instead_of={})
    assert not await store.set_listing_mark({"settled": 2}, instead_of={})
    assert await store.listing_mark() == {"settled": 1}
    store.close()


async def test_retry_buys_fetches_or_leaves_as_the_failure_asks(path: Path) -> None:
    store = await planned(path, 6)
    await claimed(store)
    await store.record_rejected(1, TROUBLE)
    await store.record_cancelled(2)
    await to_finished(store, 3, images=2)
    await store.record_output(3, saved((await store.row(3)).outputs[0], "images/3_0.png"))
    await store.record_lost(3, Failure("download failed", "404"))
    await to_finished(store, 4)
    await store.record_lost(4, Failure("images gone", "deleted"))
    await to_done(store, 5)
    await to_submitting(store, 6)
    states = [State.FAILED, State.CANCELLED]
    assert await store.requeue(states=states) == Requeued(submit=2, save=1, lost=1)
    found = [(await store.row(seq)).state for seq in range(1, 7)]
    assert found == [
        State.PLANNED,
        State.PLANNED,
        State.FINISHED,
        State.FAILED,
        State.DONE,
        State.SUBMITTING,
    ]
    # what was saved stays saved, and nothing is claimed
    (row,) = await claimed(store, State.FINISHED)
    assert [output.path for output in row.outputs] == ["images/3_0.png", None]
    assert await store.requeue(states=states, regenerate_lost=True) == Requeued(submit=1)
    assert [row.seq for row in await claimed(store, State.PLANNED)] == [1, 2, 4]
    assert await store.counts() == recount(path)
    store.close()


async def test_retry_can_be_told_the_rows_by_id_or_by_file_name(path: Path) -> None:
    rows = [staged(1, id="a"), staged(2, id="b/c"), staged(3)]
    store = await planned(path, rows)
    for row in await claimed(store):
        await store.record_rejected(row.seq, TROUBLE)
    assert await store.requeue(states=[State.FAILED], ids=["b/c"]) == Requeued(submit=1)
    assert (await store.row(2)).state is State.PLANNED
    name = (await store.row(3)).name
    assert await store.requeue(states=[State.FAILED], ids=[name, "nobody"]) == Requeued(submit=1)
    assert await store.requeue(states=[State.FAILED], ids=["nobody"]) == Requeued()
    assert await store.requeue(states=[]) == Requeued()
    store.close()


async def test_a_row_asked_for_anew_has_fresh_attempts_and_keeps_its_history(path: Path) -> None:
    store = await planned(path, 1)
    await claimed(store)
    row = await to_in_flight(store, 1, "first")
    await store.record_attempt_failed(1, Task("first"), TROUBLE, at=1.0, event=Event.GAVE_UP)
    await store.requeue(states=[State.FAILED])
    (row,) = await claimed(store)
    assert (row.attempts, row.attempt, row.generation) == (0, None, 1)
    row = await to_in_flight(store, 1, "second")
    assert row.attempt is not None
    assert row.attempt.number == 1
    await save_all(store, await store.record_finished(1, ended(row), at=1.0))
    (record,) = await store.settled_after(0, limit=1)
    assert [attempt.task_id for attempt in record.attempts] == ["first", "second"]
    store.close()


async def test_images_of_a_rerun_replace_the_old_ones_when_all_are_there(path: Path) -> None:
    store = await planned(path, [staged(1, "a cat", id="x", images=2)])
    await claimed(store)
    old = await to_done(store, 1, images=2)
    await store.planning(
        lambda connection: merge(connection, [staged(1, "a dog", id="x", images=2)], rerun_changed=True)
    )
    await claimed(store)
    row = await to_in_flight(store, 1, "new")
    row = await store.record_finished(1, ended(row, images=2), at=1.0)
    older = await store.older_outputs(1)
    assert [(generation, output.path) for generation, output in older] == [
        (0, output.path) for output in old.outputs
    ]
    for output in row.outputs:
        await store.record_output(1, saved(output, f"images/000/x_{output.index}.png"), held=True)
    assert await store.older_outputs(1) == older  # held ones do not count yet
    moved = {output.path or "": f"superseded/0/{output.index}.png" for output in old.outputs}
    row = await store.record_saved(1, superseded=moved)
    assert [output.path for output in row.outputs] == ["images/000/x_0.png", "images/000/x_1.png"]
    assert await store.older_outputs(1) == []
    assert await store.counts() == recount(path)
    assert (await store.counts()).images == 2
    store.close()


# --- what is told ---------------------------------------------------------------------------------------


async def test_failures_are_grouped_by_cause_the_largest_first(path: Path) -> None:
    store = await planned(path, 10)
    await claimed(store)
    for seq in (2, 5, 7):
        await store.record_rejected(seq, Failure("rejected", f"row {seq}"))
    await store.record_rejected(9, Failure("task failed", "boom"))
    await store.record_cancelled(10)
    assert await store.failures() == [
        (State.FAILED, Failure("rejected", "row 2"), 3, 2),
        (State.CANCELLED, Failure("cancelled", "cancelled by the user"), 1, 10),
        (State.FAILED, Failure("task failed", "boom"), 1, 9),
    ]
    assert len(await store.failures(limit=2)) == 2
    reader = connect(path, read_only=True)
    assert read_failures(reader, 20) == await store.failures()
    assert read_counts(reader) == await store.counts()
    with pytest.raises(sqlite3.OperationalError):
        reader.execute("DELETE FROM rows")
    reader.close()
    store.close()


async def test_rows_that_did_not_make_it_are_given_back_as_the_manifest_had_them(path: Path) -> None:
    store = await planned(path, [*(staged(n) for n in range(1, 5)), staged(5, "?", message="wrong")])
    await claimed(store)
    await store.record_rejected(3, TROUBLE)
    await store.record_cancelled(1)
    await to_done(store, 2)
    first = await store.rejected_rows(after_seq=0, limit=2)
    assert [(row.seq, row.cells) for row in first] == [
        (1, {"prompt": "picture 1"}),
        (3, {"prompt": "picture 3"}),
    ]
    assert [row.seq for row in await store.rejected_rows(after_seq=3, limit=2)] == [5]
    store.close()


async def test_a_new_state_answers_every_question(path: Path) -> None:
    store = await begin(Store.open(path))
    assert await store.manifest() is None
    assert await store.stamp() is None
    assert await store.job() is None
    assert await store.account_limit() is None
    assert await store.stop_order() is None
    assert await store.form() == {}
    assert await store.listing_mark() == {}
    assert not await store.has_work()
    counts = await store.counts()
    assert (counts.total, counts.images, counts.cost_usd) == (0, 0, Decimal(0))
    assert await claimed(store) == []
    assert await store.failures() == []
    assert await store.last_seq_of(1) is None
    assert await store.tool_numbers() == []
    store.close()


async def test_facts_of_the_run_are_kept(path: Path) -> None:
    store = await planned(path, 1)
    await store.adopt_limit(5)
    await store.remember_job(manifest="/moved.csv", job='{"attempts": 2}')
    await store.record_upload("ab", "https://cdn/ab", at=1.0)
    await store.record_upload("ab", "https://cdn/newer", at=2.0)
    store.close()
    store = Store.open(path)
    assert await store.account_limit() == 5
    assert (await store.manifest(), await store.job()) == ("/moved.csv", '{"attempts": 2}')
    assert await store.upload_url("ab") == "https://cdn/newer"
    assert await store.upload_url("cd") is None
    assert await store.tool_numbers() == [1]
    assert "/Run/wiro/any" in await store.tool(1)
    with pytest.raises(KeyError):
        await store.tool(2)
    await store.adopt_limit(None)
    assert await store.account_limit() is None
    store.close()
