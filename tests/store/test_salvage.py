"""Real damage to real state files: it is noticed before work begins, and what is sound is still read."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from batchrun.errors import StoreDamaged
from batchrun.model import State
from batchrun.rules.rebuild import Rebuilt
from batchrun.store.connection import connect
from batchrun.store.damage import check_further, check_sound
from batchrun.store.folder import Folder
from batchrun.store.rebuilding import FoundRow, FoundRun, Image, Try, write_state
from batchrun.store.salvage import IS_SURE, Wreck
from batchrun.store.store import Store
from tests.support.rows import TOOL, begin, claimed, merge, planned, recount, staged, to_done, to_in_flight

PAGE = 4096
ROWS = 400
DONE = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of many rows, some done, some in flight, closed in good order."""
    folder = tmp_path_factory.mktemp("made")

    async def make() -> None:
        store = await planned(
            folder / "state.sqlite3", [staged(n, f"{n} {'x' * 300}") for n in range(1, ROWS + 1)]
        )
        for row in (await claimed(store, limit=DONE + 10))[:DONE]:
            await to_done(store, row.seq)
        for seq in range(DONE + 1, DONE + 11):
            await to_in_flight(store, seq)
        store.close()

    import anyio

    anyio.run(make)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Folder:
    """A copy of that folder."""
    shutil.copytree(made, tmp_path / "run")
    return Folder(tmp_path / "run")


async def killed(path: Path) -> Folder:
    """What a killed process leaves: the files as they are while it works."""
    store = await planned(path / "live.sqlite3", 30)
    for row in await claimed(store):
        await to_in_flight(store, row.seq)
    folder = Folder(path / "killed")
    folder.path.mkdir()
    for end in ("", "-wal", "-shm"):
        shutil.copy(path / f"live.sqlite3{end}", folder.path / f"state.sqlite3{end}")
    store.close()
    return folder


def log_of(folder: Folder) -> Path:
    return folder.state.with_name("state.sqlite3-wal")


# --- noticing ------------------------------------------------------------------------------------------


def zero(folder: Folder) -> None:
    (folder.path / "results.jsonl").write_text("{}\n")
    folder.state.write_bytes(b"")


def gone(folder: Folder) -> None:
    (folder.path / "images" / "000").mkdir(parents=True)
    (folder.path / "images" / "000" / "a_0.png").write_bytes(b"x")
    folder.state.unlink()


