"""The first reading of a manifest goes straight to its place, and is whole or absent; later ones, and states
of earlier versions, find the same rows."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchrun.manifest.job import job_for
from batchrun.model import State
from batchrun.plan.plan import is_same, stamp_of
from batchrun.store import migrations
from batchrun.store.connection import connect
from batchrun.store.migrations import STEPS, migrate
from batchrun.store.planning import GROUP, Planning
from batchrun.store.reading import read_counts, read_rejected
from batchrun.store.store import Store
from tests.support.plans import Plans, csv
from tests.support.rows import TOOL, merge, planned, staged


def rows_of(connection: sqlite3.Connection) -> list[Any]:
    return connection.execute(
        "SELECT seq, key, id, line, name, state, given FROM rows ORDER BY seq"
    ).fetchall()


def indexes_of(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    query = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL"
    return set(connection.execute(query).fetchall())


def scratch() -> closing[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection)
    return closing(connection)


def test_a_first_reading_and_a_later_one_make_the_same_rows_and_leave_every_index() -> None:
    wanted = [
        staged(2, "cat", id="A"),
        staged(3, "dog", id="a"),
        staged(4, "cat"),
        staged(5, "cat"),
        staged(6, "hen", message="wrong"),
        staged(7, "hen", message="wrong"),
        staged(8, "fox"),
    ]
    with scratch() as first, scratch() as later:
        indexes = indexes_of(first)
        merge(first, wanted)
        merge(later, wanted[:1])
        merge(later, wanted)
        assert rows_of(first) == rows_of(later)
        assert read_counts(first) == read_counts(later)
        assert indexes_of(first) == indexes_of(later) == indexes
        assert first.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_a_kill_while_a_manifest_is_read_leaves_a_state_that_plans_again(tmp_path: Path) -> None:
    Store.open(tmp_path / "live.sqlite3").close()
    with closing(connect(tmp_path / "live.sqlite3")) as connection:
        planning = Planning(connection)
        number = planning.tool(TOOL)
        connection.execute("PRAGMA cache_size = 10")  # so that much of it is on disk already
        for line in range(2, 3 * GROUP):
            planning.stage(staged(line)._replace(tool=number))
        planning.summary()
        for end in ("", "-wal", "-shm"):
            shutil.copy(tmp_path / f"live.sqlite3{end}", tmp_path / f"state.sqlite3{end}")
        assert (tmp_path / "state.sqlite3-wal").stat().st_size > 100_000
    with closing(connect(tmp_path / "state.sqlite3")) as connection:
        migrate(connection)
        assert rows_of(connection) == []
        assert ("rows_key",) in connection.execute("SELECT name FROM sqlite_schema").fetchall()
        assert merge(connection, [staged(2), staged(3)]).new == 2


def test_a_manifest_that_is_wrong_leaves_nothing(tmp_path: Path) -> None:
    with Plans(tmp_path) as plans:
        plans.refuse(csv("id,prompt", "a,x", "a,y"))
        assert plans.rows() == []
        assert plans.take(csv("id,prompt", "a,x", "b,y")).new == 2


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_state_of_the_form_before_is_brought_up_to_date_and_read_into_again(
    monkeypatch: pytest.MonkeyPatch, has_rows: bool
) -> None:
    script = Path(migrations.__file__).with_name("schema.sql").read_text(encoding="utf-8")
    before = "\n".join(line for line in script.splitlines() if "rows_key" not in line)
    before = before.replace("key TEXT NOT NULL,  ", "key TEXT NOT NULL UNIQUE,  ")
    before = before.replace(
        "WHERE state = 'failed' OR state = 'cancelled'", "WHERE state IN ('failed', 'cancelled')"
    )
    assert "UNIQUE" in before
    assert "WHERE state IN" in before
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in migrations._statements(before):
            connection.execute(statement)
        for step in STEPS[1:4]:
            step(connection)
        connection.execute("PRAGMA user_version = 4")
        with pytest.raises(sqlite3.OperationalError, match="whole"):
            connection.execute("SELECT * FROM whole")
        wanted = [staged(2, "cat", id="A"), staged(3, "dog", id="a"), staged(4, "cat"), staged(5, "cat")]
        if has_rows:
            with scratch() as other:
                merge(other, wanted[:3])
                for table in ("run", "tools", "rows", "sources", "counts"):
                    for record in other.execute(f"SELECT * FROM {table}").fetchall():
                        marks = ", ".join("?" * len(record))
                        connection.execute(f"INSERT INTO {table} VALUES ({marks})", record)
            connection.execute("UPDATE rows SET state = 'done' WHERE seq = 1")
        migrate(connection)
        assert connection.execute("PRAGMA user_version").fetchone() == (len(STEPS),)
        with scratch() as fresh:
            assert indexes_of(fresh) - indexes_of(connection) == {
                index for index in indexes_of(fresh) if index[0] == "rows_key"
            }
        assert merge(connection, wanted).new == (1 if has_rows else 4)
        states = [record[5] for record in rows_of(connection)]
        assert states == ["done" if has_rows else "planned", "planned", "planned", "planned"]


def test_rows_are_given_back_as_the_manifest_has_them_whether_that_is_kept_or_told(tmp_path: Path) -> None:
    with Plans(tmp_path) as plans:
        text = csv("id,prompt,steps,seed", "a,x,20,", "b,y,20.0,7", "c,é,,random")
        plans.take(text, set={"samples": 1})
        kept = plans.do(plans.store.planning(lambda c: c.execute("SELECT row FROM sources").fetchall()))
        assert kept == [(2,)]  # 20.0 is 20 from then on
        told = [
            {"id": "a", "prompt": "x", "steps": "20"},
            {"id": "b", "prompt": "y", "steps": "20.0", "seed": "7"},
            {"id": "c", "prompt": "é", "seed": "random"},
        ]
        assert plans.sources() == told
        plans.buy(1)
        # a bought row that asks for something else now is left alone, and is given back as it stands now
        plans.take(text.replace("a,x,20,", "a,z,20,").replace("20.0", "20"), set={"samples": 1})
        told[0]["prompt"] = "z"
        told[1]["steps"] = "20"
        assert plans.sources() == told
        rejected = plans.do(plans.store.planning(lambda c: read_rejected(c, after_seq=0, limit=9)))
        assert rejected == []


def test_rows_of_json_are_given_back_to_the_letter_whether_that_is_kept_or_told(tmp_path: Path) -> None:
    lines = {
        '{"id": "a", "prompt": "é", "steps": 20, "scale": "7.5"}': "told",
        '{"id": "b", "prompt": "x", "steps": "20"}': "kept",
        '{"prompt": "x", "steps": 20, "id": "c"}': "kept",  # told, the id would come first
        '{"id": "d", "prompt": "x", "scale": 7.50}': "kept",
        '{"id": 5, "prompt": "x"}': "kept",
        '{"id": "f", "prompt": "x", "seed": null}': "kept",
        '{"prompt": "x"}': "told",
    }
    with Plans(tmp_path) as plans:
        plans.take("\n".join(lines), name="list.jsonl")
        kept = plans.do(plans.store.planning(lambda c: c.execute("SELECT row FROM sources").fetchall()))
        assert kept == [(seq,) for seq, how in enumerate(lines.values(), 1) if how == "kept"]
        given = [list(source.items()) for source in plans.sources()]
        assert given == [list(json.loads(line, parse_float=Decimal).items()) for line in lines]
        # a bought row that asks for something else now is left alone, and is given back as it stands now
        plans.buy()
        changed = [line.replace('"x"', '"z"').replace('"é"', '"z"') for line in lines]
        plans.take("\n".join(changed), name="list.jsonl")
        assert plans.rows()[0].given["prompt"] == "é"
        given = [list(source.items()) for source in plans.sources()[:-1]]
        assert given == [list(json.loads(line, parse_float=Decimal).items()) for line in changed[:-1]]


def test_a_manifest_that_the_system_shows_unchanged_is_not_read_to_be_told(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("prompt\ncat\n")
    job = job_for(path, tool="Retro-Cartoons")
    young = stamp_of(job)
    assert young is not None
    seen, digest, settings = json.loads(young)
    assert seen == []  # a change within this tick of the clock could not be seen
    facts = path.stat()
    system = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_dev, facts.st_ino]
    seen = json.dumps([system, digest, settings])
    marked = json.dumps([system, "a hash that it has not", settings])
    assert stamp_of(job, marked) == marked
    assert not is_same(stamp_of(job.with_overrides(extra="keep"), marked), marked)
    # another time, the same text: read, and the same
    os.utime(path, ns=(1, 1))
    assert is_same(stamp_of(job, seen), seen)
    assert not is_same(stamp_of(job, marked), marked)
    # the same size and time, another text
    path.write_text("prompt\ndog\n")
    os.utime(path, ns=(facts.st_mtime_ns, facts.st_mtime_ns))
    assert not is_same(stamp_of(job, seen), seen)
    # as an earlier version told it
    assert is_same(young, json.dumps([11, 1, digest, settings]))
    assert not is_same(young, "")
    assert not is_same(None, None)


async def test_no_start_passes_over_the_rows_that_rest(tmp_path: Path) -> None:
    store = await planned(tmp_path / "state.sqlite3", [staged(line, id=f"r{line}") for line in range(2, 6)])
    asked: list[str] = []
    await store.planning(lambda connection: connection.set_trace_callback(asked.append))
    for state in (State.IN_FLIGHT, State.FINISHED, State.SUBMITTING, State.IN_DOUBT, State.PLANNED):
        await store.claim(state, limit=2)
    await store.has_work()
    await store.unbought()
    await store.planned_beyond(1)
    await store.states_of(["r2", "r3"])
    await store.failures()
    await store.rejected_rows(after_seq=0, limit=5)
    await store.settled_after(0, limit=5)
    await store.recent_seconds()
    await store.known_task()
    await store.counts()
    await store.requeue(states=[State.FAILED, State.CANCELLED], ids=["r2"])
    await store.planning(lambda connection: connection.set_trace_callback(None))

    def passed_over(connection: sqlite3.Connection) -> list[tuple[str, str]]:
        found = []
        for query in asked:
            if query.startswith(("SELECT", "UPDATE", "INSERT")):
                for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall():
                    if step.startswith("SCAN rows") or "(rowid>?)" in step:
                        found.append((query, step))
        return found

    assert len(asked) > 20
    assert await store.planning(passed_over) == []
    store.close()