def short(folder: Folder) -> None:
    content = folder.state.read_bytes()
    folder.state.write_bytes(content[: len(content) // 2])


def beginning(folder: Folder) -> None:
    with folder.state.open("r+b") as file:
        file.write(Random(1).randbytes(PAGE))


def middle(folder: Folder) -> None:
    random, pages = Random(2), folder.state.stat().st_size // PAGE
    with folder.state.open("r+b") as file:
        for page in random.sample(range(30, pages), pages // 10):
            file.seek(page * PAGE)
            file.write(random.randbytes(PAGE))


def replaced(folder: Folder) -> None:
    (folder.path / "results.jsonl").write_text('{"task_ids": ["424242"]}\n')


DAMAGES = [zero, gone, short, beginning, middle, replaced]


def test_damage_deep_in_a_large_state_is_noticed_while_the_run_goes_on(folder: Folder) -> None:
    check_further(folder)
    middle(folder)
    with pytest.raises(StoreDamaged, match="batchrun repair"):
        check_further(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_before_work_begins_and_the_words_name_the_cure(
    folder: Folder, damage: Callable
) -> None:
    check_sound(folder)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(StoreDamaged, match="batchrun repair") as told:
        check_sound(folder)
    assert "images already saved are safe" in str(told.value)
    for path, content in before.items():
        assert path.read_bytes() == content


async def test_a_state_whose_log_is_gone_is_noticed_even_before_anything_was_saved(tmp_path: Path) -> None:
    folder = await killed(tmp_path)
    check_sound(folder)
    for make_it_go in (lambda: log_of(folder).write_bytes(b""), log_of(folder).unlink):
        make_it_go()
        with pytest.raises(StoreDamaged, match="-wal is gone"):
            check_sound(folder)


@pytest.mark.parametrize("at", [0, 10, 32 + 30, 32 + 4120 * 5 + 200])
async def test_a_garbled_log_is_noticed_wherever_it_begins(tmp_path: Path, at: int) -> None:
    folder = await killed(tmp_path)
    with log_of(folder).open("r+b") as file:
        file.seek(at)
        file.write(Random(at).randbytes(16))
    with pytest.raises(StoreDamaged, match="garbled"):
        check_sound(folder)


async def test_what_a_kill_and_a_power_cut_leave_is_no_damage(tmp_path: Path) -> None:
    folder = await killed(tmp_path)
    whole = log_of(folder).read_bytes()
    log_of(folder).write_bytes(whole[:-1000])  # the last commit was torn
    check_sound(folder)
    torn = bytearray(whole)
    torn[-3000:-2000] = bytes(1000)
    log_of(folder).write_bytes(torn)
    check_sound(folder)
    starts = range(32, len(whole), 24 + PAGE)
    commits = [start for start in starts if whole[start + 4 : start + 8] != bytes(4)]
    assert commits[-1] - commits[-2] > 24 + PAGE  # the last commit has several pages
    torn = bytearray(whole)
    torn[commits[-1] - PAGE : commits[-1] - PAGE + 500] = Random(5).randbytes(500)  # the one before its last
    log_of(folder).write_bytes(torn)
    check_sound(folder)
    log_of(folder).write_bytes(whole)
    # taken over entirely, and then begun anew with a torn header
    connection = connect(folder.state)
    connection.execute("PRAGMA wal_checkpoint").fetchone()
    database = folder.state.read_bytes()
    connection.close()
    folder.state.write_bytes(database)
    log_of(folder).write_bytes(struct.pack(">I", 7) + whole[4:])
    check_sound(folder)


async def test_a_start_that_comes_to_nothing_after_a_kill_leaves_a_sound_state(tmp_path: Path) -> None:
    folder = await killed(tmp_path)
    Store.open(folder.state).close()  # takes the log over, and removes it
    assert not log_of(folder).exists()
    check_sound(folder)


def test_a_folder_without_a_run_and_one_killed_while_reading_are_sound(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    check_sound(folder)
    folder.create()
    folder.state.touch()
    check_sound(folder)
    Store.open(folder.state).close()
    check_sound(folder)


# --- reading -------------------------------------------------------------------------------------------


def read(folder: Folder) -> tuple[dict[int, dict], Wreck]:
    wreck = Wreck(folder.state, folder.path / "reading")
    rows = {remains.row["seq"]: remains for remains in wreck.rows()}
    return rows, wreck


@pytest.mark.parametrize(
    ("damage", "at_least"), [(None, ROWS), (short, ROWS // 4), (beginning, ROWS), (middle, ROWS // 2)]
)
def test_what_is_not_damaged_is_read(folder: Folder, damage: Callable | None, at_least: int) -> None:
    whole, wreck = read(folder)
    wreck.close()
    assert len(whole) == ROWS
    if damage is not None:
        damage(folder)
    before = folder.state.read_bytes()
    rows, wreck = read(folder)
    assert at_least <= len(rows) <= ROWS
    assert (len(rows) == ROWS) == (damage in (None, beginning))
    for seq, remains in rows.items():
        assert remains.row == whole[seq].row
        if remains.row["state"] == State.IN_FLIGHT and remains.attempts:
            assert remains.attempts == whole[seq].attempts or not remains.attempts[-1][IS_SURE]
    wreck.close()
    assert folder.state.read_bytes() == before
    assert not (folder.path / "reading").exists()


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_anywhere_never_end_the_reading_and_never_forge_a_task(
    folder: Folder, seed: int
) -> None:
    whole, wreck = read(folder)
    wreck.close()
    random = Random(seed)
    content = bytearray(folder.state.read_bytes())
    for _ in range(400):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    folder.state.write_bytes(content)
    rows, wreck = read(folder)
    wreck.run(), wreck.tools(), wreck.uploads(), wreck.times()
    wreck.close()
    known = {one["task_id"] for remains in whole.values() for one in remains.attempts}
    sure = {one["task_id"] for remains in rows.values() for one in remains.attempts if one[IS_SURE]}
    assert sure - {None} <= known


def test_a_file_that_is_no_database_at_all_gives_nothing_and_no_error(folder: Folder) -> None:
    folder.state.write_bytes(Random(3).randbytes(100_000))
    rows, wreck = read(folder)
    assert (rows, wreck.run(), wreck.tools(), wreck.times()) == ({}, {}, {}, [])
    wreck.close()


# --- writing -------------------------------------------------------------------------------------------


def found(seq: int, standing: Rebuilt, **more: object) -> FoundRow:
    content = bytes([seq]) * 12
    key = f"{content.hex()}.1"
    return FoundRow(standing, seq, key, content, content, None, seq, f"n{seq}", TOOL, **more)


async def test_a_rebuilt_state_is_whole_and_contradictions_are_left_to_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    image = Image(0, "images/000/n1_0.png", "ab" * 32, 10)
    rows = [
        found(1, Rebuilt.DONE, tries=[Try("1", cost_usd="0.10")], outputs=[image], images=1),
        found(2, Rebuilt.FAILED, cause="rejected", message="no"),
        found(3, Rebuilt.FOLLOW, tries=[Try("2", cost_usd="0"), Try("3", cost_usd="0.5")]),
        found(4, Rebuilt.DONE, tries=[Try("3")]),  # a task is one row's
        found(5, Rebuilt.SEARCH, given='{"prompt":"x"}'),
    ]
    written = write_state(path, FoundRun(until=50.0), rows)
    assert written == {Rebuilt.DONE: 1, Rebuilt.FAILED: 1, Rebuilt.FOLLOW: 1, Rebuilt.SEARCH: 1}
    assert path.stat().st_mode & 0o777 == 0o600
    store = await begin(Store.open(path))
    counts = await store.counts()
    assert counts == recount(path)
    assert (counts.images, counts.bytes, f"{counts.cost_usd}") == (
        1,
        10,
        "0.10",
    )  # an open task is not paid yet
    (row,) = await claimed(store, State.IN_FLIGHT)
    assert row.attempt is not None
    assert (row.attempt.task_id, row.attempt.number, row.attempts) == ("3", 2, 1)
    assert await claimed(store, State.IN_DOUBT) == []  # searched for, never looked up one by one
    store.close()
    check_sound(Folder(tmp_path))


async def test_the_first_reading_after_a_repair_makes_every_unknown_row_doubtful_and_later_ones_do_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.sqlite3"
    one, two, three = staged(1, id="a"), staged(2, id="b"), staged(3, id="c")
    known = FoundRow(Rebuilt.DONE, 2, "id:b", two.content, two.content, "b", 9, "b", TOOL, images=1)
    lost = FoundRow(Rebuilt.DONE, 4, "id:d", b"", b"", "d", 0, "d", TOOL, images=1)
    write_state(path, FoundRun(until=50.0), [known, lost])
    store = await begin(Store.open(path))
    assert await store.is_unread()
    await store.planning(lambda connection: merge(connection, [one, two, three, staged(4, id="d")]))
    rows = [await store.row(seq) for seq in (1, 2, 3, 4)]
    # numbers that nobody has are given again: images lie by them
    assert [(row.id, row.state.value) for row in rows] == [
        ("a", "in_doubt"), ("b", "done"), ("c", "in_doubt"), ("d", "done"),
    ]  # fmt: skip
    assert rows[1].line == 2
    assert rows[3].content == staged(4, id="d").content.hex()
    assert await claimed(store) == []
    assert await store.wanted() is not None
    again = await store.planning(
        lambda connection: merge(
            connection, [one, two, three, staged(4, id="d"), staged(5, id="e")], stamp="t"
        )
    )
    assert (again.new, again.changed, again.replaced) == (1, 0, 0)
    assert [row.id for row in await claimed(store)] == ["e"]
    store.close()
